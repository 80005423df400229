"""One registration for every operator: schema, Triton launcher, shape function.

An operator is an opaque node to torch.compile and torch.export. Its launcher runs on CUDA tensors, and on CPU tensors
where Triton takes those (`_device.triton_on_cpu`).

In eager mode an operator calls its launcher directly, because torch's dispatcher would cost 5 to 10 us more per call.
The dispatcher is used if a compiler, tracer, profiler, mode, or tensor subclass may need to see the operator.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from . import _device

# operator -> its launcher for CPU tensors, for calls that bypass torch's dispatcher
LAUNCHERS: dict[str, Callable] = {}
_LIBRARY = torch.library.Library("fastbert", "DEF")
# types of devices whose tensors go to the launcher directly
EAGER = {"cuda", "cpu"}


def on_its_device(name: str, launch: Callable) -> Callable:
    """`launch` with its tensors' device as the current one, which is where Triton launches."""

    def launch_there(*args):
        first = args[0]
        if first.is_cuda:
            index = first.get_device()
            if index != torch.cuda.current_device():
                with torch.cuda.device(index):
                    return launch(*args)
        elif first.is_cpu and not _device.triton_on_cpu():
            raise RuntimeError(f"fastbert::{name} needs CUDA tensors, or TRITON_INTERPRET=1 for tensors on a CPU")
        return launch(*args)

    return launch_there


_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_mode = torch._C._is_torch_function_mode_enabled
_functorch = torch._C._functorch.peek_interpreter_stack
_profiler = torch.autograd._profiler_enabled
_tracing = torch._C._get_tracing_state


# types of arguments with which an operator may bypass the dispatcher
PLAIN = {Tensor, Parameter, type(None), int, float, bool, str, list, tuple, torch.dtype, torch.Size}


def _watched(args: tuple) -> bool:
    """Whether torch's dispatcher would do more with these arguments than call the launcher."""
    return _followed() or _profiler() or not PLAIN.issuperset(map(type, args))


def _followed() -> bool:
    """Whether a mode, a transformation or a tracer is active that sees or changes single operators."""
    return _dispatch_modes() > 0 or _function_mode() or _functorch() is not None or _tracing() is not None


def needs_operators(x: Tensor) -> bool:
    """Whether a computation on x must call registered operators rather than their launchers."""
    return _is_compiling() or x.device.type not in EAGER or _followed() or forward_ad._current_level >= 0


def _expect_no_tangent(name: str, args: tuple) -> None:
    """Raises NotImplementedError for a derivative in forward mode, which torch would silently drop."""
    if any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in args):
        raise NotImplementedError(f'fastbert::{name} has no derivative in forward mode; impl="reference" has one')


def register(schema: str, launch: Callable, fake: Callable) -> Callable:
    """Defines `fastbert::<schema>` and returns a function that calls it; its attribute `operator` is torch's operator.

    The first argument must be a tensor. `launch` allocates the outputs and launches the kernels; `fake` returns
    outputs of the right shape, dtype and strides for tracing. For an output that was not requested, `launch` returns
    None, `fake` and the operator an empty tensor.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    launch = on_its_device(name, launch)

    def implementation(*args):
        outputs = launch(*args)
        if isinstance(outputs, tuple) and any(output is None for output in outputs):
            empty = fake(*args)
            outputs = tuple(e if output is None else output for output, e in zip(outputs, empty, strict=True))
        return outputs

    LAUNCHERS[name] = implementation
    for device in ("CUDA", "CPU"):
        _LIBRARY.impl(name, implementation, device)
    torch.library.register_fake(f"fastbert::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.fastbert, name).default

    def call(*args):
        if _is_compiling():
            return operator(*args)
        if forward_ad._current_level >= 0:
            _expect_no_tangent(name, args)
        if args[0].device.type not in EAGER or _watched(args):
            return operator(*args)
        return launch(*args)

    call.operator = operator
    return call


def apply(function: type[torch.autograd.Function], *args):
    """`function.apply(*args)`, without functorch's search for wrappers if no mode or transformation is active."""
    if _is_compiling() or _watched(args):
        return function.apply(*args)
    return apply_unwatched(function, *args)


def apply_unwatched(function: type[torch.autograd.Function], *args):
    """`function.apply(*args)`, for callers that know that no transformation of functorch is active."""
    return super(torch.autograd.Function, function).apply(*args)


def once(backward: Callable) -> Callable:
    """`torch.autograd.function.once_differentiable`, at no cost if no second derivative is recorded."""
    guarded = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def differentiated_once(ctx, *gradients):
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *gradients)

    return differentiated_once


def by_torch(upstream: Tensor) -> bool:
    """Whether a backward pass must use torch's own operators. It must if its gradients may be differentiated again, or
    if `upstream` is a batch of gradients (`torch.autograd.grad(is_grads_batched=True)`), whose memory cannot be read
    directly."""
    return torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(upstream)


def plain_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], wanted: Sequence[bool], upstream: Tensor
) -> list[Tensor | None]:
    """The gradients of `function(*inputs)` by torch's own operators, for a backward pass of which `by_torch` is true.
    They can be differentiated again. None for an input that is not `wanted`.

    One input may have been computed from another: x of an add + LayerNorm is computed from the residual. Each gradient
    must be with respect to its own input only, so `function` gets a view of each input, on which no other input
    depends.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        views = [None if t is None else t.view_as(t) for t in inputs]
        leaves = [t for t, is_wanted in zip(views, wanted, strict=True) if is_wanted]
        y = function(*views)
    found = iter(torch.autograd.grad(y, leaves, upstream, create_graph=create_graph, materialize_grads=True))
    return [next(found) if is_wanted else None for is_wanted in wanted]
