#!/usr/bin/env bash
# torch: after load_state_dict(assign=True) tied weights still share memory, but are two parameters, and an optimiser updates
# that memory twice in each step.
#
# Packages: torch 2.13.0. A masked language model in small: an embedding, and a product by the same weight, tied in __init__;
# saved with torch.save, loaded with torch.load.
#
# assign=True is the recipe for models made on the meta device. Each name gets a new nn.Parameter over the tensor of the
# file, and torch.load gives both names one memory. So the model looks tied, its outputs are right, and the weights stay equal;
# but `parameters()` yields two, each with a part of the gradient. AdamW divides each part by its own size and takes two steps,
# and decays the weight twice. Clipping and counts of parameters are wrong too. Way out: tie again after loading,
# before the optimiser is made.
#
# Output seen (one step of AdamW, lr 0.1, weight decay 0.1):
#                parameters   one memory   largest change of a weight
#   copied                1   yes          0.12
#   assigned              2   yes          0.24
#   tied again            1   yes          0.12
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES= PYTHONWARNINGS=ignore
cat > case.py <<'PY'
import torch
import torch.nn as nn


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.decoder = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.tie()

    def tie(self):
        self.decoder.weight = self.embedding.weight

    def forward(self, ids):
        return self.decoder(self.embedding(ids))


torch.manual_seed(0)
saved = Words()
torch.save(saved.state_dict(), "words.pt")
ids = torch.tensor([1, 2])


def trained(assign: bool, tie_again: bool) -> tuple[int, bool, float]:
    """The number of parameters, whether both names have one memory, and the largest change of one step."""
    with torch.device("meta" if assign else "cpu"):
        model = Words()
    model.load_state_dict(torch.load("words.pt"), assign=assign)
    if tie_again:
        model.tie()
    assert torch.equal(model(ids), saved(ids))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    nn.functional.cross_entropy(model(ids), torch.tensor([3, 4])).backward()
    optimizer.step()
    shared = model.embedding.weight.data_ptr() == model.decoder.weight.data_ptr()
    change = (model.embedding.weight - saved.embedding.weight).abs().max().item()
    return len(list(model.parameters())), shared, change


seen = {"copied": trained(False, False), "assigned": trained(True, False), "tied again": trained(True, True)}
for name, (count, shared, change) in seen.items():
    print(f"{name:10}   parameters {count}   one memory {shared}   largest change {change:.3f}")
assert seen["copied"] == seen["tied again"] and seen["copied"][:2] == (1, True)
assert seen["assigned"][:2] == (2, True), "assign=True keeps weights tied now"
assert seen["assigned"][2] > 1.5 * seen["copied"][2]
PY
"$tmp/venv/bin/python" case.py
