"""Connections: a reply is sent in one piece, and it reaches clients that have not finished sending their request."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
from typing import Any

# Bounds for reading and discarding the rest of a request after its answer.
LINGER_SECONDS, LINGER_BYTES = 2.0, 2**25
STALL_SECONDS = 15.0  # a client that takes none of its answer for so long, or up to twice so long, is disconnected


class OneWrite:
    """A transport that sends the head of a reply together with its body, in one piece.

    uvicorn writes them one after the other. In two pieces, the second might wait for an acknowledgement, which the
    client's system delays by 40 ms. A head without a body, the reply to HEAD, is sent at the loop's next iteration.

    If the connection is closed before the whole request was read, a client that is still sending would lose the answer:
    its system resets the connection because of the unread bytes, and drops what it has received. So the transport keeps
    reading for a while, and discards the bytes (`Leftover`).

    A client that no longer reads would keep its answer in memory for ever, and a server that is stopping would wait for
    it. So its connection is ended.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, protocol: Any):
        self._transport, self._loop, self._protocol, self._head = transport, loop, protocol, b""
        self._is_closing = False
        self._written = 0  # bytes
        self._watch: asyncio.TimerHandle | None = None  # while the buffer is not empty

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if self._head:
            data, self._head = self._head + data, b""
        elif data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 100"):
            self._head = data
            self._loop.call_soon(self._flush)
            return
        self._send(data)

    def _flush(self) -> None:
        if self._head:
            data, self._head = self._head, b""
            self._send(data)

    def _send(self, data: bytes) -> None:
        self._transport.write(data)
        self._written += len(data)
        if self._watch is None:
            self._look(None)

    def _look(self, taken: int | None) -> None:
        """Ends the connection if the client has taken nothing of the buffer since `taken`; looks again later."""
        self._watch = None
        left = self._transport.get_write_buffer_size()
        if left and taken == self._written - left:
            self._transport.abort()
        elif left:
            self._watch = self._loop.call_later(STALL_SECONDS, self._look, self._written - left)

    def forget(self) -> None:
        """Called when the connection is lost."""
        if self._watch is not None:
            self._watch.cancel()

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


def protocol(kind: str | None = None) -> type:
    """uvicorn's HTTP protocol on a OneWrite transport. kind: "httptools" or "h11"; None for httptools if installed."""
    if kind is None:
        kind = "h11" if importlib.util.find_spec("httptools") is None else "httptools"
    if kind == "httptools":
        Base = _of_httptools()
    else:
        from uvicorn.protocols.http.h11_impl import H11Protocol as Base

    class Protocol(Base):
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(OneWrite(transport, self.loop, self))

        def connection_lost(self, error: Exception | None) -> None:
            self.transport.forget()
            super().connection_lost(error)

        def _unsupported_upgrade_warning(self) -> None:
            """An offer of another protocol is ignored, without two lines in the log each time."""

    return Protocol


def _of_httptools() -> type:
    """uvicorn's protocol with httptools, which also answers requests that offer another protocol.

    Java's HttpClient, which the libraries of Java for embeddings use, offers HTTP/2 with its requests. httptools stops
    before the body of such a request, and uvicorn loses the body. So another parser gets the same head without the
    offer, and what follows.
    """
    import httptools
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class Protocol(HttpToolsProtocol):
        def data_received(self, data: bytes) -> None:
            try:
                self._unset_keepalive_if_required()
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as stopped:
                if self._has_offer():
                    self._parse_again(data[stopped.args[0] :])
            except httptools.HttpParserError:
                message = "Invalid HTTP request received."
                self.logger.warning(message)
                self.send_400_response(message)

        def _has_offer(self) -> bool:
            return self.parser.should_upgrade() and any(name == b"upgrade" for name, _ in self.headers)

        def on_headers_complete(self) -> None:
            if not self._has_offer():
                super().on_headers_complete()

        def on_message_complete(self) -> None:
            if not self._has_offer():
                super().on_message_complete()

        def _parse_again(self, rest: bytes) -> None:
            kept = [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
            version = self.parser.get_http_version().encode()
            head = b"%b %b HTTP/%b\r\n%b\r\n" % (self.parser.get_method(), self.url, version, b"".join(kept))
            self.parser = httptools.HttpRequestParser(self)
            with contextlib.suppress(AttributeError):  # httptools before 0.6.3
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self.data_received(head + rest)

    return Protocol
