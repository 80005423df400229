"""Operator calls that together launch every kernel at every value of every flag, on emulated PTX in minutes.

`test_emulated.py` executes them; `test_launch.py` compares what they launch with all that `compile_calls` can launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch

import fastbert
from fastbert import functional as F
from fastbert.kernels import _gemm, _gemm_config, feed_forward, reference
from fastbert.stack.shared import UNBOUNDED
from fastbert.testing import INPUTS, MODELS, WITHOUT_GRADIENT, Check, ModelShape, compare, run_op

TINY = MODELS["tiny"]
WIDE = ModelShape(512, 8, 2048, 1)  # the first rung of each ladder of products
ODD = ModelShape(41, 1, 51, 1)  # rows of 82 bytes: no bulk copies
LENGTHS = (40, 100, 0, 200)  # one block, one tile, no tokens, and enough tokens for the kernels with loops
SHORT = (40, 0, 9)
DISTANCES = (70, 0, 9)  # two tiles on each side, and a part of one
GROUPED = {"kv_heads": 1}
EVERYTHING = {"bias": True, "mask": True, "alibi": True, "window": (24, 40), "rotary": True, "return_lse": True}
IDS = {"dropout_p": 0.1, "return_lse": True}


def _product(op: str, **options) -> list[Check]:
    return _op(op, (_gemm_config.FEW_ROWS + 3,), **options)  # fewer rows go to the vendor library


def _op(op: str, lengths=(35,), model: ModelShape = TINY, dtype=torch.bfloat16, **options) -> list[Check]:
    inputs = INPUTS[op](model, lengths, **options)
    return run_op(op, inputs, dtype).checks()


def _attention(op: str, lengths=LENGTHS, ids: bool = False, bias_of_batch: bool = False, **options) -> list[Check]:
    inputs = INPUTS[op](TINY, lengths, **options)
    if ids:
        inputs["sequence_ids"] = torch.arange(len(lengths)) * 3 + 2**30
    if bias_of_batch:
        inputs["bias"] = torch.randn(len(lengths), 1, *inputs["bias"].shape[2:])
    return run_op(op, inputs, torch.bfloat16).checks()


def _disentangled(**options) -> list[Check]:
    inputs = INPUTS["disentangled_attention"](TINY, DISTANCES, **options)
    inputs["sequence_ids"] = torch.arange(len(DISTANCES)) * 3 + 2**30
    return run_op("disentangled_attention", inputs, torch.bfloat16).checks()


def _norm(op: str, ids: bool = False, weight: bool = True, **options) -> list[Check]:
    inputs = INPUTS[op](TINY, [35], **options)
    if ids:
        inputs["row_ids"] = torch.arange(35) * 7
    if not weight:
        inputs |= dict.fromkeys({"weight", "bias"} & inputs.keys())
    return run_op(op, inputs, torch.bfloat16).checks()


def _embedding(types: int | None = 2, ids: bool = False, weight: bool = True, **options) -> list[Check]:
    inputs = INPUTS["embedding_layer_norm"](replace(TINY, vocab=16), [150], **options)
    if types is None:
        inputs |= {"token_type_ids": None, "token_type": None}
    else:
        inputs |= {"token_type_ids": torch.arange(150) % types, "token_type": torch.randn(types, TINY.hidden)}
    if ids:
        inputs["row_ids"] = torch.arange(150) * 7
    if not weight:
        inputs |= {"weight": None, "bias": None}
    return run_op("embedding_layer_norm", inputs, torch.bfloat16).checks()


def _invariant(op: str, model: ModelShape, **options) -> list[Check]:
    def ours(**given):
        with fastbert.batch_invariant():
            return getattr(F, op)(**given, impl="triton")

    plain = functools.partial(getattr(F, op), impl="reference")
    return compare(ours, plain, INPUTS[op](model, [35], **options), torch.bfloat16, constant=WITHOUT_GRADIENT)


def _frozen() -> list[Check]:
    """Only x needs a gradient."""
    weights = INPUTS["feed_forward"](TINY, [_gemm_config.FEW_ROWS + 3])
    x = weights.pop("x")
    weights = {name: w.bfloat16() if isinstance(w, torch.Tensor) else w for name, w in weights.items()}

    def by(impl):
        def run(x):
            cast = {name: w.to(x.dtype) if isinstance(w, torch.Tensor) else w for name, w in weights.items()}
            return F.feed_forward(x, **cast, impl=impl)

        return run

    return compare(by("triton"), by("reference"), {"x": x}, torch.bfloat16)


def _linear(model: ModelShape) -> list[Check]:
    """The product alone, in all three layouts, by our kernel."""
    inputs = INPUTS["linear_act"](model, [35])
    del inputs["activation"]
    return compare(_gemm.linear, torch.nn.functional.linear, inputs, torch.bfloat16)


def _accumulate(model: ModelShape) -> list[Check]:
    a, b = (torch.randn(35, width) for width in (model.hidden, model.intermediate))

    def ours(a, b):
        total = torch.zeros(a.shape[1], b.shape[1])
        config = _gemm.gemm_config(b.shape[1], a.shape[1], a.dtype, _gemm._device.arch(), "tn", "accumulate")
        config = replace(config, vendor=False) if config.vendor else config
        for rows in (slice(0, 16), slice(16, 35)):
            _gemm.gemm(a[rows], b[rows], None, "tn", config, out=total, accumulate=True)
        return total

    return compare(ours, lambda a, b: a.t().to(total_dtype(a)) @ b.to(total_dtype(b)), {"a": a, "b": b},
                   torch.bfloat16, backward=False)  # fmt: skip


def total_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _activate(activation: str, wanted: bool) -> list[Check]:
    """The activation without the product; `wanted`: its backward pass also returns the activation's output."""

    def ours(h, g):
        dh, a, _ = feed_forward._activate_backward(g, h, activation, wanted, wanted)
        return (feed_forward._activate(h, activation), dh, *((a,) if wanted else ()))

    def plain(h, g):
        leaf = h.detach().requires_grad_()
        with torch.enable_grad():
            a = reference.activate(leaf, activation)
        (dh,) = torch.autograd.grad(a, leaf, g)
        return (a.detach(), dh, *((a.detach(),) if wanted else ()))

    h, g = torch.randn(9, 96), torch.randn(9, 48 if activation == "geglu" else 96)
    return compare(ours, plain, {"h": h, "g": g}, torch.bfloat16, backward=False)


ACTIVATIONS = F.ACTIVATIONS
SUBSET: dict[str, Callable[[], list[Check]]] = {
    "attention_plain": lambda: _attention("attention"),
    "attention_ids": lambda: _attention("attention", ids=True, **IDS),
    "attention_everything": lambda: _attention("attention", ids=True, dropout_p=0.1, **GROUPED, **EVERYTHING),
    "attention_no_dropout": lambda: _attention("attention", **EVERYTHING),
    "attention_grouped": lambda: _attention("attention", **GROUPED),
    "attention_grouped_ids": lambda: _attention("attention", ids=True, **GROUPED, **IDS),
    "attention_decoder": lambda: _attention("attention", window=(UNBOUNDED, 0), rotary=True, **GROUPED),
    "attention_bias_of_batch": lambda: _attention("attention", bias=True, bias_of_batch=True),
    "attention_cross": lambda: _attention("attention", lengths_k=(3, 150, 70, 10)),
    "padded_plain": lambda: _attention("attention_padded"),
    "padded_ids": lambda: _attention("attention_padded", ids=True, **IDS),
    "padded_everything": lambda: _attention("attention_padded", ids=True, dropout_p=0.1, **EVERYTHING),
    "padded_short": lambda: _attention("attention_padded", SHORT, **EVERYTHING),
    "disentangled_plain": lambda: _op("disentangled_attention", DISTANCES),
    "disentangled_ids": lambda: _disentangled(dropout_p=0.1),
    "disentangled_c2p": lambda: _op("disentangled_attention", (40,), terms=("c2p",)),
    "disentangled_fp32": lambda: _op("disentangled_attention", (20,), dtype=torch.float32),
    "disentangled_p2c": lambda: _op("disentangled_attention", (40,), terms=("p2c",)),
    "layer_norm_bare": lambda: _norm("add_layer_norm", weight=False, residual=False),
    "layer_norm_dropout": lambda: _norm("add_layer_norm", x_bias=True, dropout_p=0.1),
    "layer_norm_sum_ids": lambda: _norm("add_layer_norm_sum", ids=True, x_bias=True, dropout_p=0.1),
    "rms_norm_bare": lambda: _norm("add_rms_norm", weight=False, residual=False),
    "rms_norm_plain": lambda: _norm("add_rms_norm"),
    "rms_norm_dropout": lambda: _norm("add_rms_norm", x_bias=True, dropout_p=0.1),
    "embedding_ids": lambda: _embedding(ids=True, dropout_p=0.1),
    "embedding_dropout": lambda: _embedding(types=1, dropout_p=0.1),
    "embedding_bare": lambda: _embedding(types=None, weight=False),
    "embedding_many_types": lambda: _embedding(types=3),
    **{f"linear_act_{a}": functools.partial(_product, "linear_act", activation=a) for a in ACTIVATIONS},
    **{f"feed_forward_{a}": functools.partial(_product, "feed_forward", activation=a) for a in ACTIVATIONS},
    "feed_forward_recompute": lambda: _product("feed_forward", recompute=True, down_bias=False),
    "feed_forward_frozen": _frozen,
    "feed_forward_wide": lambda: _product("feed_forward", model=WIDE),
    "feed_forward_odd": lambda: _product("feed_forward", model=ODD),
    "feed_forward_odd_geglu": lambda: _product("feed_forward", model=ODD, activation="geglu"),
    "feed_forward_invariant": lambda: _invariant("feed_forward", TINY),
    "linear_even": lambda: _linear(TINY),
    "linear_odd": lambda: _linear(ODD),
    "accumulate_even": lambda: _accumulate(TINY),
    "accumulate_odd": lambda: _accumulate(ODD),
    **{f"activate_{a}": functools.partial(_activate, a, True) for a in ACTIVATIONS},
    "activate_alone": lambda: _activate("gelu", False),
    "encoder_layer": lambda: _op("encoder_layer", (40, 100, 130), fold=True, dropout_p=0.1),
    "cross_entropy_mean": lambda: _op("linear_cross_entropy"),
    "cross_entropy_rows": lambda: _op("linear_cross_entropy", bias=False, reduction="none", label_smoothing=0.1),
    "cross_entropy_fp32": lambda: _op("linear_cross_entropy", dtype=torch.float32),
    **{
        f"pool_{mode}_{normalize}": functools.partial(
            _op, "pool", (5, 150, 0), mode=mode, normalize=normalize, dtype=torch.bfloat16
        )
        for mode in F.POOLING_MODES
        for normalize in (False, True)
    },
    "attention_fp32": lambda: _op("attention", SHORT, dtype=torch.float32, bias=True),
}  # fmt: skip
