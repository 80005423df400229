"""Tens of thousands of requests of all kinds to a server in this process: each must get the right answer.

    python -m tests.service_stress                     50,000 requests, some minutes
    python -m tests.service_stress --requests 5000

Threads switch a thousand times as often as usual, garbage is collected all the time, and the queue is too short for the
load, so that a forgotten request shows as one without an answer. The requests cover every API; some are wrong, the
clients of some disconnect, and some allow too little time.
"""

import argparse
import asyncio
import faulthandler
import gc
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from fastbert.service.app import application
from fastbert.service.models import Models, load
from fastbert.service.service import Service
from fastbert.service.settings import Settings

sys.path.append(str(Path(__file__).parent))
from service_models import CLASSES, Client, make_folder

PATIENCE = 60.0  # seconds; a request without an answer by then counts as forgotten
FAR = 1e-4
TEXTS = ["a b c", "", "d e f g h", "ab", "the quick brown", "x " * 50, "y z " * 400]
QUESTION = {"question": "a b", "context": "c d e f g " * 20}
# (address, body): each is sent once alone before the others, and must get the same answer from then on.
ASKED = (
    *(("/v1/embeddings", {"input": text}) for text in TEXTS),
    ("/v1/embeddings", {"input": TEXTS * 3, "dimensions": 8}), ("/embed", {"inputs": TEXTS * 20}),
    ("/embed", {"inputs": TEXTS, "prompt_name": "query"}), ("/embed_all", {"inputs": ["a b", "c"]}),
    ("/v2/embed", {"texts": ["a", "b c"], "embedding_types": ["int8"]}), ("/tokenize", {"inputs": "a bc"}),
    ("/predict", {"inputs": "a b"}), ("/rerank", {"query": "q", "texts": ["a", "b c d", "e"]}),
    ("/token_classify", {"inputs": ["a b c", "d"]}), ("/question_answer", {"inputs": QUESTION}),
    ("/fill_mask", {"inputs": "a [MASK] c", "top_k": 1}), ("/v1/embeddings", {"input": []}), ("/embed", [1]),
    ("/embed", {"inputs": "a", "prompt_name": "no such"}), ("/v1/embeddings", {"input": [10**9]}),
)  # fmt: skip


def is_same(found: object, wanted: object) -> bool:
    """Whether two answers are equal. Numbers may differ by FAR, the rounding that other texts of a batch change."""
    if isinstance(wanted, float):
        return isinstance(found, (int, float)) and abs(found - wanted) < FAR
    if isinstance(wanted, list):
        return isinstance(found, list) and len(found) == len(wanted) and all(map(is_same, found, wanted))
    if isinstance(wanted, dict):
        return (
            isinstance(found, dict) and set(found) == set(wanted) and all(is_same(found[k], wanted[k]) for k in found)
        )
    return found == wanted


class Stress:
    """Sends requests through a client, and counts what became of each."""

    def __init__(self, client: Client, seed: int):
        self.client, self.draw = client, random.Random(seed)
        self.wanted, self.outcomes, self.wrong = [], Counter(), []

    async def ask(self, path: str, body: object, headers: dict[str, str], gone: asyncio.Event | None) -> object:
        content = json.dumps(body).encode()
        asked = self.client._ask("POST", path, content, headers, gone, False)
        return await asyncio.wait_for(asked, PATIENCE)

    async def one(self) -> None:
        number, manner = self.draw.randrange(len(ASKED)), self.draw.random()
        headers, gone = {}, None
        if manner < 0.05:
            gone = asyncio.Event()
            asyncio.get_running_loop().call_later(self.draw.random() * 0.01, gone.set)
        elif manner < 0.1:
            headers = {"x-timeout-seconds": f"{self.draw.random() * 0.01 + 1e-4:.5f}"}
        path, body = ASKED[number]
        try:
            reply = await self.ask(path, body, headers, gone)
        except asyncio.TimeoutError:
            self.wrong.append(f"no answer within {PATIENCE:g} s: {path} {str(body)[:80]}")
            faulthandler.dump_traceback()
            return
        if reply is None:
            self.outcomes["the client went away"] += 1
            if gone is None:
                self.wrong.append(f"given up though the client waits: {path}")
            return
        self.outcomes[reply.status] += 1
        status, answer = self.wanted[number]
        if reply.status not in (status, 429, *((504,) if headers else ())):
            self.wrong.append(f"{path} {str(body)[:80]}: {reply.status} {reply.content[:200]!r}")
        elif reply.status == status and not is_same(without_ids(reply.json()), answer):
            self.wrong.append(f"{path} {str(body)[:80]}: a wrong answer")

    async def run(self, requests: int, in_flight: int) -> None:
        for path, body in ASKED:
            reply = await self.ask(path, body, {}, None)
            self.wanted.append((reply.status, without_ids(reply.json())))
        left = iter(range(requests))

        async def one_after_another() -> None:
            for _ in left:
                if self.wrong:
                    return
                await self.one()

        await asyncio.gather(*(one_after_another() for _ in range(in_flight)))


def without_ids(answer: object) -> object:
    """The answer without Cohere's id, which is new each time."""
    return {k: v for k, v in answer.items() if k != "id"} if isinstance(answer, dict) else answer


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=50_000, help="default: 50,000")
    parser.add_argument("--in-flight", type=int, default=48, help="default: 48")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    settings = Settings(dtype="float32", device="cpu", impl="native", max_queue_tokens=6000, max_batch_tokens=512)
    with tempfile.TemporaryDirectory() as folder:
        models = []
        for kind in CLASSES:
            (Path(folder) / kind).mkdir()
            models.append(load(kind, make_folder(Path(folder) / kind, kind), settings))
    service = Service(settings, Models(models))
    client = Client(application(service))
    while not service.is_warm:
        time.sleep(0.001)
    stress = Stress(client, args.seed)
    sys.setswitchinterval(5e-6)
    gc.set_threshold(50, 2, 2)
    began = time.perf_counter()
    asyncio.run_coroutine_threadsafe(stress.run(args.requests, args.in_flight), client.loop).result()
    took = time.perf_counter() - began
    for outcome, number in sorted(stress.outcomes.items(), key=str):
        print(f"{outcome!s:24s} {number:8,d}")
    answered = sum(stress.outcomes.values())
    print(f"{answered:,} of {args.requests:,} requests in {took:.0f} s, {service.engine.tokens_waiting()} tokens wait")
    for wrong in stress.wrong[:10]:
        print(f"FAILED: {wrong}")
    if not service.engine.is_alive or service.engine.tokens_waiting() or service.open:
        print("FAILED: a thread has ended, or something is left in the queue")
        return 1
    if not stress.wrong:
        client.close()
    return bool(stress.wrong) or answered != args.requests


if __name__ == "__main__":
    sys.exit(main())
