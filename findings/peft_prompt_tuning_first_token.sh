#!/usr/bin/env bash
# peft: under prompt tuning BERT's classifier no longer reads [CLS], but the first virtual token.
#
# Packages: peft 0.21.2, transformers 5.24.0, torch 2.13.0. BertForSequenceClassification of random weights, three virtual tokens.
#
# Virtual tokens are put before the whole text. [CLS] is then the fourth token and has the position embedding of a fourth token,
# and its last state is not used: the pooler takes row 0. So nothing of what the state of [CLS] and the pooler learnt together is
# kept, and nothing says so. P-tuning does the same; prefix tuning, which adds no rows, is refused for BERT. A text may also
# have three tokens fewer: the tokenizer, which does not know of the virtual tokens, cuts three too late.
#
# Output seen:
#   [CLS] is in row 3 of 7, the classifier reads row 0
#   a text as long as the model's limit raises
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 peft==0.21.2 accelerate==1.15.0 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
cat > case.py <<'PY'
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

CLS = 2
torch.manual_seed(0)
config = BertConfig(
    vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=32,
)
base = BertForSequenceClassification(config)
model = get_peft_model(base, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)).eval()
seen = {}


def of_inputs(module, args, options):
    table = base.bert.embeddings.word_embeddings.weight
    seen["row"] = (options["inputs_embeds"][0] == table[CLS]).all(-1).nonzero().flatten().tolist()


def of_states(module, args, output):
    seen["states"] = output[0] if isinstance(output, tuple) else output
    seen["states"].retain_grad()


base.bert.embeddings.register_forward_pre_hook(of_inputs, with_kwargs=True)
base.bert.encoder.layer[-1].register_forward_hook(of_states)
text = torch.tensor([[CLS, 7, 8, 3]])
model(input_ids=text, attention_mask=torch.ones_like(text)).logits.sum().backward()
rows, used = seen["states"].shape[1], seen["states"].grad[0].any(-1).nonzero().flatten().tolist()
print(f"[CLS] is in row {seen['row'][0]} of {rows}, the classifier reads row {used[0]}")
assert seen["row"] == [3] and rows == 7 and used == [0], "the classifier reads another row now"
longest = torch.full((1, 32), 7)
try:
    model(input_ids=longest, attention_mask=torch.ones_like(longest))
except (IndexError, RuntimeError):
    print("a text as long as the model's limit raises")
else:
    raise SystemExit("a text as long as the limit fits now")
PY
"$tmp/venv/bin/python" case.py
