"""Several processes that make parts. A process asks for the next unit when it can start on it.

parent --> worker   a unit; None if there are no more
worker --> parent   None to ask for a unit; an outcome; at the end its EncodeStats
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any

from ..encoding.stats import EncodeStats
from ..encoding.workers import WorkerPool, device_of
from .job import Job
from .run import CorpusEncoder, Done, Failed
from .units import Unit


class CorpusPool(WorkerPool):
    """`CorpusEncoder(job)` in each of several processes.

    Raises: the error of loading in a worker; RuntimeError if a worker ends by itself.
    """

    def __init__(self, workers: int, job: Job):
        super().__init__(workers, _work, job)
        self.stats = EncodeStats()

    def encode(self, units: Iterable[Unit]) -> Iterator[Done | Failed]:
        """Yields an outcome for each unit, in the order of completion. The pool is closed afterwards."""
        coming, working = iter(units), set(self.pipes)
        try:
            while working:
                for pipe in wait(list(working)):
                    message = self.receive(pipe)
                    if message is None:
                        self.send(pipe, next(coming, None))
                    elif isinstance(message, EncodeStats):
                        working.discard(pipe)
                        self._add(message)
                    else:
                        yield message
        finally:
            self.close()

    def _add(self, stats: EncodeStats) -> None:
        for name in ("texts", "tokens", "padded_tokens", "seconds"):
            setattr(self.stats, name, getattr(self.stats, name) + getattr(stats, name))


def _work(pipe: Connection, index: int, job: Job) -> None:
    encoder = CorpusEncoder(replace(job, encoder={**job.encoder, "device": device_of(index, dict(job.encoder))}))
    sending = threading.Lock()  # the thread that reads asks for units, the main thread sends outcomes

    def send(message: Any) -> None:
        with sending:
            pipe.send(message)

    def units() -> Iterator[Unit]:
        while True:
            send(None)
            unit = pipe.recv()
            if unit is None:
                return
            yield unit

    send("ready")
    for outcome in encoder.encode(units()):
        send(outcome)
    send(encoder.stats)
