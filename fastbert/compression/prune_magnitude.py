"""Sets the weights of least magnitude to zero: at once, or step by step while the others are trained.

The share of zeros after step t of a ramp of T steps is share * (1 - (1 - t / T)^3) (Zhu and Gupta, arXiv:1710.01878).
The matrices keep their shapes: products do not get faster, and files get smaller only if they are compressed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..training.shaping import Shaping

SCOPES = ("global", "layer")
NO_SPEED = (
    "zeros in a matrix of the same shape give no speed: every product multiplies by them. "
    "--heads, --ffn and --layers make the matrices smaller"
)
EVERY = 10  # steps between two choices of the zeros
RAMP = 2 / 3  # share of all steps in which the share of zeros grows; then the remaining weights are trained
_MATRIX = re.compile(r"(?:.*\.)?encoder\.layer\.\d+\.(?!.*LayerNorm).+\.weight")


def matrices(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The weights of the layers' linear layers, which are the ones that get zeros."""
    return {name: t for name, t in named if _MATRIX.fullmatch(name) and t.numel()}


def masks_of(weights: Mapping[str, Tensor], share: float, scope: str) -> dict[str, Tensor]:
    """name -> bool, False at this share of the elements, those of least magnitude among all matrices together (global)
    or in each one (layer)."""
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {SCOPES}, got {scope!r}")
    if scope == "layer":
        return {name: _largest(w.abs().flatten(), share).view(w.shape) for name, w in weights.items()}
    joined = _largest(torch.cat([w.abs().flatten() for w in weights.values()]), share)
    parts = joined.split([w.numel() for w in weights.values()])
    return {name: part.view(w.shape) for (name, w), part in zip(weights.items(), parts, strict=True)}


def _largest(sizes: Tensor, share: float) -> Tensor:
    """[N] bool, False at the round(share * N) smallest elements; of equal ones at the first."""
    gone = round(share * len(sizes))
    keep = torch.ones(len(sizes), dtype=torch.bool, device=sizes.device)
    if gone:
        threshold = sizes.kthvalue(gone).values
        keep[sizes < threshold] = False
        ties = (sizes == threshold).nonzero()[:, 0]
        keep[ties[: gone - int((~keep).sum())]] = False
    return keep


def sparsity(weights: Mapping[str, Tensor]) -> float:
    """The share of elements that are zero."""
    return sum(int((w == 0).sum()) for w in weights.values()) / sum(w.numel() for w in weights.values())


def share_at(step: int, steps: int, share: float) -> float:
    """The share of zeros after `step` of all `steps`."""
    return share * (1.0 - (1.0 - min(1.0, step / steps_of_ramp(steps))) ** 3)


def steps_of_ramp(steps: int) -> int:
    """The number of steps after which the share of zeros is complete."""
    return max(1, round(RAMP * steps))


class GradualPruning(Shaping):
    """Zeros whose number grows while a model is fine-tuned; a zero stays zero.

    A resumed run finds the zeros in the weights themselves. A model is kept only when its share of zeros is complete,
    even if one with fewer zeros was better.
    """

    def __init__(self, share: float, scope: str) -> None:
        self.share, self.scope = share, scope
        self._masks: dict[str, Tensor] = {}

    def binding(self) -> dict[str, Any]:
        return {"share of zeros": self.share, "zeros chosen": self.scope}

    def is_whole(self, step: int, steps: int) -> bool:
        return step >= steps_of_ramp(steps)

    def begin(self, model: nn.Module) -> None:
        self._masks = {name: w.detach() != 0 for name, w in matrices(model.named_parameters()).items()}

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        weights = matrices(model.named_parameters())
        end = steps_of_ramp(steps)
        if step <= end and (step % EVERY == 0 or step == end):
            for name, mask in self._masks.items():  # earlier zeros stay zero, and are the smallest
                weights[name].mul_(mask)
            self._masks = masks_of(weights, share_at(step, steps, self.share), self.scope)
        for name, mask in self._masks.items():
            weights[name].mul_(mask)
