"""The process: uvicorn with our application, stopped by a signal after what it has accepted is answered."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import logging
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from .app import application, metrics_application
from .service import Service

# Seconds that a connection may idle: longer than the pools of clients keep theirs, or a request meets a closed one.
KEEP_ALIVE = 75


class OneWrite:
    """A transport that sends the head of a reply together with its body, in one piece.

    uvicorn writes them one after the other: in two pieces, of which the second may wait for an acknowledgement that
    the client's system delays by 40 ms. A head without a body, as HEAD is answered, goes at the loop's next turn.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop):
        self._transport, self._loop, self._head = transport, loop, b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if self._head:
            data, self._head = self._head + data, b""
        elif data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 100"):
            self._head = data
            self._loop.call_soon(self._flush)
            return
        self._transport.write(data)

    def _flush(self) -> None:
        if self._head:
            self._transport.write(self._head)
            self._head = b""

    def close(self) -> None:
        self._flush()
        self._transport.close()


def protocol() -> type:
    """uvicorn's HTTP protocol, by httptools where that is installed, that writes replies in one piece."""
    if importlib.util.find_spec("httptools") is not None:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as Base
    else:
        from uvicorn.protocols.http.h11_impl import H11Protocol as Base

    class Protocol(Base):
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(OneWrite(transport, self.loop))

    return Protocol


class Server(uvicorn.Server):
    """Stops on SIGTERM and SIGINT without raising the signal again: to stop so is no failure."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.service.is_stopping = True  # readiness says so while the rest is answered
        super().handle_exit(sig, frame)


class Lines(logging.Formatter):
    """A JSON object a line."""

    FIELDS = ("method", "path", "status", "texts", "tokens", "cut", "trace")

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": round(record.created, 3), "level": record.levelname.lower(), "message": record.getMessage()}
        line |= {name: getattr(record, name) for name in self.FIELDS if hasattr(record, name)}
        return json.dumps(line, ensure_ascii=False)


def log_lines(level: str) -> None:
    """Structured logs to standard error; at "debug" a line for every request, which never has a text in it."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    for name in ("fastbert.service", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper() if name == "fastbert.service" else "WARNING")


def serve(service: Service) -> int:
    """Answers until a signal comes; the exit code."""
    settings = service.settings
    options = {
        "host": settings.host, "log_config": None, "access_log": False, "server_header": False, "backlog": 2048,
        "timeout_keep_alive": KEEP_ALIVE, "timeout_graceful_shutdown": int(settings.timeout) + 1,
    }  # fmt: skip
    kind = "uvloop" if importlib.util.find_spec("uvloop") is not None else "asyncio"
    server = Server(
        uvicorn.Config(application(service), port=settings.port, http=protocol(), ws="none", loop=kind, **options),
        service,
    )

    async def run() -> None:
        beside = None
        if settings.prometheus_port is not None:
            config = uvicorn.Config(
                metrics_application(service), port=settings.prometheus_port, ws="none", lifespan="off", **options
            )
            other = uvicorn.Server(config)
            beside = asyncio.create_task(other._serve())
        await server.serve()
        if beside is not None:
            other.should_exit = True
            await beside

    started = time.perf_counter()
    loop = (server.config.get_loop_factory() or asyncio.new_event_loop)()
    try:
        loop.run_until_complete(run())
    finally:
        loop.close()
    logging.getLogger("fastbert.service").info("stopped after %.0f seconds", time.perf_counter() - started)
    return 0 if server.started else 1
