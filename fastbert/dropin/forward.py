"""A `forward` of one module in place of its class's: how it is put there, copied, replicated and taken away.

Only `forward` changes, as an attribute of a module; classes, parameters and state_dict stay. A `forward` here keeps
nothing but references, so a model with it can be copied, pickled and compiled, and without it is what it was.
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

# A count is read and written in two steps, and calls come from several threads.
_COUNTING = threading.Lock()


class Forward:
    """A `forward` of one module, in place of its class's."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.warned: dict[str, int] = {}
        signature = inspect.signature(type(module).forward)
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.names = [p.name for p in signature.parameters.values() if p.kind in kinds][1:]

    @property
    def __signature__(self) -> inspect.Signature:
        """The original's: Trainer and others read from it what a model takes."""
        return inspect.signature(type(self.module).forward.__get__(self.module))

    @property
    def __code__(self) -> CodeType:
        """The original's: torch.export names the place in the source by it."""
        return type(self.module).forward.__code__

    @property
    def __globals__(self) -> dict[str, Any]:
        raise AttributeError(
            "torch.jit.script compiles the source of a forward, and an accelerated one has none: call "
            "fastbert.restore(model) before it"
        )

    def put(self) -> None:
        """In place of the class's `forward`, until `remove`."""
        self.module.forward = self
        self.module._replicate_for_data_parallel = self.replicate

    def remove(self) -> None:
        del self.module.forward
        del self.module._replicate_for_data_parallel

    def replicate(self) -> nn.Module:
        """nn.DataParallel's replica of the module: the class's own, and a `forward` that looks at the replica.

        torch copies `__dict__`, so without this a replica would run the modules of the first device.
        """
        replica = type(self.module)._replicate_for_data_parallel(self.module)
        self.over(replica).put()
        return replica

    def over(self, replica: nn.Module) -> Forward:
        """This `forward` for another module; what it has warned of is shared."""
        forward = copy.copy(self)
        forward.module = replica
        return forward

    def original(self, *args, **kwargs):
        return type(self.module).forward(self.module, *args, **kwargs)

    def named(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    def warn(self, reason: str) -> None:
        """Counts a call that the original's code has, and says so the first time."""
        if torch.compiler.is_compiling():
            return
        if count(self.warned, reason) == 1:
            warnings.warn(
                f"{type(self.module).__name__}: {reason}, so fastbert leaves this call to the model's own code",
                stacklevel=4,
            )

    def __call__(self, *args, **kwargs):
        raise TypeError(f"{type(self).__name__} has no forward")


def count(counts: dict[str, int], what: str) -> int:
    """One more of `what`; returns how many there are now."""
    with _COUNTING:
        counts[what] = counts.get(what, 0) + 1
        return counts[what]
