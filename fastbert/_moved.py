"""Modules and names that moved: their old names still lead to them, with a DeprecationWarning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# old name -> new name, both within this package
_WITHIN = {
    "batching": "text.batching",
    "embed": "encoding.encoder",
    "graphs": "inference.graphs",
    "tokenizer": "text.tokenizer",
    "workers": "encoding.workers",
}
MOVED = {f"{__package__}.{old}": f"{__package__}.{new}" for old, new in _WITHIN.items()}

# module -> old name within it -> new name
RENAMED = {
    f"{__package__}.config": {"ACTIVATIONS": "HIDDEN_ACTS"},
    f"{__package__}.layers": {"ACTIVATIONS": "ACTIVATION_CLASSES"},
}


def renamed(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module that gives what `RENAMED` has of it."""

    def find(name: str) -> Any:
        new = RENAMED[module].get(name)
        if new is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(f"{module}.{name} is now {module}.{new}", DeprecationWarning, stacklevel=2)
        return getattr(sys.modules[module], new)

    return find


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        old, new = module.__name__, MOVED[module.__name__]
        warnings.warn(f"{old} is now {new}", DeprecationWarning, stacklevel=2)
        sys.modules[old] = import_module(new)


def install() -> None:
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
