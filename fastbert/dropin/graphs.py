"""transformers' encoders by CUDA graphs: which calls are replayed, and how their batches are packed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..inference.graphs import Graphs
from ..packing import PackedBatch
from ..stack.shared import Pass
from .embeddings import count_positions, position_tables
from .encoder import EncoderForward
from .facts import at, has
from .inspection import Seen
from .kinds import why_not_plain_norm
from .original import why_not_here
from .parts import not_plain, plain_table
from .plain import why_not_plain


class GraphedEncoderForward(EncoderForward):
    """An encoder that replays `graphs`. A call that cannot be replayed runs as without them."""

    def __init__(self, *args: Any, graphs: Graphs):
        super().__init__(*args)
        self.graphs: Graphs | None = graphs
        self.recorded: Seen | None = None  # the inspection that the recordings were made with

    def for_replica(self, replica: nn.Module) -> GraphedEncoderForward:
        forward = super().for_replica(replica)
        forward.graphs = None  # a replica exists for one call only
        return forward

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"recorded": None}

    def release(self) -> None:
        super().release()
        self.recorded = None

    def call(self, *args, **kwargs):
        given = self.named(args, kwargs)
        replayed = self.replay(given)
        if replayed is None:
            return super().call(*args, **kwargs)
        x, batch = replayed
        return self.finish(batch.pad(x), [], given)

    def replay(self, given: dict[str, Any]) -> tuple[Tensor, PackedBatch] | None:
        """(x [T, C], the batch) by a recording of `graphs`; None if the call has to run without one."""
        graphs = self.graphs
        if graphs is None or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None
        reason = self.why_not_replayed(given)
        batch = None if reason else self.pack_on_host(given)
        if batch is not None:
            reason = graphs.why_not(given["input_ids"].device, batch.total_tokens)
        elif reason is None:
            reason = "padding is read, or is computed in the packed path too"
        if reason is not None:
            graphs.calls[reason] += 1
            return None
        seen = self.seen

        def prepare(max_seqlen: int):
            # made once, since they do not depend on the batch
            tables = position_tables(self.module, self.facts, max_seqlen, graphs.device)
            return lambda batch: self.run(
                Pass(batch, None, self.impl, layers=seen.layers, **tables).scheduled(), seen, {}
            )[0]  # fmt: skip

        x = graphs.run(self.module, batch, prepare, seen.settings.longest)
        return None if x is None else (x, batch)

    def why_not_replayed(self, given: dict[str, Any]) -> str | None:
        if torch.is_grad_enabled():
            return "gradients are on; torch.inference_mode() or torch.no_grad() turns them off"
        if reason := why_not_here(given):
            return reason
        ids = given.get("input_ids")
        if not isinstance(ids, Tensor):
            return "there are no input_ids"
        if self.asked(given, "output_hidden_states"):
            return "output_hidden_states is on"
        seen = self.look()
        if not (self.graphs.is_same() and seen is self.recorded):
            if reason := seen.reason or self.why_not_recorded():
                return reason
            if seen is not self.recorded and len(self.graphs) > 0:
                self.graphs.drop()
            self.recorded = seen
        return self.why_not_given(given, seen.settings)

    def why_not_recorded(self) -> str | None:
        """Why the encoder cannot be recorded, or None. A replay runs no Python code, so every part has to be fused."""
        encoder, facts = self.module, self.facts
        seen = self.look()
        if any(m.training for m in (encoder, *seen.layers, *seen.dropouts)):
            return "a module is in training mode"
        if facts.called is not None:
            return "its embeddings are called as they are"
        rotations = [at(encoder, facts.tables_of_rotation)] if facts.positions == "rotary" else []
        if facts.layer.rotary is not None:
            rotations = [at(layer, facts.layer.rotary) for _, layer in self.layers()]
        for rope in (getattr(rotation, "rope_type", "default") for rotation in rotations):
            if set(rope.values() if isinstance(rope, dict) else [rope]) != {"default"}:
                return "its rotary tables depend on the batch"
        paths = [path for path in facts.tables if at(self.module, path) is not None]
        if not all(plain_table(at(encoder, path)) for path in paths):
            return "an embedding table is not torch's own, or has hooks"
        for path, kind, norm in facts.around:
            if path is None or not has(encoder, path):
                continue
            module = at(encoder, path)
            if reason := why_not_plain(module, kind) if norm is None else why_not_plain_norm(module, norm):
                return f"{path} is called: {reason}"
        for _, layer in self.layers():
            for path, reason in not_plain(layer, facts.layer).items():
                return f"{path} is called: {reason}"
        return None

    def pack_on_host(self, given: dict[str, Any]) -> PackedBatch | None:
        """The packed batch, whose indices are computed on the host, which waits once for the device; None if padding is
        computed."""
        ids, mask, positions = given["input_ids"], given.get("attention_mask"), given.get("position_ids")
        height, width = ids.shape
        lengths = None
        if mask is not None:
            reads, others, why = self.padding_reads(mask, ids, self.seen)
            unknown = self.is_reader_unknown(reads)
            reads, _ = self.with_pooled(reads, why, ids)
            planes = [mask != 0, *(t for t in (reads, others) if isinstance(t, Tensor))]
            mask, *planes = torch.stack(planes).cpu().unbind()
            reads, others = (planes.pop(0) if isinstance(t, Tensor) else t for t in (reads, others))
            rows, _ = self.rows_of(mask, reads, others)
            if rows.padding or rows.reason is not None:
                return None
            mask, lengths = rows.real, rows.lengths
            if mask is not None and unknown:
                self.warn_of_zeros()
        columns = torch.arange(width, dtype=torch.int64, device="cpu")[None]
        batch = PackedBatch.from_padded(None, mask, None, columns, shape=(height, width), lengths=lengths)
        indices = None if batch.indices is None else batch.indices.to(ids.device)

        def take(plane: Tensor | None) -> Tensor | None:
            flat = None if plane is None else plane.expand(height, width).reshape(-1)
            return flat if flat is None or indices is None else flat[indices]

        if positions is None and self.facts.positions == "after_padding_idx":
            positions = count_positions(self.module.embeddings.padding_idx, ids, None)
        return replace(
            batch,
            input_ids=take(ids),
            token_type_ids=take(given.get("token_type_ids")),
            positions=batch.positions if positions is None else take(positions),
            indices=indices,
        )
