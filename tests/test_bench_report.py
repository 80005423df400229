"""The report has the figures of the result files, and none for what was not measured."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.reporting import anchors as report_anchors
from benchmarks.reporting import report, results

pytestmark = pytest.mark.once

SHAPE = {"tokens": 100, "sequences": 4, "longest": 40, "hidden": 768, "heads": 12}


def row(peer: str = "fastbert", time: float = 0.1, **more) -> dict:
    """A row of a whole model on 100 tokens."""
    return {
        "suite": "encoder", "workload": "base_natural", "model": "base", "operator": None, "direction": "forward",
        "dtype": "bfloat16", "shape": SHAPE, "row": peer, "peer": peer, "version": "1", "settings": {},
        "status": "ok", "reason": None, "seconds": [time] * 3, "median_s": time, "spread": 0.02, "tokens": 100,
        "tokens_per_second": 100 / time, "flops": 1e9, "bytes": None, "tflops": 1e-3 / time, "gbs": None,
        "share_of_ceiling": 0.5, "bound_by": "matrix", "floor_s": None, "over_floor": None, "error": 1e-3,
        "budget": 2e-3, "peak_memory_bytes": None, "first_call_s": None, "energy_j": None, "ratio_to_ours": None,
        **more,
    }  # fmt: skip


def slower(peer: str, times: float, **more) -> dict:
    ratio = {"value": times, "low": 0.95 * times, "high": 1.05 * times}
    return row(peer, 0.1 * times, ratio_to_ours=ratio, **more)


def file(folder: Path, name: str, rows: list[dict], *, kind: str = "cpu", command: str = "", **more) -> None:
    device = {
        "type": kind, "name": "Toaster", "slug": "toaster", "cores": 2, "threads": 2, "memory_bytes": 2**30,
        "driver": None, "capability": None,
    }  # fmt: skip
    result = {
        "schema": results.SCHEMA, "created": "2026-01-02T00:00:00+00:00", "commit": "abc1234",
        "command": f"fastbert bench {command}", "device": device, "versions": {"torch": "2.13"}, "complete": True,
        "ceilings": {"gemm_tflops": {"bfloat16": 0.4}, "copy_gbs": 40.0}, "rows": rows, "curves": [], **more,
    }  # fmt: skip
    (folder / "toaster").mkdir(parents=True, exist_ok=True)
    (folder / "toaster" / f"{name}.json").write_text(json.dumps(result))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Makes this the folder of result files, in place of benchmarks/results."""
    monkeypatch.setattr(report, "ROOT", tmp_path)
    return tmp_path / "benchmarks" / "results"


def page_of(folder: Path) -> str:
    return report.page(results.load(folder))


def test_page_says_ahead_and_behind_and_shows_no_time_of_a_wrong_row(folder):
    none = {"seconds": None, "median_s": None, "tokens_per_second": None, "tflops": None}
    file(folder, "a", [
        row(), slower("openvino", 0.7), slower("transformers", 3.0), slower("floor", 0.5),
        row("xformers", status="wrong", reason="relative RMS error 1e-1, budget 2e-3", **none),
        row(model="large", workload="large_natural"), slower("torch", 2.0, model="large", workload="large_natural"),
    ])  # fmt: skip
    page = page_of(folder)
    assert "Of 2 timed cases" in page
    assert "ahead of the best of them in 1, level (the interval holds 1) in 0, and behind in 1:" in page
    assert "| base forward, base_natural (100 tokens), bfloat16 | encoder | openvino | 0.70x (0.66 - 0.73) |" in page
    assert "| xformers | 1 | **wrong**: relative RMS error 1e-1, budget 2e-3 |" in page
    (summary,) = re.findall(r"^\| base forward.*\| 50% of matrix .*$", page, re.MULTILINE)
    assert "| 100 ms | 1,000 |" in summary
    assert "openvino: 70 ms" in summary
    assert "| 2.00x |" in summary  # relative to the products alone


def test_full_runs_win_over_quick_ones_and_new_over_old(folder):
    file(folder, "a-whole", [row(time=0.2)])
    file(folder, "b-older", [row(time=0.4)], created="2026-01-01T00:00:00+00:00")
    quick = [row(time=0.3), row(time=0.5, workload="minilm_natural", model="minilm")]
    file(folder, "c-quick", quick, command="--quick", created="2026-01-03T00:00:00+00:00")
    (device,) = results.load(folder)
    assert {case.rows[0]["workload"]: case.ours["median_s"] for case in device.cases} == {
        "base_natural": 0.2, "minilm_natural": 0.5,
    }  # fmt: skip


def test_an_interrupted_case_hides_no_other_case(folder):
    file(folder, "a", [row(time=0.2)])
    none = {"seconds": None, "median_s": None, "status": "skipped", "reason": "interrupted"}
    file(folder, "b", [row(**none), row("torch", **none)], created="2026-01-03T00:00:00+00:00", complete=False)
    (device,) = results.load(folder)
    assert [case.ours["median_s"] for case in device.cases] == [0.2]


def test_a_row_with_a_tolerance_of_its_own_is_shown_and_does_not_count(folder):
    int8 = slower("onnxruntime", 0.5, settings={"tolerance": 0.1}) | {"row": "onnxruntime int8"}
    file(folder, "a", [row(), int8, slower("openvino", 1.5)])
    page = page_of(folder)
    assert "ahead of the best of them in 1," in page
    assert "| onnxruntime int8 | 1 | 50 ms" in page


def test_one_file_cut_short_says_so(folder):
    file(folder, "a", [row()], complete=False)
    assert "1, **cut short: not every case was measured**" in page_of(folder)


def test_memory_first_results_and_slopes_have_their_tables(folder):
    nothing = {"suite": "memory", "seconds": None, "median_s": None, "tokens_per_second": None}

    def memory(peer: str, loaded: int, work: int) -> dict:
        held = {"loaded_bytes": loaded * 2**20, "process_bytes": (loaded + work) * 2**20}
        return row(peer, **nothing, peak_memory_bytes=work * 2**20, settings=held)

    cold = {"suite": "cold", "direction": "first result", "settings": {"import_s": 1.0, "load_s": 0.5, "first_s": 0.02}}
    curve = {
        "name": "tokens", "row": "fastbert", "dtype": "bfloat16", "model": "base", "x": [16, 64],
        "y_seconds": [0.01, 0.03], "x_label": "tokens", "slope": 0.79, "slope_low": 0.7, "slope_high": 0.9,
        "complete": False, "cut": "to 64 of 65,536: a CPU",
    }  # fmt: skip
    file(folder, "a", [
        memory("fastbert", 80, 20), memory("torch", 90, 50),
        row(**{**cold, "median_s": 1.52, "seconds": [1.52]}),
        row(suite="scaling"),
    ], curves=[curve])  # fmt: skip
    page = page_of(folder)
    assert "| torch | 50 MiB | 140 MiB | 2.50x |" in page
    assert "| fastbert | 1.52 s | 1.00 s | 500 ms | 20 ms |" in page
    assert "| fastbert | 2, 16 to 64 | 10 ms to 30 ms | 0.79 (0.70 - 0.90) | to 64 of 65,536: a CPU |" in page


def test_energy_and_memory_of_a_gpu_are_shown(folder):
    file(folder, "a", [row(energy_j=0.2, peak_memory_bytes=3 * 2**20)], kind="cuda")
    page = page_of(folder)
    assert "| peak memory | mJ a token |" in page
    assert "| 3 MiB | 2 |" in page
    assert "## NVIDIA GPUs" not in page


# ---- published figures -----------------------------------------------------------------------------------


def attention(tflops: float, length: int = 512, direction: str = "forward", **more) -> dict:
    shape = {**SHAPE, "tokens": 32 * length, "sequences": 32, "longest": length}
    return row(suite="kernels", operator="attention", direction=direction, shape=shape, tflops=tflops, **more)


def ours_of(rows: list[dict]) -> dict[str, str]:
    found = report_anchors.rows(("NVIDIA H200", r) for r in rows)
    return {figure: ours for _, figure, _, _, ours in found}


def test_published_figures_are_not_measured_without_a_gpu(folder):
    file(folder, "a", [attention(0.1)])
    page = page_of(folder)
    assert "## NVIDIA GPUs\n\nnot measured" in page
    table = page[page.index("## Published elsewhere") :]
    for figure in ("7,994 samples/s", "996 sequences/s", *(f"{n} TFLOP/s" for n in (333, 392, 476, 215, 254, 296))):
        (line,) = re.findall(rf"^.*{figure}.*$", table, re.MULTILINE)
        assert line.endswith("| not measured |")


def test_published_figures_have_our_share_where_a_gpu_was_measured():
    training = row(suite="training", model="large", direction="step", tokens_per_second=996 * 512 / 2)
    ours = ours_of([attention(333.0), attention(300.0), attention(107.5, direction="forward+backward"), training])
    assert ours["333 TFLOP/s"] == "NVIDIA H200: 333 (100%)"  # the better of two
    assert ours["215 TFLOP/s"] == "NVIDIA H200: 108 (50%)"
    assert ours["996 sequences/s a GPU"] == "NVIDIA H200: 498 (50%)"
    assert ours["392 TFLOP/s"] == ours["7,994 samples/s a GPU"] == "not measured"


@pytest.mark.parametrize(
    "other",
    [
        attention(999.0, dtype="float32"),
        attention(999.0) | {"shape": {**attention(1.0)["shape"], "dropout_p": 0.1}},
        attention(999.0) | {"shape": {**attention(1.0)["shape"], "heads": 24}},
        attention(999.0) | {"shape": {**attention(1.0)["shape"], "tokens": 1000}},
        attention(999.0) | {"suite": "scaling"},
    ],
    ids=["float32", "dropout", "head_dim 32", "uneven lengths", "another suite"],
)
def test_published_figures_are_compared_with_the_same_work_only(other):
    assert set(ours_of([other]).values()) == {"not measured"}


# ---- what is committed -----------------------------------------------------------------------------------


def test_every_page_with_figures_is_that_of_the_committed_files(capsys):
    """So no number on these pages is typed by hand."""
    assert report.main(["--check"]) == 0, capsys.readouterr().err


def test_committed_files_follow_the_schema_and_every_picture_exists():
    from benchmarks.harness import schema

    for device in results.load():
        for result in device.results:
            assert schema.problems({k: v for k, v in result.items() if k != "path"}) == [], result["path"]
    text = (report.ROOT / "benchmarks" / "REPORT.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert shown
    for name in shown:
        assert (report.ROOT / "benchmarks" / name).is_file(), name


def test_pictures_are_drawn_of_the_rows_that_exist(folder):
    """Without rows of ours, with one point of a curve, or with no point, there is one picture less and no error."""
    pytest.importorskip("matplotlib", reason="draws")
    from benchmarks.reporting import plots as report_plots

    file(folder, "a", [row(), slower("openvino", 0.7), row("torch", suite="latency")])
    (device,) = results.load(folder)
    report_plots.draw(device)
    assert sorted(p.name for p in device.folder.glob("*.png")) == [
        "picture-encoder-bars.png", "picture-encoder-ratios.png",
    ]  # fmt: skip
    assert all(p.stat().st_size > 5000 for p in device.folder.glob("*.png"))
