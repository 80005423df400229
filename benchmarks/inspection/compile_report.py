"""Compiles every kernel for every architecture, without a GPU, and reports on its machine code.

    python -m benchmarks.inspection.compile_report

Each kernel module lists calls of its operators (`compile_calls()`). They run through the real launchers for a GPU that
is not present, and the launched kernels are compiled. The report gives registers, spills, shared memory, warps that fit
a multiprocessor, matrix instructions, bulk copies, the widest global load, and the instruction mix of the inner loops
with the least cycles of each unit. The exit code is 1 if a launch is refused or a kernel does not compile, spills more
than FEW_SPILLS, needs too much shared memory, lacks expected matrix instructions or bulk copies, or touches registers
of an asynchronous product too early (`async_products`).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastbert.kernels._assembler import assembler

from . import async_products, machine_code
from .compile_cases import CompileCase, cases_of

KB = 1024


@dataclass(frozen=True)
class Arch:
    """The limits of a multiprocessor and of one program (CTA, workgroup)."""

    target: tuple[str, int | str, int]  # triton's backend, arch, warp size
    warps: int
    ctas: int
    registers: int  # 32-bit registers of a multiprocessor, divided by the warp size
    shared: int
    shared_per_cta: int
    shared_reserved: int  # bytes of each CTA that the system uses
    matrix: str  # opcodes of the matrix unit in 16-bit types
    bulk_copy: str  # opcodes of copies to shared memory that do not use registers
    matrix_flops: int  # in a cycle, dense, 16-bit types
    issue: int = 4  # instructions in a cycle (on AMD a vector instruction occupies its SIMD for four cycles)
    special_lanes: int = 16  # exp2 in a cycle
    shared_bytes: int = 128  # in a cycle


# Limits are from the CUDA programming guide's table of compute capabilities, and from AMD's CDNA 3 guide. The flops of
# a cycle are the vendors' peak rates divided by multiprocessors and clock. For 8.6, 8.9 and 12.x they are those of the
# professional cards; GeForce cards sum in float32 at half of that rate.
ARCHES = {
    "sm_80": Arch(("cuda", 80, 32), 64, 32, 2048, 164 * KB, 163 * KB, KB, "HMMA", "LDGSTS", 2048),
    "sm_86": Arch(("cuda", 86, 32), 48, 16, 2048, 100 * KB, 99 * KB, KB, "HMMA", "LDGSTS", 1024),
    "sm_89": Arch(("cuda", 89, 32), 48, 24, 2048, 100 * KB, 99 * KB, KB, "HMMA", "LDGSTS", 1024),
    "sm_90": Arch(("cuda", 90, 32), 64, 32, 2048, 228 * KB, 227 * KB, KB, "HGMMA", "UTMALDG|UBLKCP", 4096),
    "sm_100": Arch(("cuda", 100, 32), 64, 32, 2048, 228 * KB, 227 * KB, KB, "UTC[A-Z]*MMA", "UTMALDG|UBLKCP", 8192),
    "sm_120": Arch(("cuda", 120, 32), 48, 24, 2048, 100 * KB, 99 * KB, KB, "HMMA", "UTMALDG|UBLKCP", 1024),
    "sm_121": Arch(("cuda", 121, 32), 48, 24, 2048, 100 * KB, 99 * KB, KB, "HMMA", "UTMALDG|UBLKCP", 1024),
    "gfx942": Arch(("hip", "gfx942", 64), 32, 32, 2048, 64 * KB, 64 * KB, 0, "v_mfma", "(?!)", 2048, issue=1),
}
DEFAULT_ARCHES = tuple(ARCHES)


@dataclass
class Report:
    """The result of compiling one case. Sizes are in bytes, widths in bits of a lane."""

    module: str
    name: str
    arch: str
    error: str = ""
    registers: int = 0
    spills: int = 0  # spill loads and stores in the code, or bytes of stack if the code shows none
    shared: int = 0
    warps: int = 0  # warps of one CTA
    ctas_per_sm: int = 0
    warps_per_sm: int = 0
    limit: str = ""  # the resource that bounds the occupancy
    global_scratch: int = 0
    wants_matrix: bool = False  # whether it multiplies tiles of 16-bit types
    matrix: int = 0
    matrix_opcode: str = ""
    bulk_copies: int = 0
    widest_load: int = 0
    hazards: list[str] = field(default_factory=list)  # asynchronous products whose registers are touched too early
    transposed_products: int = 0  # left operands that are the transpose of another asynchronous product's result
    loops: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


# ---- the cases -------------------------------------------------------------------------------------------


def kernel_modules() -> tuple[list[str], list[str]]:
    """(modules that list calls, modules that the table of operators names but that do not exist)."""
    from fastbert import functional, kernels

    present = sorted(m.name for m in pkgutil.iter_modules(kernels.__path__))
    named = set(functional.TRITON_MODULES.values())
    modules = [f"fastbert.kernels.{n}" for n in present if n in named or _lists_calls(f"fastbert.kernels.{n}")]
    return modules, sorted(named - set(present))


def _lists_calls(module: str) -> bool:
    """Whether the module has `compile_calls`. Its source is searched, because importing it might need other
    packages."""
    origin = importlib.util.find_spec(module).origin
    if not origin.endswith(".py"):  # the C++ operators
        return False
    return re.search(r"^def compile_calls\b", Path(origin).read_text(encoding="utf-8"), re.MULTILINE) is not None


# ---- one case --------------------------------------------------------------------------------------------


def report_one(case: CompileCase, module: str, arch: str) -> Report:
    """Compiles one case and reads its code. An error becomes part of the report."""
    report = Report(module, case.name, arch, warps=case.num_warps)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # if ptxas fails, Triton prints the whole program
            compiled = compile_case(case, arch)
        _read(report, case, compiled, ARCHES[arch])
        report.failures = judge(report, case, ARCHES[arch])
    except Exception as error:  # any error of the compiler is the result of this case
        report.error = _reason(error)
        report.failures = ["does not compile"]
    return report


def _reason(error: BaseException) -> str:
    """The line of the message that names the error; Triton adds source code, and ptxas a command to repeat."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {next((line for line in lines if 'fatal' in line), lines[-1])}"


def compile_case(case: CompileCase, arch: str) -> Any:
    """The compiled kernel of a case, from Triton's cache if it has been compiled before."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = case.kernel.split(":")
    kernel = getattr(importlib.import_module(module), name)
    place = {name: (n,) for n, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=case.signature,
        constexprs={place[name]: value for name, value in case.constexprs.items()},
        attrs={place[name]: value for name, value in case.attrs.items()},
    )
    return triton.compile(source, target=GPUTarget(*ARCHES[arch].target), options=case.options)


def _tool(name: str, *args: str) -> str:
    """Output of one of the NVIDIA tools that come with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *args], check=True, capture_output=True, text=True).stdout


def _read(report: Report, case, compiled, arch: Arch) -> None:
    report.shared = compiled.metadata.shared
    report.wants_matrix = wants_matrix(compiled.asm["ttir"])
    report.global_scratch = getattr(compiled.metadata, "global_scratch_size", 0) or 0
    if arch.target[0] == "cuda":
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            usage = _tool("cuobjdump", "-res-usage", cubin.name)
            code = machine_code.parse_sass(_tool("nvdisasm", "-c", cubin.name))
        used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        report.registers = used["REG"]
        report.spills = len(code.of_kind("spill")) or used["STACK"] + used["LOCAL"]
        report.hazards = [hazard.describe(code) for hazard in async_products.hazards(code)]
        report.transposed_products = async_products.transposed_products(compiled.asm["ttgir"])
        # A warp-specialised kernel has helper warps in addition to num_warps.
        if threads := re.search(r"\.(?:req|max)ntid\s+(\d+)", compiled.asm["ptx"]):
            report.warps = int(threads[1]) // arch.target[2]
    else:
        assembly = compiled.asm["amdgcn"]
        code = machine_code.parse_amd(assembly)
        meta = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", assembly, re.MULTILINE)}
        report.registers = meta["vgpr_count"]
        # scalar registers spill into lanes of a vector register, not into memory
        report.spills = meta["vgpr_spill_count"] or len(code.of_kind("spill"))

    matrix = code.of_kind("matrix")
    report.matrix = len(matrix)
    # Prefer the architecture's own instructions: a product that is too small for them uses older ones beside them.
    own = [i.opcode for i in matrix if re.match(arch.matrix, i.opcode)] or [i.opcode for i in matrix]
    report.matrix_opcode = max(sorted(set(own)), key=own.count, default="")
    report.bulk_copies = code.count(arch.bulk_copy)
    report.widest_load = machine_code.widest_global_load(code)
    report.loops = [_loop(*loop, report.warps, arch) for loop in machine_code.inner_loops(code)]
    _occupancy(report, arch, getattr(compiled.metadata, "tmem_size", 0) or 0)


def _occupancy(report: Report, arch: Arch, tensor_memory: int) -> None:
    """Sets how many CTAs fit one multiprocessor, limited by the scarcest resource."""
    if arch.target[0] == "cuda":
        per_lane = -(-report.registers // 8) * 8  # registers are allocated in units of 8 a lane, by four schedulers
        by_registers = arch.registers // 4 // max(per_lane, 1) * 4 // report.warps
    else:
        # four SIMDs of 512 registers a lane, at most 8 waves each
        by_registers = min(512 // max(-(-report.registers // 8) * 8, 1), 8) * 4 // report.warps
    shared = report.shared + arch.shared_reserved
    limits = {
        "warps": arch.warps // report.warps,
        "CTAs": arch.ctas,
        "registers": by_registers,
        "shared": arch.shared // shared if shared else arch.ctas,
        "tensor memory": 512 // tensor_memory if tensor_memory else arch.ctas,
    }
    report.limit = min(limits, key=limits.get)
    report.ctas_per_sm = limits[report.limit]
    report.warps_per_sm = report.ctas_per_sm * report.warps


def _loop(loop: machine_code.Code, sometimes: machine_code.Code, warps: int, arch: Arch) -> dict[str, Any]:
    """The instruction mix of one inner loop, for one warp, and the least cycles of a CTA's iteration for each unit.

    An iteration is one of the machine code: the compiler may have unrolled the kernel's own loop. Cycles only count
    instructions that every iteration executes, not conditional ones (`sometimes`).
    """
    mix = machine_code.instruction_mix(loop)
    flops = machine_code.matrix_flops(loop, warps)
    lanes = arch.target[2]
    full_rate = all(re.match(arch.matrix, i.opcode) and "TF32" not in i.opcode for i in loop.of_kind("matrix"))
    shared_bytes = sum(_shared_bits(i) * lanes // 8 for i in loop.of_kind("shared")) * warps
    cycles = {
        "matrix": flops / arch.matrix_flops if full_rate else 0,
        "exp2": mix.get("exp2", 0) * warps * lanes / arch.special_lanes,
        "shared": shared_bytes / arch.shared_bytes,
        "issue": mix["total"] * warps / arch.issue,
    }
    return {
        "mix": mix,
        "sometimes": machine_code.instruction_mix(sometimes),
        "matrix_flops": flops,
        "cycles": {unit: round(c) for unit, c in cycles.items() if c},
    }


def _shared_bits(instruction: machine_code.Instruction) -> int:
    if found := re.match(r"(?:LDSM|STSM).*\.([1248])$", instruction.opcode):
        return 32 * int(found[1])  # 8x8 matrices of 16 bits, one register of a lane for each
    return machine_code.access_bits(instruction)


def wants_matrix(ttir: str) -> bool:
    """Whether the kernel multiplies tiles of 16-bit types. (Exact float32 products do not use the matrix unit.)"""
    return re.search(r"tt\.dot\b.*: tensor<\w+x(bf16|f16)>", ttir) is not None


# A kernel may spill one register, a store and a load. Without that, the forward of disentangled attention in float32
# would leave half as many warps on a multiprocessor (head_dim 32, sm_90).
FEW_SPILLS = 2


def judge(report: Report, case: CompileCase, arch: Arch) -> list[str]:
    """The reasons why this kernel must not be released; empty if there are none."""
    failures = []
    if report.spills > FEW_SPILLS:
        failures.append(f"spills ({report.spills})")
    if report.shared > arch.shared_per_cta:
        failures.append(f"shared memory {report.shared} > {arch.shared_per_cta}")
    if report.hazards:
        failures.append(f"registers of asynchronous products touched before the wait ({len(report.hazards)}): "
                        f"{report.hazards[0]}")  # fmt: skip
    if report.transposed_products:
        failures.append(f"left operands that are transposed results of products ({report.transposed_products})")
    if report.wants_matrix and not re.match(arch.matrix, report.matrix_opcode):
        failures.append(f"no matrix instructions ({arch.matrix}), found {report.matrix_opcode or 'none'}")
    if case.bulk_copy and arch.target[0] == "cuda" and arch.target[1] >= 90 and not report.bulk_copies:
        failures.append(f"no bulk copies ({arch.bulk_copy})")
    # in a warp of 64 lanes (AMD) a lane loads half as much, so the check does not apply
    if case.wide_loads and arch.target[0] == "cuda" and report.widest_load < 128:
        failures.append(f"loads of {report.widest_load} bits a lane at most")
    return failures


# ---- all of them -----------------------------------------------------------------------------------------


Task = tuple[CompileCase, str, str]  # case, module, architecture


def report_all(tasks: list[Task], jobs: int, progress: bool = False) -> list[Report]:
    """A report for each task, in order. Tasks run in worker processes, so a crash of the compiler costs one case."""
    from tqdm import tqdm

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(sorted({case.kernel.split(":")[0] for case, _, _ in tasks}))
    reports: dict[int, Report] = {}
    with tqdm(total=len(tasks), unit="kernel", disable=not progress, leave=False) as bar:
        try:
            with ProcessPoolExecutor(jobs, mp_context=context) as pool:
                futures = {pool.submit(report_one, *task): n for n, task in enumerate(tasks)}
                for future in as_completed(futures):
                    reports[futures[future]] = future.result()
                    bar.update()
        except BrokenProcessPool:
            for n in sorted(set(range(len(tasks))) - set(reports)):
                reports[n] = _report_alone(tasks[n], context)
                bar.update()
    return [reports[n] for n in range(len(tasks))]


def _report_alone(task: Task, context) -> Report:
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(report_one, *task).result()
        except BrokenProcessPool:
            case, module, arch = task
            return Report(module, case.name, arch, error="the compiler aborted", failures=["does not compile"])


# ---- output ----------------------------------------------------------------------------------------------

COLUMNS = ("kernel", "regs", "spills", "shared", "CTAs", "warps", "bound by", "matrix", "bulk", "load", "verdict")


def _row(r: Report) -> tuple[str, ...]:
    if r.error:
        return (r.name, *["-"] * (len(COLUMNS) - 2), f"FAIL {r.error}")
    return (
        r.name, str(r.registers), str(r.spills), f"{r.shared / KB:.1f}K", str(r.ctas_per_sm), str(r.warps_per_sm),
        r.limit, f"{r.matrix} {r.matrix_opcode}".strip() if r.matrix else "-", str(r.bulk_copies or "-"),
        str(r.widest_load or "-"), "FAIL " + "; ".join(r.failures) if r.failures else "ok",
    )  # fmt: skip


def _loop_line(loop: dict[str, Any]) -> str:
    def counts(of: dict[str, int]) -> str:
        return f"{of['total']}: " + ", ".join(f"{what} {n}" for what, n in of.items() if what != "total")

    sometimes = f"; under conditions {counts(loop['sometimes'])}" if loop["sometimes"]["total"] else ""
    cycles = ", ".join(f"{unit} {n}" for unit, n in loop["cycles"].items())
    return f"loop of {counts(loop['mix'])}{sometimes}; cycles a CTA at least: {cycles}"


def format_reports(reports: list[Report], markdown: bool = False) -> str:
    """A table for each architecture, with the inner loops under each kernel."""
    lines = []
    for arch in dict.fromkeys(r.arch for r in reports):
        header = (arch, *COLUMNS[1:])
        rows = [(_row(r), [_loop_line(loop) for loop in r.loops]) for r in reports if r.arch == arch]
        if markdown:
            lines.append("| " + " | ".join((*header, "inner loops")) + " |")
            lines.append("|" + " --- |" * (len(COLUMNS) + 1))
            lines += [
                "| " + " | ".join((*row, "<br>".join(loops) or "-")).replace("\n", " ") + " |" for row, loops in rows
            ]
        else:
            widths = [max(len(row[c]) for row in (header, *(row for row, _ in rows))) for c in range(len(COLUMNS) - 1)]
            for row, loops in ((header, []), *rows):
                cells = [cell.ljust(w) for cell, w in zip(row, widths, strict=False)]
                lines.append("  ".join((*cells, row[-1])).rstrip())
                lines += [f"    {loop}" for loop in loops]
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inspection.compile_report", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--arch", default=",".join(DEFAULT_ARCHES), help=f"of {', '.join(ARCHES)} (default: %(default)s)"
    )
    parser.add_argument(
        "--fast", action="store_true", help="only the fixed subset that continuous integration compiles"
    )
    parser.add_argument("--kernel", default="", metavar="SUBSTRING", help="only kernels whose name contains this")
    parser.add_argument("--module", action="append", metavar="NAME", help="compile the calls of this module instead")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="worker processes (default: all cores)")
    parser.add_argument("--json", metavar="FILE", help="also write the reports as JSON (- for standard output)")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    args = parser.parse_args(argv)
    arches = args.arch.split(",")
    if unknown := [a for a in arches if a not in ARCHES]:
        parser.error(f"unknown architecture {', '.join(unknown)}; known: {', '.join(ARCHES)}")
    if importlib.util.find_spec("triton") is None:
        print("compile_report needs triton, which is not installed here", file=sys.stderr)
        return 2
    if os.environ.get("TRITON_INTERPRET"):
        # With TRITON_INTERPRET set at import, @triton.jit makes functions that cannot be compiled.
        print("TRITON_INTERPRET is set: starting again without it", file=sys.stderr)
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        arguments = sys.argv[1:] if argv is None else argv
        return subprocess.call(
            [sys.executable, "-m", "benchmarks.inspection.compile_report", *arguments], env=environment
        )

    modules, missing = (args.module, []) if args.module else kernel_modules()
    tasks, failed, known = [], [], set()
    for module in modules:
        for arch in arches:
            cases, errors = cases_of(module, arch, args.fast)
            for name, error in errors.items():
                failed.append(Report(module.rsplit(".", 1)[-1], name, arch, _reason(error)))
                failed[-1].failures = ["is refused"]
            for case in cases:
                if args.kernel in case.name and (what := (arch, *case.bound)) not in known:
                    known.add(what)  # modules share kernels; each variant is compiled only once
                    tasks.append((case, module.rsplit(".", 1)[-1], arch))
    tasks.sort(key=lambda task: arches.index(task[2]))
    reports = failed + report_all(tasks, args.jobs, progress=sys.stderr.isatty())

    to_stdout = args.json == "-"
    assemblers = {arch: assembler(arch) for arch in arches if ARCHES[arch].target[0] == "cuda"}
    if args.json:
        import triton

        document = {"triton": triton.__version__, "assemblers": assemblers, "missing": missing}
        document["kernels"] = [asdict(r) for r in reports]
        text = json.dumps(document, indent=1) + "\n"
        sys.stdout.write(text) if to_stdout else Path(args.json).write_text(text)
    if not to_stdout:
        print(format_reports(reports, args.markdown))
    if missing:
        print(f"not there yet: {', '.join(missing)}", file=sys.stderr)
    bad = [r for r in reports if r.failures]
    for r in bad:
        print(f"FAIL {r.arch} {r.name}: {r.error or '; '.join(r.failures)}", file=sys.stderr)
    for assembled_by in dict.fromkeys(assemblers.values()):
        by_it = ", ".join(arch for arch, name in assemblers.items() if name == assembled_by)
        print(f"{by_it}: {assembled_by}", file=sys.stderr)
    print(f"{len(reports)} kernels, {len(bad)} failed", file=sys.stderr)
    return 1 if bad or not reports else 0


if __name__ == "__main__":
    sys.exit(main())
