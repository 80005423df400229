"""Launches Triton kernels; all launchers use this file.

A launcher makes a `Plan`: a kernel with the arguments that do not change from call to call, its strides, sizes, flags
and options. A call then passes a grid, tensors and numbers:

    plan((programs,), (x, residual, y), (n_rows, stream_id))

The first call for a device and dtypes goes through Triton's binder, which inspects every argument, specialises, and
compiles; that takes 15 to 60 us each time. The result is cached, and later calls pass their arguments directly to the
compiled kernel. Triton would choose the same kernel for them because everything that it inspects is the same: the
plan's constants; dtypes, and which tensors are None; addresses that are divisible by 16; numbers that it does not
specialise on (`do_not_specialize`) and that fit 32 bits. If one of these does not hold, the call goes through the
binder.

A caller that launches several kernels on the same tensors may inspect them once for all launches, and pass a key of the
result (`known`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
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
        tensors, numbers: the names, separated by spaces, of the arguments that each call passes, in order. Tensors are
            the kernel's first arguments, and may be None. Numbers are integers that the kernel declares in
            `do_not_specialize`.
        constants: all other arguments.
        options: num_warps, num_stages, ...

    Raises: ValueError if the names are not the kernel's arguments, tensors do not come first, or Triton specialises on
        a number.
    """

    __slots__ = ("_bound", "_constants", "_known", "_may_bind", "_names", "_options", "_places", "_rest", "kernel")

    def __init__(self, kernel: Any, tensors: str, numbers: str, constants: dict[str, Any], **options: Any):
        self.kernel, self._constants = kernel, constants
        # From Triton 3.10 on products and sums are not fused by default; 3.9 warns of that.
        self._options = {"enable_fp_fusion": True, **options}
        self._names = (*tensors.split(), *numbers.split())
        given = [*self._names, *constants]
        if sorted(given) != sorted(kernel.arg_names):
            raise ValueError(f"{kernel.__name__} takes {', '.join(kernel.arg_names)}; the plan has {', '.join(given)}")
        first = len(tensors.split())
        if given[:first] != kernel.arg_names[:first]:
            raise ValueError(f"the first arguments of {kernel.__name__} are not {tensors}")
        # the arguments after the tensors, and the indices of a call's numbers in them
        self._rest = [constants.get(name) for name in kernel.arg_names[first:]]
        self._places = [kernel.arg_names.index(name) - first for name in numbers.split()]
        params = getattr(kernel, "params", None)  # the interpreter's functions have none
        self._may_bind = params is not None
        if params is not None:
            changing = set(numbers.split())
            if fixed := [p.name for p in params if p.name in changing and not p.do_not_specialize]:
                raise ValueError(f"{kernel.__name__} is specialised on {', '.join(fixed)}")
        self._bound: dict[tuple, _Bound] = {}
        self._known: dict[tuple, _Bound] = {}

    def __call__(
        self,
        grid: tuple[int, ...],
        tensors: Sequence[Tensor | None],
        numbers: tuple[int, ...] = (),
        passed: Sequence[Any] | None = None,
        known: Hashable = None,
    ) -> None:
        """Launch.

        Args:
            passed: the kernel's arguments in place of `tensors`, if some are passed as tensor descriptors.
            known: if not None, the caller guarantees that in all calls with this value the same tensors are None, the
                others have the same dtypes and addresses divisible by 16, and the numbers fit 32 bits.
        """
        if not self._may_bind:
            self._through_binder(grid, passed or tensors, numbers)
            return
        active = driver.active
        device = active.get_current_device()
        bound = None if known is None else self._known.get((device, known))
        if bound is None or self.kernel.pre_run_hooks:
            bound = self._bound_for(device, grid, tensors, numbers, passed, known)
            if bound is None:  # `_bound_for` has launched through the binder
                return
        compiled, run, function, packed_metadata = bound
        rest = self._rest.copy()
        for place, number in zip(self._places, numbers):  # noqa: B905 - the binder counted them in the first call
            rest[place] = number
        stream = active.get_current_stream(device)
        x, y, z = (*grid, 1, 1)[:3]
        enter, leave = _RUNTIME.launch_enter_hook, _RUNTIME.launch_exit_hook
        if _listen(enter, leave):
            metadata = compiled.launch_metadata(grid, stream, *(passed or tensors), *rest)
            run(x, y, z, stream, function, packed_metadata, metadata, enter, leave, *(passed or tensors), *rest)
        else:
            run(x, y, z, stream, function, packed_metadata, None, None, None, *(passed or tensors), *rest)

    def _bound_for(self, device, grid, tensors, numbers, passed, known) -> _Bound | None:
        """The cached kernel for these arguments. None if there is none or it must not be used; then the binder has
        launched."""
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
        if _IS_AMD and not _in_reach(tensors):
            fits = False
        if fits and bound is not None and not self.kernel.pre_run_hooks:
            if known is not None and not _IS_AMD:
                self._known[device, known] = bound
            return bound
        compiled = self._through_binder(grid, passed or tensors, numbers)
        if fits and bound is None and hasattr(compiled, "packed_metadata"):
            self._bound[key] = _Bound(compiled, compiled.run, compiled.function, compiled.packed_metadata)
        return None

    def _through_binder(self, grid, tensors, numbers) -> Any:
        given = dict(zip(self._names, (*tensors, *numbers), strict=True))
        return self.kernel[tuple(grid)](**given, **self._constants, **self._options)


def all_at_16_bytes(*tensors: Tensor | None) -> bool:
    """Whether every address is divisible by 16."""
    addresses = 0
    for t in tensors:
        if t is not None:
            addresses |= t.data_ptr()
    return not addresses & 15


def _listen(enter: Any, leave: Any) -> bool:
    """Whether Triton has launch hooks to call. (An empty chain of hooks does not count, so no metadata is made.)"""
    return bool(
        (enter is not None and getattr(enter, "calls", True)) or (leave is not None and getattr(leave, "calls", True))
    )


def _in_reach(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a bound kernel may be used for later tensors. On AMD, Triton specialises on storages below 2 GiB."""
    return all(t is None or t.untyped_storage().nbytes() <= WITHIN_32_BITS for t in tensors)
