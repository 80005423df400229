"""`fastbert verify --jobs`: its cases shared out among processes that may crash.

A process takes one case after another. Where it dies, or its GPU no longer answers (an illegal access ends all that a
process had on the device), that case has failed by that reason and a new process takes the next one. A case begins only
where the device has room for what it may take beside those that run.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait

import torch

from .verify import Result, Task, check

ROOM = 0.9  # of the device's memory that is free at the start: the rest is for what allocators waste
START = 120.0  # seconds that a process may take to import torch and Triton, beside the time of its first case
BEGUN = "begun"


class Worker:
    """A process that checks what it is sent, one task at a time; no longer `fit` once it or its device is lost."""

    def __init__(self, device: torch.device, impl: str):
        spawn = multiprocessing.get_context("spawn")
        self.connection, there = spawn.Pipe()
        self.process = spawn.Process(target=work, args=(there, str(device), impl), daemon=True)
        self.process.start()
        there.close()  # or its end could not be told from silence
        self.task: Task | None = None
        self.began, self.fit = 0.0, True

    def begin(self, task: Task) -> None:
        self.task, self.began = task, time.monotonic() + START
        with contextlib.suppress(OSError):  # it has died, which its connection will tell
            self.connection.send(task)

    def result(self) -> Result | None:
        """What it has to say, or how it ended; None where it only says that it has begun."""
        try:
            said = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            result = self.failed(f"the process ended: {_ending(self.process.exitcode)}")
        else:
            if said == BEGUN:
                self.began = time.monotonic()
                return None
            result, self.fit = said
        self.task = None
        return result

    def overdue(self, seconds: float) -> Result:
        result = self.failed(f"not done after {seconds:g} s")
        self.task = None
        return result

    def failed(self, message: str) -> Result:
        self.fit = False
        return Result(self.task, (), max(0.0, time.monotonic() - self.began), message)

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


def share_out(tasks: Sequence[Task], jobs: int, device: torch.device, impl: str, seconds: float) -> Iterator[Result]:
    """A result for each task, in the order in which they become known; they begin in the order given.

    seconds: a case may take; then its process is ended.
    """
    waiting: deque[Task] = deque(tasks)
    workers: list[Worker] = []
    room = _room(device)
    try:
        while waiting or any(worker.task for worker in workers):
            _hand_out(waiting, workers, jobs, room, device, impl)
            busy = [worker for worker in workers if worker.task]
            left = min(worker.began for worker in busy) + seconds - time.monotonic()
            ready = wait([worker.connection for worker in busy], max(left, 0.0))
            for worker in busy:
                if worker.connection in ready:
                    if (result := worker.result()) is not None:
                        yield result
                elif time.monotonic() - worker.began > seconds:
                    yield worker.overdue(seconds)
                if not worker.fit:
                    worker.end()
                    workers.remove(worker)
    finally:
        for worker in workers:
            worker.end()


def _hand_out(
    waiting: deque[Task], workers: list[Worker], jobs: int, room: float, device: torch.device, impl: str
) -> None:
    """Begins what waits, first come first served, while there are processes and room; something always runs."""
    while waiting:
        taken = sum(worker.task.needs for worker in workers if worker.task)
        if taken and taken + waiting[0].needs > room:
            return
        idle = next((worker for worker in workers if not worker.task), None)
        if idle is None:
            if len(workers) == jobs:
                return
            idle = Worker(device, impl)
            workers.append(idle)
        idle.begin(waiting.popleft())


def _room(device: torch.device) -> float:
    return ROOM * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")


# ---- in the process --------------------------------------------------------------------------------------


def work(connection: Connection, device: str, impl: str) -> None:
    """Answers each task with its result, and whether it can take another one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who started all
    place = torch.device(device)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            task = connection.recv()
            connection.send(BEGUN)
            result = check(task, place, impl)
            fit = _answers(place)
            connection.send((result, fit))
            if fit and place.type == "cuda":
                torch.cuda.empty_cache()  # for the others


def _answers(device: torch.device) -> bool:
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return False
    return True
