"""Pre-training: the same gradients however a step is split, the same bits with any number of workers and after a break,
and checkpoints that other programs read."""

import json
import math
import re
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbert.pretraining.electra import generator_config, sample
from fastbert.pretraining.objectives import Divisor, MaskedWords, area
from fastbert.pretraining.sizes import NEVER_PREDICTED, config_of
from fastbert.testing import allowed_factor, assert_within_budget
from fastbert.training import loop
from fastbert.training.loop import TrainingError
from pretraining_models import LENGTH, WORDS, gradients, model_of, run_of
from two_processes import run_in_two

OBJECTIVES = ("mlm", "mlm+nsp", "mlm+sop", "electra")


def recorded(out: Path, name: str) -> list:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def losses(out: Path) -> list[float]:
    return recorded(out, "loss")


def weights(run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


# ---- gradients -----------------------------------------------------------------------------------------------


@pytest.mark.native
@pytest.mark.parametrize("objective", ["mlm+nsp", "electra"])
def test_gradients_do_not_depend_on_how_a_step_is_cut(objective, tmp_path):
    """With dropout. Each loss is divided by its count in the whole step, and masks depend only on the example."""
    whole = gradients(run_of(tmp_path, objective))
    exact = run_of(tmp_path, objective)
    exact.model.double()
    exact = gradients(exact)
    for batch_tokens in (1, 100):
        parts = gradients(run_of(tmp_path, objective, batch_tokens=batch_tokens))
        for name, truth in exact.items():
            # a shift of all scores does not change a softmax: the gradient of these biases is only rounding
            if name.endswith("attention.self.key.bias"):
                continue
            error, allowed = ((g[name] - truth).norm() for g in (parts, whole))
            assert error <= 2 * allowed + 1e-6 * truth.norm() + 1e-8, name


@pytest.mark.native
@pytest.mark.parametrize("objective", ["mlm+nsp", "electra"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_steps_gradient_beside_the_plain_reference(objective, dtype, tmp_path):
    """As the loop computes it: packed, in several batches, within autocast, with the same dropout. The reference makes
    the same step in the same dtype; its own error against float64 sets the budget. ELECTRA's replaced words are always
    those that float64 samples, since other words would have another gradient."""
    found, sampled = {}, []
    for who, impl in (("truth", "reference"), ("ours", "native"), ("plain", "reference")):
        run = run_of(
            tmp_path, objective, dropout=0.2, impl=impl, batch_tokens=150,
            dtype=torch.float32 if who == "truth" else dtype,
        )  # fmt: skip
        run.model.to(torch.float64 if who == "truth" else torch.float32).train()
        of_name, given = defaultdict(list), iter(list(sampled))
        if objective == "electra":

            def words(logits, uniform, who=who, given=given):
                if who == "truth":
                    sampled.append(sample(logits, uniform))
                    return sampled[-1]
                return next(given)

            run.model.forward.__globals__["sample"] = words
        try:
            for epoch, step in [(0, run.plan.steps(0)[0]), (1, run.plan.steps(1)[0])]:
                run.model.zero_grad()
                run._gradients(step, epoch)
                for name, p in run.model.named_parameters():
                    if not name.endswith("attention.self.key.bias"):
                        of_name[re.sub(r"layer\.\d", "layer", name)].append(p.grad.flatten().double())
        finally:
            if objective == "electra":
                run.model.forward.__globals__["sample"] = sample
        found[who] = {name: torch.cat(parts) for name, parts in of_name.items()}
    for name, truth in found["truth"].items():
        factor = allowed_factor(dtype)
        assert_within_budget(found["ours"][name], found["plain"][name], truth, name=name, factor=factor)


@pytest.mark.once
def test_the_losses_are_those_of_transformers_and_add_up(tmp_path):
    """The losses of one step without dropout, as one padded batch: the mean over masked words, and over pairs."""
    transformers = pytest.importorskip("transformers", reason="needs the test extra")
    run = run_of(tmp_path, "mlm+nsp", dropout=0.0, batch_tokens=100)
    run.model.eval()
    run.model.save_pretrained(tmp_path / "saved")
    theirs = transformers.BertForPreTraining.from_pretrained(tmp_path / "saved").eval()
    step = run.plan.steps(0)[1]
    total, words, pairs = run._gradients(step, 0).tolist()
    batches = run.loader(step)
    inputs = [(batch.shown, batch.labels, batch.pairs) for batch in batches]
    ids = [row for shown, _, _ in inputs for row in shown.input_ids.split(list(shown.lengths))]
    types = [row for shown, _, _ in inputs for row in shown.token_type_ids.split(list(shown.lengths))]
    labels = [row for shown, of_batch, _ in inputs for row in of_batch.split(list(shown.lengths))]
    pad = torch.nn.utils.rnn.pad_sequence
    with torch.no_grad():
        output = theirs(
            input_ids=pad(ids, batch_first=True), token_type_ids=pad(types, batch_first=True),
            attention_mask=pad([torch.ones_like(row) for row in ids], batch_first=True),
            labels=pad(labels, batch_first=True, padding_value=-100),
            next_sentence_label=torch.cat([of_pairs for _, _, of_pairs in inputs]),
        )  # fmt: skip
    assert total == pytest.approx(float(output.loss), rel=1e-5)
    assert words + pairs == pytest.approx(total, rel=1e-6)
    relation = torch.nn.functional.cross_entropy(
        output.seq_relationship_logits, torch.cat([of_pairs for _, _, of_pairs in inputs])
    )
    assert pairs == pytest.approx(float(relation), rel=1e-5)


@pytest.mark.once
def test_expectation_with_dropout_is_that_of_transformers(tmp_path):
    """Our dropout is a function of seed and place, transformers' uses torch's generator: over many seeds, losses and
    gradients have the same mean. The squared distance of two means is the sum of their variances, except for chance."""
    transformers = pytest.importorskip("transformers", reason="needs the test extra")
    seeds = 60
    run = run_of(tmp_path, "mlm+nsp", dropout=0.2, step_tokens=100)
    run.model.save_pretrained(tmp_path / "saved")
    theirs = transformers.BertForPreTraining.from_pretrained(tmp_path / "saved").train()
    run.model.train()
    batch = run.loader(run.plan.steps(0)[0])[0]
    shown, divisor = batch.shown, Divisor(*batch.sizes())
    inputs = {
        "input_ids": shown.pad(shown.input_ids), "token_type_ids": shown.pad(shown.token_type_ids),
        "attention_mask": shown.pad(torch.ones_like(shown.input_ids)), "labels": shown.pad(batch.labels, -100),
        "next_sentence_label": batch.pairs,
    }  # fmt: skip
    names = [name for name, _ in run.model.named_parameters()]
    means, variances = [], []
    for model in (run.model, theirs):
        parameters = dict(model.named_parameters())
        drawn = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            loss = run.objective.losses(model, batch, divisor)[0] if model is run.model else model(**inputs).loss
            of_seed = torch.autograd.grad(loss, [parameters[name] for name in names])
            drawn.append(torch.cat([loss.detach()[None], *(g.flatten() for g in of_seed)]).double())
        drawn = torch.stack(drawn)
        means.append(drawn.mean(0))
        variances.append(drawn.var(0) / seeds)
    difference, expected = means[0] - means[1], variances[0] + variances[1]
    assert abs(difference[0]) < 4 * expected[0].sqrt(), "the loss"
    assert 0.5 < difference[1:].square().sum() / expected[1:].sum() < 2, "the gradient"
    assert 0.7 < variances[0][1:].sum() / variances[1][1:].sum() < 1.4, "the variances are equal too"


# ---- the same run --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with a checkpoint after every step: (its folder, its weights)."""
    out = tmp_path_factory.mktemp("whole")
    run = run_of(out, save_every=1, keep=99, steps=8)
    run.train()
    return out, weights(run)


@pytest.mark.once
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_no_bit(whole, workers, tmp_path):
    shutil.copy(whole[0] / "text.txt", tmp_path)
    run = run_of(tmp_path, workers=workers, steps=8)
    run.train()
    assert losses(tmp_path) == losses(whole[0])
    for name, p in weights(run).items():
        assert torch.equal(p, whole[1][name]), name
    run.loader.close()


@pytest.mark.once
@pytest.mark.parametrize("step", [2, 7])
def test_a_resumed_run_ends_with_the_same_bits(whole, step, tmp_path):
    """Within its first and its second epoch, as after kill -9: only a checkpoint is left."""
    out, expected = whole
    name = f"step-{step:08d}"
    shutil.copy(out / "text.txt", tmp_path)
    shutil.copytree(out / "checkpoints" / name, tmp_path / "checkpoints" / name)
    run = run_of(tmp_path, steps=8, workers=1)
    assert run.resume() == step
    run.train()
    assert losses(tmp_path) == losses(out)[step:]
    for name, p in weights(run).items():
        assert torch.equal(p, expected[name]), name
    assert len(run.plan.steps(0)) < 7, "the run has more than one epoch"


@pytest.mark.once
def test_other_batches_change_the_curve_only_by_rounding(whole, tmp_path):
    run_of(tmp_path, steps=8, batch_tokens=80).train()
    assert losses(tmp_path) == pytest.approx(losses(whole[0]), rel=1e-4)
    assert losses(tmp_path) != losses(whole[0])


@pytest.mark.once
def test_two_processes_train_as_one(tmp_path):
    """Under DDP and FSDP2: the same masks, so the same curve except for rounding, and the same scores. One process
    then resumes the run of two."""
    objective, one, *both = "mlm+nsp", tmp_path / "one", tmp_path / "ddp", tmp_path / "fsdp"
    run_of(one, objective, evaluated=True).train()
    for two in both:
        two.mkdir()
        shutil.copy(one / "text.txt", two)
        run_of(two, objective)  # makes the corpus
    run_in_two("pretraining_models.py", objective, *both)
    expected = recorded(one, "scores")
    assert len(expected) == 2, "after the third step, and at the end"
    for two in both:
        assert losses(two) == pytest.approx(losses(one), rel=2e-4), two.name
        for ours, theirs in zip(expected, recorded(two, "scores"), strict=True):
            assert ours == pytest.approx(theirs, abs=2e-3), two.name
        rest = tmp_path / f"after-{two.name}"
        shutil.copytree(two / "checkpoints" / "step-00000003", rest / "checkpoints" / "step-00000003")
        shutil.copy(one / "text.txt", rest)
        alone = run_of(rest, objective)
        assert alone.resume() == 3
        alone.train()
        assert losses(rest) == pytest.approx(losses(one)[3:], rel=2e-4), rest.name


@pytest.mark.once
def test_the_first_process_may_read_a_text_for_hours(tmp_path):
    """The others waited for it in a group whose limit is 30 minutes with gloo and 10 with NCCL. Here the limit is a
    second."""
    run_in_two("first_in_turn.py", tmp_path / "file")


@pytest.mark.once
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_each_objective_is_learnt(objective, tmp_path):
    """On repetitive text each loss falls. The records have all losses, and `loss` is their sum."""
    run = run_of(tmp_path, objective, steps=24, dropout=0.0, lr=5e-3, evaluated=True)
    run.evaluate_every = 24
    run.train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    scores = rows[-1]["scores"]
    assert tuple(name for name in rows[0] if name.endswith("_loss")) == run.PARTS
    parts = [rows[0][name] for name in run.PARTS]
    weighted = parts[0] + 50 * parts[1] if objective == "electra" else sum(parts)
    assert rows[0]["loss"] == pytest.approx(weighted, rel=1e-5)
    assert scores[run.PARTS[0]] < 0.95 * parts[0]
    if objective == "electra":
        assert rows[-2]["discriminator_loss"] < parts[1]
        assert scores["detection_auc"] > 0.5
    else:
        assert scores["perplexity"] == pytest.approx(math.exp(scores["masked_loss"]))
        assert 0 < scores["masked_accuracy"] < 1


# ---- steps ---------------------------------------------------------------------------------------------------


@pytest.mark.once
def test_steps_of_a_plan(tmp_path):
    plan = run_of(tmp_path, "mlm", growing=4, step_tokens=300).plan
    assert [plan.tokens_of_step(n) for n in range(6)] == [30, 98, 165, 232, 300, 300]
    assert plan.steps(0)[1:3] == [plan.steps(0)[1], plan.steps(0)[2]]
    assert plan.steps(0)[-1].number == len(plan.steps(0)) - 1
    with pytest.raises(IndexError):
        plan.steps(0)[len(plan.steps(0))]
    rows = [row for step in plan.steps(0) for row in step.rows]
    assert sorted(rows) == list(range(len(plan.epoch(0).examples)))
    for number, step in enumerate(plan.steps(0)):
        assert plan.tokens(step) <= plan.tokens_of_step(number)
        assert plan.tokens(step) > plan.tokens_of_step(number) - LENGTH or number + 1 == len(plan.steps(0))
    assert list(plan.steps(1)) != list(plan.steps(0))
    assert plan.epoch(1).begun == len(plan.steps(0))
    again = run_of(tmp_path, "mlm", growing=4, step_tokens=300).plan
    assert list(again.steps(1)) == list(plan.steps(1)), "whatever was computed before"


@pytest.mark.once
def test_a_run_ends_when_its_time_is_up(tmp_path, monkeypatch):
    """The clock advances by a second at each reading, three times in a step."""
    now = iter(range(10**6))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(now)))
    run = run_of(tmp_path, "mlm", steps=0, seconds=30.0, save_every=4, evaluated=True)
    run.train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [row["lr"] for row in rows if "loss" in row]
    assert len(rates) == 11
    assert rates[2] > rates[1] > rates[0], "it rises for a tenth of the time"
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] > 0
    assert rates[-1] < 0.15 * max(rates)
    assert "scores" in rows[-1]
    again = run_of(tmp_path, "mlm", steps=0, seconds=30.0)
    assert again.resume() == 11
    again.train()
    assert again.progress.step == 11, "no time is left"


@pytest.mark.once
def test_checkpoints_are_as_frequent_as_requested(tmp_path):
    """With epochs of a few steps, not every epoch ends with an evaluation."""
    run = run_of(tmp_path, "mlm", steps=8, save_every=7, keep=9)
    run.train()
    assert len(run.plan.steps(0)) < 7
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000007", "step-00000008"]


@pytest.mark.once
def test_another_run_is_not_continued(whole, tmp_path):
    shutil.copytree(whole[0] / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises(TrainingError, match=r"is of a run with seed 3, not 4: go on with the same settings"):
        run_of(tmp_path, seed=4).resume()


# ---- parts ---------------------------------------------------------------------------------------------------


@pytest.mark.once
def test_rows_that_pad_the_vocabulary_are_never_predicted(tmp_path):
    """Loss and gradient are those of a model without these rows, and training does not change their biases."""
    run = run_of(tmp_path, "mlm", dropout=0.0)
    padded = model_of("mlm", 0.0, rows=len(WORDS) + 6)
    padded.load_state_dict(
        {
            name: t if padded.state_dict()[name].shape == t.shape else torch.cat([t, torch.ones(6, *t.shape[1:])])
            for name, t in run.model.state_dict().items()
        }
    )
    bias = padded.cls["predictions"].bias
    with torch.no_grad():
        bias[len(WORDS) :] = NEVER_PREDICTED
    expected, before = gradients(run), run.loss_of_step
    run.model = run.shared = padded
    found = gradients(run)
    torch.testing.assert_close(run.loss_of_step, before)
    for name, gradient in found.items():
        rows = expected[name].shape[0]
        torch.testing.assert_close(gradient[:rows], expected[name], rtol=1e-4, atol=1e-6)
        assert not gradient[rows:].any()


@pytest.mark.once
def test_sizes(tmp_path):
    config = config_of("mini", 1000, 128, 64, 0.1)
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (4, 256, 4)
    assert (config.intermediate_size, config.vocab_size, config.max_position_embeddings) == (1024, 1024, 512)
    assert config_of("large", 30522, 1024, 1, 0.0).max_position_embeddings == 1024
    config.save_pretrained(tmp_path)
    assert config_of(str(tmp_path / "config.json"), 100, 600, 8, 0.0).max_position_embeddings == 600
    with pytest.raises(RuntimeError, match=r"--config huge: neither one of tiny, mini, .* nor a file"):
        config_of("huge", 100, 128, 8, 0.0)
    widths = [generator_config(config_of(name, 100, 128, 8, 0.0)).hidden_size for name in ("mini", "base", "large")]
    assert widths == [64, 256, 256], "table 6 of the paper, for its small, base and large"


@pytest.mark.once
def test_the_area_under_the_curve():
    """How often a positive's score is above a negative's; ties count half."""
    draw = np.random.default_rng(0)
    for size in (5, 200):
        scores, positive = np.round(draw.normal(size=size), 1), draw.random(size) < 0.4
        positive[:2] = (True, False)
        differences = scores[positive][:, None] - scores[~positive]
        assert area(scores, positive) == pytest.approx(((differences > 0) + 0.5 * (differences == 0)).mean())
    assert math.isnan(area(scores, np.zeros(200, bool)))


@pytest.mark.once
def test_without_masked_words_there_is_no_loss():
    scores = MaskedWords().scores({"guessed": 0, "loss": 0.0, "right": 0}).values
    assert all(math.isnan(value) for value in scores.values())


@pytest.mark.native
def test_tokens_do_not_attend_to_other_documents(tmp_path):
    """An example has the same logits alone and among others: rows of different documents never attend to each other."""
    run = run_of(tmp_path, "mlm", dropout=0.0)
    run.model.eval()
    batch = run.loader(run.plan.steps(0)[0])[0].shown
    with torch.no_grad():
        together = run.model(batch).logits
        alone = run.model(batch.input_ids[: batch.lengths[0]][None]).logits[0]
    torch.testing.assert_close(together[: batch.lengths[0]], alone, atol=1e-4, rtol=1e-4)
