"""wgmma: operands in shared memory, addressed by descriptors; fragments in registers; data in flight."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from fastbert.emulator import errors

pytestmark = pytest.mark.once

OPERANDS = runpy.run_path(str(Path(__file__).with_name("operands.py")))
KINDS, copy_in, descriptor, laid_out = (OPERANDS[name] for name in ("KINDS", "copy_in", "descriptor", "laid_out"))


def _accumulators(n: int) -> list[str]:
    return [f"%r{20 + j}" for j in range(n // 2)]


def _store_out(n: int) -> str:
    registers = _accumulators(n)
    stores = " ".join(f"st.global.b32 [%d9 + {4 * j}], {r};" for j, r in enumerate(registers))
    return f"mad.wide.u32 %d9, %t, {4 * len(registers)}, %y; {stores}"


def _matrix_of(out: np.ndarray) -> np.ndarray:
    """Registers [128, n / 2] as D [64, n], as the PTX manual draws it."""
    d = np.zeros((64, out.shape[1] * 2), np.float32)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for j in range(out.shape[1]):
            d[16 * warp + lane // 4 + 8 * (j // 2 % 2), 8 * (j // 4) + 2 * (lane % 4) + j % 2] = out[thread, j]
    return d


def _numbers(rows: int, columns: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-8, 9, (rows, columns)).astype(np.float32)


BEFORE = "fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned;"
AFTER = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"


def _wgmma(kind: str, n: int, a: str, b: str, flags: str) -> str:
    registers = ", ".join(_accumulators(n))
    return f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {{{registers}}}, {a}, {b}, {flags};"


def _initial(n: int, value: str = "0f40400000") -> str:
    return " ".join(f"mov.b32 {r}, {value};" for r in _accumulators(n))


# opcode -> (n, type)
CASES = {
    f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind}": (n, kind)
    for kind in KINDS
    for n in (8, 16, 32, 64, 128, 256)
}


@pytest.mark.instructions(
    "wgmma.fence.sync.aligned", "wgmma.commit_group.sync.aligned", "wgmma.wait_group.sync.aligned",
    "fence.proxy.async.shared::cta",
)  # fmt: skip
@pytest.mark.parametrize("opcode", CASES)
def test_shapes(ptx, opcode):
    """D = A B + 3, with both operands swizzled over 128 bytes and k innermost."""
    n, kind = CASES[opcode]
    a, b = _numbers(64, 16, 1), _numbers(n, 16, 2)
    image_a, _, stride = laid_out(KINDS[kind](a), 128, False)
    image_b, _, _ = laid_out(KINDS[kind](b), 128, False)
    x = np.concatenate([image_a, image_b])
    out = np.zeros((128, n // 2), np.float32)
    of_a, of_b = descriptor(0, 16, stride, 128), descriptor(len(image_a), 16, stride, 128)
    body = f"""
    {copy_in(len(x))} {_initial(n)}
    mov.b64 %d10, {of_a}; mov.b64 %d11, {of_b}; mov.pred %p1, 1;
    {BEFORE} {_wgmma(kind, n, "%d10", "%d11", "%p1, 1, 1, 0, 0")} {AFTER} {_store_out(n)}
    """
    ptx(body, threads=128, shared=len(x), x=x, y=out)
    assert _matrix_of(out).tolist() == (a @ b.T + 3).tolist()


LAYOUTS = [(0, False, False), *((span, a, b) for span in (32, 64, 128) for a in (False, True) for b in (False, True))]


@pytest.mark.parametrize(("span", "transposed_a", "transposed_b"), LAYOUTS)
def test_layouts(ptx, span, transposed_a, transposed_b):
    """Every swizzle, with k or rows innermost. B does not start at address zero."""
    n = 128
    a, b = _numbers(64, 16, 3), _numbers(n, 16, 4)
    image_a, leading_a, stride_a = laid_out(KINDS["bf16"](a), span, transposed_a)
    image_b, leading_b, stride_b = laid_out(KINDS["bf16"](b), span, transposed_b)
    start = -(-len(image_a) // 1024) * 1024
    x = np.zeros(start + len(image_b), np.uint8)
    x[: len(image_a)], x[start:] = image_a, image_b
    out = np.zeros((128, n // 2), np.float32)
    of_a, of_b = descriptor(0, leading_a, stride_a, span), descriptor(start, leading_b, stride_b, span)
    body = f"""
    {copy_in(len(x))} {_initial(n)}
    mov.b64 %d10, {of_a}; mov.b64 %d11, {of_b}; mov.pred %p1, 0;
    {BEFORE} {_wgmma("bf16", n, "%d10", "%d11", f"%p1, 1, -1, {int(transposed_a)}, {int(transposed_b)}")} {AFTER}
    {_store_out(n)}
    """
    ptx(body, threads=128, shared=len(x), x=x, y=out)
    assert _matrix_of(out).tolist() == (-(a @ b.T) + 0).tolist()


def test_a_in_registers_and_a_chain_of_k(ptx):
    """Two instructions add to one accumulator; A is 64 x 32 in registers, B 16 x 32 in rows of 64 bytes."""
    n = 16
    a, b = _numbers(64, 32, 5), _numbers(n, 32, 6)
    image = np.zeros(n * 64, np.uint8)
    bits = KINDS["bf16"](b)
    for row in range(n):
        for k in range(32):
            piece = (k * 2 // 16) ^ (row % 8 // 2)
            image.view(np.uint16)[(row * 64 + piece * 16 + k * 2 % 16) // 2] = bits[row, k]
    words = np.zeros((128, 8), np.uint32)  # two instructions, four registers each
    bits = KINDS["bf16"](a).astype(np.uint32)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for step in range(2):
            for i in range(4):
                row, k = 16 * warp + lane // 4 + 8 * (i % 2), 16 * step + 2 * (lane % 4) + 8 * (i // 2)
                words[thread, 4 * step + i] = bits[row, k] | bits[row, k + 1] << 16
    out = np.zeros((128, n // 2), np.float32)
    first, second = descriptor(0, 16, 512, 64), descriptor(32, 16, 512, 64)
    loads = " ".join(f"ld.global.b32 %r{4 + j}, [%d3 + {4 * j}];" for j in range(8))
    ptx(
        f"""
        {copy_in(len(image))} {_initial(n)} mad.wide.u32 %d3, %t, 32, %w; {loads}
        mov.b64 %d10, {first}; mov.b64 %d11, {second};
        setp.ne.u32 %p1, 0, 0; setp.eq.u32 %p2, 0, 0;
        {BEFORE}
        {_wgmma("bf16", n, "{%r4, %r5, %r6, %r7}", "%d10", "%p1, 1, 1, 0")}
        {_wgmma("bf16", n, "{%r8, %r9, %r10, %r11}", "%d11", "%p2, 1, 1, 0")}
        {AFTER} {_store_out(n)}
        """,
        threads=128, shared=len(image), x=image, w=words, y=out,
    )  # fmt: skip
    assert _matrix_of(out).tolist() == (a @ b.T).tolist()


def test_each_warpgroup_has_its_own_product(ptx):
    """Two warpgroups share B; each has its own A."""
    n = 8
    a, b = _numbers(128, 16, 7), _numbers(n, 16, 8)
    image, _, stride = laid_out(KINDS["bf16"](np.concatenate([a, b])), 32, False)
    out = np.zeros((256, n // 2), np.float32)
    ptx(
        f"""
        {copy_in(len(image), 256)} {_initial(n)}
        shr.u32 %r1, %t, 7; cvt.u64.u32 %d3, %r1; mul.lo.s64 %d3, %d3, {64 * 32 // 16};
        mov.b64 %d10, {descriptor(0, 16, stride, 32)}; add.s64 %d10, %d10, %d3;
        mov.b64 %d11, {descriptor(128 * 32, 16, stride, 32)}; mov.pred %p1, 0;
        {BEFORE} {_wgmma("bf16", n, "%d10", "%d11", "%p1, 1, 1, 0, 0")} {AFTER} {_store_out(n)}
        """,
        threads=256, shared=len(image), x=image, y=out,
    )  # fmt: skip
    for group in range(2):
        got = _matrix_of(out[128 * group : 128 * group + 128])
        assert got.tolist() == (a[64 * group : 64 * group + 64] @ b.T).tolist()


# ---- errors ------------------------------------------------------------------------------------------------

_N = 8
_SIZE = (64 + _N) * 32


def _refusal(
    ptx, setup: str = "", between: str = "", before: str = BEFORE, after: str = AFTER, late: str = "",
    flags: str = "%p1, 1, 1, 0, 0",
) -> None:  # fmt: skip
    """One product of zeros; `between` runs while it is in flight."""
    body = f"""
    {copy_in(_SIZE)} {_initial(_N)} mov.u32 %r0, 0; mov.b32 %r100, 0f00000000; mov.u32 %r1, 4096;
    mov.b64 %d10, {descriptor(0, 16, 256, 32)}; mov.b64 %d11, {descriptor(64 * 32, 16, 256, 32)}; mov.pred %p1, 1;
    {setup} {before} {_wgmma("bf16", _N, "%d10", "%d11", flags)} {between} {after} {late}
    """
    x = np.zeros(_SIZE, np.uint8)
    ptx(body, threads=128, shared=8192, x=x)


def test_a_correct_product_is_accepted(ptx):
    _refusal(
        ptx,
        between="add.f32 %r100, %r100, %r100;",
        late="add.f32 %r20, %r20, %r20; bar.sync 0; st.shared.b32 [%r0], 0;",
    )


def test_an_accumulator_in_flight_may_not_be_used(ptx):
    with pytest.raises(errors.MissingWait, match=r"accumulator is used before .*add\.f32 %r100, %r20"):
        _refusal(ptx, between="add.f32 %r100, %r20, %r20;")
    with pytest.raises(errors.MissingWait, match="accumulator"):
        _refusal(ptx, between="mov.b32 %r20, 0;")
    with pytest.raises(errors.MissingWait, match="accumulator"):  # one group may still be in flight
        _refusal(ptx, after=AFTER.replace("aligned 0", "aligned 1"), late="add.f32 %r100, %r20, %r20;")


def test_shared_memory_that_a_product_reads_may_not_be_written(ptx):
    write = "mad.lo.s32 %r2, %t, 4, %r1; st.shared.b32 [%r2], %r0;"
    _refusal(ptx, between=write)  # to other memory
    with pytest.raises(errors.MissingWait, match="asynchronous unit may still read"):
        _refusal(ptx, setup="mov.u32 %r1, 0;", between=write)
    _refusal(ptx, late=f"bar.sync 0; mov.u32 %r1, 0; {write}")
    with pytest.raises(errors.SharedRace):  # one warp may pass its wait before another warp
        _refusal(ptx, late=f"mov.u32 %r1, 0; {write}")


def test_registers_of_a_in_flight_may_not_be_written(ptx):
    def run(between: str) -> None:
        ptx(
            f"""
            {copy_in(_N * 32)} {_initial(_N)} mov.u32 %r4, 0;
            mov.b64 %d11, {descriptor(0, 16, 256, 32)}; mov.pred %p1, 1; {BEFORE}
            {_wgmma("bf16", _N, "{%r4, %r4, %r4, %r4}", "%d11", "%p1, 1, 1, 0")} {between} {AFTER}
            """,
            threads=128, shared=_N * 32, x=np.zeros(_N * 32, np.uint8),
        )  # fmt: skip

    run("mov.b32 %r5, %r4;")
    with pytest.raises(errors.MissingWait, match="a wgmma in flight reads"):
        run("mov.u32 %r4, 1;")


def test_a_missing_fence_for_the_asynchronous_unit_is_an_error(ptx):
    with pytest.raises(errors.MissingFence, match=r"no fence\.proxy\.async"):
        _refusal(ptx, before="bar.sync 0; wgmma.fence.sync.aligned;")
    # a fence by the reader, after the barrier, is enough
    _refusal(ptx, before="bar.sync 0; fence.proxy.async.shared::cta; wgmma.fence.sync.aligned;")


def test_a_missing_barrier_before_the_product_is_an_error(ptx):
    with pytest.raises(errors.SharedRace, match="starts an asynchronous read"):
        _refusal(ptx, before="fence.proxy.async.shared::cta; wgmma.fence.sync.aligned;")


def test_a_missing_fence_of_registers_is_an_error(ptx):
    with pytest.raises(errors.MissingFence, match=r"no wgmma\.fence before the first"):
        _refusal(ptx, before="fence.proxy.async.shared::cta; bar.sync 0;")
    with pytest.raises(errors.MissingFence, match=r"no wgmma\.fence between"):
        _refusal(ptx, before=f"{BEFORE} mov.b32 %r20, 0;")
    _refusal(ptx, before=f"{BEFORE} mov.b32 %r100, 0;")


def test_a_missing_wait_at_the_end_is_an_error(ptx):
    with pytest.raises(errors.MissingWait, match="ends before it has waited for its wgmma"):
        _refusal(ptx, after="wgmma.commit_group.sync.aligned;")
    with pytest.raises(errors.MissingWait, match="ends before"):  # the group was never committed
        _refusal(ptx, after="wgmma.wait_group.sync.aligned 0;")


def test_descriptors_must_stay_inside_and_be_equal_in_a_warpgroup(ptx):
    with pytest.raises(errors.InvalidOperand, match="a transposed matrix that is not swizzled"):
        _refusal(ptx, setup=f"mov.b64 %d10, {descriptor(0, 128, 256, 0)};", flags="%p1, 1, 1, 1, 0")
    with pytest.raises(errors.OutOfBounds, match="wgmma reads byte"):
        _refusal(ptx, setup=f"mov.b64 %d10, {descriptor(8192 - 1024, 16, 256, 32)};")
    with pytest.raises(errors.InvalidOperand, match="a matrix descriptor differs"):
        _refusal(ptx, setup="cvt.u64.u32 %d10, %t;")
    with pytest.raises(errors.UnwrittenShared):
        _refusal(ptx, setup=f"mov.b64 %d10, {descriptor(4096, 16, 256, 32)};")


def test_a_part_of_a_warpgroup_cannot_multiply(ptx):
    with pytest.raises(errors.DivergentWarp, match="wgmma without thread 64"):
        _refusal(ptx, before=f"{BEFORE} setp.ge.u32 %p2, %t, 64; @%p2 bra skip;", after=f"{AFTER} skip:")
