"""Clocks, and what a list of times says: interleaved runs, medians, spread, and ratios with an interval.

Runs go A B A B, so that whatever drifts (a clock that heats up, a neighbour) meets all of them alike. Every time is
kept. A GPU is timed by events around each call; a kernel after the L2 cache was overwritten, and after a wait in which
its launch is queued, so that the events do not time Python. A CPU is timed by `perf_counter`.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

SHORT = 2e-3  # a CPU call below this is repeated within one sample: the clock and a context switch would show
# A CPU call below SETTLES seconds whose neighbours have threads of their own, which spin on after their work (ONNX
# Runtime's for some 20 ms: another library's time doubles on two cores), begins its turn with a pause and an untimed
# call, which also brings its weights back into the cache.
SETTLES, PAUSE = 0.1, 0.04
LAUNCH_CYCLES = 1_000_000  # half a millisecond at 2 GHz, for Python to queue the kernels of an operator in
FLUSH_BYTES = 256 * 2**20  # more than twice the L2 cache of any GPU that is sold (50 MB on an H100 or H200)


@dataclass(frozen=True)
class Effort:
    """How long to measure each row of a case."""

    warm_ups: int = 1  # beside the first call, whose output is checked
    least: int = 3  # rounds
    most: int = 30
    seconds: float = 2.5  # that a row's rounds take; a slow row has fewer of them, `least` at least
    share: float = 10.0  # a row of another library whose `least` rounds would take longer is skipped

    def within(self, budget: float | None) -> Effort:
        """The same for a run of `budget` seconds: no row may take more than a fiftieth of it."""
        if budget is None:
            return self
        return replace(self, seconds=min(self.seconds, budget / 200), share=min(self.share, budget / 50))

    def turns(self, once: float) -> int:
        """Rounds of a row whose sample takes `once` seconds."""
        return max(self.least, min(self.most, int(self.seconds / max(once, 1e-7))))


QUICK = Effort(most=9, seconds=0.5, share=5.0)
FULL = Effort()
GPU = Effort(warm_ups=3, least=10, most=60, seconds=0.15, share=1.5)


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
            torch.cuda._sleep(LAUNCH_CYCLES)
        before.record()
        run()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3


def warm_up(run: Callable[[], object], clock: Clock, effort: Effort) -> float:
    """Seconds of the last of the warm-ups."""
    return [clock(run) for _ in range(max(effort.warm_ups, 1))][-1]


def interleave(
    runs: dict[str, Callable[[], object]], clock: Clock, effort: Effort, stop: Callable[[], bool] = lambda: False, *,
    once: dict[str, float] | None = None, seconds: dict[str, list[float]] | None = None, settle: bool = False,
) -> dict[str, list[float]]:  # fmt: skip
    """All times of each run, in the order of the rounds. A slow run sits out some rounds, evenly.
    After `stop` says so, only `least` rounds are completed.

    `once` holds what a call of each takes, where that is known; else all are warmed up. `seconds` is filled as it goes,
    for a caller that has to know them when a run raises. `settle`: short runs wait for the threads of others.
    """
    once = once or {name: warm_up(run, clock, effort) for name, run in runs.items()}
    calls, turns = {}, {}
    for name in runs:
        repeat = max(1, min(1000, round(SHORT / max(once[name], 1e-7))))
        calls[name] = 1 if clock.device.type == "cuda" else repeat
        turns[name] = effort.turns(once[name] * calls[name])
    seconds = {} if seconds is None else seconds
    seconds |= {name: [] for name in runs}
    rounds = max(turns.values(), default=0)
    for n in range(rounds):
        late = stop()
        if late and all(len(times) >= effort.least for times in seconds.values()):
            break
        for name, run in runs.items():
            its_turn = (n + 1) * turns[name] // rounds > n * turns[name] // rounds
            if len(seconds[name]) < effort.least if late else its_turn:
                if settle and once[name] < SETTLES:
                    time.sleep(PAUSE)
                    run()
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


def bootstrap_slope(x: list[float], seconds: list[list[float]], draws: int = 500) -> dict[str, float | None]:
    """`fitted_slope` of the medians, and the interval that holds 95% of what resampled points and times give.

    So a bent curve has a wide interval, however quiet the machine. Draws with fewer than two different x have no
    slope and are left out; two points alone are always both taken.
    """
    generator = np.random.default_rng(0)
    drawn = []
    for _ in range(draws if len(x) > 1 else 0):
        chosen = range(2) if len(x) == 2 else generator.integers(len(x), size=len(x))
        y = [float(np.median(generator.choice(seconds[n], len(seconds[n])))) for n in chosen]
        if len({x[n] for n in chosen}) > 1:
            drawn.append(fitted_slope([x[n] for n in chosen], y))
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist() if drawn else (None, None)
    slope = fitted_slope(list(x), [float(np.median(times)) for times in seconds])
    return {"slope": slope, "slope_low": low, "slope_high": high}


def _uuid(device: torch.device) -> str:
    """As NVML names the GPU: its own numbers do not know CUDA_VISIBLE_DEVICES."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


@contextlib.contextmanager
def energy(device: torch.device) -> Iterator[dict[str, float]]:
    """Joules that the GPU used inside the block, as NVML counts them, under "joules"; nothing where it cannot say."""
    reading: dict[str, float] = {}
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(_uuid(device)) if device.type == "cuda" else None
        before = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) if handle else None
    except Exception:  # no NVML, no driver, or a GPU without the counter: energy is extra
        handle = None
    yield reading
    if handle is not None:
        synchronise(device)
        reading["joules"] = (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before) / 1e3
