"""The specification: every operator in plain torch, with torch's own autograd.

Fused code never imports this file; tests always do. Everything runs in the dtype of its arguments (float64 for true
values, the working dtype for error budgets) and on any device. Names and signatures are those of the fused operators,
without arguments that only affect launches.
"""

import itertools

import torch
import torch.nn.functional as F

from ._random import HEAD_STREAMS, keep_mask, row_keys

ACTIVATION_FUNCTIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def activate(h, activation):
    """The activation of a feed-forward layer; `geglu` halves the width: gelu(first half) * second half."""
    if activation == "geglu":
        gate, value = h.chunk(2, dim=-1)
        return F.gelu(gate) * value
    return ACTIVATION_FUNCTIONS[activation](h)


def dropout(x, p, seed, stream, row_ids):
    """x [M, N] with elements dropped by (seed, stream, row_ids (M of them), column), the rest scaled by 1 / (1 - p)."""
    if p == 0.0:
        return x
    if row_ids is None:
        row_ids = torch.arange(x.shape[0], dtype=torch.int64, device=x.device)
    keep = keep_mask(row_keys(seed, stream, row_ids.reshape(-1)), x.shape[-1], p)
    return torch.where(keep, x / (1.0 - p), 0.0)


# ---- attention -------------------------------------------------------------------------------------------


def _rotate(x, cos, sin):
    """Rotary embedding of x [S, H, D] by cos, sin [S, D / 2]: halves (x1, x2) -> (x1 c - x2 s, x2 c + x1 s)."""
    x1, x2 = x.chunk(2, dim=-1)
    c, s = cos[: x.shape[0], None].to(x.dtype), sin[: x.shape[0], None].to(x.dtype)
    return torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), dim=-1)


def _attend(q, k, v, sequence, bias, mask, alibi_slopes, window, rotary, dropout_p, seed, stream, scale):
    """One sequence: q [Sq, H, D], k, v [Sk, Hk, D] -> o [Sq, H, D], lse [H, Sq]."""
    if rotary is not None:
        q, k = _rotate(q, *rotary), _rotate(k, *rotary)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)

    s = torch.einsum("qhd,khd->hqk", q, k) * scale
    rows = torch.arange(q.shape[0], dtype=torch.int64, device=q.device)[:, None]
    cols = torch.arange(k.shape[0], dtype=torch.int64, device=q.device)[None, :]
    if bias is not None:
        s = s + bias[..., : q.shape[0], : k.shape[0]].to(s.dtype)
    if alibi_slopes is not None:
        s = s - alibi_slopes.to(s.dtype)[:, None, None] * (rows - cols).abs()
    allowed = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool, device=q.device)
    if window is not None:
        left, right = window
        allowed = allowed & (cols >= rows - left) & (cols <= rows + right)
    if mask is not None:
        allowed = allowed & mask[..., : q.shape[0], : k.shape[0]]
    s = s.masked_fill(~allowed, float("-inf"))

    lse = torch.logsumexp(s, dim=-1)
    # a row without any key has lse = -inf and must give zeros, not exp(-inf + inf)
    p = torch.exp(s - torch.where(lse.isinf(), 0.0, lse)[..., None])
    if dropout_p > 0.0:
        heads = torch.arange(q.shape[1], dtype=torch.int64, device=q.device)[:, None]
        keys = row_keys(seed, stream * HEAD_STREAMS + heads, (sequence << 32) | rows[:, 0])
        p = torch.where(keep_mask(keys, k.shape[0], dropout_p), p / (1.0 - dropout_p), 0.0)
    return torch.einsum("hqk,khd->qhd", p, v), lse


def attention(
    q,
    k,
    v,
    cu_seqlens,
    max_seqlen=None,
    *,
    cu_seqlens_k=None,
    max_seqlen_k=None,
    bias=None,
    mask=None,
    alibi_slopes=None,
    window=None,
    rotary=None,
    dropout_p=0.0,
    seed=None,
    stream=0,
    sequence_ids=None,
    scale=None,
    return_lse=False,
    schedule=None,
):
    """Bidirectional attention over packed sequences; see `functional.attention` for every argument.

    q [Tq, H, D], k, v [Tk, Hk, D] -> o [Tq, H, D] (and lse [H, Tq]).
        s = scale * q k^T + bias - slope * |i - j|, -inf where the mask or the window forbids
        p = dropout(softmax(s));  o = p v;  lse = logsumexp(s), natural log
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    starts_q = cu_seqlens.tolist()
    starts_k = starts_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    outputs, lses = [], []
    for b in range(len(starts_q) - 1):
        rows_q, rows_k = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        of_b = [t if t is None or t.shape[0] == 1 else t[b : b + 1] for t in (bias, mask)]
        o, lse = _attend(
            q[rows_q], k[rows_k], v[rows_k],
            b if sequence_ids is None else int(sequence_ids[b]),
            *(None if t is None else t[0] for t in of_b),
            alibi_slopes, window, rotary, dropout_p, seed, stream, scale,
        )  # fmt: skip
        outputs.append(o)
        lses.append(lse)
    o = torch.cat(outputs) if outputs else attention_of_nothing(q, k, v, bias)
    lse = torch.cat(lses, dim=1) if lses else q.new_zeros(q.shape[1], 0)
    return (o, lse.to(torch.promote_types(lse.dtype, torch.float32))) if return_lse else o


def attention_of_nothing(q, *others):
    """Attention's result without tokens: q [0, H, D]. `others`, tensors or None, get gradients of zero."""
    return q + sum(t[..., :0].sum() for t in others if t is not None)


def attention_padded(q, k, v, seqlens=None, seqlens_k=None, **options):
    """Attention over padded q [B, Sq, H, D], k, v [B, Sk, Hk, D]; the first `seqlens[b]` rows are real.

    Output rows past a sequence's length are zero. `return_lse` gives lse [B, H, Sq], -inf on padding.
    """
    batch, width_q, heads = q.shape[:3]
    width_k = k.shape[1]
    host = {"dtype": torch.int64, "device": "cpu"}
    if seqlens_k is None:
        seqlens_k = torch.full((batch,), width_k, **host) if seqlens is None or width_k != width_q else seqlens
    seqlens = torch.full((batch,), width_q, **host) if seqlens is None else seqlens.cpu()
    seqlens_k = seqlens_k.cpu()
    real_q = torch.arange(width_q, **host) < seqlens[:, None]  # [B, Sq]
    real_k = torch.arange(width_k, **host) < seqlens_k[:, None]
    zero = seqlens.new_zeros(1)
    return_lse = options.pop("return_lse", False)
    o, lse = attention(
        q[real_q], k[real_k], v[real_k],
        torch.cat((zero, seqlens.cumsum(0))),
        cu_seqlens_k=torch.cat((zero, seqlens_k.cumsum(0))),
        return_lse=True, **options,
    )  # fmt: skip
    padded = torch.zeros_like(q).masked_scatter(real_q.to(q.device)[..., None, None], o)
    if not return_lse:
        return padded
    lse_padded = lse.new_full((batch, width_q, heads), float("-inf"))
    lse_padded[real_q] = lse.t()
    return padded, lse_padded.transpose(1, 2)


def disentangled_attention(
    q, k, v, pk, pq, lut, cu_seqlens, max_seqlen=None, *,
    dropout_p=0.0, seed=None, stream=0, sequence_ids=None, scale=None, schedule=None,
):  # fmt: skip
    """Attention of packed sequences with terms for distances; see `functional.disentangled_attention`.

    q, k, v [T, H, D], pk, pq [R, H, D] or None, lut [2 S - 1] -> o [T, H, D].
        s = scale * (q k^T + q pk[lut]^T + k pq[lut]^T),  lut over i - j
        p = dropout(softmax(s));  o = p v
    """
    scale = disentangled_scale(q, pk, pq) if scale is None else scale
    starts, outputs = cu_seqlens.tolist(), []
    for b, (start, end) in enumerate(itertools.pairwise(starts)):
        q_, k_, v_ = (t[start:end].transpose(0, 1) for t in (q, k, v))  # [H, S, D]
        rows = torch.arange(end - start, dtype=torch.int64, device=q.device)
        slots = lut[(rows[:, None] - rows + lut.shape[0] // 2)].to(torch.int64)  # [S, S]
        s = q_ @ k_.mT
        if pk is not None:  # scores of a query with all rows of the table, gathered at its distances
            s = s + (q_ @ pk.permute(1, 2, 0)).gather(-1, slots.expand(s.shape))
        if pq is not None:
            s = s + (k_ @ pq.permute(1, 2, 0)).gather(-1, slots.mT.expand(s.shape)).mT
        p = (s * scale).softmax(-1)
        if dropout_p > 0.0:
            heads = torch.arange(q.shape[1], dtype=torch.int64, device=q.device)[:, None]
            name = b if sequence_ids is None else int(sequence_ids[b])
            keys = row_keys(seed, stream * HEAD_STREAMS + heads, (name << 32) | rows)
            p = torch.where(keep_mask(keys, end - start, dropout_p), p / (1.0 - dropout_p), 0.0)
        outputs.append((p @ v_).transpose(0, 1))
    return torch.cat(outputs) if outputs else attention_of_nothing(q, k, v, pk, pq)


def disentangled_scale(q, pk, pq):
    """1 / sqrt(D (1 + terms)), where terms is the number of tables, 0 to 2."""
    return (q.shape[-1] * (1 + (pk is not None) + (pq is not None))) ** -0.5


# ---- normalisation ---------------------------------------------------------------------------------------


def dropout_add(x, residual, x_bias=None, dropout_p=0.0, seed=None, stream=0, row_ids=None):
    """dropout(x + x_bias) + residual [..., N]; see `dropout`."""
    z = x if x_bias is None else x + x_bias
    z = dropout(z.reshape(-1, z.shape[-1]), dropout_p, seed, stream, row_ids).reshape(z.shape)
    return z if residual is None else z + residual


def add_layer_norm(
    x, residual, weight, bias, eps=1e-12, *, x_bias=None, dropout_p=0.0, seed=None, stream=0, row_ids=None
):
    """z = dropout(x + x_bias) + residual [..., N];  y = (z - mean) / sqrt(var + eps) * weight + bias [..., N]."""
    z = dropout_add(x, residual, x_bias, dropout_p, seed, stream, row_ids)
    return F.layer_norm(z, z.shape[-1:], weight, bias, eps)


def add_layer_norm_sum(
    x, residual, weight, bias, eps=1e-12, *, x_bias=None, dropout_p=0.0, seed=None, stream=0, row_ids=None
):
    """The pre-norm form: (y, z) of `add_layer_norm`, z being the next residual."""
    z = dropout_add(x, residual, x_bias, dropout_p, seed, stream, row_ids)
    return F.layer_norm(z, z.shape[-1:], weight, bias, eps), z


def add_rms_norm(x, residual, weight, eps=1e-6, *, x_bias=None, dropout_p=0.0, seed=None, stream=0, row_ids=None):
    """z as in `add_layer_norm`;  y = z / sqrt(mean(z^2) + eps) * weight [..., N]."""
    z = dropout_add(x, residual, x_bias, dropout_p, seed, stream, row_ids)
    return F.rms_norm(z, z.shape[-1:], weight, eps)


# ---- feed-forward ----------------------------------------------------------------------------------------


def linear_act(x, weight, bias=None, activation="gelu"):
    """act(x weight^T + bias): x [..., C], weight [F, C] (geglu: [2F, C]) -> [..., F]."""
    return activate(F.linear(x, weight, bias), activation)


def feed_forward(x, up_weight, up_bias, down_weight, down_bias=None, activation="gelu", recompute=False):
    """act(x up^T + up_bias) down^T + down_bias: x [..., C], up [F, C] (geglu: [2F, C]), down [C, F] -> [..., C]."""
    return F.linear(linear_act(x, up_weight, up_bias, activation), down_weight, down_bias)


# ---- embeddings, pooling, loss ---------------------------------------------------------------------------


def embedding_layer_norm(
    input_ids, token_type_ids, positions, word, position, token_type, weight, bias, eps=1e-12,
    *, padding_idx=None, dropout_p=0.0, seed=None, stream=0, row_ids=None,
):  # fmt: skip
    """dropout(LayerNorm(word[input_ids] + token_type[token_type_ids] + position[positions])): [T] -> [T, C].

    `padding_idx` is the row of `word` that gets no gradient, as in nn.Embedding.
    """
    z = F.embedding(input_ids, word, padding_idx)
    if token_type_ids is not None:
        z = z + F.embedding(token_type_ids, token_type)
    z = z + F.embedding(positions, position)
    y = F.layer_norm(z, z.shape[-1:], weight, bias, eps)
    return dropout(y, dropout_p, seed, stream, row_ids)


def pool(x, cu_seqlens, mode="mean", normalize=False):
    """One vector for each sequence: x [T, C] -> [B, C]. An empty sequence gives zeros.

    mode: "mean" or "max" of the tokens, or "cls", the first token. normalize: divides by max(L2 norm, 1e-12).
    """
    starts = cu_seqlens.tolist()
    rows = []
    for start, end in itertools.pairwise(starts):
        tokens = x[start:end]
        if start == end:
            rows.append(tokens.sum(0))  # zeros, with a gradient for x
        elif mode == "mean":
            rows.append(tokens.mean(0))
        elif mode == "cls":
            rows.append(tokens[0])
        else:
            rows.append(tokens.amax(0))
    y = torch.stack(rows) if rows else x[:0]
    return F.normalize(y, dim=-1) if normalize else y


def linear_cross_entropy(hidden, weight, bias, labels, *, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    """cross_entropy(hidden weight^T + bias, labels): hidden [N, C], weight [V, C], bias [V], labels [N] -> loss."""
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(
        logits, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
    )
