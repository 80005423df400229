"""ELECTRA: transformers' losses and gradients, sampling, what the discriminator learns, resumed runs."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from fastbert.pretraining.electra import sample
from pretraining_models import run_of

pytestmark = pytest.mark.once


def of_transformers(folder: Path, model):
    """transformers' (generator, discriminator) with our weights and shared embeddings."""
    transformers = pytest.importorskip("transformers", reason="needs the test extra")
    model.save_pretrained(folder, model.state_dict())
    generator = transformers.ElectraForMaskedLM.from_pretrained(folder / "generator").eval()
    discriminator = transformers.ElectraForPreTraining.from_pretrained(folder / "discriminator").eval()
    generator.electra.embeddings = discriminator.electra.embeddings
    generator.generator_lm_head.weight = discriminator.electra.embeddings.word_embeddings.weight
    return generator, discriminator


def test_losses_and_gradients_are_those_of_transformers(tmp_path):
    """As the paper defines them, in float64: the mean over masked tokens, and 50 times the mean over all tokens. The
    shared embeddings get both models' gradients, and no gradient flows back through sampling."""
    run = run_of(tmp_path, "electra", dropout=0.0)
    model = run.model.eval()
    with torch.no_grad():
        model.generator_bias.normal_()
    generator, discriminator = (m.double() for m in of_transformers(tmp_path / "saved", model))
    model.double()
    batch = run.loader(run.plan.steps(0)[0])[0]
    output = model(batch.shown, batch.labels, batch.uniform, batch.guessed, batch.shown.total_tokens)
    output.loss.backward()

    def padded(x, value):
        rows = x.split(list(batch.shown.lengths))
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    real, labels = padded(torch.ones_like(batch.labels), 0), padded(batch.labels, -100)
    shown, guessed = padded(batch.shown.input_ids, 0), labels >= 0
    guesses = generator(shown, attention_mask=real).logits[guessed]
    generated = torch.nn.functional.cross_entropy(guesses, labels[guessed])
    seen = shown.clone()
    seen[guessed] = sample(guesses.detach(), padded(batch.uniform, 0.0)[guessed])
    replaced = guessed & (seen != labels)
    told = discriminator(seen, attention_mask=real).logits[real > 0]
    detected = torch.nn.functional.binary_cross_entropy_with_logits(told, replaced[real > 0].double())
    loss = generated + 50 * detected
    loss.backward()
    for ours, expected in zip(output[:3], (loss, generated, detected), strict=True):
        assert ours.item() == pytest.approx(expected.item(), rel=1e-9)

    theirs = {
        **{f"bert.{name}": p for name, p in discriminator.electra.named_parameters()},
        **{name: p for name, p in discriminator.named_parameters() if name.startswith("discriminator_predictions.")},
        **{name: p for name, p in generator.named_parameters() if name.startswith("generator_predictions.")},
        **{f"generator.{name}": p for name, p in generator.electra.named_parameters() if name.startswith("encoder.")},
        "generator.embeddings.project.weight": generator.electra.embeddings_project.weight,
        "generator.embeddings.project.bias": generator.electra.embeddings_project.bias,
        "generator_bias": generator.generator_lm_head.bias,
    }
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, theirs[name].grad, rtol=1e-6, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_the_discriminator_learns_to_tell(tmp_path):
    """In documents of one letter each, a replaced token is a different letter from most."""
    documents = ("\n".join([" ".join(letter * 8) + " ."] * 8) for letter in "abcdefghij" * 3)
    (tmp_path / "text.txt").write_text("\n\n".join(documents) + "\n")
    run = run_of(tmp_path, "electra", steps=40, dropout=0.0, lr=5e-3, evaluated=True)
    run.evaluate_every = 40
    run.train()
    scores = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["scores"]
    assert scores["detection_auc"] > 0.8


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    first = run_of(whole, "electra", steps=4, save_every=1, keep=9)
    first.train()
    rest.mkdir()
    shutil.copy(whole / "text.txt", rest)
    shutil.copytree(whole / "checkpoints" / "step-00000002", rest / "checkpoints" / "step-00000002")
    second = run_of(rest, "electra", steps=4, workers=1)
    assert second.resume() == 2
    second.train()
    for (name, expected), p in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, expected), name
    lines = [(out / "metrics.jsonl").read_text().splitlines() for out in (whole, rest)]
    of_whole, of_rest = ([json.loads(line)["discriminator_loss"] for line in of] for of in lines)
    assert of_rest == of_whole[2:]


def test_words_are_sampled_as_often_as_the_softmax_says():
    logits = torch.tensor([[0.0, math.log(3.0), -1e4, math.log(4.0), -1e4]]).expand(8000, -1)
    torch.manual_seed(0)
    found = sample(logits, torch.rand(8000, dtype=torch.float64))
    shares = torch.bincount(found, minlength=5) / 8000
    assert shares.tolist() == pytest.approx([1 / 8, 3 / 8, 0, 1 / 2, 0], abs=0.02)
    edges = sample(logits[:2], torch.tensor([0.0, 1 - 2.0**-32], dtype=torch.float64))
    assert edges.tolist() == [0, 3]


def test_electra_is_saved_for_transformers(tmp_path):
    """Both models, and the discriminator's encoder as a BERT."""
    transformers = pytest.importorskip("transformers", reason="needs the test extra")
    run = run_of(tmp_path, "electra", dropout=0.0)
    model = run.model.eval()
    with torch.no_grad():
        model.generator_bias.normal_()
    model.save_pretrained(tmp_path / "saved", model.state_dict())
    batch = run.loader(run.plan.steps(0)[0])[0]
    ids = batch.shown.input_ids[: batch.shown.lengths[0]]
    labels = batch.labels[: len(ids)]
    with torch.no_grad():
        output = model(batch.shown, batch.labels, batch.uniform, 1, 1)
        generator = transformers.ElectraForMaskedLM.from_pretrained(tmp_path / "saved" / "generator").eval()
        guesses = generator(ids[None]).logits[0]
        seen = ids.clone()
        guessed = labels >= 0
        seen[guessed] = sample(guesses[guessed], batch.uniform[: len(ids)][guessed])
        discriminator = transformers.ElectraForPreTraining.from_pretrained(tmp_path / "saved" / "discriminator").eval()
        told = discriminator(seen[None]).logits[0]
        hidden = transformers.AutoModel.from_pretrained(tmp_path / "saved").eval()(seen[None]).last_hidden_state
        own = discriminator.electra(seen[None]).last_hidden_state
    torch.testing.assert_close(told, output.logits[: len(ids)], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(hidden, own, atol=1e-5, rtol=1e-5)
    assert torch.equal(output.replaced[: len(ids)], guessed & (seen != labels))
    with torch.no_grad():
        word = int(batch.labels[batch.labels >= 0][0])
        model.generator_bias[word] = 1e4
        sure = model(batch.shown, batch.labels, batch.uniform, 1, 1)
    assert torch.equal(sure.replaced, (batch.labels >= 0) & (batch.labels != word)), "an original is no replacement"
    assert (batch.labels == word).any()
    assert not output.replaced[batch.labels < 0].any()
