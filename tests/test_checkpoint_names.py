"""Checkpoints with other heads and prefixes: the encoder is that of AutoModel, and what is left out is named."""

import json
import warnings

import pytest
import torch

from fastbert import BertConfig, BertModel
from fastbert.checkpoint import CheckpointError, save_state_dict

pytestmark = pytest.mark.once

CONFIG = BertConfig(
    vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
    max_position_embeddings=16,
)  # fmt: skip
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
HEAD = {"weight": torch.ones(3, 32), "bias": torch.ones(3)}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return BertModel(CONFIG, impl="native").eval()


def prefixed(prefix, state):
    return {prefix + name: t for name, t in state.items()}


def head(name):
    return prefixed(name + ".", HEAD)


def layer_too_many(state):
    last = {n: t for n, t in state.items() if n.startswith("encoder.layer.1.")}
    return state | {name.replace("layer.1.", "layer.2."): t for name, t in last.items()}


# name -> (function from the encoder's state to the checkpoint, prefixes of what is left out with a warning)
LOADED = {
    "bare": (lambda s: s, ()),
    "prefix": (lambda s: prefixed("bert.", s), ()),
    "head of transformers'": (lambda s: prefixed("bert.", s) | head("classifier") | head("cls.seq_relationship"), ()),
    "linear, bare": (lambda s: s | head("linear"), ("linear.",)),
    "linear, prefix": (lambda s: prefixed("bert.", s) | head("linear"), ("linear.",)),
    "score": (lambda s: prefixed("bert.", s) | head("score"), ("score.",)),
    "head inside": (lambda s: prefixed("bert.", s) | head("bert.projection"), ("bert.projection.",)),
    "two heads": (lambda s: s | head("dense.linear") | head("classifier"), ("dense.linear.",)),
    "layer too many": (layer_too_many, ("encoder.layer.2.",)),
}


def load(folder):
    """(our model, the warnings while loading it)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = BertModel.from_pretrained(folder, impl="native")
    return model, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("name", LOADED)
def test_what_auto_model_loads_is_loaded_and_the_rest_is_named(name, encoder, tmp_path):
    transformers = pytest.importorskip("transformers")
    checkpoint, left_out = LOADED[name]
    state = checkpoint(encoder.state_dict())
    CONFIG.save_pretrained(tmp_path)
    save_state_dict(tmp_path, {key: t.clone() for key, t in state.items()})
    theirs, report = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    ours, said = load(tmp_path)
    for key, t in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], t), key

    others = [key for key in state if key.startswith(left_out)] if left_out else []
    assert set(others) <= set(report["unexpected_keys"])
    assert len(said) == bool(others)
    assert all("left out, as no part of this model" in words and str(tmp_path) in words for words in said)
    shown = sorted(key for key in state if any(key in words for words in said))
    assert set(shown) <= set(others)
    assert len(shown) >= min(len(others), 10)


def test_the_prefix_of_data_parallel_is_removed(encoder, tmp_path):
    """AutoModel of transformers 5 loads nothing from such a file, and computes with random weights."""
    CONFIG.save_pretrained(tmp_path)
    state = prefixed("module.", prefixed("bert.", encoder.state_dict()) | head("linear"))
    torch.save(state, tmp_path / "pytorch_model.bin")
    ours, said = load(tmp_path)
    assert torch.equal(ours(IDS).last_hidden_state, encoder(IDS).last_hidden_state)
    assert len(said) == 1
    assert "linear.weight, linear.bias" in said[0]


@pytest.mark.parametrize("prefix", ["", "module.", "module.bert."])
def test_an_old_archive_with_another_head(prefix, encoder, tmp_path):
    """The archive is pytorch-pretrained-bert's, which has only Google's config."""
    (tmp_path / "bert_config.json").write_text(json.dumps(CONFIG.to_dict()))
    torch.save(prefixed(prefix, encoder.state_dict()) | head("module.score"), tmp_path / "pytorch_model.bin")
    ours, said = load(tmp_path)
    assert torch.equal(ours(IDS).last_hidden_state, encoder(IDS).last_hidden_state)
    assert len(said) == 1
    assert "module.score.weight, module.score.bias" in said[0]


REFUSED = {
    "twice": (lambda s: s | prefixed("bert.", s), {}, "39 unexpected .bert.embeddings"),
    "twice, once as DataParallel saves it": (lambda s: s | prefixed("module.", s), {}, "with and without module"),
    "a weight is missing": (lambda s: {n: t for n, t in s.items() if "layer.1.output.dense.bias" not in n}, {},
                            r"1 missing \(encoder.layer.1.output.dense.bias"),
    "another model's prefix": (lambda s: prefixed("auto_model.", s), {}, "holds 0|39 missing"),
    "quantised": (lambda s: s, {"quantization_config": {"quant_method": "bitsandbytes"}}, "weights are quantised"),
}  # fmt: skip


@pytest.mark.parametrize(("checkpoint", "changes", "message"), REFUSED.values(), ids=REFUSED)
def test_a_checkpoint_without_the_whole_encoder_is_refused(checkpoint, changes, message, encoder, tmp_path):
    """transformers would warn and fill in random weights, or quantise in its own way."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict() | changes))
    state = checkpoint(encoder.state_dict())
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message) as caught:
        BertModel.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
