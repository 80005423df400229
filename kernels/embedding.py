"""Three table look-ups, their sum, LayerNorm and dropout: the bottom of BERT in one kernel, with its backward.

Forward over T packed tokens, tables [V, N], [P, N], [types, N], statistics in fp32, the mean as two numbers (see
`layer_norm`):

    z = word[input_ids] + token_type[token_type_ids] + position[positions]     [T, N]
    y = dropout((z - mean) * rstd * weight + bias)                             [T, N];  mean, rstd [T]

Backward, with d = dy where kept, / (1 - p), x_hat = (z - mean) * rstd and g = d * weight:

    dz = rstd * (g - avg(g) - x_hat * avg(g * x_hat))                          [T, N]
    dword[v] = sum of dz[t] over input_ids[t] == v, likewise the other tables
    dweight = sum over t of d * x_hat;  dbias of d                             [N]

The ids, mean and rstd are saved. The backward pass gathers z and computes the mask again, because reading a saved z
would move as many bytes, and writing it even more.

A token type table of one or two rows needs no scatter: the LayerNorm backward kernel sums its gradient, as it does for
weight and bias. The other tables' gradients are computed by `_scatter`, which sorts and has no atomics.

Bytes moved for T tokens, with elements of b bytes: forward reads rows of `word` (the small tables stay in cache) and
writes y: 2 T N b. Backward reads dy and word rows and writes dz: 3 T N b, then reads dz once for each sorted table:
2 T N b, and writes the tables' gradients: (V + P) N b of zeros and at most T N b of sums each. dz, written and read
twice, 3 T N b, could be saved by adding to the tables directly, at the price of atomics and of bits that differ from
run to run. The zeros are needed because the gradients of the tables are dense. At 4.3 TB/s BERT-base (V 30,522, N 768,
bf16) with 16,384 tokens takes at least 12 us forward and 46 us backward.

Ids must be in range; the caller checks them where that needs no wait for the device. An id out of range gives a row of
zeros and no gradient, so it cannot touch memory outside the tables.
"""

import functools
from dataclasses import replace

import torch
import triton
import triton.language as tl

from . import _device
from ._compile import TRITON_TYPES, CompileCall, compile_call, empty
from ._launch import Plan, cdiv
from ._library import apply, once, register
from ._rows import (
    EXACT,
    MAX_FUSED_WIDTH,
    MAX_WIDTH,
    NormConfig,
    _dropout_mask,
    _norm_backward,
    _norm_forward,
    _row_block,
    _store_part,
    _store_statistics,
    dropout_constants,
    dropout_tensors,
    norm_bwd_config,
    norm_fwd_config,
    packed,
    sum_parts,
)
from ._scatter import scatter

# The LayerNorm backward kernel sums the gradient of a token type table with at most this many rows (and MAX_FUSED_WIDTH
# columns).
MAX_FUSED_TYPES = 2

# ---- configs ---------------------------------------------------------------------------------------------


@functools.cache
def embedding_bwd_config(n_cols: int) -> NormConfig:
    """`norm_bwd_config` with half the rows, because two more fp32 sums and the gathers' addresses need registers."""
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


@triton.jit(do_not_specialize=[*_VARYING, "want_stats"])
def _embedding_fwd_kernel(
    input_ids_ptr, token_type_ids_ptr, positions_ptr,                 # in:  [T]
    word_ptr, token_type_ptr, position_ptr, weight_ptr, bias_ptr,     # in:  [V, N], [types, N], [P, N], [N], [N]
    seed_ptr, row_ids_ptr,                                            # in:  [1], [T]
    y_ptr, mean_ptr, rstd_ptr,                                        # out: [T, N], [T, 2], [T]
    n_tokens, n_words, n_types, n_positions,
    eps, stream_id, threshold, keep_scale,
    want_stats,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_N)
    tokens, mask_m, mask = _row_block(tl.program_id(0).to(tl.int64) * BLOCK_M, n_tokens, cols, N, BLOCK_M)

    z = _load_embeddings(
        input_ids_ptr, token_type_ids_ptr, positions_ptr, word_ptr, token_type_ptr, position_ptr,
        n_words, n_types, n_positions, tokens, mask_m, cols, N,
    )  # fmt: skip
    y, mean, rest, rstd = _norm_forward(z, mask, weight_ptr, bias_ptr, cols, eps, N, RMS=False)
    if seed_ptr is not None:
        keep = _dropout_mask(seed_ptr, row_ids_ptr, stream_id, threshold, tokens, mask_m, cols)
        y = tl.where(keep, y * keep_scale, 0.0)

    tl.store(y_ptr + tokens[:, None] * N + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    _store_statistics(mean_ptr, rstd_ptr, mean, rest, rstd, tokens, mask_m, want_stats)


_WANTS = ["want_dz", "want_dweight", "want_dbias", "want_dtype"]


@triton.jit(do_not_specialize=[*_VARYING, "tokens_per_step", *_WANTS])
def _embedding_bwd_kernel(
    dy_ptr,                                                           # in:  [T, N]
    input_ids_ptr, token_type_ids_ptr, positions_ptr,                 # in:  [T]
    word_ptr, token_type_ptr, position_ptr, weight_ptr,               # in:  [V, N], [types, N], [P, N], [N]
    mean_ptr, rstd_ptr, seed_ptr, row_ids_ptr,                        # in:  [T, 2], [T], [1], [T]
    dz_ptr,                                                           # out: [T, N]
    dweight_part_ptr, dbias_part_ptr, dtype0_part_ptr, dtype1_part_ptr,   # out: [P, N] fp32; None if no such sum
    n_tokens, n_words, n_types, n_positions, tokens_per_step,
    stream_id, threshold, keep_scale,
    want_dz, want_dweight, want_dbias, want_dtype,
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

        d = tl.load(dy_ptr + tokens[:, None] * N + cols[None, :], mask=mask, other=0.0).to(tl.float32)
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

        if want_dz != 0:
            tl.store(dz_ptr + tokens[:, None] * N + cols[None, :], dz.to(dz_ptr.dtype.element_ty), mask=mask)
        if dtype0_part_ptr is not None:
            types = tl.load(token_type_ids_ptr + tokens, mask=mask_m, other=-1)
            dtype0 += tl.sum(tl.where((types == 0)[:, None], dz, 0.0), axis=0)
            if dtype1_part_ptr is not None:
                dtype1 += tl.sum(tl.where((types == 1)[:, None], dz, 0.0), axis=0)

    _store_part(dweight_part_ptr, dweight, pid, cols, want_dweight, N)
    _store_part(dbias_part_ptr, dbias, pid, cols, want_dbias, N)
    _store_part(dtype0_part_ptr, dtype0, pid, cols, want_dtype, N)
    _store_part(dtype1_part_ptr, dtype1, pid, cols, want_dtype, N)


# ---- launchers -------------------------------------------------------------------------------------------

_TABLES = "input_ids_ptr token_type_ids_ptr positions_ptr word_ptr token_type_ptr position_ptr"
_SIZES = "n_tokens n_words n_types n_positions"


@functools.lru_cache(256)
def _fwd_plan(config: NormConfig, n_cols: int, eps: float, dropout_p: float) -> Plan:
    return Plan(
        _embedding_fwd_kernel,
        f"{_TABLES} weight_ptr bias_ptr seed_ptr row_ids_ptr y_ptr mean_ptr rstd_ptr",
        f"{_SIZES} stream_id want_stats",
        {"eps": eps, **dropout_constants(dropout_p), "N": n_cols}
        | {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n},
        num_warps=config.num_warps, **EXACT,
    )  # fmt: skip


@functools.lru_cache(256)
def _bwd_plan(config: NormConfig, n_cols: int, dropout_p: float) -> Plan:
    return Plan(
        _embedding_bwd_kernel,
        f"dy_ptr {_TABLES} weight_ptr mean_ptr rstd_ptr seed_ptr row_ids_ptr dz_ptr "
        "dweight_part_ptr dbias_part_ptr dtype0_part_ptr dtype1_part_ptr",
        f"{_SIZES} tokens_per_step stream_id {' '.join(_WANTS)}",
        {**dropout_constants(dropout_p), "N": n_cols, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n},
        num_warps=config.num_warps, **EXACT,
    )  # fmt: skip


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
    tables, sizes = _tables_and_sizes(input_ids, token_type_ids, positions, word, position, token_type)
    _fwd_plan(config, n_cols, eps, dropout_p)(
        (cdiv(n_tokens, config.block_m),),
        (*tables, packed(weight), packed(bias), *dropout_tensors(dropout_p, seed, row_ids), y, mean, rstd),
        (*sizes, stream, int(want_stats)),
    )
    return outs


def _tables_and_sizes(input_ids, token_type_ids, positions, word, position, token_type) -> tuple[tuple, tuple]:
    """The arguments that the plans name _TABLES, and those that they name _SIZES."""
    n_types = 0 if token_type is None else token_type.shape[0]
    return (
        tuple(packed(t) for t in (input_ids, token_type_ids, positions, word, token_type, position)),
        (input_ids.shape[0], word.shape[0], n_types, position.shape[0]),
    )


def _fake_fwd(
    input_ids, token_type_ids, positions, word, position, token_type, weight, bias, eps,
    seed, row_ids, dropout_p, stream, want_stats,
):  # fmt: skip
    """(y, mean, rstd); statistics that are not wanted have no elements."""
    n_tokens = input_ids.shape[0]
    stats = n_tokens if want_stats else 0
    return (
        word.new_empty((n_tokens, word.shape[1])),
        word.new_empty((stats, 2), dtype=torch.float32),
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
    dword, dposition, dtoken_type, dweight, dbias = outs
    want_dword, want_dposition, want_dtype, want_dweight, want_dbias = wanted
    n_types = 0 if token_type is None else len(token_type)
    fused = n_types <= MAX_FUSED_TYPES and n_cols <= MAX_FUSED_WIDTH
    want_dz = want_dword or want_dposition or (want_dtype and not fused)
    dz = dy.new_empty((n_tokens, n_cols) if want_dz else (0,), dtype=word.dtype)

    config = embedding_bwd_config(n_cols)
    programs = min(config.programs_per_sm * _device.multiprocessors(dy.device.index), cdiv(n_tokens, config.block_m))
    # every possible sum has a place, wanted or not
    types = [dtoken_type[n] if want_dtype else dtoken_type for n in range(n_types)] if fused else []
    sums = [dweight if weight is not None else None, dbias if bias is not None else None, *(*types, None, None)[:2]]
    parts = dy.new_empty((sum(s is not None for s in sums), programs, n_cols), dtype=torch.float32)
    slots = iter(parts)
    dweight_part, dbias_part, dtype0_part, dtype1_part = (None if s is None else next(slots) for s in sums)
    tables, sizes = _tables_and_sizes(input_ids, token_type_ids, positions, word, position, token_type)
    _bwd_plan(config, n_cols, dropout_p)(
        (programs,),
        (
            packed(dy), *tables, packed(weight), mean, rstd, *dropout_tensors(dropout_p, seed, row_ids),
            dz, dweight_part, dbias_part, dtype0_part, dtype1_part,
        ),
        (
            *sizes, programs * config.block_m, stream,
            int(want_dz), int(want_dweight), int(want_dbias), int(want_dtype),
        ),
    )  # fmt: skip
    there = [s for s in sums if s is not None]
    sum_parts(parts, [s if s.numel() else None for s in there], there)

    if want_dword:
        scatter(dz, input_ids, dword, -1 if padding_idx is None else padding_idx % word.shape[0])
    if want_dposition:
        scatter(dz, positions, dposition, -1)
    if want_dtype and not fused:
        scatter(dz, token_type_ids, dtoken_type, -1)
    return outs


def _fake_bwd(
    dy, input_ids, token_type_ids, positions, word, position, token_type, weight, bias, mean, rstd,
    seed, row_ids, dropout_p, stream, padding_idx, wanted,
):  # fmt: skip
    """(dword, dposition, dtoken_type, dweight, dbias); what is not wanted has no elements."""
    return tuple(
        dy.new_empty(0) if t is None else t.new_empty(t.shape if w else (0,))
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
    @once
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

    N up to 8,192, in the dtype of `word`; see `functional`. An id out of range gives a row of zeros and no gradient.
    """
    n_cols = word.shape[1]
    if not 1 <= n_cols <= MAX_WIDTH:
        raise ValueError(f"the Triton embedding takes tables of 1 to {MAX_WIDTH} columns, got {n_cols}")
    if dropout_p == 0.0:
        seed = row_ids = None
    tables = word, position, token_type, weight, bias
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tables):
        return apply(
            _EmbeddingLayerNorm,
            *tables,
            input_ids,
            token_type_ids,
            positions,
            eps,
            seed,
            row_ids,
            dropout_p,
            stream,
            padding_idx,
        )
    return _embedding_fwd(input_ids, token_type_ids, positions, *tables, eps, seed, row_ids, dropout_p, stream, False)[
        0
    ]


# ---- for the offline compiler ----------------------------------------------------------------------------

# one width for each choice of tile, and the widths of BERT-base, large and MiniLM
_WIDTHS = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
_TOKENS = 128  # two chunks of the scatter


def compile_calls() -> list[CompileCall]:
    """Every config with all tables, dropout and gradients, which need the most registers."""
    ids = empty(_TOKENS, dtype=torch.int64)
    dropout = {"dropout_p": 0.1, "seed": empty(1, dtype=torch.int64), "row_ids": ids}

    def call(name, n_cols=768, dtype=torch.bfloat16, absent=(), types=2, **more):
        table, vector = functools.partial(empty, dtype=dtype), empty(n_cols, dtype=dtype)
        given = dict.fromkeys(("input_ids", "token_type_ids", "positions"), ids)
        given |= {"word": table(50, n_cols), "position": table(60, n_cols), "token_type": table(types, n_cols)}
        given |= {"weight": vector, "bias": vector} | dropout | dict.fromkeys(absent)
        if "seed" in absent:
            given["dropout_p"] = 0.0
        wide = (_embedding_fwd_kernel, _embedding_bwd_kernel) if n_cols >= 128 else ()
        form = f"{name},N={n_cols}"
        inference = n_cols in (384, 768)
        return compile_call(embedding_layer_norm, form, wide_loads=wide, inference=inference, **given, **more)

    return [
        *(
            call(TRITON_TYPES[dtype], n_cols, dtype, fast=n_cols == 768 and dtype == torch.bfloat16)
            for dtype in (torch.bfloat16, torch.float32)
            for n_cols in _WIDTHS
        ),
        call("fp16", dtype=torch.float16),
        call("bf16,bare", absent=("token_type_ids", "token_type", "weight", "bias", "seed", "row_ids")),
        call("bf16,without_row_ids", absent=("row_ids",)),
        call("bf16,one_type", types=1),
        call("bf16,many_types", types=5),
        call("bf16,only_weight", grads=("weight",)),
        call("bf16,only_bias", grads=("bias",)),
    ]
