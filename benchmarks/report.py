"""From result files to a page that a person reads in a minute: `python -m benchmarks.report [--check]`.

Reads every benchmarks/results/*/*.json that `fastbert bench` wrote, and writes benchmarks/REPORT.md, plots beside the
results (with matplotlib; `--no-plots` leaves them alone), and the table between the markers in README.md. No number in
either is typed by hand. --check writes nothing and exits 1 where a file is out of date.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
SCHEMA = "fastbert-bench/1"

# Published elsewhere, on other machines and software: for scale, never as if measured here.
ANCHORS = (
    ("BERT-large inference, SQuAD, 99.9%", "7,994 samples/s a GPU", "H200", "MLPerf Inference v4.1"),
    ("BERT-large pre-training, packed to 512", "996 sequences/s a GPU", "H200", "MLPerf Training v4.0"),
    ("attention forward, head_dim 64, at 512 / 1k / 4k", "333 / 392 / 476 TFLOP/s", "H100", "FlashAttention 3"),
    ("attention forward + backward, head_dim 64, at 512 / 1k / 16k", "215 / 254 / 296 TFLOP/s", "H100",
     "FlashAttention 2"),
)  # fmt: skip


def load(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The result files of this schema, by device and name."""
    found = []
    for path in sorted(folder.glob("*/*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result.get("schema") == SCHEMA:
            found.append({**result, "path": path})
        else:
            print(f"skipped: {path.relative_to(folder)} is not of schema {SCHEMA}", file=sys.stderr)
    return found


# ---- rows ------------------------------------------------------------------------------------------------


def groups(rows: Iterable[dict]) -> dict[str, list[dict]]:
    """case -> its rows, in the order measured."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        dropout = ", dropout 0.1" if row["shape"].get("dropout_p") else ""
        what = f"{row['operator'] or row['model']} {row['direction']}{dropout}"
        name = f"{what}, {row['workload']} ({row['tokens']:,} tokens), {row['dtype']}"
        found.setdefault(name, []).append(row)
    return found


def ours_of(rows: list[dict]) -> dict | None:
    timed = [row for row in rows if row["peer"] == "fastbert" and row["median_s"] is not None]
    return min(timed, key=lambda row: row["median_s"], default=None)


def best_peer(rows: list[dict]) -> dict | None:
    timed = [row for row in rows if row["peer"] not in ("fastbert", "floor") and row["median_s"] is not None]
    return min(timed, key=lambda row: row["median_s"], default=None)


def _ratio(row: dict | None) -> str:
    if row is None or row["ratio_to_ours"] is None:
        return ""
    r = row["ratio_to_ours"]
    return f"{r['value']:.2f}x ({r['low']:.2f} - {r['high']:.2f})"


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:,.3g} ms" if seconds < 1 else f"{seconds:,.2f} s"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    return [
        "| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |",
        *("| " + " | ".join(row) + " |" for row in rows), "",
    ]  # fmt: skip


# ---- the page --------------------------------------------------------------------------------------------


def machine_of(result: dict) -> str:
    device = result["device"]
    cores = f"{device['cores']} cores, {device['threads']} threads, " if device["type"] == "cpu" else ""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{device['name']}, {cores}{device['memory_bytes'] / 2**30:.0f} GiB; {versions}"


def summary(result: dict) -> list[str]:
    """One line a case: ours, the best of the others, the ratio."""
    lines = []
    for suite in ("encoder", "training", "latency", "kernels"):
        cases = groups(row for row in result["rows"] if row["suite"] == suite)
        rows = []
        for name, of_case in cases.items():
            ours, peer = ours_of(of_case), best_peer(of_case)
            floor = next((row for row in of_case if row["peer"] == "floor" and row["median_s"]), None)
            above = f"{ours['median_s'] / floor['median_s']:.2f}x" if ours and floor else ""
            rows.append((
                name, _time(ours["median_s"]) if ours else "not measured",
                f"{ours['tokens_per_second']:,.0f}" if ours else "",
                f"{peer['row']}: {_time(peer['median_s'])}" if peer else "none", _ratio(peer), above,
            ))  # fmt: skip
        if rows:
            head = (
                "case",
                "fastbert",
                "tokens/s",
                "best of the others",
                "their time / ours (95%)",
                "over the products alone",
            )
            lines += [f"### {suite}", "", *table(head, rows)]
    return lines


def detail(result: dict) -> list[str]:
    lines = []
    for name, rows in groups(result["rows"]).items():
        cells = []
        for row in rows:
            if row["median_s"] is None:
                cells.append(
                    (row["row"], row["version"] or "", f"**{row['status']}**: {row['reason']}", "", "", "", "", "")
                )
                continue
            gemm = result["ceilings"]["gemm_tflops"].get(row["dtype"])
            share = f"{row['tflops'] / gemm:.0%}" if row["tflops"] and gemm else ""
            cells.append((
                row["row"], row["version"] or "", f"{_time(row['median_s'])} ±{row['spread'] / 2:.0%}",
                f"{row['tokens_per_second']:,.0f}" if row["tokens_per_second"] else "",
                f"{row['tflops']:.3g} ({share})" if row["tflops"] else "", f"{row['gbs']:.3g}" if row["gbs"] else "",
                _ratio(row), f"{row['error']:.1e}" if row["error"] is not None else "",
            ))  # fmt: skip
        head = ("", "version", "median", "tokens/s", "TFLOP/s (of the ceiling)", "GB/s", "their time / ours", "error")
        lines += [f"#### {name}", "", *table(head, cells)]
    return lines


def page(results: list[dict], plots: dict[Path, list[Path]]) -> str:
    lines = [
        "# Benchmark report", "",
        "Made by `python -m benchmarks.report` from the files in `results/`; nothing here is typed by hand. Times are",
        "medians; a ratio above 1 means that fastbert is faster, with its bootstrap interval of 95%. Tokens are real",
        "tokens: padding never counts. Every result was checked before its time was taken (with dropout only for being",
        "finite).", "",
    ]  # fmt: skip
    for result in results:
        ceilings = result["ceilings"]
        products = ", ".join(f"{dtype} {value:,.3g} TFLOP/s" for dtype, value in ceilings["gemm_tflops"].items())
        lines += [
            f"## {result['device']['name']} ({result['path'].relative_to(RESULTS)})", "", machine_of(result), "",
            f"Commit {result['commit']}, {result['created'][:10]}, `{result['command']}`"
            + ("" if result["complete"] else "; **cut short: not every case was measured**") + ".",
            f"Ceilings, measured in the same run: products {products}; copy {ceilings['copy_gbs']:,.3g} GB/s.", "",
            *(f"![{path.stem}]({path.relative_to(ROOT / 'benchmarks')})\n" for path in plots.get(result["path"], [])),
            *summary(result),
            "<details><summary>Every row</summary>", "", *detail(result), "</details>", "",
        ]  # fmt: skip
    if not any(result["device"]["type"] == "cuda" for result in results):
        lines += ["## NVIDIA GPUs", "", "not measured", ""]
    lines += ["## Published elsewhere", "", "On other machines and by other people, for scale only.", ""]
    lines += table(("work", "figure", "hardware", "source"), ANCHORS)
    return "\n".join(lines)


def readme_table(results: list[dict]) -> str:
    """Whole models, one line a case and device."""
    rows = []
    for result in results:
        cases = groups(row for row in result["rows"] if row["suite"] in ("encoder", "training"))
        for name, of_case in cases.items():
            ours, peer = ours_of(of_case), best_peer(of_case)
            if ours is not None:
                rows.append((
                    name, result["device"]["name"], f"{ours['tokens_per_second']:,.0f}",
                    f"{peer['row']}: {peer['tokens_per_second']:,.0f}" if peer else "none", _ratio(peer),
                ))  # fmt: skip
    head = ("whole models, real tokens/s", "machine", "fastbert", "best of the others", "their time / ours (95%)")
    return "\n".join([BEGIN, "", *table(head, rows), END]) if rows else "\n".join([BEGIN, "", "not measured", "", END])


def with_table(readme: str, new: str) -> str:
    before, _, rest = readme.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"README.md has no {BEGIN} ... {END}")
    return before + new + after


# ---- pictures --------------------------------------------------------------------------------------------

OURS, OTHERS, FLOOR = "#0072b2", "#bbbbbb", "#e69f00"  # told apart by the colour-blind and in grey


def plot(result: dict) -> list[Path]:
    """Bars of whole models, and the roofline of the operators."""
    import matplotlib

    matplotlib.use("Agg")
    made = [_bars(result), _roofline(result)]
    return [path for path in made if path is not None]


def _bars(result: dict) -> Path | None:
    import matplotlib.pyplot as plt

    cases = groups(row for row in result["rows"] if row["suite"] == "encoder")
    cases = {name: [r for r in rows if r["median_s"]] for name, rows in cases.items()}
    cases = {name: rows for name, rows in cases.items() if ours_of(rows)}
    if not cases:
        return None
    heights = [len(rows) + 1.2 for rows in cases.values()]
    figure, axes = plt.subplots(
        len(cases),
        1,
        figsize=(9, 0.33 * sum(heights) + 0.8),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis, (name, rows) in zip(axes[:, 0], cases.items(), strict=True):
        rows = sorted(rows, key=lambda row: -row["median_s"])
        values = [row["tokens"] / row["median_s"] for row in rows]
        colours = [{"fastbert": OURS, "floor": FLOOR}.get(row["peer"], OTHERS) for row in rows]
        bars = axis.barh([row["row"] for row in rows], values, color=colours)
        axis.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3, fontsize=8)
        axis.set_title(name, fontsize=9, loc="left")
        axis.set_xlim(0, 1.15 * max(values))
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("real tokens per second (orange: the model's matrix products and nothing else)", fontsize=8)
    figure.suptitle(result["device"]["name"], fontsize=10)
    return _save(figure, result, "models")


def _roofline(result: dict) -> Path | None:
    import matplotlib.pyplot as plt
    import numpy as np

    rows = [ours for rows in groups(result["rows"]).values() if (ours := ours_of(rows)) and ours["operator"]]
    dtype = next(iter(result["ceilings"]["gemm_tflops"]))
    rows = [row for row in rows if row["flops"] and row["dtype"] == dtype]
    if not rows:
        return None
    peak, copy = result["ceilings"]["gemm_tflops"][dtype], result["ceilings"]["copy_gbs"]
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    x = np.geomspace(1, 10_000, 200)
    axis.plot(
        x, np.minimum(peak, x * copy / 1e3), color="black", label=f"ceiling: {copy:,.0f} GB/s, {peak:,.3g} TFLOP/s"
    )
    marks = dict(zip(sorted({row["operator"] for row in rows}), "osD^v", strict=False))
    for operator, mark in marks.items():
        for filled, direction in ((True, "forward"), (False, "forward+backward")):
            chosen = [r for r in rows if r["operator"] == operator and r["direction"] == direction]
            if not chosen:
                continue
            axis.scatter(
                [r["flops"] / r["bytes"] for r in chosen], [r["tflops"] for r in chosen], marker=mark,
                facecolors=OURS if filled else "none", edgecolors=OURS, label=f"{operator} {direction}",
            )  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="TFLOP/s",
             title=f"fastbert's operators, {dtype}, {result['device']['name']}")  # fmt: skip
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return _save(figure, result, "roofline")


def _save(figure: Any, result: dict, name: str) -> Path:
    import matplotlib.pyplot as plt

    path = result["path"].with_name(f"{result['path'].stem}-{name}.png")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return path


# ---- command line ----------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file is out of date")
    parser.add_argument("--no-plots", action="store_true", help="leave the pictures as they are")
    args = parser.parse_args(argv)
    results = load()
    if not args.check and not args.no_plots:
        for result in results:
            plot(result)
    plots = {result["path"]: sorted(result["path"].parent.glob(f"{result['path'].stem}-*.png")) for result in results}
    readme = ROOT / "README.md"
    wanted = {
        ROOT / "benchmarks" / "REPORT.md": page(results, plots),
        readme: with_table(readme.read_text(encoding="utf-8"), readme_table(results)),
    }
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if args.check:
            print(f"{path.relative_to(ROOT)} is out of date: run python -m benchmarks.report", file=sys.stderr)
        else:
            path.write_text(wanted[path], encoding="utf-8")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
