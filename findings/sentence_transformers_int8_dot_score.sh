#!/usr/bin/env bash
# sentence-transformers: dot_score of int8 or binary vectors overflows in 8 bits, so semantic_search finds almost nothing.
#
# Packages: sentence-transformers 6.2.0, torch 2.13.0. 200 random unit vectors of width 384, quantised by quantize_embeddings;
# every vector is a query for itself.
#
# dot_score converts float16 and bfloat16 to float32, but leaves 8-bit integers to torch.mm, whose sums on a CPU have the dtype of
# the inputs and wrap around. There is no error, and scores lie between -128 and 127. pairwise_dot_score returns int64, but its
# products have wrapped before they are added. cos_sim raises. Way out: convert the vectors to float32 before.
#
# Output seen (vectors that are their own first hit):
#            as quantised   the same in float32   scores
#   int8               0%                  100%   int8
#   binary             1%                  100%   int8
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 sentence-transformers==6.2.0 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
cat > case.py <<'PY'
import numpy as np
import torch
from sentence_transformers.util import dot_score, pairwise_dot_score, quantize_embeddings, semantic_search

vectors = torch.nn.functional.normalize(torch.randn(200, 384, generator=torch.Generator().manual_seed(0)), dim=1)


def found(vectors: np.ndarray) -> float:
    hits = semantic_search(vectors, vectors, score_function=dot_score, top_k=1)
    return sum(first["corpus_id"] == i for i, (first,) in enumerate(hits)) / len(hits)


for precision in ("int8", "binary"):
    small = quantize_embeddings(vectors.numpy(), precision)
    wide = small.astype(np.float32)
    scores = dot_score(small, small)
    print(f"{precision:8} found itself: {found(small):.1%}, in float32 {found(wide):.0%}; scores {scores.dtype}")
    assert found(wide) == 1.0
    pairs = pairwise_dot_score(small, small)
    assert pairs.dtype == torch.int64 and not np.allclose(pairs, (wide * wide).sum(1), rtol=0.1)
    assert small.dtype == np.int8 and scores.dtype == torch.int8 and found(small) < 0.1, "dot_score does not overflow now"
PY
"$tmp/venv/bin/python" case.py
