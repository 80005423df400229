"""What tests, `fastbert verify` and the benchmarks run on: lengths, shapes, workloads, inputs of operators."""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

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


def cu_seqlens_of(lengths: list[int], device: torch.device | str = "cpu") -> Tensor:
    """[B + 1] int32 starts of sequences with these lengths."""
    return torch.tensor([0, *lengths], dtype=torch.int64, device="cpu").cumsum(0).to(torch.int32).to(device)


# ---- workloads -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a BERT that its operators see."""

    hidden: int
    heads: int
    intermediate: int
    layers: int
    vocab: int = 30522

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


MODELS = {
    "tiny": ModelShape(64, 2, 128, 2, vocab=211),  # for the interpreter; a vocabulary that no block divides
    "minilm": ModelShape(384, 12, 1536, 6),
    "base": ModelShape(768, 12, 3072, 12),
    "large": ModelShape(1024, 16, 4096, 24),
}


def natural_lengths(count: int, median: int = 37, longest: int = 512, seed: int = 0) -> list[int]:
    """Lengths as real sentences and paragraphs have them: log-normal, most short, a few long."""
    draw = random.Random(seed)
    return [max(3, min(longest, round(draw.lognormvariate(math.log(median), 1.1)))) for _ in range(count)]


# kind of real text -> how many a workload holds; counted lengths and their sources: data/lengths.json
REAL_TEXTS = {"queries": 512, "sentences": 512, "paragraphs": 128, "documents": 16}


@functools.lru_cache
def real_lengths(kind: str, count: int, seed: int = 0) -> tuple[int, ...]:
    """`count` lengths of real texts of this kind, in a random order: evenly spaced quantiles of all that were counted.

    So a small sample has the shape of the whole, and no luck of the draw changes how much padding it would need.
    """
    if kind not in REAL_TEXTS:
        raise ValueError(f"kind must be one of {', '.join(REAL_TEXTS)}, got {kind!r}")
    data = json.loads((resources.files("fastbert") / "data" / "lengths.json").read_text(encoding="utf-8"))
    counted = [length for length, texts in data[kind]["lengths"] for _ in range(texts)]
    chosen = [counted[int((n + 0.5) / count * len(counted))] for n in range(count)]
    random.Random(seed).shuffle(chosen)
    return tuple(chosen)


@dataclass(frozen=True)
class Workload:
    """A batch on a model, under a name that benchmarks and tests share."""

    model: ModelShape
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


WORKLOADS = {
    "minilm_natural": Workload(MODELS["minilm"], tuple(natural_lengths(256))),  # embedding a corpus
    "base_natural": Workload(MODELS["base"], tuple(natural_lengths(256))),
    "base_128": Workload(MODELS["base"], (128,) * 256),  # BERT's first pretraining phase, and short tasks
    "base_512": Workload(MODELS["base"], (512,) * 64),  # its second phase, no padding to avoid
    "base_4096": Workload(MODELS["base"], (4096,) * 8),  # long documents: attention dominates
    "base_one_long": Workload(MODELS["base"], (4096, *(64,) * 192)),  # one long sequence among many short ones
    "large_natural": Workload(MODELS["large"], tuple(natural_lengths(256))),
    "large_512": Workload(MODELS["large"], (512,) * 64),
}

# The grid of full batches, sequences x length: nothing to gain from leaving padding out.
GRID = ((1, 16), (1, 128), (8, 128), (256, 128), (32, 512), (8, 2048), (4, 4096))
for _name in ("minilm", "base", "large"):
    WORKLOADS |= {f"{_name}_{b}x{s}": Workload(MODELS[_name], (s,) * b) for b, s in GRID}
    WORKLOADS |= {f"{_name}_{kind}": Workload(MODELS[_name], real_lengths(kind, n)) for kind, n in REAL_TEXTS.items()}
# A GPU's: 16k tokens of each length, as papers on attention measure it (with the grid's 32x512 and 4x4096); 2k to 64k
# rows of an operator; and 4k to 64k tokens of natural lengths.
for _name in ("base", "large"):
    _sizes = ((64, 256), (16, 1024), (16, 128), (64, 128), (512, 128))
    WORKLOADS |= {f"{_name}_{b}x{s}": Workload(MODELS[_name], (s,) * b) for b, s in _sizes}
    WORKLOADS |= {f"{_name}_natural{n}": Workload(MODELS[_name], tuple(natural_lengths(n))) for n in (64, 1024)}


# ---- inputs of the operators -----------------------------------------------------------------------------
# Each makes float32 tensors on the CPU, always the same ones. What is given as an option goes in as it is.


def _normal(*shape: int, std: float = 1.0, mean: float = 0.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(math.prod(shape) + 7919 * seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu") * std + mean


def _integers(high: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(high + math.prod(shape))
    return torch.randint(high, shape, generator=generator, dtype=torch.int64, device="cpu")


def _dropout(p: float) -> dict[str, Any]:
    seed = torch.tensor([1234567890123], dtype=torch.int64, device="cpu")
    return {"dropout_p": p, "seed": seed, "stream": 3} if p else {}


def attention_inputs(
    model: ModelShape, lengths: Sequence[int], *, lengths_k: Sequence[int] | None = None, kv_heads: int | None = None,
    bias: bool = False, mask: bool = False, alibi: bool = False, rotary: bool = False, dropout_p: float = 0.0,
    **options,
) -> dict[str, Any]:  # fmt: skip
    keys = lengths if lengths_k is None else lengths_k
    width, width_k = max(lengths, default=0), max(keys, default=0)
    heads, dim = model.heads, model.head_dim
    inputs = {
        "q": _normal(sum(lengths), heads, dim, seed=1),
        "k": _normal(sum(keys), kv_heads or heads, dim, seed=2),
        "v": _normal(sum(keys), kv_heads or heads, dim, seed=3),
        "cu_seqlens": cu_seqlens_of(list(lengths)),
        "max_seqlen": width,
        **_attention_options(heads, dim, width, width_k, bias, mask, alibi, rotary),
        **_dropout(dropout_p),
        **options,
    }
    if lengths_k is not None:
        inputs |= {"cu_seqlens_k": cu_seqlens_of(list(keys)), "max_seqlen_k": width_k}
    return inputs


def attention_padded_inputs(
    model: ModelShape, lengths: Sequence[int], *, kv_heads: int | None = None, bias: bool = False, mask: bool = False,
    alibi: bool = False, rotary: bool = False, dropout_p: float = 0.0, **options,
) -> dict[str, Any]:  # fmt: skip
    width, heads, dim = max(lengths, default=0), model.heads, model.head_dim
    return {
        "q": _normal(len(lengths), width, heads, dim, seed=1),
        "k": _normal(len(lengths), width, kv_heads or heads, dim, seed=2),
        "v": _normal(len(lengths), width, kv_heads or heads, dim, seed=3),
        "seqlens": torch.tensor(lengths, dtype=torch.int32, device="cpu"),
        **_attention_options(heads, dim, width, width, bias, mask, alibi, rotary),
        **_dropout(dropout_p),
        **options,
    }


def _attention_options(heads, dim, width, width_k, bias, mask, alibi, rotary) -> dict[str, Any]:
    options = {}
    if bias:
        options["bias"] = _normal(1, heads, width, width_k, seed=4)
    if mask:
        options["mask"] = _normal(1, 1, width, width_k, seed=5) < 1.0
    if alibi:
        options["alibi_slopes"] = 2.0 ** -torch.arange(1, heads + 1, dtype=torch.float32, device="cpu")
    if rotary:
        places = torch.arange(max(width, width_k), dtype=torch.float32, device="cpu")
        angles = places[:, None] * 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
        options["rotary"] = (angles.cos(), angles.sin())
    return options


def disentangled_inputs(
    model: ModelShape, lengths: Sequence[int], *, terms: Sequence[str] = ("c2p", "p2c"), dropout_p: float = 0.0,
    **options,
) -> dict[str, Any]:  # fmt: skip
    """Of `disentangled_attention`; distances of 8 and more share a row of the tables."""
    longest, shape = max(1, *lengths, 1), (sum(lengths), model.heads, model.head_dim)
    distances = torch.arange(1 - longest, longest, dtype=torch.int32, device="cpu")
    return {
        **{name: _normal(*shape, seed=seed) for seed, name in enumerate("qkv", 1)},
        "pk": _normal(16, *shape[1:], seed=4) if "c2p" in terms else None,
        "pq": _normal(16, *shape[1:], seed=5) if "p2c" in terms else None,
        "lut": distances.clamp(-8, 7) + 8,
        "cu_seqlens": cu_seqlens_of(list(lengths)),
        "max_seqlen": max(lengths, default=0),
        **_dropout(dropout_p),
        **options,
    }


def norm_inputs(
    model: ModelShape, lengths: Sequence[int], *, residual: bool = True, bias: bool = True, x_bias: bool = False,
    dropout_p: float = 0.0, **options,
) -> dict[str, Any]:  # fmt: skip
    """Of `add_layer_norm` and `add_layer_norm_sum`; without `bias` of `add_rms_norm`."""
    rows, width = sum(lengths), model.hidden
    return {
        "x": _normal(rows, width, seed=1),
        "residual": _normal(rows, width, seed=2) if residual else None,
        "weight": _normal(width, std=0.1, mean=1.0, seed=3),
        **({"bias": _normal(width, std=0.1, seed=4)} if bias else {}),
        **({"x_bias": _normal(width, seed=5)} if x_bias else {}),
        **_dropout(dropout_p),
        **options,
    }


def linear_act_inputs(
    model: ModelShape, lengths: Sequence[int], *, activation: str = "gelu", bias: bool = True
) -> dict[str, Any]:
    rows = model.intermediate * (2 if activation == "geglu" else 1)
    return {
        "x": _normal(sum(lengths), model.hidden, seed=1),
        "weight": _normal(rows, model.hidden, std=model.hidden**-0.5, seed=2),
        "bias": _normal(rows, std=0.1, seed=3) if bias else None,
        "activation": activation,
    }


def feed_forward_inputs(
    model: ModelShape, lengths: Sequence[int], *, activation: str = "gelu", down_bias: bool = True, **options
) -> dict[str, Any]:
    up = linear_act_inputs(model, lengths, activation=activation)
    return {
        "x": up["x"],
        "up_weight": up["weight"],
        "up_bias": up["bias"],
        "down_weight": _normal(model.hidden, model.intermediate, std=model.intermediate**-0.5, seed=4),
        "down_bias": _normal(model.hidden, std=0.1, seed=5) if down_bias else None,
        "activation": activation,
        **options,
    }


def encoder_layer_inputs(
    model: ModelShape, lengths: Sequence[int], *, dropout_p: float = 0.0, **options
) -> dict[str, Any]:
    """Of `whole_layer.encoder_layer`; rows have names of their own where there is dropout."""
    width, feed = model.hidden, feed_forward_inputs(model, lengths)
    norms = {
        f"{name}_norm{end}": _normal(width, std=0.1, mean=mean, seed=seed)
        for name, end, mean, seed in (("out", "", 1.0, 6), ("out", "_bias", 0.0, 7),
                                      ("down", "", 1.0, 8), ("down", "_bias", 0.0, 9))
    }  # fmt: skip
    return {
        "x": feed["x"],
        "qkv": _normal(3 * width, width, std=width**-0.5, seed=10),
        "qkv_bias": _normal(3 * width, std=0.1, seed=11),
        "out": _normal(width, width, std=width**-0.5, seed=12),
        "out_bias": _normal(width, std=0.1, seed=13),
        "up": feed["up_weight"], "up_bias": feed["up_bias"],
        "down": feed["down_weight"], "down_bias": feed["down_bias"],
        **norms,
        "cu_seqlens": cu_seqlens_of(list(lengths)), "max_seqlen": max(lengths, default=0), "heads": model.heads,
        **(_dropout(dropout_p) | {"row_ids": 7 * torch.arange(sum(lengths), dtype=torch.int64, device="cpu")}
           if dropout_p else {}),
        **options,
    }  # fmt: skip


def embedding_inputs(model: ModelShape, lengths: Sequence[int], *, dropout_p: float = 0.0, **options) -> dict[str, Any]:
    """Of `embedding_layer_norm`. Ids repeat, so a row of the table sums the gradients of many tokens."""
    tokens, width = sum(lengths), model.hidden
    return {
        "input_ids": _integers(max(model.vocab // 8, 2), tokens),
        "token_type_ids": _integers(2, tokens),
        "positions": torch.tensor([i for n in lengths for i in range(n)], dtype=torch.int64, device="cpu"),
        "word": _normal(model.vocab, width, std=0.02, seed=1),
        "position": _normal(max(lengths, default=1), width, std=0.02, seed=2),
        "token_type": _normal(2, width, std=0.02, seed=3),
        "weight": _normal(width, std=0.1, mean=1.0, seed=4),
        "bias": _normal(width, std=0.1, seed=5),
        **_dropout(dropout_p),
        **options,
    }


def pool_inputs(model: ModelShape, lengths: Sequence[int], **options) -> dict[str, Any]:
    return {"x": _normal(sum(lengths), model.hidden), "cu_seqlens": cu_seqlens_of(list(lengths)), **options}


def cross_entropy_inputs(model: ModelShape, lengths: Sequence[int], *, bias: bool = True, **options) -> dict[str, Any]:
    """Of `linear_cross_entropy`: a row a token, every fifth one ignored."""
    rows = sum(lengths)
    labels = _integers(model.vocab, rows)
    labels[::5] = options.get("ignore_index", -100)
    return {
        "hidden": _normal(rows, model.hidden, seed=1),
        "weight": _normal(model.vocab, model.hidden, std=model.hidden**-0.5, seed=2),
        "bias": _normal(model.vocab, std=0.1, seed=3) if bias else None,
        "labels": labels,
        **options,
    }


INPUTS = {
    "attention": attention_inputs,
    "attention_padded": attention_padded_inputs,
    "disentangled_attention": disentangled_inputs,
    "add_layer_norm": norm_inputs,
    "add_layer_norm_sum": norm_inputs,
    "add_rms_norm": functools.partial(norm_inputs, bias=False),
    "linear_act": linear_act_inputs,
    "feed_forward": feed_forward_inputs,
    "encoder_layer": encoder_layer_inputs,
    "embedding_layer_norm": embedding_inputs,
    "linear_cross_entropy": cross_entropy_inputs,
    "pool": pool_inputs,
}
