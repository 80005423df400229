"""What some objects are and some dictionaries hold, to tell before each call whether all of it is still the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, repeat
from operator import is_
from typing import Any

from ..kernels.cpu.objects import Missing, find_same_objects, pack


class Snapshot:
    """Taken when it is made. A look compares a thousand things by identity, in a few microseconds where the C++
    operators are built, and otherwise in a few dozen: in lists made beforehand.

    Args:
        objects: whose class must stay.
        places: (dictionary, key): what lies there must stay the same object, or nothing must come to lie there.
        attributes: (class, name): what the class has under that name must stay the same object.
        tables: dictionaries that must keep their keys and values, in order.
    """

    def __init__(
        self,
        objects: Sequence[Any] = (),
        places: Iterable[tuple[Mapping, str]] = (),
        attributes: Iterable[tuple[type, str]] = (),
        tables: Iterable[dict] = (),
    ):
        self.objects, self.types = list(objects), list(map(type, objects))
        places = {(id(holder), key): (holder, key) for holder, key in places}.values()
        self.holders, self.keys = [holder for holder, _ in places], [key for _, key in places]
        self.values = self._values()
        pairs = list(dict.fromkeys(attributes))
        self.classes, self.names = [cls for cls, _ in pairs], [name for _, name in pairs]
        self.attributes = self._attributes()
        of_classes: dict[type, dict[str, Any]] = {}
        for (cls, name), value in zip(pairs, self.attributes, strict=True):
            of_classes.setdefault(cls, {})[name] = value
        tables = list(tables)
        self.empty, self.filled = [t for t in tables if not t], [t for t in tables if t]
        self.sizes, self.entries = list(map(len, self.filled)), self._entries()
        self.packed = pack(
            self.objects,
            list(zip(self.holders, self.keys, self.values, strict=True)),
            of_classes,
            self.empty,
            list(zip(self.filled, self.sizes, strict=True)),
            self.entries,
        )
        self.address, _ = self.packed.buffer_info()
        self.same_objects = find_same_objects()

    def _values(self) -> list[Any]:
        return list(map(dict.get, self.holders, self.keys, repeat(Missing)))

    def _attributes(self) -> list[Any]:
        return list(map(getattr, self.classes, self.names, repeat(Missing)))

    def _entries(self) -> list[Any]:
        """Key and value of each entry, one after another."""
        return list(chain.from_iterable(chain.from_iterable(map(dict.items, self.filled))))

    def is_same(self) -> bool:
        if self.same_objects is not None:
            return self.same_objects(self.address) == 1
        return self.is_same_in_python()

    def is_same_in_python(self) -> bool:
        return (
            all(map(is_, map(type, self.objects), self.types))
            and all(map(is_, self._values(), self.values))
            and not any(self.empty)
            and list(map(len, self.filled)) == self.sizes
            and all(map(is_, self._entries(), self.entries))
            and all(map(is_, self._attributes(), self.attributes))
        )
