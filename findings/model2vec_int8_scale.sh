#!/usr/bin/env bash
# model2vec: a model loaded with quantize_to="int8" gives float32 vectors of another length than the model itself.
#
# Packages: model2vec 0.10.0. A model of four words with random vectors that does not normalize, saved and loaded three times.
#
# The table is multiplied by 127 over its largest number and rounded, and that factor is not kept. `encode` returns means of the
# rounded numbers as float32, so that nothing shows that they are in other units. float16 gives the vectors of the model.
# A normalizing model hides this. Otherwise products and distances with vectors of an earlier version, thresholds, and
# classifiers that were fitted to them are wrong by that factor, which is another one for each model; cosines are right.
#
# Output seen (dtype of the table, dtype of the vectors, length, cosine):
#   as saved  float32  float32  1.00 times  1.0000
#   float16   float16  float16  1.00 times  1.0000
#   int8      int8     float32  52.93 times  1.0000
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q model2vec==0.10.0 tokenizers==0.23.3 numpy==2.4.6
cd "$tmp"
cat > case.py <<'PY'
import numpy as np
from model2vec import StaticModel
from tokenizers import Tokenizer, models, pre_tokenizers

words = ["[UNK]", "a", "cat", "dog", "sits", "[PAD]"]
tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
vectors = np.random.default_rng(0).normal(size=(len(words), 32)).astype(np.float32)
StaticModel(vectors, tokenizer, normalize=False).save_pretrained("model")

true = StaticModel.from_pretrained("model").encode("a cat sits")
for name in (None, "float16", "int8"):
    model = StaticModel.from_pretrained("model", quantize_to=name)
    vector = model.encode("a cat sits")
    length = np.linalg.norm(vector.astype(np.float64)) / np.linalg.norm(true)
    cosine = vector.astype(np.float64) @ true / np.linalg.norm(true) ** 2 / length
    print(f"{name or 'as saved':9} {model.embedding.dtype!s:8} {vector.dtype!s:8} {length:.2f} times  {cosine:.4f}")
PY
venv/bin/python case.py | tee found
diff found - <<'SEEN'
as saved  float32  float32  1.00 times  1.0000
float16   float16  float16  1.00 times  1.0000
int8      int8     float32  52.93 times  1.0000
SEEN
