"""The happens-before order among the warps of each program.

Time counts the events that order memory: barriers, fences, waits. `known[p, v, u]` is the time up to which everything
that warp u of program p did happens before what warp v does now; for u = v it is the time up to which the lanes of the
warp are ordered among each other. Columns beyond the warps stand for mbarriers: the data of bulk copies is known to
warps that have waited on their mbarrier. A barrier of all threads raises `limit`: everything with a smaller stamp is
known to all warps, and this single comparison settles nearly every access.

An event of a warp counts for all its lanes.
"""

from __future__ import annotations

import numpy as np

from .formats import i64
from .state import State

CODES = 12  # low bits of a stamp with the code of the writer; the bits above are the time
BULK = 1024  # codes below are threads of the program; codes from here are mbarriers of bulk copies
SEVERAL = 2048  # codes from here: more than one lane of warp (code - SEVERAL)
MBARRIER, MANY = 4094, 4095  # bytes of an mbarrier; more than one warp
FLYING = 1 << 40  # the time of an operation in flight


def stamp(time, code):
    return (time << CODES) | code


class Order:
    def __init__(self, machine: State):
        self.now = 1
        self.warps = machine.warps
        self.known = np.zeros((machine.count, self.warps, self.warps), i64)
        # the same at the last fence.proxy.async of each warp
        self.fenced = np.zeros_like(self.known)
        self._fence_limit = np.full(machine.count, stamp(1, 0), i64)  # smaller stamps were fenced by their writers
        self.limit = np.full(machine.count, stamp(1, 0), i64)  # smaller stamps are known to all warps

    def tick(self) -> None:
        self.now += 1

    def add_column(self) -> int:
        """Adds a column for another mbarrier; returns its number."""
        self.known = np.concatenate([self.known, np.zeros((*self.known.shape[:2], 1), i64)], 2)
        return self.known.shape[2] - 1

    def meet(self, programs: np.ndarray) -> None:
        """All threads of these programs (a mask) pass a barrier."""
        self.known[programs] = self.known[programs].max(1, keepdims=True)
        self.known[programs, :, : self.warps] = self.now
        self.limit[programs] = stamp(self.now + 1, 0)
        self.tick()

    def meet_in_warp(self, warps: np.ndarray) -> None:
        """The lanes of these warps (a mask, [programs, warps]) pass a bar.warp.sync."""
        for warp in range(self.warps):
            self.known[warps[:, warp], warp, warp] = self.now
        self.tick()

    def fence(self, warps: np.ndarray) -> None:
        """These warps (a mask, [programs, warps]) make everything that they know or did visible to asynchronous
        units."""
        own = np.arange(self.warps)
        row = self.known[..., : self.warps].copy()
        row[:, own, own] = self.now
        self.fenced[warps] = row[warps]
        self._fence_limit = stamp(self.fenced[:, own, own].min(1) + 1, 0)
        self.tick()

    def release(self, warps: np.ndarray) -> np.ndarray:
        """What these warps (a mask) know and did, as [programs, columns]; 0 for programs without such a warp."""
        own = np.arange(self.warps)
        row = self.known.copy()
        row[:, own, own] = self.now
        self.tick()
        return np.where(warps[..., None], row, 0).max(1)

    def acquire(self, warps: np.ndarray, what: np.ndarray) -> None:
        """These warps (a mask) now know `what`, [programs, columns]."""
        what = np.pad(what, ((0, 0), (0, self.known.shape[2] - what.shape[1])))
        self.known = np.where(warps[..., None], np.maximum(self.known, what[:, None]), self.known)

    def _rows(self, program, who) -> np.ndarray:
        """What `who` (codes of threads, or of several lanes of a warp) know, [places, columns]."""
        return self.known[program, np.where(who < BULK, who >> 5, who - SEVERAL)]

    def unknown(self, stamps, program, who) -> np.ndarray:
        """Which of the stamps (one axis) belong to events that are not ordered before `who`."""
        time, code = stamps >> CODES, stamps & ((1 << CODES) - 1)
        rows = self._rows(program, who)
        column = np.select([code < BULK, code < SEVERAL, code < MBARRIER], [code >> 5, code - BULK, code - SEVERAL], 0)
        known = rows[np.arange(len(rows)), np.minimum(column, rows.shape[1] - 1)]
        known = np.where(code == MANY, rows[:, : self.warps].min(1), known)
        same = (code == who) & (who < BULK)
        return (time >= FLYING) | ((known < time) & ~same)

    def unfenced(self, stamps, program, warp) -> np.ndarray:
        """Which of the stamps (one axis) of threads' writes are not made visible by a fence to an asynchronous read
        that `warp` starts. Either the writer fences after writing, or the reader after the write is ordered before
        it."""
        if not (stamps >= self._fence_limit[program]).any():
            return np.zeros(stamps.shape, bool)
        time, code = stamps >> CODES, stamps & ((1 << CODES) - 1)
        by_thread = (code < BULK) | ((code >= SEVERAL) & (code < MBARRIER))
        writer = np.where(code < BULK, code >> 5, np.where(by_thread, code - SEVERAL, 0))
        fenced = np.maximum(self.fenced[program, writer, writer], self.fenced[program, warp, writer])
        return by_thread & (time < FLYING) & (fenced < time)
