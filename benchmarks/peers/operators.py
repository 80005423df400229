"""The other operators by others: plain torch as everybody writes it, torch.compile of that, and Liger's kernels.

Each entry takes the operator's inputs by name, as in `fastbert.functional`, and gives its output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as tf
from torch import Tensor

from ..harness.case import Missing, need


@dataclass(frozen=True)
class OpPeer:
    """`make(device)` gives a function of the operator's inputs."""

    row: str
    peer: str
    make: Callable[[torch.device], Callable[..., Tensor]]
    package: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    slow: bool = False


def add_layer_norm(x, residual, weight, bias, eps=1e-12, *, dropout_p=0.0, **_) -> Tensor:
    return tf.layer_norm(tf.dropout(x, dropout_p) + residual, weight.shape, weight, bias, eps)


def feed_forward(x, up_weight, up_bias, down_weight, down_bias, activation="gelu", **_) -> Tensor:
    return tf.linear(tf.gelu(tf.linear(x, up_weight, up_bias)), down_weight, down_bias)


def linear_cross_entropy(hidden, weight, bias, labels, **_) -> Tensor:
    return tf.cross_entropy(tf.linear(hidden, weight, bias).float(), labels)


def embedding_layer_norm(
    input_ids, token_type_ids, positions, word, position, token_type, weight, bias, eps=1e-12, **_
) -> Tensor:
    x = tf.embedding(input_ids, word) + tf.embedding(token_type_ids, token_type) + tf.embedding(positions, position)
    return tf.layer_norm(x, weight.shape, weight, bias, eps)


def pool(x, cu_seqlens, mode="mean", normalize=False, **_) -> Tensor:
    lengths = cu_seqlens.diff().long()
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=x.device), lengths, output_size=x.shape[0])
    sums = torch.zeros(len(lengths), x.shape[1], device=x.device).index_add_(0, owner, x.float())
    return (sums / lengths[:, None]).to(x.dtype)


def _compiled(plain: Callable[..., Tensor]) -> Callable[[torch.device], Callable[..., Tensor]]:
    def make(device: torch.device) -> Callable[..., Tensor]:
        import torch._functorch.config  # not there before somebody asks for it

        # a graph is run backward many times over here, so its buffers may not be given away
        torch._functorch.config.donated_buffer = False
        return torch.compile(plain, mode="max-autotune-no-cudagraphs" if device.type == "cuda" else None)

    return make


def _liger_layer_norm(device: torch.device) -> Callable[..., Tensor]:
    function = need("liger-kernel", "liger_kernel.ops.layer_norm").LigerLayerNormFunction

    def call(x, residual, weight, bias, eps=1e-12, *, dropout_p=0.0, **_) -> Tensor:
        return function.apply(tf.dropout(x, dropout_p) + residual, weight, bias, eps)

    return call


def _liger_cross_entropy(device: torch.device) -> Callable[..., Tensor]:
    module = need("liger-kernel", "liger_kernel.transformers.fused_linear_cross_entropy")
    loss = module.LigerFusedLinearCrossEntropyLoss()

    def call(hidden, weight, bias, labels, **_) -> Tensor:
        if not hidden.requires_grad:
            raise Missing("Liger's loss computes its gradients in the forward pass; see forward+backward")
        return loss(weight, hidden, labels, bias)

    return call


def _of(plain: Callable[..., Tensor], *more: OpPeer) -> tuple[OpPeer, ...]:
    return (
        OpPeer("torch", "torch", lambda device: plain),
        OpPeer("torch.compile", "torch.compile", _compiled(plain), package="torch", slow=True),
        *more,
    )


PEERS: dict[str, tuple[OpPeer, ...]] = {
    "add_layer_norm": _of(add_layer_norm, OpPeer("liger", "liger-kernel", _liger_layer_norm, devices=("cuda",))),
    "feed_forward": _of(feed_forward),
    "linear_cross_entropy": _of(
        linear_cross_entropy, OpPeer("liger", "liger-kernel", _liger_cross_entropy, devices=("cuda",))
    ),
    "embedding_layer_norm": _of(embedding_layer_norm),
    "pool": _of(pool),
}


def bound(function: Callable[..., Tensor], inputs: dict[str, Any]) -> Callable[..., Tensor]:
    """`function` of the tensors that have gradients, the rest of `inputs` filled in."""
    return lambda **leaves: function(**{**inputs, **leaves})
