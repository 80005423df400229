"""Exchange within a warp: shfl, vote, redux, elect, match."""

from __future__ import annotations

import numpy as np

from .errors import DivergentWarp
from .formats import i32, i64, u32
from .ptx import Immediate, Instruction, Pair
from .state import State
from .translate import Emitter, available, refuse, translates

_LANES = np.arange(32)
_REDUCTIONS = {
    "min": np.minimum, "max": np.maximum, "add": np.add, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}  # fmt: skip


def expect_whole_warps(S: State, mask, what: str, members=None) -> None:
    """Raises DivergentWarp if only a part of a warp runs an instruction that needs the whole warp. members: bits of the
    lanes that have to take part, None for all; lanes that have ended are exempt."""
    if mask is None:
        return
    active = S.by_warp(mask)
    missing = active.any(-1, keepdims=True) & ~active & S.by_warp(S.live)
    if members is not None:
        first = np.take_along_axis(S.by_warp(members), active.argmax(-1)[..., None], -1)
        missing &= (first >> _LANES.astype(u32)) & u32(1) != 0
    if missing.any():
        program, warp, lane = np.argwhere(missing)[0]
        raise DivergentWarp(f"{what} without thread {warp * 32 + lane} of program {program} of the batch")


available(expect_whole_warps)


def expect_named_lanes(emit: Emitter, i: Instruction) -> None:
    """Emits the check that the lanes in the last operand run this instruction together."""
    if emit.mask != "None":
        members = i.operands[-1]
        whole = isinstance(members, Immediate) and members.value in (-1, 0xFFFFFFFF)
        named = "None" if whole else emit.read(members, "u32")
        emit.line(f"expect_whole_warps(S, {emit.mask}, {i.opcode!r}, {named})")


@available
def shuffle(S: State, how: str, a, b, c):
    """shfl: (values, whether the source lane is in range). A lane with a source out of range keeps its own value."""
    value = S.by_warp(a)
    b, c = np.asarray(b).astype(i64) & 31, np.asarray(c).astype(i64)
    lane = S.lane
    clamp, segment = c & 31, (c >> 8) & 31
    limit = (lane & segment) | (clamp & ~segment)
    match how:
        case "up":
            source = lane - b
            inside = source >= limit
        case "down":
            source = lane + b
            inside = source <= limit
        case "bfly":
            source = lane ^ b
            inside = source <= limit
        case _:
            source = (lane & segment) | (b & ~segment & 31)
            inside = source <= limit
    source = np.where(inside, source, lane)
    if source.shape[0] == 1 and (source.shape[1] == 32 or (source.reshape(-1, 32) == source[0, :32]).all()):
        taken = value[..., source[0, :32]]
    else:
        taken = np.take_along_axis(value, S.by_warp(source), -1)
    return taken.reshape(S.shape), inside


@translates("shfl")
def _shfl(emit: Emitter, i: Instruction) -> None:
    if i.parts[1] != "sync" or i.type != "b32":
        refuse(i)
    expect_named_lanes(emit, i)
    a, b, c = (emit.read(o, "b32") for o in i.operands[1:4])
    got = emit.new(f"shuffle(S, {i.parts[2]!r}, {a}, {b}, {c})", "got")
    target = i.operands[0]
    if isinstance(target, Pair):
        emit.write(target.first, f"{got}[0]")
        emit.write(target.second, f"{got}[1]")
    else:
        emit.write(target, f"{got}[0]")


@available
def reduce_warp(S: State, operation: str, a, mask):
    """redux: one value of all lanes that take part, given to each."""
    value = S.by_warp(a)
    function = _REDUCTIONS[operation]
    if mask is None:
        result = function.reduce(value, -1, dtype=value.dtype, keepdims=True)
    else:
        member = S.by_warp(mask)
        limits = np.iinfo(value.dtype)
        neutral = {"min": limits.max, "max": limits.min, "and": -1 if limits.min else limits.max}.get(operation, 0)
        result = function.reduce(
            np.where(member, value, value.dtype.type(neutral)), -1, dtype=value.dtype, keepdims=True
        )
    return np.broadcast_to(result, value.shape).reshape(S.shape)


@available
def extreme_of_warp(S: State, operation: str, bits, mask):
    """redux.min and max of float32, as bits: NaNs are left out, and -0 is less than 0."""
    bits = S.by_warp(bits)
    # If the lower bits of negative numbers are inverted, floats compare like integers.
    ordered = bits.view(i32) ^ ((bits.view(i32) >> 31) & 0x7FFFFFFF)
    left_out = (bits & u32(0x7FFFFFFF)) > u32(0x7F800000)
    left_out = left_out if mask is None else left_out | ~S.by_warp(mask)
    limits = np.iinfo(i32)
    function, neutral = {"min": (np.minimum, limits.max), "max": (np.maximum, limits.min)}[operation]
    result = function.reduce(np.where(left_out, i32(neutral), ordered), -1, keepdims=True)
    result = (result ^ ((result >> 31) & 0x7FFFFFFF)).view(u32)
    result = np.where(left_out.all(-1, keepdims=True), u32(0x7FFFFFFF), result)
    return np.broadcast_to(result, bits.shape).reshape(S.shape)


@translates("redux")
def _redux(emit: Emitter, i: Instruction) -> None:
    of_floats = i.type == "f32" and i.parts[2] in ("min", "max") and len(i.parts) == 4
    if i.type not in ("s32", "u32", "b32") and not of_floats:
        refuse(i)
    expect_named_lanes(emit, i)
    if of_floats:
        value = emit.read(i.operands[1], "b32")
        emit.write(i.operands[0], f"extreme_of_warp(S, {i.parts[2]!r}, {value}, {emit.mask})")
        return
    result = f"reduce_warp(S, {i.parts[2]!r}, {emit.read(i.operands[1], i.type)}, {emit.mask})"
    emit.write(i.operands[0], result, "s" if i.type[0] == "s" else "b")


@available
def ballot(S: State, predicate, mask):
    """vote.ballot: a bit a lane."""
    predicate = S.by_warp(predicate if mask is None else predicate & mask)
    bits = (predicate.astype(u32) << _LANES.astype(u32)).sum(-1, dtype=u32, keepdims=True)
    return np.broadcast_to(bits, predicate.shape).reshape(S.shape)


@available
def vote(S: State, how: str, predicate, mask):
    predicate = S.by_warp(predicate)
    member = np.ones_like(predicate) if mask is None else S.by_warp(mask)
    every, some = (predicate | ~member).all(-1, keepdims=True), (predicate & member).any(-1, keepdims=True)
    result = {"all": every, "any": some, "uni": every | ~some}[how]
    return np.broadcast_to(result, predicate.shape).reshape(S.shape)


@translates("vote")
def _vote(emit: Emitter, i: Instruction) -> None:
    if i.parts[1] != "sync":
        refuse(i)
    expect_named_lanes(emit, i)
    predicate = emit.read(i.operands[1], "pred")
    if i.parts[2] == "ballot":
        emit.write(i.operands[0], f"ballot(S, {predicate}, {emit.mask})")
    else:
        emit.write(i.operands[0], f"vote(S, {i.parts[2]!r}, {predicate}, {emit.mask})")


@available
def elect(S: State, mask):
    """elect: (the elected lane, whether it is this one). The lowest participating lane is elected."""
    member = np.ones((1, 1, 32), bool) if mask is None else S.by_warp(mask)
    leader = member.argmax(-1)[..., None]
    chosen = (leader == _LANES) & member
    leader = np.broadcast_to(leader.astype(u32), (S.count, S.warps, 32)).reshape(S.shape)
    return leader, np.broadcast_to(chosen, (S.count, S.warps, 32)).reshape(S.shape)


@translates("elect")
def _elect(emit: Emitter, i: Instruction) -> None:
    expect_named_lanes(emit, i)
    got = emit.new(f"elect(S, {emit.mask})", "got")
    emit.write(i.operands[0].first, f"{got}[0]")
    emit.write(i.operands[0].second, f"{got}[1]")


@translates("activemask")
def _activemask(emit: Emitter, i: Instruction) -> None:
    emit.write(i.operands[0], f"ballot(S, np.True_, {emit.mask})")
