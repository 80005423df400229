#!/usr/bin/env bash
# usearch: a restored index searches less thoroughly than the saved one, and a loaded one may name a metric that it does not use.
#
# Packages: usearch 2.26.6. An index with expansion_search=512 is saved and opened in three ways, with no other argument than
# the documentation's examples have.
#
# The file holds vectors, graph, metric and dtype, but not how many candidates a search looks at. Index.restore("file"), which
# needs no parameters of the index, goes back to 64 candidates: fewer of the true neighbours are found, and nothing says so.
# `load` into an index that was made with the parameter keeps it; copy() keeps it too. `load` into an index made for another
# metric or width takes those of the file for its distances, while `metric` goes on to name the one of the constructor.
#
# Output seen:
#   saved index                 expansion_search 512
#   copy()                      expansion_search 512
#   Index(...).load             expansion_search 512
#   Index.restore               expansion_search 64
#   restore finds fewer of the ten nearest: True
#   loaded into another index   metric l2sq, distance to twice the vector 0.0
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q usearch==2.26.6 numpy==2.4.6
cd "$tmp"
cat > case.py <<'PY'
import sys

import numpy as np
from usearch.index import Index

random = np.random.default_rng(0)
vectors = random.normal(size=(5000, 64)).astype(np.float32)
queries = vectors[:200] + 0.5 * random.normal(size=(200, 64)).astype(np.float32)
saved = Index(ndim=64, metric="l2sq", expansion_search=512)
saved.add(np.arange(5000), vectors, threads=1)
saved.save("index")
loaded = Index(ndim=64, metric="l2sq", expansion_search=512)
loaded.load("index")
restored = Index.restore("index")
truth = saved.search(queries, 10, exact=True).keys


def recall(index: Index) -> float:
    found = index.search(queries, 10, threads=1).keys
    return np.mean([len(set(mine) & set(true)) / 10 for mine, true in zip(found, truth)])


for name, index in (
    ("saved index", saved), ("copy()", saved.copy()), ("Index(...).load", loaded), ("Index.restore", restored)
):
    print(f"{name:27} expansion_search {index.expansion_search}")
print(f"recall: saved {recall(saved):.3f}, restored {recall(restored):.3f}", file=sys.stderr)
print("restore finds fewer of the ten nearest:", bool(recall(restored) < recall(saved) - 0.01))

cosine = Index(ndim=2, metric="cos")
cosine.add(0, np.array([1, 0], dtype=np.float32))
cosine.save("cosine")
other = Index(ndim=3, metric="l2sq")
other.load("cosine")
distance = other.search(np.array([2, 0], dtype=np.float32), 1).distances[0]
print(f"loaded into another index   metric {other.metric.name.lower()}, distance to twice the vector {distance:.1f}")
PY
venv/bin/python case.py | tee found
diff found - <<'SEEN'
saved index                 expansion_search 512
copy()                      expansion_search 512
Index(...).load             expansion_search 512
Index.restore               expansion_search 64
restore finds fewer of the ten nearest: True
loaded into another index   metric l2sq, distance to twice the vector 0.0
SEEN
