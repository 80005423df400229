"""`fastbert fill-mask`: the words, their order, and the errors."""

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastbert
from fastbert import BertModel
from fastbert.checkpoint import CheckpointError
from fastbert.cli.main import main
from fastbert.encoding.masks import MaskFiller
from small_bert import LETTERS, save_bert

pytestmark = pytest.mark.once

WORDS = [*LETTERS, "ä"]
TEXTS = ["a [MASK] c", "[MASK] b [MASK] d e f", "x [MASK]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with random weights and a position table of 12."""
    sizes = {"vocab_size": 40, "max_position_embeddings": 12, "initializer_range": 0.5}
    folder = save_bert(tmp_path_factory.mktemp("words"), WORDS, fastbert.BertForMaskedLM, **sizes)
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false, "tokenizer_class": "BertTokenizer"}')
    return folder


@pytest.fixture
def options(folder) -> list[str]:
    return ["--model", str(folder), "--impl", "native", "--device", "cpu", "--dtype", "float32"]


def test_words_and_scores_are_those_of_transformers(folder):
    """The model has more rows than the vocabulary has words, as if padded: these rows are never answers."""
    transformers = pytest.importorskip("transformers", reason="compared with transformers")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    filler = MaskFiller.from_pretrained(folder, dtype="float32", device="cpu", impl="native")
    filled = filler.fill(TEXTS, top_k=4)
    assert [len(masks) for masks in filled] == [1, 2, 1]
    for text, masks in zip(TEXTS, filled, strict=True):
        ids = torch.tensor(filler.tokenizer.input_ids([text]))
        with torch.no_grad():
            logits = theirs(ids).logits[0, :, : len(WORDS)]
        expected = logits.softmax(-1)[ids[0] == WORDS.index("[MASK]")].topk(4)
        assert [[word.id for word in of_mask] for of_mask in masks] == expected.indices.tolist()
        torch.testing.assert_close(torch.tensor([[w.score for w in of_mask] for of_mask in masks]), expected.values)
        assert all(word.token == WORDS[word.id] for of_mask in masks for word in of_mask)


def test_lines_come_in_their_order(tmp_path, folder, options, capsysbinary, monkeypatch):
    """From a file, standard input and a field, in chunks, to standard output and a file."""
    monkeypatch.setattr("fastbert.cli.fill_mask.LINES", 2)
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS) + "\n")
    assert main(["fill-mask", str(file), "--top-k", "2", *options]) == 0
    plain = capsysbinary.readouterr().out
    records = [json.loads(line) for line in plain.splitlines()]
    assert [record["text"] for record in records] == TEXTS
    assert [len(record["masks"]) for record in records] == [1, 2, 1]
    assert all(
        len(of_mask) == 2 and of_mask[0]["score"] >= of_mask[1]["score"]
        for record in records
        for of_mask in record["masks"]
    )
    assert list(records[0]["masks"][0][0]) == ["token", "id", "score"]

    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(file.read_bytes())))
    assert main(["fill-mask", "-", "--top-k", "2", *options]) == 0
    assert capsysbinary.readouterr().out == plain

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"id": n, "body": text}) + "\n" for n, text in enumerate(TEXTS)))
    out = tmp_path / "out.jsonl"
    assert main(["fill-mask", str(rows), "-o", str(out), "--field", "body", "--top-k", "2", *options]) == 0
    found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [record["id"] for record in found] == [0, 1, 2]
    assert [record["masks"] for record in found] == [record["masks"] for record in records]


@pytest.mark.parametrize(
    ("lines", "more", "message"),
    [
        (["a [MASK]", "a b"], [], "line 2: there is no [MASK] in the text"),
        (["a [mask]"], [], "line 1: there is no [MASK]"),
        (["[MASK] " + "a " * 20 + "[MASK] [MASK]"], [], "line 1: 2 of 3 [MASK] are past the model's 12 tokens"),
        (["a [MASK]"], ["--top-k", "99"], "top_k must be from 1 to 32, the vocabulary, got 99"),
        (["a [MASK]"], ["--top-k", "0"], "expected a whole number from 1 up"),
    ],
)
def test_errors_are_one_line(tmp_path, options, capsys, lines, more, message):
    file, out = tmp_path / "texts.txt", tmp_path / "out.jsonl"
    file.write_text("\n".join(lines) + "\n")
    arguments = ["fill-mask", str(file), "-o", str(out), *options, *more]
    if "0" in more:
        with pytest.raises(SystemExit):
            main(arguments)
    else:
        assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists(), "nothing half written"


def test_a_model_without_the_head_is_refused(tmp_path, folder, options, capsys):
    """The words of a head with random weights would be noise."""
    plain = tmp_path / "plain"
    BertModel(fastbert.BertForMaskedLM.from_pretrained(folder).config).save_pretrained(plain)
    for name in ("vocab.txt", "tokenizer_config.json"):
        shutil.copy(folder / name, plain / name)
    with pytest.raises(
        CheckpointError, match=r"has no head for masked words: it lacks cls\.predictions\.bias and 4 more"
    ):
        MaskFiller.from_pretrained(plain)
    file = tmp_path / "texts.txt"
    file.write_text("a [MASK]\n")
    assert main(["fill-mask", str(file), *options, "--model", str(plain)]) == 1
    assert "has no head for masked words" in capsys.readouterr().err
    assert main(["fill-mask", str(file), "-o", str(file), *options]) == 2
    assert "input and output are the same file" in capsys.readouterr().err


def test_scores_that_are_not_finite_are_refused(folder):
    filler = MaskFiller.from_pretrained(folder, dtype="float32", device="cpu", impl="native")
    with torch.no_grad():
        filler.model.cls["predictions"].bias[7] = float("nan")
    with pytest.raises(ValueError, match="scores are not finite"):
        filler.fill(["a [MASK]"])
