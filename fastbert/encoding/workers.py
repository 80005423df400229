"""Several processes that share the work of one Encoder.

    parent   chunks of texts --a pipe a worker--> vectors, put back in their order
    worker   a thread receives and tokenises; the main thread computes and sends

A worker gets the next chunk when it has finished one, so a slow worker does not delay the others. The number of chunks
in progress is bounded, and so is memory. Several workers pay where one process cannot use the whole machine: several
NUMA nodes (each worker stays on one node, with a copy of the weights in that node's memory), several GPUs (one for each
worker), dozens of cores.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..parent import child
from .encoder import Encoder, EncodeStats, resolve_device

# Chunks at a worker: one that it computes, and one that it tokenises meanwhile.
CHUNKS_A_WORKER = 2
# Chunks in progress in all, per worker. This bounds how far the others may be ahead of the slowest worker.
CHUNKS_AHEAD = 3


class WorkerPool:
    """Several processes that each run `work(pipe, index, *arguments)`. They end with this process, however it ends.

    Args:
        workers: number of processes; each gets its share of `torch.get_num_threads()`, at least one thread, and of the
            NUMA nodes.
        work: a function at the top of a module, so that it can be pickled.
        arguments: for `work`; they must be picklable.

    Attributes:
        ready: the first message of each worker.

    Raises: the error of a worker that fails before its first message; RuntimeError if a worker ends by itself.
    """

    def __init__(self, workers: int, work: Callable[..., None], *arguments: Any):
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        threads = max(1, torch.get_num_threads() // workers)
        self.pipes: list[Connection] = []
        self.processes = []
        try:
            for index in range(workers):
                ours, theirs = multiprocessing.Pipe()
                given = (work, index, workers, threads, arguments)
                process = child(_serve, theirs, *given, name=f"fastbert worker {index}")
                with _without_interrupts():
                    process.start()
                theirs.close()  # otherwise the pipe would stay open after the worker has ended
                self.pipes.append(ours)
                self.processes.append(process)
            self.ready = [self.receive(pipe) for pipe in self.pipes]
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Kills the workers."""
        for process in self.processes:
            process.kill()  # SIGTERM may be ignored, inherited from this process; workers have nothing to clean up
        for process in self.processes:
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self.pipes = []

    def send(self, pipe: Connection, message: Any) -> None:
        try:
            pipe.send(message)
        except OSError:
            self.receive(pipe)  # raises the worker's own error, if there is one
            raise

    def receive(self, pipe: Connection) -> Any:
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


class EncoderPool(WorkerPool):
    """`Encoder.from_pretrained(*args, **options)` in each of several processes, with an Encoder's `encode_chunks`.

        if __name__ == "__main__":  # a worker imports the program that made it
            with EncoderPool(4, folder, dtype="bfloat16") as pool:
                for vectors in pool.encode_chunks(chunks): ...

    Args:
        workers: number of processes; each gets its share of `torch.get_num_threads()`, at least one thread.
        args, options: for `Encoder.from_pretrained`; they must be picklable.

    Raises: the error of loading in a worker; RuntimeError if a worker ends by itself.
    """

    def __init__(self, workers: int, *args: Any, **options: Any):
        super().__init__(workers, _work, args, options)
        self._stats = [EncodeStats()] * workers
        self._seconds = 0.0
        self.dimension, device_type = self.ready[0]
        self.device = torch.device(device_type)

    @property
    def stats(self) -> EncodeStats:
        """Sums over the workers; `seconds` is elapsed time, not the sum of the workers' times."""
        texts, tokens, padded = (
            sum(getattr(s, name) for s in self._stats) for name in ("texts", "tokens", "padded_tokens")
        )
        return EncodeStats(texts, tokens, padded, self._seconds)

    def encode_chunks(
        self, chunks: Iterable[Sequence[str]], *, max_tokens_per_batch: int | None = None
    ) -> Iterator[Tensor]:
        """As `Encoder.encode_chunks`: yields [n, C] float32 for each chunk of n texts, in order.

        Leaving the iteration early closes the pool, since chunks are still in progress then.
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
                    self.send(idle.pop(0), (number, list(texts), max_tokens_per_batch))
                    sent += 1
                if given == sent:
                    break
                for pipe in wait(self.pipes):
                    number, vectors, self._stats[self.pipes.index(pipe)] = self.receive(pipe)
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


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes started within this block do not receive Ctrl-C, which a terminal sends to all its processes; the
    parent handles it. A Ctrl-C during the block is delivered at its end.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # multiprocessing unblocks the signal when it starts the tracker: start it before
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---- in a worker -----------------------------------------------------------------------------------------


def _serve(
    pipe: Connection, work: Callable[..., None], index: int, workers: int, threads: int, arguments: tuple
) -> None:
    """The main function of a worker: sets the process up, calls `work`, and sends the error that it raises."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for systems on which the parent cannot block the signal
    try:
        _stay_on_its_nodes(index, workers)
        torch.set_num_threads(threads)
        limit_tokenizer_threads()
        work(pipe, index, *arguments)
    except BrokenPipeError:  # the parent is gone
        return
    except Exception as error:
        if os.environ.get("FASTBERT_DEBUG") == "1":
            traceback.print_exc()
        with contextlib.suppress(OSError):
            pipe.send(_sendable(error))


def limit_tokenizer_threads() -> None:
    """Gives the tokenizers library as many threads as torch has in this process. By default each process gives it a
    thread for each core. This has an effect only before its first use."""
    os.environ["RAYON_NUM_THREADS"] = str(torch.get_num_threads())


def _work(pipe: Connection, index: int, args: tuple, options: dict[str, Any]) -> None:
    """In a worker of `EncoderPool`: loads the model, sends (dimension, device type), then answers each chunk."""
    encoder = Encoder.from_pretrained(*args, **{**options, "device": device_of(index, options)})
    pipe.send((encoder.dimension, encoder.device.type))
    for number, ids, budget in _tokenised(pipe, encoder):
        vectors = encoder.encode_ids(ids, budget)
        pipe.send((number, vectors.numpy(), encoder.stats))


def _tokenised(pipe: Connection, encoder: Encoder) -> Iterator[tuple[int, list[list[int]], int | None]]:
    """(number, ids, budget) of each received chunk, tokenised by another thread while the caller computes."""
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


def device_of(index: int, options: dict[str, Any]) -> torch.device:
    """The worker's device. If no GPU is named, worker i uses GPU i modulo their number."""
    device = resolve_device(options.get("device", "auto"))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", index % torch.cuda.device_count())
    return device


def _sendable(error: Exception) -> Exception:
    """The error itself if it can be pickled, else a RuntimeError with its name and message."""
    try:
        return error if type(pickle.loads(pickle.dumps(error))) is type(error) else _named(error)
    except Exception:
        return _named(error)


def _named(error: Exception) -> RuntimeError:
    return RuntimeError(f"{type(error).__name__}: {error}")


def _stay_on_its_nodes(index: int, workers: int) -> None:
    """Binds this process to its share of the NUMA nodes, if there are several, so that its memory is local."""
    nodes = numa_nodes()
    if len(nodes) > 1:
        os.sched_setaffinity(0, {cpu for node in nodes[index % len(nodes) :: workers] for cpu in node})


def numa_nodes(root: Path = Path("/sys/devices/system/node")) -> list[set[int]]:
    """For each NUMA node the CPUs that this process may use. Empty if the system does not tell."""
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
