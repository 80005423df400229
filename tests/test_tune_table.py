"""The kernels of `tuning.tune`: a config reaches its own launcher and compile cases, and no others."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="configs are those of Triton kernels")

from benchmarks.tuning import table as tune_table
from benchmarks.tuning import tunables
from fastbert.kernels import _device
from fastbert.kernels._gemm_config import GemmConfig
from fastbert.testing import MODELS

pytestmark = pytest.mark.once

KERNELS = tune_table.kernels()
needs_interpreter = pytest.mark.skipif(
    not _device.INTERPRETING, reason="runs kernels on CPU tensors, which Triton's interpreter does"
)


def shape_of(kernel, model="tiny", arch="sm_90", dtype=torch.float16) -> tunables.Shape:
    return tunables.Shape(MODELS[model], (70, 3), dtype, arch, torch.device("cpu"))


class Asked(Exception):
    """Raised where a launcher asks for its config."""


@needs_interpreter
@pytest.mark.parametrize("name", [n for n in KERNELS if n != "cross_entropy"])  # its seams are constants
def test_the_launcher_asks_where_the_table_says(name, monkeypatch):
    kernel = KERNELS[name]
    shape = shape_of(kernel)
    before = [getattr(*tunables.place(seam)) for seam in kernel.seams]
    run = kernel.job(shape).run
    if "bwd" in name or name in ("embedding_scatter", "pool_rows"):
        run()  # the forward pass has run, so the next to ask is the backward pass

    def refuse(put):
        def patched(original, config):
            chosen = put(original, config)

            def asked(*args, **options):
                if chosen(*args, **options) is config:
                    raise Asked
                return chosen(*args, **options)

            return asked

        return patched

    spied = replace(kernel, seams={seam: refuse(put) for seam, put in kernel.seams.items()})
    with tunables.using(spied, object()), pytest.raises(Asked):
        run()
    assert [getattr(*tunables.place(seam)) for seam in kernel.seams] == before  # an error restores everything


CASES = """
import json, torch
from dataclasses import replace
from benchmarks.tuning import table as tune_table
from benchmarks.tuning import tunables
from fastbert.testing import MODELS
found = {}
for kernel in tune_table.kernels().values():
    model = replace(MODELS["base"], hidden=kernel.width or MODELS["base"].hidden)
    shape = tunables.Shape(model, (512,), torch.bfloat16, "sm_90", torch.device("cpu"))
    config = kernel.current(shape)
    config = kernel.start(shape) if config is None or config in kernel.others else config
    other = replace(config, num_warps=32)
    cases = [tunables.compile_cases(kernel, c, shape) for c in (config, other, config)]
    found[kernel.name] = [[[case.name, case.num_warps] for case in some] for some in cases]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def cases():
    """kernel -> its compile cases for the ladder's config, for one with 32 warps, and for the ladder's config again."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", CASES], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", KERNELS)
def test_compiled_cases_are_those_of_the_config(name, cases):
    """The offline compiler gets the config in question instead of the ladder's, which is restored afterwards."""
    ladders, others, again = cases[name]
    assert ladders, "its work launches no such kernel"
    assert {warps for _, warps in others} == {32}
    assert again == ladders
    assert 32 not in {warps for _, warps in ladders}


@pytest.mark.parametrize("name", KERNELS)
def test_neighbours_differ_in_one_field_and_the_grid_is_complete(name):
    kernel = KERNELS[name]
    shape = shape_of(kernel, "base", dtype=torch.bfloat16)
    begin = kernel.current(shape)
    begin = kernel.start(shape) if begin is None or begin in kernel.others else begin
    for other in kernel.neighbours(begin):
        if other not in kernel.others:
            assert sum(getattr(other, f.name) != getattr(begin, f.name) for f in fields(begin)) == 1
    assert {f.name for f in fields(begin)} >= set(kernel.grid)
    everything = list(kernel.everything(begin))
    size = len(kernel.others)
    combinations = 1
    for values in kernel.grid.values():
        combinations *= len(values)
    assert len(everything) == len(set(everything)) == size + combinations


@pytest.mark.parametrize("name", KERNELS)
def test_a_printed_rung_is_python_that_returns_the_config(name):
    kernel = KERNELS[name]
    shape = shape_of(kernel, "base", dtype=torch.bfloat16)
    config = kernel.current(shape)
    config = kernel.start(shape) if config is None or config in kernel.others else config
    text = kernel.rung(config, shape)
    ast.parse(text)
    call = text.split("return ")[-1] if "return" in text else text
    known = {type(config).__name__: type(config)}
    if name == "cross_entropy":
        assert eval(call.split("=")[1]) == (config.block_v, config.num_warps)
    elif name.startswith("gemm:"):
        assert eval(call, known) == ((*tune_table.gemm_sizes(name[5:], shape), config),)
    else:
        assert eval(call, known) == config


def test_other_directions_and_forms_keep_their_configs():
    from fastbert.kernels import _attention_launch, _gemm

    with tunables.using(KERNELS["attention_bwd_dq"], "mine"):
        asked = {d: _attention_launch.attention_config(64, torch.float16, "sm_90", d) for d in ("fwd", "bwd_dq")}
    assert asked["bwd_dq"] == "mine" != asked["fwd"]
    with tunables.using(KERNELS["gemm:nn"], "mine"):
        product, fused, other = (
            _gemm.gemm_config(768, 768, torch.float16, "sm_90", *form) for form in (("nn",), ("nn", "dact"), ("nt",))
        )
    assert product == "mine"
    assert "mine" not in (fused, other)


def test_bulk_copies_and_register_limits_only_where_supported():
    gemm, attention = KERNELS["gemm:nt+act"], KERNELS["attention_fwd"]
    bulk = GemmConfig(128, 128, 64, bulk=True, flatten=True, programs_per_sm=1)
    assert gemm.allowed(bulk, shape_of(gemm))
    assert not gemm.allowed(bulk, shape_of(gemm, arch="sm_80"))
    assert not gemm.allowed(bulk, shape_of(gemm, dtype=torch.float32))
    # one tile, so there is no loop to flatten
    assert not gemm.allowed(replace(bulk, programs_per_sm=0), shape_of(gemm))
    assert not gemm.allowed(replace(bulk, block_m=256, block_n=256), shape_of(gemm))
    limited = replace(attention.current(shape_of(attention)), max_registers=168)
    assert attention.allowed(limited, shape_of(attention))
    assert not attention.allowed(limited, shape_of(attention, arch="gfx942"))


def test_names_families_and_unknown_ones():
    assert [k.name for k in tune_table.named("attention")] == [n for n in KERNELS if n.startswith("attention_")]
    assert next(k.name for k in tune_table.named("gemm:nt,gemm")) == "gemm:nt"
    assert len(tune_table.named("all")) == len(KERNELS)
    with pytest.raises(ValueError, match="no kernel 'atention'; there are attention_fwd"):
        tune_table.named("atention")
