"""The loop: the same gradients however a step is split, and no incomplete checkpoint."""

import contextlib
import copy
import errno
import json
import math
import os
import pickle
import re
import signal
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from fastbert.checkpoint import CheckpointError
from fastbert.testing import allowed_factor, assert_within_budget
from fastbert.training import checkpoints
from fastbert.training.loop import TrainingError
from fastbert.training.metrics import Scores
from fastbert.training.optimizer import GroupedAdamW, depth_of, freeze, groups_of
from fastbert.training.plan import Plan, dropout_seed, rate
from fastbert.training.predicting import pack
from fastbert.training.run import Run
from training_models import KINDS, gradients, losses, model_of, run_of, task_of, weights
from two_processes import run_in_two

# ---- the plan ------------------------------------------------------------------------------------------------


def test_an_epoch_has_every_window_once_in_its_own_order():
    plan = Plan(seed=1, lengths=[3, 9, 4, 4, 20, 1, 7], step_tokens=12, batch_tokens=8)
    orders = [plan.order(epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert orders == [Plan(1, plan.lengths, 99, 99).order(epoch) for epoch in range(3)]
    assert orders[0] != Plan(2, plan.lengths, 12, 8).order(0)
    for step in plan.steps(0):
        assert len(step) == 1 or sum(plan.lengths[w] for w in step) <= 12
    assert [w for step in plan.steps(0) for w in step] == orders[0]
    assert plan.count_steps(2) == [len(plan.steps(0)), len(plan.steps(1))]


@pytest.mark.parametrize("ranks", [1, 2, 3, 9])
def test_ranks_share_a_step_in_equal_numbers_of_batches(ranks):
    plan = Plan(seed=1, lengths=[3, 9, 4, 4, 20, 1, 7], step_tokens=99, batch_tokens=8)
    shares = [plan.batches(plan.order(0), rank, ranks) for rank in range(ranks)]
    assert sorted(w for share in shares for batch in share for w in batch) == list(range(7))
    assert len({len(share) for share in shares}) == 1
    assert all(len(b) <= 1 or sum(plan.lengths[w] for w in b) <= 8 for share in shares for b in share)


def test_seeds_of_dropout_depend_on_the_epoch():
    seeds = {dropout_seed(seed, epoch) for seed in range(4) for epoch in range(4)}
    assert len(seeds) == 16
    assert all(0 <= seed < 2**62 for seed in seeds)


def test_the_rate_rises_to_its_peak_and_falls_to_zero():
    assert [rate(step, 6, 2) for step in range(7)] == pytest.approx([1 / 3, 2 / 3, 1, 3 / 4, 1 / 2, 1 / 4, 0])
    assert [rate(step, 2, 0) for step in range(2)] == [1.0, 0.5]


# ---- gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["native", "reference", pytest.param("triton", marks=pytest.mark.triton)])
@pytest.mark.parametrize("kind", ["sentence", "token", "qa"])
def test_dropout_depends_on_the_name_of_a_window(kind, impl):
    """A window's masks do not depend on the other windows of a batch, nor on its place."""
    task, _, windows = task_of(kind, count=4)
    model = model_of(task, dropout=0.3, impl=impl).train()

    def outputs(rows, names):
        torch.manual_seed(5)
        chosen = [windows[row] for row in rows]
        with torch.no_grad():
            output = model(pack(chosen, names, torch.device("cpu")))
        found = output.start_logits if kind == "qa" else output.logits
        return found.split([1 if kind == "sentence" else len(w.input_ids) for w in chosen])

    together, alone, renamed = outputs([0, 1, 2], [7, 8, 9]), outputs([2], [9]), outputs([2], [10])
    torch.testing.assert_close(together[2], alone[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(renamed[0], alone[0], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_do_not_depend_on_how_a_step_is_cut(kind, tmp_path):
    """With dropout. The divisor is the whole step's, and a window has its own masks."""
    whole = gradients(run_of(tmp_path, kind))
    exact = run_of(tmp_path, kind)
    exact.model.double()
    exact = gradients(exact)
    for batch_tokens in (1, 40):
        parts = gradients(run_of(tmp_path, kind, batch_tokens=batch_tokens))
        for name, truth in exact.items():
            # a shift of all scores does not change a softmax: the gradient of these biases is only rounding
            if name.endswith("attention.self.key.bias") or name == "qa_outputs.bias":
                continue
            error, allowed = ((g[name] - truth).norm() for g in (parts, whole))
            assert error <= 2 * allowed + 1e-6 * truth.norm() + 1e-9, name


class Stopped(Exception):
    pass


@pytest.mark.cpp
@pytest.mark.parametrize("ends", ["at its end", "in an error"])
@pytest.mark.parametrize("kind", KINDS)
def test_deferred_decay_changes_no_bit(kind, ends, tmp_path, monkeypatch):
    """Neither of a loss nor of the weights that an evaluation, a checkpoint or the caller sees."""
    found, deferred = [], []
    for defers in (True, False):
        monkeypatch.setattr(Run, "DEFERS", defers)
        seen, saved = [], Run._save
        monkeypatch.setattr(Run, "_save", lambda run, seen=seen, saved=saved: (seen.append(weights(run)), saved(run)))
        run = run_of(
            tmp_path / str(defers), kind, evaluated=True, dropout=0.0, step_tokens=24, weight_decay=0.5, lr=1e-2,
            evaluations=2, save_every=4, keep=1,
        )  # fmt: skip
        evaluate, record = run.evaluate, run._record

        def evaluated(model, run=run, seen=seen, evaluate=evaluate):
            seen.append(weights(run))
            return evaluate(model)

        def recorded(values, run=run, record=record):
            record(values)
            if run.optimizer._plan.late is not None:
                deferred.append(int(run.optimizer._plan.late.max()))
            if ends == "in an error" and values["step"] == 6:
                raise Stopped

        run.evaluate, run._record = evaluated, recorded
        with contextlib.suppress(Stopped):
            run.train()
        found.append((losses(run.out), [*seen, weights(run)]))
    assert max(deferred) > 2
    (of_ours, ours), (of_plain, plain) = found
    assert of_ours == of_plain
    assert len(ours) == len(plain) >= 2
    for a, b in zip(ours, plain, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_each_epoch_has_other_dropout_masks(tmp_path):
    """An epoch always has the same masks, whatever was computed before."""
    run = run_of(tmp_path)
    step = run.plan.steps(0)[0]

    def of_epoch(epoch):
        run.shared.train()
        run.model.zero_grad()
        run._gradients(step, epoch)
        return run.model.classifier.weight.grad.clone()

    first, second, again = of_epoch(0), of_epoch(1), of_epoch(0)
    assert torch.equal(first, again)
    assert not torch.allclose(first, second, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_whole_steps_gradient_against_the_plain_reference(kind, dtype, tmp_path):
    """As the loop computes it: packed, in several batches, within autocast, with the same dropout. The reference makes
    the same step in the same dtype; its own error against float64 sets the budget. Errors of a parameter are summed
    over all layers and several steps, since those of few numbers depend on chance. (test_heads.py compares heads with
    transformers.)"""
    found = {}
    for who, impl in (("ours", "native"), ("plain", "reference"), ("truth", "reference")):
        precision = torch.float32 if who == "truth" else dtype
        run = run_of(tmp_path, kind, dropout=0.2, impl=impl, dtype=precision, batch_tokens=60)
        run.model.to(torch.float64 if who == "truth" else torch.float32).train()
        of_name = defaultdict(list)
        for epoch, step in [(0, run.plan.steps(0)[0]), *((1, step) for step in run.plan.steps(1)[:3])]:
            run.model.zero_grad()
            run._gradients(step, epoch)
            for name, p in run.model.named_parameters():
                # keys' biases do not change a softmax: their gradient is only rounding
                if not name.endswith("attention.self.key.bias"):
                    place = re.sub(r"layer\.\d", "layer", name) if name.startswith("bert.") else "head"
                    of_name[place].append(p.grad.flatten().double())
        found[who] = {name: torch.cat(gradients) for name, gradients in of_name.items()}
    for name, truth in found["truth"].items():
        factor = allowed_factor(dtype)
        assert_within_budget(found["ours"][name], found["plain"][name], truth, name=name, factor=factor)


def test_frozen_layers_stay_and_the_others_learn(tmp_path):
    run = run_of(tmp_path, epochs=1, freeze=1)
    before = weights(run)
    run.train()
    moved = {name for name, p in weights(run).items() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if not name.startswith(("bert.embeddings.", "bert.encoder.layer.0."))}
    with pytest.raises(ValueError, match="cannot freeze 3 layers of 2"):
        freeze(run.model, 3)


# ---- the optimiser -------------------------------------------------------------------------------------------


def test_groups_of_parameters():
    """Biases and LayerNorms do not decay; each layer's rate is half of that of the layer above."""
    model = model_of(task_of("sentence")[0])
    groups = groups_of(model.named_parameters(), weight_decay=0.1, layer_decay=0.5)
    by_id = {id(p): (group["scale"], group["decay"]) for group in groups for p in group["params"]}
    found = {name: by_id[id(p)] for name, p in model.named_parameters()}
    assert len(found) == sum(len(group["params"]) for group in groups)
    assert found["classifier.weight"] == found["bert.pooler.dense.weight"] == (1.0, 0.1)
    assert found["bert.encoder.layer.1.output.dense.weight"] == (0.5, 0.1)
    assert found["bert.encoder.layer.0.output.LayerNorm.weight"] == (0.25, 0.0)
    assert found["bert.embeddings.word_embeddings.weight"] == (0.125, 0.1)
    assert {decay for name, (_, decay) in found.items() if name.endswith("bias")} == {0.0}
    assert [depth_of(name) for name in ("classifier.bias", "bert.embeddings.LayerNorm.bias")] == [-1, 0]


@pytest.mark.parametrize("corrected", [True, False])
def test_steps_of_the_optimiser(corrected):
    """Compared with the formulas in float64."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    (beta1, beta2), eps, decay = (0.8, 0.95), 1e-3, 0.1
    optimizer = GroupedAdamW([{"params": [p], "scale": 0.5, "decay": decay}], (beta1, beta2), eps, corrected)
    truth, m, v = p.detach().clone(), 0.0, 0.0
    for step in range(1, 6):
        p.grad = torch.randn_like(p)
        m, v = beta1 * m + (1 - beta1) * p.grad, beta2 * v + (1 - beta2) * p.grad**2
        lr = 0.5 * 0.1 * step
        m_hat, v_hat = (m / (1 - beta1**step), v / (1 - beta2**step)) if corrected else (m, v)
        truth = truth - lr * (m_hat / (v_hat.sqrt() + eps) + decay * truth)
        optimizer.set_rate(0.1 * step, step)
        optimizer.step()
        torch.testing.assert_close(p.detach(), truth)


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
def test_a_copied_optimiser_goes_on_with_the_same_bits(way, corrected):
    """Copies and pickles had lost eps and the choice of bias correction, and raised in `set_rate`."""

    def made():
        generator = torch.Generator().manual_seed(0)
        matrix, bias = (torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 37), (37,)))
        groups = [{"params": [matrix], "scale": 0.5, "decay": 0.1}, {"params": [bias], "scale": 1.0, "decay": 0.0}]
        return GroupedAdamW(groups, (0.8, 0.95), 1e-3, corrected)

    def steps(optimizer, first, last):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.clip(1.0)
            optimizer.set_rate(0.1 / step, step)
            optimizer.step()
        return parameters

    optimizer = made()
    parameters = steps(optimizer, 1, 4)
    if way == "state_dict":
        copied = made()
        with torch.no_grad():
            for p, q in zip(steps(copied, 1, 1), parameters, strict=True):
                p.copy_(q)
        copied.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        copied = copy.deepcopy(optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    for p, q in zip(steps(optimizer, 4, 7), steps(copied, 4, 7), strict=True):
        assert p is not q
        assert torch.equal(p, q)
        assert all(torch.equal(value, copied.state[q][name]) for name, value in optimizer.state[p].items())


def test_the_norm_of_the_gradient_is_limited(tmp_path):
    """In the loop, after the first step: the mean of the gradients is (1 - beta1) times a gradient of this norm."""
    run = run_of(tmp_path, clip=1e-3)
    run._step(run.plan.steps(0)[0], 0, [])
    means = [state["exp_avg"].flatten() for state in run.optimizer.state.values()]
    assert float(torch.cat(means).norm()) == pytest.approx(0.1 * 1e-3, rel=1e-3)


# ---- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(number, tmp_path):
    run = run_of(tmp_path)
    run.report = lambda record: os.kill(os.getpid(), number) if record["step"] == 2 else None
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step 3 of \d+, which is saved; .* --resume"):
        run.train()
    assert signal.getsignal(number) is before
    assert run.checkpoints.last().name == "step-00000003"
    assert run_of(tmp_path).resume() == 3


@pytest.mark.parametrize("what", ["loss", "gradient", "parameters"])
def test_values_that_are_not_finite_end_the_run_and_are_not_saved(what, tmp_path, monkeypatch):
    run = run_of(tmp_path, save_every=2)
    of_step = run._gradients

    def spoil(step, epoch):
        loss = of_step(step, epoch)
        if run.progress.step == 3:
            run.model.classifier.bias.grad.fill_(math.inf if what == "gradient" else 0.0)
            if what == "parameters":
                run.model.classifier.bias.data.fill_(math.inf)
        return loss * math.nan if what == "loss" and run.progress.step == 3 else loss

    monkeypatch.setattr(run, "_gradients", spoil)
    says = {
        "loss": "the loss is nan",
        "gradient": "its gradient's norm inf",
        "parameters": "2 parameters are no longer",
    }
    with pytest.raises(TrainingError, match=rf"step 4: .*{says[what]}.*; the last checkpoint is .*step-00000003"):
        run.train()
    again = run_of(tmp_path)
    assert again.resume() == 3
    assert all(torch.isfinite(p).all() for p in weights(again).values())


@pytest.mark.parametrize("moment", ["writing", "reporting", "naming"])
def test_a_full_disk_leaves_the_last_checkpoint(moment, tmp_path, monkeypatch):
    run = run_of(tmp_path, save_every=2)

    def full(*args, **kwargs):
        if moment != "naming":
            (Path(kwargs["checkpoint_id"])).mkdir()
            (Path(kwargs["checkpoint_id"]) / "half").write_text("x")
        error = OSError(errno.ENOSPC, "No space left on device")
        if moment == "reporting":  # torch's writer raises its own error, with the system's as its context
            of_torch = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
            of_torch.__context__ = error
            error = checkpoints.dcp.CheckpointException("write", {0: (of_torch, None)})
        raise error

    def fill(record):
        if record["step"] == 4:
            where, name = (checkpoints.dcp, "save") if moment != "naming" else (checkpoints.os, "fsync")
            monkeypatch.setattr(where, name, full)

    run.report = fill
    with pytest.raises(CheckpointError) as caught:
        run.train()
    assert "step-00000004: No space left on device; the last good checkpoint is" in str(caught.value)
    assert str(caught.value).endswith("step-00000003")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]
    monkeypatch.undo()
    assert run_of(tmp_path, save_every=2).resume() == 3


def test_a_run_ends_when_nothing_gets_better(tmp_path):
    run = run_of(tmp_path, evaluated=True, epochs=6, lr=0.0, patience=2)
    run.train()
    assert run.progress.step == sum(run.steps_of_epochs[:3]), "the first epoch is the best, the next two are not better"
    again = run_of(tmp_path, evaluated=True, epochs=6, lr=0.0, patience=2)
    again.resume()
    again.train()
    assert again.progress.step == run.progress.step, "resuming does not begin another epoch"


@pytest.mark.parametrize(("evaluations", "places"), [(1, [1.0]), (3, [1 / 3, 2 / 3, 1.0]), (99, None)])
def test_evaluations_are_spread_over_an_epoch(evaluations, places, tmp_path):
    run = run_of(tmp_path, epochs=2, evaluations=evaluations)
    values, kept = iter([0.1, 0.3, 0.2] * 20), []
    run.metric, run.evaluate = "accuracy", lambda model: Scores({"accuracy": next(values)}, {})
    run.keep_best = lambda model, scores: kept.append(run.progress.step)
    run.train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    scored, steps = [row["step"] for row in rows if "scores" in row], run.steps_of_epochs[0]
    expected = range(1, steps + 1) if places is None else [math.ceil(steps * place - 1e-9) for place in places]
    assert [step for step in scored if step <= steps] == list(expected)
    assert scored[-1] == sum(run.steps_of_epochs)
    assert kept == scored[:2], "the second evaluation is the best one"


def test_a_model_is_kept_also_where_its_metric_is_undefined(tmp_path):
    """Pearson's correlation of constants is undefined: the last epoch's model is kept, later the best one's."""
    run = run_of(tmp_path, epochs=5)
    values, kept = iter([math.nan, math.nan, 0.2, math.nan, 0.1]), []
    run.metric, run.evaluate = "pearson", lambda model: Scores({"pearson": next(values)}, {})
    run.keep_best = lambda model, scores: kept.append(scores.values["pearson"])
    run.train()
    assert kept == [pytest.approx(value, nan_ok=True) for value in (math.nan, math.nan, 0.2)]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["scores"]["pearson"] for row in rows if "scores" in row] == [None, None, 0.2, None, 0.1]


# ---- several processes ---------------------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_train_as_one_and_one_process_reads_their_checkpoint(how, tmp_path):
    """Tokens of a step are shared unevenly, with dropout and weights of classes; one process reads the last checkpoint.
    The mean of the weights is evaluated; with FSDP2, which keeps gathered weights, the next step used it."""
    run_in_two("training_models.py", tmp_path / "two", "token", how)
    options = {"evaluated": True, "class_weights": "b-x=3,o=.5", "average": 0.5, "evaluations": 2}
    run = run_of(tmp_path / "one", "token", **options)
    run.train()
    expected, found = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-4)
    again = run_of(tmp_path / "two", "token", **options)
    assert again.resume() == run.steps
    for name, p in weights(again).items():
        torch.testing.assert_close(p, dict(run.model.named_parameters())[name].detach(), atol=2e-4, rtol=1e-3)
    for name, mean in again.average.means.items():
        torch.testing.assert_close(mean, run.average.means[name], atol=2e-4, rtol=1e-3)
