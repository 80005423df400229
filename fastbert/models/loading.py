"""What the models share when weights are loaded, or drawn where there are none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import checkpoint
from ..config import BertConfig
from ..formats import open_model, opened

# where a checkpoint's own shapes show a size: end of a name -> (its dimension, the field of the config)
SIZES_IN_WEIGHTS = {
    "embeddings.word_embeddings.weight": ((0, "vocab_size"), (1, "hidden_size")),
    "embeddings.position_embeddings.weight": ((0, "max_position_embeddings"),),
    "embeddings.token_type_embeddings.weight": ((0, "type_vocab_size"),),
    "encoder.layer.0.intermediate.dense.weight": ((0, "intermediate_size"),),
}


def read_model(id_or_path: str | Path, **changes: Any) -> tuple[BertConfig, dict[str, Tensor]]:
    """(config, weights) from a local folder or a hub id, or from another format that `fastbert convert` reads.

    changes: fields of the config that win over the file's.

    Raises: CheckpointError, also where the config asks for more than the weights hold.
    """
    with opened(id_or_path) as path:
        foreign = open_model(path)
        if foreign is None:
            config, state = BertConfig.from_pretrained(path, **changes), checkpoint.load_state_dict(path)
        else:
            config, state = BertConfig.from_model(foreign, **changes), foreign.state_dict()
    _expect_sizes(config, state, id_or_path)
    return config, state


def _expect_sizes(config: BertConfig, state: dict[str, Tensor], source: str | Path) -> None:
    """Refuses a config that asks for more than the weights hold, before a model of that size is built."""
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


def of_other_heads(state: dict[str, Tensor]) -> tuple[str, ...]:
    """Patterns of names that a model without these heads leaves alone: the checkpoint was trained for another task."""
    names = ("cls.*", "classifier.*", "qa_outputs.*")
    if any(name.startswith("bert.encoder.") for name in state):
        names += tuple(name for name in state if not name.startswith("bert."))
    return names


class LeftUninitialised(TorchFunctionMode):
    """torch.nn.init does nothing. On the meta device it has nothing to fill, yet would import torch's compiler."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"]
        return func(*args, **kwargs)


def initialise(module: nn.Module, spread: float, generator: torch.Generator | None = None) -> None:
    """The paper's start of a module's own parameters: normal weights of standard deviation `spread`, zero biases.

    LayerNorms keep torch's start, ones and zeros. generator: by default torch's global one.
    """
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=spread, generator=generator)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()
