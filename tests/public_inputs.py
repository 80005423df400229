"""The inputs of the calls of public_calls.py: tensors and weights of sines, a small model, its folder."""

from __future__ import annotations

import atexit
import contextlib
import io
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbert import BertConfig, BertModel, Encoder
from fastbert.cli import main as cli

LENGTHS = (7, 1, 12, 4)
T, H, D, C, INNER = sum(LENGTHS), 2, 32, 64, 96
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefgh")]
TEXTS = ["a b c", "", "abc d efg h", "Z", "i j k l m n o p q r s t", "naïve!"]
CONFIG = BertConfig(
    vocab_size=len(WORDS), hidden_size=C, num_hidden_layers=2, num_attention_heads=H, intermediate_size=INNER,
    max_position_embeddings=32,
)  # fmt: skip


def wave(*shape: int, phase: float = 0.0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of sines; `phase` makes tensors differ."""
    n = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(0.7 * n + 0.013 * n * torch.cos(n) + phase)).reshape(shape).to(dtype)


def waved(module: torch.nn.Module) -> Any:
    """The module in evaluation mode, with sines for parameters; the weights of norms are sines around 1."""
    with torch.no_grad():
        for number, (name, p) in enumerate(module.named_parameters()):
            p.copy_(wave(*p.shape, phase=number, scale=0.1) + (p.dim() == 1 and name.endswith("weight")))
    return module.eval()


def lengths() -> Tensor:
    return torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)


def qkv(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return wave(3, T, H, D, dtype=dtype).unbind(0)


def seed() -> Tensor:
    return torch.tensor([12345], dtype=torch.int64)


def rows() -> list[list[int]]:
    return [[2, *(5 + (3 * i + length) % 26 for i in range(length - 1))] for length in LENGTHS]


def model(**options: Any) -> BertModel:
    return waved(BertModel(CONFIG, **options))


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*leaves)
    return [y, *torch.autograd.grad(y, leaves, wave(*y.shape, phase=9.0, dtype=y.dtype))]


def folder() -> Path:
    """A new folder with a checkpoint and its vocabulary."""
    made = Path(tempfile.mkdtemp(prefix="fastbert"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    model().save_pretrained(made)
    (made / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return made


def encoder(**options: Any) -> Encoder:
    return Encoder.from_pretrained(folder(), **{"dtype": "float32", "device": "cpu", **options})


def command(*words: Any) -> str:
    """What the command prints to both streams, and its exit code."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as leaving:
            code = leaving.code
    return f"{said.getvalue()}exit code {code}"
