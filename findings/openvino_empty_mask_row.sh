#!/usr/bin/env bash
# OpenVINO gives NaN for a text whose mask is all zeros where the model it was converted from gives numbers; it depends on the
# attention that the model was built with.
#
# Packages: openvino 2026.4.1, transformers 5.24.0, torch 2.13.0. A BERT of random weights in float32, three texts, the last
# with a mask of zeros (a filler row that rounds a batch up to a fixed size).
#
# In transformers all scores of such a row are masked alike, and both kinds of attention return finite numbers. After
# openvino.convert_model, a model built with "eager" returns the same numbers, and a model built with "sdpa" (the default)
# returns NaN in that row. Other rows are right. One NaN row is enough for a mean or a loss over the batch.
#
# Output seen:
#            torch    openvino   largest difference in the other rows
#   sdpa     finite   NaN        1e-06 or less
#   eager    finite   finite     1e-06 or less
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 openvino==2026.4.1 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
cat > case.py <<'PY'
import openvino
import torch
from transformers import BertConfig, BertModel


class Encoder(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


torch.manual_seed(0)
ids, mask = torch.randint(5, 40, (3, 9)), torch.ones(3, 9, dtype=torch.int64)
mask[1, 4:] = 0
filler = mask.clone()
filler[2] = 0
seen = {}
for attention in ("sdpa", "eager"):
    config = BertConfig(
        vocab_size=40, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32, attn_implementation=attention,
    )
    model = Encoder(BertModel(config)).eval()
    with torch.no_grad():
        expected = model(ids, filler)
    converted = openvino.convert_model(model, example_input=(ids, mask))
    compiled = openvino.Core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    got = torch.from_numpy(compiled([ids.numpy(), filler.numpy()])[0].copy())
    error = (got - expected)[:2].abs().max().item()
    seen[attention] = bool(expected.isfinite().all()), bool(got[2].isnan().all()), error
    print(f"{attention:6} torch finite: {seen[attention][0]}  openvino NaN: {seen[attention][1]}  other rows: {error:.1e}")
assert all(finite and error < 5e-6 for finite, _, error in seen.values())
assert seen["sdpa"][1] and not seen["eager"][1], "OpenVINO no longer gives NaN for an empty row"
PY
"$tmp/venv/bin/python" case.py
