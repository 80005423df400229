"""The comparison of libraries' own tests on plain and accelerated models: what fails, and how a run continues."""

import json

import pytest
import torch

from libraries_own import BEGAN, NEVER_ENDED, Accelerator, Recorder, names_in, outcomes_in, report

pytestmark = pytest.mark.once

PLAIN = {"a": "passed", "b": "passed", "c": "FAILED", "d": "skipped"}
MODELS = ["BertModel"]


def test_a_test_that_passes_only_on_plain_models_is_named(capsys):
    assert report(PLAIN, {"a": "passed", "b": "FAILED AssertionError: 3 != 4"}, MODELS) == 1
    assert "2 of 4 pass on plain models, 1 of these fail" in (said := capsys.readouterr().out)
    assert "b: FAILED AssertionError: 3 != 4" in said
    assert report(PLAIN, {"a": "passed", "b": "passed"}, MODELS) == 0
    assert report(PLAIN, {"a": "passed"}, MODELS) == 1, "a test that did not run has failed"
    assert report({"c": "FAILED"}, {}, MODELS) == 1, "nothing was compared"


def test_a_run_that_accelerated_nothing_is_a_failure(tmp_path, capsys):
    """A test file of transformers replaced the module in sys.modules whose folder identifies the library's code: every
    model was left alone, and every test passed."""
    assert report(PLAIN, {"a": "passed", "b": "passed"}, []) == 1
    assert "accelerated: no model" in capsys.readouterr().out
    accelerator = Accelerator(tmp_path / "models.txt")
    for module in (torch.nn.Linear(2, 2), *(torch.nn.MultiheadAttention(4, 1) for _ in range(2))):
        accelerator.accelerate(module)
    assert names_in(accelerator.file) == ["MultiheadAttention"]


def test_a_listed_test_may_fail_and_its_reason_is_printed(capsys):
    name = "tests/losses/test_x.py::test_cached_loss_replays_dropout_in_the_backward_pass"
    assert report({name: "passed"}, {name: "FAILED"}, MODELS) == 0
    assert "the products between them round differently" in capsys.readouterr().out


@pytest.fixture
def kept(tmp_path):
    def write(name, *lines):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tmp_path / name

    return write


def test_a_stopped_run_continues_and_skips_a_test_that_never_ends(kept):
    file = kept("plain.jsonl", ["a", BEGAN], ["a", "passed"], ["b", BEGAN], ["c", BEGAN], ["c", BEGAN])
    assert outcomes_in(file) == {"a": "passed", "b": BEGAN, "c": NEVER_ENDED}
    assert Recorder(file, None).done == {"a", "c"}


def test_accelerated_models_run_the_tests_that_pass_on_plain_ones(kept, tmp_path):
    recorder = Recorder(tmp_path / "accelerated.jsonl", kept("plain.jsonl", *PLAIN.items()))
    assert recorder.only == {"a", "b"}
