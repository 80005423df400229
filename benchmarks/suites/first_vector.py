"""Measures the time until the first vector: a new process that encodes one sentence, compared with a floor.

    python -m benchmarks.suites.first_vector [--repeats 15] [-- ARGUMENTS OF fastbert encode]

The floor is a process that imports torch and reads the weights with safetensors. Processes run in turns (A B C A B C)
with a warm file cache; the first turn does not count. A row's share of the floor is the median over turns. Wall time
is comparable only on an idle machine, processor time with OMP_NUM_THREADS=1 on others too. Bytecode is cached, as after
an installation, even if the environment forbids it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from fastbert.checkpoint import resolve
from fastbert.cli.main import build_parser
from fastbert.cli.options import default_model

READ = """\
import sys, torch
from safetensors.torch import load_file
{name: weight.clone() for name, weight in load_file(sys.argv[1]).items()}  # the file is mapped: the copy reads it"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.suites.first_vector", description="Time to the first vector."
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("encode", nargs="*", help="after --: more arguments of fastbert encode")
    args = parser.parse_args(argv)
    model = build_parser().parse_args(["encode", "-", *args.encode]).model or default_model()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "one.txt"
        source.write_text("A man is eating food.\n", encoding="utf-8")
        words = ["encode", str(source), "-o", str(Path(folder) / "one.npy"), "--quiet", *args.encode]
        rows = {
            "python -c 'pass'": ["-c", "pass"],
            "python -c 'import torch'": ["-c", "import torch"],
            "import torch, read the weights": ["-c", READ, str(resolve(model) / "model.safetensors")],
            "fastbert encode, one sentence": ["-m", "fastbert", *words],
        }
        times = {name: [] for name in rows}
        for _ in range(args.repeats + 1):
            for name, command in rows.items():
                times[name].append(_seconds([sys.executable, *command]))
    floors = times["import torch, read the weights"][1:]
    for name, seconds in times.items():
        print(f"{name:<32}", end="")
        for kind, i in (("wall", 0), ("processor", 1)):
            own = [turn[i] for turn in seconds[1:]]
            share = statistics.median(turn / floor[i] for turn, floor in zip(own, floors, strict=True))
            spread = f"{min(own):.2f} - {max(own):.2f}"
            print(f"  {kind} {statistics.median(own):.2f} s ({spread}), {share:.2f} of the floor", end="")
        print()


def _seconds(command: list[str]) -> tuple[float, float]:
    """(wall time, processor time) of a process."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started = time.perf_counter()
    process = os.posix_spawn(command[0], command, environment)
    _, status, used = os.wait4(process, 0)
    wall = time.perf_counter() - started
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return wall, used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
