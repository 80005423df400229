"""The emulator's errors: a class for each kind of fault; messages name the kernel, the PTX line and the values."""

from __future__ import annotations


class EmulatorError(RuntimeError):
    """A fault of a kernel that ran on the emulator.

    The code that finds a fault gives the message; the code that runs the program adds `kernel`, `line` (of the PTX
    text, from 1) and `instruction` (its text).
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
    """Two threads use the same shared memory without a barrier in between, and one of them writes."""


class StoreConflict(EmulatorError):
    """One instruction stores different values to the same address, so the result is undefined."""


class ProgramRace(EmulatorError):
    """A program uses global memory that another program of the launch writes, or both write it."""


class GlobalRace(EmulatorError):
    """A thread uses global memory that another thread of its program wrote, without a barrier in between."""


class MissingWait(EmulatorError):
    """A use of memory or registers that an asynchronous instruction still fills or reads."""


class MissingFence(EmulatorError):
    """An asynchronous unit reads what threads wrote, and no fence makes it visible there."""


class UninitialisedRegister(EmulatorError):
    """An instruction reads a register that no path through the program assigns before."""


class LimitExceeded(EmulatorError):
    """The program needs more threads, shared memory or other resources than the architecture has."""


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
