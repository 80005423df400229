#!/usr/bin/env bash
# Triton 3.9: a condition that is the same in every step of a loop makes the loop half as long again.
#
# Packages: triton 3.7.1 and 3.9.0. No GPU is needed: kernels are compiled for sm_90, and the machine code of their loop is counted.
#
# The loop masks columns past n, as attention does: tl.where((cols < n)[None, :], tl.dot(x, tl.trans(y)), -inf). 3.7.1 compares
# in the loop, one instruction for each column of a thread. 3.9.0 runs LLVM's SLP vectorizer (not for sm_80): it computes the
# conditions before the loop as one vector of bits, packs them into registers, and the loop has to take each bit out again. No option
# of a kernel turns this off. A row of 0 and -inf that is made before the loop and added in it avoids the bits, and is right where
# no score is infinite or NaN.
#
# Output seen (instructions in the loop; the last column is 3.9.0 without the SLP vectorizer):
#                              3.7.1   3.9.0   without
#   tl.where in the loop         227     350       246
#   a row of 0 and -inf          199     217       217
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
cd "$tmp"
export TRITON_DEFAULT_FP_FUSION=1  # the default, which 3.9.0 warns of if the variable is not set
cat > kernel.py <<'PY'
import re
import subprocess
import sys
from pathlib import Path

import triton
import triton.backends.nvidia.compiler as backend
import triton.language as tl
from triton.backends.compiler import GPUTarget


@triton.jit
def best(x_ptr, y_ptr, out_ptr, m, n, ROW: tl.constexpr):
    """The largest inner product of each row of x with the first n rows of y."""
    cols = tl.arange(0, 128)
    dims = tl.arange(0, 64)
    y = tl.load(y_ptr + cols[:, None] * 64 + dims[None, :])
    row = tl.where(cols < n, 0.0, float("-inf"))
    for first in range(0, m, 64):
        rows = first + tl.arange(0, 64)
        x = tl.load(x_ptr + rows[:, None] * 64 + dims[None, :])
        scores = tl.dot(x, tl.trans(y))
        if ROW:
            scores += row[None, :]
        else:
            scores = tl.where((cols < n)[None, :], scores, float("-inf"))
        tl.store(out_ptr + rows, tl.max(scores, 1))


class WithoutSLP:
    """Triton's binding of LLVM, with the vectorizer off."""

    def __init__(self, llvm):
        self.llvm = llvm

    def __getattr__(self, name):
        return getattr(self.llvm, name)

    def optimize_module(self, *args, **kwargs):
        return self.llvm.optimize_module(*args, **{**kwargs, "disable_slp_vectorizer": True})


def loop_length(row):
    signature = dict(x_ptr="*fp16", y_ptr="*fp16", out_ptr="*fp32", m="i32", n="i32", ROW="constexpr")
    aligned = {(n,): [["tt.divisibility", 16]] for n in range(3)}
    source = triton.compiler.ASTSource(best, signature, {"ROW": row}, aligned)
    Path("kernel.cubin").write_bytes(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"])
    nvdisasm = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    code = subprocess.run([nvdisasm, "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    labels, count, longest = {}, 0, 0
    for line in code.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = count
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/", line):
            count += 1
            if (jump := re.search(r"BRA.*`\((\.L\w+)\)", line)) and jump[1] in labels:  # a jump back ends a loop
                longest = max(longest, count - labels[jump[1]])
    return longest


if sys.argv[1:] == ["without"]:
    backend.llvm = WithoutSLP(backend.llvm)
print(*(sys.argv[1:] or [triton.__version__]), loop_length(False), loop_length(True), sep="\n")
PY
for version in 3.7.1 3.9.0; do
  venv/bin/pip install -q --target "$tmp/$version" "triton==$version"
  PYTHONPATH="$tmp/$version" TRITON_CACHE_DIR="$tmp/cache-$version" venv/bin/python kernel.py > "seen-$version"
done
PYTHONPATH="$tmp/3.9.0" TRITON_CACHE_DIR="$tmp/cache-without" venv/bin/python kernel.py without > seen-without
printf '%s\n' '' 'tl.where in the loop' 'a row of 0 and -inf' > rows
paste -d '|' rows seen-* | while IFS='|' read -r row old new off; do printf '%-25s%7s%8s%10s\n' "$row" "$old" "$new" "$off"; done | tee found
diff found - <<'SEEN'
                           3.7.1   3.9.0   without
tl.where in the loop         227     350       246
a row of 0 and -inf          199     217       217
SEEN
