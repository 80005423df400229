"""The cases to verify: each operator's, in each dtype, at each shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .. import functional
from ..testing import INPUTS, MODELS, ModelShape

# operator -> case -> options of its inputs; together they cover every branch of a kernel
CASES: dict[str, dict[str, dict]] = {
    "attention": {
        "plain": {},
        "dropout": {"dropout_p": 0.1},
        "bias": {"bias": True, "mask": True},
        "local": {"window": (24, 40), "rotary": True},
        "alibi": {"alibi": True, "return_lse": True},
        "grouped": {"kv_heads": 1},
        "cross": {"cross": True},
    },
    "attention_padded": {
        "plain": {},
        "dropout": {"dropout_p": 0.1, "bias": True},
    },
    "disentangled_attention": {
        "plain": {},
        "dropout": {"dropout_p": 0.1},
        "c2p": {"terms": ("c2p",)},
        "p2c": {"terms": ("p2c",)},
    },
    "add_layer_norm": {
        "plain": {"residual": False},
        "dropout": {"x_bias": True, "dropout_p": 0.1},
    },
    "add_layer_norm_sum": {"dropout": {"x_bias": True, "dropout_p": 0.1}},
    "add_rms_norm": {"dropout": {"x_bias": True, "dropout_p": 0.1}},
    "linear_act": {activation: {"activation": activation} for activation in functional.ACTIVATIONS},
    "feed_forward": {
        "gelu": {},
        "geglu": {"activation": "geglu"},
        "recompute": {"recompute": True, "down_bias": False},
    },
    "encoder_layer": {
        "plain": {},
        "dropout": {"dropout_p": 0.1, "fold": True},
    },
    "embedding_layer_norm": {
        "plain": {},
        "dropout": {"dropout_p": 0.1, "padding_idx": 0},
    },
    "linear_cross_entropy": {
        "mean": {},
        "smooth": {"label_smoothing": 0.1, "reduction": "sum"},
        "rows": {"reduction": "none", "bias": False},
    },
    "pool": {
        "mean": {"mode": "mean"},
        "cls": {"mode": "cls", "normalize": True},
        "max": {"mode": "max"},
    },
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# (model, lengths): the sequences are packed, or padded to the longest, as the operator needs. Small shapes are for the
# interpreter, which takes seconds where a GPU takes microseconds; real shapes are BERT's, from 1 to 4,096 tokens.
SMALL = ((MODELS["tiny"], (5, 70, 0, 1, 33)),)
REAL = (
    (MODELS["base"], (128, 512, 1, 0, 77, 300)),
    (MODELS["large"], (512, *(128,) * 8)),
    (MODELS["base"], (4096, 64)),
)
# Bytes of GPU memory below which only four heads are checked: the reference holds float64 scores several times.
ROOMY = 40 * 2**30
NARROW = ModelShape(hidden=256, heads=4, intermediate=1024, layers=1)
# Shapes for recordings that the emulator replays in minutes, with the tiles of real widths.
MEDIUM = (*SMALL, (ModelShape(hidden=768, heads=12, intermediate=1024, layers=1, vocab=1000), (5, 150, 0, 45)))
SHAPES = ("auto", "small", "medium", "real")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")  # architectures that the emulator supports
LONG = 1024  # longest sequence with an additive bias, which the reference holds in float64 several times


@dataclass(frozen=True)
class Task:
    """One case of an operator in one dtype at one shape."""

    op: str
    dtype: str
    case: str  # of CASES[op]
    model: ModelShape
    lengths: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.case}, {self.model.hidden} wide, {sum(self.lengths)} tokens"

    def inputs(self) -> dict:
        return inputs_of(self.op, self.model, self.lengths, **CASES[self.op][self.case])

    @property
    def needs(self) -> int:
        """Estimate of the device memory in bytes, from measurements of the float64 reference with gradients."""
        m, tokens = self.model, sum(self.lengths)
        scores = m.heads * sum(n * n for n in self.lengths)
        if "attention" in self.op:
            of_pairs = 3 if self.op == "disentangled_attention" else 2 if "bias" in CASES[self.op][self.case] else 1
            elements = 4 * tokens * m.hidden + scores * of_pairs
        else:
            elements = tokens * (4 * m.hidden + 3 * m.intermediate) + m.vocab * m.hidden
            elements += tokens * m.vocab if self.op == "linear_cross_entropy" else 0
            elements += scores + 8 * tokens * m.hidden if self.op == "encoder_layer" else 0
        return 64 * elements + 2**30


def shapes_of(name: str, device: torch.device) -> tuple[tuple[ModelShape, tuple[int, ...]], ...]:
    if name not in SHAPES:
        raise ValueError(f"shapes must be one of {', '.join(SHAPES)}, got {name!r}")
    if name == "small" or (name == "auto" and device.type != "cuda"):
        return SMALL
    if name == "medium":
        return MEDIUM
    memory = torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else 0
    return tuple((NARROW if max(n) > LONG and memory < ROOMY else model, n) for model, n in REAL)


def tasks(ops: Sequence[str], dtypes: Sequence[str], device: torch.device, shapes: str = "auto") -> list[Task]:
    """All tasks, dtype by dtype."""
    return [
        Task(op, dtype, case, model, lengths)
        for dtype in dtypes
        for op in ops
        for model, lengths in shapes_of(shapes, device)
        for case, options in CASES[op].items()
        if not (max(lengths) > LONG and "bias" in options)
    ]


def inputs_of(op: str, model: ModelShape, lengths: Sequence[int], *, cross: bool = False, **options) -> dict:
    if cross:  # keys and values with other lengths than the queries
        options["lengths_k"] = lengths[::-1]
    return INPUTS[op](model, lengths, **options)


def pick_device(device: str | torch.device | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
