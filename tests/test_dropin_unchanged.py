"""Encoders that run their own code, and models that are copied, saved, called and restored as before."""

import copy
import io
import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import fastbert
from dropin_models import MASKS, MODELS, SIZES, WIDTH, assert_gradients, batch_of, build, three
from fastbert.dropin.families import FAMILIES
from fastbert.dropin.forward import Forward

transformers = pytest.importorskip("transformers", reason="its models are accelerated")
pytestmark = pytest.mark.native


# ---- what it leaves to the original ----------------------------------------------------------------------


FALLBACKS = {
    "output_attentions": ("bert", {"output_attentions": True}, "output_attentions was given"),
    "mask_4d": ("bert", {"attention_mask": torch.ones(4, 1, WIDTH, WIDTH).tril().bool()}, r"not \[batch, tokens\]"),
    "encoder_hidden_states": (
        "bert",
        {"encoder_hidden_states": torch.zeros(4, 3, SIZES["hidden_size"])},
        "encoder_hidden_states was",
    ),
    "single_states": ("bert", {"output_hidden_states": 1}, "single states"),
    "rotary_position_ids": ("modernbert", {"position_ids": torch.arange(WIDTH)[None] * 2}, "rotary positions"),
}


@pytest.mark.parametrize(("family", "more", "reason"), FALLBACKS.values(), ids=FALLBACKS.keys())
def test_fallback_warns_once_and_is_the_original(family, more, reason):
    ours, plain, _ = three(build(family))
    batch = batch_of(plain, None) | more
    with torch.no_grad():
        with pytest.warns(UserWarning, match=reason):
            first = ours(**batch)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = ours(**batch)
        expected = plain(**batch)
    for output in (first, again):
        assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
    assert list(first.keys()) == list(expected.keys())
    assert reason.replace("\\", "") in str(fastbert.explain(ours))


def test_a_hook_inside_is_called():
    """Hooks of modules that the fused code does not call must still run."""
    ours, plain, _ = three(build("bert"))
    heard = []
    handle = ours.encoder.layer[1].attention.self.register_forward_hook(lambda *_: heard.append(1))
    with pytest.warns(UserWarning, match="BertSelfAttention has a hook"), torch.no_grad():
        ours(**batch_of(plain, None))
    assert heard
    handle.remove()
    with torch.no_grad():
        ours(**batch_of(plain, None))
    assert len(heard) == 1


def test_a_hook_on_a_linear_layer_sees_what_it_sees_in_the_original():
    ours, plain, _ = three(build("bert"))
    shapes = []
    ours.encoder.layer[0].intermediate.dense.register_forward_hook(lambda _, __, out: shapes.append(out.shape))
    batch = batch_of(plain, MASKS["right"])
    with pytest.warns(UserWarning, match="a Linear has a hook"):
        output = ours(**batch)
    assert torch.equal(output.last_hidden_state, plain(**batch).last_hidden_state)
    assert shapes == [(4, WIDTH, SIZES["intermediate_size"])]
    assert "encoder.layer.0.intermediate.dense" in fastbert.explain(ours).left


def test_too_long_for_the_position_table_raises_as_before():
    ours = fastbert.accelerate(build("bert"), impl="native")
    with pytest.warns(UserWarning, match="41 tokens"), pytest.raises(Exception):  # noqa: B017, PT011
        ours(torch.ones(1, 41, dtype=torch.long))


def test_decoder_is_left_alone():
    model = build("bert", "LMHeadModel", is_decoder=True)
    with pytest.warns(UserWarning, match="replaced nothing"):
        fastbert.accelerate(model, impl="native")
    assert "it is a decoder" in str(fastbert.explain(model))


def test_unknown_model_is_left_alone():
    with pytest.warns(UserWarning, match="replaced nothing"):
        fastbert.accelerate(torch.nn.Linear(2, 2))


def test_bad_impl():
    with pytest.raises(ValueError, match="impl must be one of"):
        fastbert.accelerate(build("bert"), impl="cuda")


# ---- adapters --------------------------------------------------------------------------------------------


class LowRank(torch.nn.Module):
    """A LoRA adapter like PEFT's: a module that wraps and calls a linear layer."""

    def __init__(self, base: torch.nn.Linear):
        super().__init__()
        self.base_layer = base
        self.a = torch.nn.Linear(base.in_features, 2, bias=False)
        self.b = torch.nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.b(self.a(x))


@pytest.mark.parametrize("parts", [("query", "value"), ("dense",)], ids=["query_value", "every_dense"])
def test_adapters_on_linear_layers_are_called(parts):
    model = build("bert")
    for path, module in list(model.named_modules()):
        if path.split(".")[-1] in parts and "pooler" not in path:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, LowRank(module))
    ours, plain, truth = three(model)
    batch = batch_of(plain, MASKS["right"])
    losses = [m(**batch).pooler_output.square().sum() for m in (ours, plain, truth)]
    assert_gradients(ours, plain, truth, losses)
    assert "a LowRank" in str(fastbert.explain(ours))


# ---- the model stays what it was -------------------------------------------------------------------------


@pytest.mark.parametrize("family", MODELS)
def test_restore_is_exact(family):
    plain = build(family, "ForSequenceClassification")
    state = {name: t.clone() for name, t in plain.state_dict().items()}
    parameters = {name: id(p) for name, p in plain.named_parameters()}
    batch = batch_of(plain, MASKS["right"])
    with torch.no_grad():
        before = plain(**batch).logits
        accelerated = fastbert.accelerate(plain, impl="native")
        assert accelerated is plain
        accelerated(**batch)
        assert {name: id(p) for name, p in plain.named_parameters()} == parameters
        assert list(plain.state_dict()) == list(state)
        assert fastbert.restore(plain) is plain
        assert torch.equal(plain(**batch).logits, before)
    assert not any("forward" in m.__dict__ for m in plain.modules())
    assert all(torch.equal(t, state[name]) for name, t in plain.state_dict().items())


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("called", [False, True], ids=["at_first", "after_a_call"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded],
                         ids=["deepcopy", "pickle", "torch.save"])  # fmt: skip
@pytest.mark.parametrize("family", MODELS)
def test_a_copy_is_independent(family, duplicate, called):
    ours = fastbert.accelerate(build(family, "ForSequenceClassification"), impl="native")
    batch = batch_of(ours, MASKS["right"])
    with torch.no_grad():
        if called:
            ours(**batch)
        other = duplicate(ours)
        expected = ours(**batch).logits
        assert torch.equal(other(**batch).logits, expected)
        for p in ours.parameters():
            p.zero_()
        assert torch.equal(other(**batch).logits, expected)
    mine = {id(m) for m in other.modules()}
    forwards = [m.__dict__["forward"] for m in other.modules() if "forward" in m.__dict__]
    assert forwards
    assert all(isinstance(f, Forward) and id(f.module) in mine for f in forwards)


@pytest.mark.parametrize("called", [False, True], ids=["at_first", "after_a_call"])
@pytest.mark.parametrize("family", MODELS)
def test_save_and_load(family, called, tmp_path):
    ours = fastbert.accelerate(build(family, "ForSequenceClassification"), impl="native")
    batch = batch_of(ours, MASKS["right"])
    if called:
        ours(**batch)
    ours.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(ours)
    torch.testing.assert_close(loaded(**batch).logits, ours(**batch).logits, atol=1e-4, rtol=1e-4)
    assert not any("forward" in m.__dict__ for m in loaded.modules())


def test_signature_is_the_original_one():
    import inspect

    model = build("bert")
    before = inspect.signature(model.forward)
    assert inspect.signature(fastbert.accelerate(model, impl="native").forward) == before


def test_tuples():
    ours, plain, _ = three(build("bert"))
    batch = batch_of(plain, MASKS["right"])
    a, b = (m(**batch, return_dict=False, output_hidden_states=True) for m in (ours, plain))
    assert [type(t) for t in a] == [type(t) for t in b]
    for family in ("bert", "mpnet"):
        ours, plain, _ = three(build(family, "ForTokenClassification"))
        a, b = (m(**batch_of(plain, None), return_dict=False) for m in (ours, plain))
        assert [t.shape for t in a] == [t.shape for t in b]


@pytest.mark.parametrize("asked", [None, 0, 1, np.False_])
@pytest.mark.parametrize("by_config", [True, False])
@pytest.mark.parametrize("family", ["bert", "modernbert", "distilbert"])
def test_return_dict_that_is_no_bool(family, by_config, asked):
    """return_dict=0, or None where the config says False: most models of transformers return a tuple only for False
    itself. Accelerated ones returned a tuple for whatever counts as false."""
    ours, plain, _ = three(build(family, return_dict=by_config))
    batch = batch_of(plain, None)
    a, b = (m(**batch, return_dict=asked) for m in (ours, plain))
    assert type(a) is type(b)
    torch.testing.assert_close(a[0], b[0], atol=1e-4, rtol=1e-4)


def test_resized_embeddings_are_used():
    ours = fastbert.accelerate(build("bert", "ForMaskedLM"), impl="native")
    ours.resize_token_embeddings(70)
    plain = fastbert.restore(copy.deepcopy(ours))
    batch = {"input_ids": torch.full((2, 5), 69)}
    torch.testing.assert_close(ours(**batch).logits, plain(**batch).logits)


def test_accelerate_twice_is_accelerate_once():
    model = fastbert.accelerate(fastbert.accelerate(build("bert"), impl="native"), impl="reference")
    assert model.forward.impl == "reference"
    fastbert.restore(model)
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_modernbert_with_its_own_flash_attention_is_left_alone():
    model = build("modernbert")
    if not hasattr(model.layers[0].attn, "rotary_emb"):
        pytest.skip("this transformers has no separate flash attention")
    model.config._attn_implementation = "flash_attention_2"
    assert "runs packed already" in str(fastbert.explain(model))


def test_a_row_with_the_wrong_positions_is_refused(monkeypatch):
    """Data2VecText has BERT's layers and RoBERTa's positions. With a row copied from BERT's, positions were columns,
    and every state was wrong by 4e-2 without an error."""
    row = FAMILIES["RobertaModel"]
    monkeypatch.setitem(FAMILIES, "RobertaModel", replace(row, positions="column"))
    model = build("roberta")
    with pytest.warns(UserWarning, match="padding_idx"):
        fastbert.accelerate(model, impl="native")
    assert "count positions from padding_idx" in str(fastbert.explain(model))


def test_explain_names_every_layer():
    report = fastbert.explain(fastbert.accelerate(build("bert", "ForSequenceClassification"), impl="native"))
    assert report.replaced["bert.encoder.layer.0"] == (
        "BertLayer: q, k, v in one product, attention, feed_forward, add_layer_norm"
    )
    assert "bert.pooler" in report.left
    restored = fastbert.explain(build("bert"))
    assert not restored.replaced
    assert "not accelerated" in str(restored)
