"""An error for second derivatives, which the Triton kernels do not have."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional as F


class OnlyOnce(torch.autograd.Function):
    """The identity, which raises an error if its gradient is differentiated again. The Triton kernels' backward passes
    are not differentiable, and torch would only warn and leave their part of the second derivative out."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fastbert: second derivatives (create_graph=True) do not go through its Triton kernels; "
                'fastbert.restore(model), or fastbert.accelerate(model, impl="native"), for these calls'
            )
        return dy


def only_once(x: Tensor, impl: F.Impl | None) -> Tensor:
    """The output x of a pass, through `OnlyOnce` if Triton kernels computed it."""
    if torch.is_grad_enabled() and x.requires_grad and F.choose_impl(impl, x.device) == "triton":
        return OnlyOnce.apply(x)
    return x
