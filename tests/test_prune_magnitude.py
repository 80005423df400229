"""`fastbert prune --magnitude`: which weights become zero, at once, or step by step during training."""

import json

import pytest
import torch

from command_line import run
from compression_models import stopped_after
from fastbert.checkpoint import load_state_dict
from fastbert.compression import prune_magnitude
from fastbert.compression.folders import HISTORY
from fastbert.compression.prune_magnitude import masks_of, matrices, share_at, sparsity, steps_of_ramp
from fastbert.training import run as training_run

pytest_plugins = ("compression_fixtures",)
pytestmark = pytest.mark.once


def test_the_smallest_weights_become_zero():
    """The requested number of weights, the first of equal ones, over all matrices together or in each."""
    weights = {"a": torch.tensor([[1.0, -2.0, 3.0], [-3.0, 3.0, 5.0]]), "b": torch.tensor([[0.0, 9.0], [7.0, -8.0]])}
    together, each = (masks_of(weights, 0.5, scope) for scope in ("global", "layer"))
    assert together["a"].tolist() == [[False, False, False], [False, True, True]]
    assert together["b"].tolist() == [[False, True], [True, True]]
    assert each["a"].tolist() == [[False, False, False], [True, True, True]]
    assert each["b"].tolist() == [[False, True], [False, True]]
    assert all(mask.all() for mask in masks_of(weights, 0.01, "global").values())
    with pytest.raises(ValueError, match="scope must be one of"):
        masks_of(weights, 0.5, "model")


def test_the_share_of_zeros_grows_to_its_full_value_at_the_end_of_the_ramp():
    for steps in (1, 2, 5, 300):
        shares = [share_at(step, steps, 0.8) for step in range(steps + 1)]
        assert shares[0] == 0.0
        assert shares == sorted(shares)
        end = steps_of_ramp(steps)
        assert shares[end:] == [0.8] * (steps + 1 - end)
        assert end == 1 or shares[end - 1] < 0.8
    assert share_at(100, 300, 0.8) == pytest.approx(0.8 * (1 - 0.5**3))


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_folder_with_zeros(teacher, tmp_path, capsys, scope):
    """Only the matrices of the layers have zeros; all else is unchanged."""
    out = tmp_path / "out"
    assert run("prune", teacher, "-o", out, "--magnitude", "0.75", "--scope", scope) == 0
    assert "zeros among the layers' weights: 75.0%" in capsys.readouterr().out
    before, after = load_state_dict(teacher), load_state_dict(out)
    parts = [f"attention.self.{each}" for each in ("query", "key", "value")]
    parts += ["attention.output.dense", "intermediate.dense", "output.dense"]
    names = [f"bert.encoder.layer.{layer}.{part}.weight" for layer in range(3) for part in parts]
    sizes = {name: before[name].abs() for name in before if name in names}
    assert len(sizes) == 18
    for name, t in before.items():
        kept = after[name] != 0
        assert torch.equal(after[name], t * kept if name in sizes else t), name
        if name in sizes and scope == "layer":
            assert kept.sum() == t.numel() // 4
            assert sizes[name][kept].min() >= sizes[name][~kept].max()
    kept = torch.cat([(after[name] != 0).flatten() for name in sizes])
    assert kept.sum() == len(kept) // 4
    if scope == "global":
        joined = torch.cat([size.flatten() for size in sizes.values()])
        assert joined[kept].min() >= joined[~kept].max()
    assert json.loads((out / HISTORY).read_text())["steps"][0]["share of zeros"] == 0.75


def test_zeros_during_a_training_that_is_stopped_and_resumed(teacher, data, tmp_path, capsys, monkeypatch):
    """The kept model has all of its zeros, even if an epoch with fewer was the best one. After a stop in the middle of
    the ramp training continues to the same bits, but not with another share."""
    monkeypatch.setattr(prune_magnitude, "EVERY", 1)
    # the first model counts as the best
    monkeypatch.setattr(training_run, "is_better", lambda value, best: best is None)
    training = ("--train", data, "--eval", data, "--epochs", 3, "--lr", 1e-3)
    command = ["prune", teacher, "--magnitude", "0.75", "--impl", "native", *training]
    assert run(*command, "-o", tmp_path / "whole") == 0
    assert "note: zeros in a matrix" in capsys.readouterr().out
    after = load_state_dict(tmp_path / "whole")
    zeros = matrices(after.items())
    assert sparsity(zeros) == 0.75
    assert not torch.equal(after["classifier.weight"], load_state_dict(teacher)["classifier.weight"])
    records = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [record["best"] for record in records if "scores" in record] == [False, True, False]

    parts = [*command, "-o", tmp_path / "parts", "-q"]
    with monkeypatch.context() as patch:
        stopped_after(patch, 3)
        assert run(*parts) == 130
    assert "the same command with --resume goes on" in capsys.readouterr().err
    assert run(*parts) == 1
    assert "has checkpoints of a run: --resume goes on with it" in capsys.readouterr().err
    assert run(*["0.5" if word == "0.75" else word for word in parts], "--resume") == 1
    assert "share of zeros" in capsys.readouterr().err
    assert run(*parts, "--resume") == 0
    assert (tmp_path / "parts" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    step = json.loads((tmp_path / "parts" / HISTORY).read_text())["steps"][-1]
    assert (step["command"], step["share of zeros"]) == ("prune --train", 0.75)
