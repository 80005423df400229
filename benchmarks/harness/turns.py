"""Two processes that take turns: one works while the other waits, so that both meet the same machine."""

from __future__ import annotations

import os
from dataclasses import dataclass


class TurnsOver(Exception):
    """This process has taken all its turns."""


@dataclass
class Turns:
    """One process' side of the alternation.

    Args:
        read, write: file descriptors of two pipes, from the other process and to it.
        first: whether this process has the first turn.
        steps: the steps of a turn.
        count: the number of this process' turns.
    """

    read: int
    write: int
    first: bool
    steps: int
    count: int
    done: int = 0  # steps of this process, the one before the first turn included

    def after_step(self) -> bool:
        """Called after each step. The first step is not part of a turn: after it a process waits until the other one
        has done its first step. Returns whether it has waited; raises TurnsOver after the last turn."""
        self.done += 1
        if self.done == 1:
            if not self.first:
                self._pass_on()
            self._wait()
            return True
        if (self.done - 1) % self.steps:
            return False
        is_last = self.done - 1 == self.steps * self.count
        if self.first or not is_last:
            self._pass_on()
        if is_last:
            raise TurnsOver
        self._wait()
        return True

    def _pass_on(self) -> None:
        os.write(self.write, b"x")

    def _wait(self) -> None:
        if not os.read(self.read, 1):
            raise RuntimeError("the other process has ended before its last turn")


def pipes() -> tuple[tuple[int, int], tuple[int, int]]:
    """(read, write) for each of two processes, to be passed by `pass_fds` and then closed here."""
    read_of_second, write_of_first = os.pipe()
    read_of_first, write_of_second = os.pipe()
    return (read_of_first, write_of_first), (read_of_second, write_of_second)
