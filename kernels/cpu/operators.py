"""The C++ operators of `*.cpp` in this folder, for x86 CPUs with AVX2 or AVX-512: loading, calling, and the operators
of inference. Operators with gradients are in `products.py`, `norm.py`, `embedding.py` and `loss.py`, attention in
`attention.py` and `../_attention_native.py`.

Installing compiles the operators where there is a C++ compiler. Without them, or on another CPU, `native.py` computes
the same from torch's operators. They are called through ctypes, so one build works with every version of torch.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import warnings
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._invariance import is_batch_invariant
from .._layer import LayerOptions, LayerWeights
from .._random import keep_threshold
from . import library
from .library import NO_MEMORY, NORM_BLOCK, UP_ROWS, WIDTH
from .pointers import PLAIN, address, address_of_starts, address_or_none, addresses, strided_address

# Row limits for our `linear` when the number of columns is not a multiple of WIDTH, or when oneDNN can use AMX: without
# and with a copy of the weight in oneDNN's layout.
LINEAR_ROWS = 64
LINEAR_ROWS_LAID_OUT = 16
# Size of x up to which a call always has all layers. Where oneDNN can use AMX, also the limit for `encoder_layers` as a
# whole.
FEW_BYTES = 288 << 10
PRODUCTS_OF_A_CALL = 4 << 30  # multiplications of a larger call, some 30 ms of two threads with AVX-512
UP = LayerWeights._fields.index("up")
ACTIVATION_NUMBERS = {"gelu": 1, "gelu_tanh": 2, "relu": 3}  # as in simd.h; 0 is no activation
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def instructions(dtype: torch.dtype) -> str | None:
    """The instruction set of library.INSTRUCTIONS that the operators use for this dtype on this CPU; None where the CPU
    has neither. ATEN_CPU_CAPABILITY limits our operators as it limits torch's."""
    capability = torch.backends.cpu.get_cpu_capability()
    in_512 = dtype is not torch.bfloat16 or torch.cpu._is_avx512_bf16_supported()
    if capability.startswith("AVX512") and torch.cpu._is_avx512_supported() and in_512:
        return "avx512"
    return "avx2" if capability.startswith(("AVX2", "AVX512")) and torch.cpu._is_avx2_supported() else None


@functools.cache
def load(dtype: torch.dtype = torch.float32) -> tuple[ctypes.CDLL | None, str | None]:
    """(library for this dtype, None), or (None, the reason why there is none). Warns about a library that was built
    from other sources."""
    if os.environ.get("FASTBERT_CPP") == "0":
        return None, "FASTBERT_CPP=0 turns them off"
    chosen = instructions(dtype)
    if chosen is None:
        return None, f"they need AVX2 or AVX-512, this CPU has {torch.backends.cpu.get_cpu_capability()}"
    return _open(chosen)


@functools.cache
def _open(instructions: str) -> tuple[ctypes.CDLL | None, str | None]:
    built = library.find(Path(__file__).parent, instructions)
    if built is None:
        return None, f"they are not built: installing had no C++ compiler; in a checkout, {library.REBUILD}"
    try:
        return library.open_library(built), None
    except library.UnusableLibrary as unusable:
        warnings.warn(f"fastbert computes without its C++ operators: {unusable}", RuntimeWarning, stacklevel=3)
        return None, str(unusable)


@functools.cache
def dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes that the operators support on this machine; empty where there are no operators."""
    return tuple(dtype for dtype in NAMES if load(dtype)[0] is not None)


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether `linear` is faster than the vendor library for any number of rows: always, except bfloat16 with AMX."""
    return dtype == torch.float32 or not torch.cpu._is_amx_tile_supported()


def runs_now(x: Tensor) -> bool:
    """Whether x has values to compute with now: x is on the CPU, and no tracing or torch.func transform is active."""
    return (
        not torch.compiler.is_compiling()
        and x.is_cpu
        and not torch._C._functorch.maybe_current_level()
        and forward_ad._current_level < 0
    )


def knows(*tensors: Tensor) -> bool:
    """Whether the operators support these tensors: on the CPU, of one supported dtype, not traced, and not of a
    subclass, whose memory need not match its shape."""
    first = tensors[0]
    return (
        runs_now(first)
        and first.dtype in dtypes()
        and all(type(t) in PLAIN and t.is_cpu and t.dtype is first.dtype and t.stride(-1) == 1 for t in tensors)
    )


def is_plain(t: Tensor, dtype: torch.dtype) -> bool:
    """Whether the operators can read indices or lengths from t: no subclass, this dtype, contiguous, on the CPU."""
    return type(t) in PLAIN and t.dtype is dtype and t.is_cpu and t.is_contiguous()


def want_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _take(*tensors: Tensor) -> bool:
    """Whether the operators support these tensors, and no gradient is needed."""
    return knows(*tensors) and not want_gradients(*tensors)


def call(function: str, dtype: torch.dtype, *arguments: object) -> int | None:
    """Calls a function of the library. Addresses must come from `pointers`, which checks the tensors.

    Raises: TypeError where the library does not support `dtype`, or an argument is not a number.
    """
    if dtype not in NAMES:
        raise TypeError(f"{function} computes in {' and '.join(map(str, NAMES))}, got {dtype}")
    try:
        return getattr(load(dtype)[0], f"{function}_{NAMES[dtype]}")(*arguments)
    except ctypes.ArgumentError as error:  # callers expect TypeError, which ctypes' class is not
        raise TypeError(f"{function}: {error}") from None


def expect_multiple(function: str, what: str, size: int, multiple: int = WIDTH) -> None:
    if size % multiple or size < 1:
        raise ValueError(f"{function}: {what} must be a multiple of {multiple}, got {size}")


def expect_tokens(function: str, x: Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"{function}: x must be [T, C], got shape {(*x.shape,)}")


def rows_and_width(function: str, x: Tensor) -> tuple[int, int]:
    """(number of rows, N) of x [..., N]."""
    width = x.shape[-1] if x.dim() else 0
    expect_multiple(function, "the width of a row", width)
    return x.numel() // width, width


# ---- rows and products -----------------------------------------------------------------------------------


def takes_add_layer_norm(x: Tensor, *others: Tensor | None, x_bias: Tensor | None = None) -> bool:
    """Whether `add_layer_norm` supports these. others: residual, weight and bias. All tensors but x may be float32 when
    x is not, as under autocast."""
    if any(t is None or t.shape[-1] != x.shape[-1] or not t.is_contiguous() for t in (x, *others)):
        return False
    given = others if x_bias is None else (*others, x_bias)
    return (
        knows(x)
        and knows(*given)
        and others[0].dtype in (x.dtype, torch.float32)
        and others[0].shape == x.shape
        and x.shape[-1] % WIDTH == 0
    )


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, keys: Tensor | None = None,
    dropout_p: float = 0.0, x_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """LayerNorm(dropout(x + x_bias) + residual): contiguous [..., N] in residual's dtype, which all tensors but x have.
    Statistics are float32, and the sum is not rounded. keys: row keys of `_random.row_keys`, or None for no dropout."""
    (rows, width), size, dtype, wide = rows_and_width("add_layer_norm", x), x.numel(), x.dtype, residual.dtype
    y = torch.empty(x.shape, dtype=wide, device="cpu")
    of_x, summed = address("x", x, dtype, size), address("residual", residual, wide, size)
    scaled = address("weight", weight, wide, width), address("bias", bias, wide, width), address("y", y, wide, size)
    if keys is None and x_bias is None and wide is dtype:
        call("add_layer_norm", dtype, of_x, summed, *scaled, rows, width, eps)
    else:
        call(
            "dropout_add_layer_norm", dtype, of_x, address_or_none("x_bias", x_bias, wide, width), summed,
            address_or_none("keys", keys, torch.int64, rows), *scaled, is_wide("residual", wide, dtype),
            rows, width, eps, keep_threshold(dropout_p), 1.0 / (1.0 - dropout_p),
        )  # fmt: skip
    return y


def add_layer_norm_backward(
    dy: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float, keys: Tensor | None = None,
    dropout_p: float = 0.0, x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(dx, dresidual, dweight, dbias, dx_bias). Without dropout and in one dtype, dx and dresidual are one tensor."""
    (rows, width), size, dtype, wide = rows_and_width("add_layer_norm_backward", x), x.numel(), x.dtype, residual.dtype
    dy = dy.contiguous()
    dresidual = torch.empty(x.shape, dtype=wide, device="cpu")
    as_one = keys is None and wide is dtype
    dx = dresidual if as_one else torch.empty(x.shape, dtype=dtype, device="cpu")
    parts = torch.zeros(max(1, -(-rows // NORM_BLOCK)), 3, width, dtype=torch.float32, device="cpu")
    call(
        "add_layer_norm_backward", dtype, address("x", x, dtype, size),
        address_or_none("x_bias", x_bias, wide, width), address("residual", residual, wide, size),
        address_or_none("keys", keys, torch.int64, rows), address("weight", weight, wide, width),
        address("dy", dy, wide, size), None if as_one else address("dx", dx, dtype, size),
        address("dresidual", dresidual, wide, size), address("parts", parts, torch.float32, parts.numel()),
        is_wide("residual", wide, dtype), rows, width, eps, keep_threshold(dropout_p), 1.0 / (1.0 - dropout_p),
    )  # fmt: skip
    dweight, dbias, dx_bias = parts[0].to(wide)
    return dx, dresidual, dweight, dbias, None if x_bias is None else dx_bias


def takes_rms_norm(x: Tensor, weight: Tensor | None) -> bool:
    """Whether `rms_norm` supports these. weight may be float32 when x is not."""
    return (
        weight is not None
        and x.shape[-1] % WIDTH == 0
        and x.shape[-1] == weight.shape[-1]
        and knows(x)
        and knows(weight)
        and weight.dtype in (x.dtype, torch.float32)
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight: [..., N] in x's dtype, computed in float32."""
    x = x.contiguous()
    (rows, width), dtype = rows_and_width("rms_norm", x), x.dtype
    y = torch.empty(x.shape, dtype=dtype, device="cpu")
    call(
        "rms_norm", dtype, address("x", x, dtype, x.numel()),
        address("weight", weight.contiguous(), weight.dtype, width), is_wide("weight", weight.dtype, dtype),
        address("y", y, dtype, y.numel()), rows, width, eps,
    )  # fmt: skip
    return y


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(dx in x's dtype, dweight in weight's dtype)."""
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    (rows, width), dtype = rows_and_width("rms_norm_backward", x), x.dtype
    dx = torch.empty(x.shape, dtype=dtype, device="cpu")
    parts = torch.zeros(max(1, -(-rows // NORM_BLOCK)), width, dtype=torch.float32, device="cpu")
    call(
        "rms_norm_backward", dtype, address("x", x, dtype, x.numel()),
        address("weight", weight, weight.dtype, width), is_wide("weight", weight.dtype, dtype),
        address("dy", dy, dtype, dy.numel()), address("dx", dx, dtype, dx.numel()),
        address("parts", parts, torch.float32, parts.numel()), rows, width, eps,
    )  # fmt: skip
    return dx, parts[0].to(weight.dtype)


def is_wide(name: str, dtype: torch.dtype, of_x: torch.dtype) -> bool:
    """Whether `dtype` is float32 and x's dtype `of_x` is not. Raises TypeError where it is neither."""
    if dtype not in (of_x, torch.float32):
        raise TypeError(f"{name} must be {of_x} or torch.float32, got {dtype}")
    return dtype is not of_x


def takes_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None, laid_out: bool = False
) -> bool:
    """Whether `linear` supports these and computes activation(x weight^T + bias) faster than the vendor library.

    laid_out: there is a copy of the weight in the vendor library's layout.
    """
    columns, inner = weight.shape
    most = math.inf
    if columns % WIDTH or not multiplies(x.dtype):
        if is_batch_invariant():
            return False
        most = LINEAR_ROWS_LAID_OUT if laid_out else LINEAR_ROWS
    if activation not in (None, "gelu") or not 0 < x.numel() <= most * x.shape[-1]:
        return False
    given = (x, weight) if bias is None else (x, weight, bias)
    if columns < 1 or columns % 4 or inner % (WIDTH if x.dtype == torch.float32 else 2 * WIDTH):
        return False
    return all(t.is_contiguous() for t in given) and not torch.is_autocast_enabled("cpu") and _take(*given)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    """activation(x weight^T + bias): [..., K], [N, K], [N] or None -> [..., N], with sums in float32. Within
    `batch_invariant()` the product for many rows computes every size, since its result for a row does not depend on
    the others."""
    y = torch.empty(*x.shape[:-1], len(weight), dtype=x.dtype, device="cpu")
    _multiply(x, weight, bias, y.view(math.prod(x.shape[:-1]), len(weight)), activation)
    return y


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """The products of x with each weight, concatenated: [..., K], weights [N, K] -> [..., sum of N]."""
    width = sum(map(len, weights))
    y = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device="cpu")
    parts = y.view(-1, width).split([len(weight) for weight in weights], dim=1)
    for weight, bias, part in zip(weights, biases, parts, strict=True):
        _multiply(x, weight, bias, part, None)
    return y


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, activation: str | None) -> None:
    """Fills y [M, N], whose rows may have any stride."""
    (columns, inner), dtype, rows = weight.shape, x.dtype, len(y)
    expect_multiple("linear", "the number of columns", columns, 4)
    expect_multiple("linear", "the inner size", inner, WIDTH * 4 // dtype.itemsize)
    if activation is not None and activation not in ACTIVATION_NUMBERS:
        raise ValueError(f"linear: activation must be None or one of {(*ACTIVATION_NUMBERS,)}, got {activation!r}")
    failed = call(
        "linear", dtype, address("x", x, dtype, rows * inner), address("weight", weight, dtype, columns * inner),
        address_or_none("bias", bias, dtype, columns), strided_address("y", y, dtype, (rows, columns)), y.stride(0),
        rows, columns, inner, ACTIVATION_NUMBERS.get(activation, 0), is_batch_invariant(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"linear: no memory for 64 columns of {inner} weights")


# ---- before, in and after the layers ---------------------------------------------------------------------


def fits_embedding(indices: tuple[Tensor | None, ...], tables: tuple[Tensor | None, ...]) -> bool:
    """Whether the C++ embeddings support these, with or without gradients.

    indices: ids, segments, positions [T] int64. tables: word, segment, position [., N], LayerNorm's weight and bias.
    """
    if any(t is None or not t.is_contiguous() for t in (*indices, *tables)) or tables[0].shape[-1] % WIDTH:
        return False
    return all(is_plain(t, torch.int64) for t in indices) and knows(*tables)


_INDICES = "indices of words", "indices of segments", "indices of positions"
_TABLES = "words", "segments", "positions", "weight", "bias"


def embedding_layer_norm(
    indices: tuple[Tensor, ...], tables: tuple[Tensor, ...], eps: float
) -> Tensor | None:  # fmt: skip
    """LayerNorm of the float32 sum of three look-ups; None if an index is outside of its table."""
    dtype, rows, (_, width) = tables[0].dtype, indices[0].numel(), rows_and_width("embedding_layer_norm", tables[0])
    y = torch.empty(rows, width, dtype=dtype, device="cpu")
    sizes = array("q", map(len, tables[:3]))
    counts = (*(size * width for size in sizes), width, width)
    outside = call(
        "embedding_layer_norm", dtype,
        *(address(name, t, torch.int64, rows) for name, t in zip(_INDICES, indices, strict=True)),
        *(address(name, t, dtype, count) for name, t, count in zip(_TABLES, tables, counts, strict=True)),
        address("y", y, dtype, rows * width), rows, sizes.buffer_info()[0], width, eps,
    )  # fmt: skip
    return None if outside else y


def takes_mean(x: Tensor, cu_seqlens: Tensor) -> bool:
    starts = is_plain(cu_seqlens, torch.int32)
    return starts and x.shape[-1] % WIDTH == 0 and x.is_contiguous() and _take(x)


def mean_of_sequences(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """x [T, N], cu_seqlens [B + 1] -> [B, N], sums in float32. Raises ValueError where cu_seqlens does not cut T rows
    into sequences."""
    rows, width = rows_and_width("mean_of_sequences", x)
    starts, sequences = address_of_starts("cu_seqlens", cu_seqlens)
    y = torch.empty(sequences, width, dtype=x.dtype, device="cpu")
    if call(
        "mean_of_sequences", x.dtype, address("x", x, x.dtype, rows * width), starts,
        address("y", y, x.dtype, y.numel()), sequences, rows, width,
    ):  # fmt: skip
        raise ValueError(f"mean_of_sequences: cu_seqlens must rise from 0 to {rows}, got {cu_seqlens.tolist()}")
    return y


def layer_shapes(width: int, inner: int) -> list[tuple[int, ...]]:
    """The shapes of the tensors of `LayerWeights`, in its order."""
    square, vector = [(width, width), (width,)], (width,)
    return [*square * 4, vector, vector, (inner, width), (inner,), (width, inner), vector, vector, vector]


def whole_layers(nbytes: int, dtype: torch.dtype) -> bool:
    """Whether `encoder_layers` is faster than single layers for an x of this size."""
    return dtype in dtypes() and (multiplies(dtype) or (nbytes <= FEW_BYTES and not is_batch_invariant()))


def layers_of_a_call(count: int, x: Tensor, inner: int) -> int:
    """How many of `count` layers a call computes. At its end threads wait for each other, and Python handles Ctrl-C."""
    rows, width = x.shape
    of_layer = rows * width * (4 * width + 2 * inner)
    return count if x.nbytes <= FEW_BYTES else max(1, min(count, PRODUCTS_OF_A_CALL // of_layer))


def encoder_layers(
    x: Tensor, layers: list[Tensor], options: LayerOptions, cu_seqlens: Tensor
) -> Tensor | None:  # fmt: skip
    """The output [T, C] of a stack of post-norm layers that share `options`, without dropout. layers: the tensors of
    each layer's `LayerWeights`, one layer after another; no copy of them is made. None where the caller has to compute
    layer by layer: with gradients, or where the C++ does not support the dtype, a size or the activation.

    Raises: ValueError where x is not [T, C], or cu_seqlens does not cut T rows into sequences; MemoryError.
    """
    expect_tokens("encoder_layers", x)
    width, dtype = x.shape[1], x.dtype
    if not len(x) or not whole_layers(x.nbytes, dtype) or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    heads, eps, inner = options.heads, options.out_eps, len(layers[UP])
    if options.activation not in ACTIVATION_NUMBERS or options.down_eps != eps:
        return None
    if (
        not knows(x)
        or type(cu_seqlens) not in PLAIN
        or not x.is_contiguous()
        or width % (2 * WIDTH)
        or inner % (2 * WIDTH)
    ):
        return None
    if heads < 1 or width % heads or width // heads % WIDTH:
        return None
    each = len(LayerWeights._fields)
    count = len(layers) // each
    pointers = addresses(layers, dtype, layer_shapes(width, inner) * count)
    if pointers is None:
        return None
    y = x.clone()
    work = torch.empty(4 * x.numel() + min(len(x), UP_ROWS) * inner, dtype=dtype, device="cpu")
    starts, sequences = address_of_starts("cu_seqlens", cu_seqlens)
    step = layers_of_a_call(count, x, inner)
    for layer in range(0, count, step):
        outcome = call(
            "encoder_layers", dtype, address("x", y, dtype, x.numel()),
            pointers.buffer_info()[0] + layer * each * pointers.itemsize, min(step, count - layer), starts,
            sequences, *x.shape, inner, heads, ACTIVATION_NUMBERS[options.activation], eps, is_batch_invariant(),
            address("work", work, dtype, work.numel()),
        )  # fmt: skip
        if outcome == NO_MEMORY:
            raise MemoryError(f"encoder_layers: no memory for {x.shape[0]} rows of {inner} columns")
        if outcome:
            raise ValueError(f"encoder_layers: cu_seqlens must rise from 0 to {len(x)}, got {cu_seqlens.tolist()}")
    return y
