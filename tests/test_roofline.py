"""Costs compared with torch's counter and with real tensors, floors worked out by hand, and the printed table."""

import json

import pytest
import torch
import torch.nn.functional as tf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import costs, machine
from benchmarks.harness.plain_bert import PlainBert
from benchmarks.inspection import operator_times, roofline
from fastbert import functional as F
from fastbert.config import BertConfig
from fastbert.models.bert import BertModel
from fastbert.testing import INPUTS, MODELS, WORKLOADS, Workload

pytestmark = pytest.mark.once

TINY = MODELS["tiny"]
RAGGED = Workload(TINY, (5, 31, 2, 12))
FULL = Workload(TINY, (20,) * 3)  # one length: padded and packed tokens are equal
CEILINGS = {"gemm_tflops": {"float32": 0.1, "bfloat16": 0.4}, "copy_gbs": 20.0, "source": "invented"}


def counted(call) -> float:
    """FLOPs by torch's counter, which knows products, but not a CPU's fused attention."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


def recomputed(workload: Workload) -> float:
    """By convention each layer's backward pass computes q k^T again; plain torch stores the probabilities instead."""
    return workload.model.layers * costs.attention_flops(workload) / 2


# ---- FLOPs -----------------------------------------------------------------------------------------------


def plain_bert(trained: bool) -> PlainBert:
    config = BertConfig(
        vocab_size=TINY.vocab, hidden_size=TINY.hidden, num_hidden_layers=TINY.layers,
        num_attention_heads=TINY.heads, intermediate_size=TINY.intermediate, max_position_embeddings=64,
    )  # fmt: skip
    state = BertModel(config, add_pooling_layer=False).state_dict()
    return PlainBert(state, TINY.layers, TINY.heads).requires_grad_(trained)


def test_flops_of_a_forward_pass_are_those_of_plain_torch():
    ids = torch.ones(len(FULL.lengths), FULL.lengths[0], dtype=torch.long)
    model = plain_bert(trained=False)
    assert costs.encoder_flops(FULL) == counted(lambda: model(ids, ids))


def test_flops_of_a_training_step_are_those_of_plain_torch():
    ids = torch.ones(len(FULL.lengths), FULL.lengths[0], dtype=torch.long)
    model, n = plain_bert(trained=True), costs.masked(FULL.tokens)
    dense = torch.nn.Linear(TINY.hidden, TINY.hidden)

    def step():
        rows = tf.gelu(dense(model(ids, ids).flatten(0, 1)[:n]))
        logits = tf.linear(tf.layer_norm(rows, rows.shape[1:]), model.weights["embeddings/word_embeddings/weight"])
        tf.cross_entropy(logits, torch.zeros(n, dtype=torch.long)).backward()

    ours = sum(cost.work.flops for cost in costs.of_model(FULL, torch.float32, training=True))
    assert ours - recomputed(FULL) == counted(step)


@pytest.mark.parametrize("op", ["attention", "add_layer_norm", "feed_forward", "linear_cross_entropy", "pool"])
def test_flops_of_operators_are_those_of_the_reference(op):
    """For uneven lengths: padding would show as too many products."""
    inputs = INPUTS[op](TINY, RAGGED.lengths)
    leaves = {k: v.requires_grad_() for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    kept = []
    forward, backward = costs.of_operator(op, RAGGED, 4, training=True)
    if op == "linear_cross_entropy":  # the reference also multiplies rows without a label
        forward, backward = costs.cross_entropy(RAGGED.tokens, TINY, 4)
    assert counted(lambda: kept.append(getattr(F, op)(**inputs, impl="reference"))) == forward.flops
    again = costs.attention_flops(RAGGED) / 2 if op == "attention" else 0
    got = counted(lambda: torch.autograd.grad(kept[0].sum(), list(leaves.values()), allow_unused=True))
    assert got == backward.flops - again


def test_backward_attention_is_counted_as_torch_counts_its_fused_kernels():
    """q k^T is computed again, so it costs 2.5 times the forward pass."""
    counter = pytest.importorskip("torch.utils.flop_counter").sdpa_backward_flop_count
    shapes = [(1, TINY.heads, n, TINY.head_dim) for n in RAGGED.lengths]
    assert costs.attention(RAGGED, 2)[1].flops == sum(counter(shape, shape, shape, shape) for shape in shapes)


def test_rows_without_a_label_cost_nothing():
    forward, _ = costs.of_operator("linear_cross_entropy", RAGGED, 4, training=False)
    labels = INPUTS["linear_cross_entropy"](TINY, RAGGED.lengths)["labels"]
    assert forward.flops == 2 * int((labels >= 0).sum()) * TINY.hidden * TINY.vocab


# ---- bytes and floors ------------------------------------------------------------------------------------


def matrices(tensors) -> int:
    """Bytes of the tensors with rows; biases, ids and lengths are left out."""
    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point() and t.dim() > 1)


@pytest.mark.parametrize("op", ["attention", "add_layer_norm", "feed_forward", "pool"])
def test_forward_bytes_are_those_of_inputs_and_outputs(op):
    inputs = INPUTS[op](TINY, RAGGED.lengths)
    inner = 2 * RAGGED.tokens * TINY.intermediate * 4 if op == "feed_forward" else 0  # written and read again
    forward, _ = costs.of_operator(op, RAGGED, 4, training=False)
    assert forward.bytes == matrices([*inputs.values(), getattr(F, op)(**inputs, impl="reference")]) + inner


@pytest.mark.parametrize("op", ["attention", "add_layer_norm", "pool"])
def test_backward_bytes_are_those_of_upstream_inputs_and_gradients(op):
    inputs = INPUTS[op](TINY, RAGGED.lengths)
    out = getattr(F, op)(**inputs, impl="reference")
    moved = 2 * matrices(inputs.values()) + matrices([out])  # inputs, their gradients, dy
    if op == "attention":
        moved += matrices([out])  # o, for the sums of o * do
    if op == "add_layer_norm":
        moved -= matrices([inputs["residual"]])  # x and residual have one gradient
    if op == "pool":
        moved -= matrices([inputs["x"]])  # a mean does not need x
    assert costs.of_operator(op, RAGGED, 4, training=True)[1].bytes == moved
    if op == "add_layer_norm":
        dropped = costs.of_operator(op, RAGGED, 4, training=True, dropout=True)[1]
        assert dropped.bytes == moved + matrices([inputs["residual"]])


def test_linear_reads_and_writes_each_matrix_once():
    forward, backward = costs.linear(10, 3, 5, 2)
    assert (forward.flops, forward.bytes) == (2 * 10 * 3 * 5, 2 * (10 * 3 + 3 * 5 + 10 * 5))
    assert (backward.flops, backward.bytes) == (4 * 10 * 3 * 5, 2 * (10 * 5 + 2 * 10 * 3 + 2 * 3 * 5))


def test_floors_by_hand():
    """The figures in the kernels' docstrings: 16,384 tokens of BERT-base in bfloat16 at 790 TFLOP/s and 4.3 TB/s."""
    rows = {
        (cost.operator, cost.direction, cost.part): (*cost.floor(790, 4300), cost.count)
        for cost in costs.of_model(Workload(MODELS["base"], (512,) * 32), torch.bfloat16, training=True)
    }
    seconds, bound, count = rows["add_layer_norm", "forward", ""]
    assert (round(1e6 * seconds / count), bound) == (18, "memory")
    seconds, bound, count = rows["add_layer_norm", "backward", ""]
    assert (round(1e6 * seconds / count), bound) == (23, "memory")
    up, down = (rows["feed_forward", "forward", part] for part in ("up", "down"))
    assert (round(1e6 * (up[0] + down[0]) / up[2]), up[1]) == (196, "matrix")


def test_each_batch_reads_the_weights_again():
    whole = Workload(TINY, (64, 64))
    (one,), two = [whole], [Workload(TINY, (64,)), Workload(TINY, (64,))]
    weights = TINY.layers * 3 * TINY.hidden**2 * 4
    of = lambda batches: {c.operator: c.work for c in costs.of_batches(batches, torch.float32)}  # noqa: E731
    assert of(two)["qkv"].flops == of([one])["qkv"].flops
    assert of(two)["qkv"].bytes == of([one])["qkv"].bytes + weights
    assert of(two)["attention"] == of([one])["attention"]


# ---- the command -----------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    """A workload small enough to be timed here, with PyTorch's operators; the interpreter would take a minute."""
    monkeypatch.setattr("fastbert.functional._choice.why_not_triton", lambda device: "not in this test")
    monkeypatch.setitem(WORKLOADS, "tiny_ragged", RAGGED)
    monkeypatch.setattr(machine, "ceilings", lambda *_: {k: v for k, v in CEILINGS.items() if k != "source"})
    return ["--workload", "tiny_ragged", "--quick", "--device", "cpu", "--dtype", "float32"]


@pytest.mark.parametrize("training", [False, True])
def test_on_this_device_every_operator_and_the_model_are_timed(tiny, training, tmp_path, capsys):
    out = tmp_path / "r.json"
    assert roofline.main([*tiny, "--json", str(out), *(["--training"] if training else [])]) == 0
    found = json.loads(out.read_text())
    assert found["schema"] == roofline.SCHEMA
    assert all(row["measured_s"] > 0 and row["over_floor"] > 0 for row in found["operators"])
    assert sum(row["share"] for row in found["operators"]) == pytest.approx(1)
    assert found["sum"]["measured_s"] == pytest.approx(sum(row["measured_s"] for row in found["operators"]))
    assert found["whole"]["measured_s"] > 0
    printed = capsys.readouterr().out
    assert ("loss" in printed, "pool" in printed) == (training, not training)
    assert "measured in the same run" in printed
    assert roofline.main(["--result", str(out)]) == 0
    assert capsys.readouterr().out == printed


def test_time_above_the_floor_shows_where_it_is_spent(tiny, watch, monkeypatch):
    """An attention that sleeps adds this time for each layer, and changes no other operator."""
    attention = F.attention

    def slow(*args, **options):
        watch.sleep(0.03)
        return attention(*args, **options)

    monkeypatch.setattr(F, "attention", slow)
    monkeypatch.setattr(operator_times.timing, "SHORT", 0.0)  # no need to repeat short calls
    args = [RAGGED], torch.device("cpu"), torch.float32, False, operator_times.timing.QUICK
    rows = roofline.operators([RAGGED], torch.float32, False, CEILINGS)
    roofline.add_times(rows, operator_times.measure(*args))
    measured = {row["operator"]: row["measured_s"] for row in rows}
    assert measured["attention"] > 0.03 * TINY.layers
    assert max(measured, key=measured.get) == "attention"


def test_for_another_device_there_are_floors_without_times(capsys, tmp_path):
    out = tmp_path / "r.json"
    assert roofline.main(["--workload", "large_512", "--device", "h200", "--training", "--json", str(out)]) == 0
    assert "not measured here" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["measured_in"] is None
    assert found["whole"] is None
    assert {row["measured_s"] for row in found["operators"]} == {None}


def test_ceilings_may_be_given(capsys):
    roofline.main(["--device", "h200", "--ceilings", "100,1000"])
    printed = capsys.readouterr().out
    assert "100 TFLOP/s, 1,000 GB/s, as given by --ceilings" in printed
    for wrong in (["--ceilings", "fast"], ["--device", "h300"], ["--workload", "tall"]):
        with pytest.raises(SystemExit):
            roofline.main(wrong)
    with pytest.raises(SystemExit):  # no ceiling is known for this device
        roofline.main(["--device", "h200", "--dtype", "float32"])


def result_row(operator: str, direction: str, seconds: list[float], tokens: int = 38, **more) -> dict:
    return {
        "suite": "kernels", "peer": "fastbert", "status": "ok", "workload": "tiny_ragged", "dtype": "float32",
        "operator": operator, "direction": direction, "tokens": tokens, "seconds": seconds, "shape": {},
    } | more  # fmt: skip


def test_times_from_a_result_file(tiny, tmp_path):
    """Scaled to the file's tokens. The backward time is that of both directions less forward. No peers, no dropout."""
    rows = [
        result_row("attention", "forward", [0.1, 0.1, 0.3]),
        result_row("attention", "forward+backward", [0.5, 0.4, 0.3]),
        result_row("attention", "forward", [9.0], shape={"dropout_p": 0.1}),
        result_row("add_layer_norm", "forward", [9.0], peer="torch"),
        result_row("add_layer_norm", "forward", [0.01]),
        result_row("pool", "forward", [9.0], tokens=37),
    ]
    path = tmp_path / "bench.json"
    path.write_text(
        json.dumps(
            {"schema": "fastbert-bench/1", "device": {"type": "cpu", "name": "C"}, "ceilings": CEILINGS, "rows": rows}
        )
    )
    out = tmp_path / "r.json"
    args = ["--workload", "tiny_ragged", "--dtype", "float32", "--result", str(path), "--training", "--json", str(out)]
    assert roofline.main(args) == 0
    found = json.loads(out.read_text())
    assert found["shape"]["tokens"] == 38
    measured = {(r["operator"], r["direction"]): r["measured_s"] for r in found["operators"] if r["measured_s"]}
    layers = TINY.layers
    assert measured == pytest.approx(
        {
            ("attention", "forward"): 0.1 * layers,
            ("attention", "backward"): 0.3 * layers,
            ("add_layer_norm", "forward"): 0.01 * 2 * layers,
        }
    )
    assert found["sum"]["measured_s"] is None
    with pytest.raises(SystemExit):
        roofline.main(["--workload", "base_512", "--result", str(path)])


def test_floors_for_the_device_of_a_result_file(tiny, tmp_path, capsys):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"device": {"type": "cuda", "name": "Card"}, "ceilings": CEILINGS, "rows": []}))
    assert roofline.main(["--workload", "tiny_ragged", "--device", str(path)]) == 0
    assert "Card: 0.4 TFLOP/s, 20 GB/s, from bench.json" in capsys.readouterr().out


def test_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="draws pictures")
    for n, args in enumerate((["--training"], [])):
        path = tmp_path / f"{n}.png"
        assert roofline.main(["--device", "h200", "--plot", str(path), *args]) == 0
        assert path.stat().st_size > 10_000
