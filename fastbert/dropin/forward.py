"""A `forward` of one module in place of its class's: how it is set, copied, replicated and removed.

Accelerating a module only sets the attribute `forward`; classes, parameters and state_dict stay. The objects here hold
references only, so an accelerated model can be copied, pickled and compiled, and restoring it leaves nothing behind.
"""

from __future__ import annotations

import copy
import inspect
import threading
import warnings
from types import CodeType
from typing import Any

import torch
import torch.nn as nn

from .padding import ZEROS

_COUNTING = threading.Lock()  # `count` reads and writes in two steps, and calls come from several threads


class Forward:
    """A `forward` of one module, in place of its class's.

    Attributes:
        warned: reason why calls ran the original's code -> number of these calls.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.warned: dict[str, int] = {}
        signature = inspect.signature(type(module).forward)
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.names = [p.name for p in signature.parameters.values() if p.kind in kinds][1:]

    @property
    def __signature__(self) -> inspect.Signature:
        """The original's. Libraries such as Trainer read from it which arguments a model takes."""
        return inspect.signature(type(self.module).forward.__get__(self.module))

    @property
    def __code__(self) -> CodeType:
        """The original's. torch.export reads from it the place in the source."""
        return type(self.module).forward.__code__

    @property
    def __globals__(self) -> dict[str, Any]:
        raise AttributeError(
            "torch.jit.script compiles the source of a forward, and an accelerated one has none: call "
            "fastbert.restore(model) before it"
        )

    def put(self) -> None:
        """Replaces the class's `forward` until `remove`."""
        self.module.forward = self
        self.module._replicate_for_data_parallel = self.replicate

    def remove(self) -> None:
        del self.module.forward
        del self.module._replicate_for_data_parallel

    def replicate(self) -> nn.Module:
        """nn.DataParallel's replica of the module, with a `forward` for the replica.

        torch copies `__dict__`, so otherwise the replica would run the modules of the first device.
        """
        replica = type(self.module)._replicate_for_data_parallel(self.module)
        self.for_replica(replica).put()
        return replica

    def for_replica(self, replica: nn.Module) -> Forward:
        """This `forward` for a replica of its module. Both share the counts of warnings."""
        forward = copy.copy(self)
        forward.module = replica
        return forward

    def original(self, *args, **kwargs):
        return type(self.module).forward(self.module, *args, **kwargs)

    def named(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    def warn(self, reason: str) -> None:
        """Counts a call that the original's code runs, and warns at the first one."""
        if torch.compiler.is_compiling():
            return
        if count(self.warned, reason) == 1:
            warnings.warn(
                f"{type(self.module).__name__}: {reason}, so fastbert leaves this call to the model's own code",
                stacklevel=4,
            )

    def __call__(self, *args, **kwargs):
        raise TypeError(f"{type(self).__name__} has no forward")


class InspectedForward(Forward):
    """A `forward` that inspects its module at the first call, and again whenever the module has changed.

    Attributes:
        seen: the result of the last inspection, with the attribute `watch`; None before the first one.
    """

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.seen: Any = None
        self.zeros_returned: dict[str, int] = {}

    def for_replica(self, replica: nn.Module) -> InspectedForward:
        forward = super().for_replica(replica)
        forward.seen = None
        return forward

    def __getstate__(self) -> dict[str, Any]:
        """A pickled or deep-copied one inspects its own module."""
        return self.__dict__ | {"seen": None}

    def look(self) -> Any:
        """The result of an inspection of the module as it is now."""
        seen = self.seen  # another thread may replace it meanwhile
        if seen is None or not seen.watch.is_same():
            seen = self.seen = self.inspect()
        return seen

    def inspect(self) -> Any:
        raise NotImplementedError

    def warn_of_zeros(self) -> None:
        """Warns once that padding gets zeros where the original returns other values."""
        if count(self.zeros_returned, ZEROS) == 1:
            warnings.warn(f"{type(self.module).__name__}: {ZEROS}", stacklevel=6)


def count(counts: dict[str, int], what: str) -> int:
    """Adds one to the count of `what`, and returns it."""
    with _COUNTING:
        counts[what] = counts.get(what, 0) + 1
        return counts[what]
