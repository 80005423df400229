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
from collections.abc import Callable, Sequence
from itertools import chain, groupby
from typing import Any

from . import operators


class Missing:
    """Stands for what a dictionary or a class does not have."""


Kept = tuple[Any, Any, Any]  # a dictionary, a key and its value; or a class, a name and its attribute


def pack(
    objects: Sequence[Any],
    places: Sequence[Kept],
    attributes: Sequence[Kept],
    entries: Sequence[Kept],
    empty: Sequence[dict],
) -> array:
    """The addresses of all that is to stay the same, as `same_objects` of objects.cpp reads them.

    Args:
        objects: whose class stays.
        places: what dictionaries have, `Missing` where nothing lies under the key; of one dictionary side by side.
        attributes: what classes have, likewise.
        entries: of dictionaries whose entries all stay, in order, and to which none comes; side by side.
        empty: dictionaries that stay empty.
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
    """The function of the library that compares what lies at an address that `pack` has filled: 1 where all is the
    same. None where there is no library, or it was built without Python's headers."""
    opened, _ = operators.load()
    # a PYFUNCTYPE keeps Python's lock while it runs, which the functions of a CDLL give back
    prototype = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
    try:
        return None if opened is None else prototype(("same_objects", opened))
    except AttributeError:
        return None
