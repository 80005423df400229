"""Arrow files: which record batches are read, how often, and the errors of broken files."""

import pytest

pytest.importorskip("pyarrow", reason="needs the corpus extra")

from corpus_files import job_of, pa, plan, table_of, write_arrow
from fastbert.corpus import reading
from fastbert.corpus.units import Unit
from fastbert.text.files import InputError

pytestmark = pytest.mark.once


class Counting:
    """A reader of an Arrow file that records which batches are read, and how many columns of them."""

    def __init__(self, reader, seen):
        self.reader, self.seen = reader, seen

    def __getattr__(self, name):
        return getattr(self.reader, name)

    def get_batch(self, number):
        batch = self.reader.get_batch(number)
        self.seen.append((number, batch.num_columns))
        return batch


@pytest.fixture
def batches_read(monkeypatch):
    """(number, columns) of every record batch that is read from a file."""
    seen, right = [], reading.ipc.open_file
    monkeypatch.setattr(reading.ipc, "open_file", lambda *args, **options: Counting(right(*args, **options), seen))
    return seen


def rows_of(units, job):
    """The rows of all units, each read from a newly opened table."""
    found = []
    for unit in units:
        with reading.open_table(unit.path, unit.source, job) as table:
            found += list(table.batches(unit))
    return pa.Table.from_batches(found)


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("where", ["{}", "file://{}", "memory:/{}"], ids=["path", "url", "memory"])
def test_a_batch_is_read_once_to_plan_and_once_by_each_unit_with_rows_of_it(
    compression, where, batches_read, folder, tmp_path
):
    """Every unit read all batches to count their rows, so a file of N parts was read N + 1 times."""
    import fsspec

    table = table_of(400).select(["number", "tags", "text"])
    path = write_arrow(tmp_path / "a.arrow", table, 8, compression=compression)
    if where.startswith("memory"):
        fsspec.filesystem("memory").pipe(str(path), path.read_bytes())
    job, units = plan([where.format(path)], job_of(folder, tmp_path / "out", keep=("number",), part_rows=20))
    assert [(unit.first, unit.last, unit.batch, unit.skipped) for unit in units[:3]] == [
        (0, 16, 0, 0), (16, 32, 2, 0), (32, 48, 4, 0),
    ]  # fmt: skip
    assert batches_read == [(number, 1) for number in range(50)]
    batches_read.clear()
    assert rows_of(units, job).select(["number", "text"]).equals(table.select(["number", "text"]))
    assert batches_read == [(number, 2) for number in range(50)]


def test_a_batch_larger_than_a_part_is_read_by_each_of_its_parts(batches_read, folder, tmp_path):
    """There are empty batches before, between and after the full ones."""
    table = table_of(70).select(["text"])
    path = tmp_path / "a.arrow"
    with pa.ipc.new_file(path, table.schema) as sink:
        for first, last in ((0, 0), (0, 5), (5, 5), (5, 50), (50, 70), (70, 70)):
            texts = pa.array(table.column("text").to_pylist()[first:last], pa.string())
            sink.write_batch(pa.record_batch([texts], schema=table.schema))
    job, units = plan([str(path)], job_of(folder, tmp_path / "out", part_rows=20))
    assert [(unit.first, unit.last, unit.batch, unit.skipped) for unit in units] == [
        (0, 5, 1, 0), (5, 20, 3, 0), (20, 35, 3, 15), (35, 50, 3, 30), (50, 70, 4, 0),
    ]  # fmt: skip
    batches_read.clear()
    assert rows_of(units, job).column("text").to_pylist() == table.column("text").to_pylist()
    assert [number for number, _ in batches_read] == [1, 3, 3, 3, 4]


def test_a_broken_batch_is_refused_before_its_offsets_are_used(folder, tmp_path):
    path = write_arrow(tmp_path / "a.arrow", pa.table({"text": [f"text {i}" for i in range(100)]}))
    content = bytearray(path.read_bytes())
    texts = content.index(b"text 0text 1")
    content[texts - 200 : texts - 8] = b"\xff" * 192
    path.write_bytes(content)
    job, units = plan([str(path)], job_of(folder, tmp_path / "out"))
    with pytest.raises(InputError, match=r"a\.arrow: In column 0: Invalid: Offset invariant failure"):
        rows_of(units, job)


def test_a_file_that_was_cut_off_says_so(folder, tmp_path):
    """Such a file was read as a stream, whose first four bytes are a length."""
    path = write_arrow(tmp_path / "a.arrow", table_of(100).select(["text"]))
    content = path.read_bytes()
    for size in (6, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(InputError, match=r"a\.arrow: an Arrow file without its end; it may have been cut off"):
            plan([str(path)], job_of(folder, tmp_path / "out"))


def test_an_empty_file_and_a_file_without_rows(folder, tmp_path):
    (tmp_path / "a.arrow").write_bytes(b"")
    with pytest.raises(InputError, match=r"a\.arrow: "):
        plan([str(tmp_path / "a.arrow")], job_of(folder, tmp_path / "out"))
    path = write_arrow(tmp_path / "b.arrow", table_of(1).select(["text"]).slice(1))
    job, units = plan([str(path)], job_of(folder, tmp_path / "out"))
    assert units == [Unit(units[0].source, str(path), 0, 0, path.stat().st_size)]
    with reading.open_table(str(path), "b", job) as table:
        assert sum(batch.num_rows for batch in table.batches(units[0])) == 0
