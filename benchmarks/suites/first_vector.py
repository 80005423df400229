"""Measures the time until the first vector: a new process that encodes one sentence, compared with a floor.

    python -m benchmarks.suites.first_vector [--repeats 7] [-- ARGUMENTS OF fastbert encode]

The floor is a process that imports torch and reads the weights with safetensors. Processes run in turns (A B C A B C)
with a warm file cache; the first turn does not count.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
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
    parser.add_argument("--repeats", type=int, default=7)
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
                started = time.perf_counter()
                subprocess.run([sys.executable, *command], check=True)
                times[name].append(time.perf_counter() - started)
    floor = statistics.median(times["import torch, read the weights"][1:])
    for name, seconds in times.items():
        middle = statistics.median(seconds[1:])
        spread = f"{min(seconds[1:]):.2f} - {max(seconds[1:]):.2f}"
        print(f"{name:<32} {middle:6.2f} s  ({spread})  {middle / floor:5.2f} of the floor")


if __name__ == "__main__":
    main()
