"""The seam: validate, choose an implementation, call it.

Every operator of the encoder, as a plain function of tensors. `impl` picks who computes it:

    "triton"     the hand-written kernels: CUDA tensors, or CPU tensors under TRITON_INTERPRET=1
    "native"     PyTorch's own fast operators (oneDNN, SDPA), on any device
    "reference"  plain torch as in the specification, on any device
    None         triton where the tensor lies on a CUDA device of compute capability 8.0 or newer (or the interpreter
                 is on), else native

An explicit `impl` runs that implementation or raises; only None may choose. Gradients flow through all three.
Shapes use T tokens in the packed batch, B sequences, H heads, D head_dim, C hidden width, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .kernels import _device as machine
from .kernels import native, reference
from .kernels._assembler import assembler as assembler
from .kernels._checks import ACTIVATIONS as ACTIVATIONS
from .kernels._checks import expect_indices as expect_indices
from .kernels._checks import expect_lengths
from .kernels._checks import expect_sequences as expect_sequences
from .kernels._invariance import is_batch_invariant
from .kernels._layer import LayerOptions, LayerWeights
from .kernels.cpu import operators as cpp

Impl = Literal["triton", "native", "reference"]
IMPLS = ("triton", "native", "reference")

# operator -> the kernel module that holds its Triton form
TRITON_MODULES = {
    "attention": "attention",
    "attention_padded": "attention",
    "add_layer_norm": "layer_norm",
    "add_layer_norm_sum": "layer_norm",
    "add_rms_norm": "layer_norm",
    "linear_act": "feed_forward",
    "feed_forward": "feed_forward",
    "embedding_layer_norm": "embedding",
    "linear_cross_entropy": "cross_entropy",
    "pool": "pooling",
}

POOLING_MODES = ("mean", "cls", "max")


# The kernels are written for, and compiled for in tests: matrix units with bfloat16, copies to shared memory that pass
# no registers. Triton itself builds for older cards what it can, and fails on the rest.
OLDEST_CAPABILITY = (8, 0)


def why_not_triton(device: torch.device) -> str | None:
    """None where Triton kernels run on this device, else the reason they do not."""
    if not machine.HAS_TRITON:
        return "triton is not installed"
    if device.type == "cuda":
        return _why_too_old(device.index)
    if machine.triton_on_cpu():
        return None
    return f"Triton needs a CUDA device (this one is {device.type}) or TRITON_INTERPRET=1"


def _why_too_old(index: int | None) -> str | None:
    """Why a CUDA device is too old for the kernels, or None. ROCm's capability is the number of AMD's own target
    (gfx942 is 9.4) and says nothing of this kind."""
    if torch.version.hip is not None or (found := machine.capability(index)) >= OLDEST_CAPABILITY:
        return None
    return f"the kernels need compute capability {_dotted(OLDEST_CAPABILITY)}, and this card has {_dotted(found)}"


# What `torch.compiler.assume_constant_result` sets, without the second that importing torch's compiler takes.
_why_too_old._dynamo_marked_constant = True


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def why_not_cpp() -> str | None:
    """None where `native` has its C++ operators on a CPU, else the reason it has not."""
    return cpp.load()[1]


def choose_impl(impl: str | None, device: torch.device) -> Impl:
    """The implementation that `impl` means on this device. Raises where an explicit one cannot run."""
    if impl is None:
        impl = "native" if why_not_triton(device) else "triton"
    elif impl not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS} or None, got {impl!r}")
    elif impl == "triton" and (reason := why_not_triton(device)):
        raise RuntimeError(f'impl="triton" cannot run here: {reason}')
    if is_batch_invariant() and impl != "triton" and (impl, device.type) != ("native", "cpu"):
        reason = why_not_triton(device)
        raise RuntimeError(
            f'batch_invariant() needs impl "triton", or "native" on a CPU; got "{impl}" on {device.type}'
            + (f" ({reason})" if reason else "")
        )
    return impl


OPERATORS = (*TRITON_MODULES, "linear")


def engine(op: str, dtype: torch.dtype, device: torch.device, impl: str | None = None) -> str:
    """Who computes an operator of `OPERATORS` in this dtype on this device, in words: "native" has several engines.

    Raises where `choose_impl` does.
    """
    chosen = choose_impl(impl, device)
    if op == "linear" and impl is None and chosen == "triton" and not is_batch_invariant():
        chosen = "native"  # the vendor library's, unless our own product is asked for
    if chosen == "native":
        return native.engine(op, dtype, device)
    return "our Triton kernel" if chosen == "triton" else "plain torch"


_modules: dict[str, Any] = {}


def _triton_module(name: str) -> Any:
    """A kernel module, imported on first use. (Statements, since torch.compile follows those and no import_module.)"""
    if name not in _modules:
        from .kernels import attention, cross_entropy, embedding, encoder_layer, feed_forward, layer_norm, pooling

        _modules.update(
            attention=attention, cross_entropy=cross_entropy, embedding=embedding, encoder_layer=encoder_layer,
            feed_forward=feed_forward, layer_norm=layer_norm, pooling=pooling,
        )  # fmt: skip
    return _modules[name]


def _resolve(op: str, impl: str | None, x: Tensor) -> Any:
    impl = choose_impl(impl, x.device)
    if impl == "triton":
        return getattr(_triton_module(TRITON_MODULES[op]), op)
    return getattr(native if impl == "native" else reference, op)


def _expect_one_device(op: str, **tensors: Tensor | None) -> None:
    device = next(iter(tensors.values())).device
    for name, t in tensors.items():
        if t is not None and t.device != device:
            raise ValueError(f"{op}: all tensors must lie on one device, but {name} is on {t.device}, not {device}")


def _expect_dropout(op: str, dropout_p: float, seed: Tensor | None) -> None:
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p > 0.0 and (not isinstance(seed, Tensor) or seed.numel() != 1 or seed.dtype != torch.int64):
        raise ValueError(
            f"{op}: dropout needs seed, an int64 tensor with one element, got "
            + (f"{seed.dtype} of shape {tuple(seed.shape)}" if isinstance(seed, Tensor) else repr(seed))
        )


def _expect_integers(op: str, name: str, t: Tensor | None, count: int) -> None:
    """Of a list that kernels index by row or sequence: one integer for each."""
    if t is not None and (t.numel() != count or t.dtype not in (torch.int64, torch.int32)):
        raise ValueError(f"{op}: {name} must be {count} int64 or int32, got {t.dtype} of shape {tuple(t.shape)}")


# ---- attention -------------------------------------------------------------------------------------------


def _expect_heads(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.dim() == k.dim() == v.dim():
        raise ValueError(f"{op}: q, k, v have {q.dim()}, {k.dim()}, {v.dim()} dimensions")
    if k.shape != v.shape:
        raise ValueError(f"{op}: k is {tuple(k.shape)}, v is {tuple(v.shape)}; they must agree")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"{op}: q has head_dim {q.shape[-1]}, k has {k.shape[-1]}")
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if kv_heads <= 0 or heads % kv_heads != 0:
        raise ValueError(f"{op}: q has {heads} heads, k has {kv_heads}; the first must be a multiple of the second")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{op}: q, k, v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    _expect_one_device(op, q=q, k=k, v=v)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    window: tuple[int, int] | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    sequence_ids: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    schedule: Any = None,
    impl: Impl | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Bidirectional attention of each packed sequence over itself, or over its own keys.

        s = scale * q k^T + bias - slope * |i - j|      -inf where the mask or the window forbids
        o = dropout(softmax(s)) v;   lse = logsumexp(s)

    Args:
        q: [Tq, H, D], any strides with the last dimension contiguous (a view of one fused qkv tensor is fine).
        k, v: [Tk, Hk, D]; H must be a multiple of Hk (grouped heads: query head h reads key head h * Hk // H).
        cu_seqlens: [B + 1] int32, starts at 0, ends at Tq; sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1].
        max_seqlen: at least the longest sequence's length; a bound for launches, not read from the device.
        cu_seqlens_k, max_seqlen_k: the same for k and v in cross-attention; by default those of q.
        bias: [1 | B, 1 | H, >= max_seqlen, >= max_seqlen_k], added to the scores; differentiable.
        mask: bool of bias's kind of shape, True where attention is allowed.
        alibi_slopes: [H] float32.
        window: (left, right): position i sees i - left to i + right, both included.
        rotary: (cos, sin), each [>= max_seqlen, D / 2], applied to q and k by position in the sequence.
        dropout_p, seed, stream: probabilities are dropped by (seed, stream, head, sequence id, row, column);
            seed is an int64 tensor with one element, stream tells call sites (layers) apart.
        sequence_ids: [B] int64 or int32 names of the sequences for dropout; by default 0 to B - 1.
        scale: softmax scale, by default D ** -0.5.
        return_lse: also return lse, [H, Tq] float32, natural logarithm (-inf where a row has no key).
        schedule: `attention_schedule(...)` of this batch and implementation, to share among layers.

    Returns: o [Tq, H, D] in q's dtype. A row that may attend to no key is zero, and so are its gradients.
    Raises: ValueError on shapes, dtypes or devices that do not fit; and on lengths that do not, on CPU tensors, and on
    a GPU with FASTBERT_CHECK=1 in the environment.
    """
    if q.dim() != 3:
        raise ValueError(f"attention: q must be [T, H, D], got {tuple(q.shape)}; padded input is attention_padded")
    _expect_heads("attention", q, k, v)
    _expect_dropout("attention", dropout_p, seed)
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"attention: cu_seqlens must be [B + 1] int32, got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens_k is None:
        if q.shape[0] != k.shape[0]:
            raise ValueError(
                f"attention: q has {q.shape[0]} tokens, k has {k.shape[0]}; cross-attention needs cu_seqlens_k"
            )
    else:
        if cu_seqlens_k.shape != cu_seqlens.shape or cu_seqlens_k.dtype != torch.int32:
            raise ValueError(
                f"attention: cu_seqlens_k must be int32 of shape {tuple(cu_seqlens.shape)}, "
                f"got {cu_seqlens_k.dtype} of shape {tuple(cu_seqlens_k.shape)}"
            )
        if max_seqlen_k is None:
            raise ValueError("attention: cu_seqlens_k needs max_seqlen_k")
        expect_sequences("attention", "cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    if schedule is None:  # else whoever made it has looked
        expect_sequences("attention", "cu_seqlens", cu_seqlens, q.shape[0], max_seqlen)
    _expect_integers("attention", "sequence_ids", sequence_ids, cu_seqlens.shape[0] - 1)
    _expect_attention_options("attention", q, cu_seqlens.shape[0] - 1, bias, mask, alibi_slopes, window, rotary)
    return _resolve("attention", impl, q)(
        q, k, v, cu_seqlens, max_seqlen,
        cu_seqlens_k=cu_seqlens_k, max_seqlen_k=max_seqlen_k, bias=bias, mask=mask, alibi_slopes=alibi_slopes,
        window=window, rotary=rotary, dropout_p=dropout_p, seed=seed, stream=stream, sequence_ids=sequence_ids,
        scale=scale, return_lse=return_lse, schedule=schedule,
    )  # fmt: skip


def _expect_attention_options(op, q, batch, bias, mask, alibi_slopes, window, rotary) -> None:
    heads, head_dim = q.shape[-2:]
    for name, t in (("bias", bias), ("mask", mask)):
        if t is not None and (t.dim() != 4 or t.shape[0] not in (1, batch) or t.shape[1] not in (1, heads)):
            raise ValueError(f"{op}: {name} must be [1 or {batch}, 1 or {heads}, Sq, Sk], got {tuple(t.shape)}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"{op}: mask must be bool, got {mask.dtype}")
    if alibi_slopes is not None and alibi_slopes.shape != (heads,):
        raise ValueError(f"{op}: alibi_slopes must be [{heads}], got {tuple(alibi_slopes.shape)}")
    if window is not None and (len(window) != 2 or min(window) < 0):
        raise ValueError(f"{op}: window must be (left, right) with both at least 0, got {window}")
    if rotary is not None:
        if head_dim % 2 != 0:
            raise ValueError(f"{op}: rotary needs an even head_dim, got {head_dim}")
        if len(rotary) != 2 or not all(t.dim() == 2 and t.shape[1] == head_dim // 2 for t in rotary):
            raise ValueError(
                f"{op}: rotary must be (cos, sin), each [S, {head_dim // 2}], got {[tuple(t.shape) for t in rotary]}"
            )


def attention_padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    window: tuple[int, int] | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    sequence_ids: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    schedule: Any = None,
    impl: Impl | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` over padded views: q [B, Sq, H, D], k, v [B, Sk, Hk, D], right-padded, nothing copied.

    Args:
        seqlens: [B] int32, real rows of each sequence of q; by default all Sq.
        seqlens_k: [B] int32 for k and v; by default `seqlens` where Sk equals Sq, else all Sk.
        schedule: `attention_schedule(seqlens, Sq, padded=True)`, to share among layers.
        All others as in `attention`.

    Returns: o [B, Sq, H, D], zero past each length (and lse [B, H, Sq] float32, -inf there).
    Raises: ValueError on shapes, dtypes or devices that do not fit.
    """
    if q.dim() != 4:
        raise ValueError(f"attention_padded: q must be [B, S, H, D], got {tuple(q.shape)}")
    _expect_heads("attention_padded", q, k, v)
    _expect_dropout("attention_padded", dropout_p, seed)
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"attention_padded: q has {q.shape[0]} sequences, k has {k.shape[0]}")
    for name, t in (("seqlens", seqlens), ("seqlens_k", seqlens_k)):
        if t is not None and (t.shape != (q.shape[0],) or t.dtype != torch.int32):
            raise ValueError(f"attention_padded: {name} must be [{q.shape[0]}] int32, got {(t.dtype, tuple(t.shape))}")
        if t is not None:
            expect_lengths("attention_padded", name, t, (q if name == "seqlens" else k).shape[1])
    _expect_integers("attention_padded", "sequence_ids", sequence_ids, q.shape[0])
    _expect_attention_options("attention_padded", q, q.shape[0], bias, mask, alibi_slopes, window, rotary)
    return _resolve("attention_padded", impl, q)(
        q, k, v, seqlens, seqlens_k,
        bias=bias, mask=mask, alibi_slopes=alibi_slopes, window=window, rotary=rotary, dropout_p=dropout_p,
        seed=seed, stream=stream, sequence_ids=sequence_ids, scale=scale, return_lse=return_lse, schedule=schedule,
    )  # fmt: skip


def attention_schedule(
    cu_seqlens: Tensor,
    total_tokens: int,
    impl: Impl | None = None,
    *,
    spans_k: Tensor | None = None,
    padded: bool = False,
    lengths: Sequence[int] | None = None,
    entries: Tensor | None = None,
) -> Any:
    """What `attention` derives from a batch's lengths, made once and shared by all layers of a forward pass.

    Opaque: pass it as `schedule=`. It belongs to these lengths and this implementation.

    Args:
        cu_seqlens, total_tokens: of `attention`; padded: the seqlens [B] int32 and the width of `attention_padded`.
        spans_k: cu_seqlens_k or seqlens_k, in cross-attention.
        lengths: of the B packed sequences, where the host knows them and k has the same. Kernels that no sequence of
            these lengths needs are then not launched.
        entries: `attention_entries(lengths)` on the device of cu_seqlens. Without it a kernel there makes them.

    Raises: ValueError where lengths are not B that add up to total_tokens, and where cu_seqlens does not rise from 0 to
        total_tokens: on a CPU, and on a GPU with FASTBERT_CHECK=1 in the environment.
    """
    impl = choose_impl(impl, cu_seqlens.device)
    if impl == "triton":
        if not padded:
            expect_sequences("attention", "cu_seqlens", cu_seqlens, total_tokens)
        return _triton_module("attention").attention_schedule(
            cu_seqlens, total_tokens, spans_k, padded, lengths, entries
        )
    if impl == "reference" or padded or spans_k is not None:
        return None  # these go by the lengths themselves
    return native.attention_schedule(cu_seqlens, total_tokens, lengths)


def attention_entries(lengths: Sequence[int], device: torch.device) -> Tensor | None:
    """The part of `attention_schedule` that has to be on `device`, made on the host: [n, 2] int32 on the CPU.

    None where no Triton kernels run on that device: the other implementations have no use for it.
    """
    return None if why_not_triton(device) else _triton_module("attention").attention_entries(lengths)


# ---- normalisation ---------------------------------------------------------------------------------------


def _expect_norm(op, x, residual, weight, bias, x_bias, dropout_p, seed, row_ids) -> None:
    width = x.shape[-1]
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"{op}: x is {tuple(x.shape)}, residual is {tuple(residual.shape)}")
    for name, t in (("weight", weight), ("bias", bias), ("x_bias", x_bias)):
        if t is not None and t.shape != (width,):
            raise ValueError(f"{op}: {name} must be [{width}] like x's last dimension, got {tuple(t.shape)}")
    _expect_dropout(op, dropout_p, seed)
    if row_ids is not None:
        _expect_integers(op, "row_ids", row_ids, x.numel() // max(width, 1))
    _expect_one_device(op, x=x, residual=residual, weight=weight, bias=bias, x_bias=x_bias, row_ids=row_ids)


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-12,
    *,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    row_ids: Tensor | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """LayerNorm(dropout(x + x_bias) + residual), the block end of post-norm BERT. Ba et al., arXiv:1607.06450.

    Args:
        x, residual: [..., N], one shape; residual may be None.
        weight, bias, x_bias: [N] or None. x_bias is the bias of the linear layer that made x.
        eps: added to the variance.
        dropout_p, seed, stream, row_ids: element (row, column) is dropped by (seed, stream, row_ids[row], column);
            row_ids is int64 or int32, one a row, by default the row's number; see `PackedBatch.row_ids`.

    Returns: [..., N] in x's dtype; statistics are float32.
    """
    _expect_norm("add_layer_norm", x, residual, weight, bias, x_bias, dropout_p, seed, row_ids)
    return _resolve("add_layer_norm", impl, x)(
        x,
        residual,
        weight,
        bias,
        eps,
        x_bias=x_bias,
        dropout_p=dropout_p,
        seed=seed,
        stream=stream,
        row_ids=row_ids,
    )


def add_layer_norm_sum(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-12,
    *,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    row_ids: Tensor | None = None,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` for pre-norm blocks: (y, z) with z = dropout(x + x_bias) + residual, the next residual."""
    _expect_norm("add_layer_norm_sum", x, residual, weight, bias, x_bias, dropout_p, seed, row_ids)
    return _resolve("add_layer_norm_sum", impl, x)(
        x,
        residual,
        weight,
        bias,
        eps,
        x_bias=x_bias,
        dropout_p=dropout_p,
        seed=seed,
        stream=stream,
        row_ids=row_ids,
    )


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float = 1e-6,
    *,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    row_ids: Tensor | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """z = dropout(x + x_bias) + residual; z / sqrt(mean(z^2) + eps) * weight. Zhang, Sennrich, arXiv:1910.07467.

    Arguments as in `add_layer_norm`.
    """
    _expect_norm("add_rms_norm", x, residual, weight, None, x_bias, dropout_p, seed, row_ids)
    return _resolve("add_rms_norm", impl, x)(
        x,
        residual,
        weight,
        eps,
        x_bias=x_bias,
        dropout_p=dropout_p,
        seed=seed,
        stream=stream,
        row_ids=row_ids,
    )


def dropout(
    x: Tensor, dropout_p: float, seed: Tensor | None, *, stream: int = 0, row_ids: Tensor | None = None
) -> Tensor:
    """x [M, N] with elements dropped as in `add_layer_norm`, the others scaled by 1 / (1 - dropout_p). Plain torch."""
    if x.dim() != 2:
        raise ValueError(f"dropout: x must be [M, N], got {tuple(x.shape)}")
    _expect_dropout("dropout", dropout_p, seed)
    if row_ids is not None:
        _expect_integers("dropout", "row_ids", row_ids, x.shape[0])
    return reference.dropout(x, dropout_p, seed, stream, row_ids)


# ---- feed-forward ----------------------------------------------------------------------------------------


def _expect_linear(op: str, name: str, x_width: int, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or weight.shape[1] != x_width:
        raise ValueError(
            f"{op}: {name} must be [out, {x_width}] for input of width {x_width}, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"{op}: the bias of {name} must be [{weight.shape[0]}], got {tuple(bias.shape)}")


def _expect_activation(op: str, activation: str, rows: int) -> int:
    """The width after the activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {ACTIVATIONS}, got {activation!r}")
    if activation != "geglu":
        return rows
    if rows % 2 != 0:
        raise ValueError(f"{op}: geglu needs an even number of weight rows, got {rows}")
    return rows // 2


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: Impl | None = None) -> Tensor:
    """x weight^T + bias: x [..., C], weight [N, C], bias [N] -> [..., N].

    By default the vendor library's product on a GPU, which no epilogue of ours would improve, and on a CPU "native",
    which has products of its own where they are ahead. Within `batch_invariant()` our own GEMM, or on a CPU the
    vendor's in blocks of one size. impl="triton" is our own GEMM.
    """
    _expect_linear("linear", "weight", x.shape[-1], weight, bias)
    chosen = "native" if impl is None and not is_batch_invariant() else choose_impl(impl, x.device)
    if chosen == "triton":
        from .kernels._gemm import linear as by_our_gemm

        return by_our_gemm(x, weight, bias)
    if chosen == "native" and x.device.type == "cpu":
        return native.linear(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


def products_beside(impl: Impl | None) -> Impl | None:
    """The `impl` of `linear` in a model whose other operators are by `impl`: with our kernels the default."""
    return None if impl == "triton" else impl


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation alone, in plain torch: x [..., F] -> [..., F], or [..., F / 2] where it is geglu.

    For layers whose product is not a plain one, so that `linear_act` and `feed_forward` cannot have it.
    """
    _expect_activation("activate", activation, x.shape[-1])
    return reference.activate(x, activation)


def linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "gelu",
    *,
    impl: Impl | None = None,
) -> Tensor:
    """act(x weight^T + bias) in one GEMM with an epilogue: x [..., C], weight [F, C], bias [F] -> [..., F].

    activation: gelu (exact), gelu_tanh, relu, silu, or geglu: weight [2F, C], gelu(first F) * second F.
    """
    _expect_linear("linear_act", "weight", x.shape[-1], weight, bias)
    _expect_activation("linear_act", activation, weight.shape[0])
    return _resolve("linear_act", impl, x)(x, weight, bias, activation)


def feed_forward(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None = None,
    activation: str = "gelu",
    *,
    recompute: bool = False,
    impl: Impl | None = None,
) -> Tensor:
    """act(x up^T + up_bias) down^T + down_bias: x [..., C] -> [..., C].

    Args:
        up_weight: [F, C] (geglu: [2F, C]); up_bias: its rows, or None.
        down_weight: [C, F]; down_bias: [C] or None (then fold it into the `x_bias` of `add_layer_norm`).
        activation: as in `linear_act`.
        recompute: training only: recompute the pre-activation in the backward pass instead of saving it.
            Saves T x F elements of memory for one more GEMM of the first layer's size.
    """
    _expect_linear("feed_forward", "up_weight", x.shape[-1], up_weight, up_bias)
    inner = _expect_activation("feed_forward", activation, up_weight.shape[0])
    _expect_linear("feed_forward", "down_weight", inner, down_weight, down_bias)
    return _resolve("feed_forward", impl, x)(
        x, up_weight, up_bias, down_weight, down_bias, activation, recompute=recompute
    )


# ---- a whole layer ---------------------------------------------------------------------------------------


def encoder_layer(
    x: Tensor,
    weights: LayerWeights,
    cu_seqlens: Tensor,
    max_seqlen: int,
    options: LayerOptions,
    *,
    schedule: Any,
    seed: Tensor | None = None,
    row_ids: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    qkv: Callable[[], tuple[Tensor, Tensor | None]] | None = None,
    impl: Impl | None = None,
) -> Tensor | None:
    """A post-norm encoder layer of a packed batch as one operator, or None: its operators have to be called one by one.

        x = LayerNorm(dropout(attention(x)) + x);  x = LayerNorm(dropout(feed_forward(x)) + x)

    The Triton kernels have it, for plain tensors of one dtype, outside of autocast, torch.compile, tracing and whatever
    else follows or changes single operators. The bits of x are those of the operators one by one, its gradient is as
    close. Second derivatives are refused.

    Args:
        x: [T, C].
        weights, options: see there.
        cu_seqlens, max_seqlen, schedule, seed, sequence_ids: as in `attention`; row_ids: as in `add_layer_norm`.
        qkv: gives query, key and value joined, weight [3A, C] and bias [3A]; called where no gradient is recorded, so
            that the caller may keep them from pass to pass. By default they are joined anew.
    """
    if choose_impl(impl, x.device) != "triton":
        return None
    module = _triton_module("encoder_layer")
    if not module.takes(x, weights, options):
        return None
    _expect_dropout("encoder_layer", max(options.probs_p, options.out_p, options.down_p), seed)
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"encoder_layer: cu_seqlens must be [B + 1] int32, got {cu_seqlens.dtype} of {tuple(cu_seqlens.shape)}"
        )
    if row_ids is not None:
        _expect_integers("encoder_layer", "row_ids", row_ids, x.shape[0])
    _expect_integers("encoder_layer", "sequence_ids", sequence_ids, cu_seqlens.shape[0] - 1)
    return module.encoder_layer(
        x, weights, cu_seqlens.contiguous(), max_seqlen, options,
        schedule=schedule, seed=seed, row_ids=row_ids, sequence_ids=sequence_ids, qkv=qkv,
    )  # fmt: skip


# ---- embeddings, pooling, loss ---------------------------------------------------------------------------


def embedding_layer_norm(
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    positions: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-12,
    *,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    row_ids: Tensor | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """dropout(LayerNorm(word[input_ids] + token_type[token_type_ids] + position[positions])): [T] -> [T, C].

    Args:
        input_ids, token_type_ids, positions: [T] int64 or int32, in range: else IndexError or ValueError, on a GPU only
            with FASTBERT_CHECK=1 in the environment.
        word: [vocab, C]; position: [max_position, C]; token_type: [types, C] or None (with token_type_ids None).
        weight, bias: [C] of the LayerNorm.
        padding_idx: the row of `word` that gets no gradient, as in nn.Embedding.
        dropout_p, seed, stream, row_ids: as in `add_layer_norm`.
    """
    op = "embedding_layer_norm"
    for name, t in (("token_type_ids", token_type_ids), ("positions", positions)):
        if t is not None and t.shape != input_ids.shape:
            raise ValueError(f"{op}: input_ids is {tuple(input_ids.shape)}, {name} is {tuple(t.shape)}")
    if input_ids.dim() != 1:
        raise ValueError(f"{op}: input_ids must be [T], got {tuple(input_ids.shape)}")
    if (token_type is None) != (token_type_ids is None):
        raise ValueError(f"{op}: token_type and token_type_ids go together")
    for name, t in (("position", position), ("token_type", token_type)):
        if t is not None and t.shape[1] != word.shape[1]:
            raise ValueError(f"{op}: word has width {word.shape[1]}, {name} has {t.shape[1]}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.shape != word.shape[1:]:
            raise ValueError(f"{op}: {name} must be [{word.shape[1]}] like a row of word, got {tuple(t.shape)}")
    _expect_integers(op, "row_ids", row_ids, input_ids.shape[0])
    _expect_dropout(op, dropout_p, seed)
    _expect_one_device(op, input_ids=input_ids, positions=positions, word=word, position=position, weight=weight)
    if choose_impl(impl, word.device) == "triton":  # torch's own look-ups raise IndexError by themselves
        for name, ids, table in (
            ("input_ids", input_ids, word),
            ("token_type_ids", token_type_ids, token_type),
            ("positions", positions, position),
        ):
            if ids is not None:
                expect_indices(op, name, ids, table.shape[0])
    return _resolve(op, impl, word)(
        input_ids, token_type_ids, positions, word, position, token_type, weight, bias, eps,
        padding_idx=padding_idx, dropout_p=dropout_p, seed=seed, stream=stream, row_ids=row_ids,
    )  # fmt: skip


def pool(
    x: Tensor, cu_seqlens: Tensor, mode: str = "mean", normalize: bool = False, *, impl: Impl | None = None
) -> Tensor:
    """One vector a packed sequence: x [T, C], cu_seqlens [B + 1] int32 -> [B, C].

    mode: mean of its tokens, cls (its first), max over them. An empty sequence gives zeros.
    normalize: divide by max(L2 norm, 1e-12), as torch.nn.functional.normalize does.
    """
    if mode not in POOLING_MODES:
        raise ValueError(f"pool: mode must be one of {POOLING_MODES}, got {mode!r}")
    if x.dim() != 2:
        raise ValueError(f"pool: x must be [T, C], got {tuple(x.shape)}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"pool: cu_seqlens must be [B + 1] int32, got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    _expect_one_device("pool", x=x, cu_seqlens=cu_seqlens)
    expect_sequences("pool", "cu_seqlens", cu_seqlens, x.shape[0])
    return _resolve("pool", impl, x)(x, cu_seqlens, mode, normalize)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    impl: Impl | None = None,
) -> Tensor:
    """cross_entropy(hidden weight^T + bias, labels) without the [N, V] logits in memory as a whole.

    Args:
        hidden: [N, C], the rows that have a label (masked positions); weight: [V, C], often the word embedding.
        bias: [V] or None; labels: [N] int64, `ignore_index` where a row does not count.
        label_smoothing, reduction: as in torch.nn.functional.cross_entropy.

    Returns: a scalar float32 ("mean" over the rows that count, "sum"), or [N] float32 ("none").
    """
    op = "linear_cross_entropy"
    if hidden.dim() != 2:
        raise ValueError(f"{op}: hidden must be [N, C], got {tuple(hidden.shape)}")
    _expect_linear(op, "weight", hidden.shape[1], weight, bias)
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"{op}: labels must be [{hidden.shape[0]}], got {tuple(labels.shape)}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction must be mean, sum or none, got {reduction!r}")
    _expect_one_device(op, hidden=hidden, weight=weight, bias=bias, labels=labels)
    if choose_impl(impl, hidden.device) == "triton":  # torch's own loss raises IndexError by itself
        expect_indices(op, "labels", labels, weight.shape[0], ignored=ignore_index)
    return _resolve(op, impl, hidden)(
        hidden,
        weight,
        bias,
        labels,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
