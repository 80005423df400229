"""From result files to a page that a person reads in a minute: `python -m benchmarks.reporting.report [--check]`.

Reads every benchmarks/results/*/*.json that `fastbert bench` or `python -m benchmarks.inspection.roofline` wrote, and
writes benchmarks/REPORT.md, pictures beside the results (with matplotlib; `--no-plots` leaves them alone), and the
table between the markers in README.md. No number in either is typed by hand. A case that several files of a device
have is taken from a whole run rather than a --quick one, then from the newest. --check writes nothing and exits 1
where a file is out of date.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import anchors as report_anchors
from . import sentences as report_sentences
from . import texts as report_encode

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
SCHEMA, ROOFLINE = "fastbert-bench/1", "fastbert-roofline/1"

# suite -> its title; one that is not here follows under its own name
TITLES = {
    "encoder": "Whole models: ids to vectors",
    "training": "A training step",
    "latency": "One query alone",
    "kernels": "Operators",
    "memory": "Memory",
    "cold": "From a cold process to the first result",
    "scaling": "Scaling",
    "sentences": "Texts to vectors through sentence-transformers",
}


@dataclass(frozen=True)
class Case:
    """The rows of one piece of work, and the file they are from."""

    name: str
    suite: str
    rows: list[dict[str, Any]]
    result: dict[str, Any]

    @property
    def metric(self) -> str:
        return "peak_memory_bytes" if self.suite == "memory" else "median_s"

    @property
    def measured(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["status"] == "ok" and row[self.metric] is not None]

    @property
    def ours(self) -> dict[str, Any] | None:
        return self._best([row for row in self.measured if row["peer"] == "fastbert"])

    @property
    def peer(self) -> dict[str, Any] | None:
        """The best row of the others that keeps the budget: one with a tolerance of its own (int8) does other work."""
        others = [row for row in self.measured if row["peer"] not in ("fastbert", "floor")]
        return self._best([row for row in others if tolerance(row) is None])

    @property
    def floor(self) -> dict[str, Any] | None:
        return self._best([row for row in self.measured if row["peer"] == "floor"])

    @property
    def best_of_each(self) -> list[dict[str, Any]]:
        """The best row of each library, best first; int8 counts as one of its own."""
        kinds: dict[tuple, list[dict]] = {}
        for row in self.measured:
            kinds.setdefault((row["peer"], tolerance(row)), []).append(row)
        best = [self._best(rows) for rows in kinds.values()]
        return sorted(best, key=lambda row: row[self.metric])

    def _best(self, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
        return min(rows, key=lambda row: row[self.metric], default=None)


@dataclass
class Device:
    """Everything measured on one device."""

    slug: str
    results: list[dict[str, Any]] = field(default_factory=list)
    rooflines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.latest["device"]["name"]

    @property
    def folder(self) -> Path:
        return self.latest["path"].parent

    @property
    def latest(self) -> dict[str, Any]:
        return (self.results or self.rooflines)[-1]

    @property
    def cases(self) -> list[Case]:
        """By suite, in the order measured."""
        found: dict[tuple, Case] = {}
        for result in self.results:
            of_file: dict[tuple, Case] = {}
            for row in result["rows"]:
                names = ("suite", "workload", "model", "operator", "direction", "dtype")
                key = (*(row[name] for name in names), row["shape"].get("dropout_p", 0))
                of_file.setdefault(key, Case(case_name(row), row["suite"], [], result)).rows.append(row)
            # a case that the time or Ctrl-C left no row of hides none that another file has
            found |= {key: case for key, case in of_file.items() if any(r["status"] != "skipped" for r in case.rows)}
        order = list(TITLES)
        return sorted(found.values(), key=lambda c: order.index(c.suite) if c.suite in order else len(order))

    @property
    def curves(self) -> list[dict[str, Any]]:
        found = {}
        for result in self.results:
            found |= {tuple(c[name] for name in ("name", "row", "dtype", "model")): c for c in result["curves"]}
        return list(found.values())


def tolerance(row: dict[str, Any]) -> float | None:
    """What the row may err, where that is not the budget of its dtype."""
    return row.get("settings", {}).get("tolerance")


def case_name(row: dict[str, Any]) -> str:
    dropout = ", dropout 0.1" if row["shape"].get("dropout_p") else ""
    what = f"{row['operator'] or row['model']} {row['direction']}{dropout}"
    return f"{what}, {row['workload']} ({row['tokens']:,} tokens), {row['dtype']}"


def load(folder: Path = RESULTS) -> list[Device]:
    """A Device for each folder, its files in the order in which later ones replace earlier ones."""
    devices = []
    for path in sorted(folder.glob("*/*.json")):
        if path.name.startswith("encode-"):  # README's first table
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        schema = result.get("schema")
        if schema not in (SCHEMA, ROOFLINE):
            print(f"skipped: {path.relative_to(folder)} is of neither {SCHEMA} nor {ROOFLINE}", file=sys.stderr)
            continue
        if not devices or devices[-1].slug != path.parent.name:
            devices.append(Device(path.parent.name))
        (devices[-1].results if schema == SCHEMA else devices[-1].rooflines).append({**result, "path": path})
    for device in devices:
        device.results.sort(key=lambda r: ("--quick" not in r["command"].split(), r["created"]))
    return devices


# ---- cells -----------------------------------------------------------------------------------------------


def ratio(row: dict | None) -> str:
    if row is None or row["ratio_to_ours"] is None:
        return ""
    r = row["ratio_to_ours"]
    return f"{r['value']:.2f}x ({r['low']:.2f} - {r['high']:.2f})"


def duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:,.2f} s"
    return f"{1e3 * seconds:,.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:,.3g} µs"


def mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Columns that are empty in every row are left out."""
    head, rows = list(head), [list(row) for row in rows]
    kept = [n for n in range(len(head)) if n == 0 or any(row[n] for row in rows)]
    lines = [head, ["---"] * len(head), *rows]
    return [*("| " + " | ".join(line[n] for n in kept) + " |" for line in lines), ""]


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
    """In how many cases fastbert is ahead, level and behind, and where behind."""
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
    """One line a case: ours, the best of the others, the ratio."""
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
    """Slopes: what doubling x does to the time, as a power of two."""
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


# ---- the page, and README's table ------------------------------------------------------------------------


def page(devices: list[Device]) -> str:
    lines = [
        "# Benchmark report", "",
        "Made by `python -m benchmarks.reporting.report` from the files in `results/`; nothing here is typed by hand.",
        "Times are medians; a ratio above 1 means that fastbert is faster, with its bootstrap interval of 95%. Tokens",
        "are real tokens: padding never counts. Every result was checked before its time was taken (with dropout only",
        "for being finite). Rows with a tolerance of their own (int8) are shown, and are not among the others that",
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
    lines += table(("work", "figure", "hardware", "source", "ours"), report_anchors.rows(measured))
    return "\n".join(lines)


def readme_table(devices: list[Device]) -> str:
    """Whole models on texts of real lengths, one line a case and device."""
    rows = []
    for device in devices:
        for case in device.cases:
            ours, peer = case.ours, case.peer
            if case.suite in ("encoder", "training") and case.rows[0]["workload"].endswith("_natural") and ours:
                rows.append((
                    case.name, device.name, f"{ours['tokens_per_second']:,.0f}",
                    f"{peer['row']}: {peer['tokens_per_second']:,.0f}" if peer else "none", ratio(peer),
                ))  # fmt: skip
    head = ("whole models, real tokens/s", "machine", "fastbert", "best of the others", "their time / ours (95%)")
    return "\n".join([BEGIN, "", *(table(head, rows) if rows else ["not measured", ""]), END])


def with_table(readme: str, new: str) -> str:
    before, _, rest = readme.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"README.md has no {BEGIN} ... {END}")
    return before + new + after


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reporting.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file is out of date")
    parser.add_argument("--no-plots", action="store_true", help="leave the pictures as they are")
    args = parser.parse_args(argv)
    devices = load()
    if not args.check and not args.no_plots:
        from . import plots as report_plots

        for device in devices:
            report_plots.draw(device)
    readme = ROOT / "README.md"
    text = with_table(readme.read_text(encoding="utf-8"), readme_table(devices))
    text = report_sentences.with_table(text, ROOT / "benchmarks" / "results")
    wanted = {
        ROOT / "benchmarks" / "REPORT.md": page(devices),
        readme: report_encode.with_table(text, report_encode.block(ROOT / "benchmarks" / "results")),
    }
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
