"""Calls of torch's own transformer modules that the fused code leaves to torch, and changes after accelerating."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastbert
from dropin_torch_models import BAND, RIGHT, SLOPE, WIDTH, encoder, three

pytestmark = pytest.mark.native


def test_attention_weights_come_from_torch():
    ours, plain, _ = three(nn.MultiheadAttention(32, 4, batch_first=True).eval())
    x = torch.randn(2, 5, 32)
    with pytest.warns(UserWarning, match="need_weights"):
        y, weights = ours(x, x, x)
    expected = plain(x, x, x)
    assert torch.equal(y, expected[0])
    assert torch.equal(weights, expected[1])


def test_causal_is_left_to_torch():
    ours, plain, _ = three(encoder().eval())
    x, causal = torch.randn(2, 5, 32), nn.Transformer.generate_square_subsequent_mask(5)
    with pytest.warns(UserWarning, match="is_causal=True"):
        y = ours(x, mask=causal, is_causal=True)
    assert torch.equal(y, plain(x, mask=causal, is_causal=True))
    assert "is_causal" in str(fastbert.explain(ours))


def test_is_causal_of_attention_is_left_to_torch():
    """One of torch's own tests failed: with is_causal=True torch ignores the mask, which did not fit. Ours read it."""
    ours, plain, _ = three(nn.MultiheadAttention(32, 4).eval())
    x, other = torch.randn(5, 2, 32), torch.zeros(5, 5)
    with pytest.warns(UserWarning, match="is_causal=True"):
        y, _ = ours(x, x, x, attn_mask=other, need_weights=False, is_causal=True)
    assert torch.equal(y, plain(x, x, x, attn_mask=other, need_weights=False, is_causal=True)[0])


KEYS = torch.zeros(2, 5, 32)


@pytest.mark.filterwarnings("ignore:.*so fastbert leaves")
@pytest.mark.parametrize(
    "wrong",
    [
        {"key": KEYS[0]},
        {"value": KEYS[0]},
        {"value": KEYS[:, :4]},
        {"key": KEYS[:1], "value": KEYS[:1]},
        {"key_padding_mask": torch.zeros(5, dtype=torch.bool)},
        {"key_padding_mask": torch.zeros(1, 5, dtype=torch.bool)},
        {"attn_mask": torch.zeros(5, dtype=torch.bool)},
        {"attn_mask": torch.zeros(1, 5, dtype=torch.bool)},
        {"attn_mask": torch.zeros(4, 5, 5, dtype=torch.bool)},
    ],
    ids=lambda wrong: "_".join((*wrong, *(str(tuple(t.shape)) for t in wrong.values()))),
)
def test_arguments_that_do_not_fit_have_torchs_own_error(wrong):
    """One of torch's own tests failed: two of the errors came from a product instead of torch's checks, and masks of
    one row were broadcast, which torch refuses."""
    ours, plain, _ = three(nn.MultiheadAttention(32, 4, batch_first=True).eval())
    given = {"query": torch.zeros(2, 5, 32), "key": KEYS, "value": KEYS, "need_weights": False} | wrong
    with pytest.raises((AssertionError, RuntimeError)) as expected:
        plain(**given)
    with pytest.raises(type(expected.value), match=re.escape(str(expected.value))):
        ours(**given)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "wrong", [{"mask": BAND[:1]}, {"src_key_padding_mask": RIGHT[:1]}], ids=lambda wrong: next(iter(wrong))
)
def test_masks_of_an_encoder_that_do_not_fit_have_torchs_own_error(wrong):
    ours, plain, _ = three(encoder().train())
    with pytest.raises((AssertionError, RuntimeError)) as expected:
        plain(torch.zeros(3, WIDTH, 32), **wrong)
    with pytest.raises(type(expected.value), match=re.escape(str(expected.value))):
        ours(torch.zeros(3, WIDTH, 32), **wrong)


def test_scripting_says_what_to_do():
    with pytest.raises(AttributeError, match=r"fastbert\.restore"):
        torch.jit.script(fastbert.accelerate(encoder()))


@pytest.mark.filterwarnings("ignore:.*nested")
def test_a_sequence_without_tokens_is_left_to_torch():
    ours, _, _ = three(encoder().train())
    padding = RIGHT.clone()
    padding[1] = True
    with pytest.warns(UserWarning, match="a sequence has no token"):
        ours(torch.randn(3, WIDTH, 32), src_key_padding_mask=padding)


NUMBERS = torch.where(RIGHT, -2.0, 0.0)
OF_FAST_PATH = {
    "numbers": ({"mask": SLOPE}, "treats a mask of numbers as one of bools"),
    "numbers_of_each_head": ({"mask": SLOPE.expand(6, WIDTH, WIDTH).clone()}, "treats a mask of numbers"),
    "numbers_beside_padding": ({"mask": SLOPE, "src_key_padding_mask": RIGHT}, "treats a mask of numbers"),
    "padding_in_numbers": ({"src_key_padding_mask": NUMBERS}, "treats a mask of numbers as one of bools"),
}


@pytest.mark.filterwarnings("ignore:.*so fastbert leaves", "ignore:.*nested", "ignore:Support for mismatched")
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "padded"])
@pytest.mark.parametrize(("masks", "reason"), OF_FAST_PATH.values(), ids=OF_FAST_PATH)
def test_masks_that_torch_reads_otherwise_without_gradients(masks, reason, nested):
    """Without gradients torch takes every number of a mask but 0 for a token that is not seen, where otherwise it adds
    the number. Ours gave the same in both."""
    plain = encoder().eval()
    ours = fastbert.accelerate(copy.deepcopy(plain), impl="native", padding="exact")
    for model in (ours, plain):
        model.use_nested_tensor = nested
    x = torch.randn(3, WIDTH, 32)
    with torch.no_grad():
        got, want = (model(x, **masks) for model in (ours, plain))
    torch.testing.assert_close(got, want, equal_nan=True)
    assert reason in str(fastbert.explain(ours))
    torch.testing.assert_close(ours(x, **masks), plain(x, **masks), atol=1e-5, rtol=1e-4)
    layer = {{"mask": "src_mask"}.get(name, name): mask for name, mask in masks.items()}
    with torch.no_grad():
        got, want = (model.layers[0](x, **layer) for model in (ours, plain))
    torch.testing.assert_close(got, want, equal_nan=True)


def test_padding_in_floats_gives_zeros_where_torch_does():
    """torch's nested path takes 0 and -infinity as it takes bools; ours computed the padding of such a mask."""
    ours, plain, _ = three(encoder(norm=False).eval())
    x, padding = torch.randn(3, WIDTH, 32), torch.where(RIGHT, float("-inf"), 0.0)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(x, src_key_padding_mask=padding), plain(x, src_key_padding_mask=padding), atol=1e-5, rtol=1e-4
        )


@pytest.mark.filterwarnings("ignore:.*so fastbert leaves")
@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "none"])
@pytest.mark.parametrize(
    ("where", "name"),
    [
        (nn.functional, "multi_head_attention_forward"),
        (torch, "_transformer_encoder_layer_fwd"),
        (nn.Linear, "__call__"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_functions_of_torch_that_were_replaced(where, name, gradients, monkeypatch):
    """torch's layers compute by functions of torch that have other names than those of transformers' layers."""
    ours, plain, _ = three(encoder().eval())
    x, original = torch.randn(3, WIDTH, 32), getattr(where, name)

    def louder(*given, **named):
        y = original(*given, **named)
        return y * 1.5 if isinstance(y, torch.Tensor) else (y[0] * 1.5, *y[1:])

    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(ours(x), plain(x), atol=1e-5, rtol=1e-4)
        monkeypatch.setattr(where, name, louder)
        torch.testing.assert_close(ours(x), plain(x), atol=1e-5, rtol=1e-4)


def test_a_hook_inside_is_called():
    ours, _, _ = three(encoder().eval())
    heard = []
    ours.layers[1].norm1.register_forward_hook(lambda *_: heard.append(1))
    ours.layers[0].linear1.register_forward_hook(lambda *_: heard.append(2))
    with pytest.warns(UserWarning, match="LayerNorm has a hook"):
        ours(torch.randn(2, 5, 32))
    assert sorted(heard) == [1, 2]


@pytest.mark.filterwarnings("ignore:.*so fastbert leaves")
def test_pruned_attention_is_computed_anew():
    """A hook on pruned attention computes its weight before each call. The hook did not run, so the weight stayed that
    of the first step, and the second backward pass failed."""
    plain = encoder()
    for layer in plain.layers:
        prune.l1_unstructured(layer.self_attn, "in_proj_weight", 0.5)
    ours = fastbert.accelerate(plain, impl="native")
    optimizer = torch.optim.SGD(ours.parameters(), 0.1)
    x = torch.randn(2, 5, 32)
    for _ in range(2):
        ours(x).square().sum().backward()
        optimizer.step()
    y = ours(x)
    torch.testing.assert_close(y, fastbert.restore(ours)(x))


@pytest.mark.filterwarnings("ignore:.*so fastbert leaves")
def test_attention_alone_in_training_mode():
    """Here torch's inference path applies no dropout, but its other path does."""
    ours = fastbert.accelerate(encoder(dropout=0.5).eval(), impl="native")
    ours.layers[0].self_attn.train()
    x = torch.randn(2, 5, 32)
    assert not torch.equal(ours(x), ours(x))
    with torch.no_grad():
        assert torch.equal(ours(x), ours(x))


@pytest.mark.parametrize("change", ["tanh", "changed_later"])
def test_an_activation_that_torch_takes_for_another_is_left_to_torch(change):
    """In inference torch computes the erf GELU for nn.GELU("tanh"), and ReLU after ReLU was replaced by another
    function. An accelerated model gives the same results in both modes."""
    plain = encoder(activation=nn.GELU("tanh") if change == "tanh" else "relu").eval()
    if change == "changed_later":
        for layer in plain.layers:
            layer.activation = nn.SiLU()
    ours, x = fastbert.accelerate(copy.deepcopy(plain), impl="native"), torch.randn(3, WIDTH, 32)
    with_gradients = plain(x)
    with torch.no_grad():
        assert not torch.allclose(plain(x), with_gradients, atol=1e-5), "torch computes one function: remove this rule"
        assert torch.equal(ours(x), plain(x))
    assert torch.equal(ours(x), with_gradients)
    assert "fast path treats its activation as" in str(fastbert.explain(ours))


@pytest.mark.filterwarnings("ignore:.*so fastbert leaves")
def test_spectral_norm_of_attention_takes_as_many_steps():
    """In training each reading of such a weight is a step of the power iteration; the fused code read it twice."""
    plain = encoder()
    for part, name in ((plain.layers[0].self_attn, "in_proj_weight"), (plain.layers[1].self_attn.out_proj, "weight")):
        parametrizations.spectral_norm(part, name)
    ours, x = fastbert.accelerate(copy.deepcopy(plain), impl="native"), torch.randn(3, WIDTH, 32)
    for _ in range(2):
        torch.testing.assert_close(ours(x), plain(x))
    for (name, one), (_, other) in zip(ours.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(one, other), name


class Backwards(nn.ModuleList):
    def __iter__(self):
        return reversed([*super().__iter__()])


def list_of_another_class(model):
    model.layers = Backwards(model.layers)


def activation_in_place(model):
    for layer in model.layers:
        layer.activation.approximate = "tanh"


def norms_first(model):
    for layer in model.layers:
        layer.norm_first = True


def more_heads(model):
    for layer in model.layers:
        layer.self_attn.num_heads, layer.self_attn.head_dim = 4, 8


@pytest.mark.parametrize("change", [list_of_another_class, activation_in_place, norms_first, more_heads])
@pytest.mark.filterwarnings("ignore:.*so fastbert leaves")
def test_changes_after_a_call_take_effect(change):
    """Layers ran in torch's order, and an activation was that of the first call."""
    plain = encoder(activation=nn.GELU()).eval()
    ours, x = fastbert.accelerate(copy.deepcopy(plain), impl="native"), torch.randn(3, WIDTH, 32)
    before = ours(x)
    for model in (plain, ours):
        change(model)
    assert not torch.allclose(plain(x), before, atol=1e-4), "the change changes nothing"
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(ours(x), plain(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("made", ["encoder", "layer", "attention"])
def test_autocast_on_a_cpu_gives_torchs_dtype(made, grad):
    """Within autocast, torch's encoders return bfloat16 in inference, float32 with gradients."""
    plain = {
        "encoder": encoder,
        "layer": lambda: encoder().layers[0],
        "attention": lambda: encoder().layers[0].self_attn,
    }[made]().eval()
    ours, x = fastbert.accelerate(copy.deepcopy(plain), impl="native"), torch.randn(3, WIDTH, 32)
    given, more = ((x, x, x), {"need_weights": False}) if made == "attention" else ((x,), {})
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        found, expected = (model(*given, **more) for model in (ours, plain))
    if made == "attention":
        found, expected = found[0], expected[0]
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
