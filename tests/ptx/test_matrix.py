"""mma.sync, ldmatrix and stmatrix: fragments as the PTX manual draws them, filled and read one element at a time."""

import numpy as np
import pytest

from fastbert.emulator import errors

pytestmark = pytest.mark.once

KINDS = {
    "bf16": lambda x: np.array(x, np.float32).view(np.uint32) >> 16,
    "f16": lambda x: np.array(x, np.float16).view(np.uint16),
}


def _word(kind: str, low: float, high: float) -> int:
    return int(KINDS[kind](low)) | int(KINDS[kind](high)) << 16


def _fragments(kind: str, a, b, c) -> np.ndarray:
    """[lane, 10] words: four registers of A, two of B, four of C."""
    words = np.zeros((32, 10), np.uint32)
    for lane in range(32):
        group, t = lane // 4, lane % 4
        for i in range(4):  # two elements each: rows group and group + 8, columns from 2t, and from 2t + 8
            row, column = group + 8 * (i % 2), 2 * t + 8 * (i // 2)
            words[lane, i] = _word(kind, a[row][column], a[row][column + 1])
        for i in range(2):
            row = 2 * t + 8 * i
            words[lane, 4 + i] = _word(kind, b[row][group], b[row + 1][group])
        for i in range(4):
            words[lane, 6 + i] = np.float32(c[group + 8 * (i // 2)][2 * t + i % 2]).view(np.uint32)
    return words


def _run_mma(ptx, kind: str, words: np.ndarray) -> np.ndarray:
    """The result [16, 8]."""
    out = np.zeros((32, 4), np.float32)
    loads = " ".join(f"ld.global.b32 %r{n}, [%d0 + {4 * n}];" for n in range(10))
    ptx(
        f"""
        mad.wide.u32 %d0, %t, 40, %x; {loads}
        mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32
            {{%r20, %r21, %r22, %r23}}, {{%r0, %r1, %r2, %r3}}, {{%r4, %r5}}, {{%r6, %r7, %r8, %r9}};
        mad.wide.u32 %d1, %t, 16, %y; st.global.v4.b32 [%d1], {{%r20, %r21, %r22, %r23}};
        """,
        x=words, y=out,
    )  # fmt: skip
    d = np.zeros((16, 8), np.float32)
    for lane in range(32):
        for i in range(4):
            d[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2] = out[lane, i]
    return d


def _product(a, b, c) -> list[list[float]]:
    columns = range(len(b[0]))
    return [[sum(x * b[k][n] for k, x in enumerate(row)) + c[m][n] for n in columns] for m, row in enumerate(a)]


@pytest.mark.instructions(
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
)
@pytest.mark.parametrize("kind", KINDS)
def test_mma(ptx, kind):
    """All rows and columns differ, so that an element in the wrong place shows."""
    a = [[(3 * m + 5 * k) % 17 - 8 for k in range(16)] for m in range(16)]
    b = [[(7 * k + 2 * n * n) % 13 - 6 for n in range(8)] for k in range(16)]
    c = [[m * 8 + n for n in range(8)] for m in range(16)]
    assert _run_mma(ptx, kind, _fragments(kind, a, b, c)).tolist() == _product(a, b, c)


def test_mma_rounds_its_sum_once(ptx):
    """2^24 and sixteen ones: added one by one, each would be lost."""
    ones_a, ones_b = [[1] * 16] * 16, [[1] * 8] * 16
    got = _run_mma(ptx, "bf16", _fragments("bf16", ones_a, ones_b, [[2.0**24] * 8] * 16))
    assert got.tolist() == [[2.0**24 + 16] * 8] * 16
    # 4096 * 4096 + 1, which float32 lacks, and 1 more
    row, column = [4096, 1, *[0] * 14], [[4096] * 8, *[[1] * 8] * 15]
    got = _run_mma(ptx, "bf16", _fragments("bf16", [row] * 16, column, [[1] * 8] * 16))
    assert got.tolist() == [[2.0**24 + 2] * 8] * 16


def test_mma_in_a_part_of_a_warp_is_an_error(ptx):
    text = """
    setp.lt.u32 %p0, %t, 16; mov.u32 %r0, 0; @!%p0 bra skip;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
        {%r1, %r2, %r3, %r4}, {%r0, %r0, %r0, %r0}, {%r0, %r0}, {%r0, %r0, %r0, %r0};
    skip:
    """
    with pytest.raises(errors.DivergentWarp, match="mma without thread 16"):
        ptx(text)


COUNTS = {1: "%r1", 2: "%r1, %r2", 4: "%r1, %r2, %r3, %r4"}


@pytest.mark.instructions(
    "ldmatrix.sync.aligned.m8n8.x1.shared.b16", "ldmatrix.sync.aligned.m8n8.x2.shared.b16",
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16", "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
)  # fmt: skip
@pytest.mark.parametrize("transposed", [False, True], ids=["", "trans"])
@pytest.mark.parametrize("count", COUNTS)
def test_ldmatrix(ptx, count, transposed):
    """Lane 8m + r holds the address of row r of matrix m. Here the rows stand in reverse order."""
    rows = 8 * count
    x = np.arange(rows * 8, dtype=np.uint16).reshape(rows, 8)
    out = np.zeros((32, count), np.uint32)
    form = f"x{count}{'.trans' if transposed else ''}"
    stores = " ".join(f"st.global.b32 [%d1 + {4 * n}], %r{n + 1};" for n in range(count))
    ptx(
        f"""
        setp.lt.u32 %p0, %t, {rows};
        mul.lo.s32 %r9, %t, 16; cvt.u64.u32 %d0, %r9; add.s64 %d0, %d0, %x;
        @%p0 ld.global.v2.b64 {{%d2, %d3}}, [%d0];
        @%p0 st.shared.v2.b64 [%r9], {{%d2, %d3}};
        bar.sync 0;
        sub.s32 %r10, {rows - 1}, %t; mul.lo.s32 %r10, %r10, 16; selp.b32 %r10, %r10, 0, %p0;
        ldmatrix.sync.aligned.m8n8.{form}.shared.b16 {{{COUNTS[count]}}}, [%r10];
        mad.wide.u32 %d1, %t, {4 * count}, %y; {stores}
        """,
        shared=16 * rows, x=x, y=out,
    )  # fmt: skip
    for lane in range(32):
        for m in range(count):
            at = [(lane // 4, 2 * (lane % 4) + e) for e in range(2)]
            if transposed:
                at = [(column, row) for row, column in at]
            low, high = (int(x[rows - 1 - (8 * m + row), column]) for row, column in at)
            assert out[lane, m] == low | high << 16, (lane, m)


@pytest.mark.instructions(
    "stmatrix.sync.aligned.m8n8.x1.shared.b16", "stmatrix.sync.aligned.m8n8.x2.shared.b16",
    "stmatrix.sync.aligned.m8n8.x4.shared.b16", "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
)  # fmt: skip
@pytest.mark.parametrize("transposed", [False, True], ids=["", "trans"])
@pytest.mark.parametrize("count", COUNTS)
def test_stmatrix(ptx, count, transposed):
    """Register m of a lane holds the elements 2 * (32 m + lane) and the next. The rows are stored in reverse order."""
    rows = 8 * count
    out = np.zeros((rows, 8), np.uint16)
    form = f"x{count}{'.trans' if transposed else ''}"
    values = " ".join(
        f"add.s32 %r20, %t, {32 * m}; mul.lo.s32 %r20, %r20, 2; add.s32 %r21, %r20, 1; shl.b32 %r21, %r21, 16; "
        f"or.b32 %r{m + 1}, %r20, %r21;"
        for m in range(count)
    )
    ptx(
        f"""
        {values}
        setp.lt.u32 %p0, %t, {rows};
        sub.s32 %r10, {rows - 1}, %t; mul.lo.s32 %r10, %r10, 16; selp.b32 %r10, %r10, 0, %p0;
        stmatrix.sync.aligned.m8n8.{form}.shared.b16 [%r10], {{{COUNTS[count]}}};
        bar.sync 0;
        mul.lo.s32 %r9, %t, 16; cvt.u64.u32 %d0, %r9; add.s64 %d0, %d0, %y;
        @%p0 ld.shared.v2.b64 {{%d2, %d3}}, [%r9];
        @%p0 st.global.v2.b64 [%d0], {{%d2, %d3}};
        """,
        shared=16 * rows, y=out,
    )  # fmt: skip
    for lane in range(32):
        for m in range(count):
            for e in range(2):
                row, column = lane // 4, 2 * (lane % 4) + e
                if transposed:
                    row, column = column, row
                assert out[rows - 1 - (8 * m + row), column] == 2 * (32 * m + lane) + e


def test_rows_of_matrices_must_be_aligned_and_inside_the_memory(ptx):
    body = """
    mad.lo.s32 %r0, %t, 16, OFFSET;
    stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r0], {%t, %t, %t, %t};
    """
    ptx(body.replace("OFFSET", "0"), shared=512)
    with pytest.raises(errors.Misaligned):
        ptx(body.replace("OFFSET", "8"), shared=1024)
    with pytest.raises(errors.OutOfBounds):
        ptx(body.replace("OFFSET", "16"), shared=512)
