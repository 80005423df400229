"""Gradients that have none themselves: the Triton kernels' backward passes say so when they are differentiated."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional as F


class OnlyOnce(torch.autograd.Function):
    """x, whose gradient has none itself: the Triton kernels' backward passes are not differentiable, and torch would go
    on without them, with no more than a warning."""

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
    """The output of a pass, behind `OnlyOnce` where kernels made it."""
    if torch.is_grad_enabled() and x.requires_grad and F.choose_impl(impl, x.device) == "triton":
        return OnlyOnce.apply(x)
    return x
