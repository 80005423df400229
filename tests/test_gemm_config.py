"""Which implementation multiplies, and with which tile: the table, its rules, and that the operators follow it."""

import inspect
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the configs of Triton kernels")

from fastbert import testing
from fastbert.kernels import _compile, _gemm, _gemm_config, feed_forward, reference
from fastbert.kernels._gemm_config import CHOICES, FORMS, Choice, gemm_config
from fastbert.testing import MODELS, assert_op, relative_rms

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parents[1]
ARCHES = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942")
DTYPES = tuple(_compile.TRITON_TYPES)


@pytest.fixture
def measured(monkeypatch):
    """Puts rows of made-up measurements on top of the table."""

    def put(*rows):
        monkeypatch.setattr(_gemm_config, "CHOICES", (*rows, *CHOICES))
        gemm_config.cache_clear()

    yield put
    gemm_config.cache_clear()


# ---- the table -------------------------------------------------------------------------------------------


def test_rows_give_their_reasons():
    for row in CHOICES:
        assert row.form in ("*", *FORMS), row
        assert row.dtype in ("*", *_compile.TRITON_TYPES.values()), row
        assert row.by in ("vendor", "vendor epilogue", "ours"), row
        assert row.by != "vendor epilogue" or row.form == "nt+act only", row
        if row.basis == "measured":
            assert "*" not in (row.arch, row.dtype, row.form), f"a measurement has no wildcards: {row}"
            assert row.n > 0 < row.k, row
            assert (ROOT / row.source).is_file(), row
        else:
            assert row.basis == "reasoned", row
            assert len(row.source.split()) > 2, f"no reason: {row}"


def test_no_row_is_hidden_by_an_earlier_one():
    for i, row in enumerate(CHOICES):
        asked = (row.arch, row.dtype, row.form, row.n, row.k)
        assert not any(earlier.fits(*asked) for earlier in CHOICES[:i]), row


def test_every_product_has_a_row():
    for arch in ARCHES:
        for dtype in DTYPES:
            for form in FORMS:
                assert _gemm_config.choice(3072, 768, dtype, arch, form).by


def test_a_measured_row_decides_for_its_shape_alone(measured):
    shape = (3072, 768, torch.bfloat16, "sm_90", "nt", "act")
    assert not gemm_config(*shape).vendor
    measured(Choice("sm_90", "bf16", "nt+act", 3072, 768, "vendor", "measured", "x.json"))
    assert gemm_config(*shape).vendor
    assert not gemm_config(*shape, invariant=True).vendor
    for other in (
        (3072, 1024, torch.bfloat16, "sm_90", "nt", "act"),
        (768, 3072, torch.bfloat16, "sm_90", "nt", "act"),
        (3072, 768, torch.float16, "sm_90", "nt", "act"),
        (3072, 768, torch.bfloat16, "sm_80", "nt", "act"),
        (3072, 768, torch.bfloat16, "sm_90", "nt", "geglu"),
        (3072, 768, torch.bfloat16, "sm_90", "nn", "dact"),
    ):
        assert not gemm_config(*other).vendor, other


def test_the_config_does_not_depend_on_the_batch():
    """The config depends on M only by whether there are few rows, and with batch invariance not at all. For a weight
    gradient, which sums over the batch, k is the other side."""
    assert set(inspect.signature(gemm_config).parameters) == {
        "n", "k", "dtype", "arch", "layout", "epilogue", "invariant", "few_rows",
    }  # fmt: skip
    for form in (("nt", "act"), ("nt", "geglu"), ("nn", "dact"), ("nn", "dgeglu")):
        shape = (3072, 768, torch.bfloat16, "sm_90", *form)
        assert gemm_config(*shape, few_rows=True).vendor
        assert not gemm_config(*shape).vendor
        assert gemm_config(*shape, invariant=True, few_rows=True) == gemm_config(*shape, invariant=True)


@pytest.mark.parametrize("activation", _gemm_config.VENDOR_ACTIVATIONS)
def test_the_vendor_s_epilogue_stays_within_the_budget(activation):
    """The vendor's GELU is the tanh form. It may replace erf's only where the difference is lost in rounding: its error
    against float64 must be less than twice that of torch's own linear and activation in the same dtype."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(256, 768), torch.randn(512, 768) / 768**0.5, torch.randn(512) / 10
    for dtype in _gemm_config.VENDOR_ACTIVATIONS[activation]:
        a, b, c = (t.to(dtype) for t in (x, weight, bias))
        h = a.double() @ b.double().T + c.double()
        act, vendors = reference.ACTIVATION_FUNCTIONS[activation], {"gelu": "gelu_tanh"}.get(activation, activation)
        vendor, plain = reference.ACTIVATION_FUNCTIONS[vendors](h).to(dtype), act(torch.nn.functional.linear(a, b, c))
        error, budget = relative_rms(vendor, act(h)), relative_rms(plain, act(h))
        assert error <= 2 * budget, (dtype, error, budget)


@pytest.mark.parametrize("recompute", [False, True])
def test_training_never_takes_the_vendor_s_epilogue(recompute, monkeypatch, device):
    """The backward pass would differentiate another GELU."""
    calls = []
    epilogue = torch._addmm_activation
    monkeypatch.setattr(torch, "_addmm_activation", lambda *a, **k: calls.append(1) or epilogue(*a, **k))
    x, up, bias, down = (torch.randn(*s, device=device).half() for s in ((70, 32), (64, 32), (64,), (32, 64)))
    feed_forward.feed_forward(x, up, bias, down, activation="gelu_tanh")
    assert len(calls) == 1
    feed_forward.feed_forward(x.requires_grad_(), up, bias, down, activation="gelu_tanh", recompute=recompute)
    assert len(calls) == 1


def test_a_weight_gradient_is_configured_by_the_weights_shape(monkeypatch, device):
    asked = []

    def spy(n, k, *rest):
        asked.append((n, k, *rest[2:]))
        return gemm_config(n, k, *rest)

    monkeypatch.setattr(_gemm, "gemm_config", spy)
    for rows in (5, 7):
        dy, x = torch.randn(rows, 24, device=device), torch.randn(rows, 40, device=device)
        _gemm.matmul(dy, x, layout="tn")
        _gemm.accumulate_tn(torch.zeros(24, 40, device=device), dy, x, first=True)
    assert asked == [(40, 24, "tn", "none", False), (40, 24, "tn", "accumulate")] * 2


# ---- the operators follow it -----------------------------------------------------------------------------


@pytest.mark.triton
@pytest.mark.parametrize("activation", ["gelu", "geglu"])
def test_the_vendor_s_product_with_our_pointwise_kernel(activation, measured, device):
    """No 16-bit product uses this path until a measurement says so, but it must be correct."""
    reasoned = [Choice("*", "fp16", form, 0, 0, "vendor", "reasoned", "for this test") for form in FORMS]
    measured(*(row for row in reasoned if row.form != "tn+accumulate"))
    config = feed_forward._up_config(torch.zeros(1, 64).half(), torch.zeros(128, 64), activation, False)
    assert config.vendor
    for op in ("linear_act", "feed_forward"):
        inputs = testing.INPUTS[op](MODELS["tiny"], [35], activation=activation)
        assert_op(op, inputs, torch.float16, device)


@pytest.mark.parametrize("arch", ARCHES)
def test_tiles(arch):
    """A tile for every epilogue, descriptors only where the hardware has them."""
    for dtype in DTYPES:
        for n, k in ((3072, 768), (1536, 384), (64, 32)):
            assert gemm_config(n, k, dtype, arch).vendor
            for epilogue in ("act", "geglu", "dact", "dgeglu", "accumulate", "none"):
                config = gemm_config(n, k, dtype, arch, "nt", epilogue, invariant=True)
                assert not config.vendor
                assert config.block_n % config.slice_n == 0
                assert not config.bulk or arch in ("sm_90", "sm_100", "sm_120")
    wide = gemm_config(3072, 768, torch.bfloat16, "sm_90", "nt", "act")
    assert (wide.block_m, wide.block_n, wide.block_k, wide.num_warps) == (128, 256, 64, 8)
