"""BertConfig: transformers reads what we write, we read what transformers writes, and errors name wrong numbers."""

import dataclasses
import json

import pytest
import torch

from fastbert.checkpoint import CheckpointError
from fastbert.config import HIDDEN_ACTS, BertConfig
from fastbert.kernels import reference

pytestmark = pytest.mark.once

TINY = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "max_position_embeddings": 20,
}


def read(folder) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def write(folder, **data) -> None:
    (folder / "config.json").write_text(json.dumps(data), encoding="utf-8")


def test_defaults_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.BertConfig(), BertConfig.base()
    for f in dataclasses.fields(ours):
        if f.name not in ("extra", "position_embedding_type", "pruned_heads"):  # fields that transformers 5 removed
            assert getattr(ours, f.name) == getattr(theirs, f.name), f.name
    assert ours.num_labels == theirs.num_labels


def test_large():
    config = BertConfig.large(num_labels=3)
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (24, 1024, 16)
    assert (config.intermediate_size, config.head_dim, config.num_labels) == (4096, 64, 3)


CHANGES = {
    "plain": {},
    "labels": {"id2label": {0: "neg", 1: "neutral", 2: "pos"}, "label2id": {"neg": 0, "neutral": 1, "pos": 2}},
    "own_names_for_two_labels": {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}},
    "one_label": {"num_labels": 1},
    "dtype": {"dtype": "bfloat16"},
    "outputs": {"output_hidden_states": True, "problem_type": "regression", "classifier_dropout": 0.3},
    "untied": {"tie_word_embeddings": False, "pad_token_id": None},
    "activation": {"hidden_act": "gelu_new"},
    "unknown_field": {"a_field_of_tomorrow": {"depth": [1, 2]}},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_round_trip_through_transformers(tmp_path, changes):
    """Written by us, read and written by transformers, read by us: no number changes."""
    transformers = pytest.importorskip("transformers")
    ours = BertConfig.from_dict(TINY | {"architectures": ["BertModel"]} | changes)
    ours.save_pretrained(tmp_path)
    theirs = transformers.BertConfig.from_pretrained(tmp_path)
    for f in dataclasses.fields(ours):
        if f.name not in ("extra", "dtype", "pruned_heads"):
            assert getattr(theirs, f.name) == getattr(ours, f.name), f.name
    assert theirs.dtype == (torch.bfloat16 if "dtype" in changes else None)
    assert getattr(theirs, "a_field_of_tomorrow", None) == changes.get("a_field_of_tomorrow")

    theirs.save_pretrained(tmp_path / "theirs")
    back = BertConfig.from_pretrained(tmp_path / "theirs")
    assert dataclasses.replace(back, extra={}) == dataclasses.replace(ours, extra={})
    assert back.extra.get("a_field_of_tomorrow") == changes.get("a_field_of_tomorrow")


def test_pruned_heads_go_both_ways():
    config = BertConfig.from_dict(TINY | {"pruned_heads": {"1": [0, 0], "0": []}})
    assert config.pruned_heads == {1: [0]}
    assert [config.heads_of(layer) for layer in (0, 1)] == [config.num_attention_heads, config.num_attention_heads - 1]
    assert config.to_dict()["pruned_heads"] == {"1": [0]}
    assert BertConfig.from_dict(config.to_dict()) == config
    assert "pruned_heads" not in BertConfig.from_dict(TINY | {"pruned_heads": {}}).to_dict()


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_dict_round_trip_is_exact(changes):
    ours = BertConfig.from_dict(TINY | changes)
    assert BertConfig.from_dict(json.loads(json.dumps(ours.to_dict()))) == ours


def test_unknown_fields_are_written_back(tmp_path):
    write(tmp_path, model_type="bert", use_cache=True, transformers_version="4.8.2", nested={"a": [1, None]}, **TINY)
    config = BertConfig.from_pretrained(tmp_path)
    assert config.extra == {"use_cache": True, "transformers_version": "4.8.2", "nested": {"a": [1, None]}}
    config.save_pretrained(tmp_path / "new" / "folder")
    written = read(tmp_path / "new" / "folder")
    assert {key: written[key] for key in config.extra} == config.extra
    assert written["model_type"] == "bert"


@pytest.mark.parametrize("spelling", ["dtype", "torch_dtype"])
def test_dtype_under_both_spellings(spelling):
    config = BertConfig.from_dict({spelling: "float16"})
    assert (config.dtype, config.torch_dtype) == ("float16", "float16")
    assert {key: config.to_dict()[key] for key in ("dtype", "torch_dtype")} == dict.fromkeys(
        ("dtype", "torch_dtype"), "float16"
    )
    assert BertConfig(dtype=torch.bfloat16).dtype == "bfloat16"
    assert BertConfig.from_dict({}, **{spelling: torch.float16}).dtype == "float16"


def test_labels():
    config = BertConfig(id2label={"0": "no", "1": "yes"})  # JSON has only strings as keys
    assert config.id2label == {0: "no", 1: "yes"}
    assert config.label2id == {"no": 0, "yes": 1}
    config.num_labels = 2
    assert config.id2label == {0: "no", 1: "yes"}
    config.num_labels = 3
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert dataclasses.replace(config, hidden_size=24).num_labels == 3
    assert BertConfig.from_dict({"num_labels": 5}).num_labels == 5  # as old versions wrote it
    named = {"id2label": {"0": "a", "1": "b", "2": "c"}}
    assert BertConfig.from_dict(named, num_labels=4).id2label[3] == "LABEL_3"
    assert BertConfig.from_dict(named, num_labels=3).id2label[2] == "c"
    assert BertConfig.from_dict(named | {"num_labels": 2}).num_labels == 3  # as in transformers, the names decide
    with pytest.raises(ValueError, match="num_labels is 3, but id2label has 2"):
        BertConfig(num_labels=3, id2label={0: "no", 1: "yes"})


def test_changes_win_over_the_file(tmp_path):
    write(tmp_path, hidden_dropout_prob=0.1, **TINY)
    config = BertConfig.from_pretrained(tmp_path, hidden_dropout_prob=0.0, num_labels=4)
    assert (config.hidden_dropout_prob, config.num_labels, config.hidden_size) == (0.0, 4, 24)


@pytest.mark.parametrize("name", HIDDEN_ACTS)
def test_activations_mean_what_transformers_means(name):
    transformers = pytest.importorskip("transformers")
    config = BertConfig(hidden_act=name)
    x = torch.linspace(-6, 6, 401, dtype=torch.float64)
    theirs = transformers.activations.ACT2FN[config.hidden_act](x)
    # gelu_fast has the constant sqrt(2 / pi) with ten digits
    torch.testing.assert_close(reference.ACTIVATION_FUNCTIONS[config.activation](x), theirs, rtol=1e-7, atol=1e-7)


def test_our_own_activation_name_is_written_as_theirs(tmp_path):
    BertConfig(hidden_act="gelu_tanh").save_pretrained(tmp_path)
    assert read(tmp_path)["hidden_act"] == "gelu_pytorch_tanh"


WRONG = {
    "heads": ({"hidden_size": 100, "num_attention_heads": 12}, "hidden_size must be a multiple.*got 100 and 12"),
    "no_vocabulary": ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
    "text_for_a_number": ({"hidden_size": "768"}, "hidden_size must be a positive integer, got '768'"),
    "fraction": ({"num_attention_heads": 12.0}, "num_attention_heads must be a positive integer, got 12.0"),
    "negative_layers": ({"num_hidden_layers": -1}, "num_hidden_layers must be 0 or more, got -1"),
    "all_dropped": ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob must be in \[0, 1\), got 1.0"),
    "negative_rate": ({"attention_probs_dropout_prob": -0.1}, "attention_probs_dropout_prob must be"),
    "classifier_rate": ({"classifier_dropout": 2}, "classifier_dropout must be"),
    "nan_rate": ({"hidden_dropout_prob": float("nan")}, "hidden_dropout_prob must be"),
    "zero_eps": ({"layer_norm_eps": 0}, "layer_norm_eps must be positive and finite, got 0"),
    "pad_outside": ({"pad_token_id": 50, "vocab_size": 50}, r"pad_token_id must be None or in \[0, 50\).*got 50"),
    "activation": ({"hidden_act": "mish"}, "hidden_act must be one of gelu,.*got 'mish'"),
    "relative": ({"position_embedding_type": "relative_key"}, "position_embedding_type must be.*got 'relative_key'"),
    "decoder": ({"is_decoder": True}, "is_decoder must be false.*got True"),
    "cross": ({"add_cross_attention": True}, "add_cross_attention must be false.*got True"),
    "other_model": ({"model_type": "roberta"}, "model_type must be \"bert\", got 'roberta'"),
    "pruned_all": (
        {"pruned_heads": {"0": [0, 1], "1": [1, 0]}, "num_attention_heads": 2, "num_hidden_layers": 2},
        "pruned_heads must be layers of 2 with some of their 2 heads, not all heads of all layers",
    ),
    "pruned_no_layer": ({"pruned_heads": {"12": [1]}}, "pruned_heads must be layers of 12"),
    "pruned_no_head": ({"pruned_heads": {"0": [12]}}, "pruned_heads must be layers of 12"),
    "pruned_a_list": ({"pruned_heads": [[0]]}, "pruned_heads must be layers of 12"),
    "no_labels": ({"num_labels": 0}, "num_labels must be an integer from 1 to 10,000,000, got 0"),
    "a_billion_labels": ({"num_labels": 10**9}, "num_labels must be an integer from 1 to 10,000,000, got 1000000000"),
    "several_activations": ({"hidden_act": ["gelu"]}, "hidden_act must be one of gelu"),
}


@pytest.mark.parametrize(("data", "message"), WRONG.values(), ids=WRONG)
def test_wrong_numbers_are_named(tmp_path, data, message):
    with pytest.raises(ValueError, match=message) as caught:
        BertConfig.from_dict(data)
    assert "\n" not in str(caught.value)
    write(tmp_path, **data)
    with pytest.raises(CheckpointError, match=message) as caught:
        BertConfig.from_pretrained(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "is not valid JSON"), (b"\xff{}", "is not valid JSON"), (b"[1]", "must hold a JSON object, got list")],
    ids=["truncated", "not_utf8", "a_list"],
)
def test_unreadable_config(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        BertConfig.from_pretrained(tmp_path)
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_config(tmp_path):
    (tmp_path / "vocab.txt").write_text("[UNK]\n")
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        BertConfig.from_pretrained(tmp_path)


def test_saving_where_a_file_stands(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match="it is a file, not a folder"):
        BertConfig().save_pretrained(tmp_path / "taken")
