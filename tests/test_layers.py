"""The building blocks compared with torch's own, and what they refuse."""

import copy

import pytest
import torch
from torch import nn

from fastbert.layers import (
    AddLayerNorm,
    EncoderLayer,
    FeedForward,
    FusedLinears,
    JoinedLinears,
    MultiheadAttention,
    prepack,
)
from fastbert.testing import assert_within_budget

IMPLS = ["native", "triton"]
CASES = {
    "self": (3, {}, {}),
    "cross": (2, {}, {}),
    "unbatched": (3, {}, {"unbatched": True}),
    "sequence_first": (3, {"batch_first": False}, {}),
    "other_widths": (2, {"kdim": 24, "vdim": 24}, {}),
    "no_bias": (3, {"bias": False}, {}),
    "padding": (3, {}, {"key_padding_mask": torch.arange(7) >= torch.tensor([7, 2])[:, None]}),
    "padding_float": (3, {}, {"key_padding_mask": torch.randn(2, 7)}),
    "mask": (3, {}, {"attn_mask": torch.ones(7, 7).triu(2).bool()}),
    "mask_of_heads": (3, {}, {"attn_mask": torch.randn(8, 7, 7)}),
    "both": (3, {}, {"attn_mask": torch.ones(7, 7).triu(2).bool(),
                     "key_padding_mask": torch.arange(7) >= torch.tensor([7, 2])[:, None]}),
}  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("same", "options", "more"), CASES.values(), ids=CASES.keys())
def test_multi_head_attention_is_torchs(same, options, more, impl):
    more = dict(more)
    unbatched = more.pop("unbatched", False)
    theirs = nn.MultiheadAttention(32, 4, **{"batch_first": True, **options})
    ours = MultiheadAttention(32, 4, **{"batch_first": True, **options})
    ours.load_state_dict(theirs.state_dict())
    ours.impl = impl
    x, memory = torch.randn(2, 7, 32), torch.randn(2, 7, options.get("kdim", 32))
    if unbatched:
        x, memory = x[0], memory[0]
    elif not ours.batch_first:
        x, memory = x.transpose(0, 1), memory.transpose(0, 1)
    outputs, grads = [], []
    for model in (ours, theirs, copy.deepcopy(theirs).double()):
        dtype = model.out_proj.weight.dtype
        query = x.to(dtype)
        key = query if same == 3 else memory.to(dtype)
        masks = {k: t.to(dtype) if t.is_floating_point() else t for k, t in more.items()}
        y, weights = model(query, key, key, need_weights=False, **masks)
        assert weights is None
        outputs.append(y)
        grads.append(torch.autograd.grad((y * x.to(dtype)).sum(), list(model.parameters())))
    assert outputs[0].shape == outputs[1].shape
    assert_within_budget(*outputs)
    assert_within_budget(*(torch.cat([g.flatten() for g in of]) for of in grads), name="all gradients")


LAYERS = {
    "post_norm": {},
    "pre_norm": {"norm_first": True},
    "gelu": {"activation": "gelu"},
    "no_bias": {"bias": False},
    "sequence_first": {"batch_first": False},
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
def test_encoder_layer_is_torchs(options, impl):
    options = {"batch_first": True, "dropout": 0.0, **options}
    theirs, ours = nn.TransformerEncoderLayer(32, 2, 48, **options), EncoderLayer(32, 2, 48, **options)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    ours.load_state_dict(theirs.state_dict())
    ours.impl = impl
    padding, mask = torch.arange(7) >= torch.tensor([7, 2])[:, None], torch.ones(7, 7).triu(3).bool()
    x = torch.randn(2, 7, 32)
    x = x if options["batch_first"] else x.transpose(0, 1)
    outputs, grads = [], []
    for model in (ours, theirs, copy.deepcopy(theirs).double()):
        src = x.to(model.linear1.weight.dtype)
        y = model(src, src_mask=mask, src_key_padding_mask=padding)
        outputs.append(y)
        grads.append(torch.autograd.grad((y * src.roll(1, 0)).sum(), list(model.parameters())))
    assert outputs[0].is_contiguous()
    assert_within_budget(*outputs)
    assert_within_budget(*(torch.cat([g.flatten() for g in of]) for of in grads), name="all gradients")


def test_encoder_layer_unbatched_dropout_and_refusals():
    layer = EncoderLayer(32, 2, 48, dropout=0.5, batch_first=True)
    layer.impl = "native"
    x = torch.randn(7, 32)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), layer(x[None])[0])
    with pytest.raises(ValueError, match="is_causal is a hint"):
        layer(x, is_causal=True)
    with pytest.raises(ValueError, match="activation must be one of"):
        EncoderLayer(32, 2, activation=nn.Tanh())


def test_multi_head_attention_refuses_unsupported_options():
    x = torch.randn(1, 3, 32)
    with pytest.raises(ValueError, match="need_weights"):
        MultiheadAttention(32, 4)(x, x, x, need_weights=True)
    with pytest.raises(ValueError, match="add_bias_kv"):
        MultiheadAttention(32, 4, add_bias_kv=True)(x, x, x)
    with pytest.raises(ValueError, match="is_causal is a hint"):
        MultiheadAttention(32, 4)(x, x, x, is_causal=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_add_layer_norm(impl):
    norm = AddLayerNorm(32)
    norm.impl = impl
    x, residual = torch.randn(5, 32), torch.randn(5, 32)

    def plain(dtype):
        return nn.functional.layer_norm((x + residual).to(dtype), (32,))

    exact = nn.functional.layer_norm(x.double() + residual.double(), (32,))
    assert_within_budget(norm(x, residual), plain(torch.float32), exact)
    torch.testing.assert_close(norm(x), nn.functional.layer_norm(x, (32,)))
    assert AddLayerNorm(32, bias=False).bias is None
    with pytest.raises(ValueError, match="one number"):
        AddLayerNorm((4, 8))


def test_add_layer_norm_has_dropout_in_training_only():
    norm, x = AddLayerNorm(32, dropout=0.5), torch.randn(5, 32)
    norm.impl = "native"
    assert not torch.equal(norm(x), norm(x))
    norm.eval()
    assert torch.equal(norm(x), norm(x))


@pytest.mark.parametrize("activation", ["relu", "gelu", "geglu"])
def test_feed_forward(activation):
    block = FeedForward(16, 24, activation)
    block.impl = "native"
    x = torch.randn(2, 5, 16)
    h = block.linear1(x)
    if activation == "geglu":
        first, second = h.chunk(2, -1)
        h = nn.functional.gelu(first) * second
    else:
        h = getattr(nn.functional, activation)(h)
    torch.testing.assert_close(block(x), block.linear2(h))
    with pytest.raises(ValueError, match="activation must be one of"):
        FeedForward(16, 24, "tanh")


def test_joined_linears_follow_their_parts():
    """The joined weight is kept if its parts were marked. Every change of a part must be noticed."""
    parts = [nn.Linear(8, 4), nn.Linear(8, 6)]
    joined, x = JoinedLinears(), torch.randn(3, 8)
    with torch.no_grad():
        joined(x, parts)
    assert joined._weight_and_bias is None  # the parts are not marked
    prepack(nn.ModuleList(parts))

    def expected():
        return torch.cat([part(x) for part in parts], dim=-1)

    with torch.no_grad():
        torch.testing.assert_close(joined(x, parts), expected())
        kept = joined._weight_and_bias[0]
        joined(x, parts)
        assert joined._weight_and_bias[0] is kept
        parts[1].weight.mul_(2.0)
        torch.testing.assert_close(joined(x, parts), expected())
        parts[0].bias = nn.Parameter(torch.ones(4))
        torch.testing.assert_close(joined(x, parts), expected())
    joined(x, parts).sum().backward()
    assert all(part.weight.grad is not None for part in parts)
    assert copy.deepcopy(joined)._weight_and_bias is None


def test_joined_linears_of_weights_made_in_inference_mode():
    """Such tensors have no version counter, so nothing can be kept. They once raised an error."""
    with torch.inference_mode():
        parts = [nn.Linear(8, 4, bias=False), nn.Linear(8, 6, bias=False)]
        joined, x = JoinedLinears(), torch.randn(3, 8)
        torch.testing.assert_close(joined(x, parts), torch.cat([part(x) for part in parts], dim=-1))
        parts[0].weight.zero_()
        assert not joined(x, parts)[:, :4].any()


def test_fused_linears_keep_their_names():
    fused = FusedLinears({"query": nn.Linear(8, 4), "key": nn.Linear(8, 4)})
    assert list(fused.state_dict()) == ["query.weight", "query.bias", "key.weight", "key.bias"]
    x = torch.randn(2, 8)
    torch.testing.assert_close(fused(x), torch.cat([fused["query"](x), fused["key"](x)], dim=-1))
