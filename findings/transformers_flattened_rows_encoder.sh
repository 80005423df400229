#!/usr/bin/env bash
# transformers: texts packed into one row by DataCollatorWithFlattening stay apart in Llama, and see each other in BERT.
#
# Packages: transformers 5.24.0, torch 2.13.0. Models of random weights with sdpa; two texts of 3 and 2 tokens in one row,
# with the position_ids that the collator makes, 0 1 2 0 1, and each text alone.
#
# With sdpa and no attention_mask, decoders take from positions that begin again where a text ends, and hide the other
# texts. Encoders do not: in BERT every token sees all tokens of the row, so a text's vectors depend on its neighbours, and a model
# trained so learns from them. There is no error, since position_ids are valid. The collator warns that attention must be able to
# handle such rows, in the same words for both kinds of models. Way out: a mask for each pair of tokens.
#
# Output seen (largest difference between a text in the row and alone):
#   Llama        4e-07
#   Bert         0.02
#   ModernBert   0.01
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
cat > case.py <<'PY'
import torch
import transformers

transformers.logging.set_verbosity_error()
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
texts = [[3, 4, 5], [6, 7]]
row = transformers.DataCollatorWithFlattening()([{"input_ids": text} for text in texts])
assert row["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
seen = {}
for name, more in (("Llama", {"use_cache": False}), ("Bert", {}), ("ModernBert", {"pad_token_id": 0})):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **more)
    model = getattr(transformers, f"{name}Model")(config).eval()
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        together = model(row["input_ids"], position_ids=row["position_ids"]).last_hidden_state[0]
        alone = torch.cat([model(torch.tensor([text])).last_hidden_state[0] for text in texts])
    seen[name] = (together - alone).abs().max().item()
    print(f"{name:10} {seen[name]:.1g}")
assert seen["Llama"] < 1e-5
assert min(seen["Bert"], seen["ModernBert"]) > 1e-3, "encoders read the positions too now"
PY
"$tmp/venv/bin/python" case.py
