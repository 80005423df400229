"""dropout + add + LayerNorm for training on a CPU: forward pass with dropout, and gradients, in C++."""

import pytest
import torch

from cpu_dtypes import DTYPES
from fastbert.kernels import _random, native, reference
from fastbert.kernels.cpu import norm as cpu_norm
from fastbert.kernels.cpu import operators as cpp
from fastbert.testing import assert_within_budget

pytestmark = pytest.mark.cpp
NAMES = ("y", "dx", "dresidual", "dweight", "dbias")


def tensors(shape, dtype=torch.float32):
    """Rows far from zero, whose variance is that of what remains after subtracting the mean."""
    x, residual = torch.randn(2, *shape)
    weight, bias = torch.randn(2, shape[-1])
    return [t.to(dtype).requires_grad_() for t in (x, residual + 3.0, weight, bias)]


def options(dropout_p, rows, named=False):
    if not dropout_p:
        return {}
    names = torch.arange(rows) * 3 + (5 << 32) if named else None
    return {"dropout_p": dropout_p, "seed": torch.tensor(2**63 - 25), "stream": 7, "row_ids": names}


def results(function, leaves, **options):
    y = function(*leaves, 1e-12, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(y.dtype)
    return y, *torch.autograd.grad(y, leaves, dy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    "shape", [(1, 16), (64, 48), (3, 45, 384)], ids=str
)  # one row, one block of them, two and some
def test_gradients(dtype, dropout_p, shape):
    leaves = tensors(shape, dtype)
    assert cpp.takes_add_layer_norm(*leaves)
    drop = options(dropout_p, leaves[0].numel() // shape[-1], named=len(shape) == 3)
    ours = results(native.add_layer_norm, leaves, **drop)
    assert "AddLayerNorm" in ours[0].grad_fn.name()
    plain = results(reference.add_layer_norm, leaves, **drop)
    truth = results(reference.add_layer_norm, [t.detach().double().requires_grad_() for t in leaves], **drop)
    for name, *three in zip(NAMES, ours, plain, truth, strict=True):
        assert_within_budget(*three, name)
    if dropout_p:
        assert torch.equal(ours[1] == 0, truth[1] == 0)  # the mask is exactly that of the specification


@pytest.mark.skipif(torch.bfloat16 not in cpp.dtypes(), reason="this CPU has no AVX512-BF16")
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_bias_of_x_and_float32_beside_a_product_in_bfloat16(dropout_p, mixed):
    """What a layer in training also adds: the bias of the product before, which is bfloat16 under autocast."""
    x, *others = tensors((2, 45, 48))
    leaves = [x.detach().bfloat16().requires_grad_() if mixed else x, *others, torch.randn(48).requires_grad_()]
    drop = options(dropout_p, 90)

    def of(module):
        return lambda x, residual, weight, bias, x_bias, eps, **drop: module.add_layer_norm(
            x, residual, weight, bias, eps, x_bias=x_bias, **drop
        )

    ours, plain = results(of(native), leaves, **drop), results(of(reference), leaves, **drop)
    assert "AddLayerNorm" in ours[0].grad_fn.name()
    truth = results(of(reference), [t.detach().double().requires_grad_() for t in leaves], **drop)
    for name, *three in zip((*NAMES, "dx_bias"), ours, plain, truth, strict=True):
        assert three[0].dtype == three[1].dtype
        assert_within_budget(*three, name)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_the_same_bits_without_gradients_and_with_any_number_of_threads(dropout_p):
    leaves, drop = tensors((200, 64)), options(dropout_p, 200)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(results(native.add_layer_norm, leaves, **drop))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    with torch.no_grad():
        assert torch.equal(native.add_layer_norm(*leaves, 1e-12, **drop), found[0][0])


@pytest.mark.parametrize("wanted", range(4), ids=NAMES[1:])
def test_one_gradient_alone_and_a_strided_upstream(wanted):
    leaves = tensors((5, 32))
    y = native.add_layer_norm(*leaves)
    dy = torch.randn(32, 5).t()
    expected = torch.autograd.grad(y, leaves, dy)[wanted]
    alone = [t if i == wanted else t.detach() for i, t in enumerate(leaves)]
    assert torch.equal(torch.autograd.grad(native.add_layer_norm(*alone), alone[wanted], dy.contiguous())[0], expected)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_gradients(dropout_p, frozen):
    """Computed by torch's operators under the same mask."""
    second = []
    leaves, drop = tensors((5, 16)), options(dropout_p, 5)
    if frozen:
        leaves[2:] = [t.detach() for t in leaves[2:]]
    wanted = leaves[:2] if frozen else leaves
    for function in (native.add_layer_norm, reference.add_layer_norm):
        y = function(*leaves, **drop)
        grads = torch.autograd.grad(y.pow(3).sum(), wanted, create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in grads), wanted))
    for ours, theirs in zip(*second, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_create_graph_when_x_depends_on_the_residual():
    """As in every layer, x = linear(attention(residual)). With create_graph=True the path from y through x to the
    residual was counted twice, in its own gradient and through x: an accelerated BERT's gradients were 30% off."""
    (start, _, weight, bias), linear = tensors((5, 16)), torch.randn(16, 16, requires_grad=True)

    def found(create_graph):
        residual = start * 2
        y = native.add_layer_norm(residual @ linear, residual, weight, bias)
        return torch.autograd.grad(y.pow(3).sum(), (start, linear, weight), create_graph=create_graph)

    once, again = found(False), found(True)
    torch.testing.assert_close(again, once, rtol=1e-4, atol=1e-4)
    assert all(grad.requires_grad for grad in again)


def test_the_same_tensor_as_x_and_residual_and_no_rows():
    x, _, weight, bias = tensors((6, 32))
    for function in (native.add_layer_norm, reference.add_layer_norm):
        y = function(x, x, weight, bias)
        grads = torch.autograd.grad(y, (x, weight), torch.ones_like(y).cumsum(-1))
        if function is native.add_layer_norm:
            ours = grads
    for one, other in zip(ours, grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    leaves = [x[:0].detach().requires_grad_(), x[:0].detach(), weight, bias]
    y = native.add_layer_norm(*leaves)
    assert not any(g.any() for g in torch.autograd.grad(y.sum(), (leaves[0], weight, bias)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
def test_keys_of_rows_equal_those_of_the_specification(dtype):
    """Row names at both ends of their range and strided in memory; seeds and streams whose sum wraps around."""
    ends = torch.iinfo(dtype)
    names = torch.tensor([[0, 9], [1, 9], [ends.max, 9], [ends.min, 9], [-1, 9]], dtype=dtype)[:, 0]
    for seed, stream in ((0, 0), (2**62, 3), (-1, 2**31), (-(2**63), 12)):
        seed = torch.tensor([seed], dtype=torch.int64)
        assert torch.equal(cpu_norm.row_keys(seed, stream, names), _random.row_keys(seed, stream, names))
    assert len(cpu_norm.row_keys(seed, stream, names[:0])) == 0


# ---- RMSNorm -------------------------------------------------------------------------------------------------


def rms_results(function, x, weight, residual=None, **options):
    y = function(x, residual, weight, 1e-6, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(y.dtype)
    return y, *torch.autograd.grad(y, [x, weight], dy)


@pytest.mark.parametrize("wide", [False, True], ids=["one_dtype", "weight_in_float32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (64, 48), (3, 45, 384), (5, 3, 64)], ids=str)
def test_rms_norm(shape, dtype, wide):
    """Rows, and heads in a view of a joined product, whose rows are not contiguous."""
    heads = torch.randn(shape[0], 2 * shape[1], *shape[2:]) if shape[-1] == 64 else None
    x = torch.randn(shape) if heads is None else heads[:, : shape[1]]
    leaves = [x.to(dtype).requires_grad_(), torch.randn(shape[-1], dtype=torch.float32 if wide else dtype)]
    leaves[1].requires_grad_()
    assert cpp.takes_rms_norm(*leaves)
    ours = rms_results(native.add_rms_norm, *leaves)
    assert "RmsNorm" in ours[0].grad_fn.name()
    plain = rms_results(reference.add_rms_norm, leaves[0], leaves[1].to(dtype).detach().requires_grad_())
    truth = rms_results(reference.add_rms_norm, *(t.detach().double().requires_grad_() for t in leaves))
    for name, *three in zip(("y", "dx", "dweight"), ours, plain, truth, strict=True):
        assert three[0].dtype == (leaves[1].dtype if name == "dweight" else dtype)
        assert_within_budget(*three, name)


def test_rms_norm_of_a_sum_with_dropout():
    x, residual, weight, x_bias = torch.randn(45, 48), torch.randn(45, 48), torch.randn(48), torch.randn(48)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    drop = options(0.3, 45, named=True) | {"x_bias": x_bias}
    ours = rms_results(native.add_rms_norm, *leaves, residual, **drop)
    assert "RmsNorm" in ours[0].grad_fn.name()
    plain = rms_results(reference.add_rms_norm, *leaves, residual, **drop)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    truth = rms_results(reference.add_rms_norm, *wide, residual.double(), **drop | {"x_bias": x_bias.double()})
    for name, *three in zip(("y", "dx", "dweight"), ours, plain, truth, strict=True):
        assert_within_budget(*three, name)


def test_rms_norms_second_derivative():
    leaves = [torch.randn(5, 48).requires_grad_(), torch.randn(48).requires_grad_()]
    found = []
    for module in (native, reference):
        y = module.add_rms_norm(leaves[0], None, leaves[1], 1e-6)
        (dx,) = torch.autograd.grad(y.square().sum(), leaves[:1], create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), leaves))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


# ---- dropout alone ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "columns of a wider tensor", "transposed", "21 columns", "no rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_has_the_bits_of_the_specification(dtype, layout, monkeypatch):
    """With its gradient, and the gradient of that. Other layouts are left to the specification."""
    calls = []
    monkeypatch.setattr(cpu_norm, "dropout", lambda *args, right=cpu_norm.dropout: (calls.append(1), right(*args))[1])
    x = torch.randn(0 if layout == "no rows" else 33, 21 if layout == "21 columns" else 48).to(dtype)
    x = x[:, 16:32] if layout.startswith("columns") else x.t() if layout == "transposed" else x
    x.requires_grad_()
    given = (0.3, torch.tensor([2**62 - 5]), 4, torch.arange(len(x)) * 7 + (3 << 32))
    found = []
    for function in (native.dropout, reference.dropout):
        y = function(x, *given)
        dy = torch.linspace(-1.0, 1.0, y.numel()).view_as(y).to(dtype).requires_grad_()
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        (ddy,) = torch.autograd.grad(dx, dy, torch.ones_like(dx))
        found.append((y, dx, ddy))
    assert len(calls) == (layout == "contiguous")
    assert all(map(torch.equal, *found))
    assert x.numel() == 0 or 0.5 < (found[0][0] != 0).float().mean() < 0.9
