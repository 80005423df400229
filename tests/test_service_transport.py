"""The transport: a reply is one write, and a connection ends properly although its request was not read to the end."""

import asyncio
import contextlib
import importlib.util
import socket
import struct
from types import SimpleNamespace

import pytest

pytest.importorskip("uvicorn", reason="needs the serve extra")
import uvicorn
from uvicorn.server import ServerState

from fastbert.service import transport
from fastbert.service.transport import OneWrite, protocol
from service_models import PATIENCE

pytestmark = pytest.mark.once
REFUSED = b"POST /refuse HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n"


async def replies(scope, receive, send):
    """Refuses a body without reading it, or replies after reading it; in three parts if the address is /parts."""
    refuses = scope["path"] == "/refuse"
    if not refuses:
        while (await receive()).get("more_body"):
            pass
    headers = [(b"content-length", b"6"), *([(b"connection", b"close")] if refuses else [])]
    await send({"type": "http.response.start", "status": 413 if refuses else 200, "headers": headers})
    for part in (b"an", b"sw", b"er") if scope["path"] == "/parts" else (b"answer",):
        await send({"type": "http.response.body", "body": part, "more_body": part in (b"an", b"sw")})


class Recorder:
    """A transport that records what is written to it."""

    def __init__(self, transport, written):
        self.transport, self.written = transport, written

    def __getattr__(self, name):
        return getattr(self.transport, name)

    def write(self, data):
        if data:
            self.written.append(bytes(data))
        self.transport.write(data)


class Server:
    """uvicorn's protocol on a socket, with an application. state: uvicorn's, with its open connections. written:
    everything written, in its pieces. made: the protocols of all connections."""

    def __init__(self, application=replies, kind=None):
        self.application, self.kind = application, kind

    async def __aenter__(self):
        config = uvicorn.Config(self.application, ws="none", log_config=None, access_log=False)
        self.state, self.written, self.made = ServerState(), [], []
        config.load()
        server = self

        class Recorded(protocol(self.kind)):
            def connection_made(self, transport):
                super().connection_made(Recorder(transport, server.written))
                server.made.append(self)

        loop = asyncio.get_running_loop()
        self.server = await loop.create_server(lambda: Recorded(config, self.state, {}), "127.0.0.1", 0)
        return self

    async def __aexit__(self, *error):
        self.server.close()

    async def connect(self):
        return await asyncio.open_connection(*self.server.sockets[0].getsockname())

    async def until_all_are_lost(self):
        while self.state.connections:
            await asyncio.sleep(0.001)


def run(test):
    asyncio.run(asyncio.wait_for(test(), PATIENCE))


def test_every_reply_begins_with_one_write_and_leaves_the_connection_open():
    async def test():
        async with Server() as server:
            reader, writer = await server.connect()
            for path in (b"/", b"/parts", b"/"):
                writer.write(b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\nbody" % path)
                assert (await reader.readuntil(b"answer")).startswith(b"HTTP/1.1 200 OK\r\n")
            assert [piece.partition(b"\r\n\r\n")[2] or piece for piece in server.written] == [
                b"answer", b"an", b"sw", b"er", b"answer",
            ]  # fmt: skip
            writer.close()

    run(test)


def test_a_connection_whose_request_was_read_is_closed_at_once():
    """Otherwise the client, which keeps its side open, would hold the connection until the end of the pause."""

    async def test():
        async with Server() as server:
            reader, writer = await server.connect()
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            assert (await reader.read()).endswith(b"answer")
            await server.until_all_are_lost()
            writer.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transport, "LINGER_SECONDS", 10 * PATIENCE)
        run(test)


@pytest.mark.parametrize("bound", ["seconds", "bytes"])
def test_the_rest_of_a_refused_request_is_read_within_bounds(bound, monkeypatch):
    """After the reply the client may go on sending; its silence, or too much data, then ends the connection. uvicorn
    must know, because on shutdown it waits for open connections."""
    monkeypatch.setattr(transport, "LINGER_SECONDS", 0.05 if bound == "seconds" else 10 * PATIENCE)
    monkeypatch.setattr(transport, "LINGER_BYTES", 50_000)

    async def test():
        async with Server() as server:
            reader, writer = await server.connect()
            writer.write(REFUSED)
            reply = await reader.read()
            assert reply.startswith(b"HTTP/1.1 413 ")
            assert reply.endswith(b"\r\n\r\nanswer")
            assert len(server.written) == 1
            (made,) = server.made
            assert made.timeout_keep_alive_task is None  # for uvicorn the connection is closed
            writer.write(b"x" * 50_000)
            await writer.drain()
            if bound == "bytes":
                await asyncio.sleep(0.05)
                assert server.state.connections == {made}
                writer.write(b"x")
            await server.until_all_are_lost()
            with contextlib.suppress(ConnectionError):
                writer.close()
                await writer.wait_closed()

    run(test)


def test_a_client_reads_the_answer_to_a_malformed_body(monkeypatch):
    """Closed at once, the connection would be reset because of the bytes behind the malformed ones."""
    monkeypatch.setattr(transport, "LINGER_SECONDS", 10 * PATIENCE)

    async def test():
        async with Server() as server:
            reader, writer = await server.connect()
            writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n4\r\nbody\r\n")
            await asyncio.sleep(0.05)
            writer.write(b"no length\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
            assert len(server.state.connections) == 1
            writer.write(b"x" * 50_000)
            writer.close()
            await server.until_all_are_lost()

    run(test)


async def echoes(scope, receive, send):
    """Replies with the method, the address and the body."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message["body"], message["more_body"]
    content = b"%b %b <%b>" % (scope["method"].encode(), scope["path"].encode(), body)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(content))]})
    await send({"type": "http.response.body", "body": content})


OFFER = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAoAAA\r\n"


@pytest.mark.parametrize("kind", ["h11", "httptools"])
def test_a_request_that_offers_another_protocol_is_answered_with_its_body(kind, caplog):
    """Java's HttpClient offers HTTP/2 with each request. With httptools, uvicorn lost the body: the answer was that an
    empty body is no JSON. Each such request also left two lines in the log."""
    if kind == "httptools" and importlib.util.find_spec("httptools") is None:
        pytest.skip("needs the test extra")

    async def test():
        async with Server(echoes, kind) as server:
            reader, writer = await server.connect()

            async def answered(*parts):
                for part in parts:
                    writer.write(part)
                    await asyncio.sleep(0.02)
                return (await reader.readuntil(b">")).rpartition(b"\r\n\r\n")[2]

            head = b"POST /a HTTP/1.1\r\nhost: x\r\n" + OFFER
            long = b"x" * 60_000
            assert await answered(head + b"content-length: 4\r\n\r\nbody") == b"POST /a <body>"
            assert await answered(head[:40], head[40:], b"content-length: 4\r\n\r\n", b"bo", b"dy") == b"POST /a <body>"
            assert await answered(head + b"content-length: 60000\r\n\r\n", long) == b"POST /a <%b>" % long
            chunks = head + b"transfer-encoding: chunked\r\n\r\n"
            assert await answered(chunks, b"4\r\nbody\r\n", b"0\r\n\r\n") == b"POST /a <body>"
            apart = b"POST /a HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nconnection: keep-alive\r\nupgrade: h2c\r\n"
            assert await answered(apart + b"content-length: 4\r\n\r\nbody") == b"POST /a <body>"
            assert await answered(b"GET /b HTTP/1.1\r\nhost: x\r\n" + OFFER + b"\r\n") == b"GET /b <>"
            two = head + b"content-length: 1\r\n\r\n"
            assert await answered(two + b"1" + two + b"2POST /c HTTP/1.1\r\nhost: x\r\n\r\n") == b"POST /a <1>"
            assert (await reader.readuntil(b">")).endswith(b"POST /a <2>")
            assert (await reader.readuntil(b">")).endswith(b"POST /c <>")
            writer.close()

    run(test)
    assert not caplog.records


async def long_answer(scope, receive, send):
    content = b"x" * 60_000_000
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(content))]})
    for part in range(0, len(content), 10_000_000):
        await send({"type": "http.response.body", "body": content[part : part + 10_000_000], "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def test_a_client_that_does_not_read_its_answer_is_disconnected(monkeypatch):
    """It kept the answer in memory, and a server that was told to stop waited for it for two minutes. A client that
    reads slowly gets all."""
    monkeypatch.setattr(transport, "STALL_SECONDS", 0.2)

    async def test():
        async with Server(long_answer) as server:
            for is_slow in (True, False):
                reader, writer = await server.connect()
                writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
                if is_slow:
                    await reader.readuntil(b"\r\n\r\n")
                    left = 60_000_000
                    while left:
                        left -= len(await reader.read(2**20))
                        await asyncio.sleep(0.001)
                    writer.close()
                await server.until_all_are_lost()
            writer.close()

    run(test)


def test_no_timer_holds_a_connection_that_was_lost_in_the_middle_of_an_answer():
    async def test():
        async with Server(long_answer) as server:
            reader, writer = await server.connect()
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            writer.transport.abort()
            await server.until_all_are_lost()
            (made,) = server.made
            assert made.transport._watch.cancelled()

    run(test)


class Transport:
    """Records what is written to it, and whether it was closed."""

    def __init__(self):
        self.written, self.closed = [], False

    def write(self, data):
        self.written.append(data)

    def get_write_buffer_size(self):
        return 0

    def close(self):
        self.closed = True

    def is_closing(self):
        return self.closed


class Loop:
    """An event loop whose next turn the test starts."""

    def __init__(self):
        self.waiting = []

    def call_soon(self, function):
        self.waiting.append(function)

    def turn(self):
        for function in self.waiting:
            function()
        self.waiting = []


def test_head_and_body_are_one_write():
    """The head waits for the body. An early end loses nothing. Other data is written at once."""
    transport, loop = Transport(), Loop()
    one = OneWrite(transport, loop, SimpleNamespace(cycle=None))
    one.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    one.write(b"HTTP/1.1 200 OK\r\n\r\n")
    one.write(b"body")
    one.write(b"more")
    loop.turn()
    one.write(b"HTTP/1.1 204 No Content\r\n\r\n")
    assert transport.written == [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\nbody", b"more"]
    one.close()
    assert transport.written[-1] == b"HTTP/1.1 204 No Content\r\n\r\n"
    assert one.is_closing()


def test_a_head_without_a_body_is_sent():
    """httptools' protocol writes only the head of an answer to HEAD."""
    transport, loop = Transport(), Loop()
    one = OneWrite(transport, loop, SimpleNamespace(cycle=None))
    one.write(b"HTTP/1.1 200 OK\r\n\r\n")
    assert transport.written == []
    loop.turn()
    one.write(b"HTTP/1.1 404 Not Found\r\n\r\n")
    one.write(b"body")
    assert transport.written == [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 404 Not Found\r\n\r\nbody"]


def test_a_reset_by_the_client_is_no_error():
    """The transport closes before it learns of the reset, and then the system refuses to end the sending half."""

    class Half(asyncio.Protocol):
        cycle = SimpleNamespace(response_complete=True, more_body=True)

        def connection_made(self, transport):
            self.transport = transport
            made.set_result(self)

        def connection_lost(self, error):
            lost.set_result(error)

    async def test():
        nonlocal made, lost
        loop = asyncio.get_running_loop()
        made, lost = loop.create_future(), loop.create_future()
        server = await loop.create_server(Half, "127.0.0.1", 0)
        client = socket.create_connection(server.sockets[0].getsockname())
        half = await made
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() resets
        client.close()
        OneWrite(half.transport, loop, half).close()
        assert isinstance(await lost, ConnectionResetError)
        server.close()

    made = lost = None
    asyncio.run(asyncio.wait_for(test(), PATIENCE))
