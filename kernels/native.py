"""The same operators from PyTorch's own fast ones: oneDNN's matrix products, fused SDPA and LayerNorm.

What a machine without a GPU runs. Nearly everything here is ordinary torch, so autograd and torch.compile need no
help; where the specification already is a sequence of fast operators, it is used as it stands. Signatures are those
of `fastbert.functional`, where every argument is described.
"""

import itertools

import torch
import torch.nn.functional as F

from . import reference

add_layer_norm = reference.add_layer_norm
add_layer_norm_sum = reference.add_layer_norm_sum
add_rms_norm = reference.add_rms_norm
embedding_layer_norm = reference.embedding_layer_norm
linear_act = reference.linear_act
feed_forward = reference.feed_forward


# ---- attention -------------------------------------------------------------------------------------------


def attention_schedule(cu_seqlens, total_tokens):
    """Runs of neighbours of one length: [(first row, number of sequences, length)], empty sequences left out.

    A run is one batched product. Texts sorted by length make few runs.
    """
    if torch.compiler.is_compiling():
        return None  # lengths are data: the operator below reads them when it runs
    starts = cu_seqlens.tolist()
    if starts[-1] != total_tokens:
        raise ValueError(f"cu_seqlens ends at {starts[-1]}, but there are {total_tokens} tokens")
    runs, start = [], 0
    for length, run in itertools.groupby(end - begin for begin, end in itertools.pairwise(starts)):
        count = sum(1 for _ in run)
        if length:
            runs.append((start, count, length))
        start += count * length
    return runs


def _sdpa(q, k, v, scale):
    """[n, L, H, D] views -> [n, L, H, D]; grouped heads allowed."""
    grouped = q.shape[2] != k.shape[2]
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale, enable_gqa=grouped
    ).transpose(1, 2)


def _attention_in_runs(q, k, v, runs, scale):
    """Plain self-attention, one SDPA call a run: q [T, H, D], k, v [T, Hk, D] -> [T, H, D]."""

    def of_run(x, start, count, length):
        return x[start : start + count * length].unflatten(0, (count, length))

    outputs = [_sdpa(*(of_run(x, *run) for x in (q, k, v)), scale).flatten(0, 1) for run in runs]
    return torch.cat(outputs) if outputs else q.new_zeros(q.shape)


@torch.library.custom_op("fastbert::attention_native", mutates_args=())
def _attention_opaque(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """`_attention_in_runs` as one node of a traced graph, since its loop depends on data."""
    return _attention_in_runs(q, k, v, attention_schedule(cu_seqlens, q.shape[0]), scale).contiguous()


@_attention_opaque.register_fake
def _(q, k, v, cu_seqlens, scale):
    return q.new_empty(q.shape)


@torch.library.custom_op("fastbert::attention_native_backward", mutates_args=())
def _attention_opaque_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o = _attention_in_runs(*leaves, attention_schedule(cu_seqlens, q.shape[0]), scale)
    grads = torch.autograd.grad(o, leaves, do, allow_unused=True)
    return tuple(x.new_zeros(x.shape) if g is None else g.contiguous() for g, x in zip(grads, leaves, strict=True))


@_attention_opaque_backward.register_fake
def _(do, q, k, v, cu_seqlens, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_attention(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _attention_opaque_grad(ctx, do):
    return *_attention_opaque_backward(do, *ctx.saved_tensors, ctx.scale), None, None


_attention_opaque.register_autograd(_attention_opaque_grad, setup_context=_save_attention)


def _is_plain(options):
    """No variant asked for: what SDPA does by itself."""
    tensors = ("cu_seqlens_k", "bias", "mask", "alibi_slopes", "window", "rotary")
    return not (options.get("dropout_p") or options.get("return_lse")) and all(options.get(t) is None for t in tensors)


def attention(q, k, v, cu_seqlens, max_seqlen=None, *, scale=None, schedule=None, **options):
    """Plain self-attention runs on SDPA; any variant (bias, mask, window, dropout, ...) as the specification does."""
    if not _is_plain(options):
        return reference.attention(q, k, v, cu_seqlens, max_seqlen, scale=scale, **options)
    if torch.compiler.is_compiling():
        return _attention_opaque(q, k, v, cu_seqlens, scale)
    runs = attention_schedule(cu_seqlens, q.shape[0]) if schedule is None else schedule
    return _attention_in_runs(q, k, v, runs, scale)


def attention_padded(q, k, v, seqlens=None, seqlens_k=None, *, scale=None, **options):
    """Without lengths or variants one SDPA call; otherwise as the specification does."""
    if _is_plain(options) and seqlens is None and seqlens_k is None and k.shape[1] > 0:
        return _sdpa(q, k, v, scale)
    return reference.attention_padded(q, k, v, seqlens, seqlens_k, scale=scale, **options)


# ---- pooling and loss ------------------------------------------------------------------------------------


def pool(x, cu_seqlens, mode="mean", normalize=False):
    """One vector a sequence without a loop over sequences."""
    lengths = cu_seqlens.diff()
    batch = lengths.shape[0]
    if mode == "cls":
        first = (
            F.embedding(cu_seqlens[:-1].clamp(max=max(x.shape[0] - 1, 0)), x) if x.shape[0] else x.new_zeros(batch, 1)
        )
        y = torch.where((lengths > 0)[:, None], first, 0.0).expand(batch, x.shape[1])
    else:
        sequences = torch.repeat_interleave(torch.arange(batch, device=x.device), lengths, output_size=x.shape[0])
        if mode == "mean":
            sums = x.new_zeros(batch, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
            sums = sums.index_add(0, sequences, x.to(sums.dtype))
            y = (sums / lengths.clamp(min=1)[:, None]).to(x.dtype)
        else:
            index = sequences[:, None].expand_as(x)
            y = x.new_zeros(batch, x.shape[1]).scatter_reduce(0, index, x, "amax", include_self=False)
    return F.normalize(y, dim=-1) if normalize else y


# rows of logits held at a time; 1,024 rows of BERT's vocabulary are 125 MB in float32
LOGIT_ROWS = 1024


def linear_cross_entropy(hidden, weight, bias, labels, *, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    """The loss in chunks of rows, each chunk's logits recomputed in its backward instead of kept."""

    def of_chunk(rows, targets):
        logits = F.linear(rows, weight, bias).float()
        return F.cross_entropy(
            logits, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
        )

    chunks = zip(hidden.split(LOGIT_ROWS), labels.split(LOGIT_ROWS), strict=True)
    losses = torch.cat([torch.utils.checkpoint.checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks])
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / (labels != ignore_index).sum()
