"""The command line: what it writes, in what order, with how much memory, and its messages for bad input.

A BERT of one layer with random weights encodes, through the native operators: these tests are about files.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from command_line import run
from fastbert import BertModel, Encoder
from fastbert.text.files import HEADER_BYTES, npy_header, safetensors_header
from small_bert import LETTERS, save_bert

pytestmark = pytest.mark.once

WORDS = [*LETTERS, *(f"##{c}" for c in "abcdxyz")]
WIDTH = 32
PATIENCE = 600  # seconds; a process that takes longer counts as hanging, on a busy machine too
TEXTS = ["a b c", "", "d", "abc xyz " * 7, "e f", "naïve \U0001f600 日本"]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    return save_bert(tmp_path_factory.mktemp("model"), WORDS, hidden_size=WIDTH, initializer_range=0.5)


@pytest.fixture
def options(model_folder) -> list[str]:
    """The options of every test: without them the tests' environment would choose the interpreter, which is slow."""
    return ["--model", str(model_folder), "--impl", "native", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture
def encoder(model_folder) -> Encoder:
    return Encoder.from_pretrained(model_folder, impl="native", device="cpu", dtype="float32")


@pytest.fixture
def texts_file(tmp_path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return path


def read(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r")
    if path.suffix == ".safetensors":
        return load_file(path)["embeddings"]
    rows = [json.loads(line)["embedding"] for line in path.read_text(encoding="utf-8").splitlines()]
    return np.array(rows, dtype=np.float32).reshape(len(rows), -1)


def start(*argv, before=(), **pipes) -> subprocess.Popen:
    command = [*before, sys.executable, "-m", "fastbert", *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, **pipes)


# ---- what comes out --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".jsonl"])
def test_each_line_gives_one_vector_in_order(suffix, texts_file, tmp_path, options, encoder):
    out = tmp_path / f"out{suffix}"
    assert run("encode", texts_file, "-o", out, *options) == 0
    vectors = read(out)
    assert vectors.dtype == np.float32
    # nine digits, or four bytes, restore every bit
    np.testing.assert_array_equal(vectors, encoder.encode(TEXTS).numpy())
    one_at_a_time = torch.cat([encoder.encode([text]) for text in TEXTS])
    torch.testing.assert_close(torch.from_numpy(np.array(vectors)), one_at_a_time, atol=1e-5, rtol=1e-4)


def test_order_across_chunks(tmp_path, options, encoder):
    """Lines are sorted by length within a chunk, and must be written in their original order."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = [" ".join(letters[: 1 + 7 * i % 13]) + " " + letters[i % 26] for i in range(2100)]
    source, out = tmp_path / "texts.txt", tmp_path / "out.npy"
    source.write_text("\n".join(texts), encoding="utf-8")
    assert run("encode", source, "-o", out, *options) == 0
    torch.testing.assert_close(torch.from_numpy(np.load(out)), encoder.encode(texts), atol=1e-5, rtol=1e-4)


def test_standard_input_and_output(texts_file, options, encoder, monkeypatch, capsysbinary):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(texts_file.read_bytes())))
    assert run("encode", "-", *options) == 0
    captured = capsysbinary.readouterr()
    records = [json.loads(line) for line in captured.out.splitlines()]
    assert [record["text"] for record in records] == TEXTS
    vectors = np.array([record["embedding"] for record in records], dtype=np.float32)
    np.testing.assert_array_equal(vectors, encoder.encode(TEXTS).numpy())
    assert captured.err == b"", "without a terminal there is no bar and no summary"


def test_jsonl_keeps_its_other_fields(tmp_path, options, encoder):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    records = [{"id": 7, "body": "a b"}, {"body": "é", "tags": [1, None], "embedding": "old"}]
    source.write_text("".join(json.dumps(record) + "\r\n" for record in records))
    assert run("encode", source, "--field", "body", "-o", out, *options) == 0
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{**record, "embedding": None} for record in written] == [{**r, "embedding": None} for r in records]
    np.testing.assert_array_equal(read(out), encoder.encode(["a b", "é"]).numpy())


def test_byte_order_mark_and_windows_line_ends(texts_file, tmp_path, options):
    windows = tmp_path / "windows.txt"
    windows.write_bytes(b"\xef\xbb\xbf" + texts_file.read_bytes().replace(b"\n", b"\r\n"))
    out = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    assert run("encode", texts_file, "-o", out[0], *options) == run("encode", windows, "-o", out[1], *options) == 0
    assert out[0].read_bytes() == out[1].read_bytes()  # texts too: the tokenizer itself would drop both marks


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        (["--pooling", "cls", "--normalize"], {"pooling": "cls", "normalize": True}),
        (["--pooling", "pooler"], {"pooling": "pooler"}),
        (["--pooling", "max", "--layer", "0", "--no-normalize"], {"pooling": "max", "layer": 0, "normalize": False}),
        (["--max-length", "5"], {"max_length": 5}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_reach_the_encoder(words, arguments, texts_file, tmp_path, options, model_folder):
    out = tmp_path / "out.npy"
    assert run("encode", texts_file, "-o", out, *options, *words) == 0
    encoder = Encoder.from_pretrained(model_folder, impl="native", device="cpu", dtype="float32", **arguments)
    np.testing.assert_array_equal(read(out), encoder.encode(TEXTS).numpy())


def test_batches_of_one_text(texts_file, tmp_path, options, encoder, monkeypatch):
    out = tmp_path / "out.npy"
    sizes = []
    forward = BertModel.forward
    monkeypatch.setattr(
        BertModel,
        "forward",
        lambda self, batch, **others: sizes.append(len(batch.cu_seqlens) - 1) or forward(self, batch, **others),
    )
    assert run("encode", texts_file, "-o", out, *options, "--max-tokens-per-batch", "1") == 0
    assert sizes == [1] * len(TEXTS)
    monkeypatch.undo()
    torch.testing.assert_close(torch.from_numpy(np.load(out)), encoder.encode(TEXTS), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".jsonl"])
def test_empty_file_gives_no_rows(suffix, tmp_path, options):
    source, out = tmp_path / "empty.txt", tmp_path / f"out{suffix}"
    source.touch()
    assert run("encode", source, "-o", out, *options) == 0
    if suffix == ".jsonl":
        assert out.read_bytes() == b""
    else:
        assert read(out).shape == (0, WIDTH)


def test_line_of_a_megabyte_is_cut_to_the_limit(tmp_path, options, encoder):
    source, out = tmp_path / "long.txt", tmp_path / "out.npy"
    source.write_text("a b " * 262_144 + "\n" + "c" * 1_048_576 + "\nd")
    assert run("encode", source, "-o", out, *options) == 0
    expected = encoder.encode(["a b " * 40, "[UNK]", "d"])
    torch.testing.assert_close(torch.from_numpy(np.load(out)), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("header", [npy_header, safetensors_header])
def test_the_header_fits_its_reserved_space(header):
    """The header is overwritten in the space reserved for it. The header of a gigantic matrix must still fit."""
    assert len(header(0, 1)) == len(header(10**12, 65536)) == HEADER_BYTES


def test_bar_and_summary_on_a_terminal(texts_file, tmp_path, options, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for quiet in (False, True):
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        words = ["--quiet"] if quiet else []
        assert run("encode", texts_file, "-o", tmp_path / "out.npy", *options, *words) == 0
        said = terminal.getvalue()
        assert said == "" if quiet else ("100%" in said and f"{len(TEXTS)} texts" in said and "padding" in said)


# ---- bad input -------------------------------------------------------------------------------------------


def fails(capsys, code: int, message: str, *argv) -> None:
    """Expects one line on standard error and nothing on standard output."""
    assert run(*argv) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("fastbert: error: ")
    assert message in lines[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.txt", b"fine\nb\xff\n", "in.txt, line 2: not UTF-8 (byte 0xff at position 2)"),
        ("in.txt", "a\nb\n".encode("utf-16"), "line 1: not UTF-8"),
        ("in.txt", b"a\n" * 3000 + b"\xc3\n", "line 3001: not UTF-8"),
        ("in.jsonl", b'{"text": "a"}\n{"text"', "line 2: not JSON"),
        ("in.jsonl", b'{"text": "a"}\n\n{"text": "b"}\n', "line 2: the line is empty"),
        ("in.jsonl", b"[1]\n", "line 1: expected a JSON object, got list"),
        ("in.jsonl", b'{"text": "a"}\n{"txt": "a", "n": 1}\n', "line 2: no field 'text'; it has 'txt', 'n'"),
        ("in.jsonl", b'{"text": null}\n', "line 1: field 'text' must be a string, got NoneType"),
        ("in.jsonl", b'{"text": "\\ud83d"}\n', "line 1: field 'text' has half a surrogate pair"),
        ("in.jsonl", b'{"text": ' + b"[" * 200_000 + b"\n", "line 1: not JSON"),
    ],
    ids=["utf8", "utf16", "late", "cut", "blank", "list", "field", "null", "surrogate", "deep"],
)
@pytest.mark.parametrize("suffix", [".npy", ".jsonl"])
def test_bad_lines(name, content, message, suffix, tmp_path, options, capsys):
    """The message names the line, no partial file is written, and an old file stays."""
    (tmp_path / "out").mkdir()
    source, out = tmp_path / name, tmp_path / "out" / f"out{suffix}"
    source.write_bytes(content)
    fails(capsys, 1, message, "encode", source, "-o", out, *options)
    assert list(out.parent.iterdir()) == []

    out.write_text("an older result")
    fails(capsys, 1, message, "encode", source, "-o", out, *options)
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert out.read_text() == "an older result"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "COMMAND"),
        (["encode"], "FILE"),
        (["frobnicate"], "frobnicate"),
        (["encode", "{texts}", "-o", "{folder}/out.csv"], ".npy, .safetensors, .jsonl, got"),
        (["encode", "{texts}", "--pooling", "sum"], "sum"),
        (["encode", "{texts}", "--max-tokens-per-batch", "0"], "from 1 up, got '0'"),
        (["encode", "{texts}", "--max-length", "many"], "from 1 up, got 'many'"),
        (["encode", "{texts}", "--layer", "top"], "top"),
        (["encode", "{folder}/same.jsonl", "-o", "{folder}/same.jsonl"], "same file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage(words, message, texts_file, tmp_path, capsys):
    (tmp_path / "same.jsonl").touch()
    fails(capsys, 2, message, *(word.format(texts=texts_file, folder=tmp_path) for word in words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layer", "2"], "layer must be -2 to 1"),
        (["--max-length", "65"], "max_length must be 2 to 64"),
        (["--impl", "triton"], 'impl="triton" cannot run here'),
        (["--device", "cuda"], "no CUDA device"),
        (["--model", "no-such/model"], "no-such/model"),
        (["--model", "{folder}"], "is not a model folder"),
    ],
    ids=["layer", "length", "impl", "device", "unknown", "folder"],
)
def test_impossible_options_are_refused(words, message, texts_file, tmp_path, options, capsys, monkeypatch):
    if words[0] == "--device" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    from fastbert.kernels import _device

    monkeypatch.setattr(_device, "INTERPRETING", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "out").mkdir()
    words = [word.format(folder=tmp_path / "out") for word in words]
    fails(capsys, 1, message, "encode", texts_file, "-o", tmp_path / "out" / "out.npy", *options, *words)
    assert list((tmp_path / "out").iterdir()) == []


def test_truncated_and_wrong_checkpoints(texts_file, tmp_path, options, model_folder, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(model_folder, broken)
    argv = ["encode", texts_file, *options, "--model", broken]
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()

    weights.write_bytes(whole[: len(whole) // 2])
    fails(capsys, 1, "model.safetensors is truncated", *argv)

    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    weights.write_bytes(whole)
    fails(capsys, 1, "the config says num_hidden_layers 2, but the weights hold 1", *argv)

    (broken / "config.json").write_text(json.dumps(config)[:-5])
    fails(capsys, 1, "config.json", *argv)

    weights.unlink()
    (broken / "config.json").write_text(json.dumps(config))
    fails(capsys, 1, "has no weights", *argv)


def test_unusable_files_are_reported_before_loading(texts_file, tmp_path, options, capsys, monkeypatch):
    def loaded(*args, **kwargs):
        raise AssertionError("the model was loaded before the files were opened")

    monkeypatch.setattr(Encoder, "from_pretrained", loaded)
    read_only = tmp_path / "read_only"
    read_only.mkdir(mode=0o555)
    if os.access(read_only, os.W_OK):  # root may write anywhere except to such places as /proc
        read_only = Path("/sys")
    out = tmp_path / "out.npy"
    fails(capsys, 1, "nowhere.txt: No such file", "encode", tmp_path / "nowhere.txt", "-o", out, *options)
    fails(capsys, 1, "Is a directory", "encode", tmp_path, "-o", out, *options)
    fails(capsys, 1, "no folder", "encode", texts_file, "-o", tmp_path / "nowhere" / "out.npy", *options)
    fails(capsys, 1, "cannot write", "encode", texts_file, "-o", read_only / "out.npy", *options)
    (tmp_path / "taken.npy").mkdir()
    fails(capsys, 1, "it is a folder", "encode", texts_file, "-o", tmp_path / "taken.npy", *options)
    assert not out.exists()


def test_debug_shows_the_traceback(tmp_path, options, monkeypatch):
    monkeypatch.setenv("FASTBERT_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        run("encode", tmp_path / "nowhere.txt", *options)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyError("gone"), "KeyError: 'gone' (FASTBERT_DEBUG=1 shows where)"),
        (RuntimeError("out of\n  memory\n"), "error: out of memory"),
    ],
    ids=["bug", "lines"],
)
def test_any_error_is_one_line(error, message, texts_file, options, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(Encoder, "from_pretrained", fail)
    fails(capsys, 1, message, "encode", texts_file, *options)


# ---- long input, and interrupted runs --------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npy", ".jsonl"])
def test_memory_does_not_grow_with_the_file(suffix, tmp_path, options):
    def peak(lines: int) -> int:
        source = tmp_path / f"{lines}.txt"
        source.write_text("".join(f"{'abc'[i % 3]} {'xyz'[i % 5 % 3]}\n" for i in range(lines)))
        tracemalloc.start()
        try:
            assert run("encode", source, "-o", tmp_path / f"out{suffix}", *options) == 0
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)  # imports everything
    few, many = peak(2048), peak(12 * 1024)
    assert many < 1.5 * few, f"{few:,} bytes for 2,048 lines, {many:,} for six times as many"


def wait_for_vectors(process: subprocess.Popen, folder: Path) -> None:
    """Waits until the process, whose input is still open, has written vectors into the only file of the folder."""
    deadline = time.monotonic() + PATIENCE
    while sum(path.stat().st_size for path in folder.iterdir()) <= HEADER_BYTES:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "nothing was written while the input was still open"
        time.sleep(0.02)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "terminate"])
def test_interrupted_leaves_no_file(number, code, tmp_path, options, hearing):
    process = start("encode", "-", "-o", tmp_path / "out.npy", *options, stdin=subprocess.PIPE, before=hearing)
    try:
        process.stdin.write(b"a b c\n" * 2500)  # more than two chunks without an end of input: half of the work is done
        process.stdin.flush()
        wait_for_vectors(process, tmp_path)
        assert not (tmp_path / "out.npy").exists(), "the output got its name before it was complete"
        process.send_signal(number)
        assert process.wait(timeout=PATIENCE) == code
        assert b"Traceback" not in process.stderr.read()
        assert list(tmp_path.iterdir()) == []
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("workers", [1, 2])
def test_signals_ignored_at_the_start_stay_ignored(workers, tmp_path, options):
    """As in a shell's background job, which Ctrl-C in its terminal must not end, or after `trap '' TERM`."""
    ignoring = (
        "import os, signal, sys; [signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM)]; "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    words = ["encode", "-", "-o", tmp_path / "out.npy", *options, "--workers", workers]
    pipes = {"stdin": subprocess.PIPE, "start_new_session": True}
    process = start(*words, before=[sys.executable, "-c", ignoring], **pipes)
    try:
        process.stdin.write(b"a b c\n" * 9000)
        process.stdin.flush()
        wait_for_vectors(process, tmp_path)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.killpg(process.pid, number)
        said = process.communicate(timeout=PATIENCE)[1]
        assert (process.returncode, said) == (0, b"")
        assert np.load(tmp_path / "out.npy").shape == (9000, WIDTH)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
def test_reader_that_leaves_early(tmp_path, options):
    """`fastbert encode FILE | head -n 1` ends without an error."""
    source = tmp_path / "texts.txt"
    source.write_text("a b c\n" * 3000)
    process = start("encode", source, *options, stdout=subprocess.PIPE)
    try:
        assert json.loads(process.stdout.readline())["text"] == "a b c"
        process.stdout.close()
        assert process.wait(timeout=PATIENCE) == 141
        assert process.stderr.read() == b""
    finally:
        process.kill()
        process.wait()
