"""Control flow: branches at which threads diverge, loops, predicates, the end; and unassigned registers."""

from types import SimpleNamespace

import numpy as np
import pytest

from fastbert.emulator import errors

pytestmark = pytest.mark.once

LANES = np.arange(32, dtype=np.uint32)


@pytest.mark.instructions("bra", "bra.uni", "ret")
def test_threads_diverge_and_reconverge(ptx):
    """The shuffle after the branch needs all threads."""
    body = """
    setp.lt.u32 %p0, %t, 10;
    @%p0 bra low;
    add.s32 %r0, %t, 100;
    bra.uni both;
    low:
    add.s32 %r0, %t, 200;
    both:
    shfl.sync.bfly.b32 %out, %r0, 31, 31, -1;
    """
    got = ptx.each(body, LANES, out=np.uint32)
    assert got.tolist() == [(200 if 31 - n < 10 else 100) + 31 - n for n in range(32)]


def test_each_thread_runs_its_own_number_of_rounds(ptx):
    body = """
    mov.u32 %r0, 0; mov.u32 %r1, 0;
    again:
    add.s32 %r0, %r0, %r1;
    add.s32 %r1, %r1, 1;
    setp.le.u32 %p0, %r1, %t;
    @%p0 bra again;
    mov.u32 %out, %r0;
    """
    assert ptx.each(body, LANES, out=np.uint32).tolist() == [n * (n + 1) // 2 for n in range(32)]


def test_threads_that_end_early_are_not_waited_for(ptx):
    y = np.zeros(64, np.uint32)
    body = """
    setp.ge.u32 %p0, %t, 48;
    @%p0 ret;
    bar.sync 0;
    mad.wide.u32 %d0, %t, 4, %y;
    st.global.b32 [%d0], 1;
    """
    ptx(body, threads=64, y=y)
    assert y.tolist() == [1] * 48 + [0] * 16


def test_a_predicate_and_its_opposite(ptx):
    body = "setp.lt.u32 %p0, %t, 3; mov.u32 %out, 9; @%p0 mov.u32 %out, 1; @!%p0 add.s32 %out, %out, 1;"
    assert ptx.each(body, LANES, out=np.uint32).tolist() == [1] * 3 + [10] * 29


def test_each_program_has_its_own_number_and_loop_count(ptx):
    """300 programs run in several batches. Each loops as often as its number says."""
    y = np.zeros(300, np.uint32)
    body = """
    mov.u32 %r0, %ctaid.x; mov.u32 %r1, %ctaid.y; mov.u32 %r2, %nctaid.x;
    mad.lo.s32 %r3, %r1, %r2, %r0;
    mov.u32 %r4, 0;
    again:
    setp.ge.u32 %p0, %r4, %r3;
    @%p0 bra done;
    add.s32 %r4, %r4, 1;
    bra again;
    done:
    mad.wide.u32 %d0, %r3, 4, %y;
    setp.eq.u32 %p1, %t, 0;
    @%p1 st.global.b32 [%d0], %r4;
    """
    ptx(body, grid=(30, 10, 1), y=y)
    assert y.tolist() == list(range(300))


def test_labels_in_two_blocks_may_have_the_same_name(ptx):
    """As in inline assembly."""
    loop = "{ .reg .pred more; again: add.s32 %r0, %r0, 1; setp.lt.u32 more, %r0, LIMIT; @more bra again; }"
    body = f"mov.u32 %r0, 0; {loop.replace('LIMIT', '5')} {loop.replace('LIMIT', '9')} mov.u32 %out, %r0;"
    assert ptx.each(body, LANES, out=np.uint32).tolist() == [9] * 32


def test_a_trap_is_an_error(ptx):
    body = "setp.eq.u32 %p0, %n, 1; @%p0 trap;"
    ptx(body, n=0)
    with pytest.raises(errors.Trap, match=r"example, PTX line \d+: @%p0 trap"):
        ptx(body, n=1)


def test_a_register_that_nothing_assigns_is_an_error(ptx):
    with pytest.raises(errors.UninitialisedRegister, match="%r0 is read"):
        ptx("add.s32 %r1, %r0, 1;")
    # it is enough that one path assigns the register
    ptx("setp.eq.u32 %p0, %t, 0; @%p0 bra skip; mov.u32 %r0, 1; skip: add.s32 %r1, %r0, 1;")


def test_a_register_that_one_path_does_not_assign_is_a_nan(ptx):
    body = "setp.lt.u32 %p0, %t, 2; @!%p0 bra skip; mov.b32 %r0, 0f3F800000; skip: mov.b32 %out, %r0;"
    got = ptx.each(body, LANES, out=np.float32)
    assert got[:2].tolist() == [1, 1]
    assert np.isnan(got[2:]).all()


def test_a_load_with_a_false_guard_keeps_the_register(ptx):
    x = np.array([7], np.uint32)
    y = np.zeros(32, np.uint32)
    body = """
    setp.eq.u32 %p0, %t, 0;
    mov.u32 %r0, 3;
    @%p0 ld.global.b32 %r0, [%x];
    mad.wide.u32 %d0, %t, 4, %y;
    st.global.b32 [%d0], %r0;
    """
    ptx(body, x=x, y=y)
    assert y.tolist() == [7] + [3] * 31


@pytest.mark.parametrize(
    ("text", "what"), [("st.local.b32 [%t], %t;", "st.local.b32"), ("add.sat.s32 %r0, %t, %t;", "add.sat.s32")]
)
def test_an_unknown_form_of_an_instruction_is_named(ptx, text, what):
    with pytest.raises(errors.UnknownInstruction, match=f"does not know {what}"):
        ptx(text)


def test_unknown_special_registers_are_named(ptx):
    with pytest.raises(errors.UnknownInstruction, match="%clock64"):
        ptx("mov.u64 %d0, %clock64;")


def test_a_program_has_whole_warps_and_at_most_1024_threads(ptx):
    ptx("mov.u32 %r0, 0;", threads=1024)
    for threads in (1056, 48):
        with pytest.raises(errors.LimitExceeded, match=f"wants {threads} threads"):
            ptx("mov.u32 %r0, 0;", threads=threads)


def test_a_launch_keeps_to_the_shared_memory_of_its_architecture():
    """Triton itself refuses such a launch; the emulator refuses one made without Triton."""
    pytest.importorskip("triton")
    from fastbert.emulator.launch import execute

    metadata = SimpleNamespace(target=SimpleNamespace(arch=80))
    launch = SimpleNamespace(name="large", shared=164 * 1024, compiled=SimpleNamespace(metadata=metadata))
    with pytest.raises(errors.LimitExceeded, match="large needs 167936 bytes of shared memory, sm_80 has 166912"):
        execute(launch)
