"""Extreme shapes: one token, no sequence, odd and tiny head widths, rows of one column."""

import pytest
import torch

pytest.importorskip("triton", reason="tests the Triton kernels")

from fastbert import functional, testing
from fastbert.testing import ModelShape, assert_op

if functional.why_not_triton(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

torch.set_num_threads(1)


@pytest.mark.parametrize("head_dim", [1, 3, 17, 33, 127, 255])
@pytest.mark.parametrize("op", ["attention", "attention_padded"])
def test_odd_head_dims(op, head_dim, device):
    """Blocks are powers of two, at least 16 columns: their unused columns must not count. One head in float32."""
    model = ModelShape(head_dim, 1, 16, 1)
    inputs = testing.INPUTS[op](model, [1, 19, 0])
    assert_op(op, inputs, torch.float32, device)


@pytest.mark.parametrize("head_dim", [2, 6, 250])
def test_rotary_of_odd_halves(head_dim, device):
    inputs = testing.attention_inputs(ModelShape(head_dim, 1, 16, 1), [1, 19], rotary=True)
    assert_op("attention", inputs, torch.float32, device)


@pytest.mark.parametrize("head_dim", [17, 64])
def test_heads_with_strided_elements(head_dim, device):
    """q, k, v with any stride in the last dimension, such as [D, H, T], give the results of contiguous ones."""
    inputs = testing.attention_inputs(ModelShape(2 * head_dim, 2, 16, 1), [1, 21])
    results = []
    for lie in (torch.Tensor.contiguous, lambda t: t.permute(2, 1, 0).contiguous().permute(2, 1, 0)):
        leaves = [lie(inputs[k]).to(device).requires_grad_() for k in ("q", "k", "v")]
        o = functional.attention(*leaves, inputs["cu_seqlens"].to(device), 21, impl="triton")
        results.append((o, *torch.autograd.grad(o, leaves, torch.ones_like(o))))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("width", [1, 2, 15, 17])
@pytest.mark.parametrize("op", ["add_layer_norm_sum", "add_rms_norm", "embedding_layer_norm", "pool", "feed_forward"])
def test_narrow_rows(op, width, device):
    """One column and other widths below a block. LayerNorm of one column gives only the bias."""
    if width == 1 and "layer_norm" in op:
        pytest.skip("the variance of one column is zero: its reciprocal square root is noise")
    inputs = testing.INPUTS[op](ModelShape(width, 1, 3, 1, vocab=11), [1, 5])
    assert_op(op, inputs, torch.float32, device)


@pytest.mark.parametrize("op", testing.INPUTS)
@pytest.mark.parametrize("lengths", [[0, 0], []], ids=["no_tokens", "no_sequences"])
def test_no_rows(op, lengths, device):
    """Without rows: outputs of the right shape, and zero gradients for shared parameters."""
    inputs = testing.INPUTS[op](ModelShape(32, 2, 24, 1, vocab=13), lengths)
    # a layer without rows runs its separate operators; a mean over no rows is undefined
    more = {"linear_cross_entropy": {"reduction": "sum"}, "encoder_layer": {"whole": False}}.get(op, {})
    assert_op(op, inputs | more, torch.float32, device)


@pytest.mark.parametrize("op", testing.INPUTS)
def test_one_token(op, device):
    # With one key the true gradients of q and k are zero, with two nearly so: their rounding means nothing for so few
    # numbers. A second sequence gives them a size.
    lengths = [1, 5] if "attention" in op else [1]
    assert_op(op, testing.INPUTS[op](ModelShape(32, 2, 24, 1, vocab=13), lengths), torch.float32, device)
