"""Finds instructions that touch registers of an asynchronous matrix product before the code has waited for it.

Hopper's HGMMA returns at once. Until the wait for it (`WARPGROUP.DEPBAR`) its sums must not be read or written, and a
left operand in registers must not be written. The compiler must ensure that, but released assemblers have failed to:
https://github.com/triton-lang/triton/issues/9433 and pull request 11781. So this module follows the machine code along
every path, through loops too, and tracks the products that may be in flight.

Blackwell's UTC*MMA is not affected: its operands are in shared and tensor memory, and its only registers are uniform
ones, which it reads when it is issued.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .machine_code import Code, Instruction, access_bits, successors

# Opcodes that only read their first register: they write predicates or memory, or change the control flow.
READS_ONLY = re.compile(
    r"(I|F|D|H|U|P|C)SETP2?\b|FCHK\b|R2P\b|NANOSLEEP\b|BRX|JMX|RET\b|CALL\b|WARPSYNC|BAR\b|BRA\b|ST[SGLM]?\b|STSM\b|RED"
)
PREDICATE = re.compile(r"!?U?P(\d|T|R)\b")
OLDEST = 7  # most groups of products that a wait can leave in flight


@dataclass(frozen=True)
class Hazard:
    """An instruction that touches registers of a product in flight. Both are indices of instructions."""

    product: int
    at: int
    what: str  # "operand written", "sum written" or "sum read"
    registers: tuple[int, ...]

    def describe(self, code: Code) -> str:
        """As text, with both instructions."""
        product, at = code.instructions[self.product], code.instructions[self.at]
        registers = ", ".join(f"R{r}" for r in self.registers)
        return f"{self.what} ({registers}) of {product.opcode} {product.operands} by {at.opcode} {at.operands}"


@dataclass(frozen=True)
class _Product:
    """Registers of one HGMMA."""

    operand: frozenset[int]  # registers of the left operand; empty if that is in shared memory
    total: frozenset[int]


def hazards(code: Code) -> list[Hazard]:
    """All hazards in the order of the code. Empty for code without HGMMA."""
    products = {n: _product(i) for n, i in enumerate(code.instructions) if i.opcode.startswith("HGMMA")}
    if not products:
        return []
    touched = [_touched(i) for i in code.instructions]
    after = successors(code)

    # Product -> number of groups committed since it was issued, including its own; 0 while its group is still open. Of
    # several paths the least number counts. A group is committed by its last product, which is marked gsb0.
    pending: list[dict[int, int] | None] = [None] * len(code.instructions)
    pending[0] = {}
    work = [0]
    while work:
        n = work.pop()
        following = _step(code.instructions[n], n, pending[n])
        for successor in after[n]:
            known = pending[successor]
            merged = (
                following
                if known is None
                else known | {p: min(age, known.get(p, OLDEST)) for p, age in following.items()}
            )
            if merged != known:
                pending[successor] = merged
                work.append(successor)

    found = []
    for n, in_flight in enumerate(pending):
        for p in sorted(in_flight or {}):
            found += _conflicts(p, products[p], n, products.get(n), *touched[n])
    return found


def _step(instruction: Instruction, n: int, pending: dict[int, int]) -> dict[int, int]:
    """The products in flight after an instruction."""
    if instruction.opcode.startswith("HGMMA"):
        pending = pending | {n: 0}
        if re.search(r"\bgsb0\b", instruction.operands):
            pending = {p: min(age + 1, OLDEST) for p, age in pending.items()}
    elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
        left = int(re.search(r"gsb0, (0x[0-9a-f]+)", instruction.operands)[1], 16)
        pending = {p: age for p, age in pending.items() if age <= left}  # including those of an open group
    return pending


def _conflicts(p: int, product: _Product, n: int, other: _Product | None, reads, writes) -> list[Hazard]:
    """The hazards between instruction n and product p in flight. other: the registers of n if n is a product too."""
    if other is not None and other.total == product.total:
        reads, writes = other.operand, frozenset()  # products onto the same sum run in order
    pairs = (
        ("operand written", product.operand & writes),
        ("sum written", product.total & writes),
        ("sum read", product.total & reads - writes),
    )
    return [Hazard(p, n, what, tuple(sorted(registers))) for what, registers in pairs if registers]


def transposed_products(ttgir: str) -> int:
    """The number of products in a kernel's Triton IR whose left operand is the transpose of an asynchronous product's
    result.

    Such products were wrong on Hopper, from Triton 3.4 and ptxas 12.8 on, with operands in registers and in shared
    memory: https://github.com/fla-org/flash-linear-attention/pull/826 and issue 984. For other architectures the number
    is 0. Values are followed within a loop's body, not from one iteration to the next.
    """
    layouts = "|".join(re.findall(r"^(#\w+) = #ttg\.nvidia_mma<\{versionMajor = 3\b", ttgir, re.MULTILINE))
    transposed: set[str] = set()
    count = 0
    for line in ttgir.splitlines() if layouts else ():
        if not (found := re.match(r"\s*(%\w+)(?::\d+)? = (?:\"?)([\w.]+)(.*)", line)):
            continue
        result, operation, rest = found.groups()
        operands = re.findall(r"%\w+", rest.split(" : ")[0])
        if operation == "ttng.warp_group_dot":
            count += operands[0] in transposed
        elif transposed.intersection(operands) or (
            operation == "tt.trans" and re.search(rf": tensor<[^>]*, ({layouts})> ->", rest)
        ):
            transposed.add(result)
    return count


# ---- registers of an instruction -------------------------------------------------------------------------


def _operands(instruction: Instruction) -> list[str]:
    return [operand.strip() for operand in instruction.operands.split(",")]


def _register(operand: str) -> int | None:
    """The number of an operand's first register; None for RZ, uniform registers, constants and addresses."""
    found = re.match(r"[-~|!]*R(\d+)\b", operand)
    return int(found[1]) if found else None


def _range(first: int | None, count: int) -> frozenset[int]:
    return frozenset() if first is None else frozenset(range(first, first + count))


def _product(instruction: Instruction) -> _Product:
    columns = int(re.match(r"HGMMA\.64x(\d+)x", instruction.opcode)[1])
    sixteen_bits = re.match(r"HGMMA\.\d+x\d+x\d+\.F16\b", instruction.opcode) is not None
    total, left = _operands(instruction)[:2]
    # 64 rows over 128 lanes; an instruction reads 16 bytes of the left operand in each lane, for every type
    return _Product(_range(_register(left), 4), _range(_register(total), columns // (4 if sixteen_bits else 2)))


def _touched(instruction: Instruction) -> tuple[frozenset[int], frozenset[int]]:
    """(read, written) registers."""
    if instruction.opcode.startswith("HGMMA"):
        product = _product(instruction)
        return product.operand | product.total, product.total
    operands = _operands(instruction)
    written: frozenset[int] = frozenset()
    if not READS_ONLY.match(instruction.opcode):
        while operands and PREDICATE.match(operands[0]):
            operands = operands[1:]
        if operands and (first := _register(operands[0])) is not None:
            written = _range(first, _width(instruction))
            operands = operands[1:]
    read = frozenset().union(*(_range(r, n) for r, n in _sources(instruction, operands)))
    return read, written


def _width(instruction: Instruction) -> int:
    """The number of registers of the result."""
    opcode = instruction.opcode
    if found := re.match(r"LDSM.*?(?:\.([24]))?$", opcode):
        return int(found[1] or 1)
    if re.match(r"(LD|LDS|LDG|LDL|LDC|ATOM|ATOMG|ATOMS)\b", opcode):
        return max(access_bits(instruction) // 32, 1)
    if re.match(r"(HMMA|IMMA)", opcode):
        return 2 if re.match(r"HMMA\.\d+\.F16\b", opcode) else 4
    if re.match(r"IMAD\.WIDE|CS2R(?!\.32)|D(ADD|MUL|FMA)\b|(F2F|I2F)\.F64|F2I\.[US]64", opcode):
        return 2
    return 1


def _sources(instruction: Instruction, operands: list[str]) -> list[tuple[int, int]]:
    """(first register, how many) for each operand that is read. operands: all but the result."""
    opcode = instruction.opcode
    found = []
    for place, operand in enumerate(operands):
        for match in re.finditer(r"(?<![A-Z])R(\d+)\b(\.64)?", operand):
            count = 2 if match[2] else 1
            if "[" not in operand:
                if re.match(r"(ST|STS|STG|STL|ATOM|ATOMG|ATOMS|RED)\b", opcode):
                    count = max(access_bits(instruction) // 32, 1)
                elif stored := re.match(r"STSM.*?\.([24])$", opcode):
                    count = int(stored[1])
                elif re.match(r"HMMA\.16816|IMMA", opcode):
                    count = (4, 2, 4)[place] if place < 3 else 1
                elif re.match(r"HMMA", opcode):
                    count = (2, 1, 4)[place] if place < 3 else 1
                elif re.match(r"D(ADD|MUL|FMA|SETP)\b", opcode) or (opcode.startswith("IMAD.WIDE") and place == 2):
                    count = 2
            found.append((int(match[1]), count))
    return found
