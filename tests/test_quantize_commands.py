"""`fastbert quantize` from folder to folder, after training and by training: the folder computes what was evaluated."""

import json
import re

import numpy as np
import pytest
import torch

import fastbert
from command_line import run
from compression_models import needs_products, stopped_after, task_and_windows, tuned
from fastbert import BertModel, Encoder
from fastbert.checkpoint import load_state_dict
from fastbert.compression.folders import HISTORY
from fastbert.compression.quantize import QuantisedTraining, Settings, outputs_of_task
from fastbert.formats.integers import Integers
from fastbert.inference.eight_bits import Int8Linear, holds_integers
from fastbert.inference.training_in_8_bits import TrainedInt8Linear
from fastbert.models.heads import BertForSequenceClassification
from fastbert.testing import relative_rms
from fastbert.training import run as training_run
from fastbert.training.predicting import outputs_of

pytest_plugins = ("compression_fixtures",)

OPTIONS = {"device": "cpu", "impl": "native"}
TEXTS = ["ab cd", "e", "fa ga ha", "b " * 9]


@pytest.fixture(scope="module")
def in_8(teacher, data, tmp_path_factory):
    """The teacher in 8 bits, made by the command."""
    out = tmp_path_factory.mktemp("made") / "int8"
    assert run("quantize", teacher, "-o", out, "--data", data, "-q") == 0
    return out


# ---- folders ---------------------------------------------------------------------------------------------


@pytest.mark.native
@needs_products
def test_a_folder_in_8_bits_has_the_results_of_the_quantised_model(in_8, teacher):
    """`pipeline`, `Encoder` and a server use the stored integers, in one call if this machine supports it."""
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
@needs_products
def test_without_8_bit_products_the_weights_are_floats(in_8, tmp_path, monkeypatch):
    """On a GPU, with the Triton kernels and on an older CPU. They have the integers' values, and are saved so."""
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
@needs_products
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
@needs_products
def test_layers_kept_in_float32_and_pruned_heads(teacher, data, tmp_path, capsys):
    """A pruned model without heads in one layer; the most sensitive groups stay in float32."""
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
@needs_products
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
@needs_products
def test_the_folder_computes_what_training_evaluated(teacher, data, tmp_path, capsys):
    """The score in the report is that of the folder, which computes with integers. Training lowers the loss."""
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
@needs_products
def test_the_calibrated_model_is_kept_if_training_does_not_help(
    teacher, in_8, data, tmp_path, capsys, monkeypatch
):  # fmt: skip
    """It is evaluated before the first step, and is the folder that --data would write."""
    # the first model counts as the best
    monkeypatch.setattr(training_run, "is_better", lambda value, best: best is None)
    out = tmp_path / "out"
    assert run("quantize", teacher, "-o", out, "--train", data, "--eval", data, "--lr", "1e-3") == 0
    assert " after epoch 0, which is the best" in capsys.readouterr().out
    first, last = (row for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "scores" in row)
    assert (first["step"], first["best"], last["best"]) == (0, True, False)
    assert json.loads((out / "report.json").read_text())["scores"] == first["scores"]
    expected, found = load_state_dict(in_8), load_state_dict(out)
    assert all(torch.equal(found[name], t) for name, t in expected.items())


@pytest.mark.native
@needs_products
def test_the_kept_model_and_its_folder_have_the_same_bits(tmp_path, teacher):
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
    # in `predict`'s batches, which ask for autocast: it must not round the integers' products again
    found = outputs_of(ready.model, task, windows, 200, torch.bfloat16, ready.processes)
    with torch.no_grad():
        assert relative_rms(torch.tensor(np.array(found)), outputs[1]().double()) < 1e-3


@pytest.mark.native
@needs_products
def test_a_stopped_training_continues(teacher, data, tmp_path, capsys, monkeypatch):
    """It ends with the same bits. Another model is refused, because it would have other factors."""
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
@needs_products
def test_a_model_in_8_bits_cannot_be_trained_pruned_or_quantised(in_8, data, tmp_path, capsys):
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
@needs_products
@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_invalid_arguments_are_refused(teacher, data, tmp_path, capsys, options, message):
    """The error is one line, and nothing is written."""
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
