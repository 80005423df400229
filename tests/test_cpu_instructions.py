"""The C++ operators with each instruction set that this CPU has, so that a large CPU also tests the smaller sets.

Other tests run with the largest set, or with AVX2 under `ATEN_CPU_CAPABILITY=avx2 make test-cpp`.
"""

import pytest
import torch
import torch.nn.functional as F

from fastbert.kernels.cpu import attention as cpu_attention
from fastbert.kernels.cpu import library
from fastbert.kernels.cpu import operators as cpp
from fastbert.testing import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16]

pytestmark = pytest.mark.cpp


@pytest.fixture(params=library.INSTRUCTIONS)
def instructions(request, monkeypatch):
    """Limits the operators to this instruction set."""
    if request.param == "avx512" and cpp.instructions(torch.bfloat16) != "avx512":
        pytest.skip("this CPU has no AVX-512 with bfloat16")
    opened = cpp._open(request.param)
    assert opened[0] is not None, opened[1]
    monkeypatch.setattr(cpp, "load", lambda dtype=torch.float32: opened)
    return request.param


def in_each_dtype(ours, inputs, dtype, function):
    given = [t.to(dtype) for t in inputs]
    assert_within_budget(ours(*given), function(*given), function(*(t.double() for t in given)), "y")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [7, 28, 150])
def test_products(instructions, rows, dtype):
    """From the weight as given, with groups of rows, and from panels, the last of which is not full."""
    inputs = torch.randn(rows, 96), torch.randn(144, 96) / 10, torch.randn(144)
    in_each_dtype(lambda *t: cpp.linear(*t, "gelu"), inputs, dtype, lambda *t: F.gelu(F.linear(*t)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("length", "head_dim"), [(1, 32), (75, 48), (200, 64), (650, 32)])
def test_attention(instructions, length, head_dim, dtype):
    inputs = [torch.randn(length, 2, head_dim) for _ in range(3)]
    starts = torch.tensor([0, length], dtype=torch.int32)

    def by_torch(*inputs):
        q, k, v = (t.transpose(0, 1) for t in inputs)
        return ((q @ k.mT * head_dim**-0.5).softmax(-1) @ v).transpose(0, 1)

    in_each_dtype(lambda *t: cpu_attention.attention(*t, starts, None), inputs, dtype, by_torch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm(instructions, dtype):
    inputs = torch.randn(5, 80), torch.randn(5, 80), torch.randn(80), torch.randn(80)
    in_each_dtype(
        lambda *t: cpp.add_layer_norm(*t, 1e-12),
        inputs,
        dtype,
        lambda x, r, w, b: F.layer_norm(x + r, (80,), w, b, 1e-12),
    )


def test_rounding_to_bfloat16_is_torchs(instructions):
    """Rounding of w + bias: ties go to even, NaN stays NaN, and the largest numbers become infinite."""
    w, bias = torch.randn(16).bfloat16(), (torch.randn(16) / 300).bfloat16()
    largest = torch.finfo(torch.bfloat16).max
    w[:6] = torch.tensor([1.0, 1 + 2**-7, 1.0, 1.0, 1.0, largest])
    bias[:6] = torch.tensor([2**-8, 2**-8, torch.nan, torch.inf, -torch.inf, largest / 2**8])
    weight = torch.zeros(16, 32, dtype=torch.bfloat16)
    weight[:, 0] = w
    ours = cpp.linear(torch.ones(1, 32, dtype=torch.bfloat16), weight, bias)[0]
    wanted = (w.float() + bias.float()).bfloat16()
    torch.testing.assert_close(ours, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2", "AVX512"])
@pytest.mark.parametrize("multiplies_bfloat16", [False, True])
def test_which_instructions_are_chosen(capability, multiplies_bfloat16, monkeypatch):
    """The set that torch uses, never more than the CPU has. AVX-512 without bfloat16 multiplies bfloat16 by AVX2."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: multiplies_bfloat16)
    best = {"DEFAULT": None, "AVX2": "avx2", "AVX512": "avx512"}[capability]
    assert cpp.instructions(torch.float32) == best
    assert cpp.instructions(torch.bfloat16) == (best if multiplies_bfloat16 or best is None else "avx2")
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    assert cpp.instructions(torch.float32) == (None if best is None else "avx2")
