"""Compares servers: texts a second, latency, and processor time, with 1, 8 and 64 requests in flight.

    python -m benchmarks.suites.serving                                          our server, and the Encoder without one
    python -m benchmarks.suites.serving --peers /tmp/peers/bin/python            also infinity and a plain handler
    python -m benchmarks.suites.serving --txtai /tmp/txtai/bin/python            also txtai
    python -m benchmarks.suites.serving --only-load http://127.0.0.1:8080        a server that runs already

--peers names the Python of an environment with infinity-emb[server,torch]==0.0.78. It also has the packages of the
plain handler, which is sentence-transformers behind FastAPI with one `encode` for each request. --txtai names the
Python of an environment with txtai[api]==9.14, which is told to cut long texts as the model's folder says. All servers
have the same folder of all-MiniLM-L6-v2 and the same client. A request has one text of the Devil's Dictionary, in the
dictionary's order: most are short, some have three hundred words. Servers take turns for each number of requests in
flight.

closed: this number of clients, each of which sends its next text after its answer. open: requests come at random times
with a fixed mean rate, whether or not earlier ones are answered. The rate is 0.7 of the texts a second of the slowest
server with 64 in flight, the same for all, and afterwards 0.7 of ours for ours alone.

Every vector is compared with that of the Encoder: a wrong vector, or a status other than 200, ends the run. The client
shares the machine's cores with the servers. Processor time is that of the server, counted by the system.

idle: a request of ten tokens compared with `Encoder.encode` of the same text in the client's process, in turns: the
median difference of wall times, and the processor time of each. The client is a socket, without a library or an event
loop. Each follows a pause, since the OpenMP threads of the one before would spin for some milliseconds and take a
processor away. `encode` computes with all threads in one half of the turns, with a single one in the other half, and
the faster of the two counts.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

FLIGHTS = (1, 8, 64)
# Allowed difference of a vector's elements from the Encoder's: our server in float32, and in bfloat16, where rounding
# depends on the batch; other servers, which may compute in another dtype. Vectors have length 1.
FAR, FAR_IN_BFLOAT16, FAR_OF_OTHERS = 1e-4, 0.02, 0.05
PLAIN = """
import sys
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer
import uvicorn
model = SentenceTransformer(sys.argv[1], device="cpu")
app = FastAPI()
class Body(BaseModel):
    input: str
@app.post("/v1/embeddings")
def embeddings(body: Body):
    return {"data": [{"embedding": model.encode([body.input])[0].tolist()}]}
uvicorn.run(app, port=int(sys.argv[2]), log_level="warning")
"""
TXTAI = """
import json, os, sys, uvicorn
os.environ["CONFIG"] = json.dumps({"embeddings": {"path": sys.argv[1], "maxlength": True}, "openai": True})
uvicorn.run("txtai.api:app", port=int(sys.argv[2]), log_level="warning")
"""
PAUSE = 0.02  # seconds; libgomp spins for about 3 ms
TEN_TOKENS = "a man is eating food in the park"


@dataclass
class Row:
    """The figures of a server: latencies in milliseconds, processor time in milliseconds for a text. rate: planned
    requests a second of an open loop."""

    party: str
    loop: str
    in_flight: int
    texts: int
    texts_per_second: float
    p50: float
    p95: float
    p99: float
    cpu_ms_per_text: float | None
    rate: float | None = None


def request_of(body: bytes) -> bytes:
    return (
        b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
        % (len(body), body)
    )


def length_after(head: bytes) -> int:
    """Bytes of the body that follows the head of a reply. Raises RuntimeError for another status than 200."""
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(head.decode())
    return int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])


def exchange(connection: socket.socket, request: bytes) -> bytes:
    """Sends a request and returns the body of its reply."""
    connection.sendall(request)
    reply = b""
    while True:
        reply += connection.recv(65_536)
        head, end, body = reply.partition(b"\r\n\r\n")
        if end and len(body) == length_after(head):
            return body


class Connection:
    """A persistent connection for one request at a time."""

    def __init__(self, port: int):
        self.port, self.streams = port, None

    async def ask(self, body: bytes) -> bytes:
        # Servers close connections that were idle for some seconds.
        if self.streams is None or self.streams[0].at_eof():
            self.streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self.streams
        writer.write(request_of(body))
        return await reader.readexactly(length_after(await reader.readuntil(b"\r\n\r\n")))


class Load:
    """Texts as requests, and their expected vectors. far: the allowed difference.

    In `bodies`, `packed` requests ask for vectors in base64, as OpenAI's client does; the plain handler and txtai do
    not support that.
    """

    def __init__(self, texts: list[str], vectors: np.ndarray, far: float):
        self.texts, self.vectors, self.far = texts, vectors, far

    def bodies(self, packed: bool) -> list[bytes]:
        more = {"encoding_format": "base64"} if packed else {}
        return [json.dumps({"input": text, "model": "minilm", **more}).encode() for text in self.texts]

    def expect(self, number: int, content: bytes) -> None:
        embedding = json.loads(content)["data"][0]["embedding"]
        if isinstance(embedding, str):
            embedding = np.frombuffer(base64.b64decode(embedding), "<f4")
        off = float(np.abs(np.asarray(embedding, np.float32) - self.vectors[number]).max())
        if not off < self.far:
            raise RuntimeError(f"a wrong vector, off by {off:.2g}")


async def closed(port: int, load: Load, in_flight: int, seconds: float, packed: bool) -> tuple[list[float], float]:
    """(latency of each request, total seconds) with a fixed number of clients."""
    bodies, times, answers = load.bodies(packed), [], []
    began = time.perf_counter()
    numbers = iter(range(10**9))

    async def client() -> None:
        connection = Connection(port)
        while time.perf_counter() < began + seconds:
            number = next(numbers) % len(bodies)
            sent = time.perf_counter()
            content = await connection.ask(bodies[number])
            times.append(time.perf_counter() - sent)
            answers.append((number, content))

    await asyncio.gather(*(client() for _ in range(in_flight)))
    took = time.perf_counter() - began
    for number, content in answers:
        load.expect(number, content)
    return times, took


async def opened(port: int, load: Load, rate: float, seconds: float, packed: bool) -> tuple[list[float], float]:
    """(latency of each request, total seconds) of requests at random times, `rate` in a second. A latency begins at the
    time for which the request was planned."""
    bodies, times, free, draw = load.bodies(packed), [], [], random.Random(0)
    tasks, began, due = [], time.perf_counter(), 0.0

    async def request(number: int, at: float) -> None:
        connection = free.pop() if free else Connection(port)
        content = await connection.ask(bodies[number])
        times.append(time.perf_counter() - at)
        free.append(connection)
        load.expect(number, content)

    while due < seconds:
        due += draw.expovariate(rate)
        await asyncio.sleep(max(began + due - time.perf_counter(), 0.0))
        tasks.append(asyncio.create_task(request(len(tasks) % len(bodies), began + due)))
    await asyncio.gather(*tasks)
    return times, time.perf_counter() - began


# ---- parties -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def party(command: Callable[[int], list[str]], **environment: str) -> Iterator[tuple[int, int]]:
    """(port, process id) of a server that is ready."""
    with contextlib.closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    process = subprocess.Popen(
        command(port), env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 180
        while True:
            with contextlib.suppress(OSError):
                body = json.dumps({"input": "a", "model": "minilm"}).encode()
                request = urllib.request.Request(
                    f"http://127.0.0.1:{port}/v1/embeddings", body, {"content-type": "application/json"}
                )
                urllib.request.urlopen(request, timeout=60).read()
                break
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{command(port)[:4]} does not answer")
            time.sleep(0.2)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait()


def processor_time(pid: int) -> float:
    """Processor seconds of a process and its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def row(
    name: str, loop: str, in_flight: int, found: tuple[list[float], float], cpu: float | None, rate: float | None = None
) -> Row:
    times, took = found
    p50, p95, p99 = (1e3 * float(x) for x in np.percentile(times, (50, 95, 99)))
    cpu = None if cpu is None else 1e3 * cpu / len(times)
    made = Row(name, loop, in_flight, len(times), len(times) / took, p50, p95, p99, cpu, rate)
    print("{party:24s} {loop:6s} {in_flight:3d} in flight {texts_per_second:8.1f} texts/s  p50 {p50:8.2f}  "
          "p95 {p95:8.2f}  p99 {p99:8.2f} ms  ".format(**asdict(made))
          + ("" if cpu is None else f"{cpu:.2f} ms of processor time a text"), flush=True)  # fmt: skip
    return made


def encoder_alone(encoder: Any, texts: list[str], seconds: float) -> Row:
    """`Encoder.encode` of all texts at once, repeated: a bound for what a server can reach."""
    encoder.encode(texts)
    began, cpu, passes = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() < began + seconds:
        encoder.encode(texts)
        passes += 1
    cpu, took = time.process_time() - cpu, time.perf_counter() - began
    count = passes * len(texts)
    made = Row("Encoder.encode", "none", len(texts), count, count / took, 0.0, 0.0, 0.0, 1e3 * cpu / count)
    print(f"{made.party:24s} {made.texts_per_second:8.1f} texts/s  {made.cpu_ms_per_text:.2f} ms of processor time")
    return made


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", metavar="PYTHON", help="Python with infinity-emb[server,torch]==0.0.78")
    parser.add_argument("--txtai", metavar="PYTHON", help="Python with txtai[api]==9.14")
    parser.add_argument("--only-load", metavar="URL", help="only measure the server at this URL")
    parser.add_argument(
        "--dtype", default="float32", help="dtype of our server; others have float32 (default: float32)"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each measurement (default: 10)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the rows to this file")
    args = parser.parse_args(argv)
    from fastbert import Encoder
    from fastbert.cli.options import default_model
    from fastbert.storage import write_json

    folder = default_model()
    data = resources.files("fastbert").joinpath("data", "devils_dictionary.txt").read_text(encoding="utf-8")
    texts = data.splitlines()
    encoder = Encoder.from_pretrained(folder, dtype=args.dtype, device="cpu")
    vectors = encoder.encode(texts).numpy()
    load = Load(texts, vectors, FAR if args.dtype == "float32" else FAR_IN_BFLOAT16)
    rows: list[Row] = []
    if args.only_load:
        port = int(args.only_load.rpartition(":")[2].strip("/"))
        for in_flight in FLIGHTS:
            found = asyncio.run(closed(port, load, in_flight, args.seconds, True))
            rows.append(row("only", "closed", in_flight, found, None))
    else:
        rows = _side_by_side(args, folder, load, encoder)
        added = _idle(args, folder, encoder)
    if args.json:
        made = {"schema": "fastbert-serving/1", "rows": [asdict(each) for each in rows]}
        write_json(args.json, made if args.only_load else {**made, "idle": added})
    return 0


def _ours(args: argparse.Namespace, folder: str) -> Callable[[int], list[str]]:
    return lambda port: [
        sys.executable, "-m", "fastbert", "serve", f"minilm={folder}", "--port", str(port), "--dtype", args.dtype,
        "--device", "cpu",
    ]  # fmt: skip


def _idle(args: argparse.Namespace, folder: str, encoder: Any) -> dict[str, float]:
    """Milliseconds of one request and of `encode` alone: median wall time, and processor time."""
    body = json.dumps({"input": TEN_TOKENS, "model": "minilm", "encoding_format": "base64"}).encode()
    request = request_of(body)
    rounds = max(int(10 * min(args.seconds, 10.0)), 20)
    threads = torch.get_num_threads()

    def in_turn(port: int, rounds: int) -> tuple[list[float], list[float], float]:
        alone, served, own_cpu = [], [], 0.0
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(rounds):
                time.sleep(PAUSE)
                began, cpu = time.perf_counter(), time.process_time()
                encoder.encode([TEN_TOKENS])
                alone.append(time.perf_counter() - began)
                time.sleep(PAUSE)
                own_cpu += time.process_time() - cpu
                began = time.perf_counter()
                exchange(connection, request)
                served.append(time.perf_counter() - began)
        return alone, served, own_cpu

    made = []
    with party(_ours(args, folder)) as (port, pid):
        for number in sorted({1, threads}):
            torch.set_num_threads(number)
            in_turn(port, 20)
            before = processor_time(pid)
            alone, served, own_cpu = in_turn(port, rounds)
            cpu = processor_time(pid) - before
            made.append({
                "encode_threads": number, "encode_ms": 1e3 * float(np.median(alone)),
                "served_ms": 1e3 * float(np.median(served)),
                "added_ms": 1e3 * float(np.median(np.subtract(served, alone))),
                "encode_cpu_ms": 1e3 * own_cpu / rounds, "served_cpu_ms": 1e3 * cpu / rounds,
            })  # fmt: skip
            print("idle, ten tokens: encode, {encode_threads} threads {encode_ms:.2f} ms, served {served_ms:.2f} ms, "
                  "added {added_ms:.2f} ms; processor time {encode_cpu_ms:.2f} and {served_cpu_ms:.2f} ms"
                  .format(**made[-1]), flush=True)  # fmt: skip
    torch.set_num_threads(threads)
    return min(made, key=lambda each: each["encode_ms"])


def _side_by_side(args: argparse.Namespace, folder: str, load: Load, encoder: Any) -> list[Row]:
    def infinity(port: int) -> list[str]:
        return [str(Path(args.peers).parent / "infinity_emb"), "v2", "--model-id", folder, "--served-model-name",
                "minilm", "--engine", "torch", "--device", "cpu", "--no-model-warmup", "--url-prefix", "/v1",
                "--port", str(port)]  # fmt: skip

    def plain(port: int) -> list[str]:
        return [args.peers, "-c", PLAIN, folder, str(port)]

    def txtai(port: int) -> list[str]:
        return [args.txtai, "-c", TXTAI, folder, str(port)]

    parties = {"fastbert serve": (_ours(args, folder), True)}
    if args.peers:
        parties |= {"infinity 0.0.78": (infinity, True), "plain FastAPI": (plain, False)}
    if args.txtai:
        parties["txtai 9.14"] = (txtai, False)
    ours = next(iter(parties))
    with contextlib.ExitStack() as stack:
        offline = {"HF_HUB_OFFLINE": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0", "DO_NOT_TRACK": "1"}
        running = {
            name: (*stack.enter_context(party(command, **offline)), packed)
            for name, (command, packed) in parties.items()
        }
        print("the servers run", flush=True)
        theirs = Load(load.texts, load.vectors, FAR_OF_OTHERS)
        made = [encoder_alone(encoder, load.texts, args.seconds)]

        def measure(name: str, in_flight: int, rate: float | None = None) -> None:
            """A row in a closed loop, or an open one with a rate. A server with a wrong answer has no further rows."""
            port, pid, packed = running[name]
            of_party = load if name == ours else theirs
            try:
                if rate is None:
                    asyncio.run(closed(port, of_party, in_flight, min(1.0, args.seconds), packed))
                before = processor_time(pid)
                if rate is None:
                    found = asyncio.run(closed(port, of_party, in_flight, args.seconds, packed))
                else:
                    found = asyncio.run(opened(port, of_party, rate, args.seconds, packed))
            except (RuntimeError, OSError) as error:
                if name == ours:
                    raise
                print(f"{name}, {in_flight} in flight: {error}: no row")
                del running[name]
                return
            loop = "closed" if rate is None else "open"
            made.append(row(name, loop, in_flight, found, processor_time(pid) - before, rate))

        for in_flight in FLIGHTS:
            for name in list(running):
                measure(name, in_flight)
        speeds = {r.party: r.texts_per_second for r in made if r.in_flight == FLIGHTS[-1]}
        for name in list(running):
            measure(name, 0, 0.7 * min(speeds.values()))
        measure(ours, 0, 0.7 * speeds[ours])
    return made


if __name__ == "__main__":
    sys.exit(main())
