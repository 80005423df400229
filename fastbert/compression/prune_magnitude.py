"""Single weights set to zero, those of least magnitude: at once, or step by step while the rest is trained.

The share of zeros after step t of a ramp of T steps is share * (1 - (1 - t / T)^3) (Zhu and Gupta, arXiv:1710.01878).
The matrices keep their shapes: no product gets faster, and no file smaller unless it is packed.
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
EVERY = 10  # steps between two choices of what is zero
RAMP = 2 / 3  # share of all steps in which the share of zeros grows; in the rest what is left is trained
_MATRIX = re.compile(r"(?:.*\.)?encoder\.layer\.\d+\.(?!.*LayerNorm).+\.weight")


def matrices(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Of all tensors the weights of the layers' linear layers, which are those that get zeros."""
    return {name: t for name, t in named if _MATRIX.fullmatch(name) and t.numel()}


def masks_of(weights: Mapping[str, Tensor], share: float, scope: str) -> dict[str, Tensor]:
    """name -> bool, False at this share of all elements, those of least magnitude: of all matrices together (global),
    or of each one (layer)."""
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {SCOPES}, got {scope!r}")
    if scope == "layer":
        return {name: _largest(w.abs().flatten(), share).view(w.shape) for name, w in weights.items()}
    joined = _largest(torch.cat([w.abs().flatten() for w in weights.values()]), share)
    parts = joined.split([w.numel() for w in weights.values()])
    return {name: part.view(w.shape) for (name, w), part in zip(weights.items(), parts, strict=True)}


def _largest(sizes: Tensor, share: float) -> Tensor:
    """[N] bool, False at round(share * N) elements, the smallest ones; of equal ones the first."""
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
    """What share is zero after so many of all steps."""
    return share * (1.0 - (1.0 - min(1.0, step / steps_of_ramp(steps))) ** 3)


def steps_of_ramp(steps: int) -> int:
    """After how many of all steps the share of zeros is whole."""
    return max(1, round(RAMP * steps))


class GradualPruning(Shaping):
    """Zeros that grow in number while a model is fine-tuned, and stay.

    A run that goes on from a checkpoint finds what is zero in the weights themselves. A model is kept only once its
    share of zeros is whole, however good one with fewer zeros was.
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
            for name, mask in self._masks.items():  # what is zero stays so, and counts as the smallest
                weights[name].mul_(mask)
            self._masks = masks_of(weights, share_at(step, steps, self.share), self.scope)
        for name, mask in self._masks.items():
            weights[name].mul_(mask)
