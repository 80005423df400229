"""Tracks the last write and read of each piece of shared memory, to find races, missing waits and missing fences.

A piece is as large as the smallest access of the program. A write and another access by different threads need a
barrier in between; for lanes of one warp a `bar.warp.sync`. Pieces that a copy in flight writes, or a matrix
instruction reads, may not be used until a thread has waited.
"""

from __future__ import annotations

import numpy as np

from .errors import BarrierMisuse, MissingFence, MissingWait, SharedRace, UnwrittenShared
from .formats import i64
from .order import BULK, CODES, FLYING, MANY, MBARRIER, SEVERAL, Order, stamp
from .state import State

_FLIES = stamp(FLYING, 0)


class Shadow:
    """`size` bytes of shared memory for all programs, `stride` a program, in pieces of `piece` bytes (a power of 2)."""

    def __init__(self, machine: State, size: int, stride: int, piece: int, space: str = "shared memory"):
        self.order: Order = machine.order
        self._space = space
        self._piece, self._shift, self._stride = piece, piece.bit_length() - 1, stride
        self._written = np.zeros(size // piece, i64)
        self._read = np.zeros(size // piece, i64)
        self._program = np.arange(machine.count, dtype=i64)[:, None]
        self._threads = np.arange(machine.threads, dtype=i64)[None]
        warps = SEVERAL + np.arange(machine.warps, dtype=i64)
        self.rows_of_warps = {count: warps.repeat(8 * count)[None] for count in (1, 2, 4)}  # of ldmatrix

    # ---- what threads do

    def read(
        self, place: np.ndarray, size: int, mask, who: np.ndarray | None = None, expect_written: bool = True
    ) -> None:
        """Threads read `size` bytes at places [programs, threads]. who: codes of the readers; by default each
        thread."""
        index, program, who = self._pieces(place, size, mask, who)
        written = self._written.take(index)
        if expect_written and not written.all():
            self._never_written(index, written == 0)
        self._expect_known(written, index, program, who, "reads", "wrote")
        self._mark_read(index, program, who)

    def write(self, place: np.ndarray, size: int, mask, who: np.ndarray | None = None) -> bool:
        """Threads write `size` bytes; returns whether two threads write the same piece at once."""
        index, program, who = self._pieces(place, size, mask, who)
        self._expect_free(index, program, who, "writes")
        self._written[index] = stamp(self.order.now, who)
        back = self._written.take(index) & ((1 << CODES) - 1)
        several = bool((back != who).any())
        if several:
            self._written[index[(back >> 5) != (who >> 5)]] = stamp(self.order.now, MANY)
        return several

    def _mark_read(self, index, program, who) -> None:
        new = stamp(self.order.now, who)
        before = self._read.take(index)
        open_ = before >= self.order.limit[program]
        if open_.any():
            at = np.flatnonzero(open_)
            at = at[self.order.unknown(before[at], program[at], who[at])]
            new[at] = self._joined(before[at], who[at])
        self._read[index] = new
        back = self._read.take(index)
        differs = np.flatnonzero(back != new)
        if differs.size:  # several threads read the same piece at once
            joined = self._joined(back[differs], who[differs])
            one_warp = (joined & ((1 << CODES) - 1)) != MANY
            self._read[index[differs[one_warp]]] = joined[one_warp]
            self._read[index[differs[~one_warp]]] = joined[~one_warp]

    def _joined(self, stamps, who) -> np.ndarray:
        """New stamps for pieces read by the previous readers and `who`; asynchronous reads in flight stay in flight."""
        code = stamps & ((1 << CODES) - 1)
        first, second = (np.where(c < BULK, c >> 5, c - SEVERAL) for c in (code, who))
        both = np.where((first == second) & (code != MANY), SEVERAL + second, MANY)
        return stamp(np.maximum(self.order.now, np.where(stamps >= _FLIES, FLYING, 0)), both)

    # ---- what asynchronous units do

    def fly(self, place: np.ndarray, size: int, mask, who: np.ndarray | None, code: np.ndarray | None = None) -> None:
        """`who` start copies to these places. code: the writer in the stamps, if it is not `who`."""
        index, program, who = self._pieces(place, size, mask, who)
        self._expect_free(index, program, who, "starts a copy to")
        self._written[index] = stamp(FLYING, who if code is None else code)

    def land(self, place: np.ndarray, size: int, mask, code: np.ndarray | None = None) -> None:
        """Copies are complete."""
        index, _, who = self._pieces(place, size, mask, code)
        self._written[index] = stamp(self.order.now, who)

    def read_async(self, place: np.ndarray, program: np.ndarray, warps: np.ndarray, fenced: bool = True) -> np.ndarray:
        """An asynchronous unit reads 16 bytes at each of places [operations, n]. program: [operations]. warps:
        [operations, k], the warps that start the read; the writes must be ordered before all of them. fenced: a proxy
        fence is needed as well. Returns the pieces, for `read_is_over`."""
        index = self._spread(place, 16).reshape(len(place), -1)
        written = self._written.take(index)
        if not written.all():
            self._never_written(index, written == 0)
        each = index.shape[1]
        if (written >= self.order.limit[program][:, None]).any():
            for k in range(warps.shape[1]):
                who = SEVERAL + warps[:, k]
                self._expect_known(
                    written.reshape(-1), index.reshape(-1), program.repeat(each), who.repeat(each),
                    "starts an asynchronous read of", "wrote",
                )  # fmt: skip
        if fenced:
            self._expect_fenced(written, index, program, warps[:, 0])
        self._read[index] = stamp(FLYING, MANY)
        return index

    def _expect_fenced(self, written, index, program, warp) -> None:
        each = index.shape[1]
        unfenced = self.order.unfenced(written.reshape(-1), program.repeat(each), warp.repeat(each))
        if unfenced.any():
            where = int(np.argmax(unfenced))
            raise MissingFence(
                f"no fence.proxy.async between the write of {self._name(written.flat[where])} to byte "
                f"{self._byte(index.flat[where])} of {self._space} and its asynchronous read"
            )

    def read_is_over(self, index: np.ndarray, code: int = MANY) -> None:
        """Ends an asynchronous read. code: of the mbarrier that reports the end, if any."""
        self._read[index] = stamp(self.order.now, code)

    def read_goes_on(self, index: np.ndarray) -> None:
        self._read[index] = stamp(FLYING, MANY)

    def start_result(self, index: np.ndarray, program: np.ndarray, warp: np.ndarray, own: np.ndarray) -> None:
        """The matrix unit starts to write pieces [operations, n] for warps [operations]. own: the pieces that it wrote
        last for the same warp; these need no wait, because products run one after the other."""
        who, each = SEVERAL + warp, index.shape[1]
        pieces, program, who = index.reshape(-1), program.repeat(each), who.repeat(each)
        others = ~own.reshape(-1)
        written = self._written.take(pieces[others])
        self._expect_known(written, pieces[others], program[others], who[others], "starts a product in", "wrote")
        self._expect_known(self._read.take(pieces), pieces, program, who, "starts a product in", "read")
        self.start_result_again(index, warp)

    def expect_written(self, index: np.ndarray) -> None:
        never = self._written.take(index) == 0
        if never.any():
            self._never_written(index, never)

    def start_result_again(self, index: np.ndarray, warp: np.ndarray) -> None:
        self._written[index] = stamp(FLYING, SEVERAL + warp)[:, None]

    def end_result(self, index: np.ndarray, code: int) -> None:
        """Ends a write of the matrix unit. code: of the mbarrier that reports the end."""
        self._written[index] = stamp(self.order.now, code)

    def hold_mbarrier(self, place: np.ndarray, programs: np.ndarray) -> None:
        """Marks 8 bytes as an mbarrier, which only mbarrier instructions may use."""
        self._written[self._spread(place[programs], 8).reshape(-1)] = stamp(FLYING, MBARRIER)

    def free_mbarrier(self, place: np.ndarray, programs: np.ndarray, thread: np.ndarray) -> None:
        index = self._spread(place[programs], 8)
        self._written[index] = stamp(self.order.now, thread[programs])[..., None]

    # ---- the rules

    def _expect_free(self, index, program, who, does: str) -> None:
        self._expect_known(self._written.take(index), index, program, who, does, "wrote")
        self._expect_known(self._read.take(index), index, program, who, does, "read")

    def _expect_known(self, stamps, index, program, who, does: str, did: str) -> None:
        open_ = stamps >= self.order.limit[program]
        if not open_.any():
            return
        at = np.flatnonzero(open_)
        at = at[self.order.unknown(stamps[at], program[at], who[at])]
        if at.size:
            first = at[int(np.argmax(stamps[at] >= _FLIES))]
            self._refuse(int(stamps[first]), int(index[first]), int(who[first]), does, did, at.size)

    def _refuse(self, old: int, index: int, who: int, does: str, did: str, count: int) -> None:
        what = f"{self._name(who)} {does} byte {self._byte(index)} of {self._space}"
        if old >= _FLIES:
            if old & ((1 << CODES) - 1) == MBARRIER:
                raise BarrierMisuse(f"{what}, which holds an mbarrier")
            if did == "read":
                raise MissingWait(f"{what} while an asynchronous unit may still read it: a wait is missing")
            raise MissingWait(f"{what}, to which {self._name(old)} started a copy, without a wait for it")
        raise SharedRace(f"{what}, which {self._name(old)} {did} with no barrier between ({count} such accesses)")

    def _never_written(self, index, never) -> None:
        where = int(index.flat[np.argmax(never)])
        raise UnwrittenShared(f"byte {self._byte(where)} of {self._space} is read, but nothing was written there")

    def _byte(self, index) -> int:
        return int(index) * self._piece % self._stride

    @staticmethod
    def _name(code: int) -> str:
        code = int(code) & ((1 << CODES) - 1)
        if code < BULK:
            return f"thread {code}"
        if code < SEVERAL:
            return "a bulk copy"
        return "several warps" if code == MANY else f"warp {code - SEVERAL}"

    def _spread(self, place: np.ndarray, size: int) -> np.ndarray:
        """Numbers of the pieces of accesses, on a further axis."""
        return (place >> self._shift)[..., None] + np.arange(max(size >> self._shift, 1))

    def _pieces(self, place, size: int, mask, who):
        """(piece, program, code) of every piece of the accesses of the mask, one axis."""
        who = self._threads if who is None else who
        each = max(size >> self._shift, 1)
        program, who = np.broadcast_to(self._program, place.shape), np.broadcast_to(who, place.shape)
        if mask is not None:
            place, program, who = place[mask], program[mask], who[mask]
        if each == 1:
            return (place >> self._shift).reshape(-1), program.reshape(-1), who.reshape(-1)
        return self._spread(place, size).reshape(-1), program.repeat(each), who.repeat(each)
