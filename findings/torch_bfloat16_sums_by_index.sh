#!/usr/bin/env bash
# torch: on a CPU, operators for one and the same sum by index differ by up to sixteen times in bfloat16.
#
# Packages: torch 2.13.0. 4,096 rows of ones are summed into one row (as when the tokens of a packed text are pooled), and the
# gradient of one row that was read 4,096 times is summed.
#
# Some of the operators add up in bfloat16, where 256 + 1 is 256; others in float32, rounding once. Names do not say which:
# index_add_ adds up rows in float32 and single numbers in bfloat16. The gradient of rows that were read as w[index] is summed in
# bfloat16, that of w.index_select(0, index) in float32. segment_reduce makes a mean of ones 0.0625.
#
# Output seen (4096 and a mean of 1 are right):
#   index_add_ of rows          4096
#   index_add_ of numbers        256
#   scatter_add_                4096
#   index_put_ accumulate        256
#   segment_reduce sum           256
#   segment_reduce mean       0.0625
#   index_reduce_ mean        0.0625
#   scatter_reduce_ mean           1
#   embedding_bag sum           4096
#   gradient of w[index]         256
#   gradient of index_select    4096
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES= PYTHONWARNINGS=ignore
cat > case.py <<'PY'
import torch
import torch.nn.functional as F

torch.set_num_threads(1)
half = torch.bfloat16
ones, index = torch.ones(4096, 8, dtype=half), torch.zeros(4096, dtype=torch.int64)
columns = index[:, None].expand(-1, 8)


def zeros(*shape):
    return torch.zeros(*shape, dtype=half)


def gradient(read):
    w = torch.ones(1, 8, dtype=half, requires_grad=True)
    read(w).backward(ones)
    return w.grad


every = torch.tensor([4096])
cases = {
    "index_add_ of rows": zeros(1, 8).index_add_(0, index, ones),
    "index_add_ of numbers": zeros(1).index_add_(0, index, ones[:, 0].contiguous()),
    "scatter_add_": zeros(1, 8).scatter_add_(0, columns, ones),
    "index_put_ accumulate": zeros(1, 8).index_put_((index,), ones, accumulate=True),
    "segment_reduce sum": torch.segment_reduce(ones, "sum", lengths=every),
    "segment_reduce mean": torch.segment_reduce(ones, "mean", lengths=every),
    "index_reduce_ mean": zeros(1, 8).index_reduce_(0, index, ones, "mean", include_self=False),
    "scatter_reduce_ mean": zeros(1, 8).scatter_reduce_(0, columns, ones, "mean", include_self=False),
    "embedding_bag sum": F.embedding_bag(torch.arange(4096), ones, torch.tensor([0]), mode="sum"),
    "gradient of w[index]": gradient(lambda w: w[index]),
    "gradient of index_select": gradient(lambda w: w.index_select(0, index)),
}
for name, found in cases.items():
    print(f"{name:24} {found.flatten()[0].item():7g}")
PY
venv/bin/python case.py | tee found
diff found - <<'SEEN'
index_add_ of rows          4096
index_add_ of numbers        256
scatter_add_                4096
index_put_ accumulate        256
segment_reduce sum           256
segment_reduce mean       0.0625
index_reduce_ mean        0.0625
scatter_reduce_ mean           1
embedding_bag sum           4096
gradient of w[index]         256
gradient of index_select    4096
SEEN
