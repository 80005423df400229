"""Launches attention's kernels: which kernel runs over which part of the list of tiles, with which arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ._arch import hardware
from ._attention_arguments import Options, Saved, Sequences, Tiles, Traits, row_strides, unit_stride
from ._attention_bwd import (
    _attention_bwd_bias_kernel,
    _attention_bwd_dkv_kernel,
    _attention_bwd_dq_kernel,
    _attention_bwd_short_kernel,
)
from ._attention_config import SHORT, TILE, AttentionConfig, attention_config
from ._attention_fwd import _attention_fwd_kernel
from ._attention_short import (
    _attention_bwd_heads_kernel,
    _attention_bwd_tile_kernel,
    _attention_fwd_heads_kernel,
    _attention_fwd_tile_kernel,
)
from ._launch import Plan, cdiv
from ._random import keep_threshold

LOG2_E = 1.4426950408889634
_STRIDES = tuple(f"stride_{name}{axis}" for name in "qkv" for axis in "bth")


def _plan(
    kernel, tensors: str, numbers: str, config: AttentionConfig, traits: Traits, strides: tuple[int, ...], **more
) -> Plan:
    """A plan of this kernel. Of all constants it gets those that the kernel has as arguments."""
    constants = dict(zip(_STRIDES, strides, strict=True))
    for name, steps in (("bias", traits.bias), ("mask", traits.mask)):
        constants |= dict(zip((f"stride_{name}_{axis}" for axis in "bhqk"), steps or (0,) * 4, strict=True))
    stride_cos, stride_sin = traits.rotary or (0, 0)
    constants |= {
        "stride_cos": stride_cos, "stride_sin": stride_sin, "n_heads": traits.heads,
        "scale": traits.scale, "scale_log2": traits.scale * LOG2_E,
        "keep_scale": 1.0 / (1.0 - traits.dropout_p), "threshold": keep_threshold(traits.dropout_p),
        "PADDED": traits.padded, "GROUP": traits.heads // traits.kv_heads,
        "HAS_BIAS": traits.bias is not None, "HAS_MASK": traits.mask is not None, "HAS_ALIBI": traits.alibi,
        "HAS_WINDOW": traits.window, "HAS_ROTARY": traits.rotary is not None,
        "HAS_DROPOUT": traits.dropout_p > 0.0, "HAS_IDS": traits.ids, "SHORT": SHORT,
        "HEAD_DIM": traits.head_dim, "BLOCK_D": max(16, triton.next_power_of_2(traits.head_dim)),
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "PRECISION": "ieee" if traits.dtype == torch.float32 else "tf32",  # no effect on 16-bit types
        "FENCED": config.num_stages > 1 and hardware(traits.arch).matrix == "tcgen05",
        **more,
    }  # fmt: skip
    taken = set(kernel.arg_names)
    constants = {name: value for name, value in constants.items() if name in taken}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, **config.options}
    return Plan(kernel, tensors, numbers, constants, **options)


# ---- forward


class Forward(NamedTuple):
    """Plans of the kernel with a loop, of the one for a tile, of the one for short sequences (None: see `_parts`)."""

    loop: Plan
    programs: int  # programs of the kernel with a loop for each entry of the schedule
    tile: Plan | None
    short: Plan | None
    plain: bool


@functools.lru_cache(1024)
def forward_plans(config_of: Callable, traits: Traits, strides: tuple[int, ...]) -> Forward:
    """config_of: `attention_config`."""
    plain = traits.is_plain()
    config, of_short, of_tile = (
        config_of(traits.head_dim, traits.dtype, traits.arch, direction, traits.of_config())
        for direction in ("fwd", "fwd_heads" if plain else "fwd_short", "fwd_tile")
    )
    of_tile = of_tile if plain else None
    full, plain_tensors = (
        f"{Sequences.NAMES} {Tiles.NAMES} {options} o_ptr lse_ptr"
        for options in (Options.NAMES, Options.NAMES_OF_DROPOUT)
    )
    numbers = "first_entry width_q stream_id"
    loop = _plan(_attention_fwd_kernel, full, f"{numbers} {Options.WINDOW}", config, traits, strides, TILE=TILE)
    tile = short = None
    if of_tile:
        tile = _plan(_attention_fwd_tile_kernel, plain_tensors, numbers, of_tile, traits, strides, TILE=TILE)
    if of_short and plain:
        short = _plan(_attention_fwd_heads_kernel, plain_tensors, numbers, of_short, traits, strides, TILE=SHORT)
    elif of_short:
        short = _plan(_attention_fwd_kernel, full, f"{numbers} {Options.WINDOW}", of_short, traits, strides, TILE=SHORT)
    return Forward(loop, TILE // config.block_m * traits.heads, tile, short, plain)


def launch_forward(q, k, v, spans_q, spans_k, entries, parts, *given):
    """(o, lse). The arguments are those of the operator's schema."""
    q, k, v = unit_stride(q, k, v)
    options = Options(*given)
    plans = forward_plans(attention_config, options.traits(q, k), row_strides(q, k, v))
    return run_forward(plans, Sequences(q, k, v, spans_q, spans_k), Tiles(entries, parts), options)


def run_forward(plans: Forward, sequences: Sequences, tiles: Tiles, options: Options, known: Hashable = None):
    """(o, lse) by these plans. known: as in `Plan`."""
    q = sequences.q
    outputs = forward_outputs(q)
    heads = q.shape[-2]
    (first_loop, n_loop), (first_tile, n_tile), (first_short, n_short) = _parts(tiles, plans)

    inputs = (*sequences, tiles.entries)
    full = (*inputs, *options.tensors(), *outputs)
    dropout = (*inputs, options.seed, options.sequence_ids, *outputs)
    numbers, window = (q.shape[-3], options.stream), (options.window_left, options.window_right)
    if n_loop:
        plans.loop((n_loop * plans.programs,), full, (first_loop, *numbers, *window), known=known)
    if n_tile:
        plans.tile((n_tile * heads,), dropout, (first_tile, *numbers), known=known)
    if n_short and plans.plain:
        plans.short((n_short * heads,), dropout, (first_short, *numbers), known=known)
    elif n_short:
        plans.short((n_short * heads,), full, (first_short, *numbers, *window), known=known)
    return outputs


def _parts(tiles: Tiles, plans: Forward | Backward) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """(first entry, entries) for the kernels with loops, the kernel for a tile, and the one for short sequences.

    Every entry belongs to one kernel. Without a kernel for short sequences, the kernel for a tile takes theirs; without
    that one, the kernels with loops do. The number of entries is 0, and nothing is launched, for an empty part and for
    a part that cannot have sequences because `longest` is too small.
    """
    n_long, n_medium, longest = tiles.parts
    first_short, end = n_long + n_medium, tiles.entries.shape[0]
    end_tile = end if plans.short is None else first_short
    end_loop = end_tile if plans.tile is None else n_long
    # entries of sequences longer than `longest` are surplus: they come first, and are skipped
    first = 0 if longest > TILE else n_long if longest > SHORT else first_short
    first_tile = max(first, n_long)
    return (
        (first, max(end_loop - first, 0)),
        (first_tile, 0 if plans.tile is None else end_tile - first_tile),
        (first_short, 0 if plans.short is None else end - first_short),
    )


def forward_outputs(q, *_):
    """o like q but contiguous; lse [H, Tq] or [B, H, Sq] in fp32."""
    *rows, heads, _ = q.shape
    lse_shape = (heads, *rows) if len(rows) == 1 else (rows[0], heads, rows[1])
    return q.new_empty(*q.shape), q.new_empty(*lse_shape, dtype=torch.float32)


# ---- backward


class Backward(NamedTuple):
    """Plans of the kernels with loops, of the one for a tile, of the one for short sequences (None: see `_parts`)."""

    dq: Plan
    dq_programs: int  # programs of the dq kernel for each entry of the schedule
    dkv: Plan
    dkv_programs: int
    tile: Plan | None
    short: Plan | None
    plain: bool


@functools.lru_cache(1024)
def backward_plans(
    config_of: Callable, traits: Traits, strides: tuple[int, ...], gradient_strides: tuple[int, int], has_dlse: bool
) -> Backward:
    """gradient_strides: the token stride of dq, and that of dk and dv."""
    plain = traits.is_plain()
    of_dq, of_dkv, of_short, of_tile = (
        config_of(traits.head_dim, traits.dtype, traits.arch, direction, traits.of_config())
        for direction in ("bwd_dq", "bwd_dkv", "bwd_heads" if plain else "bwd_short", "bwd_tile")
    )
    of_tile = of_tile if plain else None
    loop = {"TILE": TILE, "HAS_DLSE": has_dlse}
    loop |= dict(zip(("stride_dq", "stride_dkv"), gradient_strides, strict=True))
    of_pass = f"{Sequences.NAMES} {Tiles.NAMES}"
    inputs = f"{of_pass} {Options.NAMES}"
    of_q, of_k = "first_entry width_q stream_id", "first_entry width_q width_k stream_id"

    def plan(kernel, tensors, numbers, config, **more):
        return _plan(kernel, tensors, numbers, config, traits, strides, **{**loop, **more})

    dq = plan(_attention_bwd_dq_kernel, f"{inputs} {Saved.NAMES} dq_ptr delta_ptr", f"{of_q} {Options.WINDOW}", of_dq)
    dkv = plan(
        _attention_bwd_dkv_kernel, f"{inputs} lse_ptr do_ptr delta_ptr dk_ptr dv_ptr", f"{of_k} {Options.WINDOW}",
        of_dkv,
    )  # fmt: skip
    tile = short = None
    plain_tensors = f"{of_pass} {Options.NAMES_OF_DROPOUT} {Saved.NAMES} dq_ptr dk_ptr dv_ptr"
    if of_tile:
        tile = plan(_attention_bwd_tile_kernel, plain_tensors, of_q, of_tile)
    if of_short and plain:
        short = plan(_attention_bwd_heads_kernel, plain_tensors, of_q, of_short, TILE=SHORT)
    elif of_short:
        tensors = f"{inputs} {Saved.NAMES} dq_ptr dk_ptr dv_ptr delta_ptr"
        short = plan(_attention_bwd_short_kernel, tensors, f"{of_k} {Options.WINDOW}", of_short, TILE=SHORT)
    return Backward(
        dq, TILE // of_dq.block_m * traits.heads, dkv, TILE // of_dkv.block_n * traits.kv_heads, tile, short, plain
    )


def launch_backward(
    do, dlse, o, lse, q, k, v, spans_q, spans_k, entries_q, entries_k, parts_q, parts_k, *given, into=None
):  # fmt: skip
    """(dq, dk, dv, delta). The arguments are those of the operator's schema, and:

    into: dq, dk and dv to write to; by default new tensors. Heads are contiguous, dk and dv have the same token stride,
        which may be any, and padded sequences follow each other without gaps.
    """
    outputs = backward_outputs(do, dlse, o, lse, q, k, v) if into is None else into
    saved = Saved(o, lse, do.contiguous(), None if dlse is None else dlse.contiguous())
    q, k, v = unit_stride(q, k, v)
    options = Options(*given)
    plans = backward_plans(
        attention_config, options.traits(q, k), row_strides(q, k, v),
        (outputs[0].stride(-3), outputs[1].stride(-3)), dlse is not None,
    )  # fmt: skip
    tiles_q = Tiles(entries_q, parts_q)
    tiles_k = tiles_q if entries_k is entries_q else Tiles(entries_k, parts_k)
    return run_backward(plans, outputs, saved, Sequences(q, k, v, spans_q, spans_k), tiles_q, tiles_k, options)


def run_backward(
    plans: Backward, outputs: tuple[Tensor, ...], saved: Saved, sequences: Sequences, tiles_q: Tiles, tiles_k: Tiles,
    options: Options, known: Hashable = None,
):  # fmt: skip
    """Computes (dq, dk, dv, delta) into `outputs` with these plans. tiles_k: in self-attention the same object as
    tiles_q. known: as in `Plan`."""
    dq, dk, dv, delta = outputs
    q, k = sequences.q, sequences.k
    heads, kv_heads = q.shape[-2], k.shape[-2]
    (first_q, n_loop_q), (first_tile, n_tile), (first_short, n_short) = _parts(tiles_q, plans)
    first_k, n_loop_k = (first_q, n_loop_q) if tiles_k is tiles_q else _parts(tiles_k, plans)[0]

    inputs, modifiers = (*sequences, tiles_q.entries), options.tensors()
    width_q, width_k, stream = q.shape[-3], k.shape[-3], options.stream
    window = options.window_left, options.window_right
    plain = (*inputs, options.seed, options.sequence_ids, *saved, dq, dk, dv)
    # dq before dk and dv: it also writes delta, which they read
    if n_loop_q:
        plans.dq(
            (n_loop_q * plans.dq_programs,), (*inputs, *modifiers, *saved, dq, delta),
            (first_q, width_q, stream, *window), known=known,
        )  # fmt: skip
    if n_loop_k:
        plans.dkv(
            (n_loop_k * plans.dkv_programs,),
            (*sequences, tiles_k.entries, *modifiers, saved.lse, saved.do, delta, dk, dv),
            (first_k, width_q, width_k, stream, *window), known=known,
        )  # fmt: skip
    if n_tile:
        plans.tile((n_tile * heads,), plain, (first_tile, width_q, stream), known=known)
    if n_short and plans.plain:
        plans.short((n_short * kv_heads,), plain, (first_short, width_q, stream), known=known)
    elif n_short:
        plans.short(
            (n_short * kv_heads,), (*inputs, *modifiers, *saved, dq, dk, dv, delta),
            (first_short, width_q, width_k, stream, *window), known=known,
        )  # fmt: skip
    return outputs


def backward_outputs(do, dlse, o, lse, q, k, v, *_):
    """dq, dk, dv contiguous; delta like lse."""
    return q.new_empty(*q.shape), k.new_empty(*k.shape), v.new_empty(*v.shape), torch.empty_like(lse)


# ---- gradient of the bias


@functools.lru_cache(1024)
def _bias_plan(config: AttentionConfig, traits: Traits, strides: tuple[int, ...], of: tuple[bool, bool]) -> Plan:
    return _plan(
        _attention_bwd_bias_kernel, f"{Sequences.NAMES} {Options.NAMES} lse_ptr do_ptr delta_ptr dbias_ptr",
        f"width_q stream_id {Options.WINDOW} bias_rows bias_cols batch", config, traits, strides,
        OF_BATCH=of[0], OF_HEADS=of[1],
    )  # fmt: skip


def launch_backward_bias(do, lse, delta, q, k, v, spans_q, spans_k, *given):
    """dbias. The arguments are those of the operator's schema."""
    options = Options(*given)
    dbias = options.bias.new_empty(options.bias.shape)
    if dbias.numel() == 0:
        return dbias
    q, k, v = unit_stride(q, k, v)
    batch = spans_q.shape[0] if q.dim() == 4 else spans_q.shape[0] - 1
    planes_b, planes_h, rows, cols = dbias.shape
    traits = options.traits(q, k)
    config = attention_config(traits.head_dim, traits.dtype, traits.arch, "bwd_bias", traits.of_config())
    _bias_plan(config, traits, row_strides(q, k, v), (planes_b == 1, planes_h == 1))(
        (planes_b * planes_h * cdiv(rows, config.block_m) * cdiv(cols, config.block_n),),
        (q, k, v, spans_q, spans_k, *options.tensors(), lse, do.contiguous(), delta, dbias),
        (q.shape[-3], options.stream, options.window_left, options.window_right, rows, cols, batch),
    )
    return dbias
