"""PTX text, parsed: instructions with resolved registers, and the labels between them."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field

from .errors import EmulatorError

# bits of every type that an instruction can name
WIDTHS = {
    "pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16, "b32": 32, "u32": 32,
    "s32": 32, "f32": 32, "f16x2": 32, "bf16x2": 32, "b64": 64, "u64": 64, "s64": 64, "f64": 64,
    "f32x2": 64, "b128": 128,
}  # fmt: skip
BRANCHES = ("bra", "ret", "exit", "trap")


@dataclass(frozen=True)
class Register:
    index: int
    width: int  # bits; 1 for a predicate
    name: str


@dataclass(frozen=True)
class Immediate:
    """A number in the text. `bits` is the width of a floating-point literal given by its bits, 0 for an integer."""

    value: int
    bits: int = 0


@dataclass(frozen=True)
class Special:
    name: str  # e.g. "%tid.x"


@dataclass(frozen=True)
class Symbol:
    name: str  # a parameter, a variable in shared memory, a label


@dataclass(frozen=True)
class Address:
    base: Operand
    offset: int


@dataclass(frozen=True)
class TensorAddress:
    """[descriptor, {coordinates}] of a bulk copy; the innermost coordinate comes first."""

    descriptor: Operand
    coordinates: tuple[Operand, ...]


@dataclass(frozen=True)
class Vector:
    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """Two destinations d|p."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Not:
    operand: Operand


@dataclass(frozen=True)
class Sink:
    """The destination `_`."""


Operand = Register | Immediate | Special | Symbol | Address | TensorAddress | Vector | Pair | Not | Sink


@dataclass(frozen=True)
class Instruction:
    opcode: str  # e.g. "ld.global.v4.b32"
    operands: tuple[Operand, ...]
    guard: tuple[Register, bool] | None  # the predicate, and whether it is negated
    line: int  # of the PTX text, from 1
    text: str
    target: int | None = None  # of a branch: index of an instruction

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")

    @property
    def name(self) -> str:
        return self.opcode.split(".", 1)[0]

    @property
    def types(self) -> list[str]:
        return [p for p in self.parts if p in WIDTHS]

    @property
    def type(self) -> str | None:
        """The last type that the opcode names."""
        return next(reversed(self.types), None)


@dataclass
class Program:
    """One kernel's PTX."""

    name: str
    parameters: dict[str, int]  # name -> position
    threads: int  # of a CTA
    widths: list[int] = field(default_factory=list)  # of the registers
    instructions: list[Instruction] = field(default_factory=list)
    shared: dict[str, int] = field(default_factory=dict)  # variable in shared memory -> offset

    @functools.cached_property
    def matrix_registers(self) -> frozenset[int]:
        """Numbers of the registers that `wgmma` uses asynchronously: D, and A if it is in registers."""
        used = (i.operands[:2] for i in self.instructions if i.opcode.startswith("wgmma.mma_async"))
        vectors = (o for operands in used for o in operands if isinstance(o, Vector))
        return frozenset(r.index for vector in vectors for r in vector.items if isinstance(r, Register))


def parse(text: str) -> Program:
    """The first kernel in a PTX text. Raises EmulatorError if there is none, or a name is not declared."""
    return _Parser(text).program


_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_IGNORED = re.compile(r"(?m)^[ \t]*\.(?:loc|file|pragma)\b[^\n]*$")
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(")
_PARAMETER = re.compile(r"\.param\b.*?([\w$]+)(?:\[\d+\])?$", re.DOTALL)
_SHARED = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*(?:\[(\d*)\])?")
_LABEL = re.compile(r"([\w$%]+):(?!:)")
_DECLARED = re.compile(r"(%?[\w$]+)<(\d+)>$")
_GUARDED = re.compile(r"@(!?)\s*(%?[\w$]+)\s+(.*)$")
_INTEGER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$")
_OFFSET = re.compile(r"(.+?)\s*\+\s*(-?\w+)$")


def _blank(match: re.Match) -> str:
    return "\n" * match[0].count("\n")  # line numbers stay


def split_operands(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    parts, depth, start = [], 0, 0
    for n, char in enumerate(text):
        if char in "{[(":
            depth += 1
        elif char in "}])":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:n].strip())
            start = n + 1
    if text[start:].strip():
        parts.append(text[start:].strip())
    return parts


class _Parser:
    def __init__(self, text: str):
        self._text = _IGNORED.sub("", _COMMENT.sub(_blank, text))
        entry = _ENTRY.search(self._text)
        if entry is None:
            raise EmulatorError("the PTX text has no .entry")
        end = self._closing(entry.end() - 1, "(", ")")
        names = [_PARAMETER.search(p)[1] for p in split_operands(self._text[entry.end() : end])]
        start = self._text.index("{", end)
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", self._text[end:start])
        if threads is None:
            raise EmulatorError(f"{entry[1]} does not say how many threads it needs (.reqntid)")
        self.program = Program(entry[1], {name: n for n, name in enumerate(names)}, int(threads[1]))
        self._shared_end = 0
        for match in _SHARED.finditer(self._text[: entry.start()]):
            self._declare_shared(match)
        self._parse_body(start + 1, self._closing(start, "{", "}"))

    def _closing(self, start: int, opens: str, closes: str) -> int:
        """Where the bracket that opens at `start` closes."""
        depth = 0
        for match in re.compile(rf"[{re.escape(opens + closes)}]").finditer(self._text, start):
            depth += 1 if match[0] == opens else -1
            if depth == 0:
                return match.start()
        raise EmulatorError("the PTX text ends inside a bracket")

    def _declare_shared(self, match: re.Match) -> None:
        align, size = int(match[1] or 1), WIDTHS[match[2]] // 8 * int(match[4] or 0 if "[" in match[0] else 1)
        offset = -(-self._shared_end // align) * align
        self.program.shared[match[3]] = offset
        self._shared_end = offset + size

    def _parse_body(self, position: int, end: int) -> None:
        text, program = self._text, self.program
        scopes: list[dict[str, Register]] = [{}]
        numbers, count = [0], 0  # of the scopes, for labels that two scopes give one name
        labels: dict[tuple[int, str], int] = {}
        branches: list[tuple[int, str, list[int]]] = []
        line, counted = 1, 0
        while position < end:
            char = text[position]
            if char.isspace() or char == ";":
                position += 1
                continue
            if char == "{":
                count += 1
                scopes.append({})
                numbers.append(count)
                position += 1
                continue
            if char == "}":
                scopes.pop()
                numbers.pop()
                position += 1
                continue
            if label := _LABEL.match(text, position):
                labels[numbers[-1], label[1]] = len(program.instructions)
                position = label.end()
                continue
            stop = self._statement_end(position)
            line, counted = line + text.count("\n", counted, position), position
            statement = " ".join(text[position:stop].split())
            position = stop + 1
            if statement.startswith(".reg"):
                self._declare_registers(statement, scopes[-1])
            elif statement.startswith("."):
                if match := _SHARED.match(statement):
                    self._declare_shared(match)
            else:
                instruction = self._instruction(statement, scopes, line)
                if instruction.name == "bra":
                    name = instruction.operands[0].name
                    branches.append((len(program.instructions), name, numbers[::-1]))
                program.instructions.append(instruction)
        for index, name, scope in branches:
            at = next((labels[n, name] for n in scope if (n, name) in labels), None)
            if at is None:
                raise EmulatorError(f"no label {name}")
            old = program.instructions[index]
            program.instructions[index] = Instruction(old.opcode, (), old.guard, old.line, old.text, at)

    def _statement_end(self, position: int) -> int:
        """Of the semicolon, or of what stands inside braces together with it."""
        depth = 0
        for match in re.compile(r"[{};]").finditer(self._text, position):
            if match[0] == ";" and depth == 0:
                return match.start()
            depth += {"{": 1, "}": -1, ";": 0}[match[0]]
        raise EmulatorError("the PTX text ends inside an instruction")

    def _declare_registers(self, statement: str, scope: dict[str, Register]) -> None:
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", statement).groups()
        for declared in split_operands(names):
            many = _DECLARED.match(declared)
            for name in [f"{many[1]}{n}" for n in range(int(many[2]))] if many else [declared]:
                scope[name] = Register(len(self.program.widths), WIDTHS[kind], name)
                self.program.widths.append(WIDTHS[kind])

    def _instruction(self, statement: str, scopes: list[dict[str, Register]], line: int) -> Instruction:
        guard, body = None, statement
        if guarded := _GUARDED.match(statement):
            guard, body = (self._operand(guarded[2], scopes), guarded[1] == "!"), guarded[3]
        opcode, _, rest = body.partition(" ")
        operands = tuple(self._operand(o, scopes) for o in split_operands(rest))
        return Instruction(opcode, operands, guard, line, statement)

    def _operand(self, text: str, scopes: list[dict[str, Register]]) -> Operand:
        if text.startswith("{"):
            return Vector(tuple(self._operand(x, scopes) for x in split_operands(text[1:-1])))
        if text.startswith("["):
            inner = text[1:-1].strip()
            if "{" in inner:
                descriptor, coordinates = split_operands(inner)
                items = tuple(self._operand(x, scopes) for x in split_operands(coordinates[1:-1]))
                return TensorAddress(self._operand(descriptor, scopes), items)
            plus = _OFFSET.match(inner)
            base, offset = (plus[1].strip(), int(plus[2], 0)) if plus else (inner, 0)
            return Address(self._operand(base, scopes), offset)
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first, scopes), self._operand(second, scopes))
        if text == "_":
            return Sink()
        if text.startswith("!"):
            return Not(self._operand(text[1:].strip(), scopes))
        for scope in reversed(scopes):
            if text in scope:
                return scope[text]
        if re.match(r"0[fF][0-9a-fA-F]{8}$", text):
            return Immediate(int(text[2:], 16), 32)
        if re.match(r"0[dD][0-9a-fA-F]{16}$", text):
            return Immediate(int(text[2:], 16), 64)
        if _INTEGER.match(text):
            return Immediate(int(text.rstrip("U"), 0))
        return Special(text) if text.startswith("%") else Symbol(text)
