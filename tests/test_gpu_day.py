"""A measuring day on a GPU: every step runs, and whatever ends the run early leaves two complete files."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks import run
from benchmarks.gpu_day import PTXAS_VARIABLES
from benchmarks.gpu_day import plan as gpu_day_plan
from benchmarks.gpu_day import summary as gpu_day_summary
from benchmarks.gpu_day.plan import Step
from benchmarks.harness import schema
from benchmarks.run import SUITES
from fastbert import verify
from fastbert.cli import main as cli

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.once
SCRIPT = ROOT / "benchmarks" / "gpu_day.sh"
RULE = json.loads((ROOT / "benchmarks" / "gpu_day" / "summary.json").read_text())
NAMES = [
    "card", "precompile", "verify", "verify-newer", "record", "encoder", "attention", "training", "operators", "cold",
    "compile", "memcheck", "racecheck",
]  # fmt: skip
# The run with a plan of its own, whose steps are the given Python programs.
MAIN = """
import sys
sys.path.insert(0, {root!r})
from benchmarks.gpu_day import day, plan
from benchmarks.gpu_day.plan import Step

def step(name, code, limit=60.0, least=0.0):
    return [Step(name, limit, lambda results, seconds, record: [sys.executable, "-c", code, str(results)], least)]

day.GRACE, day.EVERY = 0.5, 0.2
plan.day = lambda python, rehearsal: [{steps}]
sys.exit(day.main(sys.argv[1:]))
"""
LINE = (
    '{"op": "pool", "dtype": "fp32", "case": "mean", "hidden": 8, "heads": 1, "lengths": [1], "passed": true, '
    '"seconds": 1, "message": "", "checks": []}'
)
# writes one complete line and half of another, and waits
WRITER = f"""
import sys, time
file = open(sys.argv[1] + "/verify.jsonl", "w")
file.write({LINE!r} + "\\n" + {LINE!r}[:40])
file.flush()
time.sleep(1e6)
"""


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


def started(tmp_path, *steps: str, arguments=()) -> subprocess.Popen:
    (tmp_path / "main.py").write_text(MAIN.format(root=str(ROOT), steps=", ".join(steps)))
    command = [sys.executable, str(tmp_path / "main.py"), str(tmp_path / "out"), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())


def both_complete(out: Path) -> dict:
    """Checks that the summary is valid and the same in the archive, and returns it."""
    summary = json.loads((out / "summary.json").read_text())
    assert schema.problems(summary, RULE) == []
    with tarfile.open(out / "gpu_day.tar.gz") as archive:
        inside = json.load(archive.extractfile("gpu_day/summary.json"))
        for member in archive.getmembers():
            archive.extractfile(member).read()
    assert schema.problems(inside, RULE) == []
    assert {path.name for path in out.iterdir()} <= {"summary.json", "gpu_day.tar.gz", *_unfinished(out)}
    return summary


def _unfinished(out: Path) -> set[str]:
    return {path.name for path in out.iterdir() if path.name.endswith(".tmp")}


def wait_for(out: Path, condition) -> dict:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (out / "gpu_day.tar.gz").exists() and condition(both_complete(out)):
            return both_complete(out)
        time.sleep(0.05)
    raise AssertionError("the condition never became true")


def statuses(summary: dict) -> dict[str, str]:
    return {step["name"]: step["status"] for step in summary["steps"]}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_run_killed_half_way_leaves_both_files_complete(tmp_path, number):
    steps = ("step('card', 'pass')", f"step('verify', {WRITER!r})", "step('encoder', 'pass')")
    process = started(tmp_path, *steps)
    out = tmp_path / "out"
    try:
        wait_for(out, lambda s: s["verify"] and s["verify"][0]["cases"] == 1)
    finally:
        process.send_signal(number)
        process.communicate(timeout=60)
    summary = both_complete(out)
    assert summary["verify"] == [{"step": "verify", "cases": 1, "passed": 1, "failed": []}]
    assert not summary["complete"]
    if number == signal.SIGKILL:
        assert statuses(summary) == {"card": "ok", "verify": "running", "encoder": "waiting"}
    else:
        assert process.returncode == 128 + number
        assert summary["cut"] == number.name
        assert statuses(summary) == {"card": "ok", "verify": "cut", "encoder": "waiting"}


def test_no_process_outlives_a_run_that_is_killed(tmp_path):
    code = "import os, sys, time; open(sys.argv[1] + '/../../pid', 'w').write(str(os.getpid())); time.sleep(1e6)"
    code = code.replace("sys.argv[1] + '/../../pid'", repr(str(tmp_path / "pid")))
    process = started(tmp_path, f"step('card', {code!r})")
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.communicate()
    step = int((tmp_path / "pid").read_text())
    while Path(f"/proc/{step}").exists() and "State:\tZ" not in Path(f"/proc/{step}/status").read_text():
        assert time.monotonic() < deadline + 60
        time.sleep(0.05)


def test_a_step_that_fails_or_takes_too_long_affects_no_other_step(tmp_path):
    process = started(
        tmp_path, "step('card', 'raise SystemExit(3)')", "step('verify', 'import time; time.sleep(1e6)', 1.0)",
        "step('encoder', 'print(1)')", "step('cold', 'pass', least=1e6)",
    )  # fmt: skip
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    summary = both_complete(tmp_path / "out")
    assert statuses(summary) == {"card": "failed", "verify": "out of time", "encoder": "ok", "cold": "out of time"}
    assert summary["steps"][0]["reason"] == "exit code 3: "
    assert summary["complete"]
    assert "verify         out of time" in text


def test_the_run_keeps_its_time_limit(tmp_path):
    sleeper = "step('card', 'import time; time.sleep(1e6)', 1e6)"
    process = started(tmp_path, sleeper, "step('verify', 'pass', least=5.0)", arguments=("--seconds", "9"))
    process.communicate(timeout=120)
    summary = both_complete(tmp_path / "out")
    assert statuses(summary) == {"card": "out of time", "verify": "out of time"}
    assert summary["steps"][0]["limit_s"] <= 3.0  # the rest of the time is for ending and writing


# ---- the plan --------------------------------------------------------------------------------------------


class Known:
    """A record with fixed answers."""

    def __init__(self, better: bool = False):
        self.better = better

    def other_assembler(self):
        return "/newer/ptxas"

    def newer_is_better(self):
        return self.better


def steps_of(waves) -> dict[str, Step]:
    return {step.name: step for wave in waves for step in wave}


def test_the_rehearsal_has_the_steps_of_the_day():
    assert [*steps_of(gpu_day_plan.day("python", False))] == [*steps_of(gpu_day_plan.day("python", True))] == NAMES


@pytest.mark.parametrize("rehearsal", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_command_lines_parse(name, rehearsal, tmp_path):
    """An unknown option would make the step fail on the day."""
    step = steps_of(gpu_day_plan.day("python", rehearsal))[name]
    words = step.command(tmp_path, 50.0, Known())
    words = words[words.index("-m") + 1 :]
    if words[0] == "fastbert":
        if words[1] == "bench":
            parser = cli.Parser()
            run.add_arguments(parser)
            args = parser.parse_args(words[2:])
            assert set(args.suite) <= set(SUITES)
            assert 0 < args.budget_minutes < 50 / 60
            assert args.out.parent == tmp_path
        else:
            args = cli.build_parser().parse_args(words[1:])
            assert set(args.op or ()) <= set(verify.CASES)
            assert args.json_lines == tmp_path / f"{name}.jsonl"
        return
    with pytest.raises(SystemExit) as stopped:  # the module's own parser, after all of its options
        __import__(words[0], fromlist=["main"]).main([*words[1:], "--help"])
    assert stopped.value.code == 0


def test_attention_is_timed_with_the_assembler_with_which_it_passed():
    steps = steps_of(gpu_day_plan.day("python", False))
    assert steps["verify-newer"].environment(Known()) == dict.fromkeys(PTXAS_VARIABLES, "/newer/ptxas")
    assert steps["attention"].environment(Known(better=True)) == dict.fromkeys(PTXAS_VARIABLES, "/newer/ptxas")
    assert steps["attention"].environment(Known(better=False)) == {}


def test_the_newer_assembler_is_used_only_if_it_passes_more(tmp_path):
    record = gpu_day_summary.Record(tmp_path, tmp_path, "day", False, 480.0, 0.0)

    def lines(name: str, *passed: bool) -> None:
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"op": "attention", "passed": p}) + "\n" for p in passed)
        )

    assert not record.newer_is_better()
    lines("verify", True, False)
    assert not record.newer_is_better()
    lines("verify-newer", True, True)
    assert record.newer_is_better()
    lines("verify-newer", True, False)
    assert not record.newer_is_better()
    lines("verify", True, True)
    lines("verify-newer", True, True)
    assert not record.newer_is_better()


def test_a_missing_sanitizer_is_named(monkeypatch):
    monkeypatch.setattr(gpu_day_plan.shutil, "which", lambda name: None)
    steps = steps_of(gpu_day_plan.day("python", False))
    assert steps["racecheck"].why_not() == "compute-sanitizer is not installed"
    assert steps["encoder"].why_not() is None


def test_the_second_run_searches_all_kernels(tmp_path):
    from benchmarks.tuning import table as tune_table

    steps = steps_of(gpu_day_plan.tune("python", False))
    words = [step.command(tmp_path, 100.0, Known()) for name, step in steps.items() if name != "card"]
    names = [kernel.name for w in words for kernel in tune_table.named(w[w.index("--kernel") + 1])]
    assert sorted(names) == sorted(tune_table.kernels())
    assert sum(step.limit for step in steps.values()) <= 480


# ---- the rehearsal itself --------------------------------------------------------------------------------


# Hides some packages, as on a machine without them: a `sitecustomize.py` on the path.
BARE = """
import sys
from importlib.machinery import PathFinder

ABSENT = {absent!r}

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in ABSENT else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
"""


def without(tmp_path, absent: str) -> dict[str, str]:
    """An environment in which `gpu_day.sh` finds this interpreter without these packages."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "sitecustomize.py").write_text(BARE.format(absent=absent.split()))
    return environment() | {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path / "bare")}


@pytest.mark.parametrize("absent", ["torch triton", "triton"])
def test_an_interpreter_without_torch_or_triton_is_named_before_any_step(tmp_path, absent):
    """Every step failed for this reason, and the exit code was 1, as after any failed step."""
    command = ["bash", str(SCRIPT), "--rehearse", str(tmp_path / "out")]
    done = subprocess.run(
        command, env=without(tmp_path, absent), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()
    (line,) = done.stderr.splitlines()
    assert f"{sys.executable} has no {absent.replace(' ', ' and no ')};" in line
    assert "PYTHON=" in line


def test_rehearsal(tmp_path):
    """All steps of the script, from start to end, on a machine that has only torch, Triton and numpy."""
    # everything that fastbert uses beside torch, Triton and numpy, and its peers
    absent = (
        "tokenizers safetensors huggingface_hub tqdm transformers sentence_transformers accelerate peft onnx "
        "onnxruntime openvino pytest"
    )
    command = ["bash", str(SCRIPT), "--rehearse", "--seconds", "1200", str(tmp_path / "out")]
    done = subprocess.run(command, env=without(tmp_path, absent), capture_output=True, text=True, check=False)
    summary = both_complete(tmp_path / "out")
    assert statuses(summary) == dict.fromkeys(NAMES, "ok") | {"record": "skipped"}, done.stdout
    assert done.returncode == 0
    assert "precompiled 2 of " in done.stdout
    assert summary["complete"]
    made = summary["precompile"]
    assert made["kernels"] > 100  # bound through the launch path of every operator, dtype and direction
    assert (made["compiled"], made["failed"], made["left"]) == (2, [], 0)
    assert [(v["step"], v["passed"] == v["cases"] > 0) for v in summary["verify"]] == [
        ("verify", True), ("verify-newer", True),
    ]  # fmt: skip
    timed = {row["step"] for row in summary["timing"] if row["status"] == "ok" and row["row"].startswith("fastbert")}
    assert timed == {"encoder", "attention", "training", "operators", "cold", "compile"}
