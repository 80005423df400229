"""Small modules of torch, masks for them, and three copies of a module: accelerated, plain and in float64."""

import copy

import torch
from torch import nn

import fastbert

WIDTH, LENGTHS = 9, torch.tensor([9, 4, 1])
RIGHT = torch.arange(WIDTH) >= LENGTHS[:, None]  # True means padding, as in torch
LEFT = torch.arange(WIDTH) < WIDTH - LENGTHS[:, None]
BAND = (torch.arange(WIDTH)[:, None] - torch.arange(WIDTH)).abs() > 3  # True means forbidden
SCATTERED = torch.arange(WIDTH)[:, None] * 5 % 7 > torch.arange(WIDTH) * 3 % 8  # not a function of the distance
SCATTERED.fill_diagonal_(False)
SLOPE = -0.3 * (torch.arange(WIDTH)[:, None] - torch.arange(WIDTH)).abs().float()

MASKS = {
    "none": {},
    "right": {"src_key_padding_mask": RIGHT},
    "left": {"src_key_padding_mask": LEFT},
    "float_padding": {"src_key_padding_mask": torch.zeros(3, WIDTH).masked_fill(RIGHT, float("-inf"))},
    "src_mask": {"mask": BAND},
    "src_mask_float": {"mask": SLOPE},
    "src_mask_minus_inf": {"mask": torch.zeros(WIDTH, WIDTH).masked_fill(BAND, float("-inf"))},
    "src_mask_and_padding": {"mask": BAND, "src_key_padding_mask": RIGHT},
    "src_mask_and_left_padding": {"mask": SCATTERED, "src_key_padding_mask": LEFT},
    "src_mask_of_each_head": {"mask": torch.stack([BAND.roll(i, 0) & ~torch.eye(WIDTH).bool() for i in range(6)])},
}


def encoder(depth: int = 2, norm: bool = True, inner: int = 48, **options) -> nn.TransformerEncoder:
    options = {"batch_first": True, "dropout": 0.0, **options}
    layer = nn.TransformerEncoderLayer(32, 2, inner, **options)
    model = nn.TransformerEncoder(
        layer, depth, nn.LayerNorm(32) if norm else None, enable_nested_tensor=not options.get("norm_first")
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def three(model: nn.Module, impl: str = "native") -> tuple:
    """(accelerated, plain, truth) with the same weights."""
    return fastbert.accelerate(copy.deepcopy(model), impl=impl), model, copy.deepcopy(model).double()


def in_float64(options: dict) -> dict:
    return {name: t.double() if t.is_floating_point() else t for name, t in options.items()}


def padding_of(options: dict) -> torch.Tensor:
    padding = options.get("src_key_padding_mask", torch.zeros(3, WIDTH, dtype=torch.bool))
    return padding if padding.dtype == torch.bool else padding.isinf()
