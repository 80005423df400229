"""Records what a machine computed, for comparison with another machine: `fastbert verify --record FILE`, `--replay
FILE`.

A recording of a GPU shows whether the emulator computes the same as that GPU. A safetensors file holds for each case
its inputs, upstream gradients, outputs and gradients, and in its header the versions that they were computed with:

    inputs/<digest>             tensors, named by their contents, since dtypes and cases share most of them
    upstream/<case>/<n>         gradient of output n, if it has one
    outputs/<case>/<name>       "out", "dx", ...

A case can be repeated from the file alone: inputs that are no tensors are in the header.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import __version__
from ..functional import assembler as assembler_of
from ..functional import machine
from ..testing import Check, ModelShape, Runs, error_and_budget, run_op
from .cases import DTYPES, Task
from .checks import Result, factor_of, result_of

FORMAT = "1"


def environment(device: torch.device, impl: str) -> dict[str, str]:
    """What the bits of results depend on: device, architecture, versions, assembler; empty strings if not
    applicable."""
    name, arch, compiler, assembler = "CPU", "", "", ""
    if device.type == "cuda":
        name, arch = torch.cuda.get_device_name(device), machine.arch(device.index)
    elif impl == "triton":
        name, arch = "the interpreter" if machine.INTERPRETING else "the emulator", machine.arch()
    if impl == "triton":
        import triton

        compiler = triton.__version__
        if not (torch.version.hip or machine.INTERPRETING):
            assembler, _, _ = assembler_of(arch).partition(" (")  # without its path
    return {
        "format": FORMAT, "device": name, "arch": arch, "impl": impl, "fastbert": __version__,
        "torch": torch.__version__, "triton": compiler, "assembler": assembler,
    }  # fmt: skip


def describe(of: dict[str, str]) -> str:
    card = f"{of['device']} ({of['arch']})" if of["arch"] else of["device"]
    versions = [f"{name} {of[name]}" for name in ("fastbert", "torch", "triton") if of[name]]
    return ", ".join([f"{of['impl']} on {card}", *versions, *filter(None, [of["assembler"]])])


# ---- recording -------------------------------------------------------------------------------------------


class Recorder:
    """Records the cases that `check` runs; `save` writes them."""

    def __init__(self, device: torch.device, impl: str):
        self._device, self._impl = device, impl
        self._cases: list[dict] = []
        self._tensors: dict[str, Tensor] = {}

    def check(self, task: Task) -> Result:
        """`verify.check`, and records the case."""
        return result_of(task, lambda: self._run(task))

    def _run(self, task: Task) -> list[Check]:
        inputs = task.inputs()
        runs = run_op(task.op, inputs, DTYPES[task.dtype], self._device, impl=self._impl)
        self._add(task, inputs, runs)
        return runs.checks(factor_of(task.dtype, self._impl))

    def _add(self, task: Task, inputs: dict[str, Any], runs: Runs) -> None:
        number = len(self._cases)
        for n, gradient in enumerate(runs.upstream):
            if gradient is not None:
                self._tensors[f"upstream/{number}/{n}"] = _plain(gradient)
        for name, tensor in zip(runs.names, runs.ours, strict=True):
            self._tensors[f"outputs/{number}/{name}"] = _plain(tensor)
        shapes = [None if gradient is None else list(gradient.shape) for gradient in runs.upstream]
        self._cases.append(
            {
                "op": task.op, "dtype": task.dtype, "case": task.case, "model": asdict(task.model),
                "lengths": list(task.lengths), "inputs": {name: self._encoded(value) for name, value in inputs.items()},
                "outputs": list(runs.names), "upstream": shapes,
            }
        )  # fmt: skip

    def _encoded(self, value: Any) -> Any:
        """JSON for one input; a tensor is stored in the file, and its name is returned."""
        if isinstance(value, Tensor):
            shape, value = value.shape, _plain(value)
            contents = value.view(torch.uint8) if value.numel() else value.to(torch.uint8)
            digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)} ".encode() + contents.numpy().tobytes())
            name = f"inputs/{digest.hexdigest()[:24]}"
            self._tensors[name] = value
            return {"tensor": name, "shape": list(shape)}
        if isinstance(value, (tuple, list)):
            return {"items": [self._encoded(v) for v in value]}
        return {"value": value}

    def save(self, path: Path) -> None:
        header = {"environment": json.dumps(environment(self._device, self._impl)), "cases": json.dumps(self._cases)}
        save_file(self._tensors, path, metadata=header)


def _plain(tensor: Tensor) -> Tensor:
    """The tensor in the form that the file needs: on the CPU, contiguous, at least one dimension, its own memory."""
    return torch.atleast_1d(tensor.detach()).to("cpu", copy=True).contiguous()


# ---- replaying -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """One case of a recording."""

    task: Task
    inputs: dict[str, Any]
    upstream: list[Tensor | None]
    outputs: dict[str, Tensor]


class Recording:
    """A file that `Recorder` wrote. Raises ValueError if it is not one."""

    def __init__(self, path: Path):
        self._path = path
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: {error}") from None
        except Exception as error:  # SafetensorError is a direct subclass of Exception
            raise ValueError(f"{path} is no file of safetensors: {error}") from None
        if "environment" not in header or "cases" not in header:
            raise ValueError(f"{path} is no recording of fastbert verify")
        self.environment: dict[str, str] = json.loads(header["environment"])
        if self.environment["format"] != FORMAT:
            raise ValueError(f"{path} has format {self.environment['format']}, this version reads {FORMAT}")
        self._cases: list[dict] = json.loads(header["cases"])

    def tasks(self, ops: list[str] | None = None, dtypes: list[str] | None = None) -> list[Task]:
        """The recorded cases as tasks; optionally only some operators and dtypes."""
        return [
            task
            for task in map(_task_of, self._cases)
            if (not ops or task.op in ops) and (not dtypes or task.dtype in dtypes)
        ]

    def read(self, task: Task) -> Recorded:
        """One of `tasks()`, with its tensors."""
        number, case = next((n, case) for n, case in enumerate(self._cases) if _task_of(case) == task)
        with safe_open(self._path, "pt") as file:
            return Recorded(
                task,
                {name: _decoded(value, file) for name, value in case["inputs"].items()},
                [
                    file.get_tensor(f"upstream/{number}/{n}").view(shape) if shape is not None else None
                    for n, shape in enumerate(case["upstream"])
                ],
                {name: file.get_tensor(f"outputs/{number}/{name}") for name in case["outputs"]},
            )


def _task_of(case: dict) -> Task:
    return Task(case["op"], case["dtype"], case["case"], ModelShape(**case["model"]), tuple(case["lengths"]))


def _decoded(value: dict, file: Any) -> Any:
    if "tensor" in value:
        return file.get_tensor(value["tensor"]).view(value["shape"])
    if "items" in value:
        return tuple(_decoded(v, file) for v in value["items"])
    return value["value"]


class Replay:
    """Compares this machine with a recording: a check for each tensor, of the difference between the two.

    Each machine may differ from the truth by the budget; here the two machines may differ by that budget. A GPU and the
    emulator add in different orders inside a matrix unit, and approximate exp2 and rsqrt differently.
    """

    def __init__(self, recording: Recording, device: torch.device, impl: str):
        self._recording, self._device, self._impl = recording, device, impl
        self.tensors = self.same = 0  # number of compared tensors; number of those that are equal to the bit

    def check(self, task: Task) -> Result:
        return result_of(task, lambda: self._run(self._recording.read(task)))

    def _run(self, recorded: Recorded) -> list[Check]:
        task, checks = recorded.task, []
        runs = run_op(
            task.op, recorded.inputs, DTYPES[task.dtype], self._device, impl=self._impl, upstream=recorded.upstream
        )
        if set(runs.names) != set(recorded.outputs):
            raise ValueError(f"recorded were {', '.join(recorded.outputs)}, here there are {', '.join(runs.names)}")
        factor = factor_of(task.dtype, self._impl)
        for name, ours, plain, truth in zip(runs.names, runs.ours, runs.plain, runs.truth, strict=True):
            expected = recorded.outputs[name].view(ours.shape)
            checks.append(Check(name, *error_and_budget(ours, plain, truth, factor, expected)))
            self.tensors += 1
            self.same += torch.equal(ours.cpu(), expected)
        return checks
