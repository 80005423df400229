"""A case: the same work by several rows, each checked against the truth, then timed in turns.

A row's `make` returns a function that does the work; it is called to compare its outputs, and then to take its times.
An error of one row becomes that row's status, in one line, and does not affect other rows:

    ok       within the budget, timed                      wrong    outputs outside the budget; no time is shown
    missing  not installed, or not for this machine        failed   the row raised an error
    skipped  too slow for its share of the time, or no time was left
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastbert.testing import TINY, relative_rms

from . import timing
from .peer import FLOOR, OURS, Missing, Run, one_line, version

OWN_THREADS = ("onnxruntime", "openvino")  # peers with their own threads, not torch's

# Allowed errors, in multiples of plain torch's: another library that adds in another order is not hidden for it.
OF_OURS, OF_OTHERS = 2, 4


@contextlib.contextmanager
def compiling(rows: Sequence[Row]) -> Iterator[None]:
    """Resets torch.compile for each case, and makes it raise instead of running uncompiled after too many shapes."""
    if not any(row.peer == "torch.compile" for row in rows):
        yield
        return
    import torch._dynamo

    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


class Interrupted(KeyboardInterrupt):
    """Ctrl-C within a case; `rows` are the rows that were finished."""

    def __init__(self, rows: list[dict[str, Any]]):
        super().__init__()
        self.rows = rows


@dataclass(frozen=True)
class Row:
    """One way to do a case's work. `make` returns a function that does it once; `outputs(result)` are compared."""

    row: str
    peer: str
    make: Callable[[], Run]
    package: str | None = None  # the package whose version is recorded
    settings: dict[str, Any] = field(default_factory=dict)
    outputs: Callable[[Any], Sequence[Tensor]] | None = None
    checked: bool = True  # False for floors, which compute no result of the case
    slow: bool = False  # left out of --quick
    tolerance: float | None = None  # allowed relative RMS error in place of the budget, for integer arithmetic


@dataclass(frozen=True)
class Case:
    """The work that rows are compared on. `truth` returns the outputs in float64 (or float32), `plain` those of plain
    torch in the case's dtype, which set the budget."""

    suite: str
    workload: str
    rows: Sequence[Row]
    truth: Callable[[], Sequence[Tensor]]
    plain: Callable[[], Sequence[Tensor]]
    model: str | None = None
    operator: str | None = None
    direction: str = "forward"
    dtype: torch.dtype = torch.float32
    shape: dict[str, int | float] = field(default_factory=dict)
    tokens: int = 0
    flops: float | None = None
    bytes: float | None = None
    priority: int = 50  # cases with smaller numbers are measured first
    quick: bool = False
    floor: str | None = None  # name of the row that is the floor
    random: bool = (
        False  # dropout: there is no truth to compare with, so a finite output of the right shape is asked for
    )
    close: Callable[[], None] | None = None  # frees what the rows shared

    def measured(self, *args: Any, **options: Any) -> list[dict[str, Any]]:
        """The finished rows."""
        return measure(self, *args, **options)

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.suite, self.operator, self.direction, self.workload, self.dtype_name)))

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def _as_list(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _empty_row(case: Case, row: Row) -> dict[str, Any]:
    facts = {
        "suite": case.suite, "workload": case.workload, "model": case.model, "operator": case.operator,
        "direction": case.direction, "dtype": case.dtype_name, "shape": case.shape, "row": row.row, "peer": row.peer,
        "version": version(row.package or row.peer), "settings": row.settings, "status": "skipped", "reason": None,
        "tokens": case.tokens, "flops": case.flops, "bytes": case.bytes, "bound_by": None,
    }  # fmt: skip
    empty = (
        "seconds median_s spread host_s device_s graph_s host_bound tokens_per_second tflops gbs share_of_ceiling "
        "floor_s over_floor error budget peak_memory_bytes first_call_s energy_j ratio_to_ours"
    )
    return facts | dict.fromkeys(empty.split())


def measure(
    case: Case, device: torch.device, effort: timing.Effort, ceilings: dict[str, Any], *,
    peers: Callable[[Row], bool] = lambda row: True, quick: bool = False, stop: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:  # fmt: skip
    """The finished rows of one case, in its order.

    Raises: Interrupted, with the rows, on Ctrl-C.
    """
    results = {row.row: _empty_row(case, row) for row in case.rows if peers(row) and not (quick and row.slow)}
    chosen = [row for row in case.rows if row.row in results]
    clock = timing.Clock(device, cold_cache=case.suite == "kernels")
    runs: dict[str, Run] = {}
    paces: dict[str, timing.Pace] = {}
    seconds: dict[str, list[float]] = {}
    interrupted = False
    try:
        with compiling(chosen):
            truth, plain = _truth(case, chosen)
            for row in chosen:
                if stop():
                    break
                _prepare(row, results[row.row], runs, truth, plain, device)
                _warm_up(row, results[row.row], runs, paces, clock, effort)
            del truth
            guarded = {name: _guarded(runs, results[name], name) for name in runs}
            settle = device.type == "cpu" and any(row.peer in OWN_THREADS for row in chosen)
            timing.interleave(guarded, clock, effort, stop, paces=paces, seconds=seconds, settle=settle)
            _memory_and_energy(case, runs, results, device)
            _graphs(case, runs, results, paces, clock, effort)
    except KeyboardInterrupt:
        interrupted = True
    for name, times in seconds.items():
        if name in runs and len(times) >= FEWEST:
            _write_times(results[name], times, case, ceilings)
            _write_pace(results[name], paces[name])
    for result in results.values():
        if result["status"] in ("ok", "skipped") and result["seconds"] is None and result["reason"] is None:
            result |= {"status": "skipped", "reason": "interrupted" if interrupted else "the time was up"}
    _compare_rows(results, case)
    runs.clear()
    if case.close is not None:
        case.close()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if interrupted:
        raise Interrupted(list(results.values()))
    return list(results.values())


FEWEST = 3  # least number of times for a median


def _truth(case: Case, chosen: Sequence[Row]) -> tuple[list[Tensor] | None, list[float] | None]:
    """(true outputs, plain torch's error of each); None if nothing is compared."""
    if case.random or not any(row.checked for row in chosen):
        return None, None
    truth = [t.detach() for t in _as_list(case.truth())]
    return truth, [relative_rms(p, t) for p, t in zip(_as_list(case.plain()), truth, strict=True)]


def _prepare(row: Row, result: dict, runs: dict[str, Run], truth, plain, device: torch.device) -> None:
    """Makes the row, checks its outputs, and adds its function to `runs` for timing."""
    try:
        run = row.make()
        made = run()
        timing.synchronise(device)
        outputs = _as_list(row.outputs(made) if row.outputs else made)
        if row.checked and truth is None and not all(bool(t.isfinite().all()) for t in outputs):
            result |= {"status": "wrong", "reason": "an output is not finite"}
            return
        if row.checked and truth is not None:
            errors = [relative_rms(o, t) for o, t in zip(outputs, truth, strict=True)]
            times = OF_OURS if row.peer == OURS else OF_OTHERS
            budgets = [times * p + TINY if row.tolerance is None else row.tolerance for p in plain]
            worst = max(range(len(errors)), key=lambda n: errors[n] / budgets[n])
            result |= {"error": errors[worst], "budget": budgets[worst]}
            if not errors[worst] <= result["budget"]:
                reason = f"relative RMS error {errors[worst]:.1e}, budget {result['budget']:.1e}"
                result |= {"status": "wrong", "reason": reason, "error": min(errors[worst], 1e300)}
                return
    except Missing as error:
        result |= {"status": "missing", "reason": str(error)}
    except Exception as error:  # any error of a peer becomes its row's status
        result |= {"status": "failed", "reason": one_line(error)}
    else:
        result["status"] = "ok"
        runs[row.row] = run


def _warm_up(row: Row, result: dict, runs: dict[str, Run], paces: dict[str, timing.Pace], clock, effort) -> None:
    """Measures how long a call of a prepared row takes. A row of another library that would exceed its share of the
    time is skipped."""
    if row.row not in runs:
        return
    pace = timing.warm_up(_guarded(runs, result, row.row), clock, effort)
    if row.row not in runs:
        return
    theirs, seconds = row.peer not in (OURS, FLOOR), pace.seconds
    if theirs and seconds <= effort.share < effort.least * seconds:  # once more: a first warm pass may be a slow one
        seconds = min(seconds, clock(_guarded(runs, result, row.row)))
    paces[row.row] = replace(pace, seconds=seconds)
    if theirs and effort.least * seconds > effort.share and row.row in runs:
        del runs[row.row]
        reason = f"{seconds:.2g} s a pass, {effort.least} passes are over the row's share of {effort.share:.2g} s"
        result |= {"status": "skipped", "reason": reason}


def _guarded(runs: dict[str, Run], result: dict, name: str) -> Run:
    """The run, whose first error becomes its row's status; after that its turns do nothing."""
    run = runs[name]

    def call() -> None:
        if name not in runs:
            return
        try:
            run()
        except Exception as error:
            del runs[name]
            result.update(status="failed", reason=one_line(error))

    return call


def _compare_rows(results: dict[str, dict], case: Case) -> None:
    """Adds ratios to fastbert's time and to the floor; to fastbert's only if both rows have enough times."""
    timed = {name: result for name, result in results.items() if result["seconds"] is not None}
    ours = next((result for result in timed.values() if result["peer"] == OURS), None)
    floor = timed.get(case.floor or "")
    for result in timed.values():
        fewest = min(len(r["seconds"]) for r in (result, ours or result))
        if ours is not None and result is not ours and fewest >= FEWEST:
            result["ratio_to_ours"] = timing.bootstrap_ratio(result["seconds"], ours["seconds"])
        if floor is not None:
            result["floor_s"] = floor["median_s"]
            result["over_floor"] = result["median_s"] / floor["median_s"]


def _write_times(result: dict, seconds: list[float], case: Case, ceilings: dict[str, Any]) -> None:
    median = statistics.median(seconds)
    result |= {"seconds": seconds, "median_s": median, "spread": timing.spread(seconds)}
    if case.tokens:
        result["tokens_per_second"] = case.tokens / median
    matrix = memory = None
    if case.flops:
        result["tflops"] = case.flops / median / 1e12
        ceiling = ceilings["gemm_tflops"].get(case.dtype_name)
        matrix = result["tflops"] / ceiling if ceiling else None
    if case.bytes:
        result["gbs"] = case.bytes / median / 1e9
        memory = result["gbs"] / ceilings["copy_gbs"]
    shares = {name: share for name, share in (("matrix", matrix), ("memory", memory)) if share is not None}
    if shares:
        result["bound_by"] = max(shares, key=shares.get)
        result["share_of_ceiling"] = shares[result["bound_by"]]


def _write_pace(result: dict, pace: timing.Pace) -> None:
    result |= {"host_s": pace.host_s, "device_s": pace.device_s, "host_bound": pace.host_bound}


def _memory_and_energy(case: Case, runs: dict[str, Run], results: dict[str, dict], device: torch.device) -> None:
    """On a GPU: the peak memory of a call beyond its inputs, and the energy of a model's call."""
    if device.type != "cuda":
        return
    for name, run in list(runs.items()):
        run = _guarded(runs, results[name], name)
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        run()
        torch.cuda.synchronize(device)
        took = time.perf_counter() - started
        results[name]["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device) - before
        if case.suite == "kernels":  # too short for the counter, which is updated every few milliseconds
            continue
        calls = max(1, min(200, round(0.2 / max(took, 1e-4))))
        with timing.energy(device) as reading:
            for _ in range(calls):
                run()
        if "joules" in reading:
            results[name]["energy_j"] = reading["joules"] / calls


def _graphs(case: Case, runs: dict[str, Run], results: dict[str, dict], paces, clock: timing.Clock, effort) -> None:
    """On a GPU: the time of our operator as a CUDA graph, without the cost of Python.

    Calls that wait for the GPU cannot be recorded. Calls with dropout are not recorded either, since a failed recording
    leaves torch's random numbers unusable.
    """
    if clock.device.type != "cuda" or case.suite != "kernels" or case.random:
        return
    for row in case.rows:
        pace = paces.get(row.row)
        if row.row not in runs or row.peer != OURS or None in (pace.host_s, pace.device_s):
            continue
        try:
            replay = timing.graph_of(runs[row.row])
            times = [clock(replay, 1, timing.HOLD_LEAST) for _ in range(effort.least)]
        except Exception as error:  # an operator that cannot be recorded still has its time without a graph
            results[row.row]["settings"] = {**results[row.row]["settings"], "graph": one_line(error)}
        else:
            results[row.row]["graph_s"] = statistics.median(times)
