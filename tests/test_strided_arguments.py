"""Every operator accepts tensors of any layout: strided, offset, expanded; and ids in 32 bits.

Kernels read lists (lengths, ids, labels, names, slopes) and vectors (weights, biases) element by element. `cu_seqlens`,
`alibi_slopes` and LayerNorm's vectors used to be passed without regard to strides: x[::2] was read as x[:n // 2] with
the elements between, and an expanded tensor past its end.
"""

import functools

import pytest
import torch

pytest.importorskip("triton", reason="tests the Triton kernels")

from fastbert import functional, testing
from fastbert.kernels._invariance import batch_invariant
from fastbert.testing import ModelShape

if functional.why_not_triton(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

torch.set_num_threads(1)

MODEL = ModelShape(32, 2, 40, 1, vocab=61)
LENGTHS = [5, 18, 0, 1]
ROWS = sum(LENGTHS)


def labels(count: int) -> torch.Tensor:
    return torch.arange(count) * 5 + 3


def names(count: int) -> torch.Tensor:
    return torch.arange(count) * 3 + 11


ATTENTION = {
    "bias": True, "mask": True, "alibi": True, "rotary": True, "dropout_p": 0.2, "sequence_ids": names(len(LENGTHS)),
}  # fmt: skip
NORM = {"x_bias": True, "dropout_p": 0.2, "row_ids": names(ROWS)}

# operator and form -> its inputs, with all optional ones
CASES = {
    "attention": lambda: testing.attention_inputs(MODEL, LENGTHS, lengths_k=[9, 16, 3, 0], **ATTENTION),
    "attention,plain": lambda: testing.attention_inputs(
        MODEL, LENGTHS, dropout_p=0.2, sequence_ids=names(len(LENGTHS)), return_lse=True
    ),
    "attention_padded": lambda: testing.attention_padded_inputs(
        MODEL, LENGTHS, seqlens_k=torch.tensor([9, 16, 3, 0], dtype=torch.int32), **ATTENTION
    ),
    "add_layer_norm": lambda: testing.norm_inputs(MODEL, LENGTHS, **NORM),
    "add_layer_norm_sum": lambda: testing.norm_inputs(MODEL, LENGTHS, **NORM),
    "add_rms_norm": lambda: testing.norm_inputs(MODEL, LENGTHS, bias=False, **NORM),
    "linear_act": lambda: testing.linear_act_inputs(MODEL, LENGTHS),
    "linear_act,geglu": lambda: testing.linear_act_inputs(MODEL, LENGTHS, activation="geglu"),
    "feed_forward": lambda: testing.feed_forward_inputs(MODEL, LENGTHS),
    "embedding_layer_norm": lambda: testing.embedding_inputs(MODEL, LENGTHS, dropout_p=0.2, row_ids=names(ROWS)),
    "linear_cross_entropy": lambda: testing.cross_entropy_inputs(MODEL, [11], reduction="none", labels=labels(11)),
    "linear_cross_entropy,mean": lambda: testing.cross_entropy_inputs(
        MODEL, [11], label_smoothing=0.1, labels=labels(11)
    ),
    "pool,mean": lambda: testing.pool_inputs(MODEL, LENGTHS),
    "pool,max": lambda: testing.pool_inputs(MODEL, LENGTHS, mode="max", normalize=True),
    "linear": lambda: {k: v for k, v in testing.linear_act_inputs(MODEL, LENGTHS).items() if k != "activation"},
}


# ---- memory layouts --------------------------------------------------------------------------------------


def between(t: torch.Tensor) -> float | int:
    """A value for the elements between those of a strided tensor: reading it changes results, but does no harm."""
    return float("nan") if t.is_floating_point() else 7 if t.dtype != torch.bool else True


def every_other(t: torch.Tensor) -> torch.Tensor:
    return torch.stack((t, torch.full_like(t, between(t))), dim=-1).flatten(-2)[..., ::2]


def offset(t: torch.Tensor) -> torch.Tensor:
    """Three elements into a wider tensor: not at a multiple of 16 bytes, and with a larger row stride."""
    around = torch.full((*t.shape[:-1], 3), between(t), dtype=t.dtype)
    return torch.cat((around, t, around), dim=-1)[..., 3:-3]


def expanded(t: torch.Tensor) -> torch.Tensor:
    """The same element everywhere: stride 0 in the last dimension."""
    return t[..., :1].expand(t.shape)


VIEWS = {"every_other": every_other, "offset": offset, "expanded": expanded}


def on_all(f, value):
    """Applies f to every tensor among the inputs that has a dimension."""
    if isinstance(value, tuple):
        return tuple(on_all(f, v) for v in value)
    return f(value) if isinstance(value, torch.Tensor) and value.numel() > 1 else value


def results(op: str, inputs: dict, device: str, impl: str) -> list[torch.Tensor]:
    """Outputs and all gradients, for one upstream gradient."""
    inputs = {k: on_all(lambda t: t.to(device), v) for k, v in inputs.items()}
    wants = [
        k
        for k, v in inputs.items()
        if isinstance(v, torch.Tensor) and v.is_floating_point() and k not in testing.WITHOUT_GRADIENT
    ]
    inputs |= {k: inputs[k].detach().requires_grad_() for k in wants}
    out = getattr(functional, op)(**inputs, impl=impl)
    outs = out if isinstance(out, tuple) else (out,)
    torch.manual_seed(1)
    upstream = [torch.rand_like(o) for o in outs]
    # the logarithm of an empty sum is -inf and has no gradient
    finite = [torch.where(o.isfinite(), u, 0.0) for o, u in zip(outs, upstream, strict=True)]
    return [*outs, *torch.autograd.grad(outs, [inputs[k] for k in wants], finite)]


def one_row(t: torch.Tensor) -> torch.Tensor:
    """The same row everywhere: stride 0 in the first dimension."""
    return t[:1].expand(t.shape)


def with_view(view, inputs: dict) -> dict:
    # starts of sequences cannot all be equal
    fixed = [k for k in inputs if k.startswith("cu_seqlens")] if view is expanded else []
    # LayerNorm of equal elements is only rounding
    if view is expanded and "word" in inputs:
        view = one_row
    return {k: v if k in fixed else on_all(view, v) for k, v in inputs.items()}


@functools.cache
def of_contiguous(case: str, is_expanded: bool, impl: str, device: str) -> list[torch.Tensor]:
    """The results for contiguous copies of the same tensors."""
    inputs = with_view(expanded, CASES[case]()) if is_expanded else CASES[case]()
    return results(
        case.split(",")[0], {k: on_all(lambda t: t.contiguous(), v) for k, v in inputs.items()}, device, impl
    )


@pytest.mark.parametrize("impl", ["triton", "native"])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("case", CASES)
def test_tensors_of_any_layout(case, view, impl, device):
    strided = with_view(VIEWS[view], CASES[case]())
    ours = results(case.split(",")[0], strided, device, impl)
    expected = of_contiguous(case, view == "expanded", impl, device)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert not one.isnan().any()


@pytest.mark.parametrize("view", VIEWS)
def test_biases_in_our_own_product(view, device):
    """Within `batch_invariant()` our kernel computes all products, with their biases."""
    inputs = {k: v for k, v in testing.feed_forward_inputs(MODEL, LENGTHS).items() if k != "activation"}
    strided = {k: on_all(VIEWS[view], v) for k, v in inputs.items()}
    contiguous = {k: v.contiguous() for k, v in strided.items()}
    with batch_invariant():
        ours, expected = (results("feed_forward", given, device, "triton") for given in (strided, contiguous))
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# ---- names -----------------------------------------------------------------------------------------------

# form -> inputs with names. Attention has a form for each kernel that draws masks: for sequences of up to 64 tokens, up
# to 128 and more, without options; and one with the options that only the general kernels support.
NAMED = {
    "attention,plain": lambda ids: testing.attention_inputs(MODEL, [5, 66, 130], dropout_p=0.3, sequence_ids=ids),
    "attention,any": lambda ids: testing.attention_inputs(
        MODEL, [5, 66, 1], dropout_p=0.3, sequence_ids=ids, bias=True, kv_heads=1
    ),
    "attention_padded": lambda ids: testing.attention_padded_inputs(MODEL, [5, 66, 3], dropout_p=0.3, sequence_ids=ids),
    "add_layer_norm": lambda ids: testing.norm_inputs(MODEL, [3], dropout_p=0.3, row_ids=ids),
    "add_layer_norm_sum": lambda ids: testing.norm_inputs(MODEL, [3], dropout_p=0.3, row_ids=ids),
    "add_rms_norm": lambda ids: testing.norm_inputs(MODEL, [3], bias=False, dropout_p=0.3, row_ids=ids),
    "embedding_layer_norm": lambda ids: testing.embedding_inputs(MODEL, [3], dropout_p=0.3, row_ids=ids),
}


@pytest.mark.parametrize("impl", ["triton", "native", "reference"])
@pytest.mark.parametrize("case", NAMED)
def test_names_of_32_bits(case, impl, device):
    """The bits are those of int64. A name is shifted by 32 bits, which made 32-bit names zero: all sequences drew the
    mask of sequence 0."""
    ids = torch.tensor([77, 2**31 - 1, 5])
    op = case.split(",")[0]
    wide, narrow, others = (results(op, NAMED[case](i), device, impl) for i in (ids, ids.to(torch.int32), ids * 0))
    assert all(torch.equal(one, other) for one, other in zip(wide, narrow, strict=True))
    assert not torch.equal(wide[0], others[0])


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_streams_beyond_32_bits_of_heads(impl, device):
    """Head h of stream s draws by s * 2^16 + h, which needs 64 bits from 2^15 streams on."""
    drawn = [
        results("attention", testing.attention_inputs(MODEL, [5, 70], dropout_p=0.3) | {"stream": stream}, device, i)[0]
        for stream, i in ((2**16, impl), (2**16, "native"), (0, impl))
    ]
    torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(drawn[0], drawn[2])


# ---- errors ----------------------------------------------------------------------------------------------


def test_lists_of_another_length_are_refused(device):
    """A kernel would read past their end."""
    attention = testing.attention_inputs(MODEL, LENGTHS, dropout_p=0.2, sequence_ids=names(3))
    padded = testing.attention_padded_inputs(MODEL, LENGTHS, dropout_p=0.2, sequence_ids=names(3))
    for op, inputs in (("attention", attention), ("attention_padded", padded)):
        with pytest.raises(ValueError, match=rf"{op}: sequence_ids must be 4 int64 or int32, got torch.int64 of shape"):
            results(op, inputs, device, "triton")
    with pytest.raises(ValueError, match=r"row_ids must be 24 int64 or int32, got torch.float32"):
        results("add_layer_norm", testing.norm_inputs(MODEL, LENGTHS, row_ids=torch.rand(ROWS)), device, "triton")
    embedding = testing.embedding_inputs(MODEL, LENGTHS)
    with pytest.raises(ValueError, match="row_ids must be 24 int64 or int32"):
        results("embedding_layer_norm", embedding | {"row_ids": names(ROWS - 1)}, device, "triton")
    for name in ("weight", "bias"):
        with pytest.raises(ValueError, match=rf"{name} must be \[32\] like a row of word, got \(31,\)"):
            results("embedding_layer_norm", embedding | {name: torch.rand(31)}, device, "triton")
    with pytest.raises(ValueError, match=r"pool: cu_seqlens must be \[B \+ 1\] int32, got torch.int64"):
        results("pool", {"x": torch.rand(3, 32), "cu_seqlens": torch.tensor([0, 3])}, device, "triton")
