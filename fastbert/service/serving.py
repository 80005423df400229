"""The process: uvicorn with our application, stopped by a signal after what it has accepted is answered."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib.util
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import uvicorn

from .app import application, metrics_application
from .service import Service
from .transport import protocol

# Seconds that a connection may idle: longer than the pools of clients keep theirs, or a request meets a closed one.
KEEP_ALIVE = 75
BACKLOG = 2048  # connections that the system accepts ahead


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


def bound_to(host: str, port: int) -> list[socket.socket]:
    """Sockets for all addresses of a host, which do not listen yet. Raises ValueError, in one line."""
    found: list[socket.socket] = []
    absent: OSError | None = None
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol_number, _, address in dict.fromkeys(addresses):
            try:
                found.append(_bound(socket.socket(family, kind, protocol_number), address))
            except OSError as error:
                # Where IPv6 is turned off, as in many containers, localhost has an address of it all the same.
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                absent = error
        if absent is not None and not found:
            raise absent
    except (OSError, UnicodeError, OverflowError) as error:
        for made in found:
            made.close()
        said = getattr(error, "strerror", None) or "this is no name of a host"
        raise ValueError(f"cannot listen on {host}, port {port}: {said}") from None
    return found


def _bound(made: socket.socket, address: tuple) -> socket.socket:
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if made.family == socket.AF_INET6:  # the same port of IPv4 is another address
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
    except OSError:
        made.close()
        raise
    return made


def serve(service: Service, sockets: Sequence[socket.socket], beside: Sequence[socket.socket] = ()) -> int:
    """Answers on sockets until a signal comes; the exit code. beside: where /metrics is alone.

    Raises: ValueError, in one line, where another process listens there already.
    """
    settings = service.settings
    for each in (*sockets, *beside):
        try:
            each.listen(BACKLOG)
        except OSError as error:
            host, port = each.getsockname()[:2]
            raise ValueError(f"cannot listen on {host}, port {port}: {error.strerror}") from None
    options = {
        "log_config": None, "access_log": False, "server_header": False, "backlog": BACKLOG,
        "timeout_keep_alive": KEEP_ALIVE, "timeout_graceful_shutdown": int(settings.timeout) + 1,
    }  # fmt: skip
    kind = "uvloop" if importlib.util.find_spec("uvloop") is not None else "asyncio"
    server = Server(
        uvicorn.Config(application(service), http=protocol(), ws="none", loop=kind, **options),
        service,
    )

    async def run() -> None:
        if not beside:
            await server.serve(list(sockets))
            return
        other = uvicorn.Server(uvicorn.Config(metrics_application(service), ws="none", lifespan="off", **options))
        running = asyncio.create_task(other._serve(list(beside)))
        await server.serve(list(sockets))
        other.should_exit = True
        await running

    started = time.perf_counter()
    loop = (server.config.get_loop_factory() or asyncio.new_event_loop)()
    try:
        loop.run_until_complete(run())
    finally:
        loop.close()
    logging.getLogger("fastbert.service").info("stopped after %.0f seconds", time.perf_counter() - started)
    return 0 if server.started else 1
