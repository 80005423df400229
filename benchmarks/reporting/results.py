"""Reads the result files of benchmarks/results: devices, and the cases measured on each."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SCHEMA, ROOFLINE = "fastbert-bench/1", "fastbert-roofline/1"
NOT_REPORTED = "fastbert-finetuning/1", "fastbert-serving/1"  # quoted by the text of docs/training.md and serving.md

# suite -> its title; other suites follow under their own names
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
    """The rows of one case, and the file that they are from."""

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
        """Our row with which the others are compared: of several ways to use fastbert, the first."""
        rows = [row for row in self.measured if row["peer"] == "fastbert"]
        return self._best([row for row in rows if row["ratio_to_ours"] is None])

    @property
    def peer(self) -> dict[str, Any] | None:
        """The best row of other libraries, without rows that have a tolerance of their own (int8)."""
        others = [row for row in self.measured if row["peer"] not in ("fastbert", "floor")]
        return self._best([row for row in others if tolerance(row) is None])

    @property
    def floor(self) -> dict[str, Any] | None:
        return self._best([row for row in self.measured if row["peer"] == "floor"])

    @property
    def best_of_each(self) -> list[dict[str, Any]]:
        """The best row of each library, best first; int8 counts as a library of its own."""
        kinds: dict[tuple, list[dict]] = {}
        for row in self.measured:
            kinds.setdefault((row["peer"], tolerance(row)), []).append(row)
        best = [self._best(rows) for rows in kinds.values()]
        return sorted(best, key=lambda row: row[self.metric])

    def _best(self, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
        return min(rows, key=lambda row: row[self.metric], default=None)


@dataclass
class Device:
    """All results of one device."""

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
        """The cases by suite, in the order in which they were measured."""
        found: dict[tuple, Case] = {}
        for result in self.results:
            of_file: dict[tuple, Case] = {}
            for row in result["rows"]:
                names = ("suite", "workload", "model", "operator", "direction", "dtype")
                key = (*(row[name] for name in names), row["shape"].get("dropout_p", 0))
                of_file.setdefault(key, Case(case_name(row), row["suite"], [], result)).rows.append(row)
            # A case of which no row was measured, for lack of time, does not replace that of another file.
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
    """The allowed error of a row, if that is not the budget of its dtype."""
    return row.get("settings", {}).get("tolerance")


def case_name(row: dict[str, Any]) -> str:
    dropout = ", dropout 0.1" if row["shape"].get("dropout_p") else ""
    what = f"{row['operator'] or row['model']} {row['direction']}{dropout}"
    return f"{what}, {row['workload']} ({row['tokens']:,} tokens), {row['dtype']}"


def load(folder: Path = RESULTS) -> list[Device]:
    """A Device for each folder. Its files are in an order in which later ones replace earlier ones."""
    devices = []
    for path in sorted(folder.glob("*/*.json")):
        if path.name.startswith("encode-"):  # the table in README.md
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        schema = result.get("schema")
        if schema in NOT_REPORTED:
            continue
        if schema not in (SCHEMA, ROOFLINE):
            print(f"skipped: {path.relative_to(folder)} is of neither {SCHEMA} nor {ROOFLINE}", file=sys.stderr)
            continue
        if not devices or devices[-1].slug != path.parent.name:
            devices.append(Device(path.parent.name))
        (devices[-1].results if schema == SCHEMA else devices[-1].rooflines).append({**result, "path": path})
    for device in devices:
        device.results.sort(key=lambda r: ("--quick" not in r["command"].split(), r["created"]))
    return devices
