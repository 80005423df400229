"""Long input: a chunk is tokenised while the last one is computed; constant memory; clean interruption."""

import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.suites import long_file as memory
from fastbert import Encoder
from fastbert.cli.main import main
from fastbert.text.batching import one_ahead
from fastbert.text.files import InputError, read_chunks
from small_bert import save_bert

pytestmark = pytest.mark.once

WIDTH = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A BERT of one layer with vectors of a kilobyte, which are visible in the memory of a process."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 16, "max_position_embeddings": 16}
    return save_bert(tmp_path_factory.mktemp("model"), **sizes)


@pytest.fixture
def encoder(folder) -> Encoder:
    return Encoder.from_pretrained(folder, impl="native", device="cpu", dtype="float32")


TEXTS = [" ".join("abcdefg"[: 1 + i % 7]) for i in range(50)]


def test_the_next_chunk_is_tokenised_while_one_is_computed(encoder, monkeypatch):
    """The first chunk's forward pass waits until the second is tokenised, which would never happen in turn."""
    tokenised, threads = threading.Semaphore(0), set()
    tokenise, encode_ids = encoder.tokenise, encoder.encode_ids

    def and_tell(texts):
        ids = tokenise(texts)
        threads.add(threading.get_ident())
        tokenised.release()
        return ids

    def when_one_ahead(ids, budget):
        assert tokenised.acquire(timeout=600)
        if len(ids) == 20:
            assert tokenised.acquire(timeout=600), "the next chunk was not tokenised meanwhile"
            tokenised.release()
        return encode_ids(ids, budget)

    expected = encoder.encode(TEXTS)
    monkeypatch.setattr(encoder, "tokenise", and_tell)
    monkeypatch.setattr(encoder, "encode_ids", when_one_ahead)
    parts = list(encoder.encode_stream(TEXTS, chunk_size=20))
    assert [len(part) for part in parts] == [20, 20, 10]
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-5, atol=1e-6)
    assert threading.get_ident() not in threads


def test_texts_are_read_in_the_callers_thread(encoder):
    """The cursor of a database, for example, belongs to the thread that opened it."""
    threads = set()

    def drawn():
        for text in TEXTS:
            threads.add(threading.get_ident())
            yield text

    for _ in encoder.encode_stream(drawn(), chunk_size=8):
        pass
    assert threads == {threading.get_ident()}


def test_one_chunk_needs_no_thread(encoder, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a thread was started for a single chunk")

    monkeypatch.setattr(threading, "Thread", refuse)
    assert encoder.encode("a b").shape == (WIDTH,)


def test_iterators_give_what_lists_give(encoder):
    vectors = encoder.encode(TEXTS)
    assert torch.equal(encoder.encode(text for text in TEXTS), vectors)
    assert encoder.encode(iter([])).shape == (0, WIDTH)


@pytest.mark.parametrize("chunk_size", [8, 1000], ids=["while_computing", "first"])
def test_errors_of_the_other_thread_and_of_the_source_reach_the_caller(encoder, chunk_size):
    with pytest.raises(ValueError, match="lone surrogate"):
        list(encoder.encode_stream([*TEXTS, "\ud83d"], chunk_size=chunk_size))

    def broken():
        yield from TEXTS
        raise InputError("line 51 is missing")

    with pytest.raises(InputError, match="line 51"):
        list(encoder.encode_stream(broken(), chunk_size=chunk_size))


def test_a_stream_closed_early_leaves_no_thread(encoder):
    before = set(threading.enumerate())
    stream = encoder.encode_stream(TEXTS, chunk_size=4)
    next(stream)
    stream.close()
    for thread in threading.enumerate():
        if thread.name.startswith("ahead"):
            thread.join(timeout=600)
    assert set(threading.enumerate()) <= before


def test_stopping_does_not_wait_for_the_tokenizer():
    """Ctrl-C and SIGTERM close the stream. One word of 200 MB in the second chunk delayed them by a minute, and then
    the end of the process waited for the thread again."""
    over, begun, ended, daemons = threading.Event(), threading.Event(), [], []

    def tokenise(text):
        daemons.append(threading.current_thread().daemon)
        if text == "long":
            begun.set()
            over.wait(timeout=20)
        ended.append(text)
        return text

    stream = one_ahead(tokenise, ["short", "long", "next"])
    assert next(stream)() == "short"
    assert next(stream) is not None
    assert begun.wait(timeout=600)
    stream.close()
    assert ended == ["short"]
    assert all(daemons)
    over.set()
    for thread in threading.enumerate():
        if thread.name == "ahead":
            thread.join(timeout=600)
    assert ended == ["short", "long"], "a text was tokenised although its request was cancelled"


def test_chunks_of_lines_end_by_number_and_by_size(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("a\n" * 5 + "b" * 100 + "\n" + "c\n" * 2)
    with path.open("rb") as stream:
        chunks = list(read_chunks(stream, "texts", lines=4, n_bytes=50))
    assert [[line.text[0] for line in chunk] for chunk in chunks] == [list("aaaa"), list("ab"), list("cc")]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of a process from Linux' /proc")
def test_resident_memory_does_not_grow_with_the_file(folder, tmp_path):
    """Ten times the lines have the same peak. Kept vectors would add 18 MB, kept lines and ids more."""
    code = (
        "import sys; from fastbert.cli.main import main; assert main(sys.argv[1:]) == 0\n"
        "print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )

    def peak(lines: int) -> int:
        source, out = tmp_path / f"{lines}.txt", tmp_path / f"{lines}.npy"
        source.write_text("".join(TEXTS[i % 50] + "\n" for i in range(lines)))
        options = ["--model", folder, "--impl", "native", "--device", "cpu", "--dtype", "float32"]
        command = [sys.executable, "-c", code, "encode", source, "-o", out, *options]
        # glibc returns freed blocks to the system at once, so that the peak shows what is kept
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(list(map(str, command)), env=environment, check=True, capture_output=True, text=True)
        assert np.load(out, mmap_mode="r").shape == (lines, WIDTH)
        return int(done.stdout)

    few, many = peak(2_000), peak(20_000)
    assert many - few < 6_000, f"{few:,} kB for 2,000 lines, {many:,} kB for 20,000"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from Linux' /proc")
def test_the_benchmark_of_memory_measures_this_process_and_finds_growth(capsys):
    before = memory.memory(os.getpid())[1]
    # new memory from the system, not what this process freed before
    with mmap.mmap(-1, 32 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as kept:
        kept.write(b"1" * len(kept))
        assert memory.memory(os.getpid())[1] - before > 30
    lines = np.arange(0, 1001, 10.0)
    memory.report(np.stack([lines, lines, lines + 300, 200 + lines / 1000], axis=1), count=5)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 + 5 + 1
    assert said[-1].endswith("anonymous 200.2 to 201.0 MB, growing +100.00 MB per 100,000 lines")


def test_interrupted_says_that_nothing_was_written(folder, tmp_path, monkeypatch, capsys):
    source, out = tmp_path / "texts.txt", tmp_path / "out.npy"
    source.write_text("a b\n" * 2500)
    calls = []
    encode_ids = Encoder.encode_ids

    def interrupted(self, ids, budget):
        calls.append(ids)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode_ids(self, ids, budget)

    monkeypatch.setattr(Encoder, "encode_ids", interrupted)
    assert main(["encode", str(source), "-o", str(out), "--model", str(folder), "--impl", "native"]) == 130
    said = capsys.readouterr().err
    assert said == f"fastbert: error: interrupted after 1,024 lines; {out} was not written\n"
    assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]
