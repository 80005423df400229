"""add_layer_norm, its pre-norm form and RMSNorm in Triton: outputs and gradients against float64, and properties."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounter

pytest.importorskip("triton", reason="tests the Triton kernels")

from fastbert import functional
from fastbert.kernels import layer_norm, reference
from fastbert.kernels._random import keep_mask, row_keys
from fastbert.testing import ModelShape, allowed_factor, assert_op, assert_within_budget, norm_inputs

if functional.why_not_triton(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

torch.set_num_threads(1)

OPS = ["add_layer_norm", "add_layer_norm_sum", "add_rms_norm"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs_of(op, width, rows, **options):
    return norm_inputs(ModelShape(width, 1, width, 1), [rows], bias=op != "add_rms_norm", **options)


def outputs_of(op, *arguments, **options) -> tuple:
    """The outputs of an operator as a tuple, whether it has one or two."""
    if op == "add_rms_norm":
        arguments = arguments[:3]
    outputs = getattr(layer_norm, op)(*arguments, **options)
    return outputs if isinstance(outputs, tuple) else (outputs,)


# ---- against the reference -------------------------------------------------------------------------------

WIDTHS = {
    "one_column": 1,  # zero variance: y = bias
    "under_a_block": 7,
    "several_rows_a_warp": 64,
    "minilm": 384,  # two rows of 512 in a program
    "base": 768,  # three quarters of a block
    "multiple_of_eight_only": 1000,
    "block_is_full": 1024,
    "widest": 8192,
}


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS.keys())
@pytest.mark.parametrize("op", OPS)
def test_widths(op, width, device):
    """Every output and gradient, with all inputs and dropout."""
    # RMSNorm of one column is a sign, whose gradient is of the size of eps: with a small eps it is only rounding
    eps = {"eps": 0.1} if width == 1 else {}
    assert_op(op, inputs_of(op, width, 3, x_bias=True, dropout_p=0.1, **eps), torch.float16, device)
    assert_op(op, inputs_of(op, width, 3, **eps), torch.float32, device)


# 257 rows of 40: backward programs loop, the last tile has one row of four, and 64 partial sums are added
@pytest.mark.parametrize(("rows", "width"), [(1, 384), (3, 384), (257, 40)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_rows_and_dtypes(op, dtype, rows, width, device):
    assert_op(op, inputs_of(op, width, rows, x_bias=True, dropout_p=0.1), dtype, device, factor=allowed_factor(dtype))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("op", OPS)
def test_every_input_may_be_absent(op, dropout_p, device):
    present = itertools.product([False, True], repeat=4)
    for residual, weight, bias, x_bias in present:
        inputs = inputs_of(op, 20, 9, residual=residual, x_bias=x_bias, dropout_p=dropout_p)
        if not weight:
            inputs["weight"] = None
        if not bias and op != "add_rms_norm":
            inputs["bias"] = None
        assert_op(op, inputs, torch.float32, device)


@pytest.mark.parametrize("op", OPS)
def test_no_rows(op, device):
    assert_op(op, inputs_of(op, 24, 0, x_bias=True, dropout_p=0.1), torch.float32, device)
    x = torch.empty(2, 0, 24, device=device)
    assert all(out.shape == x.shape for out in outputs_of(op, x, x, None, None))


# beyond 4,096 columns dbias and dx_bias are summed by another kernel
ALONE = [*((op, 40, p) for op in OPS for p in (0.0, 0.2)), ("add_layer_norm", 5000, 0.2)]


@pytest.mark.parametrize(("op", "width", "dropout_p"), ALONE)
def test_a_gradient_alone_has_the_same_bits(op, width, dropout_p, device):
    """Freezing all inputs but one changes which tensors the backward kernel writes, and nothing else."""
    values = values_of(op, width, device)
    together = gradients_of(op, values, range(len(values)), dropout_p)
    for n, expected in enumerate(together):
        assert torch.equal(gradients_of(op, values, [n], dropout_p)[0], expected), f"input {n}"


@pytest.mark.parametrize(("op", "width", "dropout_p"), ALONE)
def test_one_kernel_computes_any_set_of_gradients(op, width, dropout_p, device, kernels_of):
    """Two kernels could add in different orders, since the compiler chooses layouts by loads and stores."""
    values = values_of(op, width, device)
    everything = range(len(values))
    together = kernels_of(lambda: gradients_of(op, values, everything, dropout_p))
    assert len(together) == 3  # forward, backward, the sum of partial sums
    for n in everything:
        assert kernels_of(lambda n=n: gradients_of(op, values, [n], dropout_p)) <= together, f"input {n}"


def values_of(op, width, device):
    """x, residual, weight, bias (RMSNorm has none), x_bias."""
    values = [torch.randn(5, width, device=device) for _ in range(2)] + [
        torch.randn(width, device=device) for _ in "wbx"
    ]
    if op == "add_rms_norm":
        values.pop(3)
    return values


def gradients_of(op, values, wanted, dropout_p):
    leaves = [v.clone().requires_grad_(n in wanted) for n, v in enumerate(values)]
    weights = leaves[2:-1] + [None] * (op == "add_rms_norm")
    seed = torch.tensor([5], device=values[0].device)
    outputs = outputs_of(op, *leaves[:2], *weights, x_bias=leaves[-1], dropout_p=dropout_p, seed=seed)
    upstream = [torch.sin(torch.arange(o.numel(), device=o.device).view(o.shape) + 1.0) for o in outputs]
    return torch.autograd.grad(outputs, [leaves[n] for n in wanted], upstream)


@pytest.mark.parametrize("op", OPS)
def test_forward_is_one_kernel_with_and_without_gradients(op, device, kernels_of):
    """Storing the statistics made another kernel: if nothing else used a row's mean, sum / N was not rounded before it
    was subtracted, so y had other bits in training."""
    x, residual, *weights, x_bias = values_of(op, 384, device)
    forward = lambda: outputs_of(op, x, residual, *weights, *[None] * (op == "add_rms_norm"), x_bias=x_bias)  # noqa: E731
    alone, kernel = forward(), kernels_of(forward)
    x.requires_grad_()
    assert kernels_of(forward) == kernel
    assert all(map(torch.equal, forward(), alone))


def test_sum_form_with_one_output_unused(device):
    x, residual = (torch.randn(5, 24, device=device, requires_grad=True) for _ in range(2))
    for used in (0, 1):
        dy = torch.randn(5, 24, device=device)
        grads = [
            torch.autograd.grad(impl.add_layer_norm_sum(x, residual, None, None)[used], (x, residual), dy)
            for impl in (layer_norm, reference)
        ]
        torch.testing.assert_close(*grads)


def test_gradients_of_x_and_residual_do_not_share_memory(device):
    """Without dropout they are one tensor internally, but scaling one in place must not scale the other."""
    x, residual = (torch.randn(5, 24, device=device, requires_grad=True) for _ in range(2))
    layer_norm.add_layer_norm(x, residual, None, None).backward(torch.randn(5, 24, device=device))
    before = residual.grad.clone()
    x.grad.mul_(3.0)
    assert torch.equal(residual.grad, before)


# ---- memory layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_strided_inputs(op, device):
    """Columns of wider NaN-poisoned tensors, a transposed tensor, one at an odd address, and an expanded upstream
    gradient give the same bits."""
    values = [torch.randn(6, 24, device=device) for _ in range(2)]
    weights = [torch.randn(24, device=device) for _ in range(2)]
    dy = torch.randn(24, device=device)

    def run(x, residual, upstream):
        leaves = [t.requires_grad_() for t in (x, residual, *weights)]
        outputs = outputs_of(op, *leaves)
        return *outputs, *torch.autograd.grad(outputs, leaves, [upstream] * len(outputs), allow_unused=True)

    def within_nan(t):
        wide = torch.full((t.shape[0], t.shape[1] + 11), torch.nan, device=device)
        wide[:, 5:-6] = t
        return wide[:, 5:-6].detach()

    plain = run(*(v.clone() for v in values), dy.expand(6, 24).contiguous())
    for x, residual, upstream in (
        (*(within_nan(v) for v in values), within_nan(dy.expand(6, 24))),
        (values[0].t().contiguous().t(), values[1].clone(), dy.expand(6, 24)),
        (*(torch.cat((v.new_zeros(1), v.flatten()))[1:].view(6, 24) for v in values), dy.expand(6, 24)),
    ):
        for ours, expected in zip(run(x, residual, upstream), plain, strict=True):
            assert (ours is None and expected is None) or torch.equal(ours, expected)


@pytest.mark.parametrize("op", OPS)
def test_one_kernel_for_every_layout_of_rows(op, device, kernels_of):
    values = values_of(op, 24, device)
    elsewhere = [torch.cat((v.new_zeros(1), v.flatten()))[1:].view(v.shape) for v in values]  # at an odd address
    assert all(v.data_ptr() % 16 for v in elsewhere)
    wide = [torch.cat((v, v), dim=-1)[..., :24] for v in values]
    plain = kernels_of(lambda: gradients_of(op, values, range(len(values)), 0.1))
    for moved in (elsewhere, wide):
        leaves = [v.requires_grad_() for v in moved]
        weights = leaves[2:-1] + [None] * (op == "add_rms_norm")
        seed = torch.tensor([5], device=device)

        def backward(leaves=leaves, weights=weights, seed=seed):
            outputs = outputs_of(op, *leaves[:2], *weights, x_bias=leaves[-1], dropout_p=0.1, seed=seed)
            upstream = [torch.ones(5, 25, device=device).view(-1)[1:121].view(5, 24) for _ in outputs]
            torch.autograd.grad(outputs, leaves, upstream)

        assert kernels_of(backward) == plain


def test_more_dimensions(device):
    """[B, S, N], and a slice of it that is no view [M, N]."""
    x = torch.randn(4, 6, 32, device=device)[:, 1:5]
    y, z = layer_norm.add_layer_norm_sum(x, x, None, None)
    assert y.shape == z.shape == x.shape
    torch.testing.assert_close(y, reference.add_layer_norm(x, x, None, None))


def test_element_offsets_past_32_bits(device, tmp_path):
    """The kernel reads rows 0 and 2^18 of 8,192 elements, where 32-bit offsets would wrap."""
    if device != "cpu":
        pytest.skip("a sparse file maps to CPU memory only")
    n_rows, width = 2**18 + 1, 8192
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=n_rows * width, dtype=torch.float16)
    x = storage.as_strided((2, width), (2**31, 1)).copy_(torch.randn(2, width))
    rstd, dweight = torch.ones(n_rows), torch.empty(1, width)
    layer_norm._add_norm_bwd_kernel[(1,)](
        dy_ptr=x, dz_out_ptr=None, x_ptr=x, residual_ptr=None, x_bias_ptr=None, weight_ptr=None,
        mean_ptr=None, rstd_ptr=rstd, seed_ptr=None, row_ids_ptr=None, dx_ptr=x[:0], dresidual_ptr=x[:0],
        dweight_part_ptr=dweight, dbias_part_ptr=None, dx_bias_part_ptr=None, n_rows=n_rows, rows_per_step=n_rows - 1,
        stream_id=0, threshold=0, keep_scale=1.0, has_dz_out=0, want_dx=0, want_dresidual=0, want_dweight=1,
        want_dbias=0, want_dx_bias=0, N=width, RMS=True, X_IS_SUM=False, BLOCK_M=1, BLOCK_N=width, num_warps=16,
    )  # fmt: skip
    torch.testing.assert_close(dweight[0], x.float().square().sum(0))


# ---- dropout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [7, 384, 2048])
@pytest.mark.parametrize("named", [False, True], ids=["rows_by_number", "rows_by_name"])
def test_dropout_mask_is_the_specification_s(named, width, device):
    """Exactly the same mask in the forward pass (z is zero where dropped) and the backward pass (dx is)."""
    rows, p = 37, 0.3
    seed = torch.tensor([2**62 + 12345], device=device)
    names = torch.randint(-(2**62), 2**62, (rows,), device=device)
    x = torch.ones(rows, width, device=device, requires_grad=True)
    _, z = layer_norm.add_layer_norm_sum(
        x, None, None, None, dropout_p=p, seed=seed, stream=11, row_ids=names if named else None
    )
    keep = keep_mask(row_keys(seed, 11, names if named else torch.arange(rows, device=device)), width, p)
    assert torch.equal(z != 0.0, keep)
    (dx,) = torch.autograd.grad(z, x, torch.ones_like(z))
    assert torch.equal(dx != 0.0, keep)
    torch.testing.assert_close(dx[keep], torch.full_like(dx[keep], 1 / (1 - p)))


def test_dropout_differs_by_seed_and_stream(device):
    x = torch.ones(8, 256, device=device)

    def mask(seed, stream):
        seed = torch.tensor([seed], device=device)
        return layer_norm.add_layer_norm_sum(x, None, None, None, dropout_p=0.5, seed=seed, stream=stream)[1] != 0.0

    masks = [mask(1, 0), mask(1, 1), mask(2, 0)]
    assert torch.equal(masks[0], mask(1, 0))
    for a, b in itertools.combinations(masks, 2):
        assert 0.4 < (a == b).float().mean() < 0.6


# ---- numbers that hurt -----------------------------------------------------------------------------------


def test_large_mean(device):
    """A row far from zero: a variance computed as avg(z^2) - avg(z)^2 would lose all digits."""
    x = torch.randn(5, 768, device=device) + 3000.0
    truth = reference.add_layer_norm(x.double(), None, None, None)
    assert_within_budget(
        layer_norm.add_layer_norm(x, None, None, None), reference.add_layer_norm(x, None, None, None), truth
    )


def test_constant_row(device):
    """Without variance: zeros, and finite gradients."""
    x = torch.full((2, 100), 2.0, device=device, requires_grad=True)
    y = layer_norm.add_layer_norm(x, None, None, None)
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.autograd.grad(y, x, torch.randn_like(y))[0].isfinite().all()


def test_sum_form_normalises_the_sum_that_it_returns(device):
    """Rows with almost no variance: y was computed from the unrounded z, but x_hat from the rounded one that backward
    reads, which gave a weight gradient of 1e6 times the rounding error."""
    x, residual = (torch.full((3, 8), value, device=device, dtype=torch.float16) for value in (1.1, 0.0004))
    weight = torch.ones(8, device=device, dtype=torch.float16, requires_grad=True)
    y, _ = layer_norm.add_layer_norm_sum(x, residual, weight, None)
    assert torch.equal(y, torch.zeros_like(y))
    (dweight,) = torch.autograd.grad(y, weight, torch.randn_like(y))
    assert torch.equal(dweight, torch.zeros_like(dweight))


def test_a_poisoned_row_affects_no_other_row(device):
    x = torch.randn(9, 48, device=device)
    clean = layer_norm.add_layer_norm(x, x, None, None)
    x[4] = torch.nan
    y = layer_norm.add_layer_norm(x, x, None, None)
    assert y[4].isnan().all()
    others = torch.arange(9, device=device) != 4
    assert torch.equal(y[others], clean[others])


# ---- properties ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [64, 384, 768])
@pytest.mark.parametrize("op", OPS)
def test_a_row_alone_has_the_same_bits(op, width, device):
    values = [torch.randn(11, width, device=device) for _ in range(2)]
    dy = torch.randn(11, width, device=device)
    seed = torch.tensor([3], device=device)

    def run(rows):
        x, residual = (v[rows].clone().requires_grad_() for v in values)
        outputs = outputs_of(op, x, residual, None, None, dropout_p=0.1, seed=seed, row_ids=rows)
        return *outputs, *torch.autograd.grad(outputs, (x, residual), [dy[rows]] * len(outputs))

    together = run(torch.arange(11, device=device))
    for rows in (torch.tensor([7], device=device), torch.tensor([10, 2, 5], device=device)):
        for ours, expected in zip(run(rows), together, strict=True):
            assert torch.equal(ours, expected[rows])


def test_mixed_dtypes(device):
    """Under autocast x comes from a linear layer in half precision; residual and parameters are float32."""
    inputs = inputs_of("add_layer_norm_sum", 96, 5, x_bias=True)
    leaves = {name: t.to(device, copy=True).requires_grad_() for name, t in inputs.items()}
    x = leaves["x"] = leaves["x"].detach().half().requires_grad_()
    y, z = layer_norm.add_layer_norm_sum(**leaves)
    assert (y.dtype, z.dtype) == (torch.float16, torch.float32)
    exact = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    truth = reference.add_layer_norm_sum(**exact)
    assert_within_budget(z, z, truth[1], factor=1.0)
    dy, dz = torch.randn_like(y), torch.randn_like(z)
    grads = torch.autograd.grad((y, z), leaves.values(), (dy, dz))
    expected = torch.autograd.grad(truth, exact.values(), (dy.double(), dz.double()))
    for (name, leaf), ours, right in zip(leaves.items(), grads, expected, strict=True):
        assert ours.dtype == leaf.dtype, name
        assert_within_budget(ours, right.to(leaf.dtype), right, name, factor=4.0)
    assert layer_norm.add_layer_norm(x, leaves["residual"], None, None).dtype == torch.float16


def test_second_derivatives_raise(device):
    x = torch.randn(3, 8, device=device, requires_grad=True)
    y = layer_norm.add_layer_norm(x, None, None, None)
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_rows_too_wide(device):
    with pytest.raises(ValueError, match="1 to 8192 elements, got 8193"):
        layer_norm.add_layer_norm(torch.zeros(1, 8193, device=device), None, None, None)


# ---- torch.library, compile, export ----------------------------------------------------------------------


def test_opcheck(device):
    x, residual, dy = (torch.randn(5, 24, device=device) for _ in range(3))
    weight, bias, x_bias = (torch.randn(24, device=device) for _ in range(3))
    seed, row_ids = torch.tensor([1], device=device), torch.arange(5, device=device)
    for rms, want_sum, want_stats in ((False, True, True), (True, False, True), (False, False, False)):
        torch.library.opcheck(
            torch.ops.fastbert.add_norm_fwd.default,
            (x, residual, weight, bias, 1e-5, x_bias, seed, row_ids, 0.1, 2, rms, want_sum, want_stats),
        )
    stats = torch.randn(5, 2, device=device), torch.rand(5, device=device)
    for want_dx, want_dresidual, want_params in ((True, True, [True] * 3), (False, True, [True, False, False])):
        torch.library.opcheck(
            torch.ops.fastbert.add_norm_bwd.default,
            (dy, dy, x, residual, weight, bias, x_bias, *stats, seed, row_ids, 0.1, 2, False, False,
             want_dx, want_dresidual, want_params),
        )  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_compiles_once_for_all_lengths(op, device):
    weight, bias, x_bias = (torch.randn(24, device=device, requires_grad=True) for _ in range(3))
    seed = torch.tensor([1], device=device)

    def f(x, residual):
        return outputs_of(op, x, residual, weight, bias, x_bias=x_bias, dropout_p=0.2, seed=seed, stream=4)[0]

    counter = CompileCounter()
    for backend in (counter, "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
        for rows in (7, 12, 33):
            x, residual = (torch.randn(rows, 24, device=device, requires_grad=True) for _ in range(2))
            dy = torch.randn(rows, 24, device=device)
            grads = [torch.autograd.grad(g(x, residual), (x, residual, weight, x_bias), dy) for g in (compiled, f)]
            for ours, expected in zip(*grads, strict=True):
                assert torch.equal(ours, expected)
    assert counter.frame_count == 1


def test_exports(device):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.LayerNorm(24)

        def forward(self, x, residual):
            return layer_norm.add_layer_norm(x, residual, self.norm.weight, self.norm.bias)

    block = Block().to(device)
    rows = torch.export.Dim("rows", min=2, max=1000)
    x = torch.randn(9, 24, device=device)
    exported = torch.export.export(block, (x, x), dynamic_shapes=({0: rows}, {0: rows}))
    assert any("add_norm_fwd" in str(node.target) for node in exported.graph.nodes)
    x = torch.randn(20, 24, device=device)
    assert torch.equal(exported.module()(x, x), block(x, x))
