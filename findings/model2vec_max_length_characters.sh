#!/usr/bin/env bash
# model2vec: `max_length` tokens are also a limit of characters, so a text of long words loses most of its tokens.
#
# Packages: model2vec 0.10.0. A model of ten words with random vectors, whose median token has two characters, and two texts of
# 40 tokens each; encode(max_length=40).
#
# Before tokenising, `encode` cuts a text after max_length times the median length of the vocabulary's tokens in characters.
# That median counts each entry once, so it is short beside the words of German, code or chemistry, and spaces count as well.
# `tokenize` of the same model gives all 40 tokens, and the documentation says that tokens beyond max_length are
# truncated. Texts that begin with the same words get the same vector, whatever follows; so does a text with a deep indentation.
#
# Output seen:
#   tokenize, text of long words                  40 tokens
#   encode(max_length=40) is that of the first    7 tokens
#   encode(max_length=None) is that of the first  40 tokens
#   the same with words of one and two letters    32 tokens
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q model2vec==0.10.0 tokenizers==0.23.3 numpy==2.4.6
cd "$tmp"
cat > case.py <<'PY'
import numpy as np
from model2vec import StaticModel
from tokenizers import Tokenizer, models, pre_tokenizers

words = ["[UNK]", "a", "an", "is", "it", "of", "or", "cat", "internationalization", "[PAD]"]
tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
vectors = np.random.default_rng(0).normal(size=(len(words), 8)).astype(np.float32)
model = StaticModel(vectors, tokenizer, normalize=False)
assert model.median_token_length == 2


def read(text: str, max_length: int | None) -> int:
    """How many tokens of the text have the vector of the whole text."""
    vector = model.encode(text, max_length=max_length)
    ids = tokenizer.encode(text).ids
    return next(n for n in range(len(ids), 0, -1) if np.allclose(vectors[ids[:n]].mean(0), vector, atol=1e-6))


long = " ".join(["internationalization", "cat", "of", "internationalization"] * 10)
short = " ".join(["or", *["it", "is", "a", "a"] * 9, "it", "is", "a"])
print("tokenize, text of long words                 ", len(model.tokenize([long])[0]), "tokens")
print("encode(max_length=40) is that of the first   ", read(long, 40), "tokens")
print("encode(max_length=None) is that of the first ", read(long, None), "tokens")
print("the same with words of one and two letters   ", read(short, 40), "tokens")
PY
venv/bin/python case.py | tee found
diff found - <<'SEEN'
tokenize, text of long words                  40 tokens
encode(max_length=40) is that of the first    7 tokens
encode(max_length=None) is that of the first  40 tokens
the same with words of one and two letters    32 tokens
SEEN
