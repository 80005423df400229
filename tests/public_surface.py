"""What fastbert promises: its public names with their parameters, and the rows of its benchmark.

`python tests/public_surface.py` writes both to public_surface.json, with which test_public_surface.py compares them. A
name that is to go is first kept for a while with a DeprecationWarning. The commit that removes it says so.

Public is what a program would import. The command line and the code behind it are not: their promise is the commands,
which test_cli.py tests. The kernels are not public either: programs call `fastbert.functional`.
"""

from __future__ import annotations

import inspect
import json
import pkgutil
import sys
from importlib import import_module
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any
from unittest import mock

RECORD = Path(__file__).with_suffix(".json")
INTERNAL = {
    "fastbert.__main__", "fastbert._moved", "fastbert.cli", "fastbert.corpus", "fastbert.demo", "fastbert.emulator",
    "fastbert.encoding.ranks", "fastbert.engines", "fastbert.info", "fastbert.kernels", "fastbert.models.head",
    "fastbert.models.loading", "fastbert.pretraining", "fastbert.service", "fastbert.stack", "fastbert.storage",
    "fastbert.text.files", "fastbert.text.part_files", "fastbert.training", "fastbert.verify", "fastbert.workloads",
}  # fmt: skip


# ---- names -----------------------------------------------------------------------------------------------


def modules() -> list[str]:
    import fastbert

    found = ["fastbert", *(module.name for module in pkgutil.walk_packages(fastbert.__path__, "fastbert."))]
    rooms = (
        "cli",
        "corpus",
        "dropin",
        "emulator",
        "engines",
        "functional",
        "kernels",
        "pretraining",
        "service",
        "stack",
        "training",
        "verify",
    )
    inner = tuple(f"fastbert.{room}." for room in rooms)
    return [name for name in found if name not in INTERNAL and not name.startswith(inner)]


def names() -> dict[str, str]:
    """module.name, or module.Class.name for members, -> the parameters; "" for what has none."""
    found = {}
    for module_name in modules():
        module = import_module(module_name)
        for name in dir(module):
            value = getattr(module, name)
            if not name.startswith("_") and _is_its_own(value, module):
                found[f"{module_name}.{name}"] = parameters_of(value) if callable(value) else ""
                if inspect.isclass(value) and value.__module__ == module_name:
                    found |= _members(f"{module_name}.{name}", value)
    return found


def _is_its_own(value: Any, module: ModuleType) -> bool:
    """Whether the module offers the value, rather than only importing it for its own use."""
    if isinstance(value, ModuleType):
        return module.__name__ == "fastbert" and value.__name__ == "fastbert.functional"
    home = getattr(value, "__module__", module.__name__)
    if module.__name__ in ("fastbert", "fastbert.dropin", "fastbert.functional"):
        return str(home).startswith("fastbert")
    return home == module.__name__


def _members(path: str, value: type) -> dict[str, str]:
    found = {}
    for owner in reversed(value.__mro__):
        if not owner.__module__.startswith("fastbert"):
            continue
        for name, member in vars(owner).items():
            if not name.startswith("_"):
                function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
                is_function = isinstance(function, FunctionType)
                found[f"{path}.{name}"] = parameters_of(function) if is_function else ""
    return found


def parameters_of(function: Any) -> str:
    """The parameters as in the function's definition, without annotations."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return ""
    bare = []
    for parameter in signature.parameters.values():
        default = parameter.default
        if default is not parameter.empty and not isinstance(default, (bool, int, float, str, tuple, type(None))):
            default = ...
        bare.append(parameter.replace(annotation=parameter.empty, default=default))
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))[1:-1].replace("Ellipsis", "...")


# ---- rows of the benchmark -------------------------------------------------------------------------------


def rows() -> dict[str, dict[str, list[str]]]:
    """Each "suite, device and dtype" -> each case -> its rows. No row is run."""
    import torch

    from benchmarks.run import SUITES

    found = {}
    with mock.patch.object(torch, "get_num_threads", return_value=2):  # the number of cores decides some cases
        for suite, module in SUITES.items():
            for device in ("cpu", "cuda"):
                for dtype in (torch.float32, torch.bfloat16):
                    cases = list(import_module(module).cases(torch.device(device), dtype, False))
                    found[f"{suite} {device} {str(dtype).removeprefix('torch.')}"] = {
                        "cases": sorted({case.name for case in cases}),
                        "rows": sorted({row.row for case in cases for row in case.rows}),
                    }
    return found


if __name__ == "__main__":
    sys.path.insert(0, str(RECORD.parents[1]))  # the folder of benchmarks/
    RECORD.write_text(json.dumps({"names": names(), "rows": rows()}, indent=1) + "\n")
