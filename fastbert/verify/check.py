"""`fastbert verify`: every operator on this machine, held to the reference.

Each operator runs its cases forward and backward in each dtype, against the specification in float64. The error
allowed is twice that of plain torch in the same dtype (see `testing`). A row tells the worst tensor of an operator,
dtype and direction: the one that comes closest to its budget, or passes it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import functional, verify_jobs
from .kernels import _device
from .kernels._assembler import assembler
from .testing import INPUTS, MODELS, Check, ModelShape, allowed_factor, check_op

# operator -> case -> options of its inputs; together they touch every branch a kernel has
CASES: dict[str, dict[str, dict]] = {
    "attention": {
        "plain": {},
        "dropout": {"dropout_p": 0.1},
        "bias": {"bias": True, "mask": True},
        "local": {"window": (24, 40), "rotary": True},
        "alibi": {"alibi": True, "return_lse": True},
        "grouped": {"kv_heads": 1},
        "cross": {"cross": True},
    },
    "attention_padded": {
        "plain": {},
        "dropout": {"dropout_p": 0.1, "bias": True},
    },
    "add_layer_norm": {
        "plain": {"residual": False},
        "dropout": {"x_bias": True, "dropout_p": 0.1},
    },
    "add_layer_norm_sum": {"dropout": {"x_bias": True, "dropout_p": 0.1}},
    "add_rms_norm": {"dropout": {"x_bias": True, "dropout_p": 0.1}},
    "linear_act": {activation: {"activation": activation} for activation in functional.ACTIVATIONS},
    "feed_forward": {
        "gelu": {},
        "geglu": {"activation": "geglu"},
        "recompute": {"recompute": True, "down_bias": False},
    },
    "embedding_layer_norm": {
        "plain": {},
        "dropout": {"dropout_p": 0.1, "padding_idx": 0},
    },
    "linear_cross_entropy": {
        "mean": {},
        "smooth": {"label_smoothing": 0.1, "reduction": "sum"},
        "rows": {"reduction": "none", "bias": False},
    },
    "pool": {
        "mean": {"mode": "mean"},
        "cls": {"mode": "cls", "normalize": True},
        "max": {"mode": "max"},
    },
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# (model, lengths): packed as they are, or padded to the longest, as the operator takes them. Small is for the
# interpreter, which takes seconds where a GPU takes microseconds; real is BERT's, from 1 to 4,096 tokens.
SMALL = ((MODELS["tiny"], (5, 70, 0, 1, 33)),)
REAL = (
    (MODELS["base"], (128, 512, 1, 0, 77, 300)),
    (MODELS["large"], (512, *(128,) * 8)),
    (MODELS["base"], (4096, 64)),
)
# The reference holds the scores of a long sequence in float64, several times: on GPUs with less, only four heads.
ROOMY = 40 * 2**30
NARROW = ModelShape(hidden=256, heads=4, intermediate=1024, layers=1)
# Recorded on cards and replayed by the emulator: the real widths' tiles, in minutes.
MEDIUM = (*SMALL, (ModelShape(hidden=768, heads=12, intermediate=1024, layers=1, vocab=1000), (5, 150, 0, 45)))
SHAPES = ("auto", "small", "medium", "real")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")  # that the emulator knows
LONG = 1024  # no additive bias for sequences beyond this: the reference would hold it in float64, several times


@dataclass(frozen=True)
class Task:
    """One case of an operator in one dtype at one shape: what a process is given to check."""

    op: str
    dtype: str
    case: str  # of CASES[op]
    model: ModelShape
    lengths: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.case}, {self.model.hidden} wide, {sum(self.lengths)} tokens"

    def inputs(self) -> dict:
        return _inputs(self.op, self.model, self.lengths, **CASES[self.op][self.case])

    @property
    def needs(self) -> int:
        """Bytes of the device that it may take, by measurements of the float64 reference and its gradients."""
        m, tokens = self.model, sum(self.lengths)
        if self.op.startswith("attention"):
            scores = m.heads * sum(n * n for n in self.lengths)
            elements = 4 * tokens * m.hidden + scores * (2 if "bias" in CASES[self.op][self.case] else 1)
        else:
            elements = tokens * (4 * m.hidden + 3 * m.intermediate) + m.vocab * m.hidden
            elements += tokens * m.vocab if self.op == "linear_cross_entropy" else 0
        return 64 * elements + 2**30


@dataclass(frozen=True)
class Result:
    """What came of a task: a check a tensor, or in `message` why there are none."""

    task: Task
    checks: tuple[Check, ...] = ()
    seconds: float = 0.0
    message: str = ""

    @property
    def passed(self) -> bool:
        return not self.message and all(check.passed for check in self.checks)

    def as_json(self) -> dict:
        """JSON has no NaN and no infinity: null."""
        t = self.task
        checks = [{**asdict(c), "passed": c.passed} for c in self.checks]
        return {
            "op": t.op, "dtype": t.dtype, "case": t.case, "hidden": t.model.hidden, "heads": t.model.heads,
            "lengths": list(t.lengths), "passed": self.passed, "seconds": round(self.seconds, 3),
            "message": self.message, "checks": [{k: _plain(v) for k, v in c.items()} for c in checks],
        }  # fmt: skip


@dataclass(frozen=True)
class Row:
    """The worst tensor of one operator, dtype and direction; where the operator raised, what it said."""

    op: str
    dtype: str
    direction: str  # "forward" or "backward"
    case: str  # "dropout, 768 wide, 4160 tokens"
    tensor: str  # "out", "dq", ...
    error: float
    budget: float
    passed: bool
    message: str = ""


def verify(
    ops: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    device: str | torch.device | None = None,
    impl: str = "triton",
    shapes: str = "auto",
) -> list[Row]:
    """Two rows (forward, backward) for each operator and dtype, all of them by default.

    Args:
        ops: names in `CASES`; dtypes: names in `DTYPES`; device: by default the GPU, if there is one.
        impl: which implementation is held to the reference; "triton" on a CPU needs TRITON_INTERPRET=1.
        shapes: "real", BERT-base and -large, 1 to 4,096 tokens a sequence; "small"; "auto" is real on a GPU.
    """
    device = _pick(device)
    found = [check(task, device, impl) for task in tasks(ops or tuple(CASES), dtypes or tuple(DTYPES), device, shapes)]
    return worst(found)


def _pick(device: str | torch.device | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _shapes(name: str, device: torch.device) -> tuple[tuple[ModelShape, tuple[int, ...]], ...]:
    if name not in SHAPES:
        raise ValueError(f"shapes must be one of {', '.join(SHAPES)}, got {name!r}")
    if name == "small" or (name == "auto" and device.type != "cuda"):
        return SMALL
    if name == "medium":
        return MEDIUM
    memory = torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else 0
    return tuple((NARROW if max(n) > LONG and memory < ROOMY else model, n) for model, n in REAL)


def tasks(ops: Sequence[str], dtypes: Sequence[str], device: torch.device, shapes: str = "auto") -> list[Task]:
    """All there is to check, dtype by dtype."""
    return [
        Task(op, dtype, case, model, lengths)
        for dtype in dtypes
        for op in ops
        for model, lengths in _shapes(shapes, device)
        for case, options in CASES[op].items()
        if not (max(lengths) > LONG and "bias" in options)
    ]


def check(task: Task, device: torch.device, impl: str) -> Result:
    """Checks one task here."""
    return result_of(
        task,
        lambda: check_op(
            task.op, task.inputs(), DTYPES[task.dtype], device, impl=impl, factor=factor_of(task.dtype, impl)
        ),
    )


def factor_of(dtype: str, impl: str) -> float:
    """How many times plain torch's error an implementation may make in this dtype."""
    return allowed_factor(DTYPES[dtype]) if impl == "triton" else 2.0


def result_of(task: Task, checks: Callable[[], Iterable[Check]]) -> Result:
    """What `checks()` gives. An operator that raises has failed, and that is its result."""
    began, found, message = time.perf_counter(), (), ""
    try:
        found = tuple(checks())
    except Exception as error:
        message = f"{type(error).__name__}: {error}".splitlines()[0]
    return Result(task, found, time.perf_counter() - began, message)


def worst(results: Iterable[Result]) -> list[Row]:
    """Of each operator and dtype, in the order of CASES, the rows of both directions."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.task.op, result.task.dtype), []).append(result)
    ops = tuple(CASES)
    return [row for key in sorted(groups, key=lambda key: ops.index(key[0])) for row in _rows(groups[key])]


def _rows(results: Sequence[Result]) -> list[Row]:
    """The two rows of one operator and dtype: those that raised are the worst."""
    op, dtype = results[0].task.op, results[0].task.dtype
    raised = next((result for result in results if result.message), None)
    if raised is not None:
        nothing = (str(raised.task), "", float("nan"), float("nan"), False, raised.message)
        return [Row(op, dtype, direction, *nothing) for direction in ("forward", "backward")]
    found: dict[str, tuple[str, Check]] = {}
    for result in results:
        for check in result.checks:
            direction = "forward" if check.name.startswith("out") else "backward"
            if direction not in found or _badness(check) > _badness(found[direction][1]):
                found[direction] = (str(result.task), check)
    return [
        Row(op, dtype, direction, case, check.name, check.error, check.budget, check.passed)
        for direction, (case, check) in found.items()
    ]


def _inputs(op: str, model: ModelShape, lengths: Sequence[int], *, cross: bool = False, **options) -> dict:
    if cross:  # keys and values of other lengths than the queries
        options["lengths_k"] = lengths[::-1]
    return INPUTS[op](model, lengths, **options)


def _badness(check: Check) -> float:
    return check.error / check.budget


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- command line ----------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastbert verify`."""
    parser.add_argument("--op", action="append", choices=tuple(CASES), help="only this operator; may be repeated")
    parser.add_argument("--dtype", action="append", choices=tuple(DTYPES), help="only this dtype; may be repeated")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the GPU, if there is one)")
    parser.add_argument(
        "--impl", choices=("triton", "native"), default="triton", help="what is held to the reference (default: triton)"
    )
    parser.add_argument(
        "--shapes", choices=SHAPES, default="auto",
        help="real: BERT-base and -large, 1 to 4,096 tokens a sequence; medium: base's width, 200 tokens; small; "
        "default auto: real on a GPU, medium with --record on one",
    )  # fmt: skip
    parser.add_argument(
        "--emulate", metavar="ARCH", choices=ARCHITECTURES,
        help="without a GPU: compile the kernels for this architecture (sm_90, ...), and execute them on the CPU",
    )  # fmt: skip
    files = parser.add_mutually_exclusive_group()
    files.add_argument(
        "--record", metavar="FILE", type=Path, help="also save the inputs and outputs of every case there (safetensors)"
    )
    files.add_argument(
        "--replay", metavar="FILE", type=Path,
        help="take the cases of this recording, and hold what is computed here against what was recorded",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--json-lines", metavar="FILE", type=Path, help="append a line of JSON there for each case, once it is known"
    )
    parser.add_argument(
        "--jobs", metavar="N", type=int,
        help="share the cases among N processes; one that crashes, or loses the GPU, costs only its own case",
    )  # fmt: skip
    parser.add_argument(
        "--case-seconds",
        metavar="S",
        type=float,
        default=300.0,
        help="with --jobs: a case that takes longer has failed, and its process is ended (default: 300)",
    )


def run(args: argparse.Namespace) -> int:
    """Verify and print; 0 where all passed, 1 on any failure, 2 where nothing can run."""
    if refusal := _refusal(args):
        print(f"fastbert verify: {refusal}", file=sys.stderr)
        return 2
    if args.emulate and _device.INTERPRETING:
        return _again(args, interpreting=False)
    with _emulation(args.emulate):
        try:
            device = torch.device("cpu") if args.emulate else _pick(args.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
            print(f"fastbert verify: device {args.device!r}: {str(error).splitlines()[0]}", file=sys.stderr)
            return 2
        if args.impl == "triton" and functional.why_not_triton(device):
            return _again(args, interpreting=True)
        return _run(args, device)


def _refusal(args: argparse.Namespace) -> str | None:
    """Why these arguments cannot be run at all, if so."""
    if args.impl == "triton" and not _device.HAS_TRITON:
        return "triton is not installed; --impl native checks the CPU operators"
    if args.emulate and args.impl != "triton":
        return f"--emulate executes Triton kernels; --impl {args.impl} has none"
    if args.emulate and args.device not in (None, "cpu"):
        return f"--emulate computes on the CPU, not on --device {args.device}"
    if args.jobs is not None and args.jobs < 1:
        return f"--jobs must be at least 1, got {args.jobs}"
    if args.jobs is not None and (args.record or args.replay):
        return "--record and --replay take one process, without --jobs"
    return None


def _emulation(arch: str | None) -> contextlib.AbstractContextManager:
    if arch is None:
        return contextlib.nullcontext()
    from .emulator import emulated

    return emulated(arch)


def _run(args: argparse.Namespace, device: torch.device) -> int:
    ops, dtypes = args.op or tuple(CASES), args.dtype or tuple(DTYPES)
    notes, recorder, replayed = [], None, None
    if args.replay:
        from . import recording

        try:
            recorded = recording.Recording(args.replay)
        except ValueError as error:
            print(f"fastbert verify: {error}", file=sys.stderr)
            return 2
        replayed = recording.Replay(recorded, device, args.impl)
        work = recorded.tasks(ops, dtypes)
    else:
        shapes = "medium" if args.record and args.shapes == "auto" and device.type == "cuda" else args.shapes
        work = tasks(ops, dtypes, device, shapes)
    if args.record:
        from . import recording

        recorder = recording.Recorder(device, args.impl)
    found = _run_with_progress(work, device, args, recorder or replayed)
    rows = worst(found)
    notes += _notes(device, args, rows)
    if recorder:
        recorder.save(args.record)
        notes.append(f"Recorded in {args.record}: {recording.describe(recording.environment(device, args.impl))}")
    if replayed:
        notes.append(f"Recorded: {recording.describe(recorded.environment)}")
        notes.append(f"Of {replayed.tensors} tensors {replayed.same} have the bits of the recording.")
    whole = len(found) == len(work)
    if not whole:
        notes.append("Interrupted: this is not all.")
    if args.json:
        print(json.dumps({"device": _describe(device), "impl": args.impl, "notes": notes} | _results(rows), indent=1))
    else:
        print(f"{args.impl} on {_describe(device)}")
        print("\n".join(notes))
        print(format_rows(rows))
    return 0 if whole and all(row.passed for row in rows) else 1


def _again(args: argparse.Namespace, interpreting: bool) -> int:
    """The same in another process, whose Triton interprets kernels or compiles them: settled when it is imported."""
    command = [sys.executable, "-m", "fastbert.verify", "--device", "cpu", "--impl", args.impl, "--shapes", args.shapes]
    command += [word for op in args.op or () for word in ("--op", op)]
    command += [word for dtype in args.dtype or () for word in ("--dtype", dtype)]
    command += ["--json"] if args.json else []
    command += [] if args.jobs is None else ["--jobs", str(args.jobs), "--case-seconds", str(args.case_seconds)]
    for name in ("emulate", "record", "replay", "json_lines"):
        if (value := getattr(args, name)) is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    return subprocess.call(command, env=os.environ | {"TRITON_INTERPRET": str(int(interpreting))})


def _run_with_progress(
    work: Sequence[Task], device: torch.device, args: argparse.Namespace, checker: Any | None
) -> list[Result]:
    """The results, those before Ctrl-C where it came; each is in --json-lines at once.

    checker: what has a `check(task)` of its own, a Recorder or a Replay.
    """
    results = map(checker.check, work) if checker else _results_of(work, device, args)
    if sys.stderr.isatty():
        from tqdm import tqdm

        results = tqdm(results, total=len(work), unit="case", leave=False)
    found: list[Result] = []
    lines = contextlib.nullcontext() if args.json_lines is None else args.json_lines.open("a", encoding="utf-8")
    # Ctrl-C, and SIGTERM as the command line takes it
    with contextlib.suppress(KeyboardInterrupt, SystemExit), lines as file:
        for result in results:
            found.append(result)
            if file is not None:
                print(json.dumps(result.as_json(), allow_nan=False), file=file, flush=True)
    return found


def _results_of(work: Sequence[Task], device: torch.device, args: argparse.Namespace) -> Iterator[Result]:
    if args.jobs is None:
        return (check(task, device, args.impl) for task in work)
    outcomes = verify_jobs.share_out(
        work, args.jobs, partial(_check_in_process, device=device, impl=args.impl, emulate=args.emulate),
        seconds=args.case_seconds,
        is_fit=partial(_still_answers, device), needs=lambda task: task.needs, room=_room(device),
    )  # fmt: skip
    return (o.answer or Result(o.task, (), o.seconds, o.reason) for o in outcomes)


def _check_in_process(task: Task, device: torch.device, impl: str, emulate: str | None) -> Result:
    with _emulation(emulate):
        return check(task, device, impl)


def _still_answers(device: torch.device) -> bool:
    """Whether this process still has the device, whose unused memory it gives back for the others."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
    return True


def _room(device: torch.device) -> float:
    """Bytes of the device's memory that cases may share; what is left is for what allocators waste."""
    return 0.9 * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return f"CPU, torch {torch.__version__}"
    arch = _device.arch(device.index)
    assembled = f", {assembler(arch)}" if _device.HAS_TRITON and arch.startswith("sm_") else ""
    return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}{assembled}"


def _notes(device: torch.device, args: argparse.Namespace, rows: Sequence[Row]) -> list[str]:
    if args.impl != "triton" or device.type == "cuda":
        return []
    if args.emulate:
        return [f"No GPU is used: the kernels are compiled for {args.emulate}, and the CPU executes their PTX."]
    notes = ["No GPU is used: the kernels run through Triton's interpreter, on small shapes."]
    if any(row.dtype == "bf16" for row in rows):
        notes.append(
            f"The interpreter truncates where it casts to bf16 (hardware rounds): bf16 may err "
            f"{allowed_factor(torch.bfloat16):g} times as much as plain torch here, instead of twice."
        )
    return notes


def _results(rows: Sequence[Row]) -> dict:
    """JSON has no NaN: an operator that raised has null for its error and budget."""
    plain = [{k: _plain(v) for k, v in asdict(row).items()} for row in rows]
    return {"passed": all(row.passed for row in rows), "rows": plain}


def format_rows(rows: Sequence[Row]) -> str:
    """An aligned table and a line that sums it up."""
    table = [("operator", "dtype", "direction", "worst", "error", "budget", "", "case")]
    for row in rows:
        numbers = ("-", "-") if row.message else (f"{row.error:.2e}", f"{row.budget:.2e}")
        verdict = "pass" if row.passed else "FAIL"
        told = f"{row.case}: {row.message}" if row.message else row.case
        table.append((row.op, row.dtype, row.direction, row.tensor or "-", *numbers, verdict, told))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    failed = sum(not row.passed for row in rows)
    return "\n".join([*lines, f"{len(rows) - failed} of {len(rows)} passed" + (f", {failed} FAILED" if failed else "")])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastbert verify", description="Check every operator on this machine.")
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
