"""Entities from tags, and their scores in three definitions: conlleval's, strict IOB2, and WNUT-17's surface forms.

lenient   conlleval's definition (Tjong Kim Sang and Buchholz, CoNLL-2000), and seqeval's default: an I- opens an entity
          if none of its type is open.
strict    The definition of IOB2, seqeval's `mode="strict", scheme=IOB2`: an entity is a B- and the I- of its type that
          follow; any other I- belongs to no entity.
surface   WNUT-17's definition: an entity is right or wrong at its place, by the lenient definition. Each pair of (form,
          type) is then counted once among the right ones, once among the predicted ones and once among the gold ones.
          Forms that differ in case are different.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from .metrics import Counts, Scores

TOKEN_METRICS = ("entity_f1", "strict_f1", "surface_f1")


class Entity(NamedTuple):
    """The words [start, end) of a sentence."""

    type: str
    start: int
    end: int


def split_tag(tag: str) -> tuple[str, str]:
    """("B", "creative-work") of "B-creative-work"; ("O", "") of "O"."""
    prefix, _, kind = tag.partition("-")
    return prefix, kind


def lenient(tags: Sequence[str]) -> list[Entity]:
    """Entities by conlleval's definition, from IOB1, IOB2 or IOBES tags."""
    entities, start = [], None
    parts = [("O", ""), *map(split_tag, tags), ("O", "")]
    for place, ((before, type_before), (prefix, kind)) in enumerate(pairwise(parts)):
        # `place` is the number of the second word, whose tag is `prefix-kind`
        if start is not None and _ends(before, type_before, prefix, kind):
            entities.append(Entity(type_before, start, place))
            start = None
        if _starts(before, type_before, prefix, kind):
            start = place
    return entities


def _ends(before: str, type_before: str, prefix: str, kind: str) -> bool:
    """Whether an entity ends between two neighbouring tags."""
    return before in ("E", "S") or prefix in ("B", "S", "O") or kind != type_before


def _starts(before: str, type_before: str, prefix: str, kind: str) -> bool:
    """Whether an entity starts with the second of two neighbouring tags."""
    return prefix != "O" and (prefix in ("B", "S") or before in ("E", "S", "O") or kind != type_before)


def strict(tags: Sequence[str]) -> list[Entity]:
    """Entities by the definition of IOB2."""
    entities, start, type_ = [], None, ""
    for place, tag in enumerate((*tags, "O")):
        prefix, kind = split_tag(tag)
        if start is not None and not (prefix == "I" and kind == type_):
            entities.append(Entity(type_, start, place))
            start = None
        if prefix == "B":
            start, type_ = place, kind
    return entities


def count_entities(gold: Sequence[Iterable[Entity]], predicted: Sequence[Iterable[Entity]]) -> dict[str, Counts]:
    """Counts of each type over sentences. An entity is right if its type, start and end are."""
    totals: dict[str, Counts] = {}
    for of_gold, of_predicted in zip(gold, predicted, strict=True):
        wanted, found = set(of_gold), set(of_predicted)
        for entity in wanted | found:
            more = Counts(int(entity in wanted and entity in found), int(entity in found), int(entity in wanted))
            totals[entity.type] = totals.get(entity.type, Counts(0, 0, 0)) + more
    return totals


def micro(counts: dict[str, Counts]) -> Counts:
    """The counts of all types together."""
    return sum(counts.values(), Counts(0, 0, 0))


def count_surfaces(
    words: Sequence[Sequence[str]], gold: Sequence[Iterable[Entity]], predicted: Sequence[Iterable[Entity]]
) -> Counts:
    """WNUT-17's counts of (form, type)."""
    right, found, wanted = set(), set(), set()
    for sentence, of_gold, of_predicted in zip(words, gold, predicted, strict=True):
        for entities, forms in ((set(of_gold) & set(of_predicted), right), (of_predicted, found), (of_gold, wanted)):
            forms.update((" ".join(sentence[e.start : e.end]), e.type) for e in entities)
    return Counts(len(right), len(found), len(wanted))


def token_scores(
    words: Sequence[Sequence[str]], gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> Scores:
    """All metrics of tagged sentences; gold and predicted have a tag for each word."""
    for number, (sentence, a, b) in enumerate(zip(words, gold, predicted, strict=True)):
        if len(sentence) != len(a) or len(a) != len(b):
            raise ValueError(f"sentence {number} has {len(sentence)} words, {len(a)} gold and {len(b)} predicted tags")
    gold_lenient, found_lenient = [lenient(tags) for tags in gold], [lenient(tags) for tags in predicted]
    entity = micro(count_entities(gold_lenient, found_lenient))
    exact = micro(count_entities([strict(tags) for tags in gold], [strict(tags) for tags in predicted]))
    surface = count_surfaces(words, gold_lenient, found_lenient)
    n_words = sum(map(len, words))
    right = sum(a == b for pair in zip(gold, predicted, strict=True) for a, b in zip(*pair, strict=True))
    values, definitions = {}, {}
    for name, counts, what in (
        ("entity", entity, "of entities, micro, read as conlleval does (an I- opens an entity where none is open)"),
        ("strict", exact, "of entities, micro, read by strict IOB2 (an I- without its B- is of no entity)"),
        ("surface", surface, "of WNUT-17's surface forms: right at its place, then each (form, type) once"),
    ):
        for measure in ("f1", "precision", "recall"):
            values[f"{name}_{measure}"] = getattr(counts, measure)
            definitions[f"{name}_{measure}"] = f"{measure} {what}"
    values["word_accuracy"] = right / n_words if n_words else 0.0
    definitions["word_accuracy"] = "share of words whose tag is right"
    return Scores(values, definitions)
