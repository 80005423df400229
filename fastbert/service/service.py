"""A server's state, and the path of a request through it: limits, the engine, metrics, and headers of the reply."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import orjson
import torch

from .. import __version__
from ..encoding.devices import resolve_device
from ..text.batching import end_team, flights_of
from .engine import Engine, Job, Prepared
from .errors import ServiceError
from .metrics import Metrics
from .models import Models, Served
from .queue import TokenQueue
from .settings import Settings
from .work.texts import announced, length_of

log = logging.getLogger("fastbert.service")
MANY = 1_000_000  # number of batches with which `flights_of` is asked: a busy server always has more
GRACE = 1.0  # seconds for the rest of a body when the server is stopping: its request is not accepted yet
SHORT_REST = 65_536  # most unread bytes of a body with which a connection is kept after the answer


# function -> the first part of text-embeddings-inference's names for its counts of texts
TEXT_COUNTS = {"embed": "te_embed", "embed_all": "te_embed", "similarity": "te_embed", "predict": "te_predict",
               "rerank": "te_predict", "score": "te_predict"}  # fmt: skip


class Gone(Exception):
    """The client closed its connection before the answer."""


class Call:
    """One request.

    Attributes:
        name: the function's name in metrics: embed, predict, ...
        body: the JSON object of the request.
        timeout: seconds for the request, counted from `began`.
        report: headers of the reply with times, tokens, and the number of cut texts.
        is_late, is_dropped: whether the body is not read to its end, because its time is over or because the server is
            stopping.
        noted: (number of texts, tokens of each, times in seconds) of what was computed, for the metrics.
    """

    def __init__(self, name: str, scope: dict, receive: Callable[[], Awaitable[dict]]):
        self.name, self.scope, self.receive = name, scope, receive
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.body: dict[str, Any] = {}
        self.began = time.perf_counter()
        self.report: list[tuple[bytes, bytes]] = []
        self.texts = self.tokens = self.cut = 0
        self.noted: list[tuple[int, list[int], tuple[float, ...]]] = []
        self.is_read = self.is_late = self.is_dropped = False

    @property
    def has_long_rest(self) -> bool:
        """Whether the unread part of the body is, or may be, longer than SHORT_REST."""
        if self.is_read:
            return False
        length = self.headers.get(b"content-length", b"0")
        return b"transfer-encoding" in self.headers or not length.isdigit() or int(length) > SHORT_REST

    async def read(self, most: int) -> None:
        """Reads the body. Raises ServiceError if it is compressed, has more than `most` bytes or is no JSON
        object; Gone."""
        coding = self.headers.get(b"content-encoding", b"identity").strip().lower()
        if coding not in (b"", b"identity"):
            raise ServiceError("encoded", "the request's body is compressed: send it without Content-Encoding")
        length = self.headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > most:
            raise self._too_large(most)
        message = await self.receive()
        content = message.get("body", b"")
        if message["type"] == "http.disconnect":
            raise Gone
        if message.get("more_body"):
            parts, size = [content], len(content)
            while message.get("more_body"):
                message = await self.receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > most:
                    raise self._too_large(most)
            content = b"".join(parts)
        self.is_read = True
        if len(content) > most:
            raise self._too_large(most)
        try:
            self.body = orjson.loads(content)
        except orjson.JSONDecodeError as error:
            raise ServiceError("not_json", f"the request's body is no JSON: {error.msg}", code="not_json") from None
        if not isinstance(self.body, dict):
            raise ServiceError("invalid", "the request's body must be a JSON object")

    @staticmethod
    def _too_large(most: int) -> ServiceError:
        return ServiceError("too_large", f"the request's body is larger than {most:,} bytes (--payload-limit)")


class Service:
    """The service of a process.

    Args:
        settings: limits of the server.
        models: loaded models.
    """

    def __init__(self, settings: Settings, models: Models):
        self.settings, self.models = settings, models
        self.device = resolve_device(settings.device)
        # Each service has its own queues, even if another service of this process has the same models: a thread answers
        # requests on the event loop of its own service.
        self.queues = {model.name: TokenQueue(model.batch_tokens, settings.max_queue_tokens) for model in models.served}
        self.engine: Engine | None = None
        self.metrics = Metrics(self._queued)
        self.open = 0  # open requests, including the one that is being admitted
        self.is_warm = self.is_stopping = False
        self.failure: str | None = None
        self.version, self.created = __version__, int(time.time())
        self._reading: dict[asyncio.Task, Call] = {}  # tasks that read a body
        self._aside = ThreadPoolExecutor(1, "aside")
        self._key = None if settings.api_key is None else f"Bearer {settings.api_key}".encode()

    # ---- beginning and end ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Starts the threads, for the running event loop."""
        end_team()  # of the thread that loaded the models, where the event loop runs in that thread
        workers = flights_of(MANY, self.device)
        self.engine = Engine(
            asyncio.get_running_loop(),
            list(self.queues.values()),
            workers=workers,
            threads=torch.get_num_threads() if workers > 1 else None,
            on_batch=self.metrics.on_batch,
        )

    async def warm_up(self) -> None:
        """Runs a first batch of each model; the server is ready after that."""
        try:
            for model in self.models.served:
                for ability, way in model.abilities.items():
                    if ability != "masks":
                        job = Job(self.queues[model.name], lambda way=way, ability=ability: _warm(way, ability), 0)
                        self.engine.submit(job)
                        await job.answer
        except ServiceError as error:
            self.failure = error.message
            log.error("the first batch failed: %s", error.message)
        else:
            self.is_warm = True
            log.info("ready")

    def begin_to_stop(self) -> None:
        """From now on /ready fails, and bodies have GRACE seconds to arrive. May be called by a signal's handler."""
        self.is_stopping = True
        if self.engine is not None:
            self.engine.loop.call_soon_threadsafe(self.engine.loop.call_later, GRACE, self._drop_reading)

    def _drop_reading(self) -> None:
        for task in self._reading:
            self._end_reading(task, "is_dropped")

    async def stop(self) -> None:
        """Ends the threads after the accepted requests, while the event loop continues."""
        self.is_stopping = True
        await asyncio.to_thread(self.engine.stop)
        self._aside.shutdown()

    @property
    def is_ready(self) -> bool:
        return self.is_warm and not self.is_stopping and self.engine.is_alive

    def _queued(self) -> tuple[int, int]:
        return (0, 0) if self.engine is None else (self.engine.requests_waiting(), self.engine.tokens_waiting())

    # ---- one request ----------------------------------------------------------------------------------------

    def admit(self, call: Call) -> None:
        """Raises ServiceError for a request without the key, and if too many requests are open."""
        if self._key is not None and not hmac.compare_digest(call.headers.get(b"authorization", b""), self._key):
            raise ServiceError("unauthorized", "the request has no valid API key: Authorization: Bearer KEY")
        if self.open > self.settings.max_concurrent_requests:
            raise ServiceError("overloaded", "Model is overloaded: too many requests are open", retry_after=1)

    async def read(self, call: Call) -> None:
        """Reads the body. Raises like `Call.read`, and ServiceError for a body that does not arrive in time: otherwise
        a client that stops in the middle of a body would remain an open request for ever."""
        timeout, task, reading = self.timeout_of(call), asyncio.current_task(), call.read(self.settings.payload_limit)
        try:
            awaited = reading.send(None)
        except StopIteration:  # most bodies are there already, and need neither a timer nor a task
            return
        seconds = min(timeout, GRACE) if self.is_stopping else timeout
        self._reading[task] = call
        timer = self.engine.loop.call_later(seconds, self._end_reading, task, "is_late")
        try:
            await _rest(reading, awaited)
        except asyncio.CancelledError:
            if not (call.is_late or call.is_dropped):
                raise
            if hasattr(task, "uncancel"):  # since Python 3.11
                task.uncancel()
            if call.is_dropped or self.is_stopping:
                raise ServiceError(
                    "not_ready", "the server is stopping, and the request's body has not arrived", retry_after=1
                ) from None
            raise ServiceError("late", f"the request's body did not come within {timeout:g} seconds") from None
        finally:
            timer.cancel()
            del self._reading[task]

    def _end_reading(self, task: asyncio.Task, why: str) -> None:
        call = self._reading[task]
        if not (call.is_late or call.is_dropped):
            setattr(call, why, True)
            task.cancel()

    def expect_count(self, texts: Sequence[Any]) -> None:
        """Raises ServiceError if a request has too many texts."""
        most = self.settings.max_client_batch_size
        if len(texts) > most:
            raise ServiceError(
                "too_large", f"batch size {len(texts)} > maximum allowed batch size {most} (--max-client-batch-size)"
            )

    async def run(
        self,
        call: Call,
        model: Served,
        texts: Sequence[Any],
        prepare: Callable[[], Prepared],
        *,
        in_windows: bool = False,
    ) -> Any:
        """The engine's answer to a request.

        Args:
            texts: texts, ids or pairs of the request; used for metrics and for the room to reserve in the queue.
            prepare: makes pieces of them, in another thread.
            in_windows: long texts are computed whole, in windows, and not cut.

        Raises: ServiceError; Gone if the client went away, in which case its pieces leave the queue.
        """
        self.expect_count(texts)
        loop, timeout = asyncio.get_running_loop(), self.timeout_of(call)
        tokens = announced(texts, None if in_windows else model.texts.limit)
        job = Job(self.queues[model.name], prepare, tokens, sum(map(length_of, texts)))
        self.engine.submit(job)
        counted = TEXT_COUNTS.get(call.name)
        if counted is not None:
            self.metrics.count(f"{counted}_count", len(texts))
        late = ServiceError("late", f"there was no answer within {timeout:g} seconds")
        timer = loop.call_later(timeout - (time.perf_counter() - call.began), _fail, job, late)
        watch = loop.create_task(_watch(call, job))
        try:
            answer = await job.answer
        except BaseException:
            self.engine.give_up(job)
            del job  # it has the error, whose traceback has this frame: as a cycle they would stay in memory
            raise
        finally:
            timer.cancel()
            watch.cancel()
            del watch  # it refers to the job
        self._note(call, job, texts)
        return answer

    async def aside(self, function: Callable[[], Any]) -> Any:
        """function() in another thread, one call at a time; for work without a model."""
        return await asyncio.get_running_loop().run_in_executor(self._aside, function)

    def timeout_of(self, call: Call) -> float:
        """Seconds for a request: the server's limit, or less if the header x-timeout-seconds asks for less."""
        given = call.headers.get(b"x-timeout-seconds")
        if given is None:
            return self.settings.timeout
        try:
            seconds = float(given)
        except ValueError:
            seconds = 0.0
        if not 0.0 < seconds < float("inf"):
            raise ServiceError("invalid", "x-timeout-seconds must be a number above 0")
        return min(seconds, self.settings.timeout)

    def _note(self, call: Call, job: Job, texts: Sequence[Any]) -> None:
        tokens, (tokenising, queued, computing) = job.prepared.tokens, job.times
        call.texts += len(texts)
        call.tokens += sum(tokens)
        call.cut += job.prepared.cut
        total = time.perf_counter() - call.began
        call.noted.append((len(texts), tokens, (total, tokenising, queued, computing)))
        call.report = [
            (b"x-compute-type", b"cpu" if self.device.type == "cpu" else b"gpu"),
            (b"x-compute-time", b"%d" % (1000 * total)),
            (b"x-compute-characters", b"%d" % sum(map(length_of, texts))),
            (b"x-compute-tokens", b"%d" % call.tokens),
            (b"x-total-time", b"%d" % (1000 * total)),
            (b"x-tokenization-time", b"%d" % (1000 * tokenising)),
            (b"x-queue-time", b"%d" % (1000 * queued)),
            (b"x-inference-time", b"%d" % (1000 * computing)),
            (b"x-truncated-texts", b"%d" % call.cut),
        ]

    def observe(self, call: Call) -> None:
        """Adds an answered request to the metrics, after its reply."""
        of_texts = TEXT_COUNTS.get(call.name)
        for texts, tokens, seconds in call.noted:
            self.metrics.time("te_request", seconds)
            if of_texts is not None:  # all texts of a request are tokenised, wait and are answered together
                self.metrics.count(f"{of_texts}_success", texts)
                self.metrics.time(of_texts, seconds, texts)
            self.metrics.input_length.observe_each(tokens)


@types.coroutine
def _rest(started: Coroutine, awaited: Any) -> Generator:
    """The rest of a coroutine that has run until it awaits `awaited`."""
    while True:
        try:
            given = yield awaited
        except BaseException as error:
            run = partial(started.throw, error)
        else:
            run = partial(started.send, given)
        try:
            awaited = run()
        except StopIteration as end:
            return end.value


def _fail(job: Job, error: Exception) -> None:
    if not job.answer.done():
        job.answer.set_exception(error)


async def _watch(call: Call, job: Job) -> None:
    """Waits until the client disconnects, and then fails the job."""
    while (await call.receive())["type"] != "http.disconnect":
        pass
    _fail(job, Gone())


def _warm(way: Any, ability: str) -> Prepared:
    given = [("a", "a")] if ability in ("answers", "scores") else ["a"]
    return way.prepare(given)
