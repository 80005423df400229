#!/usr/bin/env bash
# sentence-transformers: `truncate_dim` cuts vectors after the model's own Normalize module, so they are no longer of length 1.
#
# Packages: sentence-transformers 6.2.0, transformers 5.24.0, torch 2.13.0. BERT, mean pooling, Normalize, as many published
# models end.
#
# Users of a model that ends in Normalize expect unit vectors, and store them in an index that uses inner products. With
# `truncate_dim` vectors are cut last: their lengths are below 1 and differ, so inner products also rank by length.
# `normalize_embeddings=True`, which seems superfluous for such a model, does normalise after the cut.
#
# Output seen (lengths of four vectors):
#   whole                                 1.00 1.00 1.00 1.00
#   truncate_dim=8                        0.34 to 0.55, all different
#   truncate_dim=8, normalize_embeddings  1.00 1.00 1.00 1.00
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 sentence-transformers==6.2.0 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
cat > case.py <<'PY'
import json
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer, models
from transformers import BertConfig, BertModel

torch.manual_seed(0)
config = BertConfig(vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
BertModel(config).save_pretrained("bert")
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxy"]
Path("bert/vocab.txt").write_text("\n".join(words) + "\n")
Path("bert/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
pipeline = [models.Transformer("bert"), models.Pooling(32, "mean"), models.Normalize()]
model = SentenceTransformer(modules=pipeline, device="cpu")
texts = ["a b c", "d e f g h i j k", "a", "x y"]


def lengths(**options):
    found = np.linalg.norm(model.encode(texts, **options), axis=1)
    print(f"{', '.join(options) or 'whole':36}", *(f"{length:.2f}" for length in found))
    return found


assert np.allclose(lengths(), 1, atol=1e-5)
cut = lengths(truncate_dim=8)
assert np.allclose(lengths(truncate_dim=8, normalize_embeddings=True), 1, atol=1e-5)
assert cut.max() < 0.9 and np.ptp(cut) > 0.05, "vectors are normalised after the cut now"
PY
"$tmp/venv/bin/python" case.py
