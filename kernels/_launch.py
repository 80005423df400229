"""The one way to launch a Triton kernel.

A launcher asks for a `Plan`: a kernel with what does not change from call to call, its strides, sizes, flags and
options. A call then brings a grid, tensors and numbers:

    plan((programs,), (x, residual, y), (n_rows, stream_id))

The first call for a device and dtypes goes through Triton's binder, which looks at every argument, specialises, and
compiles; that is 15 to 60 us each time. What it found is kept, and later calls hand their arguments to the compiled
kernel. Triton would find the same kernel for them because everything it looks at is the same: the plan's constants;
dtypes, and which tensors are None; addresses that are divisible by 16; numbers that it does not specialise on
(`do_not_specialize`) and that fit 32 bits. Where one of these does not hold, the call goes through the binder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

INT32 = 1 << 31
_IS_AMD = torch.version.hip is not None
_RUNTIME = knobs.runtime
WITHIN_32_BITS = 2**31 - 1


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (`triton.cdiv` is for kernels too, and takes ten times as long on the host.)"""
    return -(-a // b)


class _Bound(NamedTuple):
    """A compiled kernel, loaded on a device."""

    compiled: Any
    run: Callable
    function: Any
    packed_metadata: Any


class Plan:
    """How a kernel is launched, apart from the tensors and numbers of a call.

    Args:
        kernel: a @triton.jit function.
        tensors, numbers: the names, with spaces between, of the arguments that each call brings, in its order. Numbers
            are integers that the kernel declares in `do_not_specialize`; a tensor may be None.
        constants: all other arguments.
        options: num_warps, num_stages, ...

    Raises: ValueError where the names are not those of the kernel's arguments, or a number is specialised on.
    """

    __slots__ = ("_bound", "_constants", "_in_order", "_may_bind", "_names", "_options", "_values", "kernel")

    def __init__(self, kernel: Any, tensors: str, numbers: str, constants: dict[str, Any], **options: Any):
        self.kernel, self._constants, self._options = kernel, constants, options
        self._names = (*tensors.split(), *numbers.split())
        self._values = tuple(constants.values())
        given = [*self._names, *constants]
        if sorted(given) != sorted(kernel.arg_names):
            raise ValueError(f"{kernel.__name__} takes {', '.join(kernel.arg_names)}; the plan has {', '.join(given)}")
        self._in_order = itemgetter(*(given.index(name) for name in kernel.arg_names))
        params = getattr(kernel, "params", None)  # the interpreter's functions have none
        self._may_bind = params is not None
        if params is not None:
            changing = set(numbers.split())
            if fixed := [p.name for p in params if p.name in changing and not p.do_not_specialize]:
                raise ValueError(f"{kernel.__name__} is specialised on {', '.join(fixed)}")
        self._bound: dict[tuple, _Bound] = {}

    def __call__(
        self,
        grid: tuple[int, ...],
        tensors: tuple[Tensor | None, ...],
        numbers: tuple[int, ...] = (),
        passed: tuple[Any, ...] | None = None,
    ) -> None:
        """Launch. passed: what the kernel gets in place of `tensors`, where some of them go as tensor descriptors."""
        if not self._may_bind:
            self._through_binder(grid, passed or tensors, numbers)
            return
        active = driver.active
        device = active.get_current_device()
        key, addresses = [device], 0
        for t in tensors:
            if t is None:
                key.append(None)
            else:
                key.append(t.dtype)
                addresses |= t.data_ptr()
        key = tuple(key)
        bound = self._bound.get(key)
        fits = not addresses & 15 and (not numbers or (max(numbers) < INT32 and min(numbers) >= -INT32))
        if bound is None or not fits or self.kernel.pre_run_hooks or (_IS_AMD and not _in_reach(tensors)):
            compiled = self._through_binder(grid, passed or tensors, numbers)
            if fits and bound is None and hasattr(compiled, "packed_metadata") and (not _IS_AMD or _in_reach(tensors)):
                self._bound[key] = _Bound(compiled, compiled.run, compiled.function, compiled.packed_metadata)
            return
        compiled, run, function, packed_metadata = bound
        args = self._in_order((*(passed or tensors), *numbers, *self._values))
        stream = active.get_current_stream(device)
        x, y, z = grid if len(grid) == 3 else (*grid, 1) if len(grid) == 2 else (*grid, 1, 1)
        enter, leave = _RUNTIME.launch_enter_hook, _RUNTIME.launch_exit_hook
        if _listens(enter) or _listens(leave):
            metadata = compiled.launch_metadata(grid, stream, *args)
            run(x, y, z, stream, function, packed_metadata, metadata, enter, leave, *args)
        else:
            run(x, y, z, stream, function, packed_metadata, None, None, None, *args)

    def _through_binder(self, grid, tensors, numbers) -> Any:
        given = dict(zip(self._names, (*tensors, *numbers), strict=True))
        return self.kernel[tuple(grid)](**given, **self._constants, **self._options)


def _listens(hook: Any) -> bool:
    """Would anything happen if Triton called this launch hook? (A chain of none is not worth making metadata for.)"""
    return hook is not None and bool(getattr(hook, "calls", True))


def _in_reach(tensors: Sequence[Tensor | None]) -> bool:
    """On AMD Triton assumes more of storages within 2 GiB: may a launch be bound for all like it?"""
    return all(t is None or t.untyped_storage().nbytes() <= WITHIN_32_BITS for t in tensors)
