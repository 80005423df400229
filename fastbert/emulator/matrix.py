"""The matrix unit of a warp: ldmatrix, stmatrix, mma.sync.

Products of 16-bit numbers are exact; their sum over the instruction's k and the accumulator is taken in float64 and
rounded once to float32. A GPU sums in its own order with fewer bits, so its results differ in the last bits.

Fragments (g = lane / 4, t = lane % 4): the four 16-bit-pair registers of A hold rows g, g + 8, g, g + 8 and columns
2t.., 2t.., 2t + 8.., 2t + 8..; those of B hold column g and rows 2t.., 2t + 8..; D holds row g columns 2t, 2t + 1, and
the same of row g + 8. So the registers of a lane, side by side, are a part of a row of A or a column of B, in one order
of k for both, and a sum over k needs no other.
"""

from __future__ import annotations

import numpy as np

from .formats import f32, f64, u16, u32
from .ptx import Instruction, Vector
from .state import State
from .translate import Emitter, available, refuse, translates
from .warp import expect_whole_warps


def halves_to_f32(bits: np.ndarray, kind: str) -> np.ndarray:
    """uint16 bits -> float32 values."""
    if kind == "bf16":
        return (bits.astype(u32) << u32(16)).view(f32)
    return bits.view(np.float16).astype(f32)


def _elements(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """Registers of all lanes, [programs, threads] each, as rows: [warps, 8, 4 lanes * elements of the registers]."""
    values = halves_to_f32(np.stack(registers, -1).view(u16), kind).astype(f64)
    return values.reshape(-1, 8, 4 * values.shape[-1])


@available
def fragment_a(S: State, registers: list, kind: str) -> np.ndarray:
    """[2, warps, 8, k]: rows g, and rows g + 8."""
    r = [S.full(x) for x in registers]
    return np.stack([_elements(r[0::2], kind), _elements(r[1::2], kind)])


@available
def fragment_b(S: State, registers: list, kind: str) -> np.ndarray:
    """[warps, k, 8]."""
    return _elements([S.full(x) for x in registers], kind).transpose(0, 2, 1)


@available
def multiply(S: State, a: np.ndarray, b: np.ndarray, c: list) -> list[np.ndarray]:
    """D = A B + C of every warp; the four registers of D as bits."""
    product = np.matmul(a, b).reshape(2, *S.shape, 2)
    return [(product[n >> 1, :, :, n & 1] + c[n].view(f32)).astype(f32).view(u32) for n in range(4)]


@translates("mma")
def _mma(emit: Emitter, i: Instruction) -> None:
    kind = i.parts[-2]
    if kind not in ("f16", "bf16") or i.opcode != f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32":
        refuse(i)
    fragments = [[emit.read(r, "b32") for r in o.items] for o in i.operands[1:]]
    if emit.mask != "None":
        emit.line(f"expect_whole_warps(S, {emit.mask}, 'mma')")
    names = []
    for operand, registers in zip("ab", fragments[:2], strict=True):
        key = f"fragment_{operand}(S, [{', '.join(registers)}], {kind!r})"
        names.append(emit.once(key))
    got = emit.new(f"multiply(S, {names[0]}, {names[1]}, [{', '.join(fragments[2])}])", "got")
    for n, register in enumerate(i.operands[0].items):
        emit.write(register, f"{got}[{n}]")


# ---- between shared memory and fragments -------------------------------------------------------------------

_ROW, _COLUMN = np.arange(32) >> 2, (np.arange(32) & 3) * 2


def _row_places(S: State, address, count: int, mask, what: str) -> np.ndarray:
    """[programs, warps, 8 * count] places of the rows of `count` 8x8 matrices, 16 bytes each; lane l gives row l."""
    expect_whole_warps(S, mask, what)
    lanes = np.zeros(S.shape, bool).reshape(S.count, S.warps, 32)
    lanes[..., : 8 * count] = True
    lanes = lanes.reshape(S.shape)
    place = S.shared.locate(S, address, 16, lanes if mask is None else lanes & mask)
    return place.reshape(S.count, S.warps, 32)[..., : 8 * count]


def _rows_of(S: State, mask, count: int):
    """The mask for places [programs, rows]."""
    return None if mask is None else S.by_warp(mask)[..., : 8 * count].reshape(S.count, -1)


@available
def load_matrices(S: State, address, count: int, transposed: bool, mask) -> list[np.ndarray]:
    """ldmatrix: a register a matrix; lane l gets elements (l / 4, 2 (l % 4) + {0, 1}), of the transpose if asked."""
    place = _row_places(S, address, count, mask, "ldmatrix")
    shadow = S.shared.shadow
    shadow.read(place.reshape(S.count, -1), 16, _rows_of(S, mask, count), shadow.rows_of_warps[count])
    rows = S.shared.view(128).take(place // 16).view(u16).reshape(S.count, S.warps, count, 8, 8)
    if transposed:
        rows = np.ascontiguousarray(rows.swapaxes(-1, -2))
    words = rows.view(u32).reshape(S.count, S.warps, count, 32)
    return [np.ascontiguousarray(words[:, :, n]).reshape(S.shape) for n in range(count)]


@available
def store_matrices(S: State, address, registers: list, transposed: bool, mask) -> None:
    count = len(registers)
    place = _row_places(S, address, count, mask, "stmatrix")
    S.shared.shadow.write(
        place.reshape(S.count, -1), 16, _rows_of(S, mask, count), S.shared.shadow.rows_of_warps[count]
    )
    words = np.stack([S.by_warp(r) for r in registers], 2)
    rows = np.ascontiguousarray(words).view(u16).reshape(S.count, S.warps, count, 8, 8)
    if transposed:
        rows = rows.swapaxes(-1, -2)
    rows = np.ascontiguousarray(rows).view(np.complex128).reshape(S.count, S.warps, 8 * count)
    here = slice(None) if mask is None else S.by_warp(mask)[..., : 8 * count]
    S.shared.view(128)[place[here] // 16] = rows[here]


@translates("ldmatrix", "stmatrix")
def _matrices(emit: Emitter, i: Instruction) -> None:
    if "m8n8" not in i.parts or i.type != "b16":
        refuse(i)
    transposed = "trans" in i.parts
    loads = i.name == "ldmatrix"
    target, memory = i.operands if loads else i.operands[::-1]
    registers = target.items if isinstance(target, Vector) else (target,)
    where = emit.address(memory, 32)
    if loads:
        got = emit.new(f"load_matrices(S, {where}, {len(registers)}, {transposed}, {emit.mask})", "got")
        for n, register in enumerate(registers):
            emit.write(register, f"{got}[{n}]")
    else:
        values = ", ".join(emit.read(r, "b32") for r in registers)
        emit.line(f"store_matrices(S, {where}, [{values}], {transposed}, {emit.mask})")
