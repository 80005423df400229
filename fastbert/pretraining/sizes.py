"""Sizes of models by name: those of Devlin et al. (base, large) and of Turc et al., arXiv:1908.08962 (the others)."""

from __future__ import annotations

from pathlib import Path

from ..config import BertConfig
from ..storage import CheckpointError, read_json

SIZES = {  # layers, width
    "tiny": (2, 128),
    "mini": (4, 256),
    "small": (4, 512),
    "medium": (8, 512),
    "base": (12, 768),
    "large": (24, 1024),
}
HEAD_WIDTH = 64
NEVER_PREDICTED = -1e4  # bias of the rows that pad a vocabulary: exp(-1e4) is 0, so they are never predicted


def config_of(name: str, vocab_size: int, max_length: int, multiple: int, dropout: float) -> BertConfig:
    """The config of a named size, or of a config.json, with the vocabulary's size rounded up to a multiple.

    max_length: tokens of an example. The table of positions has at least as many rows, and at least 512 or the file's
        number.

    Raises: CheckpointError if there is neither a size nor a file of this name.
    """
    changes = {
        "vocab_size": -(-vocab_size // multiple) * multiple,
        "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout,
    }  # fmt: skip
    if name in SIZES:
        layers, width = SIZES[name]
        return BertConfig(
            num_hidden_layers=layers, hidden_size=width, num_attention_heads=width // HEAD_WIDTH,
            intermediate_size=4 * width, max_position_embeddings=max(512, max_length), **changes,
        )  # fmt: skip
    path = Path(name)
    if not path.exists():
        raise CheckpointError(f"--config {name}: neither one of {', '.join(SIZES)} nor a file")
    file = path / "config.json" if path.is_dir() else path
    try:
        config = BertConfig.from_dict(read_json(file), **changes)
        config.max_position_embeddings = max(config.max_position_embeddings, max_length)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    return config


def default_rate(config: BertConfig) -> float:
    """Default peak of the learning rate, higher for small models."""
    return 1e-3 if config.hidden_size <= 256 else 5e-4 if config.hidden_size <= 512 else 1e-4
