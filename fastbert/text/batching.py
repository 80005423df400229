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

# Tokens per batch: on a CPU few enough that the activations of a layer stay in its cache, on a GPU enough to fill it.
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 65536}
# Texts tokenised and sorted together. Both limits together keep memory constant for any file.
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
    """Yields for each item a function that returns function(item). A thread computes the next item meanwhile.

    The items are drawn in the caller's thread. A single item needs no thread. A caller that stops early, for example at
    Ctrl-C, does not wait for the thread; its unfinished work is dropped.
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

    # A daemon thread, not an executor's: Python waits for an executor's threads at exit, however long one text takes.
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
        del task, future, item  # so that texts and results are not kept in memory while this thread waits


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
    """`batches_within`. Where several batches are computed at once, each thread gets as many of them, all of about the
    same size, so that the threads finish together."""
    batches = list(batches_within(order, lengths, budget))
    flights = flights_of(len(batches), device)
    total, room = sum(lengths), budget - max(lengths, default=0)  # a batch may exceed its share by one text
    if flights == 1 or 2 * room < budget:
        return batches
    count = -(-total // (room * flights)) * flights
    ends = np.searchsorted(np.cumsum([lengths[row] for row in order]), np.arange(1, count) * total / count) + 1
    return [order[start:end] for start, end in itertools.pairwise((0, *ends.tolist(), len(order))) if start < end]


def filling(tokens: int, longest: int, device: torch.device) -> list[int]:
    """Length of a filler sequence, in a list of one or none, that rounds the tokens of a batch on a CPU up.

    oneDNN makes a kernel for each number of rows of each product (about 0.4 ms and 0.6 MB) and keeps 1,024 of them, so
    few different numbers of tokens are better. With AVX-512, products of up to 16 rows do not use oneDNN, and passes
    for which `BertModel.takes_in_one_call` is true never do.
    """
    step = min(16 if tokens <= 512 else 32, longest)
    missing = -tokens % step if device.type == "cpu" and tokens > 16 else 0
    return [missing] if missing else []


def run_batches(encode: Callable[[list[int]], None], batches: list[list[int]], device: torch.device) -> None:
    """Encodes all batches: on a CPU several at once, each with its share of the threads.

    They are encoded one after another where there is one thread, where there are too few batches to keep all threads
    busy to the end, and within `batch_invariant()`, where bits must not depend on the number of threads.
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
    """How many batches are computed at once, if there are `batches` of them."""
    flights = min(IN_FLIGHT, torch.get_num_threads())
    alone = device.type != "cpu" or batches < 3 * flights or F.is_batch_invariant() or _openmp() is None
    return 1 if alone else flights


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """torch's shared library, which gives access to its OpenMP; None where torch uses other threads than OpenMP's."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return library if hasattr(library, "omp_set_num_threads") else None
    except OSError:  # another system
        return None


def use_threads(count: int) -> None:
    """Makes torch's operators that this thread calls use `count` threads from now on; other threads are not affected.

    `torch.set_num_threads` would also change the default for threads that start later.
    """
    torch.get_num_threads()  # torch sets its own number at its first use in a thread: let it do so before ours is set
    _openmp().omp_set_num_threads(count)
    if hasattr(_openmp(), "MKL_Set_Num_Threads_Local"):
        _openmp().MKL_Set_Num_Threads_Local(count)


def end_team() -> None:
    """Ends the threads that torch's operators have started for this thread. Its next operator starts new ones.

    GNU's OpenMP keeps such a team for every thread that ever called an operator. When all teams together have more
    threads than there are processors, threads sleep whenever they wait for each other within an operator, instead of
    spinning for a while.
    """
    if _openmp() is not None and hasattr(_openmp(), "omp_pause_resource_all"):  # since OpenMP 5
        _openmp().omp_pause_resource_all(1)  # 1 is omp_pause_soft, which keeps the number of threads
