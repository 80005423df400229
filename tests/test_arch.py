"""The class of each GPU architecture, on which launch parameters and compile report agree."""

import importlib
from itertools import combinations, product
from pathlib import Path

import pytest
import torch

from fastbert.kernels._arch import KB, hardware
from fastbert.kernels._attention_config import attention_config
from fastbert.kernels._gemm_config import own_config

ROOT = Path(__file__).resolve().parents[1]
DIRECTIONS = (
    "fwd", "fwd_short", "fwd_heads", "fwd_tile",
    "bwd_dq", "bwd_dkv", "bwd_bias", "bwd_short", "bwd_heads", "bwd_tile",
)  # fmt: skip
TRAITS = [frozenset(t) for n in range(5) for t in combinations(("dropout", "modified", "many", "grouped"), n)]


@pytest.mark.parametrize(
    ("arch", "matrix", "shared", "bulk_copy"),
    [
        ("sm_80", "mma.sync", 163, False),  # A100
        ("sm_86", "mma.sync", 99, False),  # RTX 30, A10, A40
        ("sm_87", "mma.sync", 163, False),  # Orin
        ("sm_88", "mma.sync", 99, False),
        ("sm_89", "mma.sync", 99, False),  # RTX 40, L4, L40S
        ("sm_90", "wgmma", 227, True),  # H100, H200
        ("sm_90a", "wgmma", 227, True),
        ("sm_100", "tcgen05", 227, True),  # B200
        ("sm_100f", "tcgen05", 227, True),
        ("sm_103", "tcgen05", 227, True),  # B300
        ("sm_110", "tcgen05", 227, True),  # Thor
        ("sm_120", "mma.sync", 99, True),  # RTX 50, RTX PRO 6000
        ("sm_121", "mma.sync", 99, True),  # GB10
        ("sm_130", "mma.sync", 99, False),  # unknown: only what all have
        ("gfx942", "mfma", 64, False),  # MI300
        ("gfx950", "mfma", 64, False),
    ],
)
def test_class_of_an_architecture(arch, matrix, shared, bulk_copy):
    unit = hardware(arch)
    assert (unit.matrix, unit.shared, unit.bulk_copy) == (matrix, shared * KB, bulk_copy)


@pytest.mark.parametrize("name", ["sm_9", "sm_90x", "90", "cuda", ""])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match='expected an architecture such as "sm_90"'):
        hardware(name)


@pytest.mark.parametrize(
    ("new", "known"),
    [("sm_87", "sm_80"), ("sm_89", "sm_86"), ("sm_103", "sm_100"), ("sm_110", "sm_100"), ("sm_121", "sm_120")],
)
def test_a_class_has_one_ladder(new, known):
    for head_dim, dtype in product((32, 64, 80, 128, 256), (torch.bfloat16, torch.float32)):
        for direction, traits in product(DIRECTIONS, TRAITS):
            asked = head_dim, dtype, direction, traits
            of_new, of_known = (attention_config(head_dim, dtype, arch, direction, traits) for arch in (new, known))
            assert of_new == of_known, asked
    for n, k, epilogue in product((384, 3072), (384, 3072), ("none", "act", "geglu", "dact", "dgeglu", "accumulate")):
        assert own_config(n, k, torch.bfloat16, new, epilogue) == own_config(n, k, torch.bfloat16, known, epilogue)


def test_the_compile_report_has_the_same_classes():
    # the repository's root is on the path only here, see test_compile_report
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        arches = importlib.import_module("benchmarks.inspection.compile_report").ARCHES
    assert set(arches) == {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "sm_121", "gfx942"}
    opcodes = {"mma.sync": "HMMA", "wgmma": "HGMMA", "tcgen05": "UTC[A-Z]*MMA", "mfma": "v_mfma"}
    for name, arch in arches.items():
        unit = hardware(name)
        assert (arch.shared_per_cta, arch.matrix) == (unit.shared, opcodes[unit.matrix])
        assert arch.bulk_copy.startswith("UTMALDG") == unit.bulk_copy
