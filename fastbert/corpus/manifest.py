"""Which parts count: a receipt for each, and what all of them were made by.

    DIR/data/NAME.parquet              a part
    DIR/manifest/corpus.json           what all parts are a function of, besides the input
    DIR/manifest/parts/NAME.json       the receipt of a part: where its rows come from, how many, hashes

A part counts once its receipt is there, which is written after it. Each receipt is a file of its own, since several
processes and machines write them, and an object store has no file that one could add a line to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .job import differences
from .places import Place
from .units import Unit

DESCRIPTION, RECEIPTS, DATA = "manifest/corpus.json", "manifest/parts", "data"


class ManifestError(ValueError):
    """A folder that this job cannot go on with, in one line."""


class Manifest:
    """Of the corpus in a folder."""

    def __init__(self, out: str):
        self.place = Place(out)

    def description(self) -> dict[str, Any] | None:
        """What the parts were made by; None where nothing was begun."""
        return self._read(DESCRIPTION)

    def begin(self, description: Mapping[str, Any]) -> dict[str, Any]:
        """Begins a corpus, or goes on with one: gives the description that it began with.

        Raises: ManifestError where that differs in more than where the model lies.
        """
        with self.place.alone("corpus"):
            before = self.description()
            if before is None:
                self.place.write(DESCRIPTION, _spelled(description))
                return dict(description)
        # as JSON has it: tuples are lists there
        if found := differences(before, json.loads(_spelled(description))):
            raise ManifestError(
                f"{self.place.url} was written by another model, settings or versions: {'; '.join(found)}. Go on with "
                "those, or write into another folder"
            )
        return before

    def receipt(self, unit: Unit) -> dict[str, Any] | None:
        return self._read(f"{RECEIPTS}/{unit.name}.json")

    def add(self, unit: Unit, receipt: Mapping[str, Any]) -> None:
        self.place.write(f"{RECEIPTS}/{unit.name}.json", _spelled(receipt))

    def receipts(self) -> dict[str, dict[str, Any]]:
        """Of all parts that count, by their names, in their order."""
        found = {}
        for name in self.place.names(RECEIPTS):
            receipt = self._read(f"{RECEIPTS}/{name}")
            if receipt is not None and name.endswith(".json"):
                found[name.removesuffix(".json")] = receipt
        return found

    def missing(self, units: Sequence[Unit]) -> list[Unit]:
        """The units without a receipt.

        Raises: ManifestError where the folder has a part of a file that changed since, or is not among the units.
        """
        receipts, known = self.receipts(), {unit.name: unit for unit in units}
        for name, receipt in receipts.items():
            place = receipt["source"]
            if name not in known:
                raise ManifestError(
                    f"{self.place.url} has a part of {place} that the inputs do not make: name all inputs again, or "
                    "write into another folder"
                )
            before, now = (receipt["first"], receipt["last"], receipt["size"]), known[name]
            if before != (now.first, now.last, now.size):
                raise ManifestError(f"{place} has changed since {self.place.url} was begun: write into another folder")
        return [unit for unit in units if unit.name not in receipts]

    def _read(self, name: str) -> dict[str, Any] | None:
        content = self.place.read(name)
        if content is None:
            return None
        try:
            return json.loads(content)
        except ValueError as error:
            raise ManifestError(f"{self.place.path(name)} is not valid JSON: {error}") from None


def part_path(name: str) -> str:
    return f"{DATA}/{name}.parquet"


def _spelled(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
