"""The benchmark suite: a wrong row has no time, a slow row has its true ratio, and files follow the schema."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import run
from benchmarks.harness import compare, schema, timing, workloads
from benchmarks.harness.case import Case, Missing, Row, measure
from benchmarks.harness.jobs import Job
from benchmarks.harness.peer import OperatorPeer
from benchmarks.peers import torch as peers_torch
from benchmarks.suites import encoder as suite_encoder
from benchmarks.suites import kernels as suite_kernels
from benchmarks.suites import training as suite_training
from fastbert import functional as F
from fastbert.testing import MODELS, WORKLOADS, Workload, real_lengths, relative_rms

pytestmark = pytest.mark.once

CPU = torch.device("cpu")
CEILINGS = {"gemm_tflops": {"float32": 0.1}, "copy_gbs": 10.0}
EFFORT = timing.Effort(warm_ups=1, least=5, most=5, seconds=0.1)
TINY = Workload(MODELS["tiny"], (5, 17, 1))


def of_rows(*rows: Row, dtype=torch.float32) -> Case:
    """A case whose correct result is 1000 ones."""
    ones = torch.ones(1000)
    return Case("kernels", "base_natural", rows, lambda: [ones.double()], lambda: [ones], dtype=dtype, tokens=10)


def sleeper(seconds: float):
    def run():
        timing.time.sleep(seconds)
        return torch.ones(1000)

    return lambda: run


def measured(case: Case, **options) -> dict[str, dict]:
    return {r["row"]: r for r in measure(case, CPU, EFFORT, CEILINGS, **options)}


def op_case(op: str, direction: str, *extra: OperatorPeer) -> Case:
    return suite_kernels.build(
        op, direction, "base_natural", 1, True, {}, device=CPU, dtype=torch.float32, workload=TINY, extra=extra
    )


@pytest.mark.parametrize("direction", [suite_kernels.FORWARD, suite_kernels.BOTH])
def test_wrong_kernel_shows_wrong_and_no_time(direction):
    """Wrong by 1%: far more than float32's error, but too little to see in a printed number."""
    off = OperatorPeer("off", "off", lambda device: lambda **kw: F.add_layer_norm(impl="native", **kw) * 1.01)
    rows = {r["row"]: r for r in measure(op_case("add_layer_norm", direction, off), CPU, EFFORT, CEILINGS, quick=True)}
    assert rows["fastbert"]["status"] == "ok"
    assert rows["torch"]["status"] == "ok"
    assert rows["off"]["status"] == "wrong"
    assert "budget" in rows["off"]["reason"]
    assert rows["off"]["median_s"] is None
    assert rows["off"]["seconds"] is None
    assert rows["off"]["ratio_to_ours"] is None


def test_wrong_gradient_shows_wrong():
    """The output is right, and one gradient is doubled."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return 2 * dy

    def doubled(device):
        return lambda *, x, **kw: F.add_layer_norm(Doubled.apply(x), impl="native", **kw)

    case = op_case("add_layer_norm", suite_kernels.BOTH, OperatorPeer("doubled", "doubled", doubled))
    assert measured(case, quick=True)["doubled"]["status"] == "wrong"


def test_slow_row_shows_its_true_ratio(watch):
    rows = measured(of_rows(Row("fastbert", "fastbert", sleeper(0.04)), Row("slow", "slow", sleeper(0.12))))
    ratio = rows["slow"]["ratio_to_ours"]
    assert 2.5 < ratio["value"] < 3.3
    assert ratio["low"] <= ratio["value"] <= ratio["high"]
    assert rows["fastbert"]["ratio_to_ours"] is None
    assert rows["slow"]["tokens_per_second"] == pytest.approx(10 / rows["slow"]["median_s"])


def test_a_failing_row_does_not_affect_the_others():
    def missing():
        raise Missing("it is not installed")

    def late():
        def run():
            raise RuntimeError("no\nkernel image")

        return run

    rows = measured(
        of_rows(
            Row("fastbert", "fastbert", sleeper(0.0)), Row("gone", "gone", missing), Row("broken", "broken", late),
            Row("shape", "shape", lambda: lambda: torch.ones(3)),
            Row("nan", "nan", lambda: lambda: torch.full((1000,), torch.nan)),
        )
    )  # fmt: skip
    assert (rows["gone"]["status"], rows["gone"]["reason"]) == ("missing", "it is not installed")
    assert (rows["broken"]["status"], rows["broken"]["reason"]) == ("failed", "RuntimeError: no kernel image")
    assert rows["shape"]["status"] == "failed"
    assert rows["nan"]["status"] == "wrong"
    assert rows["fastbert"]["status"] == "ok"
    json.dumps(list(rows.values()), allow_nan=False)


def test_a_compiled_row_never_runs_uncompiled():
    """After too many shapes torch.compile runs code uncompiled, which no row may do. Each case has its own count."""

    def of_sizes(name: str, sizes: range):
        compiled = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)

        def run():
            for n in sizes:
                compiled(torch.ones(n))
            return torch.ones(1000)

        return Row(name, "torch.compile", lambda: run, package="torch")

    for sizes in (range(2, 8), range(8, 14)):
        rows = measured(of_rows(of_sizes("few shapes", sizes)))
        assert rows["few shapes"]["status"] == "ok", rows["few shapes"]["reason"]
    rows = measured(of_rows(of_sizes("many shapes", range(2, 14))))
    assert rows["many shapes"]["status"] == "failed"
    assert rows["many shapes"]["status"] == "failed"
    assert "recompile_limit" in rows["many shapes"]["reason"]


@pytest.mark.parametrize("op", ["attention", "feed_forward", "linear_cross_entropy", "embedding_layer_norm", "pool"])
def test_operators_and_their_peers_agree(op):
    """Every row that runs here gives the same results, gradients included."""
    case = op_case(op, suite_kernels.FORWARD if op == "pool" else suite_kernels.BOTH)
    rows = measured(case, peers=lambda row: row.row != "torch.compile")
    assert len(rows) > 1
    assert {r["status"] for r in rows.values()} == {"ok"}, {n: r["reason"] for n, r in rows.items()}


def test_whole_encoders_agree_and_name_the_floor():
    """Every installed encoder gives the vectors of plain torch. The floor is a row of its own."""
    case = suite_encoder.build("encoder", "base_natural", TINY, 1, True, device=CPU, dtype=torch.float32)
    rows = measured(case, quick=True, peers=lambda row: row.peer in ("fastbert", "floor", "transformers", "torch"))
    assert {r["status"] for r in rows.values()} == {"ok"}, {n: r["reason"] for n, r in rows.items()}
    assert len(rows) >= 5
    job = Job(TINY, torch.float32, CPU)
    plain = peers_torch.plain(32)(job)  # a row for GPUs, which runs anywhere
    assert relative_rms(plain(), job.truth(torch.float64)[0]) < 1e-5
    assert rows["fastbert"]["over_floor"] == pytest.approx(rows["fastbert"]["median_s"] / rows["fastbert"]["floor_s"])


def test_training_steps_agree_with_and_without_transformers(monkeypatch):
    """All start from the same weights, so that all can be compared by one vector of every parameter's gradient."""
    monkeypatch.setitem(WORKLOADS, "minilm_natural", TINY)
    monkeypatch.setattr(suite_training, "CASES", (("minilm_natural", 1, True),))
    (case,) = suite_training.cases(CPU, torch.float32, True)
    rows = measured(case, quick=True)
    ours = {"fastbert.accelerate", "fastbert, packed"}
    assert {r["status"] for r in rows.values()} == {"ok"}, {n: r["reason"] for n, r in rows.items()}
    assert {*ours, "transformers sdpa", "plain torch sdpa", "matrix products alone"} <= {*rows}
    assert rows["fastbert, packed"]["floor_s"] == rows["matrix products alone"]["median_s"]
    assert {r["row"] for r in rows.values() if r["ratio_to_ours"]} >= {"fastbert, packed", "plain torch sdpa"}


def test_a_rounded_sum_over_all_tokens_is_no_error_of_a_peer(monkeypatch):
    """transformers' step in bfloat16 was "wrong": torch adds up the gradient of the table of token types, which has a
    summand for every token, in bfloat16, and the plain code that sets the budget looked no types up."""
    monkeypatch.setitem(WORKLOADS, "minilm_natural", Workload(MODELS["tiny"], (400, 500, 500, 600)))
    monkeypatch.setattr(suite_training, "CASES", (("minilm_natural", 1, True),))
    (case,) = suite_training.cases(CPU, torch.bfloat16, True)
    rows = {row.row: row for row in case.rows if row.row in ("transformers sdpa", "fastbert, packed")}
    truth = case.truth()
    budgets = [2 * relative_rms(plain, exact) for plain, exact in zip(case.plain(), truth, strict=True)]
    for name, row in rows.items():
        found = row.outputs(row.make()())
        for gradient, exact, budget in zip(found, truth, budgets, strict=True):
            assert relative_rms(gradient, exact) <= budget, name
    assert budgets[0] < 0.1, "the other gradients have a budget of their own"


def test_a_wrong_head_is_a_wrong_step(monkeypatch):
    monkeypatch.setitem(WORKLOADS, "minilm_natural", TINY)
    monkeypatch.setattr(suite_training, "CASES", (("minilm_natural", 1, True),))
    right = F.linear_cross_entropy
    monkeypatch.setattr(F, "linear_cross_entropy", lambda x, w, *rest: right(x, w * 1.01, *rest))
    (case,) = suite_training.cases(CPU, torch.float32, True)
    rows = measured(case, quick=True, peers=lambda row: row.row in ("fastbert, packed", "plain torch sdpa"))
    assert {name: r["status"] for name, r in rows.items()} == {"fastbert, packed": "wrong", "plain torch sdpa": "ok"}


def result_file(seconds: list[float]) -> dict:
    times = iter(seconds)

    def run():
        timing.time.sleep(next(times, 0.01))
        return torch.ones(1000)

    rows = measure(of_rows(Row("fastbert", "fastbert", lambda: run)), CPU, EFFORT, CEILINGS)
    return {"device": {"name": "this"}, "rows": rows}


def test_compare_flags_a_regression_and_not_noise(watch):
    noisy = [0.03, 0.03, 0.030, 0.0312, 0.0288, 0.0306, 0.0297]  # long enough that the noise of a busy machine is small
    old, again, slower = result_file(noisy), result_file(noisy[::-1]), result_file([t + 0.015 for t in noisy])
    assert [c["verdict"] for c in compare.changes(old, again)] == ["same"]
    assert [c["verdict"] for c in compare.changes(old, slower)] == ["slower"]
    assert [c["verdict"] for c in compare.changes(slower, old)] == ["faster"]
    assert compare.report(old, slower, lambda line: None) == 1
    assert compare.report({**old, "device": {"name": "other"}}, slower, lambda line: None) == 0


def test_bootstrap_interval_contains_the_ratio_and_few_times_widen_it():
    a, b = [2.0, 2.1, 1.9, 2.0, 2.2, 2.0], [1.0, 1.1, 0.9, 1.0, 1.0, 1.05]
    many = timing.bootstrap_ratio(a, b)
    assert many["low"] <= many["value"] <= many["high"]
    assert many["value"] == pytest.approx(2.0, rel=0.03)
    few = timing.bootstrap_ratio([2.0, 2.4, 1.9], [1.0, 1.2, 0.8])
    assert (few["low"], few["high"]) == (pytest.approx(1.9 / 1.2), pytest.approx(3.0))


@pytest.mark.parametrize(("settle", "turn"), [(False, 1), (True, 2)])
def test_interleave_takes_turns(settle, turn, watch):
    """Where threads keep spinning after their work, a turn begins with a call that is not timed."""
    order = []
    runs = {n: lambda n=n: (order.append(n), timing.time.sleep(0.003)) for n in "ab"}
    seconds = timing.interleave(runs, timing.Clock(CPU), EFFORT, settle=settle)
    assert order[2:] == [*["a"] * turn, *["b"] * turn] * 5  # after a warm-up of each
    assert [len(times) for times in seconds.values()] == [5, 5]


def test_fitted_slope():
    assert timing.fitted_slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2.0)
    assert timing.fitted_slope([1], [3]) is None


def test_real_lengths_have_the_distribution_that_was_counted():
    assert sorted(real_lengths("queries", 101))[50] == 14  # the median of all 1,190
    assert real_lengths("sentences", 64) == real_lengths("sentences", 64)
    assert max(real_lengths("documents", 16)) == 4096
    with pytest.raises(ValueError, match="kind must be one of queries"):
        real_lengths("novels", 3)


def test_workloads_are_cut_from_the_front():
    w = WORKLOADS["base_natural"]
    cut = workloads.cut(w, 300)
    assert sum(cut.lengths) <= 300
    assert cut.lengths == w.lengths[: len(cut.lengths)]
    assert workloads.cut(WORKLOADS["base_4096"], 100).lengths == (100,)  # at least one sequence remains, itself cut


@pytest.fixture
def short(monkeypatch):
    """A run of two cases on a tiny model, with given ceilings."""
    two = [op_case("pool", suite_kernels.FORWARD), op_case("add_layer_norm", suite_kernels.FORWARD)]
    monkeypatch.setattr(suite_kernels, "cases", lambda *_: two)
    monkeypatch.setattr("benchmarks.harness.machine.ceilings", lambda *_: CEILINGS)
    monkeypatch.setattr(timing, "QUICK", EFFORT)
    return ["--suite", "kernels", "--quick", "--dtype", "float32", "--device", "cpu"]


def test_result_file_follows_the_schema(short, tmp_path, capsys):
    out = tmp_path / "r.json"
    assert run.main([*short, "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert schema.problems(results) == []
    assert results["complete"]
    assert {r["operator"] for r in results["rows"]} == {"pool", "add_layer_norm"}
    assert all(r["status"] == "ok" and r["seconds"] for r in results["rows"])
    assert "x ours" in capsys.readouterr().err
    jsonschema = pytest.importorskip("jsonschema", reason="checks the schema itself; our own check has passed")
    jsonschema.validate(results, schema.schema())


def test_schema_check_finds_what_is_wrong(short, tmp_path):
    out = tmp_path / "r.json"
    run.main([*short, "--out", str(out), "--peers", "none"])
    results = json.loads(out.read_text())
    assert {r["peer"] for r in results["rows"]} == {"fastbert"}
    results["rows"][0]["status"] = "fine"
    results["rows"][1]["median_s"] = "fast"
    del results["device"]["slug"]
    assert len(schema.problems(results)) == 3


def test_results_stay_when_time_runs_out(short, tmp_path):
    out = tmp_path / "r.json"
    run.main([*short, "--out", str(out), "--budget-minutes", "1e-9"])
    results = json.loads(out.read_text())
    assert results["complete"] is False
    assert results["rows"] == []
    assert schema.problems(results) == []


def test_interrupt_loses_nothing(short, tmp_path, monkeypatch):
    cases = suite_kernels.cases()

    def interrupted():
        raise KeyboardInterrupt

    broken = of_rows(Row("fastbert", "fastbert", interrupted))
    monkeypatch.setattr(suite_kernels, "cases", lambda *_: [cases[0], broken])
    out = tmp_path / "r.json"
    run.main([*short, "--out", str(out)])
    results = json.loads(out.read_text())
    assert results["complete"] is False
    assert {r["operator"] for r in results["rows"] if r["status"] == "ok"} == {"pool"}
    assert [r["reason"] for r in results["rows"] if r["status"] == "skipped"] == ["interrupted"]


def test_wrong_row_of_ours_fails_the_command(short, monkeypatch):
    bad = of_rows(Row("fastbert", "fastbert", lambda: lambda: torch.zeros(1000)))
    monkeypatch.setattr(suite_kernels, "cases", lambda *_: [bad])
    assert run.main(short) == 1


def test_pytest_benchmark_times_the_operators(tmp_path):
    """`pytest benchmarks/`: the clock waits for the device, work stands beside the time, the machine in the header."""
    pytest.importorskip("pytest_benchmark", reason="times through pytest-benchmark")
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-k", "pool", "--benchmark-max-time=0.1"]
    file, root = tmp_path / "times.json", Path(__file__).parents[1]
    # nothing is timed under xdist
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run([*command, f"--benchmark-json={file}"], cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    made = json.loads(file.read_text())
    assert made["machine_info"]["device"]["type"] in ("cpu", "cuda")
    of = {b["name"].rstrip("]").split()[-1]: b for b in made["benchmarks"]}
    assert {"fastbert", "torch"} <= set(of)
    assert of["fastbert"]["options"]["timer"] == "synchronised"
    assert of["fastbert"]["extra_info"]["bytes"] > 0
