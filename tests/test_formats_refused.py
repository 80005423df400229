"""Other frameworks' checkpoints that are refused, each with one line that names the fault."""

import json
from pathlib import Path

import pytest
import torch

from fastbert.checkpoint import CheckpointError
from fastbert.formats import open_model
from fastbert.formats.source import case_of_name
from fastbert.models.bert import BertModel
from formats_models import folder_with, google_variables, write_google_folder

pytestmark = pytest.mark.once


@pytest.fixture
def google(tmp_path) -> Path:
    return folder_with(tmp_path, "google_tf1", "bert_config.json", "vocab.txt")


@pytest.mark.parametrize("signature", [b"TREE", b"HEAP", b"SNOD"])
def test_a_damaged_keras_file_is_one_line(signature, tmp_path):
    """Damage of HDF5's own structure, for which h5py raises other exceptions than OSError."""
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
def test_whether_a_name_tells_lower_casing(name, lower_case):
    assert case_of_name(name) is lower_case
