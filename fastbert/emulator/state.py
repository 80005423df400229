"""The state of the programs (CTAs) that run together, through which the emulator's parts use each other."""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import UnknownInstruction
from .formats import i64, u32, u64

PARAMETER_SPACE = 0xFFFE << 48  # addresses of parameters, which are no addresses of tensors


class State:
    """programs: positions in the grid, [n, 3]. first: number of the first program, counted through the grid. Arrays of
    the state are [n, threads]. `Machine` adds the parts: memory, order, shared memory, barriers, copies, the queue of
    matrix products, and tensor memory."""

    memory: Any
    order: Any
    shared: Any
    barriers: Any
    copies: Any
    queue: Any
    tensor: Any

    def __init__(
        self, programs: np.ndarray, grid: tuple[int, int, int], threads: int, descriptors: dict[int, object], first: int
    ):  # fmt: skip
        self.first = first
        self.count, self.threads = len(programs), threads
        self.shape = self.count, threads
        self.warps = threads // 32
        self.descriptors = descriptors  # number of a parameter -> tensor descriptor
        self.at: int | None = None  # index of the instruction that runs
        self.live = np.ones(self.shape, bool)
        thread = np.arange(threads, dtype=u32)[None]
        self.lane = (thread % u32(32)).astype(i64)
        self._special = {
            "%tid.x": thread, "%laneid": thread % u32(32), "%warpid": thread // u32(32), "%ntid.x": u32(threads),
            "%tid.y": u32(0), "%tid.z": u32(0), "%ntid.y": u32(1), "%ntid.z": u32(1),
            "%cluster_ctarank": u32(0), "%cluster_nctarank": u32(1),
        }  # fmt: skip
        for axis, name in enumerate("xyz"):
            self._special[f"%ctaid.{name}"] = programs[:, axis : axis + 1].astype(u32)
            self._special[f"%nctaid.{name}"] = u32(grid[axis])
        self._special = {name: np.asarray(value) for name, value in self._special.items()}

    def full(self, x) -> np.ndarray:
        """x as [programs, threads]."""
        return x if np.shape(x) == self.shape else np.broadcast_to(x, self.shape)

    def by_warp(self, x) -> np.ndarray:
        """x as [programs, warps, 32]."""
        return np.reshape(self.full(x), (self.count, self.warps, 32))

    def warps_of(self, mask) -> np.ndarray:
        """[programs, warps]: whether the mask contains a thread of the warp."""
        return np.ones((self.count, self.warps), bool) if mask is None else self.by_warp(mask).any(-1)

    def special(self, name: str) -> np.ndarray:
        if name not in self._special:
            raise UnknownInstruction(f"the emulator does not know the register {name}")
        return self._special[name]

    def parameter_address(self, number: int) -> np.uint64:
        return u64(PARAMETER_SPACE | number)

    def descriptor(self, address) -> object:
        """The tensor descriptor at an address of the parameter space."""
        number = int(address) - PARAMETER_SPACE
        if number not in self.descriptors:
            raise UnknownInstruction(f"no tensor descriptor at {int(address):#x}")
        return self.descriptors[number]
