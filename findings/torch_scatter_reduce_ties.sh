#!/usr/bin/env bash
# torch: scatter_reduce("amax", include_self=False) loses a part of the gradient if the maximum equals the old value.
#
# Packages: torch 2.13.0. Maximum over the rows of a segment, of three equal values, into a tensor of zeros; also index_reduce.
#
# With include_self=False the forward pass ignores the old values of `self`. But the backward pass compares `self` with the
# result: if they are equal it counts one more tie, and that share of the gradient is lost. A segment maximum usually starts
# from zeros, and a ReLU before it often makes the maximum exactly 0: a single value then loses half of its gradient. Starting
# from NaN, which equals nothing, gives the right gradient.
#
# Output seen (gradient of each value, its upstream gradient being 1; the right one is 1 shared by all):
#   maximum 0   three values   scatter_reduce 0.25   index_reduce 0.25   from NaN 0.333333
#   maximum 0   one value      scatter_reduce 0.5   index_reduce 0.5   from NaN 1
#   maximum 1   three values   scatter_reduce 0.333333   index_reduce 0.333333   from NaN 0.333333
#   maximum 1   one value      scatter_reduce 1   index_reduce 1   from NaN 1
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES= PYTHONWARNINGS=ignore
cat > case.py <<'PY'
import torch

for maximum in (0.0, 1.0):
    for words, count in (("three values", 3), ("one value   ", 1)):
        x = torch.full((count,), maximum, requires_grad=True)
        zeros, nan, where = torch.zeros(1), torch.full((1,), torch.nan), torch.zeros(count, dtype=torch.int64)
        outputs = {
            "scatter_reduce": zeros.scatter_reduce(0, where, x, "amax", include_self=False),
            "index_reduce": zeros.index_reduce(0, where, x, "amax", include_self=False),
            "from NaN": nan.scatter_reduce(0, where, x, "amax", include_self=False),
        }
        assert all(y.item() == maximum for y in outputs.values())
        found = {name: torch.autograd.grad(y.sum(), x)[0][0].item() for name, y in outputs.items()}
        print(f"maximum {maximum:.0f}   {words}   " + "   ".join(f"{name} {g:g}" for name, g in found.items()))
        right, lost = 1 / count, 1 / (count + 1)
        expected = (lost, lost, right) if maximum == 0 else (right, right, right)
        for got, wanted in zip(found.values(), expected):
            assert abs(got - wanted) < 1e-6, "the value left out is no tie any more"
PY
"$tmp/venv/bin/python" case.py
