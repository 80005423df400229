"""A sample of the mutants of compiled kernels; `make ptx-mutants` runs all of them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

SCRIPT = Path(__file__).with_name("mutants.py")


def test_nearly_all_mutants_are_noticed():
    """LayerNorm's backward pass without every third of its barriers and address steps."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        str(SCRIPT),
        "--kernel",
        "layer_norm",
        "--kind",
        "barrier",
        "--kind",
        "address",
        "--every",
        "3",
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    noticed = {kind: int(count) for kind, count in re.findall(r"^  (\w+) +(\d+) noticed", result.stdout, re.MULTILINE)}
    assert noticed.keys() == {"barrier", "address"}
    assert min(noticed.values()) > 3
