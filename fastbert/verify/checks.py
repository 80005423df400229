"""Checks tasks in this process, and summarises the results in rows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..testing import Check, allowed_factor, check_op
from .cases import CASES, DTYPES, Task, pick_device, tasks


@dataclass(frozen=True)
class Result:
    """The result of a task: a check for each tensor, or in `message` why there are none."""

    task: Task
    checks: tuple[Check, ...] = ()
    seconds: float = 0.0
    message: str = ""

    @property
    def passed(self) -> bool:
        return not self.message and all(check.passed for check in self.checks)

    def as_json(self) -> dict:
        """The result for JSON, with null for NaN and infinity."""
        t = self.task
        checks = [{**asdict(c), "passed": c.passed} for c in self.checks]
        return {
            "op": t.op, "dtype": t.dtype, "case": t.case, "hidden": t.model.hidden, "heads": t.model.heads,
            "lengths": list(t.lengths), "passed": self.passed, "seconds": round(self.seconds, 3),
            "message": self.message, "checks": [{k: without_nan(v) for k, v in c.items()} for c in checks],
        }  # fmt: skip


@dataclass(frozen=True)
class Row:
    """The worst tensor of one operator, dtype and direction; or the operator's error."""

    op: str
    dtype: str
    direction: str  # "forward" or "backward"
    case: str  # "dropout, 768 wide, 4160 tokens"
    tensor: str  # "out", "dq", ...
    error: float
    budget: float
    passed: bool
    message: str = ""


def verify(
    ops: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    device: str | torch.device | None = None,
    impl: str = "triton",
    shapes: str = "auto",
) -> list[Row]:
    """Two rows (forward, backward) for each operator and dtype, all of them by default.

    Args:
        ops: names in `CASES`; dtypes: names in `DTYPES`; device: by default the GPU, if there is one.
        impl: the implementation to check; "triton" on a CPU needs TRITON_INTERPRET=1.
        shapes: "real": BERT-base and -large, 1 to 4,096 tokens a sequence; "small"; "auto" is real on a GPU, else
        small.
    """
    device = pick_device(device)
    found = [check(task, device, impl) for task in tasks(ops or tuple(CASES), dtypes or tuple(DTYPES), device, shapes)]
    return worst(found)


def check(task: Task, device: torch.device, impl: str) -> Result:
    """Checks one task in this process."""
    return result_of(
        task,
        lambda: check_op(
            task.op, task.inputs(), DTYPES[task.dtype], device, impl=impl, factor=factor_of(task.dtype, impl)
        ),
    )


def factor_of(dtype: str, impl: str) -> float:
    """The allowed error of an implementation in this dtype, as a multiple of plain torch's error."""
    return allowed_factor(DTYPES[dtype]) if impl == "triton" else 2.0


def result_of(task: Task, checks: Callable[[], Iterable[Check]]) -> Result:
    """The result of `checks()`. If the operator raises, the result is a failure with the error."""
    began, found, message = time.perf_counter(), (), ""
    try:
        found = tuple(checks())
    except Exception as error:
        message = f"{type(error).__name__}: {error}".splitlines()[0]
    return Result(task, found, time.perf_counter() - began, message)


def worst(results: Iterable[Result]) -> list[Row]:
    """The rows of both directions for each operator and dtype, in the order of CASES."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.task.op, result.task.dtype), []).append(result)
    ops = tuple(CASES)
    return [row for key in sorted(groups, key=lambda key: ops.index(key[0])) for row in _rows(groups[key])]


def _rows(results: Sequence[Result]) -> list[Row]:
    """The two rows of one operator and dtype. Results with an error count as the worst."""
    op, dtype = results[0].task.op, results[0].task.dtype
    raised = next((result for result in results if result.message), None)
    if raised is not None:
        nothing = (str(raised.task), "", float("nan"), float("nan"), False, raised.message)
        return [Row(op, dtype, direction, *nothing) for direction in ("forward", "backward")]
    found: dict[str, tuple[str, Check]] = {}
    for result in results:
        for check in result.checks:
            direction = "forward" if check.name.startswith("out") else "backward"
            if direction not in found or _badness(check) > _badness(found[direction][1]):
                found[direction] = (str(result.task), check)
    return [
        Row(op, dtype, direction, case, check.name, check.error, check.budget, check.passed)
        for direction, (case, check) in found.items()
    ]


def _badness(check: Check) -> float:
    return check.error / check.budget


def without_nan(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def results_of(rows: Sequence[Row]) -> dict:
    """The rows for JSON; an operator that raised has null for error and budget."""
    plain = [{k: without_nan(v) for k, v in asdict(row).items()} for row in rows]
    return {"passed": all(row.passed for row in rows), "rows": plain}


def format_rows(rows: Sequence[Row]) -> str:
    """An aligned table and a summary line."""
    table = [("operator", "dtype", "direction", "worst", "error", "budget", "", "case")]
    for row in rows:
        numbers = ("-", "-") if row.message else (f"{row.error:.2e}", f"{row.budget:.2e}")
        verdict = "pass" if row.passed else "FAIL"
        told = f"{row.case}: {row.message}" if row.message else row.case
        table.append((row.op, row.dtype, row.direction, row.tensor or "-", *numbers, verdict, told))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    failed = sum(not row.passed for row in rows)
    return "\n".join([*lines, f"{len(rows) - failed} of {len(rows)} passed" + (f", {failed} FAILED" if failed else "")])
