"""`impl` says which implementation computes; `functional.engine` names the engine behind "native"."""

import sys

import pytest
import torch

from fastbert import batch_invariant, functional, kernels
from fastbert.cli.main import main
from fastbert.functional._choice import triton_module
from fastbert.kernels import _gemm, native
from fastbert.kernels.cpu import operators as cpp
from fastbert.testing import INPUTS, MODELS

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs_of(op: str, dtype: torch.dtype) -> dict:
    """Inputs with more rows than the limit up to which our product computes where the vendor library is faster."""
    if op == "linear":
        made = {"x": torch.randn(75, 64), "weight": torch.randn(96, 64), "bias": torch.randn(96)}
    else:
        made = INPUTS[op](MODELS["tiny"], (5, 70))
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in made.items()
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", functional.OPERATORS)
def test_the_engine_that_is_named_computes(op, dtype, monkeypatch):
    """Every call into the C++ library goes through one function."""
    calls, right = [], cpp.call
    monkeypatch.setattr(cpp, "call", lambda *args: calls.append(args[0]) or right(*args))
    with torch.no_grad():
        getattr(functional, op)(**inputs_of(op, dtype), impl="native")
    named = functional.engine(op, dtype, CPU, "native")
    assert bool(calls) == named.startswith("C++"), named


def test_engines_of_the_other_implementations():
    for op in functional.OPERATORS:
        assert functional.engine(op, torch.float32, CPU, "reference") == "plain torch"
    with pytest.raises(ValueError, match="impl must be one of"):
        functional.engine("pool", torch.float32, CPU, "fastest")
    if functional.why_not_triton(CPU) is not None:
        with pytest.raises(RuntimeError, match="cannot run here"):
            functional.engine("pool", torch.float32, CPU, "triton")


@pytest.mark.parametrize("impl", [None, "triton", "native", "reference"])
def test_linear_is_computed_by_the_impl_that_is_named(impl, monkeypatch):
    """impl="triton" ran the vendor's product without a word."""
    asked = []
    monkeypatch.setattr(native, "linear", lambda *args: asked.append("native"))
    monkeypatch.setattr(_gemm, "linear", lambda *args: asked.append("triton"))
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: asked.append("reference"))
    monkeypatch.setattr("fastbert.functional._choice.why_not_triton", lambda device: None)
    functional.linear(torch.ones(2, 4), torch.ones(3, 4), impl=impl)
    assert asked == [impl or "native"]


def test_the_engine_of_linear_within_batch_invariance(monkeypatch):
    """It named the vendor library, although our product computes there."""
    monkeypatch.setattr("fastbert.functional._choice.why_not_triton", lambda device: None)
    assert functional.engine("linear", torch.float32, CPU) != "our Triton kernel"
    with batch_invariant():
        assert functional.engine("linear", torch.float32, CPU) == "our Triton kernel"


def test_linear_refuses_what_cannot_run():
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match="impl must be one of"):
        functional.linear(x, x, impl="fastest")
    if functional.why_not_triton(CPU) is not None:
        with pytest.raises(RuntimeError, match="cannot run here"):
            functional.linear(x, x, impl="triton")


def test_info_names_the_engines(capsys):
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    _, _, table = said.partition("who computes them on ")
    for op in functional.OPERATORS:
        assert f"\n  {op} " in table
    assert functional.engine("attention", torch.float32, device_of_info()) in table


def device_of_info() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.once
def test_a_kernels_module_may_be_imported_first_while_a_graph_is_traced(tmp_path, monkeypatch):
    """torch.compile cannot trace `import_module`: without the mark on our function the first call would fail."""
    (tmp_path / "new_operator.py").write_text("def twice(x):\n    return 2 * x\n")
    monkeypatch.setattr(kernels, "__path__", [*kernels.__path__, str(tmp_path)])
    whole = torch.compile(lambda x: triton_module("new_operator").twice(x), fullgraph=True, backend="eager")
    try:
        assert whole(torch.ones(3, dtype=torch.float32, device="cpu")).tolist() == [2.0] * 3
    finally:
        sys.modules.pop("fastbert.kernels.new_operator", None)
        kernels.__dict__.pop("new_operator", None)
