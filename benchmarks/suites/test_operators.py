"""The kernels suite with pytest-benchmark: `python -m pytest benchmarks/ [-k attention] [--benchmark-json FILE]`.

Every row of every quick case is a test: its outputs are checked, then it is timed by a clock that waits for the device.
The file has FLOPs and bytes beside the times, and a description of the machine.
"""

from __future__ import annotations

import time

import pytest
import torch

from fastbert.encoding.encoder import resolve_dtype
from fastbert.testing import relative_rms

from ..harness import timing
from ..harness.case import _as_list, _empty_row, _prepare
from . import kernels as suite_kernels

pytest.importorskip("pytest_benchmark", reason="times through pytest-benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = list(suite_kernels.cases(DEVICE, resolve_dtype("auto", DEVICE), quick=True))
ROWS = [(case, row) for case in CASES for row in case.rows if not row.slow]


def synchronised() -> float:
    """The time in seconds after waiting for the device."""
    timing.synchronise(DEVICE)
    return time.perf_counter()


@pytest.mark.benchmark(timer=synchronised)
@pytest.mark.parametrize(("case", "row"), ROWS, ids=[f"{case.name} {row.row}" for case, row in ROWS])
def test_operator(case, row, benchmark):
    truth = plain = None
    if not case.random:
        truth = _as_list(case.truth())
        plain = [relative_rms(p, t) for p, t in zip(_as_list(case.plain()), truth, strict=True)]
    result, runs = _empty_row(case, row), {}
    _prepare(row, result, runs, truth, plain, DEVICE)
    if result["status"] == "missing":
        pytest.skip(result["reason"])
    assert result["status"] == "ok", result["reason"]

    benchmark.group = case.name
    benchmark.extra_info.update(flops=case.flops, bytes=case.bytes)
    benchmark(runs[row.row])
