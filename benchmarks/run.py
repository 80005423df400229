"""Measures fastbert and other libraries on this machine, in one run. See `fastbert bench --help`.

Cases are sorted by priority, so that a run that ends early has measured the most important ones. The whole result file
is written after every case; its "complete" says whether it has all cases.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from fastbert.cli.main import Parser, run_command

SCHEMA = "fastbert-bench/1"

# suite -> its module, with cases(device, dtype, quick) and optionally curves(rows, device, quick)
SUITES = {
    "kernels": "benchmarks.suites.kernels",
    "encoder": "benchmarks.suites.encoder",
    "latency": "benchmarks.suites.latency",
    "training": "benchmarks.suites.training",
    "memory": "benchmarks.suites.memory",
    "cold": "benchmarks.suites.cold",
    "scaling": "benchmarks.suites.scaling",
    "sentences": "benchmarks.suites.sentences",
}

EPILOG = """\
The output of every row is compared with true values before its time is shown: if its error is more than
twice that of plain torch in the same dtype, the row is "wrong" and has no time. A row whose library is not installed is
"missing"; one that raises is "failed", with the reason; one that is too slow for its share of the time is "skipped",
with the time of a pass. Rows run in turns (A B A B); times are medians, tokens are real tokens. After Ctrl-C and
SIGTERM the results up to then are kept.

examples:
  fastbert bench --quick                                 all suites, small; under three minutes on two cores
  fastbert bench --suite kernels --peers none            only fastbert, as a share of the ceiling
  fastbert bench --peers auto,-torch.compile             all libraries except one, which compiles for long
  fastbert bench --suite encoder,latency --peers transformers,openvino --out mine.json
  fastbert bench --budget-minutes 8 --out day.json       the most important cases, as many as the time allows
  fastbert bench --quick --compare before.json           exit code 1 if fastbert became slower beyond the noise
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "Time fastbert and the alternatives to it on this machine, in one run."
    parser.epilog = EPILOG
    suites = ", ".join((*SUITES, "all"))
    parser.add_argument("--suite", type=_suites, default=list(SUITES), help=f"of {suites}, with commas (default all)")
    parser.add_argument("--quick", action="store_true", help="small shapes, few repeats, no slow peers")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if there is a GPU"
    )
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="dtype of every row (default auto: bfloat16 if the hardware multiplies it fast)",
    )  # fmt: skip
    parser.add_argument(
        "--peers", type=_peers, default=_peers("auto"), metavar="auto|none|NAME,...",
        help="other libraries to measure (default auto: all; -NAME leaves one out)",
    )  # fmt: skip
    only = {"metavar": "NAME,...", "type": lambda text: text.split(",")}
    parser.add_argument("--workload", **only, help="only these workloads, such as base_natural")
    parser.add_argument("--operator", **only, help="only these operators, such as attention")
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="write the results to this file, in the format of benchmarks/harness/schema.json",
    )
    parser.add_argument("--compare", metavar="OLD", type=Path, help="at the end, compare with the results in this file")
    parser.add_argument(
        "--ceilings",
        metavar="FILE",
        type=Path,
        help="use the ceilings in this file of benchmarks.gpu_day.card, instead of measuring them",
    )
    parser.add_argument("--budget-minutes", metavar="N", type=float, help="start nothing after N minutes")


def _suites(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in (*SUITES, "all")]:
        raise argparse.ArgumentTypeError(f"unknown suite {', '.join(unknown)}; there are {', '.join((*SUITES, 'all'))}")
    return list(SUITES) if "all" in names else names


@dataclass(frozen=True)
class Peers:
    """Chooses the other libraries to measure: `only` these (None: all), `without` those. Floors are always measured."""

    only: frozenset[str] | None = None
    without: frozenset[str] = frozenset()

    def __call__(self, peer: str) -> bool:
        if peer in ("fastbert", "floor"):  # the report gives shares of the floor, so floors are always needed
            return True
        return (self.only is None or peer in self.only) and peer not in self.without


def _peers(text: str) -> Peers:
    names = [name for name in text.split(",") if name]
    without = frozenset(name[1:] for name in names if name.startswith("-"))
    named = frozenset(name for name in names if not name.startswith("-"))
    return Peers(None if "auto" in named or not named else named - {"none"}, without)


class Results:
    """The result file: a dict that is written whole after each case."""

    def __init__(self, head: dict[str, Any], path: Path | None):
        self.data = {**head, "complete": False, "rows": [], "curves": []}
        self.path = path

    def add(self, rows: Sequence[dict] = (), curves: Sequence[dict] = ()) -> None:
        self.data["rows"] += rows
        self.data["curves"] += curves
        self.write()

    def write(self) -> None:
        if self.path is None:
            return
        from fastbert.storage import write_atomically

        with write_atomically(self.path) as temporary:
            temporary.write_text(json.dumps(self.data, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def run(args: argparse.Namespace) -> int:
    """Runs `fastbert bench`; returns 1 if a row of fastbert is wrong or failed, or --compare found a regression."""
    import torch

    from fastbert.encoding.encoder import resolve_device, resolve_dtype

    from .harness import compare, machine

    old = json.loads(args.compare.read_text(encoding="utf-8")) if args.compare else None
    if args.out and not (args.out.parent.is_dir()):
        raise NotADirectoryError(f"no folder {str(args.out.parent)!r} to write {args.out.name} into")
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    started = time.monotonic()
    deadline = started + 60 * args.budget_minutes if args.budget_minutes else None
    say = _Progress(deadline)
    say(f"{machine.describe(device)['name']}, {str(dtype).removeprefix('torch.')}, torch {torch.__version__}; ceilings")
    results = Results(
        {
            "schema": SCHEMA, "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": machine.commit(), "command": shlex.join(["fastbert", "bench", *args.argv]),
            "device": machine.describe(device), "versions": machine.versions(),
            "ceilings": _ceilings(args.ceilings) or machine.ceilings(device, [*{dtype, torch.float32}], args.quick),
        },
        args.out,
    )  # fmt: skip
    ceilings = results.data["ceilings"]
    say(_ceilings_line(ceilings))
    with _sigterm_as_interrupt():
        try:
            done = _measure_all(args, device, dtype, results, say, deadline)
        except KeyboardInterrupt:
            done = False
            say("interrupted: what was done is kept")
    results.data["complete"] = done
    results.add(curves=_curves(args, device, results, say))
    say(
        f"{len(results.data['rows'])} rows in {time.monotonic() - started:.0f} s"
        + (f", in {args.out}" if args.out else "")
    )
    bad = [r for r in results.data["rows"] if r["peer"] == "fastbert" and r["status"] in ("wrong", "failed")]
    slower = compare.report(old, results.data, say) if old else 0
    return 1 if bad or slower else 0


def _ceilings(path: Path | None) -> dict[str, Any] | None:
    """The ceilings that benchmarks.gpu_day.card measured, or None."""
    return json.loads(path.read_text(encoding="utf-8"))["ceilings"] if path and path.is_file() else None


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM, as `timeout` sends it, ends the run as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _measure_all(args, device, dtype, results: Results, say: _Progress, deadline: float | None) -> bool:
    """True if every case was measured."""
    from .harness import timing
    from .harness.case import Interrupted

    modules = [import_module(SUITES[name]) for name in args.suite]
    cases = [case for module in modules for case in module.cases(device, dtype, args.quick)]
    for only, has in ((args.workload, "workload"), (args.operator, "operator")):
        if only is not None:
            found = {getattr(case, has) for case in cases}
            if unknown := [name for name in only if name not in found]:
                raise ValueError(f"no case of these suites has {has} {', '.join(unknown)}")
            cases = [case for case in cases if getattr(case, has) in only]
    if not cases:
        raise ValueError("no case of these suites has this workload and operator")
    cases.sort(key=lambda case: case.priority)
    effort = timing.QUICK if args.quick else timing.GPU if device.type == "cuda" else timing.FULL
    effort = effort.within(60 * args.budget_minutes if args.budget_minutes else None)
    late = (lambda: False) if deadline is None else (lambda: time.monotonic() > deadline)
    for n, case in enumerate(cases):
        if late():
            say(f"out of time: {len(cases) - n} of {len(cases)} cases not measured")
            return False
        say(f"[{n + 1}/{len(cases)}] {case.name}")
        try:
            rows = case.measured(
                device, effort, results.data["ceilings"], peers=lambda row: args.peers(row.peer), quick=args.quick,
                stop=late,
            )  # fmt: skip
        except Interrupted as interrupted:
            results.add(interrupted.rows)
            raise
        except Exception as error:  # a case that fails, for example for lack of memory, must not end the run
            say(f"  failed: {type(error).__name__}: {error}")
            continue
        results.add(rows)
        say.rows(rows)
    return True


def _curves(args, device, results: Results, say: _Progress) -> list[dict]:
    """The fitted curves of the rows that were measured."""
    found = []
    for name in args.suite:
        module = import_module(SUITES[name])
        if hasattr(module, "curves"):
            found += module.curves(results.data["rows"], device, args.quick)
    for curve in found:
        slope = "none" if curve["slope"] is None else f"{curve['slope']:.2f}"
        say(f"  {curve['name']}: {curve['row']}, slope {slope}")
    return found


class _Progress:
    """Lines on standard error as the run goes."""

    def __init__(self, deadline: float | None = None):
        self.deadline = deadline

    def __call__(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def rows(self, rows: Sequence[dict]) -> None:
        for r in rows:
            if r["status"] != "ok":
                self(f"  {r['row']:44} {r['status']}: {r['reason']}")
                continue
            figures = "" if r["median_s"] is None else f"{r['median_s'] * 1e3:10.3f} ms  +-{r['spread'] / 2:4.0%}"
            if r["suite"] == "memory":
                figures += f"{r['peak_memory_bytes'] / 2**20:10,.0f} MiB above the loaded model"
            if r["tokens_per_second"]:
                figures += f" {r['tokens_per_second']:12,.0f} tok/s"
            if r["share_of_ceiling"]:
                figures += f"  {r['share_of_ceiling']:4.0%} of {r['bound_by']}"
            if r["over_floor"]:
                figures += f"  {r['over_floor']:.2f}x floor"
            if r.get("host_bound"):
                figures += "  host-bound"
            if r["ratio_to_ours"]:
                ratio = r["ratio_to_ours"]
                figures += f"  {ratio['value']:.2f}x ours [{ratio['low']:.2f}, {ratio['high']:.2f}]"
            self(f"  {r['row']:44} {figures}")


def _ceilings_line(ceilings: dict[str, Any]) -> str:
    products = ", ".join(f"{dtype} {tflops:.3g} TFLOP/s" for dtype, tflops in ceilings["gemm_tflops"].items())
    return f"ceilings: {products}; copy {ceilings['copy_gbs']:.3g} GB/s"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="fastbert bench")
    add_arguments(parser)
    args = parser.parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    return run_command(run, args)
