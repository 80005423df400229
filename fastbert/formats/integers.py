"""Weights of 8-bit integers in a checkpoint, in the layout of the library compressed-tensors, format int-quantized.

    NAME.weight         [N, K] int8
    NAME.weight_scale   [N, 1], or [N, groups] of neighbours in a row: the weight is scales * integers
    NAME.input_factors  [K], ours: what is multiplied is x * factors, so the weight is scales * integers * factors

config.json says in `quantization_config` how activations are treated; here they are always rounded to 8 bits by ranges
of their own for each token. A reader that does not know `input_factors` would compute something else, so the scheme
then has a field that compressed-tensors refuses.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..storage import CheckpointError

WEIGHT, SCALE, FACTORS = ".weight", ".weight_scale", ".input_factors"
METHOD, FORMAT = "compressed-tensors", "int-quantized"
_STRATEGIES = ("channel", "group")


class Integers(NamedTuple):
    """A weight [N, K] in 8 bits: integers [N, K] int8, scales [N, groups] float32, factors [K] float32 or None."""

    integers: Tensor
    scales: Tensor
    factors: Tensor | None

    def weight(self) -> Tensor:
        """[N, K] float32."""
        grouped = self.integers.unflatten(1, (self.scales.shape[1], -1)) * self.scales[:, :, None]
        return grouped.flatten(1) if self.factors is None else grouped.flatten(1) * self.factors


def described(ignored: list[str], has_factors: bool) -> dict[str, Any]:
    """`quantization_config` of a model; ignored: names of its linear layers that are not in 8 bits."""
    numbers = {"num_bits": 8, "type": "int"}
    group: dict[str, Any] = {
        "targets": ["Linear"],
        "weights": {**numbers, "symmetric": True, "strategy": "channel", "dynamic": False},
        "input_activations": {**numbers, "symmetric": False, "strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    if has_factors:
        group["input_factors"] = True
    return {
        "quant_method": METHOD, "format": FORMAT, "quantization_status": "compressed", "ignore": ignored,
        "config_groups": {"group_0": group},
    }  # fmt: skip


def expect_layout(config: dict[str, Any], source: object) -> None:
    """Raises CheckpointError, in one line, where a `quantization_config` is of another layout."""
    method, groups = config.get("quant_method"), config.get("config_groups")
    if method != METHOD or config.get("format") != FORMAT or not isinstance(groups, dict):
        found = f"{method}, {config.get('format')}" if method == METHOD else method
        raise CheckpointError(
            f"{source}: its weights are quantised by {found}; {METHOD} with the format {FORMAT} can be read"
        )
    for group in groups.values():
        weights, inputs = group.get("weights") or {}, group.get("input_activations")
        known = weights.get("num_bits") == 8 and weights.get("type") == "int" and weights.get("symmetric", True)
        if not known or weights.get("strategy") not in _STRATEGIES:
            raise CheckpointError(
                f"{source}: its weights are quantised as {weights}; symmetric integers of 8 bits by channel or by "
                "group can be read"
            )
        if inputs is None or inputs.get("num_bits") != 8 or not inputs.get("dynamic"):
            raise CheckpointError(
                f"{source}: its activations are {inputs}; 8 bits by ranges found for each token can be read"
            )


def take_out(state: dict[str, Tensor], source: object) -> tuple[dict[str, Tensor], dict[str, Integers]]:
    """(the state with float32 weights in place of integers, what there was of integers: name of a layer -> Integers).

    Raises: CheckpointError, in one line, where an integer weight has no scales, or they do not fit.
    """
    floats, found = dict(state), {}
    for name, t in state.items():
        if t.dtype != torch.int8 or not name.endswith(WEIGHT):
            continue
        layer = name.removesuffix(WEIGHT)
        scales, factors = floats.pop(layer + SCALE, None), floats.pop(layer + FACTORS, None)
        if scales is None:
            raise CheckpointError(f"{source}: {name} is of 8-bit integers and has no {layer.rpartition('.')[2]}{SCALE}")
        fits = t.dim() == scales.dim() == 2 and len(scales) == len(t) and scales.shape[1] > 0
        if not fits or t.shape[1] % scales.shape[1] or (factors is not None and factors.shape != t.shape[1:]):
            shapes = [list(scales.shape), None if factors is None else list(factors.shape)]
            raise CheckpointError(f"{source}: {name} is {list(t.shape)}, its scales and factors are {shapes}")
        integers = Integers(t, scales.float(), None if factors is None else factors.float())
        floats[name], found[layer] = integers.weight(), integers
    return floats, found


def put_in(state: dict[str, Tensor], layer: str, integers: Integers) -> None:
    """The weight of a layer as it is stored in a file, instead of a float one."""
    state[layer + WEIGHT], state[layer + SCALE] = integers.integers, integers.scales
    if integers.factors is not None:
        state[layer + FACTORS] = integers.factors.clone()  # several layers share them, and a file would have one
