"""Are Python's objects still the ones that they were? By the C++ of objects.cpp, which compares their addresses.

    memory = pack(...)  # addresses alone: whoever keeps them keeps the objects alive
    find_same_objects()(memory.buffer_info()[0])  # 1 where all is as it was when it was packed

Of a model that was called before, whose weights have driven its modules out of the caches, this looks at a thousand
things in the time in which Python looks at a hundred.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import operators


class Missing:
    """Stands for what a dictionary or a class does not have."""


def pack(
    objects: Sequence[Any],
    places: Sequence[tuple[dict, str, Any]],
    attributes: Mapping[type, Mapping[str, Any]],
    empty: Sequence[dict],
    tables: Sequence[tuple[dict, int]],
    entries: Sequence[Any],
) -> array:
    """The addresses of all that is to stay the same, as `same_objects` of objects.cpp reads them.

    Args:
        objects: whose class stays.
        places: (dictionary, key, value), `Missing` where nothing lies under the key.
        attributes: class -> name -> value, `Missing` likewise.
        empty: dictionaries that stay empty.
        tables: (dictionary, how many entries it has), of those whose entries all stay, in order.
        entries: of all `tables`, one after another: key, value, key, value.
    """
    named = [pair for of_class in attributes.values() for pair in of_class.items()]
    memory = array("q", map(len, (objects, places, attributes, named, empty, tables)))

    def add(*parts: Any) -> None:
        memory.extend(0 if part is Missing else id(part) for part in parts)

    for thing in objects:
        add(thing, type(thing))
    for place in places:
        add(*place)
    for cls, of_class in attributes.items():
        memory.extend((id(cls), 0, len(of_class)))
    for pair in named:
        add(*pair)
    add(*empty)
    for table, size in tables:
        memory.extend((id(table), size))
    add(*entries)
    return memory


@functools.cache
def find_same_objects() -> Callable[[int], int] | None:
    """The function of the library that compares what lies at an address that `pack` has filled: 1 where all is the
    same. None where there is no library, or it was built without Python's headers."""
    opened, _ = operators.load()
    # a PYFUNCTYPE keeps Python's lock while it runs, which the functions of a CDLL give back
    prototype = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
    try:
        return None if opened is None else prototype(("same_objects", opened))
    except AttributeError:
        return None
