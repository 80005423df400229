"""The basic blocks of a program, the registers that each reads and writes, and those that are live after it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .errors import UninitialisedRegister
from .ptx import (
    BRANCHES,
    WIDTHS,
    Address,
    Immediate,
    Instruction,
    Not,
    Operand,
    Pair,
    Program,
    Register,
    TensorAddress,
    Vector,
)

# Instructions whose first operand is no destination.
_NO_DESTINATION = ("st", "red", "bar", "barrier", "cp", "stmatrix", "fence", "membar", "nanosleep", "griddepcontrol")


def waits(instruction: Instruction) -> bool:
    """Whether a thread may have to wait at this instruction. Such an instruction starts a block."""
    name, parts = instruction.name, instruction.parts
    if name in ("bar", "barrier"):
        return "warp" not in parts and "arrive" not in parts
    return name == "mbarrier" and parts[1] in ("try_wait", "test_wait")


def registers(operand: Operand) -> Iterator[Register]:
    """All registers of an operand."""
    match operand:
        case Register():
            yield operand
        case Address(base=inner) | Not(operand=inner):
            yield from registers(inner)
        case Vector(items=items):
            for item in items:
                yield from registers(item)
        case Pair(first=first, second=second):
            yield from registers(first)
            yield from registers(second)
        case TensorAddress(descriptor=descriptor, coordinates=coordinates):
            yield from registers(descriptor)
            for coordinate in coordinates:
                yield from registers(coordinate)


def destinations(instruction: Instruction) -> list[Register]:
    if not instruction.operands or instruction.name in (*_NO_DESTINATION, *BRANCHES):
        return []
    if isinstance(instruction.operands[0], Address) or instruction.opcode.startswith("tcgen05.dealloc"):
        return []
    return list(registers(instruction.operands[0]))


def sources(instruction: Instruction) -> list[Register]:
    """Registers that are read. A guarded instruction also reads its destination, since it may keep the old value."""
    skip = 1 if destinations(instruction) else 0
    if instruction.guard is not None or instruction.name == "wgmma":
        skip = 0
    found = [r for operand in instruction.operands[skip:] for r in registers(operand)]
    return found if instruction.guard is None else [instruction.guard[0], *found]


def smallest_access(program: Program, space: str) -> int:
    """Bytes of the smallest access to a state space ("shared" or "global"); 16 if there is no access."""
    sizes = [16]
    for i in program.instructions:
        spaces = [p.split("::")[0] for p in i.parts]
        if i.name in ("ld", "st", "atom", "red") and space in spaces:
            count = next((len(o.items) for o in i.operands if isinstance(o, Vector)), 1)
            sizes.append(WIDTHS[i.type] // 8 * count)
        elif i.opcode.startswith("cp.async.c") and space in spaces and "bulk" not in i.parts:
            sizes.append(next((o.value for o in i.operands if isinstance(o, Immediate)), 16))
        elif i.name == "mbarrier" and space == "shared":
            sizes.append(8)
    return min(sizes)


def stored_parameters(program: Program) -> set[int]:
    """Positions of the parameters from which addresses of stores to global memory are computed."""
    code = program.instructions
    origin = [0] * len(program.widths)  # of each register: positions of parameters, as bits
    flows = [(destinations(i), sources(i)) for i in code if i.name != "ld"]
    for i in code:
        if i.name == "ld" and "param" in i.parts:
            origin[i.operands[0].index] |= 1 << program.parameters[i.operands[1].base.name]
    changed = True
    while changed:
        changed = False
        for to, sources_ in flows:
            what = 0
            for register in sources_:
                what |= origin[register.index]
            for register in to:
                changed |= what & ~origin[register.index] != 0
                origin[register.index] |= what
    stored = 0
    for i in code:
        if i.name in ("st", "red", "atom") and "global" in i.parts:
            for register in registers(next(o for o in i.operands if isinstance(o, Address))):
                stored |= origin[register.index]
    return set(_bits(stored))


def expect_initialised(program: Program, blocks: dict[int, Block]) -> None:
    """Raises UninitialisedRegister if an instruction reads a register that no path to it assigns."""
    before = dict.fromkeys(blocks, 0)  # registers that some path to a block assigns, as bits
    todo = [0]
    seen = set()
    while todo:
        start = todo.pop()
        seen.add(start)
        assigned = before[start]
        for i in program.instructions[start : blocks[start].stop]:
            for register in destinations(i):
                assigned |= 1 << register.index
        for following in blocks[start].successors:
            joined = before[following] | assigned
            if joined != before[following] or following not in seen:
                before[following] = joined
                todo.append(following)
    for start in seen:
        assigned = before[start]
        for i in program.instructions[start : blocks[start].stop]:
            written = destinations(i)
            # Not counted as reads: the kept value of a guarded instruction, and an accumulator that starts at zero.
            # Compilers also fill a wide register by halves of which they need only one.
            kept = written if i.guard is not None or i.name == "wgmma" else []
            packs = i.name == "mov" and isinstance(i.operands[1], Vector)
            for register in [] if packs else sources(i):
                if not assigned >> register.index & 1 and register not in kept:
                    fault = UninitialisedRegister(f"{register.name} is read, and nothing has assigned it")
                    raise fault.at(program.name, i.line, i.text)
            for register in written:
                assigned |= 1 << register.index


@dataclass(frozen=True)
class Block:
    start: int  # index of the first instruction
    stop: int  # one past the last
    successors: tuple[int, ...]  # starts of the blocks that can come next
    live_out: frozenset[int]  # registers that some later block reads


def blocks_of(program: Program) -> dict[int, Block]:
    """Start -> block. A block ends at a branch and after a wait for the matrix unit, and starts at a wait."""
    code = program.instructions
    heads = {0} | {i.target for i in code if i.target is not None}
    for index, instruction in enumerate(code):
        if instruction.name in BRANCHES or instruction.opcode.startswith("wgmma.wait_group"):
            heads.add(index + 1)
        if waits(instruction):
            heads.add(index)
    ordered = sorted(h for h in heads if h < len(code))
    spans = dict(zip(ordered, [*ordered[1:], len(code)], strict=True))
    successors = {start: _successors(code, stop) for start, stop in spans.items()}
    live = _live_out(code, spans, successors)
    return {start: Block(start, stop, successors[start], live[start]) for start, stop in spans.items()}


def _successors(code: list[Instruction], stop: int) -> tuple[int, ...]:
    last = code[stop - 1]
    goes_on = (stop,) if stop < len(code) and (last.name not in BRANCHES or last.guard is not None) else ()
    return goes_on if last.target is None or last.target >= len(code) else (last.target, *goes_on)


def _live_out(
    code: list[Instruction], spans: dict[int, int], successors: dict[int, tuple[int, ...]]
) -> dict[int, frozenset[int]]:
    """The usual backward analysis; sets of registers are the bits of a number."""
    reads, writes = {}, {}
    for start, stop in spans.items():
        read = written = 0
        for instruction in code[start:stop]:
            for register in sources(instruction):
                read |= (1 << register.index) & ~written
            if instruction.guard is None:
                for register in destinations(instruction):
                    written |= 1 << register.index
        reads[start], writes[start] = read, written
    live_in, live_out = dict.fromkeys(spans, 0), dict.fromkeys(spans, 0)
    changed = True
    while changed:
        changed = False
        for start in reversed(spans):
            out = 0
            for following in successors[start]:
                out |= live_in[following]
            live_out[start] = out
            before, live_in[start] = live_in[start], reads[start] | (out & ~writes[start])
            changed |= before != live_in[start]
    return {start: frozenset(_bits(out)) for start, out in live_out.items()}


def _bits(number: int) -> Iterator[int]:
    while number:
        low = number & -number
        yield low.bit_length() - 1
        number ^= low
