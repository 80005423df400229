"""Encodes corpora with a real Ray and a real Spark on this machine. `make engines` installs both and runs this file and
the examples; pytest does not collect this file by itself. Spark needs Java."""

import os
import sys
from functools import partial
from importlib import import_module

import pytest

pytest.importorskip("pyarrow", reason="needs the corpus extra")

from corpus_files import PLAIN, encode, hashes, job_of, pa, read, table_of, texts_of, write
from fastbert import Encoder
from fastbert.text.files import InputError


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray", reason="needs the ray extra")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def spark():
    os.environ["PYSPARK_PYTHON"] = sys.executable  # otherwise the workers run the first python3 on PATH
    sql = pytest.importorskip("pyspark.sql", reason="needs the spark extra")
    session = sql.SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
    yield session
    session.stop()


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """A table, and the hashes of the files that one process makes from it."""
    where = tmp_path_factory.mktemp("alone")
    path = write(where / "a.parquet", table_of(500), row_group_size=50)
    encode(folder, [path], where / "out", **OPTIONS)
    return path, hashes(where / "out")


OPTIONS = {"batch_invariant": True, "part_rows": 50, "keep": ("number", "tags")}


def test_ray_makes_the_same_files(folder, alone, ray, tmp_path):
    from fastbert.engines.ray import encode as encode_by_ray

    path, expected = alone
    receipts = encode_by_ray([str(path)], job_of(folder, tmp_path / "out", **OPTIONS), actors=2)
    assert len(receipts) == 10
    assert hashes(tmp_path / "out") == expected
    assert encode_by_ray([str(path)], job_of(folder, tmp_path / "out", **OPTIONS), actors=2) == []


def test_spark_makes_the_same_files(folder, alone, spark, tmp_path):
    from fastbert.engines.spark import encode as encode_by_spark

    path, expected = alone
    receipts = encode_by_spark(spark, [str(path)], job_of(folder, tmp_path / "out", **OPTIONS), partitions=2)
    assert len(receipts) == 10
    assert hashes(tmp_path / "out") == expected
    assert encode_by_spark(spark, [str(path)], job_of(folder, tmp_path / "out", **OPTIONS), partitions=2) == []


@pytest.mark.parametrize("engine", ["ray", "spark"])
def test_a_failed_part_is_reported(engine, folder, request, tmp_path):
    table = pa.table({"text": ["a", None, "b", "c"]})
    path, session = write(tmp_path / "a.parquet", table, row_group_size=2), request.getfixturevalue(engine)
    job = job_of(folder, tmp_path / "out", nulls="refuse", part_rows=2)
    encode_by = import_module(f"fastbert.engines.{engine}").encode
    arguments = ([str(path)], job)
    if engine == "ray":
        run = partial(encode_by, *arguments, actors=1)
    else:
        run = partial(encode_by, session, *arguments, partitions=1)
    with pytest.raises(InputError, match=r"row 2: there is no text.*1 parts failed; the other 1 are finished"):
        run()
    assert read(tmp_path / "out").num_rows == 2


def test_rows_through_a_ray_dataset(folder, ray, tmp_path):
    """Fixed-size lists and nulls survive, and rows keep their vectors in whatever order Ray returns them."""
    from fastbert.engines.batches import BatchEncoder

    texts = [*texts_of(60), None]
    rows = ray.data.from_arrow(pa.table({"number": range(61), "text": texts})).repartition(3)
    encoder = {"id_or_path": str(folder), **PLAIN}
    pool = ray.data.ActorPoolStrategy(size=2)
    mapped = rows.map_batches(
        BatchEncoder, fn_constructor_args=(encoder,), batch_format="pyarrow", batch_size=16, compute=pool, num_cpus=0.5
    )
    table = pa.concat_tables(ray.get(mapped.to_arrow_refs())).sort_by("number")
    expect_rows(table, texts, Encoder.from_pretrained(**encoder))
    assert table.schema.field("embedding").type == pa.list_(pa.field("element", pa.float32()), 32)
    mapped.write_parquet(str(tmp_path / "out"))
    back = pa.parquet.read_table(tmp_path / "out").sort_by("number")
    assert back.schema.field("embedding").type.list_size == 32


def test_rows_through_a_spark_dataframe(folder, spark):
    from fastbert.engines.spark import with_vectors

    texts, encoder = [*texts_of(60), None], {"id_or_path": str(folder), **PLAIN}
    rows = spark.createDataFrame([(text, number) for number, text in enumerate(texts)], "text string, number int")
    table = with_vectors(rows.repartition(3), encoder).toArrow().sort_by("number")
    assert table.column_names == ["text", "number", "embedding"]
    expect_rows(table, texts, Encoder.from_pretrained(**encoder))


def expect_rows(table, texts, encoder):
    assert table.column("text").to_pylist() == texts
    assert table.column("embedding").to_pylist()[-1] is None
    found = table.column("embedding").to_pylist()[:-1]
    for row, expected in zip(found, encoder.encode(texts[:-1]).tolist(), strict=True):
        assert row == pytest.approx(expected, abs=1e-5)
