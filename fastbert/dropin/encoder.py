"""The swap for transformers' encoders: unpad once, run the layers packed, pad once.

Only `forward` changes, as an attribute of the encoder, of its layers and of some heads; classes, parameters and
state_dict stay. A `forward` here keeps nothing but references, so a model with it can be copied, pickled and compiled,
and without it is what it was.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import CodeType
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from .. import functional as F
from ..layers import JoinedLinears
from ..packing import PackedBatch
from . import facts as table
from .pieces import (
    Shared,
    add_norm,
    at,
    feed_forward,
    frozen_row,
    has,
    linear_without_bias,
    listeners,
    look_up,
    norm_and_sum,
    norm_only,
    plain,
    plain_table,
    probability,
    project,
)

# arguments that say nothing about what the encoder computes
IGNORED = {"return_dict", "output_hidden_states", "num_items_in_batch", "use_cache"}
# torch.jit.trace records the branches of one batch, and which branch packs depends on the batch
TRACED = "torch.jit.trace is at work"
INPUTS = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"}


class Forward:
    """A `forward` of one module, in place of its class's."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.warned: dict[str, int] = {}
        signature = inspect.signature(type(module).forward)
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.names = [p.name for p in signature.parameters.values() if p.kind in kinds][1:]

    @property
    def __signature__(self) -> inspect.Signature:
        """The original's: Trainer and others read from it what a model takes."""
        return inspect.signature(type(self.module).forward.__get__(self.module))

    @property
    def __code__(self) -> CodeType:
        """The original's: torch.export names the place in the source by it."""
        return type(self.module).forward.__code__

    def put(self) -> None:
        """In place of the class's `forward`, until `remove`."""
        self.module.forward = self
        self.module._replicate_for_data_parallel = self.replicate

    def remove(self) -> None:
        del self.module.forward
        del self.module._replicate_for_data_parallel

    def replicate(self) -> nn.Module:
        """nn.DataParallel's replica of the module: the class's own, and a `forward` that looks at the replica.

        torch copies `__dict__`, so without this a replica would run the modules of the first device.
        """
        replica = type(self.module)._replicate_for_data_parallel(self.module)
        self.over(replica).put()
        return replica

    def over(self, replica: nn.Module) -> Forward:
        """This `forward` for another module; what it has warned of is shared."""
        forward = copy.copy(self)
        forward.module = replica
        return forward

    def original(self, *args, **kwargs):
        return type(self.module).forward(self.module, *args, **kwargs)

    def named(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    def warn(self, reason: str) -> None:
        if reason not in self.warned and not torch.compiler.is_compiling():
            warnings.warn(
                f"{type(self.module).__name__}: {reason}, so fastbert leaves this call to the model's own code",
                stacklevel=4,
            )
        if not torch.compiler.is_compiling():
            self.warned[reason] = self.warned.get(reason, 0) + 1

    def __call__(self, *args, **kwargs):
        raise TypeError(f"{type(self).__name__} has no forward")


class LayerForward(Forward):
    """One layer: given what the layers share it runs on [T, C], given anything else it is the original."""

    def __init__(self, layer: nn.Module, facts: table.Layer):
        super().__init__(layer)
        self.facts = facts
        self.joined = JoinedLinears()

    def over(self, replica: nn.Module) -> LayerForward:
        forward = super().over(replica)
        forward.joined = JoinedLinears()  # of the replica's weights
        return forward

    def __call__(self, *args, **kwargs):
        if not (len(args) == 3 and isinstance(args[1], Shared)):
            return self.original(*args, **kwargs)
        layer, (x, shared, index) = self.module, args
        run = partial(self.pre_norm if self.facts.pre_norm else self.post_norm, shared=shared, index=index)
        if getattr(layer, "gradient_checkpointing", False) and layer.training:
            return layer._gradient_checkpointing_func(run, x)
        return run(x)

    def attention(self, x: Tensor, shared: Shared, index: int, kind: str | None = None) -> tuple[Tensor, Tensor | None]:
        """(attention of x [T, C] through its output layer, that layer's bias where it is still to be added)."""
        layer, facts = self.module, self.facts
        q, k, v = project(x, [at(layer, path) for path in facts.qkv], self.joined, at(layer, facts.head_dim))
        dropout = at(layer, facts.probs_dropout)
        p = probability(dropout) if isinstance(dropout, nn.Module) else dropout * layer.training
        o = shared.attend(q, k, v, p, index + 1, kind)
        return linear_without_bias(at(layer, facts.out), o, fold=layer.training)

    def feed_forward(self, x: Tensor, shared: Shared, fold: bool) -> tuple[Tensor, Tensor | None]:
        layer, facts = self.module, self.facts
        return feed_forward(
            x, at(layer, facts.up), at(layer, facts.activation), at(layer, facts.down), shared.impl,
            gated=facts.gated, inner_dropout=self.probability(facts.inner_dropout), fold=fold,
        )  # fmt: skip

    def probability(self, path: str | None) -> float:
        return 0.0 if path is None else probability(at(self.module, path))

    def post_norm(self, x: Tensor, shared: Shared, index: int) -> Tensor:
        """x = norm(x + attention(x)); x = norm(x + feed_forward(x))."""
        layer, facts = self.module, self.facts
        y, bias = self.attention(x, shared, index)
        x = add_norm(
            y, bias, x, at(layer, facts.out_norm), self.probability(facts.out_dropout), shared, stream=2 * index + 1
        )
        y, bias = self.feed_forward(x, shared, fold=layer.training)
        return add_norm(
            y, bias, x, at(layer, facts.down_norm), self.probability(facts.down_dropout), shared, stream=2 * index + 2
        )

    def pre_norm(self, x: Tensor, shared: Shared, index: int) -> Tensor:
        """x = x + attention(norm(x)); x = x + feed_forward(norm(x))."""
        layer, facts = self.module, self.facts
        y, bias = self.attention(norm_only(x, at(layer, facts.out_norm), shared), shared, index, layer.attention_type)
        h, x = norm_and_sum(
            y, bias, x, at(layer, facts.down_norm), self.probability(facts.out_dropout), shared, stream=2 * index + 1
        )
        return x + self.feed_forward(h, shared, fold=False)[0]


class EncoderForward(Forward):
    """The encoder. What it cannot do, `type(encoder).forward` does for that call, with a warning that says why, once.

    `reads`: what the head above reads beyond the first column and the real tokens; see `HeadForward`.
    """

    reads: Tensor | str | None = None

    def __init__(self, encoder: nn.Module, facts: table.Family, impl: F.Impl | None):
        super().__init__(encoder)
        self.facts, self.impl = facts, impl
        # Modules that are walked past: whoever listens to one of them must be heard, so then the original runs.
        self.passed = [m for path, m in encoder.named_modules() if path and path.split(".")[0] != "pooler"]

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
        encoder, config = self.module, self.module.config
        if torch.jit.is_tracing():
            return TRACED
        if reason := self.who_listens():
            return reason
        for name, value in given.items():
            if name in INPUTS or name in IGNORED or value is None or value is False:
                continue
            return f"{name} was given"
        if getattr(config, "is_decoder", False) or getattr(config, "is_causal", False):
            return "the model is a decoder"
        if getattr(config, "output_attentions", False) and given.get("output_attentions") is None:
            return "the config asks for output_attentions"
        if not isinstance(self.asked(given, "output_hidden_states"), (bool, type(None))):
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
            positions = at(encoder, self.facts.position)
            first = 0 if self.facts.positions == "column" else encoder.embeddings.padding_idx + 1
            if hasattr(positions, "num_embeddings") and shape[1] + first > positions.num_embeddings:
                return f"{shape[1]} tokens may be more than the position table holds"
        for _, layer in self.layers():  # itself, or in a wrapper that calls it
            if not any(isinstance(module.__dict__.get("forward"), LayerForward) for module in layer.modules()):
                return f"a {type(layer).__name__} came in place of an accelerated layer"
        return None

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

        encoder, facts = self.module, self.facts
        shared = self.pack(given, padding)
        batch = shared.batch
        x = self.embed(given, shared)
        keep, hidden_states = self.asked(given, "output_hidden_states"), []
        for index, layer in self.layers():
            if keep:
                hidden_states.append(x)
            x = layer(x, shared, index)
        if facts.final_norm is not None:
            x = norm_only(x, at(encoder, facts.final_norm), shared)

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
        if keep:
            fields["hidden_states"] = (*map(batch.pad, hidden_states), last_hidden_state)
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
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        rows, width = (ids if embeds is None else embeds).shape[:2]
        if positions is None and self.facts.positions == "after_padding_idx":
            positions = self.count_positions(ids, embeds)
        if embeds is not None and positions is None:
            positions = torch.arange(width, device=embeds.device)[None]
        batch = PackedBatch.from_padded(
            ids, None if padding else mask, given.get("token_type_ids"), positions, shape=(rows, width)
        )
        padded = padding or (mask is None and torch.compiler.is_compiling())
        shared = Shared(
            batch,
            None if padded else F.attention_schedule(batch.cu_seqlens, batch.total_tokens, self.impl),
            self.impl,
            padded=padded,
            mask=(mask != 0)[:, None, None, :].expand(rows, 1, width, width) if padding else None,
            bias=self.position_bias(width),
        )
        if self.facts.positions == "rotary":
            shared = replace(shared, **self.rotary(width, batch.positions.device))
        if self.module.training:
            seed = torch.randint(2**62, (1,), device=batch.cu_seqlens.device)
            shared = replace(shared, seed=seed, row_ids=batch.row_ids())
        return shared

    def count_positions(self, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
        padding_idx = self.module.embeddings.padding_idx
        if ids is None:
            return torch.arange(padding_idx + 1, embeds.shape[1] + padding_idx + 1, device=embeds.device)[None]
        real = ids != padding_idx
        return real.cumsum(1) * real + padding_idx

    def position_bias(self, width: int) -> Tensor | None:
        if self.facts.bias is None:
            return None
        holder = at(self.module, self.facts.bias)
        like = holder.relative_attention_bias.weight.new_empty(1, width)
        return holder.compute_position_bias(like)

    def rotary(self, width: int, device: torch.device) -> dict[str, Any]:
        encoder, config = self.module, self.module.config
        columns, like = torch.arange(width, device=device)[None], torch.empty(0, device=device)
        kinds = sorted({layer.attention_type for _, layer in self.layers()})
        half = at(next(iter(self.layers()))[1], self.facts.layer.head_dim) // 2
        tables = {kind: encoder.rotary_emb(like, columns, kind) for kind in kinds}
        reach = config.sliding_window
        return {
            "rotary": {kind: tuple(t[0, :, :half] for t in pair) for kind, pair in tables.items()},
            "windows": {kind: (reach, reach) if kind == "sliding_attention" else None for kind in kinds},
        }

    def embed(self, given: dict[str, Any], shared: Shared) -> Tensor:
        """dropout(norm(word + position + segment)) [T, C], brought to the width of the layers."""
        encoder, facts, batch = self.module, self.facts, shared.batch
        word, norm = at(encoder, facts.word), at(encoder, facts.norm)
        position = None if facts.position is None else at(encoder, facts.position)
        segment = None if facts.token_type is None else at(encoder, facts.token_type)
        types = batch.token_type_ids
        if segment is not None and types is None:
            types = torch.zeros_like(batch.positions)
        p = probability(at(encoder, facts.dropout))
        embeds = given.get("inputs_embeds")

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
