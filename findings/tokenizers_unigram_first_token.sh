#!/usr/bin/env bash
# tokenizers: with Unigram, the first token of a text can depend on how long the text is, millions of characters further on.
#
# Package: tokenizers 0.23.3 (the models of XLM-R, ALBERT, T5, Pegasus have such tokens for "x", "xx", "xxx"). So it is not safe to cut a
# long text generously before it is tokenised and truncated to 512 tokens: the kept tokens can be others.
#
# Unigram takes the tokens with the best sum of scores. In a word of one letter many times over, the tokens "xxx" leave a rest of one or
# two letters, which may stand anywhere with the same sum. Of equal sums the library keeps the one that it saw first, which has
# the longest last token: so the rest is at the beginning, and the first token tells the length modulo three. With scores that no sum
# of float64 holds exactly, rounding decides: the rest moves to another place when the sum gets another exponent.
#
# Output seen:
#   3000 letters begin with xxx, 3001 with x, 3002 with xx
#   rest of 3001 letters at token 0, of 30001 at token 1296, of 300001 at token 20723
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q tokenizers==0.23.3
cd "$tmp"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
cat > case.py <<'PY'
from tokenizers import Tokenizer, models


def tokens(scores, length):
    pieces = [("<unk>", 0.0), *zip(("x", "xx", "xxx"), scores)]
    return Tokenizer(models.Unigram(pieces, 0)).encode("x" * length).tokens


exact = (-8.5, -12.75, -12.625)
first = [tokens(exact, length)[0] for length in (3000, 3001, 3002)]
print("3000 letters begin with {}, 3001 with {}, 3002 with {}".format(*first))
rounded = (-8.66, -12.8, -12.65)
rests = [[place for place, token in enumerate(tokens(rounded, length)) if token != "xxx"] for length in (3001, 30001, 300001)]
print("rest of 3001 letters at token {}, of 30001 at token {}, of 300001 at token {}".format(*(place for place, in rests)))
assert first == ["xxx", "x", "xx"], "the first token no longer depends on the length"
assert rests == [[0], [1296], [20723]]
PY
"$tmp/venv/bin/python" case.py
