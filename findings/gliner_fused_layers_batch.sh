#!/usr/bin/env bash
# GLiNER: with `fuse_layers=True` the scores of a text depend on the texts beside it.
#
# Package: gliner 0.2.29 (torch 2.13.0, transformers 5.16.1).
#
# With this option the encoder's layers are added up, each with a weight that a small network computes for the text: from the mean
# of the layer over all positions. The mean includes padding, and no mask is passed to it. So the weights depend on how much
# longer the longest text of the batch is, and a text alone has other scores than in a batch. Without the option they are
# the same to rounding. Differences are small in a new model like this one, and grow with the weights of that network.
#
# Output seen (largest difference of a score, alone and beside a longer text):
#   fuse_layers=False:              6e-08
#   fuse_layers=True:               3e-05
#   its weights 5 times as large:   1e-03
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q gliner==0.2.29 torch==2.13.0 transformers==5.16.1

export CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

cat > "$tmp/scores.py" <<'PY'
import sys
import torch
from gliner import GLiNER, GLiNERConfig
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

folder = sys.argv[1]
TEXT = "Ada Lovelace lived in London ."
LONG = "She wrote about the engine , and then she wrote about it again in letters to a friend . " * 4
LABELS = ["person", "place"]
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(f"{TEXT} {LONG} {' '.join(LABELS)}".split())]
backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
PreTrainedTokenizerFast(
    tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
).save_pretrained(folder)
torch.manual_seed(0)
BertModel(BertConfig(
    vocab_size=len(words), hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=128
)).save_pretrained(folder)


def model(fuse_layers):
    torch.manual_seed(0)
    config = GLiNERConfig(
        model_name=folder, hidden_size=64, max_width=3, max_len=128, num_rnn_layers=0, fuse_layers=fuse_layers
    )
    return GLiNER.from_config(config).eval()


def difference(gliner):
    """Largest difference between a text's scores alone and in a batch."""
    def scores(texts):
        found = gliner.inference(texts, LABELS, threshold=0.0, flat_ner=False, multi_label=True, batch_size=2)[0]
        return {(e["start"], e["end"], e["label"]): e["score"] for e in found}

    alone, beside = scores([TEXT]), scores([TEXT, LONG])
    return max(abs(score - beside[at]) for at, score in alone.items() if at in beside)


plain, fused = difference(model(False)), difference(model(True))
larger = model(True)
fuser = larger.model.token_rep_layer.bert_layer.layers_fuser
torch.manual_seed(1)
with torch.no_grad():
    for layer, factor in ((fuser.squeeze, 1.0), (fuser.W1, 5.0), (fuser.W2, 5.0)):
        layer.reset_parameters()
        layer.weight.mul_(factor)
largest = difference(larger)
print(f"fuse_layers=False:              {plain:.0e}")
print(f"fuse_layers=True:               {fused:.0e}")
print(f"its weights 5 times as large:   {largest:.0e}")
assert plain < 1e-6, "scores depend on the batch without the option, too"
assert fused > 20 * plain, "scores no longer depend on the batch"
assert largest > 20 * fused, "the weights no longer matter"
PY
cd "$tmp"
"$tmp/venv/bin/python" scores.py "$tmp/model" 2> /dev/null
