"""Loads and stores: every access is held against its own tensor."""

import numpy as np
import pytest

from fastbert.emulator import errors


def test_each_thread_adds_two_numbers(ptx):
    a, b = np.arange(32, dtype=np.uint32), np.full(32, 5, np.uint32)
    result = ptx.each("add.s32 %out, %in0, %in1;", a, b, out=np.uint32)
    assert result.tolist() == [n + 5 for n in range(32)]


def test_an_access_past_its_tensor_is_an_error_though_another_tensor_lies_there(ptx):
    both = np.zeros(64, np.uint32)
    body = "mad.wide.u32 %d0, %t, 4, %x; ld.global.b32 %r0, [%d0 + OFFSET];"
    ptx(body.replace("OFFSET", "0"), x=both[:32], y=both[32:])
    with pytest.raises(errors.OutOfBounds, match=r"4 bytes at byte 128 of x, which has 128 .*ld\.global\.b32"):
        ptx(body.replace("OFFSET", "4"), x=both[:32], y=both[32:])


def test_an_access_before_its_tensor_is_an_error(ptx):
    both = np.zeros(64, np.uint32)
    with pytest.raises(errors.OutOfBounds, match="at byte -4 of x"):
        ptx("st.global.b32 [%x + -4], %t;", x=both[32:])


def test_threads_that_do_not_run_may_point_anywhere(ptx):
    x = np.zeros(16, np.uint32)
    body = "mad.wide.u32 %d0, %t, 4, %x; setp.lt.u32 %p0, %t, 16; @%p0 st.global.b32 [%d0], %t;"
    ptx(body, x=x)
    assert x.tolist() == list(range(16))
    with pytest.raises(errors.OutOfBounds):
        ptx(body.replace("@%p0 ", ""), x=x)


def test_a_vector_access_is_aligned_to_all_of_it(ptx):
    x = np.zeros(8, np.uint32)
    assert x.ctypes.data % 16 == 0
    ptx("ld.global.v2.b32 {%r0, %r1}, [%x + 8];", x=x)
    with pytest.raises(errors.Misaligned, match="16 bytes at an address of x that is no multiple of 16"):
        ptx("ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%x + 8];", x=x)


def test_what_the_emulator_does_not_know_is_named(ptx):
    with pytest.raises(errors.UnknownInstruction, match=r"does not know frobnicate\.b32 \(example, PTX line \d+"):
        ptx("frobnicate.b32 %r0, %t;")
