"""Suites whose rows are fresh processes, and curves: wrong rows show no figures, the others show true ones."""

import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import run
from benchmarks.harness import case, child_tools, children, compare, schema, timing, workloads
from benchmarks.harness.case import Row
from benchmarks.harness.children import ChildCase, Files, Launch
from benchmarks.harness.jobs import Job
from benchmarks.suites import memory as suite_memory
from benchmarks.suites import scaling as suite_scaling
from fastbert.testing import MODELS, Workload

pytestmark = pytest.mark.once

CPU = torch.device("cpu")
TINY = Workload(MODELS["tiny"], (5, 17, 1))
TINY_JOB = Job(TINY, torch.float32, CPU)
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from /proc")

STUB = """
import json, sys, time
import numpy as np
job = json.loads(sys.stdin.readline())
print("a library's own words")
print(json.dumps({"event": "imported"}), flush=True)
time.sleep(job["sleep"])
print(json.dumps({"event": "loaded"}), flush=True)
print(json.dumps({"event": "first"}), flush=True)
if job["value"] is None:
    print("what the matter was", file=sys.stderr)
    sys.exit(3)
np.save(job["out"], np.full(100, job["value"], dtype=np.float32))
"""


def stub_case(folder, **rows) -> ChildCase:
    """A case of processes that sleep and return a value 100 times; the correct value is 1."""
    from benchmarks.suites.cold import finish

    (folder / "stub.py").write_text(STUB)
    files = Files(TINY_JOB)

    def make(sleep, value):
        job = {"sleep": sleep, "value": value, "environment": {"PYTHONPATH": str(folder)}}
        return Launch(files, lambda: [dict(job)], "stub")

    ones = torch.ones(100)
    own = {"tolerance": 0.1}
    made = [Row(name, name, lambda given=given: make(*given), settings=own) for name, given in rows.items()]
    return ChildCase(
        "cold", "tiny", made, lambda: [ones.double()], lambda: [ones],
        files=files, finish=finish, runs=(3, 3), warm=True,
    )  # fmt: skip


def test_processes_are_checked_and_timed_from_their_start(tmp_path):
    case = stub_case(tmp_path, fastbert=(0.0, 1.0), slow=(0.6, 1.0), wrong=(0.0, 1.01), broken=(0.0, None))
    rows = {r["row"]: r for r in case.measured(CPU, timing.QUICK, {})}
    assert {name: r["status"] for name, r in rows.items()} == {
        "fastbert": "ok", "slow": "ok", "wrong": "wrong", "broken": "failed",
    }  # fmt: skip
    assert rows["broken"]["reason"] == "RuntimeError: what the matter was"
    assert rows["wrong"]["first_call_s"] is None
    assert rows["wrong"]["seconds"] is None
    slow, ours = rows["slow"], rows["fastbert"]
    assert len(slow["seconds"]) == 3  # the first run was the warm-up
    assert slow["first_call_s"] >= 0.6
    assert ours["first_call_s"] > 0
    assert slow["settings"]["tolerance"] == 0.1  # the row's own settings stay: the report tells rows apart by them
    assert 0 < slow["settings"]["load_s"] < slow["first_call_s"]
    assert slow["ratio_to_ours"]["value"] == pytest.approx(slow["median_s"] / ours["median_s"])
    assert "folder" not in vars(case.files)  # removed after the case


def test_a_cold_start_is_divided_by_its_events():
    from benchmarks.suites.cold import finish

    said = [{"imported": {"at": 1.0 + n}, "loaded": {"at": 1.5 + n}, "first": {"at": 3.5 + n}} for n in (0.2, 0.0, 0.1)]
    result = {"settings": {"tolerance": 0.1}}
    finish(result, said)
    assert (result["first_call_s"], result["median_s"]) == pytest.approx((3.6, 3.6))
    expected = {"tolerance": 0.1, "import_s": 1.1, "load_s": 0.5, "first_s": 2.0}
    assert result["settings"] == pytest.approx(expected)


@pytest.mark.parametrize(("times", "known"), [(2, False), (3, True)])
def test_a_ratio_of_too_few_times_is_not_given(times, known):
    """The interval of one run each has no width, which would look like certainty."""
    facts = {"ratio_to_ours": None, "floor_s": None}
    seconds = {"a": [1.0] * times, "b": [2.0] * times}
    rows = {name: {"peer": name, "seconds": s, "median_s": s[0], **facts} for name, s in seconds.items()}
    rows["a"]["peer"] = "fastbert"
    case._compare_rows(rows, types.SimpleNamespace(floor=None))
    assert (rows["b"]["ratio_to_ours"] is not None) == known


def test_a_killed_process_and_no_process_are_failures():
    with pytest.raises(RuntimeError, match="No module named"):
        children.run("benchmarks.nowhere", [{}])


WAITER = """
import json, os, sys, time
job = json.loads(sys.stdin.readline())
print(json.dumps({"event": "here", "pid": os.getpid()}), flush=True)
if job["does"] == "waits":
    time.sleep(100)
elif job["does"] == "is killed":
    os.kill(os.getpid(), 9)
elif job["does"] == "fails":
    sys.exit("what the matter was")
"""


@pytest.mark.parametrize(
    ("does", "said"),
    [(("waits", "fails"), "what the matter was"), (("waits", "is killed"), "killed by signal 9"),
     (("ends", "waits"), "not done after 5 s")],
)  # fmt: skip
def test_a_failing_process_ends_those_that_wait_for_it(does, said, tmp_path, monkeypatch):
    (tmp_path / "waiter.py").write_text(WAITER)
    monkeypatch.setattr(children, "PATIENCE", 5 if "5 s" in said else 30)
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    with pytest.raises(RuntimeError, match=said):
        children.run("waiter", [{"does": what, "environment": {"PYTHONPATH": str(tmp_path)}} for what in does])
    assert [child.poll() is not None for child in started] == [True, True]


@linux
def test_the_memory_meter_can_be_reset():
    """200 MB are used before the reset, 50 MB after it."""
    memory = child_tools.Memory("cpu")
    before = np.ones(25_000_000)
    del before
    memory.reset()
    held = memory.now()
    work = np.ones(6_250_000)
    del work
    assert 48e6 < memory.peak() - held < 60e6


@linux
def test_encoders_in_processes_agree_and_are_metered():
    case = suite_memory._encode("tiny_natural", TINY_JOB, 1, True)
    rows = case.measured(CPU, timing.QUICK, {}, peers=lambda r: r.peer in ("fastbert", "transformers"), quick=True)
    assert [r["status"] for r in rows] == ["ok", "ok"], [r["reason"] for r in rows]
    for row in rows:
        assert row["peak_memory_bytes"] >= 0
        assert 50e6 < row["settings"]["loaded_bytes"] <= row["settings"]["process_bytes"] < 2e9
        assert row["median_s"] is None


@linux
def test_the_loss_is_metered_beside_plain_torch():
    """Plain torch holds all logits (139 MB) more than once; fastbert holds a quarter of them at a time."""
    tokens, shape = 4096, MODELS["tiny"]
    shape = type(shape)(shape.hidden, shape.heads, shape.intermediate, shape.layers, vocab=8500)
    case = suite_memory._loss(shape, "tiny", tokens, 1, Job(Workload(shape, (tokens,)), torch.float32, CPU))
    ours, theirs = case.measured(CPU, timing.QUICK, {}, quick=True)
    assert (ours["status"], theirs["status"]) == ("ok", "ok"), (ours["reason"], theirs["reason"])
    assert theirs["peak_memory_bytes"] > 2 * 4 * tokens * 8500
    assert ours["peak_memory_bytes"] < 0.5 * theirs["peak_memory_bytes"]


def test_two_processes_take_the_step_of_one():
    """Their gradient is that of the whole batch, compared with the truth against which the rows are checked."""
    pytest.importorskip("transformers", reason="trains its model")
    case = suite_scaling._processes("tiny", 2, 4, 16, torch.float32, CPU)
    (row,) = case.measured(CPU, timing.QUICK, {}, peers=lambda r: r.peer == "fastbert", quick=True)
    assert row["status"] == "ok", row["reason"]
    assert len(row["seconds"]) == 5
    assert row["shape"]["processes"] == 2


# ---- curves ----------------------------------------------------------------------------------------------


def scaling_row(workload: str, seconds: float, **shape) -> dict:
    return {
        "suite": "scaling", "status": "ok", "workload": workload, "row": "fastbert", "dtype": "float32",
        "model": "tiny", "shape": shape, "seconds": [seconds] * 3, "median_s": seconds,
    }  # fmt: skip


def test_curves_are_fitted_through_the_points_that_were_measured():
    rows = [scaling_row(f"tiny_length_{n}", 1e-6 * n**2, longest=n, tokens=n) for n in (1024, 128, 256, 512)]
    rows += [scaling_row(f"tiny_tokens_{n}", 1e-3 * n, tokens=n, longest=5) for n in (16, 64)]
    rows.append({**scaling_row("tiny_tokens_256", 1.0, tokens=256, longest=5), "status": "wrong"})
    length, tokens = suite_scaling.curves(rows, CPU, quick=True)
    assert (length["name"], length["x"], length["complete"]) == ("sequence length", [128, 256, 512, 1024], True)
    assert [length[k] for k in ("slope", "slope_low", "slope_high")] == pytest.approx([2.0, 2.0, 2.0])
    assert length["cut"] == "to 1,024 of 16,384: a CPU, --quick"
    assert (tokens["name"], tokens["slope"], tokens["complete"]) == ("tokens", pytest.approx(1.0), False)


def test_the_interval_of_a_slope_is_wide_if_the_curve_bends_or_times_scatter():
    x = [1.0, 2.0, 4.0, 8.0]
    straight = timing.bootstrap_slope(x, [[v] * 5 for v in x])
    assert straight["slope_low"] == pytest.approx(straight["slope_high"]) == pytest.approx(1.0)
    bent = timing.bootstrap_slope(x, [[v] * 5 for v in (1.0, 1.0, 2.0, 8.0)])
    assert bent["slope_low"] < bent["slope"] - 0.2
    assert bent["slope_high"] > bent["slope"] + 0.2
    two = timing.bootstrap_slope([1.0, 2.0], [[1.0, 1.1, 0.9], [2.0, 2.2, 1.8]])
    assert two["slope"] == pytest.approx(1.0)
    assert two["slope_low"] < 1 < two["slope_high"]
    assert timing.bootstrap_slope([1.0], [[1.0]]) == dict.fromkeys(("slope", "slope_low", "slope_high"))


@pytest.mark.parametrize("share", suite_scaling.POINTS["padding share"])
def test_padding_grows_while_real_tokens_stay_the_same(share):
    lengths = suite_scaling.padded_share(2048, 128, share)
    assert sum(lengths) == 2048
    assert max(lengths) == 128
    assert 1 - 2048 / (128 * len(lengths)) == pytest.approx(share, abs=0.01)


def test_cut_lists_say_why(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert suite_scaling.points("processes", CPU, False) == ((1, 2), "to 2 of 8: 2 cores here")
    assert suite_scaling.points("sequence length", torch.device("cuda"), True)[0][-1] == 16384
    names = [case.workload for case in suite_scaling.cases(CPU, torch.float32, True)]
    assert "minilm_tokens_1024" in names
    assert not any("processes" in name for name in names)


def test_curves_are_written_into_the_result_file(tmp_path, monkeypatch, capsys):
    def tiny(*_):
        for tokens in (5, 22):
            workload = workloads.cut(TINY, tokens)
            job = Job(workload, torch.float32, CPU)
            yield suite_scaling._encoder(f"tiny_tokens_{tokens}", workload, suite_scaling._rows(job), 1, job)

    monkeypatch.setattr(suite_scaling, "cases", tiny)
    monkeypatch.setattr(
        "benchmarks.harness.machine.ceilings", lambda *_: {"gemm_tflops": {"float32": 0.1}, "copy_gbs": 10.0}
    )
    out = tmp_path / "r.json"
    arguments = "--suite scaling --quick --dtype float32 --device cpu --peers transformers --out".split()
    assert run.main([*arguments, str(out)]) == 0
    results = json.loads(out.read_text())
    assert schema.problems(results) == []
    assert [c["row"] for c in results["curves"]][:2] == ["fastbert", "transformers sdpa, sorted, batches of 2"]
    assert all(c["x"] == [5, 22] and c["slope_low"] <= c["slope"] <= c["slope_high"] for c in results["curves"])
    assert "tokens: fastbert, slope" in capsys.readouterr().err


# ---- memory and energy -----------------------------------------------------------------------------------


def test_compare_reports_growing_memory():
    row = {
        "suite": "memory", "workload": "w", "model": "tiny", "operator": None, "direction": "step", "dtype": "float32",
        "row": "fastbert", "peer": "fastbert", "shape": {}, "status": "ok", "seconds": None, "peak_memory_bytes": 1000,
    }  # fmt: skip
    verdicts = [
        compare.changes({"rows": [row]}, {"rows": [{**row, "peak_memory_bytes": n}]})[0]["verdict"]
        for n in (1050, 1200, 800)
    ]
    assert verdicts == ["same", "slower", "faster"]


def test_energy_is_what_nvml_counts_or_nothing(monkeypatch):
    counter = iter((5_000, 12_500))  # millijoules
    fake = types.SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counter),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(timing, "_uuid", lambda device: "GPU-1")
    monkeypatch.setattr(timing, "synchronise", lambda device: None)
    with timing.energy(torch.device("cuda")) as reading:
        pass
    assert reading == {"joules": 7.5}
    with timing.energy(CPU) as reading:
        pass
    assert reading == {}
