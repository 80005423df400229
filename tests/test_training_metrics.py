"""Metrics compared with the scripts and libraries that define them: seqeval, SQuAD, CMRC, WNUT-17, scikit-learn.

The folder `shared` has the originals' values for 48 cases; random cases are compared with the library itself.
"""

import json
import math
import random

import pytest

from fastbert.training import answers, entities, metrics, treebank

pytestmark = pytest.mark.once


@pytest.fixture(scope="session")
def cases(shared) -> dict[str, list[dict]]:
    """The cases of each metric."""
    grouped: dict[str, list[dict]] = {}
    for case in json.loads((shared / "fixtures" / "metrics.json").read_text(encoding="utf-8"))["cases"]:
        grouped.setdefault(case["metric"], []).append(case)
    return grouped


def test_every_case_has_a_test(cases):
    assert {metric: len(of_metric) for metric, of_metric in cases.items()} == {
        "seqeval": 11, "squad": 12, "cmrc2018": 15, "wnut17": 4, "matthews": 2, "spearman": 3, "pearson": 1,
    }  # fmt: skip


# ---- entities ------------------------------------------------------------------------------------------------


def prf(gold, predicted, read=entities.lenient, average="micro"):
    counts = entities.count_entities([read(tags) for tags in gold], [read(tags) for tags in predicted])
    if average == "macro":  # the mean over the types that occur in gold or in the predictions
        each = counts.values()
        return tuple(sum(getattr(c, name) for c in each) / max(len(each), 1) for name in ("precision", "recall", "f1"))
    total = entities.micro(counts)
    return total.precision, total.recall, total.f1


def test_seqeval_cases(cases):
    for case in cases["seqeval"]:
        # seqeval is strict only if a scheme is named as well
        read = entities.strict if "scheme" in case["args"] else entities.lenient
        found = prf(case["true"], case["pred"], read, case["args"].get("average", "micro"))
        assert found == pytest.approx((case["precision"], case["recall"], case["f1"]), abs=1e-12), case["name"]


def test_random_tags_as_seqeval_reads_them():
    """Lenient is seqeval's default, strict its strict IOB2, for tags in any order."""
    seqeval = pytest.importorskip("seqeval.metrics", reason="needs the test extra")
    from seqeval.scheme import IOB2

    def compared(gold, predicted, **options):
        found = (f(gold, predicted, zero_division=0, **options) for f in
                 (seqeval.precision_score, seqeval.recall_score, seqeval.f1_score))  # fmt: skip
        return pytest.approx(tuple(found), abs=1e-12)

    tags = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "I-creative-work"]
    draw = random.Random(0)
    for _ in range(60):
        gold, predicted = ([draw.choices(tags, k=n) for n in (1, 7, 12)] for _ in range(2))
        # An entity in each, because seqeval fails if there is none.
        gold[0], predicted[0] = ["B-PER"], ["B-PER"]
        assert prf(gold, predicted) == compared(gold, predicted)
        assert prf(gold, predicted, entities.strict) == compared(gold, predicted, mode="strict", scheme=IOB2)


def test_tags_of_five_kinds():
    """IOBES read leniently: E- ends an entity, S- is one, and I- after either begins another."""
    tags = ["B-A", "E-A", "I-A", "S-A", "S-A", "O", "E-A", "B-A", "B-A"]
    spans = [(e.start, e.end) for e in entities.lenient(tags)]
    assert spans == [(0, 2), (2, 3), (3, 4), (4, 5), (6, 7), (7, 8), (8, 9)]


def test_surface_cases(cases):
    for case in cases["wnut17"]:
        words, gold, predicted = ([[row[i] for row in s] for s in case["sentences"]] for i in range(3))
        values = entities.token_scores(words, gold, predicted).values
        for name in ("entity", "surface"):
            found = [100 * values[f"{name}_{measure}"] for measure in ("precision", "recall", "f1")]
            assert found == pytest.approx(case[f"{name}_prf"], abs=0.005), (case["name"], name)


def test_words_and_tags_must_be_as_many():
    with pytest.raises(ValueError, match="sentence 0 has 2 words, 2 gold and 1 predicted tags"):
        entities.token_scores([["a", "b"]], [["O", "O"]], [["O"]])


# ---- answers -------------------------------------------------------------------------------------------------


def test_squad_cases(cases):
    for case in cases["squad"]:
        for version, metric in (("v1", "squad"), ("v2", "squad_v2")):
            found = answers.score(metric, case["answers"], case["prediction"])
            expected = case[f"{version}_em"], case[f"{version}_f1"]
            assert found == pytest.approx(expected, abs=1e-12), (case["name"], version)
        assert " ".join(answers.squad_words(case["prediction"])) == case["normalized"], case["name"]


def test_cmrc_cases(cases):
    for case in cases["cmrc2018"]:
        found = answers.score("cmrc", case["answers"], case["prediction"])
        assert found == pytest.approx((case["em"], case["f1"]), abs=1e-12), case["name"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("don't say it's john's.", ["do", "n't", "say", "it", "'s", "john", "'s", "."]),
        ("mr. smith paid $3.88, i cannot", ["mr.", "smith", "paid", "$", "3.88", ",", "i", "can", "not"]),
        ('the "old man" (1952)...', ["the", "``", "old", "man", "''", "(", "1952", ")", "..."]),
        ("gimme 50% of a, b", ["gim", "me", "50", "%", "of", "a", ",", "b"]),
    ],
)
def test_english_words_within_chinese(text, expected):
    """As nltk 3.10.4's NLTKWordTokenizer splits them."""
    assert treebank.words(text) == expected


def test_drcd_goes_by_characters():
    assert answers.score("drcd", ["臺北 市、Taiwan"], "臺北市taiwan") == (1.0, 1.0)
    # three of four characters, in any place: 2 * 3 / (4 + 3)
    assert answers.score("drcd", ["臺北大學"], "大北臺") == pytest.approx((0.0, 6 / 7))


def test_no_answer_where_squad_allows_it():
    scores = answers.answer_scores(
        "squad_v2", {"a": ["tower"], "b": [], "c": ["the"]}, {"a": "tower hill", "b": "", "c": "x"}
    )
    assert scores.values["f1"] == pytest.approx((2 / 3 + 1.0 + 0.0) / 3)
    assert scores.values["exact_match"] == pytest.approx(1 / 3)
    assert scores.values["has_answer_f1"] == pytest.approx(2 / 3)
    # normalising makes the gold answer "the" empty, which counts as no answer
    assert scores.values["no_answer_f1"] == pytest.approx(1 / 2)
    # with another gold answer beside it, no answer is wrong
    assert answers.score("squad_v2", ["the", "tower"], "") == (0.0, 0.0)


def test_unanswered_question_counts_as_wrong():
    assert answers.answer_scores("squad", {"a": ["x"], "b": ["y"]}, {"a": "x"}).values["f1"] == 0.5


def test_threshold_is_the_best_of_all():
    """Compared with every possible threshold, if several questions have the same difference."""
    draw = random.Random(1)
    for _ in range(50):
        keys = range(draw.randint(1, 8))
        differences = {key: float(draw.randint(-3, 3)) for key in keys}
        earned, without = ({key: draw.choice([0.0, 0.5, 1.0]) for key in keys} for _ in range(2))

        def mean(threshold, d=differences, e=earned, w=without):
            return sum(w[key] if d[key] > threshold else e[key] for key in d) / len(d)

        threshold, value = answers.best_threshold(differences, earned, without)
        assert value == pytest.approx(mean(threshold))
        assert value == pytest.approx(max(mean(t) for t in (-4.0, *differences.values())))


# ---- classes and numbers -------------------------------------------------------------------------------------


def same(found: float, expected: float | str) -> bool:
    return math.isnan(found) if expected == "nan" else found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["matthews", "spearman", "pearson"])
def test_correlation_cases(cases, name):
    for case in cases[name]:
        x, y = case.get("true", case.get("x")), case.get("pred", case.get("y"))
        assert same(getattr(metrics, name)([float(v) for v in x], [float(v) for v in y]), case["value"]), case["name"]


def test_random_classes_and_numbers_as_scikit_learn_and_scipy_have_them():
    reference = pytest.importorskip("sklearn.metrics", reason="needs the test extra")
    stats = pytest.importorskip("scipy.stats", reason="needs the test extra")
    draw = random.Random(2)
    for n_labels in (2, 3, 5):
        for _ in range(20):
            gold, predicted = ([draw.randrange(n_labels) for _ in range(30)] for _ in range(2))
            assert metrics.accuracy(gold, predicted) == pytest.approx(reference.accuracy_score(gold, predicted))
            assert metrics.f1_macro(gold, predicted) == pytest.approx(
                reference.f1_score(gold, predicted, average="macro")
            )
            assert metrics.matthews(gold, predicted) == pytest.approx(reference.matthews_corrcoef(gold, predicted))
            positive = metrics.f1_binary(gold, predicted, positive=1)
            assert positive == pytest.approx(reference.f1_score(gold, predicted, labels=[1], average="macro"))
            assert metrics.spearman(gold, predicted) == pytest.approx(stats.spearmanr(gold, predicted).statistic)
            assert metrics.pearson(gold, predicted) == pytest.approx(stats.pearsonr(gold, predicted).statistic)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_correlation_of_tiny_and_huge_numbers(scale):
    assert metrics.pearson([scale, 2 * scale, 4 * scale], [1.0, 2.0, 4.0]) == pytest.approx(1.0)


def test_constant_predictions_are_never_the_best():
    # in floating point the mean of three times 0.1 is not 0.1
    assert math.isnan(metrics.pearson([1, 2, 3], [0.1, 0.1, 0.1]))
    assert metrics.is_better(0.1, None)
    assert metrics.is_better(-0.5, math.nan)
    assert not metrics.is_better(math.nan, None)
    assert not metrics.is_better(0.5, 0.5)


def test_scores_have_definitions():
    """Every value has its definition, and F1 of two labels names its label."""
    for scores in (
        metrics.class_scores([0, 1], [0, 0], ["negative", "positive"]),
        metrics.number_scores([1.0, 2.0], [1.0, 1.5]),
        entities.token_scores([["a"]], [["B-x"]], [["O"]]),
        answers.answer_scores("squad_v2", {"a": ["x"], "b": []}, {}),
    ):
        assert scores.values.keys() == scores.definitions.keys()
    scores = metrics.class_scores([0, 1, 1], [1, 1, 1], ["negative", "positive"])
    assert scores.definitions["f1"] == "F1 of the label positive"
    assert scores.values["f1"] == pytest.approx(0.8)


def test_nothing_to_score_is_an_error():
    for call in (
        lambda: metrics.accuracy([], []),
        lambda: metrics.pearson([1.0], [1.0, 2.0]),
        lambda: answers.answer_scores("squad", {}, {}),
    ):
        with pytest.raises(ValueError, match=r"expected as many|no questions"):
            call()
