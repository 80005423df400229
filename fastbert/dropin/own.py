"""Is a module still the one that the fused code stands in for, and does anybody listen to it?

The fused code walks past a module only where that module would have run the very code of its library: no subclass with
a method of its own, no method put on the instance or on the class, no function changed that this code calls, no hook.
`why_own` looks closely, which takes a while; `Watch` tells in a few microseconds that nothing has changed since.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from itertools import chain, starmap
from operator import attrgetter, eq
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor, is_grad_enabled
from torch._C import _is_tracing, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from ..inference.snapshot import Snapshot
from ..inference.weights import HOOKS
from .forward import Forward

# functions that a library hangs on modules and that look at no tensor's shape: where they come from -> their name
HARMLESS = {
    "torch.nn.utils.": "",  # a weight computed anew before each call: pruning, weight norm, spectral norm
    "transformers.utils.": "",  # sleep unless the original runs
    "transformers.modeling_utils": "make_inputs_require_grad",
    "peft.": "make_inputs_require_grad",
}
# what torch hangs on a module that is sharded; it is called, so they do their work
SHARDED = "torch.distributed."
PACKAGES = ("torch", "transformers")
# functions of torch that the original's code calls, and the fused code does not
LIBRARY = [
    (nn.functional.__dict__, name)
    for name in ("dropout", "embedding", "gelu", "layer_norm", "linear", "scaled_dot_product_attention", "softmax")
]


def why_library() -> str | None:
    """Which of these functions is somebody's own, or None."""
    return next((f"torch.nn.functional.{name} was replaced" for f, name in LIBRARY if not of_library(f[name])), None)


@functools.cache
def _folder(package: str) -> str | None:
    """The folder that a package's code lies in, or None: it is not installed."""
    import importlib.util

    spec = importlib.util.find_spec(package)
    return None if spec is None or spec.origin is None else os.path.dirname(spec.origin) + os.sep


def of_library(function: Any) -> bool:
    """Is this code of torch or transformers, with every decorator around it?"""
    while function is not None:
        function = getattr(function, "__func__", function)
        code = getattr(function, "__code__", None)
        if isinstance(code, CodeType):
            if not code.co_filename.startswith(tuple(filter(None, map(_folder, PACKAGES)))):
                return False
        elif not type(function).__module__.startswith(("builtins", "functools", "torch", "transformers")):
            return False
        function = getattr(function, "__wrapped__", getattr(function, "func", None))
    return True


def _inner(function: Any) -> Any:
    """A function without its decorators."""
    function = getattr(function, "__func__", function)
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def _same(one: Any, other: Any) -> bool:
    """Is this the same code? A library may decorate the methods of its classes anew in each class derived from them."""
    return one is other or (_inner(one) is _inner(other) and of_library(one))


def _static(cls: type, name: str) -> Any:
    """The attribute of a class as it stands in its dictionary, or in that of a class it derives from."""
    return next((vars(c)[name] for c in cls.__mro__ if name in vars(c)), None)


def _names(code: CodeType) -> Iterable[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


@functools.cache
def used_by(cls: type[nn.Module]) -> tuple[tuple[str, ...], tuple[tuple[dict, str], ...]]:
    """(the methods of `cls` that a call of it may run, the functions of their files that these call)."""
    methods, functions, left = {"__call__": None}, {}, ["forward"]
    while left:
        name = left.pop()
        if name in methods:
            continue
        methods[name] = None
        code = getattr(_inner(_static(cls, name)), "__code__", None)
        for used in () if code is None else _names(code):
            here = getattr(_inner(_static(cls, name)), "__globals__", {})
            if callable(_static(cls, used)) or isinstance(_static(cls, used), (staticmethod, classmethod)):
                left.append(used)
            elif isinstance(here.get(used), FunctionType):
                functions[id(here), used] = (here, used)
    return tuple(methods), tuple(functions.values())


def why_own(module: nn.Module, names: tuple[str, ...], package: str) -> str | None:
    """None where a call of `module` runs the code of the class of `package` that has one of these names, and no other;
    else what is somebody's own."""
    cls = type(module)
    base = next((c for c in cls.__mro__ if c.__name__ in names and c.__module__.startswith(package)), None)
    if base is None:
        return f"a {cls.__name__} came in place of a {names[0]}"
    methods, functions = used_by(base)
    for name in methods:
        if not _same(_static(cls, name), _static(base, name)):
            return f"{cls.__name__} has a {name} of its own"
        if name in module.__dict__ and not isinstance(module.__dict__[name], Forward):
            return f"the {name} of a {cls.__name__} was replaced"
        if not of_library(_static(base, name)):
            return f"{base.__name__}.{name} was replaced"
    return next(
        (f"{name} was replaced, which {base.__name__} calls" for f, name in functions if not of_library(f[name])), None
    )


def module_of(hook: Any) -> str:
    """Where the code of a hook comes from."""
    hook = getattr(hook, "func", hook)
    if not isinstance(hook, FunctionType) and not hasattr(hook, "__func__"):
        hook = type(hook).__call__  # an object: pruning and spectral norm are classes
    return getattr(hook, "__module__", "") or ""


def listeners(module: nn.Module, sharded: bool = False) -> list:
    """The hooks that want to see or change what goes through this module; `sharded`: it is called, in its place."""
    hooks = [hook for name in HOOKS for hook in getattr(module, name).values()]
    return [hook for hook in hooks if not _harmless(hook) and not (sharded and module_of(hook).startswith(SHARDED))]


def _harmless(hook: Any) -> bool:
    here, name = module_of(hook), getattr(hook, "__name__", "")
    return any(here.startswith(package) and name.startswith(of) for package, of in HARMLESS.items())


def globally_heard() -> bool:
    """Is there a hook on every module that there is?"""
    return any(_HOOKS_ON_ALL(nn.modules.module))


_version = attrgetter("_version")
_HOOKS_ON_ALL = attrgetter(*(f"_global{name}" for name in HOOKS))


def written_on(module: nn.Module) -> list[tuple[Mapping, str]]:
    """The places of everything on a module that the code of its class may read, but for its mode and its weights."""
    own = module.__dict__
    return [(own, name) for name in own if not name.startswith("_") and name != "training"]


class Watch:
    """Are these modules what they were? Looked at: their classes and the methods of these, the functions that they
    call, what was put on an instance in place of a method, children, hooks, and whatever else is given.

    Args:
        modules: whose calls the fused code stands in for, or makes.
        places, attributes: (dictionary, key) and (class, name) of what else must stay the same object. A list of
            strings must also hold the same strings.
        buffers: small tensors that must hold the same numbers.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        places: Iterable[tuple[Mapping, str]] = (),
        attributes: Iterable[tuple[type, str]] = (),
        buffers: Iterable[Tensor] = (),
    ):
        modules, places = list(modules), list(places)
        attributes = [(nn.Module, "__call__"), *attributes]
        for module in modules:
            names, functions = used_by(type(module))
            places += [(module.__dict__, name) for name in names if not name.startswith("__")]
            places += functions
            attributes += [(type(module), name) for name in names]
        # what they hold must stay, and they themselves: another dictionary may be put in place of one
        tables = {name: [(module.__dict__, name) for module in modules] for name in ("_modules", *HOOKS)}
        backward = [place for name in HOOKS if "backward" in name for place in tables.pop(name)]
        forward = list(chain.from_iterable(tables.values()))
        self.snapshot = Snapshot(modules, [*places, *forward], attributes, [own[name] for own, name in forward])
        self.backward = Snapshot(places=backward, tables=[own[name] for own, name in backward])
        buffers = [t for t in buffers if not t.is_meta]
        # on a CPU their numbers are looked at: who writes to them through .data, or in inference mode, is not counted
        self.on_host = [(t, t.clone()) for t in buffers if t.is_cpu]
        self.buffers = [t for t in buffers if not t.is_cpu and not t.is_inference()]
        self.versions = list(map(_version, self.buffers))
        # settings such as config.layer_types, which may be written to in place
        values = {id(value): value for holder, key in places if isinstance(value := holder.get(key), list)}
        self.lists = [(v, v.copy()) for v in values.values() if all(isinstance(entry, str) for entry in v)]

    def is_same(self) -> bool:
        return (
            self.snapshot.is_same()
            and (not is_grad_enabled() or self.backward.is_same())  # without gradients nobody calls these hooks
            and list(map(_version, self.buffers)) == self.versions
            and all(starmap(torch.equal, self.on_host))
            and all(starmap(eq, self.lists))
        )


# ---- what a call itself brings --------------------------------------------------------------------------

TRACED = "torch.jit.trace is at work"  # it records the branches of one batch, and which branch packs depends on it
_CALL = nn.Module.__call__


def why_not_here(given: Mapping[str, Any]) -> str | None:
    """Why a call with these arguments, in this place of the program, needs the original code: somebody follows each
    step of it. None while a graph is traced by torch.compile, which follows ours."""
    if is_compiling():
        return TRACED if torch.jit.is_tracing() else None
    if _is_tracing():
        return TRACED
    if nn.Module.__call__ is not _CALL:
        return "somebody follows every call of a module"
    if globally_heard():
        return "a hook on all modules is there"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives are taken"
    if peek_interpreter_stack() is not None:
        return "a transformation of torch.func is at work"
    if _len_torch_dispatch_stack() > 0:
        return "a TorchDispatchMode follows every operator"
    if _len_torch_function_stack() > 0 and any(
        not isinstance(mode, torch.utils._device.DeviceContext)
        for mode in torch.overrides._get_current_function_mode_stack()
    ):
        return "a TorchFunctionMode follows every function"
    for name, value in given.items():
        kind = type(value)
        if kind is Tensor or value is None:
            continue
        if isinstance(value, Tensor) and kind is not nn.Parameter:
            return f"{name} is a {kind.__name__}"
        if isinstance(value, torch.fx.Proxy):
            return "torch.fx traces it"
    return None
