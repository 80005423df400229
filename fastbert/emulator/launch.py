"""Runs the PTX of a launch, which comes from the driver, on numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .copies import TensorDescriptor
from .driver import CARDS
from .errors import InvalidOperand, LimitExceeded
from .execute import LIMIT, run
from .formats import f32, f64, u8, u16, u32, u64
from .memory import pointer
from .region import Region

if TYPE_CHECKING:
    from .driver import Launch

_INTEGERS = {"1": u8, "8": u8, "16": u16, "32": u32, "64": u64}


def execute(launch: Launch, ptx: str | None = None, limit: int = LIMIT) -> int:
    """Runs a compiled launch, which writes its tensors in place. Returns the number of instructions that warps ran.

    ptx: another program with the same parameters, in place of the launch's own. limit: most instructions of a batch of
    programs.
    """
    arch = f"sm_{launch.compiled.metadata.target.arch}"
    if launch.shared > CARDS[arch][1]:
        raise LimitExceeded(f"{launch.name} needs {launch.shared} bytes of shared memory, {arch} has {CARDS[arch][1]}")
    arguments = _Arguments(launch)
    return run(
        launch.compiled.asm["ptx"] if ptx is None else ptx, launch.grid, arguments.parameters, arguments.regions,
        launch.shared, arguments.descriptors, limit,
    )  # fmt: skip


def extent(tensor: Tensor) -> tuple[int, int]:
    """Real addresses of a tensor's first byte and of the first byte after its last element."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


class _Arguments:
    """Parameters in the order of the PTX: those that Triton packs for each argument, then two pointers to scratch
    memory."""

    def __init__(self, launch: Launch):
        self.parameters: list[np.generic] = []
        self.regions: list[Region] = []
        self.descriptors: dict[int, TensorDescriptor] = {}
        metas = list(launch.descriptors)
        for name, (kind, value) in launch.arguments.items():
            if kind.startswith("*"):
                self._pointer(name, value)
            elif kind.startswith("tensordesc"):
                self._descriptor(name, value, metas.pop(0) if metas else None)
            else:
                self.parameters.append(_number(kind, value))
        self.parameters += [u64(0), u64(0)]

    def _pointer(self, name: str, tensor: Tensor) -> None:
        self.parameters.append(pointer(len(self.regions), tensor.data_ptr()))
        self.regions.append(Region(name, *extent(tensor)))

    def _descriptor(self, name: str, given: Any, meta: dict | None) -> None:
        sizes = [*given.shape], [*given.strides]
        if meta is None:  # without bulk copies, the parts of a descriptor are separate parameters
            self._pointer(name, given.base)
            self.parameters += [u64(n) for n in (*sizes[0], *sizes[1])]
            self.parameters += [u8(given.padding == "nan"), u8(given.round_f32_to_tf32)]
        else:
            self.descriptors[len(self.parameters)] = _tensor_map(name, given, meta, len(self.regions))
            self.parameters.append(u64(0))
            self.regions.append(Region(name, *extent(given.base)))
        self.parameters += [u32(n) for n in sizes[0]] + [u64(n) for n in sizes[1]]


def _tensor_map(name: str, given: Any, meta: dict, region: int) -> TensorDescriptor:
    element = given.base.element_size()
    if given.base.data_ptr() % 16 or any(s * element % 16 for s in given.strides[:-1]) or given.strides[-1] != 1:
        raise InvalidOperand(f"{name}: a tensor map needs an address and strides that are multiples of 16 bytes")
    fill = {2: 0x7FFF, 4: 0x7FFFFFFF}.get(element, 0) if given.padding == "nan" else 0
    box = tuple(meta["block_size"])
    return TensorDescriptor(
        region, given.base.data_ptr(), tuple(given.shape), tuple(given.strides), element, box, meta["swizzle"], fill
    )


def _number(kind: str, value: Any) -> np.generic:
    if kind in ("fp32", "f32"):
        return f32(value).view(u32)
    if kind in ("fp64", "f64"):
        return f64(value).view(u64)
    if kind[0] not in "iu" or kind[1:] not in _INTEGERS:
        raise InvalidOperand(f"an argument of type {kind}")
    unsigned = _INTEGERS[kind[1:]]
    return unsigned(int(value) & ((1 << unsigned().itemsize * 8) - 1))
