#!/usr/bin/env bash
# transformers: BertTokenizer(vocab_file="vocab.txt") makes a tokenizer of five special tokens, without an error or a warning.
#
# Packages: transformers 5.24.0, tokenizers 0.23.3.
#
# `vocab_file` was the first argument of BertTokenizer until transformers 4, and many scripts use it. In 5 the argument is called
# `vocab`; the old name is taken into **kwargs and ignored, so every word becomes [UNK] and training goes on.
#
# Output seen:
#   vocab_file=   5 tokens, "hello world" -> [UNK] [UNK]
#   vocab=        7 tokens, "hello world" -> hello world
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
cat > case.py <<'PY'
from pathlib import Path

from transformers import BertTokenizer

Path("vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world"]) + "\n")
by_old_name, by_new_name = BertTokenizer(vocab_file="vocab.txt"), BertTokenizer(vocab="vocab.txt")
for name, tokenizer in (("vocab_file=", by_old_name), ("vocab=", by_new_name)):
    print(f'{name:12} {len(tokenizer):2} tokens, "hello world" -> {" ".join(tokenizer.tokenize("hello world"))}')
assert by_new_name.tokenize("hello world") == ["hello", "world"]
assert len(by_old_name) == 5 and by_old_name.tokenize("hello world") == ["[UNK]", "[UNK]"], "vocab_file is read now"
PY
"$tmp/venv/bin/python" case.py
