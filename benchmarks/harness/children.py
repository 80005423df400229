"""Rows that run in fresh processes: the time from their start to the first result, and their peak memory.

A run is a process of its own (child.py), in turns (A B A B); the first of each row is checked against the truth.
Files that a library loads (weights, an ONNX graph, OpenVINO's IR) are written beforehand.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert.models.bert import BertModel

from . import timing
from .case import Case, Interrupted, Row, _compare_rows, _empty_row, _prepare, _truth
from .jobs import Job
from .peer import OURS, ProcessPeer, need

ROOT = Path(__file__).parents[2]
PATIENCE = 900  # seconds after which a process is killed

Said = dict[str, dict[str, Any]]  # event -> the child's data about it, and "at", seconds since its start


class Files:
    """A model in the formats that libraries load, written once, on demand, into a folder that `close` deletes."""

    def __init__(self, job: Job):
        self.job = job
        self._written: dict[str, str] = {}

    @functools.cached_property
    def folder(self) -> Path:
        self._temporary = tempfile.TemporaryDirectory(prefix="fastbert-bench-")
        return Path(self._temporary.name)

    def close(self) -> None:
        if "folder" in vars(self):
            self._temporary.cleanup()
            del self.folder
        self._written.clear()

    def new_folder(self) -> str:
        return tempfile.mkdtemp(dir=self.folder)

    def once(self, name: str, write: Callable[[str], None]) -> str:
        """The folder of this name, which `write` fills when it is asked for the first time."""
        if name not in self._written:
            folder = self.folder / name
            folder.mkdir()
            write(str(folder))
            self._written[name] = str(folder)
        return self._written[name]

    def shared_folder(self, name: str) -> str:
        return self.once(name, lambda folder: None)

    @property
    def weights(self) -> str:
        """A folder with config.json and model.safetensors in float32, as models are published."""

        def write(folder: str) -> None:
            config, state = self.job.model
            model = BertModel(config, add_pooling_layer=False)
            model.load_state_dict(state)
            try:
                model.save_pretrained(folder)
            except ImportError:  # no safetensors: in torch's own format, which every library here reads too
                config.save_pretrained(folder)
                torch.save(model.state_dict(), f"{folder}/pytorch_model.bin")

        return self.once("weights", write)


class Launch:
    """A call runs the jobs in processes at the same time and returns the result of the first; `said` has all events.

    A job is the input of benchmarks/harness/child.py, and may have an "environment".
    """

    def __init__(
        self, files: Files, jobs: Callable[[], list[dict[str, Any]]], module: str = "benchmarks.harness.child"
    ):
        self.files, self.jobs, self.module = files, jobs, module
        self.said: list[Said] = []

    def __call__(self) -> list[Tensor]:
        jobs = self.jobs()
        folder = Path(self.files.new_folder())
        for n, job in enumerate(jobs):
            job["out"] = str(folder / f"{n}.npy")
        self.said.append(run(self.module, jobs)[0])
        return [torch.from_numpy(np.load(folder / "0.npy"))]


def run(module: str, jobs: list[dict[str, Any]]) -> list[Said]:
    """Runs `python -m module` for every job at the same time. If one fails, the others, which may wait for it, are
    killed.

    Raises: RuntimeError with the last line of the standard error of the first that fails.
    """
    started: list[subprocess.Popen] = []
    with ThreadPoolExecutor(len(jobs)) as pool:
        try:
            listening = []
            for job in jobs:
                log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with its process)
                began = time.perf_counter()
                environment = job.pop("environment", {})
                started.append(_start(module, environment, log))
                listening.append(pool.submit(_listen, started[-1], job, began, log))
            for heard in as_completed(listening):
                heard.result()
            return [heard.result() for heard in listening]
        finally:
            for child in started:
                child.kill()  # nothing where it has ended


def _start(module: str, more: dict[str, str], log: Any) -> subprocess.Popen:
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths, **more}
    environment.pop("TRITON_INTERPRET", None)  # set by tests; the interpreter is hundreds of times slower
    return subprocess.Popen(
        [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        cwd=ROOT, env=environment,
    )  # fmt: skip


def _listen(child: subprocess.Popen, job: dict[str, Any], began: float, log: Any) -> Said:
    said: Said = {}
    timer = threading.Timer(PATIENCE, child.kill)
    timer.start()
    with child, log:
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended: its output has the reason
                child.stdin.write(json.dumps(job) + "\n")
                child.stdin.close()
            for line in child.stdout:
                at = time.perf_counter() - began
                if line.startswith('{"event"'):  # a library may print too
                    facts = json.loads(line)
                    said[facts.pop("event")] = {"at": at, **facts}
            code = child.wait()
        finally:
            timer.cancel()
        if code < 0:
            late = time.perf_counter() - began >= PATIENCE
            raise RuntimeError(f"not done after {PATIENCE:g} s" if late else f"killed by signal {-code}")
        if code:
            log.seek(0)
            lines = [line.strip() for line in log if line.strip()]
            raise RuntimeError(lines[-1] if lines else f"exit code {code}")
    return said


@dataclass(frozen=True)
class ChildCase(Case):
    """A case whose rows make a `Launch`. `finish(row, events of each run)` writes a row's figures.

    A slow row, which compiles for a minute, has one run that counts.
    """

    files: Files | None = None
    finish: Callable[[dict[str, Any], list[Said]], None] | None = None
    runs: tuple[int, int] = (1, 3)  # in --quick, else; the checked one is one of them unless `warm`
    warm: bool = False

    def measured(
        self, device: torch.device, effort: timing.Effort, ceilings: dict[str, Any], *,
        peers: Callable[[Any], bool] = lambda row: True, quick: bool = False, stop: Callable[[], bool] = lambda: False,
    ) -> list[dict[str, Any]]:  # fmt: skip
        chosen = [row for row in self.rows if peers(row) and not (quick and row.slow)]
        results = {row.row: _empty_row(self, row) for row in chosen}
        launches: dict[str, Launch] = {}
        interrupted = False
        try:
            truth, plain = _truth(self, chosen)
            for row in chosen:
                if not stop():
                    _prepare(row, results[row.row], launches, truth, plain, device)
            for n in range(self.runs[not quick] - (not self.warm)):
                if stop() and n >= self.warm:
                    break
                for row in chosen:
                    if row.row in launches and not (row.slow and n >= self.warm):
                        launches[row.row]()
        except KeyboardInterrupt:
            interrupted = True
        finally:
            self.files.close()
        for name, launch in launches.items():
            if said := launch.said[self.warm :]:
                self.finish(results[name], said)
            else:
                results[name] |= {"status": "skipped"}
        for result in results.values():
            if result["status"] == "skipped":
                result["reason"] = "interrupted" if interrupted else "the time was up"
        _compare_rows(results, self)
        if interrupted:
            raise Interrupted(list(results.values()))
        return list(results.values())


def common(job: Job, work: str, engine: str) -> dict[str, Any]:
    """The part of a child's job that all have."""
    return {
        "work": work, "engine": engine, "device": job.device.type, "dtype": job.dtype_name,
        "threads": torch.get_num_threads(), "memory": True,
    }  # fmt: skip


# ---- encoders --------------------------------------------------------------------------------------------


def encoders(files: Files, suite: str, rows: Sequence[ProcessPeer], batch: int) -> Iterator[Row]:
    """Rows whose runs encode the job's ids in a process, in batches of `batch`."""
    job = files.job
    for peer in rows:
        if suite not in peer.suites or job.device.type not in peer.devices:
            continue
        if peer.dtypes and job.dtype_name not in peer.dtypes:
            continue

        def make(peer: ProcessPeer = peer) -> Launch:
            if peer.peer != OURS:
                need(peer.module.rpartition(".")[2])
            peer.files(files)  # whatever has to be written is written before the first process starts
            return Launch(files, functools.partial(told, peer))

        def told(peer: ProcessPeer) -> list[dict[str, Any]]:
            metered = {"memory": suite == "memory", "ids": job.rows, "batch": batch}
            more = peer.files(files)
            if suite == "cold" and peer.cache is not None:
                more |= peer.cache(files.new_folder() if peer.empty else files.shared_folder(peer.module))
            return [{**common(job, "encode", peer.module), **metered, **more}]

        many = "" if suite == "cold" or peer.peer == OURS else f", sorted, batches of {batch}"
        yield Row(peer.row + many, peer.peer, make, package=peer.package, slow=peer.slow, tolerance=peer.tolerance)
