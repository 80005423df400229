#!/usr/bin/env bash
# tokenizers: training WordPiece twice on the same lines gives two different vocabularies; training BPE does not.
#
# Package: tokenizers 0.23.3. The same 300 lines, the same settings, eight trainings in one process.
#
# The continuing pieces of one letter (##a, ##b, ...) have another order in every training, so ids differ between trainings;
# the set of words can differ too. A checkpoint trained with one vocabulary is useless with the next, and "same command,
# same vocabulary" is wrong. The trainer has no seed: keep the vocabulary file.
#
# Output seen (the counts vary):
#   WordPiece  8 numberings of the vocabulary in 8 trainings, 2 sets of words
#   BPE        1 numbering of the vocabulary in 8 trainings, 1 set of words
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q tokenizers==0.23.3
cd "$tmp"
export TOKENIZERS_PARALLELISM=false
cat > case.py <<'PY'
import random

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

rng = random.Random(0)
words = ["".join(rng.choice("abcdefgh") for _ in range(rng.randint(2, 9))) for _ in range(400)]
lines = [" ".join(rng.choice(words) for _ in range(12)) for _ in range(300)]
kinds = {
    "WordPiece": (models.WordPiece, trainers.WordPieceTrainer),
    "BPE": (models.BPE, trainers.BpeTrainer),
}
numberings = {}
for name, (model, trainer) in kinds.items():
    vocabularies = []
    for _ in range(8):
        tokenizer = Tokenizer(model(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.train_from_iterator(lines, trainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False))
        vocabularies.append(tokenizer.get_vocab())
    numberings[name] = len({tuple(sorted(v.items())) for v in vocabularies})
    sets = len({tuple(sorted(v)) for v in vocabularies})
    print(f"{name:10} {numberings[name]} numberings of the vocabulary in 8 trainings, {sets} sets of words")
assert numberings["BPE"] == 1
assert numberings["WordPiece"] > 1, "WordPiece training gives one vocabulary now"
PY
"$tmp/venv/bin/python" case.py
