#!/usr/bin/env bash
# pytrec_eval: documents of equal score are ranked by their names, backwards; scores are equal if they are so in float32.
#
# Packages: pytrec_eval-terrier 0.5.11.
#
# The order of a run is ignored: only scores count, and among equal ones the name that is last in the alphabet comes first. So
# other names for the same documents give another MRR or NDCG, and a search that breaks ties in favour of the right document gains
# nothing. Scores are Python floats, of 64 bits, but are compared in 32: sums of many terms, or 1 - 1e-9 against 1, become ties.
# With vectors in few bits most documents of a query are in a tie.
#
# Output seen (reciprocal rank of the one right document, whose score is first in the run):
#   named a, the other b, equal scores            0.50
#   named z, the other b, equal scores            1.00
#   named a, better by 1e-9                       0.50
#   named a, better by 1e-6                       1.00
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q pytrec_eval-terrier==0.5.11 numpy==2.4.6
cd "$tmp"
cat > case.py <<'PY'
import pytrec_eval


def reciprocal_rank(right, other, difference):
    judged = pytrec_eval.RelevanceEvaluator({"query": {right: 1}}, {"recip_rank"})
    return judged.evaluate({"query": {right: 1.0, other: 1.0 - difference}})["query"]["recip_rank"]


for name, case in {
    "named a, the other b, equal scores": ("a", "b", 0.0),
    "named z, the other b, equal scores": ("z", "b", 0.0),
    "named a, better by 1e-9": ("a", "b", 1e-9),
    "named a, better by 1e-6": ("a", "b", 1e-6),
}.items():
    print(f"{name:45} {reciprocal_rank(*case):.2f}")
PY
venv/bin/python case.py | tee found
diff found - <<'SEEN'
named a, the other b, equal scores            0.50
named z, the other b, equal scores            1.00
named a, better by 1e-9                       0.50
named a, better by 1e-6                       1.00
SEEN
