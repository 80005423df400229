"""Basic blocks become Python functions on numpy arrays.

A register holds an array that broadcasts to [programs, threads]: an address step that depends only on the thread is
[1, threads], one that depends only on the program is [programs, 1], a constant is a scalar. Within a block registers
are local variables, and the views of a register that readers need (as float32, as the upper bfloat16) are made once. At
the end of a block live registers are written back to the list R; if the block ran for some threads only (mask M), they
are merged with the values of the other threads.

Each family of instructions registers its translators with `translates`: functions of an `Emitter` and an
`Instruction` that read operands (`emit.read`), write destinations (`emit.write`) and add lines (`emit.line`). Names
that these lines use are registered with `available`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import formats
from .errors import EmulatorError, UnknownInstruction
from .flow import Block, destinations, sources
from .formats import FLOAT, RAW, SIGNED
from .ptx import (
    BRANCHES,
    WIDTHS,
    Address,
    Immediate,
    Instruction,
    Not,
    Operand,
    Program,
    Register,
    Sink,
    Special,
    Symbol,
)

TRANSLATORS: dict[str, Callable[[Emitter, Instruction], None]] = {}
NAMES: dict[str, object] = {"np": np, "where": np.where}
NAMES |= {name: getattr(formats, name) for name in dir(formats) if not name.startswith("_")}
# The value of an unwritten register: NaN as float32, bfloat16 and float16, and no valid address.
POISON = {1: np.bool_(False), 16: np.uint16(0x7FFF), 32: np.uint32(0x7FFF7FFF), 64: np.uint64(0x7FFF7FFF7FFF7FFF)}


def translates(*names: str) -> Callable:
    """Registers a function as the translator of the instructions whose first part is one of `names`."""

    def register(function: Callable) -> Callable:
        TRANSLATORS.update(dict.fromkeys(names, function))
        return function

    return register


def available(function: Callable) -> Callable:
    """Makes a function available, under its name, to the lines that translators emit."""
    NAMES[function.__name__] = function
    return function


def refuse(instruction: Instruction) -> None:
    raise UnknownInstruction(f"the emulator does not know {instruction.opcode}")


class Emitter:
    """Collects the Python lines of a block. masked: the block runs for some of the threads only."""

    def __init__(self, program: Program, block: Block, masked: bool):
        self.program, self.block, self.masked = program, block, masked
        self.lines: list[str] = []
        self.constants: dict[str, object] = {}
        self._forms: dict[int, dict[str, str]] = {}  # register -> form -> variable; "raw" are its bits
        self._written: set[int] = set()
        self._count = 0
        self._guard: tuple[Register, bool] | None = None
        self._mask_of_guard: dict[tuple[str, bool], str] = {}
        self._made: dict[str, str] = {}

    # ---- for translators

    def line(self, text: str) -> None:
        self.lines.append(text)

    def new(self, expression: str, hint: str = "t") -> str:
        """A variable that holds the expression."""
        self._count += 1
        name = f"{hint}_{self._count}"
        self.lines.append(f"{name} = {expression}")
        return name

    def once(self, expression: str) -> str:
        """A variable for an expression without side effects, emitted once. (Variables are never reassigned.)"""
        if expression not in self._made:
            self._made[expression] = self.new(expression)
        return self._made[expression]

    def constant(self, value: object) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    @property
    def mask(self) -> str:
        """The threads for which this instruction runs: the name of an array, or "None" for all."""
        if self._guard is None:
            return "M" if self.masked else "None"
        register, negated = self._guard
        raw = self._raw(register)
        if (raw, negated) not in self._mask_of_guard:
            condition = f"~{raw}" if negated else raw
            self._mask_of_guard[raw, negated] = self.new(f"M & {condition}" if self.masked else condition, "m")
        return self._mask_of_guard[raw, negated]

    def read(self, operand: Operand, kind: str) -> str:
        """An expression for the operand as PTX type `kind`: numpy integers of its width and sign, float32 values for
        f32, f16 and bf16, bool for pred."""
        width = WIDTHS[kind]
        match operand:
            case Register():
                if kind in ("f16", "bf16"):
                    return self.form(operand, kind, f"from_{kind}({{}})")
                if operand.width != width:
                    resized = self.form(operand, f"u{width}", self._resized(operand, width))
                    return f"{resized}.view({kind[0].replace('s', 'i')}{width})" if kind[0] in "sf" else resized
                if kind[0] == "s":
                    return self.form(operand, "signed", f"{{}}.view(i{width})")
                if kind[0] == "f" and not kind.endswith("x2"):
                    return self.form(operand, "float", f"{{}}.view(f{width})")
                return self._raw(operand)
            case Immediate():
                return self.constant(self._immediate(operand, kind))
            case Special():
                return self._special(operand, width)
            case Not():
                return f"(~{self.read(operand.operand, kind)})"
            case Symbol():
                return self._symbol(operand, width)
        raise EmulatorError(f"an operand of the wrong kind: {operand}")

    def form(self, register: Register, form: str, expression: str) -> str:
        """A variable with a view of a register, made once: `expression` with {} where its bits stand."""
        forms = self._forms.setdefault(register.index, {})
        if form not in forms:
            raw = self._raw(register)
            forms[form] = self.new(expression.format(raw), "v")
        return forms[form]

    def half(self, operand: Operand, which: str, kind: str) -> str:
        """The "low" or "high" half of an operand as float32; `kind` is that of a half, "f16", "bf16" or "f32"."""
        if isinstance(operand, Register):
            return self.form(operand, f"{which}_{kind}", f"{which}_{kind}({{}})")
        return f"{which}_{kind}({self.read(operand, f'b{2 * WIDTHS[kind]}')})"

    def address(self, operand: Operand, width: int) -> str:
        """The value of [base + offset] in `width` bits."""
        if not isinstance(operand, Address):
            raise EmulatorError(f"expected an address, got {operand}")
        base = self.read(operand.base, f"b{width}")
        if operand.offset == 0:
            return base
        return f"({base} + {self.constant(RAW[width](operand.offset & ((1 << width) - 1)))})"

    def write(self, operand: Operand, expression: str, kind: str = "b") -> None:
        """Assign. `kind`: "b" for bits of the register's width, "f" for float32 or float64 values of it, "s" for signed
        integers of it; under a guard the threads that do not run keep what they had."""
        if isinstance(operand, Sink):
            return
        if not isinstance(operand, Register):
            raise EmulatorError(f"cannot write to {operand}")
        form = {"b": "raw", "f": "float", "s": "signed"}[kind]
        if self._guard is not None:
            bits = expression if form == "raw" else f"({expression}).view(u{operand.width})"
            expression, form = f"where({self.mask}, {bits}, {self._raw(operand)})", "raw"
        name = self.new(expression, "r")
        self._forms[operand.index] = {form: name}
        self._written.add(operand.index)

    def resize(self, expression: str, width: int, operand: Operand, signed: bool) -> str:
        """Bits of `width` as bits of the destination's width, which may be wider."""
        if not isinstance(operand, Register) or operand.width == width:
            return expression
        if signed and operand.width > width:
            return f"{expression}.view(i{width}).astype(i{operand.width}).view(u{operand.width})"
        return f"{expression}.astype(u{operand.width})"

    # ---- the block

    def translate(self) -> tuple[Callable, Instruction | None]:
        """(the block's function of (S, R, M, P), the branch at the end of the block). If the branch has a guard, the
        function returns the threads for which the guard holds."""
        branch = None
        for index in range(self.block.start, self.block.stop):
            instruction = self.program.instructions[index]
            if instruction.name in BRANCHES:
                branch = instruction
                break
            try:
                self._guard = instruction.guard
                translator = TRANSLATORS.get(instruction.name)
                if translator is None:
                    refuse(instruction)
                self._guard_matrix_registers(instruction, index)
                if getattr(translator, "can_fail", True):
                    self.line(f"S.at = {index}")
                translator(self, instruction)
            except EmulatorError as error:
                raise error.at(self.program.name, instruction.line, instruction.text) from None
        self._guard = None
        self._mask_of_guard = {}
        last = self.program.instructions[self.block.stop - 1]
        ending = self.lines.pop() if last.opcode.startswith("wgmma.wait_group") else None
        for register in sorted(self._written & self.block.live_out):
            bits = self._raw(Register(register, self.program.widths[register], ""))
            self.line(f"R[{register}] = " + (f"where(M, {bits}, R[{register}])" if self.masked else bits))
        if ending is not None:
            self.line(ending)
        if branch is not None and branch.guard is not None:
            register, negated = branch.guard
            self.line(f"return {'~' if negated else ''}{self._raw(register)}")
        source = "\n ".join(["def block(S, R, M, P):", *(self.lines or ["pass"])])
        names = NAMES | self.constants
        exec(compile(source, f"<{self.program.name} {self.block.start}>", "exec"), names)
        return names["block"], branch

    def _guard_matrix_registers(self, instruction: Instruction, index: int) -> None:
        """Emits the check that ordinary instructions do not use registers that the matrix unit is using."""
        shared = self.program.matrix_registers
        if not shared or instruction.name == "wgmma":
            return
        read = frozenset(r.index for r in sources(instruction)) & shared
        written = frozenset(r.index for r in destinations(instruction)) & shared
        if read or written:
            self.line(f"S.at = {index}")
            self.line(f"S.queue.touch(S, {self.constant(read)}, {self.constant(written)}, {self.mask})")

    # ---- operands

    def _raw(self, register: Register) -> str:
        forms = self._forms.setdefault(register.index, {})
        if "raw" not in forms:
            made = forms.get("float") or forms.get("signed")
            expression = f"R[{register.index}]" if made is None else f"{made}.view(u{register.width})"
            forms["raw"] = self.new(expression, "r")
        return forms["raw"]

    @staticmethod
    def _resized(register: Register, width: int) -> str:
        return "({} != 0)" if width == 1 else f"{{}}.astype(u{width})"

    @staticmethod
    def _immediate(immediate: Immediate, kind: str):
        width = WIDTHS[kind]
        if immediate.bits and immediate.bits != width:
            value = np.array(immediate.value, RAW[immediate.bits]).view(FLOAT[immediate.bits])
            raw = value.astype(FLOAT[width]).view(RAW[width])[()]
        elif width == 1:
            return np.bool_(immediate.value != 0)
        else:
            raw = RAW[width](immediate.value & ((1 << width) - 1))
        if kind == "bf16":
            return formats.from_bf16(raw)
        if kind == "f16":
            return formats.from_f16(raw)
        if kind[0] == "s":
            return raw.view(SIGNED[width])
        return raw.view(FLOAT[width]) if kind[0] == "f" and not kind.endswith("x2") else raw

    def _special(self, special: Special, width: int) -> str:
        expression = f"S.special({special.name!r})"
        return expression if width == 32 else f"{expression}.astype(u{width})"

    def _symbol(self, symbol: Symbol, width: int) -> str:
        if symbol.name in self.program.parameters:
            return f"S.parameter_address({self.program.parameters[symbol.name]})"
        if symbol.name in self.program.shared:
            return self.constant(RAW[width](self.program.shared[symbol.name]))
        raise EmulatorError(f"the program has no variable {symbol.name}")
