"""Runs every operator through Triton's launch path for a GPU that is absent, and prints what was launched as JSON.

`test_launch.py` runs this in a process of its own: the tests' process interprets kernels, which Triton fixes at import.
"""

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fastbert import functional as F
from fastbert import verify
from fastbert.emulator.driver import Launch, offline
from fastbert.kernels._launch import Plan
from fastbert.testing import LENGTHS, MODELS, WITHOUT_GRADIENT, function_of

DTYPES = verify.DTYPES
# (architecture, dtypes): architectures differ in the same way for both 16-bit types
ARCHES = (("sm_90", tuple(DTYPES)), ("sm_80", ("bf16",)), ("gfx942", ("bf16",)))
NARROW = replace(MODELS["base"], hidden=128, heads=2, intermediate=256, vocab=211)

# Twenty batches: one token, whole and odd numbers of tokens, one sequence and many, short and long ones.
BATCHES = [
    *([n] for n in (1, 16, 17, 63, 64, 65, 100, 128, 129, 200)),
    *([n] * 3 for n in (5, 16, 64, 128)),
    *(LENGTHS[name] for name in ("mixed", "with_empty")),
    [1, 1], [300, 2, 40], [7] * 16, [33, 80, 15, 128],
]  # fmt: skip


def run(op: str, inputs: dict, dtype: torch.dtype, backward: bool = True) -> None:
    """The operator on these inputs in a dtype, forward, and backward to every floating-point input."""
    leaves = {
        name: value.to(dtype).requires_grad_(backward)
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point() and name not in WITHOUT_GRADIENT
    }
    out = function_of(op)(**{**inputs, **leaves}, impl="triton")
    if backward:
        outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
        torch.autograd.backward(outs, [torch.zeros_like(o) for o in outs])


def shown(launch: Launch) -> dict:
    bound = {name: str(value) for name, value in launch.constexprs.items()}
    return {
        "kernel": launch.name, "variant": hash(launch.variant), "grid": launch.grid, "constexprs": bound,
        "fused": launch.options["enable_fp_fusion"],
    }  # fmt: skip


def every_operator() -> Iterator[dict]:
    """Every case of `fastbert verify`, forward and backward, in every dtype: the launches of each, or its error."""
    found = ((arch, dtype, op) for arch, dtypes in ARCHES for dtype in dtypes for op in verify.CASES)
    for arch, dtype, op in found:
        for name, options in verify.CASES[op].items():
            seen: list[Launch] = []
            error = None
            with offline(arch, seen.append, compiles=False):
                try:
                    for _ in range(2):  # the first call binds the kernel, the second uses the stored plan
                        inputs = verify.inputs_of(op, NARROW, (5, 70, 0, 1, 33, 200), **options)
                        run(op, inputs, DTYPES[dtype])
                except Exception as raised:
                    error = f"{type(raised).__name__}: {raised}"
            first, second = (seen[half * (len(seen) // 2) :][: len(seen) // 2] for half in (0, 1))
            yield {
                "arch": arch, "op": op, "case": name, "dtype": dtype, "error": error,
                "launches": [shown(launch) for launch in first],
                "same": [launch.variant for launch in first] == [launch.variant for launch in second],
            }  # fmt: skip


def twenty_batches() -> Iterator[dict]:
    """For every operator and case, the variants of each kernel and config over batches of all sizes."""
    for (op, cases), dtype in itertools.product(verify.CASES.items(), ("bf16", "fp32")):
        for name, options in cases.items():
            seen: list[Launch] = []
            with offline("sm_90", seen.append, compiles=False):
                for lengths in BATCHES:
                    run(op, verify.inputs_of(op, NARROW, tuple(lengths), **options), DTYPES[dtype])
            variants: dict[str, set] = {}
            for launch in seen:
                blocks = "x".join(str(value) for key, value in launch.constexprs.items() if key.startswith("BLOCK_"))
                variants.setdefault(f"{launch.name} {blocks}", set()).add(launch.variant)
            yield {
                "op": op, "case": name, "dtype": dtype,
                "variants": {kernel: len(found) for kernel, found in variants.items()},
                "differ": {kernel: _differences(found) for kernel, found in variants.items() if len(found) > 1},
            }  # fmt: skip


def _differences(variants: set) -> list[str]:
    """What differs between variants of one kernel."""
    parts = [dict(pair for part in variant[1:] for pair in part) for variant in variants]
    return sorted(k for k in set().union(*parts) if len({p.get(k) for p in parts}) > 1)


def layers() -> Iterator[dict]:
    """The kernels that one encoder layer launches, forward in evaluation, forward and backward in training; for lengths
    that the host knows and for lengths that only the device knows."""
    from fastbert import BertConfig
    from fastbert.models.bert import BertLayer
    from fastbert.packing import PackedBatch
    from fastbert.stack.shared import Pass

    config = BertConfig(hidden_size=128, num_attention_heads=2, intermediate_size=256)
    layer = BertLayer(config, 0).to(torch.bfloat16)
    batches = {"short": [30] * 4, "tile": [100] * 4, "long": [300, 300], "mixed": [30, 100, 300]}
    for (name, lengths), known in itertools.product(batches.items(), (True, False)):
        batch = PackedBatch.from_lists([[5] * n for n in lengths])
        if not known:
            batch = replace(batch, lengths=None, entries=None)
        x = torch.zeros(sum(lengths), 128, dtype=torch.bfloat16, requires_grad=True)
        for training in (False, True):
            seen: list[Launch] = []
            with offline("sm_90", seen.append, compiles=False):
                schedule = batch.schedule("triton")
                seen.clear()
                with torch.set_grad_enabled(training):
                    y = layer.train(training)(x, Pass(batch, schedule, "triton"))
                if training:
                    y.backward(torch.zeros_like(y))
            kernels = sorted(launch.name for launch in seen)
            yield {"batch": name, "known": known, "training": training, "kernels": kernels}


def schedules() -> Iterator[dict]:
    """The launches that make attention's list of tiles: from a mask, from lists, in cross-attention."""
    from fastbert.packing import PackedBatch

    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    ids = torch.ones(2, 3, dtype=torch.int64)
    seen: list[Launch] = []
    with offline("sm_90", seen.append, compiles=False):
        cu_seqlens = torch.tensor([0, 2, 3], dtype=torch.int32)
        for name, make in {
            "mask": lambda: PackedBatch.from_padded(ids, mask).schedule("triton"),
            "lists": lambda: PackedBatch.from_lists([[1, 1], [1]]).schedule("triton"),
            "device": lambda: F.attention_schedule(cu_seqlens, 3, "triton"),
            "cross": lambda: F.attention_schedule(cu_seqlens, 3, "triton", spans_k=cu_seqlens),
            "padded": lambda: F.attention_schedule(cu_seqlens[1:], 3, "triton", padded=True),
        }.items():
            seen.clear()
            make()
            yield {"name": name, "kernels": [launch.name for launch in seen]}


def alignment() -> Iterator[dict]:
    """Launches of one kernel over tensors at a multiple of 16 bytes, or 4 bytes after one, and what each assumes."""
    memory = torch.zeros(16, dtype=torch.int32)
    through_binder, seen = Plan._through_binder, []
    bound: list[Plan] = []

    def counted(plan, *args):
        bound.append(plan)
        return through_binder(plan, *args)

    Plan._through_binder = counted
    with offline("sm_90", seen.append, compiles=False):
        for offset in (0, 0, 1, 1, 0):
            seen.clear(), bound.clear()
            F.attention_schedule(memory[offset : offset + 3], 0, "triton")
            (launch,) = seen
            yield {
                "aligned": memory[offset:].data_ptr() % 16 == 0, "assumed": "spans_ptr" in launch.divisible,
                "through_binder": len(bound), "variant": hash(launch.variant),
            }  # fmt: skip


def layer_alignment() -> Iterator[dict]:
    """A layer, forward and backward, with all tensors at multiples of 16 bytes (three times), then with one tensor at
    another address: how often a plan checked its tensors, and what the launcher refused."""
    from fastbert import BertConfig
    from fastbert.models.bert import BertLayer, Pass
    from fastbert.packing import PackedBatch

    look, looks = Plan._bound_for, []

    def counted(plan, *args):
        looks.append(plan)
        return look(plan, *args)

    Plan._bound_for = counted
    layer = BertLayer(BertConfig(hidden_size=128, num_attention_heads=2, intermediate_size=256), 0)
    layer = layer.to(torch.bfloat16).train()
    batch = PackedBatch.from_lists([[5] * 30, [5] * 100])
    aligned = {name: torch.zeros(130, 128, dtype=torch.bfloat16) for name in ("x", "dy")}
    aligned |= {name: p.detach() for name, p in layer.named_parameters()}
    for odd in (None, None, None, *aligned):
        tensors = dict(aligned)
        if odd is not None:
            t = tensors[odd]
            tensors[odd] = torch.zeros(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape)
        x, dy = tensors["x"].detach().requires_grad_(), tensors["dy"]
        seen: list[Launch] = []
        error = None
        for name, p in layer.named_parameters():
            p.data = tensors[name]
        with offline("sm_90", seen.append, compiles=False):
            shared = Pass(batch, batch.schedule("triton"), "triton")
            seen.clear(), looks.clear()
            try:
                layer(x, shared).backward(dy)
            except (TypeError, ValueError) as refused:
                error = str(refused)
        yield {"odd": odd, "error": error, "looks": len(looks), "launches": len(seen)}
    Plan._bound_for = look


def compile_cases() -> Iterator[dict]:
    from benchmarks.inspection.compile_cases import cases_of
    from benchmarks.inspection.compile_report import kernel_modules

    # attention sets one of its flags only for Blackwell's data centre cards
    of_two = itertools.product(("sm_80", "sm_90"), kernel_modules()[0])
    for arch, module in (*of_two, ("sm_100", "fastbert.kernels.attention")):
        cases, errors = cases_of(module, arch)
        yield {
            "arch": arch,
            "module": module,
            "errors": {name: str(error) for name, error in errors.items()},
            "cases": [
                {"kernel": case.kernel.split(":")[1], "num_warps": case.num_warps, "constexprs": case.constexprs}
                for case in cases
            ],
        }


def emulated_subset() -> Iterator[dict]:
    """What the calls of `emulated_subset.py` launch."""
    from emulated_subset import SUBSET

    for arch, (name, run) in itertools.product(("sm_80", "sm_90"), SUBSET.items()):
        seen: list[Launch] = []
        with offline(arch, seen.append, compiles=False):
            run()
        launches = [{"kernel": launch.name, "constexprs": _plain(launch.constexprs)} for launch in seen]
        yield {"arch": arch, "name": name, "launches": launches}


def _plain(constexprs: dict) -> dict:
    return {name: value for name, value in constexprs.items() if isinstance(value, (bool, str)) or value is None}


if __name__ == "__main__":
    parts: dict[str, Callable[[], Iterator[dict]]] = {
        "every_operator": every_operator, "twenty_batches": twenty_batches, "layers": layers,
        "schedules": schedules, "alignment": alignment,
        "layer_alignment": layer_alignment, "compile_cases": compile_cases,
        "emulated_subset": emulated_subset,
    }  # fmt: skip
    json.dump({name: list(parts[name]()) for name in sys.argv[1:]}, sys.stdout)
