"""Which positions of a padded batch an accelerated model computes: those that are read; the rest is zero."""

import copy

import pytest
import torch
import torch.nn as nn

import fastbert
from dropin_changes import MASK, accelerated, assert_same, batch_of, plain_model
from dropin_models import build

pytestmark = [pytest.mark.native, pytest.mark.filterwarnings("ignore")]


def test_modes_of_padding():
    plain, rows = plain_model(), torch.ones_like(MASK)
    truth = plain(**batch_of())[0]
    exact, zero, auto = (accelerated(plain, mode) for mode in ("exact", "zero", "auto"))
    assert_same(exact, plain, rows)
    for model in (zero, auto):
        got = model(**batch_of())[0]
        assert not got[~MASK].any()
        torch.testing.assert_close(got[MASK], truth[MASK], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("given", ["other_tokens", "embeddings"])
def test_masked_positions_with_content_are_computed(given):
    """Late interaction scores masked tokens; with embeddings as input, the values at masked positions are unknown."""
    plain = plain_model()
    ours, batch = accelerated(plain), batch_of()
    if given == "other_tokens":
        batch["input_ids"] = batch["input_ids"] + 4 * ~MASK
    else:
        batch["inputs_embeds"] = torch.randn(*MASK.shape, 32)
        del batch["input_ids"]
    assert_same(ours, plain, torch.ones_like(MASK), **batch)


def test_the_first_column_is_computed_and_an_empty_sequence_is_the_originals():
    """Poolers read the first column of left-padded batches. Rows without a token are means of all values."""
    plain = plain_model()
    ours = accelerated(plain)
    left = batch_of(MASK.flip(1))
    torch.testing.assert_close(ours(**left)[1], plain(**left)[1], atol=1e-5, rtol=1e-4)
    nothing = batch_of(MASK & torch.tensor([[True], [False], [True]]))
    assert_same(ours, plain, torch.ones_like(MASK), **nothing)


class MeanPooler(nn.Module):
    def forward(self, x):
        return x.mean(1)


HEADS = {
    "labels_at_padding": ("ForTokenClassification", {"labels": torch.ones(3, 9, dtype=torch.long)}, None),
    "every_token": (
        "ForQuestionAnswering",
        {"start_positions": torch.tensor([1, 2, 0]), "end_positions": torch.tensor([3, 3, 0])},
        None,
    ),
    "shown_logits": ("ForTokenClassification", {}, None),
    "own_pooler": (
        "ForSequenceClassification",
        {},
        lambda model: setattr(model.bert, "pooler", MeanPooler()),
    ),
    "hook_on_the_head": (
        "ForTokenClassification",
        {"labels": torch.where(MASK, 1, -100)},
        lambda model: model.dropout.register_forward_hook(lambda module, given, y: y + y.abs().mean()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("called", [False, True], ids=["at_first", "after_a_call"])
@pytest.mark.parametrize("name", HEADS)
def test_heads_get_the_rows_that_they_read(name, called):
    head, labels, change = HEADS[name]
    plain = plain_model(head)
    ours, batch = accelerated(plain), batch_of() | labels
    if called:
        assert_same(ours, plain, ..., **batch)
    if change is not None:
        for model in (ours, plain):
            torch.manual_seed(3)
            change(model)
    assert_same(ours, plain, ..., **batch)


def counting(loss):
    """The same loss, but -100 is a label like any other."""
    return lambda *given, **named: loss(*given[:-1], given[-1].clamp(min=0), **named)


@pytest.mark.parametrize("called", [False, True], ids=["at_first", "after_a_call"])
@pytest.mark.parametrize(
    ("where", "name"), [(nn.CrossEntropyLoss, "forward"), (nn.functional, "cross_entropy")], ids=["class", "function"]
)
def test_a_loss_that_was_replaced_reads_every_row(where, name, called, monkeypatch):
    """The encoder returned zeros for rows whose label is -100, so a loss that counts these had another value."""
    plain = plain_model("ForTokenClassification")
    ours, batch = accelerated(plain), batch_of() | {"labels": torch.where(MASK, 1, -100)}
    before = plain(**batch).loss
    if called:
        torch.testing.assert_close(ours(**batch).loss, before, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(where, name, counting(getattr(where, name)))
    want = plain(**batch).loss
    assert not torch.allclose(want, before, atol=1e-3), "the change changes nothing"
    torch.testing.assert_close(ours(**batch).loss, want, atol=1e-5, rtol=1e-4)
    assert "was replaced" in str(fastbert.explain(ours))


def test_an_encoder_whose_config_asks_for_hidden_states():
    """transformers' heads return what the encoder returns, and both have one config only until somebody copies it. The
    states came back with zeros at padding, since the head's config did not ask for any."""
    plain = plain_model("ForSequenceClassification")
    ours = accelerated(plain)
    for model in (ours, plain):
        model.bert.config = copy.deepcopy(model.bert.config)
        model.bert.config.output_hidden_states = True
    with torch.no_grad():
        got, want = (model(**batch_of()).hidden_states for model in (ours, plain))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("called", [False, True], ids=["at_first", "after_a_call"])
def test_a_loss_function_set_on_a_model_reads_every_row(called):
    """transformers' models have such a property, which newer families call."""
    model = build("modernbert", "ForMaskedLM", local_attention=32)
    if not hasattr(type(model), "loss_function"):
        pytest.skip("this transformers has no loss_function")
    ours, batch = fastbert.accelerate(copy.deepcopy(model), impl="native"), batch_of()
    batch["labels"] = torch.where(MASK, batch["input_ids"], -100)
    before = model(**batch).loss
    if called:
        torch.testing.assert_close(ours(**batch).loss, before, atol=1e-5, rtol=1e-4)
    for m in (ours, model):
        m.loss_function = lambda logits, labels, **_: nn.functional.cross_entropy(
            logits.flatten(0, -2), labels.flatten().clamp(min=0)
        )
    want = model(**batch).loss
    assert not torch.allclose(want, before, atol=1e-3), "the change changes nothing"
    torch.testing.assert_close(ours(**batch).loss, want, atol=1e-5, rtol=1e-4)
