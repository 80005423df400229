"""Exchange within a warp: what each lane receives, and which lanes must take part."""

import numpy as np
import pytest

from fastbert.emulator import errors

pytestmark = pytest.mark.once

LANES = np.arange(32, dtype=np.uint32)


def _shuffled(ptx, how: str, b: str, c: str):
    """(values, whether the source was in range) of lanes that hold 100 + lane."""
    body = f"add.s32 %r0, %t, 100; shfl.sync.{how}.b32 %r1|%p0, %r0, {b}, {c}, -1; selp.b32 %r2, 1000, 0, %p0;"
    got = ptx.each(f"{body} add.s32 %out, %r1, %r2;", LANES, out=np.uint32)
    return (got % 1000 - 100).tolist(), (got >= 1000).tolist()


@pytest.mark.instructions("shfl.sync.bfly.b32", "shfl.sync.idx.b32", "shfl.sync.up.b32", "shfl.sync.down.b32")
def test_shuffles(ptx):
    assert _shuffled(ptx, "bfly", "1", "31")[0] == [n ^ 1 for n in range(32)]
    assert _shuffled(ptx, "bfly", "16", "31")[0] == [(n + 16) % 32 for n in range(32)]
    assert _shuffled(ptx, "idx", "5", "31")[0] == [5] * 32
    # a lane whose source lies past the end keeps its own value, and its predicate is false
    values, inside = _shuffled(ptx, "up", "3", "0")
    assert values == [0, 1, 2, *range(29)]
    assert inside == [False] * 3 + [True] * 29
    values, inside = _shuffled(ptx, "down", "3", "31")
    assert values == [*range(3, 32), 29, 30, 31]
    assert inside == [True] * 29 + [False] * 3


def test_shuffles_in_parts_of_a_warp(ptx):
    """Bits 8 to 12 of the third operand are a mask of the lane number's fixed bits: 0x1800 makes groups of eight."""
    assert _shuffled(ptx, "idx", "2", "0x181f")[0] == [n // 8 * 8 + 2 for n in range(32)]
    assert _shuffled(ptx, "bfly", "8", "0x181f")[1] == [n >= 8 and n % 16 >= 8 for n in range(32)]


def test_a_shuffle_whose_source_lane_is_in_a_register(ptx):
    body = "sub.s32 %r0, 31, %t; add.s32 %r1, %t, 7; shfl.sync.idx.b32 %out, %r1, %r0, 31, -1;"
    assert ptx.each(body, LANES, out=np.uint32).tolist() == [38 - n for n in range(32)]


def test_each_warp_shuffles_separately(ptx):
    thread = np.arange(96, dtype=np.uint32)
    assert ptx.each("shfl.sync.bfly.b32 %out, %in0, 4, 31, -1;", thread, out=np.uint32).tolist() == [
        n // 32 * 32 + (n % 32 ^ 4) for n in range(96)
    ]


def test_a_shuffle_needs_all_lanes_of_its_mask(ptx):
    body = "setp.lt.u32 %p0, %t, 16; mov.u32 %out, 0; @%p0 shfl.sync.bfly.b32 %out, %t, 1, 31, MEMBERS;"
    got = ptx.each(body.replace("MEMBERS", "0xffff"), LANES, out=np.uint32)
    assert got.tolist() == [n ^ 1 for n in range(16)] + [0] * 16
    with pytest.raises(errors.DivergentWarp, match=r"shfl\.sync\.bfly\.b32 without thread 16 of program 0"):
        ptx.each(body.replace("MEMBERS", "-1"), LANES, out=np.uint32)


REDUCTIONS = {
    "redux.sync.add.s32": sum(range(32)) - 320, "redux.sync.min.s32": -10, "redux.sync.max.s32": 21,
    "redux.sync.min.u32": 0, "redux.sync.max.u32": 2**32 - 1, "redux.sync.or.b32": 2**32 - 1, "redux.sync.and.b32": 0,
}  # fmt: skip


@pytest.mark.parametrize("opcode", REDUCTIONS)
def test_reductions_over_a_warp(ptx, opcode):
    """Reduces the numbers -10 to 21."""
    got = ptx.each(f"sub.s32 %r0, %in0, 10; {opcode} %out, %r0, -1;", LANES, out=np.uint32)
    assert got.tolist() == [REDUCTIONS[opcode] % 2**32] * 32


NAN = float("nan")
EXTREMES = {
    "redux.sync.max.f32": [([-3.0, -0.5], -0.5), ([NAN, 2.0], 2.0), ([NAN, NAN], NAN), ([-0.0, 0.0], 0.0)],
    "redux.sync.min.f32": [([-3.0, -0.5], -3.0), ([NAN, 2.0], 2.0), ([NAN, NAN], NAN), ([0.0, -0.0], -0.0)],
}  # fmt: skip


@pytest.mark.parametrize("opcode", EXTREMES)
def test_extremes_of_floats_over_a_warp(ptx, opcode):
    """Half of the lanes hold one number, half the other."""
    for given, expected in EXTREMES[opcode]:
        x = np.float32(given * 16)
        got = ptx.each(f"{opcode} %out, %in0, -1;", x, out=np.uint32)
        canonical = np.uint32(0x7FFFFFFF) if np.isnan(expected) else np.float32(expected).view(np.uint32)
        assert (got == canonical).all(), (given, got.view(np.float32))


def test_a_reduction_covers_only_the_lanes_of_its_mask(ptx):
    body = "setp.ge.u32 %p0, %t, 20; mov.u32 %out, 7; @%p0 redux.sync.min.s32 %out, %t, 0xfff00000;"
    assert ptx.each(body, LANES, out=np.uint32).tolist() == [7] * 20 + [20] * 12


VOTES = {
    "vote.sync.ballot.b32 %out, %p0, -1;": 0b1110, "vote.sync.any.pred %p1, %p0, -1; selp.b32 %out, 1, 0, %p1;": 1,
    "vote.sync.all.pred %p1, %p0, -1; selp.b32 %out, 1, 0, %p1;": 0,
    "vote.sync.uni.pred %p1, %p0, -1; selp.b32 %out, 1, 0, %p1;": 0,
    "activemask.b32 %out;": 2**32 - 1,
}  # fmt: skip


@pytest.mark.parametrize("vote", VOTES)
def test_votes(ptx, vote):
    """Lanes 1, 2 and 3 vote yes."""
    body = f"sub.s32 %r0, %in0, 1; setp.lt.u32 %p0, %r0, 3; {vote}"
    assert ptx.each(body, LANES, out=np.uint32).tolist() == [VOTES[vote]] * 32


@pytest.mark.instructions("elect.sync")
def test_one_lane_is_elected(ptx):
    got = ptx.each("elect.sync %r0|%p0, -1; selp.b32 %out, 1, 0, %p0;", np.arange(64, dtype=np.uint32), out=np.uint32)
    assert got.tolist() == ([1] + [0] * 31) * 2
    body = """
    setp.ge.u32 %p1, %t, 9;
    mov.u32 %out, 0;
    @!%p1 bra done;
    elect.sync %r0|%p0, MEMBERS;
    selp.b32 %out, %r0, 0, %p0;
    done:
    """
    got = ptx.each(body.replace("MEMBERS", "0xfffffe00"), LANES, out=np.uint32)
    assert got.tolist() == [0] * 9 + [9] + [0] * 22
    with pytest.raises(errors.DivergentWarp):
        ptx.each(body.replace("MEMBERS", "-1"), LANES, out=np.uint32)


@pytest.mark.instructions("bar.warp.sync")
def test_a_warp_barrier_needs_all_lanes_of_its_mask(ptx):
    body = "setp.lt.u32 %p0, %t, 16; @%p0 bar.warp.sync MEMBERS;"
    ptx(body.replace("MEMBERS", "0xffff"))
    with pytest.raises(errors.DivergentWarp):
        ptx(body.replace("MEMBERS", "-1"))
