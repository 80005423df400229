"""Finds the fastest config of a kernel on this GPU: `python -m benchmarks.tuning.tune --kernel attention`.

A config is a kernel's launch parameters (blocks, warps, stages). A kernel's ladder, in its module, is the list of
conditions by which its launcher chooses a config. The search starts with the ladder's config, tries every config that
differs from the best so far in one field, and continues from a better one until none is better or time runs out. Before
a config is timed, its outputs are compared with true values: if its error is more than twice plain torch's, the config
is "wrong" and has no time. Configs run in turns with the ladder's; at the end the best one runs again with the ladder's
alone, so a printed entry was faster twice. Configs that do not fit (shared memory, or spills, as the compiler reports
them) do not run.

The search needs a GPU. Without one the kernels run in Triton's interpreter on tiny shapes, as a rehearsal whose times
mean nothing; --compile-only prints the compiler's report for each config.

  python -m benchmarks.tuning.tune --kernel attention --budget-minutes 3 --out tune.json
  python -m benchmarks.tuning.tune --kernel layer_norm --model minilm,base,large    a ladder of three entries
  python -m benchmarks.tuning.tune --kernel gemm:nt+act --width 1024 --inner 4096
  python -m benchmarks.tuning.tune --kernel attention_fwd --compile-only sm_90      only registers and spills
  python -m benchmarks.tuning.tune --list                                           kernels, and values of each field
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import itertools
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastbert.encoding.encoder import resolve_dtype
from fastbert.kernels import _device
from fastbert.testing import MODELS, ModelShape

from ..harness import machine, timing
from ..harness.case import OURS
from ..run import Results
from . import table as tune_table
from .search import Compiler, Sweep, dtype_name, interval, label
from .tunables import Kernel, Shape

BERTS = [name for name in MODELS if name != "tiny"]
SCHEMA = "fastbert-tune/1"
REHEARSAL = 3  # configs of each kernel in a rehearsal

# ---- output ----------------------------------------------------------------------------------------------

LADDERS = "the ladder's"
HEAD = ("config", "median", "spread", "time / the ladder's (95%)", "registers", "spills", "shared", "CTAs")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The table of configs, fastest first; those without a time last, with the reason."""
    lines, last = [HEAD], []
    ladders = [row for row in rows if row["peer"] == OURS][:1]  # it ran in every group, and is shown once
    rows = [*ladders, *(row for row in rows if row["peer"] != OURS)]
    timed = [row for row in rows if row["status"] == "ok"]
    for row in sorted(timed, key=lambda row: (row["ratio_to_ours"] or {"value": 1.0})["value"]):
        ratio = row["ratio_to_ours"]
        relative = "-" if ratio is None else interval(ratio)
        name = LADDERS if row["peer"] == OURS else row["row"]
        lines.append((name, f"{1e3 * row['median_s']:.4f} ms", f"{row['spread']:.0%}", relative, *_machine_code(row)))
    for row in rows:
        if row["status"] != "ok":
            last.append(f"{LADDERS if row['peer'] == OURS else row['row']}  {row['status']}: {row['reason']}")
    return "\n".join([_columns(lines), *last])


def _columns(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _machine_code(row: dict[str, Any]) -> tuple[str, ...]:
    facts = row.get("compiled")
    if not facts:
        return ("-",) * 4
    return str(facts["registers"]), str(facts["spills"]), f"{facts['shared'] / 1024:.0f}K", str(facts["ctas_per_sm"])


def compile_table(kernel: Kernel, shape: Shape, compiler: Compiler, whole_grid: bool, most: int | None) -> str:
    """The compiler's report for the configs that a search would try first."""
    begin = kernel.current(shape)
    begin = kernel.start(shape) if begin is None or begin in kernel.others else begin
    around = kernel.everything(begin) if whole_grid else kernel.neighbours(begin)
    configs = [c for c in dict.fromkeys((begin, *around)) if c not in kernel.others and kernel.allowed(c, shape)][:most]
    lines = [(HEAD[0], *HEAD[4:], "verdict")]
    for config, answer in compiler(kernel, configs, shape).items():
        facts = answer()
        verdict = "not listed by its module" if not facts else "; ".join(facts["failures"]) or "ok"
        lines.append((label(config, begin), *_machine_code({"compiled": facts}), verdict))
    return _columns(lines)


# ---- command line ----------------------------------------------------------------------------------------


def _shape(
    args: argparse.Namespace, kernel: Kernel, name: str, device: torch.device, arch: str, rehearsal: bool
) -> Shape:  # fmt: skip
    """The batch to time a kernel with, in the sizes of this model or those of the arguments."""
    base = MODELS[name]
    width = args.width or (kernel.width if kernel.width and not rehearsal else None) or base.hidden
    head_dim = args.head_dim or base.head_dim
    if width % head_dim:
        raise ValueError(f"a width of {width} is not a multiple of head_dim {head_dim}")
    model = ModelShape(width, width // head_dim, args.inner or base.intermediate, base.layers, args.vocab or base.vocab)
    sequences, length = args.batch or kernel.batch
    lengths = (length,) * sequences
    if rehearsal and not args.batch:
        lengths = (min(length, 130 if kernel.name.startswith("attention") else 24), 5)
    # the interpreter only emulates bfloat16
    dtype = torch.float16 if rehearsal and args.dtype == "auto" else resolve_dtype(args.dtype, device)
    if args.compile_only and args.dtype == "auto":
        dtype = torch.bfloat16
    nk = None if args.n is None and args.k is None else (args.n, args.k)
    if nk is not None and None in nk:
        raise ValueError("--n and --k come together")
    return Shape(model, lengths, dtype, arch, device, args.dropout, nk)


def _batch(text: str) -> tuple[int, int]:
    try:
        sequences, length = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected SEQUENCESxLENGTH such as 64x512, got {text!r}") from None
    return sequences, length


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tuning.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--kernel", default="all", metavar="NAME,...", help="kernels, families of them, or all (default)"
    )
    parser.add_argument("--list", action="store_true", help="list the kernels with their fields and values, and exit")
    parser.add_argument(
        "--model", default="base", metavar="NAME,...",
        help=f"one or several of {', '.join(BERTS)}; each gives an entry of the ladder (default: base)",
    )  # fmt: skip
    parser.add_argument("--width", type=int, metavar="C", help="hidden width (default: the model's)")
    parser.add_argument("--head-dim", type=int, metavar="D", help="width of a head (default: the model's)")
    parser.add_argument("--inner", type=int, metavar="F", help="feed-forward width (default: the model's)")
    parser.add_argument("--vocab", type=int, metavar="V", help="size of the vocabulary (default: the model's)")
    parser.add_argument("--n", type=int, help="with --k: sizes of a matrix product, as in its table of choices")
    parser.add_argument("--k", type=int)
    parser.add_argument("--batch", type=_batch, metavar="BxS", help="sequences x length (default: by kernel)")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P", help="of attention")
    parser.add_argument("--dtype", default="auto", help="default: bfloat16 if the GPU multiplies it fast")
    parser.add_argument("--whole-grid", action="store_true", help="try all configs, nearest to the ladder's first")
    parser.add_argument("--most", type=int, metavar="N", help="try at most N configs of each kernel")
    parser.add_argument(
        "--budget-minutes", type=float, metavar="N", help="start nothing after N minutes, divided evenly among kernels"
    )
    parser.add_argument("--no-compile", action="store_true", help="do not compile configs before they run")
    parser.add_argument("--compile-only", metavar="ARCH", help="print registers and spills, such as on sm_90; no run")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, few configs (without a GPU: always)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write JSON to this file, after every group of configs"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    given = list(sys.argv[1:] if argv is None else argv)
    if importlib.util.find_spec("triton") is None:
        print("tune needs triton, which is not installed here", file=sys.stderr)
        return 2
    gpu = torch.cuda.is_available()
    if not gpu and not _device.INTERPRETING and not args.compile_only and not args.list:
        print("no GPU here, and times need one: rehearsing under Triton's interpreter instead", file=sys.stderr)
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        return subprocess.call([sys.executable, "-m", "benchmarks.tuning.tune", *given], env=environment)
    try:
        if args.list:
            print(listing())
            return 0
        chosen = tune_table.named(args.kernel)
        if unknown := [name for name in args.model.split(",") if name not in BERTS]:
            raise ValueError(f"no model {', '.join(unknown)}; there are {', '.join(BERTS)}")
        if args.out and not args.out.parent.is_dir():
            raise ValueError(f"no folder {str(args.out.parent)!r} to write {args.out.name} into")
        return _compile_only(args, chosen) if args.compile_only else _tune(args, chosen, gpu, given)
    except ValueError as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2


def _compile_only(args: argparse.Namespace, chosen: Sequence[Kernel]) -> int:
    from ..inspection.compile_report import ARCHES

    if args.compile_only not in ARCHES:
        raise ValueError(f"no architecture {args.compile_only!r}; there are {', '.join(ARCHES)}")
    compiler = Compiler(os.cpu_count() or 1)
    try:
        for kernel, name in itertools.product(chosen, args.model.split(",")):
            shape = _shape(args, kernel, name, torch.device("cpu"), args.compile_only, rehearsal=False)
            print(f"{kernel.name}, {shape.arch}, {dtype_name(shape)}, {shape.model}")
            print(compile_table(kernel, shape, compiler, args.whole_grid, args.most), end="\n\n", flush=True)
    finally:
        compiler.close()
    return 0


def _tune(args: argparse.Namespace, chosen: Sequence[Kernel], gpu: bool, given: list[str]) -> int:
    """Runs the searches. Returns the exit code, 1 if a ladder's config is wrong or failed."""
    rehearsal = args.rehearse or not gpu
    device = torch.device("cuda" if gpu else "cpu")
    arch = _device.arch()
    effort = timing.Effort(warm_ups=1, least=3, most=3, seconds=0.0) if rehearsal else timing.GPU
    most = args.most if args.most is not None else REHEARSAL if rehearsal else None
    models = ["tiny"] if rehearsal else args.model.split(",")
    work = [(k, _shape(args, k, name, device, arch, rehearsal)) for k, name in itertools.product(chosen, models)]
    dtypes = list(dict.fromkeys(shape.dtype for _, shape in work))
    head = {
        "schema": SCHEMA, "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": machine.commit(), "command": shlex.join(["python", "-m", "benchmarks.tuning.tune", *given]),
        "device": machine.describe(device), "versions": machine.versions(), "rehearsal": rehearsal,
        "ceilings": machine.ceilings(device, dtypes, quick=True) if gpu else {"gemm_tflops": {}, "copy_gbs": 1.0},
        "kernels": [],
    }  # fmt: skip
    results = Results(head, args.out)
    source = f"benchmarks/results/{head['device']['slug']}/{args.out.name if args.out else 'tune.json'}"
    if rehearsal:
        print("rehearsal: times mean nothing, and no step is advice", file=sys.stderr)
    ends = None if args.budget_minutes is None else time.monotonic() + 60 * args.budget_minutes
    compiler = Compiler(0 if rehearsal or args.no_compile else min(8, os.cpu_count() or 1))
    bad = False
    try:
        for n, (kernel, shape) in enumerate(work):
            now = time.monotonic()
            until = float("inf") if ends is None else now + (ends - now) / (len(work) - n)
            try:
                sweep = Sweep(kernel, shape, effort, compiler, results.data["ceilings"], source)
            except (RuntimeError, ValueError) as error:  # out of memory, or the operator refuses the shape
                print(f"{kernel.name}: {error}", file=sys.stderr)
                bad = True
                continue
            results.data["kernels"].append(sweep.found)
            sweep.run(args.whole_grid, most, lambda until=until: time.monotonic() > until, results.write)
            print(report(sweep.found, rehearsal), end="\n\n", flush=True)
            bad |= any(row.get("peer") == OURS and row["status"] != "ok" for row in sweep.found["rows"])
        results.data["complete"] = all(found["complete"] for found in results.data["kernels"])
    except KeyboardInterrupt:
        print("interrupted: what was done is kept", file=sys.stderr)
    compiler.close()
    results.write()
    if not rehearsal:
        print(ladders(results.data["kernels"]))
    return int(bad)


def report(found: dict[str, Any], rehearsal: bool) -> str:
    """The tables of one kernel; after a rehearsal without the confirmation."""
    sizes = ", ".join(f"{name} {value}" for name, value in found["shape"].items() if value)
    cut = "" if found["complete"] else "; not all was tried"
    lines = [f"{found['kernel']}, {found['arch']}, {found['dtype']}, {sizes}{cut}"]
    lines += [f"the ladder's: {found['current']}", table(found["rows"])]
    if found["confirmed"] and not rehearsal:
        lines += ["once more:", table(found["confirmed"])]
    return "\n".join(lines)


def ladders(all_found: Sequence[dict[str, Any]]) -> str:
    """The text to paste: for each kernel its ladder entries, with their evidence as comments."""
    steps: dict[tuple[str, str], list[str]] = {}
    for found in all_found:
        steps.setdefault((found["kernel"], found["arch"]), []).extend(found["paste"])
    return "\n\n".join("\n".join([f"# {name} on {arch}", *lines]) for (name, arch), lines in steps.items() if lines)


def listing() -> str:
    """All kernels, the batch that each is timed with, and the possible values of its config's fields."""
    lines = []
    for kernel in tune_table.kernels().values():
        sequences, length = kernel.batch
        lines.append(f"{kernel.name} ({sequences} sequences of {length})")
        lines += [f"    {field}: {', '.join(str(value) for value in values)}" for field, values in kernel.grid.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
