"""Compares the time of a pass with the least time that its operators need.

For each operator of a workload: FLOPs and bytes (costs.py), the floor that follows from two ceilings (the fastest
matrix product, the fastest copy), its share of the whole floor, and the measured time above it. Times are measured
here, for each operator and for the whole model, or read from a result file. For a device that is not present there are
floors only. On a CPU an operator whose tensors stay in the cache may be faster than its floor, since the ceiling of
copies is that of memory.

  python -m benchmarks.inspection.roofline                                 this machine, with measured ceilings
  python -m benchmarks.inspection.roofline --workload large_512 --training --device h200
  python -m benchmarks.inspection.roofline --device day.json               floors at the ceilings in a result file
  python -m benchmarks.inspection.roofline --result day.json --plot day.png    with ceilings and times of that file
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastbert.encoding.encoder import resolve_device, resolve_dtype
from fastbert.storage import write_atomically
from fastbert.testing import WORKLOADS, Workload

from ..harness import costs, machine, timing, workloads

SCHEMA = "fastbert-roofline/1"

# Devices that --device accepts without being present: name, TFLOP/s of a large product by dtype, GB/s of a large copy.
GIVEN = {"h200": ("NVIDIA H200", {"bfloat16": 790.0, "float16": 790.0}, 4300.0)}

# operator in a result file -> our operator, if a pass has one of that shape
OPERATORS = {
    "attention": "attention", "add_layer_norm": "add_layer_norm", "feed_forward": "feed_forward",
    "embedding_layer_norm": "embedding", "pool": "pool",
}  # fmt: skip


# ---- the table -------------------------------------------------------------------------------------------


def operators(batches: Sequence[Workload], dtype: torch.dtype, training: bool, ceilings: dict) -> list[dict[str, Any]]:
    """A row for each operator and direction: FLOPs, bytes, floor. The floor of several products is their floors'
    sum."""
    tflops, gbs = _ceilings_of(ceilings, dtype)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for cost in costs.of_batches(batches, dtype, training):
        seconds, bound = cost.floor(tflops, gbs)
        part = {
            "part": cost.part, "flops": cost.work.flops, "bytes": cost.work.bytes,
            "floor_s": seconds, "bound_by": bound,
        }  # fmt: skip
        row = rows.setdefault(
            (cost.operator, cost.direction),
            {
                "operator": cost.operator, "direction": cost.direction, "count": cost.count, "flops": 0.0, "bytes": 0.0,
                "floor_s": 0.0, "parts": [], "seconds": None, "measured_s": None, "over_floor": None, "spread": None,
            },
        )  # fmt: skip
        for name in ("flops", "bytes", "floor_s"):
            row[name] += part[name]
        row["parts"].append(part)
    total = sum(row["floor_s"] for row in rows.values())
    for row in rows.values():
        row["share"] = row["floor_s"] / total
        row["bound_by"] = max(row["parts"], key=lambda part: part["floor_s"])["bound_by"]
    return list(rows.values())


def _ceilings_of(ceilings: dict, dtype: torch.dtype) -> tuple[float, float]:
    name = str(dtype).removeprefix("torch.")
    if name not in ceilings["gemm_tflops"]:
        known = ", ".join(ceilings["gemm_tflops"])
        raise ValueError(f"no ceiling of {name} products; there are {known}")
    return ceilings["gemm_tflops"][name], ceilings["copy_gbs"]


def add_times(rows: Iterable[dict], seconds: dict[tuple[str, str], list[float]]) -> None:
    """Adds an operator's time in a pass to its row: the time of a call, multiplied by the number of calls."""
    for row in rows:
        if times := seconds.get((row["operator"], row["direction"])):
            median = row["count"] * statistics.median(times)
            row |= {
                "seconds": times, "measured_s": median, "spread": timing.spread(times),
                "over_floor": median / row["floor_s"],
            }  # fmt: skip


def times_of(result: dict, name: str, dtype: str) -> tuple[Workload, dict[tuple[str, str], list[float]]]:
    """(the workload of a result file of `fastbert bench`, with the same number of tokens; times of its operators).

    The time of a backward pass is the median of "forward+backward" minus that of "forward". Operators that were
    measured on fewer tokens than most (the loss, on a CPU) have no time."""
    rows = [
        r for r in result["rows"]
        if r["suite"] == "kernels" and r["peer"] == "fastbert" and r["status"] == "ok" and r["workload"] == name
        and r["dtype"] == dtype and r["operator"] in OPERATORS and not r["shape"].get("dropout_p")
    ]  # fmt: skip
    if not rows:
        raise ValueError(f"the file has no {dtype} operators of {name}")
    tokens = Counter(r["tokens"] for r in rows).most_common(1)[0][0]
    found = {(r["operator"], r["direction"]): r["seconds"] for r in rows if r["tokens"] == tokens}
    times = {}
    for (operator, direction), seconds in found.items():
        ours = OPERATORS[operator]
        if direction == costs.FORWARD:
            times[ours, costs.FORWARD] = seconds
        elif forward := found.get((operator, costs.FORWARD)):
            times[ours, costs.BACKWARD] = [max(s - statistics.median(forward), 0.0) for s in seconds]
    return workloads.cut(WORKLOADS[name], tokens), times


# ---- words -----------------------------------------------------------------------------------------------


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    scale, unit = (1e6, "us") if abs(seconds) < 1e-3 else (1e3, "ms") if abs(seconds) < 1 else (1.0, "s")
    return f"{seconds * scale:,.3g} {unit}"


def _cells(row: dict, name: str, measured: bool = True) -> tuple[str, ...]:
    flops, moved = row["flops"], row["bytes"]
    return (
        name, f"{flops / 1e9:,.4g}" if flops else "-", f"{moved / 1e6:,.4g}",
        f"{flops / moved:,.3g}" if flops else "-", _time(row["floor_s"]), row["bound_by"],
        f"{row['share']:.1%}" if "share" in row else "", _time(row.get("measured_s")) if measured else "",
        f"{row['over_floor']:.2f}x" if row.get("over_floor") else "",
        _time(row["measured_s"] - row["floor_s"]) if row.get("measured_s") else "",
    )  # fmt: skip


HEAD = (
    "operator (calls)", "GFLOP", "MB", "FLOPs/byte", "floor", "bound by", "of the floor", "measured", "over",
    "above it",
)  # fmt: skip


def table(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """The lines of the table: the header first, the sum and the whole model last."""
    lines, rows = [HEAD], found["operators"]
    for row in rows:
        lines.append(_cells(row, f"{row['operator']} {row['direction']} ({row['count']})"))
        if len(row["parts"]) > 1:
            lines += [_cells(part, f"  {part['part']}", measured=False) for part in row["parts"]]
    lines.append(_cells(found["sum"], "all operators"))
    if found["whole"] is not None:
        lines.append(_cells(found["whole"], "the whole model"))
    return lines


def printed(lines: list[tuple[str, ...]]) -> str:
    widths = [max(len(line[n]) for line in lines) for n in range(len(HEAD))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in lines
    )


def headline(found: dict[str, Any]) -> str:
    shape, ceilings = found["shape"], found["ceilings"]
    pass_ = "training step, forward and backward" if found["training"] else "forward"
    batches = f" in {found['batches']} batches" if found["batches"] > 1 else ""
    return (
        f"{found['workload']}, {found['dtype']}, {pass_}: "
        f"{shape['tokens']:,} tokens of {shape['sequences']} texts{batches}\n"
        f"{found['device']['name']}: {ceilings['gemm_tflops'][found['dtype']]:,.4g} TFLOP/s, "
        f"{ceilings['copy_gbs']:,.4g} GB/s, {ceilings['source']}"
    )


# ---- the picture -----------------------------------------------------------------------------------------

FLOOR, ABOVE, MEMORY = "#0072b2", "#cccccc", "#e69f00"  # distinguishable with colour blindness and in grey


def plot(found: dict[str, Any], path: Path) -> None:
    """Draws floor and measured time of each operator on the left, and the roofline with operators on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = found["operators"]
    figure, (bars, roof) = plt.subplots(
        1, 2, figsize=(13, 1.6 + 0.36 * max(len(rows), 9)), width_ratios=(1.15, 1), layout="constrained"
    )
    _bars(bars, rows)
    _roof(roof, found)
    figure.suptitle(headline(found), fontsize=10)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _label(row: dict) -> str:
    return row["operator"] + {costs.FORWARD: "", costs.BACKWARD: ", backward"}.get(row["direction"], "")


def _bars(axis: Any, rows: list[dict]) -> None:
    names, floors = [_label(row) for row in rows], [1e3 * row["floor_s"] for row in rows]
    above = [1e3 * max((row["measured_s"] or 0) - row["floor_s"], 0.0) for row in rows]
    colours = [FLOOR if row["bound_by"] == "matrix" else MEMORY for row in rows]
    axis.barh(names, floors, color=colours)
    tops = axis.barh(names, above, left=floors, color=ABOVE)
    words = [
        f"{_time(row['measured_s'])}, {row['over_floor']:.2f}x" if row["measured_s"] else _time(row["floor_s"])
        for row in rows
    ]
    axis.bar_label(tops, words, padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.3 * max(f + a for f, a in zip(floors, above, strict=True)))
    axis.set_xlabel(
        "ms of a pass: floor (blue: matrix products, orange: memory) and measured above it (grey)", fontsize=8
    )
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _roof(axis: Any, found: dict[str, Any]) -> None:
    """Draws the roofline, and under it the operators with products at their FLOPs per byte."""
    import numpy as np
    from matplotlib import ticker

    peak, copy = found["ceilings"]["gemm_tflops"][found["dtype"]], found["ceilings"]["copy_gbs"] / 1e3
    points = [row for row in found["operators"] if row["flops"]]
    x = [row["flops"] / row["bytes"] for row in points]
    edge = peak / copy  # FLOPs per byte where the two ceilings meet
    span = np.geomspace(min([*x, edge]) / 4, max([*x, edge]) * 4, 200)
    axis.plot(span, np.minimum(peak, span * copy), color="black", lw=1.2)
    measured = [row for row in points if row["measured_s"]]
    marks = dict(zip(dict.fromkeys(row["operator"] for row in points), "osD^vPX*", strict=False))
    for row in measured or points:
        floor_only = row["measured_s"] is None
        y = row["flops"] / (row["floor_s"] if floor_only else row["measured_s"]) / 1e12
        filled = row["direction"] != costs.BACKWARD
        axis.scatter(
            row["flops"] / row["bytes"], y, marker=marks[row["operator"]], s=45, zorder=3, edgecolors=FLOOR,
            facecolors=FLOOR if filled else "white", label=_label(row),
        )  # fmt: skip
    axis.set(
        xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="TFLOP/s" if measured else "TFLOP/s at the floor"
    )
    heights = [point.get_offsets()[0][1] for point in axis.collections]
    axis.set_ylim(min(heights) / 2, 1.5 * peak)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter("{x:g}")
        side.set_minor_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else ""))
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3, which="both")
    axis.tick_params(labelsize=8, which="both")


# ---- command line ----------------------------------------------------------------------------------------


def analyse(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """The result: the arguments, the ceilings, and a row for each operator."""
    if args.workload not in WORKLOADS:
        raise ValueError(f"no workload {args.workload!r}; there are {', '.join(WORKLOADS)}")
    read = json.loads(args.result.read_text(encoding="utf-8")) if args.result else None
    if read is not None and read["schema"] == SCHEMA:  # a file of this module, to print or draw it again
        return read
    here = read is None and args.device in ("auto", "cpu", "cuda")
    times, whole = {}, None
    if here:
        device = resolve_device(args.device)
        dtype = resolve_dtype(args.dtype, device)
        facts, ceilings = (
            machine.describe(device),
            _ceilings(args, lambda: machine.ceilings(device, [dtype], args.quick)),
        )
        workload = workloads.fit(args.workload, device, workloads.model_name(args.workload), args.quick)
        if args.training and device.type == "cpu":  # a step takes as long as three passes
            workload = workloads.cut(workload, max(300, workload.tokens // 4))
    else:
        facts, ceilings = _elsewhere(args, read)
        dtype = getattr(torch, "bfloat16" if args.dtype == "auto" else args.dtype)
        workload = WORKLOADS[args.workload]
        if read is not None:
            workload, times = times_of(read, args.workload, str(dtype).removeprefix("torch."))

    from . import operator_times  # imported here, because it imports the model, which a table of floors does not need

    # a result file has the times of one batch
    batches = [workload] if read is not None else operator_times.batches_of(workload, facts["type"])
    rows = operators(batches, dtype, args.training, ceilings)
    if here:
        effort = timing.QUICK if args.quick else timing.GPU if device.type == "cuda" else timing.Effort(seconds=12.0)
        times = operator_times.measure(batches, device, dtype, args.training, effort)
        whole = _total(rows, times[operator_times.WHOLE])
    add_times(rows, times)
    return {
        "schema": SCHEMA, "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": machine.commit(), "command": command, "device": facts, "versions": machine.versions(),
        "ceilings": ceilings, "workload": args.workload, "shape": workloads.shape_of(workload), "batches": len(batches),
        "dtype": str(dtype).removeprefix("torch."), "training": args.training,
        "measured_in": str(args.result) if args.result else "this run" if here else None,
        "operators": rows, "sum": _total(rows), "whole": whole,
    }  # fmt: skip


def _total(rows: list[dict], seconds: list[float] | None = None) -> dict[str, Any]:
    """The sum of all rows, or the whole pass if `seconds` are given. No measured sum if a row has no time."""
    total = {name: sum(row[name] for row in rows) for name in ("flops", "bytes", "floor_s")}
    if seconds is not None:
        measured = statistics.median(seconds)
    else:
        measured = None if any(row["measured_s"] is None for row in rows) else sum(row["measured_s"] for row in rows)
    over = measured / total["floor_s"] if measured else None
    return total | {"bound_by": "", "seconds": seconds, "measured_s": measured, "over_floor": over}


def _ceilings(args: argparse.Namespace, otherwise: Any) -> dict[str, Any]:
    if args.ceilings is None:
        return {"source": "measured in the same run"} | otherwise()
    tflops, gbs = args.ceilings
    return {
        "gemm_tflops": dict.fromkeys(("bfloat16", "float16", "float32"), tflops), "copy_gbs": gbs,
        "source": "as given by --ceilings, not measured here",
    }  # fmt: skip


def _elsewhere(args: argparse.Namespace, read: dict | None) -> tuple[dict, dict]:
    """(device, ceilings) of a result file or of a device that is not present."""
    if read is None and args.device in GIVEN:
        name, gemm, copy = GIVEN[args.device]
        facts = {"type": "cuda", "name": name, "slug": args.device}
        given = {"gemm_tflops": gemm, "copy_gbs": copy, "source": "as given, not measured here"}
        return facts, given if args.ceilings is None else _ceilings(args, None)
    if read is None:
        path = Path(args.device)
        if not path.is_file():
            raise ValueError(f"--device is auto, cpu, cuda, {', '.join(GIVEN)} or a result file, got {args.device!r}")
        read = json.loads(path.read_text(encoding="utf-8"))
    source = args.result or args.device
    return read["device"], _ceilings(args, lambda: read["ceilings"] | {"source": f"from {Path(source).name}"})


def _pair(text: str) -> tuple[float, float]:
    try:
        tflops, gbs = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected TFLOPS,GBS such as 790,4300, got {text!r}") from None
    return tflops, gbs


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inspection.roofline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workload", default="base_natural", metavar="NAME", help="default: base_natural")
    parser.add_argument(
        "--device", default="auto", metavar="auto|cpu|cuda|h200|FILE",
        help="a device of this machine, or another one with known ceilings (default: cuda if there is a GPU)",
    )  # fmt: skip
    parser.add_argument("--dtype", default="auto", help="default: bfloat16 if the hardware multiplies it fast")
    parser.add_argument("--training", action="store_true", help="forward and backward of masked-word prediction")
    parser.add_argument("--ceilings", type=_pair, metavar="TFLOPS,GBS", help="use these instead of measured ones")
    parser.add_argument(
        "--result", type=Path, metavar="FILE", help="times and ceilings from a result file, or one of --json"
    )
    parser.add_argument("--quick", action="store_true", help="fewer tokens, fewer repeats")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON (- for standard output)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the plot (needs matplotlib)")
    args = parser.parse_args(argv)
    command = shlex.join(["python", "-m", "benchmarks.inspection.roofline", *(sys.argv[1:] if argv is None else argv)])
    try:
        found = analyse(args, command)
    except ValueError as error:
        parser.error(str(error))
    text = json.dumps(found, indent=1, allow_nan=False) + "\n"
    if args.json == Path("-"):
        print(text, end="")
        return 0
    if args.json is not None:
        with write_atomically(args.json) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(headline(found), printed(table(found)), sep="\n\n")
    if args.plot is not None:
        plot(found, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
