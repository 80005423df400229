"""CUDA graphs by bucket of total tokens: the launches of a pass are recorded once and replayed as one.

A short batch on a GPU waits for its launches, over sixty in a pass of BERT-base, and not for its kernels. Here a
batch is copied into buffers of fixed size, those of the smallest bucket that holds it, and the pass recorded for that
bucket runs over them:

    tokens      T real ones, then id 0 at position 0 up to the bucket's P
    sequences   B real ones, then one of those P - T tokens, then empty ones up to the bucket's number

The tokens that fill up are a sequence of their own, and no operator mixes sequences, so real tokens do not notice. What
attention derives from the lengths is computed on the device within the recording, from cu_seqlens in its buffer, and
its size depends on the bucket alone.

A recording holds addresses. `Watched` tells whether the model is still the one that was recorded.
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

# P of the buckets. Two an octave: at most a third of a bucket's tokens are there to fill it. The last is what `Encoder`
# puts into a batch.
TOKENS = (
    16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576,
    32768, 49152, 65536,
)  # fmt: skip
# The largest bucket of BERT-base, and of all that are wider. See `most_tokens`.
BASE_TOKENS, BASE_WIDTH = 4096, 768
# Recordings kept; the one that was not used for longest goes.
LIMIT = 32

Replay = Callable[[], None]


class CudaRecorder:
    """Records on a CUDA device. The recordings share one pool of memory, since no two of them run at once."""

    impls = ("triton",)  # the other implementations read lengths on the host while they run

    def __init__(self, device: torch.device):
        self.device, self.stream = device, None
        self.forget()

    def forget(self) -> None:
        """After all recordings are gone: their pool is not one that can be recorded into again."""
        with torch.cuda.device(self.device):
            self.pool = torch.cuda.graph_pool_handle()

    def busy(self) -> bool:
        """Is somebody recording already?"""
        return torch.cuda.is_current_stream_capturing()

    def record(self, function: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """(what runs `function` again over the tensors that it reads, the tensor that it then writes)."""
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):  # kernels are compiled and libraries made ready before
            for _ in range(2):
                function()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=side, capture_error_mode="thread_local"):
            output = function()
        return graph.replay, output

    @contextmanager
    def in_order(self):
        """Within it one batch is copied in, replayed and copied out, after what another stream did of that before."""
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            if self.stream is not None and self.stream != current:
                current.wait_stream(self.stream)
            self.stream = current
            yield


# kind of device -> what records there
RECORDERS: dict[str, Callable[[torch.device], Any]] = {"cuda": CudaRecorder}


def most_tokens(width: int) -> int:
    """The size of the largest bucket for a model of this width.

    A layer waits for its launches while the host takes longer for them than the device for its products, which are
    24 C^2 FLOP a token (feed-forward four times as wide). At 0.1 ms of Python a layer and 400 TFLOP/s that ends at
    40 GFLOP, some 3,000 tokens of width 768, four times as many of half the width: the bound grows by (768 / C)^2.
    Wider models keep 4,096, where a replay gains little and costs nothing but memory.
    """
    bound = BASE_TOKENS * max(1.0, (BASE_WIDTH / width) ** 2)
    return max(size for size in TOKENS if size <= bound)


def bucket_of(tokens: int, sequences: int, most: int = BASE_TOKENS) -> tuple[int, int] | None:
    """(tokens, sequences) of the smallest bucket, none over `most` tokens; or None: a batch that large, or that empty,
    has none."""
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
        """Every element is written, so nothing of the batch before is left. One copy carries all that is known on the
        host, and one each what lies on the device."""
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
    """Why a pass of this module cannot be recorded: what Python code does in it would be done once."""
    for module in list(root.modules())[1:]:
        if isinstance(module, CONTAINERS):
            continue
        if module.training:
            return f"a {type(module).__name__} is in training mode"
        if any(getattr(module, name) for name in HOOKS):
            return f"a {type(module).__name__} has a hook"
    return None


class Watched:
    """What a recording takes from a model: which modules, of which classes, and tensors are where, the addresses of the
    tensors and their versions."""

    def __init__(self, root: nn.Module, without: str = "pooler"):
        modules = [m for path, m in root.named_modules() if path.split(".")[0] != without]
        places = [(root._modules, name) for name in root._modules if name != without]
        places += [(m.__dict__, name) for m in modules for name in ("forward", "training")]
        # what they hold must stay, and they themselves: another dictionary may be put in place of one
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
        calls: what became of the calls: "replayed", or the reason why one ran without a recording -> how many.
        recorded: how many recordings were made, the ones gone since included.
        most: a batch of more tokens runs without.
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
        """A copied or pickled one starts without recordings: they are of the first one's addresses."""
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
        """Is the model still the one that was recorded? Where not, its recordings are dropped."""
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
            return "somebody else records this stream"
        return None

    def run(
        self,
        root: nn.Module,
        batch: PackedBatch,
        prepare: Callable[[int], Callable[[PackedBatch], Tensor]],
        longest: int | None = None,
        key: tuple = (),
    ) -> Tensor | None:
        """x [T, C] of `batch` by a replay; None where recording fails, which is said in a warning and in `calls`.

        Args:
            root: the module whose pass this is.
            prepare: of max_seqlen, makes the function of a PackedBatch that is recorded; it must not wait for the
                device, and what `prepare` itself computes is not recorded.
            longest: no sequence is longer; None for no such bound.
            key: whatever else the pass depends on.
        """
        tokens, sequences = bucket_of(batch.total_tokens, batch.batch_size, self.most)
        # inference tensors could not be written again; leaving that mode turns gradients on, so in this order
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
        # the tokens that fill a bucket are one sequence too, of fewer than a step between buckets
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
    """The switches of torch and of this package that change what is launched."""
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return autocast, F.is_batch_invariant(), torch.get_float32_matmul_precision()


def why_no_graphs(module: nn.Module, impl: F.Impl | None) -> str | None:
    """Why there can be no recordings of a module where it lies now, or None."""
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
    """`Graphs` for a model where it lies now. Raises ValueError where there is nothing that records."""
    if reason := why_no_graphs(module, impl):
        raise ValueError(f"cuda_graphs=True: {reason}")
    device = next(itertools.chain(module.parameters(), module.buffers())).device
    return Graphs(device, impl, most=most_tokens(module.config.hidden_size))
