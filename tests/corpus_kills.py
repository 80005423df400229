"""kill -9 of `fastbert encode --out-dir` at random moments: the next run must always end with the same files.

    python tests/corpus_kills.py --kills 20 --seed 0 --workers 2

With --workers 2 every other kill hits one worker alone. Prints a line for each kill; exits with 1 if files differed.
"""

import argparse
import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from small_bert import save_bert

PATIENCE = 300  # seconds; a run that takes longer counts as hanging
ROWS, GROUP = 6000, 500


def make_input(folder):
    """Makes a model of one small layer and a table of some thousand rows, and returns (model, table)."""
    import pyarrow as pa
    from pyarrow import parquet

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
    model = save_bert(folder / "model", initializer_range=0.5, **sizes)
    choose = random.Random(0)
    texts = [" ".join(choose.choices("abcdefghij", k=choose.randint(1, 60))) for _ in range(ROWS)]
    table = pa.table({"number": range(ROWS), "text": texts})
    parquet.write_table(table, folder / "a.parquet", row_group_size=GROUP)
    return model, folder / "a.parquet"


def words_of(model, table, out, workers):
    """The arguments of the command, after `fastbert`."""
    return [
        "encode", table, "--out-dir", out, "--model", model, "--keep", "number",
        "--device", "cpu", "--dtype", "float32", "--impl", "native", "--batch-invariant", "--part-rows", GROUP,
        "--workers", workers, "--quiet",
    ]  # fmt: skip


def start(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fastbert", *map(str, words_of(*arguments))]
    return subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, text=True)


def finish(*arguments):
    """Runs the command to its end. Raises: RuntimeError with the command's output if it failed."""
    process = start(*arguments)
    _, said = process.communicate(timeout=PATIENCE)
    if process.returncode:
        raise RuntimeError(said)


def files_of(out):
    """The hash of every file of a folder."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def workers_of(process):
    """The processes that a process started."""
    with contextlib.suppress(OSError):
        found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return [pid for pid in map(int, found) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return []


def kill_at(process, out, seconds, of_worker):
    """Kills the command, or one worker, some seconds after it began to write. Returns how many parts were complete."""
    began = out / "manifest" / "corpus.json"
    while process.poll() is None and not began.exists():
        time.sleep(0.002)
    time.sleep(seconds)
    workers = workers_of(process) if of_worker else []
    with contextlib.suppress(ProcessLookupError):
        os.kill(workers[-1] if workers else process.pid, signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    receipts = out / "manifest" / "parts"
    return len(list(receipts.iterdir())) if receipts.exists() else 0


def trials(folder, kills, seed, workers, finish=finish):
    """Yields (seconds, parts that were complete at the kill, whether the files are equal at the end) of each kill."""
    model, table = make_input(folder)
    finish(model, table, folder / "whole", workers)
    whole = files_of(folder / "whole")
    parts = [path.stat().st_mtime for path in (folder / "whole" / "manifest").rglob("*.json")]
    span, choose = max(parts) - min(parts) + 0.1, random.Random(seed)
    for number in range(kills):
        out, seconds = folder / f"killed{number}", choose.uniform(0, span)
        counted = kill_at(start(model, table, out, workers), out, seconds, of_worker=number % 2 == 1)
        finish(model, table, out, workers)
        yield seconds, counted, files_of(out) == whole


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for seconds, counted, equal in trials(Path(folder), args.kills, args.seed, args.workers):
            ending = "equal" if equal else "OTHER FILES"
            print(f"killed after {seconds:.3f} s, {counted:2} of {ROWS // GROUP} parts: {ending}", flush=True)
            wrong += not equal
    print(f"{args.kills - wrong} of {args.kills} ended with the same files")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
