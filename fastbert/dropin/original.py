"""Whether a module still runs the original code of its library, which the fused code replaces, and has no hooks.

The fused code bypasses a module only if calling the module would run that original code: no subclass with a method of
its own, no method set on the instance or the class, no replaced function that the code calls, and no hook.
`why_not_original` inspects a module, which is slow. `Watch` checks in microseconds that nothing has changed since.
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

# Hooks of libraries that do not depend on the shape of a tensor: module of the hook -> beginning of its name.
HARMLESS = {
    "torch.nn.utils.": "",  # they compute a weight before each call: pruning, weight norm, spectral norm
    "transformers.utils.": "",  # they do nothing unless the original's code runs
    "transformers.modeling_utils": "make_inputs_require_grad",
    "peft.": "make_inputs_require_grad",
}
SHARDED = "torch.distributed."  # hooks of sharded modules, which work as long as the module is called
PACKAGES = ("torch", "transformers")
# functions of torch that the original's code calls and the fused code does not
LIBRARY = [
    *(
        (nn.functional.__dict__, name)
        for name in (
            "dropout", "embedding", "gelu", "layer_norm", "linear", "multi_head_attention_forward",
            "scaled_dot_product_attention", "softmax",
        )
    ),
    *(
        (torch.__dict__, name)
        for name in ("bmm", "matmul", "_native_multi_head_attention", "_transformer_encoder_layer_fwd")
    ),
]  # fmt: skip


def why_library() -> str | None:
    """Which function of `LIBRARY` was replaced, or None."""
    return next((f"{of['__name__']}.{name} was replaced" for of, name in LIBRARY if not of_library(of[name])), None)


@functools.cache
def _folder(package: str) -> str | None:
    """The folder of a package's code; None if it is not installed."""
    import importlib.util

    spec = importlib.util.find_spec(package)
    return None if spec is None or spec.origin is None else os.path.dirname(spec.origin) + os.sep


def of_library(function: Any) -> bool:
    """Whether a function and all its decorators are code of torch or transformers."""
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
    """Whether two functions are the same but for decorators. A library may decorate a method again in each subclass."""
    return one is other or (_inner(one) is _inner(other) and of_library(one))


def _static(cls: type, name: str) -> Any:
    """The attribute of a class as its dictionary or that of a base class holds it, without descriptors' effects."""
    return next((vars(c)[name] for c in cls.__mro__ if name in vars(c)), None)


def _names(code: CodeType) -> Iterable[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def called_by(function: Any) -> dict[tuple[int, str], tuple[dict, str]]:
    """The functions that a function may call by a name of its file, and those that these call in their own files:
    (id of the file's globals, name) -> (globals, name)."""
    found: dict[tuple[int, str], tuple[dict, str]] = {}
    left = [function]
    while left:
        inner = _inner(left.pop())
        code, here = getattr(inner, "__code__", None), getattr(inner, "__globals__", {})
        for name in () if code is None else _names(code):
            if isinstance(used := here.get(name), FunctionType) and (id(here), name) not in found:
                found[id(here), name] = (here, name)
                left += [used] if of_library(used) else []
    return found


CALLS = ("__call__", "_call_impl")  # methods of nn.Module by which each call of a module goes
COMPILED = "_compiled_call_impl"  # what `Module.compile` sets on a module, to run in place of its `_call_impl`


@functools.cache
def used_by(cls: type[nn.Module]) -> tuple[tuple[str, ...], tuple[tuple[dict, str], ...]]:
    """(the methods that a call of a `cls` may run, the functions that these call: (globals, name))."""
    methods: dict[str, None] = dict.fromkeys(CALLS)
    functions: dict[tuple[int, str], tuple[dict, str]] = {}
    left = ["forward"]
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
                functions |= {(id(here), used): (here, used), **called_by(here[used])}
    return tuple(methods), tuple(functions.values())


def why_call(module: nn.Module) -> str | None:
    """What runs in place of `nn.Module.__call__` when this module is called, or None. A call by `Module.compile`, which
    gives the same numbers, does not count."""
    own, cls = module.__dict__, type(module)
    for name in CALLS:
        if not of_library(getattr(cls, name)):
            return f"{cls.__name__}.{name} was replaced"
    if "_call_impl" in own:
        return f"the _call_impl of a {cls.__name__} was replaced"
    compiled = own.get(COMPILED)
    if compiled is not None and not hasattr(compiled, "_torchdynamo_orig_callable"):
        return f"the {COMPILED} of a {cls.__name__} was replaced"
    return None


def why_not_original(module: nn.Module, names: tuple[str, ...], package: str) -> str | None:
    """None if calling `module` runs exactly the code of the class of `package` that has one of these names; else what
    differs."""
    cls = type(module)
    base = next((c for c in cls.__mro__ if c.__name__ in names and c.__module__.startswith(package)), None)
    if base is None:
        return f"a {cls.__name__} is in place of a {names[0]}"
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
    """The module of a hook's code."""
    hook = getattr(hook, "func", hook)
    if not isinstance(hook, FunctionType) and not hasattr(hook, "__func__"):
        hook = type(hook).__call__  # an object: pruning and spectral norm are classes
    return getattr(hook, "__module__", "") or ""


def tensor_hooks(module: nn.Module, sharded: bool = False) -> list:
    """The hooks of a module that may see or change its inputs or outputs. sharded: leave out those of sharding, since
    the module is called in its place."""
    hooks = [hook for name in HOOKS for hook in getattr(module, name).values()]
    return [hook for hook in hooks if not _harmless(hook) and not (sharded and module_of(hook).startswith(SHARDED))]


def _harmless(hook: Any) -> bool:
    here, name = module_of(hook), getattr(hook, "__name__", "")
    return any(here.startswith(package) and name.startswith(of) for package, of in HARMLESS.items())


def has_global_hook() -> bool:
    """Whether there is a hook on all modules, such as by `register_module_forward_hook`."""
    return any(_HOOKS_ON_ALL(nn.modules.module))


_version = attrgetter("_version")
_HOOKS_ON_ALL = attrgetter(*(f"_global{name}" for name in HOOKS))


def written_on(module: nn.Module) -> list[tuple[Mapping, str]]:
    """(dictionary, key) of the attributes of a module that its class's code may read, except mode and weights."""
    own = module.__dict__
    return [(own, name) for name in own if not name.startswith("_") and name != "training"]


class Watch:
    """The state of modules at construction, to check whether it has changed: classes and their methods, the functions
    that these call, methods set on an instance, children, hooks, and the places that are given.

    Args:
        modules: the modules that the fused code bypasses or calls.
        places, attributes: (dictionary, key) and (class, name) of other values that must stay the same object. A list
            of strings must also keep its strings.
        buffers: small tensors that must keep their values.
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
            places += [(module.__dict__, name) for name in (*names, COMPILED) if not name.startswith("__")]
            places += functions
            attributes += [(type(module), name) for name in names]
        # The dictionaries must keep their contents, and must not be replaced by other dictionaries.
        tables = {name: [(module.__dict__, name) for module in modules] for name in ("_modules", *HOOKS)}
        backward = [place for name in HOOKS if "backward" in name for place in tables.pop(name)]
        forward = list(chain.from_iterable(tables.values()))
        self.snapshot = Snapshot(modules, [*places, *forward], attributes, [own[name] for own, name in forward])
        self.backward = Snapshot(places=backward, tables=[own[name] for own, name in backward])
        buffers = [t for t in buffers if not t.is_meta]
        # On a CPU values are compared, because writes through .data or in inference mode change no version.
        self.on_host = [(t, t.clone()) for t in buffers if t.is_cpu]
        self.buffers = [t for t in buffers if not t.is_cpu and not t.is_inference()]
        self.versions = list(map(_version, self.buffers))
        # settings such as config.layer_types, which may change in place
        values = {id(value): value for holder, key in places if isinstance(value := holder.get(key), list)}
        self.lists = [(v, v.copy()) for v in values.values() if all(isinstance(entry, str) for entry in v)]

    def is_same(self) -> bool:
        return (
            self.snapshot.is_same()
            and (not is_grad_enabled() or self.backward.is_same())  # torch calls backward hooks with gradients only
            and list(map(_version, self.buffers)) == self.versions
            and all(starmap(torch.equal, self.on_host))
            and all(starmap(eq, self.lists))
        )


# ---- calls that something else observes ------------------------------------------------------------------

TRACED = "torch.jit.trace is running"  # it records the branches of one batch, and packing depends on the batch
_CALL = nn.Module.__call__


def why_not_here(given: Mapping[str, Any]) -> str | None:
    """Why a call with these arguments has to run the original's code here: a tracer, a mode or a tensor subclass
    observes its operators. None under torch.compile, which traces the fused code."""
    if is_compiling():
        return TRACED if torch.jit.is_tracing() else None
    if _is_tracing():
        return TRACED
    if nn.Module.__call__ is not _CALL:
        return "torch.nn.Module.__call__ was replaced"
    if has_global_hook():
        return "there is a hook on all modules"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives are computed"
    if peek_interpreter_stack() is not None:
        return "a transformation of torch.func is active"
    if _len_torch_dispatch_stack() > 0:
        return "a TorchDispatchMode is active"
    if _len_torch_function_stack() > 0 and any(
        not isinstance(mode, torch.utils._device.DeviceContext)
        for mode in torch.overrides._get_current_function_mode_stack()
    ):
        return "a TorchFunctionMode is active"
    for name, value in given.items():
        kind = type(value)
        if kind is Tensor or value is None:
            continue
        if isinstance(value, Tensor) and kind is not nn.Parameter:
            return f"{name} is a {kind.__name__}"
        if isinstance(value, torch.fx.Proxy):
            return "torch.fx traces it"
    return None
