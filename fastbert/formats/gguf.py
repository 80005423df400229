"""GGUF files of BERT, as llama.cpp's converter writes them: the encoder and its vocabulary. Reading needs gguf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..storage import CheckpointError
from .families import GGUF
from .source import Source, case_of_name
from .variable import Variable

_ARCHITECTURE = "bert"
_TOKENIZER = "bert"
_CONFIG_KEYS = {
    "bert.embedding_length": "hidden_size",
    "bert.block_count": "num_hidden_layers",
    "bert.attention.head_count": "num_attention_heads",
    "bert.feed_forward_length": "intermediate_size",
    "bert.context_length": "max_position_embeddings",
    "bert.attention.layer_norm_epsilon": "layer_norm_eps",
}
_POOLINGS = {0: None, 1: "mean", 2: "cls"}
_PHANTOM_SPACE = "\u2581"  # marks the start of a word, which has no mark in a WordPiece vocabulary
_Q8_BLOCK = 32  # numbers that share a scale
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "Q8_0": torch.float32}


def read(file: Path) -> Source:
    """Reads a file. Raises CheckpointError, also if the package gguf is missing, and for other models than BERT."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise CheckpointError(f"{file} needs the package gguf: pip install gguf") from None
    try:
        reader = GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, OSError, IndexError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is truncated or not a GGUF file ({error})") from error
    if fields.get("general.architecture") != _ARCHITECTURE:
        raise CheckpointError(f"{file} holds {fields.get('general.architecture')!r}; only BERT is read")
    if reader.byte_order != "I":
        raise CheckpointError(f"{file} is of a machine with another byte order, which is not read")
    # XLM-RoBERTa's files also name "bert" as their architecture; only the tokenizer differs.
    if (tokenizer := fields.get("tokenizer.ggml.model", _TOKENIZER)) != _TOKENIZER:
        raise CheckpointError(f"{file} has a tokenizer of type {tokenizer!r}; only BERT's word pieces are read")
    config: dict[str, Any] = {}
    for theirs, ours in _CONFIG_KEYS.items():
        if theirs not in fields:
            raise CheckpointError(f"{file} lacks {theirs}")
        config[ours] = fields[theirs]
    # The file holds a float32, whose nearest value to 1e-12 is not the float64 1e-12.
    config["layer_norm_eps"] = float(f"{config['layer_norm_eps']:.6g}")
    pooling = fields.get("bert.pooling_type", 0)
    if pooling not in _POOLINGS:
        raise CheckpointError(f"{file} has pooling type {pooling}; mean, cls and none are read")
    return Source(
        file,
        GGUF.title,
        GGUF.activation,
        config,
        lambda: {tensor.name: _variable(file, tensor) for tensor in reader.tensors},
        lambda _: GGUF,
        _words(fields),
        case_of_name(file.stem),
        pooling=_POOLINGS[pooling],
    )


def _words(fields: dict[str, Any]) -> list[str]:
    """The vocabulary in WordPiece's spelling: "▁word" becomes "word", and "piece" becomes "##piece"."""
    words = []
    for token in fields.get("tokenizer.ggml.tokens", []):
        if token.startswith("[") and token.endswith("]"):
            words.append(token)
        elif token.startswith(_PHANTOM_SPACE):
            words.append(token[1:])
        else:
            words.append("##" + token)
    return words


def _variable(file: Path, tensor: Any) -> Variable:
    kind = tensor.tensor_type.name
    shape = tuple(int(n) for n in reversed(tensor.shape))  # the file has the fastest axis first

    def read() -> torch.Tensor:
        if kind not in _DTYPES:
            raise CheckpointError(f"{file}: {tensor.name} is of {kind}, which is not read")
        data = np.ascontiguousarray(tensor.data).reshape(-1)
        if kind == "Q8_0":
            return _dequantised(data).reshape(shape)
        return torch.from_numpy(data.view(np.uint8).copy()).view(_DTYPES[kind]).reshape(shape)

    return Variable(tensor.name, shape, kind.lower(), _DTYPES.get(kind), read)


def _dequantised(data: np.ndarray) -> torch.Tensor:
    """float32 of blocks of one float16 scale and 32 int8 numbers."""
    blocks = data.view(np.uint8).reshape(-1, 2 + _Q8_BLOCK)
    scales = torch.from_numpy(blocks[:, :2].copy()).view(torch.float16).float()  # [blocks, 1]
    return (torch.from_numpy(blocks[:, 2:].copy()).view(torch.int8).float() * scales).reshape(-1)
