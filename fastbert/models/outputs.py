"""The outputs of BERT and its heads, registered with torch's pytrees, so that torch.export and FSDP2 find the
tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.utils._pytree import register_dataclass, register_pytree_node


@dataclass
class BertOutput:
    """The output of `BertModel`; it can also be indexed and unpacked like a tuple of the fields that are not None.

    Attributes:
        last_hidden_state: [B, S, C], zero at padding; or [T, C] for a PackedBatch.
        pooler_output: [B, C], tanh of a linear layer of each sequence's first real token; None without a pooler.
        hidden_states: embeddings and every layer's output; None unless requested. For a padded batch, and for a
            PackedBatch that `from_padded` made, they are [B, S, C], and so is last_hidden_state then.
        attentions: every layer's probabilities [B, H, S, S]; None unless requested.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

    def to_tuple(self) -> tuple:
        fields = (self.last_hidden_state, self.pooler_output, self.hidden_states, self.attentions)
        return tuple(field for field in fields if field is not None)

    def __getitem__(self, key: int | slice | str):
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self):
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(self.to_tuple())


# torch.export needs the registration for a function's output.
register_dataclass(BertOutput, serialized_type_name="fastbert.BertOutput")


class HeadOutput(dict):
    """The output of a head, like transformers' ModelOutput: a dict of the fields that are not None, in order.
    `output.logits` is None for a missing field; `output[0]` and `output[:2]` count the fields that are not None.

    Fields: loss, logits, hidden_states, attentions.
    """

    NAMES: ClassVar[tuple[str, ...]] = ("loss", "logits", "hidden_states", "attentions")

    def __init__(self, *args, **values):
        super().__init__((name, value) for name, value in dict(*args, **values).items() if value is not None)

    def __getattr__(self, name: str) -> Any:
        if name in type(self).NAMES:
            return self.get(name)
        raise AttributeError(f"{type(self).__name__} has no {name!r}")

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple:
        return tuple(self.values())


class SpanOutput(HeadOutput):
    """Fields: loss, start_logits, end_logits, hidden_states, attentions."""

    NAMES = ("loss", "start_logits", "end_logits", "hidden_states", "attentions")


class PreTrainingOutput(HeadOutput):
    """Fields: loss, prediction_logits, seq_relationship_logits, hidden_states, attentions."""

    NAMES = ("loss", "prediction_logits", "seq_relationship_logits", "hidden_states", "attentions")


# FSDP2 uses pytrees to find the tensors on which it sets its gradient hooks.
def _register(kind: type[HeadOutput]) -> None:
    register_pytree_node(
        kind,
        lambda output: (list(output.values()), tuple(output)),
        lambda values, names: kind(zip(names, values, strict=True)),
        serialized_type_name=f"fastbert.{kind.__name__}",
    )


for _kind in (HeadOutput, SpanOutput, PreTrainingOutput):
    _register(_kind)
