"""`--workers`: several processes write one ordered result; if one fails, there is one clear error."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbert import Encoder
from fastbert.checkpoint import CheckpointError
from fastbert.cli.main import main
from fastbert.encoding import workers as workers_module
from fastbert.encoding.workers import CHUNKS_AHEAD, EncoderPool, numa_nodes
from fastbert.text.files import HEADER_BYTES

pytestmark = pytest.mark.once

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PATIENCE = 600  # seconds; a process that takes longer counts as hanging, on a busy machine too
OPTIONS = {"impl": "native", "device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def pool(folder):
    with EncoderPool(2, folder, **OPTIONS) as pool:
        yield pool


def sentences(count: int) -> list[str]:
    return [" ".join(LETTERS[i * 7 % 26 : i * 7 % 26 + 1 + i % 9]) for i in range(count)]


def test_vectors_come_in_order(pool, folder):
    """Chunks of very different sizes, so that one worker overtakes the other."""
    texts, sizes = sentences(700), [300, 1, 2, 150, 0, 3, 144, 100]
    chunks = [texts[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]
    before = pool.stats
    parts = list(pool.encode_chunks(chunks))
    assert [len(part) for part in parts] == sizes
    alone = Encoder.from_pretrained(folder, **OPTIONS)
    torch.testing.assert_close(torch.cat(parts), alone.encode(texts), rtol=1e-5, atol=1e-6)
    assert pool.dimension == alone.dimension
    assert pool.device == alone.device
    assert (pool.stats.texts - before.texts, pool.stats.tokens - before.tokens) == (700, alone.stats.tokens)
    assert pool.stats.seconds > before.seconds


def test_no_chunks_give_no_vectors(pool):
    assert list(pool.encode_chunks([])) == []


def test_the_source_is_read_only_a_few_chunks_ahead(pool):
    drawn = 0

    def chunks():
        nonlocal drawn
        for _ in range(40):
            drawn += 1
            yield ["a b"]

    for given, _ in enumerate(pool.encode_chunks(chunks())):
        assert drawn <= given + 1 + 2 * CHUNKS_AHEAD
    assert drawn == 40


def test_the_order_holds_if_a_worker_is_slow(pool):
    """One worker has a chunk of long texts; the other computes many short ones meanwhile."""
    slow = [" ".join(LETTERS)] * 3000
    chunks = [slow, *([text] for text in sentences(9))]
    parts = list(pool.encode_chunks(chunks))
    assert [len(part) for part in parts] == [3000] + [1] * 9
    again = list(pool.encode_chunks(chunks[1:]))
    assert all(torch.equal(one, other) for one, other in zip(parts[1:], again, strict=True))


def test_an_error_of_a_worker_is_raised_and_ends_the_pool(folder, capfd):
    with EncoderPool(1, folder, **OPTIONS) as pool:
        with pytest.raises(ValueError, match=r"lone surrogate U\+D83D"):
            list(pool.encode_chunks([["a"], ["\ud83d"]]))
        assert all(not process.is_alive() for process in pool.processes)
        with pytest.raises(RuntimeError, match="closed"):
            list(pool.encode_chunks([["a"]]))
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_worker_that_is_killed_is_noticed(folder):
    with EncoderPool(1, folder, **OPTIONS) as pool:
        os.kill(pool.processes[0].pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="worker 1 of 1 was killed by SIGKILL before its work was done"):
            list(pool.encode_chunks([["a"]]))


def test_an_error_while_loading_is_raised(tmp_path):
    with pytest.raises(CheckpointError, match="is not a model folder"):
        EncoderPool(1, tmp_path, **OPTIONS)


def test_at_least_one():
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        EncoderPool(0, "nowhere")


def test_the_command(folder, tmp_path, capsys):
    source, out = tmp_path / "texts.txt", tmp_path / "out.npy"
    texts = sentences(2500)
    source.write_text("\n".join(texts))
    words = ["encode", str(source), "-o", str(out), "--model", str(folder), "--impl", "native", "--dtype", "float32"]
    assert main([*words, "--device", "cpu", "--workers", "2"]) == 0
    alone = Encoder.from_pretrained(folder, **OPTIONS).encode(texts)
    torch.testing.assert_close(torch.from_numpy(np.load(out)), alone, rtol=1e-5, atol=1e-6)
    for wrong in ("0", "-1", "two"):
        with pytest.raises(SystemExit, match="2"):
            main([*words, "--workers", wrong])
        assert f"from 1 up, got '{wrong}'" in capsys.readouterr().err


def imports_torch(pid: str) -> bool:
    with contextlib.suppress(OSError):
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text()
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="counts children in Linux' /proc")
@pytest.mark.parametrize("when", ["starting", "encoding"])
def test_ctrl_c_ends_all_and_leaves_nothing(when, folder, tmp_path, hearing):
    """Sent to the whole process group, as by a terminal: one line on standard error, no file, no process."""
    out = tmp_path / "out.npy"
    words = ["encode", "-", "-o", out, "--model", folder, "--impl", "native", "--device", "cpu", "--workers", "2"]
    process = subprocess.Popen(
        [*hearing, sys.executable, "-m", "fastbert", *map(str, words)],
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    def wait_until(done, why: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not done():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline, why
            time.sleep(0.02)

    try:
        process.stdin.write(b"a b c\n" * 9000)  # without an end
        process.stdin.flush()
        wait_until(lambda: list(tmp_path.iterdir()), "the output was not opened")
        if when == "encoding":
            wait_until(lambda: next(tmp_path.iterdir()).stat().st_size > HEADER_BYTES, "nothing was written")
        else:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            wait_until(lambda: len(children.read_text().split()) >= 3, "no workers were started")
            wait_until(lambda: any(map(imports_torch, children.read_text().split())), "no worker imported torch")
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=PATIENCE)[1].decode()
        assert process.returncode == 130
        assert said.startswith("fastbert: error: interrupted")
        assert said.count("\n") == 1
        assert list(tmp_path.iterdir()) == []
        deadline = time.monotonic() + PATIENCE
        with contextlib.suppress(ProcessLookupError):  # multiprocessing's own helper process ends a moment later
            while time.monotonic() < deadline:
                os.killpg(process.pid, 0)
                time.sleep(0.02)
            pytest.fail("a process was left behind")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


# ---- who runs where --------------------------------------------------------------------------------------


def test_numa_nodes_are_read_and_kept_to_what_is_allowed(tmp_path, monkeypatch):
    for node, cpus in {"node0": "0-3,8-11", "node1": "4-7,12-15", "node2": "", "node10": "16"}.items():
        (tmp_path / node).mkdir()
        (tmp_path / node / "cpulist").write_text(cpus + "\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)) - {5}, raising=False)
    assert numa_nodes(tmp_path) == [{0, 1, 2, 3, 8, 9, 10, 11}, {4, 6, 7, 12, 13, 14, 15}]
    assert numa_nodes(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("nodes", "workers", "expected"),
    [(2, 2, [{0}, {1}]), (2, 4, [{0}, {1}, {0}, {1}]), (4, 2, [{0, 2}, {1, 3}]), (1, 3, [None] * 3)],
    ids=["one_each", "two_a_node", "two_nodes_each", "one_node"],
)
def test_each_worker_stays_on_its_nodes(nodes, workers, expected, monkeypatch):
    monkeypatch.setattr(workers_module, "numa_nodes", lambda: [{node} for node in range(nodes)])
    seen = [None] * workers
    for index in range(workers):
        monkeypatch.setattr(
            os, "sched_setaffinity", lambda pid, cpus, i=index: seen.__setitem__(i, cpus), raising=False
        )
        workers_module._stay_on_its_nodes(index, workers)
    assert seen == expected


def test_each_worker_takes_the_next_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(workers_module.device_of(i, {})) for i in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert str(workers_module.device_of(1, {"device": "cuda:0"})) == "cuda:0"
    assert str(workers_module.device_of(1, {"device": "cpu"})) == "cpu"
