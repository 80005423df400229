"""Distributes tasks to processes that may crash: `fastbert verify --jobs`.

A process runs one task after another. If it dies or loses its GPU (an illegal memory access ends a process's use of the
device), that task has failed for this reason, and a new process takes the next task. A task starts only if the running
tasks leave enough memory for it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from ..parent import child

START = 120.0  # seconds that a process may take to import torch and Triton, in addition to its first task's limit
BEGUN = "begun"


@dataclass(frozen=True)
class Outcome:
    """The outcome of a task: its answer, or in `reason` why there is none."""

    task: Any
    answer: Any = None
    seconds: float = 0.0
    reason: str = ""


class Worker:
    """A process that runs one task at a time. `fit` becomes False when the process or its device is lost."""

    def __init__(self, answer: Callable[[Any], Any], is_fit: Callable[[], bool]):
        self.connection, there = multiprocessing.Pipe()
        self.process = child(work, there, answer, is_fit)
        self.process.start()
        there.close()  # otherwise this process could not notice that the other one has ended
        self.task: Any = None
        self.began, self.fit = 0.0, True

    def begin(self, task: Any) -> None:
        self.task, self.began = task, time.monotonic() + START
        with contextlib.suppress(OSError):  # the process has died; reading from its connection will report that
            self.connection.send(task)

    def heard(self) -> Outcome | None:
        """The outcome that the process sent, or how the process ended; None for the message that it has started."""
        try:
            said = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            return self.lost(f"the process ended: {_ending(self.process.exitcode)}")
        if said == BEGUN:
            self.began = time.monotonic()
            return None
        answer, self.fit = said
        outcome = Outcome(self.task, answer, time.monotonic() - self.began)
        self.task = None
        return outcome

    def lost(self, reason: str) -> Outcome:
        outcome = Outcome(self.task, None, max(0.0, time.monotonic() - self.began), reason)
        self.task, self.fit = None, False
        return outcome

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _ending(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


def share_out(
    tasks: Sequence[Any], jobs: int, answer: Callable[[Any], Any], *, seconds: float,
    is_fit: Callable[[], bool], needs: Callable[[Any], float], room: float = float("inf"),
) -> Iterator[Outcome]:  # fmt: skip
    """An outcome for each task, in the order in which they become known; tasks begin in the order given.

    Args:
        jobs: most processes. They import the functions, which are pickled by name.
        answer: computes the answer of a task, in a process.
        seconds: limit for a task; a process that exceeds it is killed.
        is_fit: called in the process after each task; if it returns False, the process gets no further task.
        needs: share of `room` that a task needs; tasks that run at the same time share the room.
    """
    waiting: deque[Any] = deque(tasks)
    workers: list[Worker] = []
    try:
        while waiting or any(worker.task for worker in workers):
            hand_out(waiting, workers, jobs, needs, room, lambda: Worker(answer, is_fit))
            busy = [worker for worker in workers if worker.task]
            left = min(worker.began for worker in busy) + seconds - time.monotonic()
            ready = wait([worker.connection for worker in busy], max(left, 0.0))
            for worker in busy:
                if worker.connection in ready:
                    if (outcome := worker.heard()) is not None:
                        yield outcome
                elif time.monotonic() - worker.began > seconds:
                    yield worker.lost(f"not done after {seconds:g} s")
                if not worker.fit:
                    worker.end()
                    workers.remove(worker)
    finally:
        for worker in workers:
            worker.end()


def hand_out(
    waiting: deque[Any], workers: list[Worker], jobs: int, needs: Callable[[Any], float], room: float,
    start: Callable[[], Worker],
) -> None:  # fmt: skip
    """Starts waiting tasks in order while there are processes and room. At least one task always runs."""
    while waiting:
        taken = sum(needs(worker.task) for worker in workers if worker.task)
        if taken and taken + needs(waiting[0]) > room:
            return
        idle = next((worker for worker in workers if not worker.task), None)
        if idle is None:
            if len(workers) == jobs:
                return
            idle = start()
            workers.append(idle)
        idle.begin(waiting.popleft())


def work(connection: Connection, answer: Callable[[Any], Any], is_fit: Callable[[], bool]) -> None:
    """The process's main function: answers each task, and reports whether it can take another one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            task = connection.recv()
            connection.send(BEGUN)
            answered = answer(task)
            connection.send((answered, is_fit()))
