"""The swap for transformers' encoders: unpad once, run the layers packed, pad once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from .. import functional as F
from ..packing import PackedBatch
from ..stack.description import Layer
from ..stack.layer import FEW_TOKENS, in_one, in_one_call, is_one_call_ahead
from ..stack.shared import UNBOUNDED, Pass
from ..stack.steps import norm_only
from . import facts as table
from .checks import blind_is_zero
from .embeddings import count_positions, embeddings, pooled_columns, pooled_output, position_tables
from .facts import at
from .forward import InspectedForward, count, forward_of
from .inspection import Seen, Settings, inspect, settings_of
from .kinds import kind_of, windows_of
from .layer import LayerForward
from .once import only_once
from .original import tensor_hooks, why_not_here
from .padding import ABOVE, BEFORE, EXACT, FULL, OTHERS, WINDOW, Policy, Rows, only_wanted, reading_now, rows_to_compute
from .parts import layers_of, part, probability_at

# arguments that do not change what the encoder computes
IGNORED = {"return_dict", "output_hidden_states", "num_items_in_batch", "use_cache", "batch_size", "seq_len"}
# What sentence-transformers' modules write into the features of a batch. Losses pass the same features to a model
# again, so these reach the encoder, which does not read them.
FEATURES = {
    "token_embeddings", "all_layer_embeddings", "cls_token_embeddings", "token_weights_sum", "sentence_embedding",
    "scores",
}  # fmt: skip
INPUTS = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"}


class EncoderForward(InspectedForward):
    """The `forward` of an encoder. A call that the fused code cannot take runs the original's code; the first such call
    warns of each reason.

    Args:
        padding: see `accelerate`.
        bare: whether the model is the encoder itself or a wrapper of it, so that the user's code reads its output.

    Attributes:
        computed: reason why padding was computed -> number of calls.
    """

    def __init__(
        self, encoder: nn.Module, facts: table.Family, impl: F.Impl | None, padding: Policy = "auto", bare: bool = True
    ):
        super().__init__(encoder)
        self.facts, self.impl, self.padding, self.bare = facts, impl, padding, bare
        self.computed: dict[str, int] = {}

    # ---- the parts ----

    def layers(self) -> Iterator[tuple[int, nn.Module]]:
        return layers_of(self.module, self.facts)

    def look(self) -> Seen:
        if torch.compiler.is_compiling():
            *found, drops = constants(self)
            return Seen(None, *found, settings_of(self.module, self.facts), drops)
        return super().look()

    def inspect(self) -> Seen:
        return inspect(self.module, self.facts, is_layer)

    # ---- calls that the original's code runs ----

    def why_not(self, given: dict[str, Any]) -> tuple[str | None, Seen | None]:
        """(why the original's code runs this call, or None; the inspection, or None if there was none)."""
        if reason := why_not_here(given):  # before `look`, whose operators a dispatch mode would record
            return reason, None
        seen = self.look()
        return seen.reason or self.why_not_given(given, seen.settings), seen

    def why_not_given(self, given: dict[str, Any], settings: Settings) -> str | None:
        for name, value in given.items():
            if name in INPUTS or name in IGNORED or name in FEATURES or value is None or value is False:
                continue
            if self.facts.called is not None and name in self.facts.called:
                continue
            return f"{name} was given"
        if settings.decodes:
            return "the model is a decoder"
        if self.facts.decoder and (why := self.why_not_decoded(given)):
            return why
        if self.facts.layerdrop is not None and self.module.training and at(self.module, self.facts.layerdrop) > 0:
            return "it leaves out layers at random in training (layerdrop)"
        if self.facts.position_class is not None and given.get("position_ids") is not None:
            return "position_ids were given, which it does not read"
        if self.facts.refuses_cache and given.get("use_cache") is True:
            return "use_cache=True was given"
        if self.facts.half_clamped and (why := self.why_not_clamped(given.get("inputs_embeds"))):
            return why
        if settings.attentions and given.get("output_attentions") is None:
            return "the config asks for output_attentions"
        default = getattr(self.module.config, "return_dict", True)
        returns = given.get("return_dict", default)
        if not isinstance(returns, bool) and (returns is not None or default is not True):
            return "return_dict is neither True nor False"  # models differ in what they return then
        asked = given.get("output_hidden_states")
        asked = settings.states if asked is None else asked
        if not isinstance(asked, (bool, type(None))) and not (isinstance(asked, list) and self.knows_single_states()):
            return "output_hidden_states names single states"
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        if (ids is None) == (embeds is None):
            return "not exactly one of input_ids and inputs_embeds was given"
        if ids is None and self.facts.pooled is not None:
            return "there are no input_ids"
        shape, mask = (ids if embeds is None else embeds).shape[:2], given.get("attention_mask")
        if ids is not None and ids.dim() != 2:
            return f"input_ids are {ids.dim()}-dimensional"
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != shape):
            return "attention_mask is not [batch, tokens]"
        if given.get("position_ids") is not None and self.facts.positions == "rotary":
            return "position_ids were given to a model with rotary positions"
        if settings.longest is not None and shape[1] > settings.longest and given.get("position_ids") is None:
            return f"{shape[1]} tokens may be more than the position table holds"
        return None

    def why_not_decoded(self, given: dict[str, Any]) -> str | None:
        if given.get("is_causal") is not None:
            return "is_causal was given"
        module = self.module
        checkpoints = getattr(module, "gradient_checkpointing", False) and module.training and torch.is_grad_enabled()
        if self.asked(given, "use_cache") and not checkpoints:
            return "it returns a cache, which use_cache=False turns off"
        return None

    def why_not_clamped(self, embeds: Tensor | None) -> str | None:
        """The original clamps values that overflow in float16, and casts between the dtypes of its layers."""
        first, facts = next(self.layers())[1], self.facts.layer
        like = at(self.module, self.facts.word).weight if embeds is None else embeds
        dtypes = {getattr(at(first, path), "weight", like).dtype for path in (facts.up, facts.down)} | {like.dtype}
        if torch.float16 in dtypes:
            return "it is in float16, in which it clamps values that overflow"
        return None if len(dtypes) == 1 else "its layers are of several dtypes"

    def knows_single_states(self) -> bool:
        """Whether the installed transformers returns hidden states by a list of numbers, numbered as here."""
        from transformers.utils import output_capturing

        counted = len(list(self.layers())) == self.module.config.num_hidden_layers
        return counted and hasattr(output_capturing, "selected_hidden_states")

    def asked(self, given: dict[str, Any], name: str) -> Any:
        value = given.get(name)
        return getattr(self.module.config, name, False) if value is None else value

    # ---- padding ----

    def rows(self, mask: Tensor | None, ids: Tensor | None, seen: Seen) -> Rows:
        """Which rows are computed. Under torch.compile all of them, since the number of tokens depends on data."""
        if mask is None:
            return FULL
        if torch.compiler.is_compiling():
            reach, causal = self.reach()
            return Rows(mask != 0, None, BEFORE if causal else None if reach is None else WINDOW)
        reads, others, why = self.padding_reads(mask, ids, seen)
        unknown = self.is_reader_unknown(reads)
        reads, why = self.with_pooled(reads, why, ids)
        rows, by_others = self.rows_of(mask, reads, others)
        if rows.padding and rows.reason is None:
            count(self.computed, OTHERS if by_others else why)
        elif rows.queries is not None and unknown:
            self.warn_of_zeros()
        return rows

    def with_pooled(self, reads: bool | Tensor, why: str, ids: Tensor) -> tuple[bool | Tensor, str]:
        """`reads` with the rows that the encoder's own pooled output is made of, and the reason."""
        if self.facts.pooled is None or reads is True:
            return reads, why
        columns = torch.arange(ids.shape[1], dtype=torch.int64, device=ids.device)
        rows = columns == pooled_columns(self.module, self.facts, ids)[:, None]
        return rows | reads, why or "its pooled output is made of a masked token"

    def padding_reads(self, mask: Tensor, ids: Tensor | None, seen: Seen) -> tuple[bool | Tensor, Tensor | None, str]:
        """`reads` and `others` of `rows_to_compute`, and the reason for `reads`."""
        reads, why = self.reads(seen)
        if not self.is_reader_unknown(reads):
            return reads, None, why
        padding = getattr(self.module.config, "pad_token_id", None)
        if self.facts.pooled is not None:  # their tokenizers pad with other tokens than the config says
            padding = ids[:, -1:]
        if ids is None or padding is None:  # any token may be masked
            return reads, torch.ones_like(mask, dtype=torch.bool), why
        return reads, ids != padding, why

    def is_reader_unknown(self, reads: bool | Tensor) -> bool:
        """Whether the user's own code reads the output, so that it is not known which rows of padding it reads."""
        return reads is False and self.padding == "auto" and self.bare and reading_now() is None

    def reads(self, seen: Seen) -> tuple[bool | Tensor, str]:
        """(which rows of padding are read: all, none, or those of a [B, S] bool; the reason)."""
        if self.padding == "exact":
            return True, EXACT
        if seen.whole is not None or seen.pools is not None:
            return True, f"{seen.whole or seen.pools}, which may look at more than one token"
        now = reading_now()
        if self.padding == "zero":
            return (False, "") if now is None else (now.needs, now.why)
        if tensor_hooks(self.module, sharded=True):
            return True, f"a hook on the {type(self.module).__name__} sees it"
        if now is not None:
            return now.rows, now.why
        return (False, "") if self.bare else (True, ABOVE)

    def rows_of(self, mask: Tensor, reads: bool | Tensor, others: Tensor | None) -> tuple[Rows, bool]:
        reach, causal = self.reach()
        facts, zeros = self.facts, (causal or reach is not None) and blind_is_zero(self.module)
        return rows_to_compute(
            mask, reads, others, facts.relative, reach, causal, facts.first_column, zeros, facts.zero_or_one
        )

    def reach(self) -> tuple[int | None, bool]:
        """(the smallest window of a layer to the left, None if no layer has one; whether tokens see no later ones)."""
        if not self.facts.layer.looks_back and (
            self.facts.positions != "rotary" or (self.facts.layer.rotates and not self.facts.decoder)
        ):
            return None, False
        one_of = {kind_of(layer, self.facts.layer): layer for _, layer in self.layers()}
        windows = [window for window in windows_of(self.module, self.facts, one_of).values() if window is not None]
        bounded = [left for left, _ in windows if left < UNBOUNDED]
        reach = min(bounded) if bounded else None  # torch.compile does not support min(..., default=...)
        return reach, any(right == 0 for _, right in windows)

    # ---- the pass ----

    def call(self, *args, **kwargs):
        given, rows = self.named(args, kwargs), FULL
        reason, seen = self.why_not(given)
        if reason is None:
            rows = self.rows(given.get("attention_mask"), given.get("input_ids"), seen)
            reason = rows.reason
        if reason is not None:
            self.warn(reason)
            output = self.original(*args, **kwargs)
            if isinstance(output, tuple):
                return (only_wanted(output[0]), *output[1:])
            output["last_hidden_state"] = only_wanted(output["last_hidden_state"])
            return output
        shared = self.pack(given, rows, seen)
        wanted = self.wanted(given)
        first_only = wanted is None and self.is_read_first_alone(shared, seen)
        x, states = self.run(shared, seen, given, wanted, first_only)
        return self.finish(x[:, None] if first_only else shared.batch.pad(x), states, given)

    def is_read_first_alone(self, shared: Pass, seen: Seen) -> bool:
        """Whether only the first token of each sequence is read of the last layer's output: a known head calls, it
        returns no hidden states, and there is no hook. A post-norm layer then computes no other tokens."""
        if torch.compiler.is_compiling():  # heads declare nothing then
            return False
        now = reading_now()
        if now is None or not now.first or self.padding == "exact" or F.is_batch_invariant():
            return False
        if not shared.is_plain() or seen.layers is None or seen.whole is not None or seen.pools is not None:
            return False
        if self.facts.final_norm is not None:  # a pre-norm model
            return False
        return not tensor_hooks(self.module, sharded=True)

    def wanted(self, given: dict[str, Any]) -> set[int] | None:
        """The numbers of the hidden states that the call returns; None if it returns none."""
        asked = self.asked(given, "output_hidden_states")
        if not asked:
            return None
        count = len(list(self.layers())) + 1
        return set(range(count)) if asked is True else {i % count for i in asked if -count <= i < count}

    def run(
        self, shared: Pass, seen: Seen, given: dict[str, Any], wanted: set[int] | None = None,
        first_only: bool = False,
    ) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
        """(x, states) of the embeddings and the layers: x [T, C], or with `first_only` the first token's row of each
        sequence [B, C]. states: the input [B, S, C] of each layer, None if its number is not in `wanted`; and the input
        of the last norm if that is the last hidden state."""
        states: list[Tensor | None] = []

        def shown(x: Tensor) -> Tensor:
            state = None
            if wanted is not None and len(states) in wanted:
                state, x = shared.state(x)
            states.append(state)
            return x

        x = embeddings(self.module, self.facts, shared, seen, given)
        layers, to_first = list(self.layers()), None  # to_first: number of the layer that computes first tokens only
        if wanted is None and shared.infers:
            but_last = first_only and shared.batch.total_tokens > FEW_TOKENS
            y = in_one_call(x, self.in_order(seen)[: len(layers) - but_last], shared)
            if y is not None:
                x, layers = y, layers[-1:] if but_last else []
        if first_only and layers:
            to_first = layers[-1][0]
        for index, layer in layers:
            x = layer(shown(x), replace(shared, first_only=True) if index == to_first else shared, index)
        if first_only and to_first is None:
            x = x[shared.batch.first_tokens]
        if not self.facts.last_state_normed:
            x = shown(x)
        if self.facts.final_norm is not None:
            norm = part(self.module, self.facts.final_norm, seen.final_norm, self.facts.layer.norm)
            x = norm_only(x, norm, shared)
        if self.facts.final_dropout is not None:
            p = probability_at(self.module, self.facts.final_dropout)
            x = shared.drop(x, p, stream=2 * len(list(self.layers())) + 1)
        return only_once(x, self.impl), states

    def in_order(self, seen: Seen) -> list[Layer | None]:
        """The descriptions of the layers in the order of execution; None for a layer in a wrapper, which has to be
        called."""
        return [seen.layers.get(layer) for _, layer in self.layers()]

    def may_run_in_one_call(self) -> bool:
        """Whether all layers of some batch run in one C++ call; the smallest batch is tried, of one token."""
        parameter, seen = next(self.module.parameters()), self.look()
        if seen.reason is not None or self.facts.relative:
            return False
        stack = in_one(self.in_order(seen))
        width = 0 if stack is None else stack[0][0].shape[1]
        return width > 0 and is_one_call_ahead(
            width * parameter.itemsize, parameter.dtype, parameter.device, self.impl
        )  # fmt: skip

    def finish(self, last_hidden_state: Tensor, states: list[Tensor | None], given: dict[str, Any]):
        """transformers' output object. last_hidden_state: [B, S, C], or [B, 1, C] if only its first column is read;
        states: those of `run`."""
        encoder, facts = self.module, self.facts
        if last_hidden_state.is_cuda and torch.is_autocast_enabled("cuda") and last_hidden_state.dtype != torch.float64:
            last_hidden_state = last_hidden_state.float()  # the original's last LayerNorm returns float32
        fields = {"last_hidden_state": last_hidden_state}
        if facts.pooled is not None:
            fields["pooler_output"] = pooled_output(encoder, facts, last_hidden_state, given["input_ids"])
        elif getattr(encoder, "pooler", None) is not None:
            if facts.pooler_activation is None:
                fields["pooler_output"] = encoder.pooler(last_hidden_state)
            else:
                activation = at(encoder, facts.pooler_activation)
                fields["pooler_output"] = activation(encoder.pooler(last_hidden_state[:, 0]))
        wanted = self.wanted(given)
        if wanted is not None:
            if facts.last_state_normed:
                states = [*states, last_hidden_state if len(states) in wanted else None]
            fields["hidden_states"] = tuple(states)
        fields["last_hidden_state"] = only_wanted(last_hidden_state)
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

    def pack(self, given: dict[str, Any], rows: Rows, seen: Seen) -> Pass:
        """The batch of the rows that are computed. Under torch.compile even a batch without padding stays [B, S], so
        that its lengths are shapes rather than data."""
        ids, embeds, positions = given.get("input_ids"), given.get("inputs_embeds"), given.get("position_ids")
        height, width = (ids if embeds is None else embeds).shape[:2]
        if positions is None and self.facts.positions == "after_padding_idx":
            positions = count_positions(self.module.embeddings.padding_idx, ids, embeds)
        if embeds is not None and positions is None:
            positions = torch.arange(width, dtype=torch.int64, device=embeds.device)[None]
        types = given.get("token_type_ids") if self.facts.called is None else None
        batch = PackedBatch.from_padded(
            ids, rows.queries, types, positions, shape=(height, width), lengths=rows.lengths
        )
        compiling, trains = torch.compiler.is_compiling(), torch.is_grad_enabled()
        impl = F.choose_impl(self.impl, batch.positions.device)
        # Attention over all rows takes one call with a mask. Triton kernels instead take the keys of each sequence.
        everywhere = compiling or self.facts.relative or impl != "triton"
        masked = rows.padding and rows.queries is None and everywhere
        shared = Pass(
            batch,
            None,
            self.impl,
            padded=masked or (rows.real is None and compiling),
            infers=not (trains or compiling or self.module.training),
            mask=rows.real[:, None, None, :].expand(height, 1, width, width) if masked else None,
            layers=seen.layers,
            twice=trains and not compiling and impl == "native" and self.is_eager(),
            **position_tables(self.module, self.facts, width, batch.positions.device),
        )
        if rows.padding and not masked:
            shared = shared.over_keys(rows.real, rows.keys, impl)
        elif not shared.padded:
            shared = shared.scheduled()
        return shared.dropping() if (seen.drops if compiling else self.drops(seen)) else shared

    def is_eager(self) -> bool:
        """Whether the original computes attention by plain products, which can be differentiated twice."""
        return self.module.config._attn_implementation in ("eager", None)

    def drops(self, seen: Seen) -> bool:
        """Whether a dropout is on. If not, no seed is drawn from torch's generator, as in the original."""
        if not any(module.training for module in seen.dropouts):
            return False
        if self.facts.dropout is not None and probability_at(self.module, self.facts.dropout):
            return True
        return any(any(layer.__dict__["forward"].drops()) for layer in seen.layers)


def is_layer(module: nn.Module) -> bool:
    return isinstance(forward_of(module), LayerForward)


@torch.compiler.assume_constant_result
def constants(forward: EncoderForward) -> tuple:
    """The fields of `Seen` that are constants under torch.compile: without modules, `watch` and `settings`."""
    seen = forward.inspect()
    drops = seen.reason is None and forward.drops(seen)
    return seen.reason, seen.whole, seen.pools, (), None, seen.tables, seen.norm, seen.final_norm, seen.project, drops
