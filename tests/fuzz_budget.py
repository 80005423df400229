"""Whether a result of the fuzz is within its budget: twice the error of the reference in the same dtype, plus rounding.

With few numbers, or where one row decides, both errors depend on chance. So a result outside its budget is computed
again from `NEIGHBOURS` variants of the inputs, and the errors of all of them are compared together. Under a ReLU they
are more: where a number before it is nearly 0, rounding decides whether it has a gradient, which happens to some inputs
only and makes their errors 30 times as large.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fuzz_operators import results

NUMBERS = ("alibi_slopes", "rotary")  # stay float32
# Rounding of a result near 1 in float16 and bfloat16; in float32, the effect of another order of summation.
SLACK = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
NEIGHBOURS, UNDER_A_RELU = 32, 256
ORDER = 4  # epsilons by which sums over the keys differ if their order does


def exact(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(exact, value))
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def rms(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item() if t.numel() else 0.0


def least_size(op: str, name: str, inputs: dict[str, Any], true: Tensor) -> float:
    """The least size that a result is taken to have, for its rounding.

    Where every text has one key, the gradients of q, k, pk and pq are differences of two equal numbers: only the
    rounding of these numbers remains. Where all rows of the loss's weight are equal, so are all logits of a row, and
    plain torch has no error, since it rounds them alike: ours has the rounding of large logits.
    """
    if op == "linear_cross_entropy" and not inputs["weight"].double().diff(dim=0).any():
        logits = rms(inputs["hidden"].double() @ inputs["weight"].double().T)
        factor = {"gradient of hidden": "weight", "gradient of weight": "hidden"}.get(name)
        return max(1e-3, logits * (1.0 if factor is None else rms(inputs[factor])))
    return 1e-3 if rms(true) > 1e-12 else max(1e-3, size_of_terms(name, inputs))


def size_of_terms(name: str, inputs: dict[str, Any]) -> float:
    """The size of the terms whose differences are the gradients of q, k, pk and pq; 0 for other results."""
    factors = {
        "gradient of q": ("k", "v"), "gradient of k": ("q", "v"),
        "gradient of pk": ("q", "v"), "gradient of pq": ("k", "v"),
    }.get(name)  # fmt: skip
    if factors is None:
        return 0.0
    scale = inputs.get("scale")
    relative = 1.0 if scale is None else abs(scale) * inputs["q"].shape[-1] ** 0.5
    return rms(inputs[factors[0]]) * rms(inputs[factors[1]]) * relative


def rounding_of_scores(inputs: dict[str, Any]) -> float:
    """The largest rounding error of a float32 logsumexp of attention's scores. The gradients of torch's SDPA and of the
    Triton kernels have a bias as large, because both compute probabilities from the scores and that number.

    If one key has nearly all of the probability, the gradients of q and k are small differences of large terms. They
    have the rounding of these terms: ours that of the output o, from which delta is computed, and in float64 the
    reference that of the logsumexp.
    """
    if "qkv" in inputs:  # a layer's inputs
        qkv = inputs["x"].double() @ inputs["qkv"].double().T + inputs["qkv_bias"].double()
        q, k, _ = qkv.unflatten(1, (3, inputs["heads"], -1)).to(inputs["x"].dtype).unbind(1)
    else:
        q, k = inputs["q"], inputs["k"]
    scale = inputs.get("scale")
    longest = [t.double().norm(dim=-1).max().item() if t.numel() else 0.0 for t in (q, k)]
    largest = longest[0] * longest[1] * abs(q.shape[-1] ** -0.5 if scale is None else scale)
    return largest * torch.finfo(torch.promote_types(q.dtype, torch.float32)).eps


class Judged(NamedTuple):
    """The error of one result against float64, that of the reference in the same dtype, and what every budget adds."""

    error: float
    plain: float
    floor: float


Computed = dict[str, Tensor]
Compute = Callable[[dict[str, Any]], Computed]


def judged(
    op: str, inputs: dict[str, Any], dtype: torch.dtype, wanted: list[str], ours: Computed
) -> Iterator[tuple[str, Judged | str]]:
    """(name, errors) of each of `ours`, or (name, what is wrong) if the values cannot be compared."""
    plain = {n: t.contiguous() if isinstance(t, Tensor) else t for n, t in inputs.items()}
    truth = results(op, {n: exact(t) for n, t in plain.items()}, "reference", wanted)
    same = results(op, plain, "reference", wanted)
    rounded = [(same, 1.0)]  # results of plain torch, and the share of their errors that counts
    if any(plain[n] is not t for n, t in inputs.items()):  # torch sums strided tensors in another order
        rounded.append((results(op, inputs, "reference", wanted), 1.0))
    if dtype == torch.float64:  # the truth is rounded too, by as much less than float32 as its epsilon is smaller
        narrow = {n: t.float() if isinstance(t, Tensor) and t.dtype == dtype else t for n, t in plain.items()}
        share = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        if op == "linear_cross_entropy":  # documented to be computed in float32
            share = 1.0
        rounded.append((results(op, narrow, "reference", wanted), share))
    for name, true in truth.items():
        found = ours[name]
        if found.shape != true.shape:
            yield name, f"has shape {tuple(found.shape)}, expected {tuple(true.shape)}"
            continue
        keep = true.isfinite()
        if not ((found.isfinite() == same[name].isfinite()) | (found.isfinite() == keep)).all():
            yield name, "is not finite where the reference is finite, or the other way round"
            continue
        keep &= same[name].isfinite()
        # the loss is documented to be float32
        slack = SLACK[torch.float32 if op == "linear_cross_entropy" and dtype == torch.float64 else dtype]
        if ("attention" in op or op == "encoder_layer") and name.startswith("gradient"):
            slack = max(slack, rounding_of_scores(plain))
        error = rms((found.double() - true)[keep])
        of_plain = max(share * rms((of[name].double() - true)[keep]) for of, share in rounded)
        floor = slack * max(rms(true[keep]), least_size(op, name, plain, true))
        if "attention" in op:
            rounding = ORDER * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
            if op != "disentangled_attention":
                rounding = max(rounding, rounding_of_scores(plain))
            floor = max(floor, rounding * size_of_terms(name, plain))
        yield name, Judged(error, of_plain, floor)


def together(parts: list[Judged]) -> Judged:
    return Judged(*((sum(x * x for x in of_one) / len(parts)) ** 0.5 for of_one in zip(*parts, strict=True)))


def neighbour(inputs: dict[str, Any], number: int) -> dict[str, Any]:
    """The inputs, each tensor times a factor, in the same layout. Zeros and equal rows stay; all rounding differs."""
    rng, found = random.Random(number), dict(inputs)
    for name, t in inputs.items():
        if isinstance(t, Tensor) and t.is_floating_point() and name not in NUMBERS and t.is_cpu:
            memory = torch.empty(0, dtype=t.dtype, device="cpu").set_(t.untyped_storage().clone())
            found[name] = memory.as_strided(t.shape, t.stride(), t.storage_offset()).mul_(rng.uniform(0.8, 1.2))
    return found


def differences(
    op: str, inputs: dict[str, Any], dtype: torch.dtype, wanted: list[str], compute: Compute
) -> Iterator[str]:
    """The results that are outside their budget, in words."""
    found = dict(judged(op, inputs, dtype, wanted, compute(inputs)))
    yield from (f"{name} {wrong}" for name, wrong in found.items() if isinstance(wrong, str))
    out = {n: [j] for n, j in found.items() if isinstance(j, Judged) and not j.error <= 2 * j.plain + j.floor}
    neighbours = UNDER_A_RELU if inputs.get("activation") == "relu" else NEIGHBOURS
    for number in range(neighbours if out else 0):
        nearby = neighbour(inputs, number)
        for name, again in judged(op, nearby, dtype, wanted, compute(nearby)):
            if name in out and isinstance(again, Judged):
                out[name].append(again)
    for name, parts in out.items():
        error, plain, floor = together(parts)
        if not error <= (budget := 2 * plain + floor):
            yield f"{name} is {error:.3g} off, the budget is {budget:.3g}"
