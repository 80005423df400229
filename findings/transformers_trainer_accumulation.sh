#!/usr/bin/env bash
# transformers: Trainer's gradient accumulation multiplies the loss and the gradient of BERT's classifiers by the number of steps.
#
# Packages: transformers 5.24.0, accelerate 1.15.0, torch 2.13.0. One optimiser step over the same 16 examples, without dropout.
#
# 16 examples at once, 4 x 4 and 1 x 16 are the same step, so one expects the same loss and gradient norm. They grow by the factor
# gradient_accumulation_steps: forward takes **kwargs, from which Trainer concludes that the model divides its loss by
# num_items_in_batch, and so does not divide by the number of steps itself; the classification heads ignore that argument.
# With a clipped gradient (max_grad_norm is 1 by default) the update hides it and only the logged loss looks wrong; without
# clipping, or below the threshold, the step is too large by that factor.
#
# Output seen:
#   16 x  1: loss  0.694, gradient norm 0.0330
#    4 x  4: loss  2.775, gradient norm 0.1321
#    1 x 16: loss 11.101, gradient norm 0.5283
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3 numpy==2.4.6 accelerate==1.15.0
cd "$tmp"
export CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
cat > case.py <<'PY'
import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

CONFIG = BertConfig(
    vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=2,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)


class Examples(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        ids = torch.randint(0, 50, (6,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": torch.tensor(i % 2)}


def one_step(batch, accumulation):
    torch.manual_seed(0)
    arguments = TrainingArguments(
        tempfile.mkdtemp(), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=1,
        logging_steps=1, report_to=[], max_grad_norm=1e9, use_cpu=True, disable_tqdm=True, save_strategy="no",
    )
    trainer = Trainer(BertForSequenceClassification(CONFIG), arguments, train_dataset=Examples())
    trainer.train()
    return trainer.state.log_history[0]


seen = {(b, a): one_step(b, a) for b, a in ((16, 1), (4, 4), (1, 16))}
for (b, a), log in seen.items():
    print(f"{b:2} x {a:2}: loss {log['loss']:6.3f}, gradient norm {log['grad_norm']:.4f}")
for key in ("loss", "grad_norm"):
    assert abs(seen[4, 4][key] / seen[16, 1][key] - 4) < 0.1, "the factor is gone"
    assert abs(seen[1, 16][key] / seen[16, 1][key] - 16) < 0.5, "the factor is gone"
PY
"$tmp/venv/bin/python" case.py
