"""The commands under bad conditions: endless lines, full disks, closed streams, killed parents, hostile folders."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbert import BertModel, Encoder
from fastbert.checkpoint import CheckpointError, load_state_dict, write_atomically
from fastbert.text.files import InputError, read_lines
from small_bert import save_bert

pytestmark = pytest.mark.once

PATIENCE = 600  # seconds; a process that takes longer counts as hanging, on a busy machine too


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_bert(tmp_path_factory.mktemp("model"))


def command(folder: Path, *words) -> list[str]:
    return [
        sys.executable, "-m", "fastbert", "encode", *map(str, words), "--model", str(folder), "--impl", "native",
        "--device", "cpu", "--dtype", "float32",
    ]  # fmt: skip


def encode(folder: Path, *words, shell: str = "", **options) -> subprocess.CompletedProcess:
    """Runs `fastbert encode`, by bash if `shell` has redirections."""
    line = command(folder, *words)
    if shell:
        line = ["bash", "-c", f'"$@" {shell}', "bash", *line]
    return subprocess.run(line, capture_output=True, text=True, timeout=PATIENCE, **options)


def said(process: subprocess.CompletedProcess) -> str:
    assert process.returncode == 1, process.stderr
    assert process.stderr.startswith("fastbert: error: "), process.stderr
    assert process.stderr.count("\n") == 1
    return process.stderr


# ---- lines ------------------------------------------------------------------------------------------------


def test_the_error_for_a_line_without_an_end_names_its_place(folder, tmp_path):
    """A file of 200 MB without a line end took 19.6 GB, and SIGTERM did not stop the tokenizer for minutes."""
    file = tmp_path / "texts.txt"
    file.write_bytes(b"a b\n" + b"c " * 6_000_000 + b"\n")
    error = said(encode(folder, file, "-o", tmp_path / "o.npy"))
    assert "texts.txt, line 2: longer than 10,000,000 bytes; --max-line-bytes allows more" in error
    file.write_bytes(b"a b\n" + b"c " * 50 + b"\n")
    assert "line 2: longer than 99 bytes" in said(
        encode(folder, file, "-o", tmp_path / "o.npy", "--max-line-bytes", 99)
    )
    assert list(tmp_path.iterdir()) == [file]
    assert encode(folder, file, "-o", tmp_path / "o.npy", "--max-line-bytes", 100).returncode == 0
    assert np.load(tmp_path / "o.npy").shape == (2, 32)


def test_no_more_than_the_limit_is_read(tmp_path):
    """The rest of a long line stays unread. The line end and a byte order mark do not count."""
    file = tmp_path / "texts.txt"
    file.write_bytes(b"\xef\xbb\xbf" + b"x" * 50 + b"\r\n" + b"y" * 1_000_000)
    with open(file, "rb", buffering=0) as stream:
        lines = read_lines(stream, "f", line_bytes=50)
        assert next(lines).text == "x" * 50
        with pytest.raises(InputError, match="f, line 2: longer than 50 bytes"):
            next(lines)
        assert stream.tell() < 200


def test_empty_lines_may_end_a_file_of_objects(folder, tmp_path):
    """Editors and `cat` leave empty lines at the end. In the middle they are an error, which names the line."""
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text('{"text": "a"}\n{"text": "b"}\n\n \r\n')
    assert encode(folder, file, "-o", out).returncode == 0
    assert [json.loads(line)["text"] for line in out.read_text().splitlines()] == ["a", "b"]
    file.write_text('{"text": "a"}\n\n\n{"text": "b"}\n')
    assert "in.jsonl, line 2: the line is empty" in said(encode(folder, file, "-o", out))


@pytest.mark.parametrize("number", ["1e400", "NaN", "-Infinity"])
def test_numbers_that_json_lacks_are_not_written(number, folder, tmp_path):
    """Python reads such numbers, and wrote Infinity and NaN, which other JSON readers refuse."""
    file = tmp_path / "in.jsonl"
    file.write_text(f'{{"text": "a"}}\n{{"text": "b", "deep": [{{"x": {number}}}]}}\n')
    error = said(encode(folder, file, "-o", tmp_path / "out.jsonl"))
    assert "text 2 comes with a number that is not finite" in error
    assert not (tmp_path / "out.jsonl").exists()
    assert encode(folder, file, "-o", tmp_path / "out.npy").returncode == 0  # .npy holds none of the other fields


# ---- descriptors and disks --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "shell", "message"),
    [
        (("-", "-o", "o.npy"), "<&-", "standard input is closed"),
        (("t.txt",), ">&-", "standard output is closed"),
        (("t.txt",), ">/dev/full", "standard output: No space left on device"),
    ],
    ids=["stdin", "stdout", "full"],
)
def test_standard_streams_that_are_closed_or_full(words, shell, message, folder, tmp_path):
    """Closed streams raised AttributeError: 'NoneType' object has no attribute 'buffer'."""
    (tmp_path / "t.txt").write_text("a\n")
    assert message in said(encode(folder, *words, shell=shell, cwd=tmp_path))


@pytest.mark.parametrize(
    ("words", "shell", "code", "message"),
    [
        ("info", ">&-", 1, "error: standard output is closed"),
        ("info", ">/dev/full", 1, "error: standard output: No space left on device"),
        ("bench --help", ">&-", 0, ""),  # argparse's output is lost, as in any Python program
    ],
    ids=["closed", "full", "bench"],
)
def test_other_commands_whose_output_is_lost(words, shell, code, message, tmp_path):
    """`info` succeeded without a word, or named no file; `bench` raised AttributeError: no attribute 'flush'."""
    line = f"{sys.executable} -m fastbert {words} {shell}"
    process = subprocess.run(["bash", "-c", line], stderr=subprocess.PIPE, text=True, timeout=PATIENCE, check=False)
    assert process.returncode == code, process.stderr
    assert message in process.stderr
    assert process.stderr.count("fastbert: error") == code


def test_with_standard_error_closed_errors_do_not_reach_the_output(folder, tmp_path):
    (tmp_path / "t.txt").write_bytes(b"a\n\xff\n")
    process = encode(folder, "t.txt", shell="2>&-", cwd=tmp_path)
    assert process.returncode == 1
    assert "error" not in process.stdout


def test_a_full_disk_names_the_file(folder, tmp_path):
    """A limit on the size of files stands for a full disk, for which the message was only `No space left`."""
    file, out = tmp_path / "t.txt", tmp_path / "out.npy"
    file.write_text("a b\n" * 2000)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    assert f"{out}: File too large" in said(encode(folder, file, "-o", out, preexec_fn=limit))
    assert list(tmp_path.iterdir()) == [file]


def test_no_room_at_any_step_names_the_file(tmp_path):
    path = tmp_path / "x.npy"
    with pytest.raises(OSError, match=r"x\.npy") as raised, write_atomically(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert raised.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


# ---- temporary files --------------------------------------------------------------------------------------


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".jsonl"])
def test_file_names_of_the_greatest_length(suffix, folder, tmp_path):
    """A name of 249 characters is allowed, but the temporary name beside it, which has 14 more, was too long."""
    (tmp_path / "t.txt").write_text("a\n")
    out = tmp_path / ("k" * (255 - len(suffix)) + suffix)
    assert encode(folder, tmp_path / "t.txt", "-o", out).returncode == 0
    assert names_in(tmp_path) == sorted([out.name, "t.txt"])


def test_hanging_up_leaves_no_file(folder, tmp_path):
    """Closing a terminal sends SIGHUP, which ended the process at once and left its temporary file."""
    out = tmp_path / "out" / "k.npy"
    out.parent.mkdir()
    process = subprocess.Popen(
        command(folder, "-", "-o", out), stdin=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=handles_hang_up
    )
    with process:
        wait_for(lambda: names_in(out.parent))
        process.send_signal(signal.SIGHUP)
        assert process.wait(PATIENCE) == 128 + signal.SIGHUP
    assert names_in(out.parent) == []


def handles_hang_up() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def wait_for(condition) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "nothing came of it"
        time.sleep(0.05)


def test_the_next_run_removes_the_files_of_a_killed_run(folder, tmp_path):
    """SIGKILL leaves no time to clean up. Files that another process still writes, and files with other names, stay."""
    out = tmp_path / "out" / "k.npy"
    out.parent.mkdir()
    killed = subprocess.Popen(command(folder, "-", "-o", out), stdin=subprocess.PIPE)
    with killed:
        wait_for(lambda: names_in(out.parent))
        killed.kill()
    (left,) = names_in(out.parent)
    for other in (".k2.0123abcd.tmp.npy", ".k.0123abcd.tmp.jsonl", ".k.notes.tmp.npy"):
        (out.parent / other).touch()
    others = set(names_in(out.parent)) - {left}
    with write_atomically(out) as writing:
        assert set(names_in(out.parent)) == {*others, writing.name}
        with write_atomically(out) as second:
            assert set(names_in(out.parent)) == {*others, writing.name, second.name}
        writing.write_bytes(b"x")
    assert set(names_in(out.parent)) == {*others, "k.npy"}
    assert out.read_bytes() == b"x"


# ---- workers ----------------------------------------------------------------------------------------------

# Each worker computes a chunk, for an hour, when its parent is killed.
SLEEPERS = """
import os, sys, time
from fastbert.encoding import workers
def asleep(self, ids, budget):
    open(os.environ["BUSY"] + "/" + str(os.getpid()), "w").close()
    time.sleep(3600)
workers.Encoder.encode_ids = asleep
if __name__ == "__main__":
    with workers.EncoderPool(2, sys.argv[1], impl="native", device="cpu") as pool:
        list(pool.encode_chunks([["a"]] * 4))
"""


# A child spends an hour importing the module of its function, as importing torch takes seconds.
IMPORTS = """
import multiprocessing, os, time
if multiprocessing.parent_process() is not None:
    open(os.environ["BUSY"] + "/" + str(os.getpid()), "w").close()
    time.sleep(3600)
def function(pipe):
    pass
"""
PARENT = """
import multiprocessing, time
if __name__ == "__main__":
    from fastbert.parent import child
    from imports import function
    for _ in range(2):
        child(function, multiprocessing.Pipe()[0]).start()
    time.sleep(3600)
"""


@pytest.mark.parametrize("main", [SLEEPERS, PARENT], ids=["at_work", "while_they_import"])
def test_workers_end_with_a_parent_that_was_killed(main, folder, tmp_path):
    """Workers computed for 20 seconds after their parent was gone, and imported torch before they noticed."""
    program, busy = tmp_path / "program.py", tmp_path / "busy"
    program.write_text(main)
    (tmp_path / "imports.py").write_text(IMPORTS)
    busy.mkdir()
    parent = subprocess.Popen([sys.executable, str(program), str(folder)], env={**os.environ, "BUSY": str(busy)})
    with parent:
        wait_for(lambda: len(names_in(busy)) == 2)
        parent.kill()
    workers = [int(name) for name in names_in(busy)]
    try:
        wait_for(lambda: not any(map(alive, workers)))
    finally:
        for worker in filter(alive, workers):
            os.kill(worker, signal.SIGKILL)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- folders ----------------------------------------------------------------------------------------------


def copy_of(folder: Path, target: Path, **config) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    data = json.loads((folder / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(data))
    return target


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 10_000_000}, "the config says num_hidden_layers 10,000,000, but the weights hold 1"),
        ({"vocab_size": 10**30}, "the config says vocab_size 1,000,000,.*but the weights hold 31"),
        ({"vocab_size": 1e30}, "vocab_size must be a positive integer, got 1e\\+30"),
        ({"intermediate_size": 10**12}, "intermediate_size 1,000,000,000,000, but the weights hold 48"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings 1,.*but the weights hold 64"),
        ({"type_vocab_size": 10**12}, "type_vocab_size 1,.*but the weights hold 2"),
        ({"hidden_size": 32 * 10**10}, "hidden_size 320,.*but the weights hold 32"),
        ({"layer_norm_eps": float("inf")}, "layer_norm_eps must be positive and finite, got inf"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps must be positive and finite, got nan"),
        ({"initializer_range": float("inf")}, "initializer_range must be 0 or more and finite"),
    ],
)
def test_sizes_that_the_weights_do_not_have(config, message, folder, tmp_path, monkeypatch):
    """fastbert built ten million layers, one by one, before it read the weights."""

    def built(*arguments, **options):
        raise AssertionError("a model was built")

    monkeypatch.setattr(BertModel, "__init__", built)
    with pytest.raises(CheckpointError, match=message):
        BertModel.from_pretrained(copy_of(folder, tmp_path / "model", **config))


@pytest.mark.parametrize("path", ["../secret", "/secret", "1_Pooling/../../secret"])
def test_modules_json_does_not_lead_out_of_its_folder(path, folder, tmp_path):
    """A downloaded folder could make fastbert read any config.json of the machine."""
    target, secret = copy_of(folder, tmp_path / "model"), tmp_path / "secret"
    secret.mkdir()
    (secret / "config.json").write_text('{"pooling_mode": "cls"}')
    path = str(secret) if path.startswith("/") else path
    modules = [{"path": "", "type": "models.Transformer"}, {"path": path, "type": "models.Pooling"}]
    (target / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match=r"modules.json: the path .*secret' leads out of the folder"):
        Encoder.from_pretrained(target, impl="native", device="cpu")


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def test_a_refused_pickle_does_not_advise_to_switch_the_safety_off(tmp_path):
    """torch's own message says: "do those steps only if you trust the source", `weights_only=False`."""
    for name, zipped in (("legacy", False), ("zipped", True)):
        (tmp_path / name).mkdir()
        torch.save({"x": Evil()}, tmp_path / name / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match=r"not a file of plain tensors \(it names posix\.system") as raised:
            load_state_dict(tmp_path / name)
        assert "weights_only" not in str(raised.value)
        assert "trust" not in str(raised.value)
