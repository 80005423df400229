"""`fastbert verify`: every operator on this machine, held to the reference.

Each operator runs its cases forward and backward in each dtype, against the specification in float64. The error
allowed is twice that of plain torch in the same dtype (see `testing`). A row tells the worst tensor of an operator,
dtype and direction: the one that comes closest to its budget, or passes it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from . import functional
from .kernels import _device
from .kernels._assembler import assembler
from .testing import INPUTS, MODELS, Check, ModelShape, check_op

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
SHAPES = ("auto", "small", "real")
LONG = 1024  # no additive bias for sequences beyond this: the reference would hold it in float64, several times
# Triton's interpreter casts float32 to bf16 by truncation, where hardware rounds to nearest: twice the error.
INTERPRETED_BF16_FACTOR = 4.0


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
    steps = _verify(ops or tuple(CASES), dtypes or tuple(DTYPES), _pick(device), impl, shapes)
    return [row for rows in steps for row in rows]


def _pick(device: str | torch.device | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _shapes(name: str, device: torch.device) -> tuple[tuple[ModelShape, tuple[int, ...]], ...]:
    if name not in SHAPES:
        raise ValueError(f"shapes must be one of {', '.join(SHAPES)}, got {name!r}")
    if name == "small" or (name == "auto" and device.type != "cuda"):
        return SMALL
    memory = torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else 0
    return tuple((NARROW if max(n) > LONG and memory < ROOMY else model, n) for model, n in REAL)


def _verify(
    ops: Sequence[str], dtypes: Sequence[str], device: torch.device, impl: str, shapes: str
) -> Iterator[list[Row]]:
    chosen = _shapes(shapes, device)
    for op in ops:
        for dtype in dtypes:
            yield _rows(op, dtype, device, impl, chosen)


def _rows(op: str, dtype: str, device: torch.device, impl: str, shapes) -> list[Row]:
    interpreted_bf16 = dtype == "bf16" and impl == "triton" and device.type == "cpu"
    factor = INTERPRETED_BF16_FACTOR if interpreted_bf16 else 2.0
    worst: dict[str, tuple[str, Check]] = {}
    for model, lengths in shapes:
        for name, options in CASES[op].items():
            if max(lengths) > LONG and "bias" in options:
                continue
            case = f"{name}, {model.hidden} wide, {sum(lengths)} tokens"
            try:
                checks = check_op(
                    op, _inputs(op, model, lengths, **options), DTYPES[dtype], device, impl=impl, factor=factor
                )
            except Exception as error:  # an operator that raises has failed; the others still run
                message = f"{type(error).__name__}: {error}".splitlines()[0]
                nothing = (case, "", float("nan"), float("nan"), False, message)
                return [Row(op, dtype, direction, *nothing) for direction in ("forward", "backward")]
            for check in checks:
                direction = "forward" if check.name.startswith("out") else "backward"
                if direction not in worst or _badness(check) > _badness(worst[direction][1]):
                    worst[direction] = (case, check)
    return [
        Row(op, dtype, direction, case, check.name, check.error, check.budget, check.passed)
        for direction, (case, check) in worst.items()
    ]


def _inputs(op: str, model: ModelShape, lengths: Sequence[int], *, cross: bool = False, **options) -> dict:
    if cross:  # keys and values of other lengths than the queries
        options["lengths_k"] = lengths[::-1]
    return INPUTS[op](model, lengths, **options)


def _badness(check: Check) -> float:
    return check.error / check.budget


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
        help="real: BERT-base and -large, 1 to 4,096 tokens a sequence; small; default auto: real on a GPU",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Verify and print; 0 where all passed, 1 on any failure, 2 where nothing can run."""
    try:
        device = _pick(args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        print(f"fastbert verify: device {args.device!r}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    if args.impl == "triton" and (reason := functional.why_not_triton(device)):
        if not _device.HAS_TRITON:
            print(f"fastbert verify: {reason}; --impl native checks the CPU operators", file=sys.stderr)
            return 2
        return _again_interpreted(args)
    ops, dtypes = args.op or tuple(CASES), args.dtype or tuple(DTYPES)
    rows = _run_with_progress(ops, dtypes, device, args.impl, args.shapes)
    notes = _notes(device, args.impl, rows)
    whole = len(rows) == 2 * len(ops) * len(dtypes)
    if not whole:
        notes.append("Interrupted: this is not all.")
    if args.json:
        print(json.dumps({"device": _describe(device), "impl": args.impl, "notes": notes} | _results(rows), indent=1))
    else:
        print(f"{args.impl} on {_describe(device)}")
        print("\n".join(notes))
        print(format_rows(rows))
    return 0 if whole and all(row.passed for row in rows) else 1


def _again_interpreted(args: argparse.Namespace) -> int:
    """The same in a process whose Triton runs on the CPU; Triton settles that when it is imported."""
    command = [sys.executable, "-m", "fastbert.verify", "--device", "cpu", "--impl", args.impl, "--shapes", args.shapes]
    command += [word for op in args.op or () for word in ("--op", op)]
    command += [word for dtype in args.dtype or () for word in ("--dtype", dtype)]
    command += ["--json"] if args.json else []
    return subprocess.call(command, env=os.environ | {"TRITON_INTERPRET": "1"})


def _run_with_progress(
    ops: Sequence[str], dtypes: Sequence[str], device: torch.device, impl: str, shapes: str
) -> list[Row]:
    """The rows, those before Ctrl-C where it came."""
    from tqdm import tqdm

    steps, rows = _verify(ops, dtypes, device, impl, shapes), []
    total = len(ops) * len(dtypes)
    with contextlib.suppress(KeyboardInterrupt, SystemExit):  # Ctrl-C, and SIGTERM as the command line takes it
        for found in tqdm(steps, total=total, unit="check", disable=not sys.stderr.isatty(), leave=False):
            rows += found
    return rows


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return f"CPU, torch {torch.__version__}"
    arch = _device.arch(device.index)
    assembled = f", {assembler(arch)}" if _device.HAS_TRITON and arch.startswith("sm_") else ""
    return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}{assembled}"


def _notes(device: torch.device, impl: str, rows: Sequence[Row]) -> list[str]:
    if impl != "triton" or device.type == "cuda":
        return []
    notes = ["No GPU is used: the kernels run through Triton's interpreter, on small shapes."]
    if any(row.dtype == "bf16" for row in rows):
        notes.append(
            f"The interpreter truncates where it casts to bf16 (hardware rounds): bf16 may err "
            f"{INTERPRETED_BF16_FACTOR:g} times as much as plain torch here, instead of twice."
        )
    return notes


def _results(rows: Sequence[Row]) -> dict:
    """JSON has no NaN: an operator that raised has null for its error and budget."""
    plain = [{k: None if v != v or v == float("inf") else v for k, v in asdict(row).items()} for row in rows]
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
