"""The report contains exactly what the result files contain; the scripts around it work together."""

import copy
import json
from pathlib import Path

import pytest

from benchmarks.reporting import report, results
from benchmarks.reporting import texts as report_encode
from benchmarks.reporting.cells import with_block

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]


def row(name: str, peer: str, seconds: float | None, **more) -> dict:
    """A row with made-up figures."""
    empty = dict.fromkeys(
        (
            "reason",
            "ratio_to_ours",
            "tokens_per_second",
            "tflops",
            "gbs",
            "error",
            "spread",
            "version",
            "share_of_ceiling",
            "peak_memory_bytes",
            "energy_j",
        )
    )
    ratio = None if peer == "fastbert" or seconds is None else {"value": seconds / 0.5, "low": 1.9, "high": 2.1}
    return empty | {
        "suite": "encoder", "workload": "invented_natural", "model": "base", "operator": None, "direction": "forward",
        "dtype": "bfloat16", "shape": {}, "row": name, "peer": peer, "tokens": 1000, "median_s": seconds,
        "status": "ok" if seconds else "wrong", "spread": 0.02, "ratio_to_ours": ratio,
        "tokens_per_second": 1000 / seconds if seconds else None,
    } | more  # fmt: skip


@pytest.fixture
def result() -> dict:
    return {
        "path": results.RESULTS / "invented" / "file.json", "created": "2026-01-01T00:00:00+00:00", "commit": "abc",
        "command": "fastbert bench", "complete": True, "versions": {"torch": "2.13"},
        "device": {"type": "cpu", "name": "A CPU", "cores": 2, "threads": 2, "driver": None, "memory_bytes": 2**34},
        "ceilings": {"gemm_tflops": {"bfloat16": 1.0}, "copy_gbs": 30.0},
        "rows": [
            row("fastbert", "fastbert", 0.5),
            row("slow one", "slow", 2.0),
            row("next best", "next", 1.0),
            row("the floor", "floor", 0.25),
            row("liar", "liar", None, reason="relative RMS error 1e-1, budget 1e-2"),
        ],
    }  # fmt: skip


def device(*files: dict) -> results.Device:
    return results.Device("invented", list(files))


def test_the_page_names_the_best_of_the_others_and_the_floor(result):
    page = report.page([device(result)])
    (line,) = [line for line in page.splitlines() if line.startswith("| base forward, invented_natural (1,000 tokens)")]
    assert "| 500 ms | 2,000 | next best: 1 s" in line.replace("1.00 s", "1 s")
    assert "2.00x (1.90 - 2.10)" in line
    assert line.rstrip(" |").endswith("2.00x")  # relative to the floor
    assert "**wrong**: relative RMS error 1e-1" in page
    assert "NVIDIA GPUs\n\nnot measured" in page


def test_a_run_that_was_cut_short_is_marked(result):
    result["complete"] = False
    assert "cut short" in report.page([device(result)])


def test_only_the_table_of_whole_models_is_replaced(result):
    page = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    new = with_block(page, report.whole_models([device(result)]))
    assert new.startswith("before\n")
    assert new.endswith("after\n")
    assert "old" not in new
    assert "next best: 1,000" in new
    for incomplete in ("no markers", f"{report.BEGIN}\n", f"{report.END}\n"):
        with pytest.raises(ValueError, match="bench: begin"):
            with_block(incomplete, report.whole_models([device(result)]))


def test_the_table_of_encoders(tmp_path):
    def of(dtype, ours, correct):
        rows = [("theirs in arrival order", 10.0, True), ("theirs, sorted", 40.0, correct), ("fastbert", ours, True)]
        rows = [{"row": name, "tokens_per_second": speed, "correct": right} for name, speed, right in rows]
        device = {"name": "CPU", "cores": 2}
        return {"texts": 5, "dtype": dtype, "device": device, "versions": {"torch": "2"}, "rows": rows}

    (tmp_path / "cpu").mkdir()
    for dtype, result in (("float32", of("float32", 30.0, False)), ("bfloat16", of("bfloat16", 60.0, True))):
        (tmp_path / "cpu" / f"encode-{dtype}.json").write_text(json.dumps(result))
    text = report_encode.block(tmp_path)
    assert "| theirs, sorted | 40 | not measured |" in text
    assert "| **fastbert** | **60** | **30** |" in text
    assert "| fastbert against arrival order | 6.00x | 3.00x |" in text
    assert "| fastbert against the best of the others | 1.50x | 3.00x |" in text
    page = f"a\n{report_encode.BEGIN}\nold\n{report_encode.END}\nb\n"
    assert with_block(page, text) == f"a\n{text}\nb\n"
    assert "not measured" in report_encode.block(tmp_path / "cpu")


def test_a_case_without_our_measurement_has_no_figure(result):
    result["rows"] = [r for r in copy.deepcopy(result["rows"]) if r["peer"] != "fastbert"]
    assert "not measured" in report.page([device(result)])
    assert "not measured" in report.whole_models([device(result)])


def test_pictures(result, tmp_path):
    pytest.importorskip("matplotlib", reason="draws pictures")
    from benchmarks.reporting import plots as report_plots

    result |= {"path": tmp_path / "file.json", "curves": []}
    operator = {"operator": "attention", "suite": "kernels", "flops": 1e9, "bytes": 1e6, "tflops": 0.5}
    result["rows"].append(row("fastbert", "fastbert", 0.5, **operator))
    report_plots.draw(device(result))
    names = {"bars": "encoder-bars", "ratios": "encoder-ratios", "kernels": "kernels-ratios", "roofline": "roofline"}
    assert {path.name for path in tmp_path.iterdir()} == {f"picture-{name}.png" for name in names.values()}
