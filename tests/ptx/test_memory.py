"""Loads and stores: every access is checked against its own tensor."""

import numpy as np
import pytest

from fastbert.emulator import errors

pytestmark = pytest.mark.once


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


def test_threads_with_a_false_guard_may_point_anywhere(ptx):
    x = np.zeros(16, np.uint32)
    body = "mad.wide.u32 %d0, %t, 4, %x; setp.lt.u32 %p0, %t, 16; @%p0 st.global.b32 [%d0], %t;"
    ptx(body, x=x)
    assert x.tolist() == list(range(16))
    with pytest.raises(errors.OutOfBounds):
        ptx(body.replace("@%p0 ", ""), x=x)


def test_a_vector_access_is_aligned_to_its_whole_size(ptx):
    x = np.zeros(8, np.uint32)
    assert x.ctypes.data % 16 == 0
    ptx("ld.global.v2.b32 {%r0, %r1}, [%x + 8];", x=x)
    with pytest.raises(errors.Misaligned, match="16 bytes at an address of x that is no multiple of 16"):
        ptx("ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%x + 8];", x=x)


def test_an_unknown_instruction_is_named(ptx):
    with pytest.raises(errors.UnknownInstruction, match=r"does not know frobnicate\.b32 \(example, PTX line \d+"):
        ptx("frobnicate.b32 %r0, %t;")


LOADS = [
    f"ld.{space}.{vector}b{width}"
    # Triton 3.8 writes "shared::cta" for "shared", with the same meaning
    for space in ("global", "shared", "shared::cta")
    for vector, width in (
        ("", 8), ("", 16), ("", 32), ("", 64), ("v2.", 8), ("v4.", 8), ("v2.", 16), ("v4.", 16), ("v2.", 32),
        ("v4.", 32), ("v2.", 64),
    )
]  # fmt: skip
STORES = [load.replace("ld.", "st.") for load in LOADS]


@pytest.mark.parametrize(("load", "store"), zip(LOADS, STORES, strict=True), ids=LOADS)
def test_every_width_loads_and_stores_its_bytes_in_order(ptx, load, store):
    """Each of 32 threads copies its bytes from x to y; for a shared space, through shared memory."""
    _, space, *vector, kind = load.split(".")
    width, count = int(kind[1:]), int(vector[0][1:]) if vector else 1
    size = width // 8 * count
    register = {8: "%h", 16: "%h", 32: "%r", 64: "%d"}[width]
    names = [f"{register}{n + 4}" for n in range(count)]
    values = f"{{{', '.join(names)}}}" if vector else names[0]
    address = f"mul.lo.s32 %r0, %t, {size}; cvt.u64.u32 %d0, %r0; add.s64 %d1, %d0, %x; add.s64 %d2, %d0, %y;"
    plain = ".".join(["global", *vector, kind])
    x = np.arange(32 * size, dtype=np.uint8)
    y = np.zeros_like(x)
    if space == "global":
        ptx(f"{address} {load} {values}, [%d1]; {store} [%d2], {values};", x=x, y=y)
    else:
        through = f"{store} [%r0], {values}; {load} {values}, [%r0];"
        ptx(f"{address} ld.{plain} {values}, [%d1]; {through} st.{plain} [%d2], {values};", shared=32 * size, x=x, y=y)
    assert y.tolist() == x.tolist()


def test_a_narrow_load_fills_a_wide_register(ptx):
    x, y = np.full(4, 0x80, np.uint8), np.zeros(2, np.uint32)
    ptx(
        """
        ld.global.s8 %r0, [%x]; ld.global.u8 %r1, [%x];
        setp.eq.u32 %p0, %t, 0;
        @%p0 st.global.v2.b32 [%y], {%r0, %r1};
        """,
        x=x, y=y,
    )  # fmt: skip
    assert y.tolist() == [0xFFFFFF80, 0x80]


@pytest.mark.instructions("ld.param.b32", "ld.param.b64", "ld.param.s32", "cvta.param.u64")
def test_parameters(ptx):
    y = np.zeros(3, np.uint64)
    ptx(
        """
        ld.param.s32 %d0, [p_n]; ld.param.b32 %r0, [p_n]; cvt.u64.u32 %d1, %r0;
        ld.param.b64 %d2, [p_y];
        mov.b64 %d3, p_n; cvta.param.u64 %d4, %d3; sub.s64 %d5, %d4, %d3;
        setp.eq.u32 %p0, %t, 0;
        @%p0 st.global.v2.b64 [%d2], {%d0, %d1};
        @%p0 st.global.b64 [%d2 + 16], %d5;
        """,
        y=y, n=-2,
    )  # fmt: skip
    assert y.tolist() == [2**64 - 2, 2**32 - 2, 0]


def test_shared_memory_ends_where_the_launch_says(ptx):
    body = "mul.lo.s32 %r0, %t, 4; st.shared.b32 [%r0], %t;"
    ptx(body, shared=128)
    with pytest.raises(errors.OutOfBounds, match="thread 31: 4 bytes at byte 124 of shared memory, which has 124"):
        ptx(body, shared=124)
    with pytest.raises(errors.Misaligned, match="shared memory"):
        ptx("mul.lo.s32 %r0, %t, 4; st.shared.b64 [%r0], %x;", shared=256, x=np.zeros(1, np.uint32))


def test_variables_in_shared_memory_lie_one_after_the_other(ptx):
    y = np.zeros(1, np.uint32)
    ptx(
        """
        .shared .align 4 .b8 first[6]; .shared .align 8 .b32 second;
        mov.u32 %r0, first; mov.u32 %r1, second; sub.s32 %r2, %r1, %r0;
        setp.eq.u32 %p0, %t, 0;
        @%p0 st.global.b32 [%y], %r2;
        """,
        y=y,
    )
    assert y.tolist() == [8]


ATOMICS = {
    # operation -> the result of 32 threads with the numbers 1 to 32, starting from 5
    "add.u32": 5 + 528, "min.u32": 1, "max.u32": 32, "exch.b32": 32, "or.b32": 63, "and.b32": 0,
    "xor.b32": 5 ^ 32,  # 1 to 31 cancel out
    "add.f32": None,
}  # fmt: skip


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("operation", ATOMICS)
def test_atomic_operations(ptx, space, operation):
    y = np.array([5], np.uint32)
    value, expected = "%r1", ATOMICS[operation]
    if operation == "add.f32":
        y, value = np.array([5], np.float32), "0f3F000000"
        expected = 5 + 32 * 0.5
    target = "%y" if space == "global" else "0"
    if space == "shared":
        target = "%r9"
    body = f"""
    add.s32 %r1, %t, 1; mov.u32 %r9, 0;
    setp.eq.u32 %p0, %t, 0;
    ld.global.b32 %r2, [%y];
    @%p0 st.shared.b32 [0], %r2;
    bar.sync 0;
    red.{space}.{operation} [{target}], {value};
    bar.sync 0;
    ld.shared.b32 %r3, [0];
    """
    if space == "shared":
        body += "@%p0 st.global.b32 [%y], %r3;"
    ptx(body.replace("[0]", "[%r9]"), shared=16, y=y)
    assert y.tolist() == [expected]


def test_compare_and_swap_returns_the_old_value(ptx):
    y, out = np.array([7], np.uint32), np.zeros(32, np.uint32)
    body = """
    add.s32 %r0, %t, 7;               // thread 0 finds 7 and leaves 8, thread 1 finds 8 and leaves 9, and so on
    add.s32 %r1, %t, 8;
    atom.global.cas.b32 %r2, [%y], %r0, %r1;
    mad.wide.u32 %d0, %t, 4, %out;
    st.global.b32 [%d0], %r2;
    """
    ptx(body, y=y, out=out)
    assert y.tolist() == [39]
    assert out.tolist() == list(range(7, 39))
