"""The matrix product with its epilogues, and linear_act and feed_forward, against float64 within the error budget."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter

pytest.importorskip("triton", reason="tests the Triton kernels")

from fastbert import functional, testing
from fastbert.kernels import _activation, _gemm, feed_forward, reference
from fastbert.kernels._gemm_config import GemmConfig
from fastbert.kernels._invariance import batch_invariant
from fastbert.testing import MODELS, ModelShape, allowed_factor, assert_op, assert_within_budget

if functional.why_not_triton(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

torch.set_num_threads(1)

ACTIVATIONS = functional.ACTIVATIONS
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def invariantly(function):
    """The function with our matrix product wherever the vendor's may be used."""

    def run(*args, **kwargs):
        with batch_invariant():
            return function(*args, **kwargs)

    return run


# hidden, heads, intermediate; lengths
SHAPES = {
    "no_block_divides": (ModelShape(40, 1, 88, 1), [5, 128, 1, 77]),
    "one_token": (ModelShape(64, 2, 128, 1), [1]),
    "odd_rows_of_bytes": (ModelShape(41, 1, 51, 1), [35]),  # rows of 82 bytes: no bulk copies, no wide loads
    "several_tiles_each_way": (ModelShape(72, 2, 264, 1), [140]),
    "no_tokens": (ModelShape(32, 1, 64, 1), [0]),
}


# ---- both operators against the reference ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype, device):
    """Every output and gradient of both operators, for every activation, in every dtype."""
    model, lengths = SHAPES["no_block_divides"]
    for op in ("linear_act", "feed_forward"):
        inputs = testing.INPUTS[op](model, lengths, activation=activation)
        assert_op(op, inputs, dtype, device, factor=allowed_factor(dtype))


@pytest.mark.parametrize("activation", ["gelu", "geglu"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, activation, device):
    model, lengths = SHAPES[shape]
    for op in ("linear_act", "feed_forward"):
        assert_op(op, testing.INPUTS[op](model, lengths, activation=activation), torch.float16, device)


@pytest.mark.parametrize("activation", ["gelu", "geglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_batch_invariant_forms(dtype, activation, device):
    model, lengths = SHAPES["no_block_divides"]
    for op in ("linear_act", "feed_forward"):
        inputs = testing.INPUTS[op](model, lengths, activation=activation)
        checks = testing.compare(
            invariantly(getattr(feed_forward, op)),
            getattr(reference, op),
            inputs,
            dtype,
            device,
            factor=allowed_factor(dtype),
        )
        assert all(check.passed for check in checks), checks


def test_no_biases(device):
    inputs = testing.feed_forward_inputs(MODELS["tiny"], [35], down_bias=False) | {"up_bias": None}
    assert_op("feed_forward", inputs, torch.float16, device)
    assert_op("linear_act", testing.linear_act_inputs(MODELS["tiny"], [35], bias=False), torch.float16, device)


# ---- the kernels with configs of the tests ---------------------------------------------------------------

CONFIGS = {
    "pointers": GemmConfig(32, 32, 16, slice_n=32),
    "pointers_persistent": GemmConfig(16, 64, 32, slice_n=16, flatten=True, programs_per_sm=1, group_m=3),
    "descriptors": GemmConfig(32, 64, 16, slice_n=32, bulk=True, flatten=True, programs_per_sm=1, group_m=2),
}


def matrices(layout, m, n, k, dtype, device):
    """a, b in this layout, their true product in float64, and torch's product."""
    a = torch.randn(m, k, device=device, dtype=dtype)
    b = torch.randn(n, k, device=device, dtype=dtype) / math.sqrt(k)
    truth, plain = a.double() @ b.double().t(), a @ b.t()
    a = a.t().contiguous() if layout == "tn" else a
    return a, b if layout == "nt" else b.t().contiguous(), truth, plain


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("layout", ["nt", "nn", "tn"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gemm_layouts(layout, config, dtype, device):
    a, b, truth, plain = matrices(layout, 40, 104, 72, dtype, device)
    c, none = _gemm.gemm(a, b, None, layout, CONFIGS[config])
    assert none is None
    assert_within_budget(c, plain, truth, factor=allowed_factor(dtype))

    total = torch.randn(40, 104, device=device)
    expected = total.double() + truth
    _gemm.gemm(a, b, None, layout, CONFIGS[config], out=total, accumulate=True)
    # 16-bit inputs, float32 sums: the budget is float32's error, not that of the inputs' dtype
    assert_within_budget(total, expected.float(), expected, "accumulated", factor=8.0)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("activation", ["gelu", "geglu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gemm_epilogues(activation, config, dtype, device):
    """act(x w^T + bias) with the pre-activation, and the backward epilogue with its column sums."""
    m, n, k = 40, 72, 56
    width = 2 * n if activation == "geglu" else n
    x, w, _, _ = matrices("nt", m, width, k, dtype, device)
    bias = torch.randn(width, device=device, dtype=dtype)
    y, h = _gemm.gemm(x, w, bias, "nt", CONFIGS[config], activation, save_h=True)
    h64 = torch.nn.functional.linear(*(t.double() for t in (x, w, bias))).requires_grad_()
    y64 = reference.activate(h64, activation)
    h_plain = torch.nn.functional.linear(x, w, bias)
    factor = allowed_factor(dtype)
    assert_within_budget(h, h_plain, h64, "h", factor)
    assert_within_budget(y, reference.activate(h_plain, activation), y64, "y", factor)

    dy, down, _, _ = matrices("nn", m, n, k, dtype, device)
    h = h_plain.detach()
    dh, a, dbias = _gemm.gemm_dact(dy, down, h, activation, CONFIGS[config], True, True)
    truth = plain = None
    for working in (torch.float64, dtype):
        leaf = h.to(working).requires_grad_()
        out = reference.activate(leaf, activation)
        (grad,) = torch.autograd.grad(out, leaf, dy.to(working) @ down.to(working))
        truth, plain = (out, grad) if truth is None else truth, (out, grad)
    assert_within_budget(a, plain[0], truth[0], "a", factor)
    assert_within_budget(dh, plain[1], truth[1], "dh", factor)
    assert_within_budget(dbias, plain[1].sum(0), truth[1].sum(0), "dbias", factor)


def test_unwanted_results_of_the_backward_epilogue_are_none(device):
    dy, down, _, _ = matrices("nn", 40, 48, 32, torch.float16, device)
    h = torch.randn(40, 48, device=device, dtype=torch.float16)
    dh, a, dbias = _gemm.gemm_dact(dy, down, h, "relu", CONFIGS["pointers"], False, False)
    assert a is None
    assert dbias is None
    assert_within_budget(dh, (dy @ down) * (h > 0), (dy.double() @ down.double()) * (h > 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_alone(activation, dtype, device):
    """Values and derivatives from -30 to 30 and at 0: the tails of an approximate GELU would show."""
    h = torch.cat((torch.linspace(-30, 30, 1199), torch.linspace(-4, 4, 1200), torch.zeros(1))).to(device, dtype)
    h = (torch.cat((h, h.flip(0) + 1)) if activation == "geglu" else h)[None]
    a = feed_forward._activate(h, activation)
    g = torch.randn(a.shape, device=device, dtype=dtype)
    dh, a_again, dbias = feed_forward._activate_backward(g, h, activation, True, True)
    assert torch.equal(a, a_again)
    assert_within_budget(dbias.to(dtype), dh[0], dh[0].double())

    for name, ours, index in (("a", a, 0), ("dh", dh, 1)):
        both = []
        for working in (dtype, torch.float64):
            leaf = h.to(working).requires_grad_()
            out = reference.activate(leaf, activation)
            both.append((out, *torch.autograd.grad(out, leaf, g.to(working)))[index])
        assert_within_budget(ours, *both, name)
    # far from 0 the function is exactly 0 or the identity
    if activation in ("gelu", "gelu_tanh"):
        far = torch.tensor([[-1e4, 1e4, -60.0, 60.0]], device=device, dtype=dtype)
        assert torch.equal(feed_forward._activate(far, activation), far.clamp(min=0.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_infinity_and_nan(activation, dtype, device):
    """An overflow must show as in torch: GELU of -inf is -inf * 0, a NaN, and a NaN stays NaN.

    The 16-bit GELU made 0 of -inf, and on a GPU, whose minimum and maximum drop NaN, 0 of NaN. The expected values are
    torch's in float64, since torch's float32 and bfloat16 GELU for CPUs makes NaN of +inf.
    """
    h = torch.tensor([[-math.inf, math.inf, math.nan, -1.0, 1.0]], device=device, dtype=dtype)
    h = torch.cat((h, torch.full_like(h, 2.0)), dim=1) if activation == "geglu" else h
    leaf = h.double().requires_grad_()
    expected = reference.activate(leaf, activation)
    (gradient,) = torch.autograd.grad(expected, leaf, torch.ones_like(expected))

    ours = feed_forward._activate(h, activation)
    dh, _, _ = feed_forward._activate_backward(torch.ones_like(ours), h, activation, False, False)
    near = {"rtol": 0.02, "atol": 1e-2, "equal_nan": True}
    assert torch.allclose(ours.double(), expected.detach(), **near), ours
    assert torch.allclose(dh.double(), gradient, **near), dh


def test_gelu_tail():
    """The 16-bit polynomial in place of erf has the accuracy that its comment claims."""
    x = torch.linspace(0, 6, 6001, dtype=torch.float64)
    p = torch.zeros_like(x)
    for n in range(7, 0, -1):
        p = (p + getattr(_activation, f"TAIL_{n}").value) * x
    error = (torch.exp2(p - 1) / (0.5 * torch.erfc(x / math.sqrt(2))) - 1).abs()
    assert error[0] == 0
    assert error[x <= 4].max() < 5e-6
    assert error.max() < 8e-5


# ---- properties ------------------------------------------------------------------------------------------


def clone_inputs(inputs, dtype, device):
    return {
        k: v.to(device, dtype, copy=True).requires_grad_() if isinstance(v, torch.Tensor) else v
        for k, v in inputs.items()
    }


@pytest.mark.parametrize("activation", ["gelu", "geglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_recompute_changes_no_bit(activation, dtype, device):
    """`recompute` only trades memory for time, and does not keep the pre-activation."""
    results = []
    for recompute in (False, True):
        inputs = clone_inputs(testing.feed_forward_inputs(MODELS["tiny"], [70], activation=activation), dtype, device)
        y = feed_forward.feed_forward(**inputs, recompute=recompute)
        saved = max(t.shape[-1] for t in y.grad_fn.saved_tensors if t is not None and t.shape[0] == 70)
        assert (saved > MODELS["tiny"].hidden) is not recompute
        leaves = [t for t in inputs.values() if isinstance(t, torch.Tensor)]
        torch.manual_seed(1)
        results.append((y, *torch.autograd.grad(y, leaves, torch.randn_like(y))))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.usefixtures("even_products")
def test_rows_do_not_depend_on_their_batch(dtype, device):
    """Batch-invariant: a row's output and gradient have the same bits alone and among others."""
    inputs = clone_inputs(testing.feed_forward_inputs(MODELS["tiny"], [140]), dtype, device)
    x = inputs.pop("x")
    dy = torch.randn(x.shape, device=device).to(dtype)
    weight, bias = inputs["up_weight"], inputs["up_bias"]

    def run(rows):
        outs = []
        with batch_invariant():
            part = x[rows].detach().requires_grad_()
            y = feed_forward.feed_forward(part, **inputs)
            outs += [y, *torch.autograd.grad(y, part, dy[rows])]
            part = x[rows].detach().requires_grad_()
            y = _gemm.linear(part, weight, bias)
            outs += [y, *torch.autograd.grad(y, part, y.detach())]
        return outs

    whole = run(slice(0, 140))
    for rows in (slice(0, 1), slice(77, 78), slice(130, 140), slice(3, 70)):
        for ours, alone in zip(whole, run(rows), strict=True):
            assert torch.equal(ours[rows], alone)


def test_linear(device):
    for dtype in DTYPES:
        x, w, _, _ = matrices("nt", 35, 51, 40, dtype, device)
        checks = testing.compare(
            _gemm.linear, torch.nn.functional.linear,
            {"x": x.view(5, 7, 40), "weight": w, "bias": torch.randn(51)}, dtype, device, factor=allowed_factor(dtype),
        )  # fmt: skip
        assert all(check.passed for check in checks), checks


NON_CONTIGUOUS = {
    "columns_of_a_wider_one": lambda t: torch.cat((t, torch.full_like(t, float("nan"))), dim=-1)[..., : t.shape[-1]],
    "every_other_row": lambda t: torch.stack((t, torch.full_like(t, float("nan"))), dim=1).flatten(0, 1)[::2],
    "transposed": lambda t: t.t().contiguous().t(),
    "not_on_16_bytes": lambda t: torch.cat((t.new_full((1,), float("nan")), t.flatten()))[1:].view(t.shape),
}


@pytest.mark.parametrize("view", NON_CONTIGUOUS)
def test_views(view, device):
    """Strided x, weights and upstream gradients give the results of contiguous copies."""
    inputs = clone_inputs(testing.feed_forward_inputs(MODELS["tiny"], [70]), torch.float16, device)
    strided = {
        k: NON_CONTIGUOUS[view](v.detach()).requires_grad_() if k in ("x", "up_weight", "down_weight") else v
        for k, v in inputs.items()
    }
    dy = torch.randn_like(inputs["x"])
    results = []
    for given, upstream in ((inputs, dy), (strided, NON_CONTIGUOUS[view](dy))):
        leaves = [t for t in given.values() if isinstance(t, torch.Tensor)]
        y = feed_forward.feed_forward(**given)
        results.append((y, *torch.autograd.grad(y, leaves, upstream)))
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=2e-3, atol=2e-3)


def test_expanded_gradient_and_leading_dimensions(device):
    """x [2, 35, C] with the gradient of a sum, whose strides are zero."""
    inputs = clone_inputs(testing.feed_forward_inputs(MODELS["tiny"], [70]), torch.float16, device)
    leaves = [t for t in inputs.values() if isinstance(t, torch.Tensor)]
    y = feed_forward.feed_forward(**inputs | {"x": inputs["x"].view(2, 35, -1)})
    assert y.shape == (2, 35, MODELS["tiny"].hidden)
    grads = torch.autograd.grad(y.sum(), leaves)
    flat = feed_forward.feed_forward(**inputs)
    expected = torch.autograd.grad(flat, leaves, torch.ones_like(flat))
    assert torch.equal(y.flatten(0, 1), flat)
    assert all(torch.equal(one, other) for one, other in zip(grads, expected, strict=True))


@pytest.mark.parametrize("wanted", ["x", "up_weight", "up_bias", "down_weight", "down_bias"])
def test_one_gradient_alone(wanted, device):
    """Frozen parameters: a single gradient equals the one computed with the others."""
    inputs = clone_inputs(testing.feed_forward_inputs(MODELS["tiny"], [35]), torch.float16, device)
    y = feed_forward.feed_forward(**inputs)
    dy = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, inputs[wanted], dy)
    frozen = {k: v if k == wanted or not isinstance(v, torch.Tensor) else v.detach() for k, v in inputs.items()}
    assert torch.equal(torch.autograd.grad(feed_forward.feed_forward(**frozen), frozen[wanted], dy)[0], expected)


def test_offsets_past_two_billion(tmp_path, device):
    """Rows are 2^24 elements apart, so that the last ones need more than int32; the memory is a sparse file."""
    rows, stride, width, n = 130, 2**24 + 64, 64, 32
    size = rows * stride
    if device == "cuda":
        storage = torch.zeros(size, dtype=torch.float16, device=device)
    else:
        storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.float16)
    x, y = storage.as_strided((rows, width), (stride, 1)), storage.as_strided((rows, n), (stride, 1), width)
    x.copy_(torch.randn(rows, width))
    w = torch.randn(n, width, device=device).half() / 8
    truth, plain = x.double() @ w.double().t(), x.contiguous() @ w.t()
    for name in ("pointers", "descriptors"):
        assert_within_budget(_gemm.gemm(x, w, None, "nt", CONFIGS[name], out=y)[0], plain, truth)
        y.zero_()
    assert torch.equal(feed_forward._activate(x, "relu"), x.clamp(min=0))


# ---- autocast, compile, export ---------------------------------------------------------------------------


def test_autocast(device):
    """As F.linear: computes in autocast's dtype, and gives gradients in the parameters' dtype."""
    inputs = clone_inputs(testing.feed_forward_inputs(MODELS["tiny"], [35]), torch.float32, device)
    leaves = [t for t in inputs.values() if isinstance(t, torch.Tensor)]
    with torch.autocast(device, dtype=torch.float16):
        y = feed_forward.feed_forward(**inputs)
        act = feed_forward.linear_act(inputs["x"], inputs["up_weight"], inputs["up_bias"])
        plain = _gemm.linear(inputs["x"], inputs["up_weight"])
    assert {y.dtype, act.dtype, plain.dtype} == {torch.float16}
    grads = torch.autograd.grad(y, leaves, torch.randn_like(y))
    assert {g.dtype for g in grads} == {torch.float32}
    assert torch.equal(y, feed_forward.feed_forward(**clone_inputs(inputs, torch.float16, device)))


def test_compiles_once_for_all_lengths(device):
    """fullgraph with dynamic rows gives one forward graph for all lengths, and the bits of eager mode."""
    inputs = clone_inputs(testing.feed_forward_inputs(MODELS["tiny"], [0]), torch.float16, device)
    del inputs["x"]
    leaves = [t for t in inputs.values() if isinstance(t, torch.Tensor)]
    counter = CompileCounter()
    for backend in (counter, "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(feed_forward.feed_forward, fullgraph=True, backend=backend)
        for rows in (17, 35, 70, 6):
            x = torch.randn(rows, MODELS["tiny"].hidden, device=device).half()
            torch._dynamo.mark_dynamic(x, 0)
            y, expected = compiled(x, **inputs), feed_forward.feed_forward(x, **inputs)
            assert torch.equal(y, expected)
            dy = torch.randn_like(y)
            for ours, other in zip(
                torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True
            ):
                assert torch.equal(ours, other)
    assert counter.frame_count == 1


class Layer(torch.nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.weights = torch.nn.ParameterDict({k: v.detach() for k, v in inputs.items() if hasattr(v, "detach")})

    def forward(self, x):
        return feed_forward.feed_forward(x, **self.weights)


def test_exports(device):
    inputs = clone_inputs(testing.feed_forward_inputs(MODELS["tiny"], [35]), torch.float16, device)
    x = inputs.pop("x").detach()
    layer = Layer(inputs)
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: rows},))
    for part in (x, x[:7]):
        assert torch.equal(program.module()(part), layer(part))


def operators(device):
    """Every registered operator with its arguments."""
    inputs = testing.feed_forward_inputs(MODELS["tiny"], [35], activation="geglu")
    inputs = {k: v.detach() for k, v in clone_inputs(inputs, torch.float16, device).items() if hasattr(v, "detach")}
    x, up, up_bias, down, down_bias = inputs.values()
    act, h = feed_forward._linear_act(x, up, up_bias, "geglu", True, False)
    dy = torch.randn_like(x)
    yield "linear_act", feed_forward._linear_act, (x, up, up_bias, "geglu", True, False)
    yield "linear_act, inference", feed_forward._linear_act, (x, up, None, "geglu", False, False)
    wants = [True, False, True]
    yield "linear_act_backward", feed_forward._linear_act_backward, (act, x, up, h, "geglu", wants, False)
    yield "feed_forward", feed_forward._feed_forward, (x, up, up_bias, down, down_bias, "geglu", True, False, False)
    wants = [True, True, False, True, True]
    yield "backward", feed_forward._feed_forward_backward, (dy, x, up, up_bias, down, h, "geglu", wants, False)
    yield "recompute", feed_forward._feed_forward_backward, (dy, x, up, up_bias, down, None, "geglu", wants, True)
    yield "linear", _gemm._linear, (x, up, up_bias)
    yield "linear_backward", _gemm._linear_backward, (h, x, up, [True, True, False])


def test_opcheck(device):
    for _name, op, arguments in operators(device):
        torch.library.opcheck(op.operator, arguments)


# ---- errors ----------------------------------------------------------------------------------------------


def test_errors(device):
    x, w = torch.randn(3, 8, device=device), torch.randn(6, 8, device=device)
    with pytest.raises(ValueError, match=r"activation must be one of .*got 'tanh'"):
        feed_forward.linear_act(x, w, None, "tanh")
    with pytest.raises(TypeError, match=r"share one dtype .*x': torch.float32, 'weight': torch.float16"):
        feed_forward.linear_act(x, w.half())
    with pytest.raises(TypeError, match="share one dtype"):
        feed_forward.feed_forward(x.double(), w.double(), None, w.double().t())
    with pytest.raises(TypeError, match="linear: all tensors must share one dtype"):
        _gemm.linear(x, w, w[:, 0].half())
