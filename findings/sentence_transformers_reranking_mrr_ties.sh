#!/usr/bin/env bash
# sentence-transformers: RerankingEvaluator gives a model that cannot tell the documents apart a perfect MRR.
#
# Packages: sentence-transformers 6.2.0, transformers 5.24.0, torch 2.13.0, tokenizers 0.23.3. A static model of small whole numbers,
# scored by inner products, so that nothing is rounded. The documents differ only in words that the model does not know.
#
# The evaluator lists positive documents first and sorts by score; equal scores keep that order, so MRR says that the positive
# document was found at once. MAP and NDCG treat equal scores as a tie. (Equal scores are also common with binary vectors, with
# few bits, and with texts that are cut after a common beginning.) The other metrics of the same call are then the only warning.
#
# Output seen (one positive document, nine others):
#   map 0.100   mrr 1.000   ndcg 0.454
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 sentence-transformers==6.2.0 tokenizers==0.23.3 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
cat > case.py <<'PY'
import numpy as np
from sentence_transformers import SentenceTransformer, util
from sentence_transformers.models import StaticEmbedding
from sentence_transformers.sentence_transformer.evaluation import RerankingEvaluator
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

words = Tokenizer(WordLevel({word: i for i, word in enumerate(["[UNK]", *"abcde"])}, unk_token="[UNK]"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
vectors = np.random.default_rng(0).integers(-4, 5, size=(6, 8)).astype(np.float32)
model = SentenceTransformer(modules=[StaticEmbedding(words, embedding_weights=vectors)], device="cpu")
documents = [f"a b c part{number}" for number in range(10)]
samples = [{"query": query, "positive": documents[:1], "negative": documents[1:]} for query in ("d", "a e", "b c d e")]
found = RerankingEvaluator(samples, at_k=10, similarity_fct=util.dot_score, show_progress_bar=False)(model)
ap, mrr, ndcg = (found[name] for name in ("map", "mrr@10", "ndcg@10"))
print(f"map {ap:.3f}   mrr {mrr:.3f}   ndcg {ndcg:.3f}")
assert abs(ap - 0.1) < 1e-6 and ndcg < 0.5
assert mrr == 1, "MRR treats equal scores otherwise now"
PY
"$tmp/venv/bin/python" case.py
