"""Integer and bit instructions, each against numbers worked out by hand."""

import numpy as np
import pytest

pytestmark = pytest.mark.once

TOP = 0x80000000

# opcode -> (operands, the inputs of each thread, what it must get). Inputs and results are bits.
CASES = {
    "add.s32": ("%in0, %in1", [(1, 2), (0x7FFFFFFF, 1), (0xFFFFFFFF, 1)], [3, TOP, 0]),
    "add.s64": ("%in0, %in1", [(0xFFFFFFFF, 1), (2**64 - 1, 2)], [0x100000000, 1]),
    "sub.s32": ("%in0, %in1", [(1, 2), (TOP, 1)], [0xFFFFFFFF, 0x7FFFFFFF]),
    "sub.s64": ("%in0, %in1", [(0, 1), (0x100000000, 1)], [2**64 - 1, 0xFFFFFFFF]),
    "mul.lo.s32": ("%in0, %in1", [(7, 6), (0x10000, 0x10000), (0xFFFFFFFF, 5)], [42, 0, 0xFFFFFFFB]),
    "mul.lo.s64": ("%in0, %in1", [(2**33, 2**30), (2**33, 2**31)], [2**63, 0]),
    "mul.hi.u32": ("%in0, %in1", [(0xFFFFFFFF, 0xFFFFFFFF), (TOP, 2)], [0xFFFFFFFE, 1]),
    "mul.hi.s32": ("%in0, %in1", [(0xFFFFFFFF, 0xFFFFFFFF), (TOP, 2)], [0, 0xFFFFFFFF]),
    "mul.hi.u64": ("%in0, %in1", [(2**64 - 1, 2**64 - 1), (2**63, 6)], [2**64 - 2, 3]),
    "mul.hi.s64": ("%in0, %in1", [(2**64 - 1, 2**64 - 1), (2**63, 6)], [0, 2**64 - 3]),
    "mad.lo.s32": ("%in0, %in1, %in2", [(7, 6, 8), (0x10000, 0x10000, 9)], [50, 9]),
    "mad.lo.s64": ("%in0, %in1, %in2", [(2**33, 2**31, 5), (3, 4, 2**64 - 1)], [5, 11]),
    "div.s32": ("%in0, %in1", [(7, 2), (-7, 2), (7, -2), (-7, -2), (5, 0)], [3, -3, -3, 3, -1]),
    "rem.s32": ("%in0, %in1", [(7, 2), (-7, 2), (7, -2), (-8, 3), (5, 0)], [1, -1, 1, -2, 5]),
    "div.u32": ("%in0, %in1", [(0xFFFFFFFF, 2), (5, 0)], [0x7FFFFFFF, 0xFFFFFFFF]),
    "rem.u32": ("%in0, %in1", [(0xFFFFFFFF, 16), (5, 0)], [15, 5]),
    "min.s32": ("%in0, %in1", [(1, 2), (-1, 1)], [1, -1]),
    "min.u32": ("%in0, %in1", [(1, 2), (-1, 1)], [1, 1]),
    "max.s32": ("%in0, %in1", [(1, 2), (-1, 1)], [2, 1]),
    "max.s64": ("%in0, %in1", [(1, 2), (-1, 1)], [2, 1]),
    "max.u32": ("%in0, %in1", [(1, 2), (-1, 1)], [2, -1]),
    "neg.s32": ("%in0", [(5,), (TOP,)], [-5, TOP]),
    "neg.s64": ("%in0", [(5,), (2**63,)], [-5, 2**63]),
    "abs.s32": ("%in0", [(-5,), (5,), (TOP,)], [5, 5, TOP]),
    "and.b16": ("%in0, %in1", [(0xFF0F, 0x0FFF)], [0x0F0F]),
    "and.b32": ("%in0, %in1", [(0xFF00FF00, 0x0FF00FF0)], [0x0F000F00]),
    "and.b64": ("%in0, %in1", [(2**63 + 3, 2**63 + 5)], [2**63 + 1]),
    "or.b16": ("%in0, %in1", [(0xF000, 0x000F)], [0xF00F]),
    "or.b32": ("%in0, %in1", [(0xF0000000, 0x0000000F)], [0xF000000F]),
    "or.b64": ("%in0, %in1", [(2**63, 1)], [2**63 + 1]),
    "xor.b32": ("%in0, %in1", [(0xFF00FF00, 0xFFFFFFFF)], [0x00FF00FF]),
    "xor.b64": ("%in0, %in1", [(2**63 + 1, 3)], [2**63 + 2]),
    "not.b32": ("%in0", [(0xFF00FF00,)], [0x00FF00FF]),
    # a shift by the width or more: zeros, or copies of the sign
    "shl.b16": ("%in0, %c1", [(0x8001, 1), (1, 15), (1, 16)], [2, 0x8000, 0]),
    "shl.b32": ("%in0, %in1", [(1, 31), (3, 31), (1, 32), (1, 0xFFFFFFFF)], [TOP, TOP, 0, 0]),
    "shl.b64": ("%in0, %c1", [(1, 63), (1, 64), (5, 32)], [2**63, 0, 5 * 2**32]),
    "shr.u16": ("%in0, %c1", [(0x8000, 15), (0x8000, 16)], [1, 0]),
    "shr.u32": ("%in0, %in1", [(TOP, 31), (TOP, 32), (0xF0, 4)], [1, 0, 0xF]),
    "shr.s32": ("%in0, %in1", [(-8, 1), (-8, 31), (-8, 32), (8, 99)], [-4, -1, -1, 0]),
    "shr.u64": ("%in0, %c1", [(2**63, 63), (2**63, 64)], [1, 0]),
    "shr.s64": ("%in0, %c1", [(-(2**40), 39), (-1, 64), (7, 64)], [-2, -1, 0]),
    # four bits from bit 4; a field past the end; an empty field; the field's top bit is its sign
    "bfe.u32": ("%in0, %in1, %in2", [(0xABCD, 4, 4), (0xFF, 4, 32), (0xFF, 0, 0), (5, 32, 4)], [0xC, 0xF, 0, 0]),
    "bfe.s32": (
        "%in0, %in1, %in2",
        [(0xABCD, 4, 4), (0x70, 4, 4), (0xFF, 0, 0), (TOP, 28, 8), (-1, 40, 4), (1, 40, 4)],
        [0xFFFFFFFC, 7, 0, 0xFFFFFFF8, -1, 0],
    ),
    "bfi.b32": (
        "%in0, %in1, %in2, %in3",
        [(0xF, 0, 8, 4), (0, 0xFFFFFFFF, 0, 16), (0xAB, 0x12345678, 32, 8)],
        [0xF00, 0xFFFF0000, 0x12345678],
    ),
    # a nibble selects each byte from b:a; with bit 3 of the nibble set, copies of that byte's sign
    "prmt.b32": (
        "%in0, %in1, %in2",
        [(0x33221100, 0x77665544, 0x7654), (0x33221100, 0x77665544, 0x5410), (0x00008000, 0, 0x8889)],
        [0x77665544, 0x55441100, 0x000000FF],
    ),
    "lop3.b32": (
        "%in0, %in1, %in2, 0xE8",  # the majority of three bits
        [(0b1100, 0b1010, 0b1001)],
        [0b1000],
    ),
    "shf.l.wrap.b32": ("%in0, %in1, %in2", [(TOP, 1, 1), (0xAAAAAAAA, 7, 32)], [3, 7]),
    "shf.r.clamp.b32": ("%in0, %in1, %in2", [(2, 1, 1), (5, 9, 40)], [0x80000001, 9]),
    "brev.b32": ("%in0", [(1,), (0x0000FFFF,)], [TOP, 0xFFFF0000]),
    "clz.b32": ("%in0", [(0,), (1,), (TOP,), (0x00800000,)], [32, 31, 0, 8]),
    "popc.b32": ("%in0", [(0,), (0xFFFFFFFF,), (0x80000001,)], [0, 32, 2]),
}
WIDE = {
    "mul.wide.s32": [((-1, 2), -2), ((0x7FFFFFFF, 4), 0x1FFFFFFFC)],
    "mul.wide.u32": [((-1, 2), 0x1FFFFFFFE), ((0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFE00000001)],
    "mad.wide.s32": [((-1, 2, 5), 3), ((1, 1, 2**64 - 1), 0)],
    "mad.wide.u32": [((-1, 2, 5), 0x200000003), ((1, 1, 2**63), 2**63 + 1)],
}


def _bits(values, width: int) -> np.ndarray:
    return np.array([int(v) & ((1 << width) - 1) for v in values], f"u{width // 8}")


@pytest.mark.parametrize("opcode", CASES)
def test_results(ptx, opcode):
    operands, inputs, expected = CASES[opcode]
    width = int(opcode[-2:])
    columns = list(zip(*inputs, strict=True))
    # %c: a 32-bit count, beside values of another width
    widths = [32 if f"%c{n}" in operands else width for n in range(len(columns))]
    result_width = 32 if opcode[:4] in ("clz.", "popc") else width
    got = ptx.each(
        f"{opcode} %out, {operands.replace('%c', '%in')};",
        *(_bits(column, w) for column, w in zip(columns, widths, strict=True)),
        out=f"u{result_width // 8}",
    )
    assert got.tolist() == _bits(expected, result_width).tolist()


@pytest.mark.parametrize("opcode", WIDE)
def test_products_of_twice_the_width(ptx, opcode):
    inputs, expected = zip(*WIDE[opcode], strict=True)
    columns = list(zip(*inputs, strict=True))
    arrays = [_bits(column, 64 if n == 2 else 32) for n, column in enumerate(columns)]
    operands = ", ".join(f"%in{n}" for n in range(len(columns)))
    got = ptx.each(f"{opcode} %out, {operands};", *arrays, out=np.uint64)
    assert got.tolist() == _bits(expected, 64).tolist()


@pytest.mark.parametrize("opcode", ["shl.b32", "shr.u32", "shr.s32", "bfe.u32", "bfe.s32", "prmt.b32"])
def test_a_count_in_the_text_is_the_same_as_one_in_a_register(ptx, opcode):
    """The two are translated differently, since constants cost less."""
    operands, inputs, expected = CASES[opcode]
    for values, result in zip(inputs, expected, strict=True):
        known = 2 if opcode == "prmt.b32" else 1
        text = operands
        for n in range(known, len(values)):
            text = text.replace(f"%in{n}", str(values[n]))
        arrays = [_bits([values[n]], 32) for n in range(known)]
        got = ptx.each(f"{opcode} %out, {text};", *arrays, out=np.uint32)
        assert got.tolist() == _bits([result], 32).tolist(), values


@pytest.mark.parametrize("selector", [0x5410, 0x7632, 0x7610, 0x5432, 0x3210, 0x0123, 0x9999])
def test_byte_permutations_that_are_known(ptx, selector):
    a, b = 0x83828180, 0x07060504
    bytes_ = [0x80, 0x81, 0x82, 0x83, 4, 5, 6, 7]
    expected = 0
    for n in range(4):
        nibble = selector >> 4 * n & 15
        byte = bytes_[nibble & 7]
        expected |= (byte if nibble < 8 else 0xFF * (byte >> 7)) << 8 * n
    got = ptx.each(f"prmt.b32 %out, %in0, %in1, {selector};", _bits([a], 32), _bits([b], 32), out=np.uint32)
    assert got[0] == expected
