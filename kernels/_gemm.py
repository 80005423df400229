"""The Triton matrix product: C = op(A) op(B)^T, with an epilogue that is computed before a tile leaves the chip.

    nt   c[m, n] = sum_k a[m, k] b[n, k]     forward:          x [M, K],  weight [N, K]
    nn   c[m, n] = sum_k a[m, k] b[k, n]     input gradient:   dy [M, K], weight [K, N]
    tn   c[m, n] = sum_k a[k, m] b[k, n]     weight gradient:  dy [K, M], x [K, N]

Epilogues, on the float32 accumulator:

    forward    h = c + bias;  y = act(h)                      [M, N];  geglu: h [M, 2N], y = gelu(h1) * h2
    accumulate y += c                                         [M, N] in float32
    backward   g = c;  a = act(h), dh = g * act'(h)           [M, N];  geglu: dh [M, 2N]
               dbias_part = column sums of dh in float32, one row for each row of tiles

Order of summation: K in steps of BLOCK_K, first to last, in one accumulator (no split-K, no atomics). The tile
comes from (n, k, dtype, device), never from M, so the bits of a row of our product depend only on that row.

Work and bytes, with elements of b bytes: 2 M N K floating-point operations; A and B are read and C is written,
(M K + K N + M N) b. An epilogue reads or writes M N b more for each further matrix (h, act, dh), and column sums 4 N
bytes for each row of tiles. There is no other pass. Tiles read their bands of A and B again from L2,
(1 / BLOCK_M + 1 / BLOCK_N) K b for each element of C. BERT-base's first feed-forward product (M 16,384, N 3,072, K 768,
bf16, h saved) takes 98 us of products at 790 TFLOP/s, and 54 us for 231 MB at 4.3 TB/s.

The grid is persistent: a fixed number of programs process the tiles in an order that keeps a band of A and a band of
B in L2. On Hopper and newer, operands are loaded through tensor descriptors (the bulk copy engine). Elsewhere, or if a
row is not a multiple of 16 bytes, they are loaded through pointers; both sum in the same order.
"""

import functools
from collections.abc import Hashable
from dataclasses import MISSING, fields

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _device
from ._compile import TRITON_TYPES, CompileCall, compile_call, empty
from ._gemm_config import UNALIGNED, GemmConfig, gemm_config
from ._gemm_kernels import _dact_kernel, _linear_act_kernel
from ._launch import Plan, cdiv
from ._library import apply, register
from ._rows import packed, sum_parts

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# ---- launchers -------------------------------------------------------------------------------------------


def matrix_of(x: Tensor) -> Tensor:
    """x [..., N] as [M, N] with contiguous rows; a copy only where the strides require one."""
    x = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    # A row stride below N means an expanded tensor, which pointers can read and descriptors cannot.
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _aligned(x: Tensor) -> bool:
    """Whether x [R, C] can be read in units of 16 bytes: address and row stride are multiples of 16 bytes."""
    return x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0


def _operands(
    a: Tensor, b: Tensor, layout: str, config: GemmConfig
) -> tuple[GemmConfig, Tensor | TensorDescriptor, Tensor | TensorDescriptor]:
    """(the config, changed if these operands do not allow it; a and b as arguments of the kernel)."""
    if a.element_size() < 4 and not (_aligned(a) and _aligned(b) and a.numel()):
        config = UNALIGNED
    if not config.bulk:
        return config, a, b
    m, n, k = config.block_m, config.block_n, config.block_k
    return (
        config,
        _descriptor(a, [k, m] if layout == "tn" else [m, k]),
        _descriptor(b, [n, k] if layout == "nt" else [k, n]),
    )


_DEFAULTS = {f.name: f.default for f in fields(TensorDescriptor) if f.default is not MISSING}


def _descriptor(t: Tensor, block: list[int]) -> TensorDescriptor:
    """`TensorDescriptor.from_tensor` without its checks, for a tensor that is `_aligned` and not empty."""
    descriptor = object.__new__(TensorDescriptor)
    descriptor.__dict__.update(_DEFAULTS, base=t, shape=t.shape, strides=t.stride(), block_shape=block)
    return descriptor


def _constants(config: GemmConfig, n: int, k: int, activation: str, **strides: int) -> dict:
    """The arguments of both kernels other than the tensors and m."""
    return strides | {
        "n": n, "k": k, "ACTIVATION": activation,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m, "SLICE": config.slice_n, "BULK": config.bulk, "FLATTEN": config.flatten,
    }  # fmt: skip


@functools.lru_cache(1024)
def _plan(
    config: GemmConfig, n: int, k: int, layout: str, activation: str, accumulate: bool, a: int, b: int, y: int, h: int
) -> Plan:
    """The launch plan. a, b, y, h: row strides. (In layout "tn" k is the number of rows of the batch, so every number
    of rows has its own plan.)"""
    return Plan(
        _linear_act_kernel, "a b bias_ptr y_ptr h_ptr", "m",
        _constants(config, n, k, activation, stride_a=a, stride_b=b, stride_y=y, stride_h=h)
        | {"LAYOUT": layout, "ACCUMULATE": accumulate},
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


@functools.lru_cache(1024)
def _dact_plan(config: GemmConfig, n: int, k: int, activation: str, a: int, b: int, h: int, dh: int) -> Plan:
    return Plan(
        _dact_kernel, "a b h_ptr dh_ptr act_ptr dbias_part_ptr", "m",
        _constants(config, n, k, activation, stride_a=a, stride_b=b, stride_h=h, stride_dh=dh)
        | {"stride_act": n, "stride_dbias": dh},
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _grid(m: int, n: int, config: GemmConfig, device: torch.device) -> tuple[int]:
    tiles = cdiv(m, config.block_m) * cdiv(n, config.block_n)
    if not config.programs_per_sm:
        return (tiles,)
    return (min(tiles, config.programs_per_sm * _device.multiprocessors(device.index)),)


def gemm(
    a: Tensor, b: Tensor, bias: Tensor | None, layout: str, config: GemmConfig,
    activation: str = "none", save_h: bool = False, out: Tensor | None = None, accumulate: bool = False,
    known: Hashable = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(act(c + bias), and c + bias with save_h else None) by our kernel. The matrices have contiguous rows; c by layout
    is described above.

    geglu (nt): b is [2N, K], bias [2N], the saved pre-activation [M, 2N].
    out: [M, N] with contiguous rows, of any float dtype; overwritten, or with `accumulate` added to.
    known: as in `Plan`; one value belongs to one combination of the options.
    """
    m, k = (a.shape[1], a.shape[0]) if layout == "tn" else a.shape
    width = b.shape[0] if layout == "nt" else b.shape[1]
    n = width // 2 if activation == "geglu" else width
    y = a.new_empty(m, n) if out is None else out
    h = a.new_empty(m, width) if save_h else None
    if y.numel() == 0:
        return y, h
    if known is None:
        bias = packed(bias)
    config, *operands = _operands(a, b, layout, config)
    strides = a.stride(0), b.stride(0), y.stride(0), width
    _plan(config, n, k, layout, activation, accumulate, *strides)(
        _grid(m, n, config, a.device), (a, b, bias, y, h), (m,), passed=(*operands, bias, y, h), known=known
    )
    return y, h


def gemm_dact(
    dy: Tensor, weight: Tensor, h: Tensor, activation: str, config: GemmConfig, want_a: bool, want_dbias: bool,
    known: Hashable = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """dh = (dy weight) * act'(h), and on request a = act(h) and the column sums of dh, taken in float32.

    dy [M, K], weight [K, N], h [M, N] (geglu [M, 2N]), rows contiguous. known: as in `Plan`.
    """
    (m, k), n = dy.shape, weight.shape[1]
    dh = h.new_empty(*h.shape)
    a = h.new_empty(m, n) if want_a else None
    known = None if known is None else (known, want_a, want_dbias)
    if dh.numel() == 0:
        return dh, a, h.new_zeros(h.shape[1]) if want_dbias else None
    config, *operands = _operands(dy, weight, "nn", config)
    blocks_m = cdiv(m, config.block_m)
    dbias_part = h.new_empty(blocks_m, h.shape[1], dtype=torch.float32) if want_dbias else None
    rest = (h, dh, a, dbias_part)
    _dact_plan(config, n, k, activation, dy.stride(0), weight.stride(0), h.stride(0), h.shape[1])(
        _grid(m, n, config, dy.device), (dy, weight, *rest), (m,), passed=(*operands, *rest), known=known
    )
    return dh, a, sum_of_parts(dbias_part, h.dtype, known) if want_dbias else None


def sum_of_parts(parts: Tensor, dtype: torch.dtype, known: Hashable = None) -> Tensor:
    """The sum over P of parts [P, N] float32, in order. known: as in `Plan`."""
    total = parts.new_empty(parts.shape[1], dtype=dtype)
    sum_parts(parts, [total], [total], known)
    return total


def matmul(
    a: Tensor, b: Tensor, bias: Tensor | None = None, layout: str = "nt", invariant: bool = False,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """op(A) op(B)^T + bias, by our kernel or the vendor library as `gemm_config` chooses. out: [M, N] with contiguous
    rows, only without bias."""
    n, k = b.shape if layout == "nt" else (b.shape[1], a.shape[1])
    config = gemm_config(n, k, a.dtype, _device.arch(a.device.index), layout, "none", invariant)
    if not config.vendor:
        return gemm(a, b, bias, layout, config, out=out)[0]
    if out is not None:
        return torch.mm(a.t() if layout == "tn" else a, b.t() if layout == "nt" else b, out=out)
    if layout == "nt":
        return F.linear(a, b, bias)
    return torch.mm(a.t() if layout == "tn" else a, b)


def add_product(total: Tensor, a: Tensor, b: Tensor, invariant: bool = False) -> Tensor:
    """total [M, N] += A B of a [M, K], b [K, N], rows contiguous. The vendor library adds within the product."""
    config = gemm_config(b.shape[1], a.shape[1], a.dtype, _device.arch(a.device.index), "nn", "none", invariant)
    return total.addmm_(a, b) if config.vendor else total.add_(gemm(a, b, None, "nn", config)[0])


def accumulate_tn(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total [M, N] float32 (+)= A^T B of a [K, M], b [K, N], whose rows are contiguous. `first` overwrites."""
    config = gemm_config(b.shape[1], a.shape[1], a.dtype, _device.arch(a.device.index), "tn", "accumulate")
    if not config.vendor:
        gemm(a, b, None, "tn", config, out=total, accumulate=not first)
    elif a.dtype == total.dtype or not a.is_cuda:
        total.addmm_(a.t().to(total.dtype), b.to(total.dtype), beta=0.0 if first else 1.0)
    elif first:  # the vendor library returns float32 sums of 16-bit operands only on CUDA
        torch.mm(a.t(), b, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, a.t(), b, out_dtype=total.dtype, out=total)


# ---- shared by the operators that use products -----------------------------------------------------------


def cast_for_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors, cast to autocast's dtype if that is on, as F.linear does; gradients are cast back."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors)


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether a gradient of one of these may be computed later."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def expect_one_dtype(op: str, **tensors: Tensor | None) -> None:
    """Raises TypeError unless all tensors share one dtype that the kernels support."""
    dtypes = {name: t.dtype for name, t in tensors.items() if t is not None}
    kinds = set(dtypes.values())
    if len(kinds) > 1 or not kinds <= set(DTYPES):
        raise TypeError(f"{op}: all tensors must share one dtype of {DTYPES}, got {dtypes}")


def none_of(like: Tensor) -> Tensor:
    """An empty tensor, which an operator returns for an output that was not requested."""
    return like.new_empty(0)


def column_sums(x: Tensor) -> Tensor:
    """Sums over the rows of x [M, N], taken in float32."""
    return x.sum(0, dtype=torch.float32).to(x.dtype)


def wanted_of(wants: list[bool], gradients: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """The requested gradients, None for the others."""
    return tuple(g if wanted else None for g, wanted in zip(gradients, wants, strict=True))


# ---- linear, batch-invariant -----------------------------------------------------------------------------


def _launch_linear(x, weight, bias):
    return matmul(matrix_of(x), matrix_of(weight), bias, invariant=True).view(*x.shape[:-1], weight.shape[0])


def _fake_linear(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _launch_linear_backward(dy, x, weight, wants):
    want_dx, want_dweight, want_dbias = wants
    rows, none = matrix_of(dy), none_of(x)
    return (
        matmul(rows, matrix_of(weight), layout="nn", invariant=True).view(x.shape) if want_dx else none,
        matmul(rows, matrix_of(x), layout="tn") if want_dweight else none_of(x),
        column_sums(rows) if want_dbias else none_of(x),
    )


def _fake_linear_backward(dy, x, weight, wants):
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(x.new_empty(s) if wanted else none_of(x) for s, wanted in zip(shapes, wants, strict=True))


_linear = register("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _launch_linear, _fake_linear)
_linear_backward = register(
    "linear_backward(Tensor dy, Tensor x, Tensor weight, bool[] wants) -> (Tensor, Tensor, Tensor)",
    _launch_linear_backward,
    _fake_linear_backward,
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        wants = list(ctx.needs_input_grad)
        return wanted_of(wants, _linear_backward(dy, x, weight, wants))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear by our GEMM: the bits of a row of x [..., C] -> [..., N], and of its gradient, depend only on that row.

    weight [N, C], bias [N] or None, dtypes and autocast as in `feed_forward`.
    """
    x, weight, bias = cast_for_autocast(x, weight, bias)
    expect_one_dtype("linear", x=x, weight=weight, bias=bias)
    return apply(_Linear, x, weight, bias) if wants_grad(x, weight, bias) else _linear(x, weight, bias)


# ---- for the offline compiler ----------------------------------------------------------------------------

# (columns, length of the sum): one pair for each choice of tile, and one whose rows are not multiples of 16 bytes
COMPILED_SIZES = {"wide": (3072, 768), "small": (512, 128), "unaligned": (515, 131)}


def compile_calls() -> list[CompileCall]:
    """The products without an epilogue with every tile, and the sum in float32. `feed_forward` lists the others."""
    calls = []
    for dtype, kind in TRITON_TYPES.items():
        for name, (n, k) in COMPILED_SIZES.items():
            x, weight = empty(16, k, dtype=dtype), empty(n, k, dtype=dtype)
            for form, bias in ((",bias", empty(n, dtype=dtype)), ("", None)):
                calls.append(compile_call(linear, f"{kind},{name}{form}", x, weight, bias))
            if dtype != torch.float32:
                total, a, b = empty(k, n, dtype=torch.float32), empty(16, k, dtype=dtype), empty(16, n, dtype=dtype)
                calls.append(compile_call(accumulate_tn, f"{kind},accumulate,{name}", total, a, b, False, grads=()))
    return calls
