"""Measures the CPU time that a call takes in Python before and between launches; needs no GPU.

    python -m benchmarks.inspection.call_cost

The operators run on tensors without data (device meta), forward and backward, through Triton's real launch path for a
GPU that is not present, and a launch does nothing. So no time is spent on computation, only on Python: checks, choices,
allocation, autograd, binding arguments, and the dispatch of torch's operators, whose computation `call_cost.cpp`
replaces (it needs g++). On a GPU a pass cannot be faster than this, however small the batch. Printed is the process'
CPU time, the least of several rounds.

--beside FOLDER also measures another checkout of this project, in turns in the same run, and prints the ratios.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import types
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve()
ROUNDS, SECONDS = 5, 0.2  # rounds of a case in a process, and how long one lasts
TURNS = 3  # processes for each checkout


# ---- in the measuring process ------------------------------------------------------------------------------


def _launch_nothing() -> None:
    """Makes Triton launch on a GPU that is not present, and operators accept tensors without data."""
    _take_kernels_from(Path.cwd() / "kernels")
    from fastbert import functional
    from fastbert.kernels import _device

    if not hasattr(functional, "machine"):  # a checkout older than the driver's use of this module
        functional.machine = _device
    if not hasattr(_device, "stand_in"):
        _as_before_the_driver(_device)
    from fastbert.kernels import _library

    _library.torch.ops.load_library(str(_build_products()))
    if hasattr(_library, "EAGER"):
        _library.EAGER.add("meta")
    _library.register = _registering_for_meta(_library)
    from fastbert import functional

    if not hasattr(functional, "machine"):  # a checkout older than the driver's use of this module
        functional.machine = _device
    spec = importlib.util.spec_from_file_location(
        "fastbert.emulator.driver", HERE.parents[2] / "fastbert" / "emulator" / "driver.py"
    )
    driver = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    interpreting, _device.INTERPRETING = _device.INTERPRETING, False
    spec.loader.exec_module(driver)
    driver.activate("sm_90", compiles=False)
    _device.INTERPRETING = interpreting


def _take_kernels_from(folder: Path) -> None:
    """Imports `fastbert.kernels` from this checkout; an editable install would import it from the installed one."""
    path = str(folder / "__init__.py")
    spec = importlib.util.spec_from_file_location("fastbert.kernels", path, submodule_search_locations=[str(folder)])
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def _build_products() -> Path:
    """The library of `call_cost.cpp`, which is built if it does not exist."""
    import torch
    from torch.utils.cpp_extension import include_paths

    source, folder = HERE.with_suffix(".cpp"), Path(torch.__file__).parent / "lib"
    key = hashlib.sha256(source.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"fastbert_call_cost_{key}.so"
    if not library.exists():
        made = library.with_suffix(f".{os.getpid()}.so")
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
        includes = [f"-I{path}" for path in include_paths()]
        libraries = [f"-L{folder}", f"-Wl,-rpath,{folder}", "-ltorch", "-ltorch_cpu", "-lc10"]
        command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", abi, *includes, str(source), "-o", str(made)]
        subprocess.run([*command, *libraries], check=True)
        made.replace(library)
    return library


def _as_before_the_driver(device_module) -> None:
    """Prepares a checkout older than `fastbert.emulator`: operators accept CPU tensors, and the driver's names
    exist."""
    device_module.INTERPRETING = True
    device_module.Card = namedtuple("Card", "arch capability multiprocessors")
    device_module.stand_in = lambda card: None
    sys.modules["fastbert.emulator"] = types.ModuleType("fastbert.emulator")
    sys.modules["fastbert.emulator"].__path__ = []


def _registering_for_meta(library) -> Callable:
    """A `register` that runs launchers on meta tensors, instead of shape functions."""
    original = library.register

    def register(schema, launch, fake, **more):
        real = library.torch.library.register_fake
        library.torch.library.register_fake = lambda *args, **kwargs: None
        try:
            call = original(schema, launch, fake, **more)
        finally:
            library.torch.library.register_fake = real
        library._LIBRARY.impl(schema.split("(", 1)[0], launch, "Meta")
        return call

    return register


def cases() -> dict[str, Callable[[], object]]:
    """Name of a case -> a function that makes one call."""
    import torch

    # autocast does not support the device meta
    known = torch.is_autocast_enabled
    torch.is_autocast_enabled = lambda kind=None: False if kind == "meta" else known(kind)
    from dataclasses import replace

    from fastbert import functional as F
    from fastbert.config import BertConfig
    from fastbert.models.bert import BertLayer
    from fastbert.packing import PackedBatch
    from fastbert.stack.shared import Pass
    from fastbert.testing import MODELS, WORKLOADS

    def empty(*shape, dtype=torch.bfloat16, grad=False):
        return torch.empty(shape, dtype=dtype, device="meta").requires_grad_(grad)

    lengths = WORKLOADS["base_natural"].lengths[:64]
    tokens, sequences, longest = sum(lengths), len(lengths), max(lengths)
    batch = PackedBatch.from_lists([[5] * n for n in lengths]).to("meta")
    try:
        schedule = F.attention_schedule(batch.cu_seqlens, tokens, impl="triton")
    except Exception:
        schedule = empty(tokens // 64 + sequences + 1 + sequences, 2, dtype=torch.int32)
    found: dict[str, Callable[[], object]] = {}

    def both(name: str, call: Callable, *leaves: torch.Tensor) -> None:
        """Adds a case of the forward pass without gradients, and one of forward and backward to these leaves."""

        def forward():
            with torch.no_grad():
                return call()

        def forward_backward():
            y = call()
            return torch.autograd.grad(y, leaves, torch.empty_like(y))

        found[f"{name} forward"] = forward
        found[f"{name} forward + backward"] = forward_backward

    def operators(width: int, inner: int, heads: int) -> None:
        q, k, v = (empty(tokens, heads, width // heads, grad=True) for _ in range(3))
        x, residual = (empty(tokens, width, grad=True) for _ in range(2))
        weight, bias, down_bias = (empty(width, grad=True) for _ in range(3))
        up, up_bias, down = empty(inner, width, grad=True), empty(inner, grad=True), empty(width, inner, grad=True)
        batched = batch.cu_seqlens, longest
        both("attention", lambda: F.attention(q, k, v, *batched, schedule=schedule, impl="triton"), q, k, v)
        norm = x, residual, weight, bias
        both("add_layer_norm", lambda: F.add_layer_norm(*norm, impl="triton"), *norm)
        feed = x, up, up_bias, down, down_bias
        both("feed_forward", lambda: F.feed_forward(*feed, impl="triton"), *feed)

    def layers(model: str, width: int, inner: int, heads: int) -> None:
        config = BertConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=inner)
        with torch.device("meta"):
            evaluated, trained = (BertLayer(config, 0).to(torch.bfloat16).train(mode) for mode in (False, True))
        plain = Pass(batch, schedule, "triton")
        seed, row_ids = empty(1, dtype=torch.int64), empty(tokens, dtype=torch.int64)
        dropping = replace(plain, seed=seed, row_ids=row_ids)
        x = empty(tokens, width, grad=True)
        leaves = [x, *trained.parameters()]

        def forward():
            with torch.no_grad():
                return evaluated(x, plain)

        def forward_backward(shared):
            y = trained(x, shared)
            return torch.autograd.grad(y, leaves, torch.empty_like(y))

        found[f"layer, {model}, forward"] = forward
        found[f"layer, {model}, forward + backward"] = lambda: forward_backward(plain)
        found[f"layer, {model}, forward + backward, dropout"] = lambda: forward_backward(dropping)

    for model in ("base", "minilm"):
        shape = MODELS[model]
        if model == "base":
            operators(shape.hidden, shape.intermediate, shape.heads)
        layers(model, shape.hidden, shape.intermediate, shape.heads)
    return found


def measure() -> dict[str, float]:
    """Name of a case -> microseconds of CPU time of a call."""
    _launch_nothing()
    found = {}
    for name, call in cases().items():
        for _ in range(3):
            call()
        start, count = time.process_time(), 0
        while time.process_time() - start < SECONDS:
            call()
            count += 1
        best = float("inf")
        for _ in range(ROUNDS):
            start = time.process_time()
            for _ in range(count):
                call()
            best = min(best, (time.process_time() - start) / count)
        found[name] = best * 1e6
    return found


# ---- the command -------------------------------------------------------------------------------------------


def _measured(folder: Path) -> dict[str, float]:
    """`measure` for the checkout in this folder, in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    program = (
        f"import sys, json, importlib.util as u; sys.path.insert(0, {str(folder)!r});"
        f"s = u.spec_from_file_location('call_cost', {str(HERE)!r});"
        "m = u.module_from_spec(s); s.loader.exec_module(m);"
        "print(json.dumps(m.measure()))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inspection.call_cost", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--beside", type=Path, metavar="FOLDER", help="another checkout, measured in the same run")
    parser.add_argument("--turns", type=int, default=TURNS, help="processes for each checkout (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    folders = [HERE.parents[2]] if args.beside is None else [args.beside.resolve(), HERE.parents[2]]
    runs: list[list[dict[str, float]]] = [[] for _ in folders]
    for _ in range(args.turns):
        for folder, found in zip(folders, runs, strict=True):
            found.append(_measured(folder))
    least = [{name: min(run[name] for run in found) for name in found[0]} for found in runs]
    if args.json:
        print(json.dumps(dict(zip(map(str, folders), least, strict=True)), indent=1))
        return 0
    width = max(map(len, least[0]))
    for name in least[0]:
        times = [found[name] for found in least]
        ratio = f"{times[1] / times[0]:8.2f}" if len(times) == 2 else ""
        print(f"{name:<{width}}", *(f"{t:8.1f} us" for t in times), ratio)
    return 0


if __name__ == "__main__":
    sys.exit(main())
