"""Describes a kernel that can be tuned: where its launcher gets a config, the possible configs, and work to time.

`table.py` lists the kernels. `using(kernel, config)` replaces the function (or constant) from which the launcher gets
its config, within a block. Nothing else of the library changes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fastbert import functional as F
from fastbert.testing import INPUTS, ModelShape, Workload

from ..harness import costs
from ..inspection.compile_cases import CompileCase, case_of

KERNELS_PACKAGE = "fastbert.kernels."
Config = Any  # a frozen dataclass of a kernel module; None: no kernel of its own


@dataclass(frozen=True)
class Shape:
    """All that a config may depend on, and the batch to time it with."""

    model: ModelShape
    lengths: tuple[int, ...]
    dtype: torch.dtype
    arch: str
    device: torch.device
    dropout: float = 0.0
    nk: tuple[int, int] | None = None  # sizes of a matrix product, instead of the model's

    @property
    def workload(self) -> Workload:
        return Workload(self.model, self.lengths)


@dataclass(frozen=True)
class Job:
    """Work to time a config with. `truth` and `plain` return the results of `run` in float64 and in the shape's
    dtype."""

    run: Callable[[], Sequence[Tensor]]
    truth: Callable[[], Sequence[Tensor]]
    plain: Callable[[], Sequence[Tensor]]
    work: costs.Work
    shape: Mapping[str, int | float]


@dataclass(frozen=True)
class Kernel:
    """A row of the table. seams: "module:name" -> a function of (the object there, a config) that returns its
    replacement."""

    name: str
    seams: Mapping[str, Callable[[Any, Config], Any]]
    current: Callable[[Shape], Config]
    grid: Mapping[str, Sequence[Any]]
    job: Callable[[Shape], Job]
    batch: tuple[int, int]  # default number of sequences, and their length
    rung: Callable[[Config, Shape], str]  # an entry of its module's ladder as source text
    allowed: Callable[[Config, Shape], bool] = lambda config, shape: True
    others: tuple[Config, ...] = ()  # configs outside the grid: the vendor library, or no kernel at all
    launches: Sequence[str] = ()  # names of the @triton.jit functions that the config launches
    width: int | None = None  # default hidden width, if not the model's
    start: Callable[[Shape], Config] | None = None  # where the search begins if the current config is not in the grid

    def neighbours(self, config: Config) -> Iterator[Config]:
        """All configs of the grid that differ from this one in one field, and those in `others`."""
        yield from self.others
        if config in self.others or config is None:
            return
        for name, values in self.grid.items():
            for value in values:
                if value != getattr(config, name):
                    yield replace(config, **{name: value})

    def everything(self, config: Config) -> Iterator[Config]:
        """The whole grid, nearest to `config` first."""

        def distance(other: Config) -> int:
            return sum(getattr(other, f.name) != getattr(config, f.name) for f in fields(config))

        yield from self.others
        grid = [replace(config, **dict(zip(self.grid, v, strict=True))) for v in itertools.product(*self.grid.values())]
        yield from sorted(grid, key=distance)


def written(config: Config) -> str:
    """A config as source text, with the fields that differ from their defaults."""
    if config is None:
        return "None"
    default = {f.name: f.default for f in fields(config)}
    given = [f"{name}={value!r}" for name, value in asdict(config).items() if value != default[name]]
    return f"{type(config).__name__}({', '.join(given)})"


def place(seam: str) -> tuple[Any, str]:
    module, name = seam.split(":")
    return importlib.import_module(KERNELS_PACKAGE + module), name


@contextlib.contextmanager
def using(kernel: Kernel, config: Config) -> Iterator[None]:
    """A context in which `kernel` is launched with `config`."""
    places = [(*place(seam), put) for seam, put in kernel.seams.items()]
    before = [getattr(module, name) for module, name, _ in places]
    try:
        for (module, name, put), original in zip(places, before, strict=True):
            setattr(module, name, put(original, config))
        yield
    finally:
        for (module, name, _), original in zip(places, before, strict=True):
            setattr(module, name, original)


# A sequence of one block, one of one tile and a longer one, so that every kernel of attention is launched.
COMPILED_LENGTHS = (40, 100, 200)


def compile_cases(kernel: Kernel, config: Config, shape: Shape) -> list[CompileCase]:
    """The launches of the kernel's work with this config on the shape's architecture, for the offline compiler.

    Empty if another kernel does the work. Does not work in a process where Triton interprets.
    """
    if config is None or getattr(config, "vendor", False):
        return []
    from fastbert.emulator.driver import Launch, offline

    job = kernel.job(replace(shape, lengths=COMPILED_LENGTHS, device=torch.device("cpu")))
    seen: list[Launch] = []
    with using(kernel, config), offline(shape.arch, seen.append, compiles=False):
        job.run()
    cases = [case_of(launch, kernel.name) for launch in seen if launch.name in kernel.launches]
    return list({case.bound: case for case in cases}.values())


# ---- work on operators -----------------------------------------------------------------------------------


def _leaves(inputs: Mapping[str, Any], dtype: torch.dtype, gradient: bool) -> dict[str, Tensor]:
    tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return {k: v.detach().to(dtype).requires_grad_(gradient) for k, v in tensors.items()}


def operator_job(op: str, directions: str, shape: Shape, **options: Any) -> Job:
    """An operator's forward pass, its backward pass repeated after one forward pass, or both."""
    made = INPUTS[op](shape.model, shape.lengths, **options)
    inputs = {k: v.to(shape.device) if isinstance(v, Tensor) else v for k, v in made.items()}
    rounded = _leaves(inputs, shape.dtype, False)
    with torch.no_grad():
        out = getattr(F, op)(**{**inputs, **rounded}, impl="reference")
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)

    def prepare(impl: str, dtype: torch.dtype) -> Callable[[], Sequence[Tensor]]:
        leaves = _leaves(rounded, dtype, directions != costs.FORWARD)
        call = lambda: getattr(F, op)(**{**inputs, **leaves}, impl=impl)  # noqa: E731
        if directions == costs.FORWARD:
            return torch.no_grad()(lambda: [call()])
        values = list(leaves.values())
        if directions == costs.BOTH:

            def both() -> Sequence[Tensor]:
                y = call()
                return [y, *torch.autograd.grad(y, values, upstream.to(y.dtype))]

            return both
        kept = call()
        dy = upstream.to(kept.dtype)
        return lambda: torch.autograd.grad(kept, values, dy, retain_graph=True)

    forward, backward = costs.of_operator(op, shape.workload, shape.dtype.itemsize, directions != costs.FORWARD)
    work = {costs.FORWARD: forward, costs.BACKWARD: backward, costs.BOTH: forward + backward}[directions]
    ours = functools.lru_cache(maxsize=1)(lambda: prepare("triton", shape.dtype))
    return Job(
        lambda: ours()(), lambda: prepare("reference", torch.float64)(), lambda: prepare("reference", shape.dtype)(),
        work, {"tokens": shape.workload.tokens, "hidden": shape.model.hidden, "heads": shape.model.heads},
    )  # fmt: skip
