"""A seeded differential fuzz of the CPU operators: python tests/fuzz.py --seconds 600 --seed 1

Each case draws an operator, sizes, a dtype, layouts of its tensors (offsets, strides, expanded rows), torch's defaults
and whether gradients are wanted, computes with impl="native" and holds the results against the reference in float64,
with twice the error of the reference in the same dtype for a budget. Where few numbers are compared, or one row
decides, both errors are a matter of chance: a result that is out of its budget is computed again from `NEIGHBOURS` of
the inputs, and the errors of all of them together are compared. One case in four gets a wrong argument: that must
raise, or give what the reference gives. A case is a function of its number alone: --first N --cases 1 runs it again.
FASTBERT_CPP=0 takes torch's operators in place of the C++ ones, ATEN_CPU_CAPABILITY=avx2 the C++ ones without AVX-512;
`make fuzz-asan` looks at every address that either library of C++ reads or writes.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastbert.functional as F
from fastbert import whole_layer
from fastbert.kernels import reference
from fastbert.kernels.cpu import adamw, int8, library
from fastbert.kernels.cpu import operators as cpp
from fastbert.testing import INPUTS, ModelShape

DTYPES = (*(torch.float32, torch.bfloat16) * 3, torch.float16, torch.float64)
REFUSALS = (ValueError, TypeError, IndexError, RuntimeError, AttributeError)
NUMBERS = ("alibi_slopes", "rotary")  # stay float32
# What float16 and bfloat16 round a result of 1 by, and float32's sums in another order.
SLACK = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
NEIGHBOURS = 32


# ---- operators without a name in `functional` -------------------------------------------------------------


def encoder_layer(x: Tensor, cu_seqlens: Tensor, max_seqlen: int, heads: int, *, impl: str, **rest: Any) -> Tensor:
    """A whole layer: in one call of C++ each way where that takes it, else by its operators one by one."""
    if impl == "native" and not rest.get("dropout_p") and not torch.is_grad_enabled():
        projections = dict(zip(("query", "key", "value"), rest["qkv"].chunk(3), strict=True))
        projections |= dict(zip(("query_bias", "key_bias", "value_bias"), rest["qkv_bias"].chunk(3), strict=True))
        weights = F.LayerWeights(**projections, **{n: rest[n] for n in F.LayerWeights._fields if n in rest})
        options = F.LayerOptions(heads, rest["activation"])
        y = cpp.encoder_layers(x, list(weights), options, cu_seqlens)
        if y is not None:
            return y
    fold = impl == "native" and torch.is_grad_enabled()
    return whole_layer.encoder_layer(
        x, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, heads=heads, impl=impl, fold=fold, **rest
    )  # fmt: skip


def rounded(weight: Tensor, largest: int) -> Tensor:
    """A weight [N, K] in float32 as integers up to `largest` say it, with one scale a row."""
    scales = weight.float().abs().amax(1, keepdim=True).clamp_min(int8.SMALLEST) / largest
    return (weight.float() / scales).round() * scales


def int8_linear(x: Tensor, weight: Tensor, bias: Tensor, activation: str | None, *, impl: str) -> Tensor:
    """A product in 8 bits, in float32; the reference in float64 is exact, in other dtypes it has one range a row."""
    if impl == "native" and int8.fits(weight):
        return int8.Int8Weight(weight, bias).linear(x, activation).float()
    if impl == "native":  # such a layer of a model stays what it is
        y = F.linear(x, weight, bias, impl="native").float()
        return y if activation is None else reference.activate(y, activation)
    if x.dtype == torch.float64:
        y = torch.nn.functional.linear(x, weight, bias)
    else:
        q, step, low = int8.quantise_rows(x.float())
        y = torch.nn.functional.linear(
            q * step + low, rounded(weight, int8.LARGEST), None if bias is None else bias.float()
        )
    return y if activation is None else reference.activate(y, activation)


def int8_layer(x: Tensor, cu_seqlens: Tensor, max_seqlen: int, heads: int, *, impl: str, **rest: Any) -> Tensor:
    """A whole layer in 8 bits. The reference has weights of 6 bits in dtypes other than float64, and rounds no x."""
    linears = {name: rest[name] for name in ("qkv", "out", "up", "down")}
    if impl == "native" and all(map(int8.fits, linears.values())) and int8.is_in_cpp() and x.shape[0]:
        biases = {name: rest[f"{name}_bias"] for name in linears}
        factors = torch.ones(x.shape[1], dtype=torch.float32, device="cpu")
        parts = zip(linears["qkv"].chunk(3), biases["qkv"].chunk(3), strict=True)
        weights = [int8.Int8Weight(*part, factors) for part in parts]
        weights += [int8.Int8Weight(linears[name], biases[name]) for name in ("out", "up", "down")]
        norms = tuple(rest[name] for name in ("out_norm", "out_norm_bias", "down_norm", "down_norm_bias"))
        layer = int8.Int8Layer(*weights, norms, heads)
        if int8.fit_in_one_call(layer):
            y = int8.encoder_layers(x, [layer], F.LayerOptions(heads, rest["activation"]), cu_seqlens)
            if y is not None:
                return y
    if x.dtype != torch.float64:
        rest |= {name: rounded(weight, 31).to(weight.dtype) for name, weight in linears.items()}
    return whole_layer.encoder_layer(
        x, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, heads=heads, impl="reference", **rest
    )  # fmt: skip


# what of int8_layer's arguments becomes a weight in 8 bits, or its bias
IN_8_BITS = ("qkv", "qkv_bias", "out", "out_bias", "up", "up_bias", "down", "down_bias")
# without gradients but for the layer of `draw_layer`, and not in float64
INFERENCE = {"encoder_layer": encoder_layer, "int8_linear": int8_linear, "int8_layer": int8_layer}


def lengths_of(rng: random.Random) -> list[int]:
    kind = rng.randrange(4)
    if kind == 0:
        return [rng.choice((1, 15, 16, 17, 64, 65, 97))]
    if kind == 1:
        return [rng.randrange(0, 20) for _ in range(rng.randrange(0, 6))]
    return [rng.randrange(1, rng.choice((4, 40, 120))) for _ in range(rng.randrange(1, 8))]


def draw(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """(operator, its arguments in float32)."""
    op = rng.choice([*(INPUTS | INFERENCE)])
    heads = rng.choice((1, 2, 3, 4))
    head_dim = rng.choice((16, 16, 32, 32, 48, 64, 8, 10, 33))
    hidden = heads * head_dim
    shape = ModelShape(hidden, heads, rng.choice((32, 64, 96, 4, 50, hidden)), 1, vocab=rng.choice((2, 31, 64, 300)))
    lengths, options = lengths_of(rng), {}
    if op == "int8_linear":
        x = torch.randn(sum(lengths), hidden, dtype=torch.float32, device="cpu")
        weight = torch.randn(shape.intermediate, hidden, dtype=torch.float32, device="cpu")
        bias = torch.randn(shape.intermediate, dtype=torch.float32, device="cpu")
        return op, {"x": x, "weight": weight, "bias": bias, "activation": rng.choice((None, "gelu", "relu"))}
    if op == "int8_layer":
        return op, INPUTS["encoder_layer"](shape, lengths, activation=rng.choice(("gelu", "gelu_tanh", "relu")))
    if op == "disentangled_attention":
        options = {"terms": rng.choice((("c2p", "p2c"), ("c2p",), ("p2c",))), "dropout_p": rng.choice((0.0, 0.3))}
    elif "attention" in op:
        options = {name: rng.random() < 0.15 for name in ("bias", "mask", "alibi")}
        options["rotary"] = head_dim % 2 == 0 and rng.random() < 0.15
        options["kv_heads"] = rng.choice([n for n in range(1, heads + 1) if heads % n == 0])
        options["dropout_p"] = rng.choice((0.0, 0.0, 0.3))
        if rng.random() < 0.2:
            options["window"] = (rng.randrange(4), rng.randrange(40))
        if rng.random() < 0.3:
            options["scale"] = rng.choice((0.0, -0.5, 1.0, 1e-6))
        if op == "attention" and rng.random() < 0.15:
            options["lengths_k"] = [rng.randrange(0, 40) for _ in lengths]
    elif op.startswith("add_") or op == "embedding_layer_norm":
        options = {"dropout_p": rng.choice((0.0, 0.0, 0.3))}
        if op.startswith("add_"):
            options |= {"residual": rng.random() < 0.8, "x_bias": rng.random() < 0.2}
            options["eps"] = rng.choice((1e-12, 1e-5))
    elif op == "encoder_layer":
        options = {"activation": rng.choice(("gelu", "gelu_tanh", "relu")), "dropout_p": rng.choice((0.0, 0.0, 0.3))}
    elif op in ("linear_act", "feed_forward"):
        options = {"activation": rng.choice(F.ACTIVATIONS)}
    elif op == "pool":
        options = {"mode": rng.choice((*F.POOLING_MODES, "mean", "mean")), "normalize": rng.random() < 0.3}
    elif op == "linear_cross_entropy":
        options = {"bias": rng.random() < 0.7, "label_smoothing": rng.choice((0.0, 0.1))}
        options["reduction"] = rng.choice(("mean", "sum", "none"))
    inputs = INPUTS[op](shape, lengths, **options)
    if rng.random() < 0.15:
        name = rng.choice([n for n, t in inputs.items() if isinstance(t, Tensor) and t.is_floating_point()])
        inputs[name] = inputs[name] * rng.choice((0.0, 30.0)) + rng.choice((0.0, 100.0))
    return op, inputs


def laid_out(t: Tensor, rng: random.Random) -> Tensor:
    """The same numbers somewhere else in memory: at an odd address, apart, transposed, or as they are."""
    kind = rng.randrange(6)
    if kind == 0 and t.dim() > 1:
        wide = t.new_empty(*t.shape[:-1], t.shape[-1] + rng.choice((1, 8, 16)))
        wide[..., : t.shape[-1]] = t
        return wide[..., : t.shape[-1]]
    if kind == 1:
        offset = rng.randrange(1, 9)
        flat = t.new_empty(t.numel() + offset)
        flat[offset:] = t.flatten()
        return flat[offset:].view(t.shape)
    if kind == 2:
        return t.repeat_interleave(2, dim=-1)[..., ::2]
    if kind == 3 and t.dim() > 1:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    return t


@contextlib.contextmanager
def defaults(rng: random.Random):
    """Torch's defaults as another part of a program may have set them."""
    with torch.device("meta") if rng.random() < 0.15 else contextlib.nullcontext():
        torch.set_default_dtype(rng.choice((torch.float32,) * 3 + (torch.float64, torch.float16, torch.bfloat16)))
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def results(op: str, inputs: dict[str, Any], impl: str, wanted: list[str]) -> dict[str, Tensor]:
    """Outputs, and the gradients of the tensors that are wanted."""
    given = {n: t.detach().requires_grad_() if n in wanted else t for n, t in inputs.items()}
    with torch.set_grad_enabled(bool(wanted)):
        y = INFERENCE.get(op, getattr(F, op, None))(**given, impl=impl)
        outputs = y if isinstance(y, tuple) else (y,)
        found = {f"output {n}": o.detach() for n, o in enumerate(outputs)}
        reached = [o for o in outputs if o.requires_grad]
        if wanted and reached:
            upstream = []
            for o in reached:
                dy = torch.linspace(-1.0, 2.0, o.numel(), dtype=torch.float64, device="cpu")
                upstream.append(dy.view(o.shape).to(o.dtype))
            grads = torch.autograd.grad(
                reached, [given[n] for n in wanted], upstream, allow_unused=True, materialize_grads=True
            )
            found |= {f"gradient of {n}": g for n, g in zip(wanted, grads, strict=True)}
    return found


def exact(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(exact, value))
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def rms(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item() if t.numel() else 0.0


def least_size(op: str, name: str, inputs: dict[str, Any], true: Tensor) -> float:
    """What a result is taken to be at least, for its rounding.

    The gradients of q, k, pk and pq vanish where every text has one key, as the difference of two equal numbers:
    what is left is those numbers' rounding. Where all rows of the loss's weight are one, so are all logits of a row,
    and plain torch loses nothing, since it rounds them alike: what is left here is the rounding of large logits.
    """
    if op == "linear_cross_entropy" and not inputs["weight"].double().diff(dim=0).any():
        logits = rms(inputs["hidden"].double() @ inputs["weight"].double().T)
        factor = {"gradient of hidden": "weight", "gradient of weight": "hidden"}.get(name)
        return max(1e-3, logits * (1.0 if factor is None else rms(inputs[factor])))
    factors = {
        "gradient of q": ("k", "v"), "gradient of k": ("q", "v"),
        "gradient of pk": ("q", "v"), "gradient of pq": ("k", "v"),
    }.get(name)  # fmt: skip
    if factors is None or rms(true) > 1e-12:
        return 1e-3
    return max(1e-3, rms(inputs[factors[0]]) * rms(inputs[factors[1]]))


def rounding_of_scores(inputs: dict[str, Any]) -> float:
    """What a float32 logsumexp of attention's scores is rounded by, at most. The gradients of torch's SDPA, and of the
    Triton kernels, are as much off to one side: these make probabilities of the scores and that number again."""
    q, k, scale = inputs["q"], inputs["k"], inputs.get("scale")
    longest = [t.double().norm(dim=-1).max().item() if t.numel() else 0.0 for t in (q, k)]
    largest = longest[0] * longest[1] * abs(q.shape[-1] ** -0.5 if scale is None else scale)
    return largest * torch.finfo(torch.promote_types(q.dtype, torch.float32)).eps


class Judged(NamedTuple):
    """One result's error against float64, that of the reference in the same dtype, and what every budget adds."""

    error: float
    plain: float
    floor: float


Computed = dict[str, Tensor]
Compute = Callable[[dict[str, Any]], Computed]


def judged(
    op: str, inputs: dict[str, Any], dtype: torch.dtype, wanted: list[str], ours: Computed
) -> Iterator[tuple[str, Judged | str]]:
    """(name, errors) of each of `ours`, or (name, what is wrong) of one that is not to be compared."""
    plain = {n: t.contiguous() if isinstance(t, Tensor) else t for n, t in inputs.items()}
    truth = results(op, {n: exact(t) for n, t in plain.items()}, "reference", wanted)
    same = results(op, plain, "reference", wanted)
    rounded = [(same, 1.0)]  # results of plain torch, and which share of their errors counts
    if any(plain[n] is not t for n, t in inputs.items()):  # torch adds up in another order where a tensor lies apart
        rounded.append((results(op, inputs, "reference", wanted), 1.0))
    if dtype == torch.float64:  # the truth is rounded too: by as much less than float32 as its epsilon is smaller
        narrow = {n: t.float() if isinstance(t, Tensor) and t.dtype == dtype else t for n, t in plain.items()}
        share = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        rounded.append((results(op, narrow, "reference", wanted), share))
    for name, true in truth.items():
        found = ours[name]
        if found.shape != true.shape:
            yield name, f"has shape {tuple(found.shape)}, expected {tuple(true.shape)}"
            continue
        keep = true.isfinite()
        if not torch.equal(found.isfinite(), same[name].isfinite()) and not torch.equal(found.isfinite(), keep):
            yield name, "is finite elsewhere than the reference"
            continue
        keep &= same[name].isfinite()
        # the loss is documented to be float32
        slack = SLACK[torch.float32 if op == "linear_cross_entropy" and dtype == torch.float64 else dtype]
        if "attention" in op and name.startswith("gradient"):
            slack = max(slack, rounding_of_scores(plain))
        error = rms((found.double() - true)[keep])
        of_plain = max(share * rms((of[name].double() - true)[keep]) for of, share in rounded)
        floor = slack * max(rms(true[keep]), least_size(op, name, plain, true))
        yield name, Judged(error, of_plain, floor)


def together(parts: list[Judged]) -> Judged:
    return Judged(*((sum(x * x for x in of_one) / len(parts)) ** 0.5 for of_one in zip(*parts, strict=True)))


def neighbour(inputs: dict[str, Any], number: int) -> dict[str, Any]:
    """The inputs, each tensor times a factor of its own, where it lay: zeros and equal rows stay, and all rounding is
    drawn anew."""
    rng, found = random.Random(number), dict(inputs)
    for name, t in inputs.items():
        if isinstance(t, Tensor) and t.is_floating_point() and name not in NUMBERS and t.is_cpu:
            memory = torch.empty(0, dtype=t.dtype, device="cpu").set_(t.untyped_storage().clone())
            found[name] = memory.as_strided(t.shape, t.stride(), t.storage_offset()).mul_(rng.uniform(0.8, 1.2))
    return found


def differences(
    op: str, inputs: dict[str, Any], dtype: torch.dtype, wanted: list[str], compute: Compute
) -> Iterator[str]:
    """What is out of its budget."""
    found = dict(judged(op, inputs, dtype, wanted, compute(inputs)))
    yield from (f"{name} {wrong}" for name, wrong in found.items() if isinstance(wrong, str))
    out = {n: [j] for n, j in found.items() if isinstance(j, Judged) and not j.error <= 2 * j.plain + j.floor}
    for number in range(NEIGHBOURS if out else 0):
        nearby = neighbour(inputs, number)
        for name, again in judged(op, nearby, dtype, wanted, compute(nearby)):
            if name in out and isinstance(again, Judged):
                out[name].append(again)
    for name, parts in out.items():
        error, plain, floor = together(parts)
        if not error <= (budget := 2 * plain + floor):
            yield f"{name} is {error:.3g} off, the budget is {budget:.3g}"


def spoil(op: str, inputs: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """One argument made wrong."""
    tensors = [n for n, t in inputs.items() if isinstance(t, Tensor)]
    name, kind = rng.choice(tensors), rng.randrange(7)
    t = inputs[name]
    if kind == 0:
        return inputs | {name: t.to("meta")}
    if kind == 1:
        floats, others = (torch.float64, torch.float16), (torch.int32, torch.int64, torch.bool)
        if op == "int8_layer" and name in IN_8_BITS:
            floats = ()  # such a weight may be in any floating-point dtype, whatever x is in
        elif (op, name) == ("int8_linear", "x"):
            floats = floats[1:]  # in float64 too, where the reference is the exact product
        return inputs | {name: t.to(rng.choice((*floats, *others)))}
    if kind == 2 and t.dim() and t.shape[-1]:
        return inputs | {name: t[..., :-1]}
    if kind == 3 and t.dim() and t.shape[0]:
        return inputs | {name: t[:-1]}
    if kind == 4:
        return inputs | {name: t[None]}
    if kind == 5 and not t.is_floating_point() and t.numel():
        wrong = t.clone()
        wrong.view(-1)[rng.randrange(t.numel())] = rng.choice((-1, -(2**31), 2**31 - 1, 7, 10**6))
        return inputs | {name: wrong}
    return inputs | {name: None}


def same_as_reference(op: str, inputs: dict[str, Any], dtype: torch.dtype, compute: Compute) -> bool:
    """Whether the reference takes these arguments too, and gives the same."""
    try:
        return not list(differences(op, inputs, dtype, [], compute))
    except REFUSALS:
        return False


def run_adamw(rng: random.Random) -> str | None:
    """A step of some tensors at odd addresses, and their gradients' norm, beside float64; or one tensor too short."""
    dtype = rng.choice(cpp.dtypes())
    shapes = [rng.choice(((), (1,), (7, 3), (5, 48), (0, 8), (4099,), (40, 33))) for _ in range(rng.randrange(1, 5))]
    tensors = []
    for shape in shapes:
        p, g, mean, square = torch.randn(4, *shape, dtype=torch.float32, device="cpu").to(dtype)
        if shape and rng.random() < 0.7:  # rows at rest, and rows that get their first gradient
            g[::2], mean[:], square[:] = 0.0, 0.0, 0.0
        tensors.append([at_an_offset(t, rng) for t in (p, g, mean, square.abs())])
    decay, scale = rng.choice((0.0, 0.1)), rng.choice((1.0, 0.3))
    by = adamw.numbers(rng.randrange(1, 9), 1e-2, (0.9, 0.999), 1e-8, decay, scale)
    resting = [adamw.at_rest(of[0], not of[2].any() and not of[3].any()) for of in tensors]
    columns = [list(column) for column in zip(*tensors, strict=True)]
    if rng.random() < 0.25:
        columns[rng.randrange(4)][0] = torch.empty(3, dtype=dtype, device="cpu")
        try:
            adamw.step(*columns, resting, [by] * len(tensors))
        except REFUSALS:
            return None
        return "a step of tensors of different sizes was taken"
    wide = [[t.double() for t in column] for column in columns]
    norm = adamw.norm(columns[1])
    adamw.step(*columns, resting, [by] * len(tensors))
    true = torch.cat([g.flatten() for g in wide[1]]).norm().item()
    if not abs(norm - true) <= SLACK[torch.float32] * true:
        return f"the norm is {norm:.7g}, in float64 {true:.7g}"
    for n, (p, g, mean, square) in enumerate(zip(*wide, strict=True)):
        g, mean, square = g * scale, mean.clone(), square.clone()
        mean += by.of_m * (g - mean)
        square = by.beta2 * square + by.of_v * g * g
        p = by.keep * p - by.step * mean / (square.sqrt() * by.of_root + by.eps)
        for name, found, expected in zip(
            ("p", "m", "v"), (columns[i][n] for i in (0, 2, 3)), (p, mean, square), strict=True
        ):
            error = rms(found.double() - expected)
            if not error <= SLACK[dtype] * max(rms(expected), 1e-3):
                return f"{name} of {shapes[n]} is {error:.3g} off, of {rms(expected):.3g}"
    return None


def at_an_offset(t: Tensor, rng: random.Random) -> Tensor:
    """The same numbers, contiguous, at any address."""
    offset = rng.randrange(0, 9)
    flat = t.new_empty(t.numel() + offset)
    flat[offset:] = t.flatten()
    return flat[offset:].view(t.shape)


def draw_layer(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A layer of sizes that the C++ takes in training, as `draw` gives it."""
    heads, head_dim = rng.choice((1, 2, 4)), rng.choice((16, 32, 64))
    shape = ModelShape(heads * head_dim, heads, rng.choice((32, 64, 96)), 1, vocab=2)
    options = {"activation": rng.choice(("gelu", "gelu_tanh", "relu")), "dropout_p": rng.choice((0.0, 0.3))}
    return "encoder_layer", INPUTS["encoder_layer"](shape, lengths_of(rng), **options)


def run_case(number: int) -> str | None:
    """None, or what went wrong."""
    rng = random.Random(number)
    torch.manual_seed(number)
    if number % 25 == 24 and cpp.dtypes():  # no operator of `functional`
        wrong = run_adamw(rng)
        return f"case {number}: AdamW: {wrong}" if wrong else None
    trains_layer = number % 25 == 21
    op, inputs = (draw_layer if trains_layer else draw)(rng)
    dtype = rng.choice(DTYPES)
    if op in INFERENCE and dtype == torch.float64:
        dtype = torch.float32
    # The C++ takes contiguous tensors of some sizes alone: half of all cases have no others, and few have many.
    elsewhere = rng.choice((0.0, 0.0, 0.2, 1.0))
    for name, t in inputs.items():
        if isinstance(t, Tensor) and t.is_floating_point() and name not in NUMBERS:
            inputs[name] = laid_out(t.to(dtype), rng) if rng.random() < elsewhere else t.to(dtype)
    floating = [n for n, t in inputs.items() if isinstance(t, Tensor) and t.is_floating_point() and n not in NUMBERS]
    has_gradients = trains_layer or (rng.random() < 0.5 and op not in INFERENCE)
    wanted = [n for n in floating if rng.random() < 0.8] if has_gradients else []
    what = f"case {number}: {op} in {dtype}, gradients of {wanted}"

    def compute(inputs: dict[str, Any]) -> Computed:
        """Under torch's defaults of this case."""
        with defaults(copy.copy(rng)):
            return results(op, inputs, "native", wanted)

    if rng.random() < 0.25:
        wrong, wanted = spoil(op, inputs, rng), []
        try:
            ours = compute(wrong)
        except REFUSALS:
            return None
        except Exception as error:
            return f"{what}: a wrong argument raised {type(error).__name__}: {error}"
        if any(not o.is_cpu for o in ours.values()):
            return None  # all of it was on meta
        return None if same_as_reference(op, wrong, dtype, compute) else f"{what}: a wrong argument was taken"
    wrong = list(differences(op, inputs, dtype, wanted, compute))
    return f"{what}: {'; '.join(wrong)}" if wrong else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="stop after so long")
    parser.add_argument("--seed", type=int, default=0, help="of the first case: cases of two seeds are different ones")
    parser.add_argument("--first", type=int, default=0, help="number of the first case within the seed")
    parser.add_argument("--cases", type=int, default=sys.maxsize, help="stop after so many")
    parser.add_argument("--libraries", type=Path, help="folder of C++ operators, in place of those installed")
    given = parser.parse_args()
    if given.libraries is not None:
        installed = library.find
        library.find = lambda folder, instructions: installed(given.libraries, instructions)
    print(f"C++ operators: {F.describe_cpp()}", flush=True)
    if given.libraries is not None and not cpp.dtypes():
        return 1
    start, done, failed = time.monotonic(), 0, 0
    while done < given.cases and time.monotonic() - start < given.seconds:
        number = given.seed * 10**9 + given.first + done
        try:
            wrong = run_case(number)
        except Exception as error:
            wrong = f"case {number}: raised {type(error).__name__}: {error}"
        done += 1
        if wrong:
            failed += 1
            print(wrong, flush=True)
    print(f"{done} cases from {given.seed * 10**9 + given.first} on, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
