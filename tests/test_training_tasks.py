"""From a head's outputs to a task's answers: spans over windows, tags of words, probabilities by label."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastbert import Tokenizer
from fastbert.training.features import question_features
from fastbert.training.files import Answer, DataError, Question, Sentence
from fastbert.training.labels import Text, classes_of, tags_of
from fastbert.training.spans import best_spans
from fastbert.training.tasks import Spec, make_task
from training_models import PIECES, task_of

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_words(PIECES, lowercase=True)


# ---- spans ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("longest", [1, 3, 50])
def test_the_best_spans_over_all_windows(tokenizer, longest):
    """Compared with every span that begins at a window's own token, ends in this window and is not too long."""
    draw = random.Random(0)
    context = " ".join(draw.choices("abcdefghij", k=40))
    windows = question_features(tokenizer, [Question("q", "a b", context)], 24, 8, training=False, longest=30).windows
    assert len(windows) > 2
    logits = [np.array([[draw.gauss(0, 1), draw.gauss(0, 1)] for _ in w.input_ids]) for w in windows]
    every = {}
    for window, of_window in zip(windows, logits, strict=True):
        for start in window.owned:
            for end in range(start, min(start + longest, len(window.input_ids) - 1)):
                place = window.offsets[start][0], window.offsets[end][1]
                assert place not in every, "no span comes twice"
                every[place] = of_window[start, 0] + of_window[end, 1]
    spans, null = best_spans(windows, logits, longest)
    expected = sorted(every.items(), key=lambda item: -item[1])[: len(spans)]
    assert [(span.start, span.end) for span in spans] == [place for place, _ in expected]
    assert [span.score for span in spans] == pytest.approx([score for _, score in expected])
    assert len(spans) == min(20, len(every))
    assert null == pytest.approx(min(of_window[0].sum() for of_window in logits))


def test_an_answer_is_the_exact_text_or_none_by_the_threshold(tokenizer):
    question = Question("q", "a", "b  C,d e", [Answer("C", 3)])
    task = make_task(Spec("qa", "squad_v2", max_length=20, threshold=0.5), tokenizer)
    (window,) = task.features([question], training=False).windows
    logits = np.zeros((len(window.input_ids), 2), np.float32)
    first, last = (i for i, o in enumerate(window.offsets) if o is not None and question.context[o[0]] in "Cd")
    logits[first, 0], logits[last, 1] = 3.0, 4.0
    (prediction,) = task.predictions([question], [window], [logits])
    assert (prediction["answer"], prediction["start"], prediction["end"]) == ("C,d", 3, 6)
    assert prediction["null_difference"] == pytest.approx(-7.0)
    assert task.record(question, prediction, False)["answer"] == "C,d"
    logits[0] = 3.7
    (prediction,) = task.predictions([question], [window], [logits])
    assert prediction["null_difference"] == pytest.approx(0.4, abs=1e-6)
    assert task.record(question, prediction, False)["answer"] == "C,d", "0.4 above it is not above the threshold"
    logits[0] = 3.8
    (prediction,) = task.predictions([question], [window], [logits])
    record = task.record(question, prediction, True)
    assert (record["answer"], record["start"], record["end"]) == ("", None, None)
    assert 0.5 < record["score"] < 1.0


def test_an_empty_context_has_no_answer(tokenizer):
    question = Question("q", "a", " ", [])
    task = make_task(Spec("qa", "squad", max_length=20), tokenizer)
    windows = task.features([question], training=False).windows
    (prediction,) = task.predictions([question], windows, [np.zeros((len(windows[0].input_ids), 2))])
    assert task.record(question, prediction, False) == {
        "id": "q",
        "answer": "",
        "score": 1.0,
        "start": None,
        "end": None,
    }


# ---- tags ----------------------------------------------------------------------------------------------------


def test_each_word_has_the_tag_of_its_own_window(tokenizer):
    """With a model that knows the tags, long sentences, words of several pieces, and batches of several windows."""
    task, examples, windows = task_of("token")
    assert len(windows) >= len(examples)
    targets = torch.tensor([max(label, 0) for window in windows for label in window.target])
    logits = torch.nn.functional.one_hot(targets, len(task.labels)) * 9.0
    found = task.by_window(SimpleNamespace(logits=logits), windows)
    predictions = task.predictions(examples, windows, found)
    assert [[tag for tag, _ in p] for p in predictions] == [e.tags for e in examples]
    assert task.scores(examples, predictions).values["entity_f1"] == 1.0
    assert sum(task.weight(w) for w in windows) == sum(len(e.words) for e in examples)


def test_an_entity_has_its_characters_and_the_mean_score_of_its_words(tokenizer):
    task = make_task(Spec("token", "entity_f1"), tokenizer, ["O", "B-x", "I-x"])
    prediction = [("O", 0.9), ("B-x", 0.8), ("I-x", 0.6)]
    joined = task.record(Sentence("s", ["ab", "c", "def"], None), prediction, False)
    assert joined["entities"] == [{"type": "x", "text": "c def", "start": 3, "end": 8, "score": pytest.approx(0.7)}]
    of_text = task.record(Sentence("s", ["ab", "c", "def"], None, "ab, c--def!", [0, 4, 7]), prediction, True)
    assert [(e["text"], e["start"], e["end"]) for e in of_text["entities"]] == [("c--def", 4, 10)]
    assert [tag["tag"] for tag in of_text["tags"]] == ["O", "B-x", "I-x"]


# ---- labels --------------------------------------------------------------------------------------------------


def texts(*labels):
    return [Text(f"line {i}", "x", None, label) for i, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("labels", "given", "of_model", "names"),
    [
        (("b", "A", "B"), None, None, ["A", "b"]),
        (("10", "9", "10"), None, None, ["9", "10"]),
        (("b", "a"), ("B", "A"), None, ["B", "A"]),
        (("b", "a"), None, ["c", "B", "A"], ["c", "B", "A"]),
        (("b", "a"), ("a", "b"), ["c", "d"], ["a", "b"]),
    ],
)
def test_the_order_of_labels(labels, given, of_model, names):
    assert classes_of(texts(*labels), given, of_model) == names


def test_training_follows_the_names_of_labels(tokenizer):
    """It does not follow the order in which they appear."""
    task = make_task(Spec("sentence", "accuracy"), tokenizer)
    examples = texts("b", "A", "B")
    task.settle(examples, None, None)
    assert task.labels == ["A", "b"]
    assert [window.target for window in task.features(examples, training=True).windows] == [1, 0, 1]
    task.settle(examples, ("B", "a"), None)
    assert task.targets(examples) == [0, 1, 0]


def test_labels_with_the_same_name_are_refused():
    with pytest.raises(DataError, match="two labels have the same name: a, A"):
        classes_of(texts("a", "b"), ("a", "A"), None)


def test_tags_are_complete_and_in_order():
    sentences = [Sentence("s", ["a", "b"], ["I-y", "B-x-z"])]
    assert tags_of(sentences, None) == ["O", "B-x-z", "I-x-z", "B-y", "I-y"]
    with pytest.raises(DataError, match="no sentence has an entity"):
        tags_of([Sentence("s", ["a"], ["O"])], None)
    with pytest.raises(DataError, match="the tag 'I-y' is none of the model's: O, B-x-z"):
        tags_of(sentences, ["O", "B-x-z"])


def test_texts_to_predict_need_no_label_and_have_no_columns_option(tokenizer, tmp_path):
    task, table = make_task(Spec("sentence", "accuracy"), tokenizer), tmp_path / "texts.tsv"
    table.write_text("sentence\nb\n", encoding="utf-8")
    assert [example.text for example in task.read(table, gold=False)] == ["b"]
    table.write_text("text1\ttext2\na\tb\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"has the columns text1, text2; expected text or sentence$"):
        task.read(table, gold=False)
