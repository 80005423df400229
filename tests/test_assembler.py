"""`fastbert info` and `fastbert verify` name the assembler that Triton uses."""

import re

import pytest
import torch

from fastbert.cli.main import main
from fastbert.kernels import _device
from fastbert.kernels._assembler import assembler
from fastbert.verify import recording, run

if not _device.HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton

# the variable that replaces Hopper's assembler
IS_NEW = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
OF_HOPPER = "TRITON_PTXAS_BLACKWELL_PATH" if IS_NEW else "TRITON_PTXAS_PATH"


@pytest.fixture
def other(tmp_path):
    """An assembler that reports another version."""
    path = tmp_path / "ptxas"
    path.write_text("#!/bin/sh\necho 'ptxas: NVIDIA (R) Ptx optimizing assembler'\necho 'release 99.4, V99.4.12'\n")
    path.chmod(0o755)
    return path


def test_the_assembler_of_tritons_wheel(monkeypatch):
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    monkeypatch.delenv("TRITON_PTXAS_BLACKWELL_PATH", raising=False)
    assert re.fullmatch(r"ptxas \d+\.\d+\.\d+ \(/.*/nvidia/bin/ptxas\)", assembler("sm_80"))
    newer = "ptxas-blackwell" if IS_NEW else "ptxas"
    assert re.fullmatch(rf"ptxas \d+\.\d+\.\d+ \(/.*/nvidia/bin/{newer}\)", assembler("sm_90"))
    assert re.fullmatch(r"ptxas \d+\.\d+\.\d+ \(/.*/nvidia/bin/ptxas-blackwell\)", assembler("sm_120"))


def test_another_assembler_is_named_if_triton_uses_it(monkeypatch, other):
    """If Triton cannot use it, the assembler to which Triton falls back is named."""
    own, of_ampere, of_blackwell = assembler("sm_90"), assembler("sm_80"), assembler("sm_100")
    monkeypatch.setenv(OF_HOPPER, str(other))
    assert assembler("sm_90") == f"ptxas 99.4.12 ({other})"
    assert (assembler("sm_80") == of_ampere) != (assembler("sm_100") == of_blackwell)
    monkeypatch.setenv(OF_HOPPER, str(other.parent / "nothing"))
    assert assembler("sm_90") == own


def test_a_recording_names_it(monkeypatch, other):
    """With Triton 3.9 it named the other assembler of the wheel for Hopper."""
    monkeypatch.setattr(recording.machine, "INTERPRETING", False)
    monkeypatch.setattr(recording.machine, "arch", lambda index=None: "sm_90")
    monkeypatch.setenv(OF_HOPPER, str(other))
    assert recording.environment(torch.device("cpu"), "triton")["assembler"] == "ptxas 99.4.12"


def test_info_and_verify_name_it(monkeypatch, other, capsys):
    monkeypatch.setenv(OF_HOPPER, str(other))
    assert main(["info"]) == 0
    assert f"ptxas 99.4.12 ({other}), for sm_90" in capsys.readouterr().out

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(_device, "arch", lambda index: "sm_89")
    assert run._describe(torch.device("cuda", 0)) == f"Some GPU, torch {torch.__version__}, {assembler('sm_89')}"
    monkeypatch.setattr(_device, "arch", lambda index: "gfx942")
    assert run._describe(torch.device("cuda", 0)) == f"Some GPU, torch {torch.__version__}"
    assert run._describe(torch.device("cpu")) == f"CPU, torch {torch.__version__}"
