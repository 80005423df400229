"""Liger's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..harness.peer import GPU_ONLY, Missing, OperatorPeer, need

if TYPE_CHECKING:
    from torch import Tensor

PEER = "liger-kernel"


def _layer_norm(device: Any) -> Callable[..., Tensor]:
    import torch.nn.functional as tf

    function = need(PEER, "liger_kernel.ops.layer_norm").LigerLayerNormFunction

    def call(x, residual, weight, bias, eps=1e-12, *, dropout_p=0.0, **_) -> Tensor:
        return function.apply(tf.dropout(x, dropout_p) + residual, weight, bias, eps)

    return call


def _cross_entropy(device: Any) -> Callable[..., Tensor]:
    module = need(PEER, "liger_kernel.transformers.fused_linear_cross_entropy")
    loss = module.LigerFusedLinearCrossEntropyLoss()

    def call(hidden, weight, bias, labels, **_) -> Tensor:
        if not hidden.requires_grad:
            raise Missing("Liger's loss computes its gradients in the forward pass; see forward+backward")
        return loss(weight, hidden, labels, bias)

    return call


OPERATORS = {
    "add_layer_norm": (OperatorPeer("liger", PEER, _layer_norm, devices=GPU_ONLY),),
    "linear_cross_entropy": (OperatorPeer("liger", PEER, _cross_entropy, devices=GPU_ONLY),),
}
