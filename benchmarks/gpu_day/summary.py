"""Writes summary.json and gpu_day.tar.gz from the files that the steps of a run on a GPU have written so far."""

from __future__ import annotations

import datetime
import io
import json
import os
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any

SCHEMA = "fastbert-gpu-day/1"
ROOT = Path(__file__).resolve().parents[2]
LONGEST_LOG = 400_000  # bytes of a log that are kept, from its end
MOST_FAILED = 60  # failed cases of a verify in the summary; the archive has all
OF_A_ROW = (
    "suite", "operator", "direction", "workload", "dtype", "row", "peer", "status", "reason", "median_s", "tflops",
    "gbs", "share_of_ceiling", "bound_by", "over_floor", "tokens_per_second", "host_bound", "host_s", "device_s",
    "graph_s", "peak_memory_bytes",
)  # fmt: skip


def state_of(step: Any) -> dict[str, Any]:
    return {
        "name": step.name, "status": "waiting", "reason": None, "began_s": None, "seconds": None,
        "limit_s": step.limit, "command": None,
    }  # fmt: skip


class Record:
    """The run so far. `write` replaces both files, each in one step."""

    def __init__(self, results: Path, out: Path, mode: str, rehearsal: bool, limit: float, began: float):
        self.results, self.out, self.mode, self.rehearsal = results, out, mode, rehearsal
        self.limit, self.began = limit, began
        self.created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self.commit = _commit()
        self.steps: list[dict[str, Any]] = []
        self.cut: str | None = None
        self.finished = False

    def state(self, name: str) -> dict[str, Any]:
        return next(state for state in self.steps if state["name"] == name)

    def write(self) -> None:
        text = json.dumps(self.summary(), indent=1, allow_nan=False) + "\n"
        _replace(self.out / "summary.json", lambda path: path.write_text(text, encoding="utf-8"))
        _replace(self.out / "gpu_day.tar.gz", lambda path: self._archive(path, text))

    def _archive(self, path: Path, summary: str) -> None:
        with tarfile.open(path, "w:gz", compresslevel=4) as archive:
            (self.results / "summary.json").write_text(summary, encoding="utf-8")
            for file in sorted(self.results.rglob("*")):
                if file.is_file() and not file.name.endswith(".tmp"):
                    _add(archive, file, f"gpu_day/{file.relative_to(self.results)}")

    def summary(self) -> dict[str, Any]:
        """The summary, in the format of benchmarks/gpu_day/summary.json."""
        card = _read(self.results / "card.json") or {}
        return {
            "schema": SCHEMA, "mode": self.mode, "rehearsal": self.rehearsal, "created": self.created,
            "commit": self.commit, "limit_s": self.limit, "seconds": round(time.monotonic() - self.began, 1),
            "complete": self.finished and self.cut is None, "cut": self.cut,
            "card": {key: card.get(key) for key in ("device", "arch", "versions", "clocks", "assemblers", "ceilings")},
            "steps": self.steps, "precompile": self._precompile(),
            "verify": [self._verify(name) for name in ("verify", "verify-newer") if self._has(name)],
            "sanitizer": [self._sanitizer(name) for name in ("memcheck", "racecheck") if self._has(name)],
            "timing": self._timing(), "tuning": self._tuning(),
        }  # fmt: skip

    def _has(self, name: str) -> bool:
        return any(state["name"] == name and state["began_s"] is not None for state in self.steps)

    def _precompile(self) -> dict[str, Any]:
        lines = _lines(self.results / "precompile.jsonl")
        kernels = [line for line in lines if line["kernel"] is not None]
        ends = {line["use"]: line for line in lines if line["kernel"] is None}
        failed = [line for line in lines if line["error"]]
        return {
            "kernels": ends.get("all", {}).get("kernels"), "compiled": sum(not line["error"] for line in kernels),
            "left": ends.get("end", {}).get("left"), "bound_s": ends.get("all", {}).get("bound_s"),
            "cpu_s": round(sum(line.get("cpu_s", 0.0) for line in kernels), 1),
            "failed": [{key: line[key] for key in ("kernel", "use", "error")} for line in failed[:MOST_FAILED]],
        }  # fmt: skip

    def _verify(self, name: str) -> dict[str, Any]:
        cases = _lines(self.results / f"{name}.jsonl")
        failed = [case for case in cases if not case["passed"]]
        told = []
        for case in failed[:MOST_FAILED]:
            over = [check for check in case["checks"] if not check["passed"]]
            kept = {key: case[key] for key in ("op", "dtype", "case", "hidden", "lengths", "message")}
            told.append({**kept, "over_budget": over})
        return {"step": name, "cases": len(cases), "passed": len(cases) - len(failed), "failed": told}

    def _sanitizer(self, name: str) -> dict[str, Any]:
        log = self.results / "logs" / f"{name}.log"
        said = [line for line in _text(log).splitlines() if "SUMMARY" in line]
        return {"tool": name, "said": said[-1].strip("= ") if said else None, "cases": self._verify(name)["cases"]}

    def _timing(self) -> list[dict[str, Any]]:
        rows = []
        for state in self.steps:
            for row in (_read(self.results / f"{state['name']}.json") or {}).get("rows", ()):
                kept = {key: row.get(key) for key in OF_A_ROW}
                ratio = row["ratio_to_ours"]
                rows.append({"step": state["name"], **kept, "ratio_to_ours": ratio and ratio["value"]})
        return rows

    def _tuning(self) -> list[dict[str, Any]]:
        found = []
        for state in self.steps:
            for kernel in (_read(self.results / f"{state['name']}.json") or {}).get("kernels", ()):
                rows = kernel["rows"]
                facts = {key: kernel[key] for key in ("kernel", "arch", "dtype", "better", "paste", "complete")}
                found.append({**facts, "tried": len(rows), "wrong": sum(row["status"] == "wrong" for row in rows)})
        return found

    # ---- for later steps -------------------------------------------------------------------------------

    def other_assembler(self) -> str | None:
        """The path of Triton's second assembler, if that supports the GPU."""
        card = _read(self.results / "card.json") or {}
        return next((a["path"] for a in card.get("assemblers", ())[1:] if a["takes"]), None)

    def newer_is_better(self) -> bool:
        """Whether attention failed with the default assembler and passed all its cases with the other one."""
        of = {
            name: [case for case in _lines(self.results / f"{name}.jsonl") if case["op"].startswith("attention")]
            for name in ("verify", "verify-newer")
        }
        default, newer = of.values()
        return bool(newer) and all(c["passed"] for c in newer) and any(not c["passed"] for c in default)


def table(summary: dict[str, Any]) -> str:
    """A summary of the run in a few lines."""
    lines = [
        f"{s['name']:14} {s['status']:12} {s['seconds'] or 0:6.1f} s  {s['reason'] or ''}" for s in summary["steps"]
    ]
    made = summary["precompile"]
    if made["kernels"] is not None:
        lines.append(f"precompiled {made['compiled']} of {made['kernels']} kernels, {len(made['failed'])} failed")
    for verified in summary["verify"]:
        lines.append(f"{verified['step']}: {verified['passed']} of {verified['cases']} cases passed")
        lines += [
            f"  FAILED {c['op']} {c['dtype']} {c['case']}: {c['message'] or c['over_budget']}"
            for c in verified["failed"]
        ]
    timed = [row for row in summary["timing"] if row["status"] == "ok"]
    lines.append(f"{len(timed)} of {len(summary['timing'])} rows timed")
    return "\n".join([*lines, f"{summary['seconds']:.1f} s of {summary['limit_s']:g}"])


def _replace(path: Path, write: Any) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


def _add(archive: tarfile.TarFile, file: Path, name: str) -> None:
    """Adds the file's present content, even if a step is still writing it. Of a long log only the end is added."""
    data = file.read_bytes()
    if file.suffix == ".log":
        data = data[-LONGEST_LOG:]
    info = tarfile.TarInfo(name)
    info.size, info.mtime = len(data), int(file.stat().st_mtime)

    archive.addfile(info, io.BytesIO(data))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _lines(path: Path) -> list[dict[str, Any]]:
    """The records of all complete lines; a last line without a newline is ignored."""
    return [json.loads(line) for line in _text(path).split("\n")[:-1] if line.startswith("{")]


def _commit() -> str | None:
    try:
        command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
