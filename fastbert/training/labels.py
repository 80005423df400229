"""Labels: their names are matched without regard to case, and their numbers follow from the names."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .entities import split_tag
from .files import DataError, Sentence


class Text(NamedTuple):
    """A text or a pair of texts. label: the name of its class, the names of several classes, a number, or None."""

    place: str
    text: str
    pair: str | None
    label: str | tuple[str, ...] | float | None


def class_name(value: Any, place: str) -> str:
    """The name of a class in a cell: a text, or in a .jsonl also a number or a truth value."""
    if isinstance(value, str) and value:
        return value
    if isinstance(value, (int, bool)):
        return json.dumps(value)
    raise DataError(f"{place}: a label must be a name, got {value!r}")


LABEL_SEPARATOR = "|"


def class_names(value: Any, place: str) -> tuple[str, ...]:
    """The names of any number of classes in a cell: a list in a .jsonl, or a text with | between the names."""
    if isinstance(value, list):
        return tuple(class_name(item, place) for item in value)
    if not isinstance(value, str):
        raise DataError(f"{place}: labels must be a list of names, got {value!r}")
    names = [name.strip() for name in value.split(LABEL_SEPARATOR)] if value.strip() else []
    return tuple(class_name(name, place) for name in names)


def one_label_each(examples: Sequence[Text]) -> list[Text]:
    """Each example once for each of its labels."""
    return [example._replace(label=name) for example in examples for name in example.label]


def number(value: Any, place: str, what: str = " for a label") -> float:
    """The number in a cell."""
    try:
        found = float(value) if isinstance(value, (str, int, float)) else math.nan
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise DataError(f"{place}: expected a number{what}, got {value!r}")
    return found


def classes_of(examples: Sequence[Text], given: Sequence[str] | None, model_labels: Sequence[str] | None) -> list[str]:
    """The names of the classes in the order of their numbers: those given by the user, else those of the model's own
    classifier, else those of the examples, sorted (numbers by value).

    Raises: DataError if an example has another name, if there is a single name, or if there are so many names that they
        seem to be texts.
    """
    found: dict[str, Text] = {}
    for example in examples:
        found.setdefault(example.label.casefold(), example)
    if len(found) < 2:
        raise DataError(f"the only label is {examples[0].label!r}; a classifier needs two or more")
    if len(found) > max(20, len(examples) // 2):
        raise DataError(
            f"{len(found):,} different labels in {len(examples):,} examples: are the columns swapped? "
            "(--columns names them, --labels number is for numbers)"
        )
    if given or model_labels:
        names = list(given or model_labels)
        numbers = numbers_of(names)
        for name, example in found.items():
            if name not in numbers:
                whose = "of --labels" if given else "of the model's; --labels starts a new classifier"
                raise DataError(f"{example.place}: the label {example.label!r} is none of {', '.join(names)} ({whose})")
        return names
    names = [example.label for example in found.values()]
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names, key=str.casefold)


def tags_of(sentences: Sequence[Sentence], model_labels: Sequence[str] | None) -> list[str]:
    """O, and the tags of every type in the sentences, always with both B- and I-; or the model's own labels.

    Raises: DataError if no sentence has an entity, or if the model's own labels lack a tag.
    """
    found: dict[str, str] = {}
    for sentence in sentences:
        for tag in sentence.tags:
            found.setdefault(tag, sentence.place)
    kinds = sorted({split_tag(tag)[1] for tag in found} - {""})
    if not kinds:
        raise DataError("no sentence has an entity: every tag is O")
    if model_labels:
        numbers = numbers_of(model_labels)
        for tag, place in found.items():
            if tag.casefold() not in numbers:
                raise DataError(f"{place}: the tag {tag!r} is none of the model's: {', '.join(model_labels)}")
        return list(model_labels)
    prefixes = ["B", "I", *sorted({split_tag(tag)[0] for tag in found} & {"E", "S"})]
    return ["O", *(f"{prefix}-{kind}" for kind in kinds for prefix in prefixes)]


def class_weights(given: str, labels: Sequence[str], counts: Mapping[int, int]) -> list[float]:
    """The weight of each label in the loss.

    given: "balanced": items / (labels that occur * items of the label), and 1 for labels that do not occur; or
        NAME=W,...: W for the named labels, and 1 for the others.
    counts: number of a label -> how often it occurs.

    Raises: DataError if a name is not a label or occurs twice, or if a weight is not a positive number.
    """
    if given == "balanced":
        total, occur = sum(counts.values()), len(counts)
        return [total / (occur * counts[i]) if i in counts else 1.0 for i in range(len(labels))]
    weights, numbers = {}, numbers_of(labels)
    for part in given.split(","):
        name, sign, text = part.rpartition("=")
        name = name.strip().casefold()
        if not sign:
            raise DataError(f"--class-weights is none, balanced, or NAME=WEIGHT,..., got {part!r}")
        if name not in numbers or numbers[name] in weights:
            why = "comes twice" if name in numbers else f"is none of {', '.join(labels)}"
            raise DataError(f"--class-weights: {name!r} {why}")
        weight = number(text, f"--class-weights: {name!r}", "")
        if weight <= 0.0:
            raise DataError(f"--class-weights: the weight of {name!r} must be above 0, got {text}")
        weights[numbers[name]] = weight
    return [weights.get(i, 1.0) for i in range(len(labels))]


def numbers_of(labels: Sequence[str]) -> dict[str, int]:
    """case-folded name -> number. Raises: DataError if two labels have the same name."""
    numbers = {label.casefold(): i for i, label in enumerate(labels)}
    if len(numbers) != len(labels):
        raise DataError(f"two labels have the same name: {', '.join(labels)}")
    return numbers


def expect_known(labels: Iterable[tuple[str, str]], names: Sequence[str]) -> None:
    """Raises DataError if a label is not among `names`. labels: (label, place) of the examples to be scored."""
    numbers = numbers_of(names)
    for label, place in labels:
        if label.casefold() not in numbers:
            raise DataError(f"{place}: the label {label!r} was never seen in training: {', '.join(names)}")
