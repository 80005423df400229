"""How tests, `fastbert verify` and the benchmarks judge an operator: by an error budget, on what `workloads` holds.

The budget: against the same computation in float64, an implementation may err at most twice as much as plain
torch does in the same dtype, as relative root mean square, per named tensor. An operator's test is then

    assert_op("pool", pool_inputs(MODELS["minilm"], LENGTHS["mixed"]), torch.float16, device)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import functional
from .whole_layer import encoder_layer
from .workloads import (  # noqa: F401 - tests and benchmarks import all of it from here
    GRID,
    INPUTS,
    LENGTHS,
    MODELS,
    REAL_TEXTS,
    WORKLOADS,
    ModelShape,
    Workload,
    attention_inputs,
    attention_padded_inputs,
    cross_entropy_inputs,
    cu_seqlens_of,
    embedding_inputs,
    encoder_layer_inputs,
    feed_forward_inputs,
    linear_act_inputs,
    natural_lengths,
    norm_inputs,
    pool_inputs,
    real_lengths,
)

TINY = 1e-7  # what a budget adds, so that an exact reference does not forbid one rounding of float32


# ---- the budget ------------------------------------------------------------------------------------------


def relative_rms(value: Tensor, truth: Tensor) -> float:
    """||value - truth|| / ||truth|| in float64 (just ||value|| where truth is zero); inf where value has a NaN."""
    if value.shape != truth.shape:
        raise AssertionError(f"shape {tuple(value.shape)}, expected {tuple(truth.shape)}")
    if value.device != truth.device:
        value, truth = value.cpu(), truth.cpu()
    value, truth = value.detach().double(), truth.detach().double()  # on a GPU: the CPU takes seconds for large ones
    both_minus_inf = (value == truth) & truth.isinf()  # a log-sum-exp over nothing
    error = torch.where(both_minus_inf, 0.0, value - truth).norm()
    size = torch.where(both_minus_inf, 0.0, truth).norm()
    ratio = (error / size if size > 0 else error).item()
    return ratio if ratio == ratio else float("inf")


def budget(plain: Tensor, truth: Tensor, factor: float = 2.0) -> float:
    """The relative RMS error allowed: `factor` times that of plain torch in the same dtype, plus TINY."""
    return factor * relative_rms(plain, truth) + TINY


def error_and_budget(
    ours: Tensor, plain: Tensor, truth: Tensor, factor: float = 2.0, expected: Tensor | None = None
) -> tuple[float, float]:
    """(the relative RMS error of `ours`, `budget`), both finite wherever `ours` has something to be held against.

    Elements where plain torch overflows or has a NaN, and the truth does not, have no part in the budget, which would
    be infinite. There `ours` has to hold the very same, or comes as near to the truth as everywhere else.

    Args:
        expected: what `ours` is compared with, by default the truth.
    """
    if not ours.shape == plain.shape == truth.shape:
        raise AssertionError(f"shape {tuple(ours.shape)}, expected {tuple(truth.shape)}")
    ours, plain, truth = (t.detach().double().to(ours.device) for t in (ours, plain, truth))
    expected = truth if expected is None else expected.detach().double().to(ours.device)
    lost = (plain != truth) & ~(plain.isfinite() & truth.isfinite())
    alike = lost & ((ours == plain) | (ours.isnan() & plain.isnan()))
    error = relative_rms(ours.masked_fill(alike, 0.0), expected.masked_fill(alike, 0.0))
    return error, budget(plain.masked_fill(lost, 0.0), truth.masked_fill(lost, 0.0), factor)


def assert_within_budget(ours: Tensor, plain: Tensor, truth: Tensor, name: str = "output", factor: float = 2.0) -> None:
    """Fails unless err(ours) <= factor * err(plain) + TINY, both against float64 truth; see `error_and_budget`."""
    error, allowed = error_and_budget(ours, plain, truth, factor)
    assert error <= allowed, f"{name}: relative RMS error {error:.2e}, budget {allowed:.2e}"


def allowed_factor(dtype: torch.dtype, interpreted_bf16: float = 4.0) -> float:
    """How many times plain torch's error a Triton kernel may make: 2, and `interpreted_bf16` under the interpreter.

    Triton's interpreter casts float32 to bf16 by cutting bits off, where cards (and the emulator) round: twice the
    error of each cast, and biased, so that it adds up over a sum.
    """
    return interpreted_bf16 if dtype == torch.bfloat16 and functional.machine.INTERPRETING else 2.0


@dataclass(frozen=True)
class Check:
    """One tensor of one run: its relative RMS error against float64, and the error allowed."""

    name: str  # "out" (of several "out[1]"), or "d" and the input's name
    error: float
    budget: float

    @property
    def passed(self) -> bool:
        return self.error <= self.budget

    def __str__(self) -> str:
        return f"{self.name}: relative RMS error {self.error:.2e}, budget {self.budget:.2e}"


# ---- one operator against the truth ----------------------------------------------------------------------


@dataclass(frozen=True)
class Runs:
    """One operator run three times on the same inputs: what came of it, and under which upstream gradients."""

    names: list[str]  # of the tensors: "out" (of several "out[1]"), then "d" and the input's name
    ours: list[Tensor]  # in the dtype under test
    plain: list[Tensor]  # the specification in that dtype
    truth: list[Tensor]  # the specification in float64
    upstream: list[Tensor | None]  # an output's; None where it carries no gradient

    def checks(self, factor: float = 2.0) -> list[Check]:
        return [
            Check(name, *error_and_budget(o, p, t, factor))
            for name, o, p, t in zip(self.names, self.ours, self.plain, self.truth, strict=True)
        ]


def compare(
    ours: Callable, plain: Callable, inputs: dict[str, Any], dtype: torch.dtype, device: torch.device | str = "cpu", *,
    constant: Sequence[str] = (), factor: float = 2.0, backward: bool = True,
) -> list[Check]:  # fmt: skip
    """A Check for each output of `ours(**inputs)` and each input's gradient, under a random upstream gradient.

    `plain` is the specification of the same; see `run_three`.
    """
    return run_three(ours, plain, inputs, dtype, device, constant=constant, backward=backward).checks(factor)


def run_three(
    ours: Callable,
    plain: Callable,
    inputs: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    constant: Sequence[str] = (),
    backward: bool = True,
    upstream: Sequence[Tensor | None] = (),
) -> Runs:
    """`ours(**inputs)` and its gradients, and the specification's: `plain`, in `dtype` and in float64.

    Floating-point tensors among the inputs are rounded to `dtype` once, the same for all three, and get
    gradients; those named in `constant`, and whatever is no tensor, are passed as they are.
    upstream: gradients of the outputs; random ones by default.
    """
    inputs = {name: _move(value, device) for name, value in inputs.items()}
    rounded = {
        name: value.to(dtype)
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point() and name not in constant
    }
    upstream = [_move(gradient, device) for gradient in upstream]

    def run(f: Callable, working: torch.dtype) -> list[Tensor]:
        leaves = {name: value.to(working, copy=True).requires_grad_(backward) for name, value in rounded.items()}
        outputs = f(**{**inputs, **leaves})
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        if backward and not upstream:  # the first run: ours
            empty = not any(leaf.numel() for leaf in leaves.values())
            assert empty or outputs[0].requires_grad, "the output carries no gradient"
            upstream.extend(_upstream(outputs, dtype))
        grads = _gradients(outputs, list(leaves.values()), upstream) if backward else ()
        return [tensor.detach() for tensor in (*outputs, *grads)]  # and let go of the graph: it may be large

    tensors = [run(f, working) for f, working in ((ours, dtype), (plain, dtype), (plain, torch.float64))]
    n_outputs = len(tensors[0]) - (len(rounded) if backward else 0)
    names = ["out"] if n_outputs == 1 else [f"out[{n}]" for n in range(n_outputs)]
    names += [f"d{name}" for name in rounded] if backward else []
    return Runs(names, *tensors, upstream)


def _move(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, tuple):
        return tuple(_move(v, device) for v in value)
    return value.to(device) if isinstance(value, Tensor) else value


def _upstream(outputs: list[Tensor], dtype: torch.dtype) -> list[Tensor | None]:
    """A random gradient for each output; None for one that carries none (a log-sum-exp kept for inspection)."""
    generator = torch.Generator().manual_seed(len(outputs))
    return [
        torch.randn(o.shape, generator=generator, dtype=torch.float32, device="cpu").to(o.device, dtype)
        if o.requires_grad
        else None
        for o in outputs
    ]


def _gradients(outputs: list[Tensor], leaves: list[Tensor], upstream: list[Tensor | None]) -> Sequence[Tensor]:
    """Gradients of all leaves; zeros where nothing depends on a leaf."""
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, upstream, strict=True) if g is not None and o.requires_grad]
    if not pairs:  # plain torch over no sequences is a fresh tensor of zeros
        return [torch.zeros_like(leaf) for leaf in leaves]
    of, by = zip(*pairs, strict=True)
    return torch.autograd.grad(of, leaves, by, allow_unused=True, materialize_grads=True)


# Inputs that operators take as float32 numbers and give no gradient.
WITHOUT_GRADIENT = ("alibi_slopes", "rotary")


def function_of(op: str) -> Callable:
    """The function of an operator's name in `INPUTS`."""
    return encoder_layer if op == "encoder_layer" else getattr(functional, op)


def run_op(
    op: str, inputs: dict[str, Any], dtype: torch.dtype, device: torch.device | str = "cpu", *,
    impl: str | None = "triton", backward: bool = True, upstream: Sequence[Tensor | None] = (),
) -> Runs:  # fmt: skip
    """`run_three` for `function_of(op)`: this implementation of it and the reference."""
    function = function_of(op)
    return run_three(
        functools.partial(function, impl=impl), functools.partial(function, impl="reference"),
        inputs, dtype, device, constant=WITHOUT_GRADIENT, backward=backward, upstream=upstream,
    )  # fmt: skip


def check_op(
    op: str, inputs: dict[str, Any], dtype: torch.dtype, device: torch.device | str = "cpu", *,
    impl: str | None = "triton", factor: float = 2.0, backward: bool = True,
) -> list[Check]:  # fmt: skip
    """`compare` for `function_of(op)`: this implementation of it against the reference."""
    return run_op(op, inputs, dtype, device, impl=impl, backward=backward).checks(factor)


def assert_op(
    op: str, inputs: dict[str, Any], dtype: torch.dtype, device: torch.device | str = "cpu", **options
) -> None:
    """Fails unless every output and every gradient is within its budget; options as in `check_op`."""
    failed = [str(check) for check in check_op(op, inputs, dtype, device, **options) if not check.passed]
    assert not failed, f"{op} in {dtype}: " + "; ".join(failed)
