#!/usr/bin/env bash
# torch: clip_grad_norm_ counts a weight that is in its list twice in the norm twice, and scales its gradient twice.
#
# Packages: torch 2.13.0. An embedding whose weight is also that of the output layer, as in models of masked words, and a layer
# between them. The list of the parameters is made by joining those of the three modules.
#
# `parameters()` of one module names each tensor once, but a list of several modules' parameters, or of the groups of an
# optimizer, names a tied weight once for each module. An optimizer warns of that. clip_grad_norm_ does not: the norm that it
# returns is too large, and where it clips, the tied gradient is multiplied by the factor two times. With gradients a
# hundred times over the limit the tied weight gets a hundredth of its share of the step.
#
# Output seen:
#   foreach=True   each once:  limit 1.0, norm afterwards 1.000, both weights scaled by the same factor: True
#   foreach=True   tied twice: limit 1.0, norm afterwards 0.951, both weights scaled by the same factor: False
#   foreach=False  each once:  limit 1.0, norm afterwards 1.000, both weights scaled by the same factor: True
#   foreach=False  tied twice: limit 1.0, norm afterwards 0.951, both weights scaled by the same factor: False
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES= PYTHONWARNINGS=ignore
cat > case.py <<'PY'
import torch
from torch import nn

embedding, middle, head = nn.Embedding(4, 2), nn.Linear(2, 2, bias=False), nn.Linear(2, 4, bias=False)
head.weight = embedding.weight
with torch.no_grad():
    embedding.weight.copy_(torch.arange(8.0).view(4, 2))
    middle.weight.copy_(torch.tensor([[1.0, 2.0], [-1.0, 0.5]]))
head(middle(embedding(torch.tensor([1, 3])))).square().sum().backward()
weights = [embedding.weight, middle.weight]
gradients = [weight.grad.clone() for weight in weights]

joined = [*embedding.parameters(), *middle.parameters(), *head.parameters()]
for foreach in (True, False):
    for name, parameters in (("each once", weights), ("tied twice", joined)):
        for weight, gradient in zip(weights, gradients):
            weight.grad = gradient.clone()
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=foreach)
        after = torch.stack([weight.grad.norm() for weight in weights]).norm().item()
        factors = [(weight.grad.norm() / gradient.norm()).item() for weight, gradient in zip(weights, gradients)]
        same = abs(factors[0] / factors[1] - 1) < 1e-3
        print(f"foreach={foreach!s:6} {name + ':':11} limit 1.0, norm afterwards {after:.3f}, "
              f"both weights scaled by the same factor: {same}")
PY
venv/bin/python case.py | tee found
diff found - <<'SEEN'
foreach=True   each once:  limit 1.0, norm afterwards 1.000, both weights scaled by the same factor: True
foreach=True   tied twice: limit 1.0, norm afterwards 0.951, both weights scaled by the same factor: False
foreach=False  each once:  limit 1.0, norm afterwards 1.000, both weights scaled by the same factor: True
foreach=False  tied twice: limit 1.0, norm afterwards 0.951, both weights scaled by the same factor: False
SEEN
