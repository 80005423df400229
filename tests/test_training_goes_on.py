"""Runs that are resumed from a checkpoint end with the same bits as an uninterrupted run."""

import json
import math
import shutil
from contextlib import suppress
from itertools import pairwise

import pytest
import torch

from fastbert.training.averaging import SNAPSHOTS, WeightAverage
from fastbert.training.loop import TrainingError, forget_after
from fastbert.training.plan import rate
from training_models import losses, run_of, weights


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with a checkpoint after every step: (its folder, its weights)."""
    out = tmp_path_factory.mktemp("whole")
    run = run_of(out, evaluated=True, save_every=1, keep=99)
    run.train()
    return out, weights(run)


def test_the_rate_of_each_step_is_the_schedules(whole):
    rows = [json.loads(line) for line in (whole[0] / "metrics.jsonl").read_text().splitlines()]
    found = [row["lr"] for row in rows if "loss" in row]
    warmup = math.ceil(0.1 * len(found))
    assert found == pytest.approx([1e-3 * rate(step, len(found), warmup) for step in range(len(found))])


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_a_resumed_run_ends_with_the_same_bits(whole, step, tmp_path):
    out, expected = whole
    name = f"step-{step:08d}"
    shutil.copytree(out / "checkpoints" / name, tmp_path / "checkpoints" / name)
    shutil.copy(out / "metrics.jsonl", tmp_path)
    run = run_of(tmp_path, evaluated=True)
    assert run.resume() == step
    forget_after(tmp_path / "metrics.jsonl", step)
    assert [s for s, _ in losses(tmp_path)] == list(range(1, step + 1))
    run.train()
    assert losses(tmp_path) == losses(out)
    for name, p in weights(run).items():
        assert torch.equal(p, expected[name]), name


def test_a_resumed_mean_of_the_weights_has_the_same_bits(tmp_path):
    """Means are evaluated and kept, and a checkpoint holds all that they need; the run itself takes the same steps."""
    kept = {}

    def keeping(name, **options):
        run = run_of(tmp_path / name, evaluated=True, save_every=1, keep=99, **options)
        evaluate = run.evaluate

        def noting(model):
            kept[name] = weights(run)
            return evaluate(model)

        run.evaluate = noting
        return run

    whole, plain = keeping("whole", average=0.5), keeping("plain")
    for run in (whole, plain):
        run.train()
    assert losses(tmp_path / "whole") == losses(tmp_path / "plain")
    assert all(torch.equal(p, weights(plain)[name]) for name, p in weights(whole).items())
    assert not torch.equal(kept["whole"]["classifier.weight"], kept["plain"]["classifier.weight"])
    name = "step-00000003"
    shutil.copytree(tmp_path / "whole" / "checkpoints" / name, tmp_path / "again" / "checkpoints" / name)
    again = keeping("again", average=0.5)
    assert again.resume() == 3
    again.train()
    for name, p in kept["whole"].items():
        assert torch.equal(p, kept["again"][name]), name
    with pytest.raises(TrainingError, match=r"is of a run with average 0\.5, not 0\.0"):
        run_of(tmp_path / "again", evaluated=True).resume()


def test_a_running_mean_forgets_older_weights():
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64, device="cpu")
    average = WeightAverage(model, steps=160, share=0.2)
    assert average.interval == 2
    truth, seen = float(model.weight.detach()), []
    for step in range(1, 81):
        with torch.no_grad():
            model.weight.fill_(float(step * step))
        average.update(step)
        if step % 2 == 0:
            seen.append(step * step)
            truth += (step * step - truth) / min(len(seen), SNAPSHOTS)
            if len(seen) <= SNAPSHOTS:
                assert truth == pytest.approx(sum(seen) / len(seen))
        assert float(average.means["weight"]) == pytest.approx(truth)
    with suppress(KeyError), average.applied():
        assert float(model.weight.detach()) == pytest.approx(truth)
        raise KeyError
    assert float(model.weight.detach()) == 6400.0
    few = WeightAverage(model, steps=20, share=0.2)
    assert (few.interval, few.snapshots) == (1, 4), "four steps are a fifth of the run"
    few.means["weight"].fill_(0.0)
    few.update(20)
    assert float(few.means["weight"]) == 1600.0


def test_a_run_resumed_with_other_batches_differs_only_by_rounding(whole, tmp_path):
    out, _ = whole
    shutil.copytree(out / "checkpoints" / "step-00000003", tmp_path / "checkpoints" / "step-00000003")
    run = run_of(tmp_path, batch_tokens=30)
    run.resume()
    run.train()
    expected = losses(out)[3:]
    assert [loss for _, loss in losses(tmp_path)] == pytest.approx([loss for _, loss in expected], rel=1e-4)
    assert losses(tmp_path) != expected


def test_another_run_is_not_continued(whole, tmp_path):
    shutil.copytree(whole[0] / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises(TrainingError, match=r"is of a run with lr 0.001, not 0.002: go on with the same settings"):
        run_of(tmp_path, lr=2e-3).resume()


def test_a_step_that_float16_skips_does_not_count_for_the_optimiser(tmp_path, monkeypatch):
    """Without bias correction the first counted step moves a parameter by lr * 0.1 / sqrt(0.001)."""
    options = {"dtype": torch.float16, "bias_correction": False, "weight_decay": 0.0, "save_every": 1, "keep": 99}
    run = run_of(tmp_path, **options)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    weight, of_step, places = run.model.classifier.weight, run._gradients, []

    def overflow(step, epoch):
        loss = of_step(step, epoch)
        if run.progress.step < 2:
            weight.grad.fill_(math.inf)
        return loss

    monkeypatch.setattr(run, "_gradients", overflow)
    places.append(weight.detach().clone())
    run.report = lambda record: places.append(weight.detach().clone())
    run.train()
    moved = [float((after - before).abs().max()) for before, after in pairwise(places)]
    assert moved[:2] == [0.0, 0.0]
    lr = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[2])["lr"]
    assert moved[2] == pytest.approx(lr * 0.1 / math.sqrt(0.001), rel=0.02)
    assert run.progress.skipped == 2
    again = run_of(tmp_path, **options)
    again.resume()
    assert again.progress.skipped == 2


def test_the_last_checkpoints_stay_and_incomplete_ones_are_removed(tmp_path):
    (tmp_path / "checkpoints" / ".step-00000002.writing").mkdir(parents=True)
    run = run_of(tmp_path, save_every=1, keep=2)
    assert run.resume() == 0, "an incomplete checkpoint does not count"
    run.train()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        f"step-{run.steps - 1:08d}", f"step-{run.steps:08d}"
    ]  # fmt: skip


def test_a_record_that_was_cut_off_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [row["step"] for row in forget_after(path, 5)] == [1, 2]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
