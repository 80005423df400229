#!/usr/bin/env bash
# Triton's interpreter: since 3.9 a mask that contains a comparison of a scalar argument raises, though the compiler takes it.
#
# Packages: triton 3.7.1 and 3.9.0, torch 2.13.0. No GPU is needed: the kernel runs under TRITON_INTERPRET=1, and is compiled for sm_90.
#
# `mask=(cols < n) & (want != 0)` is a usual way to switch a load or store off. The interpreter gives the result of a comparison of
# scalars the type of its operands, int32, and the mask gets it too. 3.7.1 turned such masks into booleans; 3.9.0 raises "mask has
# unsupported dtype". `.to(tl.int1)` does not help: the interpreter takes the number for an int1 already. A block in the comparison
# does: `tl.broadcast_to(want, (BLOCK,)) != 0`. So does `if want != 0:`. The condition of tl.where may be of any type. Where
# the scalar is a loaded float32, `&` itself raises a TypeError, in both versions.
#
# Output seen (numbers stored, 4 is right):
#                                                      3.7.1      3.9.0
#   (cols < n) & (want != 0)                           4          ValueError: mask has unsupported dtype
#   (cols < n) & (want != 0).to(tl.int1)               4          ValueError: mask has unsupported dtype
#   (cols < n) & (tl.program_id(0) < n)                4          ValueError: mask has unsupported dtype
#   (cols < n) & (tl.load(x_ptr) < 1)                  TypeError  TypeError
#   (cols < n) & (tl.broadcast_to(want, (16,)) != 0)   4          4
#   tl.where(want != 0, cols, n) < n                   4          4
#   all six, compiled                                  yes        yes
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cd "$tmp"
export TRITON_DEFAULT_FP_FUSION=1  # the default, which 3.9.0 warns of if the variable is not set
cat > kernel.py <<'PY'
import triton
import triton.language as tl

MASKS = [
    "(cols < n) & (want != 0)",
    "(cols < n) & (want != 0).to(tl.int1)",
    "(cols < n) & (tl.program_id(0) < n)",
    "(cols < n) & (tl.load(x_ptr) < 1)",
    "(cols < n) & (tl.broadcast_to(want, (16,)) != 0)",
    "tl.where(want != 0, cols, n) < n",
]


@triton.jit
def store(x_ptr, want, n, WHICH: tl.constexpr):
    cols = tl.arange(0, 16)
    if WHICH == 0:
        mask = (cols < n) & (want != 0)
    elif WHICH == 1:
        mask = (cols < n) & (want != 0).to(tl.int1)
    elif WHICH == 2:
        mask = (cols < n) & (tl.program_id(0) < n)
    elif WHICH == 3:
        mask = (cols < n) & (tl.load(x_ptr) < 1)
    elif WHICH == 4:
        mask = (cols < n) & (tl.broadcast_to(want, (16,)) != 0)
    else:
        mask = tl.where(want != 0, cols, n) < n
    tl.store(x_ptr + cols, 1.0, mask=mask)
PY
cat > interpreted.py <<'PY'
import torch
from kernel import MASKS, store

for which in range(len(MASKS)):
    x = torch.zeros(16)
    try:
        store[(1,)](x, 1, 4, WHICH=which)
        print(f"{x.sum():g}")
    except Exception as error:  # the interpreter wraps the error in another
        cause = error.__cause__ or error
        print("TypeError" if isinstance(cause, TypeError) else f"{type(cause).__name__}: {cause}")
PY
cat > compiled.py <<'PY'
import triton
from kernel import MASKS, store
from triton.backends.compiler import GPUTarget

signature = dict(x_ptr="*fp32", want="i32", n="i32", WHICH="constexpr")
for which in range(len(MASKS)):
    source = triton.compiler.ASTSource(store, signature, {"WHICH": which}, {})
    triton.compile(source, target=GPUTarget("cuda", 90, 32))
print("yes")
PY
python() { PYTHONPATH="$tmp/$version" TRITON_CACHE_DIR="$tmp/cache" "$tmp/venv/bin/python" "$@"; }
for version in 3.7.1 3.9.0; do
  "$tmp/venv/bin/pip" install -q --no-deps --target "$tmp/$version" "triton==$version"
  { python -c "import triton; print(triton.__version__)"; TRITON_INTERPRET=1 python interpreted.py; python compiled.py; } > "seen-$version"
done
{ echo; python -c "from kernel import MASKS; print(*MASKS, 'all six, compiled', sep='\n')"; } > masks
paste -d '|' masks seen-3.7.1 seen-3.9.0 | while IFS='|' read -r mask old new; do printf '%-51s%-11s%s\n' "$mask" "$old" "$new"; done | tee found
diff found - <<'SEEN'
                                                   3.7.1      3.9.0
(cols < n) & (want != 0)                           4          ValueError: mask has unsupported dtype
(cols < n) & (want != 0).to(tl.int1)               4          ValueError: mask has unsupported dtype
(cols < n) & (tl.program_id(0) < n)                4          ValueError: mask has unsupported dtype
(cols < n) & (tl.load(x_ptr) < 1)                  TypeError  TypeError
(cols < n) & (tl.broadcast_to(want, (16,)) != 0)   4          4
tl.where(want != 0, cols, n) < n                   4          4
all six, compiled                                  yes        yes
SEEN
