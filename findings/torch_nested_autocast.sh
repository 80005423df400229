#!/usr/bin/env bash
# torch: a module that was called under autocast cannot be called under a nested autocast of another dtype.
#
# Packages: torch 2.13.0. One nn.Linear on the CPU, with and without gradients; nothing about it depends on the device.
#
# Autocast caches the cast of a float32 weight that requires a gradient until the outermost block ends. The key of this cache is
# the weight alone, without the dtype of the cast. A block in bfloat16 around one in float16 (a library's own autocast
# within a trainer's) then multiplies float16 activations by the bfloat16 weight, and raises, if the same module ran in the
# outer block before; other modules work. torch.autocast(..., cache_enabled=False) for both is a way out.
#
# Output seen:
#   first call in the inner block    torch.float16
#   called outside of it before      mat1 and mat2 must have the same dtype, but got Half and BFloat16
#   the same without the cache       torch.float16
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cd "$tmp"
export CUDA_VISIBLE_DEVICES= PYTHONWARNINGS=ignore
cat > case.py <<'PY'
import torch

module, x = torch.nn.Linear(8, 8), torch.randn(2, 8)


def nested(called_before: bool, cached: bool, gradients: bool) -> str:
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
        if called_before:
            module(x)
        with torch.autocast("cpu", torch.float16, cache_enabled=cached):
            try:
                return str(module(x).dtype)
            except RuntimeError as error:
                return str(error)


for gradients in (True, False):
    fresh, again, bare = (nested(*how, gradients) for how in ((False, True), (True, True), (True, False)))
    print(f"first call in the inner block    {fresh}")
    print(f"called outside of it before      {again}")
    print(f"the same without the cache       {bare}")
    assert fresh == bare == "torch.float16"
    assert "must have the same dtype" in again, "the cache knows dtypes now"
PY
"$tmp/venv/bin/python" case.py
