#!/usr/bin/env bash
# transformers: whole-word masking treats a Chinese sentence as one word, and masks all of it or none of it.
#
# Packages: transformers 5.24.0, tokenizers 0.23.3, torch 2.13.0.
#
# BERT's tokenizer makes every Chinese character a token of its own, and Google's Chinese whole-word models were trained on words found by a
# segmenter. DataCollatorForLanguageModeling(whole_word_mask=True) finds words by the offsets: tokens that touch are one word. Chinese is
# written without spaces, so a whole sentence is "a word": of 11 tokens 11 are masked, or none. The share of masked tokens looks right on average.
#
# Output seen (masked tokens a sentence over 400 draws, share of 0.15):
#   11 Chinese characters   [0, 11], mean 1.38
#   11 letters with spaces  [0, 1, 2, 3, 4, 5, 6], mean 1.61
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
cat > case.py <<'PY'
from pathlib import Path

from transformers import BertTokenizer, DataCollatorForLanguageModeling

chinese, letters = "今天天气很好我们去公园", "a b c d e f g h i j a"
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(chinese)), *"abcdefghij"]
Path("vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
tokenizer = BertTokenizer(vocab="vocab.txt")


def masked(text):
    """Numbers of masked tokens of 400 copies of the text."""
    rows = [tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True) for _ in range(400)]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, whole_word_mask=True, seed=0)
    return (collator(rows)["labels"] != -100).sum(1)


for name, text in (("11 Chinese characters", chinese), ("11 letters with spaces", letters)):
    counts = masked(text)
    print(f"{name:23} {sorted(set(counts.tolist()))}, mean {counts.float().mean():.2f}")
assert set(masked(chinese).tolist()) == {0, 11}, "a Chinese character is a word now"
assert set(masked(letters).tolist()) > {0, 1, 2}
PY
"$tmp/venv/bin/python" case.py
