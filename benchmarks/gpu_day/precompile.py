"""Compiles every kernel that a run on a GPU will launch, before anything is launched.

    python -m benchmarks.gpu_day.precompile --json-lines FILE

The calls of `fastbert verify` and of the benchmark suites run through Triton's launch path for a GPU that is not
present, at their real shapes; torch's own operators compute nothing. The launched kernels are compiled into Triton's
cache in the order of first use, each in a process of its own, so that a crash of the compiler affects one kernel only.
Each result is appended to --json-lines as a line of JSON; the last line is a summary.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fastbert import verify
from fastbert.kernels import _device, _library
from fastbert.testing import MODELS, WITHOUT_GRADIENT, WORKLOADS, Workload, function_of

from . import PTXAS_VARIABLES

CPU = torch.device("cpu")
LARGE = 2**14  # tensors with at least this many elements are not computed
PATIENCE = 90.0  # seconds that one kernel may take to compile


class WithoutNumbers(TorchDispatchMode):
    """Within it, torch's operators allocate large floating-point results without computing them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (
            func.namespace == "fastbert"
        ):  # called without the dispatcher, so that products inside are not computed either
            name = func._schema.name.split("::")[1]
            with self:
                return _library.LAUNCHERS[name](*args, **kwargs)
        if func._schema.name in ("aten::randn", "aten::rand"):
            options = {k: v for k, v in kwargs.items() if k not in ("generator", "pin_memory")}
            return torch.empty(args[0], **options)
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        if not any(t.is_floating_point() and t.numel() >= LARGE for t in tensors):
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            changed = kwargs.get("out", args[0] if args else None)
            return changed if len(func._schema.returns) == 1 else func(*args, **kwargs)
        if any(r.alias_info is not None for r in func._schema.returns) or func._schema.name.startswith("aten::_local"):
            return func(*args, **kwargs)  # a view
        try:
            shapes = func(*tree_map(_on_meta, args), **tree_map(_on_meta, {**kwargs, **_device_of(kwargs)}))
        except (RuntimeError, NotImplementedError):  # the shape of the result depends on the numbers
            return func(*args, **kwargs)
        return tree_map(_empty, shapes)


def _device_of(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"device": torch.device("meta")} if kwargs.get("device") is not None else {}


def _on_meta(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")


def _empty(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="cpu")


# ---- the calls -------------------------------------------------------------------------------------------

Call = tuple[str, Callable[[], Any]]  # a description, and the function to call


def of_verify(ops: Sequence[str], dtypes: Sequence[str], small: bool) -> Iterator[Call]:
    """The calls of our operators in each case of `fastbert verify`."""
    shapes = verify.SMALL if small else verify.REAL
    for dtype in dtypes:
        for op in ops:
            for model, lengths in shapes:
                for case, options in verify.CASES[op].items():
                    if not (max(lengths) > verify.LONG and "bias" in options):
                        task = verify.Task(op, dtype, case, model, lengths)
                        yield f"verify {op} {dtype}: {task}", lambda task=task: _forward_and_backward(task)


def _forward_and_backward(task: verify.Task) -> None:
    inputs = task.inputs()
    leaves = {
        name: value.to(verify.DTYPES[task.dtype]).requires_grad_()
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name not in WITHOUT_GRADIENT
    }
    # A dispatch mode is active here, so the kernels of a whole layer are launched by its single operators.
    options = {"whole": False} if task.op == "encoder_layer" else {}
    out = function_of(task.op)(**{**inputs, **leaves}, **options, impl="triton")
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
    torch.autograd.backward(outs, [torch.empty_like(o) for o in outs])


def of_suites(dtype: torch.dtype, quick: bool) -> Iterator[Call]:
    """Our row in each case of the suites that a GPU runs, in order. Of a model only one layer, since all are alike."""
    from ..suites import encoder as suite_encoder
    from ..suites import kernels as suite_kernels
    from ..suites import latency as suite_latency
    from ..suites import training as suite_training

    names = [(entry[0], entry[1]) for entry in (*suite_encoder.CASES, *suite_encoder.ON_GPUS)]
    models: list[tuple[int, Call]] = []
    for name, priority in names:
        if not quick or name == "minilm_natural":
            models.append((priority, (f"encoder {name}", lambda name=name: _encode(WORKLOADS[name], dtype))))
    for model, length, priority, _ in suite_latency.CASES[: 1 if quick else None]:
        batch = Workload(MODELS[model], (length,))
        models.append((priority, (f"latency {model}_1x{length}", lambda batch=batch: _encode(batch, dtype))))
    for name, priority, _ in suite_training.CASES:
        if not quick or name == "minilm_natural":
            models.append((priority, (f"training {name}", lambda name=name: _train(WORKLOADS[name], dtype))))
    for op, direction, name, priority, in_quick, options in (*suite_kernels.CASES, *suite_kernels.ON_GPUS):
        if not quick or in_quick:
            call = (op, direction, name, priority, in_quick, options)
            models.append((priority, (f"{op} {direction} {name}", lambda call=call: _operator(call, dtype))))
    for _, call in sorted(models, key=lambda entry: entry[0]):
        yield call


def _operator(call: tuple, dtype: torch.dtype) -> None:
    from ..suites import kernels as suite_kernels

    case = suite_kernels.build(*call, device=CPU, dtype=dtype, workload=WORKLOADS[call[2]])
    case.rows[0].make()()


def _one_layer(workload: Workload, dtype: torch.dtype) -> Any:
    from ..harness.jobs import Job

    return Job(Workload(replace(workload.model, layers=1), workload.lengths), dtype, CPU)


def _encode(workload: Workload, dtype: torch.dtype) -> None:
    from fastbert.text.batching import TOKENS_PER_BATCH

    from ..peers.fastbert import encoder

    job = _one_layer(workload, dtype)
    encoder(job).encode_ids(job.rows, TOKENS_PER_BATCH["cuda"])


def _train(workload: Workload, dtype: torch.dtype) -> None:
    from ..harness import workloads
    from ..harness.steps import labelled
    from ..peers.fastbert import packed_masked_lm
    from ..suites import training as suite_training

    job = _one_layer(workloads.cut(workload, max(suite_training.GPU_TOKENS.values())), dtype)
    model = packed_masked_lm(job).to(dtype).train()
    from fastbert.packing import PackedBatch

    rows, labels = labelled(job)
    model(PackedBatch.from_lists(job.rows, device=CPU), rows, labels).backward()


# ---- compiling -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """One entry of Triton's cache."""

    name: str
    use: str  # description of the first call that launches it
    launch: Any
    assembler: str | None  # path; None: Triton's default


def kernels_of(calls: Sequence[Call], assembler: str | None, refused: Callable[[str, str], None]) -> list[Kernel]:
    """The kernels that the calls launch, each once, in order. A call that raises is reported to `refused`. Must run
    within `offline`."""
    from triton.runtime import driver

    found: dict[Any, Kernel] = {}
    for use, call in calls:

        def seen(launch: Any, use: str = use) -> None:
            key = (launch.kernel.fn.__module__, launch.variant)
            found.setdefault(key, Kernel(launch.name.strip("_"), use, launch, assembler))

        driver.active.on_launch = seen
        try:
            with WithoutNumbers():
                call()
        except Exception as error:  # a call that the operator refuses must not stop the others
            refused(use, f"{type(error).__name__}: {error}".splitlines()[0])
    driver.active.on_launch = None
    return list(found.values())


def compile_all(kernels: Sequence[Kernel], target: Any, jobs: int, until: float, say: Callable[[dict], None]) -> int:
    """Compiles the kernels in order, each in a process, until the clock reaches `until`. Returns how many are left."""
    running: dict[int, tuple[Kernel, float]] = {}
    waiting = list(reversed(kernels))
    while running or (waiting and time.monotonic() < until):
        while waiting and len(running) < jobs and time.monotonic() < until:
            kernel = waiting.pop()
            running[_start(kernel, target, say)] = kernel, time.monotonic()
        process, status = os.waitpid(-1, os.WNOHANG)
        if process == 0:
            now = time.monotonic()
            for late in [p for p, (_, began) in running.items() if now > min(until, began + PATIENCE)]:
                os.kill(late, signal.SIGKILL)
            time.sleep(0.02)
            continue
        kernel, began = running.pop(process)
        if status:
            late = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            why = (
                "not compiled in time"
                if late
                else f"the compiler ended with status {os.waitstatus_to_exitcode(status)}"
            )
            say(_line(kernel, time.monotonic() - began, why))
    return len(waiting)


def _line(kernel: Kernel, seconds: float, error: str = "", **more: Any) -> dict[str, Any]:
    facts = {"kernel": kernel.name, "use": kernel.use, "assembler": kernel.assembler, "seconds": round(seconds, 3)}
    return {**facts, "error": error, **more}


def _start(kernel: Kernel, target: Any, say: Callable[[dict], None]) -> int:
    """Starts a process that compiles, reports the result, and exits without cleaning up inherited objects."""
    process = os.fork()
    if process:
        return process
    code = 0
    try:
        import triton

        if kernel.assembler is not None:
            os.environ.update(dict.fromkeys(PTXAS_VARIABLES, kernel.assembler))
        began, cpu = time.monotonic(), time.process_time()
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # if ptxas fails, Triton prints it
            try:
                compiled = triton.compile(kernel.launch.source, target=target, options=kernel.launch.options)
                said = _line(kernel, time.monotonic() - began, shared=compiled.metadata.shared)
            except Exception as error:
                words = str(error).strip().splitlines() or [""]
                reason = f"{type(error).__name__}: {next((w for w in words if 'fatal' in w), words[-1])}"
                said = _line(kernel, time.monotonic() - began, reason)
        children = os.times().children_user + os.times().children_system
        say({**said, "cpu_s": round(time.process_time() - cpu + children, 3)})
    except BaseException:
        code = 1
    os._exit(code)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_day.precompile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json-lines", metavar="FILE", type=Path, required=True)
    parser.add_argument(
        "--card", metavar="FILE", type=Path, help="file of benchmarks.gpu_day.card (default: determined here)"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=600.0, help="begin nothing after this time")
    parser.add_argument(
        "--both-assemblers", action="store_true", help="compile attention with the newer assembler as well"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--most", type=int, metavar="N", help="compile N kernels only")
    args = parser.parse_args(argv)
    from fastbert.emulator.driver import offline

    began = time.monotonic()
    card = json.loads(args.card.read_text(encoding="utf-8"))
    handle = os.open(args.json_lines, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)

    def say(line: dict) -> None:
        os.write(handle, (json.dumps(line) + "\n").encode())  # one write, so lines of several processes do not mix

    def refused(use: str, reason: str) -> None:
        say({"kernel": None, "use": use, "error": reason})

    dtypes = ("bf16", "fp16", "fp32")
    attention = [op for op in verify.CASES if op.startswith("attention")]
    others = [a["path"] for a in card["assemblers"][1:] if a["takes"]] if args.both_assemblers else []
    with offline(card["arch"], compiles=False) as driver:
        _device.stand_in(replace(driver.card, multiprocessors=card["multiprocessors"]))
        found = kernels_of(list(of_verify(tuple(verify.CASES), dtypes, args.quick)), None, refused)
        for path in others:
            found += kernels_of(list(of_verify(attention, dtypes, args.quick)), path, refused)
        known = {(k.launch.kernel.fn.__module__, k.launch.variant) for k in found if k.assembler is None}
        # last the calls that are recorded, or run under the sanitizer
        rest = [*of_suites(torch.bfloat16, args.quick), *of_verify(tuple(verify.CASES), dtypes[:1], True)]
        for kernel in kernels_of(rest, None, refused):
            if (kernel.launch.kernel.fn.__module__, kernel.launch.variant) not in known:
                found.append(kernel)
        target = driver.get_current_target()
    say(
        {
            "kernel": None,
            "use": "all",
            "error": "",
            "kernels": len(found),
            "bound_s": round(time.monotonic() - began, 2),
        }
    )
    chosen = found if args.most is None else found[: args.most]
    left = compile_all(chosen, target, args.jobs, began + args.seconds, say)
    say({"kernel": None, "use": "end", "error": "", "left": left, "seconds": round(time.monotonic() - began, 2)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
