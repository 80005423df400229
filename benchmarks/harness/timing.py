"""Clocks and statistics: interleaved runs, medians, spread, and ratios with an interval.

Runs go A B A B, so that changes of the machine (heat, other work) affect all of them equally. Every time is kept. A CPU
is timed by `perf_counter`, a GPU by events around each call.

If the GPU is idle between two launches, events include the time of Python. So a kernel is timed held: the GPU first
overwrites its L2 cache, then spins for longer than Python needs to queue the whole call. If the first event after a
call shows that the spinning ended too early, the call is timed again. A whole model is timed as in normal use, not
held; one additional held call shows how long the GPU alone takes, and so whether Python is the limit
(`Pace.host_bound`). A call that waits for the GPU in between cannot be queued beforehand and is never held.
"""

from __future__ import annotations

import contextlib
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SHORT = 2e-3  # a CPU call below this is repeated within one sample: the clock and a context switch would show
# A CPU call below SETTLES seconds whose neighbours have threads of their own, which spin on after their work (ONNX
# Runtime's for some 20 ms: another library's time doubles on two cores), begins its turn with a pause and an untimed
# call, which also brings its weights back into the cache.
SETTLES, PAUSE = 0.1, 0.04
# The GPU is held for HOLD times what Python took to queue the call before, and HOLD_LEAST more: garbage collection and
# a neighbour's turn come in between. No call is held longer than HOLD_MOST.
HOLD, HOLD_LEAST, HOLD_MOST = 2.0, 2e-4, 0.5
SPIN_CYCLES = 1_000_000  # what the GPU's clock is measured with: half a millisecond at 2 GHz
TRIES = 3  # of a held call, until Python was in time
WAITS = 1.1  # a call that waits for the GPU itself is host-bound where it takes this many times what the GPU takes
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
        """This effort, limited for a run of `budget` seconds: a row may take at most a fiftieth of it."""
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


@dataclass(frozen=True)
class Pace:
    """What a call of one run takes. On a CPU only `seconds` is known."""

    seconds: float  # by the clock, as it times this run
    host_s: float | None = None  # that Python takes to queue the call; None where the call waits for the GPU itself
    device_s: float | None = None  # that the GPU takes, once all that can be queued is queued
    hold_s: float = 0.0  # how long the GPU is held before each call that is timed

    @property
    def host_bound(self) -> bool | None:
        """Whether the GPU waits for Python in such calls."""
        if self.device_s is None:
            return None
        return self.seconds > WAITS * self.device_s if self.host_s is None else self.host_s > self.device_s


@dataclass(frozen=True)
class _Sample:
    seconds: float  # between the events
    host_s: float  # until the call returned
    in_time: bool  # all of it was queued before the GPU began


class Clock:
    """Seconds that one call takes on a device. `cold_cache`: a GPU's calls are held, with nothing of theirs in L2."""

    def __init__(self, device: torch.device, cold_cache: bool = False):
        self.device = device
        self.holds = device.type == "cuda" and cold_cache
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if self.holds else None
        self._speed = 0.0  # cycles a second

    def __call__(self, run: Callable[[], object], calls: int = 1, hold_s: float = 0.0) -> float:
        if self.device.type == "cuda":
            for _ in range(TRIES if hold_s else 1):
                sample = self._by_events(run, hold_s)
                if sample.in_time:
                    break
            return sample.seconds
        started = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - started) / calls

    def pace(self, run: Callable[[], object]) -> Pace:
        """Learns what a call takes of a run that was warmed up."""
        if self.device.type != "cuda":
            return Pace(self(run))
        free = self._by_events(run, 0.0)
        longest = free.host_s
        for _ in range(TRIES):
            hold_s = HOLD * longest + HOLD_LEAST
            if hold_s > HOLD_MOST:
                return Pace(free.seconds, free.host_s)
            self._learn_speed()
            held = self._by_events(run, hold_s)
            if held.in_time:
                seconds = held.seconds if self.holds else free.seconds
                return Pace(seconds, held.host_s, held.seconds, hold_s if self.holds else 0.0)
            longest = max(2 * longest, held.host_s)
        # However long the GPU was held, the call took longer: it waits for the GPU.
        return Pace(free.seconds, None, held.seconds)

    def _learn_speed(self) -> None:
        """The GPU's cycles a second, which a pause lowers: the most ever seen, or a hold would be too short."""
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        torch.cuda._sleep(SPIN_CYCLES)
        after.record()
        after.synchronize()
        self._speed = max(self._speed, SPIN_CYCLES / (before.elapsed_time(after) / 1e3))

    def _by_events(self, run: Callable[[], object], hold_s: float) -> _Sample:
        if self._flush is not None:
            self._flush.zero_()
        if hold_s:
            torch.cuda._sleep(round(hold_s * self._speed))
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        started = time.perf_counter()
        run()
        host_s = time.perf_counter() - started
        in_time = not before.query()
        after.record()
        after.synchronize()
        return _Sample(before.elapsed_time(after) / 1e3, host_s, in_time)


def graph_of(run: Callable[[], object]) -> Callable[[], None]:
    """A call of `run` recorded as a CUDA graph, after two on a stream of their own, as torch asks for; the replay."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def warm_up(run: Callable[[], object], clock: Clock, effort: Effort) -> Pace:
    """What a call takes after the warm-ups."""
    for _ in range(effort.warm_ups - 1):
        run()
    synchronise(clock.device)
    return clock.pace(run)


def interleave(
    runs: dict[str, Callable[[], object]], clock: Clock, effort: Effort, stop: Callable[[], bool] = lambda: False, *,
    paces: dict[str, Pace] | None = None, seconds: dict[str, list[float]] | None = None, settle: bool = False,
) -> dict[str, list[float]]:  # fmt: skip
    """All times of each run, in the order of the rounds. A slow run sits out some rounds, evenly.
    After `stop` says so, only `least` rounds are completed.

    `paces` holds what a call of each takes, where that is known; else all are warmed up. `seconds` is filled as it
    goes, for a caller that has to know them when a run raises. `settle`: short runs wait for the threads of others.
    """
    paces = paces or {name: warm_up(run, clock, effort) for name, run in runs.items()}
    once = {name: pace.seconds for name, pace in paces.items()}
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
                seconds[name].append(clock(run, calls[name], paces[name].hold_s))
    return seconds


def spread(seconds: list[float]) -> float:
    """(max - min) / median."""
    return (max(seconds) - min(seconds)) / statistics.median(seconds)


def bootstrap_ratio(numerator: list[float], denominator: list[float], draws: int = 2000) -> dict[str, float]:
    """The ratio of medians, and the interval that holds 95% of what resampled times give. Efron, Ann. Stat. 1979.

    It knows the noise within a run, not what changes from run to run. With fewer than five times a row it is narrower
    than it should be, so the extremes of the pairs of rounds bound it instead.
    """
    value = statistics.median(numerator) / statistics.median(denominator)
    if min(len(numerator), len(denominator)) < 5:
        return {"value": value, "low": min(numerator) / max(denominator), "high": max(numerator) / min(denominator)}
    generator = torch.Generator().manual_seed(0)
    above, below = (_resampled_medians(times, draws, generator) for times in (numerator, denominator))
    return {"value": value, **_interval(above / below)}


def _resampled_medians(times: list[float], draws: int, generator: torch.Generator) -> Tensor:
    """[draws] medians of as many times, drawn with replacement."""
    chosen = torch.randint(len(times), (draws, len(times)), generator=generator, dtype=torch.int64, device="cpu")
    return torch.tensor(times, dtype=torch.float64, device="cpu")[chosen].quantile(0.5, dim=1)


def _interval(values: Tensor) -> dict[str, float]:
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype, device="cpu")).tolist()
    return {"low": low, "high": high}


def fitted_slope(x: list[float], y: list[float]) -> float | None:
    """Slope of log y over log x by least squares: 1 is linear, 2 quadratic. None for fewer than two points."""
    if len(x) < 2 or min(x) <= 0 or min(y) <= 0:
        return None
    return statistics.linear_regression([math.log(n) for n in x], [math.log(n) for n in y]).slope


def bootstrap_slope(x: list[float], seconds: list[list[float]], draws: int = 500) -> dict[str, float | None]:
    """`fitted_slope` of the medians, and the interval that holds 95% of what resampled points and times give.

    So a bent curve has a wide interval, however quiet the machine. Draws with fewer than two different x have no
    slope and are left out; two points alone are always both taken.
    """
    draw = random.Random(0)
    drawn = []
    for _ in range(draws if len(x) > 1 else 0):
        chosen = range(2) if len(x) == 2 else draw.choices(range(len(x)), k=len(x))
        y = [statistics.median(draw.choices(seconds[n], k=len(seconds[n]))) for n in chosen]
        if len({x[n] for n in chosen}) > 1:
            drawn.append(fitted_slope([x[n] for n in chosen], y))
    interval = dict.fromkeys(("low", "high"))
    if drawn:
        interval = _interval(torch.tensor(drawn, dtype=torch.float64, device="cpu"))
    slope = fitted_slope(list(x), [statistics.median(times) for times in seconds])
    return {"slope": slope, "slope_low": interval["low"], "slope_high": interval["high"]}


def _uuid(device: torch.device) -> str:
    """NVML's name of the GPU. NVML's numbers ignore CUDA_VISIBLE_DEVICES."""
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
