"""transformers' heads: each says what it reads of the encoder's output at padding, and what it shows its caller."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from .families import FAMILIES
from .forward import Forward
from .own import Watch, listeners, of_library, why_own
from .padding import Reading, reading, reading_now
from .parts import TRANSFORMERS, at
from .plain import by_token

FIRST, LABELS, EVERY = "the first column", "tokens whose label counts", "every token"
LAST = "the last token"  # where the table below says the first column, over an encoder that is a decoder
# what a head is called, after the family's name -> what it reads
HEADS = {
    "ForSequenceClassification": FIRST,
    "ForMultipleChoice": FIRST,
    "ForNextSentencePrediction": FIRST,
    "ForTokenClassification": LABELS,
    "ForMaskedLM": LABELS,
    "ForPreTraining": LABELS,
    "ForQuestionAnswering": EVERY,  # its loss is a softmax over all columns
}
# what the losses of heads call
LOSS = [(nn.functional.__dict__, "cross_entropy")]
# heads whose loss takes the mask, so that a label at padding does not count
BY_MASK = {"ElectraForPreTraining"}


def kind_of(head: nn.Module) -> str | None:
    """What a head of transformers reads, or None: it is no head that is known."""
    cls = type(head)
    if not cls.__module__.startswith(TRANSFORMERS):
        return None
    families = {name.removesuffix("Model"): family for name, family in FAMILIES.items() if family.heads}
    for name, reads in HEADS.items():
        family = families.get(cls.__name__.removesuffix(name))
        if family is not None:
            return LAST if family.decoder and reads == FIRST else reads
    return None


class HeadForward(Forward):
    """A head of transformers: runs its own code, and within it the encoder knows what is read.

    Args:
        path: of the encoder.
        labelled_logits: see `accelerate`.
    """

    def __init__(self, head: nn.Module, path: str, labelled_logits: bool = False):
        super().__init__(head)
        self.path, self.kind = path, kind_of(head)
        self.labelled_logits = labelled_logits and type(head).__name__.endswith("ForMaskedLM")
        self.seen: tuple[Watch, str | None] | None = None

    def over(self, replica: nn.Module) -> HeadForward:
        forward = super().over(replica)
        forward.seen = None
        return forward

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"seen": None}

    def why_unknown(self) -> str | None:
        """What in the head is somebody's own and may look at padding, or None."""
        seen = self.seen  # one thread may put another one there meanwhile
        if seen is None or not seen[0].is_same():
            encoder = at(self.module, self.path)
            below = set(encoder.modules())
            parts = [(path, m) for path, m in self.module.named_modules() if m not in below]
            reason = _why_loss(self.module) or next((why for path, m in parts if (why := _why_part(path, m))), None)
            own = [(self.module.__dict__, "_loss_function")]
            seen = self.seen = Watch([m for _, m in parts], [*LOSS, *own], [(nn.CrossEntropyLoss, "forward")]), reason
        return seen[1]

    def reads(self, given: dict[str, Any]) -> Reading:
        """What this call reads, and shows."""
        if (why := self.why_unknown()) is not None:
            return Reading(True, why=why)
        name, config = type(self.module).__name__, self.module.config
        if getattr(self.module, "sequence_summary", None) is not None and config.summary_type != "first":
            return Reading(True, why=f"{name} summarises by {config.summary_type}")
        outer, labels = reading_now(), given.get("labels")
        masked = outer is not None and not outer.shows  # whoever reads what the head shows leaves padding alone
        states = given.get("output_hidden_states")
        states = getattr(config, "output_hidden_states", False) if states is None else states
        why = f"{name} returns hidden states" if states else f"{name} returns something of each token"
        if self.kind == FIRST:
            return Reading(False, bool(states) and not masked, why, first=not states)
        if self.kind == LAST:
            return Reading(self.last(given), bool(states) and not masked, why)
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
        """[B, S] bool: the rows that a head reads which takes the last token other than padding of each sequence."""
        ids, padding = given.get("input_ids"), self.module.config.get_text_config().pad_token_id
        if not isinstance(ids, Tensor):
            return True
        columns = torch.arange(ids.shape[1], dtype=torch.int64, device=ids.device)
        last = columns[-1:] if padding is None else (columns * (ids != padding)).argmax(1, keepdim=True)
        return columns == last

    def says(self) -> str:
        why = self.why_unknown()
        if why is not None:
            return f"padding is computed: {why}"
        return f"it reads {self.kind}" + (", and gives logits of these alone" if self.labelled_logits else "")

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # nothing is left out of a traced pass
            return self.original(*args, **kwargs)
        given = self.named(args, kwargs)
        reads, labels = self.reads(given), given.get("labels")
        if not self.labelled_logits or not _is_by_token(labels, given) or self.why_unknown() is not None:
            with reading(reads):
                return self.original(*args, **kwargs)
        # the head's own code, over the rows that have a label, as one sequence of them
        flat = labels.flatten()
        places = (flat != -100).nonzero().squeeze(1)
        with reading(replace(reads, only=places)):
            return self.original(**given | {"labels": flat[places][None]})


def _why_loss(head: nn.Module) -> str | None:
    """Why the loss of a head may count tokens whose label is -100."""
    if not of_library(nn.CrossEntropyLoss.forward):
        return "torch.nn.CrossEntropyLoss.forward was replaced"
    if why := next((f"torch.nn.functional.{name} was replaced" for f, name in LOSS if not of_library(f[name])), None):
        return why
    own = head.__dict__.get("_loss_function")
    return None if own is None or of_library(own) else "its loss_function is somebody's own"


def _is_by_token(labels: Any, given: dict[str, Any]) -> bool:
    """Are these labels [batch, tokens] of the batch that is given?"""
    ids = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
    return isinstance(labels, Tensor) and isinstance(ids, Tensor) and labels.shape == ids.shape[:2]


def _why_part(path: str, module: nn.Module) -> str | None:
    """Why a module of a head may look at padding, or lets somebody look."""
    if path and listeners(module):
        return f"a {type(module).__name__} of the head has a hook"
    if by_token(module) or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return None
    if type(module) is nn.CrossEntropyLoss and module.ignore_index == -100:
        return None
    if type(module).__module__.startswith("peft.") and "forward" not in module.__dict__:
        return None  # a copy of a module of the head that is trained
    return why_own(module, (type(module).__name__,), TRANSFORMERS)
