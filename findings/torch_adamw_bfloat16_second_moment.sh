#!/usr/bin/env bash
# torch: the second moment of AdamW never decays if the weights are bfloat16, so one large gradient slows a weight for ever.
#
# Packages: torch 2.13.0. AdamW with its default betas, one step with a gradient of 1, then 5,000 steps with a gradient of 0.001.
#
# Moments have the dtype of the weights. A step multiplies the second moment by 0.999, but neighbouring numbers of bfloat16
# differ by 0.4% or more, so the product rounds back to the old value. With the first, large gradient kept in it, the step divides by
# sqrt(0.001) for ever, where in float32 it soon divides by the size of recent gradients. `fused` and `foreach` are no different.
# With betas=(0.9, 0.99) the moment does fall.
#
# Output seen (second moment after the first step, and after 5,000 more):
#   float32                      1.00e-03   7.71e-06
#   bfloat16                     9.99e-04   9.99e-04
#   bfloat16 foreach             9.99e-04   9.99e-04
#   bfloat16 fused               9.99e-04   9.99e-04
#   bfloat16 betas=(0.9, 0.99)   1.00e-02   2.22e-06
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES= PYTHONWARNINGS=ignore
cat > case.py <<'PY'
import torch

torch.set_num_threads(1)


def moments(name, dtype, **options):
    weight = torch.nn.Parameter(torch.zeros(16, dtype=dtype))
    optimizer = torch.optim.AdamW([weight], lr=1e-3, **options)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    first = optimizer.state[weight]["exp_avg_sq"].float().max().item()
    weight.grad = torch.full_like(weight, 1e-3)
    for _ in range(5000):
        optimizer.step()
    last = optimizer.state[weight]["exp_avg_sq"].float().max().item()
    print(f"{name:27} {first:.2e}   {last:.2e}")
    return first, last


first, last = moments("float32", torch.float32)
assert last < first / 100
for options in ({}, {"foreach": True}, {"fused": True}):
    first, last = moments(" ".join(["bfloat16", *options]), torch.bfloat16, **options)
    assert last == first > 9e-4, "the second moment of bfloat16 weights decays now"
first, last = moments("bfloat16 betas=(0.9, 0.99)", torch.bfloat16, betas=(0.9, 0.99))
assert last < first / 5
PY
venv/bin/python case.py
