"""Cross-entropy of a linear layer's outputs, of which only a chunk is in memory at a time.

    z    = hidden weight^T + bias                                    [N, V]
    m, l = max(z), sum(exp(z - m))                                   [N]
    loss = log(l) + m - (1 - e) z[label] - e / V * sum(z)            [N];  0 where label is ignore_index
    dz   = softmax(z) - (1 - e) onehot(label) - e / V                [N, V];  0 in ignored rows; times the row's scale

    dhidden = dz weight   [N, C]      dweight = dz^T hidden   [V, C]      dbias = column sums of dz   [V]

Rows are processed in chunks of at most CHUNK_BYTES of z. For a chunk, a product computes z in the working dtype. One
kernel reads the rows of z (adding the bias), writes their losses and, if a gradient is needed, overwrites z with dz.
Two products compute dhidden and dweight from dz. There is one buffer for a chunk, whatever N is.

With reduction "mean" or "sum" the upstream gradient is one number. So the forward pass computes all gradients for an
upstream gradient of 1, and the backward pass scales them: three products instead of four with recomputation (6 N V C
floating-point operations instead of 8 N V C). With "none" each row has its own upstream gradient, by which dweight
cannot be scaled afterwards; the backward pass runs the chunks again, with these gradients as row scales. Gradients of
the forward pass are not divided by N, so float16 does not underflow before a loss scale is applied; dweight and dbias
are kept in float32.

Bytes moved, with elements of b bytes and z of N V elements (chunks are written to and read from memory; hidden and
dhidden are small):

    forward    z written, read; with gradients dz written, read by two products and by dbias    (2 | 6) N V b
               weight read once a chunk for each of two products; dweight written, and read again in later chunks
    backward   dweight scaled: V C (4 + b)

At 4.3 TB/s BERT's head with gradients (N 2,458, V 30,522, C 768, bf16) moves 900 MB of z, 209 us, and its products are
346 GFLOP, 438 us at 790 TFLOP/s; the loss alone 300 MB, 70 us, beside 146 us.

The kernel reads z twice, but a row (61 KB at BERT's vocabulary in bf16) is still in L2 the second time. The pass for
dbias could be saved by a product that sums dbias in its epilogue. A kernel that keeps z on chip (with an online
logsumexp in the product's epilogue) would save the first two passes, 2 N V b of 6. But it would have to compute z again
for dz: a fourth product, which costs twice as much as those passes at BERT's C = 768 (146 us at 790 TFLOP/s instead of
70 us at 4.3 TB/s, N = 2,458).

A row's loss is computed from that row's z alone, always in the same order. The products for z and dhidden are the
vendor library's, which may choose its kernel by N; in `batch_invariant()` they are ours, so a row's bits do not depend
on the other rows.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._compile import TRITON_TYPES, CompileCall, compile_call, empty
from ._gemm import (
    accumulate_tn,
    cast_for_autocast,
    expect_one_dtype,
    matmul,
    matrix_of,
    none_of,
    wanted_of,
    wants_grad,
)
from ._invariance import is_batch_invariant
from ._launch import Plan, cdiv
from ._library import register
from ._rows import packed

# Size of z in one chunk: 4,352 rows of BERT's vocabulary in bf16. Such products fill the GPU (34 x 120 tiles), and the
# masked words of 29,000 tokens fit one chunk.
CHUNK_BYTES = 256 << 20

# A program has one row and processes 16 elements a lane at a time, two 16-byte loads of bf16 in flight. Some programs
# share a multiprocessor, so that one loads while another sums. float32 has twice as many warps, for the same number of
# bytes a lane; with 8 warps sm_100 spills two registers.
BLOCK_V, NUM_WARPS = 4096, 8

LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2_E)


# ---- device code -----------------------------------------------------------------------------------------


# A row is read in blocks of BLOCK_V without a mask, and its rest in blocks of an eighth of that with a mask. Since the
# size of a vocabulary is any number, a masked load takes every element alone: eight instructions instead of one for 16
# bytes, and in blocks of 16 elements a lane 40 more registers, for the addresses.


@triton.jit
def _load_z(z_ptr, bias_ptr, offs, n_cols, MASKED: tl.constexpr):
    """A block of z + bias in float32. MASKED: the block may extend past the last column, and is -inf there."""
    if MASKED:
        z = tl.load(z_ptr + offs, mask=offs < n_cols, other=float("-inf")).to(tl.float32)
        if bias_ptr is not None:
            z += tl.load(bias_ptr + offs, mask=offs < n_cols, other=0.0).to(tl.float32)
    else:
        z = tl.load(z_ptr + offs).to(tl.float32)
        if bias_ptr is not None:
            z += tl.load(bias_ptr + offs).to(tl.float32)
    return z


@triton.jit
def _add_columns(
    m, l, z_sum,                                 # running maximum, sum of exp(z - m), sum of z
    z_ptr, bias_ptr, first, last, n_cols,
    HAS_SMOOTHING: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(m, l, z_sum) updated with columns first to last; MASKED: only with those below n_cols."""
    for v0 in tl.range(first, last, BLOCK):
        offs = v0 + tl.arange(0, BLOCK)
        z = _load_z(z_ptr, bias_ptr, offs, n_cols, MASKED)
        m_new = tl.maximum(m, tl.max(z, axis=0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)  # as long as all z are -inf, avoids exp(-inf + inf)
        l = l * tl.exp2((m - base) * LOG2_E) + tl.sum(tl.exp2((z - base) * LOG2_E), axis=0)
        m = m_new
        if HAS_SMOOTHING:
            z_sum += tl.sum(tl.where(offs < n_cols, z, 0.0) if MASKED else z, axis=0)
    return m, l, z_sum


@triton.jit
def _store_gradient(
    z_ptr, bias_ptr, first, last, n_cols,        # in and out: dz in place of z
    label, m, l, scale, counts, smoothing,
    HAS_SMOOTHING: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Stores dz of columns first to last; MASKED: only of those below n_cols.

    m and log(l) are subtracted one after the other. Their sum would be rounded like a logit, and all probabilities of
    the row would be wrong by the same factor.
    """
    log2_l = tl.log2(l)
    for v0 in tl.range(first, last, BLOCK):
        offs = v0 + tl.arange(0, BLOCK)
        z = _load_z(z_ptr, bias_ptr, offs, n_cols, MASKED)
        dz = tl.exp2((z - m) * LOG2_E - log2_l) - tl.where(offs == label, 1.0 - smoothing, 0.0)
        if HAS_SMOOTHING:
            dz -= smoothing / n_cols
        dz = tl.where(counts, dz * scale, 0.0).to(z_ptr.dtype.element_ty)
        if MASKED:
            tl.store(z_ptr + offs, dz, mask=offs < n_cols)
        else:
            tl.store(z_ptr + offs, dz)


@triton.jit
def _cross_entropy_kernel(
    z_ptr, bias_ptr, labels_ptr, scale_ptr,      # in:  [M, V]; [V] or None; [M]; [M] float32 or None (all 1)
    loss_ptr,                                    # out: [M] float32; and dz in place of z if HAS_GRAD
    stride_z, n_cols, ignore_index, smoothing,
    HAS_GRAD: tl.constexpr, HAS_SMOOTHING: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride_z
    label = tl.load(labels_ptr + row).to(tl.int64)
    counts = label != ignore_index

    # A label outside of the columns loads nothing and makes the row NaN; torch would stop the device. Every warp reads
    # z[label], and one of them later overwrites it with dz. The barriers of the maxima and sums separate the two.
    named = (label >= 0) & (label < n_cols)
    z_label = tl.load(z_ptr + label, mask=named, other=float("nan")).to(tl.float32)
    if bias_ptr is not None:
        z_label += tl.load(bias_ptr + label, mask=named, other=0.0).to(tl.float32)

    m, l, z_sum = float("-inf"), 0.0, 0.0
    whole = n_cols // BLOCK_V * BLOCK_V
    m, l, z_sum = _add_columns(m, l, z_sum, z_ptr, bias_ptr, 0, whole, n_cols, HAS_SMOOTHING, BLOCK_V, False)
    m, l, z_sum = _add_columns(m, l, z_sum, z_ptr, bias_ptr, whole, n_cols, n_cols, HAS_SMOOTHING, BLOCK_V // 8, True)

    loss = tl.log(l) + (m - z_label)
    if HAS_SMOOTHING:
        loss += smoothing * (z_label - z_sum / n_cols)
    tl.store(loss_ptr + row, tl.where(counts, loss, 0.0))

    if HAS_GRAD:
        scale = 1.0 if scale_ptr is None else tl.load(scale_ptr + row)
        scale = tl.where(named, scale, float("nan"))
        _store_gradient(
            z_ptr, bias_ptr, 0, whole, n_cols,
            label, m, l, scale, counts, smoothing, HAS_SMOOTHING, BLOCK_V, False,
        )  # fmt: skip
        _store_gradient(
            z_ptr, bias_ptr, whole, n_cols, n_cols,
            label, m, l, scale, counts, smoothing, HAS_SMOOTHING, BLOCK_V // 8, True,
        )  # fmt: skip


# ---- launchers -------------------------------------------------------------------------------------------


def _chunk_rows(n_cols: int, dtype: torch.dtype) -> int:
    """Rows of a chunk, a multiple of 128. The number depends on the vocabulary and CHUNK_BYTES, not on N."""
    return max(128, CHUNK_BYTES // (_row_elements(n_cols) * dtype.itemsize) // 128 * 128)


def _row_elements(n_cols: int) -> int:
    """The row stride of z: a multiple of 128 bytes, so that 16-byte loads and descriptors can read the rows."""
    return cdiv(n_cols, 64) * 64


@functools.lru_cache(256)
def _plan(
    stride_z: int, n_cols: int, ignore_index: int, smoothing: float, has_grad: bool, block_v: int, num_warps: int
) -> Plan:
    return Plan(
        _cross_entropy_kernel,
        "z_ptr bias_ptr labels_ptr scale_ptr loss_ptr",
        "",
        {"stride_z": stride_z, "n_cols": n_cols, "ignore_index": ignore_index, "smoothing": smoothing}
        | {"HAS_GRAD": has_grad, "HAS_SMOOTHING": smoothing > 0.0, "BLOCK_V": block_v},
        num_warps=num_warps,
    )


def _launch(hidden, weight, bias, labels, row_scale, ignore_index, smoothing, wants, invariant):
    want_dhidden, want_dweight, want_dbias = wants
    (n_rows, width), n_cols = hidden.shape, weight.shape[0]
    hidden, weight, labels = matrix_of(hidden), matrix_of(weight), labels.contiguous()
    bias = packed(bias)
    loss = hidden.new_empty(n_rows, dtype=torch.float32)
    dhidden = hidden.new_empty(n_rows, width) if want_dhidden else none_of(hidden)
    # the first chunk overwrites the sums; an empty batch has no chunk, so its sums must be zeros
    new_sum = hidden.new_empty if n_rows > 0 else hidden.new_zeros
    dweight = new_sum((n_cols, width) if want_dweight else (0,), dtype=torch.float32)
    dbias = new_sum((n_cols,) if want_dbias else (0,), dtype=torch.float32)

    chunk_rows = min(_chunk_rows(n_cols, hidden.dtype), n_rows)
    buffer = hidden.new_empty(chunk_rows, _row_elements(n_cols))
    for start in range(0, n_rows, max(chunk_rows, 1)):
        rows = slice(start, min(start + chunk_rows, n_rows))
        z = buffer[: rows.stop - start, :n_cols]
        matmul(hidden[rows], weight, invariant=invariant, out=z)
        num_warps = NUM_WARPS * z.itemsize // 2
        _plan(z.stride(0), n_cols, ignore_index, smoothing, any(wants), BLOCK_V, num_warps)(
            (z.shape[0],), (z, bias, labels[rows], None if row_scale is None else row_scale[rows], loss[rows])
        )
        if want_dhidden:
            matmul(z, weight, layout="nn", invariant=invariant, out=dhidden[rows])
        if want_dweight:
            accumulate_tn(dweight, z, hidden[rows], first=start == 0)
        if want_dbias:
            part = z.sum(0, dtype=torch.float32)
            dbias = part if start == 0 else dbias.add_(part)
    return loss, dhidden, dweight, dbias


def _fake(hidden, weight, bias, labels, row_scale, ignore_index, smoothing, wants, invariant):
    want_dhidden, want_dweight, want_dbias = wants
    return (
        hidden.new_empty(hidden.shape[0], dtype=torch.float32),
        hidden.new_empty(hidden.shape if want_dhidden else (0,)),
        hidden.new_empty(weight.shape if want_dweight else (0,), dtype=torch.float32),
        hidden.new_empty(weight.shape[:1] if want_dbias else (0,), dtype=torch.float32),
    )


_losses = register(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? row_scale, "
    "int ignore_index, float smoothing, bool[] wants, bool invariant) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch,
    _fake,
)


def _launch_scaled(x, scale, dtype):
    # One pass in float32: a factor with dimensions takes part in type promotion, and `out` rounds when it is stored.
    return torch.mul(x, scale.view([1] * x.dim()), out=x.new_empty(x.shape, dtype=dtype))


_scaled = register(
    "scaled(Tensor x, Tensor scale, ScalarType dtype) -> Tensor",
    _launch_scaled,
    lambda x, scale, dtype: x.new_empty(x.shape, dtype=dtype),
)


# ---- autograd --------------------------------------------------------------------------------------------


class _Rows(torch.autograd.Function):
    """The loss of each row, [N] float32; the backward pass runs the chunks again with dloss as row scales."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, ignore_index, smoothing, invariant):
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.options = ignore_index, smoothing
        ctx.invariant = invariant
        return _losses(hidden, weight, bias, labels, None, ignore_index, smoothing, [False] * 3, invariant)[0]

    @staticmethod
    def backward(ctx, dloss):
        wants = list(ctx.needs_input_grad[:3])
        _, *gradients = _losses(*ctx.saved_tensors, dloss.contiguous(), *ctx.options, wants, ctx.invariant)
        dtype = ctx.saved_tensors[0].dtype
        return *wanted_of(wants, tuple(g.to(dtype) for g in gradients)), None, None, None, None


class _Sum(torch.autograd.Function):
    """The sum of the rows' losses, float32, with all gradients made during the forward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, ignore_index, smoothing, invariant):
        wants = list(ctx.needs_input_grad[:3])
        loss, *gradients = _losses(hidden, weight, bias, labels, None, ignore_index, smoothing, wants, invariant)
        ctx.save_for_backward(*gradients)
        ctx.wants, ctx.dtype = wants, hidden.dtype
        return loss.sum()

    @staticmethod
    def backward(ctx, dloss):
        gradients = tuple(_scaled(g, dloss, ctx.dtype) for g in ctx.saved_tensors)
        return *wanted_of(ctx.wants, gradients), None, None, None, None


# ---- public function -------------------------------------------------------------------------------------


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """cross_entropy(hidden weight^T + bias, labels): hidden [N, C], weight [V, C], bias [V], labels [N] -> float32.

    reduction: "mean" over the rows that are not ignored (a scalar; if all are ignored NaN with zero gradients, as in
    torch), "sum" (a scalar), "none" ([N], 0 in ignored rows). A label outside [0, V) that is not `ignore_index` gives
    NaN.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"linear_cross_entropy: reduction must be mean, sum or none, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"linear_cross_entropy: label_smoothing must be in [0, 1], got {label_smoothing}")
    hidden, weight, bias = cast_for_autocast(hidden, weight, bias)
    expect_one_dtype("linear_cross_entropy", hidden=hidden, weight=weight, bias=bias)

    arguments = (hidden, weight, bias, labels, ignore_index, label_smoothing, is_batch_invariant())
    if reduction == "none":
        return _Rows.apply(*arguments)
    total = _Sum.apply(*arguments) if wants_grad(hidden, weight, bias) else _Rows.apply(*arguments).sum()
    if reduction == "sum":
        return total
    count = (labels != ignore_index).sum()
    # total / max(count, 1) has a zero gradient if all rows are ignored; the value is then NaN, as in torch
    return torch.where(count > 0, total / count.clamp(min=1), float("nan"))


# ---- for the offline compiler ----------------------------------------------------------------------------


def compile_calls() -> list[CompileCall]:
    """The kernel with and without gradients, of 16 and 32 bits, smoothing and row scales, at BERT's vocabulary."""

    def call(name, dtype=torch.bfloat16, bias=True, **more):
        given = {"hidden": empty(8, 64, dtype=dtype), "weight": empty(30522, 64, dtype=dtype)}
        given |= {"bias": empty(30522, dtype=dtype) if bias else None, "labels": empty(8, dtype=torch.int64)}
        form, wide = f"{TRITON_TYPES[dtype]}{name}", [_cross_entropy_kernel]
        return compile_call(linear_cross_entropy, form, wide_loads=wide, **given, **more)

    return [
        call("", fast=True),
        call("", torch.float32),
        call("", torch.float16),
        call(",without_bias", bias=False),
        *(call(",smooth,rows", dtype, label_smoothing=0.1, reduction="none") for dtype in TRITON_TYPES),
    ]
