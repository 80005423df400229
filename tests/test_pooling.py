"""pool in Triton: mean, first token, maximum, with and without L2 norm: outputs and gradients against float64."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounter

pytest.importorskip("triton", reason="tests the Triton kernels")

from fastbert import functional
from fastbert.kernels import pooling, reference
from fastbert.testing import LENGTHS, ModelShape, allowed_factor, assert_op, cu_seqlens_of, pool_inputs

if functional.why_not_triton(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

torch.set_num_threads(1)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CHUNK = pooling.pool_fwd_config(64).chunk
KINDS = list(itertools.product(pooling.MODES, (False, True)))


def inputs_of(width, lengths, mode, normalize):
    return pool_inputs(ModelShape(width, 1, width, 1), lengths, mode=mode, normalize=normalize)


# ---- against the reference -------------------------------------------------------------------------------

BATCHES = {
    **LENGTHS,
    "around_a_chunk": [CHUNK - 1, CHUNK, CHUNK + 1],
    "several_chunks": [CHUNK * 5 + 3, 2, CHUNK * 2],  # more sums of chunks than are added at once
    "empty_ones_everywhere": [0, 0, 7, 0, CHUNK + 2, 0, 0],
}


@pytest.mark.parametrize(("mode", "normalize"), KINDS)
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES.keys())
def test_lengths(lengths, mode, normalize, device):
    assert_op("pool", inputs_of(40, lengths, mode, normalize), torch.float32, device)


@pytest.mark.parametrize(("mode", "normalize"), KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, mode, normalize, device):
    assert_op("pool", inputs_of(40, [5, 33, 0, 2], mode, normalize), dtype, device, factor=allowed_factor(dtype))


# one column; no power of two; several blocks of columns; more columns than partial sums are loaded for at once
@pytest.mark.parametrize("width", [1, 7, 384, 1000, 8192])
@pytest.mark.parametrize(("mode", "normalize"), KINDS)
def test_widths(mode, normalize, width, device):
    assert_op("pool", inputs_of(width, [3, 1], mode, normalize), torch.float32, device)


def test_a_long_sequence(device):
    """8,192 tokens, which are divided among several programs."""
    assert_op("pool", inputs_of(8, [8192, 3], "mean", False), torch.float32, device)


# ---- maximum ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("width", [pytest.param(24, id="chunks_in_one_tile"), pytest.param(2050, id="a_chunk_a_step")])
def test_ties_share_the_gradient_of_the_maximum(width, normalize, device):
    """As in torch.amax, within a tile, across tiles and across chunks. Inputs are integers, so most maxima are tied."""
    lengths = [CHUNK * 2 + 40, 3, 70]
    x = torch.randint(-2, 3, (sum(lengths), width), device=device).float()
    cu_seqlens = cu_seqlens_of(lengths, device)
    dy = torch.randn(3, width, device=device)
    outputs = []
    for pool in (pooling.pool, reference.pool):
        leaf = x.clone().requires_grad_()
        y = pool(leaf, cu_seqlens, "max", normalize)
        outputs.append((y, *torch.autograd.grad(y, leaf, dy)))
    torch.testing.assert_close(*outputs)
    assert (outputs[0][1] != 0.0).sum() > 10 * 24 * 3


def test_maximum_of_negative_and_infinite_numbers(device):
    x = torch.full((6, 3), -5.0, device=device)
    x[0:3, 1] = -torch.inf
    x[4, 2] = torch.inf
    y = pooling.pool(x, cu_seqlens_of([3, 3], device), "max")
    assert torch.equal(y, reference.pool(x, cu_seqlens_of([3, 3]), "max"))


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_poison_stays_in_its_sequence_and_column(mode, device):
    lengths = [5, CHUNK + 40, 4]
    x = torch.randn(sum(lengths), 20, device=device)
    cu_seqlens = cu_seqlens_of(lengths, device)
    clean = pooling.pool(x, cu_seqlens, mode)
    x[5 + CHUNK, 3] = torch.nan
    poisoned = pooling.pool(x, cu_seqlens, mode)
    assert poisoned[1, 3].isnan()
    poisoned[1, 3] = clean[1, 3]
    assert torch.equal(poisoned, clean)


# ---- the norm --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.0, 1e-14, 1e-11], ids=["zero", "under_the_clamp", "over_it"])
@pytest.mark.parametrize("mode", pooling.MODES)
def test_tiny_vectors(mode, size, device):
    """A norm below 1e-12 is replaced by 1e-12, also in the gradient."""
    x = torch.randn(4, 24, device=device).abs() * size
    outputs = []
    for pool, dtype in ((pooling.pool, torch.float32), (reference.pool, torch.float64)):
        leaf = x.to(dtype, copy=True).requires_grad_()
        y = pool(leaf, cu_seqlens_of([4], device), mode, True)
        dy = torch.linspace(-1, 2, 24, device=device, dtype=dtype)[None]
        outputs.append([t.double() for t in (y, *torch.autograd.grad(y, leaf, dy))])
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-8)


# ---- layouts and properties ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", pooling.MODES)
def test_strided_inputs(mode, device):
    """Columns of a NaN-poisoned tensor, a transposed tensor and an expanded upstream gradient give the same bits."""
    lengths = [5, 40]
    x = torch.randn(45, 20, device=device)
    wide = torch.full((45, 33), torch.nan, device=device)
    wide[:, 7:27] = x
    dy = torch.randn(20, device=device)

    def run(x, dy):
        x = x.detach().requires_grad_()
        y = pooling.pool(x, cu_seqlens_of(lengths, device), mode, True)
        return y, *torch.autograd.grad(y, x, dy)

    plain = run(x, dy.expand(2, 20).contiguous())
    for view in (wide[:, 7:27], x.t().contiguous().t()):
        for ours, expected in zip(run(view, dy.expand(2, 20)), plain, strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize(("mode", "normalize"), KINDS)
def test_a_sequence_alone_has_the_same_bits(mode, normalize, device):
    """Chunks are counted from the sequence's own start, wherever it is in the batch."""
    lengths = [7, CHUNK + 30, 0, 50, CHUNK * 2]
    x = torch.randn(sum(lengths), 40, device=device)
    dy = torch.randn(len(lengths), 40, device=device)

    def run(x, lengths, dy):
        x = x.clone().requires_grad_()
        y = pooling.pool(x, cu_seqlens_of(lengths, device), mode, normalize)
        return y, torch.autograd.grad(y, x, dy)[0].split(lengths)

    y, dx = run(x, lengths, dy)
    for b, tokens in enumerate(x.split(lengths)):
        if len(tokens) == 0:
            continue
        y_alone, dx_alone = run(tokens, [len(tokens)], dy[b : b + 1])
        assert torch.equal(y_alone[0], y[b])
        assert torch.equal(dx_alone[0], dx[b])


@pytest.mark.parametrize("mode", pooling.MODES)
def test_tokens_past_the_last_sequence(mode, device):
    """As in a batch padded to a fixed number of tokens: they change nothing, and their gradient is zero."""
    x = torch.randn(90, 24, device=device)
    x[45:] = torch.nan
    x.requires_grad_()
    cu_seqlens = cu_seqlens_of([5, 40], device)
    y = pooling.pool(x, cu_seqlens, mode, True)
    assert torch.equal(y, pooling.pool(x[:45], cu_seqlens, mode, True))
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert dx[:45].isfinite().all()
    assert torch.equal(dx[45:], torch.zeros_like(dx[45:]))


def test_errors(device):
    cu_seqlens = cu_seqlens_of([1], device)
    with pytest.raises(ValueError, match=r"mode must be one of .* got 'median'"):
        pooling.pool(torch.zeros(1, 8, device=device), cu_seqlens, "median")
    with pytest.raises(ValueError, match="1 to 8192 elements, got 8193"):
        pooling.pool(torch.zeros(1, 8193, device=device), cu_seqlens)


# ---- torch.library, compile, export ----------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "normalize"), KINDS)
def test_opcheck(mode, normalize, device):
    x, cu_seqlens = torch.randn(9, 24, device=device), cu_seqlens_of([4, 5], device)
    for want_saved in (False, True):
        torch.library.opcheck(torch.ops.fastbert.pool_fwd.default, (x, cu_seqlens, mode, normalize, want_saved))
    dy, pooled, ties = (torch.rand(2, 24, device=device) for _ in range(3))
    is_max = mode == "max"
    saved = x if is_max else None, pooled if is_max or normalize else None, ties if is_max else None
    torch.library.opcheck(torch.ops.fastbert.pool_bwd.default, (dy, cu_seqlens, *saved, 9, mode, normalize))


def test_compiles_once_for_all_lengths(device):
    def f(x, cu_seqlens):
        return torch.cat([pooling.pool(x, cu_seqlens, mode, normalize) for mode, normalize in KINDS])

    counter = CompileCounter()
    for backend in (counter, "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
        for lengths in ([3, 4], [2, 9, 4], [1, 1, 1, 5]):
            x = torch.randn(sum(lengths), 24, device=device, requires_grad=True)
            cu_seqlens = cu_seqlens_of(lengths, device)
            dy = torch.randn(len(KINDS) * len(lengths), 24, device=device)
            grads = [torch.autograd.grad(g(x, cu_seqlens), x, dy)[0] for g in (compiled, f)]
            assert torch.equal(*grads)
    assert counter.frame_count == 1


def test_exports(device):
    class Pool(torch.nn.Module):
        def forward(self, x, cu_seqlens):
            return pooling.pool(x, cu_seqlens, "mean", True)

    tokens, sequences = torch.export.Dim("tokens", min=2, max=1000), torch.export.Dim("starts", min=3, max=100)
    example = torch.randn(9, 24, device=device), cu_seqlens_of([4, 5], device)
    exported = torch.export.export(Pool(), example, dynamic_shapes=({0: tokens}, {0: sequences}))
    assert any("pool_fwd" in str(node.target) for node in exported.graph.nodes)
    x, cu_seqlens = torch.randn(20, 24, device=device), cu_seqlens_of([4, 0, 16], device)
    assert torch.equal(exported.module()(x, cu_seqlens), Pool()(x, cu_seqlens))
