"""The packed batch: the tokens of all sequences end to end, and no padding anywhere.

Padding enters and leaves the project only here. Everything between sees `[T, C]`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass

from . import functional as F

# Kernels are compiled for tensors that begin at multiples of 16 bytes, so those that share a buffer do.
ALIGNMENT = 16


@dataclass(frozen=True)
class PackedBatch:
    """B sequences, T tokens in all.

    Attributes:
        input_ids: [T] int64 (None where embeddings are given instead).
        token_type_ids: [T] int64 segment of each token, or None for all zero.
        positions: [T] int64, the row of the position table each token reads.
        cu_seqlens: [B + 1] int32, starts at 0, ends at T; sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1].
        max_seqlen: at least the length of the longest sequence; a host number, used as a bound.
        indices: [T] int64, where each token came from in the flattened [B * S] padded batch, or None: the batch had
            no padding (or was never padded).
        padded_shape: (B, S) of the padded batch it came from, or None.
        lengths: of the B sequences, or None: only the device knows them.
        entries: `functional.attention_entries(lengths)` where cu_seqlens is, or None: not made on the host.
        sequence_ids: [B] int64 names of the sequences for dropout, from 0 to 2^31 - 1, or None for 0 to B - 1. A text
            with the same name and seed has the same elements dropped, whatever it is packed with.
        together: (cu_seqlens, lengths, entries) as they belong together, which the batch sees to itself.

    `dataclasses.replace(batch, cu_seqlens=...)` gives a batch without the lengths and entries of the old cu_seqlens.
    """

    input_ids: Tensor | None
    token_type_ids: Tensor | None
    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    indices: Tensor | None = None
    padded_shape: tuple[int, int] | None = None
    lengths: tuple[int, ...] | None = None
    entries: Tensor | None = None
    sequence_ids: Tensor | None = None
    together: tuple[Any, ...] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self):
        if self.lengths is None and self.entries is None:
            return
        if self.together is not None:  # a batch made by `replace`: which tensors are still the old one's
            cu_seqlens, lengths, entries = self.together
            other = self.cu_seqlens is not cu_seqlens
            if other and self.lengths is lengths:
                object.__setattr__(self, "lengths", None)
            if (other or self.lengths is not lengths) and self.entries is entries:
                object.__setattr__(self, "entries", None)
        object.__setattr__(self, "together", (self.cu_seqlens, self.lengths, self.entries))

    @classmethod
    def from_lists(
        cls,
        input_ids: Sequence[Sequence[int]],
        token_type_ids: Sequence[Sequence[int]] | None = None,
        *,
        sequence_ids: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> PackedBatch:
        """Packs what a tokenizer returns. Lengths are known on the host, so nothing here waits for a device.

        All that a device needs, attention's list of tiles included, goes there in one copy.
        """
        lengths = tuple(map(len, input_ids))
        total = sum(lengths)
        starts = np.fromiter(itertools.accumulate(lengths, initial=0), np.int32, len(lengths) + 1)
        positions = np.arange(total, dtype=np.int64)
        if len(lengths) > 1:
            positions -= np.repeat(starts[:-1], lengths)
        ids = np.fromiter(itertools.chain.from_iterable(input_ids), np.int64, total)
        types = None
        if token_type_ids is not None:
            if tuple(map(len, token_type_ids)) != lengths:
                raise ValueError("token_type_ids must have the lengths of input_ids")
            types = torch.from_numpy(np.fromiter(itertools.chain.from_iterable(token_type_ids), np.int64, total))
        if sequence_ids is not None and len(sequence_ids) != len(lengths):
            raise ValueError(f"sequence_ids must be {len(lengths)}, one for each sequence, got {len(sequence_ids)}")
        names = None if sequence_ids is None else torch.from_numpy(np.array(sequence_ids, np.int64))
        device = torch.device("cpu" if device is None else device)
        batch = cls(
            input_ids=torch.from_numpy(ids),
            token_type_ids=types,
            positions=torch.from_numpy(positions),
            cu_seqlens=torch.from_numpy(starts),
            max_seqlen=max(lengths, default=0),
            lengths=lengths,
            entries=F.attention_entries(lengths, device) if device.type == "cpu" else None,
            sequence_ids=names,
        )
        return batch if device.type == "cpu" else batch.to(device)

    @classmethod
    def from_padded(
        cls,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        shape: tuple[int, int] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> PackedBatch:
        """Drops the padding of a [B, S] batch: right-padded, left-padded or with holes, by any 0/1 mask.

        A token keeps its column as its position, as in transformers, unless `position_ids` ([B, S] or [1, S]) says
        otherwise. A row without any real token becomes an empty sequence. With a mask on a GPU this waits once for
        the device, because the number of tokens depends on the mask; without a mask it never does.

        `shape` is (B, S) where input_ids is None. `lengths` are the real tokens of each row, for who knows them: then
        nothing waits.
        """
        rows, width = input_ids.shape if shape is None else shape
        longest = width
        device = next(t.device for t in (input_ids, attention_mask, token_type_ids, position_ids) if t is not None)
        columns = torch.arange(width, dtype=torch.int64, device=device).expand(rows, width)
        positions = columns if position_ids is None else position_ids.expand(rows, width)
        planes = [input_ids, None if token_type_ids is None else token_type_ids.expand(rows, width), positions]
        if attention_mask is None:
            indices, kept = None, [None if plane is None else plane.reshape(-1) for plane in planes]
            cu_seqlens = torch.arange(rows + 1, dtype=torch.int32, device=device) * width
            lengths = None if torch.compiler.is_compiling() else (width,) * rows
        else:
            if attention_mask.shape != (rows, width):
                raise ValueError(f"attention_mask must be {(rows, width)}, got {tuple(attention_mask.shape)}")
            real = attention_mask != 0
            counts = real.sum(1)
            if torch.compiler.is_compiling():  # a length that is read on the host would be baked in
                indices = real.reshape(-1).nonzero().squeeze(1)
            else:
                lengths = tuple(counts.tolist() if lengths is None else lengths)
                indices = real.reshape(-1).nonzero_static(size=sum(lengths)).squeeze(1)
                longest = max(lengths, default=0)
            kept = [None if plane is None else plane.reshape(-1)[indices] for plane in planes]
            cu_seqlens = torch.zeros(rows + 1, dtype=torch.int32, device=device)
            torch.cumsum(counts, 0, out=cu_seqlens[1:])
        ids, types, places = kept
        assert places is not None  # the plane of positions is always there
        return cls(
            ids, types, places, cu_seqlens, longest, indices, (rows, width), None if lengths is None else tuple(lengths)
        )

    @property
    def total_tokens(self) -> int:
        """T, the number of real tokens."""
        return self.positions.shape[0]

    @property
    def batch_size(self) -> int:
        """B, the number of sequences."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def first_tokens(self) -> Tensor:
        """[B] int64 row of each sequence's first token. (For an empty sequence: that of the next one, or T - 1.)"""
        return self.cu_seqlens[:-1].long().clamp(max=max(self.total_tokens - 1, 0))

    @property
    def sequence_names(self) -> Tensor:
        """[B] int64, `sequence_ids` or 0 to B - 1."""
        if self.sequence_ids is not None:
            return self.sequence_ids
        return torch.arange(self.batch_size, dtype=torch.int64, device=self.cu_seqlens.device)

    def row_ids(self) -> Tensor:
        """[T] int64 names of the tokens for dropout, `name of the sequence << 32 | place in the sequence`.

        They do not depend on where a token lies in memory, so packed and padded batches draw the same mask.
        """
        sequences, places = self._places()
        names = sequences if self.sequence_ids is None else self.sequence_ids[sequences]
        return (names << 32) | places

    def _places(self) -> tuple[Tensor, Tensor]:
        """(number of its sequence, place in it) of each token, both [T] int64."""
        F.expect_sequences("PackedBatch", "cu_seqlens", self.cu_seqlens, self.total_tokens, self.max_seqlen)
        if self.lengths is not None and self.cu_seqlens.is_cpu and not torch.compiler.is_compiling():
            lengths = np.array(self.lengths, np.int64)  # numpy takes a tenth of torch's time for small batches
            starts = np.repeat(lengths.cumsum() - lengths, lengths)
            numbers = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
            return torch.from_numpy(numbers), torch.from_numpy(np.arange(len(starts), dtype=np.int64) - starts)
        tokens = torch.arange(self.total_tokens, dtype=torch.int64, device=self.cu_seqlens.device)
        sequences = torch.searchsorted(self.cu_seqlens[1:].contiguous(), tokens, right=True)
        return sequences, tokens - self.cu_seqlens[sequences]

    def pad(self, x: Tensor, value: float = 0.0) -> Tensor:
        """x [T, ...] -> [B, S, ...], `value` at padding. S is the width it came with, else max_seqlen."""
        rows, width = self.padded_shape or (self.batch_size, self.max_seqlen)
        indices = self.indices
        if self.padded_shape is None:
            sequences, places = self._places()
            indices = sequences * width + places
        if indices is None:
            return x.reshape(rows, width, *x.shape[1:])
        flat = x.new_full((rows * width, *x.shape[1:]), value).index_copy(0, indices, x)
        return flat.reshape(rows, width, *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:
        """x [B, S, ...] of the padded batch this came from -> [T, ...], its real tokens."""
        if self.padded_shape is None or tuple(x.shape[:2]) != self.padded_shape:
            raise ValueError(f"expected x of the padded batch {self.padded_shape}, got {tuple(x.shape)}")
        flat = x.reshape(-1, *x.shape[2:])
        return flat if self.indices is None else flat[self.indices]

    def schedule(self, impl: F.Impl | None = None) -> Any:
        """What `attention` derives from the lengths, as its `schedule`."""
        if torch.compiler.is_compiling():  # lengths known to the host would become constants of the graph
            return F.attention_schedule(self.cu_seqlens, self.total_tokens, impl)
        return F.attention_schedule(
            self.cu_seqlens, self.total_tokens, impl, lengths=self.lengths, entries=self.entries
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch on another device. From the host to a device all of it goes in one copy, and nothing waits."""
        device = torch.device(device)
        if self.cu_seqlens.device.type == "cpu" and device.type != "cpu":
            return self._with_entries(device)._in_one_copy(device)
        return self._with({name: t.to(device, non_blocking=non_blocking) for name, t in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def _with(self, copies: dict[str, Tensor]) -> PackedBatch:
        """With copies of all its tensors, which belong together as these do."""
        return replace(self, **copies, together=None)  # type: ignore[arg-type]  # these fields hold tensors

    def _with_entries(self, device: torch.device) -> PackedBatch:
        """With the entries of attention's list, if kernels on `device` use them."""
        if self.lengths is None or self.entries is not None:
            return self
        return replace(self, entries=F.attention_entries(self.lengths, device))

    def _in_one_copy(self, device: torch.device) -> PackedBatch:
        """Every tensor, from the host to `device` by way of one buffer, whose views they are there."""
        tensors = self._tensors()
        sizes = [-(-t.nbytes // ALIGNMENT) * ALIGNMENT for t in tensors.values()]
        # pinned, so that the copy can go on while the host does; torch keeps the memory until it is over
        host = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
        for part, t in zip(host.split(sizes), tensors.values(), strict=True):
            part[: t.nbytes].view(t.dtype).view(t.shape).copy_(t)
        there = host.to(device, non_blocking=True).split(sizes)
        return self._with(
            {
                name: part[: t.nbytes].view(t.dtype).view(t.shape)
                for part, (name, t) in zip(there, tensors.items(), strict=True)
            }
        )


# torch.export passes the fields of a batch, except those that the batch derives from its lengths. To leave these out,
# both lists are needed: without field_names torch ignores drop_field_names.
_OF_ITS_OWN = ("entries", "together")
register_dataclass(
    PackedBatch,
    field_names=[f.name for f in fields(PackedBatch) if f.name not in _OF_ITS_OWN],
    drop_field_names=[*_OF_ITS_OWN],
    serialized_type_name="fastbert.PackedBatch",
)
