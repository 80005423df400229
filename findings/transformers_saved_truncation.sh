#!/usr/bin/env bash
# transformers and tokenizers: a tokenizer that was called once with max_length=8 and then saved cuts every text at 8 tokens
# wherever tokenizer.json is read by another library.
#
# Packages: transformers 5.24.0, tokenizers 0.23.3. A BERT tokenizer of 35 words, a text of 30 and one of 2.
#
# `truncation` and `padding` look like arguments of one call, but they set the state of the Rust tokenizer below, and
# `save_pretrained` writes this state into tokenizer.json. transformers sets the state again in every call, so it does
# not notice. `tokenizers.Tokenizer.from_file`, in Python as in Rust, obeys the file: long texts lose their end, and
# short ones get padding as if it were words. The same holds for `backend_tokenizer` of the object that was called. Way out: save
# before the first call, or call backend_tokenizer.no_truncation() and no_padding() before saving.
#
# Output seen (tokens of the long and of the short text):
#                                   transformers   tokenizers
#   saved before the first call            32  4         32  4
#   saved after a call                     32  4          8  8
#   the same after no_truncation()         32  4         32  4
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q transformers==5.24.0 tokenizers==0.23.3 numpy==2.4.6
cd "$tmp"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore TRANSFORMERS_VERBOSITY=error
cat > case.py <<'PY'
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BertTokenizer

words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(35))]
texts = " ".join(f"w{i}" for i in range(30)), "w1 w2"
tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})


def lengths(folder: str) -> tuple[list[int], list[int]]:
    tokenizer.save_pretrained(folder)
    own = AutoTokenizer.from_pretrained(folder)
    other = Tokenizer.from_file(f"{folder}/tokenizer.json")
    return [len(own(text).input_ids) for text in texts], [len(other.encode(text).ids) for text in texts]


seen = {"before a call": lengths("before")}
tokenizer(texts[0], truncation=True, max_length=8, padding="max_length")
seen["after a call"] = lengths("after")
tokenizer.backend_tokenizer.no_truncation()
tokenizer.backend_tokenizer.no_padding()
seen["after no_truncation()"] = lengths("without")
for when, (own, other) in seen.items():
    print(f"saved {when:22} transformers {own}   tokenizers {other}")
assert all(own == [32, 4] for own, _ in seen.values())
assert seen["before a call"][1] == seen["after no_truncation()"][1] == [32, 4]
assert seen["after a call"][1] == [8, 8], "the state of a call is no longer saved"
PY
"$tmp/venv/bin/python" case.py
