"""Measures the resident memory of `fastbert encode` while it encodes a long file (Linux).

    python -m benchmarks.suites.long_file [--lines 200000] [--texts FILE] [--samples 20] [-- ENCODE_ARGUMENTS]

The lines of FILE (by default sentences of the package's dictionary) are repeated until there are enough, and encoded by
`fastbert encode` in a process of its own. The memory of that process and its children is read from /proc while its
output grows. Anonymous memory was allocated by the process; resident memory also has the pages of mapped files, which
the system frees when it needs them. The last line describes the time after the first fifth: the range, and the slope of
a straight line through all samples.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from fastbert.demo import entries
from fastbert.text.files import HEADER_BYTES

WARM_UP = 0.2  # after this share of the lines memory should not grow
SECONDS_A_LOOK = 0.25


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.suites.long_file", description="Memory of a long encode."
    )
    parser.add_argument("--lines", type=int, default=200_000)
    parser.add_argument(
        "--texts", type=Path, help="a text in each line (default: sentences of the package's dictionary)"
    )
    parser.add_argument("--samples", type=int, default=20, help="number of samples to print")
    parser.add_argument("encode", nargs="*", help="after --: more arguments of fastbert encode")
    args = parser.parse_args(argv)
    lines = args.texts.read_text(encoding="utf-8").splitlines() if args.texts else dictionary_sentences()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "texts.txt"
        with source.open("w", encoding="utf-8") as stream:
            stream.writelines(f"{line}\n" for line in itertools.islice(itertools.cycle(lines), args.lines))
        samples = watch(source, Path(folder) / "out.npy", args.encode)
    report(samples, args.samples)


def dictionary_sentences() -> list[str]:
    """The sentences of the dictionary's entries, without their headwords."""
    return [sentence for entry in entries() for sentence in re.split(r"(?<=[.!?]) ", entry)[1:] if sentence.strip()]


def watch(source: Path, out: Path, arguments: list[str]) -> np.ndarray:
    """Samples (lines written, seconds, MB resident, MB anonymous), several in a second."""
    command = [sys.executable, "-m", "fastbert", "encode", str(source), "-o", str(out), *arguments]
    started = time.perf_counter()
    process = subprocess.Popen(command)
    samples = []
    while process.poll() is None:
        time.sleep(SECONDS_A_LOOK)
        try:
            growing = next(path for path in out.parent.iterdir() if path != source)
            samples.append((growing.stat().st_size, time.perf_counter() - started, *memory(process.pid)))
        except (StopIteration, FileNotFoundError, KeyError):  # the process has not begun, or has just ended
            continue
    if process.returncode:
        raise SystemExit(process.returncode)
    rows = np.array(samples)
    rows[:, 0] = (rows[:, 0] - HEADER_BYTES).clip(0) // np.load(out, mmap_mode="r")[0].nbytes
    return rows


def memory(pid: int) -> tuple[float, float]:
    """(resident, anonymous) memory of a process and its children, in MB."""
    resident = anonymous = 0.0
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for one in [str(pid), *children]:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{one}/status").read_text().splitlines())
        resident += int(fields["VmRSS"].split()[0]) / 1024
        anonymous += int(fields["RssAnon"].split()[0]) / 1024
    return resident, anonymous


def report(samples: np.ndarray, count: int) -> None:
    lines, seconds, resident, anonymous = samples.T
    print(f"{'lines':>10} {'seconds':>8} {'resident MB':>12} {'anonymous MB':>13}")
    for place in np.unique(np.searchsorted(lines, np.linspace(lines[0], lines[-1], count))):
        print(f"{lines[place]:>10,.0f} {seconds[place]:>8.1f} {resident[place]:>12.1f} {anonymous[place]:>13.1f}")
    after = lines >= WARM_UP * lines[-1]
    growth = np.polyfit(lines[after] / 100_000, anonymous[after], 1)[0]
    print(
        f"after {WARM_UP:.0%}: resident {resident[after].min():.1f} to {resident[after].max():.1f} MB, anonymous "
        f"{anonymous[after].min():.1f} to {anonymous[after].max():.1f} MB, growing {growth:+.2f} MB per 100,000 lines"
    )


if __name__ == "__main__":
    main()
