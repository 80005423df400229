#!/usr/bin/env bash
# seqeval: f1_score(mode="strict") without a scheme is the lenient score, and classification_report(mode="strict") the strict one.
#
# Packages: seqeval 1.2.2. One sentence with one entity; the prediction begins it with I- instead of B-, which IOB2 does
# not allow.
#
# f1_score, precision_score and recall_score evaluate strictly only if mode="strict" and a scheme are given. With one of them,
# or a misspelt mode, they evaluate leniently, as CoNLL's script does, where I- after O begins an entity. The report
# guesses the scheme from the labels if it has mode="strict" alone. So the same arguments give 1.0 and 0.0, and a "strict F1" from
# f1_score(mode="strict") is not strict.
#
# Output seen:
#                                      f1_score   classification_report, micro average
#   no argument                             1.0   1.0
#   mode="strict"                           1.0   0.0
#   scheme=IOB2                             1.0   1.0
#   mode="Strict", scheme=IOB2              1.0   1.0
#   mode="strict", scheme=IOB2              0.0   0.0
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q seqeval==1.2.2 numpy==2.4.6 scikit-learn==1.9.1 "setuptools<82"
cd "$tmp"
export PYTHONWARNINGS=ignore
cat > case.py <<'PY'
from seqeval.metrics import classification_report, f1_score, precision_score, recall_score
from seqeval.scheme import IOB2

gold, predicted = [["O", "B-PER", "I-PER", "O"]], [["O", "I-PER", "I-PER", "O"]]


def report(gold, predicted, **how) -> float:
    return classification_report(gold, predicted, output_dict=True, **how)["micro avg"]["f1-score"]


ways = {
    "no argument": {}, 'mode="strict"': {"mode": "strict"}, "scheme=IOB2": {"scheme": IOB2},
    'mode="Strict", scheme=IOB2': {"mode": "Strict", "scheme": IOB2},
    'mode="strict", scheme=IOB2': {"mode": "strict", "scheme": IOB2},
}  # fmt: skip
seen = {}
for name, how in ways.items():
    scores = {float(score(gold, predicted, **how)) for score in (f1_score, precision_score, recall_score)}
    assert len(scores) == 1
    seen[name] = scores.pop(), float(report(gold, predicted, **how))
    print(f"{name:28} f1_score {seen[name][0]}   report {seen[name][1]}")
assert seen.pop('mode="strict", scheme=IOB2') == (0.0, 0.0)
assert seen.pop('mode="strict"') == (1.0, 0.0), "f1_score knows strict without a scheme now"
assert all(scores == (1.0, 1.0) for scores in seen.values()), "an argument has another effect now"
PY
"$tmp/venv/bin/python" case.py
