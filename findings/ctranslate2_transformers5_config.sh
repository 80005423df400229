#!/usr/bin/env bash
# CTranslate2 cannot convert a BERT that transformers 5 has opened: its config lacks a setting that the converter reads.
#
# Packages: ctranslate2 4.8.5, transformers 5.24.0, torch 2.13.0. A fresh BERT saved by transformers 5.
#
# The converter checks `config.position_embedding_type == "absolute"`. transformers 5 removed the attribute from BertConfig, so
# the conversion of every BERT whose config.json does not name it fails with an AttributeError that names neither
# library's version. Folders saved by transformers 4 hold the key, and still convert, as does a config with the key put in.
#
# Output seen:
#   as saved by transformers 5             AttributeError: 'BertConfig' object has no attribute 'position_embedding_type'
#   with "position_embedding_type" added   converted
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
from transformers import BertConfig, BertModel

BertModel(
    BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
).save_pretrained("bert")
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(35))]
Path("bert/vocab.txt").write_text("\n".join(words) + "\n")
Path("bert/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))


def convert(target):
    try:
        ctranslate2.converters.TransformersConverter("bert").convert(target)
        return "converted"
    except AttributeError as error:
        return f"AttributeError: {error}"


as_saved = convert("first")
config = json.loads(Path("bert/config.json").read_text())
assert "position_embedding_type" not in config
Path("bert/config.json").write_text(json.dumps({**config, "position_embedding_type": "absolute"}))
with_key = convert("second")
print(f"as saved by transformers 5             {as_saved}")
print(f'with "position_embedding_type" added   {with_key}')
assert "position_embedding_type" in as_saved, "the converter takes the config of transformers 5 now"
assert with_key == "converted"
PY
"$tmp/venv/bin/python" case.py
