"""One case: the same work by several rows, each checked against the truth, then timed in turns.

A row makes what it needs (`make`), and what it made is called until its outputs were compared and its times taken.
Whatever goes wrong with one row is that row's status, in one line, and no other row notices:

    ok       within the budget, timed          wrong    its outputs are not; no time is shown
    missing  not installed, or not for here    failed   it raised
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastbert.testing import TINY, relative_rms

from . import timing
from .machine import version

OURS = "fastbert"
Run = Callable[[], Any]


class Missing(Exception):
    """What a row needs is not here, and this is why."""


def need(package: str, module: str | None = None) -> Any:
    """The module, or Missing."""
    import importlib

    try:
        return importlib.import_module(module or package.replace("-", "_"))
    except ImportError as error:
        found = version(package)
        raise Missing(
            f"{package} is not installed" if found is None else f"{package} {found}: {_line(error)}"
        ) from None


@dataclass(frozen=True)
class Row:
    """One way to do a case's work. `make` gives a function that does it once; `outputs` of a result are compared."""

    row: str
    peer: str
    make: Callable[[], Run]
    package: str | None = None  # whose version is written down
    settings: dict[str, Any] = field(default_factory=dict)
    outputs: Callable[[Any], Sequence[Tensor]] | None = None
    checked: bool = True  # False: a floor, whose output is nobody's
    slow: bool = False  # left out of --quick
    close: Callable[[], None] | None = None


@dataclass(frozen=True)
class Case:
    """What rows are compared on. `truth` gives the outputs in float64 (or float32), `plain` those of plain torch in the
    case's dtype, which set the budget."""

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
    priority: int = 50  # smaller is measured first
    quick: bool = False
    floor: str | None = None  # name of the row that is the floor
    random: bool = (
        False  # dropout: there is no truth to compare with, so a finite output of the right shape is asked for
    )

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.suite, self.operator, self.direction, self.workload, self.dtype_name)))

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def _line(error: BaseException) -> str:
    words = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


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
        "seconds median_s spread tokens_per_second tflops gbs share_of_ceiling floor_s over_floor error budget "
        "peak_memory_bytes first_call_s energy_j ratio_to_ours"
    )
    return facts | dict.fromkeys(empty.split())


def measure(
    case: Case, device: torch.device, effort: timing.Effort, ceilings: dict[str, Any], *,
    peers: Callable[[Row], bool] = lambda row: True, quick: bool = False, stop: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:  # fmt: skip
    """The finished rows of one case, in its order."""
    results = {row.row: _empty_row(case, row) for row in case.rows if peers(row) and not (quick and row.slow)}
    chosen = [row for row in case.rows if row.row in results]
    truth, plain = None, None
    if not case.random and any(row.checked for row in chosen):
        truth = [t.detach() for t in _as_list(case.truth())]
        plain = [relative_rms(p, t) for p, t in zip(_as_list(case.plain()), truth, strict=True)]

    runs: dict[str, Run] = {}
    for row in chosen:
        _prepare(row, results[row.row], runs, truth, plain, device)
    del truth
    times = timing.interleave(runs, timing.Clock(device, cold_cache=case.suite == "kernels"), effort, stop)
    for name, seconds in times.items():
        _write_times(results[name], seconds, case, ceilings)
    _memory_and_energy(runs, results, device)
    ours = next((r for r in results.values() if r["peer"] == OURS and r["status"] == "ok"), None)
    floor = results.get(case.floor or "")
    for result in results.values():
        if result["status"] == "ok" and ours is not None and result is not ours:
            result["ratio_to_ours"] = timing.bootstrap_ratio(result["seconds"], ours["seconds"])
        if result["status"] == "ok" and floor is not None and floor["status"] == "ok":
            result["floor_s"] = floor["median_s"]
            result["over_floor"] = result["median_s"] / floor["median_s"]
    for row in chosen:
        if row.close is not None:
            row.close()
    runs.clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return list(results.values())


def _prepare(row: Row, result: dict, runs: dict[str, Run], truth, plain, device: torch.device) -> None:
    """Makes the row, checks its outputs, and hands what is left to time to `runs`."""
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
            worst = max(range(len(errors)), key=lambda n: errors[n] / (2 * plain[n] + TINY))
            result |= {"error": errors[worst], "budget": 2 * plain[worst] + TINY}
            if not errors[worst] <= result["budget"]:
                reason = f"relative RMS error {errors[worst]:.1e}, budget {result['budget']:.1e}"
                result |= {"status": "wrong", "reason": reason, "error": min(errors[worst], 1e300)}
                return
    except Missing as error:
        result |= {"status": "missing", "reason": str(error)}
    except Exception as error:  # a peer's trouble is its row's, whatever it is
        result |= {"status": "failed", "reason": _line(error)}
    else:
        result["status"] = "ok"
        runs[row.row] = run


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


def _memory_and_energy(runs: dict[str, Run], results: dict[str, dict], device: torch.device) -> None:
    """On a GPU: the most memory a call allocates on top of its inputs, and the energy a call takes."""
    if device.type != "cuda":
        return
    for name, run in runs.items():
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        results[name]["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device) - before
        calls = max(1, min(2000, round(0.2 / results[name]["median_s"])))
        with timing.energy(device) as reading:
            for _ in range(calls):
                run()
        if "joules" in reading:
            results[name]["energy_j"] = reading["joules"] / calls
