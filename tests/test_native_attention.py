"""Attention from PyTorch's own operators, every variant beside the specification, which sets truth and budget."""

import pytest
import torch

from fastbert.testing import MODELS, assert_op, attention_inputs, attention_padded_inputs

pytestmark = pytest.mark.native

LENGTHS = [5, 5, 0, 17, 1, 17]  # runs of one length, an empty sequence among them, and one token
VARIANTS = {
    "plain": {},
    "grouped_heads": {"kv_heads": 1},
    "bias": {"bias": True},
    "mask": {"mask": True},
    "alibi": {"alibi": True},
    "window": {"window": (3, 1)},
    "rotary": {"rotary": True},
    "scale": {"scale": 0.1},
    "dropout": {"dropout_p": 0.3},
    "all": {"bias": True, "mask": True, "alibi": True, "window": (4, 4), "rotary": True, "kv_heads": 1, "scale": 0.2},
    "all_with_dropout": {"bias": True, "mask": True, "alibi": True, "window": (4, 4), "rotary": True, "kv_heads": 1,
                         "dropout_p": 0.3, "sequence_ids": torch.tensor([7, 1, 5, 0, 2, 9])},
    "lse": {"return_lse": True, "bias": True},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_packed(options, dtype):
    assert_op("attention", attention_inputs(MODELS["tiny"], LENGTHS, **options), dtype, impl="native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_padded(options, dtype):
    inputs = attention_padded_inputs(MODELS["tiny"], [9] * 6, **options)
    del inputs["seqlens"]
    assert_op("attention_padded", inputs, dtype, impl="native")


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["no_dropout", "dropout"])
def test_a_mask_and_a_bias_of_each_sequence(p):
    """Each sequence's own, also past an empty one; a row that its mask leaves no key is zero."""
    inputs = attention_inputs(MODELS["tiny"], LENGTHS, dropout_p=p)
    mask = torch.rand(6, 1, 17, 17, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[3, :, 2] = False
    inputs |= {"mask": mask, "bias": torch.randn(6, 2, 17, 17, generator=torch.Generator().manual_seed(2))}
    assert_op("attention", inputs, torch.float32, impl="native")
