"""Tables become a folder of parts with vectors: the contents, which rows make which part, and what is refused."""

import importlib.metadata
import json

import numpy as np
import pytest
import torch

pytest.importorskip("pyarrow", reason="needs the corpus extra")

from corpus_files import (
    PLAIN,
    done,
    encode,
    every_kind,
    hashes,
    job_of,
    pa,
    parquet,
    plan,
    read,
    table_of,
    texts_of,
    vectors_of,
    write,
    write_arrow,
)
from fastbert import Encoder
from fastbert.corpus import reading, writing
from fastbert.corpus.manifest import Manifest, ManifestError
from fastbert.corpus.run import CorpusEncoder, Failed
from fastbert.corpus.search import search
from fastbert.corpus.units import Unit
from fastbert.corpus.verify import verify
from fastbert.text.files import InputError

pytestmark = pytest.mark.once
reads_null_vectors = pytest.mark.skipif(
    not writing.reads_null_vectors(), reason="this pyarrow cannot read null vectors"
)


@pytest.fixture(scope="module")
def encoder(folder):
    return Encoder.from_pretrained(folder, **PLAIN)


# ---- what comes out ----------------------------------------------------------------------------------------


def test_each_row_has_a_vector_and_the_kept_columns(folder, encoder, tmp_path):
    table = table_of(500)
    write(tmp_path / "in" / "a.parquet", table.slice(0, 280), row_group_size=90)
    write(tmp_path / "in" / "deep" / "b.parquet", table.slice(280), row_group_size=1000)
    (tmp_path / "in" / "_SUCCESS").write_text("")
    write(tmp_path / "in" / "_temporary" / "c.parquet", table)
    outcomes = encode(folder, [tmp_path / "in"], tmp_path / "out", encoder, id="number", keep=("tags", "facts"))
    assert [outcome.unit.first for outcome in outcomes] == [0, 90, 180, 0, 73, 146]
    assert done(outcomes) == 6
    found = read(tmp_path / "out")
    assert found.column_names == ["number", "tags", "facts", "embedding"]
    assert found.drop_columns("embedding").to_pylist() == table.drop_columns("text").to_pylist()
    assert found.schema.field("embedding").type.list_size == encoder.dimension
    expected = encoder.encode(table.column("text").to_pylist()).numpy()
    np.testing.assert_allclose(vectors_of(found)[0], expected, atol=1e-5)
    told = json.loads(found.schema.metadata[b"fastbert"])
    assert told["dimension"] == encoder.dimension
    assert (told["pooling"], told["normalize"], told["prompt"]) == ("mean", False, "")
    assert told["versions"]["torch"] == importlib.metadata.version("torch")  # without the +cu130 in torch.__version__
    assert not list(verify(Manifest(str(tmp_path / "out")), [outcome.unit for outcome in outcomes]))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data", "manifest", "unfinished"]


def test_every_kind_of_file(folder, encoder, tmp_path):
    (tmp_path / "in").mkdir()
    for name in every_kind(tmp_path / "in", 40):
        out = tmp_path / name
        assert done(encode(folder, [tmp_path / "in" / name], out, encoder, keep=("number",), part_rows=16)) >= 1
        found = read(out)
        assert list(map(str, found.column("number").to_pylist())) == list(map(str, range(40)))
        np.testing.assert_allclose(vectors_of(found)[0], encoder.encode(texts_of(40)).numpy(), atol=1e-5)


def test_parts_begin_at_the_start_of_a_line(tmp_path, folder):
    """Every line is in exactly one part, wherever the bytes are cut. A quoted line end does not end a value in .csv."""
    rows = [{"text": "é" * (i % 7) + f" {i}"} for i in range(60)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    job = job_of(folder, tmp_path / "out")
    for step in (1, 7, 50, 10_000):
        found = []
        for first in range(0, path.stat().st_size, step):
            with reading.open_table(str(path), "a", job) as table:
                for batch in table.batches(Unit("a", "a", first, min(first + step, table.size), table.size)):
                    found += batch.column("text").to_pylist()
        assert found == [row["text"] for row in rows], step
    (tmp_path / "b.csv").write_text('text\n"a\nb"\nc\n')
    with reading.open_table(str(tmp_path / "b.csv"), "b", job) as table:
        (batch,) = table.batches(Unit("b", "b", 0, None, table.size))
        assert batch.column("text").to_pylist() == ["a\nb", "c"]


@pytest.mark.parametrize(
    ("sizes", "rows", "expected"),
    [
        ([], 10, [(0, 0)]),
        ([3], 10, [(0, 3)]),
        ([4, 4, 4], 10, [(0, 8), (8, 12)]),
        ([25], 10, [(0, 8), (8, 16), (16, 25)]),
        ([2, 25, 2, 3], 10, [(0, 2), (2, 10), (10, 18), (18, 27), (27, 32)]),
    ],
)
def test_row_groups_into_parts(sizes, rows, expected):
    assert reading.extents_of(sizes, rows) == expected


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_precisions(precision, folder, encoder, tmp_path):
    """The budget is that of the precision: half a unit in the last place."""
    path = write(tmp_path / "a.parquet", table_of(50))
    encode(folder, [path], tmp_path / "out", encoder, precision=precision)
    found, exact = vectors_of(read(tmp_path / "out"))[0], encoder.encode(texts_of(50)).numpy()
    largest = np.abs(exact).max(axis=1, keepdims=True)
    step = np.abs(exact) * 2**-11 + 1e-7 if precision == "float16" else largest / 127 / 2 * 1.0001
    assert (np.abs(found - exact) <= step).all()
    assert np.abs(found - exact).max() > 0


def test_kept_columns_of_types_that_parquet_lacks(folder, encoder, tmp_path):
    """Parquet stores seconds as milliseconds and date64 as date32, so `--verify` rejected correct parts. A column of
    nulls ended the run, and run-end encoded columns had no cast."""
    days = [86_400_000 * i for i in range(4)]
    table = pa.table(
        {
            "text": ["a", "b", "c", "d"],
            "moment": pa.array(range(4), pa.timestamp("s", "UTC")),
            "moments": pa.array([[i] for i in range(4)], pa.list_(pa.timestamp("s"))),
            "time": pa.array(range(4), pa.time32("s")),
            "day": pa.array(days, pa.date64()),
            "nothing": pa.nulls(4),
            "nothings": pa.array([[], None, [None], []], pa.list_(pa.null())),
            "runs": pa.RunEndEncodedArray.from_arrays([3, 4], ["x", "y"]),
        }
    )
    write_arrow(tmp_path / "a.arrow", table)
    outcomes = encode(folder, [tmp_path / "a.arrow"], tmp_path / "out", encoder, keep=tuple(table.column_names[1:]))
    assert done(outcomes) == 1
    assert list(verify(Manifest(str(tmp_path / "out")), [outcome.unit for outcome in outcomes])) == []
    assert read(tmp_path / "out").drop_columns("embedding").to_pylist() == table.drop_columns("text").to_pylist()


@pytest.mark.parametrize(
    "kind", [pa.struct([]), pa.month_day_nano_interval(), pa.list_view(pa.int8())], ids=["empty", "interval", "view"]
)
def test_a_column_that_cannot_be_kept_is_refused_before_anything_is(kind, folder, tmp_path):
    table = pa.table({"text": ["a"], "odd": pa.nulls(1, kind)})
    write_arrow(tmp_path / "a.arrow", table)
    with pytest.raises(InputError, match=r"a\.arrow: the column 'odd' cannot be kept: "):
        plan([str(tmp_path / "a.arrow")], job_of(folder, tmp_path / "out", keep=("odd",)))


@pytest.mark.parametrize("nulls", ["null", "fill", "encode", "refuse"])
def test_rows_without_texts(nulls, folder, encoder, tmp_path):
    """Empty texts count as texts, unless an option makes them nulls."""
    table = pa.table({"number": range(5), "text": ["a", None, "", " ", "b"]})
    path, plain = write(tmp_path / "a.parquet", table), encoder.encode(["a", "", "", " ", "b"]).numpy()
    options = {"id": "number", "nulls": nulls}
    (outcome,) = encode(folder, [path], tmp_path / "out", encoder, **options)
    if nulls == "null" and not writing.reads_null_vectors():
        return  # the next test
    if nulls == "refuse":
        assert isinstance(outcome, Failed)
        assert "a.parquet, row 2 (number 1): there is no text" in outcome.reason
        assert not hashes(tmp_path / "out")
        return
    found, valid = vectors_of(read(tmp_path / "out"))
    assert valid.tolist() == [True, nulls == "encode", True, True, True]
    np.testing.assert_allclose(found[valid], plain[valid], atol=1e-5)
    assert not found[~valid].any()
    column = read(tmp_path / "out").column("embedding")
    assert column.null_count == (nulls == "null")
    assert column.type.value_field.nullable == (nulls == "null")  # otherwise Lance cannot store the null
    encode(folder, [path], tmp_path / "empty", encoder, empty_is_null=True, **options)
    found, valid = vectors_of(read(tmp_path / "empty"))
    assert valid.tolist() == [True, *[nulls == "encode"] * 3, True]
    np.testing.assert_allclose(found[valid], plain[[0, 1, 1, 1, 4]][valid], atol=1e-5)


def test_a_null_vector_that_pyarrow_could_not_read_is_refused(folder, encoder, tmp_path, monkeypatch):
    """pyarrow 25, the newest one for Python 3.10, writes null vectors and cannot read them: a search failed at files
    that had just been written."""
    monkeypatch.setattr(pa, "__version__", "25.0.1")
    path = write(tmp_path / "a.parquet", pa.table({"text": ["a", None]}))
    (outcome,) = encode(folder, [path], tmp_path / "out", encoder)
    assert isinstance(outcome, Failed)
    assert "a.parquet, row 2: there is no text, and pyarrow 25.0.1 cannot read the null vector" in outcome.reason
    assert "--nulls fill" in outcome.reason
    assert not hashes(tmp_path / "out")
    assert done(encode(folder, [path], tmp_path / "filled", encoder, nulls="fill")) == 1


@reads_null_vectors
def test_equal_texts_are_computed_once(folder, encoder, tmp_path, monkeypatch):
    table = pa.table({"text": ["a b", "c", None, "a b", "c", "a b"]})
    path, computed = write(tmp_path / "a.parquet", table), []
    plain = encoder.encode_ids
    monkeypatch.setattr(encoder, "encode_ids", lambda ids, budget: computed.append(len(ids)) or plain(ids, budget))
    encode(folder, [path], tmp_path / "once", encoder, dedup=True)
    encode(folder, [path], tmp_path / "each", encoder)
    assert computed == [2, 5]
    (once, valid), (each, _) = (vectors_of(read(tmp_path / name)) for name in ("once", "each"))
    assert valid.tolist() == [True, True, False, True, True, True]
    np.testing.assert_allclose(once, each, atol=1e-6)


# ---- bytes -------------------------------------------------------------------------------------------------


def test_equal_values_make_equal_bytes(folder, encoder, tmp_path, monkeypatch):
    """Chunks, dictionaries, large strings, the name of a list's child, pandas' metadata, and how many rows are read and
    computed at once do not change the bytes."""
    table = table_of(700).append_column("long", pa.array([f"{i} " * 5000 for i in range(700)]))
    write(tmp_path / "one" / "a.parquet", table, row_group_size=300)
    other = table.set_column(1, "text", table.column("text").dictionary_encode())
    other = other.set_column(2, "tags", table.column("tags").cast(pa.large_list(pa.field("thing", pa.large_string()))))
    other = other.replace_schema_metadata({"pandas": "{}"})
    write(
        tmp_path / "two" / "a.parquet", other, row_group_size=300, compression="gzip", use_compliant_nested_type=False
    )
    found, options = [], {"keep": ("tags", "facts", "text", "long"), "batch_invariant": True}
    for name, rows, texts in (("one", 512, 8192), ("two", 31, 50)):
        monkeypatch.setattr(reading, "BATCH_ROWS", rows)
        monkeypatch.setattr("fastbert.corpus.run.CHUNK_TEXTS", texts)
        monkeypatch.chdir(tmp_path / name)
        out = tmp_path / f"out {name}"
        assert done(encode(folder, ["a.parquet"], out, encoder, part_rows=300, **options)) == 3
        found.append(hashes(out))
    assert found[0] == found[1]


def test_writer_options_without_effect_are_an_error(folder, encoder, tmp_path, monkeypatch):
    """pyarrow ignores the option of a missing column: a misspelt path left a column with the default compression."""
    path = write(tmp_path / "a.parquet", table_of(20))
    right = writing.leaves_of
    for option, message in (("embedding", "compression of the column 'embedding.list.element'"), ("tags", "tags")):
        wrong = lambda schema, of=option: {leaf.replace(of, "x"): name for leaf, name in right(schema).items()}  # noqa: E731
        monkeypatch.setattr(writing, "leaves_of", wrong)
        with pytest.raises(RuntimeError, match=message):
            encode(folder, [path], tmp_path / option, encoder, keep=("tags",))
        assert not hashes(tmp_path / option)


def test_the_hash_of_values_does_not_depend_on_chunks():
    table = table_of(100).append_column(
        "pairs", pa.array([[("k", i)] * (i % 2) for i in range(100)], pa.map_("string", "int32"))
    )
    table = table.append_column(
        "sizes", pa.array([None if i % 3 else [i, i] for i in range(100)], pa.list_(pa.int8(), 2))
    )

    def hash_of(tables):
        found = writing.ValuesHash()
        for part in tables:
            found.add(part)
        return found.hexdigest()

    whole = hash_of([table])
    assert hash_of([table.slice(0, 33), table.slice(33, 0), table.slice(33)]) == whole
    for name in table.column_names:
        column = table.column(name)
        changed = pa.chunked_array([column.slice(1, 1).combine_chunks(), *column.slice(1).chunks])
        place = table.column_names.index(name)
        assert hash_of([table.set_column(place, name, changed)]) != whole, name
    for values in ([1, None], ["a", None], [None, ""], [[1], None], [[], None]):
        assert hash_of([pa.table({"a": values})]) != hash_of([pa.table({"a": values[::-1]})]), values


# ---- second runs -------------------------------------------------------------------------------------------


def test_a_second_run_makes_what_is_missing(folder, encoder, tmp_path):
    path, out = write(tmp_path / "a.parquet", table_of(300), row_group_size=100), tmp_path / "out"
    assert done(encode(folder, [path], out, encoder)) == 3
    whole = hashes(out)
    assert encode(folder, [path], out, encoder) == []
    _, second, third = sorted((out / "manifest" / "parts").iterdir())
    second.unlink()  # as if killed between a part and its receipt
    (out / "data" / third.with_suffix(".parquet").name).unlink()
    third.unlink()
    assert done(encode(folder, [path], out, encoder)) == 2
    assert hashes(out) == whole
    write(tmp_path / "b.parquet", table_of(10))
    assert done(encode(folder, [path, tmp_path / "b.parquet"], out, encoder)) == 1
    with pytest.raises(ManifestError, match=r"has a part of .*b\.parquet that the inputs do not make"):
        encode(folder, [path], out, encoder)
    write(tmp_path / "b.parquet", table_of(11))
    with pytest.raises(ManifestError, match=r"b\.parquet has changed"):
        encode(folder, [path, tmp_path / "b.parquet"], out, encoder)


def test_another_model_or_setting_is_refused(folder, encoder, tmp_path, monkeypatch):
    path, out = write(tmp_path / "a.parquet", table_of(20)), tmp_path / "out"
    encode(folder, [path], out, encoder)
    before = hashes(out)
    other = Encoder.from_pretrained(folder, **PLAIN)
    with torch.no_grad():
        other.model.embeddings.word_embeddings.weight[7, 3] += 1e-3
    cases = [
        ("weights is", {"encoder": other}),
        (
            "pooling is 'mean', and here it is 'cls'",
            {"encoder": Encoder.from_pretrained(folder, pooling="cls", **PLAIN)},
        ),
        ("precision is 'float32', and here it is 'int8'", {"precision": "int8"}),
        ("columns tags is None", {"keep": ("tags",)}),
        ("batch_invariant is False", {"batch_invariant": True}),
    ]
    for message, options in cases:
        with pytest.raises(ManifestError, match=message):
            encode(folder, [path], out, **{"encoder": encoder, **options})
    monkeypatch.setattr("fastbert.corpus.job._version", lambda package: "25.0.0" if package == "pyarrow" else None)
    with pytest.raises(ManifestError, match=r"versions pyarrow is '.*', and here it is '25.0.0'"):
        encode(folder, [path], out, encoder)
    assert hashes(out) == before


def test_verify_finds_what_is_wrong(folder, encoder, tmp_path):
    path, out = write(tmp_path / "a.parquet", table_of(500), row_group_size=100), tmp_path / "out"
    encode(folder, [path], out, encoder)
    manifest, (_, units) = Manifest(str(out)), plan([str(path)], job_of(folder, out))
    files = sorted((out / "data").iterdir())
    parquet.write_table(parquet.read_table(files[0]), files[0])  # the same values in different bytes
    changed = bytearray(files[1].read_bytes())
    changed[len(changed) // 3] ^= 1
    files[1].write_bytes(changed)
    table = parquet.ParquetFile(files[2]).read()
    parquet.write_table(pa.concat_tables([table.slice(1), table.slice(0, 1)]), files[2])
    files[3].unlink()
    (out / "manifest" / "parts" / files[4].with_suffix(".json").name).unlink()
    found = list(verify(manifest, units))
    words = [
        "its bytes are others",
        "it cannot be read",
        "its values are others",
        "it is gone",
        "there is no part of it",
    ]
    assert len(found) == 6
    assert all(word in fault for word, fault in zip(words, found, strict=False)), found
    assert "the manifest does not name it" in found[5]


# ---- bad input ---------------------------------------------------------------------------------------------


def test_tables_that_cannot_be_encoded_are_refused_before_anything_is(folder, tmp_path):
    write(tmp_path / "a.parquet", table_of(10))
    write(tmp_path / "b.parquet", table_of(10).set_column(0, "number", pa.array(map(str, range(10)))))
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "d.txt").write_text("a")
    (tmp_path / "empty").mkdir()
    cases = [
        (["a.parquet"], {"text": "number"}, r"a\.parquet: the column 'number' must hold text, and holds int64"),
        (["a.parquet"], {"text": "body"}, r"no column 'body'; it has 'number', 'text', 'tags', 'facts'"),
        (["a.parquet", "b.parquet"], {"keep": ("number",)}, "'number' is string, and in .*a.parquet it is int64"),
        (["c.parquet"], {}, r"c\.parquet: "),
        (["d.txt"], {}, r"must end in one of \.parquet"),
        (["nowhere.parquet"], {}, "does not exist"),
        (["empty"], {}, "no file there ends in"),
        (["a.parquet", "*.parquet"], {}, "twice"),
    ]  # fmt: skip
    for names, options, message in cases:
        with pytest.raises(InputError, match=message):
            plan([str(tmp_path / name) for name in names], job_of(folder, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_a_corrupt_row_group_costs_only_its_part(folder, encoder, tmp_path):
    path, out = write(tmp_path / "a.parquet", table_of(300), row_group_size=100, compression="none"), tmp_path / "out"
    column = parquet.read_metadata(path).row_group(1).column(1)
    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    outcomes = encode(folder, [path], out, encoder)
    assert [type(outcome).__name__ for outcome in outcomes] == ["Done", "Failed", "Done"]
    assert "a.parquet: " in outcomes[1].reason
    assert len(hashes(out)) == 2


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_the_error_for_a_vector_that_is_not_finite_names_its_row(precision, folder, tmp_path):
    encoder = Encoder.from_pretrained(folder, **PLAIN)
    with torch.no_grad():  # the vector of a text with "z" is not finite, or too large for float16
        encoder.model.embeddings.word_embeddings.weight[encoder.tokenizer.token_to_id("z")] = torch.nan
    if precision == "float16":
        encoder = Encoder.from_pretrained(folder, **PLAIN)
        plain = encoder.encode_ids
        encoder.encode_ids = lambda ids, budget: (
            plain(ids, budget) * torch.tensor([[1e6 if 30 in row else 1.0] for row in ids])
        )
    table = pa.table({"name": [f"n{i}" for i in range(30)], "text": ["a", *["b"] * 13, "z", *["c"] * 15]})
    path, out = write(tmp_path / "a.parquet", table, row_group_size=10), tmp_path / "out"
    outcomes = encode(folder, [path], out, encoder, id="name", part_rows=10, precision=precision)
    assert [type(outcome).__name__ for outcome in outcomes] == ["Done", "Failed", "Done"]
    reason = "is not finite" if precision == "float32" else "more than float16 can hold"
    assert "a.parquet, row 15 (name n14): the vector" in outcomes[1].reason
    assert reason in outcomes[1].reason
    assert len(hashes(out)) == 2


def test_a_full_disk_ends_the_run_and_leaves_finished_parts(folder, encoder, tmp_path, monkeypatch):
    """A limit on the size of files stands for a full disk. The message named no file if the part could not be written
    before its end."""
    resource = pytest.importorskip("resource", reason="this system has no limits on the size of files")
    monkeypatch.setattr(writing, "GROUP_BYTES", 1)  # 1,024 rows are written at once
    path, out = write(tmp_path / "a.parquet", table_of(3000), row_group_size=1500), tmp_path / "out"
    job, units = plan([str(path)], job_of(folder, out, part_rows=1500))
    runner = CorpusEncoder(job, encoder)
    assert done(runner.encode(units[:1])) == 1
    first, before = hashes(out), resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (out / "data" / f"{units[0].name}.parquet").stat().st_size
    for limit in (2, size // 2, size - 50):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(OSError, match="File too large") as caught:
                list(runner.encode(units[1:]))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert caught.value.filename == str(out / "data" / f"{units[1].name}.parquet"), limit
        assert hashes(out) == first
        assert not list((out / "unfinished").iterdir())
    assert done(runner.encode(runner.manifest.missing(units))) == 1
    assert not list(verify(runner.manifest, units))


# ---- search ------------------------------------------------------------------------------------------------


@reads_null_vectors
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_search_is_exact(precision, folder, encoder, tmp_path, monkeypatch):
    """Compared with sorted float64 scores of the vectors in the file, over parts, row groups and blocks."""
    table = table_of(400)
    texts = table.column("text").to_pylist()
    texts[7] = None
    table = table.set_column(1, "text", pa.array(texts))
    path = write(tmp_path / "a.parquet", table, row_group_size=150)
    encode(folder, [path], tmp_path / "out", encoder, id="number", precision=precision, part_rows=150)
    monkeypatch.setattr("fastbert.corpus.search.BLOCK_BYTES", 4 * encoder.dimension * 37)
    queries = encoder.encode(["a b", "j j j"]).numpy()
    found = search(Manifest(str(tmp_path / "out")), queries, 20)
    vectors, valid = vectors_of(read(tmp_path / "out"))
    vectors, exact = vectors.astype(np.float64), queries.astype(np.float64)
    scores = exact @ vectors.T / np.maximum(np.linalg.norm(vectors, axis=1), 1e-30)
    scores /= np.linalg.norm(exact, axis=1, keepdims=True)
    scores[:, ~valid] = -np.inf
    assert [len(hits) for hits in search(Manifest(str(tmp_path / "out")), queries, 1000)] == [399, 399]
    for hits, of_query in zip(found, scores, strict=True):
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(of_query)[::-1][:20], atol=1e-6)
        np.testing.assert_allclose(
            [of_query[hit.columns["number"]] for hit in hits], [hit.score for hit in hits], atol=1e-6
        )
        assert len({hit.columns["number"] for hit in hits}) == 20
        assert all(f"{hit.row + 150 * (hit.columns['number'] // 150)}" == f"{hit.columns['number']}" for hit in hits)
