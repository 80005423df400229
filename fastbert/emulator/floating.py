"""Floating-point instructions, for single numbers and packed pairs.

add, sub and mul round once, as in IEEE 754. fma rounds the float64 sum of the exact product: if that sum is inexact and
next to a tie of float32 (about one case in 2^29), the result is off by one unit. The approximate functions (ex2, lg2,
rsqrt, rcp, sqrt, tanh, div.full, div.approx) are the CPU's, which are closer to the true value than a GPU's.
"""

from __future__ import annotations

import functools

import numpy as np

from .formats import f32, f64
from .ptx import WIDTHS, Instruction, Pair
from .translate import Emitter, available, refuse, translates


@available
def fused(a, b, c):
    """float32 a * b + c, rounded once (see above)."""
    return (a.astype(f64) * b + c).astype(f32) if a.dtype == f32 else a * b + c


def _lesser_zero(a, b, otherwise):
    """For equal numbers, which differ at most as -0 and +0, the one with a sign."""
    return np.where(a == b, np.where(np.signbit(a), a, b), otherwise)


@available
def minimum(a, b):
    """The minimum; if one of the two is a NaN, the other one. -0 is less than +0."""
    return _lesser_zero(a, b, np.fmin(a, b))


@available
def maximum(a, b):
    return -minimum(-a, -b)


@available
def minimum_nan(a, b):
    """The minimum; NaN if one of the two is a NaN."""
    return _lesser_zero(a, b, np.minimum(a, b))


@available
def maximum_nan(a, b):
    return -minimum_nan(-a, -b)


@available
def reciprocal(x):
    return x.dtype.type(1) / x


@available
def reciprocal_root(x):
    return x.dtype.type(1) / np.sqrt(x)


_OPERATORS = {"add": "{} + {}", "sub": "{} - {}", "mul": "{} * {}", "div": "{} / {}", "neg": "-{}", "abs": "np.abs({})"}
_APPROXIMATE = {
    "ex2": "np.exp2({})", "lg2": "np.log2({})", "rcp": "reciprocal({})", "rsqrt": "reciprocal_root({})",
    "sqrt": "np.sqrt({})", "sin": "np.sin({})", "cos": "np.cos({})", "tanh": "np.tanh({})",
}  # fmt: skip
_ROUNDINGS = {"rz", "rm", "rp"}


def _formula(i: Instruction, values: list[str]) -> str:
    if i.name in _OPERATORS:
        return _OPERATORS[i.name].format(*values)
    if i.name in ("fma", "mad"):
        return f"fused({', '.join(values)})"
    if i.name in ("min", "max"):
        of_two = f"{i.name}imum{'_nan' if 'NaN' in i.parts else ''}({{}}, {{}})"
        return functools.reduce(of_two.format, values)  # two or three values
    return _APPROXIMATE[i.name].format(*values)


def floating(emit: Emitter, i: Instruction) -> None:
    """Arithmetic of f32, f64, f16 and bf16."""
    kind, parts = i.type, set(i.parts)
    if parts & (_ROUNDINGS | {"xorsign"}):
        refuse(i)
    values = [emit.read(o, kind) for o in i.operands[1:]]
    flushes = "ftz" in parts and kind == "f32"
    if flushes:
        values = [f"flush({v})" for v in values]
    result = _formula(i, values)
    if kind == "f16":  # numpy's own float16 would round twice
        emit.write(i.operands[0], f"to_f16({result})")
    elif kind == "bf16":
        emit.write(i.operands[0], f"to_bf16({result})")
    else:
        result = f"flush({result})" if flushes else result
        result = f"np.clip(np.nan_to_num({result}, nan=0.0), f32(0), f32(1))" if "sat" in parts else result
        emit.write(i.operands[0], result, "f")


def mixed(emit: Emitter, i: Instruction) -> None:
    """add, sub and fma of float32 whose first operands are f16 or bf16: `add.f32.bf16 d, a, c` with c float32."""
    if i.types not in (["f32", "f16"], ["f32", "bf16"]) or i.name not in ("add", "sub", "fma"):
        refuse(i)
    if set(i.parts) & (_ROUNDINGS | {"sat"}):
        refuse(i)
    *narrow, last = i.operands[1:]
    values = [*(emit.read(o, i.type) for o in narrow), emit.read(last, "f32")]
    emit.write(i.operands[0], _formula(i, values), "f")


def packed(emit: Emitter, i: Instruction) -> None:
    """Arithmetic on both halves of a register: f16x2, bf16x2 and f32x2."""
    kind = i.type[:-2]
    if set(i.parts) & (_ROUNDINGS | {"xorsign", "sat", "relu"}):
        refuse(i)
    low, high = (_formula(i, [emit.half(o, which, kind) for o in i.operands[1:]]) for which in ("low", "high"))
    if "ftz" in i.parts and kind == "f32":
        low, high = f"flush({low})", f"flush({high})"
    emit.write(i.operands[0], f"pack_{kind}({low}, {high})")


@translates(*_APPROXIMATE)
def _approximate(emit: Emitter, i: Instruction) -> None:
    packed(emit, i) if i.type in ("f16x2", "bf16x2") else floating(emit, i)


@translates("copysign")
def _copysign(emit: Emitter, i: Instruction) -> None:
    sign, value = (emit.read(o, i.type) for o in i.operands[1:3])
    emit.write(i.operands[0], f"np.copysign({value}, {sign})", "f")


# ---- comparisons -------------------------------------------------------------------------------------------

_COMPARE = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip
_COMBINE = {"and": "&", "or": "|", "xor": "^"}


def _compared(how: str, a: str, b: str, is_float: bool) -> str:
    """A comparison as an expression. For floats a comparison with NaN is false, or true if its name ends in u
    ("unordered")."""
    if how in ("num", "nan"):
        return f"{'~' if how == 'num' else ''}(np.isnan({a}) | np.isnan({b}))"
    if is_float and len(how) == 3 and how[2] == "u":
        return f"(({a} {_COMPARE[how[:2]]} {b}) | np.isnan({a}) | np.isnan({b}))"
    if is_float and how == "ne":
        return f"(({a} < {b}) | ({a} > {b}))"
    return f"({a} {_COMPARE[how]} {b})"


@translates("setp")
def _setp(emit: Emitter, i: Instruction) -> None:
    kind, how = i.type, i.parts[1]
    combine = next((p for p in i.parts[2:] if p in _COMBINE), None)
    target = i.operands[0]
    if kind in ("f16x2", "bf16x2"):
        if not isinstance(target, Pair) or combine:
            refuse(i)
        for which, destination in (("low", target.first), ("high", target.second)):
            a, b = (emit.half(o, which, kind[:-2]) for o in i.operands[1:3])
            emit.write(destination, _compared(how, a, b, True))
        return
    if isinstance(target, Pair):
        refuse(i)
    a, b = (emit.read(o, kind) for o in i.operands[1:3])
    if "ftz" in i.parts and kind == "f32":
        a, b = f"flush({a})", f"flush({b})"
    result = _compared(how, a, b, kind[0] == "f" or kind == "bf16")
    if combine:
        result = f"{result} {_COMBINE[combine]} {emit.read(i.operands[3], 'pred')}"
    emit.write(target, result)


@translates("selp")
def _selp(emit: Emitter, i: Instruction) -> None:
    bits = f"b{WIDTHS[i.type]}"
    a, b = (emit.read(o, bits) for o in i.operands[1:3])
    emit.write(i.operands[0], f"where({emit.read(i.operands[3], 'pred')}, {a}, {b})")


for _translator in (_approximate, _copysign, _setp, _selp):
    _translator.can_fail = False
