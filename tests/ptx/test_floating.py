"""Floating-point instructions: rounding, denormals, NaN, signed zeros and pairs, against values worked out by hand."""

import math

import numpy as np
import pytest

pytestmark = pytest.mark.once

INF, NAN = math.inf, math.nan
TINY = 2.0**-149  # the smallest denormal of float32
SMALL = 2.0**-126  # the smallest normal number
ONE_UP = 1 + 2.0**-23  # the float32 after 1

# opcode -> (operands, inputs of each thread as float32, results)
CASES = {
    # a sum halfway between two float32 goes to the even one
    "add.f32": (
        "%in0, %in1", [(1, 2.0**-24), (ONE_UP, 2.0**-24), (INF, -INF), (TINY, TINY)], [1, 1 + 2.0**-22, NAN, 2 * TINY],
    ),
    "sub.f32": ("%in0, %in1", [(1, ONE_UP), (0, 0.0)], [-(2.0**-23), 0]),
    "mul.f32": (
        "%in0, %in1", [(ONE_UP, ONE_UP), (3, -0.5), (SMALL, 0.5), (INF, 0)], [1 + 2.0**-22, -1.5, SMALL / 2, NAN],
    ),
    "mul.ftz.f32": ("%in0, %in1", [(SMALL, 0.5), (-SMALL, 0.5), (TINY, 2.0**127)], [0, -0.0, 0]),
    # one rounding: a product rounded alone would lose its last bit, and with it the whole result
    "fma.rn.f32": ("%in0, %in1, %in2", [(ONE_UP, ONE_UP, -1 - 2.0**-22), (2, 3, 4)], [2.0**-46, 10]),
    "fma.rn.ftz.f32": ("%in0, %in1, %in2", [(SMALL, 0.5, 0), (2, 3, -7), (TINY, 1, 0)], [0, -1, 0]),
    "div.full.f32": ("%in0, %in1", [(1, 4), (1, 0), (-1, 0), (0, 0)], [0.25, INF, -INF, NAN]),
    "div.rn.f32": ("%in0, %in1", [(1, 4), (1, 0), (-1, 0), (0, 0)], [0.25, INF, -INF, NAN]),
    "neg.f32": ("%in0", [(1,), (0,), (-INF,)], [-1, -0.0, INF]),
    "abs.f32": ("%in0", [(-1,), (-0.0,), (-TINY,)], [1, 0, TINY]),
    "abs.ftz.f32": ("%in0", [(-1,), (-TINY,)], [1, 0]),
    # of a number and a NaN, the number; -0 is the smaller zero
    "min.f32": (
        "%in0, %in1", [(1, 2), (NAN, 2), (1, NAN), (0, -0.0), (-0.0, 0), (NAN, NAN)], [1, 2, 1, -0.0, -0.0, NAN],
    ),
    "max.f32": ("%in0, %in1", [(1, 2), (NAN, 2), (1, NAN), (0, -0.0), (-0.0, 0), (NAN, NAN)], [2, 2, 1, 0, 0, NAN]),
    "min.NaN.f32": ("%in0, %in1", [(1, 2), (NAN, 2), (1, NAN), (0, -0.0), (-0.0, 0)], [1, NAN, NAN, -0.0, -0.0]),
    "max.NaN.f32": ("%in0, %in1", [(1, 2), (NAN, 2), (1, NAN), (0, -0.0), (-0.0, 0)], [2, NAN, NAN, 0, 0]),
    "sqrt.rn.f32": ("%in0", [(4,), (2,), (-1,), (-0.0,)], [2, float(np.float32(2**0.5)), NAN, -0.0]),
    "rsqrt.approx.ftz.f32": ("%in0", [(4,), (0.25,), (0,), (TINY,), (INF,), (-1,)], [0.5, 2, INF, INF, 0, NAN]),
    "rcp.approx.f32": ("%in0", [(4,), (0,), (-INF,)], [0.25, INF, -0.0]),
    "ex2.approx.f32": ("%in0", [(0,), (3,), (-INF,), (INF,), (-130,)], [1, 8, 0, INF, 2.0**-130]),
    "ex2.approx.ftz.f32": ("%in0", [(-1,), (-INF,), (-130,), (TINY,)], [0.5, 0, 0, 1]),
    "lg2.approx.f32": ("%in0", [(8,), (0,), (-1,)], [3, -INF, NAN]),
    "copysign.f32": ("%in0, %in1", [(-1, 3), (1, -3), (-0.0, 2)], [-3, 3, -2]),
}  # fmt: skip


# .rn is the default rounding; an instruction that names it is not fused
CASES |= {f"{name}.rn.f32": CASES[f"{name}.f32"] for name in ("add", "sub", "mul")}


def test_the_largest_and_the_least_of_three(ptx):
    """A form that sm_100 added."""
    columns = [np.array(c, np.float32) for c in ((1, 2, 3), (3, 1, NAN), (-1, -0.0, 0))]
    for opcode, expected in (("max.f32", [3, 2, 3]), ("min.f32", [-1, -0.0, 0])):
        got = ptx.each(f"{opcode} %out, %in0, %in1, %in2;", *columns, out=np.float32)
        assert_same(got, np.array(expected, np.float32))


@pytest.mark.parametrize("opcode", CASES)
def test_float32(ptx, opcode):
    operands, inputs, expected = CASES[opcode]
    columns = [np.array(c, np.float32) for c in zip(*inputs, strict=True)]
    got = ptx.each(f"{opcode} %out, {operands};", *columns, out=np.float32)
    assert_same(got, np.array(expected, np.float32))


def assert_same(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal to the bit, except that any NaN equals any other."""
    np.testing.assert_array_equal(got, expected)  # takes two NaN as equal, and 0 and -0
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(got[numbers]), np.signbit(expected[numbers]))


def bf16(*values: float) -> np.ndarray:
    """Bits of numbers that bfloat16 represents."""
    bits = np.array(values, np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


def f16(*values: float) -> np.ndarray:
    return np.array(values, np.float16).view(np.uint16)


def pairs(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(np.uint32) | (high.astype(np.uint32) << 16)


PACKED = {
    # 1 + 2^-8 is halfway between two bfloat16, and the even one is 1
    "add.bf16x2": (bf16, [(1, 2.0**-8, 1.0), (1 + 2.0**-7, 2.0**-8, 1 + 2.0**-6), (3, -3, 0)]),
    "mul.bf16x2": (bf16, [(1 + 2.0**-7, 1 + 2.0**-7, 1 + 2.0**-6), (-2, 3, -6)]),
    "max.bf16x2": (bf16, [(1, 2, 2), (-1, -2, -1)]),
    "add.f16x2": (f16, [(1, 2.0**-11, 1), (1 + 2.0**-10, 2.0**-11, 1 + 2.0**-9), (65504, 65504, INF)]),
    "min.f16x2": (f16, [(1, 2, 1), (-1, -2, -2)]),
}


@pytest.mark.parametrize("opcode", PACKED)
def test_pairs_of_16_bits(ptx, opcode):
    """Each half is computed by itself: the cases in order in the lower halves, in reverse order in the upper ones."""
    kind, rows = PACKED[opcode]
    a, b, c = (kind(*column) for column in zip(*rows, strict=True))
    got = ptx.each(f"{opcode} %out, %in0, %in1;", pairs(a, a[::-1]), pairs(b, b[::-1]), out=np.uint32)
    assert got.tolist() == pairs(c, c[::-1]).tolist()


@pytest.mark.instructions("fma.rn.bf16x2")
def test_packed_fma_rounds_once(ptx):
    # (1 + 2^-7)^2 - (1 + 2^-6) = 2^-14: rounded first, the product would leave nothing
    a, c = pairs(bf16(1 + 2.0**-7), bf16(2)), pairs(bf16(-1 - 2.0**-6), bf16(1))
    got = ptx.each("fma.rn.bf16x2 %out, %in0, %in0, %in1;", a, c, out=np.uint32)
    assert got.tolist() == pairs(bf16(2.0**-14), bf16(5)).tolist()


DOUBLES = {
    "add.f32x2": ("%d0, %d1", [5, -1.5]),
    "sub.f32x2": ("%d0, %d1", [-1, 2.5]),
    "mul.f32x2": ("%d0, %d1", [6, -1]),
    "add.rn.f32x2": ("%d0, %d1", [5, -1.5]),
    "sub.rn.f32x2": ("%d0, %d1", [-1, 2.5]),
    "mul.rn.f32x2": ("%d0, %d1", [6, -1]),
    "fma.rn.f32x2": ("%d0, %d1, %d0", [8, -0.5]),
}


@pytest.mark.parametrize("opcode", DOUBLES)
def test_pairs_of_float32(ptx, opcode):
    operands, expected = DOUBLES[opcode]
    out = np.zeros(2, np.float32)
    ptx(
        f"""
        mov.b64 %d0, {{0f40000000, 0f3F000000}};   // 2, 0.5
        mov.b64 %d1, {{0f40400000, 0fC0000000}};   // 3, -2
        {opcode} %d2, {operands};
        setp.eq.u32 %p0, %t, 0;
        @%p0 st.global.b64 [%out], %d2;
        """,
        out=out,
    )
    assert out.tolist() == expected


MIXED = {
    "add.rn.f32.bf16": ("%in0, %in2", bf16, 1 + 2.0**-20 + 3),
    "add.rn.f32.f16": ("%in0, %in2", f16, 1 + 2.0**-20 + 3),
    "fma.rn.f32.bf16": ("%in0, %in1, %in2", bf16, 3 * 0.5 + 1 + 2.0**-20),
    "fma.rn.f32.f16": ("%in0, %in1, %in2", f16, 3 * 0.5 + 1 + 2.0**-20),
}


@pytest.mark.parametrize("opcode", MIXED)
def test_sums_of_float32_and_16_bits(ptx, opcode):
    operands, kind, expected = MIXED[opcode]
    last = np.array([1 + 2.0**-20], np.float32)
    got = ptx.each(f"{opcode} %out, {operands};", kind(3), kind(0.5), last, out=np.float32)
    assert got.tolist() == [expected]


def test_approximations_lie_within_what_cards_promise(ptx):
    """PTX: ex2.approx is off by 2 units at most, rsqrt.approx by 2^-22.9 of the value."""
    x = np.linspace(-20, 20, 1024, dtype=np.float32)
    exact = 2.0 ** x.astype(np.float64)
    got = ptx.each("ex2.approx.f32 %out, %in0;", x, out=np.float32)
    assert (abs(got - exact) <= 2 * np.spacing(got)).all()
    y = np.geomspace(1e-20, 1e20, 1024, dtype=np.float32)
    exact = y.astype(np.float64) ** -0.5
    got = ptx.each("rsqrt.approx.ftz.f32 %out, %in0;", y, out=np.float32)
    assert (abs(got / exact - 1) <= 2.0**-22.9).all()
