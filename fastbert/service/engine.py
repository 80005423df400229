"""Threads that tokenise and compute, off the event loop; requests come in and answers go out by the loop.

    submit (loop) -> unprepared -> tokenised by the thread that is free -> TokenQueue -> a batch -> answers (loop)

A thread of the model takes what is not tokenised yet itself where no batch is ready: a request that comes to an idle
server changes threads twice, to the model's and back. While all of them compute, one more thread tokenises what comes
meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

from ..text.batching import use_threads
from .errors import ServiceError
from .queue import Full, TokenQueue, Waiting

log = logging.getLogger("fastbert.service")


class Piece(NamedTuple):
    """A sequence of tokens for `lane` to compute. `data` is the lane's own."""

    lane: Lane
    data: Any
    tokens: int


class Lane(Protocol, Hashable):
    """Computes pieces that may share a batch."""

    def compute(self, data: Sequence[Any]) -> Sequence[Any]:
        """A result of each."""


class Prepared(NamedTuple):
    """A tokenised request.

    Attributes:
        pieces: in the order in which the answer wants their results; one at least.
        tokens: of each text, after cutting.
        cut: how many texts were cut.
        finish: results of the pieces -> what the face gets; None for the list of results itself.
    """

    pieces: list[Piece]
    tokens: list[int]
    cut: int = 0
    finish: Callable[[list[Any]], Any] | None = None


class Job:
    """A request on its way.

    Args:
        queue: of its model.
        prepare: tokenises; called off the loop. It may raise ServiceError.
        announced: tokens that the request is taken to have until it is tokenised.

    Attributes:
        answer: of `asyncio`, what `prepare`'s finish gives.
        times: seconds of tokenisation, in the queue, of computing.
    """

    def __init__(self, queue: TokenQueue, prepare: Callable[[], Prepared], announced: int):
        self.queue, self.prepare, self.announced = queue, prepare, announced
        self.answer: asyncio.Future = asyncio.get_running_loop().create_future()
        self.prepared: Prepared | None = None
        self.waiting: Waiting | None = None
        self.results: list[Any] = []
        self.missing = 0  # results
        self.is_over = False  # answered, failed or given up
        self.submitted = time.perf_counter()
        self.ready = self.started = self.ended = 0.0
        self.tokenising = 0.0

    @property
    def times(self) -> tuple[float, float, float]:
        return self.tokenising, max(self.started - self.submitted - self.tokenising, 0.0), self.ended - self.started


class Engine:
    """Threads for the models of a process.

    Args:
        loop: on which `submit` is called and answers are given.
        queues: one of each model; they take turns.
        workers: threads that compute, each with its share of `threads`, or with all of them where it is alone.
        threads: that torch computes on; None leaves the number alone.
        on_batch: called with the pieces and tokens of each batch, in a thread that computes.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        queues: Sequence[TokenQueue],
        *,
        workers: int = 1,
        threads: int | None = None,
        on_batch: Callable[[int, int], None] = lambda pieces, tokens: None,
    ):
        self.loop, self.queues, self.on_batch = loop, list(queues), on_batch
        self.threads = threads
        self.rate = 0.0  # tokens a second, lately
        self._lock = threading.Lock()
        self._for_worker, self._for_tokeniser = threading.Condition(self._lock), threading.Condition(self._lock)
        self._unprepared: deque[Job] = deque()
        self._idle = self._busy = 0  # threads that compute: how many wait, how many do
        self._preparing = 0  # jobs that a thread tokenises
        self._turn = 0
        self._stopped = False
        names = [f"model-{i}" for i in range(workers)]
        self._threads = [threading.Thread(target=self._work, name=name, daemon=True) for name in names]
        self._threads.append(threading.Thread(target=self._tokenise, name="tokenise", daemon=True))
        for thread in self._threads:
            thread.start()

    # ---- the loop's side ------------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Takes a request in. Raises ServiceError where the queue has no room for it."""
        with self._lock:
            if self._stopped:
                raise ServiceError("not_ready", "the server is stopping", retry_after=1)
            try:
                job.queue.announce(job.announced)
            except Full as full:
                raise self._refusal(job.queue, job.announced, full) from None
            self._unprepared.append(job)
            (self._for_worker if self._idle else self._for_tokeniser).notify()

    def give_up(self, job: Job) -> None:
        """Nobody waits for the answer any more: what of it is not computed yet leaves the queue."""
        with self._lock:
            self._end(job)

    def stop(self) -> None:
        """Ends the threads once nothing waits any more."""
        with self._lock:
            self._stopped = True
            self._for_worker.notify_all()
            self._for_tokeniser.notify_all()
        for thread in self._threads:
            thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether no thread has ended by an error."""
        return all(thread.is_alive() for thread in self._threads)

    def tokens_waiting(self) -> int:
        return sum(queue.tokens for queue in self.queues)

    def requests_waiting(self) -> int:
        return len(self._unprepared) + sum(map(len, self.queues))

    def _refusal(self, queue: TokenQueue, tokens: int, full: Full) -> ServiceError:
        if full.never:
            return ServiceError(
                "too_large",
                f"the request has about {tokens:,} tokens, and at most {queue.bound:,} may wait: send fewer texts at "
                "once, or start the server with a larger --max-queue-tokens",
            )
        wait = queue.tokens / self.rate if self.rate else 1.0
        return ServiceError("overloaded", "Model is overloaded", retry_after=wait)

    def _end(self, job: Job) -> bool:
        """Marks a job as over, under the lock; whether it was not before."""
        if job.is_over:
            return False
        job.is_over = True
        if job.waiting is not None:
            job.queue.remove(job.waiting)
        return True

    # ---- the threads' side ----------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._lock:
                job, batch = None, []
                while True:
                    batch = self._next_batch()
                    if batch or self._unprepared:
                        break
                    if self._stopped and not self._preparing:
                        return
                    self._idle += 1
                    self._for_worker.wait()
                    self._idle -= 1
                if not batch:
                    job = self._next_unprepared()
                else:
                    self._busy += 1
                    alone = self._busy == 1 and not any(self.queues)
                    if self._idle and any(self.queues):
                        self._for_worker.notify()
                    elif self._unprepared and not self._idle:
                        self._for_tokeniser.notify()
            if job is not None:
                self._prepare(job)
                continue
            if self.threads is not None:
                use_threads(self.threads if alone else max(self.threads // (len(self._threads) - 1), 1))
            try:
                self._compute(batch)
            except Exception as error:  # a fault of this file, or of what counts batches; the thread lives on
                self._finish(batch, dict.fromkeys((job for job, _ in batch), as_service_error(error)))
            finally:
                with self._lock:
                    self._busy -= 1

    def _tokenise(self) -> None:
        while True:
            with self._lock:
                # A thread of the model that is free takes the job itself, and does not wake this one afterwards. So at
                # the end of the engine this thread does not wait for that.
                while not self._unprepared or (self._idle and not self._stopped):
                    if self._stopped:
                        return
                    self._for_tokeniser.wait()
                job = self._next_unprepared()
            self._prepare(job)
            with self._lock:
                if self._idle and any(self.queues):
                    self._for_worker.notify()

    def _next_unprepared(self) -> Job:
        self._preparing += 1
        return self._unprepared.popleft()

    def _next_batch(self) -> list[tuple[Job, int]]:
        """Of the models in turn."""
        for _ in self.queues:
            self._turn = (self._turn + 1) % len(self.queues)
            if batch := self.queues[self._turn].next_batch():
                return [(waiting.owner, number) for waiting, number in batch]
        return []

    def _prepare(self, job: Job) -> None:
        """Tokenises a job and puts it into its queue; whatever goes wrong is the job's alone."""
        error, prepared, began = None, None, time.perf_counter()
        try:
            if not job.is_over:
                prepared = job.prepare()
        except Exception as found:
            error = as_service_error(found)
        job.tokenising = time.perf_counter() - began
        with self._lock:
            job.queue.withdraw(job.announced)
            self._preparing -= 1
            if self._stopped:
                self._for_worker.notify_all()
            if job.is_over:
                return
            if error is None:
                job.prepared, job.missing = prepared, len(prepared.pieces)
                job.results = [None] * job.missing
                waiting = Waiting([piece.tokens for piece in prepared.pieces], job)
                try:
                    job.queue.put(waiting)
                    job.waiting = waiting
                except Full as full:
                    error = self._refusal(job.queue, waiting.tokens, full)
            if error is None:
                return
            self._end(job)
        self._answer([(job, error)])

    def _compute(self, batch: list[tuple[Job, int]]) -> None:
        began = time.perf_counter()
        by_lane: dict[Lane, list[tuple[Job, int]]] = {}
        tokens = 0
        for job, number in batch:
            piece = job.prepared.pieces[number]
            tokens += piece.tokens
            by_lane.setdefault(piece.lane, []).append((job, number))
            job.started = job.started or began
        failed: dict[Job, ServiceError] = {}
        for lane, members in by_lane.items():
            self._compute_lane(lane, members, failed)
        now = time.perf_counter()
        # A moving mean over about ten batches; only Retry-After reads it.
        speed = tokens / max(now - began, 1e-6)
        self.rate = speed if not self.rate else 0.9 * self.rate + 0.1 * speed
        self.on_batch(len(batch), tokens)
        self._finish(batch, failed)

    def _finish(self, batch: list[tuple[Job, int]], failed: dict[Job, ServiceError]) -> None:
        """Answers the requests of a batch that have failed, or have all their results."""
        now = time.perf_counter()
        over: list[tuple[Job, ServiceError | None]] = []
        with self._lock:
            for job in dict.fromkeys(job for job, _ in batch):
                job.ended = now
                if (job in failed or job.missing == 0) and self._end(job):
                    over.append((job, failed.get(job)))
        if over:
            self._answer(over)

    def _compute_lane(self, lane: Lane, members: list[tuple[Job, int]], failed: dict[Job, ServiceError]) -> None:
        """Where computing fails, each half is tried for itself, so that the piece that is bad fails alone."""
        try:
            results = lane.compute([job.prepared.pieces[number].data for job, number in members])
        except Exception as error:
            if len(members) > 1:
                half = len(members) // 2
                self._compute_lane(lane, members[:half], failed)
                self._compute_lane(lane, members[half:], failed)
                return
            ((job, _),) = members
            failed[job] = as_service_error(error)
            return
        for (job, number), result in zip(members, results, strict=True):
            job.results[number] = result
        with self._lock:  # pieces of one job may be in batches of several threads
            for job, _ in members:
                job.missing -= 1

    def _answer(self, over: list[tuple[Job, ServiceError | None]]) -> None:
        answers = []
        for job, error in over:
            answer = None
            if error is None:
                try:
                    finish = job.prepared.finish
                    answer = job.results if finish is None else finish(job.results)
                except Exception as found:
                    error = as_service_error(found)
            answers.append((job, answer, error))
        try:
            self.loop.call_soon_threadsafe(_give, answers)
        except RuntimeError:  # the loop is closed, and with it all connections
            log.warning("%d answers came after the end of the event loop", len(answers))


def _give(answers: list[tuple[Job, Any, ServiceError | None]]) -> None:
    for job, answer, error in answers:
        if job.answer.done():
            continue
        if error is not None:
            job.answer.set_exception(error)
        else:
            job.answer.set_result(answer)


def log_failure(error: Exception) -> None:
    """Says where an error came from, without its message: that may hold a client's text."""
    trace = "".join(traceback.format_tb(error.__traceback__))
    log.error("a request failed: %s", type(error).__name__, extra={"trace": trace})


def as_service_error(error: Exception) -> ServiceError:
    """What a client is told: our own words, never those of an error that nobody wrote for a client."""
    if isinstance(error, ServiceError):
        return error
    log_failure(error)
    return ServiceError("failed", f"the model failed on this request ({type(error).__name__})")
