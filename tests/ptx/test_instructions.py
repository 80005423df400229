"""Every PTX instruction of our kernels has a test: those listed in `instructions.txt`, and those compiled today."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ARCH = os.environ.get("FASTBERT_TEST_ARCH", "sm_90")
# Every listed instruction must be tested. Every instruction that the compiler emits must be listed.
LISTED = {
    words[0]: words[1:]
    for line in (HERE / "instructions.txt").read_text().splitlines()
    if (words := line.split()) and words[0] != "#"
}

# The PTX of the kernels that continuous integration compiles. Machine code is left out: it takes most of the time.
COMPILE = """
import re, sys
from triton.backends.nvidia.compiler import CUDABackend
from benchmarks.inspection.compile_cases import cases_of
from benchmarks.inspection.compile_report import compile_case, kernel_modules
from fastbert.emulator.ptx import parse

add_stages = CUDABackend.add_stages

def without_machine_code(self, stages, options, language):
    add_stages(self, stages, options, language)
    stages["cubin"] = lambda source, metadata: b""

CUDABackend.add_stages = without_machine_code
for module in kernel_modules()[0]:
    for case in cases_of(module, sys.argv[1], fast=True)[0]:
        opcodes = {i.opcode for i in parse(compile_case(case, sys.argv[1]).asm["ptx"]).instructions}
        print(case.name, *sorted(opcodes))
"""


def _tested() -> set[str]:
    """Opcodes that the tests of this folder name: keys of their tables, and marks."""
    tested = set()
    for path in sorted(HERE.glob("test_*.py")):
        if path == Path(__file__):
            continue
        spec = importlib.util.spec_from_file_location(f"_ptx_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for value in vars(module).values():
            if isinstance(value, dict | list):
                tested |= {key for key in value if isinstance(key, str)}
            for mark in getattr(value, "pytestmark", []):
                if mark.name == "instructions":
                    tested |= set(mark.args)
    return tested


def test_every_listed_instruction_has_a_test():
    missing = sorted(set(LISTED) - _tested())
    assert not missing, f"no test names {', '.join(missing)}"


def test_what_is_compiled_today_is_listed(tmp_path):
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, ARCH]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    kernels = [line.split() for line in result.stdout.splitlines()]
    assert len(kernels) > 20
    new = {opcode: name for name, *opcodes in kernels for opcode in opcodes if ARCH not in LISTED.get(opcode, [])}
    assert not new, f"{ARCH}: not in instructions.txt: {new}"
