"""Every operator through Triton's own launch path: argument binding, specialisation and packing, without a GPU.

The interpreter and the offline compiler bypass that code, and the tests once did too: every kernel with an argument
named `stream` passed them all, but none could be launched, because Triton's launcher reserves that keyword.
`launches.py` runs the operators with a driver for an absent GPU; these tests check what it recorded.
"""

import ast
import functools
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from fastbert import functional, verify
from fastbert.kernels import _device

if not _device.HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)

from fastbert.kernels import _scatter, embedding, layer_norm, pooling

ROOT = Path(__file__).resolve().parents[1]
MOST_VARIANTS = 4


def _record(part: str) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Triton 3.10's default
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_DEFAULT_FP_FUSION": "0"}
    command = [sys.executable, str(ROOT / "tests" / "launches.py"), part]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)[part]


@pytest.fixture(scope="module")
def every_operator():
    return _record("every_operator")


@pytest.fixture(scope="module")
def twenty_batches():
    return _record("twenty_batches")


@pytest.fixture(scope="module")
def compile_cases():
    return _record("compile_cases")


# ---- launches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", verify.CASES)
def test_every_operator_dtype_and_direction_is_launched(every_operator, op):
    """The launcher refuses nothing, and packs the arguments for which the kernel was bound."""
    runs = [run for run in every_operator if run["op"] == op]
    assert {run["dtype"] for run in runs} == set(verify.DTYPES)
    assert {run["case"] for run in runs} == set(verify.CASES[op])
    assert [(run["arch"], run["case"], run["dtype"], run["error"]) for run in runs if run["error"]] == []
    assert all(run["launches"] for run in runs)
    assert all(min(launch["grid"]) > 0 for run in runs for launch in run["launches"])


def test_a_second_call_launches_what_the_first_did(every_operator):
    """The first call uses Triton's binder, the second the stored plan."""
    assert [run for run in every_operator if not run["same"]] == []


def test_products_are_fused_with_sums_whatever_triton_s_default_is(every_operator):
    """From Triton 3.10 on they are not by default, which is slower. Kernels on rows turn it off themselves."""
    fused = {launch["kernel"]: launch["fused"] for run in every_operator for launch in run["launches"]}
    assert {name for name, is_fused in fused.items() if not is_fused} == {
        "_add_norm_fwd_kernel", "_add_norm_bwd_kernel", "_embedding_fwd_kernel", "_embedding_bwd_kernel",
    }  # fmt: skip


def test_a_tensor_at_an_odd_address_is_bound_again():
    """A kernel bound for addresses divisible by 16 may read 16 bytes at once, which faults at other addresses. Triton's
    binder checks addresses, and chooses a kernel that assumes nothing."""
    runs = _record("alignment")
    assert [run["aligned"] for run in runs] == [True, True, False, False, True]
    assert [run["assumed"] for run in runs] == [run["aligned"] for run in runs]
    assert [run["through_binder"] for run in runs] == [1, 0, 1, 1, 0]
    assert len({run["variant"] for run in runs}) == 2


def test_a_layer_checks_the_addresses_of_all_its_tensors_once():
    """If all addresses are divisible by 16, the layer's plans skip their own check; the launcher checks here again.
    With one tensor at another address, every plan must check."""
    runs = _record("layer_alignment")
    first, _, third, *odd = runs
    assert [(run["odd"], run["error"]) for run in runs if run["error"]] == []
    assert third["looks"] == 0 < first["looks"] == third["launches"]
    assert len(odd) == 18
    # the upstream gradient appears only in the backward pass
    assert {run["odd"] for run in odd if run["looks"] < run["launches"]} == {"dy"}
    assert next(run["looks"] for run in odd if run["odd"] == "dy") > 0


def test_every_kernel_is_launched(every_operator):
    launched = {launch["kernel"] for run in every_operator for launch in run["launches"]}
    assert launched == set(KERNELS)


def test_no_kernel_is_compiled_again_and_again(twenty_batches):
    """Over twenty batches of all sizes a kernel's config has few variants. Each costs seconds at its first launch."""
    many = [
        (run["op"], run["case"], run["dtype"], kernel, count, run["differ"].get(kernel))
        for run in twenty_batches
        for kernel, count in run["variants"].items()
        if count > MOST_VARIANTS
    ]
    assert many == []


def test_sizes_of_the_batch_do_not_cause_compilation(twenty_batches):
    """Without a bias, a mask or a padded width, a kernel depends on the batch only by whether it is large."""
    plain = {"plain", "dropout", "mean", "gelu", "cls", "max"}
    found = {
        (run["op"], kernel, *names)
        for run in twenty_batches
        if run["case"] in plain and not run["op"].endswith("padded") and run["op"] != "linear_cross_entropy"
        for kernel, names in run["differ"].items()
        # a layer sums vectors of two widths, and there are tables of distances for keys and for queries
        if kernel.split()[0] != "_disentangled_bwd_diagonal_kernel"
        and (run["op"], kernel.split()[0]) != ("encoder_layer", "_sum_parts_kernel")
    }
    assert found == set()


# the attention kernels, forward and backward, that each kind of batch needs
FOR_SHORT = (["fwd_heads"], ["bwd_heads"])
FOR_A_TILE = (["fwd_tile"], ["bwd_tile"])
FOR_LONG = (["fwd"], ["bwd_dkv", "bwd_dq"])
OF_ATTENTION = {
    "short": (FOR_SHORT,), "tile": (FOR_A_TILE,), "long": (FOR_LONG,), "mixed": (FOR_LONG, FOR_SHORT, FOR_A_TILE),
}  # fmt: skip
# for when only the longest length is known, so that any shorter sequence may be there
ALL = OF_ATTENTION["mixed"]
UP_TO = {"short": (FOR_SHORT,), "tile": (FOR_SHORT, FOR_A_TILE), "long": ALL, "mixed": ALL}
# our other kernels in one layer: forward in evaluation; forward and backward in training
OTHERS_OF_A_LAYER = (2, 9)


@pytest.fixture(scope="module")
def layers():
    return _record("layers")


@pytest.mark.parametrize("known", [True, False])
def test_kernels_that_no_sequence_needs_are_not_launched(layers, known):
    """The attention kernels that a layer launches; each name is one launch."""
    found = {}
    for layer in layers:
        names = [name.removeprefix("_").removesuffix("_kernel") for name in layer["kernels"] if "attention" in name]
        if layer["known"] == known:
            found[layer["batch"], layer["training"]] = sorted(name.removeprefix("attention_") for name in names)
    expected = {}
    for name, kinds in (OF_ATTENTION if known else UP_TO).items():
        forward = [kernel for kind in kinds for kernel in kind[0]]
        backward = [kernel for kind in kinds for kernel in kind[1]]
        expected |= {(name, False): sorted(forward), (name, True): sorted(forward + backward)}
    assert found == expected


def test_number_of_launches_of_a_layer_without_attention(layers):
    """Python's time between launches limits small batches, so their number is counted."""
    counts = {
        layer["training"]: len([name for name in layer["kernels"] if "attention" not in name]) for layer in layers
    }
    assert counts == {False: OTHERS_OF_A_LAYER[0], True: OTHERS_OF_A_LAYER[1]}


def test_one_kernel_makes_the_list_of_tiles():
    """On the device. None is launched if the host made the list and sent it."""
    found = {run["name"]: run["kernels"] for run in _record("schedules")}
    one = ["_attention_schedule_kernel"]
    assert found == {"mask": one, "device": one, "cross": one, "padded": one, "lists": []}


# ---- what there is to compile ------------------------------------------------------------------------------


def _device_functions() -> dict[str, ast.FunctionDef]:
    folder = Path(functional.__file__).parents[2] / "kernels"
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.py"))]
    functions = [node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {f.name: f for f in functions if any("triton.jit" in ast.unparse(d) for d in f.decorator_list)}


FUNCTIONS = _device_functions()
KERNELS = {name: function for name, function in FUNCTIONS.items() if name.endswith("_kernel")}


# This kernel is launched only with a bias.
ONE_VALUE = {("_attention_bwd_bias_kernel", "HAS_BIAS")}
# Passed to a function that accepts None, but never None themselves.
NEVER_NONE = {
    ("_sum_chunks_kernel", "order_ptr"), ("_sum_table_rows_kernel", "order_ptr"), ("_embedding_fwd_kernel", "mean_ptr"),
}  # fmt: skip


@functools.cache
def _may_be_none(name: str) -> frozenset[str]:
    """Arguments that the function, or one to which it passes them, compares with None."""
    found = set()
    for node in ast.walk(FUNCTIONS[name]):
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Name) and ast.unparse(node).endswith("None"):
            found.add(node.left.id)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {*FUNCTIONS} - {name}:
            theirs = [argument.arg for argument in FUNCTIONS[node.func.id].args.args]
            handed = [*zip(theirs, node.args, strict=False), *((k.arg, k.value) for k in node.keywords)]
            inner = _may_be_none(node.func.id)
            found |= {value.id for name, value in handed if name in inner and isinstance(value, ast.Name)}
    return frozenset(found & {argument.arg for argument in FUNCTIONS[name].args.args})


def _flags(function: ast.FunctionDef) -> list[str]:
    return [a.arg for a in function.args.args if a.annotation and ast.unparse(a.annotation) == "tl.constexpr"]


@pytest.fixture(scope="module")
def bound(compile_cases):
    """(kernel, argument) -> the values to which compile cases bind it; "tensor" for run-time arguments."""
    values = defaultdict(set)
    for part in compile_cases:
        for case in part["cases"]:
            for argument in KERNELS[case["kernel"]].args.args:
                values[case["kernel"], argument.arg].add(case["constexprs"].get(argument.arg, "tensor"))
    return values


def test_no_call_is_refused(compile_cases):
    assert [(part["arch"], part["module"], part["errors"]) for part in compile_cases if part["errors"]] == []


@pytest.mark.parametrize("kernel", KERNELS)
def test_both_values_of_every_flag_are_compiled(bound, kernel):
    """`add_rms_norm` did not compile, and no compile case covered it."""
    flags = {name: bound[kernel, name] for name in _flags(KERNELS[kernel]) if (kernel, name) not in ONE_VALUE}
    of_booleans = {name: values for name, values in flags.items() if {type(value) for value in values} == {bool}}
    assert {name: values for name, values in of_booleans.items() if values != {False, True}} == {}


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_may_be_absent_is_compiled_with_and_without(bound, kernel):
    absent = {name: bound[kernel, name] for name in _may_be_none(kernel) if (kernel, name) not in NEVER_NONE}
    assert {name: values for name, values in absent.items() if values != {None, "tensor"}} == {}


def _values(launches) -> dict[tuple[str, str], set]:
    """(kernel, argument) -> the flags, names and None to which it is bound at compile time."""
    values = defaultdict(set)
    for launch in launches:
        for argument, value in launch["constexprs"].items():
            if isinstance(value, (bool, str)) or value is None:
                values[launch["kernel"], argument].add(value)
    return values


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_emulated_subset_launches_every_kernel_at_every_flag(compile_cases, arch):
    """Every flag of a compile case on this architecture is also launched by a run of `emulated_subset.py`."""
    compiled = [case for part in compile_cases if part["arch"] == arch for case in part["cases"]]
    launched = [launch for run in _record("emulated_subset") if run["arch"] == arch for launch in run["launches"]]
    assert {launch["kernel"] for launch in launched} == set(KERNELS)
    reached, run = _values(compiled), _values(launched)
    assert {key: values - run[key] for key, values in reached.items() if values - run[key]} == {}


@pytest.mark.parametrize(
    ("kernel", "config_of", "most"),
    [
        ("_add_norm_fwd_kernel", layer_norm.norm_fwd_config, layer_norm.MAX_WIDTH),
        ("_add_norm_bwd_kernel", layer_norm.norm_bwd_config, layer_norm.MAX_WIDTH),
        ("_embedding_fwd_kernel", embedding.norm_fwd_config, embedding.MAX_WIDTH),
        ("_embedding_bwd_kernel", embedding.embedding_bwd_config, embedding.MAX_WIDTH),
        ("_sum_table_rows_kernel", _scatter.scatter_config, embedding.MAX_WIDTH),
        ("_sum_chunks_kernel", _scatter.scatter_config, embedding.MAX_WIDTH),
        ("_pool_chunks_kernel", pooling.pool_fwd_config, pooling.MAX_WIDTH),
        ("_pool_rows_kernel", pooling.pool_row_config, pooling.MAX_WIDTH),
        ("_pool_bwd_kernel", pooling.pool_row_config, pooling.MAX_WIDTH),
    ],
)
def test_compile_cases_cover_the_ladders(compile_cases, kernel, config_of, most):
    """A compile case covers every tile to which a width can lead."""
    compiled = {
        (case["constexprs"]["BLOCK_M"], case["constexprs"]["BLOCK_N"], case["num_warps"])
        for part in compile_cases
        for case in part["cases"]
        if case["kernel"] == kernel
    }
    configs = (config_of(width) for width in range(1, most + 1))
    assert {(config.block_m, config.block_n, config.num_warps) for config in configs} == compiled
