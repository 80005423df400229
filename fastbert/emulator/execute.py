"""Runs a PTX program with its arguments: programs in batches, and the scheduling of threads.

All threads of a batch start together. Threads at the smallest instruction index run first, so threads that took
different branches meet again where the branches join.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from . import arithmetic, convert, floating, integer, matrix, warp  # noqa: F401  they register their translators
from .barriers import evaluate
from .errors import DivergentBarrier, EmulatorError, LimitExceeded, Trap
from .flow import blocks_of, expect_initialised, smallest_access, stored_parameters, waits
from .formats import i64
from .machine import Machine
from .memory import GlobalMemory, region_of
from .ptx import Instruction, Program, parse
from .region import Region
from .translate import POISON, Emitter

BATCH = 4096  # threads that are executed together, unless a single program has more
MAX_THREADS = 1024  # of a program
LIMIT = 50_000_000  # most instructions of a batch; an instruction counts once for all threads that run it together


class Translated:
    """A program and the functions of its blocks, which are translated on first use."""

    def __init__(self, text: str):
        self.program: Program = parse(text)
        self.blocks = blocks_of(self.program)
        expect_initialised(self.program, self.blocks)
        self.waits = {start for start in self.blocks if waits(self.program.instructions[start])}
        self.stored = stored_parameters(self.program)
        self.piece = smallest_access(self.program, "shared")
        self._functions: dict[tuple[int, bool], tuple[Callable, Instruction | None]] = {}

    def function(self, start: int, masked: bool) -> tuple[Callable, Instruction | None]:
        if (start, masked) not in self._functions:
            self._functions[start, masked] = Emitter(self.program, self.blocks[start], masked).translate()
        return self._functions[start, masked]


@functools.lru_cache(maxsize=512)
def translated(text: str) -> Translated:
    return Translated(text)


def run(
    text: str, grid: tuple[int, int, int], parameters: list[np.generic], regions: list[Region], shared_bytes: int,
    descriptors: dict[int, object] | None = None, limit: int = LIMIT,
) -> int:  # fmt: skip
    """Run a kernel over its grid; gives the number of instructions that warps ran.

    parameters: the bits of each as an unsigned numpy scalar, addresses made by `pointer`. regions: the tensors.
    descriptors: number of a parameter -> TensorDescriptor. limit: as LIMIT. Raises: EmulatorError, of the class of the
    fault.
    """
    code = translated(text)
    program = code.program
    if program.threads > MAX_THREADS or program.threads % 32:
        raise LimitExceeded(f"{program.name} wants {program.threads} threads: not whole warps, or over {MAX_THREADS}")
    stored = {region_of(parameters[n]) for n in code.stored if n < len(parameters)}
    memory = GlobalMemory(regions, stored, smallest_access(program, "global"))
    x, y, z = grid
    numbers = np.stack(np.unravel_index(np.arange(x * y * z), (z, y, x))[::-1], 1)
    per_batch = max(1, BATCH // program.threads)
    total = 0
    for first in range(0, len(numbers), per_batch):
        batch = numbers[first : first + per_batch]
        machine = Machine(batch, grid, program.threads, shared_bytes, memory, descriptors or {}, first, code.piece)
        try:
            total += _run_batch(code, machine, parameters, limit) * machine.count * machine.warps
            machine.at = None
            machine.expect_finished()
        except EmulatorError as error:
            if machine.at is None:
                raise error.at(program.name, None, None) from None
            at = program.instructions[machine.at]
            raise error.at(program.name, at.line, at.text) from None
    return total


def _run_batch(code: Translated, S: Machine, P: list[np.generic], limit: int) -> int:
    R = [POISON[max(width, 16) if width != 1 else 1] for width in code.program.widths]
    with np.errstate(all="ignore"):
        return _Schedule(code, S, R, P).run(limit)


class _Schedule:
    """Chooses the threads to run next. `together` is the common position of all live threads; None if they differ, then
    `counter` has each thread's position."""

    def __init__(self, code: Translated, S: Machine, R: list, P: list):
        self.code, self.S, self.R, self.P = code, S, R, P
        self.end = len(code.program.instructions)
        self.together: int | None = 0
        self.counter = np.zeros(S.shape, i64)

    def run(self, limit: int) -> int:
        count, code, S = 0, self.code, self.S
        while True:
            start, mask = self._next()
            if start is None or start >= self.end:
                return count
            function, branch = code.function(start, mask is not None)
            condition = function(S, self.R, mask, self.P)
            count += code.blocks[start].stop - start
            if count > limit:
                raise EmulatorError(f"more than {limit} instructions")
            self._go_on(start, mask, branch, condition)

    def _next(self) -> tuple[int | None, np.ndarray | None]:
        """(the block to run, the threads that run it or None for all)."""
        S = self.S
        if self.together is not None:
            start = self.together
            mask = None if S.live.all() else S.live
            if start in self.code.waits:
                mask = self._free(start, S.live)
                if not mask.any():
                    self._stuck([start])
                if (mask == S.live).all():
                    mask = None if S.live.all() else S.live
                else:
                    self._part()
            return start, mask
        if not S.live.any():
            return None, None
        starts = np.unique(self.counter[S.live]).tolist()
        for start in starts:
            mask = S.live & (self.counter == start)
            if start in self.code.waits:
                mask = self._free(start, mask)
            if mask.any():
                return start, mask
        self._stuck(starts)

    def _part(self) -> None:
        self.counter = np.where(self.S.live, self.together, self.end)
        self.together = None

    def _free(self, start: int, waiting: np.ndarray) -> np.ndarray:
        """The waiting threads that may proceed."""
        S, instruction = self.S, self.code.program.instructions[start]
        if instruction.name == "mbarrier":
            S.at = start
            address, parity = (evaluate(S, self.R, o) for o in instruction.operands[1:3])
            return S.barriers.phase_over(S, address, parity, waiting)
        return waiting & (waiting | ~S.live).all(1, keepdims=True)

    def _stuck(self, starts: list[int]) -> None:
        self.S.at = starts[0]
        lines = ", ".join(str(self.code.program.instructions[s].line) for s in starts)
        raise DivergentBarrier(f"no thread can go on: all that are left wait at lines {lines}")

    def _go_on(self, start: int, mask: np.ndarray | None, branch: Instruction | None, condition) -> None:
        S, following = self.S, self.code.blocks[start].stop
        if branch is None:
            self._move(mask, following)
            return
        taken = True if mask is None else mask
        if branch.guard is not None:
            taken = condition if mask is None else mask & condition
            if np.ndim(taken) == 0:
                taken = bool(taken)
        if branch.name == "trap" and np.any(taken):
            S.at = following - 1
            raise Trap("the program ran a trap")
        target = self.end if branch.target is None else branch.target
        everyone = S.live if mask is None else mask
        if isinstance(taken, bool) or taken is mask:
            all_take, none_take = taken is not False, taken is False
        else:
            none_take = not taken.any()
            all_take = not none_take and bool((taken | ~everyone).all())
        if branch.target is None:
            S.live = S.live & ~S.full(taken)
        if all_take or none_take:
            self._move(mask, target if all_take else following)
            return
        if self.together is not None:
            self._part()
        self.counter = np.where(everyone, np.where(taken, target, following), self.counter)
        self._meet()

    def _move(self, mask: np.ndarray | None, to: int) -> None:
        if self.together is not None:
            self.together = to
            return
        self.counter = np.where(mask, to, self.counter)
        self._meet()

    def _meet(self) -> None:
        """Sets `together` if all live threads are at the same instruction."""
        counters = self.counter[self.S.live]
        if counters.size and (counters == counters[0]).all():
            self.together = int(counters[0])
