"""The operators for machines without a GPU, from PyTorch's fast operators (oneDNN's products, fused SDPA, LayerNorm)
and our C++.

C++ is used for inference (`cpu/operators.py`, and weights in oneDNN's layout, `cpu/layouts.py`) and, with gradients,
for attention, products (`cpu/products.py`), add + LayerNorm (`cpu/norm.py`), embeddings and the loss. All else is
ordinary torch, which autograd and torch.compile handle. Where the specification is already made of fast operators, it
is called directly. Signatures are those of `fastbert.functional`, which describes the arguments.
"""

import torch
import torch.nn.functional as F

from . import reference
from ._attention_native import attention as attention
from ._attention_native import attention_padded as attention_padded
from ._attention_native import attention_schedule as attention_schedule
from ._disentangled_native import disentangled_attention as disentangled_attention
from ._invariance import is_batch_invariant
from .cpu import embedding as cpu_embedding
from .cpu import layouts, products
from .cpu import loss as cpu_loss
from .cpu import norm as cpu_norm
from .cpu import operators as cpp


def _sums_in_few_bits(dtype, *parameters):
    """Whether torch would sum these parameters' gradients over the rows in bfloat16 or float16: its backward passes of
    LayerNorm and of embeddings do so on CPUs. In bfloat16 a sum of ones ends at 256."""
    given = [p for p in parameters if p is not None]
    on_cpu = all(p.device.type == "cpu" for p in given)
    return dtype in (torch.bfloat16, torch.float16) and on_cpu and cpp.want_gradients(*given)


def _layer_norm(z, weight, bias, eps):
    """torch's LayerNorm, of float32 copies where torch would sum gradients in fewer bits."""
    if _sums_in_few_bits(z.dtype, weight, bias):
        weight, bias = (None if t is None else t.float() for t in (weight, bias))
        return F.layer_norm(z.float(), z.shape[-1:], weight, bias, eps).to(z.dtype)
    return F.layer_norm(z, z.shape[-1:], weight, bias, eps)


def embedding_layer_norm(
    input_ids, token_type_ids, positions, word, position, token_type, weight, bias, eps=1e-12,
    *, padding_idx=None, dropout_p=0.0, **dropout,
):  # fmt: skip
    """One pass in C++ where that is built, else torch's operators."""
    indices, tables = (input_ids, token_type_ids, positions), (word, token_type, position, weight, bias)
    if cpp.fits_embedding(indices, tables):
        if dropout_p or cpp.want_gradients(*tables):
            keys = _keys_of_rows(input_ids, **dropout) if dropout_p else None
            return cpu_embedding.embedding_layer_norm(indices, tables, eps, padding_idx, keys, dropout_p)
        y = cpp.embedding_layer_norm(indices, tables, eps)
        if y is not None:
            return y
    tables = word, position, token_type, weight, bias
    few_bits = all(t is None or t.dtype is word.dtype for t in tables) and _sums_in_few_bits(word.dtype, *tables)
    if few_bits:
        tables = tuple(None if t is None else t.float() for t in tables)
    y = reference.embedding_layer_norm(*indices, *tables, eps, padding_idx=padding_idx, dropout_p=dropout_p, **dropout)
    return y.to(word.dtype) if few_bits else y


def _keys_of_rows(rows, seed=None, stream=0, row_ids=None):
    """Dropout's keys for as many rows as `rows` has elements, in C++. By default the ids are 0, 1, 2, ..."""
    if row_ids is None:
        row_ids = torch.arange(rows.numel(), dtype=torch.int64, device=rows.device)
    return cpu_norm.row_keys(seed, stream, row_ids.flatten())


def add_layer_norm(
    x, residual, weight, bias, eps=1e-12, *, x_bias=None, dropout_p=0.0, seed=None, stream=0, row_ids=None
):
    """One pass in C++ where that is built, else torch's operators."""
    if cpp.takes_add_layer_norm(x, residual, weight, bias, x_bias=x_bias):
        keys = _keys_of_rows(x[..., 0], seed, stream, row_ids) if dropout_p else None
        return cpu_norm.add_layer_norm(x, residual, weight, bias, eps, keys, dropout_p, x_bias)
    z = reference.dropout_add(x, residual, x_bias, dropout_p, seed, stream, row_ids)
    return _layer_norm(z, weight, bias, eps)


def add_layer_norm_sum(
    x, residual, weight, bias, eps=1e-12, *, x_bias=None, dropout_p=0.0, seed=None, stream=0, row_ids=None
):
    z = reference.dropout_add(x, residual, x_bias, dropout_p, seed, stream, row_ids)
    return _layer_norm(z, weight, bias, eps), z


def dropout(x, dropout_p, seed, stream, row_ids):
    """In C++ where that is built, else the specification."""
    if dropout_p and cpu_norm.takes_dropout(x):
        return cpu_norm.dropout(x, dropout_p, _keys_of_rows(x[:, 0], seed, stream, row_ids))
    return reference.dropout(x, dropout_p, seed, stream, row_ids)


def add_rms_norm(x, residual, weight, eps=1e-6, *, x_bias=None, **dropout):
    """The specification's sum, then the norm in one pass in C++ where that is built."""
    z = reference.dropout_add(x, residual, x_bias, **dropout)
    if cpp.takes_rms_norm(z, weight):
        return cpu_norm.rms_norm(z, weight, eps)
    return reference.add_rms_norm(z, None, weight, eps)


# ---- products --------------------------------------------------------------------------------------------

# Number of rows of every product of the vendor library within `batch_invariant()`.
INVARIANT_ROWS = 128


def linear(x, weight, bias=None):
    """Our product where it is faster, else the vendor library's. That library picks its kernel by the number of rows.
    So within `batch_invariant()` it gets blocks with a fixed number of rows, the last filled up with zeros."""
    if products.takes(x, (weight,), (bias,)):
        return products.linears(x, (weight,), (bias,))
    y = _for_inference(x, weight, bias, None)
    if y is not None:
        return y
    if not is_batch_invariant():
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    whole = len(rows) // INVARIANT_ROWS * INVARIANT_ROWS
    blocks = [*rows[:whole].split(INVARIANT_ROWS)] if whole else []
    if whole < len(rows):
        blocks.append(F.pad(rows[whole:], (0, 0, 0, INVARIANT_ROWS - (len(rows) - whole))))
    parts = [F.linear(block, weight, bias) for block in blocks]
    y = torch.cat(parts)[: len(rows)] if parts else F.linear(rows, weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def linears(x, weights, biases):
    """The products of x with each weight, concatenated, without concatenating the weights; None where not supported."""
    if products.takes(x, weights, biases):
        return products.linears(x, weights, biases)
    if torch.compiler.is_compiling():
        return None
    marked = any(map(layouts.is_promised, weights))
    if not all(cpp.takes_linear(x, w, b, None, marked) for w, b in zip(weights, biases, strict=True)):
        return None
    return cpp.linears(x, weights, biases)


def linear_act(x, weight, bias=None, activation="gelu"):
    if products.takes(x, (weight,), (bias,), activation):
        return products.linear_act(x, weight, bias, activation)
    if activation in layouts.EPILOGUES:
        y = _for_inference(x, weight, bias, activation)
        if y is not None:
            return y
    return reference.activate(linear(x, weight, bias), activation)


def _for_inference(x, weight, bias, activation):
    """activation(x weight^T + bias) by the faster of the products that only inference can use; None without one."""
    if torch.compiler.is_compiling():
        return None
    if cpp.takes_linear(x, weight, bias, activation, layouts.is_promised(weight)):
        return cpp.linear(x, weight, bias, activation)
    packed = None if is_batch_invariant() else layouts.find(x, weight, bias)
    return None if packed is None else layouts.linear(x, packed, bias, activation)


def feed_forward(x, up_weight, up_bias, down_weight, down_bias=None, activation="gelu", recompute=False):
    if products.takes_feed_forward(x, up_weight, up_bias, down_weight, down_bias, activation):
        return products.feed_forward(x, up_weight, up_bias, down_weight, down_bias, activation)
    return linear(linear_act(x, up_weight, up_bias, activation), down_weight, down_bias)


# ---- pooling and loss ------------------------------------------------------------------------------------


def pool(x, cu_seqlens, mode="mean", normalize=False):
    """One vector for each sequence, without a loop over sequences. Means are computed in C++ where that is built."""
    if mode == "mean" and cpp.takes_mean(x, cu_seqlens):
        y = cpp.mean_of_sequences(x, cu_seqlens)
        return F.normalize(y, dim=-1) if normalize else y
    lengths = cu_seqlens.diff()
    batch = lengths.shape[0]
    if mode == "cls":
        # The last sequences may be empty; their start is then past the last row. In a trace the number of rows may be
        # data, on which no branch may depend, so a row is always added there.
        rows = F.pad(x, (0, 0, 0, 1)) if torch.compiler.is_compiling() or not x.shape[0] else x
        first = F.embedding(cu_seqlens[:-1].clamp(max=rows.shape[0] - 1), rows)
        y = torch.where((lengths > 0)[:, None], first, 0.0)
    else:
        numbers = torch.arange(batch, dtype=torch.int64, device=x.device)
        sequences = torch.repeat_interleave(numbers, lengths, output_size=x.shape[0])
        if mode == "mean":
            sums = x.new_zeros(batch, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
            sums = sums.index_add(0, sequences, x.to(sums.dtype))
            y = (sums / lengths.clamp(min=1)[:, None]).to(x.dtype)
        else:
            # The gradient of scatter_reduce counts an equal initial value as a tie even with include_self=False. NaN is
            # equal to nothing.
            before, index = x.new_full((batch, x.shape[1]), torch.nan), sequences[:, None].expand_as(x)
            y = before.scatter_reduce(0, index, x, "amax", include_self=False)
            y = torch.where((lengths > 0)[:, None], y, 0.0)
    return F.normalize(y, dim=-1) if normalize else y


# Rows of logits that are held at a time: 125 MB of float32 with BERT's vocabulary.
LOGIT_ROWS = 1024


def linear_cross_entropy(hidden, weight, bias, labels, *, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    """Drops rows without a label before the product, if labels can be read without waiting for a device."""
    if not cpp.runs_now(hidden):
        losses = _losses_in_chunks(hidden, weight, bias, labels, ignore_index, label_smoothing)
        return _reduced(losses, reduction, (labels != ignore_index).sum())
    if torch.is_autocast_enabled("cpu"):
        hidden, weight, bias = _cast_as_autocast(hidden, weight, bias)
    counted = (labels != ignore_index).nonzero().flatten()
    targets = labels[counted]
    rows = hidden if len(counted) == len(hidden) else hidden[counted]
    if cpu_loss.takes_loss(rows, weight, bias, targets) and not is_batch_invariant():
        losses = cpu_loss.row_losses(rows, weight, bias, targets, label_smoothing)
    else:
        losses = _losses_in_chunks(rows, weight, bias, targets, ignore_index, label_smoothing)
    if reduction == "none":
        return losses.new_zeros(len(labels)).index_copy(0, counted, losses)
    return _reduced(losses, reduction, len(counted))


def _reduced(losses, reduction, count):
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / count


def _losses_in_chunks(hidden, weight, bias, labels, ignore_index, label_smoothing):
    """The losses [N] in chunks of rows. If there are several chunks, the backward pass computes their logits again."""

    def of_chunk(rows, targets):
        logits = linear(rows, weight, bias).float()
        return F.cross_entropy(
            logits, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
        )

    if len(hidden) <= LOGIT_ROWS:
        return of_chunk(hidden, labels)
    chunks = zip(hidden.split(LOGIT_ROWS), labels.split(LOGIT_ROWS), strict=True)
    kept = [torch.utils.checkpoint.checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.cat(kept)


def _cast_as_autocast(*tensors):
    dtype = torch.get_autocast_dtype("cpu")
    return (t.to(dtype) if t is not None and t.dtype == torch.float32 else t for t in tensors)


# ---- engines ---------------------------------------------------------------------------------------------

# Operator -> the module with its Triton form; its engine if the C++ operators are available and support the dtype (None
# if that depends on the CPU); its engine otherwise. `linear` has no Triton form: beside Triton kernels, too, models use
# the vendor library's product.
ENGINES = {
    "attention": ("attention", "C++; torch's SDPA with a mask or a bias", "SDPA"),
    "attention_padded": ("attention", "SDPA", "SDPA"),
    "disentangled_attention": ("disentangled", "C++", "the vendor library's products"),
    "add_layer_norm": ("layer_norm", "C++", "plain torch"),
    "add_layer_norm_sum": ("layer_norm", "plain torch", "plain torch"),
    "add_rms_norm": ("layer_norm", "C++ behind a sum in plain torch", "plain torch"),
    "linear_act": ("feed_forward", None, "the vendor library's products"),
    "feed_forward": ("feed_forward", None, "the vendor library's products"),
    "embedding_layer_norm": ("embedding", "C++; plain torch without segments", "plain torch"),
    "linear_cross_entropy": (
        "cross_entropy", "C++ between the vendor library's products", "the vendor library's products"),
    "pool": ("pooling", "C++ for means without gradients; else plain torch", "plain torch"),
    "linear": (None, None, "the vendor library's products"),
}  # fmt: skip


def engine(op: str, dtype: torch.dtype, device: torch.device) -> str:
    """The engine of an operator with impl="native" in this dtype on this device, in words."""
    _, by_cpp, elsewhere = ENGINES[op]
    if device.type != "cpu" or dtype not in cpp.dtypes():
        return elsewhere
    if by_cpp is not None:
        return by_cpp
    if cpp.multiplies(dtype):
        return "C++, with GELU or no activation, and ReLU with gradients; else the vendor library's products"
    return f"the vendor library's products; C++ up to {cpp.LINEAR_ROWS} rows without gradients"
