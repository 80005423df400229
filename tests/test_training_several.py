"""Any number of labels for a text, and next sentences: from files to predictions, compared with other libraries."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import fastbert
from command_line import run
from fastbert import BertConfig, BertForPreTraining, BertModel, Tokenizer
from fastbert.checkpoint import CheckpointError
from fastbert.training import metrics
from fastbert.training.files import DataError
from fastbert.training.labels import class_names
from fastbert.training.tasks import Spec, make_task
from training_models import PIECES, task_of

pytestmark = pytest.mark.once

CPU = ("--impl", "native", "--dtype", "float32", "--device", "cpu")


@pytest.fixture(scope="module")
def config() -> BertConfig:
    return BertConfig(
        vocab_size=len(PIECES), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=32, initializer_range=0.3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def bert(config, tmp_path_factory) -> Path:
    """A plain BERT whose vocabulary is the letters."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    Tokenizer.from_words(PIECES, lowercase=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pretrained(config, tmp_path_factory) -> Path:
    """A BERT with both heads of pre-training."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(1)
    BertForPreTraining(config).save_pretrained(folder)
    Tokenizer.from_words(PIECES, lowercase=True).save_pretrained(folder)
    return folder


# ---- any number of labels ------------------------------------------------------------------------------------


def test_scores_of_several_labels_equal_those_of_scikit_learn():
    reference = pytest.importorskip("sklearn.metrics", reason="needs the test extra")
    draw = np.random.default_rng(0)
    for n_labels, share in ((2, 0.5), (5, 0.3), (3, 0.05)):
        gold, predicted = (draw.random((20, n_labels)) < share for _ in range(2))
        found = metrics.multi_label_scores(gold, predicted, [f"label {i}" for i in range(n_labels)])
        occurring = np.flatnonzero(gold.any(0) | predicted.any(0))
        macro = reference.f1_score(gold, predicted, average="macro", labels=occurring, zero_division=0)
        micro = reference.f1_score(gold, predicted, average="micro", zero_division=0)
        assert found.values == {
            "f1_micro": pytest.approx(micro),
            "f1_macro": pytest.approx(macro),
            "subset_accuracy": pytest.approx(reference.accuracy_score(gold, predicted)),
        }
        assert found.values.keys() == found.definitions.keys()
    third_never = np.array([[1, 0, 0], [0, 1, 0]], bool)
    assert metrics.multi_label_scores(third_never, third_never, ["a", "b", "c"]).values["f1_macro"] == 1.0
    nothing = np.zeros((3, 2), bool)
    assert metrics.multi_label_scores(nothing, nothing, ["a", "b"]).values == {
        "f1_micro": 0.0, "f1_macro": 0.0, "subset_accuracy": 1.0
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"\[texts, labels\], got \(0, 2\)"):
        metrics.multi_label_scores(nothing[:0], nothing[:0], ["a", "b"])


def test_cells_with_several_labels():
    assert class_names("a|b c", "") == class_names(["a", "b c"], "") == class_names(" a | b c ", "") == ("a", "b c")
    assert class_names("", "") == class_names(" ", "") == class_names([], "") == ()
    assert class_names([1, True], "") == ("1", "true")
    for value, message in (("a||b", "line 3: a label must be a name, got ''"), ([["a"]], "must be a name"),
                           (3, "line 3: labels must be a list of names, got 3")):  # fmt: skip
        with pytest.raises(DataError, match=message):
            class_names(value, "line 3")


def test_targets_follow_the_names_of_labels():
    """A repeated label counts once. The loss has an item for each label of a text, present or not."""
    task, examples, windows = task_of("several")
    numbers = {label: i for i, label in enumerate(task.labels)}
    for example, window in zip(examples, windows, strict=True):
        expected = [0.0] * len(task.labels)
        for name in example.label:
            expected[numbers[name]] = 1.0
        assert window.target == expected
        assert task.weight(window) == len(task.labels)
    twice = [examples[0]._replace(label=("EARLY", "early"))]
    assert task.targets(twice) == [[1.0 if label == "early" else 0.0 for label in task.labels]]
    with pytest.raises(DataError, match="--class-weights is for one label a text"):
        task.weigh("balanced", windows)


def test_a_label_is_predicted_above_one_half():
    task = make_task(Spec("sentence", "f1_micro", multi_label=True), None, ["a", "b", "c"])
    (prediction,) = task.predictions([None], [None], [np.array([2.0, 0.0, 800.0], np.float32)])
    np.testing.assert_allclose(prediction, [1 / (1 + np.exp(-2.0)), 0.5, 1.0])
    record = task.record(None, prediction, True)
    assert [found["label"] for found in record["labels"]] == ["c", "a"], (
        "the likeliest label comes first, and one half is not above one half"
    )
    assert list(record["scores"]) == ["a", "b", "c"]


def test_several_labels_from_file_to_file(bert, tmp_path, capsysbinary):
    """Learnt from a table and from .jsonl, read by transformers, and continued by the names of labels."""
    draw = random.Random(0)
    rows = []
    for _ in range(48):
        letters = draw.sample("abcdefgh", 4)
        rows.append((" ".join(letters), [name for name, letter in (("has A", "a"), ("b", "b")) if letter in letters]))
    table, lines = tmp_path / "a.tsv", tmp_path / "a.jsonl"
    table.write_text("text\tlabel\n" + "".join(f"{text}\t{'|'.join(names)}\n" for text, names in rows))
    lines.write_text("".join(json.dumps({"text": text, "label": names}) + "\n" for text, names in rows))
    base = ("finetune", "--model", bert, "--task", "sentence", "--multi-label", *CPU, "-q", "--batch-tokens", 60)
    learns = ("--epochs", 16, "--lr", "5e-3", "--eval", table)
    assert run(*base, "--train", lines, "--out", tmp_path / "out", *learns) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["metric"] == "f1_micro"
    assert report["labels"] == ["b", "has A"]
    assert report["scores"]["f1_micro"] > 0.95
    capsysbinary.readouterr()
    assert run("predict", tmp_path / "out", table, "--all-scores", *CPU) == 0
    records = [json.loads(line) for line in capsysbinary.readouterr().out.splitlines()]
    right = [{found["label"] for found in record["labels"]} == set(names)
             for record, (_, names) in zip(records, rows, strict=True)]  # fmt: skip
    assert sum(right) / len(right) == pytest.approx(report["scores"]["subset_accuracy"])

    transformers = pytest.importorskip("transformers", reason="needs the test extra")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.problem_type == "multi_label_classification"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected = theirs(**tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")).logits.sigmoid()
    scores = torch.tensor([[record["scores"][label] for label in report["labels"]] for record in records])
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)

    onward = ("finetune", "--model", tmp_path / "out", "--task", "sentence", *CPU, "-q", "--epochs", 1, "--lr", "1e-9")
    again = (*onward, "--multi-label", "--train", table, "--eval", table, "--out", tmp_path / "again")
    assert run(*again) == 0
    assert json.loads((tmp_path / "again" / "report.json").read_text())["scores"] == report["scores"]
    single = tmp_path / "single.tsv"
    single.write_text("text\tlabel\na b\tb\nc d\thas A\n")
    assert run(*onward, "--train", single, "--out", tmp_path / "single") == 0
    config = json.loads((tmp_path / "single" / "config.json").read_text())
    assert config["problem_type"] == "single_label_classification", "another loss needs another head"


@pytest.mark.parametrize(
    ("content", "others", "message"),
    [
        ("text\tlabel\na\t\nb\t\n", (), "no example has a label"),
        ("text\tlabel\na\tx\nb\tx|y\n", ("--metric", "accuracy"), "is one of f1_micro, f1_macro, subset_accuracy"),
        ("text\tlabel\na\tx\nb\tx||y\n", (), "line 3: a label must be a name, got ''"),
        ("text\tlabel\na\tx\nb\tx|y\n", ("--labels", "x,z"), "line 3: the label 'y' is none of x, z"),
        ("text\tlabel\na\t1\nb\t2\n", ("--labels", "number"), "--labels number is for one number a text"),
        ("text\tlabel\na\tx\nb\tx|y\n", ("--class-weights", "balanced"), "--class-weights is for one label a text"),
    ],
)
def test_errors_in_examples_are_one_line(bert, tmp_path, capsys, content, others, message):
    (tmp_path / "a.tsv").write_text(content)
    base = ("finetune", "--model", bert, "--task", "sentence", "--multi-label", *CPU, "-q", "--out", tmp_path / "out")
    assert run(*base, "--train", tmp_path / "a.tsv", *others) != 0
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_texts_to_be_scored_may_all_be_without_labels(bert, tmp_path):
    (tmp_path / "train.tsv").write_text("text\tlabel\na\tx\nb\tx|y\n")
    (tmp_path / "eval.tsv").write_text("text\tlabel\na\t\nb\t\n")
    files = ("--train", tmp_path / "train.tsv", "--eval", tmp_path / "eval.tsv", "--out", tmp_path / "out")
    assert (
        run("finetune", "--model", bert, "--task", "sentence", "--multi-label", *CPU, "-q", "--epochs", 1, *files) == 0
    )
    scores = json.loads((tmp_path / "out" / "report.json").read_text())["scores"]
    assert scores["f1_micro"] == 0.0
    assert 0.0 <= scores["subset_accuracy"] <= 1.0


def test_several_labels_are_for_texts_only(bert, tmp_path, capsys):
    assert run("finetune", "--task", "token", "--multi-label", "--train", "x", "--out", tmp_path / "out") == 2
    assert "--multi-label is for texts and pairs, not for --task token" in capsys.readouterr().err


# ---- next sentences ------------------------------------------------------------------------------------------


def test_a_pretrained_model_predicts_next_sentences(pretrained, tmp_path, capsysbinary):
    transformers = pytest.importorskip("transformers", reason="needs the test extra")
    pairs = [("a b", "c d"), ("a", "ab bc cd"), ("e f g", "a")]
    (tmp_path / "pairs.tsv").write_text("text1\ttext2\n" + "".join(f"{a}\t{b}\n" for a, b in pairs))
    capsysbinary.readouterr()
    assert run("predict", pretrained, tmp_path / "pairs.tsv", "--all-scores", *CPU) == 0
    records = [json.loads(line) for line in capsysbinary.readouterr().out.splitlines()]
    theirs = transformers.BertForNextSentencePrediction.from_pretrained(pretrained).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(pretrained)
    with torch.no_grad():
        first, second = zip(*pairs, strict=True)
        inputs = tokenizer(list(first), list(second), padding=True, return_tensors="pt")
        expected = theirs(**inputs).logits.softmax(-1)
    found = torch.tensor([[record["scores"][name] for name in ("is_next", "not_next")] for record in records])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    for record, probabilities in zip(records, expected, strict=True):
        assert record["label"] == ("is_next", "not_next")[int(probabilities.argmax())]
    follows = fastbert.pipeline(pretrained, impl="native", dtype="float32", device="cpu")
    assert [record["label"] for record in follows(pairs)] == [record["label"] for record in records]
    with pytest.raises(TypeError, match="must be two texts"):
        follows(["a"])


def test_a_model_without_that_head_is_refused(bert, tmp_path, capsys):
    with pytest.raises(CheckpointError, match=r"has no fastbert_task.json, .* and no head for next sentences"):
        fastbert.pipeline(bert, device="cpu")
    (tmp_path / "pairs.tsv").write_text("text1\ttext2\na\tb\n")
    assert run("predict", bert, tmp_path / "pairs.tsv", *CPU) == 1
    assert capsys.readouterr().err.count("\n") == 1
