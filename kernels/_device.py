"""The capabilities of this machine, determined once."""

import functools
import importlib.util
import os
from dataclasses import dataclass

# Looked up without an import, because importing Triton takes a quarter of a second.
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Whether Triton interprets kernels in this process. Triton itself reads the variable once, at import.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@dataclass(frozen=True)
class Card:
    """A GPU that is not present, for which Triton's launches are handled by software (`stand_in`)."""

    arch: str
    capability: tuple[int, int]
    multiprocessors: int


INTERPRETER = Card("sm_90", (9, 0), 4)  # to run Hopper's configs; few multiprocessors, so persistent grids loop
_stand_in: Card | None = None


def stand_in(card: Card | None) -> Card | None:
    """Makes Triton kernels run on CPU tensors from now on, with this card's properties; None ends that. Returns the
    previous card.

    For code that replaces Triton's driver, of which there is also one per process.
    """
    global _stand_in
    before, _stand_in = _stand_in, card
    for answer in (capability, multiprocessors, arch):
        answer.cache_clear()
    return before


def triton_on_cpu() -> bool:
    """Whether Triton runs kernels on CPU tensors, by its interpreter or with a `stand_in`."""
    return INTERPRETING or _stand_in is not None


def _card() -> Card | None:
    return INTERPRETER if INTERPRETING else _stand_in


@functools.cache
def capability(index: int | None = None) -> tuple[int, int]:
    """Compute capability (major, minor) of a CUDA device; (9, 0) under the interpreter, to run the same configs."""
    if (card := _card()) is not None:
        return card.capability
    import torch

    return torch.cuda.get_device_capability(index)


@functools.cache
def multiprocessors(index: int | None = None) -> int:
    """Number of multiprocessors of a CUDA device; a small number where there is none, so persistent grids loop."""
    if (card := _card()) is not None:
        return card.multiprocessors
    import torch

    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.cache
def arch(index: int | None = None) -> str:
    """Name of a device's architecture as compilers call it: "sm_90", "gfx942"; "sm_90" under the interpreter."""
    if (card := _card()) is not None:
        return card.arch
    import torch

    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = capability(index)
    return f"sm_{major}{minor}"
