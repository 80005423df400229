"""AdamW over groups of parameters with their own weight decay and learning rate."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from torch import nn

from .adamw import AdamW


def freeze(model: nn.Module, layers: int | None) -> int:
    """Freezes the embeddings and the first `layers` layers; None freezes nothing. Returns the number of frozen
    parameters.

    Raises: ValueError if the model has fewer layers.
    """
    if layers is None:
        return 0
    has = 1 + max(depth_of(name) for name, _ in model.named_parameters() if ".layer." in name)
    if not 0 <= layers <= has - 1:
        raise ValueError(f"cannot freeze {layers} layers of {has - 1}")
    frozen = [p for name, p in model.named_parameters() if 0 <= depth_of(name) <= layers]
    for p in frozen:
        p.requires_grad_(False)
    return len(frozen)


def depth_of(name: str) -> int:
    """0 for the embeddings, n + 1 for layer n, -1 for modules after the layers (pooler and classifier)."""
    layer = re.search(r"\.layer\.(\d+)\.", name)
    return int(layer[1]) + 1 if layer else 0 if ".embeddings." in name else -1


def groups_of(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float, layer_decay: float) -> list[dict]:
    """Parameter groups of an optimiser, with `scale`, a factor of the learning rate.

    Parameters with one dimension (biases and LayerNorms) do not decay. The learning rate of a layer is `layer_decay`
    times that of the layer above it.
    """
    trained = [(name, p) for name, p in parameters if p.requires_grad]
    top = 1 + max(depth_of(name) for name, _ in trained)
    groups: dict[tuple[float, float], dict] = {}
    for name, p in trained:
        depth = depth_of(name)
        scale = layer_decay ** (top - depth) if depth >= 0 else 1.0
        decay = weight_decay if p.ndim > 1 else 0.0
        group = groups.setdefault((scale, decay), {"params": [], "scale": scale, "decay": decay})
        group["params"].append(p)
    return list(groups.values())


class GroupedAdamW(AdamW):
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) over the groups of `groups_of`. Call `set_rate` before each step.

    bias_correction: False for the optimiser of Google's BERT, which does not correct the moments for their start at 0:
        p -= rate * (m / (sqrt(v) + eps) + decay * p)

    Copies and pickles keep eps and bias_correction, which are in `defaults`. A state_dict does not have them: it is
    loaded into an optimiser made with the same ones.
    """

    def __init__(self, groups: list[dict], betas: tuple[float, float], eps: float, bias_correction: bool) -> None:
        super().__init__(groups, lr=0.0, betas=betas, eps=eps, weight_decay=0.0, fused=True)
        self.defaults["bias_correction"] = bias_correction

    def set_rate(self, rate: float, step: int) -> None:
        """Sets the learning rate of the next step, which is the `step`-th of this optimiser, from 1.

        Without bias correction, rate, eps and decay are scaled so that torch's corrections cancel.
        """
        eps, is_corrected = self.defaults["eps"], self.defaults["bias_correction"]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            first, second = (1.0, 1.0) if is_corrected else (1.0 - beta1**step, math.sqrt(1.0 - beta2**step))
            lr = rate * group["scale"]
            group["lr"] = lr * first / second
            group["eps"] = eps / second
            group["weight_decay"] = group["decay"] * second / first
