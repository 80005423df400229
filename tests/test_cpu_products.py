"""Linear layers for training on a CPU: products, activations and gradients in C++, plain and under autocast."""

import contextlib

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastbert
from cpu_dtypes import needs_bf16
from fastbert.kernels import native, reference
from fastbert.kernels.cpu import operators as cpp
from fastbert.kernels.cpu import products
from fastbert.testing import assert_within_budget

pytestmark = pytest.mark.cpp
BFLOAT16 = pytest.param(torch.bfloat16, "plain", marks=needs_bf16, id="bfloat16")
KINDS = [
    pytest.param(torch.float32, "plain", id="float32"),
    BFLOAT16,
    pytest.param(torch.float32, "autocast", marks=needs_bf16, id="autocast"),
]
# one row; one row more than six; odd; more than one block of tokens in float32 (512) and in bfloat16 (1,024)
ROWS = (1, 7, 1100)


def tensors(dtype, *shapes):
    """Leaf tensors, of a size that keeps products near 1."""
    return [(torch.randn(shape) / max(1, shape[-1]) ** 0.5).to(dtype).requires_grad_() for shape in shapes]


def amid(kind):
    return torch.autocast("cpu", torch.bfloat16) if kind == "autocast" else contextlib.nullcontext()


def results(function, leaves, kind="plain", wanted=None):
    with amid(kind):
        y = function(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(y.dtype)
    if wanted == "backward":  # reentrant checkpoints allow only this
        for leaf in leaves:
            leaf.grad = None
        y.backward(dy)
        return y, *(leaf.grad for leaf in leaves)
    return y, *torch.autograd.grad(y, leaves if wanted is None else wanted, dy)


def hold(ours, plain, leaves, kind):
    """Every result has torch's dtype, and at most twice the error of plain torch in the same dtypes."""
    found, same = results(ours, leaves, kind), results(plain, leaves, kind)
    truth = results(plain, [t.detach().double().requires_grad_() for t in leaves])
    for place, three in enumerate(zip(found, same, truth, strict=True)):
        assert three[0].dtype == three[1].dtype
        assert_within_budget(*three, f"result {place}")
    return found


def joined(x, *parameters):
    count = len(parameters) // 2
    return torch.cat([torch.nn.functional.linear(x, parameters[i], parameters[count + i]) for i in range(count)], -1)


def ours_joined(x, *parameters):
    count = len(parameters) // 2
    return native.linears(x, parameters[:count], parameters[count:])


@pytest.mark.parametrize(("dtype", "kind"), KINDS)
@pytest.mark.parametrize("rows", ROWS)
def test_layers_side_by_side(dtype, kind, rows):
    """Three layers, as for query, key and value. 80 columns are a panel of 64 and one register more."""
    leaves = tensors(dtype, (rows, 96), *[(80, 96)] * 3, *[(80,)] * 3)
    found = hold(ours_joined, joined, leaves, kind)
    assert "_Linears" in found[0].grad_fn.name()


@pytest.mark.parametrize(("dtype", "kind"), KINDS)
@pytest.mark.parametrize("activation", [*cpp.ACTIVATION_NUMBERS])
def test_activations(dtype, kind, activation):
    leaves = tensors(dtype, (5, 9, 64), (96, 64), (96,), (64, 96), (64,))
    leaves[2].data.mul_(20)  # the activation's arguments go from -5 to 5
    found = hold(
        lambda *t: native.feed_forward(*t, activation), lambda *t: reference.feed_forward(*t, activation), leaves, kind
    )
    assert "_FeedForward" in found[0].grad_fn.name()
    leaves = leaves[:3]
    found = hold(
        lambda *t: native.linear_act(*t, activation), lambda *t: reference.linear_act(*t, activation), leaves, kind
    )
    assert "_LinearAct" in found[0].grad_fn.name()


def test_without_biases():
    leaves = tensors(torch.float32, (9, 32), (48, 32), (32, 48))

    def of(module):
        return lambda x, up, down: module.feed_forward(x, up, None, down)

    hold(of(native), of(reference), leaves, "plain")
    hold(lambda x, w: native.linear(x, w), torch.nn.functional.linear, leaves[:2], "plain")


@needs_bf16
def test_a_weight_s_gradient_is_not_rounded_under_autocast():
    x, weight = tensors(torch.float32, (33, 64), (32, 64))
    _, dweight = results(native.linear, [x, weight], "autocast", [weight])
    assert not torch.equal(dweight, dweight.bfloat16().float())


@pytest.mark.parametrize("wanted", range(5))
def test_one_gradient_alone_and_a_strided_upstream(wanted):
    leaves = tensors(torch.float32, (7, 32), (48, 32), (48,), (32, 48), (32,))
    dy = torch.randn(32, 7).t()
    expected = torch.autograd.grad(native.feed_forward(*leaves), leaves, dy)[wanted]
    alone = [t if i == wanted else t.detach() for i, t in enumerate(leaves)]
    y = native.feed_forward(*alone)
    # torch sums a bias gradient that is wanted alone, in another order
    torch.testing.assert_close(torch.autograd.grad(y, alone[wanted], dy.contiguous())[0], expected)


def test_the_same_bits_with_any_number_of_threads():
    leaves = tensors(torch.float32, (530, 64), (96, 64), (96,), (64, 96), (64,))
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(results(native.feed_forward, leaves))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("kind", ["plain", pytest.param("autocast", marks=needs_bf16)])
def test_gradients_of_gradients(kind):
    """Computed by torch's operators."""
    leaves = tensors(torch.float32, (5, 32), (32, 32), (32,), (32, 32), (32,))
    cases = [
        (lambda x, w, b, *_: native.linears(x, (w,), (b,)), lambda x, w, b, *_: reference.F.linear(x, w, b), 3),
        (lambda x, w, b, *_: native.linear_act(x, w, b), lambda x, w, b, *_: reference.linear_act(x, w, b), 3),
        (native.feed_forward, reference.feed_forward, 5),
    ]
    for ours, plain, count in cases:
        second = []
        for function in (ours, plain):
            with amid(kind):
                y = function(*leaves)
            grads = torch.autograd.grad(y.float().pow(3).sum(), leaves[:count], create_graph=True)
            second.append(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves[:count]))
        loose = 0.1 if kind == "autocast" else 1e-3
        for one, other in zip(*second, strict=True):
            assert (one - other).norm() <= loose * other.norm()


@pytest.mark.parametrize("kind", ["plain", pytest.param("autocast", marks=needs_bf16)])
def test_changed_weights_are_refused_in_backward_and_used_in_forward(kind):
    """A weight changed before its backward pass raises, as in torch. After an optimiser's step the product uses the new
    weight, even within one region of autocast."""
    x, weight = tensors(torch.float32, (7, 32), (32, 32))
    for function in (native.linear, native.linear_act, lambda x, w: native.feed_forward(x, w, None, w, None)):
        with amid(kind):
            y = function(x, weight)
        with torch.no_grad():
            weight.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    optimiser = torch.optim.SGD([weight], lr=0.5)
    with amid(kind):
        native.linear(x, weight).float().square().sum().backward()
        optimiser.step()
        y = native.linear(x, weight)
        dtype = products.dtype_of(x)
    expected = torch.nn.functional.linear(x.to(dtype), weight.to(dtype))
    torch.testing.assert_close(y, expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("kind", ["plain", pytest.param("autocast", marks=needs_bf16)])
def test_one_weight_in_both_layers_and_activations_computed_again(kind):
    leaves = tensors(torch.float32, (33, 64), (64, 64), (64,))

    def of(module):
        return lambda x, w, b: module.feed_forward(module.feed_forward(x, w, b, w, None).to(x.dtype), w, b, w, b)

    hold(of(native), of(reference), leaves, kind)
    found = results(of(native), leaves, kind)
    for reentrant in (True, False):
        again = results(lambda *t, r=reentrant: checkpoint(of(native), *t, use_reentrant=r), leaves, kind, "backward")
        assert all(torch.equal(one, other) for one, other in zip(found[1:], again[1:], strict=True))


def test_which_products_are_not_taken():
    """Others compute these, or raise, as before."""
    x, weight, bias = tensors(torch.float32, (7, 32), (48, 32), (48,))
    assert products.takes(x, (weight,), (bias,))
    assert not products.takes(x, (weight,), (bias,), "silu")
    assert not products.takes(x, (weight.detach()[:40],), (None,))
    assert not products.takes(x[:, :16], (weight,), (bias,))
    assert not products.takes(x[:0], (weight,), (bias,))
    assert not products.takes(x.double(), (weight.double(),), (None,))
    assert not products.takes(x, (weight, weight[:32]), (bias, bias[:32]))
    assert not products.takes(x.detach(), (weight.detach(),), (None,))
    with torch.no_grad():
        assert not products.takes(x, (weight,), (bias,))
    with fastbert.batch_invariant():
        assert not products.takes(x, (weight,), (bias,))
    with torch.autocast("cpu", torch.float16):
        assert not products.takes(x, (weight,), (bias,))
    with FlopCounterMode(display=False) as counter:
        native.linear(x, weight, bias)
    assert counter.get_total_flops() == 2 * 7 * 32 * 48
    with pytest.raises(RuntimeError):
        native.linear(x.bfloat16(), weight, bias)


def test_tensors_that_do_not_fit_are_refused():
    x, w, y, h = torch.randn(6, 32), torch.randn(48, 32), torch.empty(6, 48), torch.empty(6, 48)
    given = {"forward": (x, w, None, y, h), "input_gradient": (y, [w], torch.empty(6, 32)), "weight_gradients": (y, x)}
    spoilers = {
        "dtype": torch.Tensor.double, "device": lambda t: t.to("meta"), "narrower": lambda t: t[:, :-1].contiguous()
    }  # fmt: skip
    for name, arguments in given.items():
        function = getattr(products, name)
        more = {"want_weights": [True], "want_biases": [True]} if name == "weight_gradients" else {}
        function(*arguments, **more)
        for place, t in enumerate(arguments):
            for what, spoil in spoilers.items():
                if t is None or (name, place, what) == ("weight_gradients", 0, "narrower"):  # 47 columns: see below
                    continue
                spoilt = [*arguments]
                spoilt[place] = [spoil(t[0])] if isinstance(t, list) else spoil(t)
                with pytest.raises((TypeError, ValueError)):
                    function(*spoilt, **more)
    for width in (47, 8):
        with pytest.raises(ValueError, match="multiple of 16"):
            products.weight_gradients(y[:, :width], x, [True], [False])
        with pytest.raises(ValueError, match="multiple of 16"):
            products.forward(x, w[:width], None, y[:, :width].contiguous())
    with pytest.raises(ValueError, match="multiple of 16"):
        products.forward(x[:, :24].contiguous(), w[:, :24].contiguous(), None, y)
