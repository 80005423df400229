"""Other people's checkpoints, opened: the same hidden states as in the framework that wrote them."""

import json
import pickle
import shutil
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastbert.checkpoint import CheckpointError
from fastbert.convert import convert
from fastbert.formats import open_model
from fastbert.formats.object_graph import with_names
from fastbert.formats.source import case_of_name
from fastbert.formats.tensorflow_bundle import read_bundle, write_bundle
from fastbert.models.bert import BertModel

pytestmark = pytest.mark.once

FIXTURES = Path(__file__).parent / "fixtures" / "formats"


def weights() -> dict[str, torch.Tensor]:
    """The weights that all fixtures hold, under transformers' names."""
    return {name: torch.from_numpy(array) for name, array in np.load(FIXTURES / "weights_hf_names.npz").items()}


def folder_with(tmp_path: Path, name: str, *files: str) -> Path:
    """A fixture's files, and others, in one folder as people have them."""
    folder = tmp_path / name
    shutil.copytree(FIXTURES / name, folder)
    for file in files:
        shutil.copy(FIXTURES / file, folder)
    return folder


@pytest.fixture
def google(tmp_path) -> Path:
    return folder_with(tmp_path, "google_tf1", "bert_config.json", "vocab.txt")


def assert_same_weights(path: Path, expected: dict[str, torch.Tensor]) -> None:
    tensors = open_model(path).state_dict()
    assert tensors.keys() == expected.keys()
    for name, t in expected.items():
        assert tensors[name].is_contiguous(), name
        assert torch.equal(tensors[name], t), name


def encoder_of(state: dict[str, torch.Tensor], *, pooler: bool = True) -> dict[str, torch.Tensor]:
    return {n: t for n, t in state.items() if n.startswith("bert.") and (pooler or "pooler" not in n)}


# ---- what the frameworks themselves wrote ----------------------------------------------------------------

# fixture -> what to open, what they computed, under which name; what the model has beside the encoder
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
    """Ours err at most twice as much against float64 as plain torch does in float32, and theirs err as little."""
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
    """Google's gelu before February 2019 was erf's, and the difference is a thousand times float32's error."""
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
    """What transformers computes of a source that is converted, by the class that its config names."""
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
    """The scores of words [B, positions, V] out of those of all tokens [B, S, V]."""
    return logits.gather(1, torch.from_numpy(positions).long()[..., None].expand(-1, -1, logits.shape[-1]))


def test_heads_come_along_and_transformers_computes_their_values(google, tmp_path):
    expected = np.load(google / "expected.npz")
    output = transformers_output(google, expected, "BertForPreTraining", tmp_path / "out")
    words = at_positions(output.prediction_logits.log_softmax(-1), expected["masked_lm_positions"]).flatten(0, 1)
    assert torch.allclose(words, torch.from_numpy(expected["masked_lm_log_probs"]), atol=2e-5)
    following = output.seq_relationship_logits.log_softmax(-1)
    assert torch.allclose(following, torch.from_numpy(expected["next_sentence_log_probs"]), atol=2e-5)


def test_the_head_of_a_tf_hub_module_comes_along(tmp_path):
    expected = np.load(FIXTURES / "tf_hub" / "expected.npz")
    output = transformers_output(FIXTURES / "tf_hub", expected, "BertForMaskedLM", tmp_path / "out")
    words = at_positions(output.logits, expected["masked_lm_positions"])
    assert torch.allclose(words, torch.from_numpy(expected["mlm_logits"]), atol=2e-5)


def test_a_pre_training_run_of_the_model_garden(tmp_path):
    """The encoder's own pooler is not trained there: `next_sentence.pooler_dense` is what the head pools with, and what
    the Model Garden's export to TF-Hub copies into its place. The table of words is found by the head's path to it."""
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
    """A preset with a task: the backbone of `keras_hub`, with the weights of a head beside it."""
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
    """That head computes gelu by erf while the encoder computes it by tanh, and with another epsilon: it is said, and
    with both set so in transformers' head it gives keras-hub's scores."""
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


def test_what_save_weights_of_keras_writes(keras_head, tmp_path):
    """Encoder and head in one file, the encoder as a layer of the whole; without a config the shapes tell all."""
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
    if not heads:  # what has no heads is what transformers calls BertModel, and its names have no prefix
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


def google_variables() -> dict[str, torch.Tensor]:
    return {name: v.read() for name, v in read_bundle(FIXTURES / "google_tf1" / "bert_model.ckpt").items()}


def write_google_folder(folder: Path, variables: dict[str, torch.Tensor], prefix: str = "bert_model.ckpt") -> Path:
    folder.mkdir(exist_ok=True)
    shutil.copy(FIXTURES / "bert_config.json", folder)
    shutil.copy(FIXTURES / "vocab.txt", folder)
    write_bundle(folder / prefix, variables.items())
    return folder


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
def test_other_dtypes_stay_what_they_are(dtype, tmp_path):
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


# ---- formats that are built here from their description --------------------------------------------------


def numbered(state: dict[str, torch.Tensor], scope: str, heads_axis: bool) -> dict[str, torch.Tensor]:
    """The names and shapes of tf-models-official 2.0 to 2.3, by transformers' former conversion script, reversed."""
    ending = "/.ATTRIBUTES/VARIABLE_VALUE"
    parts = {"query": "_query_dense", "key": "_key_dense", "value": "_value_dense"}
    out = {}
    for name, t in encoder_of(state).items():
        words = name.split(".")[1:]
        leaf = words[-1]
        if words[0] == "embeddings" and words[1] != "LayerNorm":
            number = ["word_embeddings", "position_embeddings", "token_type_embeddings"].index(words[1])
            out[f"{scope}layer_with_weights-{number}/embeddings{ending}"] = t
            continue
        if words[1] == "LayerNorm" and words[0] == "embeddings":
            path = "layer_with_weights-3"
        elif words[0] == "pooler":
            path = "layer_with_weights-6"
        else:
            inner = ".".join(words[3:-1])
            path = f"layer_with_weights-{4 + int(words[2])}/" + {
                "attention.output.dense": "_attention_output_dense",
                "attention.output.LayerNorm": "_attention_layer_norm",
                "intermediate.dense": "_intermediate_dense",
                "output.dense": "_output_dense",
                "output.LayerNorm": "_output_layer_norm",
            }.get(inner, f"_attention_layer/{parts.get(words[-2], '')}")
        if "LayerNorm" in name:
            out[f"{scope}{path}/{'gamma' if leaf == 'weight' else 'beta'}{ending}"] = t
            continue
        if leaf == "weight":
            t = t.t().contiguous()
        if heads_axis and words[-2] in parts:
            t = t.reshape(*t.shape[:-1], 2, 16)
        if heads_axis and path.endswith("_attention_output_dense") and leaf == "weight":
            t = t.reshape(2, 16, 32)
        out[f"{scope}{path}/{'kernel' if leaf == 'weight' else 'bias'}{ending}"] = t
    return out


PARTS_OF_2019 = {
    "embeddings.word_embeddings.weight": "embedding_lookup/embeddings",
    "embeddings.position_embeddings.weight": "embedding_postprocessor/position_embeddings",
    "embeddings.token_type_embeddings.weight": "embedding_postprocessor/type_embeddings",
    "embeddings.LayerNorm": "embedding_postprocessor/output_layer_norm",
    "pooler.dense": "pooler_transform",
    "attention.self.query": "attention_layer/query_dense",
    "attention.self.key": "attention_layer/key_dense",
    "attention.self.value": "attention_layer/value_dense",
    "attention.output.dense": "attention_output_dense",
    "attention.output.LayerNorm": "attention_layer_norm",
    "intermediate.dense": "intermediate_dense",
    "output.dense": "output_dense",
    "output.LayerNorm": "output_layer_norm",
}


@pytest.mark.parametrize("scope", ["", "model/layer_with_weights-0/"])
def test_the_model_garden_of_2019(scope, tmp_path):
    """By the names in the code of tf-models-official before 2.1, where all of BERT is one layer of Keras."""
    variables = {}
    for name, t in encoder_of(weights()).items():
        module, leaf = name.removeprefix("bert.").rsplit(".", 1)
        layer = ""
        if module.startswith("encoder.layer."):
            number, module = module.removeprefix("encoder.layer.").split(".", 1)
            layer = f"encoder/layers/{number}/"
        if f"{module}.{leaf}" in PARTS_OF_2019:
            path = PARTS_OF_2019[f"{module}.{leaf}"]
        elif "LayerNorm" in module:
            path = f"{layer}{PARTS_OF_2019[module]}/{'gamma' if leaf == 'weight' else 'beta'}"
        else:
            path = f"{layer}{PARTS_OF_2019[module]}/{'kernel' if leaf == 'weight' else 'bias'}"
            t = t.t()
        variables[f"{scope}{path}/.ATTRIBUTES/VARIABLE_VALUE"] = t
    assert_same_weights(write_google_folder(tmp_path / "x", variables), encoder_of(weights()))


def test_variables_that_are_only_numbered(tmp_path):
    """A TF-Hub module is refused without the graph that names its variables, and with a damaged one: names that change
    places in it would put each weight into the other's."""
    read = read_bundle(FIXTURES / "tf_hub" / "variables" / "variables")
    variables = {name: v.read() for name, v in read.items() if v.dtype is not None}
    folder = write_google_folder(tmp_path / "x", variables)
    with pytest.raises(
        CheckpointError, match=r"only numbered \(mlm/variables/39/.*\), and there is no _CHECKPOINTABLE_OBJECT_GRAPH"
    ):
        open_model(folder)
    damaged = shutil.copytree(FIXTURES / "tf_hub", tmp_path / "damaged")
    data = damaged / "variables" / "variables.data-00000-of-00001"
    first, second = b"layer_with_weights-4", b"layer_with_weights-5"
    whole = data.read_bytes()
    data.write_bytes(whole.replace(first, b"@" * 20).replace(second, first).replace(b"@" * 20, second))
    assert len(data.read_bytes()) == len(whole)
    with pytest.raises(
        CheckpointError, match="the bytes of _CHECKPOINTABLE_OBJECT_GRAPH do not have their checksum"
    ) as error:
        open_model(damaged)
    assert str(error.value).count(str(damaged)) == 1
    graph = read["_CHECKPOINTABLE_OBJECT_GRAPH"]
    content = graph.read().numpy().tobytes()
    for old, new in ((b"layer_with_weights-0", b"\xff" * 20), (b"\x12\x14layer_with_weights-0", b"\x12\x7f" * 11)):
        wrong = torch.frombuffer(bytearray(content.replace(old, new)), dtype=torch.uint8)
        variable = replace(graph, read=lambda wrong=wrong: wrong, verify=None)
        with pytest.raises(CheckpointError, match="_CHECKPOINTABLE_OBJECT_GRAPH is damaged") as error:
            with_names(read | {graph.name: variable})
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("scope", ["", "model/", "model/layer_with_weights-0/"])
@pytest.mark.parametrize("heads_axis", [False, True])
def test_the_model_gardens_numbered_parts(scope, heads_axis, tmp_path):
    variables = numbered(weights(), scope, heads_axis)
    variables["save_counter/.ATTRIBUTES/VARIABLE_VALUE"] = torch.tensor(1)
    variables[f"{scope}layer_with_weights-3/gamma/.OPTIMIZER_SLOT/optimizer/m/.ATTRIBUTES/VARIABLE_VALUE"] = torch.ones(
        32
    )
    folder = write_google_folder(tmp_path / "x", variables)
    assert_same_weights(folder, encoder_of(weights()))


def test_a_tf_hub_module_says_its_heads_and_its_case(tmp_path):
    """A SavedModel has no bert_config.json: the axis of heads tells their number, a variable whether to lower-case."""
    variables = numbered(weights(), "", True)
    variables["do_lower_case/.ATTRIBUTES/VARIABLE_VALUE"] = torch.tensor(False)
    folder = tmp_path / "bert_en"
    (folder / "assets").mkdir(parents=True)
    (folder / "variables").mkdir()
    shutil.copy(FIXTURES / "vocab.txt", folder / "assets")
    write_bundle(folder / "variables" / "variables", variables.items())
    model = open_model(folder)
    assert model.config["num_attention_heads"] == 2
    assert model.source.lower_case is False
    convert(folder, tmp_path / "out", say=lambda line: None)
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["do_lower_case"] is False

    without = {
        name: t.flatten(1).flatten() if t.dim() == 2 and t.shape == (2, 16) else t for name, t in variables.items()
    }
    without = {n: t.reshape(32, 32) if t.dim() == 3 else t for n, t in without.items()}
    write_bundle(folder / "variables" / "variables", without.items())
    with pytest.raises(CheckpointError, match="do not show the number of heads"):
        open_model(folder)


def paddle_state(state: dict[str, torch.Tensor], *, bert: str = "bert.") -> dict[str, np.ndarray]:
    """The names of paddlenlp.transformers.BertForPretraining; its linear layers have [in, out]."""
    renames = (
        ("attention.self.query", "self_attn.q_proj"), ("attention.self.key", "self_attn.k_proj"),
        ("attention.self.value", "self_attn.v_proj"), ("attention.output.dense", "self_attn.out_proj"),
        ("attention.output.LayerNorm", "norm1"), ("intermediate.dense", "linear1"), ("output.dense", "linear2"),
        ("output.LayerNorm", "norm2"), ("encoder.layer.", "encoder.layers."), ("LayerNorm", "layer_norm"),
        ("cls.predictions.transform.dense", "cls.predictions.transform"),
        ("cls.predictions.transform.layer_norm", "cls.predictions.layer_norm"),
        ("cls.predictions.bias", "cls.predictions.decoder_bias"),
    )  # fmt: skip
    out = OrderedDict()
    for name, t in state.items():
        linear = name.endswith(".weight") and t.dim() == 2 and "embeddings" not in name
        for old, new in renames:
            name = name.replace(old, new)
        name = bert + name.removeprefix("bert.") if name.startswith("bert.") else name
        out[name] = (t.t() if linear else t).contiguous().numpy()
    return out


def write_paddle(folder: Path, state: dict) -> Path:
    folder.mkdir(exist_ok=True)
    shutil.copy(FIXTURES / "bert_config.json", folder / "config.json")
    (folder / "model_state.pdparams").write_bytes(pickle.dumps(state, protocol=4))
    return folder


def test_paddlenlp(tmp_path):
    state = paddle_state(weights())
    state["cls.predictions.decoder_weight"] = state["bert.embeddings.word_embeddings.weight"]
    state["StructuredToParameterName@@"] = {"a": "b"}
    folder = write_paddle(tmp_path / "x", state)
    model = open_model(folder)
    assert model.config["hidden_act"] == "gelu"
    assert_same_weights(folder, weights())
    assert_same_weights(folder / "model_state.pdparams", weights())


def test_paddlenlp_alone_in_bfloat16_with_an_old_config(tmp_path):
    state = encoder_of(weights())
    arrays = paddle_state({name: t.bfloat16().view(torch.int16) for name, t in state.items()}, bert="")
    folder = write_paddle(tmp_path / "x", {name: array.view(np.uint16) for name, array in arrays.items()})
    numbers = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    nested = {"init_args": [{"init_args": [numbers | {"init_class": "BertModel"}]}], "init_class": "BertForPretraining"}
    (folder / "model_config.json").write_text(json.dumps(nested))
    assert_same_weights(folder, {name: t.bfloat16() for name, t in state.items()})


class Harmful:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of a pickle was run')",))


def test_a_paddle_pickle_runs_no_code(tmp_path):
    folder = write_paddle(tmp_path / "x", {"bert.pooler.dense.weight": Harmful()})
    with pytest.raises(CheckpointError, match=r"it would call builtins\.exec"):
        open_model(folder)


def gguf_of(path: Path, kind: str, *, tokenizer: str = "bert", order: str = "LITTLE") -> dict[str, torch.Tensor]:
    """A GGUF file with its matrices in a type; what they then are. A width of 64 fits two blocks of q8_0."""
    gguf = pytest.importorskip("gguf", reason="the reader's optional package")
    draw = torch.Generator().manual_seed(2)
    width, inner, words = 64, 128, 10
    shapes = {"token_embd.weight": (words, width), "position_embd.weight": (8, width), "token_types.weight": (2, width)}
    for norm in ("token_embd_norm", "blk.0.attn_output_norm", "blk.0.layer_output_norm"):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for name, rows, columns in (
        ("attn_q", width, width), ("attn_k", width, width), ("attn_v", width, width), ("attn_output", width, width),
        ("ffn_up", inner, width), ("ffn_down", width, inner),
    ):  # fmt: skip
        shapes |= {f"blk.0.{name}.weight": (rows, columns), f"blk.0.{name}.bias": (rows,)}
    writer = gguf.GGUFWriter(path, "bert", endianess=gguf.GGUFEndian[order])
    writer.add_tokenizer_model(tokenizer)
    writer.add_context_length(8)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_layer_norm_eps(1e-12)
    writer.add_pooling_type(gguf.PoolingType.CLS)
    writer.add_token_list(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "\u2581a", "b", "\u2581c", "d", "\u2581##"])
    exact = {}
    for name, shape in shapes.items():
        t = torch.randn(shape, generator=draw)
        if len(shape) == 1 or kind == "F32":
            writer.add_tensor(name, t.numpy())
            exact[name] = t
            continue
        type_ = gguf.GGMLQuantizationType[kind]
        data = gguf.quants.quantize(t.numpy(), type_)
        writer.add_tensor(name, data, raw_dtype=type_)
        exact[name] = torch.from_numpy(gguf.quants.dequantize(data, type_))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return exact


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_gguf_types_are_dequantised_as_gguf_itself_does(kind, tmp_path):
    exact = gguf_of(tmp_path / "x.gguf", kind)
    model = open_model(tmp_path / "x.gguf")
    assert model.config["num_attention_heads"] == 4
    assert model.config["layer_norm_eps"] == 1e-12
    assert model.source.pooling == "cls"
    assert model.source.words == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b", "c", "##d", "##"]
    got = model.state_dict()
    assert model.used.keys() == exact.keys()
    for theirs, ours in model.used.items():
        assert got[ours].dtype == torch.float32
        assert torch.equal(got[ours], exact[theirs]), theirs


def test_other_gguf_types_are_refused_by_name(tmp_path):
    gguf_of(tmp_path / "x.gguf", "Q5_0")
    with pytest.raises(CheckpointError, match="is of q5_0, which is not read"):
        open_model(tmp_path / "x.gguf")


def test_a_gguf_file_of_xlm_roberta_is_refused_by_its_tokenizer(tmp_path):
    """llama.cpp calls that architecture "bert" too."""
    gguf_of(tmp_path / "x.gguf", "F32", tokenizer="t5")
    with pytest.raises(CheckpointError, match="a tokenizer of type 't5'"):
        open_model(tmp_path / "x.gguf")


def test_a_gguf_file_of_another_byte_order_is_refused(tmp_path):
    gguf_of(tmp_path / "x.gguf", "F32", order="BIG")
    with pytest.raises(CheckpointError, match="another byte order"):
        open_model(tmp_path / "x.gguf")


# ---- ALBERT and ELECTRA ----------------------------------------------------------------------------------


def tf_name(name: str, replacements: tuple[tuple[str, str], ...]) -> str:
    for old, new in replacements:
        name = name.replace(old, new)
    for old, new in (("LayerNorm.weight", "LayerNorm/gamma"), ("LayerNorm.bias", "LayerNorm/beta")):
        name = name.replace(old, new)
    name = name.replace("_embeddings.weight", "_embeddings").replace(".weight", "/kernel")
    return name.replace(".", "/")


def as_tf(name: str, t: torch.Tensor) -> torch.Tensor:
    return t.t().contiguous() if name.endswith("kernel") else t.contiguous()


def test_albert(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.AlbertConfig(
        vocab_size=50, embedding_size=8, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=16, hidden_act="gelu_new",
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(3)
    reference = transformers.AlbertForPreTraining(config).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    replacements = (
        ("albert.encoder.albert_layer_groups.0.albert_layers.0.", "bert.encoder.transformer.group_0.inner_group_0."),
        ("full_layer_layer_norm.weight", "LayerNorm_1/gamma"), ("full_layer_layer_norm.bias", "LayerNorm_1/beta"),
        ("ffn_output.", "ffn_1.intermediate.output.dense."), ("ffn.", "ffn_1.intermediate.dense."),
        ("inner_group_0.attention.LayerNorm", "inner_group_0.LayerNorm"),
        ("attention.dense.", "attention_1.output.dense."),
        ("attention.query", "attention_1.self.query"), ("attention.key", "attention_1.self.key"),
        ("attention.value", "attention_1.self.value"), ("albert.pooler.", "bert.pooler.dense."),
        ("albert.", "bert."), ("predictions.bias", "cls.predictions.output_bias"),
        ("predictions.dense", "cls.predictions.transform.dense"),
        ("predictions.LayerNorm", "cls.predictions.transform.LayerNorm"),
        ("sop_classifier.classifier.weight", "cls/seq_relationship/output_weights"),
        ("sop_classifier.classifier.bias", "cls/seq_relationship/output_bias"),
    )  # fmt: skip
    variables = {}
    for name, t in reference.state_dict().items():
        if "decoder" not in name and "position_ids" not in name:
            theirs = tf_name(name, replacements)
            variables[theirs] = as_tf(theirs, t)
    assert "bert/encoder/transformer/group_0/inner_group_0/ffn_1/intermediate/output/dense/kernel" in variables
    folder = tmp_path / "albert_base"
    folder.mkdir()
    write_bundle(folder / "model.ckpt-best", (variables | {"global_step": torch.tensor(1)}).items())
    numbers = json.loads(config.to_json_string())
    keys = ("vocab_size", "embedding_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
            "intermediate_size", "max_position_embeddings", "type_vocab_size")  # fmt: skip
    (folder / "albert_config.json").write_text(json.dumps({key: numbers[key] for key in keys} | {"hidden_act": "gelu"}))
    (folder / "30k-clean.model").write_bytes(b"a sentencepiece model")
    with pytest.raises(CheckpointError, match="give --lower-case"):
        convert(folder, tmp_path / "out", say=lambda line: None)
    convert(folder, tmp_path / "out", lower_case=True, say=lambda line: None)
    assert (tmp_path / "out" / "spiece.model").read_bytes() == b"a sentencepiece model"
    model, report = transformers.AlbertForPreTraining.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        got, expected = model.eval()(ids), reference(ids)
    assert torch.equal(got.prediction_logits, expected.prediction_logits)
    assert torch.equal(got.sop_logits, expected.sop_logits)
    with pytest.raises(CheckpointError, match="albert"):
        BertModel.from_pretrained(folder)


def test_electra_gives_both_its_models(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "embedding_size": 16, "num_hidden_layers": 2, "max_position_embeddings": 16,
             "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
    torch.manual_seed(4)
    big = transformers.ElectraConfig(hidden_size=128, num_attention_heads=2, intermediate_size=256, **sizes)
    small = transformers.ElectraConfig(hidden_size=64, num_attention_heads=1, intermediate_size=96, **sizes)
    discriminator = transformers.ElectraForPreTraining(big).eval()
    generator = transformers.ElectraForMaskedLM(small).eval()
    for parameter in (*discriminator.parameters(), *generator.parameters()):
        torch.nn.init.normal_(parameter, std=0.2)
    generator.electra.embeddings.load_state_dict(discriminator.electra.embeddings.state_dict())
    discriminator_names = (("layer.", "layer_"), ("dense_prediction", "dense_1"))
    generator_names = (
        ("layer.", "layer_"), ("electra.", "generator."),
        ("generator_lm_head.bias", "generator_predictions.output_bias"),
    )  # fmt: skip
    variables = {}
    for model, names in ((discriminator, discriminator_names), (generator, generator_names)):
        for name, t in model.state_dict().items():
            shared = names is generator_names and name.startswith("electra.embeddings.")
            if not shared and "position_ids" not in name and name != "generator_lm_head.weight":
                theirs = tf_name(name, names)
                variables[theirs] = as_tf(theirs, t)
    assert "generator/embeddings_project/kernel" in variables
    assert "discriminator_predictions/dense_1/kernel" in variables
    folder = tmp_path / "electra"
    folder.mkdir()
    write_bundle(folder / "electra_small", variables.items())
    lines = []
    convert(folder, tmp_path / "out", say=lines.append)
    assert any("computed by erf" in line for line in lines)
    assert any("attention heads are 64 wide" in line for line in lines)
    ids = torch.arange(12).reshape(2, 6)
    for path, cls, reference in (
        ("out", transformers.ElectraForPreTraining, discriminator),
        ("out/generator", transformers.ElectraForMaskedLM, generator),
    ):
        model, report = cls.from_pretrained(tmp_path / path, output_loading_info=True)
        assert not report["missing_keys"], path
        assert not report["unexpected_keys"], path
        with torch.no_grad():
            assert torch.equal(model.eval()(ids).logits, reference(ids).logits), path


# ---- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("signature", [b"TREE", b"HEAP", b"SNOD"])
def test_a_damaged_keras_file_is_one_line(signature, tmp_path):
    """Parts of HDF5's own structure, for whose damage h5py has other exceptions than OSError."""
    pytest.importorskip("h5py", reason="the reader's optional package")
    folder = folder_with(tmp_path, "keras_hub")
    path = folder / "model.weights.h5"
    path.write_bytes(path.read_bytes().replace(signature, b"xxxx"))
    with pytest.raises(CheckpointError, match=r"model\.weights\.h5 is truncated, damaged") as error:
        open_model(folder)
    assert "\n" not in str(error.value)
    assert str(error.value).count(str(folder)) == 1


def test_an_unknown_variable_is_an_error_that_names_it(tmp_path):
    folder = write_google_folder(tmp_path / "x", google_variables() | {"bert/adapter/kernel": torch.ones(2)})
    with pytest.raises(CheckpointError, match="1 unknown variables: bert/adapter/kernel"):
        BertModel.from_pretrained(folder)


def test_a_missing_variable_is_an_error_that_names_it(tmp_path):
    variables = google_variables()
    del variables["bert/encoder/layer_1/output/dense/bias"]
    with pytest.raises(CheckpointError, match=r"lacks 1 weights: bert\.encoder\.layer\.1\.output\.dense\.bias"):
        open_model(write_google_folder(tmp_path / "x", variables))
    variables = google_variables()
    del variables["cls/predictions/output_bias"]
    with pytest.raises(CheckpointError, match=r"lacks 1 weights: cls\.predictions\.bias"):
        open_model(write_google_folder(tmp_path / "y", variables))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vocab_size", 61, r"\[60, 32\], but the config's vocab_size says 61 where it has 60"),
        ("hidden_size", 64, "the config's hidden_size says 64"),
        ("num_hidden_layers", 3, "it has 2 of what the config's num_hidden_layers says are 3"),
        ("num_hidden_layers", 1, "it has 2 of what the config's num_hidden_layers says are 1"),
        ("intermediate_size", 32, "the config's intermediate_size says 32"),
        ("vocab_size", "60", "vocab_size must be a positive integer, got '60'"),
        ("num_attention_heads", 0, "num_attention_heads must be a positive integer, got 0"),
        ("num_attention_heads", 3, "hidden_size 32 is no multiple of its num_attention_heads 3"),
    ],
)
def test_a_config_that_does_not_fit_is_an_error(google, key, value, message):
    path = google / "bert_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(CheckpointError, match=message) as error:
        open_model(google)
    assert "\n" not in str(error.value)


def test_two_models_in_one_checkpoint_are_refused(tmp_path):
    variables = google_variables()
    both = {f"{scope}/{name}": t for name, t in variables.items() for scope in ("teacher", "student")}
    with pytest.raises(CheckpointError, match="several models, in the scopes student/, teacher/"):
        open_model(write_google_folder(tmp_path / "x", both))


def test_a_vocabulary_longer_than_the_table_is_refused(google):
    with open(google / "vocab.txt", "a") as file:
        file.write("one\nmore\n")
    words = len((google / "vocab.txt").read_text().splitlines())
    if words <= 60:
        pytest.fail("the fixture's vocabulary became shorter")
    with pytest.raises(CheckpointError, match=f"the vocabulary has {words} words, the model 60"):
        open_model(google)


@pytest.mark.parametrize(
    ("name", "lower_case"),
    [
        ("uncased_L-12_H-768_A-12", True),
        ("cased_L-12_H-768_A-12", False),
        ("multi_cased_L-12_H-768_A-12", False),
        ("bert-base-multilingual-cased", False),
        ("multilingual_L-12_H-768_A-12", True),
        ("chinese_L-12_H-768_A-12", True),
        ("my_model", None),
        ("showcased", None),
    ],
)
def test_what_a_name_says_of_lower_casing(name, lower_case):
    assert case_of_name(name) is lower_case


# ---- pruned heads ----------------------------------------------------------------------------------------

PRUNED = {"0": [1], "1": []}


def prune(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What transformers 4 saved after prune_heads({0: [1]}): the rows and columns of the second head are gone."""
    state = dict(state)
    for part in ("query", "key", "value"):
        for ending in ("weight", "bias"):
            name = f"bert.encoder.layer.0.attention.self.{part}.{ending}"
            state[name] = state[name][:16].clone()
    name = "bert.encoder.layer.0.attention.output.dense.weight"
    return state | {name: state[name][:, :16].clone()}


def masked_head(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same function with all heads: nothing of the second head's output is read."""
    name = "bert.encoder.layer.0.attention.output.dense.weight"
    output = state[name].clone()
    output[:, 16:] = 0
    return state | {name: output}


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("layout", ["old", "transformers"])
def test_pruned_heads_keep_their_true_shapes(impl, layout, tmp_path):
    """transformers 5 loads such a checkpoint no more."""
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


def test_pruned_heads_that_the_weights_do_not_have(tmp_path):
    config = json.loads((FIXTURES / "bert_config.json").read_text()) | {"pruned_heads": PRUNED}
    (tmp_path / "bert_config.json").write_text(json.dumps(config))
    torch.save(weights(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="hidden_size with 1 of 2 heads pruned says 16 where it has 32"):
        BertModel.from_pretrained(tmp_path)
