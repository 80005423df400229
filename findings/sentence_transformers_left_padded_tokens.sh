#!/usr/bin/env bash
# sentence-transformers: with padding on the left, the token vectors of a short text begin with those of its padding.
#
# Packages: sentence-transformers 6.2.0, transformers 5.24.0, torch 2.13.0. A Llama of random weights, whose tokenizer pads on the
# left, as embedding models made from decoders have it.
#
# encode(output_value="token_embeddings") promises the vectors of each text's tokens. It cuts off what follows the last real token,
# which on the left removes nothing: the number of vectors and the mean over them depend on the other texts of the batch, and
# vector i is not that of token i. Sentence vectors of the same call are right.
#
# Output seen (number of token vectors of a text of one token: alone, and beside a text of six):
#   padding on the right   1   1
#   padding on the left    1   6
#   the last of the six is the text's own: True
#   sentence vectors agree: True
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 sentence-transformers==6.2.0 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
cat > case.py <<'PY'
import numpy as np
import torch
from sentence_transformers import SentenceTransformer, models
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=13, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
)
LlamaModel(config).save_pretrained("decoder")
words = Tokenizer(WordLevel({word: i for i, word in enumerate(["[PAD]", "[UNK]", *"abcdefghijk"])}, unk_token="[UNK]"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", padding_side="left")
tokenizer.save_pretrained("decoder")
model = SentenceTransformer(modules=[models.Transformer("decoder"), models.Pooling(32, "lasttoken")], device="cpu")
assert model.tokenizer.padding_side == "left"
counts = {}
for side in ("right", "left"):
    model.tokenizer.padding_side = side
    (alone,) = model.encode(["a"], output_value="token_embeddings")
    beside, _ = model.encode(["a", "b c d e f g"], output_value="token_embeddings")
    counts[side] = len(alone), len(beside)
    print(f"{'padding on the ' + side:22}", *(f"{count:3}" for count in counts[side]))
own = np.allclose(beside[-1].numpy(), alone[0].numpy(), atol=1e-5)
print("the last of the six is the text's own:", own)
agree = np.allclose(model.encode(["a", "b c d e f g"])[0], model.encode(["a"])[0], atol=1e-5)
print("sentence vectors agree:", agree)
assert own and agree and counts["right"] == (1, 1)
assert counts["left"] == (1, 6), "padding on the left is cut off now"
PY
"$tmp/venv/bin/python" case.py
