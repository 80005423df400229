"""What the fuzz calls: the operators of `functional`, and layers and 8-bit products, which are not in `functional`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastbert.functional as F
from fastbert import whole_layer
from fastbert.kernels import reference
from fastbert.kernels.cpu import int8
from fastbert.kernels.cpu import operators as cpp


def encoder_layer(x: Tensor, cu_seqlens: Tensor, max_seqlen: int, heads: int, *, impl: str, **rest: Any) -> Tensor:
    """A whole layer: in one C++ call each way where the C++ takes it, else operator by operator."""
    if impl == "native" and not rest.get("dropout_p") and not torch.is_grad_enabled():
        projections = dict(zip(("query", "key", "value"), rest["qkv"].chunk(3), strict=True))
        projections |= dict(zip(("query_bias", "key_bias", "value_bias"), rest["qkv_bias"].chunk(3), strict=True))
        weights = F.LayerWeights(**projections, **{n: rest[n] for n in F.LayerWeights._fields if n in rest})
        options = F.LayerOptions(heads, rest["activation"])
        y = cpp.encoder_layers(x, list(weights), options, cu_seqlens)
        if y is not None:
            return y
    fold = impl == "native" and torch.is_grad_enabled()
    return whole_layer.encoder_layer(
        x, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, heads=heads, impl=impl, fold=fold, **rest
    )  # fmt: skip


def rounded(weight: Tensor, largest: int) -> Tensor:
    """A weight [N, K] in float32, rounded to integers up to `largest` with one scale for each row."""
    scales = weight.float().abs().amax(1, keepdim=True).clamp_min(int8.SMALLEST) / largest
    return (weight.float() / scales).round() * scales


def int8_linear(x: Tensor, weight: Tensor, bias: Tensor, activation: str | None, *, impl: str) -> Tensor:
    """A product in 8 bits, in float32. The reference is exact in float64; in other dtypes it rounds x to integers, with
    one range for each row."""
    if impl == "native" and int8.fits(weight):
        return int8.Int8Weight(weight, bias).linear(x, activation).float()
    if impl == "native":  # `quantize` leaves such a layer in floating point
        y = F.linear(x, weight, bias, impl="native").float()
        return y if activation is None else reference.activate(y, activation)
    if x.dtype == torch.float64:
        y = torch.nn.functional.linear(x, weight, bias)
    else:
        q, step, low = int8.quantise_rows(x.float().reshape(-1, x.shape[-1]))
        x = (q * step + low).view(x.shape)
        y = torch.nn.functional.linear(x, rounded(weight, int8.LARGEST), None if bias is None else bias.float())
    return y if activation is None else reference.activate(y, activation)


def int8_layer(x: Tensor, cu_seqlens: Tensor, max_seqlen: int, heads: int, *, impl: str, **rest: Any) -> Tensor:
    """A whole layer in 8 bits. In dtypes other than float64 the reference has 6-bit weights and does not round x."""
    linears = {name: rest[name] for name in ("qkv", "out", "up", "down")}
    if impl == "native" and all(map(int8.fits, linears.values())) and int8.is_in_cpp() and x.shape[0]:
        biases = {name: rest[f"{name}_bias"] for name in linears}
        factors = torch.ones(x.shape[1], dtype=torch.float32, device="cpu")
        parts = zip(linears["qkv"].chunk(3), biases["qkv"].chunk(3), strict=True)
        weights = [int8.Int8Weight(*part, factors) for part in parts]
        weights += [int8.Int8Weight(linears[name], biases[name]) for name in ("out", "up", "down")]
        norms = tuple(rest[name] for name in ("out_norm", "out_norm_bias", "down_norm", "down_norm_bias"))
        layer = int8.Int8Layer(*weights, norms, heads)
        if int8.fit_in_one_call(layer):
            y = int8.encoder_layers(x, [layer], F.LayerOptions(heads, rest["activation"]), cu_seqlens)
            if y is not None:
                return y
    if x.dtype != torch.float64:
        rest |= {name: rounded(weight, 31).to(weight.dtype) for name, weight in linears.items()}
    return whole_layer.encoder_layer(
        x, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, heads=heads, impl="reference", **rest
    )  # fmt: skip


# the arguments of int8_layer that become weights in 8 bits, or their biases
IN_8_BITS = ("qkv", "qkv_bias", "out", "out_bias", "up", "up_bias", "down", "down_bias")
# without gradients (except for the layer of `draw_layer`), and not in float64
INFERENCE = {"encoder_layer": encoder_layer, "int8_linear": int8_linear, "int8_layer": int8_layer}


def results(op: str, inputs: dict[str, Any], impl: str, wanted: list[str]) -> dict[str, Tensor]:
    """Outputs, and the gradients of the tensors in `wanted`."""
    given = {n: t.detach().requires_grad_() if n in wanted else t for n, t in inputs.items()}
    with torch.set_grad_enabled(bool(wanted)):
        y = INFERENCE.get(op, getattr(F, op, None))(**given, impl=impl)
        outputs = y if isinstance(y, tuple) else (y,)
        found = {f"output {n}": o.detach() for n, o in enumerate(outputs)}
        reached = [o for o in outputs if o.requires_grad]
        if wanted and reached:
            upstream = []
            for o in reached:
                dy = torch.linspace(-1.0, 2.0, o.numel(), dtype=torch.float64, device="cpu")
                upstream.append(dy.view(o.shape).to(o.dtype))
            grads = torch.autograd.grad(
                reached, [given[n] for n in wanted], upstream, allow_unused=True, materialize_grads=True
            )
            found |= {f"gradient of {n}": g for n, g in zip(wanted, grads, strict=True)}
    return found
