"""transformers' heads: each declares which rows of the encoder's output it reads at padding, and what it returns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from .facts import at
from .families import FAMILIES
from .forward import InspectedForward
from .kinds import TRANSFORMERS
from .original import Watch, of_library, tensor_hooks, why_not_original
from .padding import Reading, reading, reading_now
from .plain import by_token

FIRST, LABELS, EVERY = "the first column", "tokens whose label counts", "every token"
LAST = "the last token"  # what the heads of decoders read in place of the first column
KEPT = "the columns that logits_to_keep names"
# the head's class name without the family's name -> what it reads
HEADS = {
    "ForSequenceClassification": FIRST,
    "ForMultipleChoice": FIRST,
    "ForNextSentencePrediction": FIRST,
    "ForTokenClassification": LABELS,
    "ForMaskedLM": LABELS,
    "ForPreTraining": LABELS,
    "ForQuestionAnswering": EVERY,  # its loss is a softmax over all columns
    "ForCausalLM": KEPT,
}
# functions of torch that the losses of heads call
LOSS = [(nn.functional.__dict__, "cross_entropy")]
# heads whose loss leaves out what the mask leaves out, so that a label at padding does not count
BY_MASK = {"ElectraForPreTraining"}


def what_it_reads(head: nn.Module) -> str | None:
    """What a head of transformers reads; None for other modules."""
    cls = type(head)
    if not cls.__module__.startswith(TRANSFORMERS):
        return None
    families = {name.removesuffix("Model"): family for name, family in FAMILIES.items() if family.heads}
    for name, reads in HEADS.items():
        prefix = cls.__name__.removesuffix(name)
        family = families.get(prefix)
        if reads == KEPT:  # Gemma3ForCausalLM holds a Gemma3TextModel
            family = family or families.get(f"{prefix}Text")
            family = family if family is not None and family.decoder else None
        if family is not None:
            return LAST if family.decoder and reads == FIRST else reads
    return None


class Seen(NamedTuple):
    """The result of an inspection of a head. reason: a part that may look at padding, in words, or None."""

    watch: Watch
    reason: str | None


class HeadForward(InspectedForward):
    """The `forward` of a head: the head's own code runs, within a declaration of what it reads.

    Args:
        path: path of the encoder in the head.
        labelled_logits: see `accelerate`.
    """

    def __init__(self, head: nn.Module, path: str, labelled_logits: bool = False):
        super().__init__(head)
        self.path, self.kind = path, what_it_reads(head)
        self.labelled_logits = labelled_logits and type(head).__name__.endswith("ForMaskedLM")

    def inspect(self) -> Seen:
        below = set(at(self.module, self.path).modules())
        parts = [(path, m) for path, m in self.module.named_modules() if m not in below]
        reason = _why_loss(self.module) or next((why for path, m in parts if (why := _why_part(path, m))), None)
        own = [(self.module.__dict__, "_loss_function")]
        return Seen(Watch([m for _, m in parts], [*LOSS, *own], [(nn.CrossEntropyLoss, "forward")]), reason)

    def reads(self, given: dict[str, Any]) -> Reading:
        """The declaration for a call with these arguments."""
        if (why := self.look().reason) is not None:
            return Reading(True, why=why)
        name, config = type(self.module).__name__, self.module.config
        if getattr(self.module, "sequence_summary", None) is not None and config.summary_type != "first":
            return Reading(True, why=f"{name} summarises by {config.summary_type}")
        outer, labels = reading_now(), given.get("labels")
        masked = outer is not None and not outer.shows  # the head's caller does not read its output at padding
        states = given.get("output_hidden_states")
        if states is None:  # the encoder may have a config of its own
            configs = (config, at(self.module, self.path).config)
            states = any(getattr(of, "output_hidden_states", False) for of in configs)
        why = f"{name} returns hidden states" if states else f"{name} returns a value of each token"
        if self.kind == FIRST:
            return Reading(False, bool(states) and not masked, why, first=not states)
        if self.kind == LAST:
            return Reading(self.last(given), bool(states) and not masked, why)
        if self.kind == KEPT:
            rows = self.kept(given)
            if rows is True and masked:  # of all logits, such a caller may still read the last column
                return Reading(self.kept(given | {"logits_to_keep": 1}))
            why = f"{name} returns logits at padding" if not states else why
            return Reading(rows, bool(states) and not masked, why)
        if self.kind == LABELS and masked:
            return Reading(False, why=why)
        if self.kind == EVERY:
            return Reading(True, why=f"{name} reads every token")
        if not isinstance(labels, Tensor):
            return Reading(False, True, why)
        if name in BY_MASK:
            return Reading(False, bool(states), why)
        if not _is_by_token(labels, given):
            return Reading(True, why="labels are not [batch, tokens]")
        return Reading(labels != -100, bool(states), why if states else f"{name} has labels at padding")

    def last(self, given: dict[str, Any]) -> bool | Tensor:
        """[B, S] bool: the last token of each sequence other than padding, which is the row that such a head reads."""
        ids, padding = given.get("input_ids"), self.module.config.get_text_config().pad_token_id
        if not isinstance(ids, Tensor):
            return True
        columns = torch.arange(ids.shape[1], dtype=torch.int64, device=ids.device)
        last = columns[-1:] if padding is None else (columns * (ids != padding)).argmax(1, keepdim=True)
        return columns == last

    def kept(self, given: dict[str, Any]) -> bool | Tensor:
        """[B, S] bool: the tokens whose logits a language model returns; True for all."""
        like = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
        keep = given.get("logits_to_keep", given.get("num_logits_to_keep", 0))
        if not isinstance(like, Tensor) or like.dim() < 2:
            return True
        rows = torch.zeros(like.shape[:2], dtype=torch.bool, device=like.device)
        if isinstance(keep, int) and keep > 0:
            rows[:, -keep:] = True
        elif isinstance(keep, Tensor) and keep.dtype == torch.bool and keep.shape == rows.shape:
            return keep
        elif isinstance(keep, Tensor) and keep.dtype == torch.int64 and keep.dim() == 2:
            rows.scatter_(1, keep, True)
        elif isinstance(keep, Tensor) and keep.dtype == torch.int64 and keep.dim() == 1:
            rows[:, keep] = True
        else:
            return True
        return rows

    def summary(self) -> str:
        why = self.look().reason
        if why is not None:
            return f"padding is computed: {why}"
        return f"it reads {self.kind}" + (", and computes logits of these only" if self.labelled_logits else "")

    def call(self, *args, **kwargs):
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # a graph computes all rows
            return self.original(*args, **kwargs)
        given = self.named(args, kwargs)
        reads, labels = self.reads(given), given.get("labels")
        if not self.labelled_logits or not _is_by_token(labels, given) or self.look().reason is not None:
            with reading(reads):
                return self.original(*args, **kwargs)
        # The head's own code gets the rows that have a label as one sequence.
        flat = labels.flatten()
        places = (flat != -100).nonzero().squeeze(1)
        with reading(replace(reads, only=places)):
            return self.original(**given | {"labels": flat[places][None]})


def _why_loss(head: nn.Module) -> str | None:
    """Why the loss of a head may count tokens whose label is -100, or None."""
    if not of_library(nn.CrossEntropyLoss.forward):
        return "torch.nn.CrossEntropyLoss.forward was replaced"
    if why := next((f"torch.nn.functional.{name} was replaced" for f, name in LOSS if not of_library(f[name])), None):
        return why
    own = head.__dict__.get("_loss_function")
    return None if own is None or of_library(own) else "its loss_function is not transformers' own"


def _is_by_token(labels: Any, given: dict[str, Any]) -> bool:
    """Whether these labels are [batch, tokens] for the batch of this call."""
    ids = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
    return isinstance(labels, Tensor) and isinstance(ids, Tensor) and labels.shape == ids.shape[:2]


def _why_part(path: str, module: nn.Module) -> str | None:
    """Why a module of a head, or a hook on it, may look at padding; or None."""
    if path and tensor_hooks(module):
        return f"a {type(module).__name__} of the head has a hook"
    if by_token(module) or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return None
    if type(module) is nn.CrossEntropyLoss and module.ignore_index == -100:
        return None
    if type(module).__module__.startswith("peft.") and "forward" not in module.__dict__:
        return None  # PEFT's trained copy of a module of the head
    return why_not_original(module, (type(module).__name__,), TRANSFORMERS)
