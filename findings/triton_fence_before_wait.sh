#!/usr/bin/env bash
# Triton, Hopper: a tile that is loaded between two products of a loop may reach the second one without a proxy fence.
#
# Package: triton 3.7.1. No GPU is needed: the kernel is compiled and its PTX read.
#
# The loop makes k out of narrow loads (through registers, stored to shared memory) and copies v asynchronously
# (`cp.async`). wgmma reads shared memory through the asynchronous proxy, and PTX asks for a `fence.proxy.async` between writes
# of ordinary threads, `cp.async` among them, and such a read: after the copy's wait, before the product. Triton inserts a fence
# if a buffer was written since the last one. It counts a `cp.async` as a write where the copy *starts*, so the fence for k, which
# is between the start of the copy and its wait, counts for v too. If v is loaded before the first product, its wait is there as
# well, and one fence after it serves both. So load everything before the first product of the loop in your own kernels.
#
# Output seen:
#   v loaded before the products: wait of the copies, fence, product, product
#   v loaded between them:        fence, product, wait of the copies, product
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q triton==3.7.1

cat > "$tmp/kernel.py" <<'PY'
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget


@triton.jit
def two_products(x_ptr, k_ptr, v_ptr, out_ptr, n, stride_kd, EARLY: tl.constexpr):
    rows = tl.arange(0, 64)
    x = tl.load(x_ptr + rows[:, None] * 64 + rows[None, :])
    total = tl.zeros((64, 64), tl.float32)
    for first in range(0, n, 64):
        at = (first + rows)[:, None]
        k = tl.load(k_ptr + at * 64 + rows[None, :] * stride_kd)  # two bytes at a time: not copied asynchronously
        if EARLY:
            v = tl.load(v_ptr + at * 64 + rows[None, :])
        p = tl.dot(x, tl.trans(k)).to(tl.float16)
        if not EARLY:
            v = tl.load(v_ptr + at * 64 + rows[None, :])
        total = tl.dot(p, v, total)
    tl.store(out_ptr + rows[:, None] * 64 + rows[None, :], total)


STEPS = {
    "cp.async.wait_group": "wait of the copies", "fence.proxy.async": "fence", "wgmma.commit_group": "product",
}


def steps(early):
    """What the loop does, in the order of the PTX."""
    signature = dict(x_ptr="*fp16", k_ptr="*fp16", v_ptr="*fp16", out_ptr="*fp32", n="i32", stride_kd="i32", EARLY="constexpr")
    aligned = {(n,): [["tt.divisibility", 16]] for n in range(5)}
    source = triton.compiler.ASTSource(two_products, signature, {"EARLY": early}, aligned)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 2}).asm["ptx"]
    loop = ptx[ptx.index("Loop Header") :]
    lines = loop[: loop.index("bra")].splitlines()
    return [name for line in lines for start, name in STEPS.items() if line.strip().startswith(start)]


before, between = steps(True), steps(False)
print("v loaded before the products:", ", ".join(before))
print("v loaded between them:       ", ", ".join(between))
assert before == ["wait of the copies", "fence", "product", "product"], "the usual order is another one now"
assert between == ["fence", "product", "wait of the copies", "product"], "the fence is there now"
PY
cd "$tmp"
TRITON_CACHE_DIR="$tmp/cache" "$tmp/venv/bin/python" kernel.py
