"""The package's tensors do not depend on torch's default dtype and device, which belong to the user's program."""

import ast
from pathlib import Path

import pytest
from torch.utils import _device

import fastbert

pytestmark = pytest.mark.once

PACKAGE = Path(fastbert.__file__).parent
KERNELS = PACKAGE.parent / "kernels"
# Functions whose tensors depend on the defaults: torch's list for `with torch.device(...)`, without those in OTHERS,
# which make no ordinary tensor.
OTHERS = {"nested_tensor", "empty_quantized"}
FACTORIES = {function.__name__ for function in _device._device_constructors()} - OTHERS


def unnamed(source: str) -> list[str]:
    """The calls of torch's factories in this source that leave dtype or device to the defaults."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = node.func.value
        of_torch = isinstance(owner, ast.Name) and owner.id == "torch" and node.func.attr in FACTORIES
        named = {keyword.arg for keyword in node.keywords}
        if of_torch and None not in named and not {"dtype", "device"} <= named:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", sorted({*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")}), ids=lambda p: p.stem)
def test_every_factory_names_dtype_and_device(path):
    """Buffers for the C++ operators were made with torch's defaults: under `set_default_dtype(torch.float64)` or `with
    torch.device("meta")` the operators wrote past their end, or gave gradients of 1.6e19."""
    assert not unnamed(path.read_text())


@pytest.mark.parametrize(
    "call",
    [
        "torch.empty(3)",
        "torch.zeros(3, dtype=torch.int64)",
        "torch.arange(3, device=d)",
        "torch.tensor([0])",
        "torch.linspace(0, 1, 5)",
        "torch.randint(9, (1,))",
        "torch.as_tensor(x)",
    ],
)
def test_a_call_without_dtype_or_device_is_found(call):
    assert unnamed(f"y = f({call})")


@pytest.mark.parametrize(
    "call",
    ["torch.empty(3, dtype=d, device=e)", "torch.zeros_like(x)", "x.new_empty(3)", "torch.full((1,), 2, **host)"],
)
def test_other_calls_are_not_found(call):
    assert not unnamed(f"y = f({call})")
