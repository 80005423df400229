"""The report's plots of a device, written beside its result files as picture-<what>.png. Needs matplotlib.

Blue is fastbert, orange the matrix products alone; every other library has the same colour and mark in all plots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import ticker

from .cells import duration, mebibytes
from .results import Case, Device, tolerance

OURS, FLOOR, OTHERS = "#0072b2", "#e69f00", "#bbbbbb"
# The colours are distinguishable with colour blindness, and in grey by their marks.
STYLES = {
    "fastbert": (OURS, "o"), "floor": (FLOOR, "|"), "transformers": ("#d55e00", "s"), "openvino": ("#009e73", "D"),
    "onnxruntime": ("#cc79a7", "^"), "torch": ("#555555", "v"), "torch.compile": ("#999999", "P"),
    "sentence-transformers": ("#56b4e9", "X"), "flash-attn": ("#8c564b", "<"), "xformers": ("#bcbd22", ">"),
    "transformer-engine": ("#9467bd", "p"), "liger-kernel": ("#7f0000", "h"),
}  # fmt: skip
MOST_BARS = 6  # most cases in the bar plot; the plot of ratios has all


def draw(device: Device) -> None:
    """Draws every plot for which there are results, and deletes older ones."""
    for path in device.folder.glob("picture-*.png"):
        path.unlink()
    of_suite: dict[str, list[Case]] = {}
    for case in device.cases:
        if case.ours:
            of_suite.setdefault(case.suite, []).append(case)
    for suite, cases in of_suite.items():
        if suite in ("memory", "cold"):
            _save(_parts(device, cases, *PARTS[suite]), device, suite)
        elif suite != "scaling":
            if suite == "encoder":
                _save(_bars(device, cases[:MOST_BARS]), device, f"{suite}-bars")
            _save(_ratios(device, cases), device, f"{suite}-ratios")
    curves = [curve for curve in device.curves if len(curve["x"]) > 1]
    if curves:
        _save(_scaling(device, curves), device, "scaling")
    if points := [case for case in of_suite.get("kernels", ()) if case.ours["flops"]]:
        _save(_roofline(device, points), device, "roofline")


def _save(figure: Any, device: Device, name: str) -> None:
    figure.savefig(device.folder / f"picture-{name}.png", dpi=100, metadata={"Software": None})
    plt.close(figure)


def _stacked(heights: Sequence[float], width: float = 10.0) -> tuple[Any, Sequence[Any]]:
    """A figure with panels below each other; heights are numbers of bars."""
    figure, axes = plt.subplots(
        len(heights), 1, figsize=(width, 0.27 * sum(heights) + 0.9), height_ratios=heights, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis in axes[:, 0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes[:, 0]


# ---- bars ------------------------------------------------------------------------------------------------


def _bars(device: Device, cases: Sequence[Case]) -> Any:
    """Draws tokens per second of each library's best row."""
    figure, axes = _stacked([len(case.best_of_each) + 2.0 for case in cases])
    for axis, case in zip(axes, cases, strict=True):
        rows = case.best_of_each[::-1]
        values = [row["tokens_per_second"] for row in rows]
        colours = [{"fastbert": OURS, "floor": FLOOR}.get(row["peer"], OTHERS) for row in rows]
        bars = axis.barh([row["row"] for row in rows], values, color=colours)
        axis.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3, fontsize=8)
        axis.set_title(case.name, fontsize=9, loc="left")
        axis.set_xlim(0, 1.12 * max(values))
        axis.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    axes[-1].set_xlabel("real tokens per second, the best row of each library (orange: the products alone)", fontsize=8)
    figure.suptitle(device.name, fontsize=10)
    return figure


def _parts(
    device: Device, cases: Sequence[Case], parts: Callable[[dict], dict[str, float]], write: Callable[[float], str],
    label: str,
) -> Any:  # fmt: skip
    """Draws every row as a bar of several parts in shades."""
    figure, axes = _stacked([len(case.measured) + 2.0 for case in cases])
    for axis, case in zip(axes, cases, strict=True):
        rows = case.measured[::-1]
        names, left = [row["row"] for row in rows], np.zeros(len(rows))
        for n, part in enumerate(parts(rows[0])):
            values = np.array([parts(row)[part] for row in rows])
            colours = [OURS if row["peer"] == "fastbert" else "#777777" for row in rows]
            axis.barh(names, values, left=left, color=colours, alpha=(0.3, 0.6, 1.0)[-len(parts(rows[0])) :][n],
                      edgecolor="white", label=part)  # fmt: skip
            left += values
        for at, (row, end) in enumerate(zip(rows, left, strict=True)):
            text = f"{write(end)} = " + " + ".join(write(value) for value in parts(row).values())
            axis.text(end + 0.01 * max(left), at, text, va="center", fontsize=8)
        axis.set_xlim(0, 1.45 * max(left))
        axis.set_xticks([])  # the numbers are beside the bars
        axis.set_title(case.name, fontsize=9, loc="left")
    axes[-1].set_xlabel(label, fontsize=8)
    figure.suptitle(device.name, fontsize=10)
    return figure


def _memory_parts(row: dict) -> dict[str, float]:
    return {"loaded": row["settings"]["loaded_bytes"], "work": row["peak_memory_bytes"]}


def _cold_parts(row: dict) -> dict[str, float]:
    return {name: row["settings"][name] for name in ("import_s", "load_s", "first_s")}


PARTS = {
    "memory": (_memory_parts, mebibytes, "peak of the process = libraries and model, loaded (light) + the work (dark)"),
    "cold": (
        _cold_parts,
        duration,
        "first result after = imports (light) + weights + the query, compiling included (dark)",
    ),
}


# ---- ratios ----------------------------------------------------------------------------------------------


def _ratios(device: Device, cases: Sequence[Case]) -> Any:
    """Draws for every case the time of each library's best row divided by ours, with the interval."""
    figure, (axis,) = _stacked([len(cases) + 5.0])
    seen: dict[str, Any] = {}
    for at, case in enumerate(cases):
        for row in case.best_of_each:
            r = row["ratio_to_ours"]
            if r is None:
                continue
            colour, mark = STYLES.get(row["peer"], (OTHERS, "*"))
            mark = "*" if tolerance(row) else mark
            axis.plot([r["low"], r["high"]], [at, at], color=colour, linewidth=1)
            drawn = axis.plot(r["value"], at, mark, color=colour, markersize=9 if mark == "|" else 6, markeredgewidth=2
                              if mark == "|" else 0.5)  # fmt: skip
            label = "matrix products alone" if row["peer"] == "floor" else row["peer"]
            seen.setdefault(label + (" int8" if tolerance(row) else ""), drawn[0])
    axis.axvline(1, color=OURS, linewidth=2)
    axis.set_yticks(range(len(cases)), [case.name for case in cases])
    axis.set_ylim(len(cases) - 0.4, -0.6)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    axis.grid(alpha=0.3)
    axis.set_xlabel("time / fastbert's (blue line): right of it fastbert is faster", fontsize=8)
    figure.legend(seen.values(), seen.keys(), loc="outside upper center", ncols=5, fontsize=8, title=device.name)
    return figure


# ---- curves ----------------------------------------------------------------------------------------------


def _scaling(device: Device, curves: Sequence[dict]) -> Any:
    kinds = list(dict.fromkeys(curve["name"] for curve in curves))
    figure, axes = plt.subplots(-(-len(kinds) // 2), 2, figsize=(11, 4.2 * -(-len(kinds) // 2)), squeeze=False,
                                layout="constrained")  # fmt: skip
    for axis in axes.flat[len(kinds) :]:
        axis.set_visible(False)
    for axis, kind in zip(axes.flat, kinds, strict=False):
        for curve in (curve for curve in curves if curve["name"] == kind):
            peer = next((p for p in STYLES if curve["row"].startswith(p)), "")
            colour, mark = STYLES.get(peer, (OTHERS, "*"))
            label = f"{curve['row']}: slope {curve['slope']:.2f}"
            axis.plot(curve["x"], curve["y_seconds"], color=colour, marker=mark, markersize=5, label=label)
            line = np.polyfit(np.log(curve["x"]), np.log(curve["y_seconds"]), 1)
            axis.plot(
                curve["x"], np.exp(np.polyval(line, np.log(curve["x"]))), color=colour, linewidth=0.8, linestyle="--"
            )
        axis.set(
            xscale="log", yscale="log", xlabel=curve["x_label"], title=f"{curve['model']}, {curve['dtype']}: {kind}"
        )
        x = sorted({x for curve in curves if curve["name"] == kind for x in curve["x"]})
        axis.set_xticks(x, [f"{v:,.3g}" if v < 100 else f"{v:,.0f}" for v in x])
        axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: duration(y)))
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())
        axis.title.set_fontsize(9)
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.suptitle(f"{device.name}: time of a pass against ... (dashed: the fitted power law)", fontsize=10)
    return figure


# ---- roofline --------------------------------------------------------------------------------------------


def _roofline(device: Device, cases: Sequence[Case]) -> Any:
    """Draws our operators below the ceilings of the same run."""
    dtype = cases[0].ours["dtype"]
    cases = [case for case in cases if case.ours["dtype"] == dtype]
    ceilings = cases[0].result["ceilings"]
    peak, copy = ceilings["gemm_tflops"][dtype], ceilings["copy_gbs"]
    figure, axis = plt.subplots(figsize=(10, 5.5), layout="constrained")
    x = np.geomspace(1, 10_000, 200)
    axis.plot(
        x, np.minimum(peak, x * copy / 1e3), color="black", label=f"ceiling: {copy:,.0f} GB/s, {peak:,.3g} TFLOP/s"
    )
    marks = dict(zip(dict.fromkeys(case.ours["operator"] for case in cases), "osD^vP", strict=False))
    for operator, mark in marks.items():
        for direction, face in (("forward", OURS), ("forward+backward", "none")):
            rows = [case.ours for case in cases]
            rows = [row for row in rows if (row["operator"], row["direction"]) == (operator, direction)]
            if rows:
                axis.scatter(
                    [row["flops"] / row["bytes"] for row in rows], [row["tflops"] for row in rows], marker=mark, s=45,
                    facecolors=face, edgecolors=OURS, label=f"{operator} {direction}",
                )  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="TFLOP/s",
             title=f"fastbert's operators, {dtype}, {device.name}")  # fmt: skip
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
        side.set_minor_formatter(ticker.NullFormatter())
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axis.grid(alpha=0.3, which="both")
    return figure
