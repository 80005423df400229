#!/usr/bin/env bash
# onnxruntime.transformers' optimizer turns BERT's attention mask into a length, so padding anywhere but on the right gives
# other vectors, without an error.
#
# Packages: onnxruntime 1.32.0, onnx 1.23.2, transformers 5.24.0, torch 2.13.0. A BERT of random weights in float32, two texts of
# 8 and 4 tokens, exported once and optimised with `optimize_model(..., model_type="bert")`.
#
# The optimised file has an input of the same name and shape, [texts, tokens]. By default the fusion of attention replaces
# the mask by its sum over a text: of a text with four ones the first four columns are read, wherever these ones are. With padding
# on the left, as tokenizers of decoders write it, padding is attended to and real tokens are hidden; so is a token in the
# middle that a caller masks. The session's own optimisation, which runs for every file, keeps the mask. Way out:
# FusionOptions("bert") with use_raw_attention_mask(True).
#
# Output seen (largest difference to torch in real tokens):
#                            padding right   left    one token masked
#   exported                         5e-07   6e-07   5e-07
#   optimised                        7e-07   0.05    0.01
#   optimised, raw mask              7e-07   7e-07   7e-07
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6 sympy==1.14.0
cd "$tmp"
export CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
cat > case.py <<'PY'
import numpy as np
import onnxruntime
import torch
from onnxruntime.transformers.fusion_options import FusionOptions
from onnxruntime.transformers.optimizer import optimize_model
from transformers import BertConfig, BertModel


class LastHiddenState(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


torch.manual_seed(0)
config = BertConfig(vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
config._attn_implementation = "eager"  # the form of attention that the fusion knows
model = LastHiddenState(BertModel(config).eval())
ids = torch.randint(5, 50, (2, 8))
masks = {name: torch.ones(2, 8, dtype=torch.int64) for name in ("right", "left", "one masked")}
masks["right"][1, 4:] = masks["left"][1, :4] = masks["one masked"][1, 3] = 0

axes = {name: {0: "texts", 1: "tokens"} for name in ("input_ids", "attention_mask")}
torch.onnx.export(
    model, (ids, masks["right"]), "exported.onnx", input_names=list(axes), output_names=["states"], dynamic_axes=axes,
    opset_version=14, dynamo=False,
)
model.eval()  # this exporter may leave modules in training mode
raw = FusionOptions("bert")
raw.use_raw_attention_mask(True)
for name, options in (("optimised", None), ("raw", raw)):
    optimised = optimize_model("exported.onnx", "bert", num_heads=2, hidden_size=64, optimization_options=options)
    assert optimised.get_fused_operator_statistics()["Attention"] == 2, "attention is no longer fused"
    optimised.save_model_to_file(f"{name}.onnx")


def error(name: str, mask: torch.Tensor) -> float:
    session = onnxruntime.InferenceSession(f"{name}.onnx", providers=["CPUExecutionProvider"])
    given = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    types = {i.name: np.int32 if i.type == "tensor(int32)" else np.int64 for i in session.get_inputs()}
    states = session.run(None, {key: given[key].astype(kind) for key, kind in types.items()})[0]
    with torch.no_grad():
        expected = model(ids, mask).numpy()
    return float(np.abs(states - expected)[mask.bool().numpy()].max())


errors = {file: {how: error(file, mask) for how, mask in masks.items()} for file in ("exported", "optimised", "raw")}
for file, row in errors.items():
    print(f"{file:10}", *(f"{how} {value:.0e}" for how, value in row.items()), sep="   ")
assert max(*errors["exported"].values(), *errors["raw"].values(), errors["optimised"]["right"]) < 1e-5
assert min(errors["optimised"]["left"], errors["optimised"]["one masked"]) > 1e-3, "the optimiser keeps the mask now"
PY
"$tmp/venv/bin/python" case.py
