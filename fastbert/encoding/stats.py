"""Running totals of an Encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# The share of avoided padding is relative to batches of this many texts in arrival order.
PADDED_BATCH = 32


@dataclass
class EncodeStats:
    """Running totals of an Encoder. `padded_tokens` is the number that padded batches of 32 texts in arrival order
    would compute."""

    texts: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    seconds: float = 0.0

    def count(self, lengths: Sequence[int]) -> None:
        """Adds texts with these numbers of tokens."""
        self.texts += len(lengths)
        self.tokens += sum(lengths)
        for start in range(0, len(lengths), PADDED_BATCH):
            group = lengths[start : start + PADDED_BATCH]
            self.padded_tokens += len(group) * max(group)

    @property
    def padding_avoided(self) -> float:
        """The share of padding in the tokens of padded batches, 0 to 1."""
        return 1.0 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0
