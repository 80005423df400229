#!/usr/bin/env bash
# txtai: long texts are cut where the tokenizer says, not where the sentence-transformers folder says.
#
# Packages: txtai 9.14.0, transformers 5.24.0, torch 2.13.0. BERT, mean pooling.
#
# A folder of sentence-transformers limits its texts by `max_seq_length` in sentence_bert_config.json: all-MiniLM-L6-v2
# to 256 tokens, while its tokenizer would take 512. txtai reads the folder's pooling from the same folder, but its limit only
# if the configuration has `maxlength: true`. So a longer text gets another vector than in sentence-transformers, without a
# warning, and an index that one library made does not fit the queries of the other.
#
# Output seen (largest difference between the vectors of two texts whose first 6 tokens are the same):
#   default            0.27
#   maxlength: true    0.00
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 txtai==9.14.0 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
cat > case.py <<'PY'
import json
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertModel
from txtai import Embeddings

torch.manual_seed(0)
config = BertConfig(
    vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, initializer_range=0.5
)
folder = Path("model")
BertModel(config).save_pretrained(folder)
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxy"]
(folder / "vocab.txt").write_text("\n".join(words) + "\n")
(folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", "model_max_length": 64}))
modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
(folder / "modules.json").write_text(json.dumps([
    {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
    for i, (path, kind) in enumerate(modules)
]))
(folder / "1_Pooling").mkdir()
(folder / "1_Pooling" / "config.json").write_text(
    json.dumps({"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True})
)
(folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 8, "do_lower_case": False}))
texts = ["a b c d e f g h i j", "a b c d e f v w x y"]  # 8 tokens are [CLS], six letters, [SEP]


def difference(**options):
    first, second = (Embeddings({"path": "./model", **options}).transform(text) for text in texts)
    return float(np.abs(np.subtract(first, second)).max())


default, limited = difference(), difference(maxlength=True)
print(f"default            {default:.2f}")
print(f"maxlength: true    {limited:.2f}")
assert limited < 1e-6
assert default > 0.01, "the folder's limit is kept now"
PY
"$tmp/venv/bin/python" case.py
