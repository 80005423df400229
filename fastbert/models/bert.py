"""BERT on one page: embeddings, a stack of layers, a pooler. Devlin et al., arXiv:1810.04805.

Parameter names are transformers', so a `state_dict` loads in either library. The layers compute no padding: the input
is packed once, every layer takes and gives [T, C], and the output is padded again if the input was padded.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor

from .. import functional as F
from ..config import BertConfig
from ..inference.weights import FusedLinears, JoinedLinears, is_untouched
from ..packing import PackedBatch
from ..stack.description import Drops, Kept, Layer, Part, part_of
from ..stack.layer import (
    FEW_TOKENS,
    all_in_8_bits,
    in_one,
    in_one_call,
    in_one_node,
    is_one_call_ahead,
    run,
    run_for_first,
)
from ..stack.shared import Pass
from ..stack.steps import multiply, norm_only
from .loading import initialise
from .outputs import BertOutput
from .pretrained import PretrainedEncoder


class BertEmbeddings(nn.Module):
    """dropout(LayerNorm(word + segment + position))."""

    def __init__(self, config: BertConfig):
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout_p = config.hidden_dropout_prob

    def forward(self, shared: Pass, inputs_embeds: Tensor | None = None) -> Tensor:
        word, position, segment = self.word_embeddings, self.position_embeddings, self.token_type_embeddings
        norm, batch = part_of(self.LayerNorm, nn.LayerNorm), shared.batch
        dropout = shared.dropout(self.dropout_p, stream=0) if self.training else {}
        # without token_type_ids every token belongs to segment 0
        types = torch.zeros_like(batch.positions) if batch.token_type_ids is None else batch.token_type_ids
        tables_are_plain = all(is_untouched(table, nn.Embedding) for table in (word, position, segment))
        if inputs_embeds is None and not (tables_are_plain and norm.plain):
            inputs_embeds = word(batch.input_ids)
        if inputs_embeds is None:
            assert batch.input_ids is not None  # a batch without ids comes with embeddings
            own = self.LayerNorm
            return F.embedding_layer_norm(
                batch.input_ids, types, batch.positions, word.weight, position.weight, segment.weight,
                own.weight, own.bias, own.eps, padding_idx=word.padding_idx, impl=shared.impl, **dropout,
            )  # fmt: skip
        x = norm_only(inputs_embeds + segment(types) + position(batch.positions), norm, shared)
        return F.dropout(x, **dropout, impl=shared.impl) if dropout else x


@cache
def _activation_part(name: str) -> Part:
    return Part(partial(F.activate, activation=name), plain=False)


class BertLayer(nn.Module):
    """x = LayerNorm(x + attention(x)); x = LayerNorm(x + feed_forward(x)), with the paper's dropouts."""

    def __init__(self, config: BertConfig, index: int):
        super().__init__()
        width, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps

        def block_end(width_in: int) -> nn.ModuleDict:
            return nn.ModuleDict({"dense": nn.Linear(width_in, width), "LayerNorm": nn.LayerNorm(width, eps=eps)})

        self.heads = config.heads_of(index)
        inside = self.heads * config.head_dim  # smaller than width if heads are pruned
        with warnings.catch_warnings():
            # Of a layer without heads these matrices have no elements, as a checkpoint has them too.
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors", category=UserWarning)
            qkv = FusedLinears({name: nn.Linear(width, inside) for name in ("query", "key", "value")})
            self.attention = nn.ModuleDict({"self": qkv, "output": block_end(inside)})
        for p in self.attention.parameters():
            p.requires_grad_(p.numel() > 0)  # DDP waits for the gradient of every parameter that is trained
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = block_end(inner)
        self.config, self.index = config, index

    def described(self, impl: F.Impl | None) -> Layer:
        """The layer's present description. Modules with hooks, or of other classes than torch's, are marked to be
        called as modules."""
        # Modules are read from the dictionaries, because attribute access of nn.Module takes ten times as long.
        parts: dict[str, Any] = self._modules
        attention = parts["attention"]._modules
        qkv, output, last = attention["self"], attention["output"]._modules, parts["output"]._modules
        name = self.config.activation
        if part_of(qkv, FusedLinears).plain:
            projections, joined = tuple(part_of(m, nn.Linear) for m in qkv._modules.values()), qkv.joined_linears
        else:
            projections, joined = (Part(partial(qkv, impl=impl), plain=False),), JoinedLinears()
        # Positional arguments take half the time of keywords.
        return Layer(
            projections,
            part_of(output["dense"], nn.Linear),
            part_of(output["LayerNorm"], nn.LayerNorm),
            part_of(parts["intermediate"]._modules["dense"], nn.Linear),
            _activation_part(name),
            part_of(last["dense"], nn.Linear),
            part_of(last["LayerNorm"], nn.LayerNorm),
            name,
            self.config.head_dim,
            joined,
            has_heads=self.heads > 0,
        )

    def tensors(self) -> list[Tensor] | None:
        """The fields of `functional.LayerWeights`; None if a module of the layer has to be called as a module."""
        return self.described(None).tensors()

    def qkv(self, x: Tensor, impl: F.Impl | None) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, C] -> q, k, v [T, H, D], strided views of one product."""
        return self.attention["self"](x, impl).unflatten(-1, (3, self.heads, self.config.head_dim)).unbind(1)

    def forward(self, x: Tensor, shared: Pass, first_only: bool = False) -> Tensor:
        """x [T, C] -> [T, C]; with `first_only` only the row of each sequence's first token, [B, C]."""
        walk = run_for_first if first_only else run
        known = None if shared.layers is None else shared.layers.get(self)
        described = known or self.described(shared.impl)
        return walk(x, described, self.drops(shared), shared, self.index, self.training)

    def drops(self, shared: Pass) -> Drops:
        """The dropouts that are on. A single layer may be in evaluation mode while the model is in training mode."""
        hidden_p, probs_p = self.config.hidden_dropout_prob, self.config.attention_probs_dropout_prob
        return Drops(probs_p, hidden_p, 0.0, hidden_p) if self.training and shared.seed is not None else Drops()

    def probabilities(self, x: Tensor, shared: Pass) -> Tensor:
        """Attention probabilities [B, H, S, S] of this layer for its input x [T, C], zero at padding, by plain
        torch."""
        batch = shared.batch
        q, k, _ = (batch.pad(t).transpose(1, 2) for t in self.qkv(x, shared.impl))
        real = batch.pad(torch.ones(x.shape[0], 1, dtype=torch.float32, device=x.device)).bool()  # [B, S, 1]
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~real.transpose(1, 2)[:, None], torch.finfo(scores.dtype).min)
        return scores.softmax(-1) * real[:, None]


class BertModel(PretrainedEncoder):
    """The encoder, with transformers' signature, parameter names and outputs.

    Args:
        config: the sizes of the model.
        add_pooling_layer: whether the model has a `pooler`.
        impl: which implementation every operator uses; None lets each device choose. See `fastbert.functional`.
    """

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True, impl: F.Impl | None = None):
        super().__init__(config, impl)
        self._kept = Kept()
        self.embeddings = BertEmbeddings(config)
        layers = [BertLayer(config, index) for index in range(config.num_hidden_layers)]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        width = config.hidden_size
        self.pooler = nn.ModuleDict({"dense": nn.Linear(width, width)}) if add_pooling_layer else None
        self.apply(lambda module: initialise(module, config.initializer_range))

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        first_only: bool = False,
    ) -> BertOutput | tuple:
        """Hidden states of a padded batch, or of a `PackedBatch`.

        Args:
            input_ids: [B, S] int, or a PackedBatch (then the arguments down to position_ids stay None).
            attention_mask: [B, S] of 0 and 1: right-padded, left-padded or with holes; by default all ones.
                A row of zeros gives zero hidden states.
            token_type_ids: [B, S] segments, by default 0.
            position_ids: [B, S] or [1, S]; by default the column, whatever the mask, as in transformers.
            inputs_embeds: [B, S, C] in place of input_ids; or [T, C] beside a PackedBatch without input_ids.
            output_attentions: also return the probabilities, computed in plain torch; they take B x H x S x S numbers.
            output_hidden_states: also return the embeddings and each layer's output.
            return_dict: False returns a tuple.
            first_only: for callers that read only the pooler or the first token: last_hidden_state is [B, C], of each
                sequence's first real token, and the last layer computes only keys and values for the others.

        Raises: ValueError on first_only with output_attentions or output_hidden_states; on ids outside the vocabulary
            and on lengths of a PackedBatch that do not fit (checked on CPU tensors; on a GPU, where a check waits for
            the device, only with FASTBERT_CHECK=1 in the environment); on sequences longer than the position table, and
            on shapes that do not fit.
        """
        if first_only and (output_attentions or output_hidden_states):
            raise ValueError("first_only leaves out of the last layer what output_attentions and _hidden_states show")
        packed = isinstance(input_ids, PackedBatch)
        if not isinstance(input_ids, PackedBatch):
            batch = self.pack(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
            inputs_embeds = None if inputs_embeds is None else batch.unpad(inputs_embeds)
        elif any(t is not None for t in (attention_mask, token_type_ids, position_ids)):
            raise ValueError("a PackedBatch already holds mask, segments and positions; give them there")
        elif (input_ids.input_ids is None) == (inputs_embeds is None):
            raise ValueError("give inputs_embeds with a PackedBatch that has no input_ids, and with no other")
        else:
            batch = input_ids
        self._check(batch)

        plain = inputs_embeds is None and not (output_attentions or output_hidden_states)
        x = self._replayed(batch) if plain else None
        hidden_states: list[Tensor] = []
        attentions: list[Tensor] = []
        if x is None:
            x = self._run(
                batch, inputs_embeds, hidden_states if output_hidden_states else None,
                attentions if output_attentions else None, first_only,
            )  # fmt: skip
        elif first_only:
            x = F.pool(x, batch.cu_seqlens, "cls", impl=self.impl)

        pooler_output = None
        if self.pooler is not None:
            first = x if first_only else F.pool(x, batch.cu_seqlens, "cls", impl=self.impl)
            dense = part_of(self.pooler["dense"], nn.Linear)
            pooler_output = torch.tanh(multiply(dense, first, Pass(batch, None, self.impl)))
        last = hidden_states[-1] if output_hidden_states else x if packed or first_only else batch.pad(x)
        output = BertOutput(
            last_hidden_state=last,
            pooler_output=pooler_output,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return output if return_dict else output.to_tuple()

    def _run(
        self,
        batch: PackedBatch,
        inputs_embeds: Tensor | None = None,
        hidden_states: list[Tensor] | None = None,
        attentions: list[Tensor] | None = None,
        first_only: bool = False,
    ) -> Tensor:
        """x [T, C] after the last layer, from ids or from inputs_embeds [T, C]; with `first_only` [B, C], zero for a
        sequence without tokens. The lists that are passed are filled, with states in the shape of the output."""
        layers: list[Any] = list(cast(nn.ModuleList, self.encoder["layer"]))
        described, plain = (None, ()) if torch.compiler.is_compiling() else self._described()
        shared = Pass(batch, batch.schedule(self.impl), self.impl, layers=described)
        if self.training and max(self.config.hidden_dropout_prob, self.config.attention_probs_dropout_prob) > 0.0:
            shared = shared.dropping()

        def shown(x: Tensor) -> Tensor:
            if hidden_states is None:
                return x
            state, x = shared.state(x)
            hidden_states.append(state)
            return x

        x = self.embeddings(shared, inputs_embeds)
        # Attention of first tokens only is attention over other keys, which may read lengths on the host: torch.compile
        # cannot trace that. Within batch_invariant() it is left out because it depends on the number of tokens.
        ends_first = first_only and not (torch.compiler.is_compiling() or F.is_batch_invariant())
        ends_first = ends_first and len(layers) > 0 and batch.total_tokens > 0
        if hidden_states is None and attentions is None and not self.training:
            but_last = ends_first and batch.total_tokens > FEW_TOKENS
            y = in_one_call(x, plain[: len(layers) - but_last], shared)
            if y is not None:
                x, layers, ends_first = y, layers[-1:] if but_last else [], but_last
        if x.is_cpu and hidden_states is None and attentions is None and self.training and self.checkpointing is None:
            y = in_one_node(x, self._for_one_node(layers, plain, shared), shared, ends_first)
            if y is not None:
                return F.pool(y, batch.cu_seqlens, "cls", impl=self.impl) if first_only and not ends_first else y
        for layer in layers[:-1] if ends_first else layers:
            x = shown(x)
            if attentions is not None:
                attentions.append(layer.probabilities(x, shared))
            x = self._through(layer, x, shared)
        if ends_first:
            x = self._through(layers[-1], x, shared, True)
            return torch.where((batch.cu_seqlens.diff() > 0)[:, None], x, 0.0)
        return F.pool(x, batch.cu_seqlens, "cls", impl=self.impl) if first_only else shown(x)

    def _for_one_node(
        self, layers: list[Any], plain: Sequence[Layer | None], shared: Pass
    ) -> list[tuple[int, Layer, Drops]]:
        """The argument of `in_one_node`; nothing if a layer has to be called, or is in evaluation mode."""
        found = []
        for layer, described in zip(layers, plain, strict=False):
            if described is None or not layer.training:
                return []
            found.append((layer.index, described, layer.drops(shared)))
        return found

    def _through(self, layer: nn.Module, x: Tensor, *others: Any) -> Tensor:
        """layer(x, *others). With gradient checkpointing the layer is computed once more in the backward pass."""
        if self.checkpointing is None or not (self.training and torch.is_grad_enabled()):
            return layer(x, *others)
        from torch.utils.checkpoint import checkpoint

        return checkpoint(layer, x, *others, **self.checkpointing)

    def _described(self) -> tuple[dict[nn.Module, Layer], list[Layer | None]]:
        """(layer -> description; the descriptions in order, with None for a layer that has hooks or another
        forward)."""
        encoder, config = cast(nn.Module, self._modules["encoder"]), self.config
        return self._kept.of(encoder, self._describe, self.impl, config.activation, config.head_dim)

    def _describe(self) -> tuple[dict[nn.Module, Layer], list[Layer | None]]:
        layers = list(cast(nn.ModuleList, self.encoder["layer"]))
        described: dict[nn.Module, Layer] = {}
        described.update((layer, layer.described(self.impl)) for layer in layers if isinstance(layer, BertLayer))
        return described, [described[layer] if part_of(layer, BertLayer).plain else None for layer in layers]

    def takes_in_one_call(self, tokens: int) -> bool:
        """Whether a pass of `tokens` tokens without gradients runs in one C++ call, without the vendor library."""
        size = tokens * self.config.hidden_size * self.dtype.itemsize
        if self.training or self.device.type != "cpu" or F.choose_impl(self.impl, self.device) != "native":
            return False
        layers = self._described()[1]
        if all_in_8_bits(layers) is not None:
            return True
        return is_one_call_ahead(size, self.dtype, self.device, self.impl) and in_one(layers) is not None
