"""A seeded differential fuzz of the CPU operators: python tests/fuzz.py --seconds 600 --seed 1

Each case draws an operator, sizes, a dtype, layouts of its tensors (offsets, strides, expanded rows), torch's defaults
and whether gradients are wanted, computes with impl="native" and compares the results with the reference in float64,
within the budget of `fuzz_budget`. One case in four gets a wrong argument: the call must raise, or return what the
reference returns. One in 25 is a layer in training under autocast. A case depends on its number alone: --first N
--cases 1 runs case N again.
FASTBERT_CPP=0 tests torch's operators instead of the C++ ones, ATEN_CPU_CAPABILITY=avx2 the C++ without AVX-512; `make
fuzz-asan` checks every address that either C++ library reads or writes.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastbert.functional as F
from fastbert.kernels.cpu import adamw, library
from fastbert.kernels.cpu import operators as cpp
from fastbert.testing import INPUTS, ModelShape
from fuzz_budget import NUMBERS, SLACK, Compute, Computed, differences, rms
from fuzz_operators import IN_8_BITS, INFERENCE, results

DTYPES = (*(torch.float32, torch.bfloat16) * 3, torch.float16, torch.float64)
REFUSALS = (ValueError, TypeError, IndexError, RuntimeError, AttributeError)


def lengths_of(rng: random.Random) -> list[int]:
    kind = rng.randrange(4)
    if kind == 0:
        return [rng.choice((1, 15, 16, 17, 64, 65, 97))]
    if kind == 1:
        return [rng.randrange(0, 20) for _ in range(rng.randrange(0, 6))]
    return [rng.randrange(1, rng.choice((4, 40, 120))) for _ in range(rng.randrange(1, 8))]


def draw(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """(operator, its arguments in float32)."""
    op = rng.choice([*(INPUTS | INFERENCE), "dropout"])
    heads = rng.choice((1, 2, 3, 4))
    head_dim = rng.choice((16, 16, 32, 32, 48, 64, 8, 10, 33))
    hidden = heads * head_dim
    shape = ModelShape(hidden, heads, rng.choice((32, 64, 96, 4, 50, hidden)), 1, vocab=rng.choice((2, 31, 64, 300)))
    lengths, options = lengths_of(rng), {}
    if op == "dropout":
        x = torch.randn(sum(lengths), hidden, dtype=torch.float32, device="cpu")
        rows = torch.arange(len(x), dtype=rng.choice((torch.int32, torch.int64)), device="cpu") * rng.choice((1, 3))
        seed = torch.tensor([rng.randrange(2**62)], dtype=torch.int64, device="cpu")
        return op, {"x": x, "dropout_p": rng.choice((0.0, 0.1, 0.5)), "seed": seed, "stream": 3, "row_ids": rows}
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
    """The same numbers laid out differently: at an odd address, with gaps, transposed, or unchanged."""
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
    """Sets torch's defaults as another part of a program might."""
    with torch.device("meta") if rng.random() < 0.15 else contextlib.nullcontext():
        torch.set_default_dtype(rng.choice((torch.float32,) * 3 + (torch.float64, torch.float16, torch.bfloat16)))
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def spoil(op: str, inputs: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The inputs with one argument made wrong."""
    tensors = [n for n, t in inputs.items() if isinstance(t, Tensor)]
    name, kind = rng.choice(tensors), rng.randrange(7)
    t = inputs[name]
    if kind == 0:
        return inputs | {name: t.to("meta")}
    if kind == 1:
        floats, others = (torch.float64, torch.float16), (torch.int32, torch.int64, torch.bool)
        if op == "int8_layer" and name in IN_8_BITS:
            floats = ()  # these weights may have any floating-point dtype, whatever the dtype of x
        elif (op, name) == ("int8_linear", "x"):
            floats = floats[1:]  # float64 is allowed: there the reference is the exact product
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
    """Whether the reference also takes these arguments, and gives the same result."""
    try:
        return not list(differences(op, inputs, dtype, [], compute))
    except REFUSALS:
        return False


def run_adamw(rng: random.Random) -> str | None:
    """Compares an AdamW step over tensors at odd addresses, and their gradients' norm, with float64; or passes a tensor
    that is too short."""
    dtype = rng.choice(cpp.dtypes())
    shapes = [rng.choice(((), (1,), (7, 3), (5, 48), (0, 8), (4099,), (40, 33))) for _ in range(rng.randrange(1, 5))]
    tensors = []
    for shape in shapes:
        p, g, mean, square = torch.randn(4, *shape, dtype=torch.float32, device="cpu").to(dtype)
        if shape and rng.random() < 0.7:  # some rows never had a gradient, others get their first one
            g[::2], mean[:], square[:] = 0.0, 0.0, 0.0
        tensors.append([at_an_offset(t, rng) for t in (p, g, mean, square.abs())])
    decay, scale = rng.choice((0.0, 0.1)), rng.choice((1.0, 0.3))
    by = adamw.numbers(rng.randrange(1, 9), 1e-2, (0.9, 0.999), 1e-8, decay, scale, adamw.NOTHING_KEPT)
    resting = [adamw.at_rest(of[0], not of[2].any() and not of[3].any()) for of in tensors]
    columns = [list(column) for column in zip(*tensors, strict=True)]
    counts = [torch.zeros((), dtype=torch.float32, device="cpu") for _ in tensors]

    late = [torch.zeros_like(rows) if rng.random() < 0.5 else None for rows in resting]

    def step() -> None:
        p, g, *moments = columns
        update = adamw.Update(p, *moments, counts, resting, [0] * len(tensors), late)
        update.step(g, [touched_rows(t, rng) for t in g], [by])
        for t, of_rows in zip(p, late, strict=True):
            if of_rows is not None:
                adamw.settle(t, of_rows, by.kept, None)

    if rng.random() < 0.25:
        columns[rng.randrange(4)][0] = torch.empty(3, dtype=dtype, device="cpu")
        try:
            step()
        except REFUSALS:
            return None
        return "a step of tensors of different sizes was taken"
    wide = [[t.double() for t in column] for column in columns]
    norm = adamw.norm(columns[1], [touched_rows(g, rng) for g in columns[1]])
    step()
    true = torch.cat([g.flatten() for g in wide[1]]).norm().item()
    if not abs(norm - true) <= SLACK[torch.float32] * true:
        return f"the norm is {norm:.7g}, in float64 {true:.7g}"
    for n, before in enumerate(zip(*wide, strict=True)):
        p, g, mean, square = before
        g = g * scale
        mean = mean + by.of_m * (g - mean)
        square = by.beta2 * square + by.of_v * g * g
        p = by.keep * p - by.step * mean / (square.sqrt() * by.of_root + by.eps)
        for place, name, expected in ((0, "p", p), (2, "m", mean), (3, "v", square)):
            error = rms(columns[place][n].double() - expected)
            # a sum near 0 has the rounding of its terms
            if not error <= SLACK[dtype] * max(rms(expected), rms(before[place]), 1e-3):
                return f"{name} of {shapes[n]} is {error:.3g} off, of {rms(expected):.3g}"
    return None


def at_an_offset(t: Tensor, rng: random.Random) -> Tensor:
    """A contiguous copy at any address."""
    offset = rng.randrange(0, 9)
    flat = t.new_empty(t.numel() + offset)
    flat[offset:] = t.flatten()
    return flat[offset:].view(t.shape)


def touched_rows(g: Tensor, rng: random.Random) -> Tensor | None:
    """Which rows of a gradient may be other than zero; or None, which says nothing."""
    if g.dim() != 2 or rng.random() < 0.5:
        return None
    return ((g != 0).any(1) | (torch.rand(len(g), device="cpu") < 0.2)).to(torch.uint8)


def draw_layer(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A layer of sizes that the C++ takes in training, in the form that `draw` returns."""
    heads, head_dim = rng.choice((1, 2, 4)), rng.choice((16, 32, 64))
    shape = ModelShape(heads * head_dim, heads, rng.choice((32, 64, 96)), 1, vocab=2)
    options = {"activation": rng.choice(("gelu", "gelu_tanh", "relu")), "dropout_p": rng.choice((0.0, 0.3))}
    inputs = INPUTS["encoder_layer"](shape, lengths_of(rng), **options)
    return "encoder_layer", inputs | {"first_only": rng.random() < 0.3}


def run_case(number: int) -> str | None:
    """What went wrong in this case, or None."""
    rng = random.Random(number)
    torch.manual_seed(number)
    kind = number % 25
    if kind == 24 and cpp.dtypes():  # AdamW is no operator of `functional`
        wrong = run_adamw(rng)
        return f"case {number}: AdamW: {wrong}" if wrong else None
    if kind == 13:
        with torch.autocast("cpu", torch.bfloat16):
            return run_operator(number, rng, *draw_layer(rng), torch.float32, trains=True)
    op, inputs = (draw_layer if kind == 21 else draw)(rng)
    return run_operator(number, rng, op, inputs, rng.choice(DTYPES), trains=kind == 21)


def run_operator(
    number: int, rng: random.Random, op: str, inputs: dict[str, Any], dtype: torch.dtype, trains: bool
) -> str | None:
    """What went wrong with these float32 arguments in `dtype`, or None. trains: gradients are always wanted."""
    if op in INFERENCE and dtype == torch.float64:
        dtype = torch.float32
    # For some sizes the C++ takes contiguous tensors only: half of all cases have no others, and few have many.
    elsewhere = rng.choice((0.0, 0.0, 0.2, 1.0))
    for name, t in inputs.items():
        if isinstance(t, Tensor) and t.is_floating_point() and name not in NUMBERS:
            inputs[name] = laid_out(t.to(dtype), rng) if rng.random() < elsewhere else t.to(dtype)
    floating = [n for n, t in inputs.items() if isinstance(t, Tensor) and t.is_floating_point() and n not in NUMBERS]
    has_gradients = trains or (rng.random() < 0.5 and op not in INFERENCE)
    wanted = [n for n in floating if rng.random() < 0.8] if has_gradients else []
    what = f"case {number}: {op} in {dtype}, gradients of {wanted}"
    if torch.is_autocast_enabled("cpu"):
        # the budget is that of autocast's dtype
        what, dtype = f"{what}, under autocast", torch.get_autocast_dtype("cpu")

    def compute(inputs: dict[str, Any]) -> Computed:
        """Computes under torch's defaults of this case."""
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
            return None  # all tensors were on meta
        return None if same_as_reference(op, wrong, dtype, compute) else f"{what}: a wrong argument was taken"
    wrong = list(differences(op, inputs, dtype, wanted, compute))
    return f"{what}: {'; '.join(wrong)}" if wrong else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="stop after so long")
    parser.add_argument("--seed", type=int, default=0, help="two seeds have different cases")
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
