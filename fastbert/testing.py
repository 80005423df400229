"""What tests, `fastbert verify` and the benchmarks share: workloads, and the error budget.

The budget: against the same computation in float64, an implementation may err at most twice as much as plain
torch does in the same dtype, as relative root mean square, per named tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Awkward batches, each here for a reason; lengths in tokens.
LENGTHS = {
    "one_token": [1],
    "under_a_block": [63],
    "not_a_multiple": [100],
    "over_blocks": [513],
    "mixed": [5, 128, 1, 77],
    "with_empty": [3, 0, 64],
    "no_tokens": [0],
    "no_sequences": [],
}

TINY = 1e-7  # what a budget adds, so that an exact reference does not forbid one rounding of float32


def cu_seqlens_of(lengths: list[int], device: torch.device | str = "cpu") -> Tensor:
    """[B + 1] int32 starts of sequences with these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)


def relative_rms(value: Tensor, truth: Tensor) -> float:
    """||value - truth|| / ||truth|| in float64 (just ||value|| where truth is zero); inf where value has a NaN."""
    if value.shape != truth.shape:
        raise AssertionError(f"shape {tuple(value.shape)}, expected {tuple(truth.shape)}")
    value, truth = value.detach().double().cpu(), truth.detach().double().cpu()
    both_minus_inf = (value == truth) & truth.isinf()  # a log-sum-exp over nothing
    error = torch.where(both_minus_inf, 0.0, value - truth).norm()
    size = torch.where(both_minus_inf, 0.0, truth).norm()
    ratio = (error / size if size > 0 else error).item()
    return ratio if ratio == ratio else float("inf")


def budget(plain: Tensor, truth: Tensor, factor: float = 2.0) -> float:
    """The relative RMS error allowed: `factor` times that of plain torch in the same dtype, plus TINY."""
    return factor * relative_rms(plain, truth) + TINY


def assert_within_budget(ours: Tensor, plain: Tensor, truth: Tensor, name: str = "output", factor: float = 2.0) -> None:
    """Fails unless err(ours) <= factor * err(plain) + TINY, both against float64 truth."""
    error, allowed = relative_rms(ours, truth), budget(plain, truth, factor)
    assert error <= allowed, f"{name}: relative RMS error {error:.2e}, budget {allowed:.2e}"
