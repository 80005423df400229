"""Makes the report from the result files: `python -m benchmarks.reporting.report [--check]`.

Reads every benchmarks/results/*/*.json of `fastbert bench` and `python -m benchmarks.inspection.roofline`. Writes
benchmarks/REPORT.md, plots beside the results (with matplotlib; not with `--no-plots`), and the tables between markers
in README.md, docs/benchmarks.md and docs/drop-in.md. No number in them is typed by hand. If several files of a device
have the same case, a complete run is preferred to a --quick one, then the newest. --check writes nothing and exits with
1 if a file is out of date.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import anchors, sentences, texts
from .cells import duration, mebibytes, ratio, table, with_block
from .results import ROOT, TITLES, Case, Device, load

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"

# ---- one device ------------------------------------------------------------------------------------------


def machine_of(result: dict) -> str:
    device = result["device"]
    cores = f"{device['cores']} cores, {device['threads']} threads, " if device["type"] == "cpu" else ""
    driver = f", driver {device['driver']}" if device["driver"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{device['name']}, {cores}{device['memory_bytes'] / 2**30:.0f} GiB{driver}; {versions}"


def files(device: Device) -> list[str]:
    rows = []
    for result in device.results:
        ceilings = result["ceilings"]
        products = ", ".join(f"{dtype} {value:,.3g}" for dtype, value in ceilings["gemm_tflops"].items())
        rows.append((
            f"[{result['path'].name}]({result['path'].relative_to(ROOT / 'benchmarks')})", f"`{result['command']}`",
            result["created"][:10], result["commit"] or "unknown",
            f"{len(result['rows'])}" + ("" if result["complete"] else ", **cut short: not every case was measured**"),
            products, f"{ceilings['copy_gbs']:,.3g}",
        ))  # fmt: skip
    head = ("file", "command", "measured", "commit", "rows", "ceiling: products, TFLOP/s", "copy, GB/s")
    return table(head, rows)


def standing(cases: list[Case]) -> list[str]:
    """The number of cases in which fastbert is faster, equal and slower, and a table of those where it is slower."""
    timed = [case for case in cases if case.ours and case.peer and case.suite != "memory"]
    compared = [(case, r) for case in timed if (r := case.peer["ratio_to_ours"])]
    ahead = sum(r["low"] > 1 for _, r in compared)
    behind = [(case, r) for case, r in compared if r["high"] < 1]
    level = len(compared) - ahead - len(behind)
    lines = [
        f"Of {len(compared)} timed cases with another library's row, fastbert is ahead of the best of them in {ahead}, "
        f"level (the interval holds 1) in {level}, and behind in {len(behind)}"
        + (":" if behind else "."), "",
    ]  # fmt: skip
    if behind:
        behind.sort(key=lambda found: found[1]["value"])
        lines += table(
            ("behind", "in", "to", "their time / ours (95%)"),
            ((case.name, case.suite, case.peer["row"], ratio(case.peer)) for case, _ in behind),
        )
    return lines


def summary(cases: list[Case]) -> list[str]:
    """A line for each case: ours, the best of the others, the ratio."""
    rows = []
    for case in cases:
        ours, peer, floor = case.ours, case.peer, case.floor
        rows.append((
            case.name, duration(ours["median_s"]) if ours else "not measured",
            f"{ours['tokens_per_second']:,.0f}" if ours and ours["tokens_per_second"] else "",
            f"{ours['share_of_ceiling']:.0%} of {ours['bound_by']}" if ours and ours["share_of_ceiling"] else "",
            f"{peer['row']}: {duration(peer['median_s'])}" if peer else "none", ratio(peer),
            f"{ours['median_s'] / floor['median_s']:.2f}x" if ours and floor else "",
        ))  # fmt: skip
    head = ("case", "fastbert", "tokens/s", "of the ceiling", "best of the others", "their time / ours (95%)",
            "over the products alone")  # fmt: skip
    return table(head, rows)


def memory(cases: list[Case]) -> list[str]:
    lines = ["Each row is a fresh process. Above the loaded model: what the work itself needs.", ""]
    for case in cases:
        ours = case.ours
        rows = []
        for row in case.rows:
            if row not in case.measured:
                rows.append((row["row"], f"**{row['status']}**: {row['reason']}", "", ""))
                continue
            above = row["peak_memory_bytes"]
            relative = f"{above / max(ours['peak_memory_bytes'], 1):.2f}x" if ours and row is not ours else ""
            rows.append((row["row"], mebibytes(above), mebibytes(row["settings"]["process_bytes"]), relative))
        head = ("", "peak above the loaded model", "peak of the process", "theirs / ours, above")
        lines += [f"#### {case.name}", "", *table(head, rows)]
    return lines


def cold(cases: list[Case]) -> list[str]:
    lines = []
    for case in cases:
        rows = []
        for row in case.rows:
            if row not in case.measured:
                rows.append((row["row"], f"**{row['status']}**: {row['reason']}", "", "", "", ""))
                continue
            parts = (duration(row["settings"][name]) for name in ("import_s", "load_s", "first_s"))
            rows.append((row["row"], duration(row["median_s"]), *parts, ratio(row)))
        head = ("", "first result after", "imports", "weights", "the query, compiling included", "their time / ours")
        lines += [f"#### {case.name}", "", *table(head, rows)]
    return lines


def scaling(curves: list[dict]) -> list[str]:
    """The slopes of the curves: doubling x multiplies the time by two to the power of the slope."""
    rows = []
    for curve in curves:
        slope = "one point" if curve["slope"] is None else f"{curve['slope']:.2f}"
        if curve.get("slope_low") is not None:
            slope += f" ({curve['slope_low']:.2f} - {curve['slope_high']:.2f})"
        points = f"{len(curve['x'])}, {curve['x'][0]:,.4g} to {curve['x'][-1]:,.4g}"
        ends = f"{duration(curve['y_seconds'][0])} to {duration(curve['y_seconds'][-1])}"
        cut = curve.get("cut") or ("" if curve["complete"] else "points are missing")
        rows.append((f"{curve['name']}, {curve['model']}, {curve['dtype']}", curve["row"], points, ends, slope, cut))
    head = ("time against", "row", "points", "time", "fitted slope (95%)", "cut short")
    return [
        "The slope is that of log time over log x: 1 is linear, 2 quadratic, 0 free.", "", *table(head, rows),
    ]  # fmt: skip


def rooflines(device: Device) -> list[str]:
    lines = []
    for found in device.rooflines:
        whole = found["whole"] or found["sum"]
        name = f"{found['workload']}, {found['dtype']}, " + ("a training step" if found["training"] else "forward")
        lines += [
            f"#### {name} ({found['shape']['tokens']:,} tokens; commit {found['commit']}, {found['created'][:10]})",
            "",
        ]
        if whole["measured_s"]:
            above = sorted(
                (row for row in found["operators"] if row["measured_s"]),
                key=lambda row: row["floor_s"] - row["measured_s"],
            )
            most = ", ".join(f"{row['operator']} {row['direction']} {duration(row['measured_s'] - row['floor_s'])}"
                             for row in above[:3])  # fmt: skip
            lines += [
                f"{duration(whole['measured_s'])}, {whole['over_floor']:.2f}x the floor of its operators. Most above "
                f"their floors: {most}.", "",
            ]  # fmt: skip
        lines += [f"{picture}\n" for picture in pictures(found["path"].parent, found["path"].stem + ".png")]
    return lines


def detail(cases: list[Case]) -> list[str]:
    lines = []
    for case in cases:
        gemm = case.result["ceilings"]["gemm_tflops"].get(case.rows[0]["dtype"])
        cells = []
        for row in case.rows:
            if row["median_s"] is None:
                cells.append((row["row"], row["version"] or "", f"**{row['status']}**: {row['reason']}", *[""] * 7))
                continue
            share = f" ({row['tflops'] / gemm:.0%})" if row["tflops"] and gemm else ""
            peak, joules = row["peak_memory_bytes"], row["energy_j"]
            cells.append((
                row["row"], row["version"] or "", f"{duration(row['median_s'])} ±{row['spread'] / 2:.0%}",
                f"{row['tokens_per_second']:,.0f}" if row["tokens_per_second"] else "",
                f"{row['tflops']:.3g}{share}" if row["tflops"] else "", f"{row['gbs']:.3g}" if row["gbs"] else "",
                mebibytes(peak) if peak is not None else "",
                f"{1e3 * joules / row['tokens']:.3g}" if joules is not None and row["tokens"] else "",
                ratio(row), f"{row['error']:.1e}" if row["error"] is not None else "",
            ))  # fmt: skip
        head = ("", "version", "median", "tokens/s", "TFLOP/s (of the ceiling)", "GB/s", "peak memory", "mJ a token",
                "their time / ours", "error")  # fmt: skip
        lines += [f"#### {case.name}", "", *table(head, cells)]
    return lines


def pictures(folder: Path, pattern: str) -> list[str]:
    return [f"![{path.stem}]({path.relative_to(ROOT / 'benchmarks')})" for path in sorted(folder.glob(pattern))]


def section(device: Device) -> list[str]:
    cases = device.cases
    lines = [f"## {device.name} (results/{device.slug})", "", machine_of(device.latest), "", *files(device)]
    lines += standing(cases)
    for suite in dict.fromkeys(case.suite for case in cases):
        of_suite = [case for case in cases if case.suite == suite]
        lines += [f"### {TITLES.get(suite, suite.capitalize())}", ""]
        lines += [f"{picture}\n" for picture in pictures(device.folder, f"picture-{suite}*.png")]
        if suite == "scaling":
            lines += scaling(device.curves)
        else:
            lines += {"memory": memory, "cold": cold}.get(suite, summary)(of_suite)
    if device.rooflines or pictures(device.folder, "picture-roofline.png"):
        lines += ["### Roofline: where the time goes above the floor", ""]
        lines += [f"{picture}\n" for picture in pictures(device.folder, "picture-roofline.png")]
        lines += rooflines(device)
    timed = [case for case in cases if case.suite not in ("memory", "cold")]
    return [*lines, "<details><summary>Every row</summary>", "", *detail(timed), "</details>", ""]


# ---- the page, and the tables of other pages -------------------------------------------------------------


def page(devices: list[Device]) -> str:
    lines = [
        "# Benchmark report", "",
        "Made by `python -m benchmarks.reporting.report` from the files in `results/`; nothing here is typed by hand.",
        "Times are medians; a ratio above 1 means that fastbert is faster, with its bootstrap interval of 95%. Tokens",
        "are real tokens: padding never counts. Every result was checked before its time was taken (with dropout only",
        "for being finite): its error is at most twice that of plain torch in the same dtype, another library's at",
        "most four times. Rows with a tolerance of their own (int8) are shown, and are not among the others that",
        "count.", "",
    ]  # fmt: skip
    for device in devices:
        lines += section(device)
    gpus = [device for device in devices if device.latest["device"]["type"] == "cuda"]
    if not gpus:
        lines += ["## NVIDIA GPUs", "", "not measured", ""]
    lines += [
        "## Published elsewhere", "",
        "On other machines, by other people and their software, for scale only. Ours is what a result file of a GPU",
        "says of work like it, with its share of theirs.", "",
    ]  # fmt: skip
    measured = [
        (gpu.name, row) for gpu in gpus for case in gpu.cases for row in case.measured if row["peer"] == "fastbert"
    ]
    lines += table(("work", "figure", "hardware", "source", "ours"), anchors.rows(measured))
    return "\n".join(lines)


def whole_models(devices: list[Device]) -> str:
    """The block of docs/benchmarks.md: whole models on texts of real lengths, a line for each case and device."""
    rows = []
    for device in devices:
        for case in device.cases:
            ours, peer = case.ours, case.peer
            if case.suite in ("encoder", "training") and case.rows[0]["workload"].endswith("_natural") and ours:
                rows.append((
                    case.name, device.slug, f"{ours['tokens_per_second']:,.0f}",
                    f"{peer['row']}: {peer['tokens_per_second']:,.0f}" if peer else "none", ratio(peer),
                ))  # fmt: skip
    head = ("whole models, real tokens/s", "machine", "fastbert", "best of the others", "their time / ours (95%)")
    return "\n".join([BEGIN, "", *(table(head, rows) if rows else ["not measured", ""]), END])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reporting.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is out of date")
    parser.add_argument("--no-plots", action="store_true", help="do not draw plots")
    args = parser.parse_args(argv)
    devices = load()
    if not args.check and not args.no_plots:
        from . import plots

        for device in devices:
            plots.draw(device)
    results = ROOT / "benchmarks" / "results"
    blocks = {
        ROOT / "README.md": texts.block(results),
        ROOT / "docs/benchmarks.md": whole_models(devices),
        ROOT / "docs/drop-in.md": sentences.block(results),
    }
    wanted = {path: with_block(path.read_text(encoding="utf-8"), block) for path, block in blocks.items()}
    wanted[ROOT / "benchmarks" / "REPORT.md"] = page(devices)
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if args.check:
            print(
                f"{path.relative_to(ROOT)} is out of date: run python -m benchmarks.reporting.report", file=sys.stderr
            )
        else:
            path.write_text(wanted[path], encoding="utf-8")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
