"""Other frameworks' checkpoints give the hidden states that the framework computed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastbert.checkpoint import CheckpointError
from fastbert.convert import convert
from fastbert.formats import open_model
from fastbert.formats.tensorflow_bundle import read_bundle
from fastbert.models.bert import BertModel
from formats_models import (
    FIXTURES,
    assert_same_weights,
    encoder_of,
    folder_with,
    google_variables,
    weights,
    write_google_folder,
)

pytestmark = pytest.mark.once


@pytest.fixture
def google(tmp_path) -> Path:
    return folder_with(tmp_path, "google_tf1", "bert_config.json", "vocab.txt")


# ---- written by the frameworks themselves ----------------------------------------------------------------


# fixture -> what to open, the file of expected results, the name of the states in it
WRITTEN = {
    "google_tf1": ("google_tf1", "google_tf1/expected.npz", "last_hidden_state"),
    "tf2_model_garden": ("tf2_model_garden", "tf2_model_garden/expected.npz", "last_hidden_state"),
    "pytorch_pretrained_bert": (
        "pytorch_pretrained_bert/tiny-bert.tar.gz", "pytorch_pretrained_bert/expected.npz", "last_hidden_state",
    ),
    "tf_hub": ("tf_hub", "tf_hub/expected.npz", "last_hidden_state"),
    "keras_hub": ("keras_hub", "keras_hub/expected.npz", "last_hidden_state"),
    "gguf_f32": ("gguf/tiny-bert-f32.gguf", "gguf/expected-f32.npz", "last_hidden_state_gelu_pytorch_tanh"),
    "gguf_f16": ("gguf/tiny-bert-f16.gguf", "gguf/expected-f16.npz", "last_hidden_state_gelu_pytorch_tanh"),
}  # fmt: skip

PACKAGE = {"keras_hub": "h5py", "gguf_f32": "gguf", "gguf_f16": "gguf"}


def relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("name", WRITTEN)
def test_hidden_states_are_the_frameworks_own(name, tmp_path):
    """Our error and the framework's, against float64, are at most twice that of plain torch in float32."""
    if name in PACKAGE:
        pytest.importorskip(PACKAGE[name], reason="the reader's optional package")
    path, expected_file, state = WRITTEN[name]
    path = folder_with(tmp_path, path, "bert_config.json") if name == "google_tf1" else FIXTURES / path
    expected = np.load(FIXTURES / expected_file)
    ids, mask, types = (torch.from_numpy(expected[k]).long() for k in ("input_ids", "attention_mask", "token_type_ids"))
    real = mask.bool()
    exact_model = BertModel.from_pretrained(path, dtype=torch.float64, impl="reference")
    models = [BertModel.from_pretrained(path, impl=impl) for impl in ("native", "reference")]
    with torch.no_grad():
        exact, ours, plain = (model(ids, mask, types) for model in (exact_model, *models))
    for field, key in (("last_hidden_state", state), ("pooler_output", "pooler_output")):
        if field == "pooler_output" and key not in expected:
            continue
        rows = real if field == "last_hidden_state" else slice(None)
        exactly, got, torchs = (getattr(output, field)[rows] for output in (exact, ours, plain))
        budget = 2 * relative(torchs, exactly) + 1e-7
        assert relative(got, exactly) <= budget
        assert relative(torch.from_numpy(expected[key])[rows], exactly) <= budget


def test_activation_can_be_told(google):
    """Before February 2019 Google's gelu was erf's; the difference is a thousand times float32's error."""
    expected = np.load(FIXTURES / "expected_transformers.npz")
    assert open_model(google).config["hidden_act"] == "gelu_new"
    convert(google, google / "erf", activation="gelu", lower_case=True, say=lambda line: None)
    ids, mask, types = (torch.from_numpy(expected[k]) for k in ("input_ids", "attention_mask", "token_type_ids"))
    exact, real = torch.from_numpy(expected["last_hidden_state"]), mask.bool()
    with torch.no_grad():
        by_erf = BertModel.from_pretrained(google / "erf", impl="native")(ids, mask, types).last_hidden_state
        by_tanh = BertModel.from_pretrained(google, impl="native")(ids, mask, types).last_hidden_state
    assert (by_erf - exact)[real].abs().max() < 5e-6
    assert 2e-4 < (by_tanh - exact)[real].abs().max() < 5e-3


def transformers_output(source: Path, expected: dict[str, np.ndarray], head: str, out: Path):
    """What transformers computes with the converted checkpoint, by the class that its config names."""
    transformers = pytest.importorskip("transformers")
    convert(source, out, lower_case=True, say=lambda line: None)
    assert json.loads((out / "config.json").read_text())["architectures"] == [head]
    model, report = getattr(transformers, head).from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert all("pooler" in name for name in report["unexpected_keys"])  # BertForMaskedLM has none
    with torch.no_grad():
        return model(*inputs_of(expected))


def inputs_of(expected: dict[str, np.ndarray], *names: str) -> list[torch.Tensor]:
    return [torch.from_numpy(expected[k]).long() for k in names or ("input_ids", "attention_mask", "token_type_ids")]


def at_positions(logits: torch.Tensor, positions: np.ndarray) -> torch.Tensor:
    """Scores of words at some positions [B, positions, V], from those of all tokens [B, S, V]."""
    return logits.gather(1, torch.from_numpy(positions).long()[..., None].expand(-1, -1, logits.shape[-1]))


def test_heads_are_converted_and_transformers_computes_their_values(google, tmp_path):
    expected = np.load(google / "expected.npz")
    output = transformers_output(google, expected, "BertForPreTraining", tmp_path / "out")
    words = at_positions(output.prediction_logits.log_softmax(-1), expected["masked_lm_positions"]).flatten(0, 1)
    assert torch.allclose(words, torch.from_numpy(expected["masked_lm_log_probs"]), atol=2e-5)
    following = output.seq_relationship_logits.log_softmax(-1)
    assert torch.allclose(following, torch.from_numpy(expected["next_sentence_log_probs"]), atol=2e-5)


def test_the_head_of_a_tf_hub_module_is_converted(tmp_path):
    expected = np.load(FIXTURES / "tf_hub" / "expected.npz")
    output = transformers_output(FIXTURES / "tf_hub", expected, "BertForMaskedLM", tmp_path / "out")
    words = at_positions(output.logits, expected["masked_lm_positions"])
    assert torch.allclose(words, torch.from_numpy(expected["mlm_logits"]), atol=2e-5)


def test_a_pre_training_run_of_the_model_garden(tmp_path):
    """It does not train the encoder's own pooler: the head pools with `next_sentence.pooler_dense`, which the Model
    Garden's export to TF-Hub puts in the pooler's place. The head's path leads to the word embeddings."""
    folder = folder_with(tmp_path, "tf2_pretraining", "bert_config.json")
    assert_same_weights(folder, weights())
    skipped = open_model(folder).skipped
    assert [name for name in skipped if "layer_with_weights-6" in name] == [
        f"encoder/layer_with_weights-6/{leaf}/.ATTRIBUTES/VARIABLE_VALUE" for leaf in ("bias", "kernel")
    ]
    expected = np.load(folder / "expected.npz")
    output = transformers_output(folder, expected, "BertForPreTraining", tmp_path / "out")
    words = at_positions(output.prediction_logits, expected["masked_lm_positions"])
    assert torch.allclose(words, torch.from_numpy(expected["mlm_logits"]), atol=2e-5)
    assert torch.allclose(output.seq_relationship_logits, torch.from_numpy(expected["next_sentence"]), atol=2e-5)


@pytest.fixture
def keras_head(tmp_path):
    """A preset with a task: the backbone of `keras_hub`, and the weights of a head."""
    pytest.importorskip("h5py", reason="the reader's optional package")

    def folder(task: str) -> Path:
        shutil.copytree(FIXTURES / "keras_hub", tmp_path / task)
        return Path(shutil.copytree(FIXTURES / f"keras_hub_{task}", tmp_path / task, dirs_exist_ok=True))

    return folder


def test_a_classifier_of_keras_hub(keras_head, tmp_path):
    folder = keras_head("classifier")
    expected = np.load(folder / "expected.npz")
    inputs = {
        "input_ids": expected["token_ids"],
        "attention_mask": expected["padding_mask"],
        "token_type_ids": expected["segment_ids"],
    }
    output = transformers_output(folder, inputs, "BertForSequenceClassification", tmp_path / "out")
    assert torch.allclose(output.logits, torch.from_numpy(expected["logits"]), atol=2e-5)


def test_the_masked_words_of_keras_hub(keras_head, tmp_path):
    """That head computes gelu by erf and has another epsilon, while the encoder computes gelu by tanh: convert reports
    this, and with both settings transformers' head gives keras-hub's scores."""
    transformers = pytest.importorskip("transformers")
    folder, lines = keras_head("masked_lm"), []
    expected = np.load(folder / "expected.npz")
    convert(folder, tmp_path / "out", lower_case=True, say=lines.append)
    assert any("Its head of masked words computes gelu by erf" in line for line in lines)
    model = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out")
    ids, mask, types = inputs_of(expected, "token_ids", "padding_mask", "segment_ids")
    with torch.no_grad():
        as_written = at_positions(model(ids, mask, types).logits, expected["mask_positions"])
        model.cls.predictions.transform.transform_act_fn = torch.nn.GELU()
        model.cls.predictions.transform.LayerNorm.eps = 1e-5
        as_in_keras = at_positions(model(ids, mask, types).logits, expected["mask_positions"])
    exact = torch.from_numpy(expected["logits"])
    assert torch.allclose(as_in_keras, exact, atol=2e-5)
    assert 1e-4 < (as_written - exact).abs().max() < 1e-2


def test_files_of_keras_save_weights(keras_head, tmp_path):
    """Encoder and head in one file, the encoder as a layer of the whole. Without a config, shapes give the sizes."""
    h5py = pytest.importorskip("h5py", reason="the reader's optional package")
    folder = keras_head("classifier")
    with (
        h5py.File(folder / "model.weights.h5") as encoder,
        h5py.File(folder / "task.weights.h5") as head,
        h5py.File(tmp_path / "mine.weights.h5", "w") as whole,
    ):
        head.copy("layers", whole)
        encoder.copy("layers", whole.create_group("layers/bert_backbone"))
        head.copy("optimizer", whole)
    assert_same_weights(tmp_path / "mine.weights.h5", open_model(folder).state_dict())
    assert open_model(tmp_path / "mine.weights.h5").config["num_attention_heads"] == 2


@pytest.mark.parametrize("name", WRITTEN)
def test_every_format_goes_to_safetensors_by_name(name, tmp_path):
    if name in PACKAGE:
        pytest.importorskip(PACKAGE[name], reason="the reader's optional package")
    path = WRITTEN[name][0]
    path = folder_with(tmp_path, path, "bert_config.json") if name == "google_tf1" else FIXTURES / path
    convert(path, tmp_path / "out", lower_case=True, say=lambda line: None)
    expected = weights()
    got = load_file(tmp_path / "out" / "model.safetensors")
    heads = name in ("google_tf1", "pytorch_pretrained_bert", "tf_hub")
    if name == "tf_hub":
        expected = {n: t for n, t in expected.items() if "seq_relationship" not in n}
    if not heads:
        expected = {n.removeprefix("bert."): t for n, t in encoder_of(expected, pooler="gguf" not in name).items()}
    assert got.keys() == expected.keys()
    for key, t in expected.items():
        wanted = (
            t.half().float()
            if name == "gguf_f16" and t.dim() == 2 and "position" not in key and "type" not in key
            else t
        )
        assert torch.equal(got[key], wanted), key
    BertModel.from_pretrained(tmp_path / "out")
    if not heads:  # without a head transformers' class is BertModel, whose names have no prefix
        assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["BertModel"]


def test_to_tensorflow_and_back_is_the_same_file(google, tmp_path):
    convert(google, tmp_path / "a", lower_case=True, say=lambda line: None)
    convert(tmp_path / "a", tmp_path / "b", to="tensorflow", say=lambda line: None)
    theirs, ours = read_bundle(google / "bert_model.ckpt"), read_bundle(tmp_path / "b" / "bert_model.ckpt")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name].read(), ours[name].read()) for name in theirs)
    convert(tmp_path / "b", tmp_path / "c", lower_case=True, say=lambda line: None)
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "c" / file).read_bytes(), file


# ---- Google's names in all their forms -------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["module/", "model/", "a/b/"])
def test_a_scope_before_the_names(scope, tmp_path):
    folder = write_google_folder(tmp_path / "x", {scope + name: t for name, t in google_variables().items()})
    assert_same_weights(folder, weights())


@pytest.mark.parametrize(
    "ending", ["adam_m", "adam_v", "lamb_m", "lamb_v", "Adam", "Adam_1", "ExponentialMovingAverage"]
)
def test_slots_are_skipped_and_never_read(ending, tmp_path):
    """The slots' bytes are cut off the data file, so reading one would fail."""
    variables = google_variables()
    slots = {f"{name}/{ending}": t for name, t in variables.items()}
    others = {"global_step": torch.tensor(100), "beta1_power": torch.tensor(0.9), "good_steps": torch.tensor(3)}
    folder = write_google_folder(tmp_path / "x", variables | slots | others)
    data = folder / "bert_model.ckpt.data-00000-of-00001"
    used = sum(t.nbytes for t in variables.values())
    data.write_bytes(data.read_bytes()[:used])
    model = open_model(folder)
    assert model.skipped.keys() == slots.keys() | others.keys()
    assert model.skipped["global_step"] == "training counter"
    assert_same_weights(folder, weights())


def test_squad_and_classifier_heads(tmp_path):
    draw = torch.Generator().manual_seed(1)
    encoder = {name: t for name, t in google_variables().items() if name.startswith("bert/")}
    head, bias = torch.randn(2, 32, generator=draw), torch.randn(2, generator=draw)
    squad = write_google_folder(
        tmp_path / "squad", encoder | {"cls/squad/output_weights": head, "cls/squad/output_bias": bias}
    )
    assert open_model(squad).config["architectures"] == ["BertForQuestionAnswering"]
    assert_same_weights(squad, encoder_of(weights()) | {"qa_outputs.weight": head, "qa_outputs.bias": bias})

    head, bias = torch.randn(5, 32, generator=draw), torch.randn(5, generator=draw)
    labels = write_google_folder(tmp_path / "labels", encoder | {"output_weights": head, "output_bias": bias})
    model = open_model(labels)
    assert model.config["architectures"] == ["BertForSequenceClassification"]
    assert len(model.config["id2label"]) == 5
    assert_same_weights(labels, encoder_of(weights()) | {"classifier.weight": head, "classifier.bias": bias})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_kept(dtype, tmp_path):
    folder = write_google_folder(tmp_path / "x", {name: t.to(dtype) for name, t in google_variables().items()})
    model = BertModel.from_pretrained(folder)
    assert model.dtype == dtype
    expected = weights()["bert.encoder.layer.1.intermediate.dense.weight"].to(dtype)
    assert torch.equal(model.encoder["layer"][1].intermediate["dense"].weight, expected)


def test_of_several_checkpoints_the_latest_or_the_named_one(tmp_path):
    variables = google_variables()
    folder = write_google_folder(tmp_path / "x", variables, "model.ckpt-10")
    write_google_folder(folder, {name: t + 1 for name, t in variables.items()}, "model.ckpt-20")
    with pytest.raises(CheckpointError, match=r"name one of model\.ckpt-10, model\.ckpt-20"):
        open_model(folder)
    assert_same_weights(folder / "model.ckpt-10", weights())
    assert_same_weights(folder / "model.ckpt-20.index", {name: t + 1 for name, t in weights().items()})
    (folder / "checkpoint").write_text(
        'model_checkpoint_path: "/home/somebody/model.ckpt-10"\nall_model_checkpoint_paths: "model.ckpt-20"\n'
    )
    assert_same_weights(folder, weights())


# ---- pruned heads ----------------------------------------------------------------------------------------


PRUNED = {"0": [1], "1": []}


def prune(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What transformers 4 saves after prune_heads({0: [1]}): without the rows and columns of the second head."""
    state = dict(state)
    for part in ("query", "key", "value"):
        for ending in ("weight", "bias"):
            name = f"bert.encoder.layer.0.attention.self.{part}.{ending}"
            state[name] = state[name][:16].clone()
    name = "bert.encoder.layer.0.attention.output.dense.weight"
    return state | {name: state[name][:, :16].clone()}


def masked_head(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same function with all heads, where the output of the second head is not read."""
    name = "bert.encoder.layer.0.attention.output.dense.weight"
    output = state[name].clone()
    output[:, 16:] = 0
    return state | {name: output}


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("layout", ["old", "transformers"])
def test_pruned_heads_keep_their_true_shapes(impl, layout, tmp_path):
    """transformers 5 cannot load such a checkpoint."""
    folder = tmp_path / "x"
    folder.mkdir()
    config = json.loads((FIXTURES / "bert_config.json").read_text()) | {"pruned_heads": PRUNED}
    name = "bert_config.json" if layout == "old" else "config.json"
    (folder / name).write_text(json.dumps(config))
    torch.save(prune(weights()), folder / "pytorch_model.bin")
    model = BertModel.from_pretrained(folder, impl=impl)
    assert model.encoder["layer"][0].attention["self"].query.weight.shape == (16, 32)
    convert(folder, tmp_path / "out", say=lambda line: None)
    again = BertModel.from_pretrained(tmp_path / "out", impl=impl)
    model.save_pretrained(tmp_path / "saved")
    saved = BertModel.from_pretrained(tmp_path / "saved", impl=impl)
    whole = BertModel(type(model.config).from_dict(config | {"pruned_heads": {}}), impl=impl).eval()
    whole.load_state_dict({n.removeprefix("bert."): t for n, t in encoder_of(masked_head(weights())).items()})
    ids, mask = torch.arange(24).reshape(2, 12), torch.ones(2, 12, dtype=torch.int64)
    with torch.no_grad():
        expected = whole(ids, mask, output_attentions=True)
        for pruned in (model, again, saved):
            got = pruned(ids, mask, output_attentions=True)
            assert relative(got.last_hidden_state, expected.last_hidden_state.double()) < 1e-6
            assert torch.allclose(got.attentions[0], expected.attentions[0][:, :1], atol=1e-6)
    trained = model.train()(ids, mask).last_hidden_state.square().sum()
    trained.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "pooler" not in n)


def test_pruned_heads_of_an_unknown_number(tmp_path):
    config = json.loads((FIXTURES / "bert_config.json").read_text()) | {"pruned_heads": PRUNED}
    del config["num_attention_heads"]
    (tmp_path / "bert_config.json").write_text(json.dumps(config))
    torch.save(prune(weights()), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="has pruned_heads, but not hidden_size and num_attention_heads"):
        BertModel.from_pretrained(tmp_path)


def test_pruned_heads_that_contradict_the_weights(tmp_path):
    config = json.loads((FIXTURES / "bert_config.json").read_text()) | {"pruned_heads": PRUNED}
    (tmp_path / "bert_config.json").write_text(json.dumps(config))
    torch.save(weights(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="hidden_size with 1 of 2 heads pruned says 16 where it has 32"):
        BertModel.from_pretrained(tmp_path)
