#!/usr/bin/env bash
# transformers: a mask value of 3 is a token like others for BERT, triples an embedding in DeBERTa, and gives NaN in LayoutLM.
#
# Packages: transformers 5.24.0, torch 2.13.0. Small models with random weights and eager attention; one text of six tokens, two of
# them padding, with masks of 1 and 0, of the numbers of two or three parts, as for texts packed into one row, and of weights.
#
# "1 for tokens, 0 for padding" is all that the documentation says. BERT, ModernBERT and T5 ask which values are not 0, so that any
# value means a token. DeBERTa does so in its attention, and also multiplies its embeddings by the mask. LayoutLM and MarkupLM
# subtract the mask from 1 and multiply by the most negative number: a larger value outweighs every token with a 1 or overflows, and
# weights below 1 hide all but the largest. transformers 4 did the same for BERT. No model raises an error or warns.
#
# Output seen (is the vector of the first token that of the mask of 1 and 0?):
#                 two parts    three parts  weights
#   Bert          equal        equal        equal
#   ModernBert    equal        equal        equal
#   DebertaV2     different    different    different
#   LayoutLM      different    nan          different
#   MarkupLM      different    different    different
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q transformers==5.24.0 torch==2.13.0 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES= PYTHONWARNINGS=ignore HF_HOME="$tmp/home" HF_HUB_OFFLINE=1
cat > case.py <<'PY'
import torch
import transformers

SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
         "max_position_embeddings": 40, "attn_implementation": "eager"}
MORE = {
    "Bert": {},
    "ModernBert": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    "DebertaV2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "LayoutLM": {"max_2d_position_embeddings": 32},
    "MarkupLM": {"pad_token_id": 1, "max_xpath_tag_unit_embeddings": 20, "max_xpath_subs_unit_embeddings": 20,
                 "xpath_unit_hidden_size": 8, "max_depth": 4, "tag_pad_id": 19, "subs_pad_id": 19},
}
transformers.logging.set_verbosity_error()
MASKS = {"two parts": [1, 1, 2, 2, 0, 0], "three parts": [1, 2, 2, 3, 0, 0], "weights": [1.0, 0.9, 0.8, 0.5, 0.0, 0.0]}
ids = torch.tensor([[5, 6, 7, 8, 1, 1]])
print(" " * 13, "".join(f"{name:13}" for name in MASKS).rstrip())
for name, more in MORE.items():
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**SIZES, **more)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.3)
        plain = model(input_ids=ids, attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0]])).last_hidden_state[0, 0]
        found = []
        for mask in MASKS.values():
            vector = model(input_ids=ids, attention_mask=torch.tensor([mask])).last_hidden_state[0, 0]
            same = torch.allclose(vector, plain, atol=1e-4)
            found.append("nan" if vector.isnan().any() else "equal" if same else "different")
    print(f"{name:13}", "".join(f"{what:13}" for what in found).rstrip())
PY
venv/bin/python case.py | tee found
diff found - <<'SEEN'
              two parts    three parts  weights
Bert          equal        equal        equal
ModernBert    equal        equal        equal
DebertaV2     different    different    different
LayoutLM      different    nan          different
MarkupLM      different    different    different
SEEN
