"""Kernels for `test_compile_report.py`: good ones, and one for each fault that the report must find."""

import os

import triton
import triton.language as tl

from fastbert.kernels._compile import CompileCase


@triton.jit
def copy_rows(x_ptr, y_ptr, n_cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, n_cols, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < n_cols
        x = tl.load(x_ptr + row * n_cols + offs, mask=mask, other=0.0)
        tl.store(y_ptr + row * n_cols + offs, tl.exp2(x.to(tl.float32)).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def product(
    a_ptr, b_ptr, c_ptr,   # in: [M, K], [N, K]; out: [M, N], all divided by their blocks
    n, k,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    if DESCRIPTORS:
        m = tl.num_programs(0) * BLOCK_M
        a_desc = tl.make_tensor_descriptor(a_ptr, [m, k], [k, 1], [BLOCK_M, BLOCK_K])
        b_desc = tl.make_tensor_descriptor(b_ptr, [n, k], [k, 1], [BLOCK_N, BLOCK_K])

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        if DESCRIPTORS:
            a = a_desc.load([tl.program_id(0) * BLOCK_M, start])
            b = b_desc.load([tl.program_id(1) * BLOCK_N, start])
        else:
            a = tl.load(a_ptr + offs_m[:, None] * k + (start + offs_k)[None, :])
            b = tl.load(b_ptr + offs_n[:, None] * k + (start + offs_k)[None, :])
        acc = tl.dot(a.to(b.dtype), b.T, acc)

    tl.store(c_ptr + offs_m[:, None] * n + offs_n[None, :], acc.to(c_ptr.dtype.element_ty))


@triton.jit
def product_of_transpose(a_ptr, b_ptr, c_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    offs = offs[:, None] * BLOCK + offs[None, :]
    a, b = tl.load(a_ptr + offs), tl.load(b_ptr + offs)
    ab = tl.dot(a, b).to(a.dtype)
    tl.store(c_ptr + offs, tl.dot(ab.T, b).to(c_ptr.dtype.element_ty))


@triton.jit
def softmax_row(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, tl.exp2(x - tl.max(x, 0)))  # all of x lives until its maximum is known


class Aborts:
    """Stands for a kernel on which the compiler itself crashes."""

    @property
    def arg_names(self):
        os.abort()


def _copy(name, **fields) -> CompileCase:
    given = {"aligned": ("x_ptr", "y_ptr", "n_cols"), "constexprs": {"BLOCK": 1024}} | fields
    return CompileCase(
        name, copy_rows, {"x_ptr": "*bf16", "y_ptr": "*bf16", "n_cols": "i32"}, num_warps=4, num_stages=1, **given
    )


def _product(name, *, descriptors=False, a="bf16", stages=3, **fields) -> CompileCase:
    return CompileCase(
        name, product, {"a_ptr": f"*{a}", "b_ptr": "*bf16", "c_ptr": "*bf16", "n": "i32", "k": "i32"},
        {"DESCRIPTORS": descriptors, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64},
        num_warps=4, num_stages=stages, matrix=True, aligned=("a_ptr", "b_ptr", "c_ptr", "n", "k"), **fields,
    )  # fmt: skip


def compile_cases(arch: str) -> list[CompileCase]:
    common = [
        _copy("good_copy", fast=True, wide_loads=True),
        _product("good_product", stages=2, fast=True),
        _copy("matrix_missing", matrix=True),
        _product("copies_missing", stages=2, bulk_copy=True),
    ]
    if arch == "gfx942":
        return common
    common.append(_product("shared_over", stages=16))  # not on gfx942: Triton 3.9 never ends compiling it there
    spills = CompileCase(
        "spills", softmax_row, {"x_ptr": "*fp32", "y_ptr": "*fp32"}, {"BLOCK": 8192}, num_warps=4, num_stages=1,
        options={"maxnreg": 32},
    )  # fmt: skip
    if arch == "sm_80":
        return [*common, spills]
    return [
        *common,
        spills,
        _copy("good_copy_unaligned", aligned=()),
        _copy("narrow", aligned=(), wide_loads=True),
        _product("good_product_descriptors", descriptors=True, stages=2, bulk_copy=True),
        _copy("block_of_1000", constexprs={"BLOCK": 1000}),
        _product("too_few_registers", stages=2, options={"maxnreg": 32}),
        CompileCase("argument_forgotten", copy_rows, {"x_ptr": "*bf16"}, {"BLOCK": 1024}, num_warps=4, num_stages=1),
        _product("operands_overwritten", a="i8"),
        CompileCase(
            "transposed",
            product_of_transpose,
            {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*bf16"},
            {"BLOCK": 64},
            num_warps=4,
            num_stages=1,
            matrix=True,
        ),
        CompileCase("aborts", Aborts(), {}, {}, num_warps=4, num_stages=1),
    ]
