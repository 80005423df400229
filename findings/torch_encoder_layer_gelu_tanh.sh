#!/usr/bin/env bash
# torch: nn.TransformerEncoderLayer(activation=nn.GELU("tanh")) computes GELU by erf as soon as gradients are off.
#
# Packages: torch 2.13.0. One post-norm layer, float32, in evaluation mode.
#
# The layer's fast path knows two activations, ReLU and GELU, and treats any nn.GELU as the one by erf: it ignores
# `approximate`. So a model is trained with GELU by tanh, and computes another function under torch.no_grad(). If the activation
# is a function instead of a module (F.gelu with approximate="tanh", in a lambda), the fast path is not taken.
#
# Output seen (largest difference of the output without gradients from that with gradients, and from a layer with nn.GELU()):
#   nn.GELU("tanh")   1.6e-04 from its own, 0.0e+00 from nn.GELU()
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES= PYTHONWARNINGS=ignore
cat > case.py <<'PY'
import torch
import torch.nn as nn


def layer(activation):
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(64, 4, 128, activation=activation, batch_first=True).eval()


x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1))
by_tanh, by_erf = layer(nn.GELU("tanh")), layer(nn.GELU())
with_gradients = by_tanh(x).detach()
with torch.no_grad():
    without, erf = by_tanh(x), by_erf(x)
from_own, from_erf = ((without - other).abs().max().item() for other in (with_gradients, erf))
print(f'nn.GELU("tanh")   {from_own:.1e} from its own, {from_erf:.1e} from nn.GELU()')
assert from_own > 3e-5 and from_erf < 2e-6, "the fast path looks at approximate now"
PY
"$tmp/venv/bin/python" case.py
