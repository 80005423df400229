"""Inputs that are hard for float32: rows of nearly equal elements, scales of 0 and below, NaN and infinity."""

import pytest
import torch

import fastbert.functional as F
from fastbert.kernels.cpu import operators as cpp
from fastbert.testing import cu_seqlens_of

IMPLS = ("triton", "native")
impls = pytest.mark.parametrize("impl", IMPLS)


def rows(kind: str, width: int) -> torch.Tensor:
    noise = torch.randn(6, width, generator=torch.Generator().manual_seed(width))
    return {
        "constant": torch.full((6, width), 1234.567) * torch.tensor([1.0, -2.0, 3e3, 1e-3, 0.1, 7.7])[:, None],
        "large_mean": 1000 + 0.01 * noise,
        "nearly_constant": 1 + 1e-7 * noise,
        "far_outlier": torch.where(torch.arange(width) == 0, 1e4, 3.3 + 0.1 * noise),
    }[kind]


@impls
@pytest.mark.parametrize("kind", ["constant", "large_mean", "nearly_constant", "far_outlier"])
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.0])
@pytest.mark.parametrize("width", [48, 384, 768])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_layer_norm_of_rows_that_are_nearly_equal(impl, kind, eps, width, dropout_p):
    """Constant rows gave up to 0.99 instead of 0, and wrong gradients: rounding the mean to float32 moved it by as much
    as the square root of eps, and this distance counted as their deviation."""
    if impl == "native" and cpp.load()[0] is None:
        pytest.skip("torch's own LayerNorm computes here")
    if kind == "constant" and eps == 0.0:
        pytest.skip("0 / 0")
    x = rows(kind, width) if dropout_p == 0.0 else torch.zeros(6, width)
    residual = torch.zeros(6, width) if dropout_p == 0.0 else rows(kind, width)
    weight, bias = 1 + 0.1 * torch.randn(width), 0.1 * torch.randn(width)
    dy = torch.randn(6, width)
    options = {"dropout_p": dropout_p, "seed": torch.tensor([7])} if dropout_p else {}

    def run(dtype, impl):
        leaves = [t.to(dtype).requires_grad_() for t in (x, residual, weight, bias)]
        y = F.add_layer_norm(*leaves, eps, impl=impl, **options)
        return y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))

    for name, ours, exact in zip(
        ("y", "dx", "dresidual", "dweight", "dbias"),
        run(torch.float32, impl),
        run(torch.float64, "reference"),
        strict=True,
    ):
        # the size of the terms: for dx rstd times numbers near 1, for the others numbers near 1
        size = exact.abs().amax(-1, keepdim=True).clamp(min=1.0) if exact.dim() == 2 else exact.abs().clamp(min=1.0)
        assert ((ours.double() - exact).abs() <= 2e-6 * size).all(), name


@impls
@pytest.mark.parametrize("kind", ["constant", "large_mean", "nearly_constant"])
def test_embeddings_that_are_nearly_equal(impl, kind):
    """The same statistics, for the sum of three rows of tables."""
    if impl == "native" and cpp.load()[0] is None:
        pytest.skip("torch's own LayerNorm computes here")
    word, position, types = rows(kind, 48), torch.full((6, 48), 0.25), torch.full((2, 48), 0.5)
    weight, bias, indices = torch.randn(48), torch.randn(48), torch.arange(6)

    def run(dtype, impl):
        leaves = [t.to(dtype) for t in (word, position, types, weight, bias)]
        return F.embedding_layer_norm(indices, torch.zeros_like(indices), indices, *leaves, 1e-12, impl=impl)

    ours, exact = run(torch.float32, impl), run(torch.float64, "reference")
    # the sum of three rows is itself rounded, by at most half a unit, which is not small beside eps
    rounded = torch.finfo(torch.float32).eps * word.abs().amax(-1, keepdim=True).double()
    spread = (word.double() + 0.75).var(-1, correction=0, keepdim=True).add(1e-12).sqrt()
    slack = weight.abs().max() * (rounded / spread).clamp(max=1e6) if kind != "constant" else 0.0
    assert ((ours.double() - exact).abs() <= 1e-5 + slack).all()


@impls
@pytest.mark.parametrize("scale", [0.0, -0.0, -0.3, 1e-30, 2.0])
@pytest.mark.parametrize("lengths", [[5, 1, 16, 17], [33, 0, 70]], ids=("short", "over_blocks"))
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_attention_at_any_scale(impl, scale, lengths, dropout_p):
    """A scale of 0 gave NaN if a sequence's length was no multiple of 16: it was multiplied by the minus infinity that
    stands for missing keys."""
    q, k, v = (torch.randn(sum(lengths), 2, 16) for _ in range(3))
    do = torch.randn(q.shape)
    options = {"dropout_p": dropout_p, "seed": torch.tensor([7])} if dropout_p else {}

    def run(dtype, impl):
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        o = F.attention(*leaves, cu_seqlens_of(lengths), max(lengths), scale=scale, impl=impl, **options)
        with torch.no_grad():
            again = F.attention(*leaves, cu_seqlens_of(lengths), max(lengths), scale=scale, impl=impl, **options)
        return o.detach(), again, *torch.autograd.grad(o, leaves, do.to(dtype))

    for name, ours, exact in zip(
        ("o", "o without gradients", "dq", "dk", "dv"),
        run(torch.float32, impl),
        run(torch.float64, "reference"),
        strict=True,
    ):
        assert ((ours.double() - exact).abs() <= 1e-5 * max(1.0, exact.abs().max().item())).all(), name


@impls
@pytest.mark.parametrize("what", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("lengths", [[17, 5, 30], [16, 16, 16], [1, 3, 2]], ids=str)
def test_nan_and_infinity_stay_in_their_sequence(impl, what, width, lengths):
    """Whatever a text holds, other texts' outputs and gradients keep their bits."""
    first, last = lengths[0], sum(lengths[:2])
    clean = [torch.randn(sum(lengths), 2, width) for _ in range(3)]
    do, cu_seqlens = torch.randn(clean[0].shape), cu_seqlens_of(lengths)

    def run(tensors):
        leaves = [t.clone().requires_grad_() for t in tensors]
        o = F.attention(*leaves, cu_seqlens, max(lengths), impl=impl)
        results = [o.detach(), *torch.autograd.grad(o, leaves, do)]
        x = tensors[0].flatten(1)
        results += [F.add_layer_norm(x, x, x.new_ones(2 * width), x.new_zeros(2 * width), impl=impl)]
        pooled = [F.pool(x, cu_seqlens, mode, impl=impl) for mode in F.POOLING_MODES]
        return [torch.cat((t[:first], t[last:])) for t in results] + [t[[0, 2]] for t in pooled]

    expected = run(clean)
    for place in range(3):
        dirty = [t.clone() for t in clean]
        dirty[place][first:last] = what
        for ours, as_before in zip(run(dirty), expected, strict=True):
            assert torch.equal(ours, as_before)
