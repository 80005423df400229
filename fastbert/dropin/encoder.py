"""The swap for transformers' encoders: unpad once, run the layers packed, pad once; and the heads that read padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from .. import functional as F
from ..graphs import CONTAINERS
from ..packing import PackedBatch
from . import facts as table
from .forward import TRACED, Forward
from .layer import LayerForward
from .pieces import (
    Shared,
    at,
    frozen_row,
    has,
    listeners,
    look_up,
    norm_only,
    plain,
    plain_table,
    probability,
)

# arguments that say nothing about what the encoder computes
IGNORED = {"return_dict", "output_hidden_states", "num_items_in_batch", "use_cache", "batch_size", "seq_len"}
INPUTS = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"}


class EncoderForward(Forward):
    """The encoder. What it cannot do, `type(encoder).forward` does for that call, with a warning that says why, once.

    `reads`: what the head above reads beyond the first column and the real tokens; see `HeadForward`.
    """

    reads: Tensor | str | None = None

    def __init__(self, encoder: nn.Module, facts: table.Family, impl: F.Impl | None):
        super().__init__(encoder)
        self.facts, self.impl = facts, impl
        # Modules that are walked past: whoever listens to one of them must be heard, so then the original runs.
        inner = [m for path, m in encoder.named_modules() if path and path.split(".")[0] != "pooler"]
        self.passed = [m for m in inner if not isinstance(m, CONTAINERS)]

    # ---- the parts ----

    def layers(self) -> Iterator[tuple[int, nn.Module]]:
        """(number of the pass, layer), in order; a shared layer comes as often as it runs."""
        layers = at(self.module, self.facts.layers)
        if not self.facts.groups:
            yield from enumerate(layers)
            return
        config, index = self.module.config, 0
        for i in range(config.num_hidden_layers):
            for layer in layers[int(i / (config.num_hidden_layers / config.num_hidden_groups))].albert_layers:
                yield index, layer
                index += 1

    # ---- what cannot be done ----

    def why_not(self, given: dict[str, Any]) -> str | None:
        """Why this call goes to the original, or None."""
        return TRACED if torch.jit.is_tracing() else self.why_not_model() or self.why_not_given(given)

    def why_not_model(self) -> str | None:
        """Why every call goes to the original: somebody changed the model, or wants to see inside."""
        if reason := self.who_listens():
            return reason
        for _, layer in self.layers():  # itself, or in a wrapper that calls it
            if not any(isinstance(module.__dict__.get("forward"), LayerForward) for module in layer.modules()):
                return f"a {type(layer).__name__} came in place of an accelerated layer"
        return None

    def why_not_given(self, given: dict[str, Any]) -> str | None:
        config = self.module.config
        for name, value in given.items():
            if name in INPUTS or name in IGNORED or value is None or value is False:
                continue
            return f"{name} was given"
        if getattr(config, "is_decoder", False) or getattr(config, "is_causal", False):
            return "the model is a decoder"
        if getattr(config, "output_attentions", False) and given.get("output_attentions") is None:
            return "the config asks for output_attentions"
        asked = self.asked(given, "output_hidden_states")
        if not isinstance(asked, (bool, type(None))) and not (isinstance(asked, list) and self.knows_single_states()):
            return "single hidden states were asked for"
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        if (ids is None) == (embeds is None):
            return "not exactly one of input_ids and inputs_embeds was given"
        shape, mask = (ids if embeds is None else embeds).shape[:2], given.get("attention_mask")
        if ids is not None and ids.dim() != 2:
            return f"input_ids are {ids.dim()}-dimensional"
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != shape):
            return "attention_mask is not [batch, tokens]"
        if given.get("position_ids") is not None and self.facts.positions == "rotary":
            return "position_ids were given to a model with rotary positions"
        if self.facts.position is not None and given.get("position_ids") is None:
            longest = self.longest()
            if longest is not None and shape[1] > longest:
                return f"{shape[1]} tokens may be more than the position table holds"
        return None

    def knows_single_states(self) -> bool:
        """Does this transformers return the states of a list of places, and count them as we do?"""
        from transformers.utils import output_capturing

        counted = len(list(self.layers())) == self.module.config.num_hidden_layers
        return counted and hasattr(output_capturing, "selected_hidden_states")

    def longest(self) -> int | None:
        """Tokens of the longest sequence that the position table allows; None where there is no table."""
        if self.facts.position is None:
            return None
        positions = at(self.module, self.facts.position)
        first = 0 if self.facts.positions == "column" else self.module.embeddings.padding_idx + 1
        return positions.num_embeddings - first if hasattr(positions, "num_embeddings") else None

    def who_listens(self) -> str | None:
        for module in self.passed:
            own = "forward" in module.__dict__
            if not own and not (
                module._forward_hooks
                or module._forward_pre_hooks
                or module._backward_hooks
                or module._backward_pre_hooks
            ):
                continue
            hooks = listeners(module)
            if own and isinstance(module.__dict__["forward"], LayerForward):
                # a layer is called, so the hooks that gather a sharded one do their work
                own, hooks = False, [h for h in hooks if not _module_of(h).startswith("torch.distributed")]
            # transformers' own hooks, which sleep unless the original runs
            hooks = [h for h in hooks if not _module_of(h).startswith("transformers.utils")]
            if own:
                return f"the forward of a {type(module).__name__} was replaced"
            if hooks and not isinstance(module, (nn.Linear, nn.Embedding, nn.LayerNorm)):  # those are called then
                return f"a {type(module).__name__} has a hook"
        return None

    def asked(self, given: dict[str, Any], name: str) -> Any:
        value = given.get(name)
        return getattr(self.module.config, name, False) if value is None else value

    # ---- the pass ----

    def __call__(self, *args, **kwargs):
        given = self.named(args, kwargs)
        reason = self.why_not(given)
        padding = reason is None and self.keeps_padding(given.get("attention_mask"))
        if padding:
            reason = self.why_not_padded(given["attention_mask"])
        if reason is not None:
            self.warn(reason)
            return self.original(*args, **kwargs)
        shared = self.pack(given, padding)
        hidden_states = [] if self.asked(given, "output_hidden_states") else None
        x = self.run(shared, given.get("inputs_embeds"), hidden_states)
        return self.finish(x, shared.batch, hidden_states or [], given)

    def run(self, shared: Shared, embeds: Tensor | None = None, hidden_states: list[Tensor] | None = None) -> Tensor:
        """The embeddings and the layers: x [T, C]. What goes into each layer is added to `hidden_states`,
        and what goes into the last LayerNorm where that is the last of them."""
        x = self.embed(shared, embeds)
        for index, layer in self.layers():
            if hidden_states is not None:
                hidden_states.append(x)
            x = layer(x, shared, index)
        if hidden_states is not None and not self.facts.last_state_normed:
            hidden_states.append(x)
        if self.facts.final_norm is not None:
            x = norm_only(x, at(self.module, self.facts.final_norm), shared)
        return x

    def finish(self, x: Tensor, batch: PackedBatch, hidden_states: list[Tensor], given: dict[str, Any]):
        """transformers' output of the last hidden state x [T, C], and of what went into each layer."""
        encoder, facts = self.module, self.facts
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.float()  # what the original's last LayerNorm returns
        last_hidden_state = batch.pad(x)
        fields = {"last_hidden_state": last_hidden_state}
        if getattr(encoder, "pooler", None) is not None:
            if facts.pooler_activation is None:
                fields["pooler_output"] = encoder.pooler(last_hidden_state)
            else:
                activation = at(encoder, facts.pooler_activation)
                fields["pooler_output"] = activation(encoder.pooler(last_hidden_state[:, 0]))
        if hidden_states:
            last = last_hidden_state
            if not facts.last_state_normed:
                *hidden_states, last = hidden_states
                last = batch.pad(last)
            count, asked = len(hidden_states) + 1, self.asked(given, "output_hidden_states")
            kept = range(count) if asked is True else {i % count for i in asked if -count <= i < count}
            states = (*(batch.pad(h) if i in kept else None for i, h in enumerate(hidden_states)), last)
            fields["hidden_states"] = states if count - 1 in kept else (*states[:-1], None)
        return self.output(fields, self.asked(given, "return_dict"))

    def output(self, fields: dict[str, Any], return_dict: bool):
        import transformers

        if not return_dict:
            keeps = self.facts.tuple_keeps_pooler or int(transformers.__version__.split(".")[0]) < 5
            if keeps and hasattr(self.module, "pooler"):
                fields.setdefault("pooler_output", None)
                return (fields.pop("last_hidden_state"), fields.pop("pooler_output"), *fields.values())
            return tuple(fields.values())
        return getattr(transformers.modeling_outputs, self.facts.output)(**fields)

    def keeps_padding(self, mask: Tensor | None) -> bool:
        """Would somebody miss what is computed at the padding of this mask [B, S]? Waits for the device.

        While a graph is traced nobody can tell: the number of real tokens is data, so padding stays.
        """
        if mask is None or torch.compiler.is_compiling():
            return mask is not None
        real = mask != 0
        if isinstance(self.reads, str):
            return not real.all()
        unseen = real[:, 0].all()  # the first column is read by poolers, classifiers and people
        if self.facts.relative:  # no holes, so that distances stay what they were
            unseen &= (real[:, 1:] <= real[:, :-1]).all()
        if self.reads is not None and self.reads.shape == real.shape:
            unseen &= ~(self.reads & ~real).any()
        return not unseen

    def why_not_padded(self, mask: Tensor) -> str | None:
        """A query that sees no key gives zero here and the mean of all values there; the original knows which."""
        if self.facts.positions == "rotary":
            return "padding that is read, or lies left of a token, under a sliding window"
        if not torch.compiler.is_compiling() and not (mask != 0).any(1).all():
            return "a sequence has no token"
        return None

    def pack(self, given: dict[str, Any], padding: bool) -> Shared:
        """The batch without its padding, or with it and a mask. While a graph is traced a full batch stays [B, S] too,
        so that its lengths are shapes and not data."""
        encoder, mask, positions = self.module, given.get("attention_mask"), given.get("position_ids")
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        rows, width = (ids if embeds is None else embeds).shape[:2]
        if positions is None and self.facts.positions == "after_padding_idx":
            positions = self.count_positions(ids, embeds)
        if embeds is not None and positions is None:
            positions = torch.arange(width, device=embeds.device)[None]
        batch = PackedBatch.from_padded(
            ids, None if padding else mask, given.get("token_type_ids"), positions, shape=(rows, width)
        )
        shared = Shared(
            batch,
            None,
            self.impl,
            padded=padding or (mask is None and torch.compiler.is_compiling()),
            infers=not (torch.is_grad_enabled() or torch.compiler.is_compiling() or encoder.training),
            mask=(mask != 0)[:, None, None, :].expand(rows, 1, width, width) if padding else None,
            **self.tables(width, batch.positions.device),
        )
        if not shared.padded:
            shared = shared.scheduled()
        if any(m.training for m in (self.module, *self.passed)):  # dropout may be on in a model that evaluates
            seed = torch.randint(2**62, (1,), device=batch.cu_seqlens.device)
            shared = replace(shared, seed=seed, row_ids=batch.row_ids())
        return shared

    def count_positions(self, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
        padding_idx = self.module.embeddings.padding_idx
        if ids is None:
            return torch.arange(padding_idx + 1, embeds.shape[1] + padding_idx + 1, device=embeds.device)[None]
        real = ids != padding_idx
        return real.cumsum(1) * real + padding_idx

    def tables(self, width: int, device: torch.device) -> dict[str, Any]:
        """What attention looks up by position, as far as `width`."""
        bias = {"bias": self.position_bias(width)}
        return bias | (self.rotary(width, device) if self.facts.positions == "rotary" else {})

    def position_bias(self, width: int) -> Tensor | None:
        if self.facts.bias is None:
            return None
        holder = at(self.module, self.facts.bias)
        like = holder.relative_attention_bias.weight.new_empty(1, width)
        return holder.compute_position_bias(like)

    def rotary(self, width: int, device: torch.device) -> dict[str, Any]:
        encoder, config = self.module, self.module.config
        columns, like = torch.arange(width, device=device)[None], torch.empty(0, device=device)
        facts = self.facts.layer
        one_of = {at(layer, facts.attention_type): layer for _, layer in self.layers()}
        half = at(next(iter(one_of.values())), facts.head_dim) // 2
        if facts.rotary is None:
            tables = {kind: encoder.rotary_emb(like, columns, kind) for kind in sorted(one_of)}
            reach = config.sliding_window
            windows = {kind: (reach, reach) if kind == "sliding_attention" else None for kind in one_of}
        else:  # a kind is its window, and minus one is no bound
            tables = {kind: at(layer, facts.rotary)(like, columns) for kind, layer in one_of.items()}
            windows = {kind: None if min(kind) < 0 else kind for kind in one_of}
        rotary = {kind: tuple(t[0, :, :half] for t in pair) for kind, pair in tables.items()}
        return {"rotary": rotary, "windows": windows}

    def embed(self, shared: Shared, embeds: Tensor | None) -> Tensor:
        """dropout(norm(word + position + segment)) [T, C], brought to the width of the layers."""
        encoder, facts, batch = self.module, self.facts, shared.batch
        word, norm = at(encoder, facts.word), at(encoder, facts.norm)
        position = None if facts.position is None else at(encoder, facts.position)
        segment = None if facts.token_type is None else at(encoder, facts.token_type)
        types = batch.token_type_ids
        if segment is not None and types is None:
            types = torch.zeros_like(batch.positions)
        p = probability(at(encoder, facts.dropout))

        tables = [t for t in (word, position, segment) if t is not None]
        if embeds is None and position is not None and all(map(plain_table, tables)) and plain(norm, nn.LayerNorm):
            x = F.embedding_layer_norm(
                batch.input_ids, types if segment is not None else None, batch.positions,
                word.weight, frozen_row(position), None if segment is None else frozen_row(segment),
                norm.weight, norm.bias, norm.eps,
                padding_idx=word.padding_idx, impl=shared.impl, **shared.dropout(p, stream=0),
            )  # fmt: skip
        else:
            x = look_up(word, batch.input_ids) if embeds is None else batch.unpad(embeds)
            if segment is not None:
                x = x + look_up(segment, types)
            if position is not None:
                x = x + look_up(position, batch.positions)
            x = nn.functional.dropout(norm_only(x, norm, shared), p)
        if facts.project is not None and has(encoder, facts.project):
            x = at(encoder, facts.project)(x)
        return x


class HeadForward(Forward):
    """A head that may read the encoder's output at padding: it says so, and the encoder then computes that too.

    A question answering head scores every token, padding too. Any other one with a label a token, that is [B, S],
    reads the tokens whose label counts.
    """

    def __init__(self, head: nn.Module, path: str):
        super().__init__(head)
        self.path = path  # of the encoder
        self.all_tokens = type(head).__name__.endswith("ForQuestionAnswering")

    def __call__(self, *args, **kwargs):
        labels = self.named(args, kwargs).get("labels")
        encoder = at(self.module, self.path).__dict__.get("forward")
        if not isinstance(encoder, EncoderForward):  # restored on its own, or another encoder came in its place
            return self.original(*args, **kwargs)
        if self.all_tokens:
            encoder.reads = "every token"
        elif isinstance(labels, Tensor) and labels.dim() == 2:
            encoder.reads = labels != -100
        try:
            return self.original(*args, **kwargs)
        finally:
            encoder.reads = None


def _module_of(hook: Any) -> str:
    return getattr(getattr(hook, "func", hook), "__module__", "") or ""
