#!/usr/bin/env bash
# Triton: whether a kernel argument called `stream` may be passed by keyword depends on which call came first.
#
# Package: triton 3.7.1 (torch 2.13.0 for the tensor). No GPU is needed: a driver object answers for one, the kernel is only compiled.
#
# A kernel may have an argument named `stream` (or `device`, `device_type`); @triton.jit accepts it. Passed by keyword it raises
# AssertionError ("stream option is deprecated"), although it is the kernel's own argument and not an option. But it is
# refused only when that variant has to be compiled: after one positional call with the same types, the same keyword call
# works, because the check comes after the look-up in the cache. And TRITON_INTERPRET=1 always
# accepts it. So a test suite under the interpreter, or one that warms kernels up positionally, does not test keyword calls.
#
# Output seen:
#   keyword first:      AssertionError: stream option is deprecated; current stream will be used
#   positional:         compiled
#   keyword after it:   compiled
#   interpreter:        ran, 4.0
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q triton==3.7.1 torch==2.13.0 numpy==2.4.6

cat > "$tmp/kernel.py" <<'PY'
import torch
import triton
import triton.language as tl


@triton.jit
def add(x_ptr, stream, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, tl.load(x_ptr + offs) + stream)


x = torch.ones(16, dtype=torch.float32)
PY
cat > "$tmp/compiled.py" <<'PY'
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from kernel import add, torch, x


class NoCard:  # answers what a compilation asks of a driver
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


driver.set_active(NoCard())
first = ""
try:
    add.warmup(x, stream=3, BLOCK=16, grid=(1,))
except AssertionError as error:
    first = f"AssertionError: {error}"
print("keyword first:     ", first or "compiled")
print("positional:        ", "compiled" if add.warmup(x, 3, BLOCK=16, grid=(1,)) else "nothing")
print("keyword after it:  ", "compiled" if add.warmup(x, stream=3, BLOCK=16, grid=(1,)) else "nothing")
assert first.startswith("AssertionError: stream option is deprecated"), "the keyword is accepted now"
PY
cat > "$tmp/interpreted.py" <<'PY'
from kernel import add, x

add[(1,)](x, stream=3, BLOCK=16)
print("interpreter:       ", "ran,", x[0].item())
assert x[0] == 4.0
PY
cd "$tmp"
"$tmp/venv/bin/python" compiled.py
TRITON_INTERPRET=1 "$tmp/venv/bin/python" interpreted.py
