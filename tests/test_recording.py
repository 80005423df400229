"""`fastbert verify --record` and `--replay`: one machine's results in a file, with which another is compared."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastbert import functional, verify
from fastbert.cli.main import main
from fastbert.kernels import _device
from fastbert.verify import recording

CPU = torch.device("cpu")


def record(path, *arguments, impl="native"):
    assert main(["verify", "--impl", impl, "--device", "cpu", "--record", str(path), *arguments]) == 0


def contents(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 (no mapping)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Every case of every operator in bf16, computed by torch's own operators."""
    path = tmp_path_factory.mktemp("recording") / "all.safetensors"
    record(path, "--dtype", "bf16")
    return path


# ---- what a file holds -----------------------------------------------------------------------------------


def test_the_file_is_enough_to_repeat_every_case(everything):
    """All inputs, also tuples, numbers and None; outputs and gradients, each by its name."""
    recorded = recording.Recording(everything)
    tasks = recorded.tasks()
    assert tasks == verify.tasks(tuple(verify.CASES), ["bf16"], CPU, "small")
    for task in tasks:
        case = recorded.read(task)
        inputs = task.inputs()
        assert case.inputs.keys() == inputs.keys()
        for name, value in inputs.items():
            for ours, expected in zip(*map(flat, (case.inputs[name], value)), strict=True):
                assert type(ours) is type(expected), name
                assert torch.equal(ours, expected) if isinstance(expected, torch.Tensor) else ours == expected, name
        assert [name for name in case.outputs if name.startswith("out")]
        assert {name for name in inputs if f"d{name}" in case.outputs} >= {"x", "q", "word", "hidden"} & inputs.keys()


def flat(value):
    return [v for item in value for v in flat(item)] if isinstance(value, (tuple, list)) else [value]


def test_a_file_names_the_machine_and_versions(everything):
    of = recording.Recording(everything).environment
    assert of["impl"] == "native"
    assert of["torch"] == torch.__version__
    assert "native on CPU, fastbert" in recording.describe(of)


def test_a_tensor_that_cases_share_is_stored_once(everything, tmp_path):
    both = tmp_path / "both.safetensors"
    record(both, "--op", "pool", "--dtype", "fp32", "--dtype", "fp16")
    tensors, metadata = contents(both)
    cases = json.loads(metadata["cases"])
    assert len({json.dumps(case["inputs"]["x"]) for case in cases}) == 1
    assert sum(name.startswith("inputs/") for name in tensors) == 2  # x, cu_seqlens


# ---- comparison ------------------------------------------------------------------------------------------


def test_the_same_machine_has_the_same_bits(everything, capsys):
    assert main(["verify", "--impl", "native", "--device", "cpu", "--replay", str(everything)]) == 0
    said = capsys.readouterr().out
    count = len(contents(everything)[0])
    tensors = sum(name.startswith("outputs/") for name in contents(everything)[0])
    assert count > tensors > 100
    assert f"Of {tensors} tensors {tensors} have the bits of the recording." in said


@pytest.mark.parametrize(("name", "direction"), [("out", "forward"), ("dx", "backward")])
def test_a_difference_fails_its_own_case(name, direction, tmp_path, capsys):
    path = tmp_path / "recording.safetensors"
    record(path, "--op", "pool", "--dtype", "fp32")
    tensors, metadata = contents(path)
    tensors[f"outputs/1/{name}"] += 1e-5 * torch.randn_like(tensors[f"outputs/1/{name}"])
    save_file(tensors, path, metadata=metadata)
    capsys.readouterr()
    assert main(["verify", "--impl", "native", "--device", "cpu", "--replay", str(path), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert {row["direction"] for row in document["rows"] if not row["passed"]} == {direction}
    assert "Of 6 tensors 5 have the bits of the recording." in document["notes"]


def test_inputs_are_taken_from_the_file(tmp_path):
    """The recorded case is repeated, not the case that has the same name here."""
    path = tmp_path / "recording.safetensors"
    record(path, "--op", "pool", "--dtype", "fp32")
    tensors, metadata = contents(path)
    for name, tensor in tensors.items():
        if name.startswith(("inputs/", "outputs/", "upstream/")) and tensor.is_floating_point():
            tensors[name] = tensor * 2.0 if name.startswith("inputs/") or "/out" in name else tensor
    save_file(tensors, path, metadata=metadata)
    replay = recording.Replay(recording.Recording(path), CPU, "native")
    (mean,) = [task for task in recording.Recording(path).tasks() if task.case == "mean"]
    assert all(check.error == 0.0 for check in replay.check(mean).checks)


def test_some_cases_of_a_file(everything, capsys):
    arguments = ["--impl", "native", "--device", "cpu", "--replay", str(everything), "--json"]
    assert main(["verify", *arguments, "--op", "pool"]) == 0
    assert {row["op"] for row in json.loads(capsys.readouterr().out)["rows"]} == {"pool"}


def test_other_files_are_refused_in_one_line(tmp_path, capsys):
    text, other = tmp_path / "text", tmp_path / "other.safetensors"
    text.write_text("hello")
    save_file({"x": torch.zeros(1)}, other)
    for path in (text, other, tmp_path / "nothing"):
        assert main(["verify", "--impl", "native", "--device", "cpu", "--replay", str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--emulate", "sm_90", "--impl", "native"], "--emulate executes Triton kernels"),
        (["--emulate", "sm_90", "--device", "cuda"], "--emulate computes on the CPU"),
        (["--record", "file", "--jobs", "2"], "take one process"),
        (["--record", "nowhere/file"], "no folder 'nowhere' to write file into"),
    ],
)
def test_arguments_that_exclude_each_other(arguments, said, capsys):
    assert main(["verify", *arguments]) == 2
    assert said in capsys.readouterr().err


# ---- on emulated PTX -------------------------------------------------------------------------------------


@pytest.mark.skipif(not _device.HAS_TRITON, reason="triton is not installed")
def test_one_architecture_against_another(tmp_path, capfd):
    """From any process. sm_80 computes as sm_90 does, within the budget, with other kernels."""
    path, some = tmp_path / "sm_90.safetensors", ["--op", "linear_act", "--dtype", "fp16"]
    assert main(["verify", "--emulate", "sm_90", "--record", str(path), *some]) == 0
    assert "compiled for sm_90" in capfd.readouterr().out
    assert recording.Recording(path).environment["arch"] == "sm_90"
    assert main(["verify", "--emulate", "sm_80", "--replay", str(path), *some]) == 0
    assert "Recorded: triton on the emulator (sm_90)" in capfd.readouterr().out
    assert functional.why_not_triton(CPU) is None or not _device.triton_on_cpu()  # the emulator was switched off
