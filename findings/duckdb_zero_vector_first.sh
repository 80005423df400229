#!/usr/bin/env bash
# DuckDB and polars put a vector of zeros first in a search by cosine similarity, and DuckDB puts it last by cosine distance.
#
# Packages: duckdb 2.0.1, polars 2.1.0, numpy 2.4.6.
#
# A vector of zeros is no rarity: static models give it to a text without a known word, and encoders to an empty text. Its cosine
# is 0/0, NaN, and both programs sort NaN above every number. So with ORDER BY similarity DESC, arg_max or top_k it is the best hit
# of every query, while the seemingly equal ORDER BY distance puts it last. Lists behave like arrays.
#
# Output seen (best two of four vectors, of which number 3 is zeros, and 1 equals the query):
#   duckdb array_cosine_similarity   3 1
#   duckdb list_cosine_similarity    3 1
#   duckdb max_by                    3 1
#   duckdb array_cosine_distance     1 2
#   polars top_k                     3 1
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q duckdb==2.0.1 polars==2.1.0 numpy==2.4.6
cd "$tmp"
cat > case.py <<'PY'
import duckdb
import numpy as np
import polars

vectors = np.array([[1, 0, 0], [0.9, 0.1, 0], [0, 0, 0], [0, 1, 0]], dtype=np.float32)
table = duckdb.connect()
table.execute("CREATE TABLE texts (id INTEGER, vector FLOAT[3])")
table.executemany("INSERT INTO texts VALUES (?, ?)", [(i + 1, vector.tolist()) for i, vector in enumerate(vectors)])


def best(query):
    return [id for (id,) in table.execute(query).fetchall()]


similarity = "array_cosine_similarity(vector, [1, 0, 0]::FLOAT[3])"
with np.errstate(invalid="ignore"):
    cosine = vectors @ vectors[0] / np.linalg.norm(vectors, axis=1)
frame = polars.DataFrame({"id": [1, 2, 3, 4], "cosine": cosine})
cases = {
    "duckdb array_cosine_similarity": best(f"SELECT id FROM texts ORDER BY {similarity} DESC LIMIT 2"),
    "duckdb list_cosine_similarity": best(
        "SELECT id FROM texts ORDER BY list_cosine_similarity(vector::FLOAT[], [1, 0, 0]::FLOAT[]) DESC LIMIT 2"
    ),
    "duckdb max_by": best(f"SELECT unnest(max_by(id, {similarity}, 2)) FROM texts"),
    "duckdb array_cosine_distance": best(
        "SELECT id FROM texts ORDER BY array_cosine_distance(vector, [1, 0, 0]::FLOAT[3]) LIMIT 2"
    ),
    "polars top_k": frame.top_k(2, by="cosine").sort("cosine", descending=True)["id"].to_list(),
}
for name, found in cases.items():
    print(f"{name:32}", *found)
PY
venv/bin/python case.py | tee found
diff found - <<'SEEN'
duckdb array_cosine_similarity   3 1
duckdb list_cosine_similarity    3 1
duckdb max_by                    3 1
duckdb array_cosine_distance     1 2
polars top_k                     3 1
SEEN
