"""`fastbert verify` and its helpers: a wrong operator fails, a right one passes."""

import argparse
import json
import os
import subprocess
import sys

import pytest
import torch

from fastbert import functional, verify
from fastbert.cli import verify as command
from fastbert.cli.main import main
from fastbert.kernels import _device, native, reference
from fastbert.testing import (
    INPUTS,
    LENGTHS,
    MODELS,
    WORKLOADS,
    Check,
    check_op,
    compare,
    error_and_budget,
    natural_lengths,
)
from fastbert.verify import cases, checks, run

TINY = MODELS["tiny"]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _run(*arguments: str) -> int:
    return main(["verify", "--device", "cpu", "--impl", "native", *arguments])


# operator -> an error that the budget must detect
WRONG = {
    "pool": lambda right: lambda x, cu, *a: right(x, cu, *a) * (1 + 1e-3),
    "add_layer_norm": lambda right: lambda x, r, w, b, eps, **o: right(x, r, w, b, eps + 1e-3, **o),
    "attention": lambda right: lambda *a, **o: right(*a, **{**o, "dropout_p": 0.0}),
    "linear_act": lambda right: lambda x, w, b, a: right(x, w, b, "gelu_tanh" if a == "gelu" else a),
    "embedding_layer_norm": lambda right: lambda *a, padding_idx, **o: right(*a, padding_idx=None, **o),
    "linear_cross_entropy": lambda right: lambda *a, label_smoothing, **o: right(*a, label_smoothing=0.0, **o),
}


# ---- verify ----------------------------------------------------------------------------------------------


def test_every_operator_of_the_seam_is_verified():
    assert set(verify.CASES) == {*functional.TRITON_MODULES, "encoder_layer"} == set(INPUTS)


def test_right_operators_pass(capsys):
    assert _run("--op", "pool", "--op", "add_layer_norm", "--op", "embedding_layer_norm") == 0
    out = capsys.readouterr().out
    assert "18 of 18 passed" in out
    assert "FAIL" not in out


@pytest.mark.parametrize("op", WRONG)
def test_a_wrong_operator_fails(op, monkeypatch, capsys):
    monkeypatch.setattr(native, op, WRONG[op](getattr(reference, op)))
    assert _run("--op", op, "--dtype", "fp32") == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_wrong_gradient_alone_fails(monkeypatch):
    """The forward pass is exactly right, so only the backward row may fail, and it names the tensor."""

    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            return weight.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad / 2

    def halves_its_gradient(x, weight, *rest):
        return reference.linear_act(x, Halved.apply(weight), *rest)

    monkeypatch.setattr(native, "linear_act", halves_its_gradient)
    forward, backward = verify.verify(["linear_act"], ["fp32"], "cpu", impl="native")
    assert forward.passed
    assert (backward.passed, backward.tensor) == (False, "dweight")
    assert backward.error == pytest.approx(0.5, rel=1e-5)


def test_nan_fails(monkeypatch):
    monkeypatch.setattr(native, "pool", lambda x, *rest: reference.pool(x, *rest) + float("nan"))
    rows = verify.verify(["pool"], ["fp16"], "cpu", impl="native")
    assert not rows[0].passed


@pytest.mark.parametrize(
    ("ours", "passed"),
    [
        ([1.0, float("inf"), 2.0, float("nan")], True),  # plain torch's result
        ([1.0, 1e30, 2.0, 3.0], True),  # the truth
        ([1.0, -float("inf"), 2.0, 3.0], False),
        ([1.0, 1e29, 2.0, 3.0], False),
        ([1.0, float("inf"), 2.5, float("nan")], False),
        ([1.0, float("nan"), 2.0, 3.0], False),
        ([float("inf"), 1e30, 2.0, 3.0], False),
    ],
)
def test_an_overflow_of_plain_torch_does_not_make_everything_pass(ours, passed):
    """The budget was twice an infinite error, so any number passed, at these and at all other elements."""
    plain, truth = torch.tensor([1.0, float("inf"), 2.0, float("nan")]), torch.tensor([1.0, 1e30, 2.0, 3.0])
    assert Check("out", *error_and_budget(torch.tensor(ours), plain, truth.double())).passed == passed


def test_an_operator_that_raises_is_a_row_and_the_others_still_run(monkeypatch, capsys):
    def raises(*args, **options):
        raise RuntimeError("out of paper\nand of ink")

    monkeypatch.setattr(native, "add_rms_norm", raises)
    assert _run("--op", "add_rms_norm", "--op", "pool", "--dtype", "fp32", "--json") == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(r["op"], r["passed"]) for r in rows] == [
        ("add_rms_norm", False), ("add_rms_norm", False), ("pool", True), ("pool", True),
    ]  # fmt: skip
    assert rows[0]["message"] == "RuntimeError: out of paper"
    assert rows[0]["case"] == "dropout, 64 wide, 109 tokens"
    assert rows[0]["error"] is None


def test_an_output_without_a_gradient_fails(monkeypatch):
    monkeypatch.setattr(native, "pool", lambda *args: reference.pool(*args).detach())
    (forward, _) = verify.verify(["pool"], ["fp32"], "cpu", impl="native")
    assert forward.message == "AssertionError: the output carries no gradient"


def test_json_has_its_fields(capsys):
    assert _run("--op", "pool", "--dtype", "fp32", "--dtype", "bf16", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document.keys() == {"device", "impl", "notes", "passed", "rows"}
    assert (document["passed"], document["impl"]) == (True, "native")
    assert [(r["op"], r["dtype"], r["direction"]) for r in document["rows"]] == [
        ("pool", "fp32", "forward"), ("pool", "fp32", "backward"),
        ("pool", "bf16", "forward"), ("pool", "bf16", "backward"),
    ]  # fmt: skip
    for row in document["rows"]:
        assert row.keys() == {
            "op", "dtype", "direction", "case", "tensor", "error", "budget", "passed", "message",
        }  # fmt: skip
        assert 0 <= row["error"] <= row["budget"]


@pytest.mark.parametrize("arguments", [["--op", "no_such"], ["--dtype", "int8"], ["--impl", "reference"]])
def test_unknown_choices_are_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        _run(*arguments)
    assert stopped.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


def test_a_missing_device_is_one_line(capsys):
    assert main(["verify", "--device", "cuda:99", "--op", "pool"]) == 2
    assert main(["verify", "--device", "abacus", "--op", "pool"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 2
    assert "cuda:99" in err


def test_arguments_mount_on_another_parser():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    command.add_arguments(commands.add_parser("verify"))
    args = parser.parse_args(["verify", "--op", "pool", "--dtype", "fp16", "--impl", "native", "--device", "cpu"])
    assert command.run(args) == 0


def test_bf16_gets_more_only_in_the_interpreter(monkeypatch):
    seen = []
    monkeypatch.setattr(checks, "check_op", lambda *a, factor, **o: seen.append(factor) or [Check("out", 0.0, 1.0)])
    for interpreting, impl in ((True, "triton"), (True, "native"), (False, "triton")):
        monkeypatch.setattr(_device, "INTERPRETING", interpreting)
        for dtype in verify.DTYPES:
            verify.verify(["add_rms_norm"], [dtype], "cpu", impl)
    assert seen == [2.0, 2.0, 4.0] + [2.0] * 6


def test_real_shapes_run_on_gpus_or_on_request(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert cases.shapes_of("auto", cpu) == cases.shapes_of("small", cuda) == verify.SMALL
    assert cases.shapes_of("real", cpu) == cases.shapes_of("auto", cuda)
    lengths = {n for _, shape in cases.shapes_of("auto", cuda) for n in shape}
    assert {0, 1, 128, 512, 4096} <= lengths
    assert {MODELS["base"], MODELS["large"]} <= {model for model, _ in verify.REAL}
    with pytest.raises(ValueError, match="shapes must be one of auto, small, medium, real, got 'huge'"):
        verify.verify(["pool"], ["fp32"], "cpu", impl="native", shapes="huge")

    seen = []
    monkeypatch.setattr(cases, "inputs_of", lambda op, model, lengths, **o: seen.append(max(lengths)))
    monkeypatch.setattr(checks, "check_op", lambda *a, **o: [Check("out", 0.0, 1.0)])
    main(["verify", "--op", "attention", "--device", "cpu", "--impl", "native", "--shapes", "real"])
    assert set(seen) == {512, 4096}


def test_an_interrupted_run_shows_its_results_and_fails(monkeypatch, capsys):
    def steps(work, *_):
        yield verify.Result(work[0], (Check("out", 0.0, 1.0), Check("dx", 0.0, 1.0)))
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_results_of", steps)
    assert _run("--op", "pool", "--dtype", "fp32", "--dtype", "fp16") == 1
    out = capsys.readouterr().out
    assert "Interrupted" in out
    assert "2 of 2 passed" in out


@pytest.mark.once
def test_without_a_gpu_it_starts_the_interpreter():
    """A new process, as a user starts it: without TRITON_INTERPRET in the environment."""
    if torch.cuda.is_available() or functional.why_not_triton(torch.device("cuda")):
        pytest.skip("needs triton, and no GPU")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastbert", "verify", "--op", "add_rms_norm", "--dtype", "bf16"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "through Triton's interpreter" in done.stdout
    assert "4 times as much" in done.stdout
    assert "2 of 2 passed" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0


# ---- the helpers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("op", INPUTS)
def test_inputs_fit_every_operator_at_awkward_lengths(op, lengths):
    if op in ("linear_act", "feed_forward", "linear_cross_entropy") and sum(lengths) > 200:
        pytest.skip("rows only: the operator has no lengths")
    checks = check_op(op, INPUTS[op](TINY, lengths), torch.float32, impl="reference")
    assert any(c.name.startswith("out") for c in checks)
    assert any(c.name.startswith("d") for c in checks)
    if sum(lengths):  # the mean of no losses is NaN by definition
        assert all(c.passed for c in checks), [str(c) for c in checks if not c.passed]


def test_compare_gives_the_same_rounded_inputs_and_gradients_to_all():
    seen = []

    def scaled(x, mask, factor):
        seen.append((x.dtype, x.detach().double(), mask, factor))
        return (x * factor).masked_fill(mask, 0.0), x.detach().float().sum()

    inputs = {"x": torch.randn(3, 5), "mask": torch.eye(3, 5, dtype=torch.bool), "factor": torch.tensor([0.3])}
    checks = compare(scaled, scaled, inputs, torch.bfloat16, constant=("factor",))
    assert [c.name for c in checks] == ["out[0]", "out[1]", "dx"]
    assert [dtype for dtype, *_ in seen] == [torch.bfloat16, torch.bfloat16, torch.float64]
    assert all(torch.equal(x, seen[0][1]) for _, x, *_ in seen)
    assert all(mask is inputs["mask"] and factor.dtype == torch.float32 for *_, mask, factor in seen)
    # ours is plain torch itself, with exactly half of its own budget
    assert all(c.budget == pytest.approx(2 * c.error + 1e-7) for c in checks)


def test_the_upstream_gradient_is_random():
    """With an upstream gradient of ones, as from `.sum()`, this gradient in the wrong place would pass."""

    class Flipped(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad.flip(-1)

    checks = compare(lambda x: Flipped.apply(x), lambda x: x.clone(), {"x": torch.randn(3, 5)}, torch.float32)
    assert [(c.name, c.passed) for c in checks] == [("out", True), ("dx", False)]


def test_workloads_have_the_tokens_of_their_names():
    assert all(w.tokens == sum(w.lengths) and max(w.lengths) <= 4096 for w in WORKLOADS.values())
    lengths = natural_lengths(4096)
    assert lengths == natural_lengths(4096)
    assert sorted(lengths)[2048] == pytest.approx(37, abs=4)
    assert max(lengths) == 512
    assert MODELS["base"].head_dim == MODELS["large"].head_dim == 64
