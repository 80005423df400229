"""Scores of answers to questions: exact match and F1 as SQuAD, CMRC 2018 and DRCD define them.

A prediction is a text, "" for no answer; gold answers are one or several texts, none where a question has no answer.
A question's score is the best over its gold answers, exact match and F1 each for itself.

squad      SQuAD 1.1: lower case, without ASCII punctuation and the words a, an, the. F1 over words, each counted as
           often as both texts have it. If nothing is left of both texts: exact match 1, F1 0, as in its script.
squad_v2   SQuAD 2.0: the same, but if nothing is left of one text, F1 is 1 if both are empty, else 0. Gold answers of
           which nothing is left count as no answer.
cmrc       CMRC 2018: lower case, without the marks below. F1 by the longest run of neighbouring units in both texts.
           A unit is a character from U+4E00 to U+9FA5, or between these an English word (`treebank`). Exact match
           keeps inner white space.
drcd       DRCD: lower case, without punctuation (Unicode's category P) and white space. F1 over characters, each
           counted as often as both texts have it.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from . import treebank
from .metrics import Scores

# The characters that CMRC's script removes. Its list also has an ellipsis of two characters, which it never removes,
# because it compares single characters.
CMRC_MARKS = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")  # noqa: RUF001
_ASCII_MARKS = str.maketrans("", "", string.punctuation)


def squad_words(text: str) -> list[str]:
    """The words of a text that SQuAD compares."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_ASCII_MARKS)).split()


def cmrc_text(text: str) -> str:
    """The text that CMRC's exact match compares."""
    return "".join(c for c in text.lower().strip() if c not in CMRC_MARKS)


def cmrc_units(text: str) -> list[str]:
    """The units that CMRC's F1 compares."""
    units = []
    for run in re.findall("[\u4e00-\u9fa5]|[^\u4e00-\u9fa5]+", cmrc_text(text)):
        units += [run] if "\u4e00" <= run <= "\u9fa5" else treebank.words(run)
    return units


def drcd_characters(text: str) -> list[str]:
    """The characters that DRCD compares."""
    return [c for c in text.lower() if not c.isspace() and not unicodedata.category(c).startswith("P")]


def longest_run(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest run of neighbours that is in both sequences."""
    longest, row = 0, [0] * (len(b) + 1)
    for x in a:
        row = [0, *(before + 1 if x == y else 0 for before, y in zip(row, b, strict=False))]
        longest = max(longest, *row)
    return longest


def in_common(a: Sequence[str], b: Sequence[str]) -> int:
    """How many units both sequences have, each counted as often as both have it."""
    return (Counter(a) & Counter(b)).total()


def _f1(a: Sequence[str], b: Sequence[str], common: Callable[[Sequence[str], Sequence[str]], int]) -> float:
    n = common(a, b)
    return 2.0 * n / (len(a) + len(b)) if n else 0.0


# Each of these returns (exact match, F1) of a prediction for one gold answer.


def squad(gold: str, predicted: str) -> tuple[float, float]:
    a, b = squad_words(gold), squad_words(predicted)
    return float(a == b), _f1(a, b, in_common)


def squad_v2(gold: str, predicted: str) -> tuple[float, float]:
    a, b = squad_words(gold), squad_words(predicted)
    return float(a == b), _f1(a, b, in_common) if a and b else float(a == b)


def cmrc(gold: str, predicted: str) -> tuple[float, float]:
    return float(cmrc_text(gold) == cmrc_text(predicted)), _f1(cmrc_units(gold), cmrc_units(predicted), longest_run)


def drcd(gold: str, predicted: str) -> tuple[float, float]:
    a, b = drcd_characters(gold), drcd_characters(predicted)
    return float(a == b), _f1(a, b, in_common)


ANSWER_METRICS = {"squad": squad, "squad_v2": squad_v2, "cmrc": cmrc, "drcd": drcd}
_WORDS = {
    "squad": "SQuAD 1.1 (words, without case, ASCII punctuation and articles)",
    "squad_v2": "SQuAD 2.0 (words, without case, ASCII punctuation and articles; no answer counts as an answer)",
    "cmrc": "CMRC 2018 (longest common run of Chinese characters and English words)",
    "drcd": "DRCD (characters, without case, punctuation and white space)",
}


def score(metric: str, gold: Sequence[str], predicted: str) -> tuple[float, float]:
    """(exact match, F1) of a question, each the best over its gold answers."""
    if metric == "squad_v2":
        gold = [answer for answer in gold if squad_words(answer)]
    each = [ANSWER_METRICS[metric](answer, predicted) for answer in gold or [""]]
    return max(exact for exact, _ in each), max(f1 for _, f1 in each)


def answer_scores(metric: str, gold: Mapping[str, Sequence[str]], predicted: Mapping[str, str]) -> Scores:
    """F1 and exact match over questions, by their ids. A question without a prediction counts 0.

    squad_v2 also gives the F1 of the questions with an answer, and of those without one, if there are any.
    """
    if metric not in ANSWER_METRICS:
        raise ValueError(f"metric must be one of {', '.join(ANSWER_METRICS)}, got {metric!r}")
    if not gold:
        raise ValueError("there are no questions to score")
    each = {
        key: score(metric, texts, predicted[key]) if key in predicted else (0.0, 0.0) for key, texts in gold.items()
    }
    values = {"f1": _mean([f1 for _, f1 in each.values()]), "exact_match": _mean([exact for exact, _ in each.values()])}
    definitions = {
        "f1": f"mean over questions of the best F1 over gold answers, {_WORDS[metric]}",
        "exact_match": f"share of questions whose prediction equals a gold answer, {_WORDS[metric]}",
    }
    if metric == "squad_v2":
        for name, has in (("has_answer_f1", True), ("no_answer_f1", False)):
            some = [each[key][1] for key, texts in gold.items() if any(map(squad_words, texts)) == has]
            if some:
                values[name] = _mean(some)
                definitions[name] = (
                    f"the same F1 over the {len(some):,} questions {'with' if has else 'without'} an answer"
                )
    return Scores(values, definitions)


def best_threshold(
    null_differences: Mapping[str, float], scores: Mapping[str, float], null_scores: Mapping[str, float]
) -> tuple[float, float]:
    """(threshold, mean score) of the best threshold, above which a question's null difference means no answer.

    Args:
        null_differences: for each question, the score of no answer less that of its best answer.
        scores, null_scores: the metric of each question for its best answer, and for no answer.
    """
    order = sorted(null_differences, key=null_differences.__getitem__)
    total = sum(null_scores[key] for key in order)  # with a threshold below all differences no question has an answer
    # Of equally good thresholds the highest is taken, which gives the most answers.
    best, threshold = total, null_differences[order[0]] - 1.0
    for place, key in enumerate(order):
        total += scores[key] - null_scores[key]
        last_of_its_value = place + 1 == len(order) or null_differences[order[place + 1]] > null_differences[key]
        if last_of_its_value and total >= best:
            best, threshold = total, null_differences[key]
    return threshold, best / len(order)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
