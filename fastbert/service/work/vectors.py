"""Vectors of texts, and of all their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, sqrt

import numpy as np

from ...encoding.encoder import Encoder
from ...encoding.modules import Normalize, Pooling, parts_of
from ..engine import Piece, Prepared
from ..errors import ServiceError
from .texts import Texts

# Numbers of tokens' vectors in one answer: as JSON they are about 350 MB, which are in memory as a whole.
MOST_NUMBERS = 2**24
# What a text is for, in clients' words -> names of prompts; the first one that the model has is put before the text.
_QUERY, _DOCUMENT = ("query",), ("document", "passage", "corpus")
ROLES = {
    "query": _QUERY, "search_query": _QUERY, "retrieval.query": _QUERY,
    "document": _DOCUMENT, "passage": _DOCUMENT, "search_document": _DOCUMENT, "retrieval.passage": _DOCUMENT,
}  # fmt: skip
TINY = 1e-12  # least value of a vector's length, as in torch's normalize


class Vectors:
    """An Encoder that serves requests which differ in prompt, cutting, normalisation and dimensions.

    Args:
        encoder: its last module, where that is a Normalize, is left out: each request says whether it wants that.
        limit: tokens of a text at most; None for the encoder's own limit.
    """

    def __init__(self, encoder: Encoder, limit: int | None = None):
        own = encoder.max_lengths.get(encoder.task, encoder.max_length)
        self.normalize = encoder.normalize
        self.can_choose = not encoder.normalize or isinstance(encoder.modules[-1], Normalize)
        if encoder.normalize and self.can_choose:
            encoder.modules = encoder.modules[:-1]
        self.encoder = encoder
        self.dimension = encoder.dimension
        tokenizer = encoder.tokenizer.lowercased() if encoder.lowercase else encoder.tokenizer
        self.texts = Texts(tokenizer, min(own, limit or own))
        self._plain = _Pooled(encoder)
        pools_prompt = all(pooling.include_prompt for pooling in parts_of(encoder.modules, Pooling))
        # Where a prompt's tokens are not pooled, requests with different prompts cannot share a batch.
        self._by_prompt = {} if pools_prompt else {p: _Pooled(encoder.asked(prompt=p)) for p in self.prompts.values()}
        self._states = _States(encoder)

    @property
    def prompts(self) -> dict[str, str]:
        return self.encoder.prompts | {"": self.encoder.prompt}

    def expect_choice(self, normalize: bool | None, dimensions: int | None) -> None:
        """Raises ServiceError for a normalisation or a number of dimensions that cannot be had."""
        if normalize is False and self.normalize and not self.can_choose:
            raise ServiceError("invalid", "this model's vectors are always normalised", param="normalize")
        if dimensions is not None and not 1 <= dimensions <= self.dimension:
            raise ServiceError(
                "invalid", f"dimensions must be from 1 to {self.dimension}, got {dimensions}", param="dimensions"
            )

    def prompt(self, name: str | None) -> str:
        """The text of a prompt; None for the model's own. Raises ServiceError."""
        if name is None:
            return self.encoder.prompt
        if name not in self.encoder.prompts:
            known = ", ".join(self.encoder.prompts) or "none"
            raise ServiceError("invalid", f"there is no prompt {name[:99]!r}; prompts are {known}", param="prompt_name")
        return self.encoder.prompts[name]

    def prompt_for(self, role: str | None) -> str:
        """The text of the prompt for a role, one of ROLES; the model's own where it has none for that."""
        return self.prompt(next((name for name in ROLES.get(role or "", ()) if self.prompts.get(name)), None))

    def prepare(
        self,
        given: Sequence[str] | Sequence[Sequence[int]],
        *,
        prompt: str = "",
        truncate: bool = True,
        side: str | None = None,
        limit: int | None = None,
        normalize: bool | None = None,
        dimensions: int | None = None,
    ) -> Prepared:
        """Tokenises. The answer is [N, dimensions] float32, a row for each text or list of ids.

        Args:
            limit: tokens of a text at most; None for the model's own limit.
            normalize: None for what the model's folder says.
            dimensions: numbers of a vector that are kept, which is normalised afterwards where it was before.
        """
        ids, cut = self._ids(given, prompt, truncate, side, limit)
        lane = self._by_prompt.get(prompt, self._plain)
        wanted = self.normalize if normalize is None else normalize

        def finish(rows: list[np.ndarray]) -> np.ndarray:
            vectors = rows[0][None] if len(rows) == 1 else np.stack(rows)
            lengths = lengths_of(vectors)
            # A length may also be too large for its dtype.
            if not all(map(isfinite, lengths)) and not np.isfinite(vectors).all():
                raise ServiceError("failed", "the model's numbers are not finite")
            if dimensions is not None:
                vectors = np.ascontiguousarray(vectors[:, :dimensions])  # orjson takes no other
                lengths = lengths_of(vectors)
            return divided(vectors, lengths) if wanted and (self.can_choose or dimensions is not None) else vectors

        return Prepared([Piece(lane, row, len(row)) for row in ids], list(map(len, ids)), cut, finish)

    def prepare_states(
        self,
        given: Sequence[str],
        *,
        prompt: str = "",
        truncate: bool = True,
        side: str | None = None,
        limit: int | None = None,
    ) -> Prepared:
        """The same of every token: the answer is a list of [tokens, C] float32.

        Raises: ServiceError where the answer would have more than MOST_NUMBERS.
        """
        ids, cut = self._ids(given, prompt, truncate, side, limit)
        numbers = sum(map(len, ids)) * self.encoder.token_dimension
        if numbers > MOST_NUMBERS:
            raise ServiceError(
                "too_large",
                f"the answer would have {numbers:,} numbers, and at most {MOST_NUMBERS:,} go into one: send fewer "
                "texts at once",
            )
        return Prepared([Piece(self._states, row, len(row)) for row in ids], list(map(len, ids)), cut)

    def _ids(
        self, given: Sequence, prompt: str, truncate: bool, side: str | None, limit: int | None
    ) -> tuple[list[list[int]], int]:
        if given and not isinstance(given[0], str):
            return self.texts.of_ids(given, truncate, side, prompt, limit)
        return self.texts.ids([prompt + text for text in given] if prompt else given, truncate, side, limit)


class _Pooled:
    """The lane of vectors."""

    def __init__(self, encoder: Encoder):
        self.encoder = encoder

    def compute(self, data: Sequence[list[int]]) -> np.ndarray:
        return self.encoder.encode_ids(data, sum(map(len, data))).numpy()


class _States(_Pooled):
    """The lane of tokens' vectors."""

    def compute(self, data: Sequence[list[int]]) -> list[np.ndarray]:
        return [states.numpy() for states in self.encoder.states(data, sum(map(len, data)))]


def normalised(vectors: np.ndarray) -> np.ndarray:
    """[N, C] float32, each row divided by its length."""
    return divided(vectors, lengths_of(vectors))


def lengths_of(vectors: np.ndarray) -> list[float]:
    """The length of each row. A single call of numpy for a row: each other function of numpy adds 10 us to the answer
    of a server that was idle."""
    return [sqrt(row.dot(row)) for row in vectors]


def divided(vectors: np.ndarray, lengths: list[float]) -> np.ndarray:
    if len(lengths) == 1:
        return vectors / max(lengths[0], TINY)
    return vectors / np.maximum(np.array(lengths, np.float32), np.float32(TINY))[:, None]
