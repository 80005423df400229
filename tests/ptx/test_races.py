"""Races: each is found, and the most similar program without a race is accepted."""

import numpy as np
import pytest

from fastbert.emulator import errors

pytestmark = pytest.mark.once

# %r0: address of this thread's word of shared memory; %r1: of a word of the other warp; %r2: of the next lane's word
PLACES = """
mul.lo.s32 %r0, %t, 4; xor.b32 %r1, %r0, 128; xor.b32 %r2, %r0, 4; and.b32 %r3, %r0, 127; mov.u32 %r9, 0;
setp.lt.u32 %p0, %t, 32; setp.eq.u32 %p1, %t, 0;
"""
WRITE, READ_OTHER, WRITE_OTHER = (
    "st.shared.b32 [%r0], %t;", "ld.shared.b32 %r4, [%r1];", "st.shared.b32 [%r1], %t;",
)  # fmt: skip
RACES = {
    "read after write": (WRITE, READ_OTHER, r"reads byte \d+ of shared memory, which thread \d+ wrote"),
    "write after read": (f"{WRITE} bar.sync 0; {READ_OTHER}", WRITE, r"writes byte \d+ .* which thread \d+ read"),
    "write after write": (WRITE, WRITE_OTHER, r"writes byte \d+ .* which thread \d+ wrote"),
    # both warps read the word, so the race is with several
    "write after reads": (
        f"{WRITE} bar.sync 0; ld.shared.b32 %r4, [%r3];", "@%p1 st.shared.b32 [%r9], %t;", "which several warps read",
    ),
    "matrix after write": (
        WRITE, "and.b32 %r5, %t, 7; mul.lo.s32 %r5, %r5, 16; xor.b32 %r5, %r5, 128;"
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r4}, [%r5];", "warp 0 reads .* which thread 32 wrote",
    ),
}  # fmt: skip


@pytest.mark.instructions("bar.sync")
@pytest.mark.parametrize("race", RACES)
def test_warps_need_a_barrier_between(ptx, race):
    first, second, message = RACES[race]
    ptx(f"{PLACES} {first} bar.sync 0; {second}", threads=64, shared=256)
    with pytest.raises(errors.SharedRace, match=message):
        ptx(f"{PLACES} {first} {second}", threads=64, shared=256)
    with pytest.raises(errors.SharedRace):  # a warp's own barrier does not order other warps
        ptx(f"{PLACES} {first} bar.warp.sync -1; {second}", threads=64, shared=256)


NEXT = "ld.shared.b32 %r4, [%r2];"
IN_A_WARP = {
    "read after write": (WRITE, NEXT),
    "write after read": (f"{WRITE} bar.warp.sync -1; {NEXT}", WRITE),
    "matrix write, then read": (
        "mul.lo.s32 %r5, %t, 16; stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r5], {%t, %t, %t, %t};",
        "sub.s32 %r5, 496, %r5; ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r5];",
    ),
    "a word that all read": (f"@%p1 {WRITE} bar.warp.sync -1; ld.shared.b32 %r4, [%r9];", f"@%p1 {WRITE}"),
}  # fmt: skip


@pytest.mark.parametrize("race", IN_A_WARP)
def test_lanes_need_a_barrier_of_their_warp(ptx, race):
    first, second = IN_A_WARP[race]
    ptx(f"{PLACES} {first} bar.warp.sync -1; {second}", shared=512)
    ptx(f"{PLACES} {first} bar.sync 0; {second}", shared=512)
    with pytest.raises(errors.SharedRace):
        ptx(f"{PLACES} {first} {second}", shared=512)


def test_a_thread_needs_no_barrier_with_itself(ptx):
    ptx(f"{PLACES} {WRITE} ld.shared.b32 %r4, [%r0]; {WRITE} {WRITE}", threads=64, shared=256)


def test_several_threads_may_write_the_same_value_at_once(ptx):
    """Copies of one value do so. With different values the result depends on chance."""
    body = f"{PLACES} st.shared.b32 [%r3], VALUE; bar.sync 0; ld.shared.b32 %r4, [%r3];"
    ptx(body.replace("VALUE", "7"), threads=64, shared=128)
    with pytest.raises(errors.StoreConflict, match="different values to byte 0 of shared memory"):
        ptx(body.replace("VALUE", "%t"), threads=64, shared=128)
    y = np.zeros(32, np.uint32)
    body = f"{PLACES} cvt.u64.u32 %d0, %r3; add.s64 %d0, %d0, %y; st.global.b32 [%d0], VALUE;"
    ptx(body.replace("VALUE", "7"), threads=64, y=y)
    with pytest.raises(errors.StoreConflict, match="different values to byte 0 of y"):
        ptx(body.replace("VALUE", "%t"), threads=64, y=y)


def test_reading_unwritten_shared_memory_is_an_error(ptx):
    body = f"{PLACES} @GUARD {WRITE} bar.sync 0; ld.shared.b32 %r4, [%r0];"
    ptx(body.replace("@GUARD", ""), threads=64, shared=256)
    with pytest.raises(errors.UnwrittenShared, match="byte 128 of shared memory is read"):
        ptx(body.replace("@GUARD", "@%p0"), threads=64, shared=256)
    # a narrower write leaves the rest of the word unwritten
    with pytest.raises(errors.UnwrittenShared, match="byte 2 of"):
        ptx(f"{PLACES} st.shared.b16 [%r0], 0; ld.shared.b32 %r4, [%r0];", shared=128)


def test_all_running_threads_must_meet_at_one_barrier(ptx):
    body = "setp.lt.u32 %p0, %t, 32; @!%p0 bra other; bar.sync 0; bra done; other: THERE done:"
    ptx(body.replace("THERE", "ret;"), threads=64)  # ended threads are not waited for
    with pytest.raises(errors.DivergentBarrier, match=r"no thread can go on: all that are left wait at lines \d+, \d+"):
        ptx(body.replace("THERE", "bar.sync 0;"), threads=64)


# ---- global memory -----------------------------------------------------------------------------------------

# %d0: address of this thread's word; %d1: of the first word of y
GLOBAL = """
mov.u32 %r0, %ctaid.x; mad.lo.s32 %r1, %r0, 32, %t; mad.wide.u32 %d0, %r1, 4, %y; setp.eq.u32 %p0, %t, 0;
add.s64 %d1, %y, 0; setp.eq.u32 %p1, %r0, 0; setp.eq.u32 %p2, %r0, 1; xor.b32 %r2, %t, 32;
"""


def test_two_programs_may_not_write_one_address(ptx):
    y = np.zeros(64, np.uint32)
    ptx(f"{GLOBAL} st.global.b32 [%d0], %t;", grid=(2, 1, 1), y=y)
    with pytest.raises(errors.ProgramRace, match=r"program \d writes byte 0 of y, which program \d writes too"):
        ptx(f"{GLOBAL} @%p0 st.global.b32 [%d1], %t;", grid=(2, 1, 1), y=y)
    with pytest.raises(errors.ProgramRace, match="program 200 writes byte 0 of y, which program 0 wrote"):  # later
        ptx(f"{GLOBAL} setp.eq.u32 %p2, %r0, 200; or.pred %p1, %p1, %p2; and.pred %p0, %p0, %p1;"
            "@%p0 st.global.b32 [%d1], %t;", grid=(201, 1, 1), y=y)  # fmt: skip


def test_a_program_may_not_read_what_another_writes(ptx):
    y = np.zeros(64, np.uint32)
    own = f"{GLOBAL} ld.global.b32 %r3, [%d0]; st.global.b32 [%d0], %r3;"
    ptx(own, grid=(2, 1, 1), y=y)
    with pytest.raises(errors.ProgramRace, match="program 1 reads byte 0 of y, which program 0 wrote"):
        ptx(f"{own} @%p2 ld.global.b32 %r3, [%d1];", grid=(2, 1, 1), y=y)
    with pytest.raises(errors.ProgramRace, match=r"program 0 writes byte 0 of y, which .*program.* read"):
        ptx(f"{GLOBAL} ld.global.b32 %r3, [%d1]; @%p1 st.global.b32 [%d1], %r3;", grid=(2, 1, 1), y=y)


def test_races_are_found_through_views_of_one_memory(ptx):
    """y is written under its own name, and read through a view of its second half."""
    y = np.zeros(64, np.uint32)
    body = f"{GLOBAL} st.global.b32 [%d0], %t; mad.wide.u32 %d2, %t, 4, %view; @%p1 ld.global.b32 %r3, [%d2];"
    ptx(body, grid=(2, 1, 1), y=y, view=np.zeros(32, np.uint32))
    with pytest.raises(errors.ProgramRace, match="reads byte 0 of view, which program 1 wrote"):
        ptx(body, grid=(2, 1, 1), y=y, view=y[32:])


def test_threads_of_a_program_need_a_barrier_in_global_memory_too(ptx):
    y = np.zeros(64, np.uint32)
    body = f"{GLOBAL} st.global.b32 [%d0], %t; BARRIER mad.wide.u32 %d2, %r2, 4, %y; ld.global.b32 %r3, [%d2];"
    ptx(body.replace("BARRIER", "bar.sync 0;"), threads=64, y=y)
    with pytest.raises(errors.GlobalRace, match="thread 0 of program 0 reads byte 128 of y, which thread 32 wrote"):
        ptx(body.replace("BARRIER", ""), threads=64, y=y)


def test_atomic_operations_of_many_programs_are_no_race(ptx):
    y = np.zeros(1, np.uint32)
    ptx("red.global.add.u32 [%y], 1;", grid=(300, 1, 1), y=y)
    assert y.tolist() == [9600]
