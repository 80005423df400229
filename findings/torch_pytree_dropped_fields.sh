#!/usr/bin/env bash
# torch: pytree.register_dataclass(cls, drop_field_names=[...]) drops nothing, without an error, unless field_names is given too.
#
# Packages: torch 2.13.0. A dataclass with a tensor and a note that is no part of the tree (a cache, a handle, a set of names).
#
# With both arguments the note is left out, as asked. With `drop_field_names` alone, the natural way to say "all but this one",
# the argument is ignored: all fields of the constructor become children. So the field that should be dropped is
# traced, compared and carried through torch.export and torch.compile as a leaf.
#
# Output seen (leaves of Output(tensor, note="a note")):
#   drop_field_names alone                ['Tensor', 'str']
#   field_names and drop_field_names      ['Tensor']
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES= PYTHONWARNINGS=ignore
cat > case.py <<'PY'
import dataclasses

import torch
from torch.utils import _pytree as pytree

found = {}
for words, arguments in (
    ("drop_field_names alone", {"drop_field_names": ["note"]}),
    ("field_names and drop_field_names", {"field_names": ["x"], "drop_field_names": ["note"]}),
):
    Output = dataclasses.make_dataclass("Output", [("x", torch.Tensor), ("note", str, dataclasses.field(default=""))])
    pytree.register_dataclass(Output, **arguments)
    found[words] = [type(leaf).__name__ for leaf in pytree.tree_leaves(Output(torch.ones(1), "a note"))]
    print(f"{words:36}  {found[words]}")
alone, both = found.values()
assert both == ["Tensor"]
assert alone == ["Tensor", "str"], "drop_field_names is looked at by itself now"
PY
"$tmp/venv/bin/python" case.py
