"""Which texts are computed together, when, and on how many threads.

texts --chunks_of--> chunks, each tokenised one ahead --even_batches--> batches of tokens --run_batches--> done
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from .. import functional as F
from .calling import settle

# Tokens a batch. A CPU wants the activations of a layer to stay in its cache; a GPU wants to be full.
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 65536}
# Texts tokenised and sorted together, bounded in number and in characters, so memory stays flat on any file.
CHUNK_TEXTS, CHUNK_CHARACTERS = 8192, 4_000_000
# Batches computed at once on a CPU. Threads that share one batch wait for each other at the end of every operator.
IN_FLIGHT = 4


def tokens_per_batch(device: torch.device) -> int:
    return TOKENS_PER_BATCH.get(device.type, TOKENS_PER_BATCH["cuda"])


def chunks_of(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """Lists of at most `size` texts and about CHUNK_CHARACTERS characters."""
    texts = iter(texts)
    chunk: list[str] = []
    characters = 0
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"texts must be str, got {type(text).__name__}")
        chunk.append(text)
        characters += len(text)
        if len(chunk) >= size or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def one_ahead(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Callable[[], Any]]:
    """For each item what gives function(item): a thread begins with the next one while the caller has this one.

    The items themselves are drawn in the caller's thread. A single one needs no thread. Whoever stops before the end,
    as Ctrl-C makes it, does not wait for the thread: what that is at is dropped.
    """
    items = iter(items)
    first = list(itertools.islice(items, 2))
    if len(first) < 2:
        yield from (partial(function, item) for item in first)
        return
    asked: SimpleQueue[tuple[Future, Any] | None] = SimpleQueue()

    def ask(item: Any) -> Future:
        future: Future = Future()
        asked.put((future, item))
        return future

    # The threads of an executor are waited for at the end of the process, however long one text takes.
    threading.Thread(target=_answer, args=(function, asked), daemon=True, name="ahead").start()
    coming = deque(map(ask, first))
    try:
        while coming:
            yield coming.popleft().result
            coming.extend(map(ask, itertools.islice(items, 1)))
    finally:
        for future in coming:
            future.cancel()
        asked.put(None)


def _answer(function: Callable[[Any], Any], asked: SimpleQueue[tuple[Future, Any] | None]) -> None:
    """Settles one future after another, until None comes."""
    while (task := asked.get()) is not None:
        future, item = task
        if future.set_running_or_notify_cancel():
            settle(future, function, item)
        del task, future, item  # nothing is held while waiting


# ---- batches -----------------------------------------------------------------------------------------------


def batches_within(order: list[int], lengths: list[int], budget: int) -> Iterator[list[int]]:
    """Cuts `order` into batches of at most `budget` tokens, one text at least."""
    start = tokens = 0
    for place, row in enumerate(order):
        if place > start and tokens + lengths[row] > budget:
            yield order[start:place]
            start, tokens = place, 0
        tokens += lengths[row]
    if start < len(order):
        yield order[start:]


def even_batches(order: list[int], lengths: list[int], budget: int, device: torch.device) -> list[list[int]]:
    """`batches_within`; where several are computed at once, as many for each thread and all of about the same size, so
    that all of them end together."""
    batches = list(batches_within(order, lengths, budget))
    flights = flights_of(len(batches), device)
    total, room = sum(lengths), budget - max(lengths, default=0)  # a cut falls at most one text late
    if flights == 1 or 2 * room < budget:
        return batches
    count = -(-total // (room * flights)) * flights
    ends = np.searchsorted(np.cumsum([lengths[row] for row in order]), np.arange(1, count) * total / count) + 1
    return [order[start:end] for start, end in itertools.pairwise((0, *ends.tolist(), len(order))) if start < end]


def filling(tokens: int, longest: int, device: torch.device) -> list[int]:
    """Lengths of sequences, one or none, that bring a batch on a CPU to one of a few numbers of tokens.

    oneDNN makes a kernel for each number of rows of each product, about 0.4 ms and 0.6 MB, and keeps 1,024. Up to 16
    rows go without it where there is AVX-512, and any number where `BertModel.takes_in_one_call`.
    """
    step = min(16 if tokens <= 512 else 32, longest)
    missing = -tokens % step if device.type == "cpu" and tokens > 16 else 0
    return [missing] if missing else []


def run_batches(encode: Callable[[list[int]], None], batches: list[list[int]], device: torch.device) -> None:
    """Encodes all batches: on a CPU several at once, each with its share of the threads.

    One after another where there is one thread, too few batches to keep all of them busy to the end, or where bits must
    not depend on the number of threads (`batch_invariant()`).
    """
    threads, flights = torch.get_num_threads(), flights_of(len(batches), device)
    if flights == 1:
        for rows in batches:
            encode(rows)
        return
    pool = ThreadPoolExecutor(flights, "encode", initializer=use_threads, initargs=(threads // flights,))
    try:
        for _ in pool.map(encode, batches):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def flights_of(batches: int, device: torch.device) -> int:
    """How many of so many batches are computed at once."""
    flights = min(IN_FLIGHT, torch.get_num_threads())
    alone = device.type != "cpu" or batches < 3 * flights or F.is_batch_invariant() or _openmp() is None
    return 1 if alone else flights


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """torch's own library, by way of which OpenMP is reached; None where its operators run on other threads."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return library if hasattr(library, "omp_set_num_threads") else None
    except OSError:  # another system
        return None


def use_threads(count: int) -> None:
    """From here on this thread computes on `count` threads, and no other thread is told.

    `torch.set_num_threads` also sets the number that threads begin with which are new to torch: one that somebody
    starts meanwhile would keep it.
    """
    torch.get_num_threads()  # torch takes its own number once in each thread, now
    _openmp().omp_set_num_threads(count)
    if hasattr(_openmp(), "MKL_Set_Num_Threads_Local"):
        _openmp().MKL_Set_Num_Threads_Local(count)
