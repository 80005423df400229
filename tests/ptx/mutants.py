"""Mutants of compiled kernels: does the emulator notice when one step of a program is missing?

    python tests/ptx/mutants.py                                    five kernels, every mutant: `make ptx-mutants`
    python tests/ptx/mutants.py --kernel layer_norm --kind fence   some of them
    python tests/ptx/mutants.py --every 20                         each twentieth

Each barrier, wait, fence, commit, mask and address step of a kernel's PTX is removed, one at a time, and the kernel
runs again with the arguments of its launch. A mutant is noticed if the emulator raises an error, or if an output
differs from that of the whole program by more than the rounding of float16, which is about what the operators' tests
allow. A mutant is idle, and does not count, if its step changed nothing in this run: a mask that was true everywhere, a
multiple of zero, an address that differs only where any number would do, a commit without which every wait finds the
same copies done. The other mutants are printed, a line for each. Exits with 1 if fewer than 95% are noticed.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastbert import functional, testing
from fastbert.emulator.copies import AsyncCopies
from fastbert.emulator.driver import Launch, offline
from fastbert.emulator.errors import EmulatorError, Trap
from fastbert.emulator.flow import destinations, registers
from fastbert.emulator.launch import execute
from fastbert.emulator.ptx import (
    Address,
    Instruction,
    Program,
    Register,
    Special,
    TensorAddress,
    Vector,
    parse,
)
from fastbert.emulator.warpgroup import MatrixQueue
from fastbert.kernels import _gemm

GOAL = 0.95
TOLERANCE = 2**-11  # relative RMS: the rounding of float16
KINDS = ("barrier", "wait", "fence", "commit", "mask", "address")


# ---- the kernels -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    arch: str
    kernel: str  # name of the @triton.jit function
    call: Callable[[], object]  # launches it


def _attention() -> object:
    """All gradients of padded attention. Padding is NaN, and no output may be."""
    inputs = testing.attention_padded_inputs(_ATTENTION, _LENGTHS)
    padding = torch.arange(max(_LENGTHS)) >= inputs["seqlens"][:, None]
    q, k, v = (inputs[name].half().masked_fill_(padding[..., None, None], float("nan")) for name in "qkv")
    leaves = [t.requires_grad_() for t in (q, k, v)]
    o = functional.attention_padded(*leaves, inputs["seqlens"], impl="triton")
    do = torch.randn(o.shape, dtype=torch.float16, device="cpu")
    return torch.autograd.grad(o, leaves, do.masked_fill_(padding[..., None, None], float("nan")))


def _layer_norm() -> object:
    return testing.run_op("add_layer_norm", testing.norm_inputs(_NORM, (9,), dropout_p=0.1), torch.float16)


def _embedding() -> object:
    """The last row of the table of words is used, so that a wrong address lies beyond the table."""
    inputs = testing.embedding_inputs(_NORM, (150,), dropout_p=0.1)
    inputs["input_ids"] = _NORM.vocab - 1 - inputs["input_ids"]
    return testing.run_op("embedding_layer_norm", inputs, torch.float16)


def _product() -> object:
    """Reads operands by bulk copies, writes the result by plain stores."""
    x, weight = torch.randn(150, 200, dtype=torch.float16), torch.randn(328, 200, dtype=torch.float16)
    return _gemm.linear(x, weight)


# No block divides the widths, so that masks matter. There are several heads and sequences, so that strides matter. The
# first sequence almost fills its last block, so that all addresses there count; the last sequence has a single row in
# its last block. There are more blocks than stages, so that copies overwrite what was read.
_LENGTHS = (319, 257)
_ATTENTION = testing.ModelShape(128, 2, 256, 1)
_NORM = testing.ModelShape(1100, 2, 128, 1, vocab=16)
SUBJECTS = {
    "attention_fwd": Subject("sm_90", "_attention_fwd_kernel", _attention),
    "attention_bwd": Subject("sm_90", "_attention_bwd_dkv_kernel", _attention),
    "product": Subject("sm_90", "_linear_act_kernel", _product),
    "layer_norm": Subject("sm_80", "_add_norm_bwd_kernel", _layer_norm),
    "embedding": Subject("sm_80", "_embedding_bwd_kernel", _embedding),
}


class Recorded:
    """One launch of a subject's kernel, with what its tensors held before and after."""

    def __init__(self, subject: Subject):
        self._subject = subject
        self.launch: Launch | None = None
        with offline(subject.arch, self._on_launch):
            subject.call()
        if self.launch is None:
            raise ValueError(f"the call launches no {subject.kernel}")

    def _on_launch(self, launch: Launch) -> None:
        if launch.name != self._subject.kernel or self.launch is not None:
            execute(launch)
            return
        self.launch = launch
        given = [value for _, value in launch.arguments.values()]
        self._tensors = [getattr(value, "base", value) for value in given if not isinstance(value, int | float)]
        self._before = [tensor.detach().clone() for tensor in self._tensors]
        x, y, z = launch.grid
        # a mutant that never ends is stopped after eight times the average of a program
        self._limit = 8 * execute(launch) // (x * y * z * launch.num_warps)
        self._after = [tensor.detach().clone() for tensor in self._tensors]

    @property
    def ptx(self) -> str:
        return self.launch.compiled.asm["ptx"]

    def run(self, ptx: str) -> None:
        """Raises EmulatorError."""
        for tensor, before in zip(self._tensors, self._before, strict=True):
            tensor.detach().copy_(before)
        execute(self.launch, ptx, self._limit)

    def notices(self, ptx: str) -> str | None:
        """How the emulator finds the program wrong, or None."""
        try:
            self.run(ptx)
        except EmulatorError as error:
            return type(error).__name__
        worst = max(_distance(a, b) for a, b in zip(self._tensors, self._after, strict=True))
        return None if worst <= TOLERANCE else "wrong result"

    def is_idle(self, mutant: Mutant) -> bool:
        """Whether the step that a mutant lacks changes nothing in this run."""
        if mutant.kind == "commit":
            with in_flight() as without:
                self.run(mutant.of(self.ptx))
            with in_flight() as whole:
                self.run(self.ptx)
            return without == whole
        if mutant.probe is None:
            return False
        try:
            self.run(mutant.of(self.ptx, mutant.probe))
        except Trap:
            return mutant.wild is not None and self.notices(mutant.of(self.ptx, mutant.wild)) is None
        return True


@contextlib.contextmanager
def in_flight() -> Iterator[list]:
    """A list that grows by what is still in flight after each wait for copies or products inside the block."""
    seen: list[list] = []
    before = AsyncCopies.wait, MatrixQueue.wait

    def wait_copies(unit, S, *rest):
        before[0](unit, S, *rest)
        seen.append([int(copy.pending.sum()) for copy in unit._copies])

    def wait_products(unit, S, *rest):
        before[1](unit, S, *rest)
        seen.append([(registers, int(one.flying.sum())) for registers, one in unit.flying.items()])

    AsyncCopies.wait, MatrixQueue.wait = wait_copies, wait_products
    try:
        yield seen
    finally:
        AsyncCopies.wait, MatrixQueue.wait = before


def _distance(found: Tensor, expected: Tensor) -> float:
    """Relative RMS. Infinite unless the same elements are finite."""
    found, expected = found.detach().double(), expected.double()
    if not torch.equal(found.isfinite(), expected.isfinite()):
        return float("inf")
    found, expected = found.nan_to_num(0, 0, 0), expected.nan_to_num(0, 0, 0)
    return float((found - expected).norm() / expected.norm().clamp_min(1e-300))


# ---- the mutants -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutant:
    kind: str  # one of KINDS
    instruction: Instruction
    after: str  # replaces the instruction
    probe: str | None = None  # replaces it, and traps where the step changes something
    wild: str | None = None  # replaces it, and gives a number that is no address where the step changes something

    def of(self, ptx: str, statement: str | None = None) -> str:
        """The program with the instruction replaced by `statement`, or by `after`."""
        lines = ptx.splitlines(keepends=True)
        before, rest = "".join(lines[: self.instruction.line - 1]), "".join(lines[self.instruction.line - 1 :])
        pattern = r"\s+".join(re.escape(word) for word in self.instruction.text.split())
        changed, count = re.subn(pattern, lambda _: self.after if statement is None else statement, rest, count=1)
        if count != 1:
            raise ValueError(f"line {self.instruction.line} does not read {self.instruction.text}")
        return before + changed

    def __str__(self) -> str:
        return f"{self.kind}, line {self.instruction.line}: {self.instruction.text}  ->  {self.after or 'nothing'}"


def mutants_of(program: Program) -> list[Mutant]:
    steps = {id(i) for i in _address_steps(program)}
    found = [m for i in program.instructions for m in _mutants(i, id(i) in steps)]
    return sorted(found, key=lambda mutant: KINDS.index(mutant.kind))


def _mutants(i: Instruction, is_address_step: bool) -> Iterator[Mutant]:
    if i.name == "bar":
        yield Mutant("barrier", i, "")
    elif i.name == "fence" or i.opcode.startswith("wgmma.fence"):
        yield Mutant("fence", i, "")
    elif ".wait_group" in i.opcode or i.opcode == "cp.async.wait_all":
        yield Mutant("wait", i, "")
    elif i.opcode.startswith("mbarrier.try_wait"):
        yield Mutant("wait", i, f"mov.pred {i.operands[0].name}, -1")
    elif ".commit_group" in i.opcode:
        yield Mutant("commit", i, "")
    yield from _masks(i)
    if is_address_step and (reduced := _without_step(i)) is not None:
        target, (after, probe) = i.operands[0], reduced
        number = 0x7EDCBA98765432F1 >> (64 - target.width)
        yield Mutant("address", i, after, probe, probe.replace("trap", f"mov.b{target.width} {target.name}, {number}"))
    for operand in i.operands:
        if isinstance(operand, Address) and operand.offset and isinstance(operand.base, Register):
            pattern = rf"(\[\s*{re.escape(operand.base.name)}\s*)\+\s*-?\w+"
            yield Mutant("address", i, re.sub(pattern, r"\1", i.text))


def _masks(i: Instruction) -> Iterator[Mutant]:
    """Mutants without a memory access's guard, without a copy's size 0, and with a constant for a selected value."""
    if i.guard is not None and i.name in ("ld", "st", "red", "atom", "cp", "mbarrier"):
        register, negated = i.guard
        bare = i.text.partition(" ")[2]
        opposite = "" if negated else "!"
        yield Mutant("mask", i, bare, f"@{opposite}{register.name} trap; {i.text}")
    if i.opcode.startswith("cp.async.c") and len(i.operands) == 4 and isinstance(i.operands[3], Register):
        size, name = i.operands[2].value, i.operands[3].name
        probe = f"{{ .reg .pred mutated; setp.ne.u32 mutated, {name}, {size}; @mutated trap; }} {i.text}"
        yield Mutant("mask", i, f"{i.text.rpartition(',')[0]}, {size}", probe)
    if i.name == "selp":
        target, *choices, _ = i.operands
        kept = [c for c in choices if isinstance(c, Register)]
        if len(kept) == 1:
            yield Mutant("mask", i, *_replaced(i, target, kept[0]))


# Opcodes whose result is an address with something added to it, or a part of one.
_STEPS = ("add", "sub", "mul", "mad", "shl", "shr", "and", "or", "xor", "bfe", "bfi", "div", "rem", "min", "max")
_FLOATS = ("f16", "bf16", "f32", "f64", "f16x2", "bf16x2", "f32x2", "pred")


def _address_steps(program: Program) -> list[Instruction]:
    """The instructions that compute an address, a matrix descriptor or a coordinate from special registers, parameters
    and loaded values."""
    writers: dict[int, list[Instruction]] = {}
    for i in program.instructions:
        for register in destinations(i):
            writers.setdefault(register.index, []).append(i)
    todo = [r for i in program.instructions for operand in _addresses(i) for r in registers(operand)]
    seen, steps = set(), {}
    while todo:
        register = todo.pop()
        if register.index in seen:
            continue
        seen.add(register.index)
        for i in writers.get(register.index, ()):
            if i.name in ("ld", "setp") or i.type in _FLOATS:
                continue
            if i.name in _STEPS:
                steps[id(i)] = i
            todo += [r for operand in i.operands[1:] for r in registers(operand) if r.width > 1]
    return list(steps.values())


def _addresses(i: Instruction) -> Iterator[object]:
    yield from (o for o in i.operands if isinstance(o, Address | TensorAddress))
    if i.opcode.startswith("wgmma.mma_async"):
        yield from (o for o in i.operands[1:3] if not isinstance(o, Vector))


def _without_step(i: Instruction) -> tuple[str, str] | None:
    """The instruction replaced by one of its operands, and a probe."""
    target, *given = i.operands
    if i.name == "mad":
        given = given[2:]
    kept = next((o for o in given if isinstance(o, Register | Special)), None)
    return None if kept is None or not isinstance(target, Register) else _replaced(i, target, kept)


def _replaced(i: Instruction, target: Register, kept: Register | Special) -> tuple[str, str]:
    """The instruction replaced by a copy of one operand, and a probe that traps where the two differ."""
    width = kept.width if isinstance(kept, Register) else 32
    sign = "s" if any(part.startswith("s") for part in i.parts[1:]) else "u"
    copies = f"mov.b{width}" if width == target.width else f"cvt.{sign}{target.width}.{sign}{width}"
    probe = (
        f"{{ .reg .pred mutated; .reg .b{target.width} without; {copies} without, {kept.name}; {i.text}; "
        f"setp.ne.u{target.width} mutated, without, {target.name}; @mutated trap; }}"
    )
    return f"{copies} {target.name}, {kept.name}", probe


# ---- the run -----------------------------------------------------------------------------------------------


@dataclass
class Report:
    noticed: Counter  # (kind, how) -> mutants
    unnoticed: list[Mutant]
    idle: Counter  # kind -> mutants

    @property
    def share(self) -> float:
        counted = self.noticed.total() + len(self.unnoticed)
        return 1.0 if counted == 0 else self.noticed.total() / counted

    def lines(self) -> Iterator[str]:
        missed = Counter(mutant.kind for mutant in self.unnoticed)
        for kind in KINDS:
            how = {h: n for (k, h), n in sorted(self.noticed.items()) if k == kind}
            if how or missed[kind] or self.idle[kind]:
                ways = ", ".join(f"{h} {n}" for h, n in how.items())
                yield f"  {kind:8} {sum(how.values()):4} noticed {missed[kind]:3} not {self.idle[kind]:3} idle   {ways}"
        for mutant in self.unnoticed:
            yield f"  not noticed: {mutant}"


def examine(subject: Subject, kinds: tuple[str, ...] = KINDS, every: int = 1) -> Report:
    recorded = Recorded(subject)
    report = Report(Counter(), [], Counter())
    wanted = [m for m in mutants_of(parse(recorded.ptx)) if m.kind in kinds]
    for mutant in wanted[::every]:
        how = recorded.notices(mutant.of(recorded.ptx))
        if how is not None:
            report.noticed[mutant.kind, how] += 1
        elif recorded.is_idle(mutant):
            report.idle[mutant.kind] += 1
        else:
            report.unnoticed.append(mutant)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", choices=SUBJECTS, action="append", help="only this one")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only mutants of this kind")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each N-th mutant only")
    arguments = parser.parse_args()
    noticed = counted = 0
    for name in arguments.kernel or SUBJECTS:
        began = time.process_time()
        report = examine(SUBJECTS[name], tuple(arguments.kind or KINDS), arguments.every)
        noticed += report.noticed.total()
        counted += report.noticed.total() + len(report.unnoticed)
        print(f"{name} ({SUBJECTS[name].arch}): {report.share:.1%}, {time.process_time() - began:.0f} s of CPU")
        print(*report.lines(), sep="\n", flush=True)
    share = noticed / counted if counted else 1.0
    print(f"{noticed} of {counted} noticed, {share:.1%}")
    return 0 if share >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
