"""Several processes that share the work of one Encoder.

    parent   chunks of texts --a pipe a worker--> vectors, put back in their order
    worker   a thread receives and tokenises; the main thread computes and sends

A worker gets the next chunk when it is done with one, so a slow one holds nobody up; the chunks under way are bounded,
and so is memory. Worth it where one process cannot use the whole machine: several NUMA nodes (each worker stays on one,
with its own copy of the weights in that node's memory), several GPUs (each worker takes the next), dozens of cores.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .encoder import Encoder, EncodeStats, resolve_device

# Chunks that a worker holds: one that it computes, one that it tokenises meanwhile.
CHUNKS_A_WORKER = 2
# Chunks under way in all, a worker: how far the others may run ahead of the slowest.
CHUNKS_AHEAD = 3


class EncoderPool:
    """`Encoder.from_pretrained(*args, **options)` in each of several processes, with an Encoder's `encode_chunks`.

        if __name__ == "__main__":  # a worker imports the program that made it
            with EncoderPool(4, folder, dtype="bfloat16") as pool:
                for vectors in pool.encode_chunks(chunks): ...

    Args:
        workers: how many; each gets its share of `torch.get_num_threads()`, one thread at least.
        args, options: of `Encoder.from_pretrained`, each of a kind that pickle can send.

    Raises: what loading raised in a worker; RuntimeError where a worker ended unasked.
    """

    def __init__(self, workers: int, *args: Any, **options: Any):
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        context = multiprocessing.get_context("spawn")
        threads = max(1, torch.get_num_threads() // workers)
        self.pipes: list[Connection] = []
        self.processes = []
        self._stats = [EncodeStats()] * workers
        self._seconds = 0.0
        try:
            for index in range(workers):
                ours, theirs = context.Pipe()
                work = (theirs, index, workers, threads, args, options)
                process = context.Process(target=_work, args=work, name=f"fastbert worker {index}", daemon=True)
                with _deaf_to_interrupts():
                    process.start()
                theirs.close()  # or the end of the worker would not end the pipe
                self.pipes.append(ours)
                self.processes.append(process)
            ready = [self._receive(pipe) for pipe in self.pipes]
        except BaseException:
            self.close()
            raise
        self.dimension, device_type = ready[0]
        self.device = torch.device(device_type)

    def __enter__(self) -> EncoderPool:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers, whatever they are at."""
        for process in self.processes:
            process.kill()  # SIGTERM may be ignored since this process was, and they have nothing to tidy up
        for process in self.processes:
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self.pipes = []

    @property
    def stats(self) -> EncodeStats:
        """Sums over the workers; `seconds` are those that passed, not those that each of them took."""
        texts, tokens, padded = (
            sum(getattr(s, name) for s in self._stats) for name in ("texts", "tokens", "padded_tokens")
        )
        return EncodeStats(texts, tokens, padded, self._seconds)

    def encode_chunks(
        self, chunks: Iterable[Sequence[str]], *, max_tokens_per_batch: int | None = None
    ) -> Iterator[Tensor]:
        """As `Encoder.encode_chunks`: yields [n, C] float32 for each chunk of n texts, in order.

        The pool is closed where this is left before its end, since work is under way then.
        """
        if not self.pipes:
            raise RuntimeError("the pool of workers is closed")
        started = time.perf_counter()
        numbered = enumerate(chunks)
        idle = self.pipes * CHUNKS_A_WORKER
        done: dict[int, Tensor] = {}
        sent = given = 0
        try:
            while True:
                while idle and sent - given < CHUNKS_AHEAD * len(self.pipes):
                    number, texts = next(numbered, (sent, None))
                    if texts is None:
                        break
                    self._send(idle.pop(0), (number, list(texts), max_tokens_per_batch))
                    sent += 1
                if given == sent:
                    break
                for pipe in wait(self.pipes):
                    number, vectors, self._stats[self.pipes.index(pipe)] = self._receive(pipe)
                    done[number] = torch.from_numpy(vectors)
                    idle.append(pipe)
                while given in done:
                    given += 1
                    yield done.pop(given - 1)
        except BaseException:
            self.close()
            raise
        finally:
            self._seconds += time.perf_counter() - started

    def _send(self, pipe: Connection, message: Any) -> None:
        try:
            pipe.send(message)
        except OSError:
            self._receive(pipe)  # says why it does not listen
            raise

    def _receive(self, pipe: Connection) -> Any:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            index = self.pipes.index(pipe)
            self.processes[index].join(timeout=10)
            code = self.processes[index].exitcode
            how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
            raise RuntimeError(f"worker {index + 1} of {len(self.pipes)} {how} before its work was done") from None
        if isinstance(message, BaseException):
            raise message
        return message


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """A process started inside never sees Ctrl-C, which goes to every process of a terminal; the parent answers it.

    One that comes meanwhile is kept for the end of the block.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # it would lift the block when multiprocessing starts it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---- in a worker -----------------------------------------------------------------------------------------


def _work(pipe: Connection, index: int, workers: int, threads: int, args: tuple, options: dict[str, Any]) -> None:
    """What a worker does: loads, says its (dimension, device type), then answers each chunk."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where a process cannot be started deaf to it
    threading.Thread(target=_end_with_the_parent, daemon=True, name="end with the parent").start()
    try:
        _stay_on_its_nodes(index, workers)
        torch.set_num_threads(threads)
        os.environ["RAYON_NUM_THREADS"] = str(threads)  # of the tokenizer
        encoder = Encoder.from_pretrained(*args, **{**options, "device": _device_of(index, options)})
        pipe.send((encoder.dimension, encoder.device.type))
        for number, ids, budget in _tokenised(pipe, encoder):
            vectors = encoder.encode_ids(ids, budget)
            pipe.send((number, vectors.numpy(), encoder.stats))
    except BrokenPipeError:  # the parent is gone
        return
    except Exception as error:
        if os.environ.get("FASTBERT_DEBUG") == "1":
            traceback.print_exc()
        with contextlib.suppress(OSError):
            pipe.send(_sendable(error))


def _end_with_the_parent() -> None:
    """A parent that is killed cannot end its workers, and a chunk at work can take minutes to compute for nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _tokenised(pipe: Connection, encoder: Encoder) -> Iterator[tuple[int, list[list[int]], int | None]]:
    """(number, ids, budget) of each chunk that arrives, tokenised by a thread while the caller computes."""
    ready: queue.SimpleQueue = queue.SimpleQueue()  # the parent sends no more than CHUNKS_A_WORKER at once

    def receive() -> None:
        try:
            while True:
                number, texts, budget = pipe.recv()
                ready.put((number, encoder.tokenise(texts), encoder.token_budget(budget)))
        except EOFError:
            ready.put(None)
        except Exception as error:
            ready.put(error)

    threading.Thread(target=receive, daemon=True, name="tokenise").start()
    while (item := ready.get()) is not None:
        if isinstance(item, Exception):
            raise item
        yield item


def _device_of(index: int, options: dict[str, Any]) -> torch.device:
    """The worker's own GPU, where there are several and none is named."""
    device = resolve_device(options.get("device", "auto"))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", index % torch.cuda.device_count())
    return device


def _sendable(error: Exception) -> Exception:
    """The error itself where it survives a pickle, else its name and words."""
    try:
        return error if type(pickle.loads(pickle.dumps(error))) is type(error) else _named(error)
    except Exception:
        return _named(error)


def _named(error: Exception) -> RuntimeError:
    return RuntimeError(f"{type(error).__name__}: {error}")


def _stay_on_its_nodes(index: int, workers: int) -> None:
    """Keeps this process on its share of the NUMA nodes, where there are several, so that its memory is near."""
    nodes = numa_nodes()
    if len(nodes) > 1:
        os.sched_setaffinity(0, {cpu for node in nodes[index % len(nodes) :: workers] for cpu in node})


def numa_nodes(root: Path = Path("/sys/devices/system/node")) -> list[set[int]]:
    """The CPUs of each NUMA node, of those that this process may use. Empty where the system does not say."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    allowed, nodes = os.sched_getaffinity(0), []
    for file in sorted(root.glob("node[0-9]*/cpulist"), key=lambda path: int(path.parent.name[4:])):
        cpus: set[int] = set()
        for span in filter(None, file.read_text().strip().split(",")):
            first, _, last = span.partition("-")
            cpus.update(range(int(first), int(last or first) + 1))
        if cpus & allowed:
            nodes.append(cpus & allowed)
    return nodes
