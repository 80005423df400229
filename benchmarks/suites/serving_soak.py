"""Runs a server for half an hour under twice the load that it can answer, with clients that misbehave.

    python -m benchmarks.suites.serving_soak                    30 minutes
    python -m benchmarks.suites.serving_soak --seconds 60       a short run

Requests come at random times, twice as many as the server answers. The rate is at first that with 64 requests in
flight, then that of the last sixtieth of the run, because other work on the machine changes what the server can answer.
Of a hundred requests, 80 are short texts, 8 are lists of 40, 4 are texts of a megabyte, 4 are invalid, and 4 are from
clients that close their connection at once. Every vector is compared. The memory of the process and the tokens in its
queue are recorded. Memory may grow by a twentieth from the second quarter of the run to the last one. At the end one
request must be answered within a second after the last one. Any deviation ends the run with exit code 1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .serving import Load, closed, party

QUEUE_TOKENS = 8_000
TIMEOUT = 600  # seconds; long, because other work on the machine may delay answers
TIMES = 60
FAR = 1e-4
BAD: tuple[object, ...] = (
    {"input": []}, {"input": 7}, {"input": [10**9]}, {"input": "a", "dimensions": -1}, {}, [],
    {"input": "a", "encoding_format": "x"},
)  # fmt: skip
LONG = "a long text that is cut at the limit "


class Watched(NamedTuple):
    """One observation of the server. refused: the share of requests since the last one that were answered with 429."""

    seconds: float
    rate: float
    refused: float
    megabytes: float
    tokens: float


def growth(megabytes: Sequence[float]) -> float:
    """How much more memory the last quarter of observations shows than the second quarter, as a share: medians, since a
    single observation may be of a moment with large texts. A steady leak shows with what it adds in half of the run."""
    quarter = len(megabytes) // 4
    if not quarter:
        return 0.0
    return statistics.median(megabytes[-quarter:]) / statistics.median(megabytes[quarter : 2 * quarter]) - 1


class Soak:
    """Sends requests of all kinds to one port and counts their outcomes."""

    def __init__(self, port: int, load: Load, long: np.ndarray, seed: int):
        self.port, self.load, self.long = port, load, long
        self.draw, self.outcomes, self.wrong = random.Random(seed), Counter(), []

    async def exchange(self, body: object, path: str = "/v1/embeddings", leave: bool = False) -> tuple[int, bytes]:
        """(status, content) of one request; (0, b"") if the client closes the connection."""
        content = json.dumps(body).encode() if path != "/metrics" else b""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 24)
        try:
            method = b"GET" if path == "/metrics" else b"POST"
            writer.write(
                b"%b %b HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"
                % (method, path.encode(), len(content), content)
            )
            await writer.drain()
            if leave:
                return 0, b""
            head, _, answer = (await reader.read(-1)).partition(b"\r\n\r\n")
            return int(head[9:12]), answer
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def one(self) -> None:
        """Sends one request. An error is recorded, including a connection that the server closes."""
        kind = self.draw.choices(("short", "list", "long", "bad", "gone"), (80, 8, 4, 4, 4))[0]
        texts, vectors = self.load.texts, self.load.vectors
        rows = [self.draw.randrange(len(texts)) for _ in range(40 if kind == "list" else 1)]
        body: object = {"input": [texts[row] for row in rows]}
        wanted = vectors[rows]
        if kind == "bad":
            body = self.draw.choice(BAD)
        elif kind == "long":
            body, wanted = {"input": LONG * 27_000}, self.long
        try:
            status, content = await self.exchange(body, leave=kind == "gone")
        except (OSError, ValueError) as error:
            self.wrong.append(f"{kind}: {type(error).__name__}: {error}")
            return
        self.outcomes[kind, status] += 1
        if kind == "gone":
            return
        if status == 200 and kind != "bad":
            found = np.array([item["embedding"] for item in json.loads(content)["data"]], np.float32)
            if found.shape != wanted.shape or not np.abs(found - wanted).max() < FAR:
                self.wrong.append(f"{kind}: wrong vectors")
        elif status not in ((400, 429) if kind == "bad" else (429,)):
            self.wrong.append(f"{kind}: {status} {content[:200]!r}")

    async def gauge(self, name: str) -> float:
        _, text = await self.exchange({}, "/metrics")
        return next(float(line.rsplit(" ", 1)[1]) for line in text.decode().splitlines() if line.startswith(name + " "))

    async def run(self, rate: float, seconds: float, pid: int) -> list[Watched]:
        """Runs the load. Returns sixty observations."""
        tasks: set[asyncio.Task] = set()
        watched, began, due, refused, answered = [], time.perf_counter(), 0.0, 0, 0
        while due < seconds and not self.wrong:
            due += self.draw.expovariate(rate)
            await asyncio.sleep(max(began + due - time.perf_counter(), 0.0))
            task = asyncio.create_task(self.one())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            if due > seconds * (len(watched) + 1) / TIMES:
                before, (refused, answered) = (refused, answered), self.counts()
                part = (refused - before[0]) / max(sum((refused, answered)) - sum(before), 1)
                watched.append(Watched(due, rate, part, memory(pid), await self.gauge("te_queue_tokens")))
                form = "{:7.0f} s {:6.1f} requests/s, {:4.0%} refused {:7.0f} MB {:7.0f} tokens wait"
                print(form.format(*watched[-1]), flush=True)
                # If nothing was refused, the server can answer more. The rate never falls to zero.
                rate = max(2 * (answered - before[1]) * TIMES / seconds, 1.0) if part else 1.25 * rate
        await asyncio.gather(*tasks)
        return watched

    def counts(self) -> tuple[int, int]:
        """(requests answered with 429 so far, requests answered so far)."""
        refused = sum(number for (_, status), number in self.outcomes.items() if status == 429)
        return refused, sum(self.outcomes.values()) - refused


def memory(pid: int) -> float:
    """Resident memory of a process in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1800.0, help="default: 1800")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the outcome to this file")
    args = parser.parse_args(argv)
    from fastbert import Encoder
    from fastbert.cli.options import default_model
    from fastbert.storage import write_json

    folder = default_model()
    texts = resources.files("fastbert").joinpath("data", "devils_dictionary.txt").read_text("utf-8").splitlines()
    encoder = Encoder.from_pretrained(folder, dtype="float32", device="cpu")
    load = Load(texts, encoder.encode(texts).numpy(), FAR)
    long = encoder.encode([LONG * 100]).numpy()

    def command(port: int) -> list[str]:
        return [sys.executable, "-m", "fastbert", "serve", f"minilm={folder}", "--port", str(port), "--device", "cpu",
                "--dtype", "float32", "--max-queue-tokens", str(QUEUE_TOKENS), "--timeout", str(TIMEOUT)]  # fmt: skip

    with party(command) as (port, pid):
        times, took = asyncio.run(closed(port, load, 64, min(10.0, args.seconds), True))
        rate = 2 * len(times) / took
        print(f"{rate / 2:.1f} texts/s with 64 in flight; {rate:.1f} requests/s from here on")
        soak = Soak(port, load, long, args.seed)

        async def all_of_it() -> tuple[list[Watched], float]:
            watched = await soak.run(rate, args.seconds, pid)
            began = time.perf_counter()
            status, _ = await soak.exchange({"input": texts[0]})
            return watched, time.perf_counter() - began if status == 200 else float("inf")

        watched, recovery = asyncio.run(all_of_it())
    for (kind, status), number in sorted(soak.outcomes.items()):
        print(f"{kind:6s} {status:4d} {number:8,d}")
    print(f"recovery: {recovery:.2f} s")
    grown = growth([seen.megabytes for seen in watched])
    print(f"memory, last quarter and second quarter: {grown:+.1%}")
    failures = [
        *soak.wrong[:5],
        *(["the queue grew beyond its bound"] if any(seen.tokens > QUEUE_TOKENS for seen in watched) else []),
        *(["memory grew by more than a twentieth"] if grown > 0.05 else []),
        *(["no answer within a second after the load"] if recovery > 1.0 else []),
    ]
    for failure in failures:
        print(f"FAILED: {failure}")
    if args.json:
        outcomes = {f"{kind} {status or 'no answer wanted'}": n for (kind, status), n in sorted(soak.outcomes.items())}
        soaked = {"seconds": args.seconds, "queue_tokens": QUEUE_TOKENS, "outcomes": outcomes, "failures": failures,
                  "recovery_s": recovery, "watched": [seen._asdict() for seen in watched]}  # fmt: skip
        write_json(args.json, {"schema": "fastbert-serving/1", "rows": [], "soak": soaked})
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
