"""Runs all checks and measurements on a GPU: `benchmarks/gpu_day.sh`. Each step is a process with a time limit. This
script itself does not need torch.

The run writes FOLDER/gpu_day.tar.gz with all results and logs, and FOLDER/summary.json, whose format is summary.json
beside this file. Both exist from the first second and are only replaced as a whole. So after a run that was ended by a
signal, a limit or the machine they have the state of a few seconds before.

Exit code: 0 if all steps succeeded, 1 if one failed or ran out of time, 128 + the signal that ended the run, 2 if this
interpreter has no torch or no Triton.
"""

from __future__ import annotations

import time

BEGAN = time.monotonic()

import argparse  # noqa: E402 (the clock runs from the start)
import ctypes  # noqa: E402
import importlib.util  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from benchmarks.gpu_day import plan as plans  # noqa: E402
from benchmarks.gpu_day import summary  # noqa: E402
from benchmarks.gpu_day.plan import Step  # noqa: E402

LIMIT = 480.0  # seconds of the whole run
LAST = 6.0  # seconds of the run that are reserved for ending steps and writing both files
GRACE = 3.0  # seconds between SIGTERM and SIGKILL for a step
EVERY = 4.0  # seconds between two updates of both files


class Cut(Exception):
    """A signal has ended the run."""


class Day:
    """One run: its folder, the two files that it writes, and the steps so far."""

    def __init__(self, out: Path, mode: str, rehearsal: bool, limit: float):
        self.out, self.ends = out, BEGAN + limit - LAST
        self.work = Path(tempfile.mkdtemp(prefix="gpu_day-"))
        self.source = _source_tree(self.work / "source")
        self.logs = self.work / "results" / "logs"
        self.logs.mkdir(parents=True)
        out.mkdir(parents=True, exist_ok=True)
        self.record = summary.Record(self.work / "results", out, mode, rehearsal, limit, BEGAN)
        self.written = 0.0

    def run(self, waves: list[list[Step]]) -> bool:
        """Runs all steps, those of a wave at the same time. Returns whether all succeeded. Raises Cut on a signal."""
        self.record.steps = [summary.state_of(step) for wave in waves for step in wave]
        self.record.write()
        for wave in waves:
            self._run_wave(wave)
        return all(state["status"] in ("ok", "skipped") for state in self.record.steps)

    def _run_wave(self, wave: list[Step]) -> None:
        running: dict[str, tuple[subprocess.Popen, float]] = {}
        try:
            for step in wave:
                state = self.record.state(step.name)
                reason = step.why_not()
                left = self.ends - time.monotonic()
                if reason is not None or left < step.least:
                    status = "skipped" if reason else "out of time"
                    state.update(status=status, reason=reason or f"{max(0.0, left):.0f} s were left")
                    continue
                limit = min(step.limit, left)
                state.update(status="running", began_s=time.monotonic() - BEGAN, limit_s=limit)
                running[step.name] = self._start(step, limit), time.monotonic() + limit
            self.record.write()
            while running:
                self._look(running)
                time.sleep(0.1)
        finally:
            for name, (process, _) in running.items():
                _end(process, 0.5)
                self._ended(name, "cut", "the run was ended")

    def _look(self, running: dict[str, tuple[subprocess.Popen, float]]) -> None:
        for name, (process, until) in list(running.items()):
            if process.poll() is not None:
                del running[name]
                ok = process.returncode == 0
                self._ended(name, "ok" if ok else "failed", None if ok else self._why(name, process.returncode))
            elif time.monotonic() > until:
                del running[name]
                _end(process, GRACE)
                self._ended(name, "out of time", "time limit reached; results up to then are kept")
        if time.monotonic() - self.written > EVERY:
            self.written = time.monotonic()
            self.record.write()

    def _start(self, step: Step, limit: float) -> subprocess.Popen:
        command = step.command(self.work / "results", limit, self.record)
        environment = {
            **os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(self.source), os.environ.get("PYTHONPATH")))),
            "TRITON_CACHE_DIR": str(self.work / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor"),
        }  # fmt: skip
        environment.pop("TRITON_INTERPRET", None)
        environment.update(step.environment(self.record))
        self.record.state(step.name)["command"] = " ".join(command)
        with open(self.logs / f"{step.name}.log", "wb") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=self.source,
                env=environment, start_new_session=True, preexec_fn=_end_with_parent,
            )  # fmt: skip

    def _why(self, name: str, code: int) -> str:
        lines = (self.logs / f"{name}.log").read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"exit code {code}: {last[:200]}"

    def _ended(self, name: str, status: str, reason: str | None) -> None:
        state = self.record.state(name)
        state.update(status=status, reason=reason, seconds=round(time.monotonic() - BEGAN - state["began_s"], 1))
        print(f"{name:14} {status:12} {state['seconds']:6.1f} s  {reason or ''}", flush=True)
        self.record.write()

    def close(self, cut: str | None) -> str:
        """Writes both files for the last time. Returns a summary of a few lines."""
        self.record.cut = cut
        self.record.finished = True
        self.record.write()
        lines = summary.table(self.record.summary())
        shutil.rmtree(self.work, ignore_errors=True)
        return lines


def _source_tree(folder: Path) -> Path:
    """The package as a folder of links, because fastbert.kernels is kernels/ in a checkout."""
    (folder / "fastbert").mkdir(parents=True)
    for path in (ROOT / "fastbert").iterdir():
        (folder / "fastbert" / path.name).symlink_to(path)
    (folder / "fastbert" / "kernels").symlink_to(ROOT / "kernels")
    for name in ("kernels", "benchmarks", "tests"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def _end_with_parent() -> None:
    """Runs in the step's process: the operating system will send it SIGTERM when this script ends for any reason."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _end(process: subprocess.Popen, grace: float) -> None:
    """Ends the step and all processes that it started: SIGTERM, so that it can write its results, then SIGKILL."""
    for number, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, 1.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def why_not() -> str | None:
    """The reason why this interpreter cannot run the steps; None if it can."""
    absent = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return f"{sys.executable} has no {' and no '.join(absent)}; PYTHON=/path/to/python chooses another interpreter"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu_day.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("gpu_day"), help="default: gpu_day")
    parser.add_argument("--tune", action="store_true", help="the second run: search for faster launches")
    parser.add_argument("--rehearse", action="store_true", help="every step on a CPU, with tiny shapes")
    parser.add_argument(
        "--seconds", type=float, default=LIMIT, help=f"time limit of the whole run (default: {LIMIT:g})"
    )
    args = parser.parse_args(argv)
    if (reason := why_not()) is not None:
        print(f"gpu_day: {reason}", file=sys.stderr)
        return 2

    def cut(number: int, frame: object) -> None:
        raise Cut(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, cut)
    mode = "tune" if args.tune else "day"
    day = Day(args.folder.resolve(), mode, args.rehearse, args.seconds)
    plan = plans.tune if args.tune else plans.day
    ended = None
    code = 1
    try:
        code = 0 if day.run(plan(sys.executable, args.rehearse)) else 1
    except Cut as signalled:
        ended = str(signalled)
        code = 128 + signal.Signals[ended]
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # no signal interrupts the last writing
        print(day.close(ended))
    return code


if __name__ == "__main__":
    sys.exit(main())
