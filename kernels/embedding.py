"""Three table look-ups, their sum, LayerNorm and dropout: the bottom of BERT in one kernel, with its backward.

Forward over T packed tokens, tables [V, N], [P, N], [types, N], statistics in fp32:

    z = word[input_ids] + token_type[token_type_ids] + position[positions]     [T, N]
    y = dropout((z - mean) * rstd * weight + bias)                             [T, N];  mean, rstd [T]

Backward, with d = dy where kept, / (1 - p), x_hat = (z - mean) * rstd and g = d * weight:

    dz = rstd * (g - avg(g) - x_hat * avg(g * x_hat))                          [T, N]
    dword[v] = sum of dz[t] over input_ids[t] == v, likewise the other tables
    dweight = sum over t of d * x_hat;  dbias of d                             [N]

Saved: the ids, mean, rstd; z is gathered again and the mask made again, since a saved z would cost as many bytes to
read and more to write.

A token type table of one or two rows needs no scatter: its sums ride along in the LayerNorm backward, as those of
weight and bias do. The other tables go to `_scatter`, which sorts and has no atomics.

Bytes moved, b an element, T tokens: forward reads a row of `word` (the small tables stay in cache) and writes y:
2 T N b. Backward reads dy and word rows and writes dz: 3 T N b, then reads dz once for each sorted table: 2 T N b,
and writes the tables' gradients: (V + P) N b of zeros and at most T N b of sums each. Extra passes: dz, written and
read twice, 3 T N b, which adding to the tables on the spot would spare at the price of atomics and of bits that move
from run to run; and the zeros, since the gradients of the tables are dense. At 4.3 TB/s BERT-base (V 30,522, N 768,
bf16) over 16,384 tokens cannot take less than 12 us forward and 46 us backward.

Ids must be in range: the caller checks, where that costs no wait for the device. One that is not reads as a row of
zeros and gets no gradient, so a wrong id cannot touch memory outside the tables.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from . import _device
from ._compile import TRITON_TYPES, CompileCase
from ._library import register
from ._rows import (
    MAX_FUSED_WIDTH,
    MAX_WIDTH,
    NormConfig,
    _dropout_mask,
    _norm_backward,
    _norm_forward,
    _row_block,
    _store_part,
    _store_statistics,
    dropout_arguments,
    norm_bwd_config,
    norm_fwd_config,
    rows_of,
    sum_parts,
)
from ._scatter import scatter

# a token type table with at most this many rows (and MAX_FUSED_WIDTH columns) is summed inside the LayerNorm backward
MAX_FUSED_TYPES = 2

# ---- configs ---------------------------------------------------------------------------------------------


def embedding_bwd_config(n_cols: int) -> NormConfig:
    """`norm_bwd_config` with half the rows: two more fp32 sums and the gathers' addresses need the registers."""
    config = norm_bwd_config(n_cols)
    return replace(config, block_m=max(1, config.block_m // 2))


# ---- device code -----------------------------------------------------------------------------------------


@triton.jit
def _gather(ids_ptr, table_ptr, n_table, tokens, mask_m, cols, N: tl.constexpr):
    """Rows of table [n_table, N] by ids, in fp32 [BLOCK_M, BLOCK_N]; zeros for an id out of range."""
    ids = tl.load(ids_ptr + tokens, mask=mask_m, other=-1).to(tl.int64)
    mask = ((ids >= 0) & (ids < n_table))[:, None] & (cols < N)[None, :]
    return tl.load(table_ptr + ids[:, None] * N + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_embeddings(
    input_ids_ptr, token_type_ids_ptr, positions_ptr,   # in: [T]; the second None without token types
    word_ptr, token_type_ptr, position_ptr,             # in: [V, N], [types, N], [P, N]
    n_words, n_types, n_positions,
    tokens, mask_m, cols,                               # [BLOCK_M], [BLOCK_M], [BLOCK_N]
    N: tl.constexpr,
):  # fmt: skip
    """z [BLOCK_M, BLOCK_N] in fp32, zero in the columns past N."""
    z = _gather(input_ids_ptr, word_ptr, n_words, tokens, mask_m, cols, N)
    if token_type_ids_ptr is not None:
        z += _gather(token_type_ids_ptr, token_type_ptr, n_types, tokens, mask_m, cols, N)
    return z + _gather(positions_ptr, position_ptr, n_positions, tokens, mask_m, cols, N)


_VARYING = ["n_tokens", "n_words", "n_types", "n_positions", "stream_id", "threshold"]


@triton.jit(do_not_specialize=_VARYING)
def _embedding_fwd_kernel(
    input_ids_ptr, token_type_ids_ptr, positions_ptr,                 # in:  [T]
    word_ptr, token_type_ptr, position_ptr, weight_ptr, bias_ptr,     # in:  [V, N], [types, N], [P, N], [N], [N]
    seed_ptr, row_ids_ptr,                                            # in:  [1], [T]
    y_ptr, mean_ptr, rstd_ptr,                                        # out: [T, N], [T], [T]; the last two or None
    n_tokens, n_words, n_types, n_positions,
    eps, stream_id, threshold, keep_scale,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_N)
    tokens, mask_m, mask = _row_block(tl.program_id(0).to(tl.int64) * BLOCK_M, n_tokens, cols, N, BLOCK_M)

    z = _load_embeddings(
        input_ids_ptr, token_type_ids_ptr, positions_ptr, word_ptr, token_type_ptr, position_ptr,
        n_words, n_types, n_positions, tokens, mask_m, cols, N,
    )  # fmt: skip
    y, mean, rstd = _norm_forward(z, mask, weight_ptr, bias_ptr, cols, eps, N, RMS=False)
    if seed_ptr is not None:
        keep = _dropout_mask(seed_ptr, row_ids_ptr, stream_id, threshold, tokens, mask_m, cols)
        y = tl.where(keep, y * keep_scale, 0.0)

    tl.store(y_ptr + tokens[:, None] * N + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    _store_statistics(mean_ptr, rstd_ptr, mean, rstd, tokens, mask_m)


@triton.jit(do_not_specialize=[*_VARYING, "tokens_per_step"])
def _embedding_bwd_kernel(
    dy_ptr,                                                           # in:  [T, N]
    input_ids_ptr, token_type_ids_ptr, positions_ptr,                 # in:  [T]
    word_ptr, token_type_ptr, position_ptr, weight_ptr,               # in:  [V, N], [types, N], [P, N], [N]
    mean_ptr, rstd_ptr, seed_ptr, row_ids_ptr,                        # in:  [T], [T], [1], [T]
    dz_ptr,                                                           # out: [T, N] or None
    dweight_part_ptr, dbias_part_ptr, dtype0_part_ptr, dtype1_part_ptr,   # out: [P, N] fp32, or None
    n_tokens, n_words, n_types, n_positions, tokens_per_step, stride_dym,
    stream_id, threshold, keep_scale,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)

    dweight = tl.zeros((BLOCK_N,), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)
    dtype0 = tl.zeros((BLOCK_N,), tl.float32)
    dtype1 = tl.zeros((BLOCK_N,), tl.float32)

    for token in range(pid * BLOCK_M, n_tokens, tokens_per_step):
        tokens, mask_m, mask = _row_block(token, n_tokens, cols, N, BLOCK_M)

        d = tl.load(dy_ptr + tokens[:, None] * stride_dym + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if seed_ptr is not None:
            keep = _dropout_mask(seed_ptr, row_ids_ptr, stream_id, threshold, tokens, mask_m, cols)
            d = tl.where(keep, d * keep_scale, 0.0)
        z = _load_embeddings(
            input_ids_ptr, token_type_ids_ptr, positions_ptr, word_ptr, token_type_ptr, position_ptr,
            n_words, n_types, n_positions, tokens, mask_m, cols, N,
        )  # fmt: skip
        dz, dweight, dbias = _norm_backward(
            d, z, mean_ptr, rstd_ptr, weight_ptr, dweight, dbias, tokens, mask_m, cols,
            N, False, dweight_part_ptr is not None, dbias_part_ptr is not None,
        )  # fmt: skip

        if dz_ptr is not None:
            tl.store(dz_ptr + tokens[:, None] * N + cols[None, :], dz.to(dz_ptr.dtype.element_ty), mask=mask)
        if dtype0_part_ptr is not None:
            types = tl.load(token_type_ids_ptr + tokens, mask=mask_m, other=-1)
            dtype0 += tl.sum(tl.where((types == 0)[:, None], dz, 0.0), axis=0)
            if dtype1_part_ptr is not None:
                dtype1 += tl.sum(tl.where((types == 1)[:, None], dz, 0.0), axis=0)

    _store_part(dweight_part_ptr, dweight, pid, cols, N)
    _store_part(dbias_part_ptr, dbias, pid, cols, N)
    _store_part(dtype0_part_ptr, dtype0, pid, cols, N)
    _store_part(dtype1_part_ptr, dtype1, pid, cols, N)


# ---- launchers -------------------------------------------------------------------------------------------


def _launch_fwd(
    input_ids, token_type_ids, positions, word, position, token_type, weight, bias, eps,
    seed, row_ids, dropout_p, stream, want_stats,
):  # fmt: skip
    y, mean, rstd = outs = _fake_fwd(
        input_ids, token_type_ids, positions, word, position, token_type, weight, bias, eps,
        seed, row_ids, dropout_p, stream, want_stats,
    )  # fmt: skip
    if y.numel() == 0:
        return outs
    n_tokens, n_cols = y.shape
    config = norm_fwd_config(n_cols)
    _embedding_fwd_kernel[(triton.cdiv(n_tokens, config.block_m),)](
        **_table_arguments(input_ids, token_type_ids, positions, word, position, token_type),
        weight_ptr=weight, bias_ptr=bias,
        y_ptr=y, mean_ptr=mean if want_stats else None, rstd_ptr=rstd if want_stats else None,
        eps=eps, **dropout_arguments(dropout_p, seed, row_ids, stream),
        N=n_cols, BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps,
    )  # fmt: skip
    return outs


def _table_arguments(input_ids, token_type_ids, positions, word, position, token_type) -> dict:
    return {
        "input_ids_ptr": input_ids.contiguous(),
        "token_type_ids_ptr": None if token_type_ids is None else token_type_ids.contiguous(),
        "positions_ptr": positions.contiguous(),
        "word_ptr": word.contiguous(),
        "token_type_ptr": None if token_type is None else token_type.contiguous(),
        "position_ptr": position.contiguous(),
        "n_tokens": input_ids.shape[0],
        "n_words": word.shape[0],
        "n_types": 0 if token_type is None else token_type.shape[0],
        "n_positions": position.shape[0],
    }


def _fake_fwd(
    input_ids, token_type_ids, positions, word, position, token_type, weight, bias, eps,
    seed, row_ids, dropout_p, stream, want_stats,
):  # fmt: skip
    """(y, mean, rstd); statistics that are not wanted have no elements."""
    n_tokens = input_ids.shape[0]
    stats = n_tokens if want_stats else 0
    return (
        word.new_empty((n_tokens, word.shape[1])),
        word.new_empty(stats, dtype=torch.float32),
        word.new_empty(stats, dtype=torch.float32),
    )


def _launch_bwd(
    dy, input_ids, token_type_ids, positions, word, position, token_type, weight, bias, mean, rstd,
    seed, row_ids, dropout_p, stream, padding_idx, wanted,
):  # fmt: skip
    outs = _fake_bwd(
        dy, input_ids, token_type_ids, positions, word, position, token_type, weight, bias, mean, rstd,
        seed, row_ids, dropout_p, stream, padding_idx, wanted,
    )  # fmt: skip
    n_tokens, n_cols = dy.shape
    if n_tokens == 0:
        for out in outs:
            out.zero_()
        return outs
    dword, dposition, dtoken_type, dweight, dbias = (out if w else None for out, w in zip(outs, wanted, strict=True))
    fused = dtoken_type is not None and len(dtoken_type) <= MAX_FUSED_TYPES and n_cols <= MAX_FUSED_WIDTH
    types = list(dtoken_type) if fused else []
    needs_dz = any(d is not None for d in (dword, dposition)) or (dtoken_type is not None and not fused)
    dz = dy.new_empty((n_tokens, n_cols), dtype=word.dtype) if needs_dz else None

    dy = rows_of(dy, n_cols)
    config = embedding_bwd_config(n_cols)
    programs = min(
        config.programs_per_sm * _device.multiprocessors(dy.device.index), triton.cdiv(n_tokens, config.block_m)
    )
    sums = [dweight, dbias, *(*types, None, None)[:2]]
    parts = dy.new_empty((sum(s is not None for s in sums), programs, n_cols), dtype=torch.float32)
    slots = iter(parts)
    dweight_part, dbias_part, dtype0_part, dtype1_part = (None if s is None else next(slots) for s in sums)
    _embedding_bwd_kernel[(programs,)](
        dy_ptr=dy, **_table_arguments(input_ids, token_type_ids, positions, word, position, token_type),
        weight_ptr=weight, mean_ptr=mean, rstd_ptr=rstd, dz_ptr=dz,
        dweight_part_ptr=dweight_part, dbias_part_ptr=dbias_part,
        dtype0_part_ptr=dtype0_part, dtype1_part_ptr=dtype1_part,
        tokens_per_step=programs * config.block_m, stride_dym=dy.stride(0),
        **dropout_arguments(dropout_p, seed, row_ids, stream),
        N=n_cols, BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps,
    )  # fmt: skip
    sum_parts(parts, [s for s in sums if s is not None])

    if dword is not None:
        scatter(dz, input_ids, dword, -1 if padding_idx is None else padding_idx % word.shape[0])
    if dposition is not None:
        scatter(dz, positions, dposition, -1)
    if dtoken_type is not None and not fused:
        scatter(dz, token_type_ids, dtoken_type, -1)
    return outs


def _fake_bwd(
    dy, input_ids, token_type_ids, positions, word, position, token_type, weight, bias, mean, rstd,
    seed, row_ids, dropout_p, stream, padding_idx, wanted,
):  # fmt: skip
    """(dword, dposition, dtoken_type, dweight, dbias); what is not wanted has no elements."""
    return tuple(
        dy.new_empty(t.shape, dtype=t.dtype) if w else dy.new_empty(0)
        for t, w in zip((word, position, token_type, weight, bias), wanted, strict=True)
    )


_embedding_fwd = register(
    "embedding_layer_norm_fwd(Tensor input_ids, Tensor? token_type_ids, Tensor positions, Tensor word, "
    "Tensor position, Tensor? token_type, Tensor? weight, Tensor? bias, float eps, Tensor? seed, Tensor? row_ids, "
    "float dropout_p, int stream, bool want_stats) -> (Tensor, Tensor, Tensor)",
    _launch_fwd,
    _fake_fwd,
)
_embedding_bwd = register(
    "embedding_layer_norm_bwd(Tensor dy, Tensor input_ids, Tensor? token_type_ids, Tensor positions, Tensor word, "
    "Tensor position, Tensor? token_type, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, Tensor? seed, "
    "Tensor? row_ids, float dropout_p, int stream, int? padding_idx, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _launch_bwd,
    _fake_bwd,
)


# ---- autograd --------------------------------------------------------------------------------------------


class _EmbeddingLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, word, position, token_type, weight, bias, input_ids, token_type_ids, positions, eps,
        seed, row_ids, dropout_p, stream, padding_idx,
    ):  # fmt: skip
        y, mean, rstd = _embedding_fwd(
            input_ids, token_type_ids, positions, word, position, token_type, weight, bias, eps,
            seed, row_ids, dropout_p, stream, True,
        )  # fmt: skip
        ctx.save_for_backward(
            input_ids, token_type_ids, positions, word, position, token_type, weight, bias, mean, rstd, seed, row_ids
        )
        ctx.options = dropout_p, stream, padding_idx
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        wanted = list(ctx.needs_input_grad[:5])
        grads = _embedding_bwd(dy, *ctx.saved_tensors, *ctx.options, wanted)
        return *(grad if w else None for grad, w in zip(grads, wanted, strict=True)), *(None,) * 9


# ---- public ----------------------------------------------------------------------------------------------


def embedding_layer_norm(
    input_ids, token_type_ids, positions, word, position, token_type, weight, bias, eps=1e-12,
    *, padding_idx=None, dropout_p=0.0, seed=None, stream=0, row_ids=None,
):  # fmt: skip
    """dropout(LayerNorm(word[input_ids] + token_type[token_type_ids] + position[positions])): [T] -> [T, N].

    N up to 8,192, in the dtype of `word`; see `functional`. Ids out of range read as zeros and get no gradient.
    """
    n_cols = word.shape[1]
    if not 1 <= n_cols <= MAX_WIDTH:
        raise ValueError(f"the Triton embedding takes tables of 1 to {MAX_WIDTH} columns, got {n_cols}")
    if dropout_p == 0.0:
        seed = row_ids = None
    tables = word, position, token_type, weight, bias
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tables):
        return _EmbeddingLayerNorm.apply(
            *tables, input_ids, token_type_ids, positions, eps, seed, row_ids, dropout_p, stream, padding_idx
        )
    return _embedding_fwd(input_ids, token_type_ids, positions, *tables, eps, seed, row_ids, dropout_p, stream, False)[
        0
    ]


# ---- for the offline compiler ----------------------------------------------------------------------------

# one width for every step of the ladders, and those of BERT-base, large and MiniLM
_WIDTHS = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 2048, 4096, 8192)


def compile_cases(arch: str) -> list[CompileCase]:
    """Every config of the ladders, with all tables, dropout and gradients: the most registers a launch can need."""
    cases = []
    for dtype in (torch.bfloat16, torch.float32):
        d = f"*{TRITON_TYPES[dtype]}"
        ids = dict.fromkeys(("input_ids_ptr", "token_type_ids_ptr", "positions_ptr"), "*i64")
        tables = dict.fromkeys(("word_ptr", "token_type_ptr", "position_ptr", "weight_ptr"), d)
        stats = {"mean_ptr": "*fp32", "rstd_ptr": "*fp32"}
        sizes = dict.fromkeys(("n_tokens", "n_words", "n_types", "n_positions"), "i32")
        dropout = {
            "seed_ptr": "*i64", "row_ids_ptr": "*i64", "stream_id": "i32", "threshold": "i64", "keep_scale": "fp32",
        }  # fmt: skip
        sums = dict.fromkeys(("dweight_part_ptr", "dbias_part_ptr"), "*fp32")
        type_sums = dict.fromkeys(("dtype0_part_ptr", "dtype1_part_ptr"), "*fp32")
        for n_cols in _WIDTHS:
            fused, unfused = (type_sums, {}) if n_cols <= MAX_FUSED_WIDTH else ({}, dict.fromkeys(type_sums))
            kernels = [
                (
                    "embedding_layer_norm_fwd", _embedding_fwd_kernel, norm_fwd_config(n_cols), {},
                    ids | tables | {"bias_ptr": d, "y_ptr": d, "eps": "fp32"} | stats | sizes | dropout,
                ),
                (
                    "embedding_layer_norm_bwd", _embedding_bwd_kernel, embedding_bwd_config(n_cols), unfused,
                    ids | tables | {"dy_ptr": d, "dz_ptr": d, "tokens_per_step": "i32", "stride_dym": "i32"}
                    | stats | sums | fused | sizes | dropout,
                ),
            ]  # fmt: skip
            for name, kernel, config, constexprs, signature in kernels:
                cases.append(
                    CompileCase(
                        name=f"{name}[{d[1:]},N={n_cols}]",
                        kernel=kernel,
                        signature=signature,
                        constexprs=constexprs | {"N": n_cols, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n},
                        num_warps=config.num_warps,
                        num_stages=3,
                        wide_loads=n_cols >= 128,
                        aligned=tuple(a for a in signature if a.endswith("_ptr") or a.startswith("stride")),
                        fast=n_cols in (384, 768) and dtype == torch.bfloat16,
                    )
                )
    return cases
