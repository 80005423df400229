"""Loading weights into the models, and initialising weights that a checkpoint does not have."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import checkpoint
from ..config import BertConfig
from ..formats import open_model, opened
from ..formats.integers import Integers, expect_layout, take_out
from ..formats.sentence_folder import folder_of_config

# end of a weight's name -> ((dimension, field of the config that gives its size), ...)
SIZES_IN_WEIGHTS = {
    "embeddings.word_embeddings.weight": ((0, "vocab_size"), (1, "hidden_size")),
    "embeddings.position_embeddings.weight": ((0, "max_position_embeddings"),),
    "embeddings.token_type_embeddings.weight": ((0, "type_vocab_size"),),
    "encoder.layer.0.intermediate.dense.weight": ((0, "intermediate_size"),),
}

# Weights of heads and poolers of transformers' BERT classes, which are left out without a warning.
_KNOWN_HEADS = re.compile(r"cls\.|classifier\.|qa_outputs\.|(bert\.)?pooler\.")


class Read(NamedTuple):
    """The content of a model's files: the config, the weights as floating-point numbers, and the integers of those that
    are stored in 8 bits, by the name of their layer."""

    config: BertConfig
    state: dict[str, Tensor]
    integers: dict[str, Integers]

    def dtype(self, asked: torch.dtype | None) -> torch.dtype | None:
        """The dtype to load the model in: `asked`; if that is None and weights are in 8 bits, the dtype of the table of
        words, because biases of such layers are float32."""
        if asked is not None or not self.integers:
            return asked
        return next(t.dtype for name, t in self.state.items() if name.endswith("word_embeddings.weight"))


def read_model(id_or_path: str | Path, **changes: Any) -> Read:
    """From a local folder or a hub id, or from another format that `fastbert convert` reads. In a folder of
    sentence-transformers the BERT may be in a subfolder.

    changes: fields of the config that override the file's.

    DataParallel's prefix "module." is removed from names. The config does not mention 8-bit weights, since a saved copy
    of the model has floating-point weights.
    Raises: CheckpointError, also if the config describes a larger model than the weights hold, for weights quantised in
        a way that `formats.integers` cannot read, and for a name that occurs with that prefix and without.
    """
    with opened(id_or_path) as path:
        foreign = open_model(path)
        if foreign is None:
            path = folder_of_config(path)
            config, state = BertConfig.from_pretrained(path, **changes), checkpoint.load_state_dict(path)
            twice = [name for name in state if name.startswith("module.") and name.removeprefix("module.") in state]
            if twice:
                raise checkpoint.CheckpointError(f"{id_or_path}: with and without module.: {checkpoint.listed(twice)}")
            state = {name.removeprefix("module."): t for name, t in state.items()}
        else:
            config, state = BertConfig.from_model(foreign, **changes), foreign.state_dict()
            _name_what_is_left_out(foreign.other_heads, id_or_path)
    integers: dict[str, Integers] = {}
    if quantised := config.extra.pop("quantization_config", None):
        expect_layout(quantised, id_or_path)
        state, integers = take_out(state, id_or_path)
    _expect_sizes(config, state, id_or_path)
    return Read(config, state, integers)


def _expect_sizes(config: BertConfig, state: dict[str, Tensor], source: str | Path) -> None:
    """Raises CheckpointError if the config describes a larger model than the weights hold, before a model of that size
    is built."""
    numbers = [re.search(r"(?:^|\.)encoder\.layer\.(\d+)\.", name) for name in state]
    held = {"num_hidden_layers": 1 + max((int(number[1]) for number in numbers if number), default=-1)}
    for name, t in state.items():
        for end, sizes in SIZES_IN_WEIGHTS.items():
            if name.removeprefix("bert.") == end and t.dim() == 2:
                held |= {field: t.shape[dimension] for dimension, field in sizes}
    for field, size in held.items():
        if getattr(config, field) > size:
            raise checkpoint.CheckpointError(
                f"{source}: the config says {field} {getattr(config, field):,}, but the weights hold {size:,}"
            )


def load_encoder(
    model: nn.Module, state: dict[str, Tensor], source: str | Path, ignore_missing: Iterable[str] = ()
) -> None:
    """Puts a checkpoint's tensors into the model. Tensors for which the model has no parameter are left out, as by
    transformers' AutoModel; a warning names them, unless they belong to a head of transformers' BERT classes.

    ignore_missing: patterns of names that the checkpoint may lack.

    Raises: CheckpointError, which names tensors that are missing, duplicate, or of the wrong shape.
    """
    own = {name.removeprefix("bert.") for name in model.state_dict(keep_vars=True)}
    others = [name for name in state if checkpoint.current_name(name).removeprefix("bert.") not in own]
    loaded = checkpoint.load_into(
        model, state, ignore_missing=ignore_missing, ignore_unexpected=others, assign=True, source=source
    )
    _name_what_is_left_out([name for name in loaded.unexpected if not _KNOWN_HEADS.match(name)], source)


def _name_what_is_left_out(names: list[str], source: str | Path) -> None:
    if names:
        listed = checkpoint.listed(names)
        warnings.warn(f"{source}: left out, as no part of this model: {listed}", stacklevel=4)


class LeftUninitialised(TorchFunctionMode):
    """Within this mode torch.nn.init does nothing. On the meta device there is nothing to fill, but `normal_` would
    import torch's compiler, which takes a second."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"]
        return func(*args, **kwargs)


def initialise(module: nn.Module, spread: float, generator: torch.Generator | None = None) -> None:
    """Initialises a module's own parameters as in the paper: normal weights of standard deviation `spread`, zero
    biases.

    LayerNorms keep torch's ones and zeros. generator: by default torch's global one.
    """
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=spread, generator=generator)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()
