"""The emulated machine: the state of programs, and the units that change it."""

from __future__ import annotations

import numpy as np

from .barriers import Barriers
from .copies import AsyncCopies
from .memory import GlobalMemory
from .order import Order
from .shared import SharedMemory
from .state import State
from .tensor import TensorMemory
from .warpgroup import MatrixQueue


class Machine(State):
    """shared_bytes: size of shared memory. piece: bytes of the smallest access to it. The other arguments are those of
    `State`."""

    def __init__(
        self, programs: np.ndarray, grid: tuple[int, int, int], threads: int, shared_bytes: int,
        memory: GlobalMemory, descriptors: dict[int, object], first: int, piece: int,
    ):  # fmt: skip
        super().__init__(programs, grid, threads, descriptors, first)
        self.memory = memory
        self.order = Order(self)
        self.shared = SharedMemory(self, shared_bytes, piece)
        self.barriers = Barriers(self)
        self.copies = AsyncCopies(self)
        self.queue = MatrixQueue(self)
        self.tensor = TensorMemory(self)

    def expect_finished(self) -> None:
        """Raises at the end of the programs if copies or products are in flight, or an mbarrier waits."""
        self.copies.expect_none()
        self.queue.expect_none()
        self.tensor.expect_none()
        self.barriers.expect_finished()
