"""mov and cvt: between registers, and between number formats."""

from __future__ import annotations

import numpy as np

from .formats import f32, f64, u32
from .ptx import WIDTHS, Instruction, Vector
from .translate import Emitter, available, refuse, translates

_TO_INTEGER = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


@available
def to_integer(x, kind, how: str):
    """Float to a numpy integer type, clamped to what it holds; a NaN becomes 0."""
    limits = np.iinfo(kind)
    whole = np.nan_to_num(_TO_INTEGER[how](x.astype(f64)), nan=0.0, posinf=np.inf, neginf=-np.inf)
    inside = np.where(whole >= float(limits.max), 0.0, np.maximum(whole, float(limits.min)))
    return np.where(whole >= float(limits.max), kind(limits.max), inside.astype(kind))


@available
def to_whole(x, how: str):
    """Float to a whole number in the same format."""
    return _TO_INTEGER[how](x)


@available
def round_toward(x, dropped: int, how: str):
    """float32 with its `dropped` lowest bits off, toward zero (rz), down (rm) or up (rp)."""
    bits = x.view(u32)
    mask = u32((1 << dropped) - 1)
    away = {"rz": np.False_, "rm": np.signbit(x), "rp": ~np.signbit(x)}[how] & ((bits & mask) != 0)
    return np.where(np.isfinite(x), (bits & ~mask) + np.where(away, mask + u32(1), u32(0)), bits).view(f32)


@available
def clip_integer(x, kind):
    """An integer, clamped to what another type holds."""
    limits = np.iinfo(kind)
    own = np.iinfo(x.dtype)
    return np.clip(x, x.dtype.type(max(limits.min, own.min)), x.dtype.type(min(limits.max, own.max))).astype(kind)


def _is_float(kind: str) -> bool:
    return kind[0] == "f" or kind in ("bf16", "bf16x2")


@translates("cvt")
def _cvt(emit: Emitter, i: Instruction) -> None:
    if len(i.types) != 2 or "pack" in i.parts:
        refuse(i)
    to, source = i.types
    parts = set(i.parts)
    if to.endswith("x2"):
        _pair(emit, i, to, source)
    elif _is_float(to) and _is_float(source):
        _float_to_float(emit, i, to, source)
    elif _is_float(source):
        _float_to_integer(emit, i, to, source)
    elif _is_float(to):
        if parts & {"rz", "rm", "rp", "sat"}:
            refuse(i)
        value = emit.read(i.operands[1], source)
        if to in ("f16", "bf16"):
            emit.write(i.operands[0], f"to_{to}({value}.astype(f32))")
        else:
            emit.write(i.operands[0], f"{value}.astype(f{WIDTHS[to]})", "f")
    else:
        _integer_to_integer(emit, i, to, source)


def _pair(emit: Emitter, i: Instruction, to: str, source: str) -> None:
    """The first source becomes the upper half."""
    how = {"rn", "rz"} & set(i.parts)
    if source != "f32" or len(i.operands) != 3 or len(how) != 1:
        refuse(i)
    high, low = (emit.read(o, "f32") for o in i.operands[1:])
    if "relu" in i.parts:
        high, low = f"np.maximum({high}, f32(0))", f"np.maximum({low}, f32(0))"
    if how == {"rz"}:
        if to != "bf16x2":
            refuse(i)
        high, low = f"round_toward({high}, 16, 'rz')", f"round_toward({low}, 16, 'rz')"
    emit.write(i.operands[0], f"pack_{to[:-2]}({low}, {high})")


def _float_to_float(emit: Emitter, i: Instruction, to: str, source: str) -> None:
    parts = set(i.parts)
    value = emit.read(i.operands[1], source)
    if "ftz" in parts and source == "f32":
        value = f"flush({value})"
    whole = next((p for p in i.parts if p in _TO_INTEGER), None)
    toward = next((p for p in i.parts if p in ("rz", "rm", "rp")), None)
    if whole:
        value = f"to_whole({value}, {whole!r})"
    if toward:
        if (to, source) != ("bf16", "f32"):
            refuse(i)
        value = f"round_toward({value}, 16, {toward!r})"
    if "relu" in parts:
        value = f"np.maximum({value}, f32(0))"
    if "sat" in parts:
        value = f"np.clip(np.nan_to_num({value}, nan=0.0), f32(0), f32(1))"
    if to in ("f16", "bf16"):
        emit.write(i.operands[0], f"to_{to}({value})" if source != "f64" else f"to_{to}({value}.astype(f32))")
    elif WIDTHS[to] == WIDTHS[source]:
        emit.write(i.operands[0], value, "f")
    else:
        emit.write(i.operands[0], value if source in ("f16", "bf16") and to == "f32" else f"{value}.astype({to})", "f")


def _float_to_integer(emit: Emitter, i: Instruction, to: str, source: str) -> None:
    how = next((p for p in i.parts if p in _TO_INTEGER), None)
    if how is None:
        refuse(i)
    width, value = WIDTHS[to], emit.read(i.operands[1], source)
    if "ftz" in i.parts:
        value = f"flush({value})"
    signed = to[0] == "s"
    result = f"to_integer({value}, {'i' if signed else 'u'}{width}, {how!r})"
    bits = f"{result}.view(u{width})" if signed else result
    emit.write(i.operands[0], emit.resize(bits, width, i.operands[0], signed))


def _integer_to_integer(emit: Emitter, i: Instruction, to: str, source: str) -> None:
    width, value = WIDTHS[to], emit.read(i.operands[1], source)
    signed = to[0] == "s"
    if "sat" in i.parts:
        value = f"clip_integer({value}, {'i' if signed else 'u'}{width})" + (f".view(u{width})" if signed else "")
    elif WIDTHS[source] < width or source[0] == "s":
        # the sign of the source decides what comes in from the left
        value = f"{value}.astype({'i' if source[0] == 's' else 'u'}{width})"
        value = f"{value}.view(u{width})" if source[0] == "s" else value
    elif WIDTHS[source] > width:
        value = f"{value}.astype(u{width})"
    emit.write(i.operands[0], emit.resize(value, width, i.operands[0], signed))


@translates("mov")
def _mov(emit: Emitter, i: Instruction) -> None:
    target, source = i.operands
    width = WIDTHS[i.type]
    if isinstance(source, Vector):
        part = width // len(source.items)
        pieces = [f"{emit.read(x, f'b{part}')}.astype(u{width})" for x in source.items]
        shifted = [p if n == 0 else f"({p} << u{width}({n * part}))" for n, p in enumerate(pieces)]
        emit.write(target, " | ".join(shifted))
    elif isinstance(target, Vector):
        part = width // len(target.items)
        whole = emit.read(source, f"b{width}")
        for n, item in enumerate(target.items):
            emit.write(
                item, f"{whole}.astype(u{part})" if n == 0 else f"({whole} >> u{width}({n * part})).astype(u{part})"
            )
    else:
        emit.write(target, emit.read(source, i.type if i.type == "pred" else f"b{width}"))


@translates("cvta")
def _cvta(emit: Emitter, i: Instruction) -> None:
    emit.write(i.operands[0], emit.read(i.operands[1], "b64"))


for _translator in (_cvt, _mov, _cvta):
    _translator.can_fail = False
