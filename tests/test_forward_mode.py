"""The Triton kernels have no forward-mode derivatives, and raise an error."""

import pytest
import torch
from torch.autograd import forward_ad

pytest.importorskip("triton", reason="tests the Triton kernels")

import fastbert.functional as F
from fastbert import BertConfig, BertModel
from fastbert.packing import PackedBatch
from fastbert.stack.shared import Pass
from fastbert.testing import INPUTS, MODELS

if F.why_not_triton(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

REFUSED = pytest.raises(NotImplementedError, match="forward mode")


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("op", [op for op in INPUTS if op in F.TRITON_MODULES])
def test_an_operator_refuses_a_tangent(op, grad):
    """Without a recorded gradient the result lost its tangent, which means a derivative of zero."""
    inputs = INPUTS[op](MODELS["tiny"], (5, 7))
    name = next(n for n, t in inputs.items() if isinstance(t, torch.Tensor) and t.is_floating_point())
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        primal = inputs[name].detach().requires_grad_(grad)
        inputs[name] = forward_ad.make_dual(primal, torch.ones_like(primal))
        with REFUSED:
            getattr(F, op)(**inputs, impl="triton")


def test_a_transformed_operator_refuses_a_tangent():
    x, weight, bias = torch.randn(3, 32), torch.ones(32), torch.zeros(32)
    with REFUSED:
        torch.func.jvp(lambda x: F.add_layer_norm(x, x, weight, bias, impl="triton"), (x,), (x,))


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_a_layer_refuses_a_tangent(grad):
    """A layer is one operator with a function of its own."""
    config = BertConfig(
        vocab_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16,
    )  # fmt: skip
    layer = BertModel(config, add_pooling_layer=False).eval().encoder["layer"][0]
    batch, x = PackedBatch.from_lists([[1] * 5]), torch.randn(5, 32)
    with torch.set_grad_enabled(grad), forward_ad.dual_level(), REFUSED:
        layer(forward_ad.make_dual(x, torch.ones_like(x)), Pass(batch, batch.schedule("triton"), "triton"))


def test_a_dual_level_without_tangents_changes_nothing():
    x, weight, bias = torch.randn(3, 32), torch.ones(32), torch.zeros(32)
    expected = F.add_layer_norm(x, x, weight, bias, impl="triton")
    with forward_ad.dual_level():
        assert torch.equal(F.add_layer_norm(x, x, weight, bias, impl="triton"), expected)
