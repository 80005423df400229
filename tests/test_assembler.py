"""`fastbert info` and `fastbert verify` name the assembler that Triton uses."""

import re

import pytest
import torch

from fastbert.cli.main import main
from fastbert.kernels import _device
from fastbert.kernels._assembler import assembler
from fastbert.verify import run

pytestmark = pytest.mark.skipif(not _device.HAS_TRITON, reason="triton is not installed")


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
    assert re.fullmatch(r"ptxas \d+\.\d+\.\d+ \(/.*/nvidia/bin/ptxas\)", assembler("sm_90"))
    assert re.fullmatch(r"ptxas \d+\.\d+\.\d+ \(/.*/nvidia/bin/ptxas-blackwell\)", assembler("sm_120"))


def test_another_assembler_is_named_if_triton_uses_it(monkeypatch, other):
    """If Triton cannot use it, the assembler to which Triton falls back is named."""
    own = assembler("sm_90")
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(other))
    assert assembler("sm_90") == f"ptxas 99.4.12 ({other})"
    assert assembler("sm_100") != f"ptxas 99.4.12 ({other})"
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(other.parent / "nothing"))
    assert assembler("sm_90") == own


def test_info_and_verify_name_it(monkeypatch, other, capsys):
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(other))
    assert main(["info"]) == 0
    assert f"ptxas 99.4.12 ({other}), for sm_90" in capsys.readouterr().out

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(_device, "arch", lambda index: "sm_89")
    assert run._describe(torch.device("cuda", 0)) == f"Some GPU, torch {torch.__version__}, {assembler('sm_89')}"
    monkeypatch.setattr(_device, "arch", lambda index: "gfx942")
    assert run._describe(torch.device("cuda", 0)) == f"Some GPU, torch {torch.__version__}"
    assert run._describe(torch.device("cpu")) == f"CPU, torch {torch.__version__}"
