"""Searches for a kernel's fastest config: configs next to the best so far are checked, then timed in turns with the
ladder's config. A ladder is the list of conditions by which a kernel's launcher chooses its config."""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from typing import Any

import torch

from ..harness import timing
from ..harness.case import OURS, Case, Row, measure
from . import table as tune_table
from . import tunables
from .tunables import Config, Kernel, Shape, written

GROUP = 6  # configs that take turns with the ladder's
CLEARLY = 0.99  # a config is better if the 95% interval of its time over the ladder's is below this

Stop = Callable[[], bool]


def label(config: Config, beside: Config = None) -> str:
    """A config in the form of its table: all fields, or those that differ from another config."""
    if config is None:
        return "none: other kernels take its part"
    if getattr(config, "vendor", False):
        return "vendor library, with its own epilogue" if config.vendor_epilogue else "vendor library"
    known = asdict(beside) if beside is not None and beside != config and not getattr(beside, "vendor", False) else {}
    shown = {name: value for name, value in asdict(config).items() if name not in known or value != known[name]}
    return ", ".join(f"{n}={v}" for n, v in shown.items() if n != "vendor" and (known or v is not None))


# ---- facts from the compiler -----------------------------------------------------------------------------


def compiled(name: str, config: Config, shape: Shape) -> dict[str, Any] | None:
    """The worst report of the offline compiler for a config, or None if nothing is compiled. Runs in a worker
    process."""
    from ..inspection import compile_report

    with contextlib.redirect_stdout(io.StringIO()):
        cases = tunables.compile_cases(tune_table.kernels()[name], config, shape)
        reports = [compile_report.report_one(case, "", shape.arch) for case in cases]
    if not reports:
        return None
    worst = max(reports, key=lambda r: (bool(r.failures), r.spills, r.registers))
    found = {key: getattr(worst, key) for key in ("registers", "spills", "shared", "ctas_per_sm", "error")}
    return found | {"failures": [line for report in reports for line in report.failures]}


DIED = {
    "registers": 0, "spills": 0, "shared": 0, "ctas_per_sm": 0,
    "error": "the compiler died", "failures": ["the compiler crashes"],
}  # fmt: skip
Facts = dict[str, Any] | None


class Compiler:
    """Runs `compiled` in worker processes, without the interpreter. With 0 workers it has no facts."""

    def __init__(self, jobs: int):
        self.jobs = jobs
        self.pool = self._start(jobs) if jobs else None

    @staticmethod
    def _start(jobs: int) -> ProcessPoolExecutor:
        # A process inherits the environment, and Triton reads this variable once, at import.
        interpret = os.environ.pop("TRITON_INTERPRET", None)
        try:
            pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
            list(pool.map(abs, range(jobs)))  # starts them
        finally:
            if interpret is not None:
                os.environ["TRITON_INTERPRET"] = interpret
        return pool

    def __call__(self, kernel: Kernel, configs: Sequence[Config], shape: Shape) -> dict[Config, Callable[[], Facts]]:
        """Functions that wait for the answers, so that the caller can measure meanwhile."""
        from ..inspection.compile_report import ARCHES

        if self.pool is None or shape.arch not in ARCHES:
            return {}
        shape = replace(shape, device=torch.device("cpu"))
        questions = {config: (kernel.name, config, shape) for config in configs}
        try:
            coming = {config: self.pool.submit(compiled, *question) for config, question in questions.items()}
        except BrokenProcessPool:
            self.pool = self._start(self.jobs)
            coming = {config: self.pool.submit(compiled, *question) for config, question in questions.items()}
        return {config: functools.partial(self._answer, coming[config], questions[config]) for config in configs}

    def _answer(self, coming: Future, question: tuple[str, Config, Shape]) -> Facts:
        try:
            return coming.result()
        except BrokenProcessPool:  # this config or another one crashed the compiler: try again, alone
            with self._start(1) as alone:
                try:
                    return alone.submit(compiled, *question).result()
                except BrokenProcessPool:
                    return DIED

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """A context in which new tensors are NaN, so that an element that is not written is noticed, whatever another
    config has left in its memory."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.utils.deterministic.fill_uninitialized_memory = True
            torch.use_deterministic_algorithms(True, warn_only=True)
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = filled


# ---- one kernel ------------------------------------------------------------------------------------------


class Sweep:
    """The search for one kernel at one shape. `found` is its part of the result file."""

    def __init__(
        self, kernel: Kernel, shape: Shape, effort: timing.Effort, compiler: Compiler, ceilings: dict, source: str = ""
    ):  # fmt: skip
        self.kernel, self.shape, self.effort, self.compiler, self.ceilings = kernel, shape, effort, compiler, ceilings
        self.source = source  # the source of the times, which a row of the table of choices names
        self.job = kernel.job(shape)
        self.truth, self.plain = (functools.lru_cache(maxsize=1)(f) for f in (self.job.truth, self.job.plain))
        self.current = kernel.current(shape)
        in_grid = self.current is not None and self.current not in kernel.others
        # (time over the ladder's, config): the present centre of the search, and the best of all
        self.centre = (1.0, self.current) if in_grid else (float("inf"), kernel.start(shape))
        self.best = (1.0, self.current)
        self.bar = 1.0  # a config is better if its time over the ladder's is below this
        self.tried = {self.current}
        self.facts: dict[Config, Facts] = {}  # what the compiler said
        self.found: dict[str, Any] = {
            "kernel": kernel.name, "dtype": dtype_name(shape), "arch": shape.arch,
            "shape": {**self.job.shape, "dropout_p": shape.dropout}, "current": label(self.current),
            "rows": [], "confirmed": [], "better": None, "paste": [], "complete": False,
        }  # fmt: skip

    def run(self, whole_grid: bool, most: int | None, stop: Stop, save: Callable[[], None]) -> None:
        """Searches until nothing is better, `most` configs were tried, or `stop` returns True. Calls `save` after each
        group."""
        self.found["complete"] = self._search(whole_grid, most, stop, save)
        self._confirm()
        save()

    def _search(self, whole_grid: bool, most: int | None, stop: Stop, save: Callable[[], None]) -> bool:
        """Runs the search. Returns whether it was completed."""
        while True:
            begin = self.centre[1]
            around = self.kernel.everything(begin) if whole_grid else self.kernel.neighbours(begin)
            fresh = self._untried([begin, *around])
            said = self.compiler(self.kernel, [self.current, *fresh[:most]], self.shape)
            self._facts(said, [self.current])
            for start in range(0, len(fresh), GROUP):
                group = fresh[start : start + GROUP] if most is None else fresh[start : min(start + GROUP, most)]
                if stop() or not group:
                    return False
                self._facts(said, group)
                self._try(group)
                save()
            most = None if most is None else max(0, most - len(fresh))
            if whole_grid or self.centre[1] == begin:
                return True

    def _untried(self, configs: Iterable[Config]) -> list[Config]:
        """The configs that were not tried before and can run."""
        fresh = []
        for config in configs:
            may_run = config in self.kernel.others or self.kernel.allowed(config, self.shape)
            if may_run and config not in self.tried:
                self.tried.add(config)
                fresh.append(config)
        return fresh

    def _facts(self, said: dict[Config, Callable[[], Facts]], configs: Sequence[Config]) -> None:
        """Waits for the compiler's facts about these configs."""
        self.facts |= {config: said[config]() for config in configs if config in said and config not in self.facts}

    def _try(self, group: Sequence[Config]) -> None:
        failures = {c: self.facts[c]["failures"] for c in group if self.facts.get(c) and self.facts[c]["failures"]}
        for config, row in self._measure([c for c in group if c not in failures], self.effort):
            self.found["rows"].append(row)
            if row["status"] != "ok":
                if config == self.current:
                    self._dethrone()
                continue
            # without a time of the ladder's config, seconds are compared instead of ratios
            ratio = row["ratio_to_ours"] or dict.fromkeys(("value", "high"), row["median_s"])
            if config == self.current:
                continue
            if config not in self.kernel.others and ratio["high"] < self.centre[0]:
                self.centre = ratio["value"], config
            if ratio["high"] < self.bar and ratio["value"] < self.best[0]:
                self.best = ratio["value"], config
        for config, reasons in failures.items():
            pruned = {"row": label(config, self.current), "peer": "config", "status": "pruned"}
            facts = {"reason": "; ".join(reasons), "config": repr(config), "compiled": self.facts[config]}
            self.found["rows"].append(pruned | facts)

    def _dethrone(self) -> None:
        """Handles a ladder's config that is wrong or failed: any correct config is better."""
        self.bar = float("inf")
        self.best, self.centre = (
            (float("inf"), config) if config == self.current else (ratio, config)
            for ratio, config in (self.best, self.centre)
        )

    def _measure(self, configs: Sequence[Config], effort: timing.Effort) -> list[tuple[Config, dict[str, Any]]]:
        """(config, its finished row) for each config, the ladder's first."""

        def make(config: Config) -> Callable[[], Any]:
            checked = False

            def call() -> Any:
                nonlocal checked
                with contextlib.ExitStack() as stack:
                    stack.enter_context(tunables.using(self.kernel, config))
                    if not checked:  # this is the first call, whose outputs are compared
                        stack.enter_context(poisoned_memory())
                        checked = True
                    return self.job.run()

            return call

        every = list(dict.fromkeys((self.current, *configs)))
        rows = [
            Row(label(config, self.current), OURS if config == self.current else "config",
                functools.partial(make, config), package="triton")
            for config in every
        ]  # fmt: skip
        case = Case(
            "kernels", self.kernel.name, rows, self.truth, self.plain, operator=self.kernel.name,
            dtype=self.shape.dtype, shape=dict(self.job.shape), tokens=self.shape.workload.tokens,
            flops=self.job.work.flops or None, bytes=self.job.work.bytes,
        )  # fmt: skip
        measured = measure(case, self.shape.device, effort, self.ceilings)
        return [
            (config, row | {"config": repr(config), "compiled": self.facts.get(config)})
            for config, row in zip(every, measured, strict=True)
        ]

    def _confirm(self) -> None:
        """Times the best config again, only with the ladder's, and for a matrix product with the vendor library."""
        is_product = self.kernel.name.startswith("gemm:")
        best = self.centre[1] if is_product else self.best[1]
        again = [c for c in dict.fromkeys((best, *(self.kernel.others if is_product else ()))) if c != self.current]
        rows = dict(self._measure(again, replace(self.effort, seconds=2 * self.effort.seconds))) if again else {}
        self.found["confirmed"] = list(rows.values())
        if best != self.current and rows[best]["status"] == "ok":
            ratio = rows[best]["ratio_to_ours"]
            if ratio is None or ratio["high"] < CLEARLY:
                self.found["better"] = repr(best)
        self.found["paste"] = [*self._step(best, rows), *self._choice(rows)]

    def _step(self, best: Config, rows: dict[Config, dict[str, Any]]) -> list[str]:
        """The ladder's entry to paste, after comments with its evidence."""
        sizes = ", ".join(f"{name} {value}" for name, value in self.found["shape"].items() if value)
        where = f"# {dtype_name(self.shape)}, {sizes}:"
        tried = len(self.tried) - 1
        if self.found["better"] is None and self.current not in self.kernel.others:
            return [f"{where} none of {tried} others is faster", *self._rung(self.current)]
        if best in rows and rows[best]["status"] == "ok":
            ratio = rows[best]["ratio_to_ours"]
            beside = "the ladder's has no time" if ratio is None else f"{interval(ratio)} of the ladder's time"
            return [f"{where} {beside}, which is {written(self.current)}", *self._rung(best)]
        return [f"{where} {written(self.current)} is kept: none of {tried} others ran"]

    def _rung(self, config: Config) -> list[str]:
        return self.kernel.rung(config, self.shape).splitlines()

    def _choice(self, rows: dict[Config, dict[str, Any]]) -> list[str]:
        """For a matrix product: the row of `_gemm_config.CHOICES` that chooses the vendor library or our kernel."""
        if not self.kernel.name.startswith("gemm:") or not self.kernel.others:
            return []
        timed = {config: row["median_s"] for config, row in rows.items() if row["status"] == "ok"}
        vendor = [seconds for config, seconds in timed.items() if config in self.kernel.others]
        ours = [seconds for config, seconds in timed.items() if config not in self.kernel.others]
        if not vendor or not ours:
            return ["# vendor or ours: one of them was not measured"]
        from fastbert.kernels._compile import TRITON_TYPES

        others = "vendor epilogue" if self.kernel.others[0].vendor_epilogue else "vendor"
        by, other = (others, min(ours) / vendor[0]) if vendor[0] < min(ours) else ("ours", vendor[0] / min(ours))
        form = self.kernel.name.removeprefix("gemm:")
        n, k = tune_table.gemm_sizes(form, self.shape)
        row = f'Choice("{self.shape.arch}", "{TRITON_TYPES[self.shape.dtype]}", "{form}", {n}, {k}, "{by}", "measured",'
        return [row, f'       "{self.source}"),  # the other takes {other:.2f} times as long']


def interval(ratio: dict[str, float]) -> str:
    return f"{ratio['value']:.3f} ({ratio['low']:.3f} - {ratio['high']:.3f})"


def dtype_name(shape: Shape) -> str:
    return str(shape.dtype).removeprefix("torch.")
