"""A model of any supported format, with config and weights under transformers' names."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..storage import CheckpointError
from .architectures import ARCHITECTURES, Fit, fit
from .detect import find_source
from .families import GENERATOR
from .names import Named, assign, assign_plain, drop_tied
from .source import Source, told_of
from .variable import Variable

_OTHER_HEAD = "no part of the encoder, nor of a head that is known"
_HEAD_WIDTH_OF_ELECTRA = 64  # in every one of Google's: model_size small, base and large
_BERT_DEFAULTS = {
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
# ALBERT's own defaults, where transformers has others.
_ALBERT_DEFAULTS = {
    "num_hidden_groups": 1,
    "inner_group_num": 1,
    "hidden_dropout_prob": 0,
    "attention_probs_dropout_prob": 0,
}


@dataclass(frozen=True)
class Model:
    """A model under transformers' names; each weight is read on access.

    Attributes:
        source: the checkpoint that it is from.
        config: the content of a config.json.
        tensors: transformers' name -> weight.
        used: the source's name -> transformers' name.
        skipped: the source's name -> why the variable is not read.
        notes: sentences about decisions, for the user.
        generator: ELECTRA's generator, which is in the same checkpoint as the discriminator; else None.
    """

    source: Source
    config: dict[str, Any]
    tensors: dict[str, Variable]
    used: dict[str, str]
    skipped: dict[str, str]
    notes: list[str] = field(default_factory=list)
    generator: Model | None = None

    @property
    def other_heads(self) -> list[str]:
        """Variables that `open_model` left out, because they are of no known head."""
        return [name for name, reason in self.skipped.items() if reason == _OTHER_HEAD]

    def state_dict(self) -> dict[str, Tensor]:
        """The weights, on the CPU and contiguous; memory-mapped if the file holds them in this form."""
        return {name: t.read() for name, t in self.tensors.items()}


def open_model(path: str | os.PathLike, *, activation: str | None = None) -> Model | None:
    """The model at a path, with the weights that a model here can use; None for a folder of transformers.

    Args:
        path: a folder, a checkpoint's prefix, or a file.
        activation: the meaning of the config's "gelu": "gelu" or "gelu_new"; None takes what the framework computes.

    In PyTorch's files unknown heads are left out: see `Model.other_heads`.
    Raises: CheckpointError, in one line: a file that is missing or damaged, an unknown variable, a wrong shape, a
    format
        that is not supported.
    """
    source = find_source(Path(path))
    return None if source is None else understand(source, activation=activation, other_heads=True)


def understand(source: Source, *, activation: str | None = None, other_heads: bool = False) -> Model:
    """A source under transformers' names, compared with its config.

    other_heads: leave out unknown heads if the names are transformers'. Raises CheckpointError.
    """
    try:
        return _understand(source, activation, other_heads)
    except CheckpointError as error:
        raise told_of(source.path, error) from None


def _understand(source: Source, activation: str | None, other_heads: bool) -> Model:
    family = source.family(source.variables)
    if family is not None:
        named, model_type = assign(family, source.variables), family.model_type
    else:
        model_type = source.config.get("model_type", "bert")
        if model_type not in ARCHITECTURES:
            raise CheckpointError(f"its model_type is {model_type!r}; one of {', '.join(ARCHITECTURES)} is read")
        named = assign_plain(model_type, source.variables)
        if other_heads:
            _leave_out_other_heads(named, model_type)
    drop_tied(named)
    if not named.tensors:
        raise CheckpointError("it holds no weights")
    notes: list[str] = []
    _settle_dtype(named, notes)
    tensors = {name: t for name, t in named.tensors.items() if not name.startswith(GENERATOR)}
    config = dict(source.config)
    if model_type == "albert":
        config = {"embedding_size": config.get("hidden_size")} | _ALBERT_DEFAULTS | config
    found = fit(ARCHITECTURES[model_type], tensors, config)
    for part, sentence in family.differs if family is not None else ():
        if any(name.startswith(part) for name in tensors):
            notes.append(sentence)
    config = _config(model_type, config, found, named, notes)
    config["hidden_act"] = _activation(source, config.get("hidden_act", "gelu"), activation, notes)
    if source.words and len(source.words) > config["vocab_size"]:
        raise CheckpointError(f"the vocabulary has {len(source.words)} words, the model {config['vocab_size']}")
    model = Model(source, config, tensors, named.used, named.skipped, notes, _generator(source, named, config))
    return model


def _leave_out_other_heads(named: Named, model_type: str) -> None:
    for theirs, ours in list(named.used.items()):
        if not ARCHITECTURES[model_type].knows(ours):
            del named.tensors[ours], named.used[theirs]
            named.skipped[theirs] = _OTHER_HEAD


def _settle_dtype(named: Named, notes: list[str]) -> None:
    """Gives all weights the same dtype, the narrowest that holds all of them exactly, since a model has one dtype."""
    for name, t in named.tensors.items():
        if t.dtype is None or not t.dtype.is_floating_point:
            raise CheckpointError(f"{name} is of {t.kind}, which is not read")
    dtypes = {t.dtype for t in named.tensors.values()}
    if len(dtypes) > 1:
        widest = functools.reduce(torch.promote_types, dtypes)
        kinds = ", ".join(sorted({t.kind for t in named.tensors.values()}))
        notes.append(f"Its weights are of several types ({kinds}); all are {str(widest).removeprefix('torch.')} now.")
        for name, t in named.tensors.items():
            named.tensors[name] = t.as_dtype(widest)


def _config(model_type: str, config: dict[str, Any], found: Fit, named: Named, notes: list[str]) -> dict[str, Any]:
    """The config.json, from the source's config, the shapes of the weights, and the framework's defaults."""
    complete = _BERT_DEFAULTS | found.sizes | config | {"model_type": model_type}
    if model_type == "electra":
        complete.setdefault("embedding_size", found.sizes["embedding_size"])
    if "num_attention_heads" not in complete:
        if len(named.heads) == 1:
            complete["num_attention_heads"] = next(iter(named.heads))
        elif model_type == "electra":
            complete["num_attention_heads"] = max(1, complete["hidden_size"] // _HEAD_WIDTH_OF_ELECTRA)
            notes.append(
                f"There is no config: attention heads are {_HEAD_WIDTH_OF_ELECTRA} wide, as in all of Google's."
            )
        else:
            raise CheckpointError("there is no bert_config.json, and the shapes do not show the number of heads")
    if named.heads - {complete["num_attention_heads"]}:
        heads = ", ".join(map(str, sorted(named.heads)))
        raise CheckpointError(f"its weights have {heads} heads, its config {complete['num_attention_heads']}")
    if found.labels is not None and len(complete.get("id2label") or ()) != found.labels:
        complete["id2label"] = {str(i): f"LABEL_{i}" for i in range(found.labels)}
        complete["label2id"] = {f"LABEL_{i}": i for i in range(found.labels)}
    if not complete.get("architectures"):
        classes = ARCHITECTURES[model_type].classes
        complete["architectures"] = [next(name for heads, name in classes if heads <= found.heads)]
    return complete


def _activation(source: Source, said: str, wanted: str | None, notes: list[str]) -> str:
    """hidden_act of the config.json."""
    if said != "gelu":
        if wanted is not None and wanted != said:
            raise CheckpointError(f"its config says hidden_act {said!r}, which is neither gelu nor gelu_new")
        return said
    act = source.activation if wanted is None else wanted
    why = f"which is the default for {source.title}" if wanted is None else "as asked for"
    notes.append(f'"gelu" in its config is {act}, computed by {"tanh" if act == "gelu_new" else "erf"}, {why}.')
    return act


def _generator(source: Source, named: Named, config: dict[str, Any]) -> Model | None:
    tensors = {
        name.removeprefix(GENERATOR): replace(v, name=name.removeprefix(GENERATOR))
        for name, v in named.tensors.items()
        if name.startswith(GENERATOR)
    }
    if not tensors:
        return None
    shared = {name: v for name, v in named.tensors.items() if name.startswith("electra.embeddings.")}
    tensors = shared | tensors  # a generator has no embeddings of its own, unless they were not tied
    known = {key: config[key] for key in ("vocab_size", "embedding_size", "max_position_embeddings", "type_vocab_size")}
    found = fit(ARCHITECTURES["electra"], tensors, known)
    # model/modeling.py computes the number of the generator's heads like this, independently of the discriminator's.
    heads = max(1, found.sizes["hidden_size"] // _HEAD_WIDTH_OF_ELECTRA)
    sizes = found.sizes | {"num_attention_heads": heads, "architectures": None}
    generator = _config("electra", {k: v for k, v in config.items() if k not in sizes} | sizes, found, named, [])
    return Model(source, generator, tensors, {}, {})
