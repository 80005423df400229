"""The base of the heads on top of BERT: packing, losses with a divisor, tied weights, loading and saving."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn as nn
from torch import Tensor
from typing_extensions import Self

from .. import checkpoint
from .. import functional as F
from ..config import BertConfig
from ..inference.eight_bits import put_in_integers
from ..inference.weights import is_untouched
from ..packing import PackedBatch
from .bert import BertModel
from .loading import LeftUninitialised, initialise, load_encoder, read_model
from .outputs import HeadOutput

AnyOutput = TypeVar("AnyOutput", bound=HeadOutput)
IGNORED = -100  # the label of an item that does not count in the loss


def product(linear: nn.Module, x: Tensor, impl: F.Impl | None) -> Tensor:
    """linear(x). Within `batch_invariant()` a plain layer does not use the vendor library, whose bits depend on the
    number of rows of x [N, C]."""
    if F.is_batch_invariant() and is_untouched(linear, nn.Linear):
        assert isinstance(linear, nn.Linear)
        return F.linear(x, linear.weight, linear.bias, impl=impl)
    return linear(x)


def scores(linear: nn.Module, x: Tensor, impl: F.Impl | None) -> Tensor:
    """A classifier's logits, computed in the dtype of its parameters, also under autocast and after an encoder of
    another dtype. In bfloat16, with 8 bits, scores of different texts would tie; a classifier's product costs next to
    nothing.
    """
    if not torch.is_autocast_enabled(x.device.type):
        return product(linear, x.to(linear.weight.dtype) if type(linear) is nn.Linear else x, impl)
    with torch.autocast(x.device.type, enabled=False):
        return product(linear, x.to(next(linear.parameters()).dtype), impl)


# ---- what the encoder gives a head -----------------------------------------------------------------------


class Encoded(NamedTuple):
    """The encoder's outputs for a head: hidden [T, C] ([B, C] for a head that reads only first tokens), pooled [B, C]
    or None, and the other outputs that were requested."""

    batch: PackedBatch
    packed: bool  # the caller gave a PackedBatch
    hidden: Tensor
    pooled: Tensor | None
    extras: dict[str, Any]  # hidden_states, attentions

    def shaped(self, x: Tensor, value: float = 0.0) -> Tensor:
        """x [T, ...] in the form of the caller's input: unchanged if that was packed, else [B, S, ...] with `value` at
        padding."""
        return x if self.packed else self.batch.pad(x, value)

    def by_token(self, name: str, labels: Tensor) -> Tensor:
        """Labels [B, S] of a padded batch, or [T], as [T] int64."""
        if labels.shape == (self.batch.total_tokens,):
            return labels.long()
        if tuple(labels.shape) != self.batch.padded_shape:
            expected = f"[{self.batch.total_tokens}]" if self.packed else str(list(self.batch.padded_shape or ()))
            raise ValueError(f"{name} must be {expected}, one for each token, got {list(labels.shape)}")
        return self.batch.unpad(labels).long()


# ---- losses ----------------------------------------------------------------------------------------------


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cross_entropy(
    logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | float | None, weights: Tensor | None = None
) -> Tensor:
    """Cross-entropy of logits [N, K] and labels [N] without rows labelled -100: the mean, or the sum divided by
    num_items_in_batch.

    weights: [K], one for each class: a row's loss is multiplied by its class's weight, and the mean is divided by the
        sum of the weights, as in torch.
    """
    logits, labels = at_least_float32(logits), labels.long()
    weights = None if weights is None else weights.to(logits.dtype)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = nn.functional.cross_entropy(logits, labels, weights, ignore_index=IGNORED, reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


# ---- the base --------------------------------------------------------------------------------------------


class BertHead(nn.Module):
    """BERT with a head on top: the base of the classes in `heads`.

    Every `forward` takes what `BertModel.forward` takes, padded [B, S] or a `PackedBatch`, then labels, and:

        num_items_in_batch: divisor of the summed loss, a number or a tensor of one element; by default the number
            of labels in this batch that count (not -100), which gives the mean. For one optimiser step over several
            micro-batches or processes, pass the count of the whole step to all of them: then the losses and gradients
            add up to those of one batch. transformers' Trainer counts and passes it.
        output_attentions, output_hidden_states, return_dict: None takes the config's value.

    Dropout in training is a function of a seed, drawn with torch.randint in each pass, and of a token's sequence and
    position: the same for packed and padded input. A PackedBatch may name its sequences (`sequence_ids`).

    Args:
        config: sizes of the model; id2label, problem_type and classifier_dropout are for the head.
        impl: which implementation every operator uses, as in `BertModel`.
    """

    base_model_prefix = "bert"
    accepts_loss_kwargs = True  # read by transformers' Trainer: it then counts labels and passes num_items_in_batch
    POOLED: ClassVar[bool]  # the head reads the pooler's output
    FIRST_ONLY: ClassVar[bool] = False  # the head reads nothing but the first token
    # tied name -> name of the parameter that it shares while config.tie_word_embeddings is set
    _tied_weights_keys: ClassVar[dict[str, str]] = {}

    def __init__(self, config: BertConfig, impl: F.Impl | None = None):
        super().__init__()
        self.config = config
        self.bert = BertModel(config, add_pooling_layer=self.POOLED, impl=impl)
        rate = config.classifier_dropout
        self.dropout_p = config.hidden_dropout_prob if rate is None else rate
        self.initialised: tuple[str, ...] = ()
        self.register_load_state_dict_pre_hook(_name_ties)
        self.register_load_state_dict_post_hook(_tie_after_loading)

    @property
    def impl(self) -> F.Impl | None:
        return self.bert.impl

    @property
    def device(self) -> torch.device:
        return self.bert.device

    @property
    def dtype(self) -> torch.dtype:
        return self.bert.dtype

    def get_input_embeddings(self) -> nn.Module:
        return self.bert.get_input_embeddings()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Also read by PEFT."""
        return self.bert.is_gradient_checkpointing

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """As `BertModel.gradient_checkpointing_enable`."""
        self.bert.gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.bert.gradient_checkpointing_disable()

    # ---- one pass --------------------------------------------------------------------------------------

    def encode(
        self, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
        output_attentions: bool | None, output_hidden_states: bool | None,
    ) -> Encoded:  # fmt: skip
        """The encoder's pass over the arguments of `BertModel.forward`."""
        packed = isinstance(input_ids, PackedBatch)
        if packed:
            batch = input_ids
        else:
            batch = self.bert.pack(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
            inputs_embeds = None if inputs_embeds is None else batch.unpad(inputs_embeds)
            attention_mask = token_type_ids = position_ids = None  # the packed batch contains them
        config = self.config
        attentions = config.output_attentions if output_attentions is None else output_attentions
        states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = self.bert(
            batch, attention_mask, token_type_ids, position_ids, inputs_embeds, attentions, states,
            first_only=self.FIRST_ONLY and not (attentions or states),
        )  # fmt: skip
        hidden = output.last_hidden_state
        if hidden.dim() == 3:
            hidden = batch.unpad(hidden)
        extras = {"hidden_states": output.hidden_states, "attentions": output.attentions}
        return Encoded(batch, packed, hidden, output.pooler_output, extras)

    def drop(self, x: Tensor, row_ids: Tensor) -> Tensor:
        """dropout(x) before a classifier, in training: x [N, C], row_ids [N] of the tokens."""
        if not self.training or self.dropout_p == 0.0:
            return x
        seed = torch.randint(2**62, (1,), dtype=torch.int64, device=x.device)
        return F.dropout(x, self.dropout_p, seed, row_ids=row_ids, impl=self.impl)

    def pooled_dropped(self, encoded: Encoded) -> Tensor:
        """dropout of the pooler's output [B, C]."""
        assert encoded.pooled is not None  # POOLED heads have a pooler
        return self.drop(encoded.pooled, encoded.batch.sequence_names << 32)

    def returned(self, output: AnyOutput, return_dict: bool | None) -> AnyOutput | tuple:
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    # ---- ties ------------------------------------------------------------------------------------------

    def tie_weights(self) -> None:
        """Makes tied names the same parameter again, after code that made them two parameters."""
        if not self.config.tie_word_embeddings:
            return
        for alias, name in self._tied_weights_keys.items():
            path, _, last = alias.rpartition(".")
            parameters, parameter = self.get_submodule(path)._parameters, self.get_parameter(name)
            if last in parameters and parameters[last] is not parameter:
                parameters[last] = parameter

    def _apply(self, fn, recurse=True):
        """`to_empty` and other methods make a new parameter for each name, so weights are tied again."""
        super()._apply(fn, recurse)
        self.tie_weights()
        return self

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        """As torch's, but without `keep_vars` a tied name gets a copy of the tensor: transformers' Trainer passes the
        result to safetensors' save_file, which refuses two names for the same memory."""
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        if self.config.tie_word_embeddings and not keep_vars:
            for alias in self._tied_weights_keys:
                if prefix + alias in state:
                    state[prefix + alias] = state[prefix + alias].clone()
        return state

    # ---- files -----------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        impl: F.Impl | None = None,
        seed: int | None = None,
        new_head: bool = False,
        **changes: Any,
    ) -> Self:
        """A model in evaluation mode, from anything that `BertModel.from_pretrained` takes.

        Parameters that the checkpoint does not have (a head, or the pooler of a BERT that was saved without one) are
        initialised as in the paper: weights normal with standard deviation config.initializer_range, biases 0,
        LayerNorms 1 and 0. A warning names them, and `model.initialised` lists them. Heads of other tasks in the
        checkpoint are ignored.

        Args:
            dtype: of the parameters; None keeps the checkpoint's.
            seed: for the initialised weights; None draws them from torch's global generator.
            new_head: initialise the head even if the checkpoint has one.
            changes: fields of the config that override the checkpoint's: id2label, num_labels, problem_type,
                hidden_dropout_prob, ...

        Raises: CheckpointError, which names missing parameters of the encoder, or those of a wrong shape.
        """
        read = read_model(id_or_path, **changes)
        config, state = read.config, read.state
        with torch.device("meta"), LeftUninitialised():
            model = cls(config, impl)
        encoder_alone = not any(name.startswith("bert.encoder.") for name in state)
        if new_head and not encoder_alone:
            state = {name: t for name, t in state.items() if name.startswith("bert.")}
        heads = tuple(name for name in model.state_dict(keep_vars=True) if not name.startswith("bert."))
        load_encoder(model, state, id_or_path, ignore_missing=(*heads, "bert.pooler.*"))
        model._start_what_is_missing(id_or_path, seed)
        put_in_integers(model, read.integers, device, impl)
        return model.to(device=device, dtype=read.dtype(dtype)).eval()

    def _start_what_is_missing(self, source: str | Path, seed: int | None) -> None:
        """Initialises the parameters that are still on the meta device, and warns with their names."""
        missing = [name for name, p in self.named_parameters() if p.is_meta]
        if not missing:
            return
        generator = None if seed is None else torch.Generator("cpu").manual_seed(seed)
        spread, dtype = self.config.initializer_range, self.dtype
        for name in missing:
            path, _, last = name.rpartition(".")
            module = self.get_submodule(path)
            p = torch.empty(module._parameters[last].shape, dtype=torch.float32, device="cpu")
            if last == "weight" and isinstance(module, nn.Linear):
                nn.init.normal_(p, std=spread, generator=generator)
            else:
                nn.init.constant_(p, float(last == "weight"))
            module._parameters[last] = nn.Parameter(p.to(dtype))
        self.tie_weights()
        self.initialised = tuple(missing)
        drawn = "torch's generator" if seed is None else f"seed {seed}"
        warnings.warn(
            f"{source} has no {', '.join(missing)}: weights were drawn from normal(0, {spread}) by {drawn}, biases are "
            f"0, LayerNorms 1 and 0. Train this {type(self).__name__} before you trust it.",
            UserWarning,
            stacklevel=3,
        )

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Writes config.json, with this class's name and id2label, and model.safetensors, as transformers reads them.

        state_dict: by default the model's; for a sharded model, pass the gathered one.
        """
        config = copy.copy(self.config)
        config.architectures, config.dtype = [type(self).__name__], str(self.dtype).removeprefix("torch.")
        config.save_pretrained(folder)
        checkpoint.save_state_dict(folder, self.state_dict(keep_vars=True) if state_dict is None else state_dict)


def _name_ties(module: BertHead, state: dict[str, Tensor], prefix: str, *_) -> None:
    """Adds the other names of tied weights, which a file holds under one name."""
    if module.config.tie_word_embeddings:
        for alias, name in module._tied_weights_keys.items():
            for given, other in ((prefix + name, prefix + alias), (prefix + alias, prefix + name)):
                if given in state and other not in state:
                    state[other] = state[given]


def _tie_after_loading(module: BertHead, _) -> None:
    """Ties the weights again: `load_state_dict(assign=True)` makes a parameter for each name."""
    module.tie_weights()


@contextmanager
def expecting_new_weights() -> Iterator[None]:
    """A block in which `from_pretrained` does not warn of missing weights: its caller expects a new head, or reads
    `initialised`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*weights were drawn from normal.*", category=UserWarning)
        yield


def start(module: nn.Module, config: BertConfig) -> nn.Module:
    """Initialises a new part of a head, and returns it."""
    module.apply(lambda part: initialise(part, config.initializer_range))
    return module
