"""Reads machine code: instructions, loops, and the instruction mix of a loop.

The input is NVIDIA SASS in the form of `nvdisasm -c`, or AMD assembly in LLVM's form. Both become a flat list of
instructions and a table of labels. Loops are the natural loops of the control-flow graph, so a wait that was moved out
of line and jumps back does not count as a loop.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

# The kind of an instruction; the first pattern that matches its opcode counts.
SASS_KINDS = {
    "matrix": r"(HGMMA|QGMMA|IGMMA|BGMMA|HMMA|IMMA|DMMA|QMMA|OMMA|UTC[A-Z]*MMA)\b",
    "copy": r"(UTMALDG|UTMASTG|UTMAREDG|UBLKCP|UBLKRED|LDGSTS)\b",
    "exp2": r"MUFU\.EX2",
    "special": r"MUFU",
    "shared": r"(LDS|STS|LDSM|STSM|ATOMS)\b",
    "tensor_memory": r"(LDTM|STTM|LDT|STT|UTCCP)\b",
    "spill": r"(LDL|STL)\b",
    "global": r"(LDG|STG|LD|ST|RED|REDG|ATOM|ATOMG)\b",
    "float": r"(F(ADD|MUL|FMA|MNMX|SEL|SET|CHK|SWZADD)|H(ADD|MUL|FMA|MNMX|SET)2?|F2F|F2I|I2F|FRND|DADD|DMUL|DFMA)",
    "control": r"(BRA|BSSY|BSYNC|BREAK|EXIT|CALL|RET|WARPSYNC|BAR|NOP|DEPBAR|SYNCS|WARPGROUP|NANOSLEEP|YIELD|"
    r"LDGDEPBAR|MEMBAR|FENCE|ELECT|ERRBAR|CCTL|UTMACMDFLUSH|UTMACCTL|UTCBAR|BPT)",
    "integer": r".",
}
AMD_KINDS = {
    "matrix": r"v_s?mfmac?_",
    "copy": r"(global|buffer)_load_lds_",
    "exp2": r"v_exp_f",
    "special": r"v_(rcp|rsq|sqrt|log|sin|cos)_",
    "shared": r"ds_",
    "spill": r"scratch_",
    "global": r"(global|buffer|flat)_(load|store|atomic)",
    "float": r"v_(pk_)?(add|sub|mul|fma|fmac|mac|max3?|min3?|med3|cvt|div|cmp_\w+|ldexp|pk)\w*_(f|bf)(16|32|64)",
    "control": r"s_(branch|cbranch|waitcnt|barrier|nop|endpgm|sleep|sched)",
    "integer": r".",
}
KINDS = tuple(SASS_KINDS)


@dataclass(frozen=True)
class Instruction:
    opcode: str  # "HGMMA.64x64x16.F32.BF16"
    operands: str
    predicated: bool
    kind: str


@dataclass(frozen=True)
class Code:
    instructions: list[Instruction]
    labels: dict[str, int]  # label -> index of the instruction after it

    def count(self, pattern: str) -> int:
        """The number of instructions whose opcode begins with the pattern."""
        return sum(re.match(pattern, i.opcode) is not None for i in self.instructions)

    def of_kind(self, kind: str) -> list[Instruction]:
        return [i for i in self.instructions if i.kind == kind]


def _kind(opcode: str, kinds: dict[str, str]) -> str:
    return next(kind for kind, pattern in kinds.items() if re.match(pattern, opcode))


def parse_sass(text: str) -> Code:
    """The code of the first kernel in the output of `nvdisasm -c`."""
    instructions, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"(\.L[\w.]+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:(@!?\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", line):
            predicate, opcode, operands = found.groups()
            instructions.append(Instruction(opcode, operands, predicate is not None, _kind(opcode, SASS_KINDS)))
    return Code(instructions, labels)


def parse_amd(text: str) -> Code:
    """The code of the kernel in LLVM's AMD assembly."""
    instructions, labels = [], {}
    for line in text.splitlines():
        line = line.split(";", 1)[0]
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+([a-z]+_\w+)\s*(.*)", line):
            instructions.append(Instruction(found[1], found[2], False, _kind(found[1], AMD_KINDS)))
    return Code(instructions, labels)


# ---- loops -----------------------------------------------------------------------------------------------


def _successors(code: Code, index: int, joins: dict[str, str]) -> list[int]:
    """The instructions that may follow instruction `index`. joins: convergence barrier -> label, which is filled
    here."""
    at = code.instructions[index]
    following = [index + 1] if index + 1 < len(code.instructions) else []
    if at.opcode.startswith("BSSY"):
        barrier, label = re.match(r"(\w+), `\((\S+)\)", at.operands).groups()
        joins[barrier] = label
        return following
    if at.opcode.startswith("BSYNC") and at.operands in joins:
        return [*following, code.labels[joins[at.operands]]]
    if at.opcode.startswith(("EXIT", "RET", "s_endpgm")):
        return following if at.predicated else []
    if at.opcode.startswith(("BRA", "s_branch", "s_cbranch")) and (label := re.search(r"\.L\w+", at.operands)):
        always = at.opcode == "s_branch" or (at.opcode.startswith("BRA") and at.operands.startswith("`"))
        target = [t for t in [code.labels.get(label[0], -1)] if 0 <= t < len(code.instructions)]
        return target if always and not at.predicated else [*following, *target]
    return following


def successors(code: Code) -> list[list[int]]:
    """For each instruction, those that may follow it."""
    joins: dict[str, str] = {}
    return [_successors(code, i, joins) for i in range(len(code.instructions))]


@dataclass(frozen=True)
class Loop:
    """A natural loop, as indices of instructions."""

    body: frozenset[int]
    always: frozenset[int]  # instructions that every iteration executes; the others are conditional


def find_loops(code: Code) -> list[Loop]:
    """The loops of a kernel, one for each header."""
    after = successors(code)
    # Basic blocks begin at labels, at branch targets and after branches.
    starts = {0, *code.labels.values(), *(t for i, ts in enumerate(after) if ts != [i + 1] for t in (*ts, i + 1))}
    starts = sorted(s for s in starts if s < len(code.instructions))
    block_of = {s: b for b, s in enumerate(starts)}
    ends = [*starts[1:], len(code.instructions)]
    block_successors = [[block_of[t] for t in after[end - 1]] for end in ends]
    predecessors: list[list[int]] = [[] for _ in starts]
    for block, targets in enumerate(block_successors):
        for target in targets:
            predecessors[target].append(block)

    # Dominators by iteration to the fixed point, as bit sets.
    everything = (1 << len(starts)) - 1
    dominators = [everything] * len(starts)
    dominators[0] = 1
    changed = True
    while changed:
        changed = False
        for block in range(1, len(starts)):
            common = everything
            for p in predecessors[block]:
                common &= dominators[p]
            common |= 1 << block
            if common != dominators[block]:
                dominators[block], changed = common, True

    bodies: dict[int, set[int]] = {}
    always: dict[int, int] = {}
    for block, targets in enumerate(block_successors):
        for header in targets:
            if predecessors[header] and dominators[block] >> header & 1:
                always[header] = always.get(header, everything) & dominators[block]
                body, work = bodies.setdefault(header, {header}), [block]
                while work:
                    if (b := work.pop()) not in body:
                        body.add(b)
                        work += predecessors[b]

    def instructions(blocks) -> frozenset[int]:
        return frozenset(i for b in blocks for i in range(starts[b], ends[b]))

    return [
        Loop(instructions(body), instructions(b for b in body if always[header] >> b & 1))
        for header, body in bodies.items()
    ]


def inner_loops(code: Code) -> list[tuple[Code, Code]]:
    """The innermost loops with matrix instructions; in a kernel without any, those that access global memory.

    Each has two parts: instructions that every iteration executes, and conditional ones (the epilogue of a persistent
    kernel, the slow path of a wait). If the matrix instructions themselves are conditional, the first part is the whole
    loop.
    """

    def part(indices: frozenset[int]) -> Code:
        return Code([code.instructions[i] for i in sorted(indices)], {})

    for kinds in ({"matrix"}, {"global", "copy"}):

        def holds(indices: frozenset[int], kinds=kinds) -> bool:
            return any(code.instructions[i].kind in kinds for i in indices)

        hot = [loop for loop in find_loops(code) if holds(loop.body)]
        inner = [loop for loop in hot if not any(other.body < loop.body for other in hot)]
        if inner:
            split = [
                (loop.always, loop.body - loop.always) if holds(loop.always) else (loop.body, frozenset())
                for loop in sorted(inner, key=lambda loop: min(loop.body))
            ]
            return [(part(always), part(sometimes)) for always, sometimes in split]
    return []


def instruction_mix(code: Code) -> dict[str, int]:
    """The number of instructions of each kind that occurs, and their total."""
    counts = {kind: len(code.of_kind(kind)) for kind in KINDS}
    return {kind: n for kind, n in counts.items() if n} | {"total": len(code.instructions)}


# ---- single facts ----------------------------------------------------------------------------------------


def access_bits(instruction: Instruction) -> int:
    """The bits that a lane moves in one load or store."""
    if found := re.search(r"\.(?:[US])?(8|16|64|128|256)\b", instruction.opcode):
        return int(found[1])
    if found := re.search(r"_(?:dwordx|b)(\d+)", instruction.opcode):
        return int(found[1]) * (32 if "dwordx" in found[0] else 1)
    if re.search(r"_(ubyte|sbyte|byte)", instruction.opcode):
        return 8
    if re.search(r"_(ushort|sshort|short)", instruction.opcode):
        return 16
    return 32


def widest_global_load(code: Code) -> int:
    """Bits of a lane in the widest load from global memory, to registers or (LDGSTS) to shared memory; 0 without
    loads."""
    loads = [i for i in code.instructions if re.match(r"LDG\b|LDGSTS\b|(global|buffer|flat)_load", i.opcode)]
    return max(map(access_bits, loads), default=0)


def matrix_flops(code: Code, num_warps: int) -> int:
    """Floating-point operations of the matrix instructions of all warps; 0 if the opcode does not show the shape."""
    # opcode -> number of warps that issue one instruction together
    shapes = {r"HGMMA\.(\d+)x(\d+)x(\d+)": 4, r"HMMA\.(16)(8)(16|8|4)\b": 1, r"v_mfma_\w+?_(\d+)x(\d+)x(\d+)": 1}
    flops = 0
    for instruction in code.of_kind("matrix"):
        for pattern, together in shapes.items():
            if shape := re.match(pattern, instruction.opcode):
                flops += 2 * math.prod(map(int, shape.groups())) * num_warps // together
    return flops
