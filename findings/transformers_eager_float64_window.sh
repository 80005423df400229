#!/usr/bin/env bash
# transformers: a model with a sliding window gives NaN for real tokens in float64 with eager attention, and numbers in float32.
#
# Packages: transformers 5.24.0, torch 2.13.0. A random Mistral of two layers, right-padded texts, sliding_window=4.
#
# A test may use the model in float64 as an exact reference. The mask then holds the smallest float64; eager attention casts
# scores to float32 for its softmax, where that is minus infinity. A padding token whose window has only padding then has a row
# of only minus infinity, so its output is NaN, and in the next layer NaN times a probability of zero reaches the text's real
# tokens. In float32, bfloat16 and float16 the smallest number
# stays finite, and sdpa does not cast. (By the same cast eager attention in float64 has float32's error.)
#
# Output seen (does a real token have NaN, for texts of 9, 4 and 2 tokens padded to 9):
#   eager float64   False True True
#   eager float32   False False False
#   sdpa float64    False False False
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
cat > case.py <<'PY'
import torch
from transformers import MistralConfig, MistralModel

lengths = torch.tensor([9, 4, 2])
mask = (torch.arange(9) < lengths[:, None]).long()
ids = torch.randint(1, 60, (3, 9), generator=torch.Generator().manual_seed(0))


def has_nan(attention, dtype):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4,
    )
    config._attn_implementation = attention
    model = MistralModel(config).eval().to(dtype)
    with torch.no_grad():
        states = model(ids, attention_mask=mask).last_hidden_state
    found = [bool(states[i, :length].isnan().any()) for i, length in enumerate(lengths)]
    print(f"{attention} {str(dtype)[6:]:10}", *found)
    return found


assert has_nan("eager", torch.float64) == [False, True, True], "eager attention in float64 has no NaN any more"
assert not any(has_nan("eager", torch.float32))
assert not any(has_nan("sdpa", torch.float64))
PY
"$tmp/venv/bin/python" case.py
