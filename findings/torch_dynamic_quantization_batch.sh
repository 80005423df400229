#!/usr/bin/env bash
# torch: after quantize_dynamic the output for one row depends on the other rows of its batch, padding included.
#
# Packages: torch 2.13.0. One nn.Linear(64, 32), quantised to int8; a row alone, with ordinary neighbours, with one large neighbour.
#
# "Dynamic" means that the range of the activations is measured at each call. It is measured once for the whole input, not for
# each row. So a text's vector changes with the other texts of its batch and with the values at padding, and a row with large
# values makes all other rows less exact.
#
# Output seen (relative difference of the row's output from its output alone):
#   ordinary neighbours              0.016
#   a neighbour 100 times as large   0.78
#   the same in float32              1.5e-07
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES= PYTHONWARNINGS=ignore
cat > case.py <<'PY'
import sys

import torch

torch.manual_seed(0)
plain = torch.nn.Sequential(torch.nn.Linear(64, 32)).eval()
quantised = torch.ao.quantization.quantize_dynamic(plain, {torch.nn.Linear}, dtype=torch.qint8)
row, others = torch.randn(1, 64), torch.randn(7, 64)
batches = {"ordinary neighbours": others, "a neighbour 100 times as large": torch.cat([others[:6], 100 * others[6:]])}


def moved(model, others):
    alone, together = model(row)[0], model(torch.cat([row, others]))[0]
    return ((together - alone).norm() / alone.norm()).item()


with torch.no_grad():
    found = {name: moved(quantised, batch) for name, batch in batches.items()}
    found["the same in float32"] = moved(plain, batches["a neighbour 100 times as large"])
for name, value in found.items():
    print(f"{name:32s} {value:.2g}")
small, large, float32 = found.values()
sys.exit(0 if small > 1e-3 and large > 0.1 and float32 < 1e-6 else 1)
PY
"$tmp/venv/bin/python" case.py
