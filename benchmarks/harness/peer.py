"""Defines the rows of a library: a file in benchmarks/peers holds those of one library, in tables of these names.

    ATTENTION   attention on a packed batch             suite kernels
    OPERATORS   operator -> rows of it                  suite kernels
    ENCODERS    lists of ids to vectors                 suites encoder, latency, scaling
    TRAINING    a step of masked-word training          suite training
    SENTENCES   texts to vectors                        suite sentences
    PROCESSES   lists of ids to vectors, a process each suites cold, memory

The processes of the last table import only the library's own file, so that no library's start includes imports of
another. Therefore this file and those of the peers import nothing at the top that takes time: torch, fastbert and the
libraries themselves are imported by the functions that use them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

OURS, FLOOR = "fastbert", "floor"
PRODUCTS = "matrix products alone"  # the row that is the floor of a whole model
INT8 = 0.1  # allowed relative RMS error of int8, which cannot keep the budget of a floating-point dtype
ALL, CPU_ONLY, GPU_ONLY = ("cpu", "cuda"), ("cpu",), ("cuda",)
Run = Callable[[], Any]


class Missing(Exception):
    """A row cannot run here; the message says why."""


def version(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def one_line(error: BaseException) -> str:
    words = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def need(package: str, module: str | None = None) -> Any:
    """The module, or Missing."""
    try:
        return importlib.import_module(module or package.replace("-", "_"))
    except ImportError as error:
        found = version(package)
        raise Missing(
            f"{package} is not installed" if found is None else f"{package} {found}: {one_line(error)}"
        ) from None


@dataclass(frozen=True)
class Prepared:
    """A function of q, k, v in the peer's layout, and the conversions from packed [T, H, D] and back."""

    call: Callable[[Tensor, Tensor, Tensor], Tensor]
    there: Callable[[Tensor], Tensor] = lambda t: t
    back: Callable[[Tensor], Tensor] = lambda t: t


@dataclass(frozen=True)
class AttentionPeer:
    """`prepare(inputs)` of attention's inputs by name. Padded inputs are ready-made: padding is not in the time."""

    row: str
    peer: str
    prepare: Callable[[dict[str, Any]], Prepared]
    package: str | None = None
    devices: tuple[str, ...] = ALL
    slow: bool = False


@dataclass(frozen=True)
class OperatorPeer:
    """`make(device)` gives a function of the operator's inputs, by the names they have in `fastbert.functional`."""

    row: str
    peer: str
    make: Callable[[Any], Callable[..., Tensor]]
    package: str | None = None
    devices: tuple[str, ...] = ALL
    slow: bool = False


@dataclass(frozen=True)
class EncoderPeer:
    """`make(job)` of a jobs.Job gives a run. With `sizes` it is `make(size)(job)`, a row for each size of sorted
    batches: the first, thought the best, also in --quick and for one query. `fits`: other sizes too, where the lengths
    ask for them.
    """

    row: str
    peer: str
    make: Callable[..., Any]
    devices: tuple[str, ...] = ALL
    sizes: tuple[int, ...] = ()
    fits: bool = False
    package: str | None = None
    slow: bool | None = None  # None: the sizes beside the first
    checked: bool = True
    dtypes: Sequence[str] | None = None  # computes in these only; None: in the case's
    single: bool = True  # makes sense for one query too
    many: bool = True  # makes sense for many texts
    tolerance: float | None = None

    def of_sizes(self, sizes: Sequence[int]) -> list[EncoderPeer]:
        return [
            replace(
                self, row=f"{self.row}, sorted, batches of {n}", make=self.make(n), sizes=(), single=n == sizes[0],
                slow=n != sizes[0] if self.slow is None else self.slow,
            )
            for n in sizes
        ]  # fmt: skip

    def rows(self) -> list[EncoderPeer]:
        return self.of_sizes(self.sizes) if self.sizes else [replace(self, slow=bool(self.slow))]


@dataclass(frozen=True)
class TrainingPeer:
    """`make(job)` of a jobs.Job gives a run of one step, which gives the model, whose gradients are compared."""

    row: str
    peer: str
    make: Callable[[Any], Run]
    package: str | None = None
    devices: tuple[str, ...] = ALL
    slow: bool = False
    checked: bool = True


@dataclass(frozen=True)
class SentencePeer:
    """`make(folder, texts, size, device, dtype)` gives a run, in batches of each of `sizes`."""

    row: str
    peer: str
    make: Callable[..., Run]
    package: str
    sizes: tuple[int, ...] = (32, 8)
    devices: tuple[str, ...] = ALL
    dtypes: Sequence[str] | None = None


@dataclass(frozen=True)
class ProcessPeer:
    """A row whose run is a process, in which `in_process` of `module`, a peer's file, returns an encoder.

    `files(files)` returns more settings for the process, names of files that are written beforehand. In the suite cold,
    `cache(folder)` returns settings that make it keep compiled code in the folder, which is `empty` in every run, or
    shared by all runs.
    """

    row: str
    peer: str
    module: str
    files: Callable[[Any], dict[str, Any]]
    devices: tuple[str, ...] = ALL
    dtypes: Sequence[str] | None = None
    package: str | None = None
    slow: bool = False
    tolerance: float | None = None
    suites: tuple[str, ...] = ("cold", "memory")
    cache: Callable[[str], dict[str, Any]] | None = None
    empty: bool = False
