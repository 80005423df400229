"""The tensors and numbers of an encoder layer. In its own file, so that importing it needs no Triton."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LayerWeights(NamedTuple):
    """The tensors of a layer: widths C, A = H D and F. Any bias may be None; query, key and value have one or none."""

    query: Tensor  # [A, C]
    query_bias: Tensor | None
    key: Tensor
    key_bias: Tensor | None
    value: Tensor
    value_bias: Tensor | None
    out: Tensor  # [C, A]
    out_bias: Tensor | None
    out_norm: Tensor  # [C]
    out_norm_bias: Tensor | None
    up: Tensor  # [F, C]
    up_bias: Tensor | None
    down: Tensor  # [C, F]
    down_bias: Tensor | None
    down_norm: Tensor  # [C]
    down_norm_bias: Tensor | None


class LayerOptions(NamedTuple):
    """Numbers of a layer.

    Attributes:
        heads: H.
        activation: one of the feed-forward operator's, but not geglu.
        out_eps, down_eps: eps of the LayerNorms after attention and after the feed-forward.
        probs_p, out_p, down_p: dropout of attention's probabilities, before the first and before the second LayerNorm.
        probs_stream, out_stream, down_stream: the random stream of each dropout.
        fold: the LayerNorms add the biases of the products before them, and compute the gradients of these biases.
    """

    heads: int
    activation: str = "gelu"
    out_eps: float = 1e-12
    down_eps: float = 1e-12
    probs_p: float = 0.0
    out_p: float = 0.0
    down_p: float = 0.0
    probs_stream: int = 0
    out_stream: int = 0
    down_stream: int = 0
    fold: bool = False
