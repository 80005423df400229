"""Compares converting a TensorFlow 1 BERT-base, with Adam's slots, with copying its weights; run by hand.

    python -m benchmarks.inspection.conversion [--rounds 5] [--folder DIR]

The script writes a checkpoint of 1.3 GB with the package's own writer. Then three jobs run in turns, each in a process
of its own: read the bytes of the weights and write them to a file; convert the checkpoint; open it with
`from_pretrained`. The clock starts when all modules are imported, and written bytes are on the disk when it stops.
Memory is the peak of a process, mapped files included, above its memory at the start. The goals: converting takes at
most 1.5 times as long as copying, and memory is at most 1.15 times the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fastbert import BertConfig, BertModel
from fastbert.convert import convert
from fastbert.formats import open_model
from fastbert.formats.families import GOOGLE
from fastbert.formats.names import pattern_of
from fastbert.formats.tensorflow_bundle import write_bundle
from fastbert.storage import write_json

_MEBIBYTE = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="folder for 2 GB of files (default: the system's temporary folder)")
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job is not None:
        print(json.dumps(measured(JOBS[args.job], args.folder)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        source = Path(root) / "uncased_L-12_H-768_A-12"
        source.mkdir()
        weights = write_checkpoint(source)
        print(f"{sum(p.stat().st_size for p in source.iterdir()) / 1e6:,.0f} MB, of which weights {weights / 1e6:,.0f}")
        rounds = [{job: run(job, source) for job in JOBS} for _ in range(args.rounds)]
    for job in JOBS:
        times = ", ".join(f"{each[job]['seconds']:.2f}" for each in rounds)
        print(
            f"{job:>6}: {times} s; median {middle(rounds, job, 'seconds'):.2f}, of the processor "
            f"{middle(rounds, job, 'processor'):.2f}; memory {middle(rounds, job, 'memory') / _MEBIBYTE:,.0f} MiB, "
            f"{middle(rounds, job, 'memory') / weights:.2f} times the weights"
        )
    ratios = [each["convert"]["seconds"] / each["copy"]["seconds"] for each in rounds]
    listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"convert / copy, round by round: {listed}; median {statistics.median(ratios):.2f}")


def middle(rounds: list[dict], job: str, key: str) -> float:
    return statistics.median(each[job][key] for each in rounds)


def run(job: str, source: Path) -> dict[str, float]:
    command = [sys.executable, "-m", __spec__.name, "--job", job, "--folder", str(source)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])


def measured(job: Callable[[Path], object], source: Path) -> dict[str, float]:
    """Wall seconds, processor seconds, and bytes of memory beyond those that the process had before."""
    before = peak_memory()
    start, processor = time.perf_counter(), time.process_time()
    kept = job(source)
    seconds = {"seconds": time.perf_counter() - start, "processor": time.process_time() - processor}
    del kept
    return seconds | {"memory": peak_memory() - before}


def peak_memory() -> int:
    """This process' peak of memory in bytes. (getrusage would include the process that started this one.)"""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


# ---- the jobs --------------------------------------------------------------------------------------------


def copy(source: Path) -> None:
    """Reads the bytes of each weight and writes them."""
    path = source.parent / "copy"
    with open(path, "wb") as file:
        for variable in open_model(source).source.variables.values():
            if not variable.name.endswith(("adam_m", "adam_v")):
                file.write(variable.read().contiguous().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    path.unlink()


def convert_it(source: Path) -> None:
    out = source.parent / "out"
    convert(source, out, say=lambda line: None)
    for path in out.iterdir():
        path.unlink()
    out.rmdir()


def load(source: Path) -> BertModel:
    return BertModel.from_pretrained(source)


JOBS: dict[str, Callable[[Path], object]] = {"copy": copy, "convert": convert_it, "load": load}


# ---- the checkpoint --------------------------------------------------------------------------------------


def write_checkpoint(folder: Path) -> int:
    """Writes a BERT-base under Google's names, with Adam's slots. Returns the bytes of the weights alone."""
    config = BertConfig.base()
    state = {f"bert.{name}": t for name, t in BertModel(config).state_dict().items()}
    write_bundle(folder / "bert_model.ckpt", _with_slots(state))
    write_json(folder / "bert_config.json", config.to_dict())
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(config.vocab_size - 5))]
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    return sum(t.nbytes for t in state.values())


def _with_slots(state: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    rules = [(pattern_of(rule.ours), rule) for rule in GOOGLE.rules()]
    for name, t in state.items():
        match, rule = next((m, rule) for pattern, rule in rules if (m := pattern.fullmatch(name)))
        theirs = rule.theirs.format(**match.groupdict())
        t = t.t().contiguous() if rule.turn.transposed else t
        yield theirs, t
        for slot in ("adam_m", "adam_v"):
            yield f"{theirs}/{slot}", torch.zeros_like(t)


if __name__ == "__main__":
    main()
