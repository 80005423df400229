"""Kernels for `test_compile_report.py`: good ones, and one for each fault that the report must find."""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastbert.kernels import _device
from fastbert.kernels._compile import CompileCall, compile_call, empty


@triton.jit
def copy_rows_kernel(x_ptr, y_ptr, n_cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, n_cols, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < n_cols
        x = tl.load(x_ptr + row * n_cols + offs, mask=mask, other=0.0)
        tl.store(y_ptr + row * n_cols + offs, tl.exp2(x.to(tl.float32)).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def product_kernel(
    a, b, c_ptr,   # in: [M, K], [N, K], pointers or descriptors; out: [M, N], all divided by their blocks
    n, k,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        if DESCRIPTORS:
            a_block = a.load([tl.program_id(0) * BLOCK_M, start])
            b_block = b.load([tl.program_id(1) * BLOCK_N, start])
        else:
            a_block = tl.load(a + offs_m[:, None] * k + (start + offs_k)[None, :])
            b_block = tl.load(b + offs_n[:, None] * k + (start + offs_k)[None, :])
        acc = tl.dot(a_block.to(b_block.dtype), b_block.T, acc)

    tl.store(c_ptr + offs_m[:, None] * n + offs_n[None, :], acc.to(c_ptr.dtype.element_ty))


@triton.jit
def product_of_transpose_kernel(a_ptr, b_ptr, c_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    offs = offs[:, None] * BLOCK + offs[None, :]
    a, b = tl.load(a_ptr + offs), tl.load(b_ptr + offs)
    ab = tl.dot(a, b).to(a.dtype)
    tl.store(c_ptr + offs, tl.dot(ab.T, b).to(c_ptr.dtype.element_ty))


@triton.jit
def softmax_row_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, tl.exp2(x - tl.max(x, 0)))  # all of x stays in registers until its maximum is known


@triton.constexpr_function
def crash():
    import os  # imported here, because Triton reads the globals of what a kernel calls

    os.abort()


@triton.jit
def aborts_kernel(y_ptr):
    tl.store(y_ptr, crash())  # the compiler's process dies here


def copy_rows(columns: int = 1024, block: int = 1024, unaligned: bool = False) -> None:
    x, y = (empty(columns + 1)[int(unaligned) :] for _ in range(2))
    copy_rows_kernel[(1,)](x, y, columns, BLOCK=block, num_warps=4, num_stages=1)


def product(
    side: int = 64, stages: int = 2, descriptors: bool = False, left: torch.dtype = torch.bfloat16, **options: int
) -> None:
    a, b, c = (empty(side, 64, dtype=dtype) for dtype in (left, torch.bfloat16, torch.bfloat16))
    if descriptors:
        a, b = (TensorDescriptor.from_tensor(t, [side, 64]) for t in (a, b))
    product_kernel[(1, 1)](
        a, b, c, 64, 64, DESCRIPTORS=descriptors, BLOCK_M=side, BLOCK_N=side, BLOCK_K=64,
        num_warps=4, num_stages=stages, **options,
    )  # fmt: skip


def product_of_transpose() -> None:
    product_of_transpose_kernel[(1,)](*(empty(64, 64) for _ in "abc"), BLOCK=64, num_warps=4, num_stages=1)


def softmax_row() -> None:
    x = empty(8192, dtype=torch.float32)
    softmax_row_kernel[(1,)](x, x, BLOCK=8192, num_warps=4, num_stages=1, maxnreg=32)


def aborts() -> None:
    aborts_kernel[(1,)](empty(1))


def refused() -> None:
    copy_rows_kernel[(1,)](empty(1), n_cols=1, BLOCK=1)


def on(arches: str, function: Callable) -> Callable:
    """The function on these architectures; on others it does nothing."""

    @functools.wraps(function)
    def there(*args, **kwargs):
        if _device.arch() in arches.split():
            function(*args, **kwargs)

    return there


def compile_calls() -> list[CompileCall]:
    return [
        compile_call(copy_rows, "good", fast=True, wide_loads=[copy_rows_kernel]),
        compile_call(product, "good", fast=True),
        # not on gfx942, where Triton 3.9 never finishes compiling this kernel
        compile_call(on("sm_80 sm_90", product), "shared_over", stages=16),
        compile_call(on("sm_80 sm_90", softmax_row), "spills"),  # only NVIDIA's compiler reports spills
        compile_call(on("sm_90", product), "too_few_registers", maxnreg=32),
        compile_call(on("sm_90", product), "small", side=16),
        compile_call(on("sm_90", product), "good_descriptors", descriptors=True),
        compile_call(on("sm_90", copy_rows), "narrow", unaligned=True, wide_loads=[copy_rows_kernel]),
        compile_call(on("sm_90", copy_rows), "block_of_1000", block=1000),
        compile_call(on("sm_90", product), "operands_overwritten", stages=3, left=torch.int8),
        compile_call(on("sm_90", product_of_transpose), "transposed"),
        compile_call(on("sm_90", refused), "refused"),
        compile_call(on("sm_90", aborts), "aborts"),
    ]
