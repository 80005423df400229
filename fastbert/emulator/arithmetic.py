"""add, mul, fma and similar instructions, which exist for integers, floats and packed pairs: the type decides."""

from __future__ import annotations

from .floating import floating, mixed, packed
from .integer import integer
from .ptx import Instruction
from .translate import Emitter, refuse, translates


@translates("add", "sub", "mul", "mad", "fma", "div", "rem", "min", "max", "neg", "abs")
def _arithmetic(emit: Emitter, i: Instruction) -> None:
    kind = i.type
    if kind is None:
        refuse(i)
    if kind in ("f16x2", "bf16x2", "f32x2"):
        packed(emit, i)
    elif len(i.types) == 2:
        mixed(emit, i)
    elif kind in ("f16", "bf16", "f32", "f64"):
        floating(emit, i)
    elif kind[0] in "su":
        integer(emit, i)
    else:
        refuse(i)


_arithmetic.can_fail = False
