"""`tuning.tune` finds what a fake clock calls fastest; only correct configs are timed and printed for pasting."""

import json
import subprocess
import sys
import types
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace

import pytest
import torch

pytest.importorskip("triton", reason="configs are those of Triton kernels")

from benchmarks.harness import costs, timing
from benchmarks.tuning import search as tune_search
from benchmarks.tuning import table as tune_table
from benchmarks.tuning import tunables, tune
from fastbert.kernels import _device
from fastbert.kernels._gemm_config import Choice
from fastbert.testing import MODELS

pytestmark = pytest.mark.once

KERNELS = tune_table.kernels()
needs_interpreter = pytest.mark.skipif(
    not _device.INTERPRETING, reason="runs kernels on CPU tensors, which Triton's interpreter does"
)


def shape_of(kernel, model="tiny", arch="sm_90", dtype=torch.float16) -> tunables.Shape:
    return tunables.Shape(MODELS[model], (70, 3), dtype, arch, torch.device("cpu"))


# ---- the search, by a fake clock -------------------------------------------------------------------------


@dataclass(frozen=True)
class Fake:
    """A config whose time is given by the fake kernel module."""

    block: int = 1
    warps: int = 1
    vendor: bool = False
    vendor_epilogue: bool = False


LADDER = Fake(4, 4)
VENDOR_FAKE = Fake(vendor=True)


@pytest.fixture
def kernel_module(monkeypatch):
    """A module with a launcher that asks for a config, and a clock that reads the config's cost."""
    module = types.ModuleType("fastbert.kernels._fake")
    module.config = lambda: LADDER
    module.ran = []
    # the best config, block 16 with one warp, is two steps away, and both steps are improvements
    module.cost = lambda c: 1.0 + abs(c.block - 16) / 16 + abs(c.warps - 1) / 8
    module.wrong, module.broken, module.lazy = set(), set(), set()

    def launch():
        config = module.config()
        module.ran.append(config)
        if config in module.broken:
            raise RuntimeError("out of shared memory")
        out = torch.empty(100)
        # a lazy config writes nothing, so in reused memory its result would be an earlier config's right one
        if config not in module.lazy or not out.isnan().all():
            out.copy_(torch.arange(100.0) + (1 if config in module.wrong else 0))
        return [out]

    module.launch = launch
    monkeypatch.setitem(sys.modules, "fastbert.kernels._fake", module)

    def clock(self, run, calls=1, hold_s=0.0):
        run()
        return module.cost(module.ran[-1])

    monkeypatch.setattr(timing.Clock, "__call__", clock)
    return module


def fake_kernel(module, name="fake", others=()):
    truth = lambda: [torch.arange(100.0, dtype=torch.float64)]  # noqa: E731
    return tunables.Kernel(
        name, {"_fake:config": lambda original, config: lambda: config}, lambda shape: LADDER,
        {"block": (4, 8, 16, 32), "warps": (1, 2, 4, 8)},
        lambda shape: tunables.Job(module.launch, truth, truth, costs.Work(1e6, 1e6), {"m": 100}),
        (1, 1), lambda config, shape: f"if n <= 100:\n    return {tunables.written(config)}", others=others,
        start=lambda shape: LADDER,
    )  # fmt: skip


EFFORT = timing.Effort(warm_ups=1, least=3, most=3, seconds=0.0)
CEILINGS = {"gemm_tflops": {}, "copy_gbs": 1.0}


class Told:
    """A compiler that answers what a test tells it."""

    def __init__(self, failing=()):
        self.failing, self.asked = failing, []

    def __call__(self, kernel, configs, shape):
        self.asked += configs
        facts = {"registers": 100, "spills": 0, "shared": 2048, "ctas_per_sm": 2, "error": ""}
        return {c: lambda c=c: facts | {"failures": ["spills (7)"] if c in self.failing else []} for c in configs}

    def close(self):
        pass


def swept(kernel, compiler=None, whole_grid=False, most=None, stop=lambda: False):
    shape = shape_of(kernel, dtype=torch.float32)
    sweep = tune_search.Sweep(kernel, shape, EFFORT, compiler or Told(), CEILINGS, "benchmarks/results/fake/t.json")
    sweep.run(whole_grid, most, stop, lambda: None)
    return sweep.found


@pytest.mark.parametrize("whole_grid", [False, True])
def test_the_fastest_is_found_confirmed_and_printed(kernel_module, whole_grid):
    found = swept(fake_kernel(kernel_module), whole_grid=whole_grid)
    assert found["complete"]
    assert found["better"] == repr(Fake(16, 1))
    ratio = found["confirmed"][1]["ratio_to_ours"]["value"]
    assert ratio == pytest.approx(1.0 / kernel_module.cost(LADDER))
    comment, *rung = found["paste"]
    assert f"{ratio:.3f}" in comment
    assert rung == ["if n <= 100:", "    return Fake(block=16)"]
    tried = {row["config"] for row in found["rows"]}
    assert (len(tried) == 16) if whole_grid else (len(tried) < 16)


def test_without_a_better_config_the_ladder_stays(kernel_module):
    kernel_module.cost = lambda c: 1.0 if c == LADDER else 1.2
    found = swept(fake_kernel(kernel_module))
    assert found["better"] is None
    assert found["confirmed"] == []
    assert found["paste"][0].endswith("none of 6 others is faster")
    assert found["paste"][2] == "    return Fake(block=4, warps=4)"


def test_a_win_within_the_noise_does_not_count(kernel_module):
    kernel_module.cost = lambda c: 0.995 if c == Fake(8, 4) else 1.0
    found = swept(fake_kernel(kernel_module))
    assert found["better"] is None
    assert found["paste"][2] == "    return Fake(block=4, warps=4)"


def test_a_win_that_is_not_confirmed_does_not_count(kernel_module):
    kernel_module.cost = lambda c: 0.5 if c == Fake(8, 4) and kernel_module.ran.count(c) <= 5 else 1.0
    found = swept(fake_kernel(kernel_module))
    assert any((row["ratio_to_ours"] or {"value": 1})["value"] < 0.6 for row in found["rows"])
    assert found["better"] is None


@pytest.mark.parametrize("how", ["wrong", "broken", "lazy"])
def test_wrong_configs_have_no_time_and_are_never_pasted(kernel_module, how):
    """`lazy` writes nothing: memory that an earlier config wrote must not count as its output."""
    # this turns off the tests' poisoned memory; tune must poison memory itself
    torch.use_deterministic_algorithms(False)
    getattr(kernel_module, how).update({Fake(16, 1), Fake(16, 2)})
    found = swept(fake_kernel(kernel_module), whole_grid=True)
    rows = {row["config"]: row for row in found["rows"]}
    assert not torch.are_deterministic_algorithms_enabled()
    bad = rows[repr(Fake(16, 1))]
    assert bad["status"] == ("failed" if how == "broken" else "wrong")
    assert bad["median_s"] is None
    assert found["better"] not in (repr(Fake(16, 1)), repr(Fake(16, 2)), None)
    assert "16" not in "".join(found["paste"][1:]) or "warps=4" in found["paste"][-1]
    assert bad["reason"] in tune.table(found["rows"]).splitlines()[-1] + tune.table(found["rows"]).splitlines()[-2]


@pytest.mark.parametrize("how", ["wrong", "broken"])
def test_if_the_ladders_config_is_wrong_the_best_right_one_wins(kernel_module, how):
    getattr(kernel_module, how).add(LADDER)
    found = swept(fake_kernel(kernel_module))
    assert found["better"] == repr(Fake(16, 1))
    assert "the ladder's has no time" in found["paste"][0]
    assert "Fake(block=16)" in found["paste"][-1]
    assert "the ladder's  " in tune.table(found["rows"])


def test_configs_that_do_not_compile_never_run(kernel_module):
    compiler = Told(failing={Fake(16, 1), Fake(16, 4)})
    found = swept(fake_kernel(kernel_module), compiler)
    assert not {Fake(16, 1), Fake(16, 4)} & set(kernel_module.ran)
    pruned = [row for row in found["rows"] if row["status"] == "pruned"]
    assert {row["reason"] for row in pruned} == {"spills (7)"}
    assert LADDER in compiler.asked  # the table also shows its registers
    assert "100" in tune.table(found["rows"]).splitlines()[1]


def test_limits_of_configs_and_of_time(kernel_module):
    found = swept(fake_kernel(kernel_module), most=2)
    assert len({row["config"] for row in found["rows"]}) == 3
    assert not found["complete"]
    answers = iter([False, True])
    found = swept(fake_kernel(kernel_module), whole_grid=True, stop=lambda: next(answers))
    assert len({row["config"] for row in found["rows"]}) == 1 + tune_search.GROUP
    assert not found["complete"]


def test_a_product_names_the_implementation(kernel_module, monkeypatch):
    monkeypatch.setattr(tune_table, "gemm_sizes", lambda form, shape: (3072, 768))
    kernel_module.cost = lambda c: 0.5 if c.vendor else 1.0 + abs(c.block - 16) / 16
    found = swept(fake_kernel(kernel_module, "gemm:nt+act", (VENDOR_FAKE,)))
    assert "Fake(block=16" in "".join(found["paste"])
    at = next(n for n, line in enumerate(found["paste"]) if line.startswith("Choice("))
    (choice,) = eval("(" + "\n".join(found["paste"][at:]) + "\n)", {"Choice": Choice})
    source = "benchmarks/results/fake/t.json"
    assert choice == Choice("sm_90", "fp32", "nt+act", 3072, 768, "vendor", "measured", source)
    assert "2.00 times as long" in found["paste"][-1]


def test_our_best_tile_is_found_even_if_the_vendor_is_faster(kernel_module, monkeypatch):
    monkeypatch.setattr(tune_table, "gemm_sizes", lambda form, shape: (768, 768))
    kernel_module.config = lambda: VENDOR_FAKE
    kernel_module.cost = lambda c: 2.0 if c.vendor else 1.0 + abs(c.block - 16) / 16
    kernel = replace(fake_kernel(kernel_module, "gemm:nt", (VENDOR_FAKE,)), current=lambda shape: VENDOR_FAKE)
    found = swept(kernel)
    assert found["better"] == repr(Fake(16, 4))
    assert '"ours"' in "".join(found["paste"])


# ---- asking the compiler ---------------------------------------------------------------------------------


def test_the_compiler_is_asked_in_another_process():
    compiler = tune_search.Compiler(1)
    try:
        kernel = KERNELS["pool_rows"]
        shape = shape_of(kernel, "minilm", dtype=torch.bfloat16)
        facts = compiler(kernel, [kernel.current(shape)], shape)[kernel.current(shape)]()
        assert facts["failures"] == []
        assert facts["registers"] > 0
        assert compiler(kernel, [kernel.current(shape)], replace(shape, arch="sm_1")) == {}
    finally:
        compiler.close()


@pytest.mark.parametrize("deadly", [True, False])
def test_a_compiler_that_dies_affects_one_config(monkeypatch, deadly):
    """A worker that aborts breaks the pool for all configs: each is tried once more, alone."""

    class Pool:
        def __init__(self, alone):
            self.alone = alone

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, call, *question):
            def result():
                if not self.alone or deadly:
                    raise BrokenProcessPool
                return {"failures": []}

            return types.SimpleNamespace(result=result)

    pools = iter([Pool(False), Pool(True)])
    monkeypatch.setattr(tune_search.Compiler, "_start", staticmethod(lambda jobs: next(pools)))
    kernel = KERNELS["pool_rows"]
    shape = shape_of(kernel)
    facts = tune_search.Compiler(4)(kernel, [LADDER], shape)[LADDER]()
    assert facts["failures"] == (["the compiler crashes"] if deadly else [])


# ---- the command -----------------------------------------------------------------------------------------


def test_help_explains_the_command(capsys):
    with pytest.raises(SystemExit):
        tune.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("needs a GPU", "--budget-minutes 3 --out tune.json", "--compile-only sm_90", "entry of the ladder"):
        assert words in text


def test_list_names_every_kernel_and_value(capsys):
    assert tune.main(["--list"]) == 0
    text = capsys.readouterr().out
    assert all(f"{name} (" in text for name in KERNELS)
    assert "    num_stages: 1, 2, 3, 4\n" in text


def test_without_a_gpu_only_a_rehearsal_runs(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_device, "INTERPRETING", False)
    monkeypatch.setattr(subprocess, "call", lambda command, env: calls.append((command, env)) or 7)
    assert tune.main(["--kernel", "pool_rows"]) == 7
    assert "no GPU here, and times need one" in capsys.readouterr().err
    assert calls[0][0][1:] == ["-m", "benchmarks.tuning.tune", "--kernel", "pool_rows"]
    assert calls[0][1]["TRITON_INTERPRET"] == "1"


@needs_interpreter
def test_a_rehearsal_runs_checks_and_writes(tmp_path, capsys):
    out = tmp_path / "tune.json"
    assert tune.main(["--kernel", "pool_rows,gemm:nt", "--rehearse", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "times mean nothing" in printed.err
    assert "pool_rows, " in printed.out
    assert "the ladder's  " in printed.out
    assert "return" not in printed.out  # nothing to paste
    written = json.loads(out.read_text())
    assert written["schema"] == tune.SCHEMA
    assert written["rehearsal"]
    assert written["commit"]
    assert [found["kernel"] for found in written["kernels"]] == ["pool_rows", "gemm:nt"]
    for found in written["kernels"]:
        assert {row["status"] for row in found["rows"]} == {"ok"}
        assert all(row["error"] <= row["budget"] for row in found["rows"])


@needs_interpreter
def test_a_wrong_config_of_the_ladder_sets_the_exit_code(monkeypatch, capsys):
    """If the kernel's own config gives wrong numbers, this is printed, and the exit code is 1."""
    kernel = KERNELS["pool_rows"]

    def off_by_one(shape):
        job = kernel.job(shape)
        return replace(job, run=lambda: [t + 1 for t in job.run()])

    monkeypatch.setattr(tune_table, "named", lambda names: [replace(kernel, job=off_by_one)])
    assert tune.main(["--rehearse", "--most", "0"]) == 0  # nothing ran
    assert tune.main(["--rehearse", "--most", "1"]) == 1
    assert "the ladder's  wrong: relative RMS error" in capsys.readouterr().out


def test_the_ladder_has_a_step_for_every_model(kernel_module):
    found = [swept(fake_kernel(kernel_module)) for _ in range(2)]
    text = tune.ladders(found)
    assert text.splitlines()[0] == "# fake on sm_90"
    assert text.count("return Fake(block=16)") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernel", "nothing"], "no kernel 'nothing'; there are"),
        (["--model", "huge"], "no model huge; there are minilm, base, large"),
        (["--compile-only", "sm_91"], "no architecture 'sm_91'; there are sm_80"),
        (["--out", "nowhere/at/all.json"], "no folder 'nowhere/at' to write all.json into"),
        (["--n", "768", "--kernel", "gemm:nt"], "--n and --k come together"),
        (["--width", "100", "--kernel", "pool_rows", "--compile-only", "sm_90"], "is not a multiple of head_dim"),
        (["--dtype", "int8", "--kernel", "pool_rows"], "dtype must be auto or one of"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(_device, "INTERPRETING", True)
    monkeypatch.setattr(tune_search.Compiler, "_start", staticmethod(lambda jobs: None))
    assert tune.main(arguments) == 2
    assert message in capsys.readouterr().err
