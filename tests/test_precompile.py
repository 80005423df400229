"""benchmarks.gpu_day.precompile compiles exactly the kernels that launches look for, so nothing is compiled twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.once

# In a process in which Triton compiles: first the kernels of one call, then the call itself by the launch path.
MAIN = """
import json, os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
from benchmarks.gpu_day import precompile
from fastbert import verify
from fastbert.emulator.driver import offline
from fastbert.testing import MODELS

task = verify.Task("pool", "bf16", "mean", MODELS["tiny"], (5, 70, 0, 1, 33))
entries = lambda: {{path.name for path in Path(os.environ["TRITON_CACHE_DIR"]).iterdir()}}
said = []
with offline("sm_90", compiles=False) as driver:
    calls = [("pool", lambda: precompile._forward_and_backward(task)),
             ("bad", lambda: (_ for _ in ()).throw(ValueError("no such shape")))]
    found = precompile.kernels_of(calls, None, lambda *refused: said.append(refused))
    lines = open(sys.argv[1], "a")
    say = lambda line: (lines.write(json.dumps(line) + chr(10)), lines.flush())
    left = precompile.compile_all(found, driver.get_current_target(), 2, time.monotonic() + 600, say)
before = entries()
launched = []
with offline("sm_90", launched.append, compiles=True):
    precompile._forward_and_backward(task)
print(json.dumps({{
    "found": [k.name for k in found], "refused": said, "left": left, "new": sorted(entries() - before),
    "before": len(before), "launched": [l.name for l in launched],
    "compiled": [l.compiled is not None for l in launched],
}}))
"""


def run(code: str, tmp_path, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    (tmp_path / "main.py").write_text(code.format(root=str(ROOT)))
    command = [sys.executable, str(tmp_path / "main.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_launches_find_what_was_compiled_beforehand(tmp_path):
    """Compiled from the same types with fewer empty attributes, a kernel had another name in Triton's cache."""
    said = json.loads(run(MAIN, tmp_path, str(tmp_path / "lines")))
    assert said["refused"] == [["bad", "ValueError: no such shape"]]
    assert said["left"] == 0
    assert said["before"] > 0
    assert said["new"] == []
    assert all(said["compiled"])
    assert {name.strip("_") for name in said["launched"]} == set(said["found"])
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert sorted(line["kernel"] for line in lines) == sorted(said["found"])
    assert all(line["error"] == "" and line["use"] == "pool" and line["cpu_s"] > 0 for line in lines)


CRASHES = """
import json, os, signal, sys, time
sys.path.insert(0, {root!r})
from types import SimpleNamespace
import triton
from benchmarks.gpu_day import precompile

def compile(source, target, options):
    if source == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if source == "hang":
        time.sleep(1e6)
    if source == "bad":
        raise RuntimeError("fatal: out of registers")
    return SimpleNamespace(metadata=SimpleNamespace(shared=7))

triton.compile = compile
precompile.PATIENCE = 2.0
kernels = [precompile.Kernel(name, "use", SimpleNamespace(source=name, options={{}}), None)
           for name in ("crash", "hang", "bad", "good")]
say = lambda line: os.write(1, (json.dumps(line) + chr(10)).encode())
assert precompile.compile_all(kernels, None, 2, time.monotonic() + 60, say) == 0
assert precompile.compile_all(kernels, None, 2, time.monotonic(), say) == 4
"""


def test_a_kernel_that_crashes_the_compiler_affects_no_other(tmp_path):
    lines = [json.loads(line) for line in run(CRASHES, tmp_path).splitlines()]
    assert {line["kernel"]: line["error"] for line in lines} == {
        "crash": "the compiler ended with status -11", "hang": "not compiled in time",
        "bad": "RuntimeError: fatal: out of registers", "good": "",
    }  # fmt: skip


NUMBERS = """
import sys
sys.path.insert(0, {root!r})
import torch
from torch.nn import functional as tf
from benchmarks.gpu_day.precompile import WithoutNumbers

torch.utils.deterministic.fill_uninitialized_memory = False
with WithoutNumbers():
    x = torch.randn(4096, 4096).to(torch.bfloat16).requires_grad_()
    w = torch.randn(4096, 4096, dtype=torch.bfloat16, requires_grad=True)
    y = tf.layer_norm(tf.gelu(tf.linear(x, w)) + x, (4096,))
    y.transpose(0, 1).unflatten(0, (64, 64)).backward(torch.empty(64, 64, 4096, dtype=torch.bfloat16))
    few = torch.tensor([3, 1, 2]).cumsum(0).tolist()
assert x.grad.shape == w.grad.shape == (4096, 4096)
assert y.dtype == torch.bfloat16
assert few == [3, 4, 6]
print("done")
"""


def test_large_results_are_not_computed_and_small_ones_are(tmp_path):
    assert run(NUMBERS, tmp_path) == "done\n"
