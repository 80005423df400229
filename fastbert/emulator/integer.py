"""Integer and bit instructions. Sums and products wrap around. A shift by the width or more gives zeros or copies of
the sign, as in PTX. Division by zero, which PTX leaves undefined, gives all ones as on GPUs; the remainder is then the
dividend.
"""

from __future__ import annotations

import numpy as np

from .formats import SIGNED, i64, u32, u64
from .ptx import WIDTHS, Immediate, Instruction
from .translate import Emitter, available, refuse, translates

# ---- functions that translated code calls ------------------------------------------------------------------


@available
def shift_left(a, count):
    width = a.dtype.itemsize * 8
    return np.where(count < width, a << (count & u32(width - 1)).astype(a.dtype), a.dtype.type(0))


@available
def shift_right(a, count):
    """Zeros come in from the left; for signed `a` copies of its sign."""
    width = a.dtype.itemsize * 8
    if a.dtype.kind == "i":
        return a >> np.minimum(count, u32(width - 1)).astype(a.dtype)
    return np.where(count < width, a >> (count & u32(width - 1)).astype(a.dtype), a.dtype.type(0))


@available
def divide(a, b):
    """The quotient, rounded toward zero."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        return np.where(b == 0, ~a.dtype.type(0), a // safe)
    # exact: a - remainder is a multiple of b
    return np.where(b == 0, a.dtype.type(-1), (a - np.fmod(a, safe)) // safe)


@available
def remainder(a, b):
    """The remainder, with the sign of `a`."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    return np.where(b == 0, a, np.fmod(a, safe))


@available
def multiply_high(a, b):
    """The upper half of the product."""
    width = a.dtype.itemsize * 8
    if width < 64:
        wide = i64 if a.dtype.kind == "i" else u64
        return ((a.astype(wide) * b.astype(wide)) >> wide(width)).astype(a.dtype)
    low, half = u64(0xFFFFFFFF), u64(32)
    x, y = a.view(u64), b.view(u64)
    x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
    middle = x1 * y0 + ((x0 * y0) >> half)
    high = x1 * y1 + (middle >> half) + ((x0 * y1 + (middle & low)) >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, u64(0)) - np.where(b < 0, x, u64(0))
    return high.view(a.dtype)


@available
def extract_bits(a, position, length):
    """bfe: `length` bits of `a` from `position`, extended with zeros, or with the top bit of the field if signed."""
    width = a.dtype.itemsize * 8
    position, length = (position & u32(255)).astype(i64), (length & u32(255)).astype(i64)
    mask = _low_bits(length)
    bits = a.view(f"u{a.dtype.itemsize}").astype(u64)
    field = np.where(position < 64, bits >> (position & 63).astype(u64), u64(0)) & mask
    if a.dtype.kind == "i":
        top = np.minimum(position + length - 1, width - 1)
        negative = (length != 0) & ((bits >> np.maximum(top, 0).astype(u64)) & u64(1) != 0)
        # bits past the end of `a` repeat its sign
        in_word = np.maximum(np.minimum(length, width - position), 0)
        field = np.where(negative, field | ~_low_bits(np.where(position < width, in_word, 0)), field)
    return field.astype(f"u{a.dtype.itemsize}").view(a.dtype)


@available
def insert_bits(a, b, position, length):
    """bfi: `b` with `length` bits from `position` replaced by the lowest bits of `a`."""
    position, length = (position & u32(255)).astype(i64), (length & u32(255)).astype(i64)
    fits = position < 64
    shift = (position & 63).astype(u64)
    mask = np.where(fits, _low_bits(length) << shift, u64(0))
    value = np.where(fits, a.astype(u64) << shift, u64(0))
    return ((b.astype(u64) & ~mask) | (value & mask)).astype(b.dtype)


def _low_bits(count):
    return np.where(count < 64, (u64(1) << (count & 63).astype(u64)) - u64(1), ~u64(0))


@available
def permute_bytes(a, b, selector):
    """prmt: every nibble of `selector` picks one of eight bytes, or with its top bit set copies of that byte's sign."""
    both = a.astype(u64) | (b.astype(u64) << u64(32))
    selector = np.asarray(selector).astype(u64)
    result = u64(0)
    for n in range(4):
        nibble = (selector >> u64(4 * n)) & u64(15)
        byte = (both >> ((nibble & u64(7)) << u64(3))) & u64(255)
        byte = np.where(nibble & u64(8) != 0, np.where(byte & u64(128) != 0, u64(255), u64(0)), byte)
        result = result | (byte << u64(8 * n))
    return result.astype(u32)


def permute_bytes_by(a, b, selector: int):
    """prmt with a constant selector: a shift and a mask for each byte."""
    result = None
    for n in range(4):
        nibble = selector >> (4 * n) & 15
        source, at = (b if nibble & 4 else a), 8 * (nibble & 3)
        byte = (source >> u32(at)) & u32(255)
        if nibble & 8:
            byte = np.where(byte & u32(128) != 0, u32(255), u32(0))
        result = byte << u32(8 * n) if result is None else result | (byte << u32(8 * n))
    return result


# two 16-bit halves, the selectors that compilers write most
_HALVES = {
    0x5410: "({a} & u32(0xffff)) | ({b} << u32(16))",
    0x7632: "({a} >> u32(16)) | ({b} & u32(0xffff0000))",
    0x7610: "({a} & u32(0xffff)) | ({b} & u32(0xffff0000))",
    0x5432: "({a} >> u32(16)) | ({b} << u32(16))",
}
available(permute_bytes_by)


@available
def logic3(a, b, c, table: int):
    """lop3: bitwise, the entry of the table for the bits (a, b, c)."""
    result = u32(0)
    for n in range(8):
        if table >> n & 1:
            result = result | ((a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c))
    return result


@available
def funnel_left(low, high, count):
    """The upper word of high:low shifted left."""
    return (((low.astype(u64) | (high.astype(u64) << u64(32))) << count.astype(u64)) >> u64(32)).astype(u32)


@available
def funnel_right(low, high, count):
    """The lower word of high:low shifted right."""
    return ((low.astype(u64) | (high.astype(u64) << u64(32))) >> count.astype(u64)).astype(u32)


@available
def reverse_bits(a):
    for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0xFFFF)):
        a = ((a >> u32(shift)) & u32(mask)) | ((a & u32(mask)) << u32(shift))
    return a


@available
def leading_zeros(a):
    width = a.dtype.itemsize * 8
    count = np.full(np.shape(a), width, u32)
    for n in range(width):  # the highest bit that is set comes last
        count = np.where((a >> a.dtype.type(n)) & a.dtype.type(1) != 0, u32(width - 1 - n), count)
    return count


@available
def count_bits(a):
    return np.bitwise_count(a).astype(u32)


# ---- translators -------------------------------------------------------------------------------------------

_SIMPLE = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^"}


def integer(emit: Emitter, i: Instruction) -> None:
    """add, sub, mul, mad, div, rem, min, max, neg, abs of integers."""
    kind, parts, width = i.type, i.parts, WIDTHS[i.type]
    bits = f"b{width}"
    if {"sat", "cc"} & set(parts):
        refuse(i)
    operands = i.operands[1:]
    if i.name in ("mul", "mad"):
        _product(emit, i)
    elif i.name in ("add", "sub"):
        a, b = (emit.read(o, bits) for o in operands)
        emit.write(i.operands[0], f"{a} {_SIMPLE[i.name]} {b}")
    elif i.name == "neg":
        emit.write(i.operands[0], f"u{width}(0) - {emit.read(operands[0], bits)}")
    else:
        function = {"div": "divide", "rem": "remainder", "min": "np.minimum", "max": "np.maximum", "abs": "np.abs"}
        values = ", ".join(emit.read(o, kind) for o in operands)
        emit.write(i.operands[0], f"{function[i.name]}({values})", "s" if kind[0] == "s" else "b")


def _product(emit: Emitter, i: Instruction) -> None:
    kind, parts, width = i.type, i.parts, WIDTHS[i.type]
    signed = kind[0] == "s"
    added = ""
    if "wide" in parts:
        wide = f"{'i' if signed else 'u'}{2 * width}"
        a, b = (f"{emit.read(o, kind)}.astype({wide})" for o in i.operands[1:3])
        product = f"({a} * {b})" + (f".view(u{2 * width})" if signed else "")
        width *= 2
    elif "hi" in parts:
        a, b = (emit.read(o, kind) for o in i.operands[1:3])
        product = f"multiply_high({a}, {b})" + (f".view(u{width})" if signed else "")
    elif "lo" in parts:
        a, b = (emit.read(o, f"b{width}") for o in i.operands[1:3])
        product = f"{a} * {b}"
    else:
        refuse(i)
    if i.name == "mad":
        added = f" + {emit.read(i.operands[3], f'b{width}')}"
    emit.write(i.operands[0], product + added)


@translates("and", "or", "xor")
def _bitwise(emit: Emitter, i: Instruction) -> None:
    a, b = (emit.read(o, i.type) for o in i.operands[1:])
    emit.write(i.operands[0], f"{a} {_SIMPLE[i.name]} {b}")


@translates("not")
def _not(emit: Emitter, i: Instruction) -> None:
    emit.write(i.operands[0], f"~{emit.read(i.operands[1], i.type)}")


@translates("cnot")
def _cnot(emit: Emitter, i: Instruction) -> None:
    emit.write(i.operands[0], f"({emit.read(i.operands[1], i.type)} == 0).astype(u{WIDTHS[i.type]})")


@translates("shl", "shr")
def _shift(emit: Emitter, i: Instruction) -> None:
    kind, width = i.type, WIDTHS[i.type]
    signed = i.name == "shr" and kind[0] == "s"
    value = emit.read(i.operands[1], kind if signed else f"b{width}")
    count = i.operands[2]
    if isinstance(count, Immediate) and 0 <= count.value < width:
        by = emit.constant((SIGNED[width] if signed else np.dtype(f"u{width // 8}").type)(count.value))
        expression = f"{value} {'<<' if i.name == 'shl' else '>>'} {by}"
    else:
        expression = f"shift_{'left' if i.name == 'shl' else 'right'}({value}, {emit.read(count, 'u32')})"
    emit.write(i.operands[0], expression, "s" if signed else "b")


@translates("bfe")
def _bfe(emit: Emitter, i: Instruction) -> None:
    a, (at, length) = i.operands[1], i.operands[2:4]
    signed, width = i.type[0] == "s", WIDTHS[i.type]
    if isinstance(at, Immediate) and isinstance(length, Immediate) and 0 < length.value <= width - at.value:
        left, right = width - at.value - length.value, width - length.value
        if signed:
            shifted = f"({emit.read(a, i.type)} << i{width}({left})) >> i{width}({right})"
        else:
            shifted = f"({emit.read(a, i.type)} >> u{width}({at.value})) & u{width}({(1 << length.value) - 1})"
        emit.write(i.operands[0], shifted, "s" if signed else "b")
        return
    arguments = f"{emit.read(a, i.type)}, {emit.read(at, 'u32')}, {emit.read(length, 'u32')}"
    emit.write(i.operands[0], f"extract_bits({arguments})", "s" if signed else "b")


@translates("bfi")
def _bfi(emit: Emitter, i: Instruction) -> None:
    a, b = (emit.read(o, i.type) for o in i.operands[1:3])
    at, length = (emit.read(o, "u32") for o in i.operands[3:5])
    emit.write(i.operands[0], f"insert_bits({a}, {b}, {at}, {length})")


@translates("prmt")
def _prmt(emit: Emitter, i: Instruction) -> None:
    if i.parts[1:] != ["b32"]:
        refuse(i)
    a, b = (emit.read(o, "b32") for o in i.operands[1:3])
    selector = i.operands[3]
    if not isinstance(selector, Immediate):
        emit.write(i.operands[0], f"permute_bytes({a}, {b}, {emit.read(selector, 'b32')})")
    elif selector.value in _HALVES:
        emit.write(i.operands[0], _HALVES[selector.value].format(a=a, b=b))
    else:
        emit.write(i.operands[0], f"permute_bytes_by({a}, {b}, {selector.value})")


@translates("lop3")
def _lop3(emit: Emitter, i: Instruction) -> None:
    if i.parts[1:] != ["b32"]:
        refuse(i)
    a, b, c = (emit.read(o, "b32") for o in i.operands[1:4])
    emit.write(i.operands[0], f"logic3({a}, {b}, {c}, {i.operands[4].value})")


@translates("shf")
def _shf(emit: Emitter, i: Instruction) -> None:
    a, b, count = (emit.read(o, "b32") for o in i.operands[1:4])
    count = f"({count} & u32(31))" if "wrap" in i.parts else f"np.minimum({count}, u32(32))"
    emit.write(i.operands[0], f"funnel_{'left' if 'l' in i.parts else 'right'}({a}, {b}, {count})")


@translates("brev", "clz", "popc")
def _count(emit: Emitter, i: Instruction) -> None:
    if i.name == "brev" and i.type != "b32":
        refuse(i)
    function = {"brev": "reverse_bits", "clz": "leading_zeros", "popc": "count_bits"}[i.name]
    emit.write(i.operands[0], f"{function}({emit.read(i.operands[1], i.type)})")


for _translator in (_bitwise, _not, _cnot, _shift, _bfe, _bfi, _prmt, _lop3, _shf, _count):
    _translator.can_fail = False
