"""Formats whose files are built here from their description: reading returns what was written."""

import json
import pickle
import shutil
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbert.checkpoint import CheckpointError
from fastbert.convert import convert
from fastbert.formats import open_model
from fastbert.formats.object_graph import with_names
from fastbert.formats.tensorflow_bundle import read_bundle, write_bundle
from formats_models import FIXTURES, assert_same_weights, encoder_of, weights, write_google_folder

pytestmark = pytest.mark.once


def numbered(state: dict[str, torch.Tensor], scope: str, heads_axis: bool) -> dict[str, torch.Tensor]:
    """Names and shapes of tf-models-official 2.0 to 2.3: transformers' former conversion script, reversed."""
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
    """Names as in the code of tf-models-official before 2.1, where all of BERT is one Keras layer."""
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
    """A TF-Hub module without the graph that names its variables is refused, and so is a damaged graph: exchanged names
    would put weights in each other's place."""
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


def test_a_tf_hub_module_tells_its_heads_and_its_case(tmp_path):
    """A SavedModel has no bert_config.json: an axis gives the number of heads, a variable whether to lower-case."""
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
    """Names of paddlenlp.transformers.BertForPretraining, whose linear layers are [in, out]."""
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
    """Writes a GGUF file with matrices of one type, and returns their values. A width of 64 is two blocks of q8_0."""
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
def test_gguf_types_are_dequantised_as_gguf_does(kind, tmp_path):
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
    """llama.cpp calls this architecture "bert" too."""
    gguf_of(tmp_path / "x.gguf", "F32", tokenizer="t5")
    with pytest.raises(CheckpointError, match="a tokenizer of type 't5'"):
        open_model(tmp_path / "x.gguf")


def test_a_gguf_file_of_another_byte_order_is_refused(tmp_path):
    gguf_of(tmp_path / "x.gguf", "F32", order="BIG")
    with pytest.raises(CheckpointError, match="another byte order"):
        open_model(tmp_path / "x.gguf")
