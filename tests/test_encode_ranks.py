"""`torchrun -m fastbert encode`: two gloo processes write one ordered file; if one fails, all end without a file."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist

from fastbert import Encoder
from fastbert.cli.main import main
from fastbert.encoding.encoder import EncodeStats
from fastbert.encoding.ranks import Ranks
from fastbert.text.batching import one_ahead

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS_OF_OPTIONS = ["--impl", "native", "--device", "cpu", "--dtype", "float32"]

pytestmark = [pytest.mark.once, pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")]


def environment(**others: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **others}


def torchrun(*words) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastbert"]
    return subprocess.run(
        [*command, *map(str, words)], env=environment(), capture_output=True, text=True, timeout=600, check=False
    )


def sentences(count: int) -> list[str]:
    return [" ".join(LETTERS[i * 7 % 26 : i * 7 % 26 + 1 + i % 9]) for i in range(count)]


def test_one_ordered_result(folder, tmp_path):
    """Seven chunks, the last one shorter: four for the first rank, three for the second."""
    source, out = tmp_path / "texts.txt", tmp_path / "out.npy"
    texts = sentences(6 * 1024 + 77)
    source.write_text("\n".join(texts))
    done = torchrun("encode", source, "-o", out, "--model", folder, *WORDS_OF_OPTIONS)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npy", "texts.txt"]
    expected = Encoder.from_pretrained(folder, impl="native", device="cpu", dtype="float32").encode(texts)
    torch.testing.assert_close(torch.from_numpy(np.load(out)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", range(8))
def test_chunks_are_distributed_and_joined_in_order(count, monkeypatch):
    """Three ranks, run one after another: any number of chunks, also fewer than ranks, of different sizes."""

    class Numbers:
        """An encoder for chunks of numbers, which reads one chunk ahead as the real one does."""

        dimension = 1

        def __init__(self):
            self.stats = EncodeStats()

        def encode_chunks(self, chunks, max_tokens_per_batch=None):
            for vectors in one_ahead(lambda chunk: torch.tensor(chunk, dtype=torch.float32)[:, None], chunks):
                self.stats.texts += 1
                yield vectors()

    class Sent:
        def wait(self):
            pass

    def gathered(everywhere, ours):
        everywhere[:] = [ours, (0, 0, 0), (0, 0, 0)]

    chunks = [list(range(10 * i, 10 * i + 1 + i % 3)) for i in range(count)]
    mail = {1: [], 2: []}
    monkeypatch.setattr(dist, "all_gather_object", gathered)
    for rank in (1, 2):
        monkeypatch.setattr(dist, "isend", lambda vectors, to, rank=rank: mail[rank].append(vectors) or Sent())
        Ranks(rank, 3, rank).contribute(Numbers(), iter(chunks))
    monkeypatch.setattr(dist, "recv", lambda vectors, rank: vectors.copy_(mail[rank].pop(0)))
    parts = list(Ranks(0, 3, 0).gather(Numbers(), iter(chunks)))
    assert [part[:, 0].tolist() for part in parts] == chunks
    assert mail == {1: [], 2: []}


def test_a_failing_rank_ends_all(folder, tmp_path):
    """A line is not UTF-8: the first process that reads it reports it, with the line's number."""
    source, out = tmp_path / "texts.txt", tmp_path / "out.npy"
    source.write_bytes(b"a b\n" * 1500 + b"\xff\n" + b"a\n" * 1500)
    done = torchrun("encode", source, "-o", out, "--model", folder, *WORDS_OF_OPTIONS)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("fastbert: error: ")]
    assert any("rank " in line and "texts.txt, line 1501: not UTF-8" in line for line in said), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_a_vanished_rank_is_noticed(folder, tmp_path):
    """If a machine is lost, nothing ends the other ranks: rank 0 notices by itself."""
    source, out = tmp_path / "texts.txt", tmp_path / "out.npy"
    source.write_text("a b\n" * 5000)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "by hand"}
    vanishing = (
        "import os, torch.distributed as dist; dist.init_process_group('gloo'); "
        f"dist.all_gather_object([None] * 2, {{'bytes of FILE': {source.stat().st_size}, 'width of a vector': 32}}); "
        "os._exit(9)"
    )
    words = ["-m", "fastbert", "encode", source, "-o", out, "--model", folder, *WORDS_OF_OPTIONS]
    first = subprocess.Popen(
        [sys.executable, *map(str, words)], env=environment(**there, RANK="0", LOCAL_RANK="0"),
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        second = [sys.executable, "-c", vanishing]
        subprocess.run(second, env=environment(**there, RANK="1", LOCAL_RANK="1"), timeout=600, check=False)
        said = first.communicate(timeout=600)[1]
    finally:
        first.kill()
    assert first.returncode == 1
    assert "fastbert: error: rank 0: lost the connection to another rank" in said
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


@pytest.mark.parametrize(
    ("words", "message"), [(["-"], "FILE must be a file"), (["{texts}", "--workers", "2"], "--nproc-per-node")]
)
def test_options_that_exclude_torchrun(words, message, tmp_path, monkeypatch, capsys):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "here"}.items():
        monkeypatch.setenv(name, value)
    assert main(["encode", *(word.format(texts=tmp_path / "texts.txt") for word in words)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fastbert: error: rank 1: ")
    assert message in said


def test_each_rank_has_its_gpu(monkeypatch):
    assert Ranks(1, 2, 1).device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Ranks(1, 2, 1).device("auto") == "auto"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Ranks(3, 4, 1).device("auto") == Ranks(3, 4, 1).device("cuda") == "cuda:1"
    with pytest.raises(ValueError, match="3 or more processes on a machine with 2 CUDA devices"):
        Ranks(2, 4, 2).device("auto")


def test_ranks_that_read_different_files_are_refused(monkeypatch):
    def gathered(everywhere, facts):
        everywhere[:] = [{"bytes of FILE": 7}, {"bytes of FILE": 8}]

    monkeypatch.setattr(dist, "init_process_group", lambda backend: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(dist, "all_gather_object", gathered)
    with (
        pytest.raises(ValueError, match="bytes of FILE must be the same everywhere: 7, but 8 on rank 1"),
        Ranks(0, 2, 0).joined({"bytes of FILE": 7}),
    ):
        pass
