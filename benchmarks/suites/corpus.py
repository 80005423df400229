"""Measures encoding tables into a folder: memory by number of rows, rows a second, compared with `Encoder.encode`.

    python -m benchmarks.suites.corpus memory --texts sst2/train.tsv --rows 200000 1000000
    python -m benchmarks.suites.corpus speed --texts sst2/train.tsv --rows 2000 --model FOLDER
    python -m benchmarks.suites.corpus dedup --texts sst2/train.tsv wikitext-2/valid.txt

A line of TEXTS is a text, or has one before its first tab. A prefix such as "row 17: " makes as many different texts as
needed. `memory` uses a BERT of one layer with random weights, so most of the time is outside of the model: reading,
tokenising, writing. It runs the command in separate processes, which report their peak resident memory. `speed` runs
its rows in turns; it gives wall times and the processor time of all threads. Engines are in corpus_engines.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

PLAIN = {"device": "cpu", "dtype": "float32"}


def texts_of(files: Sequence[Path]) -> list[str]:
    found = [line.split("\t")[0].strip() for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [text for text in found if text]


def write_table(path: Path, texts: Sequence[str], rows: int) -> Path:
    """Writes a .parquet file with this number of rows, 100,000 at a time."""
    import pyarrow as pa
    from pyarrow import parquet

    schema = pa.schema([("number", pa.int64()), ("text", pa.string())])
    with parquet.ParquetWriter(path, schema) as writer:
        numbered = enumerate(islice(cycle(texts), rows))
        while chunk := list(islice(numbered, 100_000)):
            numbers, of_rows = [n for n, _ in chunk], [f"row {n}: {text}" for n, text in chunk]
            writer.write_table(pa.table([numbers, of_rows], schema=schema))
    return path


def small_model(folder: Path) -> Path:
    """Writes a BERT of one layer and width 64, with the tokenizer of all-MiniLM-L6-v2."""
    import torch

    from fastbert import BertConfig, BertModel, Tokenizer
    from fastbert.cli.options import default_model

    tokenizer = Tokenizer.from_pretrained(default_model())
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=128, max_position_embeddings=128,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# The process itself reads its peak: the number that the system gives to a parent includes the parent's memory.
PROGRAM = """
import sys
from fastbert.cli.main import main
code = main(sys.argv[1:])
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
sys.exit(code)
"""


def run_alone(*words: object) -> tuple[float, float, float]:
    """(seconds, processor seconds, peak resident memory in MB) of a command that must succeed."""
    started, before = time.perf_counter(), os.times()
    command = [sys.executable, "-c", PROGRAM, *map(str, words)]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - started, used, int(told) / 1000


def encode_words(model: Path, table: Path, out: Path, *others: object) -> list[object]:
    options = [word for name, value in PLAIN.items() for word in (f"--{name}", value)]
    return ["encode", table, "--out-dir", out, "--model", model, *options, *others]


# ---- suites ------------------------------------------------------------------------------------------------


def memory(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    model, texts = small_model(folder / "model"), texts_of(args.texts)
    for rows in args.rows:
        table, out = write_table(folder / f"{rows}.parquet", texts, rows), folder / f"out{rows}"
        wall, cpu, peak = run_alone(*encode_words(model, table, out, "--keep", "number"))
        yield {"rows": rows, "seconds": wall, "processor_seconds": cpu, "peak_mb": peak, "rows_a_second": rows / wall}
        shutil.rmtree(out)
        table.unlink()


def speed(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Times Encoder.encode and a corpus of the same texts in this process, in turns."""
    from fastbert import Encoder
    from fastbert.corpus.job import Job
    from fastbert.corpus.run import CorpusEncoder, expect_done
    from fastbert.corpus.units import plan

    (rows,) = args.rows
    table = write_table(folder / "a.parquet", texts_of(args.texts), rows)
    texts = [f"row {n}: {text}" for n, text in enumerate(islice(cycle(texts_of(args.texts)), rows))]
    model = args.model or small_model(folder / "model")
    encoder = Encoder.from_pretrained(model, **PLAIN)
    encoder.encode(texts[:64])

    def corpus(turn: int) -> None:
        job, units = plan(
            [str(table)], Job(str(folder / f"out{turn}"), {"id_or_path": model, **PLAIN}, keep=("number",))
        )
        expect_done(CorpusEncoder(job, encoder).encode(units))

    seconds: dict[str, list[tuple[float, float]]] = {"Encoder.encode": [], "corpus": []}
    for turn in range(args.turns):
        for name, party in (("Encoder.encode", lambda _: encoder.encode(texts)), ("corpus", corpus)):
            wall, cpu = time.perf_counter(), time.process_time()
            party(turn)
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    for place, kind in enumerate(("seconds", "processor_seconds")):
        medians = {name: statistics.median(turn[place] for turn in turns) for name, turns in seconds.items()}
        yield {"rows": rows, "of": kind, **medians, "ratio": medians["Encoder.encode"] / medians["corpus"]}


def dedup(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Counts the rows that --dedup does not compute, in windows as when reading."""
    from fastbert.text.batching import CHUNK_TEXTS, chunks_of

    for file in args.texts:
        texts = texts_of([file])
        left = sum(len(set(chunk)) for chunk in chunks_of(texts, CHUNK_TEXTS))
        characters = sum(len(text) for chunk in chunks_of(texts, CHUNK_TEXTS) for text in set(chunk))
        yield {
            "texts": file.name, "rows": len(texts), "computed": left, "saved": 1 - left / len(texts),
            "saved_characters": 1 - characters / sum(map(len, texts)),
        }  # fmt: skip


SUITES = {"memory": memory, "speed": speed, "dedup": dedup}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[2000])
    parser.add_argument("--model", help="model of speed (default: a small one)")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for temporary files")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for row in SUITES[args.suite](args, Path(folder)):
            print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
