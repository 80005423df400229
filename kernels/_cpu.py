"""The C++ operators of `_cpu_*.cpp`, for x86 CPUs with AVX-512: for inference; attention, LayerNorm and the loss for
training too.

Installing compiles them where there is a C++ compiler; without them, or on another CPU, `native.py` computes the same
from torch's own operators. They are called through ctypes, so one build serves every version of torch.
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

from . import _cpu_library
from ._cpu_library import NORM_BLOCK, UP_ROWS, WIDTH
from ._invariance import is_batch_invariant
from ._random import keep_threshold

FEW_ROWS = 64  # up to which `linear` is taken of odd widths, and where the vendor library has instructions it has not,
FEW_ROWS_LAID_OUT = 16  # and where besides a weight lies ready for that
FEW_BYTES = 288 << 10  # of x, up to which `encoder_layers` is taken there; above, Ctrl-C is heard after each layer
PLAIN = (Tensor, torch.nn.Parameter)


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str | None]:
    """(library, None), or (None, why there is none). Warns where one lies there that is not this code's own."""
    if os.environ.get("FASTBERT_CPP") == "0":
        return None, "FASTBERT_CPP=0 turns them off"
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX512"):
        return None, f"they need AVX-512, this CPU has {capability}"
    built = _cpu_library.find(Path(__file__).parent)
    if built is None:
        return None, "they were not built: installing found no C++ compiler"
    try:
        return _cpu_library.open_library(built), None
    except _cpu_library.UnusableLibrary as unusable:
        warnings.warn(f"fastbert computes without its C++ operators: {unusable}", RuntimeWarning, stacklevel=2)
        return None, str(unusable)


@functools.cache
def dtypes() -> tuple[torch.dtype, ...]:
    """What the operators compute in here; none where there are none."""
    if load()[0] is None:
        return ()
    return (torch.float32, torch.bfloat16) if torch.cpu._is_avx512_bf16_supported() else (torch.float32,)


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether `linear` is ahead of the vendor library with any number of rows: not of bfloat16 by AMX's tiles."""
    return dtype == torch.float32 or not torch.cpu._is_amx_tile_supported()


def runs_now(x: Tensor) -> bool:
    """Whether x's values are here to be read: on the CPU, outside of tracing and of torch's transforms."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and not torch._C._functorch.maybe_current_level()
        and forward_ad._current_level < 0
    )


def _know(*tensors: Tensor) -> bool:
    """Whether the operators compute with these: on the CPU, of one dtype that they know, nothing traced, and no
    subclass, whose memory need not be what its shape says."""
    first = tensors[0]
    return (
        runs_now(first)
        and first.dtype in dtypes()
        and all(
            type(t) in PLAIN and t.device.type == "cpu" and t.dtype == first.dtype and t.stride(-1) == 1
            for t in tensors
        )
    )


def want_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _take(*tensors: Tensor) -> bool:
    """Whether the operators compute with these, and no gradient is to be given."""
    return _know(*tensors) and not want_gradients(*tensors)


# ---- attention -------------------------------------------------------------------------------------------


class Dropout(ctypes.Structure):
    """Dropout of probabilities by `_random.py`'s masks, as the C++ takes it."""

    _fields_ = tuple((name, _cpu_library.TYPES[letter]) for name, letter in _cpu_library.DROPOUT_FIELDS)

    def __init__(self, dropout_p: float, seed: Tensor, sequence_ids: Tensor, stream: int = 0) -> None:
        ids = sequence_ids.to(torch.int64).contiguous()
        # what was drawn, should the caller's seed change; it also keeps the addressed memory alive
        self.options = {"dropout_p": dropout_p, "seed": seed.clone(), "sequence_ids": ids, "stream": stream}
        super().__init__(ids.data_ptr(), int(seed), stream, keep_threshold(dropout_p), 1.0 / (1.0 - dropout_p))


def takes_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float | None = None) -> bool:
    """Whether `attention` and `attention_backward` compute with these."""
    lengths = cu_seqlens.dtype == torch.int32 and cu_seqlens.is_contiguous()
    return lengths and q.shape[-1] % WIDTH == 0 and (scale is None or scale >= 0.0) and _know(q, k, v)


def _shape_of_attention(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> tuple[int, ...]:
    return cu_seqlens.data_ptr(), cu_seqlens.shape[0] - 1, q.shape[1], k.shape[1], q.shape[2]


def _options_of_attention(q: Tensor, scale: float | None, dropout: Dropout | None) -> tuple:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return scale, None if dropout is None else ctypes.addressof(dropout)


def _expect_memory(failed: int, cu_seqlens: Tensor) -> None:
    if failed:
        raise MemoryError(f"attention: no memory for the keys of a sequence of {int(cu_seqlens.diff().max())} tokens")


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float | None,
    dropout: Dropout | None = None, lse: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Self-attention: q [T, H, D], k, v [T, Hk, D], strided over tokens and heads -> [T, H, D]; and lse [H, T]."""
    o = torch.empty(q.shape, dtype=q.dtype)
    failed = getattr(load()[0], f"attention_{_name(q)}")(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), o.data_ptr(), None if lse is None else lse.data_ptr(),
        *_shape_of_attention(q, k, cu_seqlens), *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        *_options_of_attention(q, scale, dropout),
    )  # fmt: skip
    _expect_memory(failed, cu_seqlens)
    return o


def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, cu_seqlens: Tensor, scale: float | None,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv of do [T, H, D] and what `attention` took and gave."""
    do = do if do.stride(-1) == 1 else do.contiguous()
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v))
    failed = getattr(load()[0], f"attention_backward_{_name(q)}")(
        *(t.data_ptr() for t in (do, q, k, v, o, lse, dq, dk, dv)), *_shape_of_attention(q, k, cu_seqlens),
        *(stride for t in (do, q, k, v) for stride in t.stride()[:2]), *_options_of_attention(q, scale, dropout),
    )  # fmt: skip
    _expect_memory(failed, cu_seqlens)
    return dq, dk, dv


# ---- rows and products -----------------------------------------------------------------------------------


def takes_add_layer_norm(x: Tensor, *others: Tensor | None) -> bool:
    """others: residual, weight and bias."""
    given = (x, *others)
    if any(t is None or t.shape[-1] != x.shape[-1] or not t.is_contiguous() for t in given) or x.shape[-1] % WIDTH:
        return False
    return _know(*given) and others[0].shape == x.shape


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, keys: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:  # fmt: skip
    """LayerNorm(dropout(x) + residual): contiguous [..., N], statistics in float32, the sum never rounded to x's
    dtype. keys: of the rows, as `_random.row_keys` makes them, or None for no dropout."""
    y = torch.empty(x.shape, dtype=x.dtype)
    width = x.shape[-1]
    if keys is not None:
        getattr(load()[0], f"dropout_add_layer_norm_{_name(x)}")(
            x.data_ptr(), residual.data_ptr(), keys.data_ptr(), weight.data_ptr(), bias.data_ptr(), y.data_ptr(),
            x.numel() // width, width, eps, keep_threshold(dropout_p), 1.0 / (1.0 - dropout_p),
        )  # fmt: skip
        return y
    getattr(load()[0], f"add_layer_norm_{_name(x)}")(
        x.data_ptr(), residual.data_ptr(), weight.data_ptr(), bias.data_ptr(), y.data_ptr(),
        x.numel() // width, width, eps,
    )  # fmt: skip
    return y


def add_layer_norm_backward(
    dy: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float, keys: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dresidual, dweight, dbias); without dropout the first two are one tensor."""
    dy, width = dy.contiguous(), x.shape[-1]
    rows = x.numel() // width
    dresidual = torch.empty(x.shape, dtype=x.dtype)
    dx = dresidual if keys is None else torch.empty(x.shape, dtype=x.dtype)
    parts = torch.zeros(max(1, -(-rows // NORM_BLOCK)), 2, width)
    getattr(load()[0], f"add_layer_norm_backward_{_name(x)}")(
        x.data_ptr(), residual.data_ptr(), None if keys is None else keys.data_ptr(), weight.data_ptr(), dy.data_ptr(),
        None if keys is None else dx.data_ptr(), dresidual.data_ptr(), parts.data_ptr(),
        rows, width, eps, keep_threshold(dropout_p), 1.0 / (1.0 - dropout_p),
    )  # fmt: skip
    return dx, dresidual, *parts[0].to(weight.dtype)


def takes_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None, laid_out: bool = False
) -> bool:
    """Whether `linear` is the faster way to activation(x weight^T + bias)."""
    columns, inner = weight.shape
    most = math.inf
    if columns % WIDTH or not multiplies(x.dtype):
        if is_batch_invariant():
            return False
        most = FEW_ROWS_LAID_OUT if laid_out else FEW_ROWS
    if activation not in (None, "gelu") or not 0 < x.numel() <= most * x.shape[-1]:
        return False
    given = (x, weight) if bias is None else (x, weight, bias)
    if columns % 4 or inner % (WIDTH if x.dtype == torch.float32 else 2 * WIDTH):
        return False
    return all(t.is_contiguous() for t in given) and not torch.is_autocast_enabled("cpu") and _take(*given)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    """activation(x weight^T + bias): [..., K], [N, K], [N] or None -> [..., N]. Sums in float32. Within
    `batch_invariant()` always by the product of many rows, in which a row's bits are its own."""
    y = torch.empty(*x.shape[:-1], len(weight), dtype=x.dtype)
    _multiply(x, weight, bias, y, len(weight), activation)
    return y


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """The products of x with each weight side by side: [..., K], [N, K] each -> [..., sum of N]."""
    width = sum(map(len, weights))
    y = torch.empty(*x.shape[:-1], width, dtype=x.dtype)
    first = 0
    for weight, bias in zip(weights, biases, strict=True):
        _multiply(x, weight, bias, y[..., first:], width, None)
        first += len(weight)
    return y


def _multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, y_stride: int, activation: str | None
) -> None:  # fmt: skip
    columns, inner = weight.shape
    failed = getattr(load()[0], f"linear_{_name(x)}")(
        x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr(), y_stride,
        x.numel() // inner, columns, inner, activation == "gelu", is_batch_invariant(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"linear: no memory for 64 columns of {inner} weights")


# ---- before, in and after the layers ---------------------------------------------------------------------


def takes_embedding_layer_norm(indices: tuple[Tensor | None, ...], tables: tuple[Tensor | None, ...]) -> bool:
    """indices: ids, segments, positions [T] int64; tables: word, segment, position [., N], LayerNorm's weight, bias."""
    if any(t is None or not t.is_contiguous() for t in (*indices, *tables)) or tables[0].shape[-1] % WIDTH:
        return False
    return all(t.dtype == torch.int64 and t.device.type == "cpu" for t in indices) and _take(*tables)


def embedding_layer_norm(
    indices: tuple[Tensor, ...], tables: tuple[Tensor, ...], eps: float
) -> Tensor | None:  # fmt: skip
    """LayerNorm of the sum of three look-ups, summed in float32; None where an index lies outside its table."""
    rows, width = len(indices[0]), tables[0].shape[-1]
    y, sizes = torch.empty(rows, width, dtype=tables[0].dtype), array("q", map(len, tables[:3]))
    outside = getattr(load()[0], f"embedding_layer_norm_{_name(y)}")(
        *(t.data_ptr() for t in (*indices, *tables, y)), rows, sizes.buffer_info()[0], width, eps
    )
    return None if outside else y


def takes_mean(x: Tensor, cu_seqlens: Tensor) -> bool:
    starts = cu_seqlens.dtype == torch.int32 and cu_seqlens.is_contiguous() and cu_seqlens.device.type == "cpu"
    return starts and x.shape[-1] % WIDTH == 0 and x.is_contiguous() and _take(x)


def mean_of_sequences(x: Tensor, cu_seqlens: Tensor) -> Tensor | None:
    """x [T, N], cu_seqlens [B + 1] -> [B, N], sums in float32; None where cu_seqlens does not end at T."""
    sequences, (rows, width) = len(cu_seqlens) - 1, x.shape
    y = torch.empty(sequences, width, dtype=x.dtype)
    wrong = getattr(load()[0], f"mean_of_sequences_{_name(x)}")(
        x.data_ptr(), cu_seqlens.data_ptr(), y.data_ptr(), sequences, rows, width
    )
    return None if wrong else y


def layer_shapes(width: int, inner: int) -> list[tuple[int, ...]]:
    """Of the 16 tensors of a layer, weight and bias of each: query, key, value, output, norm, up, down, last norm."""
    square, vector = [(width, width), (width,)], (width,)
    return [*square * 4, vector, vector, (inner, width), (inner,), (width, inner), vector, vector, vector]


def whole_layers(nbytes: int, dtype: torch.dtype) -> bool:
    """Whether `encoder_layers` is ahead of the layers one by one, with x of so many bytes."""
    return dtype in dtypes() and (multiplies(dtype) or (nbytes <= FEW_BYTES and not is_batch_invariant()))


def takes_encoder_layers(x: Tensor, layers: list[Tensor], cu_seqlens: Tensor, heads: int, inner: int) -> bool:
    """Whether `encoder_layers` is the way through these layers: no gradients, everything of one kind."""
    width = x.shape[-1]
    if not len(x) or not whole_layers(x.nbytes, x.dtype):
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if not _take(x) or not x.is_contiguous() or cu_seqlens.dtype != torch.int32 or not cu_seqlens.is_contiguous():
        return False
    if width % heads or width // heads % WIDTH or width % (2 * WIDTH) or inner % (2 * WIDTH):
        return False
    if [t.shape for t in layers] != layer_shapes(width, inner) * (len(layers) // 16):
        return False
    kinds = {*map(type, layers)} <= {*PLAIN} and {t.dtype for t in layers} == {x.dtype}
    return kinds and all(t.is_cpu and t.is_contiguous() for t in layers)


def encoder_layers(
    x: Tensor, layers: list[Tensor], cu_seqlens: Tensor, heads: int, inner: int, eps: float
) -> Tensor:  # fmt: skip
    """x [T, C] through a stack of post-norm layers with GELU, `layers` the tensors of `layer_shapes` of one after
    another; the weights are read where they lie."""
    y, pointers = x.clone(), array("Q", [t.data_ptr() for t in layers])
    work = torch.empty(4 * x.numel() + min(len(x), UP_ROWS) * inner, dtype=x.dtype)
    count = len(layers) // 16
    step = count if x.nbytes <= FEW_BYTES else 1
    for layer in range(0, count, step):
        failed = getattr(load()[0], f"encoder_layers_{_name(x)}")(
            y.data_ptr(), pointers.buffer_info()[0] + layer * 16 * pointers.itemsize, step, cu_seqlens.data_ptr(),
            cu_seqlens.shape[0] - 1, *x.shape, inner, heads, eps, is_batch_invariant(), work.data_ptr(),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"encoder_layers: no memory for {x.shape[0]} rows of {inner} columns")
    return y


def takes_int8(x: Tensor, width: int, bias: Tensor | None, activation: str | None) -> bool:
    """Whether `quantise_rows` of x [M, K] and `scale_rows` to [M, width] can stand around a product."""
    given = (x,) if bias is None else (x, bias)
    fits = x.shape[-1] % WIDTH == 0 and width % WIDTH == 0 and activation in (None, "gelu")
    return fits and all(t.is_contiguous() for t in given) and _take(*given)


def quantise_rows(x: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """x [M, K] -> round(x / s) + 128 [M, K] uint8, s = max(|x|, least) / 127 [M] float32; NaN or infinity: s NaN."""
    q, scales = torch.empty(x.shape, dtype=torch.uint8), torch.empty(len(x))
    getattr(load()[0], f"quantise_rows_{_name(x)}")(
        x.data_ptr(), q.data_ptr(), scales.data_ptr(), *x.shape, least
    )  # fmt: skip
    return q, scales


def scale_rows(sums: Tensor, scales: Tensor, bias: Tensor | None, activation: str | None, y: Tensor) -> None:
    """y = activation(sums * scales + bias): [M, N] float32, [M] float32, [N] or None -> [M, N], in y's dtype."""
    getattr(load()[0], f"scale_rows_{_name(y)}")(
        sums.data_ptr(), scales.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr(),
        *sums.shape, activation == "gelu",
    )  # fmt: skip


def takes_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> bool:
    """Whether `_cpu_loss.row_losses` computes with these, with or without gradients."""
    given = (hidden, weight) if bias is None else (hidden, weight, bias)
    return len(hidden) > 0 and labels.dtype == torch.int64 and _know(*given)


def sum_logits(
    logits: Tensor, bias: Tensor | None, labels: Tensor, greatest: Tensor, sums: Tensor, totals: Tensor,
    of_label: Tensor, first: int,
) -> None:  # fmt: skip
    """Adds logits [words, N] of the words from `first` on to what was summed of z = logits + bias: greatest z, sum of
    exp(z - greatest), sum of z, the label's z, all [N] float32. bias [V] or None, labels [N] int32."""
    words, rows = logits.shape
    getattr(load()[0], f"sum_logits_{_name(logits)}")(
        logits.data_ptr(), None if bias is None else bias.data_ptr(), labels.data_ptr(),
        greatest.data_ptr(), sums.data_ptr(), totals.data_ptr(), of_label.data_ptr(), first, words, rows,
    )  # fmt: skip


def logit_gradients(
    logits: Tensor, bias: Tensor | None, labels: Tensor, lse: Tensor, dloss: Tensor, dz: Tensor, dbias: Tensor,
    first: int, smoothing: float, vocabulary: int,
) -> None:  # fmt: skip
    """Fills dz [words, N], which may be logits, and these words of dbias [V] float32. lse, dloss: [N] float32."""
    words, rows = logits.shape
    getattr(load()[0], f"logit_gradients_{_name(logits)}")(
        logits.data_ptr(), None if bias is None else bias.data_ptr(), labels.data_ptr(), lse.data_ptr(),
        dloss.data_ptr(), dz.data_ptr(), dbias.data_ptr(), first, words, rows, smoothing, smoothing / vocabulary,
    )  # fmt: skip


def _name(x: Tensor) -> str:
    return "float32" if x.dtype == torch.float32 else "bfloat16"
