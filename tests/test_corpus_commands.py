"""`fastbert encode --out-dir` and `fastbert search`: several processes, torchrun, kill -9, URLs, and messages."""

import json
import os
import signal

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="needs the corpus extra")

import corpus_kills
from command_line import run
from corpus_files import PLAIN, WORDS, done, encode, hashes, job_of, pa, plan, read, table_of, vectors_of, write
from fastbert import Encoder
from fastbert.corpus.places import UNFINISHED, Place
from fastbert.corpus.pool import CorpusPool
from fastbert.corpus.units import largest_first, shares_of, sizes_of
from fastbert.engines import ray, spark, torchrun

pytestmark = pytest.mark.once


@pytest.fixture
def options(folder):
    return ["--model", folder, *WORDS, "--part-rows", "100"]


def test_the_commands(folder, options, tmp_path, capsys):
    path, out = write(tmp_path / "in" / "a.parquet", table_of(250), row_group_size=100), tmp_path / "out"
    words = ["encode", tmp_path / "in", "--out-dir", out, "--id-column", "number", "--keep", "text,tags", *options]
    assert run(*words) == 0
    whole = hashes(out)
    assert sorted(path.name for path in out.iterdir()) == ["data", "manifest"]
    assert run(*words) == 0
    assert hashes(out) == whole
    assert run(*words, "--verify") == 0
    assert "3 parts, 250 rows, all as they were written" in capsys.readouterr().out
    question = table_of(250).column("text")[77].as_py()
    assert run("search", out, question, "-k", "2", "--device", "cpu") == 0
    first, _ = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["score"] == pytest.approx(1.0, abs=1e-5)
    assert first["columns"]["text"] == question
    assert run(*words, "--pooling", "cls") == 1
    assert "pooling is 'mean', and here it is 'cls'" in capsys.readouterr().err
    part = next((out / "data").iterdir())
    part.write_bytes(b"PAR1")
    assert run("search", out, question, "--device", "cpu") == 1
    assert f"{part}: Parquet file size is 4 bytes" in capsys.readouterr().err
    part.unlink()
    assert run(*words, "--verify") == 1
    captured = capsys.readouterr()
    assert "it is gone" in captured.out
    assert "1 things are wrong, of 3 parts" in captured.err
    assert path.exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["a.jsonl", "--dedup"], 2, "--dedup goes with --out-dir"),
        (["a.jsonl", "b.jsonl"], 2, "several files go with --out-dir"),
        (["a.jsonl", "--out-dir", "out", "-o", "o.npy"], 2, "not with -o, --tokens or --words"),
        (["a.jsonl", "--out-dir", ""], 2, "--out-dir: expected a folder or a URL, got ''"),
        (["a.jsonl", "--out-dir", "out", "--keep", ""], 2, "--keep: expected names between commas, got ''"),
        (["a.jsonl", "--out-dir", "out", "--keep", "embedding"], 1, "the vectors take that name"),
        (["a.jsonl", "--out-dir", "out", "--text-column", "body"], 1, "no field 'body'; it has 'text'"),
    ],
)
def test_wrong_usage(words, code, message, options, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    assert run("encode", *words, *options[:-2]) == code
    assert message in capsys.readouterr().err


def test_search_prints_null_for_numbers_that_json_lacks(folder, options, tmp_path, capsys):
    """It used to print NaN and Infinity, which only Python reads."""
    inf = float("inf")
    columns = {"x": [float("nan")], "many": [[inf, 1.0]], "deep": [{"y": -inf, "z": "NaN"}]}
    path, out = write(tmp_path / "a.parquet", pa.table({"text": ["a b"], **columns})), tmp_path / "out"
    assert run("encode", path, "--out-dir", out, "--keep", "x,many,deep", *options) == 0
    assert run("search", out, "a b", "--device", "cpu") == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["columns"] == {"x": None, "many": [None, 1.0], "deep": {"y": None, "z": "NaN"}}
    assert run("search", " ", "a b") == 2
    assert "DIR: expected a folder or a URL, got ' '" in capsys.readouterr().err


def test_two_workers_write_the_same_bytes_as_one(folder, tmp_path):
    """If a worker is killed, the next run makes its part."""
    path = write(tmp_path / "a.parquet", table_of(600), row_group_size=60)
    one = {"batch_invariant": True, "dedup": True, "keep": ("number",), "part_rows": 60}
    encode(folder, [path], tmp_path / "one", **one)
    job, units = plan([str(path)], job_of(folder, tmp_path / "two", **one))
    with CorpusPool(2, job) as pool:
        outcomes = pool.encode(units)
        first = next(outcomes)
        os.kill(pool.processes[0].pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="worker 1 of 2 was killed by SIGKILL"):
            list(outcomes)
    assert first.unit in units
    by_workers = hashes(tmp_path / "two")
    assert by_workers.items() <= hashes(tmp_path / "one").items()
    assert len(by_workers) >= 1
    encode(folder, [path], tmp_path / "two", **one)
    assert hashes(tmp_path / "two") == hashes(tmp_path / "one")


def test_a_run_that_fails_leaves_no_folder_for_unfinished_files(options, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": 3}\n')
    assert run("encode", tmp_path / "a.jsonl", "--out-dir", tmp_path / "out", *options) == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest"]


def test_a_process_that_ends_does_not_break_another_processs_lock(tmp_path, monkeypatch):
    """One process removes the empty folder of locks after another has made it and before that one opens its lock."""
    place, plain = Place(str(tmp_path / "out")), os.open
    taken = []

    def open_late(*arguments):
        if not taken:
            taken.append(place.tidy())
        return plain(*arguments)

    monkeypatch.setattr(os, "open", open_late)
    with place.alone("a"):
        assert [path.name for path in (tmp_path / "out" / UNFINISHED).iterdir()] == ["a.lock"]
    assert len(taken) == 1


def test_ranks_share_the_units(folder, tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", table_of(250), row_group_size=50)
    job = job_of(folder, tmp_path / "out", part_rows=50)
    receipts = []
    for rank in (1, 0, 0):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        receipts.append([receipt["first"] for receipt in torchrun.encode([str(path)], job)])
    assert receipts == [[50, 150], [0, 100, 200], []]


def test_workers_take_the_largest_units_first_and_shares_are_even(folder, tmp_path):
    """Sizes are bytes. A .csv file is one unit, with the size of the file."""
    path = write(tmp_path / "a.parquet", table_of(250), row_group_size=50)
    (tmp_path / "b.csv").write_text("text\n" + path.stat().st_size // 4 * "a\n")  # half as large as the others
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "d.parquet").write_bytes(path.read_bytes())
    _, units = plan([str(tmp_path)], job_of(folder, tmp_path / "out", part_rows=100))
    of_a, csv, of_c, of_d = units[:3], units[3], units[4], units[5:]
    assert [unit.last - unit.first for unit in of_a] == [100, 100, 50]
    assert largest_first(units, units) == [csv, *of_a[:2], *of_d[:2], of_a[2], of_d[2], of_c]
    assert largest_first(units[1:], units) == [csv, of_a[1], *of_d[:2], of_a[2], of_d[2], of_c]
    shares = shares_of(units, units, 2)
    assert shares[0][0] == csv
    assert sorted([*shares[0], *shares[1]], key=units.index) == units
    totals = [sum(map(sizes_of(units).__getitem__, share)) for share in shares]
    assert max(totals) - min(totals) <= min(sizes_of(units)[unit] for unit in of_a)
    assert shares_of(units[:1], units, 3) == [[units[0]], [], []]


def test_after_a_kill_the_next_run_ends_with_the_same_files(tmp_path):
    """A short version of `python tests/corpus_kills.py`, which kills twenty times."""

    def finish(*arguments):
        assert run(*corpus_kills.words_of(*arguments)) == 0

    outcomes = list(corpus_kills.trials(tmp_path, kills=1, seed=1, workers=1, finish=finish))
    assert [equal for *_, equal in outcomes] == [True]


def test_folders_behind_urls(folder, tmp_path):
    import fsspec

    encoder, memory = Encoder.from_pretrained(folder, **PLAIN), fsspec.filesystem("memory")
    path = write(tmp_path / "a.parquet", table_of(120), row_group_size=50)
    memory.pipe("/lake/in/a.parquet", path.read_bytes())
    inputs, out = ["memory://lake/in"], "memory://lake/out"
    assert done(encode(folder, inputs, out, encoder, part_rows=50)) == 3
    assert encode(folder, inputs, out, encoder, part_rows=50) == []
    parts = memory.ls("/lake/out/data", detail=False)
    assert len(parts) == 3
    (tmp_path / "out" / "data").mkdir(parents=True)
    for part in parts:
        (tmp_path / "out" / "data" / part.rsplit("/", 1)[1]).write_bytes(memory.cat(part))
    expected = encoder.encode(table_of(120).column("text").to_pylist()).numpy()
    np.testing.assert_allclose(vectors_of(read(tmp_path / "out"))[0], expected, atol=1e-5)
    memory.rm("/lake", recursive=True)


def test_engines_refuse_zero_workers(folder, tmp_path):
    """Ray without an actor returned as if no part were missing."""
    job = job_of(folder, tmp_path / "out")
    with pytest.raises(ValueError, match="actors must be at least 1, got 0"):
        ray.encode([str(tmp_path)], job, actors=0)
    with pytest.raises(ValueError, match="partitions must be at least 1, got -1"):
        spark.encode(None, [str(tmp_path)], job, partitions=-1)
