"""Checks that Python objects and their attributes are unchanged. The C++ of objects.cpp compares their addresses.

    memory = pack(...)  # holds addresses only: the caller has to keep the objects alive
    find_same_objects()(memory.buffer_info()[0])  # 1 where nothing has changed since `pack`

In a model whose modules are no longer in the CPU's caches, this makes a thousand comparisons in the time in which
Python makes a hundred.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Callable, Sequence
from itertools import chain, groupby
from typing import Any

from . import operators


class Missing:
    """The value in `Kept` for a key or an attribute that does not exist."""


Kept = tuple[Any, Any, Any]  # a dictionary, a key and its value; or a class, a name and its attribute


def pack(
    objects: Sequence[Any],
    places: Sequence[Kept],
    attributes: Sequence[Kept],
    entries: Sequence[Kept],
    empty: Sequence[dict],
) -> array:
    """The addresses that `same_objects` of objects.cpp compares, in the order in which it reads them.

    Args:
        objects: objects whose class must not change.
        places: entries of dictionaries that must not change, `Missing` for an absent key. Entries of one dictionary
            follow each other.
        attributes: attributes of classes that must not change, in the same form.
        entries: all entries of dictionaries that must keep exactly these entries in this order. Entries of one
            dictionary follow each other.
        empty: dictionaries that must stay empty.
    """
    parts = [
        [list(kept) for _, kept in groupby(part, lambda one: id(one[0]))] for part in (places, attributes, entries)
    ]
    memory = array("q", map(len, (objects, *parts, empty)))
    for thing in objects:
        memory.extend((id(thing), id(type(thing))))
    for kept in chain.from_iterable(parts):
        memory.extend((id(kept[0][0]), 0, len(kept)))
    memory.extend(map(id, empty))
    for _, *pair in chain(places, attributes, entries):
        memory.extend(0 if part is Missing else id(part) for part in pair)
    return memory


@functools.cache
def find_same_objects() -> Callable[[int], int] | None:
    """The C++ function that takes the address of memory filled by `pack`, and returns 1 where nothing has changed. None
    where there is no library, or the library was built without Python's headers."""
    opened, _ = operators.load()
    # A PYFUNCTYPE function holds the GIL while it runs; the functions of a CDLL release it.
    prototype = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
    try:
        return None if opened is None else prototype(("same_objects", opened))
    except AttributeError:
        return None
