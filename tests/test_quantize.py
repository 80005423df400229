"""Weights in 8 bits: what is stored is what inference multiplies by, and what training multiplied by, to the bit."""

import json
import re

import numpy as np
import pytest
import torch

import fastbert
from compression_models import config_of, stopped_after, table, task_and_windows, tuned
from fastbert import BertModel, Encoder
from fastbert.checkpoint import CheckpointError, load_state_dict
from fastbert.cli.main import main
from fastbert.compression.folders import HISTORY
from fastbert.compression.quantize import QuantisedTraining, Settings, outputs_of_task, stored
from fastbert.compression.quantize_plan import make_plan, relative_error
from fastbert.formats.integers import Integers, described, expect_layout, put_in, take_out
from fastbert.inference.eight_bits import Int8Linear, holds_integers, squares_of_columns, why_not
from fastbert.inference.training_in_8_bits import TrainedInt8Linear, in_8_bits, integers_of
from fastbert.models.heads import BertForSequenceClassification
from fastbert.testing import relative_rms
from fastbert.training.loop import TrainingError
from fastbert.training.predicting import outputs_of

here = pytest.mark.skipif(why_not() is not None, reason=f"no 8-bit products: {why_not()}")
OPTIONS = {"device": "cpu", "impl": "native"}
TEXTS = ["ab cd", "e", "fa ga ha", "b " * 9]


def run(*argv) -> int:
    try:
        return main([str(word) for word in argv])
    except SystemExit as leaving:
        return leaving.code


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tuned(tmp_path_factory.mktemp("made") / "teacher")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return table(tmp_path_factory.mktemp("data") / "train.tsv", 40)


@pytest.fixture(scope="module")
def in_8(teacher, data, tmp_path_factory):
    """The teacher in 8 bits, by the command."""
    out = tmp_path_factory.mktemp("made") / "int8"
    assert run("quantize", teacher, "-o", out, "--data", data, "-q") == 0
    return out


def linear_of(columns=48, inner=64, dtype=torch.float32):
    torch.manual_seed(0)
    linear = torch.nn.Linear(inner, columns, dtype=dtype)
    return linear, torch.rand(inner) + 0.5


# ---- the layer that is trained ---------------------------------------------------------------------------


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("has_factors", [True, False], ids=["factors", "none"])
def test_training_multiplies_as_inference_does(dtype, has_factors):
    """To the bit, with gradients and without, under autocast too; and after a step by the weights as they are then."""
    linear, factors = linear_of()
    trained = TrainedInt8Linear(linear, factors if has_factors else None)
    x = (torch.randn(9, 64) * torch.rand(64) * 4).to(dtype)
    for _ in range(2):
        integers = integers_of(trained.weight, factors if has_factors else None)
        made = in_8_bits(trained.weight, trained.bias, factors if has_factors else None)
        assert torch.equal(made.integers, integers.integers)
        with torch.no_grad():
            inference = made.linear(x)
            assert torch.equal(trained(x), inference)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                under_autocast = trained(x.float())
            assert torch.equal(under_autocast, made.linear(x.bfloat16()))
            assert torch.equal(trained.frozen()(x), inference)
        y = trained(x.clone().requires_grad_())
        assert torch.equal(y, inference)
        y.float().sum().backward()
        with torch.no_grad():
            trained.weight.add_(torch.randn_like(trained.weight), alpha=0.1)
            trained.bias.add_(1.0)


@pytest.mark.native
def test_gradients_pass_the_rounding_by():
    """dx by the weight that the integers say, dW by x: against float64, within twice torch's own error."""
    linear, factors = linear_of()
    trained = TrainedInt8Linear(linear, factors)
    x, dy = torch.randn(3, 7, 64).requires_grad_(), torch.randn(3, 7, 48)
    trained(x).backward(dy)
    rounded = integers_of(linear.weight, factors).weight()
    of_64 = [t.detach().double().requires_grad_() for t in (x, rounded, linear.bias)]
    of_32 = [t.detach().clone().requires_grad_() for t in (x, rounded, linear.bias)]
    for parts, upstream in ((of_64, dy.double()), (of_32, dy)):
        torch.nn.functional.linear(*parts).backward(upstream)
    for got, exact, plain in zip((x, trained.weight, trained.bias), of_64, of_32, strict=True):
        budget = 2 * relative_rms(plain.grad, exact.grad) + 1e-7
        assert relative_rms(got.grad, exact.grad) <= budget
    assert trained.weight is linear.weight
    assert not any("factors" in name for name in trained.state_dict())


# ---- the layout ------------------------------------------------------------------------------------------


@pytest.mark.once
def test_a_weight_there_and_back():
    linear, factors = linear_of()
    for chosen in (factors, None):
        integers, state = integers_of(linear.weight, chosen), {"a.bias": linear.bias}
        put_in(state, "a", integers)
        assert (state["a.weight"].dtype, state["a.weight"].shape) == (torch.int8, (48, 64))
        assert (state["a.weight_scale"].dtype, state["a.weight_scale"].shape) == (torch.float32, (48, 1))
        assert ("a.input_factors" in state) == (chosen is not None)
        floats, found = take_out(state, "x")
        assert set(floats) == {"a.bias", "a.weight"}
        assert torch.equal(floats["a.weight"], found["a"].weight())
        assert relative_rms(floats["a.weight"], linear.weight.double()) < 0.01
        assert all(torch.equal(a, b) for a, b in zip(found["a"][:2], integers[:2], strict=True))


BROKEN = {
    "no_scales": (lambda s: s.pop("a.weight_scale"), "has no a.weight_scale"),
    "other_scales": (
        lambda s: s.update({"a.weight_scale": torch.ones(3, 1)}),
        r"scales and factors are \[\[3, 1\]",
    ),
    "groups": (lambda s: s.update({"a.weight_scale": torch.ones(48, 5)}), r"scales and factors are \[\[48, 5\]"),
    "factors": (lambda s: s.update({"a.input_factors": torch.ones(3)}), r"factors are \[\[48, 1\], \[3\]\]"),
}


@pytest.mark.once
@pytest.mark.parametrize(("spoil", "message"), BROKEN.values(), ids=BROKEN)
def test_integers_without_what_they_need(spoil, message):
    linear, factors = linear_of()
    state: dict[str, torch.Tensor] = {}
    put_in(state, "a", integers_of(linear.weight, factors))
    spoil(state)
    with pytest.raises(CheckpointError, match=message):
        take_out(state, "folder")


@pytest.mark.once
def test_layouts_that_are_not_read():
    good = described([], has_factors=False)
    expect_layout(good, "x")
    group = good["config_groups"]["group_0"]

    def changed(**parts):
        return {**good, "config_groups": {"group_0": {**group, **parts}}}

    for config, message in (
        ({"quant_method": "bitsandbytes"}, "quantised by bitsandbytes"),
        ({**good, "format": "pack-quantized"}, "compressed-tensors, pack-quantized"),
        (changed(weights={**group["weights"], "num_bits": 4}), "'num_bits': 4"),
        (changed(weights={**group["weights"], "symmetric": False}), "symmetric integers of 8 bits"),
        (changed(input_activations=None), "its activations are None"),
        (changed(input_activations={**group["input_activations"], "dynamic": False}), "ranges found for each token"),
    ):
        with pytest.raises(CheckpointError, match=message):
            expect_layout(config, "x")


@pytest.mark.once
def test_the_library_reads_what_has_no_factors_and_refuses_the_rest(teacher, data, tmp_path):
    """compressed-tensors itself: weights to the last bit; a scheme with factors is none of its schemes."""
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.base import BaseCompressor

    linear, _factors = linear_of()
    config = library.QuantizationConfig.model_validate(described(["classifier"], has_factors=False))
    scheme = next(iter(config.config_groups.values()))
    integers = integers_of(linear.weight, None)
    state: dict[str, torch.Tensor] = {}
    put_in(state, "a", integers)
    found = BaseCompressor.get_value_from_registry(config.format).decompress(
        {name.removeprefix("a."): t for name, t in state.items()}, scheme
    )
    assert torch.equal(found["weight"], integers.weight())
    with pytest.raises(ValueError, match="input_factors"):
        library.QuantizationConfig.model_validate(described([], has_factors=True))


# ---- the plan --------------------------------------------------------------------------------------------


def calibrated(**changes):
    torch.manual_seed(0)
    model = BertForSequenceClassification(config_of(**changes), impl="native").eval()
    return model, outputs_of_task(model, *task_and_windows(40))


@pytest.mark.native
@here
def test_a_plan_measures_and_leaves_the_model_as_it_is():
    model, outputs = calibrated()
    with torch.no_grad():
        exact = outputs()
    modules = list(model.modules())
    plan = make_plan(model, outputs)
    with torch.no_grad():
        assert torch.equal(outputs(), exact)
    assert list(model.modules()) == modules
    assert len(plan.factors) == 18
    assert set(plan.sensitivities) == {
        f"bert.encoder.layer.{n}.{part}" for n in range(3)
        for part in ("attention.self", "attention.output.dense", "intermediate.dense", "output.dense")
    }  # fmt: skip
    layer = "bert.encoder.layer.0.attention.self."
    assert plan.factors[layer + "query"] is plan.factors[layer + "value"]
    assert 1e-4 < plan.error == plan.error_of_all < 0.2


@pytest.mark.native
@here
def test_the_most_sensitive_stay_until_the_error_is_small_enough():
    """Columns of one weight that differ by a thousand make its integers poor: it is the one to stay."""
    model, outputs = calibrated()
    with torch.no_grad():
        model.bert.encoder["layer"][1].intermediate["dense"].weight[:, ::16] *= 200.0
    loose = make_plan(model, outputs, smooth=False)
    first = max(loose.sensitivities, key=loose.sensitivities.__getitem__)
    limit = loose.error * 0.9
    plan = make_plan(model, outputs, smooth=False, error=limit)
    assert plan.kept[0] == first
    assert plan.error <= limit < plan.error_of_all
    assert not any(name.startswith(title) for title in plan.kept for name in plan.factors)
    nothing = make_plan(model, outputs, smooth=False, error=1e-9)
    assert (nothing.factors, nothing.error, len(nothing.kept)) == ({}, 0.0, 12)


@pytest.mark.native
@here
def test_smoothing_helps_where_a_column_stands_out():
    """The input of the second linear layer has columns a hundred times larger than the rest."""
    model, outputs = calibrated()
    with torch.no_grad():
        for layer in model.bert.encoder["layer"]:
            layer.intermediate["dense"].weight[::24] *= 40.0
            layer.output["dense"].weight[:, ::24] /= 40.0
    rough, smooth = (make_plan(model, outputs, smooth=on).error for on in (False, True))
    assert smooth < 0.8 * rough


@pytest.mark.once
def test_a_column_is_as_large_as_its_percentile():
    linear, x = torch.nn.Linear(4, 4), torch.arange(1.0, 101.0)[:, None] * torch.tensor([1.0, -2.0, 3.0, 0.0])
    found = squares_of_columns([linear], lambda: linear(x), percentile=90)[linear]
    assert torch.equal(found.sqrt(), torch.tensor([90.0, 180.0, 270.0, 0.0]))
    found = squares_of_columns([linear], lambda: linear(x))[linear]
    assert torch.allclose(found, x.square().mean(0))
    assert relative_error(torch.tensor([1.1, 2.2]), torch.tensor([1.0, 2.0])) == pytest.approx(0.1)


# ---- folders ---------------------------------------------------------------------------------------------


@pytest.mark.native
@here
def test_a_folder_in_8_bits_is_read_as_it_was_computed(in_8, teacher):
    """`pipeline`, `Encoder`, and a server: the stored integers, in one call where this machine has it."""
    state = load_state_dict(in_8)
    ready = fastbert.pipeline(in_8, **OPTIONS)
    linears = {name: module for name, module in ready.model.named_modules() if isinstance(module, Int8Linear)}
    assert len(linears) == 18
    for name, module in linears.items():
        assert torch.equal(module.packed.integers, state[f"{name}.weight"])
        assert torch.equal(module.packed.scales_of_groups, state[f"{name}.weight_scale"])
        assert torch.equal(module.packed.factors, state[f"{name}.input_factors"])
        assert torch.equal(module.packed.bias[: module.out_features], state[f"{name}.bias"])
    expected = fastbert.pipeline(teacher, dtype="float32", **OPTIONS)(TEXTS, all_scores=True)
    got = ready(TEXTS, all_scores=True)
    assert max(abs(a["score"] - b["score"]) for a, b in zip(got, expected, strict=True)) < 0.05
    exact = Encoder.from_pretrained(teacher, dtype="float32", **OPTIONS).encode(TEXTS)
    for dtype in ("auto", "int8", "float32"):
        encoder = Encoder.from_pretrained(in_8, dtype=dtype, **OPTIONS)
        assert holds_integers(encoder.model)
        assert 1e-4 < relative_rms(encoder.encode(TEXTS), exact.double()) < 0.05

    from fastbert.service.models import load
    from fastbert.service.settings import Settings as Served

    found = load("small", in_8, Served(device="cpu", impl="native")).abilities["labels"]
    assert holds_integers(found.lane.pipeline.model)


@pytest.mark.once
@here
def test_without_such_products_the_weights_are_floats(in_8, tmp_path, monkeypatch):
    """On a GPU, by the Triton kernels, and on an older CPU: what the integers say; and so saved again."""
    model = BertModel.from_pretrained(in_8, impl="reference", dtype=torch.float32)
    assert not holds_integers(model)
    state = load_state_dict(in_8)
    name = "encoder.layer.1.output.dense"
    integers = Integers(*(state[f"bert.{name}.{kind}"] for kind in ("weight", "weight_scale", "input_factors")))
    assert torch.equal(model.state_dict()[f"{name}.weight"], integers.weight())
    assert BertModel.from_pretrained(in_8, impl="reference").dtype is torch.bfloat16
    native = BertModel.from_pretrained(in_8, impl="native", dtype=torch.float32)
    assert holds_integers(native)
    native.save_pretrained(tmp_path / "saved")
    again = BertModel.from_pretrained(tmp_path / "saved", impl="native")
    assert not holds_integers(again)
    assert relative_rms(again.state_dict()[f"{name}.weight"], integers.weight().double()) < 1e-6


@pytest.mark.once
@here
def test_what_is_in_the_folder(in_8, teacher):
    config, state = json.loads((in_8 / "config.json").read_text()), load_state_dict(in_8)
    layer = "bert.encoder.layer.0.output.dense"
    assert {kind: state[f"{layer}.{kind}"].dtype for kind in ("weight", "weight_scale", "bias", "input_factors")} == {
        "weight": torch.int8, "weight_scale": torch.float32, "bias": torch.float32, "input_factors": torch.float32,
    }  # fmt: skip
    assert state["bert.encoder.layer.0.output.LayerNorm.weight"].dtype is torch.bfloat16
    assert state["classifier.weight"].dtype is torch.float32
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config["quantization_config"]["ignore"] == ["bert.pooler.dense", "classifier"]
    assert (in_8 / "model.safetensors").stat().st_size < 0.45 * (teacher / "model.safetensors").stat().st_size
    step = json.loads((in_8 / HISTORY).read_text())["steps"][-1]
    assert step["layers in 8 bits"] == 18
    assert step["model"] == str(teacher)


@pytest.mark.native
@here
def test_layers_that_stay_and_pruned_heads(teacher, data, tmp_path, capsys):
    """Of a pruned model, with one layer's heads gone, and the most sensitive groups left in float32."""
    small, out = tmp_path / "small", tmp_path / "out"
    assert run("prune", teacher, "-o", small, "--heads", "0:1,3;1:0,1,2,3;2:2", "-q") == 0
    assert run("quantize", small, "-o", out, "--data", data, "--error", "0.006", "--dtype", "float32") == 0
    said = capsys.readouterr().out
    assert "kept out of 8 bits" in said
    model = fastbert.pipeline(out, dtype="float32", **OPTIONS)
    assert 0 < sum(isinstance(module, Int8Linear) for module in model.model.modules()) < 15
    expected = fastbert.pipeline(small, dtype="float32", **OPTIONS)(TEXTS)
    assert max(abs(a["score"] - b["score"]) for a, b in zip(model(TEXTS), expected, strict=True)) < 0.01
    assert [s["command"] for s in json.loads((out / HISTORY).read_text())["steps"]] == ["prune", "quantize"]


@pytest.mark.native
@here
def test_an_encoder_without_a_task(teacher, tmp_path):
    plain, out, texts = tmp_path / "plain", tmp_path / "out", tmp_path / "texts.txt"
    BertModel.from_pretrained(teacher).save_pretrained(plain)
    (plain / "tokenizer.json").write_bytes((teacher / "tokenizer.json").read_bytes())
    texts.write_text("".join(f"{'abcdefghij'[i % 10]} b c\n" for i in range(20)))
    assert run("quantize", plain, "-o", out, "--data", texts, "--percentile", "99", "--no-smooth", "-q") == 2
    assert run("quantize", plain, "-o", out, "--data", texts, "--percentile", "99", "-q") == 0
    exact = Encoder.from_pretrained(plain, dtype="float32", **OPTIONS).encode(TEXTS)
    assert 1e-4 < relative_rms(Encoder.from_pretrained(out, **OPTIONS).encode(TEXTS), exact.double()) < 0.05


# ---- by training -----------------------------------------------------------------------------------------


@pytest.mark.native
@here
def test_what_training_evaluates_is_what_the_folder_computes(teacher, data, tmp_path, capsys):
    """The logits of the model that a training kept, and of its folder: the same bits. It learns, and goes on."""
    out = tmp_path / "out"
    options = ["--train", data, "--eval", data, "--epochs", "2", "--lr", "1e-3"]
    assert run("quantize", teacher, "-o", out, *options) == 0
    said = capsys.readouterr().out
    assert "18 linear layers in 8 bits" in said
    report = json.loads((out / "report.json").read_text())
    ready = fastbert.pipeline(out, **OPTIONS)
    assert holds_integers(ready.model)
    examples = ready.task.read(data)
    labels = [record["label"] for record in ready.records(examples, False)]
    right = sum(label == example.label for label, example in zip(labels, examples, strict=True))
    assert report["scores"]["accuracy"] == right / len(examples)
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines() if "loss" in line]
    assert losses[-1] < losses[0]
    assert json.loads((out / HISTORY).read_text())["steps"][-1]["command"] == "quantize --train"


@pytest.mark.native
@here
def test_the_kept_model_and_its_folder_to_the_bit(tmp_path, teacher):
    model = BertForSequenceClassification.from_pretrained(teacher, impl="native", dtype=torch.float32)
    task, windows = task_and_windows(40)
    shaping = QuantisedTraining(Settings(), str(teacher))
    shaping.prepare(model, task, windows)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.01)
    served = shaping.served(model)
    for name in ("tokenizer.json", "tokenizer_config.json", "fastbert_task.json"):
        if (teacher / name).exists():
            (tmp_path / name).write_bytes((teacher / name).read_bytes())
    shaping.save(model, tmp_path, {name: t.detach().clone() for name, t in model.state_dict().items()})
    ready = fastbert.pipeline(tmp_path, dtype="bfloat16", **OPTIONS)
    for trained, layer in zip(
        (m for m in model.modules() if isinstance(m, TrainedInt8Linear)),
        (m for m in ready.model.modules() if isinstance(m, Int8Linear)),
        strict=True,
    ):
        x = torch.randn(5, layer.in_features).bfloat16()
        with torch.no_grad():
            assert torch.equal(trained(x), layer(x))
    outputs = [outputs_of_task(each, task, windows) for each in (served, ready.model)]
    with torch.no_grad():
        assert torch.equal(*(run() for run in outputs))
        assert relative_rms(outputs[0](), outputs_of_task(model, task, windows)().double()) < 0.05
    # in batches as `predict` makes them, which asks for autocast: that must not round the integers' products again
    found = outputs_of(ready.model, task, windows, 200, torch.bfloat16, ready.processes)
    with torch.no_grad():
        assert relative_rms(torch.tensor(np.array(found)), outputs[1]().double()) < 1e-3


@pytest.mark.native
@here
def test_a_training_that_was_stopped_goes_on(teacher, data, tmp_path, capsys, monkeypatch):
    """To the same bits; not with another model, which would have other factors."""
    command = ["quantize", teacher, "--train", data, "--epochs", "2", "--lr", "1e-3", "-q", "-o"]
    assert run(*command, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        stopped_after(patch, 3)
        assert run(*command, tmp_path / "parts") == 130
    assert "the same command with --resume goes on" in capsys.readouterr().err
    other = tuned(tmp_path / "other", initializer_range=0.1)
    assert run(command[0], other, *command[2:], tmp_path / "parts", "--resume") == 1
    assert "is of a run with in 8 bits" in capsys.readouterr().err
    assert run(*command, tmp_path / "parts", "--resume") == 0
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("whole", "parts")]
    assert weights[0] == weights[1]


@pytest.mark.once
@here
def test_a_model_in_8_bits_is_not_trained_cut_or_quantised_again(in_8, data, tmp_path, capsys):
    again = ["-o", tmp_path / "out", "--data", data]
    assert run("quantize", in_8, *again) == 1
    assert "in 8 bits already" in capsys.readouterr().err
    assert run("prune", in_8, "-o", tmp_path / "out", "--layers", "0") == 1
    assert "in 8 bits already" in capsys.readouterr().err
    assert run(
        "finetune", "--task", "sentence", "--model", in_8, "--train", data, "--out", tmp_path / "tuned", "-q",
        "--columns", "text,label", "--impl", "native",
    ) == 1  # fmt: skip
    assert "the model is in 8 bits, which cannot be trained" in capsys.readouterr().err
    assert issubclass(TrainingError, RuntimeError)


WRONG = {
    "one_text": (["--data", "ONE"], "has 1 texts: calibration needs at least 16"),
    "two_texts_to_train_on": (["--train", "TWO"], "calibration needs at least 16"),
    "another_task": (["--data", "OTHER"], "column"),
    "neither": ([], "give either --data FILE"),
    "both": (["--data", "DATA", "--train", "DATA"], "give either --data FILE"),
    "rate": (["--data", "DATA", "--lr", "1e-5"], "--lr is an option of training"),
    "few_texts": (["--data", "DATA", "--texts", "8"], "--texts 8: calibration needs at least 16"),
    "percentile": (["--data", "DATA", "--percentile", "5"], "a percentile from 50 to 100"),
    "nothing": (["--data", "nowhere.tsv"], "nowhere.tsv"),
}


@pytest.mark.once
@here
@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_quantised(teacher, data, tmp_path, capsys, options, message):
    """In one line, and nothing is written."""
    one, two, other = (tmp_path / f"{name}.tsv" for name in ("one", "two", "other"))
    one.write_text("text\tlabel\na b\tearly\n")
    two.write_text("text\tlabel\na b\tearly\nh\tLate\n")
    other.write_text("one\ttwo\na b\tearly\n")
    files = {"DATA": data, "ONE": one, "TWO": two, "OTHER": other}
    assert run("quantize", teacher, "-o", tmp_path / "out", *(files.get(word, word) for word in options)) in (1, 2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(message, said), said
    out = tmp_path / "out"
    assert not out.exists() or not any(out.iterdir())


@pytest.mark.once
def test_what_is_stored_of_a_plan_of_nothing():
    """Nothing in 8 bits is a plain checkpoint in another dtype."""
    from fastbert.compression.quantize_plan import Plan

    model = BertForSequenceClassification(config_of())
    config, state, about = stored(model.config, model.state_dict(), Plan({}), torch.bfloat16)
    assert config.dtype == "bfloat16"
    assert {t.dtype for name, t in state.items() if not name.startswith("classifier")} == {torch.bfloat16}
    assert "bert.encoder.layer.2.output.dense" in about["quantization_config"]["ignore"]
