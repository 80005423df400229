"""Writes a BERT in the format of google-research/bert: bert_model.ckpt, bert_config.json, vocab.txt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from ..storage import CheckpointError, write_json
from .families import GOOGLE
from .model import Model
from .names import Rule, pattern_of
from .tensorflow_bundle import write_bundle

PREFIX = "bert_model.ckpt"
# The keys of google-research/bert's BertConfig.
_CONFIG_KEYS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "type_vocab_size",
    "initializer_range",
)  # fmt: skip


def write_google(model: Model, folder: Path, words: list[str]) -> list[str]:
    """Writes a model into a folder; returns sentences about differences in what Google's code will compute.

    Raises: CheckpointError for a model that Google's code cannot compute: another architecture, pruned heads, another
        epsilon or activation.
    """
    config, path = model.config, model.source.path
    if config["model_type"] != "bert":
        raise CheckpointError(f"{path}: only a BERT is written for TensorFlow, and this is {config['model_type']}")
    if config.get("pruned_heads"):
        raise CheckpointError(f"{path} has pruned heads, which Google's code does not have")
    if config["layer_norm_eps"] != 1e-12:
        raise CheckpointError(f"{path} has layer_norm_eps {config['layer_norm_eps']}, and Google's code always 1e-12")
    notes = []
    if config["hidden_act"] == "gelu":
        notes.append("Google's code computes gelu by tanh, and this model by erf: its values will differ slightly.")
    elif config["hidden_act"] not in ("gelu_new", "gelu_pytorch_tanh", "relu"):
        raise CheckpointError(f"{path} has hidden_act {config['hidden_act']!r}, which Google's code does not have")
    theirs = {key: config[key] for key in _CONFIG_KEYS}
    theirs["hidden_act"] = "relu" if config["hidden_act"] == "relu" else "gelu"
    write_json(folder / "bert_config.json", theirs)
    write_bundle(folder / PREFIX, _variables(model))
    (folder / "checkpoint").write_text(f'model_checkpoint_path: "{PREFIX}"\n', encoding="utf-8")
    if words:
        (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8", newline="\n")
    return notes


def _variables(model: Model) -> Iterator[tuple[str, Tensor]]:
    patterns = [(pattern_of(rule.ours), rule) for rule in GOOGLE.rules()]
    for name, variable in model.tensors.items():
        rule, numbers = next(((rule, m.groupdict()) for p, rule in patterns if (m := p.fullmatch(name))), (None, {}))
        if rule is None:
            raise CheckpointError(f"{model.source.path}: Google's code has no variable for {name}")
        yield rule.theirs.format(**numbers), _turned_back(rule, variable.read())


def _turned_back(rule: Rule, t: Tensor) -> Tensor:
    return t.t() if rule.turn.transposed else t
