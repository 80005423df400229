#!/usr/bin/env bash
# A folder that model2vec writes for sentence-transformers gives other vectors there, for every text with an unknown word.
#
# Packages: model2vec 0.10.0, sentence-transformers 6.2.0, transformers 5.24.0, torch 2.13.0. A static model of six words, saved by
# model2vec with the modules.json by which sentence-transformers reads it.
#
# model2vec drops unknown words before the mean, and a text of nothing else gives zeros. sentence-transformers takes the vector of
# [UNK] into the mean. StaticEmbedding.from_model2vec, moreover, drops the model's Normalize, which the folder keeps. Texts of known
# words agree, so a short check of the two readers finds nothing.
#
# Output seen (largest difference from model2vec, and length of the vector of an unknown word):
#                    known words   with an unknown word   length (model2vec: 0.00)
#   the folder              0.00                   0.33                      1.00
#   from_model2vec          0.74                   0.42                      1.74
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 sentence-transformers==6.2.0 numpy==2.4.6 model2vec==0.10.0
cd "$tmp"
export CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
cat > case.py <<'PY'
import numpy as np
from model2vec import StaticModel
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import StaticEmbedding
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

words = Tokenizer(WordLevel({word: i for i, word in enumerate(["[PAD]", "[UNK]", *"abcd"])}, unk_token="[UNK]"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
vectors = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
static = StaticModel(vectors, words, normalize=True)
static.save_pretrained("static")
readers = {
    "the folder": SentenceTransformer("static", device="cpu"),
    "from_model2vec": SentenceTransformer(modules=[StaticEmbedding.from_model2vec("static")], device="cpu"),
}
assert not static.encode(["z"]).any()
found = {}
for name, model in readers.items():
    known, unknown = (np.abs(model.encode([text]) - static.encode([text])).max() for text in ("a b", "a z b"))
    found[name] = known, unknown, np.linalg.norm(model.encode(["z"]))
    print(f"{name:15} {known:13.2f} {unknown:22.2f} {found[name][2]:25.2f}")
known, unknown, length = found["the folder"]
assert known < 1e-5 and unknown > 0.1 and length > 0.9, "both read unknown words alike now"
assert found["from_model2vec"][0] > 0.1, "from_model2vec keeps Normalize now"
PY
"$tmp/venv/bin/python" case.py
