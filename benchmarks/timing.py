"""Clocks, and what a list of times says: interleaved runs, medians, spread, and ratios with an interval.

Runs go A B A B, so that whatever drifts (a clock that heats up, a neighbour) meets all of them alike. Every time is
kept. A GPU is timed by events around each call, after its L2 cache was overwritten; a CPU by `perf_counter`.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

SHORT = 2e-3  # a CPU call below this is repeated within one sample: the clock and a context switch would show
FLUSH_BYTES = 256 * 2**20  # more than twice the L2 cache of any GPU that is sold (50 MB on an H100 or H200)


@dataclass(frozen=True)
class Effort:
    """How long to measure one case."""

    warm_ups: int = 2
    least: int = 5  # rounds
    most: int = 30
    seconds: float = 4.0  # of all rows of the case together; past it only `least` is completed


QUICK = Effort(warm_ups=1, least=3, most=9, seconds=0.8)
FULL = Effort()
GPU = Effort(warm_ups=5, least=10, most=60, seconds=1.0)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Seconds that one call takes on a device."""

    def __init__(self, device: torch.device, cold_cache: bool = False):
        self.device = device
        flush = device.type == "cuda" and cold_cache
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if flush else None

    def __call__(self, run: Callable[[], object], calls: int = 1) -> float:
        if self.device.type == "cuda":
            return self._by_events(run)
        started = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - started) / calls

    def _by_events(self, run: Callable[[], object]) -> float:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self._flush is not None:
            self._flush.zero_()
        before.record()
        run()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3


def interleave(
    runs: dict[str, Callable[[], object]], clock: Clock, effort: Effort, stop: Callable[[], bool] = lambda: False
) -> dict[str, list[float]]:
    """All times of each run, one a round, in the order of the rounds."""
    calls = {}
    for name, run in runs.items():
        for _ in range(max(effort.warm_ups, 1)):
            once = clock(run)
        calls[name] = 1 if clock.device.type == "cuda" else max(1, min(1000, round(SHORT / max(once, 1e-7))))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    started = time.perf_counter()
    for n in range(effort.most):
        if n >= effort.least and (time.perf_counter() - started > effort.seconds or stop()):
            break
        for name, run in runs.items():
            seconds[name].append(clock(run, calls[name]))
    return seconds


def spread(seconds: list[float]) -> float:
    """(max - min) / median."""
    return (max(seconds) - min(seconds)) / statistics.median(seconds)


def bootstrap_ratio(numerator: list[float], denominator: list[float], draws: int = 2000) -> dict[str, float]:
    """The ratio of medians, and the interval that holds 95% of what resampled times give. Efron, Ann. Stat. 1979.

    It knows the noise within a run, not what changes from run to run. With fewer than five times a row it is narrower
    than it should be, so the extremes of the pairs of rounds bound it instead.
    """
    a, b = np.asarray(numerator), np.asarray(denominator)
    value = float(np.median(a) / np.median(b))
    if min(len(a), len(b)) < 5:
        return {"value": value, "low": float(a.min() / b.max()), "high": float(a.max() / b.min())}
    generator = np.random.default_rng(0)
    drawn = [np.median(generator.choice(t, (draws, len(t))), axis=1) for t in (a, b)]
    low, high = np.quantile(drawn[0] / drawn[1], [0.025, 0.975])
    return {"value": value, "low": float(low), "high": float(high)}


def fitted_slope(x: list[float], y: list[float]) -> float | None:
    """Slope of log y over log x by least squares: 1 is linear, 2 quadratic. None for fewer than two points."""
    if len(x) < 2 or min(x) <= 0 or min(y) <= 0:
        return None
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


@contextlib.contextmanager
def energy(device: torch.device) -> Iterator[dict[str, float]]:
    """Joules that the GPU used inside the block, as NVML counts them, under "joules"; nothing where it cannot say."""
    reading: dict[str, float] = {}
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0) if device.type == "cuda" else None
        before = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) if handle else None
    except Exception:  # no NVML, no driver, or a GPU without the counter: energy is extra
        handle = None
    yield reading
    if handle is not None:
        synchronise(device)
        reading["joules"] = (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before) / 1e3
