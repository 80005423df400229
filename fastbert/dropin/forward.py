"""A `forward` of one module in place of its class's: how it is set, copied, replicated and removed.

Accelerating a module only sets the attribute `forward`; classes, parameters and state_dict stay. The objects here hold
references only, so an accelerated model can be copied, pickled and compiled, and restoring it leaves nothing behind.
"""

from __future__ import annotations

import copy
import inspect
import sys
import threading
import warnings
from types import CodeType, MethodType
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..stack.shared import Pass
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
    def __func__(self) -> Any:
        raise AttributeError(
            "an accelerated forward is no method whose function can be changed: call fastbert.restore(model) before it"
        )

    @property
    def __globals__(self) -> dict[str, Any]:
        raise AttributeError(
            "torch.jit.script compiles the source of a forward, and an accelerated one has none: call "
            "fastbert.restore(model) before it"
        )

    def entries(self) -> dict[str, Any]:
        """What lies in the module's `__dict__` as long as the module is accelerated."""
        return {"forward": self, "_replicate_for_data_parallel": self.replicate, "__getstate__": self.state}

    def put(self) -> None:
        """Replaces the class's `forward` until `remove_forwards`."""
        self.module.__dict__.update(self.entries())

    def release(self) -> None:
        """Gives back what the module's parameters hold for this `forward`, which is no longer used."""

    def state(self) -> Any:
        """The module's state for `copy` and `pickle`."""
        getstate = getattr(type(self.module), "__getstate__", None)  # Python 3.10's object has none
        state = self.module.__dict__ if getstate is None else getstate(self.module)
        return State(state, self.module) if isinstance(state, dict) else state

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
                stacklevel=5,
            )

    def __call__(self, *args, **kwargs):
        if len(args) == 3 and isinstance(args[1], Pass):
            return self.call_packed(*args)
        if args and isinstance(args[0], nn.Module):  # somebody made a method of it, as `accelerate`'s unwrap_model does
            module, *args = args
            if module is not self.module:  # a copy of the module, which has the same method
                return type(module).forward(module, *args, **kwargs)
        if not torch.compiler.is_compiling():
            called = called_module()
            if called is not None and called is not self.module and has_entries_of(called, self.module):
                return type(called).forward(called, *args, **kwargs)  # somebody copied the `__dict__` of `self.module`
        return self.call(*args, **kwargs)

    def call(self, *args, **kwargs):
        """The output of a call of the module."""
        raise TypeError(f"{type(self).__name__} has no forward")

    def call_packed(self, x: Tensor, shared: Pass, index: int) -> Tensor:
        """The output [T, C] of a call of a layer, number `index`, by the accelerated encoder around it. x: [T, C]."""
        raise TypeError(f"{type(self).__name__} is not that of a layer")


class State(dict):
    """The state of an accelerated module: its `__dict__`, or what its class's `__getstate__` makes of that.

    deepcopy and pickle take all of it, so that their copy is accelerated. A shallow copy takes the entries of this
    dictionary, without those of acceleration, so that it runs its class's code: a `Forward` would call `module`.
    """

    def __init__(self, whole: dict[str, Any], module: nn.Module):
        entries = whole.items()
        super().__init__((name, v) for name, v in entries if (f := _put_as(name, v)) is None or f.module is not module)
        self.whole = whole

    def __deepcopy__(self, memo: dict) -> dict[str, Any]:
        return copy.deepcopy(self.whole, memo)

    def __reduce_ex__(self, protocol) -> tuple:
        return dict, (self.whole,)


def _put_as(name: str, value: Any) -> Forward | None:
    """The `Forward` whose `put` makes such an entry of a module's `__dict__`; None if none does."""
    forward = getattr(value, "__self__", value)
    forward = forward if isinstance(forward, Forward) else _unbound(value)
    return forward if isinstance(forward, Forward) and name in forward.entries() else None


def _unbound(value: Any) -> Any:
    """A function or `Forward` that was made a method of a module."""
    return value.__func__ if isinstance(value, MethodType) else value


def has_entries_of(module: nn.Module, accelerated: nn.Module) -> bool:
    """Whether `module` has the entries that were put into the `__dict__` of an accelerated module. A module that was
    only given the other's `forward`, to call that, has not."""
    forward = _put_as("__getstate__", module.__dict__.get("__getstate__"))
    return forward is not None and forward.module is accelerated


def forward_of(module: nn.Module) -> Forward | None:
    """The `Forward` that runs when `module` is called; None if it is not accelerated."""
    forward = _unbound(module.__dict__.get("forward"))
    return forward if isinstance(forward, Forward) and forward.module is module else None


def remove_forwards(module: nn.Module) -> None:
    """Takes the entries of acceleration out of a module's `__dict__`."""
    own = module.__dict__
    put = {name: forward for name, value in own.items() if (forward := _put_as(name, value)) is not None}
    put = {name: f for name, f in put.items() if f.module is module or has_entries_of(module, f.module)}
    for name, value in list(own.items()):
        if name in put:
            del own[name]
            if _unbound(value) is put[name] and put[name].module is module:
                put[name].release()
        elif isinstance(value, Forward):  # kept by code that wraps it, or given to another module
            own[name] = value.original


_CALLS = nn.Module._slow_forward.__code__.co_filename  # the file of torch's code that calls a module's `forward`


def called_module() -> nn.Module | None:
    """The module whose call runs the `forward` that calls this function; None if something else calls it."""
    caller = sys._getframe(2)
    return caller.f_locals.get("self") if caller.f_code.co_filename == _CALLS else None


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

    def release(self) -> None:
        self.seen = None  # it holds the module

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
            warnings.warn(f"{type(self.module).__name__}: {ZEROS}", stacklevel=7)


def count(counts: dict[str, int], what: str) -> int:
    """Adds one to the count of `what`, and returns it."""
    with _COUNTING:
        counts[what] = counts.get(what, 0) + 1
        return counts[what]
