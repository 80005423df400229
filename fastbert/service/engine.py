"""Threads that tokenise and compute; requests come from the event loop, and answers return to it.

    submit (loop) -> unprepared -> tokenised by a free thread -> TokenQueue -> a batch -> answers (loop)

A model thread without a batch tokenises requests itself. So a request to an idle server changes threads only twice,
from the loop to the model thread and back. While all model threads compute, one more thread tokenises new requests.
Requests with a long text are tokenised by a thread of their own, one after the other, so that no other request waits
for that; and another one makes the answers of those with many windows or words.

A batch that is computed alone uses all processors, by OpenMP threads that its model thread keeps for the next one. They
are fast only as long as they are the only such team of the process (see `end_team`). So the first model thread is woken
before the others, and the others end their team after such a batch, and when nothing waits any more.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

from ..text.batching import end_team, use_threads
from .errors import ServiceError
from .queue import SHARE, Full, TokenQueue, Waiting

log = logging.getLogger("fastbert.service")
LONG = 100_000  # characters of a request from which on it is tokenised beside others; that takes 10 ms or more


class Piece(NamedTuple):
    """A sequence of tokens that `lane` computes. Only the lane knows the type of `data`."""

    lane: Lane
    data: Any
    tokens: int


class Lane(Protocol, Hashable):
    """Computes a batch of pieces. Pieces with the same lane may share a batch."""

    def compute(self, data: Sequence[Any]) -> Sequence[Any]:
        """One result for each piece."""


class Prepared(NamedTuple):
    """A tokenised request.

    Attributes:
        pieces: in the order of the results in the answer; at least one.
        tokens: number of tokens of each text, after cutting.
        cut: number of texts that were cut.
        finish: turns the pieces' results into the request's result; None returns the list of results.
        is_slow: whether `finish` may take long.
    """

    pieces: list[Piece]
    tokens: list[int]
    cut: int = 0
    finish: Callable[[list[Any]], Any] | None = None
    is_slow: bool = False


class Job:
    """A request in the engine.

    Args:
        queue: the queue of its model.
        prepare: tokenises the request; called in another thread. It may raise ServiceError.
        announced: estimated tokens of the request, which count until it is tokenised.
        characters: of all its texts.

    Attributes:
        answer: an asyncio future of the result.
        times: seconds of tokenising, in the queue, and of computing.
    """

    def __init__(self, queue: TokenQueue, prepare: Callable[[], Prepared], announced: int, characters: int = 0):
        self.queue, self.prepare, self.announced, self.is_long = queue, prepare, announced, characters > LONG
        self.answer: asyncio.Future = asyncio.get_running_loop().create_future()
        self.prepared: Prepared | None = None
        self.waiting: Waiting | None = None
        self.results: list[Any] = []
        self.missing = 0  # number of results that are not computed yet
        self.is_over = False  # answered, failed or cancelled
        self.submitted = time.perf_counter()
        self.ready = self.started = self.ended = 0.0
        self.tokenising = 0.0

    @property
    def times(self) -> tuple[float, float, float]:
        return self.tokenising, max(self.started - self.submitted - self.tokenising, 0.0), self.ended - self.started


class Engine:
    """Threads for the models of a process.

    Args:
        loop: the event loop that calls `submit` and gets the answers.
        queues: one for each model; they take turns.
        workers: number of model threads. Each computes on its share of `threads`; a single one uses all.
        threads: number of torch's threads; None does not change it.
        on_batch: called with the numbers of pieces and tokens of each batch, in a model thread.
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
        self.rate = 0.0  # tokens per second of batches that are not small, a moving mean
        self._lock = threading.Lock()
        self._for_worker = [threading.Condition(self._lock) for _ in range(workers)]
        self._for_tokeniser, self._for_long = threading.Condition(self._lock), threading.Condition(self._lock)
        self._unprepared: deque[Job] = deque()
        self._long: deque[Job] = deque()  # jobs with a long text, not tokenised yet
        self._idle: set[int] = set()  # numbers of the model threads that wait and have not been woken
        self._busy = 0  # model threads that compute
        self._preparing = 0  # jobs that are being tokenised
        self._turn = 0
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._work, args=(number,), name=f"model-{number}", daemon=True)
            for number in range(workers)
        ]
        self._threads += [
            threading.Thread(target=target, name=name, daemon=True)
            for name, target in (("tokenise", self._tokenise), ("tokenise-long", self._tokenise_long))
        ]
        self._finisher = ThreadPoolExecutor(1, "finish")
        for thread in self._threads:
            thread.start()

    # ---- called by the event loop ---------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Accepts a request. Raises ServiceError if the queue has no room for it."""
        with self._lock:
            if self._stopped:
                raise ServiceError("not_ready", "the server is stopping", retry_after=1)
            try:
                job.queue.announce(job.announced)
            except Full as full:
                raise self._refusal(job.queue, job.announced, full) from None
            if job.is_long:
                self._long.append(job)
                self._for_long.notify()
                return
            self._unprepared.append(job)
            if self._idle:
                self._wake_worker()
            else:
                self._for_tokeniser.notify()

    def give_up(self, job: Job) -> None:
        """Cancels a request whose client is gone: its pieces that are not computed yet leave the queue."""
        with self._lock:
            self._end(job)

    def stop(self) -> None:
        """Ends the threads as soon as all waiting requests are done."""
        with self._lock:
            self._stopped = True
            self._wake_all_workers()
            self._for_tokeniser.notify_all()
            self._for_long.notify_all()
        for thread in self._threads:
            thread.join()
        self._finisher.shutdown()

    @property
    def is_alive(self) -> bool:
        """Whether all threads are running, that is, none has ended by an error."""
        return all(thread.is_alive() for thread in self._threads)

    def tokens_waiting(self) -> int:
        return sum(queue.tokens for queue in self.queues)

    def requests_waiting(self) -> int:
        return len(self._unprepared) + len(self._long) + sum(map(len, self.queues))

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
        """Marks a job as over, under the lock. Returns False if it was over already."""
        if job.is_over:
            return False
        job.is_over = True
        if job.waiting is not None:
            job.queue.remove(job.waiting)
            job.waiting = None  # it refers to the job: as a cycle they would stay in memory, with the request's texts
        return True

    # ---- run by the threads ---------------------------------------------------------------------------------

    def _wake_worker(self) -> None:
        """Wakes the first of the idle model threads, under the lock."""
        number = min(self._idle)
        self._idle.remove(number)
        self._for_worker[number].notify()

    def _wake_all_workers(self) -> None:
        while self._idle:
            self._wake_worker()

    def _work(self, number: int) -> None:
        used = 0  # OpenMP threads of this one
        while True:
            with self._lock:
                job, batch = None, []
                while True:
                    batch = self._next_batch()
                    if batch or self._unprepared:
                        break
                    if self._stopped and not self._preparing and not self._long:
                        return
                    self._idle.add(number)
                    while number in self._idle:
                        self._for_worker[number].wait()
                if not batch:
                    job = self._next_of(self._unprepared)
                else:
                    self._busy += 1
                    alone = self._busy == 1 and not any(self.queues)
                    # A thread that was woken for an unprepared job may have found this batch instead.
                    if self._idle and (self._unprepared or any(self.queues)):
                        self._wake_worker()
                    elif self._unprepared:
                        self._for_tokeniser.notify()
            if job is not None:
                self._prepare(job)
                continue
            if self.threads is not None:
                wanted = self.threads if alone else max(self.threads // len(self._for_worker), 1)
                if wanted != used:
                    use_threads(wanted)
                used = wanted
            try:
                self._compute(batch)
            except Exception as error:  # a bug here or in `on_batch`: the thread must survive it
                self._finish(batch, dict.fromkeys((job for job, _ in batch), as_service_error(error)))
            finally:
                if number and (alone or not any(self.queues)):
                    end_team()
                with self._lock:
                    self._busy -= 1

    def _tokenise(self) -> None:
        while True:
            with self._lock:
                # An idle model thread takes the job itself and does not wake this thread afterwards. When the engine is
                # stopping, this thread therefore must not wait for that.
                while not self._unprepared or (self._idle and not self._stopped):
                    if self._stopped:
                        return
                    self._for_tokeniser.wait()
                job = self._next_of(self._unprepared)
            self._prepare_beside(job)

    def _tokenise_long(self) -> None:
        while True:
            with self._lock:
                while not self._long:
                    if self._stopped:
                        return
                    self._for_long.wait()
                job = self._next_of(self._long)
            self._prepare_beside(job)

    def _prepare_beside(self, job: Job) -> None:
        """Tokenises a job in a thread without a model, and wakes a model thread."""
        self._prepare(job)
        with self._lock:
            if self._idle and any(self.queues):
                self._wake_worker()

    def _next_of(self, line: deque[Job]) -> Job:
        self._preparing += 1
        return line.popleft()

    def _next_batch(self) -> list[tuple[Job, int]]:
        """The next batch; models take turns."""
        for _ in self.queues:
            self._turn = (self._turn + 1) % len(self.queues)
            if batch := self.queues[self._turn].next_batch():
                return [(waiting.owner, number) for waiting, number in batch]
        return []

    def _prepare(self, job: Job) -> None:
        """Tokenises a job and puts it into its queue; an error fails this job only."""
        error, prepared, began = None, None, time.perf_counter()
        try:
            if not job.is_over:
                prepared = job.prepare()
        except BaseException as found:  # also a panic of a library, which is no Exception: the thread must survive it
            error = as_service_error(found)
        job.tokenising = time.perf_counter() - began
        with self._lock:
            job.queue.withdraw(job.announced)
            self._preparing -= 1
            if self._stopped:
                self._wake_all_workers()
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
        # A moving mean over about ten batches, used for Retry-After only. Small batches have fewer tokens a second than
        # those of a full queue.
        if SHARE * tokens >= batch[0][0].queue.budget:
            speed = tokens / max(now - began, 1e-6)
            self.rate = speed if not self.rate else 0.9 * self.rate + 0.1 * speed
        self.on_batch(len(batch), tokens)
        self._finish(batch, failed)

    def _finish(self, batch: list[tuple[Job, int]], failed: dict[Job, ServiceError]) -> None:
        """Answers those requests of a batch that have failed or have all their results."""
        now = time.perf_counter()
        over: list[tuple[Job, ServiceError | None]] = []
        with self._lock:
            for job in dict.fromkeys(job for job, _ in batch):
                job.ended = now
                if (job in failed or job.missing == 0) and self._end(job):
                    over.append((job, failed.get(job)))
        slow = [(job, error) for job, error in over if error is None and job.prepared.is_slow]
        if slow:
            self._finisher.submit(self._answer, slow)
        if len(slow) < len(over):
            self._answer([pair for pair in over if pair not in slow])

    def _compute_lane(self, lane: Lane, members: list[tuple[Job, int]], failed: dict[Job, ServiceError]) -> None:
        """Computes the pieces of a lane. If that fails, each half is tried separately, so that only the bad piece
        fails."""
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
        with self._lock:  # the pieces of a job may be in batches of several threads
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
        except RuntimeError:  # the event loop is closed, and all connections with it
            log.warning("%d answers came after the end of the event loop", len(answers))


def _give(answers: list[tuple[Job, Any, ServiceError | None]]) -> None:
    for job, answer, error in answers:
        if job.answer.done():
            continue
        if error is not None:
            job.answer.set_exception(error)
        else:
            job.answer.set_result(answer)


def log_failure(error: BaseException) -> None:
    """Logs the type of an error and where it came from, but not its message, which may contain a client's text."""
    trace = "".join(traceback.format_tb(error.__traceback__))
    log.error("a request failed: %s", type(error).__name__, extra={"trace": trace})


def as_service_error(error: BaseException) -> ServiceError:
    """The error for the client: a ServiceError as it is, any other error without its message. Without a traceback,
    whose frames refer to the job, which refers to the error."""
    if isinstance(error, ServiceError):
        return error.with_traceback(None)
    log_failure(error)
    return ServiceError("failed", f"the model failed on this request ({type(error).__name__})")
