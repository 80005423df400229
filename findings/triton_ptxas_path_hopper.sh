#!/usr/bin/env bash
# Triton 3.9: TRITON_PTXAS_PATH no longer chooses the assembler for Hopper, and knobs.nvidia.ptxas is not the one that runs.
#
# Packages: triton 3.7.1 and 3.9.0. No GPU is needed: a small kernel is compiled for sm_90, with a variable that names another
# assembler: a script that notes its call and runs the one of the wheel.
#
# A wheel holds two assemblers, `ptxas` and `ptxas-blackwell`. 3.7.1 runs the second from sm_100 on, 3.9.0 from sm_90 on, under its old
# name. So on an H100 or H200 TRITON_PTXAS_PATH has no effect and nothing warns; the variable is TRITON_PTXAS_BLACKWELL_PATH.
# knobs.nvidia.ptxas.version, which programs log or compare, is that of the other assembler. Ask
# triton.backends.nvidia.compiler.get_ptxas(90), which is right in both. And an update of Triton moves Hopper from CUDA 12's
# assembler to CUDA 13's, whose code is another one.
#
# Output seen:
#                                                    3.7.1      3.9.0
#   file of TRITON_PTXAS_PATH is run                 yes        no
#   file of TRITON_PTXAS_BLACKWELL_PATH is run       no         yes
#   version: knobs.nvidia.ptxas                      12.8       12.9
#   version: get_ptxas(90)                           12.8       13.4
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
cd "$tmp"
export TRITON_DEFAULT_FP_FUSION=1  # the default, which 3.9.0 warns of if the variable is not set
cat > kernel.py <<'PY'
import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

named, variable = sys.argv[1:]
folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@triton.jit
def double(x_ptr):
    cols = tl.arange(0, 128)
    tl.store(x_ptr + cols, tl.load(x_ptr + cols) * 2)


if variable != "none":
    tool = "ptxas-blackwell" if "BLACKWELL" in variable else "ptxas"
    Path(named).write_text(f'#!/bin/sh\necho "$@" >> {named}.calls\nexec {folder / tool} "$@"\n')
    Path(named).chmod(0o755)
source = triton.compiler.ASTSource(double, dict(x_ptr="*fp32"), {}, {})
triton.compile(source, target=GPUTarget("cuda", 90, 32))
if variable == "none":
    print(triton.knobs.nvidia.ptxas.version)
    print(get_ptxas(90).version)
else:
    calls = Path(f"{named}.calls")
    print("yes" if calls.exists() and "--gpu-name=sm_90a" in calls.read_text() else "no")
PY
seen() {
  echo "$1"
  for variable in TRITON_PTXAS_PATH TRITON_PTXAS_BLACKWELL_PATH none; do
    named="$tmp/$1-$variable"
    env "$variable=$named" TRITON_CACHE_DIR="$named.cache" PYTHONPATH="$tmp/$1" venv/bin/python kernel.py "$named" "$variable"
  done
}
for version in 3.7.1 3.9.0; do
  venv/bin/pip install -q --target "$tmp/$version" "triton==$version"
  seen "$version" > "seen-$version"
done
cat > rows <<'ROWS'

file of TRITON_PTXAS_PATH is run
file of TRITON_PTXAS_BLACKWELL_PATH is run
version: knobs.nvidia.ptxas
version: get_ptxas(90)
ROWS
paste -d '|' rows seen-3.7.1 seen-3.9.0 | while IFS='|' read -r row old new; do printf '%-49s%-11s%s\n' "$row" "$old" "$new"; done | tee found
diff found - <<'SEEN'
                                                 3.7.1      3.9.0
file of TRITON_PTXAS_PATH is run                 yes        no
file of TRITON_PTXAS_BLACKWELL_PATH is run       no         yes
version: knobs.nvidia.ptxas                      12.8       12.9
version: get_ptxas(90)                           12.8       13.4
SEEN
