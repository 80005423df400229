"""What the emulator refuses: one class a kind of fault, each naming the kernel, the PTX line and what it met there."""

from __future__ import annotations


class EmulatorError(RuntimeError):
    """A fault of a kernel that ran on the emulator.

    Whoever finds a fault says what it is; who runs the program adds where: `kernel`, `line` (of the PTX text, counted
    from 1) and `instruction` (its text).
    """

    def __init__(self, fault: str):
        super().__init__(fault)
        self.fault = fault
        self.kernel: str | None = None
        self.line: int | None = None
        self.instruction: str | None = None

    def at(self, kernel: str, line: int | None, instruction: str | None) -> EmulatorError:
        """The same error with its place, unless it has one."""
        if self.kernel is None:
            self.kernel, self.line, self.instruction = kernel, line, instruction
        return self

    def __str__(self) -> str:
        if self.kernel is None:
            return self.fault
        place = self.kernel if self.line is None else f"{self.kernel}, PTX line {self.line}: {self.instruction}"
        return f"{self.fault} ({place})"


class UnknownInstruction(EmulatorError):
    """An instruction, or a form of one, that the emulator does not model."""


class OutOfBounds(EmulatorError):
    """A memory access outside its tensor, or outside the shared memory of the program."""


class Misaligned(EmulatorError):
    """An address that is not a multiple of the size of the access."""


class UnwrittenShared(EmulatorError):
    """A read of shared memory that nothing has written."""


class SharedRace(EmulatorError):
    """Two threads use the same shared memory, one of them writes, and no barrier lies between."""


class StoreConflict(EmulatorError):
    """One instruction stores different values to one address: which stays, nobody knows."""


class ProgramRace(EmulatorError):
    """A program uses global memory that another program of the launch writes, or both write it."""


class GlobalRace(EmulatorError):
    """A thread uses global memory that another thread of its program wrote, and no barrier lies between."""


class MissingWait(EmulatorError):
    """Memory or registers are used that an asynchronous instruction still fills or reads."""


class MissingFence(EmulatorError):
    """An asynchronous unit reads what threads wrote, and no fence makes it visible there."""


class UninitialisedRegister(EmulatorError):
    """An instruction reads a register that no way through the program assigns before."""


class LimitExceeded(EmulatorError):
    """More threads, shared memory or the like than the architecture has."""


class DivergentWarp(EmulatorError):
    """An instruction that a whole warp (or warpgroup) has to run together, run by a part of it."""


class DivergentBarrier(EmulatorError):
    """A barrier that some threads reach and others never do."""


class BarrierMisuse(EmulatorError):
    """An mbarrier used before it is initialised, with too many arrivals or bytes, or left unfinished."""


class TensorMemoryMisuse(EmulatorError):
    """More tensor memory than there is, or some that is not given back as it was allocated."""


class InvalidOperand(EmulatorError):
    """An operand with a value that the instruction does not accept."""


class Trap(EmulatorError):
    """The program ran a `trap`."""
