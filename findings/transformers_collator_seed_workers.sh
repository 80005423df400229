#!/usr/bin/env bash
# transformers: a masking collator with a seed draws the same masks in every epoch once the DataLoader has workers.
#
# Packages: transformers 5.24.0, torch 2.13.0.
#
# Dynamic masking (RoBERTa) means that a sentence gets new masks in each epoch. DataCollatorForLanguageModeling(seed=...) makes a generator at
# its first call. Without workers all epochs use this generator. With num_workers > 0 the DataLoader starts new workers for every
# epoch, each with a copy of the unused collator, so every epoch begins with the same generator: static masking, without a warning.
# (persistent_workers=True, or no seed, avoids it.)
#
# Output seen:
#   no workers:           epoch 2 has the masks of epoch 1: False
#   2 workers:            epoch 2 has the masks of epoch 1: True
#   2 persistent workers: epoch 2 has the masks of epoch 1: False
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
cat > case.py <<'PY'
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import BertTokenizer, DataCollatorForLanguageModeling

Path("vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]) + "\n")
tokenizer = BertTokenizer(vocab="vocab.txt")
rows = [{"input_ids": tokenizer("a b c d e f g h i j")["input_ids"]} for _ in range(16)]


def repeats(**options):
    """Does the second epoch mask the same tokens as the first?"""
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, seed=7)
    loader = DataLoader(rows, batch_size=4, collate_fn=collator, **options)
    first, second = (torch.cat([batch["labels"] for batch in loader]) for _ in range(2))
    return torch.equal(first, second)


if __name__ == "__main__":
    cases = {
        "no workers:": {}, "2 workers:": {"num_workers": 2},
        "2 persistent workers:": {"num_workers": 2, "persistent_workers": True},
    }
    seen = {name: repeats(**options) for name, options in cases.items()}
    for name, same in seen.items():
        print(f"{name:21} epoch 2 has the masks of epoch 1: {same}")
    assert list(seen.values()) == [False, True, False], "workers go on with the generator now"
PY
"$tmp/venv/bin/python" case.py
