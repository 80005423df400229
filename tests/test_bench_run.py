"""A whole benchmark run: it keeps its time limit, survives failing peers, loses no result, and names the machine."""

import json
import os
import re
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import peers, run
from benchmarks.harness import machine, timing  # fmt: skip
from benchmarks.harness.case import Case, Interrupted, Missing, Row, measure
from benchmarks.harness.jobs import Job
from benchmarks.peers import flash_attn, sentence_transformers, torch_compile
from benchmarks.suites import encoder as suite_encoder  # fmt: skip
from benchmarks.suites import kernels as suite_kernels
from fastbert import functional as F
from fastbert.testing import INPUTS, MODELS, Workload, relative_rms

pytestmark = pytest.mark.once

CPU = torch.device("cpu")
CEILINGS = {"gemm_tflops": {"float32": 0.1}, "copy_gbs": 10.0}
EFFORT = timing.Effort(warm_ups=1, least=3, most=6, seconds=0.05, share=0.1)
TINY = Workload(MODELS["tiny"], (5, 17, 1))
ROOT = Path(__file__).parents[1]


def case_of(*rows: Row, name: str = "base_natural") -> Case:
    """A case whose correct result is 1000 ones."""
    ones = torch.ones(1000)
    return Case("kernels", name, rows, lambda: [ones.double()], lambda: [ones], tokens=10)


def sleeper(seconds: float, calls: list | None = None, name: str = ""):
    def run():
        timing.time.sleep(seconds)
        if calls is not None:
            calls.append(name)
        return torch.ones(1000)

    return lambda: run


def measured(case: Case, **options) -> dict[str, dict]:
    return {r["row"]: r for r in measure(case, CPU, EFFORT, CEILINGS, **options)}


# ---- time ------------------------------------------------------------------------------------------------


def test_a_row_over_its_share_of_time_is_skipped_but_ours_is_not(watch):
    """One such row once took 102 s of a run that should last minutes."""
    calls: list[str] = []
    rows = measured(
        case_of(Row("fastbert", "fastbert", sleeper(0.06)), Row("slow", "slow", sleeper(0.06, calls)),
                Row("quick", "quick", sleeper(0.003)))
    )  # fmt: skip
    assert rows["slow"]["status"] == "skipped"
    assert re.fullmatch(r"0\.\d+ s a pass, 3 passes are over the row's share of 0.1 s", rows["slow"]["reason"])
    assert rows["slow"]["seconds"] is None
    assert len(calls) <= 3  # checked, warmed up, and measured once more
    assert (rows["fastbert"]["status"], len(rows["fastbert"]["seconds"])) == ("ok", 3)
    assert rows["quick"]["status"] == "ok"
    assert 3 <= len(rows["quick"]["seconds"]) <= 6


def test_slow_rows_take_fewer_turns_spread_over_all_rounds(watch):
    calls: list[str] = []
    runs = {name: sleeper(0.0, calls, name)() for name in ("slow", "quick")}
    effort = timing.Effort(least=2, most=6, seconds=0.06)
    seconds = timing.interleave(
        runs, timing.Clock(CPU), effort, paces={"slow": timing.Pace(0.03), "quick": timing.Pace(0.01)}
    )
    assert [len(seconds[name]) for name in runs] == [2, 6]
    assert calls == ["quick", "quick", "slow", "quick", "quick", "quick", "slow", "quick"]


def test_no_row_takes_more_than_its_part_of_the_budget():
    assert timing.FULL.within(None) == timing.FULL
    assert timing.FULL.within(60).share == pytest.approx(1.2)
    assert timing.FULL.within(1e6) == timing.FULL


def test_rows_not_reached_before_the_time_limit_are_named(watch):
    over = []
    rows = measured(
        case_of(Row("fastbert", "fastbert", sleeper(0.003)), Row("last", "last", sleeper(0.003, over)),
                Row("late", "late", sleeper(0.003))),
        stop=lambda: bool(over),
    )  # fmt: skip
    assert (rows["late"]["status"], rows["late"]["reason"]) == ("skipped", "the time was up")
    # rows that were ready are timed, just often enough for a median
    assert [len(rows[name]["seconds"]) for name in ("fastbert", "last")] == [3, 3]


# ---- failures --------------------------------------------------------------------------------------------


def failing(after: int, error: BaseException, seconds: float = 0.003):
    left = [after]

    def run():
        left[0] -= 1
        if left[0] < 0:
            raise error
        timing.time.sleep(seconds)
        return torch.ones(1000)

    return lambda: run


@pytest.mark.parametrize("after", [1, 3], ids=["warming up", "being timed"])
def test_peer_that_raises_later_costs_only_its_own_row(after, watch):
    rows = measured(
        case_of(Row("fastbert", "fastbert", sleeper(0.003)),
                Row("bad", "bad", failing(after, RuntimeError("out of memory"))))
    )  # fmt: skip
    assert (rows["bad"]["status"], rows["bad"]["reason"]) == ("failed", "RuntimeError: out of memory")
    assert (rows["bad"]["seconds"], rows["bad"]["ratio_to_ours"]) == (None, None)
    assert rows["fastbert"]["status"] == "ok"


def test_interrupt_inside_a_case_keeps_what_was_timed(watch):
    """The first row has its three times when the second row, in its third round, is interrupted."""
    slow = case_of(
        Row("fastbert", "fastbert", sleeper(0.02)), Row("rude", "rude", failing(4, KeyboardInterrupt(), 0.02))
    )  # fmt: skip
    with pytest.raises(Interrupted) as caught:
        measure(slow, CPU, replace(EFFORT, share=60.0), CEILINGS)
    rows = {r["row"]: r for r in caught.value.rows}
    assert (rows["fastbert"]["status"], len(rows["fastbert"]["seconds"])) == ("ok", 3)
    assert (rows["rude"]["status"], rows["rude"]["reason"]) == ("skipped", "interrupted")


@pytest.fixture
def arguments(monkeypatch):
    monkeypatch.setattr("benchmarks.harness.machine.ceilings", lambda *_: CEILINGS)
    monkeypatch.setattr(timing, "QUICK", EFFORT)
    return ["--suite", "kernels", "--quick", "--dtype", "float32", "--device", "cpu"]


def test_sigterm_writes_what_was_done(arguments, monkeypatch, tmp_path):
    """`timeout` sends SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread only")

    def killed():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        return torch.ones(1000)

    cases = [
        case_of(Row("fastbert", "fastbert", sleeper(0.0)), name="first"),
        case_of(Row("fastbert", "fastbert", lambda: killed), name="second"),
    ]
    monkeypatch.setattr(suite_kernels, "cases", lambda *_: cases)
    before = signal.getsignal(signal.SIGTERM)
    run.main([*arguments, "--out", str(tmp_path / "r.json")])
    assert signal.getsignal(signal.SIGTERM) is before
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["complete"] is False
    assert [(r["workload"], r["status"]) for r in results["rows"]] == [("first", "ok"), ("second", "skipped")]


@pytest.mark.parametrize(
    ("text", "measured_ones"),
    [("auto", "ab"), ("none", ""), ("a", "a"), ("auto,-a", "b"), ("-b", "a")],
)
def test_peers_are_chosen_by_name(text, measured_ones):
    peers = run._peers(text)
    assert "".join(name for name in "ab" if peers(name)) == measured_ones
    assert peers("fastbert")
    assert peers("floor")


# ---- other libraries -------------------------------------------------------------------------------------


def test_another_library_may_have_twice_our_rounding_error():
    """OpenVINO's float32 was 1% beyond twice plain torch's error, and its best row was missing from the comparison."""
    ones = torch.ones(1000)
    off = lambda by: lambda: lambda: ones * (1 + by)  # noqa: E731
    rows = (
        Row("ours", "fastbert", off(1.5e-3)), Row("ours, off", "fastbert", off(3e-3)),
        Row("other", "openvino", off(3e-3)), Row("other, off", "openvino", off(5e-3)),
    )  # fmt: skip
    case = replace(case_of(*rows), plain=lambda: [ones * (1 + 1e-3)])
    assert {name: row["status"] for name, row in measured(case).items()} == {
        "ours": "ok", "ours, off": "wrong", "other": "ok", "other, off": "wrong",
    }  # fmt: skip


def test_tolerance_replaces_the_budget_and_is_written_down():
    """8-bit rows cannot meet a floating-point budget. Such a row states a tolerance, and is compared with that."""
    ones = torch.ones(1000)
    off = lambda by: lambda: lambda: ones * (1 + by)  # noqa: E731
    rows = measured(
        case_of(Row("strict", "a", off(0.05)), Row("int8", "b", off(0.05), tolerance=0.1),
                Row("broken int8", "c", off(0.2), tolerance=0.1))
    )  # fmt: skip
    assert [rows[name]["status"] for name in ("strict", "int8", "broken int8")] == ["wrong", "ok", "wrong"]
    assert rows["int8"]["budget"] == 0.1
    int8 = [row for row in suite_encoder.rows(Job(TINY, torch.float32, CPU), every=True) if "int8" in row.row]
    assert int8
    assert all(row.settings == {"tolerance": row.tolerance} and "tolerance 10%" in row.row for row in int8)


@pytest.mark.parametrize(
    ("lengths", "sizes"), [((8,) * 40, {16, 32}), ((30,) * 40, {4, 8}), ((1500,) * 3, {1})],
    ids=["queries", "sentences", "documents"],
)  # fmt: skip
def test_others_have_batches_that_fit_the_lengths(lengths, sizes):
    """Batches of two queries once made other libraries look four times as slow as they are."""
    job = Job(Workload(MODELS["tiny"], lengths), torch.float32, CPU)
    names = {row.row for row in suite_encoder.rows(job, every=False)}
    for peer in ("transformers sdpa", "openvino", "onnxruntime fp32"):
        assert {f"{peer}, sorted, batches of {n}" for n in sizes} <= names


@pytest.mark.parametrize(
    ("package", "dtype", "count"),
    [("onnxruntime", torch.float32, 4), ("openvino", torch.float32, 4), ("openvino", torch.bfloat16, 4)],
    ids=["onnxruntime fp32 and int8", "openvino fp32", "openvino bf16"],
)
def test_runtimes_agree(package, dtype, count):
    pytest.importorskip(package, reason="a peer that is not installed")
    case = suite_encoder.build("encoder", "base_natural", TINY, 1, False, device=CPU, dtype=dtype)
    rows = measured(case, peers=lambda row: row.peer == package)
    assert len(rows) == count
    assert {r["status"] for r in rows.values()} <= {"ok", "skipped"}, {n: r["reason"] for n, r in rows.items()}
    assert all(r["error"] <= r["budget"] for r in rows.values())


def test_sentence_transformers_flattened_batches():
    """The library's path without padding, on one text at a time, where any attention can replace flash-attention's."""
    pytest.importorskip("sentence_transformers", reason="a peer that is not installed")
    job = Job(TINY, torch.float32, CPU)
    vectors = sentence_transformers.unpadded(1, attention="sdpa")(job)()
    [truth] = job.truth(torch.float64)
    assert relative_rms(vectors, truth) < 1e-6


def test_flash_attn_bert_gets_its_own_names(monkeypatch):
    """remap_state_dict takes transformers' names under `bert.`; the names that it returns lose that prefix."""
    seen = {}

    class Model(torch.nn.Module):
        def __init__(self, config, add_pooling_layer):
            super().__init__()
            seen["config"], seen["pooler"] = config, add_pooling_layer

        def load_state_dict(self, state):
            seen["state"] = state

    class Module:
        BertModel, layer_norm_fn, FusedDense = Model, object(), None

        @staticmethod
        def remap_state_dict(state, config):
            return {name.replace("encoder.layer.", "encoder.layers."): value for name, value in state.items()}

    pytest.importorskip("transformers", reason="a peer that is not installed")
    monkeypatch.setattr(flash_attn, "module_for", lambda *_: Module)
    flash_attn.bert(2)(Job(TINY, torch.float32, CPU))
    assert seen["config"].use_flash_attn
    assert seen["config"].fused_dropout_add_ln
    assert not seen["config"].fused_bias_fc  # its extension is not built
    assert not seen["pooler"]
    assert "encoder.layers.0.attention.self.query.weight" in seen["state"]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_keeps_sequences_apart():
    """Uncompiled, as its documentation checks results; on a GPU the compiled kernel gets the same mask."""
    inputs = INPUTS["attention"](MODELS["tiny"], (5, 130, 1, 17))
    flex = torch_compile._flex(inputs)
    out = flex.back(flex.call(*(flex.there(inputs[name]) for name in "qkv")))
    truth = F.attention(**{k: v.double() if k in "qkv" else v for k, v in inputs.items()}, impl="reference")
    assert relative_rms(out, truth) < 1e-6
    with pytest.raises(Missing, match="no dropout"):
        torch_compile._flex({**inputs, "dropout_p": 0.1})


# rows that must stand beside ours, by device: a part of a row's name, in the tables of models and of attention
ENCODERS = {
    "cpu": ("transformers sdpa, sorted", "transformers sdpa, arrival order", "transformers eager, sorted",
            "transformers eager, arrival order", "nn.TransformerEncoder nested", "torch.compile, frozen",
            "torch.compile max-autotune, frozen", "onnxruntime fp32", "onnxruntime int8", "openvino",
            "matrix products alone"),
    "cuda": ("transformers sdpa, sorted", "transformers sdpa, arrival order", "transformers eager, sorted",
             "transformers eager, arrival order", "transformers flex", "nn.TransformerEncoder nested",
             "torch.compile, transformers sdpa", "torch.compile max-autotune", "torch.compile reduce-overhead",
             "sentence-transformers unpadded", "flash-attn BERT, packed", "matrix products alone", "CUDA graph"),
}  # fmt: skip
ATTENTION = {
    "cpu": ("torch sdpa", "torch sdpa flash", "plain torch"),
    "cuda": ("torch sdpa", "torch sdpa flash", "torch sdpa cudnn", "torch sdpa efficient", "torch varlen",
             "torch flex", "flash-attn", "xformers", "transformer engine", "plain torch"),
}  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("wanted", "table"), [(ENCODERS, "ENCODERS"), (ATTENTION, "ATTENTION")])
def test_all_real_alternatives_are_measured(wanted, table, device):
    entered = [p for p in peers.rows(table) if device in p.devices]
    there = [row.row for p in entered for row in (p.rows() if table == "ENCODERS" else [p])]
    assert [name for name in wanted[device] if not any(name in row for row in there)] == []


def test_a_peer_is_found_without_being_listed(tmp_path, monkeypatch):
    (tmp_path / "slowest.py").write_text(
        "from benchmarks.harness.peer import EncoderPeer\n"
        "from benchmarks.peers.torch import plain\n"
        'ENCODERS = (EncoderPeer("slowest", "slowest", plain, sizes=(1, 2)),)\n'
    )
    monkeypatch.setattr(peers, "__path__", [*peers.__path__, str(tmp_path)])
    case = suite_encoder.build("encoder", "base_natural", TINY, 1, True, device=CPU, dtype=torch.float32)
    found = measured(case, peers=lambda row: row.peer == "slowest")
    assert {name: row["status"] for name, row in found.items()} == {
        "slowest, sorted, batches of 1": "ok", "slowest, sorted, batches of 2": "ok",
    }  # fmt: skip


def test_operators_of_liger_stand_beside_ours_on_gpus():
    for operator in ("add_layer_norm", "linear_cross_entropy"):
        assert [p.devices for p in peers.operators(operator) if p.peer == "liger-kernel"] == [("cuda",)]


@pytest.mark.parametrize(
    ("row", "package"),
    [("flash-attn varlen", "flash-attn"), ("xformers", "xformers"), ("transformer engine", "transformer-engine")],
)
def test_kernels_that_are_not_installed_are_missing_by_name(row, package, monkeypatch):
    for module in ("flash_attn", "xformers", "xformers.ops", "transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("benchmarks.harness.peer.version", lambda package: None)
    (peer,) = (p for p in peers.rows("ATTENTION") if p.row == row)
    inputs = INPUTS["attention"](MODELS["tiny"], (5, 17))
    with pytest.raises(Missing, match=f"^{package} is not installed$"):
        peer.prepare(inputs)


def test_missing_libraries_are_named():
    job = Job(TINY, torch.float32, CPU)
    with pytest.raises(Missing, match=r"flash-attn (is not installed|needs a CUDA device)"):
        flash_attn.bert(2)(job)
    with pytest.raises(Missing, match=r"(sentence-transformers|flash-attn) (is not installed|needs a CUDA device)"):
        sentence_transformers.unpadded(2)(job)


# ---- the machine -----------------------------------------------------------------------------------------


def cpuinfo(vendor: str, family: int, model: int, name: str) -> str:
    one = f"vendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: {name}\nstepping\t: 1\n"
    return f"processor\t: 0\n{one}\nprocessor\t: 1\n{one}\n"


@pytest.mark.parametrize(
    ("vendor", "family", "model", "name", "slug"),
    [
        ("AuthenticAMD", 25, 0x11, "AMD EPYC", "cpu-epyc-zen4"),  # Genoa, its name hidden by a virtual machine
        ("AuthenticAMD", 25, 0xA0, "AMD EPYC 9754 128-Core Processor", "cpu-epyc-zen4"),  # Bergamo
        ("AuthenticAMD", 25, 0x01, "AMD EPYC 7763 64-Core Processor", "cpu-epyc-zen3"),  # Milan
        ("AuthenticAMD", 23, 0x31, "AMD EPYC 7742 64-Core Processor", "cpu-epyc-zen2"),  # Milan
        ("AuthenticAMD", 26, 0x02, "AMD EPYC 9755 128-Core Processor", "cpu-epyc-zen5"),  # Turin, AVX512-BF16 too
        ("AuthenticAMD", 27, 0x00, "AMD EPYC Next", "cpu-amd-epyc-next"),  # an unknown one
        ("AuthenticAMD", 25, 0x61, "AMD Ryzen 9 7950X", "cpu-amd-ryzen-9-7950x"),
        ("GenuineIntel", 6, 0x8F, "Intel(R) Xeon(R) Platinum 8480+", "cpu-intel-xeon-platinum-8480"),
        ("GenuineIntel", 6, 0x8F, "Xeon Clone", "cpu-intel-xeon-clone"),
        ("Somebody", 6, 1, "Fast CPU (TM) 3", "cpu-fast-cpu-3"),
    ],
)
def test_processors_have_folders_of_their_own(vendor, family, model, name, slug):
    assert machine._slug(name, CPU, cpuinfo(vendor, family, model, name)) == slug


def test_gpus_have_folders_of_their_own():
    cuda = torch.device("cuda")
    assert machine._slug("NVIDIA H200", cuda) == "h200"
    assert machine._slug("NVIDIA GeForce RTX 3060", cuda) == "nvidia-geforce-rtx-3060"
