"""A record of objects and of the contents of dictionaries, to check before each call whether anything has changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import chain, repeat
from operator import is_
from typing import Any

from ..kernels.cpu.objects import Missing, find_same_objects, pack


class Snapshot:
    """The state at construction. `is_same` compares about a thousand values by identity; this takes a few microseconds
    in C++, and a few dozen in Python, because the lists of what is compared are made at construction.

    Args:
        objects: objects whose class must not change.
        places: (dictionary, key): the value must stay the same object; a missing key must stay missing.
        attributes: (class, name): the class's attribute must stay the same object.
        tables: dictionaries that must keep their keys and values, in order. Other mappings are ignored: a scripted
            module's children are no dict, and calls of such a module run compiled code in any case.
    """

    def __init__(
        self,
        objects: Sequence[Any] = (),
        places: Iterable[tuple[Mapping, str]] = (),
        attributes: Iterable[tuple[type, str]] = (),
        tables: Iterable[Mapping] = (),
    ):
        self.objects, self.types = list(objects), list(map(type, objects))
        grouped: dict[int, dict[str, Mapping]] = {}  # places of the same dictionary are compared one after another
        for table, key in places:
            grouped.setdefault(id(table), {})[key] = table
        pairs = [(table, key) for of_one in grouped.values() for key, table in of_one.items()]
        self.holders, self.keys = [table for table, _ in pairs], [key for _, key in pairs]
        self.values = self._values()
        named: dict[type, dict[str, None]] = {}
        for cls, name in attributes:
            named.setdefault(cls, {})[name] = None
        self.classes = [cls for cls, names in named.items() for _ in names]
        self.names = list(chain.from_iterable(named.values()))
        self.attributes = self._attributes()
        tables = [table for table in tables if isinstance(table, dict)]
        self.empty, self.filled = [t for t in tables if not t], [t for t in tables if t]
        self.sizes, self.entries = list(map(len, self.filled)), self._entries()
        owners = chain.from_iterable(map(repeat, self.filled, self.sizes))
        self.packed = pack(
            self.objects,
            list(zip(self.holders, self.keys, self.values, strict=True)),
            list(zip(self.classes, self.names, self.attributes, strict=True)),
            list(zip(owners, self.entries[::2], self.entries[1::2], strict=True)),
            self.empty,
        )
        address, _ = self.packed.buffer_info()
        same = find_same_objects()
        self.is_same_in_cpp = None if same is None else partial(same, address)

    def _values(self) -> list[Any]:
        return list(map(dict.get, self.holders, self.keys, repeat(Missing)))

    def _attributes(self) -> list[Any]:
        return list(map(getattr, self.classes, self.names, repeat(Missing)))

    def _entries(self) -> list[Any]:
        """Key and value of each entry, one after another."""
        return list(chain.from_iterable(chain.from_iterable(map(dict.items, self.filled))))

    def is_same(self) -> bool:
        return self.is_same_in_python() if self.is_same_in_cpp is None else self.is_same_in_cpp() == 1

    def is_same_in_python(self) -> bool:
        return (
            all(map(is_, map(type, self.objects), self.types))
            and all(map(is_, self._values(), self.values))
            and not any(self.empty)
            and list(map(len, self.filled)) == self.sizes
            and all(map(is_, self._entries(), self.entries))
            and all(map(is_, self._attributes(), self.attributes))
        )
