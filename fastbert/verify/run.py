"""Runs `fastbert verify`: the cases, their progress, recordings, and the summary."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from .. import functional
from ..functional import assembler, machine
from ..testing import allowed_factor
from . import jobs
from .cases import CASES, DTYPES, Task, pick_device, tasks
from .checks import Result, Row, check, format_rows, results_of, worst


def run(args: argparse.Namespace) -> int:
    """Verifies and prints; returns 0 if all cases passed, 1 on any failure, 2 if nothing can run."""
    if refusal := _refusal(args):
        print(f"fastbert verify: {refusal}", file=sys.stderr)
        return 2
    if args.emulate and machine.INTERPRETING:
        return _again(args, interpreting=False)
    with _emulation(args.emulate):
        try:
            device = torch.device("cpu") if args.emulate else pick_device(args.device)
            torch.empty(0, dtype=torch.float32, device=device)
        except (RuntimeError, AssertionError) as error:  # a torch built without CUDA raises AssertionError
            print(f"fastbert verify: device {args.device!r}: {str(error).splitlines()[0]}", file=sys.stderr)
            return 2
        if args.impl == "triton" and functional.why_not_triton(device):
            return _again(args, interpreting=True)
        return _run(args, device)


def _refusal(args: argparse.Namespace) -> str | None:
    """Why these arguments cannot be run, or None."""
    if args.impl == "triton" and not machine.HAS_TRITON:
        return "triton is not installed; --impl native checks the CPU operators"
    if args.emulate and args.impl != "triton":
        return f"--emulate executes Triton kernels; --impl {args.impl} has none"
    if args.emulate and args.device not in (None, "cpu"):
        return f"--emulate computes on the CPU, not on --device {args.device}"
    if args.jobs is not None and args.jobs < 1:
        return f"--jobs must be at least 1, got {args.jobs}"
    if args.jobs is not None and (args.record or args.replay):
        return "--record and --replay take one process, without --jobs"
    if args.record and not args.record.absolute().parent.is_dir():  # checked before the work, not after it
        return f"no folder {str(args.record.parent)!r} to write {args.record.name} into"
    return None


def _emulation(arch: str | None) -> contextlib.AbstractContextManager:
    if arch is None:
        return contextlib.nullcontext()
    from ..emulator import emulated

    return emulated(arch)


def _run(args: argparse.Namespace, device: torch.device) -> int:
    ops, dtypes = args.op or tuple(CASES), args.dtype or tuple(DTYPES)
    notes, recorder, replayed = [], None, None
    if args.replay:
        from . import recording  # only this needs safetensors

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
        print(json.dumps({"device": _describe(device), "impl": args.impl, "notes": notes} | results_of(rows), indent=1))
    else:
        print(f"{args.impl} on {_describe(device)}")
        print("\n".join(notes))
        print(format_rows(rows))
    return 0 if whole and all(row.passed for row in rows) else 1


def _again(args: argparse.Namespace, interpreting: bool) -> int:
    """Runs the same command in another process with or without Triton's interpreter, which is chosen at Triton's
    import.
    """
    same = f"-m fastbert verify --device cpu --impl {args.impl} --shapes {args.shapes}"
    command = [sys.executable, *same.split()]
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
    """The results; after Ctrl-C those so far. Each is written to --json-lines at once.

    checker: a Recorder or a Replay, whose `check(task)` is used, or None.
    """
    results = map(checker.check, work) if checker else _results_of(work, device, args)
    if sys.stderr.isatty():
        from tqdm import tqdm

        results = tqdm(results, total=len(work), unit="case", leave=False)
    found: list[Result] = []
    lines = contextlib.nullcontext() if args.json_lines is None else args.json_lines.open("a", encoding="utf-8")
    # Ctrl-C raises KeyboardInterrupt; the command line turns SIGTERM into SystemExit.
    with contextlib.suppress(KeyboardInterrupt, SystemExit), lines as file:
        for result in results:
            found.append(result)
            if file is not None:
                print(json.dumps(result.as_json(), allow_nan=False), file=file, flush=True)
    return found


def _results_of(work: Sequence[Task], device: torch.device, args: argparse.Namespace) -> Iterator[Result]:
    if args.jobs is None:
        return (check(task, device, args.impl) for task in work)
    outcomes = jobs.share_out(
        work, args.jobs, partial(_check_in_process, device=device, impl=args.impl, emulate=args.emulate),
        seconds=args.case_seconds,
        is_fit=partial(_still_answers, device), needs=lambda task: task.needs, room=_room(device),
    )  # fmt: skip
    return (o.answer or Result(o.task, (), o.seconds, o.reason) for o in outcomes)


def _check_in_process(task: Task, device: torch.device, impl: str, emulate: str | None) -> Result:
    with _emulation(emulate):
        return check(task, device, impl)


def _still_answers(device: torch.device) -> bool:
    """Whether this process can still use the device. Also frees the process's unused device memory for others."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
    return True


def _room(device: torch.device) -> float:
    """Bytes of the device's memory for all running cases together; the rest is for the allocators' overhead."""
    return 0.9 * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return f"CPU, torch {torch.__version__}"
    arch = machine.arch(device.index)
    assembled = f", {assembler(arch)}" if machine.HAS_TRITON and arch.startswith("sm_") else ""
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
