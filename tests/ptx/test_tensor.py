"""tcgen05: tensor memory, products in it, and data that must not be used before a wait."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from fastbert.emulator import errors

pytestmark = pytest.mark.once

OPERANDS = runpy.run_path(str(Path(__file__).with_name("operands.py")))
KINDS, copy_in, descriptor, laid_out = (OPERANDS[name] for name in ("KINDS", "copy_in", "descriptor", "laid_out"))

ALLOC = "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32"
DEALLOC = "tcgen05.dealloc.cta_group::1.sync.aligned.b32"
PERMIT = "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned"
MMA = "tcgen05.mma.cta_group::1.kind::f16"
COMMIT = "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64"
WAIT_LOAD, WAIT_STORE = "tcgen05.wait::ld.sync.aligned;", "tcgen05.wait::st.sync.aligned;"
SHAPES = {"32x32b": (8, 16, 32, 64, 128), "16x32bx2": (4, 8, 16, 32, 64)}

# %r20: the first column; %r21: the same in this warp's lanes; %p5: this is the first warp; %p6: the first thread
BEGIN = f"""
setp.lt.u32 %p5, %t, 32; setp.eq.u32 %p6, %t, 0; mov.u32 %r19, PLACE;
@%p5 {ALLOC} [%r19], COLUMNS; @%p5 {PERMIT};
bar.sync 0; ld.shared.b32 %r20, [%r19]; and.b32 %r22, %t, 96; shl.b32 %r22, %r22, 16; add.s32 %r21, %r20, %r22;
"""
FREE = f"bar.sync 0; @%p5 {DEALLOC} %r20, COLUMNS;"


def _body(text: str, columns: int = 64, place: int = 0, free: str = FREE) -> str:
    return f"{BEGIN} {text} {free}".replace("COLUMNS", str(columns)).replace("PLACE", str(place))


def _registers(count: int, first: int = 24) -> str:
    return "{" + ", ".join(f"%r{first + n}" for n in range(count)) + "}"


def _write_out(count: int) -> str:
    """Writes the n-th register to y[thread, n]."""
    stores = " ".join(f"st.global.b32 [%d9 + {4 * n}], %r{24 + n};" for n in range(count))
    return f"mad.wide.u32 %d9, %t, {4 * count}, %y; {stores}"


def _fill(count: int, wait: str = WAIT_STORE) -> str:
    """Stores 1000 l + n in column n of lane l."""
    values = " ".join(f"mad.lo.s32 %r{24 + n}, %t, 1000, {n};" for n in range(count))
    return f"{values} tcgen05.st.sync.aligned.32x32b.x{count}.b32 [%r21 + 0], {_registers(count)}; {wait}"


@pytest.mark.instructions(
    ALLOC, DEALLOC, PERMIT, WAIT_LOAD[:-1], WAIT_STORE[:-1],
    *(f"tcgen05.{op}.sync.aligned.{shape}.x{n}.b32" for shape in SHAPES for n in SHAPES[shape] for op in ("ld", "st")),
)  # fmt: skip
@pytest.mark.parametrize("count", [8, 16, 32, 64, 128])
def test_lanes_and_columns(ptx, count):
    """16x32bx2: both halves of a warp read its first 16 lanes; the upper half reads columns 3 further on."""
    y = np.zeros((128, count), np.uint32)
    load = f"tcgen05.ld.sync.aligned.32x32b.x{count}.b32 {_registers(count)}, [%r21 + 0]; {WAIT_LOAD}"
    ptx(_body(_fill(count) + load + _write_out(count), 128), threads=128, shared=4, y=y)
    assert y.tolist() == [[1000 * thread + n for n in range(count)] for thread in range(128)]
    half = count // 2
    y = np.zeros((128, half), np.uint32)
    load = f"tcgen05.ld.sync.aligned.16x32bx2.x{half}.b32 {_registers(half)}, [%r21 + 1], 3; {WAIT_LOAD}"
    ptx(_body(_fill(count) + "bar.sync 0;" + load + _write_out(half), 128), threads=128, shared=4, y=y)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        row, first = 32 * warp + lane % 16, 1 + lane // 16 * 3
        assert y[thread].tolist() == [1000 * row + first + n for n in range(half)]


@pytest.mark.parametrize("half", [4, 8, 16, 32, 64])
def test_halves_are_stored_like_they_are_loaded(ptx, half):
    """Both halves of a warp store to its first 16 lanes: the lower half from column 0, the upper half from `half`."""
    y = np.zeros((128, half), np.uint32)
    values = " ".join(f"mad.lo.s32 %r{24 + n}, %t, 1000, {n};" for n in range(half))
    store = f"tcgen05.st.sync.aligned.16x32bx2.x{half}.b32 [%r21 + 0], {half}, {_registers(half)}; {WAIT_STORE}"
    meet = "bar.sync 0; and.b32 %r22, %t, 31; setp.lt.u32 %p7, %r22, 16;"  # lanes 16 to 31 were not filled
    load = f"tcgen05.ld.sync.aligned.16x32bx2.x{half}.b32 {_registers(half)}, [%r21 + {half}], -{half}; {WAIT_LOAD}"
    ptx(_body(values + store + meet + load + _write_out(half), 128), threads=128, shared=4, y=y)
    for thread in range(128):
        assert y[thread].tolist() == [1000 * (thread ^ 16) + n for n in range(half)]


# ---- products ----------------------------------------------------------------------------------------------

N, SPAN, BARRIER = 32, 32, 8184  # columns of D; bytes of a row of A and B in shared memory; address of the mbarrier
PREPARE = f"mov.u32 %r8, {BARRIER}; @%p6 mbarrier.init.shared::cta.b64 [%r8], 1;"
READY = "fence.proxy.async.shared::cta; bar.sync 0;"
OVER = "{ .reg .pred over; again: mbarrier.try_wait.parity.shared::cta.b64 over, [%r8], 0; @!over bra.uni again; }"
FETCH = f"tcgen05.ld.sync.aligned.32x32b.x{N}.b32 {_registers(N)}, [%r21 + 0]; {WAIT_LOAD} {_write_out(N)}"
END = f"bar.sync 0; @%p6 mbarrier.inval.shared::cta.b64 [%r8]; {FREE}"


def _instruction(m: int, kind: str, negated: tuple[bool, bool] = (False, False), transposed=(False, False)) -> int:
    formats = {"f16": 0, "bf16": 1}[kind]
    flags = negated[0] << 13 | negated[1] << 14 | transposed[0] << 15 | transposed[1] << 16
    return 1 << 4 | formats << 7 | formats << 10 | flags | N >> 3 << 17 | m >> 4 << 24


def _operands(m: int, kind: str, transposed=(False, False)):
    """A [m, 16], B [N, 16], both as they lie in shared memory, and their descriptors."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(-4, 5, (m, 16)), rng.integers(-4, 5, (N, 16))
    image_a, *offsets_a = laid_out(KINDS[kind](a), SPAN, transposed[0])
    image_b, *offsets_b = laid_out(KINDS[kind](b), SPAN, transposed[1])
    image = np.concatenate([image_a, image_b])
    constant = 1 << 46  # set in every descriptor of tcgen05
    of_a = descriptor(0, *offsets_a, SPAN) | constant
    return a, b, image, of_a, descriptor(len(image_a), *offsets_b, SPAN) | constant


def _product(image, of_a, of_b, instruction, keeps: int = 0, guard: str = "@%p6", times: int = 1) -> tuple[str, str]:
    """(what comes before: mbarrier and operands; the product's instruction)."""
    set_up = f"{PREPARE} {copy_in(len(image))} mov.b64 %d10, {of_a}; mov.b64 %d11, {of_b}; mov.u32 %r7, {instruction};"
    product = f"setp.ne.u32 %p7, {keeps}, 0; " + f"{guard} {MMA} [%r20 + 0], %d10, %d11, %r7, %p7;" * times
    return set_up, product


REPORT = f"@%p6 {COMMIT} [%r8];"


def _run(ptx, image, text: str, y=None, free: str = END) -> np.ndarray:
    y = np.zeros((128, N), np.float32) if y is None else y
    ptx(_body(text, place=8176, free=free), threads=128, shared=8192, x=image, y=y)
    return y


@pytest.mark.instructions(MMA, COMMIT)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True)], ids=["plain", "a", "b"])
def test_a_product_of_shared_memory(ptx, kind, transposed):
    a, b, image, of_a, of_b = _operands(128, kind, transposed)
    before, product = _product(image, of_a, of_b, _instruction(128, kind, transposed=transposed))
    y = _run(ptx, image, before + READY + product + REPORT + OVER + FETCH)
    np.testing.assert_array_equal(y, a @ b.T)


def test_rows_of_a_product_of_64(ptx):
    """Sixteen rows are in the first sixteen lanes of each warp."""
    a, b, image, of_a, of_b = _operands(64, "f16")
    before, product = _product(image, of_a, of_b, _instruction(64, "f16"))
    half = N // 2
    load = f"tcgen05.ld.sync.aligned.16x32bx2.x{half}.b32 {_registers(half)}, [%r21 + 0], {half}; {WAIT_LOAD}"
    y = np.zeros((128, half), np.float32)
    _run(ptx, image, before + READY + product + REPORT + OVER + load + _write_out(half), y)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        first = lane // 16 * half
        np.testing.assert_array_equal(y[thread], (a @ b.T)[16 * warp + lane % 16, first : first + half])


def test_products_accumulate_and_can_be_negated(ptx):
    """Three products, of A with its sign changed, are added to stored values."""
    a, b, image, of_a, of_b = _operands(128, "bf16")
    start = " ".join(f"mov.b32 %r{24 + n}, 0f42C80000;" for n in range(N))  # 100
    start += f"tcgen05.st.sync.aligned.32x32b.x{N}.b32 [%r21 + 0], {_registers(N)}; {WAIT_STORE}"
    instruction = _instruction(128, "bf16", negated=(True, False))
    before, product = _product(image, of_a, of_b, instruction, keeps=1, times=3)
    y = _run(ptx, image, before + start + READY + product + REPORT + OVER + FETCH)
    np.testing.assert_array_equal(y, 100 - 3 * (a @ b.T))


def test_products_of_one_thread_run_in_order(ptx):
    """One thread starts two products into the same columns, and only the other threads wait for the first. It is an
    error if a thread of another warp starts the second."""
    a, b, image, of_a, of_b = _operands(128, "f16")
    before, first = _product(image, of_a, of_b, _instruction(128, "f16"))
    more = f"mov.u32 %r9, {BARRIER - 16}; @%p6 mbarrier.init.shared::cta.b64 [%r9], 1;"
    second = first.replace("%p7, 0, 0", "%p7, 1, 0")
    report, over = (text.replace("%r8", "%r9") for text in (REPORT, OVER))
    some = f"@%p5 bra skip; {OVER} skip:"
    free = END.replace(FREE, f"@%p6 mbarrier.inval.shared::cta.b64 [%r9]; {FREE}")
    text = before + more + READY + first + REPORT + some + second + report + over + FETCH
    y = _run(ptx, image, text, free=free)
    np.testing.assert_array_equal(y, 2 * (a @ b.T))
    # a thread of another warp, which has not waited for the first product
    other = second.replace(f"@%p6 {MMA}", f"@%p8 {MMA}")
    text = text.replace(second, f"setp.eq.u32 %p8, %t, 32; {other}").replace(some, "")
    with pytest.raises(errors.MissingWait):
        _run(ptx, image, text, free=free)


def test_a_left_operand_in_tensor_memory(ptx):
    """Row l of A is in lane l, two elements in a column, from column 40 on."""
    a, b, image, of_a, of_b = _operands(128, "f16")
    rows = np.ascontiguousarray(KINDS["f16"](a)).view(np.uint32)
    fetch = "mad.wide.u32 %d12, %t, 32, %a; " + " ".join(
        f"ld.global.b32 %r{24 + n}, [%d12 + {4 * n}];" for n in range(8)
    )
    store = f"tcgen05.st.sync.aligned.32x32b.x8.b32 [%r21 + 40], {_registers(8)}; {WAIT_STORE}"
    before, product = _product(image, of_a, of_b, _instruction(128, "f16"))
    product = product.replace("%d10,", "[%r20 + 40],")
    y = np.zeros((128, N), np.float32)
    text = before + fetch + store + READY + product + REPORT + OVER + FETCH
    ptx(_body(text, place=8176, free=END), threads=128, shared=8192, x=image, a=rows, y=y)
    np.testing.assert_array_equal(y, a @ b.T)


def test_unwritten_columns_are_nan(ptx):
    y = np.zeros((128, 8), np.float32)
    load = f"tcgen05.ld.sync.aligned.32x32b.x8.b32 {_registers(8)}, [%r21 + 4]; {WAIT_LOAD}"
    ptx(_body(_fill(8) + load + _write_out(8)), threads=128, shared=4, y=y)
    assert np.isfinite(y[:, :4]).all()
    assert np.isnan(y[:, 4:]).all()


def test_a_warp_may_store_where_another_of_its_lanes_loaded(ptx):
    """Lanes of a warp need no barrier between them, and other warps cannot access their lanes."""
    y = np.zeros((128, 8), np.uint32)
    load = f"tcgen05.ld.sync.aligned.16x32bx2.x4.b32 {_registers(4)}, [%r21 + 0], 4; {WAIT_LOAD}"
    store = f"tcgen05.st.sync.aligned.16x32bx2.x4.b32 [%r21 + 4], -4, {_registers(4)}; {WAIT_STORE}"
    ptx(_body(_fill(8) + load + store + load + _write_out(8)), threads=128, shared=4, y=y)
    warp, lane = (part[:, None] for part in divmod(np.arange(128), 32))
    np.testing.assert_array_equal(y[:, :4], (32 * warp + lane % 16) * 1000 + np.arange(4) + 4 * (lane < 16))


# ---- errors ------------------------------------------------------------------------------------------------

REFUSED = {
    "no wait for the product": (errors.MissingWait, {OVER: ""}),
    "no fence": (errors.MissingFence, {"fence.proxy.async.shared::cta;": ""}),
    "no barrier": (errors.SharedRace, {"shared::cta; bar.sync 0;": "shared::cta;"}),
    "no commit": (errors.DivergentBarrier, {REPORT: ""}),
    "no wait for the load": (errors.MissingWait, {WAIT_LOAD: ""}),
    "no wait for the load, and a barrier after it": (errors.MissingWait, {WAIT_LOAD: "bar.sync 0;"}),
    "an operand written too early": (errors.MissingWait, {REPORT: f"{REPORT} st.shared.b32 [%r19 + -8176], %t;"}),
    "not freed": (errors.TensorMemoryMisuse, {f"@%p5 {DEALLOC} %r20, 64;": ""}),
    "half freed": (errors.TensorMemoryMisuse, {f"{DEALLOC} %r20, 64": f"{DEALLOC} %r20, 32"}),
    "freed too early": (errors.MissingWait, {OVER: f"@%p5 {DEALLOC} %r20, 64;"}),
    "too many columns": (
        errors.TensorMemoryMisuse, {f"{ALLOC} [%r19], 64;": f"{ALLOC} [%r19], 512; @%p5 {ALLOC} [%r19], 64;"},
    ),
    "an odd allocation": (errors.InvalidOperand, {f"{ALLOC} [%r19], 64": f"{ALLOC} [%r19], 48"}),
    "more threads than one": (errors.DivergentWarp, {f"@%p6 {MMA}": f"@%p5 {MMA}"}),
    "two warps allocate": (errors.DivergentWarp, {f"@%p5 {ALLOC}": ALLOC}),
    "columns that are not allocated": (errors.OutOfBounds, {"[%r21 + 0]": "[%r21 + 33]"}),
    "a product past the columns": (errors.OutOfBounds, {"[%r20 + 0]": "[%r20 + 33]"}),
    "lanes of another warp": (errors.InvalidOperand, {"[%r21 + 0]": "[%r20 + 0]"}),
    "a sum with unwritten columns": (errors.UnwrittenShared, {"setp.ne.u32 %p7, 0, 0": "setp.ne.u32 %p7, 1, 0"}),
    "another format": (errors.InvalidOperand, {f"mov.u32 %r7, {_instruction(128, 'f16')}": "mov.u32 %r7, 0"}),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_refused(ptx, fault):
    _, _, image, of_a, of_b = _operands(128, "f16")
    before, product = _product(image, of_a, of_b, _instruction(128, "f16"))
    text = _body(before + READY + product + REPORT + OVER + FETCH, place=8176, free=END)
    error, changes = REFUSED[fault]
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    with pytest.raises(error):
        ptx(text, threads=128, shared=8192, x=image, y=np.zeros((128, N), np.float32))


def test_a_load_needs_a_wait_before_other_warps_write_there(ptx):
    """Using the loaded registers waits for them, but does not order the memory that the load reads."""
    y = np.zeros((128, 8), np.uint32)
    load = f"tcgen05.ld.sync.aligned.32x32b.x8.b32 {_registers(8)}, [%r21 + 0];"
    use, store = "add.u32 %r24, %r24, 1;", "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r21 + 3], {%r24};"
    ptx(_body(_fill(8) + load + use + WAIT_LOAD + store + WAIT_STORE + _write_out(8)), threads=128, shared=4, y=y)
    expected = np.arange(128)[:, None] * 1000 + np.arange(8)
    np.testing.assert_array_equal(y, expected + (np.arange(8) == 0))
    with pytest.raises(errors.MissingWait, match="byte 12 of tensor memory while an asynchronous unit may still read"):
        ptx(_body(_fill(8) + load + store + WAIT_LOAD + WAIT_STORE), threads=128, shared=4, y=y)
    with pytest.raises(errors.MissingWait, match=r"freed while a tcgen05\.ld"):
        ptx(_body(_fill(8) + load + _write_out(8)), threads=128, shared=4, y=y)


def test_a_store_needs_a_wait(ptx):
    y = np.zeros((128, 8), np.uint32)
    load = f"tcgen05.ld.sync.aligned.32x32b.x8.b32 {_registers(8)}, [%r21 + 0]; {WAIT_LOAD}"
    with pytest.raises(errors.MissingWait, match="byte 0 of tensor memory"):
        ptx(_body(_fill(8, wait="") + load + _write_out(8)), threads=128, shared=4, y=y)
    with pytest.raises(errors.MissingWait, match="ends before it has waited for its tensor memory"):
        ptx(_body(_fill(8, wait="")), threads=128, shared=4, y=y)
