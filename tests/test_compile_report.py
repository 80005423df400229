"""`benchmarks.inspection.compile_report` finds each faulty kernel of `example_kernels.py`, and passes the good ones."""

import importlib
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from fastbert.kernels import _device

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parents[1]
needs_triton = pytest.mark.skipif(not _device.HAS_TRITON, reason="triton is not installed")


def _report(*arguments: str) -> subprocess.CompletedProcess:
    """Runs the command on the example kernels."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "benchmarks.inspection.compile_report", "--module", "example_kernels", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """(finished process, {(arch, name): report}) of all example kernels, compiled once for all tests."""
    out = tmp_path_factory.mktemp("report") / "report.json"
    done = _report("--arch", "sm_80,gfx942,sm_90", "--json", str(out))
    assert out.exists(), done.stderr
    return done, {(r["arch"], r["name"]): r for r in json.loads(out.read_text())["kernels"]}


# ---- the command -----------------------------------------------------------------------------------------


@needs_triton
def test_good_kernels_pass(everything):
    _, reports = everything
    good = {key: r["failures"] for key, r in reports.items() if "[good" in key[1]}
    assert good == {
        ("sm_80", "copy_rows[good]"): [], ("sm_80", "product[good]"): [],
        ("sm_90", "copy_rows[good]"): [], ("sm_90", "product[good]"): [], ("sm_90", "product[good_descriptors]"): [],
        ("gfx942", "copy_rows[good]"): [], ("gfx942", "product[good]"): [],
    }  # fmt: skip


@needs_triton
@pytest.mark.parametrize(
    ("arch", "name", "failure"),
    [
        ("sm_80", "softmax_row[spills]", "spills ("),
        ("sm_90", "softmax_row[spills]", "spills ("),
        ("sm_90", "product[small]", "no matrix instructions (HGMMA), found HMMA"),
        ("sm_80", "product[shared_over]", "shared memory 245760 > 166912"),
        ("sm_90", "product[shared_over]", "shared memory 2"),
        ("sm_90", "copy_rows[narrow]", "loads of 16 bits a lane at most"),
        ("sm_90", "product_of_transpose[transposed]", "left operands that are transposed results of products (1)"),
        ("sm_90", "copy_rows[block_of_1000]", "does not compile"),
        ("sm_90", "product[too_few_registers]", "does not compile"),
        ("sm_90", "refused[refused]", "is refused"),
        ("sm_90", "aborts[aborts]", "does not compile"),
    ],
)
def test_each_fault_is_found(everything, arch, name, failure):
    done, reports = everything
    (found,) = reports[arch, name]["failures"]
    assert found.startswith(failure)
    assert done.returncode == 1


@needs_triton
def test_overwritten_operands_are_found(everything):
    """Triton issue 9433: a left operand in registers is converted for the next product while the last one reads it."""
    if tuple(map(int, version("triton").split(".")[:2])) >= (3, 8):
        pytest.skip("from Triton 3.8 on, whether the machine code is right depends on the assembler")
    (found,) = everything[1]["sm_90", "product[operands_overwritten]"]["failures"]
    assert re.match(
        r"registers of asynchronous products touched before the wait \(\d+\): operand written \(R\d+", found
    )


def test_errors_say_what_is_wrong(everything):
    done, reports = everything
    errors = {name: r["error"] for (_, name), r in reports.items() if r["error"]}
    assert errors.pop("product[too_few_registers]").startswith("PTXASError: ptxas fatal")
    assert errors == {
        "copy_rows[block_of_1000]": "ValueError: arange's range must be a power of 2",
        "refused[refused]": "TypeError: dynamic_func() missing 1 required positional argument: 'y_ptr'",
        "aborts[aborts]": "the compiler aborted",
    }
    assert "TRITON_INTERPRET is set: starting again without it" in done.stderr
    assert ".version" not in done.stdout, "ptxas's input has no place in a report"


@needs_triton
def test_facts_are_read_from_the_machine_code(everything):
    _, reports = everything
    for arch, opcode in (("sm_80", "HMMA.16816.F32.BF16"), ("sm_90", "HGMMA.64x64x16.F32.BF16"), ("gfx942", "v_mfma")):
        product = reports[arch, "product[good]"]
        assert product["matrix_opcode"].startswith(opcode)
        assert product["wants_matrix"]
        (loop,) = product["loops"]
        assert loop["matrix_flops"] == 2 * 64 * 64 * 64, "an iteration multiplies one block of each"
        assert not reports[arch, "copy_rows[good]"]["wants_matrix"]
    assert reports["sm_90", "product[good_descriptors]"]["bulk_copies"] >= 2
    assert reports["sm_90", "product[good]"]["shared"] >= 2 * 2 * 64 * 64 * 2, "two stages of two blocks"
    assert reports["sm_90", "copy_rows[good]"]["widest_load"] == 128
    assert reports["sm_90", "copy_rows[narrow]"]["widest_load"] == 16
    (loop,) = reports["sm_90", "copy_rows[good]"]["loops"]
    # eight elements in a load of 128 bits, whatever the compiler unrolled; 16 lanes of exp2 a cycle for four warps
    assert loop["mix"]["exp2"] == 8 * loop["mix"]["global"] // 2
    assert loop["cycles"]["exp2"] == loop["mix"]["exp2"] * 4 * 32 // 16


@needs_triton
def test_fast_subset_is_clean_and_prints_a_table():
    done = _report("--arch", "sm_90", "--fast", "--jobs", "1", "--markdown")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")] == [
        "sm_90", "---", "copy_rows[good]", "product[good]",
    ]  # fmt: skip


@needs_triton
def test_nothing_to_compile_is_an_error():
    assert _report("--kernel", "no such kernel", "--arch", "sm_90").returncode == 1


# ---- reading code ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compile_report():
    """Imports it with the repository's root on the path only here, because `kernels` must not be importable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        return importlib.import_module("benchmarks.inspection.compile_report")


@pytest.fixture(scope="module")
def machine_code(compile_report):
    return compile_report.machine_code


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "tensor_memory", "ctas", "limit"),
    [
        ("sm_90", 4, 32, 0, 0, 16, "warps"),
        ("sm_90", 1, 32, 0, 0, 32, "CTAs"),
        ("sm_90", 4, 64, 0, 0, 8, "registers"),
        ("sm_90", 4, 65, 0, 0, 7, "registers"),  # counted as 72: registers come in groups of eight
        ("sm_90", 8, 255, 0, 0, 1, "registers"),
        # the register file would hold 21 warps, but each of its four parts holds 5
        ("sm_90", 1, 90, 0, 0, 20, "registers"),
        ("sm_90", 4, 64, 32 * 1024, 0, 6, "shared"),  # 33 KB each with the system's share, of 228 KB
        ("sm_80", 4, 64, 32 * 1024, 0, 4, "shared"),  # of 164 KB
        ("sm_90", 8, 128, 228 * 1024, 0, 0, "shared"),
        ("sm_100", 4, 64, 0, 128, 4, "tensor memory"),
        ("gfx942", 4, 128, 0, 0, 4, "registers"),
        ("gfx942", 4, 129, 0, 0, 3, "registers"),
        ("gfx942", 8, 64, 32 * 1024, 0, 2, "shared"),
    ],
)
def test_occupancy_is_that_of_the_vendors_rules(
    compile_report, arch, warps, registers, shared, tensor_memory, ctas, limit
):
    report = compile_report.Report("m", "k", arch, registers=registers, shared=shared, warps=warps)
    compile_report._occupancy(report, compile_report.ARCHES[arch], tensor_memory)
    assert (report.ctas_per_sm, report.limit) == (ctas, limit)
    assert report.warps_per_sm == ctas * warps


@pytest.mark.parametrize(
    ("arch", "kinds", "has", "failure"),
    [
        ("sm_80", ["*bf16"], {"wants_matrix": True}, "no matrix instructions (HMMA), found none"),
        ("gfx942", ["*bf16"], {"wants_matrix": True}, "no matrix instructions (v_mfma), found none"),
        ("sm_90", ["*bf16"], {"wants_matrix": True, "matrix_opcode": "HGMMA.64x64x16.F32.BF16"}, None),
        ("sm_90", ["tensordesc<bf16[64, 64]>"], {}, "no bulk copies (UTMALDG|UBLKCP)"),
        ("sm_90", ["tensordesc<bf16[64, 64]>"], {"bulk_copies": 2}, None),
        ("sm_80", ["tensordesc<bf16[64, 64]>"], {}, None),  # this architecture has no such instruction
        ("gfx942", ["tensordesc<bf16[64, 64]>"], {}, None),
    ],
)
def test_expected_instructions_that_are_missing_are_a_failure(compile_report, arch, kinds, has, failure):
    signature = {f"x{n}": kind for n, kind in enumerate(kinds)}
    case = compile_report.CompileCase("k", "m:k", signature, {}, {}, {})
    report = compile_report.Report("m", "k", arch, **has)
    assert compile_report.judge(report, case, compile_report.ARCHES[arch]) == ([] if failure is None else [failure])


@pytest.mark.parametrize(
    ("operation", "wants"),
    [
        ("%c_1 = tt.dot %a, %b, %c : tensor<64x32xbf16> * tensor<32x64xbf16> -> tensor<64x64xf32>", True),
        ("%c_1 = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<64x32xf16> * tensor<32x64xf16> -> t", True),
        ("%c_1 = tt.dot %a, %b, %c : tensor<64x32xf32> * tensor<32x64xf32> -> tensor<64x64xf32>", False),
        ("%c_1 = tt.load %a : tensor<64x!tt.ptr<bf16>>", False),
    ],
)
def test_products_are_found_in_tritons_own_code(compile_report, operation, wants):
    assert compile_report.wants_matrix(f"module {{\n  {operation}\n}}") is wants


# An outer loop around an inner loop that waits at a barrier. The wait's slow path comes after EXIT and jumps back.
SASS = """
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   IMAD R1, R1, R2, R3 ;
.L_x_1:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR7], R4 ;
        /*0030*/              @!P0 BRA `(.L_x_3) ;
.L_x_2:
        /*0040*/                   LDS.128 R4, [R8] ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR24], R24 ;
        /*0060*/                   MUFU.EX2 R5, R5 ;
        /*0070*/               @P1 BRA `(.L_x_1) ;
        /*0080*/                   STG.E.128 [R2.64], R4 ;
        /*0090*/              @!P2 BRA `(.L_x_0) ;
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR7], R4 ;
        /*00c0*/              @!P0 BRA `(.L_x_3) ;
        /*00d0*/                   BRA `(.L_x_2) ;
.L_x_4:
        /*00e0*/                   BRA `(.L_x_4);
"""


def test_the_inner_loop_is_found(machine_code):
    code = machine_code.parse_sass(SASS)
    ((always, sometimes),) = machine_code.inner_loops(code)
    assert machine_code.instruction_mix(always) == {"matrix": 1, "exp2": 1, "shared": 1, "control": 3, "total": 6}
    assert machine_code.instruction_mix(sometimes) == {"control": 3, "total": 3}, "the slow path of the wait"
    # the outer loop, the inner loop, the wait, and the unreachable trap after the end, which loops to itself
    assert sorted(len(loop.body) for loop in machine_code.find_loops(code)) == [1, 2, 9, 12]


def test_conditional_code_is_counted_separately(machine_code):
    """A persistent kernel has such code in its epilogue: one loop over all blocks, and a store where a tile ends."""
    code = machine_code.parse_sass("""
.L_x_0:
        /*0000*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR24], R24 ;
        /*0010*/              @!P0 BRA `(.L_x_1) ;
        /*0020*/                   STG.E.128 [R2.64], R4 ;
        /*0030*/                   STG.E.128 [R2.64+0x10], R8 ;
.L_x_1:
        /*0040*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0050*/               @P1 BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
""")
    ((always, sometimes),) = machine_code.inner_loops(code)
    assert machine_code.instruction_mix(always) == {"matrix": 1, "control": 2, "integer": 1, "total": 4}
    assert machine_code.instruction_mix(sometimes) == {"global": 2, "total": 2}


def test_loops_are_found_in_amd_assembly(machine_code):
    code = machine_code.parse_amd("""
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
\ts_cbranch_execz .LBB0_2
\tds_read_b128 v[0:3], v4
.LBB0_2:
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
""")
    ((always, sometimes),) = machine_code.inner_loops(code)
    assert (len(always.instructions), len(sometimes.instructions)) == (3, 1)


def test_code_without_loops_has_none(machine_code):
    code = machine_code.parse_sass("        /*0000*/   LDG.E.U16 R0, [R2.64] ;\n        /*0010*/   EXIT ;")
    assert machine_code.inner_loops(code) == []
    assert machine_code.widest_global_load(code) == 16


@pytest.mark.parametrize(
    ("line", "kind", "bits"),
    [
        ("LDG.E.128.CONSTANT R4, [R2.64]", "global", 128),
        ("LDG.E R4, [R2.64]", "global", 32),
        ("LDG.E.64 R4, [R2.64]", "global", 64),
        ("LDGSTS.E.BYPASS.128 [R4], [R2.64]", "copy", 128),
        ("UTMALDG.2D [UR8], [UR4]", "copy", None),
        ("UTMASTG.2D [UR8], [UR4]", "copy", None),
        ("STL.64 [R1+0x20], R40", "spill", 64),
        ("LDL R4, [R1]", "spill", 32),
        ("LDGDEPBAR", "control", None),
        ("LDSM.16.MT88.4 R4, [R8]", "shared", None),
        ("STS.U16 [R8], R4", "shared", 16),
        ("UTCHMMA gdesc[UR6], gdesc[UR14], tmem[UR29], tmem[UR34], idesc[UR35], !UPT", "matrix", None),
        ("UTCQMMA.2CTA gdesc[UR6], gdesc[UR14], tmem[UR29], tmem[UR34], idesc[UR35], !UPT", "matrix", None),
        ("UTCBAR [UR4], URZ", "control", None),
        ("MUFU.EX2 R5, R5", "exp2", None),
        ("MUFU.RCP R5, R5", "special", None),
        ("FFMA.FTZ R1, R2, R3, R4", "float", None),
        ("HFMA2.BF16 R1, R2, R3, R4", "float", None),
        ("F2FP.BF16.F32.PACK_AB R1, R2, R3", "float", None),
        ("IMAD.MOV.U32 R1, RZ, RZ, R2", "integer", None),
        ("LOP3.LUT R11, R11, 0x38, RZ, 0xc0, !PT", "integer", None),
    ],
)
def test_opcodes_are_known(machine_code, line, kind, bits):
    (instruction,) = machine_code.parse_sass(f"        /*0000*/    {line} ;").instructions
    assert instruction.kind == kind
    if bits is not None:
        assert machine_code.access_bits(instruction) == bits


@pytest.mark.parametrize(
    ("line", "kind", "bits"),
    [
        ("v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]", "matrix", None),
        ("v_exp_f32_e32 v1, v2", "exp2", None),
        ("v_pk_mul_f32 v[0:1], v[2:3], v[4:5]", "float", None),
        ("v_fma_f32 v0, v1, v2, v3", "float", None),
        ("v_lshlrev_b32_e32 v0, 2, v1", "integer", None),
        ("ds_read_b128 v[0:3], v4", "shared", 128),
        ("ds_write_b16 v0, v1", "shared", 16),
        ("global_load_dwordx4 v[0:3], v[4:5], off", "global", 128),
        ("global_load_dword v0, v[4:5], off", "global", 32),
        ("buffer_load_ushort v0, v1, s[0:3], 0 offen", "global", 16),
        ("scratch_store_dwordx2 off, v[0:1], s33", "spill", 64),
        ("s_waitcnt lgkmcnt(0)", "control", None),
    ],
)
def test_amd_opcodes_are_known(machine_code, line, kind, bits):
    (instruction,) = machine_code.parse_amd(f"\t{line}   ; a comment").instructions
    assert instruction.kind == kind
    if bits is not None:
        assert machine_code.access_bits(instruction) == bits
