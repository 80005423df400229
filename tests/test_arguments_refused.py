"""Tensors on another device, and tensors of a dtype with which an operator does not compute, are refused.

PyTorch does not check everywhere: `torch.nn.functional.linear` multiplies rows on the CPU by a weight on the meta
device, `embedding` accepts indices on it and `scaled_dot_product_attention` a mask. The results are arbitrary memory,
without an error. Weights stay on meta when a checkpoint was not loaded completely.
"""

import pytest
import torch
from torch import Tensor

from fastbert import functional as F
from fastbert.testing import INPUTS, ModelShape, function_of

SHAPE, LENGTHS = ModelShape(32, 2, 64, 1, vocab=64), [5, 0, 12, 1]
HIDDEN_DROPOUT = {"dropout_p": 0.3}
OPTIONS = {
    "attention": [{"bias": True}, {"mask": True}, {"alibi": True, "rotary": True}, {"lengths_k": [3, 0, 4, 4]}],
    "attention_padded": [{"bias": True}, {"mask": True}, {"alibi": True, "rotary": True}],
    "add_layer_norm": [{"x_bias": True, **HIDDEN_DROPOUT}], "add_layer_norm_sum": [{"x_bias": True, **HIDDEN_DROPOUT}],
    "add_rms_norm": [{"bias": False, "x_bias": True, **HIDDEN_DROPOUT}], "embedding_layer_norm": [HIDDEN_DROPOUT],
}  # fmt: skip


def linear_inputs():
    inputs = INPUTS["linear_act"](SHAPE, LENGTHS)
    return {name: inputs[name] for name in ("x", "weight", "bias")}


CALLS = [
    pytest.param(op, INPUTS[op](SHAPE, LENGTHS, **options), id="-".join((op, *options)))
    for op in INPUTS
    for options in OPTIONS.get(op, [{}])
] + [pytest.param("linear", linear_inputs(), id="linear")]


def elsewhere(value):
    return tuple(map(elsewhere, value)) if isinstance(value, tuple) else value.to("meta")


@pytest.mark.parametrize(("op", "inputs"), CALLS)
def test_a_tensor_on_another_device_is_refused(op, inputs):
    for name, value in inputs.items():
        if isinstance(value, (Tensor, tuple)):
            for impl in ("native", "reference"):
                with pytest.raises((ValueError, RuntimeError), match=r"device|meta"):
                    function_of(op)(**inputs | {name: elsewhere(value)}, impl=impl)


def test_the_message_names_the_tensor():
    x, weight = (
        torch.zeros(2, 32, dtype=torch.float32, device="cpu"),
        torch.zeros(16, 32, dtype=torch.float32, device="meta"),
    )
    with pytest.raises(ValueError, match="linear: all tensors must be on one device, but weight is on meta, not cpu"):
        F.linear(x, weight)


INTEGERS = (torch.int64, torch.int32, torch.uint8, torch.bool)


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_integers_in_place_of_floats_are_refused(impl):
    """Before this check a mean of integers was truncated, torch's attention misread a bias of uint8, and the results of
    dropout on integers had torch's default dtype."""
    for dtype in INTEGERS:
        inputs = INPUTS["pool"](SHAPE, LENGTHS)
        with pytest.raises(ValueError, match="pool: x must be floating-point, got torch"):
            F.pool(**inputs | {"x": inputs["x"].to(dtype)}, impl=impl)
        inputs = INPUTS["attention"](SHAPE, LENGTHS, bias=True)
        with pytest.raises(ValueError, match="attention: bias must be floating-point, got torch"):
            F.attention(**inputs | {"bias": inputs["bias"].to(dtype)}, impl=impl)
        inputs = INPUTS["add_layer_norm"](SHAPE, LENGTHS, **HIDDEN_DROPOUT)
        for op in ("add_layer_norm", "add_layer_norm_sum"):
            with pytest.raises(ValueError, match=f"{op}: x must be floating-point, got torch"):
                getattr(F, op)(**inputs | {"x": inputs["x"].to(dtype)}, impl=impl)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float32])
def test_labels_are_int64(dtype):
    """As in torch's own loss. In uint8 the ignored label, -100, would be another label."""
    inputs = INPUTS["linear_cross_entropy"](SHAPE, LENGTHS)
    with pytest.raises(ValueError, match="labels must be int64, got torch"):
        F.linear_cross_entropy(**inputs | {"labels": inputs["labels"].to(dtype)})
