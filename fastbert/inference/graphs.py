"""CUDA graphs by bucket of total tokens: the launches of a pass are recorded once and replayed as one.

A short batch on a GPU spends its time on launches (over sixty in a pass of BERT-base), not in kernels. So a batch is
copied into buffers of fixed size, those of the smallest bucket that holds it, and the pass that was recorded for that
bucket runs on these buffers:

    tokens      T real ones, then id 0 at position 0 up to the bucket's P
    sequences   B real ones, then one of those P - T tokens, then empty ones up to the bucket's number

The filler tokens are a sequence by themselves, and no operator mixes sequences, so they do not affect real tokens.
Attention's list of tiles is computed on the device within the recording, from cu_seqlens in its buffer; the size of the
list depends on the bucket only.

A recording holds addresses. `Watched` checks whether the model still has the modules and tensors that were recorded.
"""

from __future__ import annotations

import itertools
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from .. import functional as F
from ..packing import PackedBatch
from .snapshot import Snapshot
from .weights import CONTAINERS, HOOKS

# P of the buckets, two per power of two, so that at most a third of a bucket's tokens are filler. The largest is the
# size of `Encoder`'s batches.
TOKENS = (
    16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576,
    32768, 49152, 65536,
)  # fmt: skip
# The largest bucket of BERT-base, and of all that are wider. See `most_tokens`.
BASE_TOKENS, BASE_WIDTH = 4096, 768
# Recordings kept. The least recently used one is dropped first.
LIMIT = 32

Replay = Callable[[], None]


class CudaRecorder:
    """Records on a CUDA device. The recordings share one pool of memory, since only one of them runs at a time."""

    impls = ("triton",)  # the other implementations read lengths on the host, which a recording cannot repeat

    def __init__(self, device: torch.device):
        self.device, self.stream = device, None
        self.forget()

    def forget(self) -> None:
        """Takes a new pool of memory, after all recordings were dropped: the old pool cannot be recorded into again."""
        with torch.cuda.device(self.device):
            self.pool = torch.cuda.graph_pool_handle()

    def busy(self) -> bool:
        """Whether the current stream is being recorded already, for example by the caller's own graph."""
        return torch.cuda.is_current_stream_capturing()

    def record(self, function: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """(a function that replays `function` on the same input tensors, the output tensor that each replay writes)."""
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):  # runs before recording, so that kernels are compiled and libraries initialised
            for _ in range(2):
                function()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=side, capture_error_mode="thread_local"):
            output = function()
        return graph.replay, output

    @contextmanager
    def in_order(self):
        """A block in which one batch is copied in, replayed and copied out. If the previous batch used another stream,
        the current stream waits for it."""
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            if self.stream is not None and self.stream != current:
                current.wait_stream(self.stream)
            self.stream = current
            yield


# type of device -> class that records on it
RECORDERS: dict[str, Callable[[torch.device], Any]] = {"cuda": CudaRecorder}


def most_tokens(width: int) -> int:
    """The size of the largest bucket for a model of this width.

    Replaying pays as long as the host takes longer to launch a layer than the device takes for the layer's products,
    which are 24 C^2 FLOP per token (with a feed-forward block four times as wide). At 0.1 ms of Python per layer and
    400 TFLOP/s both are equal at 40 GFLOP: some 3,000 tokens of width 768, four times as many at half the width. So the
    bound grows by (768 / C)^2. Wider models keep 4,096, where a replay gains little and costs only memory.
    """
    bound = BASE_TOKENS * max(1.0, (BASE_WIDTH / width) ** 2)
    return max(size for size in TOKENS if size <= bound)


def bucket_of(tokens: int, sequences: int, most: int = BASE_TOKENS) -> tuple[int, int] | None:
    """(tokens, sequences) of the smallest bucket that holds the batch; None if the batch is empty, or the bucket would
    have more than `most` tokens."""
    size = next((size for size in TOKENS if size >= tokens), None)
    return None if size is None or size > most or tokens == 0 else (size, 1 << (sequences - 1).bit_length())


class Static:
    """The buffers of a bucket: ids, segments, positions [P] each and cu_seqlens [sequences + 2], in one tensor."""

    def __init__(self, tokens: int, sequences: int, max_seqlen: int, device: torch.device):
        self.tokens, self.max_seqlen = tokens, max_seqlen
        self.buffer = torch.zeros(3 * tokens + sequences + 2, dtype=torch.int64, device=device)

    def parts(self, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return buffer.split([self.tokens] * 3 + [buffer.shape[0] - 3 * self.tokens])

    def fill(self, batch: PackedBatch) -> None:
        """Copies a batch into the buffers. Every element is written, so nothing of the previous batch remains. Tensors
        on the host go in one copy together, tensors on the device in one copy each."""
        given = (batch.input_ids, batch.token_type_ids, batch.positions, batch.cu_seqlens)
        host = torch.zeros(self.buffer.shape, dtype=torch.int64, device="cpu")
        self.parts(host)[3].fill_(self.tokens)
        for part, t in zip(self.parts(host), given, strict=True):
            if t is not None and t.device.type == "cpu":
                part[: t.shape[0]] = t
        self.buffer.copy_(host, non_blocking=True)
        for part, t in zip(self.parts(self.buffer), given, strict=True):
            if t is not None and t.device.type != "cpu":
                part[: t.shape[0]].copy_(t, non_blocking=True)

    def batch(self) -> PackedBatch:
        ids, types, positions, cu_seqlens = self.parts(self.buffer)
        return PackedBatch(ids, types, positions, cu_seqlens.to(torch.int32), self.max_seqlen)


@dataclass(frozen=True)
class Recording:
    static: Static
    replay: Replay
    output: Tensor  # [P, C]


def why_not_recorded(root: nn.Module) -> str | None:
    """Why a pass of this module cannot be recorded, or None. Python code such as a hook would run only at recording."""
    for module in list(root.modules())[1:]:
        if isinstance(module, CONTAINERS):
            continue
        if module.training:
            return f"a {type(module).__name__} is in training mode"
        if any(getattr(module, name) for name in HOOKS):
            return f"a {type(module).__name__} has a hook"
    return None


class Watched:
    """The state of a model that a recording depends on: its modules and their classes, its tensors, and the addresses
    and versions of these tensors."""

    def __init__(self, root: nn.Module, without: str = "pooler"):
        modules = [m for path, m in root.named_modules() if path.split(".")[0] != without]
        places = [(root._modules, name) for name in root._modules if name != without]
        places += [(m.__dict__, name) for m in modules for name in ("forward", "training")]
        # The dictionaries must keep their contents, and must not be replaced by other dictionaries.
        held = [(m.__dict__, name) for m in modules for name in ("_modules", "_parameters", "_buffers")]
        held += [(m.__dict__, name) for m in modules[1:] for name in HOOKS]
        tables = [own[name] for own, name in held if own[name] is not root._modules]
        self.snapshot = Snapshot(modules, [*places, *held], tables=tables)
        self.tensors = [t for m in modules for d in (m._parameters, m._buffers) for t in d.values() if t is not None]
        self.versioned = [t for t in self.tensors if not t.is_inference()]
        self.state = self._state()

    def _state(self) -> tuple[list[int], list[int]]:
        return list(map(Tensor.data_ptr, self.tensors)), list(map(attrgetter("_version"), self.versioned))

    def is_same(self) -> bool:
        return self.snapshot.is_same() and self._state() == self.state


class Graphs:
    """The recordings of one model's pass, made when a bucket is first met.

    Attributes:
        calls: "replayed", or the reason why a call ran without a recording -> number of calls.
        recorded: how many recordings were made, including those dropped since.
        most: batches of more tokens run without a recording.
    """

    def __init__(self, device: torch.device, impl: F.Impl | None = None, limit: int = LIMIT, most: int = BASE_TOKENS):
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self.device, self.impl, self.limit, self.most = device, impl, limit, most
        self.calls: Counter[str] = Counter()
        self.recorded = 0
        self._recorder = None
        self._lock = threading.RLock()
        self._recordings: OrderedDict[tuple, Recording] = OrderedDict()
        self._watched: Watched | None = None
        self._broken: str | None = None

    def __reduce__(self):
        """Copies and pickles start without recordings, which hold addresses of the original's tensors."""
        return type(self), (self.device, self.impl, self.limit, self.most)

    def __len__(self) -> int:
        return len(self._recordings)

    def drop(self) -> None:
        """Forgets every recording."""
        with self._lock:
            self._recordings.clear()
            self._watched = None
            if self._recorder is not None:
                self._recorder.forget()

    def is_same(self) -> bool:
        """Whether there are recordings and the model is unchanged since. If it has changed, they are dropped."""
        with self._lock:
            if self._watched is not None and not self._watched.is_same():
                self.drop()
            return self._watched is not None

    def why_not(self, batch_device: torch.device, tokens: int) -> str | None:
        """Why a batch of `tokens` cannot be replayed, or None."""
        if self._broken:
            return self._broken
        if batch_device != self.device:
            return f"the batch is on {batch_device}, the recordings on {self.device}"
        if not 0 < tokens <= self.most:
            return f"over {self.most} tokens" if tokens else "no tokens"
        if self._recorder is not None and self._recorder.busy():
            return "other code captures a CUDA graph on this stream"
        return None

    def run(
        self,
        root: nn.Module,
        batch: PackedBatch,
        prepare: Callable[[int], Callable[[PackedBatch], Tensor]],
        longest: int | None = None,
        key: tuple = (),
    ) -> Tensor | None:
        """x [T, C] of `batch` by a replay; None if recording fails, which a warning and `calls` report.

        Args:
            root: the module that runs the pass.
            prepare: takes max_seqlen and returns a function of a PackedBatch, which is recorded and must not wait for
                the device. What `prepare` itself computes is not recorded.
            longest: upper bound of the sequences' lengths; None for no bound.
            key: anything else that the pass depends on.
        """
        tokens, sequences = bucket_of(batch.total_tokens, batch.batch_size, self.most)
        # Tensors made in inference mode could not be written at the next replay. Leaving inference mode turns gradients
        # on, so no_grad comes second.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self._recorder is None:
                self._recorder = RECORDERS[self.device.type](self.device)
            with self._recorder.in_order():
                key = (tokens, sequences, *precision(self.device), *key)
                recording = self._recordings.get(key)
                if recording is None:
                    try:
                        recording = self._record(root, batch, tokens, sequences, prepare, longest)
                    except RuntimeError as error:
                        self._broken = f"recording failed: {str(error).splitlines()[0]}"
                        self.drop()
                        warnings.warn(f"cuda_graphs: {self._broken}; it goes on without", stacklevel=4)
                        return None
                    self._recordings[key] = recording
                self._recordings.move_to_end(key)
                if len(self._recordings) > self.limit:
                    self._recordings.popitem(last=False)
                recording.static.fill(batch)
                recording.replay()
                self.calls["replayed"] += 1
                return recording.output[: batch.total_tokens].clone()

    def _record(self, root, batch, tokens, sequences, prepare, longest) -> Recording:
        below = max((size for size in TOKENS if size < tokens), default=0)
        # The filler tokens are one sequence too, at most as long as the step from the next smaller bucket.
        max_seqlen = tokens if longest is None else min(tokens, max(longest, tokens - below))
        static = Static(tokens, sequences, max_seqlen, self.device)
        static.fill(batch)
        with ExitStack() as stack:
            if torch.is_autocast_enabled(
                self.device.type
            ):  # casts belong into the recording, not into autocast's cache
                dtype = torch.get_autocast_dtype(self.device.type)
                stack.enter_context(torch.autocast(self.device.type, dtype, cache_enabled=False))
            encode = prepare(max_seqlen)
            replay, output = self._recorder.record(lambda: encode(static.batch()))
        self.recorded += 1
        if self._watched is None:
            self._watched = Watched(root)
        return Recording(static, replay, output)

    def summary(self) -> str:
        without = sum(self.calls.values()) - self.calls["replayed"]
        return f"CUDA graphs: {len(self)} kept, {self.calls['replayed']} calls replayed, {without} without"


def precision(device: torch.device) -> tuple:
    """The settings of torch and of this package that change which kernels are launched."""
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return autocast, F.is_batch_invariant(), torch.get_float32_matmul_precision()


def why_no_graphs(module: nn.Module, impl: F.Impl | None) -> str | None:
    """Why passes of a module cannot be recorded on its present device, or None."""
    devices = sorted({str(t.device) for t in itertools.chain(module.parameters(), module.buffers())})
    expected = " or ".join(RECORDERS)
    if len(devices) != 1 or torch.device(devices[0]).type not in RECORDERS:
        found = " and ".join(devices) or "no parameters"
        return f"the model is not on one device that records its launches: expected {expected}, found {found}"
    device = torch.device(devices[0])
    chosen, able = F.choose_impl(impl, device), RECORDERS[device.type].impls
    if chosen not in able:
        return f"on {device} its launches are not recorded: expected impl {' or '.join(able)}, found {chosen}"
    return None


def graphs_for(module: nn.Module, impl: F.Impl | None) -> Graphs:
    """`Graphs` for a model on its present device. Raises ValueError if passes cannot be recorded there."""
    if reason := why_no_graphs(module, impl):
        raise ValueError(f"cuda_graphs=True: {reason}")
    device = next(itertools.chain(module.parameters(), module.buffers())).device
    return Graphs(device, impl, most=most_tokens(module.config.hidden_size))
