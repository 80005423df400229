"""Connections: a reply is sent in one piece, and it reaches clients that have not finished sending their request."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
from typing import Any

# Bounds for reading and discarding the rest of a request after its answer.
LINGER_SECONDS, LINGER_BYTES = 2.0, 2**25


class OneWrite:
    """A transport that sends the head of a reply together with its body, in one piece.

    uvicorn writes them one after the other. In two pieces, the second might wait for an acknowledgement, which the
    client's system delays by 40 ms. A head without a body, the reply to HEAD, is sent at the loop's next iteration.

    If the connection is closed before the whole request was read, a client that is still sending would lose the answer:
    its system resets the connection because of the unread bytes, and drops what it has received. So the transport keeps
    reading for a while, and discards the bytes (`Leftover`).
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, protocol: Any):
        self._transport, self._loop, self._protocol, self._head = transport, loop, protocol, b""
        self._is_closing = False

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

    def is_closing(self) -> bool:
        return self._is_closing or self._transport.is_closing()

    def close(self) -> None:
        if self.is_closing():
            return
        self._is_closing = True
        self._flush()
        cycle = self._protocol.cycle
        if cycle is not None and cycle.more_body:
            Leftover(self._transport, self._loop, self._protocol)
        else:
            self._transport.close()


class Leftover(asyncio.Protocol):
    """Reads and discards the rest of a request after its answer, within the bounds above."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, before: asyncio.Protocol):
        self._transport, self._before, self._bytes = transport, before, 0
        self._timer = loop.call_later(LINGER_SECONDS, transport.close)
        transport.set_protocol(self)
        with contextlib.suppress(OSError):  # if the client has reset the connection, the event loop reports it next
            transport.write_eof()
        transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        self._bytes += len(data)
        if self._bytes > LINGER_BYTES:
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._timer.cancel()
        self._before.connection_lost(error)


def protocol() -> type:
    """uvicorn's HTTP protocol (httptools' if that is installed) on a OneWrite transport."""
    if importlib.util.find_spec("httptools") is not None:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as Base
    else:
        from uvicorn.protocols.http.h11_impl import H11Protocol as Base

    class Protocol(Base):
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(OneWrite(transport, self.loop, self))

    return Protocol
