"""Which kernels take which entries of attention's list of tiles, on every architecture, for every kind of call."""

import itertools

import pytest
import torch

from fastbert.kernels import _attention_launch as launch
from fastbert.kernels._attention_arguments import UNBOUNDED, Tiles, Traits
from fastbert.kernels._attention_config import SHORT, TILE, attention_config

pytestmark = pytest.mark.once

ARCHES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
PARTS = {"long": 5, "medium": 3, "short": 4}  # entries
BOUNDS = {"long": UNBOUNDED, "medium": TILE, "short": SHORT}  # a bound for the longest sequence


def plans_of(direction, arch, head_dim, dtype, dropout_p, kv_heads, alibi, padded):
    traits = Traits(arch, dtype, 4, kv_heads, head_dim, padded, None, None, alibi, None, False, dropout_p, False, 0.125)
    strides = (0, 4 * head_dim, head_dim) * 3
    if direction == "forward":
        return launch.forward_plans(attention_config, traits, strides)
    return launch.backward_plans(attention_config, traits, strides, (4 * head_dim, kv_heads * head_dim), False)


@pytest.mark.parametrize("longest", PARTS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("arch", ARCHES)
def test_every_entry_belongs_to_exactly_one_kernel(arch, direction, longest):
    """On sm_80 at head_dim 64, dropout leaves no separate backward kernel for short sequences. The kernels with loops
    then took all entries, also those of the kernel for one tile, and every gradient of these was computed twice."""
    names = list(PARTS)
    there = names[names.index(longest) :]
    first_of = dict(zip(names, itertools.accumulate(PARTS.values(), initial=0), strict=False))
    wanted = {entry for name in there for entry in range(first_of[name], first_of[name] + PARTS[name])}
    schedule = torch.empty(sum(PARTS.values()), 2, dtype=torch.int32, device="cpu")
    for head_dim, dtype, dropout_p, kv_heads, alibi, padded in itertools.product(
        (32, 64, 128, 256), (torch.bfloat16, torch.float32), (0.0, 0.1), (4, 2), (False, True), (False, True)
    ):
        plans = plans_of(direction, arch, head_dim, dtype, dropout_p, kv_heads, alibi, padded)
        ranges = launch._parts(Tiles(schedule, (PARTS["long"], PARTS["medium"], BOUNDS[longest])), plans)
        taken = [entry for first, count in ranges for entry in range(first, first + count)]
        assert sorted(taken) == sorted(wanted), (head_dim, dtype, dropout_p, kv_heads, alibi, padded, ranges)
        loop, tile, short = (range(first, first + count) for first, count in ranges)
        assert not tile or (plans.tile is not None and tile.start >= PARTS["long"]), ranges
        assert not short or (plans.short is not None and short.start >= PARTS["long"] + PARTS["medium"]), ranges
        assert plans.tile is None or not loop or loop.stop <= PARTS["long"], ranges
