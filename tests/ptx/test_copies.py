"""cp.async and its groups, bulk copies of tensor boxes, and the mbarriers that count their bytes."""

import numpy as np
import pytest

from fastbert.emulator import errors
from fastbert.emulator.copies import TensorDescriptor

pytestmark = pytest.mark.once

# ---- cp.async ----------------------------------------------------------------------------------------------

COPY = """
mul.lo.s32 %r0, %t, SIZE; cvt.u64.u32 %d0, %r0; add.s64 %d1, %d0, %x; add.s64 %d2, %d0, %y;
cp.async.KIND.shared.global [%r0], [%d1], SIZE;
cp.async.commit_group;
"""
OUT = "ld.shared.b32 %r1, [%r0]; st.global.b32 [%d2], %r1;"


@pytest.mark.instructions(
    "cp.async.cg.shared.global", "cp.async.ca.shared.global", "cp.async.commit_group", "cp.async.wait_group"
)
@pytest.mark.parametrize(("kind", "size"), [("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16)])
def test_copies_bring_their_bytes(ptx, kind, size):
    x = np.arange(32 * size // 4, dtype=np.uint32)
    y = np.zeros_like(x)
    out = " ".join(f"ld.shared.b32 %r1, [%r0 + {at}]; st.global.b32 [%d2 + {at}], %r1;" for at in range(0, size, 4))
    body = COPY.replace("SIZE", str(size)).replace("KIND", kind) + "cp.async.wait_group 0;" + out
    ptx(body, shared=32 * size, x=x, y=y)
    assert y.tolist() == x.tolist()


def test_a_copy_of_no_bytes_is_zeros_and_reads_nothing(ptx):
    """The source size is 16 for threads whose element exists, else 0: their address may lie past the tensor."""
    x, y = np.arange(1, 81, dtype=np.uint32), np.zeros(128, np.uint32)
    body = """
    mul.lo.s32 %r0, %t, 16; cvt.u64.u32 %d0, %r0; add.s64 %d1, %d0, %x; add.s64 %d2, %d0, %y;
    setp.lt.u32 %p0, %t, 20; selp.b32 %r2, 16, 0, %p0;
    cp.async.cg.shared.global [%r0], [%d1], 0x10, %r2;
    cp.async.wait_all;
    ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r0]; st.global.v4.b32 [%d2], {%r4, %r5, %r6, %r7};
    """
    ptx(body, shared=512, x=x, y=y)
    assert y.tolist() == [*range(1, 81), *[0] * 48]
    with pytest.raises(errors.OutOfBounds):
        ptx(body.replace("lt.u32 %p0, %t, 20", "lt.u32 %p0, %t, 21"), shared=512, x=x, y=y)


def _groups(ptx, allowed: int, read: int) -> None:
    """Three copies in a group each; waits for all but the newest `allowed`; reads the copy of the group `read`."""
    copies = " ".join(
        f"cp.async.ca.shared.global [%r0 + {128 * n}], [%d1], 4; cp.async.commit_group;" for n in range(3)
    )
    body = f"mul.lo.s32 %r0, %t, 4; cvt.u64.u32 %d0, %r0; add.s64 %d1, %d0, %x; {copies}"
    ptx(f"{body} cp.async.wait_group {allowed}; ld.shared.b32 %r1, [%r0 + {128 * read}]; cp.async.wait_group 0;",
        shared=384, x=np.zeros(32, np.uint32))  # fmt: skip


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_a_wait_leaves_the_newest_groups(ptx, allowed):
    for read in range(3):
        if read < 3 - allowed:
            _groups(ptx, allowed, read)
        else:
            with pytest.raises(errors.MissingWait, match=rf"byte {128 * read} .* started a copy, without a wait"):
                _groups(ptx, allowed, read)


def test_a_copy_without_a_group_comes_with_the_next_one(ptx):
    body = COPY.replace("SIZE", "4").replace("KIND", "ca").replace("cp.async.commit_group;", "")
    x, y = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    with pytest.raises(errors.MissingWait):
        ptx(f"{body} cp.async.wait_group 0; {OUT}", shared=128, x=x, y=y)
    ptx(f"{body} cp.async.commit_group; cp.async.wait_group 0; {OUT}", shared=128, x=x, y=y)
    assert y.tolist() == x.tolist()


def test_another_thread_needs_a_barrier_after_the_wait(ptx):
    body = (
        COPY.replace("SIZE", "4").replace("KIND", "ca") + "cp.async.wait_group 0; BARRIER xor.b32 %r0, %r0, 128;" + OUT
    )
    x, y = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    ptx(body.replace("BARRIER", "bar.sync 0;"), threads=64, shared=256, x=x, y=y)
    assert y.tolist() == [n ^ 32 for n in range(64)]
    with pytest.raises(errors.SharedRace):
        ptx(body.replace("BARRIER", ""), threads=64, shared=256, x=x, y=y)


def test_the_target_of_a_copy_in_flight_may_not_be_used(ptx):
    body = COPY.replace("SIZE", "4").replace("KIND", "ca")
    x, y = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    ptx(f"{body} st.shared.b32 [%r0 + 128], %t; cp.async.wait_group 0;", shared=256, x=x, y=y)
    with pytest.raises(errors.MissingWait, match=r"thread 0 writes byte 0 .* thread 0 started a copy"):
        ptx(f"{body} st.shared.b32 [%r0], %t; cp.async.wait_group 0;", shared=256, x=x, y=y)
    with pytest.raises(errors.MissingWait, match=r"ends before it has waited for its cp\.async"):
        ptx(body, shared=256, x=x, y=y)


def test_a_copy_may_not_overwrite_what_other_threads_still_read(ptx):
    body = """
    mul.lo.s32 %r0, %t, 4; cvt.u64.u32 %d0, %r0; add.s64 %d1, %d0, %x; xor.b32 %r2, %r0, 128;
    st.shared.b32 [%r0], %t; bar.sync 0; ld.shared.b32 %r1, [%r2]; BARRIER
    cp.async.ca.shared.global [%r0], [%d1], 4; cp.async.wait_all;
    """
    x = np.zeros(64, np.uint32)
    ptx(body.replace("BARRIER", "bar.sync 0;"), threads=64, shared=256, x=x)
    with pytest.raises(errors.SharedRace, match="starts a copy to"):
        ptx(body.replace("BARRIER", ""), threads=64, shared=256, x=x)


# ---- bulk copies -------------------------------------------------------------------------------------------

BOX = (8, 32)  # rows, columns of 2 bytes
BYTES = 8 * 32 * 2
LOAD = "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes"
INIT = "setp.eq.u32 %p0, %t, 0; mov.u32 %r8, 1024; @%p0 mbarrier.init.shared::cta.b64 [%r8], 1; bar.sync 0;"
EXPECT = f"@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r8], {BYTES};"
START = f"mov.b64 %d9, p_map; mov.u32 %r7, 0; @%p0 {LOAD} [%r7], [%d9, {{%column, %row}}], [%r8];"
WAIT = "{ .reg .pred over; again: mbarrier.try_wait.parity.shared::cta.b64 over, [%r8], PARITY; @!over bra.uni again; }"
END = "bar.sync 0; @%p0 mbarrier.inval.shared::cta.b64 [%r8];"


def _box(ptx, body: str, x: np.ndarray, swizzle: int = 0, row: int = 0, column: int = 0, threads: int = 32, **more):
    """`x`: [rows, columns]; the box is (8, 32), or half of its columns where swizzled over 32 bytes."""
    box = (BOX[0], 16) if swizzle == 1 else BOX
    descriptor = TensorDescriptor(0, x.ctypes.data, x.shape, (x.strides[0] // 2, 1), 2, box, swizzle, fill=0xABCD)
    ptx(
        body, threads=threads, shared=1032, x=x, row=row, column=column, map=0,
        descriptors={ptx.position("map", ["x", *more], ["row", "column", "map"]): descriptor}, **more,
    )  # fmt: skip


FLOW = INIT + EXPECT + START + WAIT.replace("PARITY", "0")
READ = """
mul.lo.s32 %r0, %t, 16; cvt.u64.u32 %d0, %r0; add.s64 %d2, %d0, %y;
ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r0]; st.global.v4.b32 [%d2], {%r10, %r11, %r12, %r13};
"""


@pytest.mark.instructions(
    LOAD, "mbarrier.init.shared::cta.b64", "mbarrier.arrive.expect_tx.shared::cta.b64",
    "mbarrier.try_wait.parity.shared::cta.b64", "mbarrier.inval.shared::cta.b64",
)  # fmt: skip
@pytest.mark.parametrize(("row", "column"), [(0, 0), (5, 16), (12, 40), (-3, -8)])
def test_a_box_of_a_tensor(ptx, row, column):
    """Elements outside the tensor, before it or behind it, are filled."""
    x = np.arange(16 * 64, dtype=np.uint16).reshape(16, 64)
    y = np.zeros(BOX, np.uint16)
    _box(ptx, FLOW + READ + END, x, row=row, column=column, y=y)
    for r in range(BOX[0]):
        for c in range(BOX[1]):
            inside = 0 <= row + r < 16 and 0 <= column + c < 64
            assert y[r, c] == (x[row + r, column + c] if inside else 0xABCD), (r, c)


@pytest.mark.parametrize(("swizzle", "span"), [(1, 32), (2, 64)])
def test_a_box_is_swizzled(ptx, swizzle, span):
    """The 16-byte pieces of line n change places: piece p goes to p xor (n div (128 / span))."""
    x = np.arange(8 * 32, dtype=np.uint16).reshape(8, 32)
    y = np.zeros(BOX, np.uint16)
    body = (FLOW + READ + END).replace(str(BYTES), str(8 * span))
    if swizzle == 1:
        body = body.replace("ld.shared", "@%p2 ld.shared").replace(
            "mul.lo.s32 %r0", "setp.lt.u32 %p2, %t, 16; mul.lo.s32 %r0"
        )
        body = body.replace("st.global", "@%p2 st.global")
    _box(ptx, body, x, swizzle, y=y)
    for r in range(8):
        for c in range(span // 2):
            piece = (c // 8) ^ (r // (128 // span) % (span // 16))
            assert y.reshape(-1)[r * span // 2 + piece * 8 + c % 8] == x[r, c]


def test_one_thread_initialises_an_mbarrier(ptx):
    body = "mov.u32 %r8, 0; setp.eq.u32 %p0, %t, 0; @%p0 mbarrier.init.shared::cta.b64 [%r8], 1; bar.sync 0;"
    ptx(body, shared=8)
    with pytest.raises(errors.BarrierMisuse, match="32 threads initialise the mbarrier at byte 0 at once"):
        ptx(body.replace("@%p0 ", ""), shared=8)


def test_every_thread_that_reads_has_to_wait(ptx):
    x, y = np.zeros((16, 64), np.uint16), np.zeros(BOX, np.uint16)
    with pytest.raises(errors.MissingWait, match="a bulk copy started a copy, without a wait for it"):
        _box(ptx, INIT + EXPECT + START + READ, x, y=y)
    # one warp waits and the other reads, which is right only after a barrier
    some = f"setp.ge.u32 %p3, %t, 32; @%p3 bra skip; {WAIT.replace('PARITY', '0')} skip: BARRIER"
    read = "xor.b32 %r0, %t, 32; mul.lo.s32 %r0, %r0, 4; ld.shared.b32 %r1, [%r0];"
    body = INIT + EXPECT + START + some + read + END
    _box(ptx, body.replace("BARRIER", "bar.sync 0;"), x, threads=64)
    with pytest.raises(errors.SharedRace, match="which a bulk copy wrote with no barrier between"):
        _box(ptx, body.replace("BARRIER", ""), x, threads=64)


def test_a_wait_brings_the_boxes_of_its_phase_alone(ptx):
    """The second box belongs to the next phase, which still waits for a third."""
    x = np.zeros((16, 64), np.uint16)
    second = START.replace("mov.u32 %r7, 0;", "mov.u32 %r7, 512;")
    body = (
        INIT + EXPECT + START + EXPECT.replace(str(BYTES), str(2 * BYTES)) + second + WAIT.replace("PARITY", "0")
        + "mul.lo.s32 %r0, %t, 16; ld.shared.b32 %r1, [%r0 + PLACE]; bar.sync 0;"
        + START + WAIT.replace("again", "again1").replace("PARITY", "1") + END
    )  # fmt: skip
    _box(ptx, body.replace("PLACE", "0"), x)
    with pytest.raises(errors.MissingWait, match="to which a bulk copy started a copy"):
        _box(ptx, body.replace("PLACE", "512"), x)


def test_a_box_may_not_overwrite_memory_in_use(ptx):
    x = np.zeros((16, 64), np.uint16)
    use = "xor.b32 %r0, %t, 32; mul.lo.s32 %r0, %r0, 4; st.shared.b32 [%r0], %t; BARRIER"
    body = INIT + use + EXPECT + START + WAIT.replace("PARITY", "0") + END
    _box(ptx, body.replace("BARRIER", "bar.sync 0;"), x, threads=64)
    with pytest.raises(errors.SharedRace, match="starts a copy to"):
        _box(ptx, body.replace("BARRIER", ""), x, threads=64)
    twice = INIT + EXPECT.replace(str(BYTES), str(2 * BYTES)) + START + START
    with pytest.raises(errors.MissingWait, match="starts a copy to byte 0"):
        _box(ptx, twice, x)


def test_a_program_waits_for_its_boxes_before_it_ends(ptx):
    x = np.zeros((16, 64), np.uint16)
    with pytest.raises(errors.MissingWait, match="ends before it has waited for its bulk copies"):
        _box(ptx, INIT + EXPECT + START, x)


# ---- mbarriers ---------------------------------------------------------------------------------------------


def test_phases_go_on_when_all_have_arrived(ptx):
    """64 threads arrive at a barrier of 64, three times; each phase has the other parity."""
    rounds = " ".join(
        f"mbarrier.arrive.shared::cta.b64 _, [%r8]; {WAIT.replace('again', f'again{n}').replace('PARITY', str(n % 2))}"
        for n in range(3)
    )
    init = INIT.replace("1024", "0").replace("[%r8], 1", "[%r8], 64")
    ptx(init + rounds + END, threads=64, shared=8)


def test_an_arrival_orders_memory_for_threads_that_wait(ptx):
    """Warp 0 writes and arrives; warp 1 waits and reads. Without the wait it is a race."""
    body = """
    setp.eq.u32 %p0, %t, 0; mov.u32 %r8, 1024; @%p0 mbarrier.init.shared::cta.b64 [%r8], 32; bar.sync 0;
    and.b32 %r0, %t, 31; mul.lo.s32 %r0, %r0, 4; setp.lt.u32 %p1, %t, 32; @!%p1 bra reader;
    st.shared.b32 [%r0], %t; mbarrier.arrive.shared::cta.b64 _, [%r8]; bra done;
    reader: WAIT
    ld.shared.b32 %r1, [%r0]; done:
    """
    ptx(body.replace("WAIT", WAIT.replace("PARITY", "0")) + END, threads=64, shared=1032)
    with pytest.raises((errors.SharedRace, errors.UnwrittenShared)):
        ptx(body.replace("WAIT", "") + END, threads=64, shared=1032)


def test_a_phase_that_never_ends_is_an_error(ptx):
    with pytest.raises(errors.DivergentBarrier, match="no thread can go on"):
        ptx(INIT.replace("1024", "0") + WAIT.replace("PARITY", "0"), shared=8)


MISUSES = {
    "no mbarrier was initialised at byte 0": "mov.u32 %r8, 0; mbarrier.arrive.shared::cta.b64 _, [%r8];",
    "more arrivals than the mbarrier at byte 0 expects": "INIT mbarrier.arrive.shared::cta.b64 _, [%r8], 2;",
    "is left while it waits for 64 bytes": "INIT @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r8], 64;",
    "which holds an mbarrier": "INIT ld.shared.b32 %r1, [%r8];",
}


@pytest.mark.parametrize("message", MISUSES)
def test_misuses_of_mbarriers(ptx, message):
    body = MISUSES[message].replace("INIT", INIT.replace("1024", "0"))
    with pytest.raises(errors.BarrierMisuse, match=message):
        ptx(body, shared=8)


def test_a_program_may_not_end_with_a_part_of_the_arrivals(ptx):
    init = INIT.replace("1024", "0").replace("[%r8], 1", "[%r8], 2")
    arrive = "@%p0 mbarrier.arrive.shared::cta.b64 _, [%r8];"
    with pytest.raises(errors.BarrierMisuse, match="is left with a part of its arrivals"):
        ptx(init + arrive, shared=8)
    ptx(init + arrive + arrive, shared=8)


def test_other_warps_may_use_an_mbarrier_only_after_a_barrier(ptx):
    init = INIT.replace("1024", "0").replace("bar.sync 0;", "BARRIER")
    arrive = "setp.eq.u32 %p4, %t, 32; @%p4 mbarrier.arrive.shared::cta.b64 _, [%r8];"
    ptx((init + arrive).replace("BARRIER", "bar.sync 0;"), threads=64, shared=8)
    with pytest.raises(errors.SharedRace, match="warp 1 uses the mbarrier at byte 0, which warp 0 initialised"):
        ptx((init + arrive).replace("BARRIER", ""), threads=64, shared=8)


def test_an_mbarrier_may_be_invalidated_only_after_a_barrier(ptx):
    body = INIT.replace("1024", "0") + "@%p0 mbarrier.arrive.shared::cta.b64 _, [%r8];" + WAIT.replace("PARITY", "0")
    ptx(body + END, threads=64, shared=8)
    with pytest.raises(errors.SharedRace, match="given up while warp 1 may still wait"):
        ptx(body + END.replace("bar.sync 0;", ""), threads=64, shared=8)
