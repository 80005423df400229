"""A small BERT with random weights, saved into a folder with its vocabulary."""

from pathlib import Path

import torch

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz"]


def save_bert(folder: Path, words: list[str] = LETTERS, cls: type | None = None, **config) -> Path:
    """Writes a BertModel, or another class, of one layer unless `config` says otherwise, and returns the folder."""
    from fastbert import BertConfig, BertModel

    sizes = {
        "vocab_size": len(words), "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 48, "max_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    (cls or BertModel)(BertConfig(**sizes | config)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return folder
