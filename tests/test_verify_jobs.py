"""`fastbert verify --jobs`: a case that crashes or never ends affects no other case, and every case has its line."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence

import pytest
import torch

from fastbert import verify
from fastbert.cli.main import main
from fastbert.testing import MODELS, Check
from fastbert.verify import jobs

CPU = torch.device("cpu")
# The main module of the starting process, which worker processes import first.
MAIN = """\
import os, sys, time
import torch
from fastbert.cli.main import main
from fastbert.verify import run
from fastbert.kernels import native, reference

torch.set_num_threads(1)

def broken(x, cu_seqlens, mode, *rest):
    if mode == "cls":
        {fault}
    return reference.pool(x, cu_seqlens, mode, *rest)

native.pool = broken
{more}
if __name__ == "__main__":
    sys.exit(main(["verify", "--device", "cpu", "--impl", "native", *sys.argv[1:]]))
"""


def started(
    folder, *arguments: str, fault: str = "pass", more: str = "", before: Sequence[str] = ()
) -> subprocess.Popen:
    """before: what stands before the command."""
    (folder / "main.py").write_text(MAIN.format(fault=fault, more=more))
    command = [*before, sys.executable, str(folder / "main.py"), *arguments, "--json-lines", str(folder / "lines")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def verified(folder, *arguments: str, **options) -> tuple[int, str, list[dict]]:
    process = started(folder, *arguments, **options)
    out, err = process.communicate()
    assert not err, err
    return process.returncode, out, lines(folder)


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "lines").read_text().splitlines()]


def test_results_are_the_same_with_any_number_of_jobs(tmp_path):
    arguments = ("--op", "pool", "--op", "add_rms_norm", "--dtype", "fp32", "--dtype", "bf16")
    code, out, shared = verified(tmp_path, *arguments, "--jobs", "2")
    (tmp_path / "lines").unlink()
    assert (code, out) == verified(tmp_path, *arguments)[:2]
    key = lambda line: (line["op"], line["dtype"], line["case"])  # noqa: E731
    alone = sorted(lines(tmp_path), key=key)
    shared.sort(key=key)
    assert len(shared) == 8  # 3 cases of pool and one of the other operator, in two dtypes
    for a, b in zip(shared, alone, strict=True):
        assert a.pop("seconds") > 0 < b.pop("seconds")
        assert a == b


# dtype -> what happens in its second case, and the message in its line
FAULTS = {
    "fp32": ("os.kill(os.getpid(), 11)", "the process ended: SIGSEGV"),
    "fp16": ("os._exit(7)", "the process ended: exit code 7"),
    "bf16": ("time.sleep(1e6)", "not done after 30 s"),
}


def test_a_case_that_crashes_affects_no_other_case(tmp_path):
    """An illegal access once made all later cases of the process fail."""
    of = {
        torch_name: FAULTS[name][0] for name, torch_name in zip(FAULTS, ("float32", "float16", "bfloat16"), strict=True)
    }
    fault = f"exec({of!r}[str(x.dtype).split('.')[1]])"
    dtypes = [word for name in FAULTS for word in ("--dtype", name)]
    code, out, found = verified(tmp_path, "--op", "pool", *dtypes, "--jobs", "2", "--case-seconds", "30", fault=fault)
    assert code == 1
    assert "6 FAILED" in out  # both directions of the operator in each dtype
    for dtype, (_, message) in FAULTS.items():
        of_dtype = {line["case"]: line for line in found if line["dtype"] == dtype}
        assert of_dtype.keys() == {"mean", "cls", "max"}
        assert {case: line["message"] for case, line in of_dtype.items() if not line["passed"]} == {"cls": message}
        assert [len(line["checks"]) for line in of_dtype.values() if line["passed"]] == [2, 2]
        assert message in out


def test_a_process_that_lost_its_gpu_gets_no_further_case(tmp_path):
    """After an illegal access every GPU call of that process raises, so the next case would fail for it."""
    more = """
lost = []
right = native.pool
def loses(x, cu_seqlens, mode, *rest):
    if lost or mode == "cls":
        lost.append(1)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return right(x, cu_seqlens, mode, *rest)
native.pool = loses
def still_answers(device):
    return not lost
run._still_answers = still_answers
"""
    _, _, found = verified(tmp_path, "--op", "pool", "--dtype", "fp32", "--jobs", "1", more=more)
    assert [line["passed"] for line in found] == [True, False, True]


@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGKILL])
def test_lines_are_written_at_once_and_processes_end_with_the_run(tmp_path, hearing, ended_by):
    """Processes whose parent was killed went on with their case, for hours if it never ended."""
    process = started(
        tmp_path, "--op", "pool", "--dtype", "fp32", "--jobs", "2", before=hearing,
        fault=f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(1e6)",
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not ((tmp_path / "lines").exists() and len(lines(tmp_path)) == 2 and (tmp_path / "pid").exists()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert {line["case"] for line in lines(tmp_path)} == {"mean", "max"}
    finally:
        process.send_signal(ended_by)
        try:
            out, _ = process.communicate(timeout=60)  # waits for all processes that hold the output open
        except subprocess.TimeoutExpired:
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
            raise
    if ended_by == signal.SIGINT:
        assert "Interrupted" in out
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)


def test_json_lines_have_their_fields_and_no_nan(tmp_path):
    code, _, found = verified(
        tmp_path, "--op", "pool", "--dtype", "fp16", fault="return x.new_full((5, 64), torch.nan)"
    )
    assert code == 1
    assert len(found) == 3
    for line in found:
        assert line.keys() == {
            "op", "dtype", "case", "hidden", "heads", "lengths", "passed", "seconds", "message", "checks",
        }  # fmt: skip
        assert line["passed"] is (line["case"] != "cls")
    assert [c["name"] for c in found[0]["checks"]] == ["out", "dx"]
    assert found[0]["checks"][0]["error"] <= found[0]["checks"][0]["budget"]


class Idle:
    """A worker that only records its tasks."""

    def __init__(self):
        self.task = None

    def begin(self, task):
        self.task = task


def test_cases_begin_in_order_while_there_is_room():
    work = verify.tasks(["attention", "pool"], ["bf16"], CPU, "real")
    large = [task for task in work if task.op == "attention" and max(task.lengths) == 4096]
    assert all(4 * 2**30 < task.needs < 6 * 2**30 for task in large)
    small = next(task for task in work if task.op == "pool")
    assert small.needs < 3.5 * 2**30

    def handed_out(waiting, workers, most, room):
        jobs.hand_out(waiting, workers, most, lambda task: task.needs, room, Idle)
        return [worker.task for worker in workers]

    waiting, workers = deque([*large[:3], small]), []
    assert handed_out(waiting, workers, 8, 12 * 2**30) == large[:2]  # the small case waits for its turn
    workers[0].task = None
    assert handed_out(waiting, workers, 8, 12 * 2**30) == [large[2], large[1]]
    assert [*waiting] == [small]
    # a case that is too large for the device still runs, alone
    assert handed_out(deque([large[0], small]), [], 8, 2**30) == [large[0]]
    # not more processes than requested
    waiting = deque([small] * 5)
    assert handed_out(waiting, [], 2, 1e15) == [small, small]
    assert len(waiting) == 3


def test_dtypes_run_one_after_the_other_and_rows_are_sorted_by_operator():
    work = verify.tasks(["pool", "add_rms_norm"], ["bf16", "fp32"], CPU)
    assert [(t.dtype, t.op) for t in work] == [
        *[("bf16", "pool")] * 3, ("bf16", "add_rms_norm"), *[("fp32", "pool")] * 3, ("fp32", "add_rms_norm"),
    ]  # fmt: skip
    rows = verify.worst(verify.Result(task, (Check("out", 0.0, 1.0),)) for task in work)
    assert [(row.op, row.dtype) for row in rows] == [
        ("add_rms_norm", "bf16"), ("add_rms_norm", "fp32"), ("pool", "bf16"), ("pool", "fp32"),
    ]  # fmt: skip
    assert work[0].model is MODELS["tiny"]


def test_jobs_must_be_at_least_one(capsys):
    assert main(["verify", "--device", "cpu", "--impl", "native", "--jobs", "0"]) == 2
    assert "--jobs must be at least 1, got 0" in capsys.readouterr().err
