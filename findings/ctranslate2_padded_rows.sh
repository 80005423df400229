#!/usr/bin/env bash
# CTranslate2: rows past a text's end hold the vector of its last token, not zeros and not what the model computes for padding.
#
# Packages: ctranslate2 4.8.5, transformers 5.24.0, torch 2.13.0. A BERT of random weights, two texts of 5 and 3 tokens.
#
# `Encoder.forward_batch` returns a full tensor [texts, longest, width]. Its encoder takes the padding out, and puts it back by
# repeating the last real row. So a mean over the second dimension, which looks right because nothing is marked as padding,
# counts the last token (for BERT: [SEP]) once for every missing token. The result does not contain the lengths: keep them
# yourself.
#
# Output seen:
#   real rows against transformers       1e-06 or less
#   rows past the end                    both equal the last real row, bit for bit
#   mean over all rows, against the mean over real rows: largest difference 0.72
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 ctranslate2==4.8.5 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
cat > case.py <<'PY'
import json
from pathlib import Path

import ctranslate2
import numpy as np
import torch
from transformers import BertConfig, BertModel

torch.manual_seed(0)
config = BertConfig(
    vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=16, position_embedding_type="absolute",  # the converter wants it; transformers 5 has dropped it
)
model = BertModel(config).eval()
model.save_pretrained("bert")
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(35))]
Path("bert/vocab.txt").write_text("\n".join(words) + "\n")
Path("bert/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
ctranslate2.converters.TransformersConverter("bert").convert("converted")

texts = [[2, 7, 8, 9, 3], [2, 10, 3]]
encoder = ctranslate2.Encoder("converted", device="cpu", compute_type="float32")
states = torch.from_numpy(np.array(encoder.forward_batch(texts).last_hidden_state))
mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
with torch.no_grad():
    ids = torch.tensor([texts[0], [*texts[1], 0, 0]])
    expected = model(ids, attention_mask=mask).last_hidden_state
error = (states - expected)[mask.bool()].abs().max().item()
repeated = all(torch.equal(states[1, row], states[1, 2]) for row in (3, 4))
moved = (states[1].mean(0) - states[1, :3].mean(0)).abs().max().item()
print(f"real rows against transformers: {error:.1e}; rows past the end equal the last real one: {repeated}")
print(f"mean over all rows against the mean over real rows: {moved:.2f}")
assert error < 5e-6
assert repeated and moved > 0.2, "padded rows are no longer the last real row"
PY
"$tmp/venv/bin/python" case.py
