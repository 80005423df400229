#!/usr/bin/env bash
# transformers: a boolean mask for each pair of tokens is obeyed by sdpa and hides nothing with eager attention.
#
# Packages: transformers 5.24.0, torch 2.13.0. A BERT and a Llama of random weights in float32, the same weights for both kinds
# of attention. The first two of six tokens are hidden by a mask [texts, 1, tokens, tokens] of True and False.
#
# A mask with four dimensions reaches the attention as it was given. sdpa hides what is False. Eager attention, which one
# chooses to see attention's weights, adds the mask to the scores: True becomes 1 and False 0. So nothing is hidden, and
# there is no error. A mask of int64 is added likewise, and sdpa refuses it. Both obey floats, 0 and the dtype's least number.
#
# Output seen (largest difference in the other tokens to the same mask with two dimensions):
#           bool, sdpa   bool, eager   int64, eager   floats, both
#   Bert             0         0.004          0.004              0
#   Llama            0             1              1              0
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
cat > case.py <<'PY'
import torch
import transformers

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
ids, columns = torch.tensor([[3, 4, 5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1, 1, 1]])
everything = columns.bool()[:, None, None, :].expand(1, 1, 6, 6)
sees = {"Bert": everything, "Llama": everything.tril()}  # Llama's tokens see no later ones
for name, pairs in sees.items():
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, use_cache=False)
    model = getattr(transformers, f"{name}Model")(config).eval()

    def error(mask: torch.Tensor, attention: str) -> float:
        model.set_attn_implementation(attention)
        positions = torch.arange(6)[None]
        with torch.no_grad():
            two, four = (model(ids, attention_mask=m, position_ids=positions).last_hidden_state for m in (columns, mask))
        return (two - four)[:, 2:].abs().max().item()

    floats = torch.zeros(1, 1, 6, 6).masked_fill(~pairs, torch.finfo(torch.float32).min)
    obeyed, added, added_too = error(pairs, "sdpa"), error(pairs, "eager"), error(pairs.long(), "eager")
    both = max(error(floats, "sdpa"), error(floats, "eager"))
    print(f"{name:6} bool, sdpa {obeyed:.1g}   bool, eager {added:.1g}   int64, eager {added_too:.1g}   floats {both:.1g}")
    assert max(obeyed, both) < 1e-5
    assert min(added, added_too) > 1e-3, "eager attention obeys such a mask now"
PY
"$tmp/venv/bin/python" case.py
