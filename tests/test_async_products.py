"""`inspection.async_products` finds registers of asynchronous products that are used before the wait."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def hazards():
    """Hazards of SASS without addresses, as (instruction, product, what, registers)."""
    # the repository's root is on the path only here, see test_compile_report
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        async_products = importlib.import_module("benchmarks.inspection.async_products")
    parse_sass = importlib.import_module("benchmarks.inspection.machine_code").parse_sass

    def find(text):
        lines = (line if line.startswith(".L") else f"        /*0000*/  {line} ;" for line in text.split("\n") if line)
        found = async_products.hazards(parse_sass("\n".join(lines)))
        return [(h.at, h.product, h.what, h.registers) for h in found]

    return find


LOOP = """
MOV R88, R2
.L_x_0:
{before}
WARPGROUP.ARRIVE
HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR8].tnspB, R24, gsb0
HGMMA.64x64x16.F32.BF16 R24, R92, gdesc[UR12].tnspB, R24, gsb0
WARPGROUP.DEPBAR.LE gsb0, {left}
{after}
@P0 BRA `(.L_x_0)
WARPGROUP.DEPBAR.LE gsb0, 0x0
STG.E.128 desc[UR4][R2.64], R24
EXIT
"""


def test_code_that_waits_is_clean(hazards):
    """Operand and sum are used after their wait; in the loop, each group after the wait that covers it."""
    assert hazards("""
HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT
HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], R24, gsb0
MOV R4, R5
MOV R88, R90
WARPGROUP.DEPBAR.LE gsb0, 0x0
FADD R24, R25, R87
MOV R87, RZ
""") == []  # fmt: skip
    assert hazards(LOOP.format(before="MOV R92, R3", left="0x0", after="MOV R88, R4")) == []
    # one group may be in flight; it is not the first one, whose operand is R88
    assert hazards(LOOP.format(before="MOV R3, R92", left="0x1", after="MOV R88, R4")) == []


@pytest.mark.parametrize(
    ("line", "what", "registers"),
    [
        ("MOV R31, R5", "operand written", (31,)),
        ("@!P3 MOV R31, R5", "operand written", (31,)),
        ("LDS.128 R28, [R3]", "operand written", (28, 29, 30, 31)),
        ("LDSM.16.MT88.2 R30, [R3]", "operand written", (30, 31)),
        ("IMAD.WIDE.U32 R30, R3, R4, R6", "operand written", (30, 31)),
        ("CS2R R28, SRZ", "operand written", (28, 29)),
        ("SHFL.BFLY PT, R29, R5, 0x2, 0x1f", "operand written", (29,)),
        ("LOP3.LUT P0, R29, R5, 0xff, RZ, 0xc0, !PT", "operand written", (29,)),
        ("HMMA.16816.F32.BF16 R28, R4, R8, RZ", "operand written", (28, 29, 30, 31)),
        ("HGMMA.64x8x16.F32.BF16 R28, gdesc[UR8], RZ, !UPT, gsb0", "operand written", (28, 29, 30, 31)),
        ("MOV R32, RZ", "sum written", (32,)),
        ("FADD R32, R32, R4", "sum written", (32,)),
        ("F2FP.BF16.F32.PACK_AB R4, R33, R32", "sum read", (32, 33)),
        ("FMUL R5, |R63|.reuse, -R4", "sum read", (63,)),
        ("STS.64 [R3], R62", "sum read", (62, 63)),
        ("STG.E desc[UR4][R40.64], R4", "sum read", (40, 41)),
        ("STSM.16.M88.4 [R3], R60", "sum read", (60, 61, 62, 63)),
        ("ISETP.NE.AND P0, PT, R32, R4, PT", "sum read", (32,)),
        ("HGMMA.64x8x16.F32.BF16 R100, R60, gdesc[UR8], RZ, !UPT, gsb0", "sum read", (60, 61, 62, 63)),
    ],
)
def test_each_conflict_is_found(hazards, line, what, registers):
    found = hazards(f"""
HGMMA.64x64x16.F32.BF16 R32, R28, gdesc[UR8], R32, gsb0
{line}
WARPGROUP.DEPBAR.LE gsb0, 0x0
""")
    assert found == [(1, 0, what, registers)]


@pytest.mark.parametrize(
    "line",
    [
        "MOV R5, R28",  # the operand may be read
        "STS.128 [R28], R4",
        "ISETP.NE.AND P0, PT, R28, R4, PT",
        "R2UR UR32, R28",
        "UMOV UR32, UR28",
        "MOV R64, R96",
        "STG.E.64 desc[UR4][R2.64], R30",
        "HGMMA.64x64x16.F32.BF16 R32, gdesc[UR8], R32, gsb0",  # onto the same sum: products run in order
        "HGMMA.64x64x16.F32.BF16 R64, R28, gdesc[UR8], RZ, !UPT, gsb0",
    ],
)
def test_what_does_not_conflict_is_not_reported(hazards, line):
    assert hazards(f"HGMMA.64x64x16.F32.BF16 R32, R28, gdesc[UR8], R32, gsb0\n{line}\n") == []


def test_float16_sums_take_half_as_many_registers(hazards):
    assert hazards("HGMMA.64x64x16.F16 R32, gdesc[UR8], R32, gsb0\nMOV R48, RZ") == []
    assert hazards("HGMMA.64x64x16.F16 R32, gdesc[UR8], R32, gsb0\nMOV R47, RZ") == [(1, 0, "sum written", (47,))]


def test_a_wait_covers_only_its_groups(hazards):
    """A wait may leave groups in flight. A group that is still open has not been committed, so no wait covers it."""
    groups = """
HGMMA.64x8x16.F32.BF16 R32, R28, gdesc[UR8], RZ, !UPT, gsb0
HGMMA.64x8x16.F32.BF16 R36, R24, gdesc[UR8], RZ, !UPT, gsb0
WARPGROUP.DEPBAR.LE gsb0, 0x1
MOV R28, RZ
MOV R24, RZ
"""
    assert hazards(groups) == [(4, 1, "operand written", (24,))]
    is_open = """
HGMMA.64x8x16.F32.BF16 R32, R28, gdesc[UR8], RZ, !UPT
WARPGROUP.DEPBAR.LE gsb0, 0x0
MOV R28, RZ
"""
    assert hazards(is_open) == [(2, 0, "operand written", (28,))]


def test_a_conflict_with_the_next_iteration_is_found(hazards):
    """As in triton issue 9433: the wait leaves the second group, and the next iteration writes its operand."""
    assert hazards(LOOP.format(before="MOV R92, R3", left="0x1", after="MOV R88, R4")) == [
        (1, 4, "operand written", (92,))
    ]
    # the same behind a branch that only some iterations take
    code = LOOP.format(before="@P1 BRA `(.L_x_1)\nMOV R92, R3\n.L_x_1:", left="0x1", after="MOV R88, R4")
    assert hazards(code) == [(2, 5, "operand written", (92,))]


def test_every_path_counts(hazards):
    """A path may jump over a wait, which then has not happened."""
    assert hazards("""
HGMMA.64x8x16.F32.BF16 R32, R28, gdesc[UR8], RZ, !UPT, gsb0
@P0 BRA `(.L_x_0)
WARPGROUP.DEPBAR.LE gsb0, 0x0
.L_x_0:
MOV R32, RZ
""") == [(3, 0, "sum written", (32,))]  # fmt: skip


def test_the_path_with_fewest_groups_counts(hazards):
    """On one path the product is in the last group, which the wait leaves in flight; on the other, in one before."""
    assert hazards("""
HGMMA.64x8x16.F32.BF16 R32, R28, gdesc[UR8], RZ, !UPT, gsb0
@P0 BRA `(.L_x_1)
.L_x_0:
WARPGROUP.DEPBAR.LE gsb0, 0x1
MOV R28, RZ
EXIT
.L_x_1:
HGMMA.64x8x16.F32.BF16 R36, R24, gdesc[UR8], RZ, !UPT, gsb0
BRA `(.L_x_0)
""") == [(3, 0, "operand written", (28,))]  # fmt: skip


def test_code_without_asynchronous_products_has_none(hazards):
    assert hazards("HMMA.16816.F32.BF16 R4, R8, R12, R4\nMOV R4, RZ") == []
    assert hazards("UTCHMMA gdesc[UR6], gdesc[UR14], tmem[UR29], tmem[UR34], idesc[UR35], !UPT\nMOV R6, RZ") == []
