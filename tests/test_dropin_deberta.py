"""DeBERTa's second and third version, accelerated, compared with the originals and float64. test_dropin_families.py has
the tests that are the same for all families."""

import copy
import sys
import warnings

import pytest
import torch

import fastbert
from dropin_models import MASKS, WIDTH, assert_gradients, three
from fastbert import functional as F
from fastbert.dropin import distances
from fastbert.dropin.families import FAMILIES
from fastbert.testing import assert_within_budget

transformers = pytest.importorskip("transformers", minversion="5.24", reason="its DeBERTa is accelerated")

SIZES = {
    "vocab_size": 60, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40, "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
}  # fmt: skip
VERSION_3 = {
    "share_att_key": True, "position_buckets": 6, "norm_rel_ebd": "layer_norm", "position_biased_input": False,
    "type_vocab_size": 0,
}  # fmt: skip
VERSION_2 = {"type_vocab_size": 2}
KINDS = {
    "v3": VERSION_3,
    "v2": VERSION_2,
    "c2p": VERSION_2 | {"pos_att_type": ["c2p"]},
    "p2c": VERSION_3 | {"pos_att_type": ["p2c"]},
}  # fmt: skip


def build(head: str = "Model", dropout: float = 0.0, **settings) -> torch.nn.Module:
    config = transformers.DebertaV2Config(**SIZES | settings)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    torch.manual_seed(0)
    model = getattr(transformers, f"DebertaV2{head}")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.1)
    return model


def batch_of(mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 60, (4, WIDTH))
    return {"input_ids": ids} if mask is None else {"input_ids": ids * mask, "attention_mask": mask.long()}


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The names of the operators that ran, of the two."""
    found = []
    for name in ("disentangled_attention", "disentangled_attention_padded"):
        right = getattr(F, name)
        monkeypatch.setattr(
            F, name, lambda *args, name=name, right=right, **kw: found.append(name) or right(*args, **kw)
        )
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_packed(kind, dtype, calls):
    """Without padding, in texts of many lengths: values, hidden states and every gradient."""
    models = ours, plain, truth = three(build(**KINDS[kind]), dtype)
    batch = batch_of(MASKS["right"])
    real = batch["attention_mask"].bool()
    outputs = [model(**batch, output_hidden_states=True) for model in models]
    assert set(calls) == {"disentangled_attention"}
    for number, of_each in enumerate(zip(*(o.hidden_states for o in outputs), strict=True)):
        assert_within_budget(*(state[real] for state in of_each), name=f"state {number}")
    weights = torch.randn(outputs[1].last_hidden_state[real].shape)
    losses = [(o.last_hidden_state[real] * weights.to(o.last_hidden_state.dtype)).sum() for o in outputs]
    assert_gradients(ours, plain, truth, losses)


@pytest.mark.once
@pytest.mark.parametrize("mask", ["right", "left", "holes", "none"])
def test_padding_that_is_read(mask, calls):
    """Padding that is read attends to all columns alike, and has zeros for embeddings."""
    models = three(build(**VERSION_2), padding="exact")
    batch = batch_of(MASKS[mask])
    with torch.no_grad():
        outputs = [model(**batch, output_hidden_states=True) for model in models]
    for of_each in zip(*(o.hidden_states for o in outputs), strict=True):
        assert_within_budget(*of_each)
    assert set(calls) == {"disentangled_attention" if mask == "none" else "disentangled_attention_padded"}


@pytest.mark.once
@pytest.mark.parametrize("width", [3, 9, 40, 130])
@pytest.mark.parametrize(("buckets", "farthest"), [(-1, 40), (8, 40), (256, 512), (8, 512)])
def test_the_row_of_a_distance_is_the_originals(buckets, farthest, width):
    """The rows that the original's code finds, for content to position and for position to content."""
    from transformers.models.deberta_v2 import modeling_deberta_v2 as original

    like = torch.empty(1, width, 8)
    places = original.build_relative_position(like, like, buckets, farthest)[0]
    span = buckets if buckets > 0 else farthest
    rows = torch.arange(width)
    lut, first, last = distances._reachable(buckets, farthest, width, torch.device("cpu"))
    mine = lut[rows[:, None] - rows + width - 1] + first
    assert torch.equal(mine.long(), (places + span).clamp(0, 2 * span - 1))
    # the original gathers these by (key, query) and transposes the result
    assert torch.equal(mine.long(), (-places + span).clamp(0, 2 * span - 1).T)
    assert (lut.min(), lut.max()) == (0, last - first)


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering",
                                  "ForMaskedLM", "ForMultipleChoice"])  # fmt: skip
def test_heads(head):
    models = ours, plain, truth = three(build(head, **VERSION_3), padding="auto")
    batch = batch_of(MASKS["right"])
    labels = {
        "ForSequenceClassification": {"labels": torch.tensor([0, 1, 1, 0])},
        "ForMultipleChoice": {"labels": torch.tensor([0, 1])},
        "ForQuestionAnswering": {"start_positions": torch.zeros(4).long(), "end_positions": torch.ones(4).long()},
    }.get(head, {"labels": torch.where(MASKS["right"], torch.randint(0, 2, (4, WIDTH)), -100)})
    if head == "ForMultipleChoice":
        batch = {name: t.view(2, 2, WIDTH) for name, t in batch.items()}
    losses = [model(**batch, **{name: t.clone() for name, t in labels.items()}).loss for model in models]
    for loss in losses[:2]:
        torch.testing.assert_close(loss.double(), losses[2].double(), rtol=1e-5, atol=1e-5)
    assert_gradients(ours, plain, truth, losses)
    assert "own code:" not in str(fastbert.explain(ours)).replace("its own code;", "")


@pytest.mark.once
def test_dropout_of_the_table():
    """Only this dropout is on: two passes differ, and evaluation draws no random numbers."""
    model = build(**VERSION_3)
    for layer in model.encoder.layer:
        layer.attention.self.pos_dropout.p = 0.4
    ours = fastbert.accelerate(model, impl="native", padding="zero").train()
    batch = batch_of(MASKS["right"])
    with torch.no_grad():
        first, second = (ours(**batch).last_hidden_state for _ in range(2))
        assert not torch.equal(first, second)
        ours.eval()
        state = torch.get_rng_state()
        assert torch.equal(ours(**batch).last_hidden_state, ours(**batch).last_hidden_state)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.once
def test_checkpointing_gives_the_same_gradients():
    model = build(**VERSION_3)
    batch, found = batch_of(MASKS["right"]), []
    for checkpoints in (False, True):
        ours = fastbert.accelerate(copy.deepcopy(model), impl="native", padding="zero").train()
        if checkpoints:
            ours.gradient_checkpointing_enable({"use_reentrant": False})
        (ours(**batch).last_hidden_state ** 2).sum().backward()
        found.append({name: p.grad for name, p in ours.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], msg=name)
    assert found[0]["encoder.rel_embeddings.weight"].any()


@pytest.mark.once
@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"conv_kernel_size": 3}, "has no encoder.conv.conv.weight"),
        ({"embedding_size": 24}, "has no embeddings.embed_proj.weight"),
        ({"relative_attention": False}, "relative_attention is off"),
        ({"pos_att_type": []}, "neither c2p nor p2c"),
    ],
    ids=["convolution", "embeddings_of_another_width", "no_distances", "no_term"],
)
def test_unsupported_settings_are_refused_by_name(settings, why):
    with pytest.warns(UserWarning, match="replaced nothing"):
        model = fastbert.accelerate(build(**VERSION_3 | settings))
    assert why in str(fastbert.explain(model))


@pytest.mark.once
def test_later_changes_are_noticed():
    """Changes of z_steps, and of the terms of a layer."""
    ours, plain, _ = three(build(**VERSION_3))
    batch = batch_of(MASKS["right"])
    with torch.no_grad():
        before = ours(**batch).last_hidden_state
        for model in (ours, plain):
            model.z_steps = 2
        # here transformers 5.24's own code appends to a tuple
        with pytest.warns(UserWarning, match="z_steps of 2"), pytest.raises(AttributeError, match="append"):
            ours(**batch)
        ours.z_steps = plain.z_steps = 0
        assert torch.equal(ours(**batch).last_hidden_state, before)
        for model in (ours, plain):
            model.encoder.layer[0].attention.self.pos_att_type = ["c2p"]
        real = MASKS["right"]
        after = ours(**batch).last_hidden_state
        torch.testing.assert_close(after[real], plain(**batch).last_hidden_state[real], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, after)


@pytest.mark.once
def test_the_first_version_is_left_alone():
    """It computes query, key and value in one product with another layout, which the table does not have."""
    assert "DebertaModel" not in FAMILIES
    config = transformers.DebertaConfig(**SIZES)
    with pytest.warns(UserWarning, match="replaced nothing"):
        fastbert.accelerate(transformers.DebertaModel(config))


@pytest.mark.once
def test_why_it_is_left_alone_under_transformers_4(monkeypatch):
    """`explain` had said that nothing in the model is known."""
    model = build(**VERSION_3)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.6")  # transformers puts itself there anew
    with pytest.warns(UserWarning, match="replaced nothing"):
        fastbert.accelerate(model)
    said = "DebertaV2Model: accelerated under transformers 5 only, this is 4.57.6"
    assert fastbert.explain(model).left == {"(the model)": said}


@pytest.mark.once
def test_saved_and_restored(tmp_path):
    plain = build(**VERSION_3)
    ours = fastbert.accelerate(copy.deepcopy(plain), impl="native", padding="zero")
    batch = batch_of(MASKS["right"])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours.save_pretrained(tmp_path)
        again = transformers.DebertaV2Model.from_pretrained(tmp_path).eval()
        expected = plain(**batch).last_hidden_state
        assert torch.equal(again(**batch).last_hidden_state, expected)
        assert torch.equal(fastbert.restore(ours)(**batch).last_hidden_state, expected)
