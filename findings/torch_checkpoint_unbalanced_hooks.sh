#!/usr/bin/env bash
# torch: under gradient checkpointing a module's forward pre-hook runs once more than its forward hook.
#
# Packages: torch 2.13.0. A residual layer of three modules, torch.utils.checkpoint.checkpoint(use_reentrant=False).
#
# The backward pass runs the layer again and stops it, by an exception, as soon as it has the last tensor that it needs
# ("early stop", the default). The module in which that happens is entered but not left: its pre-hook has run twice, its
# forward hook once, and later modules have run once. So a pair of hooks that pushes and pops (a profiler's ranges, a stack of
# names, a switch that is set and put back) is out of balance after every checkpointed layer, without an error. A hook that was
# registered with always_call=True runs then too, and set_checkpoint_early_stop(False) runs all of the layer.
#
# Output seen (calls of the pre-hook, of the hook, of the hook with always_call=True):
#   early stop on    layer 2 1 2   up 2 2 2   act 2 1 2   drop 1 1 1
#   early stop off   layer 2 2 2   up 2 2 2   act 2 2 2   drop 2 2 2
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES= PYTHONWARNINGS=ignore
cat > case.py <<'PY'
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.drop = nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.0)

    def forward(self, x):
        return x + self.drop(self.act(self.up(x)))


seen = {}
for early in (True, False):
    layer = Layer()
    counts = seen[early] = {name: [0, 0, 0] for name in ("layer", "up", "act", "drop")}

    def counting(name, place):
        def hook(*_):
            counts[name][place] += 1

        return hook

    for name in counts:
        module = layer if name == "layer" else getattr(layer, name)
        module.register_forward_pre_hook(counting(name, 0))
        module.register_forward_hook(counting(name, 1))
        module.register_forward_hook(counting(name, 2), always_call=True)
    with set_checkpoint_early_stop(early):
        x = torch.randn(2, 8, requires_grad=True)
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    columns = "   ".join(f"{name} {a} {b} {c}" for name, (a, b, c) in counts.items())
    print(f"early stop {'on ' if early else 'off'}   {columns}")
assert all(before == behind for before, behind, _ in seen[False].values())
unbalanced = [name for name, (before, behind, _) in seen[True].items() if before != behind]
assert unbalanced == ["layer", "act"], f"hooks run in pairs now: {seen[True]}"
PY
"$tmp/venv/bin/python" case.py
