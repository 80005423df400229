#!/usr/bin/env bash
# numpy: the mean of bfloat16 vectors is far too small, where that of float16 vectors is right.
#
# Packages: numpy 2.4.6, ml_dtypes 0.6.0 (whose bfloat16 numpy uses, e.g. for what safetensors.numpy reads).
#
# For float16, mean() adds up in float32. numpy does not know bfloat16 as a float, so sums of it stay bfloat16: adding 1 to 256
# gives 256, and the mean of 1,000 vectors of ones is 0.26. sum, mean, average and var are wrong, a matrix product and a norm of
# one axis are not. mean(dtype=np.float32) is right.
#
# Output seen (1,000 rows of ones; 1 and 1000 are right):
#   mean of float16                     1
#   mean of bfloat16                    0.255859
#   average of bfloat16                 0.255859
#   sum of bfloat16                     256
#   mean of bfloat16, dtype=float32     1
#   product of bfloat16 with itself     1000
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q numpy==2.4.6 ml_dtypes==0.6.0
cd "$tmp"
cat > case.py <<'PY'
import numpy as np
from ml_dtypes import bfloat16

ones = np.ones((1000, 4), dtype=bfloat16)
cases = {
    "mean of float16": np.ones((1000, 4), dtype=np.float16).mean(axis=0),
    "mean of bfloat16": ones.mean(axis=0),
    "average of bfloat16": np.average(ones, axis=0),
    "sum of bfloat16": ones.sum(axis=0),
    "mean of bfloat16, dtype=float32": ones.mean(axis=0, dtype=np.float32),
    "product of bfloat16 with itself": ones[:, 0] @ ones,
}
for name, found in cases.items():
    print(f"{name:35} {float(found[0]):g}")
PY
venv/bin/python case.py | tee found
diff found - <<'SEEN'
mean of float16                     1
mean of bfloat16                    0.255859
average of bfloat16                 0.255859
sum of bfloat16                     256
mean of bfloat16, dtype=float32     1
product of bfloat16 with itself     1000
SEEN
