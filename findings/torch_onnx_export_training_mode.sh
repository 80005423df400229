#!/usr/bin/env bash
# torch.onnx.export(dynamo=False) can leave a model that was in evaluation mode in training mode: dropout is on afterwards.
#
# Packages: torch 2.13.0, transformers 5.24.0, onnx 1.23.2. A BERT in evaluation mode inside the usual small wrapper that picks
# one output; .eval() was never called on the wrapper itself, which has no dropout.
#
# The exporter switches the module it is given to evaluation mode and afterwards back to *that module's* mode, with
# `wrapper.train(True)`, which goes down to every module inside. The exported file is right, but the model in memory now applies
# dropout. So a comparison of the file's output with the model's fails, and looks like a broken export. The exporter
# with dynamo=True leaves all modes alone.
#
# Output seen:
#   dynamo=False   model in training mode: before False, after True; two calls agree afterwards: False
#   dynamo=True    model in training mode: before False, after False; two calls agree afterwards: True
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 onnx==1.23.2 onnxscript==0.7.2 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
cat > case.py <<'PY'
import torch
from transformers import BertConfig, BertModel


class LastHiddenState(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


ids, mask = torch.randint(5, 40, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
after = {}
for dynamo in (False, True):
    config = BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    model = BertModel(config).eval()
    before = model.training
    torch.onnx.export(LastHiddenState(model), (ids, mask), "bert.onnx", dynamo=dynamo, verbose=False)
    with torch.no_grad():
        same = torch.equal(model(ids, mask).last_hidden_state, model(ids, mask).last_hidden_state)
    after[dynamo] = model.training, same
    print(f"dynamo={dynamo!s:6} model in training mode: before {before}, after {model.training}; "
          f"two calls agree afterwards: {same}")
    assert not before
assert after[True] == (False, True)
assert after[False] == (True, False), "the exporter restores each module's own mode now"
PY
"$tmp/venv/bin/python" case.py
