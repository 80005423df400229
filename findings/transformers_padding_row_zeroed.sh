#!/usr/bin/env bash
# transformers: from_pretrained gives ChineseCLIP's text model another padding row than the checkpoint holds.
#
# Packages: transformers 5.24.0, torch 2.13.0.
#
# Loading a checkpoint that holds every parameter should leave every parameter as it was saved. For ChineseCLIPTextModel the row of
# the padding token in `word_embeddings.weight` is zero afterwards, whatever the file has there, without a warning: for an unmasked
# id equal to pad_token_id the loaded model computes something else than the saved one. The
# initialisation of a freshly made model zeroes that row through a slice of the parameter, and the slice does not carry the mark by
# which initialisation leaves loaded parameters alone. BertModel, made and loaded in the same way, keeps the row.
#
# Output seen:
#   BertModel              saved 0.5   loaded 0.5   changed: none
#   ChineseCLIPTextModel   saved 0.5   loaded 0.0   changed: embeddings.word_embeddings.weight
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
cat > case.py <<'PY'
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, ChineseCLIPTextConfig, ChineseCLIPTextModel
from transformers.utils import logging

logging.disable_progress_bar()
WORDS = "embeddings.word_embeddings.weight"
changed = {}
for config_class, model_class in ((BertConfig, BertModel), (ChineseCLIPTextConfig, ChineseCLIPTextModel)):
    torch.manual_seed(0)
    config = config_class(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    model = model_class(config)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[config.pad_token_id] = 0.5
    model.save_pretrained("model")
    saved, loaded = load_file("model/model.safetensors"), model_class.from_pretrained("model").state_dict()
    changed[model_class.__name__] = [name for name in saved if not torch.equal(saved[name], loaded[name])]
    print(
        f"{model_class.__name__:22} saved {saved[WORDS][0, 0]:.1f}   loaded {loaded[WORDS][0, 0]:.1f}   "
        f"changed: {' '.join(changed[model_class.__name__]) or 'none'}"
    )
assert changed == {"BertModel": [], "ChineseCLIPTextModel": [WORDS]}, "the padding row is loaded as it was saved"
PY
"$tmp/venv/bin/python" case.py
