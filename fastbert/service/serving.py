"""The server process: uvicorn with our application. A signal stops it after all accepted requests are answered."""

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

# Seconds that an idle connection is kept: longer than clients keep theirs, so that no request meets a closed one.
KEEP_ALIVE = 75
BACKLOG = 2048  # connections that may wait to be accepted


class Server(uvicorn.Server):
    """Stops on SIGTERM and SIGINT without raising the signal again, so that the exit code is 0."""

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
        self.service.begin_to_stop()
        super().handle_exit(sig, frame)


class Lines(logging.Formatter):
    """Formats a log record as a line with a JSON object."""

    FIELDS = ("method", "path", "status", "texts", "tokens", "cut", "trace")

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": round(record.created, 3), "level": record.levelname.lower(), "message": record.getMessage()}
        line |= {name: getattr(record, name) for name in self.FIELDS if hasattr(record, name)}
        return json.dumps(line, ensure_ascii=False)


def log_lines(level: str) -> None:
    """Writes structured logs to standard error. At "debug" there is a line for every request, without its texts."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    for name in ("fastbert.service", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper() if name == "fastbert.service" else "WARNING")


def bound_to(host: str, port: int) -> list[socket.socket]:
    """Bound sockets for all addresses of a host, not listening yet. Raises ValueError, in one line."""
    found: list[socket.socket] = []
    absent: OSError | None = None
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol_number, _, address in dict.fromkeys(addresses):
            try:
                found.append(_bound(socket.socket(family, kind, protocol_number), address))
            except OSError as error:
                # If IPv6 is turned off, as in many containers, localhost still has an IPv6 address.
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                absent = error
        if absent is not None and not found:
            raise absent
    except (OSError, UnicodeError, OverflowError) as error:
        for made in found:
            made.close()
        said = getattr(error, "strerror", None) or "this is not the name of a host"
        raise ValueError(f"cannot listen on {host}, port {port}: {said}") from None
    return found


def _bound(made: socket.socket, address: tuple) -> socket.socket:
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if made.family == socket.AF_INET6:  # otherwise this socket would also take the port of IPv4
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
    except OSError:
        made.close()
        raise
    return made


def serve(service: Service, sockets: Sequence[socket.socket], beside: Sequence[socket.socket] = ()) -> int:
    """Serves on the sockets until a signal comes; returns the exit code. beside: sockets that serve only /metrics.

    Raises: ValueError, in one line, if another process listens there already.
    """
    settings = service.settings
    for each in (*sockets, *beside):
        try:
            each.listen(BACKLOG)
        except OSError as error:
            host, port = each.getsockname()[:2]
            raise ValueError(f"cannot listen on {host}, port {port}: {error.strerror}") from None
    options = {
        "log_config": None, "access_log": False, "server_header": False, "proxy_headers": False, "backlog": BACKLOG,
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
