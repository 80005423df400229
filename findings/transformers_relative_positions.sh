#!/usr/bin/env bash
# transformers: a BERT with position_embedding_type="relative_key" is built with absolute positions, without a warning.
#
# Packages: transformers 5.24.0, torch 2.13.0.
#
# Up to transformers 4 "relative_key" and "relative_key_query" gave every layer a table `distance_embedding`. In 5 the setting is still
# accepted and kept in the config, but no layer has such a table: a checkpoint trained with relative positions computes
# something else (its tables are reported as unexpected keys at best), and a new model has absolute positions.
#
# Output seen (parameters that have to do with positions, for all three settings the same):
#   absolute             embeddings.position_embeddings.weight
#   relative_key         embeddings.position_embeddings.weight
#   relative_key_query   embeddings.position_embeddings.weight
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
cat > case.py <<'PY'
import torch
from transformers import BertConfig, BertModel

outputs = {}
for kind in ("absolute", "relative_key", "relative_key_query"):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=8, position_embedding_type=kind,
    )
    model = BertModel(config).eval()
    names = [name for name in model.state_dict() if "position" in name or "distance" in name]
    print(f"{kind:20} {' '.join(names)}")
    assert names == ["embeddings.position_embeddings.weight"], "relative positions are back"
    outputs[kind] = model(torch.arange(8)[None]).last_hidden_state
assert torch.equal(outputs["absolute"], outputs["relative_key"])
PY
"$tmp/venv/bin/python" case.py
