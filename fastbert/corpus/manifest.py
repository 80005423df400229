"""Which parts of a corpus count, and how they were made.

    DIR/data/NAME.parquet              a part
    DIR/manifest/corpus.json           the model, settings and versions of all parts: `Job.description`
    DIR/manifest/parts/NAME.json       the receipt of a part: its unit, its number of rows, hashes

A part counts if its receipt exists. The receipt is written after the part. Every receipt is a separate file, because
several processes and machines write them, and files in an object store cannot be appended to.
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
    """A folder does not fit the job. The message is one line."""


class Manifest:
    """The manifest of the corpus in a folder."""

    def __init__(self, out: str):
        self.place = Place(out)

    def description(self) -> dict[str, Any] | None:
        """The description in corpus.json; None if there is none."""
        return self._read(DESCRIPTION)

    def begin(self, description: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the description if the folder has none. Returns the one in the folder.

        Raises: ManifestError if the folder has another description; see `job.differences`.
        """
        with self.place.alone("corpus"):
            before = self.description()
            if before is None:
                self.place.write(DESCRIPTION, _spelled(description))
                return dict(description)
        # through JSON, where tuples become lists
        if found := differences(before, json.loads(_spelled(description))):
            raise ManifestError(
                f"{self.place.url} was written with another model, settings or versions: {'; '.join(found)}. Use "
                "those, or write into another folder"
            )
        return before

    def receipt(self, unit: Unit) -> dict[str, Any] | None:
        return self._read(f"{RECEIPTS}/{unit.name}.json")

    def add(self, unit: Unit, receipt: Mapping[str, Any]) -> None:
        self.place.write(f"{RECEIPTS}/{unit.name}.json", _spelled(receipt))

    def receipts(self) -> dict[str, dict[str, Any]]:
        """The receipts of all parts that count, by name, in the order of the names."""
        found = {}
        for name in self.place.names(RECEIPTS):
            receipt = self._read(f"{RECEIPTS}/{name}")
            if receipt is not None and name.endswith(".json"):
                found[name.removesuffix(".json")] = receipt
        return found

    def missing(self, units: Sequence[Unit]) -> list[Unit]:
        """The units without a receipt.

        Raises: ManifestError if there is a receipt for a file that has changed, or for something not among the units.
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
