"""A corpus by as many plain processes, actors of Ray and partitions of Spark: where the time goes.

    python -m benchmarks.suites.corpus_engines --texts sst2/train.tsv --rows 40000 --turns 2 --model FOLDER

A party runs in a process of its own, with one thread in each worker; parties take turns. Of each run:

    engine_seconds     Ray's or Spark's own start
    whole_seconds      of `encode`: planning, start of the workers, loading of the model, all parts
    steady_seconds     from the moment the first worker has its model until the last part counts; the times of the files
                       in the manifest tell both
    *_processor        processor seconds of all processes of the party: in all, and during the steady time. Where other
                       work shares the machine, rows a processor second compare better than rows a second.

Ratios are those of the medians: plain processes / the engine.

With --together the parties run at the same time, and rows a second are those of the time in which all of them have
their models and parts left to make. This compares them where other work leaves now more, now less of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from .corpus import PLAIN, small_model, texts_of, write_table

MARK = "FASTBERT_BENCHMARK_PARTY"
MEASURES = ("engine_seconds", "whole_seconds", "steady_seconds", "whole_processor", "steady_processor")


# ---- a party, in its process -------------------------------------------------------------------------------


def start_plain(workers: int) -> Callable[..., Any]:
    from fastbert.corpus.pool import CorpusPool
    from fastbert.corpus.run import expect_done
    from fastbert.corpus.units import largest_first, plan

    def encode(inputs: list[str], job: Any) -> None:
        planned, units = plan(inputs, job)
        with CorpusPool(workers, planned) as pool:
            expect_done(pool.encode(largest_first(units, units)))

    return encode


def start_ray(workers: int) -> Callable[..., Any]:
    import ray

    from fastbert.engines.ray import encode

    # Ray starts its workers with a niceness of 15, so that beside other work they get almost no time.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  that is its name
    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
    return lambda inputs, job: encode(inputs, job, actors=workers)


def start_spark(workers: int) -> Callable[..., Any]:
    from pyspark.sql import SparkSession

    from fastbert.engines.spark import encode

    os.environ["PYSPARK_PYTHON"] = sys.executable
    session = SparkSession.builder.master(f"local[{workers}]").config("spark.ui.enabled", "false").getOrCreate()
    return lambda inputs, job: encode(session, inputs, job, partitions=workers)


PARTIES = {"processes": start_plain, "Ray": start_ray, "Spark": start_spark}


def run_party(name: str, workers: int, table: Path, model: str, out: Path, part_rows: int) -> None:
    """Prints the seconds of the engine's start and of the whole run."""
    from fastbert.corpus.job import Job

    started = time.time()
    encode = PARTIES[name](workers)
    ready = time.time()
    encode([str(table)], Job(str(out), {"id_or_path": model, **PLAIN}, keep=("number",), part_rows=part_rows))
    print(json.dumps({"engine_seconds": ready - started, "whole_seconds": time.time() - ready}), flush=True)


# ---- measuring it ------------------------------------------------------------------------------------------


class ProcessorTime:
    """The processor seconds of all processes with MARK=mark in their environment, however they were started. What a
    process uses after the last look at it is missed, at most `STEP` seconds."""

    STEP = 0.2

    def __init__(self, mark: str):
        self.mark = f"{MARK}={mark}".encode()
        self.used: dict[str, float] = {}  # of each process, by its number and start
        self.sums: list[tuple[float, float]] = []
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> ProcessorTime:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.thread.join()

    def until(self, moment: float) -> float:
        """Seconds used until then."""
        return max((used for at, used in self.sums if at <= moment), default=0.0)

    def _watch(self) -> None:
        tick = os.sysconf("SC_CLK_TCK")
        while not self.ended.wait(self.STEP):
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    if self.mark in (folder / "environ").read_bytes().split(b"\0"):
                        fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
                        self.used[f"{folder.name} {fields[19]}"] = (int(fields[11]) + int(fields[12])) / tick
                except OSError:  # the process has ended
                    continue
            self.sums.append((time.time(), sum(self.used.values())))


def measured(out: Path, *words: object) -> dict[str, float]:
    """One run of a party, whose processes are known by the folder that they write. words: of `main`."""
    command = [sys.executable, "-m", "benchmarks.suites.corpus_engines", "--out", str(out), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", MARK: str(out)}
    with ProcessorTime(str(out)) as used:
        told = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = json.loads(told.splitlines()[-1])
    first, *_, last = moments_of(out)
    return found | {
        "steady_seconds": last - first,
        "whole_processor": used.until(time.time()),
        "steady_processor": used.until(last) - used.until(first),
    }


def moments_of(out: Path) -> list[float]:
    """When the first worker had its model, and when each part counted, in order."""
    receipts = sorted(receipt.stat().st_mtime for receipt in (out / "manifest" / "parts").iterdir())
    return [(out / "manifest" / "corpus.json").stat().st_mtime, *receipts]


def rates_of(outs: dict[str, Path], part_rows: int) -> dict[str, float]:
    """Rows a second of each party while all of them worked."""
    moments = {name: moments_of(out) for name, out in outs.items()}
    first, last = max(of[0] for of in moments.values()), min(of[-1] for of in moments.values())
    if last <= first:
        raise RuntimeError("one party ended before another began: take more --rows")
    parts = {name: np.interp([first, last], of, range(len(of))) for name, of in moments.items()}
    return {name: part_rows * float(end - start) / (last - first) for name, (start, end) in parts.items()}


def rows_of(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    table, model = write_table(folder / "a.parquet", texts_of(args.texts), args.rows), args.model
    model, part_rows = model or str(small_model(folder / "model")), args.rows // args.parts
    options = ["--workers", args.workers, "--part-rows", part_rows, "--table", table, "--model", model]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in args.parties}
    for turn in range(args.turns):
        outs = {name: folder / f"out-{turn}-{number}" for number, name in enumerate(args.parties)}
        with ThreadPoolExecutor(len(outs) if args.together else 1) as pool:
            for name, found in pool.map(lambda of: (of[0], measured(of[1], "--party", of[0], *options)), outs.items()):
                runs[name].append(found)
                yield {"party": name, "turn": turn, **found}
        if args.together:
            rates = rates_of(outs, part_rows)
            yield {"turn": turn, **{f"rows a second of {name}": rate for name, rate in rates.items()}}
    medians = {
        name: {measure: statistics.median(run[measure] for run in of_party) for measure in MEASURES}
        for name, of_party in runs.items()
    }
    first = medians[args.parties[0]]
    for name in args.parties[1:]:
        ratios = {measure: first[measure] / medians[name][measure] for measure in MEASURES[1:]}
        yield {"party": name, "against": args.parties[0], "workers": args.workers, "rows": args.rows, **ratios}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, nargs="+")
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--parts", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--together", action="store_true", help="run the parties at the same time")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--model", help="a folder (default: a BERT of one layer)")
    parser.add_argument("--parties", nargs="+", choices=PARTIES, default=list(PARTIES))
    parser.add_argument("--folder", type=Path, help="for temporary files")
    parser.add_argument("--party", choices=PARTIES, help=argparse.SUPPRESS)
    parser.add_argument("--table", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--part-rows", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.party:
        run_party(args.party, args.workers, args.table, args.model, args.out, args.part_rows)
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for row in rows_of(args, Path(folder)):
            print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
