"""mov, cvt and comparisons against values worked out by hand."""

import math

import numpy as np
import pytest

pytestmark = pytest.mark.once

INF, NAN = math.inf, math.nan
U = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
F = {16: np.float16, 32: np.float32, 64: np.float64}


def bits(values, kind: str) -> np.ndarray:
    """Numbers as the bits of a type: "f32", "s8", "b16" and so on."""
    width = int(kind[1:])
    if kind[0] == "f":
        return np.array(values, F[width]).view(U[width])
    return np.array([int(v) & ((1 << width) - 1) for v in values], U[width])


# opcode -> (type of the input, inputs, type of the result, results)
CONVERSIONS = {
    # bfloat16 keeps 8 bits: 1 + 2^-8 and 1 + 3 * 2^-8 are ties, which go to the even number
    "cvt.rn.bf16.f32": (
        "f32", [1, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, -INF, NAN, 3.4e38, 2.0**-133, -0.0],
        "b16", [0x3F80, 0x3F80, 0x3F82, 0x3F81, 0xFF80, 0x7FFF, 0x7F80, 0x0001, 0x8000],
    ),
    "cvt.rz.bf16.f32": (
        "f32", [1 + 3 * 2.0**-8, -1 - 3 * 2.0**-8, 3.4e38, INF], "b16", [0x3F81, 0xBF81, 0x7F7F, 0x7F80],
    ),
    "cvt.rm.bf16.f32": ("f32", [1 + 2.0**-8, -1 - 2.0**-8], "b16", [0x3F80, 0xBF81]),
    "cvt.rp.bf16.f32": ("f32", [1 + 2.0**-8, -1 - 2.0**-8, 3.4e38], "b16", [0x3F81, 0xBF80, 0x7F80]),
    "cvt.rn.f16.f32": (
        "f32", [1, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 65519, 65520, NAN, 2.0**-24, 2.0**-25],
        "b16", [0x3C00, 0x3C00, 0x3C02, 0x7BFF, 0x7C00, 0x7FFF, 0x0001, 0x0000],
    ),
    "cvt.f32.bf16": ("b16", [0x3F80, 0x0001, 0xFF80, 0x8000], "f32", [1, 2.0**-133, -INF, -0.0]),
    "cvt.f32.f16": ("b16", [0x3C00, 0x0001, 0xFC00, 0x7BFF], "f32", [1, 2.0**-24, -INF, 65504]),
    # 2^24 + 1 is the first number that float32 lacks
    "cvt.rn.f32.s32": ("s32", [-5, 2**24 + 1, 2**24 + 3, -(2**31)], "f32", [-5, 2**24, 2**24 + 4, -(2.0**31)]),
    "cvt.rn.f32.u32": ("u32", [5, 2**32 - 1], "f32", [5, 2.0**32]),
    "cvt.rn.f32.u64": ("u64", [5, 2**64 - 1, 2**40 + 1], "f32", [5, 2.0**64, 2.0**40]),
    "cvt.rzi.s32.f32": ("f32", [1.9, -1.9, 3e9, -3e9, NAN, INF], "s32", [1, -1, 2**31 - 1, -(2**31), 0, 2**31 - 1]),
    "cvt.rni.s32.f32": ("f32", [0.5, 1.5, 2.5, -0.5, -1.5], "s32", [0, 2, 2, 0, -2]),
    "cvt.rmi.s32.f32": ("f32", [1.9, -1.1], "s32", [1, -2]),
    "cvt.rpi.s32.f32": ("f32", [1.1, -1.9], "s32", [2, -1]),
    "cvt.rzi.u32.f32": ("f32", [-1, 5e9, 7.9], "u32", [0, 2**32 - 1, 7]),
    "cvt.rni.f32.f32": ("f32", [0.5, 1.5, -2.5], "f32", [0, 2, -2]),
    "cvt.rmi.f32.f32": ("f32", [1.5, -1.5], "f32", [1, -2]),
    "cvt.sat.f32.f32": ("f32", [0.25, -3, 7, NAN], "f32", [0.25, 0, 1, 0]),
    "cvt.f64.f32": ("f32", [0.5, -INF], "f64", [0.5, -INF]),
    "cvt.rn.f32.f64": ("f64", [1 + 2.0**-24, 1 + 3 * 2.0**-24, 1e300], "f32", [1, 1 + 2.0**-22, INF]),
    "cvt.s64.s32": ("s32", [-1, 5], "s64", [-1, 5]),
    "cvt.u64.u32": ("u32", [0xFFFFFFFF], "u64", [0xFFFFFFFF]),
    "cvt.u64.u16": ("u16", [0xFFFF], "u64", [0xFFFF]),
    "cvt.u32.u64": ("u64", [0x1FFFFFFFF], "u32", [0xFFFFFFFF]),
    "cvt.u32.u16": ("u16", [0x8000], "u32", [0x8000]),
    "cvt.s32.s16": ("s16", [-2], "s32", [-2]),
    "cvt.u16.u32": ("u32", [0x12345678], "u16", [0x5678]),
    # the lower byte of a 16-bit register, with its sign
    "cvt.s16.s8": ("s16", [0x12FF, 0x7F, 0x80], "s16", [-1, 127, -128]),
    "cvt.sat.s8.s32": ("s32", [300, -300, 5], "s16", [127, -128, 5]),
    "cvt.sat.u8.s32": ("s32", [300, -300, 5], "u16", [255, 0, 5]),
}  # fmt: skip


@pytest.mark.parametrize("opcode", CONVERSIONS)
def test_conversions(ptx, opcode):
    source, inputs, to, expected = CONVERSIONS[opcode]
    got = ptx.each(f"{opcode} %out, %in0;", bits(inputs, source), out=U[int(to[1:])])
    assert got.tolist() == bits(expected, to).tolist()


PAIRS = {
    # the first operand becomes the upper half
    "cvt.rn.bf16x2.f32": (1 + 3 * 2.0**-8, -2, 0x3F82C000),
    "cvt.rz.bf16x2.f32": (1 + 3 * 2.0**-8, -2, 0x3F81C000),
    "cvt.rn.relu.bf16x2.f32": (1, -2, 0x3F800000),
    "cvt.rn.f16x2.f32": (1 + 3 * 2.0**-11, -2, 0x3C02C000),
}


@pytest.mark.parametrize("opcode", PAIRS)
def test_two_numbers_into_a_word(ptx, opcode):
    high, low, expected = PAIRS[opcode]
    got = ptx.each(f"{opcode} %out, %in0, %in1;", bits([high], "f32"), bits([low], "f32"), out=np.uint32)
    assert hex(got[0]) == hex(expected)


MOVES = {
    "mov.b16": (np.uint16, "mov.b16 %out, 0xBEEF;", 0xBEEF),
    "mov.u16": (np.uint16, "mov.u16 %out, 7;", 7),
    "mov.b32": (np.uint32, "mov.b32 %out, 0f3F800000;", 0x3F800000),
    "mov.u32": (np.uint32, "mov.u32 %out, -1;", 0xFFFFFFFF),
    "mov.b64": (np.uint64, "mov.b64 %out, 0x123456789ABCDEF0;", 0x123456789ABCDEF0),
    "mov.u64": (np.uint64, "mov.u64 %out, -2;", 2**64 - 2),
    "mov.pred": (np.uint32, "mov.pred %p0, -1; mov.pred %p1, %p0; mov.pred %p2, 0; or.pred %p3, %p1, %p2; "
                            "selp.b32 %out, 3, 4, %p3;", 3),
    "not.pred": (np.uint32, "mov.pred %p0, 0; not.pred %p1, %p0; selp.b32 %out, 3, 4, %p1;", 3),
    "and.pred": (np.uint32, "mov.pred %p0, -1; mov.pred %p1, 0; and.pred %p2, %p0, %p1; selp.b32 %out, 3, 4, %p2;", 4),
    "or.pred": (np.uint32, "mov.pred %p0, -1; mov.pred %p1, 0; or.pred %p2, %p0, %p1; selp.b32 %out, 3, 4, %p2;", 3),
    "selp.b16": (np.uint16, "mov.pred %p0, 0; selp.b16 %out, 3, 4, %p0;", 4),
    "selp.b32": (np.uint32, "mov.pred %p0, 0; selp.b32 %out, 3, 4, !%p0;", 3),
    "selp.f32": (np.uint32, "mov.pred %p0, 0; selp.f32 %out, 0f3F800000, 0f40000000, %p0;", 0x40000000),
}  # fmt: skip


@pytest.mark.parametrize("opcode", MOVES)
def test_moves(ptx, opcode):
    kind, body, expected = MOVES[opcode]
    assert ptx.each(body, np.zeros(1, np.uint32), out=kind).tolist() == [expected]


def test_words_are_taken_apart_and_put_together_from_the_low_end(ptx):
    body = """
    mov.b32 {%h0, %h1}, %in0;
    mov.b32 %r0, {%h1, %h0};
    mov.b64 %d0, {%r0, %in0};
    mov.b64 {_, %r1}, %d0;
    mov.b64 {%h4, %h5, %h6, %h7}, %d0;
    mov.b64 %out, {%h5, %h4, %h6, %h7};
    """
    got = ptx.each(body, np.array([0x11112222], np.uint32), out=np.uint64)
    assert hex(got[0]) == "0x1111222211112222"


# operator -> results of (1, 2), (2, 2), (NaN, 2), (-1, 2)
COMPARISONS = {
    "eq": (0, 1, 0, 0), "ne": (1, 0, 0, 1), "lt": (1, 0, 0, 1), "le": (1, 1, 0, 1), "gt": (0, 0, 0, 0),
    "ge": (0, 1, 0, 0), "equ": (0, 1, 1, 0), "neu": (1, 0, 1, 1), "ltu": (1, 0, 1, 1), "leu": (1, 1, 1, 1),
    "gtu": (0, 0, 1, 0), "geu": (0, 1, 1, 0), "num": (1, 1, 0, 1), "nan": (0, 0, 1, 0),
}  # fmt: skip
FLOAT_COMPARISONS = [f"setp.{how}.f32" for how in COMPARISONS]
# an unsigned comparison takes -1 for the largest number
INTEGER_COMPARISONS = [
    f"setp.{how}.{kind}"
    for how in ("eq", "ne", "lt", "le", "gt", "ge")
    for kind in ("s32", "u32", "s64", "u64", "b16", "b32", "b64")
    if how in ("eq", "ne") or kind[0] != "b"
]


@pytest.mark.parametrize("opcode", FLOAT_COMPARISONS)
def test_float_comparisons(ptx, opcode):
    a, b = np.array([1, 2, NAN, -1], np.float32), np.full(4, 2, np.float32)
    got = ptx.each(f"{opcode} %p0, %in0, %in1; selp.b32 %out, 1, 0, %p0;", a, b, out=np.uint32)
    assert tuple(got) == COMPARISONS[opcode.split(".")[1]]


@pytest.mark.parametrize("opcode", INTEGER_COMPARISONS)
def test_integer_comparisons(ptx, opcode):
    _, how, kind = opcode.split(".")
    a, b = (bits(values, "u" + kind[1:]) for values in ([1, 2, 3, -1], [2, 2, 2, 2]))
    got = ptx.each(f"{opcode} %p0, %in0, %in1; selp.b32 %out, 1, 0, %p0;", a, b, out=np.uint32)
    less, greater = (1, 0, 0, int(kind[0] == "s")), (0, 0, 1, int(kind[0] == "u"))
    equal = (0, 1, 0, 0)
    expected = {
        "eq": equal, "ne": tuple(1 - e for e in equal), "lt": less, "le": tuple(map(max, less, equal)), "gt": greater,
        "ge": tuple(map(max, greater, equal)),
    }[how]  # fmt: skip
    assert tuple(got) == expected


@pytest.mark.instructions("setp.lt.bf16")
def test_bfloat16_is_compared(ptx):
    a, b = (bits(values, "u16") for values in ([0x3F80, 0x4000, 0x7FFF, 0xBF80], [0x4000] * 4))  # 1, 2, NaN, -1; 2
    body = "setp.lt.bf16 %p0, %in0, %in1; selp.b32 %out, 1, 0, %p0;"
    assert tuple(ptx.each(body, a, b, out=np.uint32)) == COMPARISONS["lt"]


def test_a_comparison_joined_with_a_predicate(ptx):
    body = "setp.eq.u32 %p0, %in0, 1; setp.lt.and.u32 %p1, %in0, 2, %p0; selp.b32 %out, 1, 0, %p1;"
    assert ptx.each(body, np.arange(4, dtype=np.uint32), out=np.uint32).tolist() == [0, 1, 0, 0]


@pytest.mark.instructions("setp.lt.bf16x2")
def test_pairs_are_compared_half_by_half(ptx):
    body = (
        "setp.lt.bf16x2 %p0|%p1, %in0, %in1; selp.b32 %r0, 1, 0, %p0; selp.b32 %r1, 2, 0, %p1; or.b32 %out, %r0, %r1;"
    )
    one, two, nan = 0x3F80, 0x4000, 0x7FFF
    a = np.array([one | two << 16, two | one << 16, one | nan << 16], np.uint32)
    b = np.full(3, two | two << 16, np.uint32)
    assert ptx.each(body, a, b, out=np.uint32).tolist() == [1, 2, 1]
