#!/usr/bin/env bash
# torch: on a CPU, LayerNorm's gradients are summed over the rows in bfloat16, also under autocast, where its weights are float32.
#
# Packages: torch 2.13.0. LayerNorm over 4,096 rows of 64 numbers, as 4,096 tokens of a batch.
#
# The gradient of the bias is the sum of the upstream gradient over all rows. In bfloat16 256 + 1 is 256, so a sum of ones ends
# at 256, and each thread sums its own share: the gradient grows with the number of threads. Autocast leaves LayerNorm in the
# dtype of its input, and with bfloat16 input (after a Linear and GELU in the head of BERT for masked words) a float32 weight gets
# the same gradient. Linear, GroupNorm and RMSNorm give the right sums, and so does LayerNorm of x.float(). Embedding too sums
# in the dtype of its table, so a row that all tokens share (a segment, a special token) gets a small part of its gradient; but
# under autocast tables stay float32.
#
# Output seen (gradient of one number of the bias or of a row; 4096 is right):
#                               1 thread   2 threads
#   LayerNorm bfloat16               256         512
#   LayerNorm under autocast         256         512
#   LayerNorm of x.float()          4096        4096
#   RMSNorm bfloat16                4096        4096
#   GroupNorm bfloat16              4096        4096
#   Linear bfloat16                 4096        4096
#   Embedding bfloat16               256         256
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES= PYTHONWARNINGS=ignore
cat > case.py <<'PY'
import torch
import torch.nn as nn

ROWS, WIDTH = 4096, 64
half = torch.bfloat16
x = torch.ones(ROWS, WIDTH, dtype=half)


def after_backward(module, inputs, autocast=False):
    with torch.autocast("cpu", dtype=half, enabled=autocast):
        y = module(inputs)
    y.backward(torch.ones_like(y))
    return module


cases = {
    "LayerNorm bfloat16": lambda: after_backward(nn.LayerNorm(WIDTH).to(half), x).bias.grad[0],
    "LayerNorm under autocast": lambda: after_backward(nn.LayerNorm(WIDTH), x, autocast=True).bias.grad[0],
    "LayerNorm of x.float()": lambda: after_backward(nn.LayerNorm(WIDTH), x.float(), autocast=True).bias.grad[0],
    "RMSNorm bfloat16": lambda: after_backward(nn.RMSNorm(WIDTH).to(half), x).weight.grad[0],
    "GroupNorm bfloat16": lambda: after_backward(nn.GroupNorm(4, WIDTH).to(half), x).bias.grad[0],
    "Linear bfloat16": lambda: after_backward(nn.Linear(WIDTH, 8).to(half), x).bias.grad[0],
    "Embedding bfloat16": lambda: after_backward(
        nn.Embedding(2, WIDTH).to(half), torch.zeros(ROWS, dtype=torch.int64)
    ).weight.grad[0, 0],
}
for name, gradient in cases.items():
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(f"{gradient().item():12.0f}")
    print(f"{name:25}", *found)
PY
venv/bin/python case.py | tee found
diff found - <<'SEEN'
LayerNorm bfloat16                 256          512
LayerNorm under autocast           256          512
LayerNorm of x.float()            4096         4096
RMSNorm bfloat16                  4096         4096
GroupNorm bfloat16                4096         4096
Linear bfloat16                   4096         4096
Embedding bfloat16                 256          256
SEEN
