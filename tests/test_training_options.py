"""Options of a training: weights of classes, less memory for activations, TensorBoard."""

import json
import sys
from types import ModuleType

import pytest
import torch

from fastbert.training.features import IGNORED
from fastbert.training.files import DataError
from fastbert.training.labels import class_weights
from fastbert.training.predicting import pack
from training_models import gradients, model_of, run_of, task_of

CPU = torch.device("cpu")


# ---- weights of classes --------------------------------------------------------------------------------------


def test_weights_of_labels():
    labels, counts = ["No", "Yes", "Never"], {0: 6, 1: 2}
    assert class_weights("balanced", labels, counts) == [8 / 12, 8 / 4, 1.0]
    assert class_weights("yes=2.5, NO=.5", labels, counts) == [0.5, 2.5, 1.0]
    assert class_weights("a=b=3", ["a=b", "c"], {}) == [3.0, 1.0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("maybe=2", "'maybe' is none of No, Yes"),
        ("yes=2,YES=3", "'yes' comes twice"),
        ("even", "is none, balanced, or NAME=WEIGHT,..., got 'even'"),
        ("yes=much", "--class-weights: 'yes': expected a number, got 'much'"),
        ("yes=0", "the weight of 'yes' must be above 0, got 0"),
        ("yes=-1", "must be above 0"),
        ("yes=inf", "expected a number, got 'inf'"),
    ],
)
def test_invalid_weights_are_refused(given, message):
    with pytest.raises(DataError, match=message):
        class_weights(given, ["No", "Yes"], {0: 1, 1: 1})


def test_tasks_without_classes_refuse_weights():
    task, _, windows = task_of("qa", count=2)
    with pytest.raises(DataError, match="--class-weights is for classes, and --task qa has none"):
        task.weigh("balanced", windows)


@pytest.mark.parametrize("kind", ["sentence", "token"])
def test_balanced_weights_count_examples_or_words(kind):
    """Pieces of words do not count, and a word in several windows counts once."""
    task, examples, windows = task_of(kind)
    task.weigh("balanced", windows)
    labels = [e.label for e in examples] if kind == "sentence" else [tag for e in examples for tag in e.tags]
    occurring = set(labels)
    for label, weight in zip(task.labels, task.class_weights, strict=True):
        expected = len(labels) / (len(occurring) * labels.count(label)) if label in occurring else 1.0
        assert weight == pytest.approx(expected)
    assert sum(map(task.weight, windows)) == pytest.approx(len(labels)), "the weights add up to the number of labels"


@pytest.mark.parametrize("kind", ["sentence", "token"])
def test_a_weighted_step_is_torchs_weighted_mean_however_it_is_split(kind, tmp_path):
    """In float64, without dropout: loss and gradients are those of torch's cross_entropy over the whole step."""
    options = {"kind": kind, "class_weights": "late=3,early=.25" if kind == "sentence" else "b-x=7,o=.5"}
    plain = run_of(tmp_path, **options)
    task, model = plain.task, plain.model.double().eval()
    step = plain.plan.steps(1)[0]
    chosen = [plain.windows[row] for row in step]
    logits = model(pack(chosen, step, CPU)).logits
    labels = task.arguments(chosen, CPU)["labels"]
    weights = torch.tensor(task.class_weights, dtype=torch.float64)
    assert len(weights.unique()) > 1
    loss = torch.nn.functional.cross_entropy(logits, labels, weights, ignore_index=IGNORED)
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    for batch_tokens in (10**6, 40, 1):
        run = run_of(tmp_path, **options, batch_tokens=batch_tokens)
        run.model.double()
        found = gradients(run, training=False)
        assert float(run.loss_of_step) == pytest.approx(float(loss.detach()))
        for name, truth in expected.items():
            torch.testing.assert_close(found[name], truth, atol=1e-10, rtol=1e-8, msg=name)


def test_class_weights_are_not_part_of_the_state(tmp_path):
    run = run_of(tmp_path, class_weights="balanced")
    assert run.model.class_weights.shape == (2,)
    assert not [name for name in run.model.state_dict() if "class_weights" in name]


# ---- activations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["sentence", "token"])
def test_recomputed_activations_have_the_same_bits(kind, dtype, impl, tmp_path):
    """With dropout. A classifier of the first token computes its last layer only for that token."""
    kept, again = (run_of(tmp_path, kind, dtype=dtype, impl=impl) for _ in range(2))
    again.model.gradient_checkpointing_enable()
    assert again.model.is_gradient_checkpointing
    calls = []
    for layer in again.model.bert.encoder["layer"]:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    expected, found = gradients(kept), gradients(again)
    assert len(calls) == 2 * len(again.model.bert.encoder["layer"]), "each layer runs twice"
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    again.model.gradient_checkpointing_disable()
    assert not again.model.is_gradient_checkpointing


def test_recomputing_activations_saves_memory():
    """The peak of allocated memory in a step of eight layers, as torch's profiler counts it."""
    task, _, windows = task_of("token")

    def peak(checkpointing: bool) -> int:
        model = model_of(task, layers=8).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            batch = pack(windows, range(len(windows)), CPU)
            model(batch, **task.arguments(windows, CPU)).loss.backward()
        now = most = 0
        for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                now += event.nbytes()
                most = max(most, now)
        return most

    assert peak(True) < 0.5 * peak(False)


def test_evaluation_computes_nothing_twice(tmp_path):
    run = run_of(tmp_path)
    run.model.gradient_checkpointing_enable()
    calls = []
    run.model.bert.encoder["layer"][0].register_forward_pre_hook(lambda *_: calls.append(1))
    gradients(run, training=False)
    assert len(calls) == 1


# ---- TensorBoard ---------------------------------------------------------------------------------------------


@pytest.mark.once
def test_scalars_for_tensorboard(tmp_path, monkeypatch):
    from fastbert.training.board import Board

    written, made = [], []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            made.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            made.append("closed")

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run = run_of(tmp_path, evaluated=True)
    with Board(tmp_path / "tensorboard", 0) as board:
        run.report = board.write
        run.train()
    assert made == [(str(tmp_path / "tensorboard"), 1), "closed"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(value, step) for name, value, step in written if name == "train/loss"] == [
        (row["loss"], row["step"]) for row in rows if "loss" in row
    ]
    assert [value for name, value, _ in written if name == "eval/accuracy"] == [
        row["scores"]["accuracy"] for row in rows if "scores" in row
    ]
    with Board(tmp_path / "tensorboard", 5) as board:
        board.write({"step": 6, "scores": {"pearson": None}})
    assert made[2] == (str(tmp_path / "tensorboard"), 6)
    assert written[-1][0] != "eval/pearson", "an undefined score is not written"


@pytest.mark.once
def test_tensorboard_reads_the_files(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the package tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from fastbert.training.board import Board

    with Board(tmp_path, 0) as board:
        for step in (1, 2):
            board.write({"step": step, "loss": 1.0 / step, "lr": 0.1, "grad_norm": 1.0, "tokens_per_second": 9.0})
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 0.5)]
