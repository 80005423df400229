"""Attention by PyTorch's own operators: every variant compared with the specification, which sets truth and budget."""

import pytest
import torch

import fastbert.functional as F
from fastbert.testing import MODELS, assert_op, attention_inputs, attention_padded_inputs

pytestmark = pytest.mark.native

LENGTHS = [5, 5, 0, 17, 1, 17]  # equal lengths, an empty sequence between them, and one token
VARIANTS = {
    "plain": {},
    "grouped_heads": {"kv_heads": 1},
    "bias": {"bias": True},
    "mask": {"mask": True},
    "alibi": {"alibi": True},
    "window": {"window": (3, 1)},
    "rotary": {"rotary": True},
    "scale": {"scale": 0.1},
    "dropout": {"dropout_p": 0.3},
    "all": {"bias": True, "mask": True, "alibi": True, "window": (4, 4), "rotary": True, "kv_heads": 1, "scale": 0.2},
    "all_with_dropout": {"bias": True, "mask": True, "alibi": True, "window": (4, 4), "rotary": True, "kv_heads": 1,
                         "dropout_p": 0.3, "sequence_ids": torch.tensor([7, 1, 5, 0, 2, 9])},
    "lse": {"return_lse": True, "bias": True},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_packed(options, dtype):
    assert_op("attention", attention_inputs(MODELS["tiny"], LENGTHS, **options), dtype, impl="native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_padded(options, dtype):
    inputs = attention_padded_inputs(MODELS["tiny"], [9] * 6, **options)
    del inputs["seqlens"]
    assert_op("attention_padded", inputs, dtype, impl="native")


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["no_dropout", "dropout"])
def test_a_mask_and_a_bias_of_each_sequence(p):
    """Each sequence has its own, also after an empty one. A row whose mask allows no key is zero."""
    inputs = attention_inputs(MODELS["tiny"], LENGTHS, dropout_p=p)
    mask = torch.rand(6, 1, 17, 17, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[3, :, 2] = False
    inputs |= {"mask": mask, "bias": torch.randn(6, 2, 17, 17, generator=torch.Generator().manual_seed(2))}
    assert_op("attention", inputs, torch.float32, impl="native")


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("sequences", [0, 2])
def test_without_tokens_every_input_has_a_zero_gradient(impl, sequences):
    """Outputs without rows did not depend on the inputs: a batch without texts left the projections without gradients.
    torch's own modules have zeros, and DistributedDataParallel waits for them."""
    q, k, v = (torch.empty(0, 2, 8, requires_grad=True) for _ in range(3))
    bias = torch.randn(sequences, 2, 4, 4, requires_grad=True)
    spans = torch.zeros(sequences + 1, dtype=torch.int32)
    o = F.attention(q, k, v, spans, 4, bias=bias, impl=impl)
    pooled = F.pool(o.flatten(1), spans, "mean", impl=impl)
    assert o.shape == (0, 2, 8)
    assert torch.equal(pooled, torch.zeros(sequences, 16))
    pooled.backward(torch.randn_like(pooled))
    for x in (q, k, v, bias):
        assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_large_scores_with_dropout(dtype):
    """In float16 q k^T overflowed before it was scaled, and a whole layer became NaN; torch's SDPA multiplies in
    float32. The largest score here is far above float16's 65,504."""
    inputs = attention_inputs(MODELS["tiny"], [9, 4], dropout_p=0.3)
    for name in ("q", "k"):
        inputs[name] = (100.0 * inputs[name] + 200.0).to(dtype)
    inputs["v"] = inputs["v"].to(dtype)
    truth = F.attention(**{n: t.double() if n in ("q", "k", "v") else t for n, t in inputs.items()}, impl="reference")
    error = (F.attention(**inputs, impl="native").double() - truth).square().mean().sqrt()
    assert error <= torch.finfo(dtype).eps * truth.square().mean().sqrt()
