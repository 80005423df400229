"""Texts to ids with a limit, and what was cut: the way in of all work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ...text.cutting import UncutError
from ...text.tokenizer import Tokenizer
from ..errors import ServiceError

SIDES = ("right", "left")
MOST_SEARCHED = 262_144  # characters of a text that are tokenised to find places, in 0.1 s


class Texts:
    """Makes ids of texts, alone or in pairs, and counts those that were cut. Safe to share among threads.

    Args:
        tokenizer: of the model.
        limit: tokens of a sequence at most, special ones included.
        of_pairs: whether sequences are pairs of texts.

    Raises: ValueError for a limit that leaves no token of a text.
    """

    def __init__(self, tokenizer: Tokenizer, limit: int, of_pairs: bool = False):
        self.limit = limit
        own = tokenizer.config.get("truncation_side", "right")
        self._of_side = {side: tokenizer.truncating(side, is_bounded=True) for side in SIDES}
        self.side = own
        special = tokenizer(["a"]).special_tokens_mask[0]
        self.head = special.index(0) if 0 in special else len(special)
        self.tail = special[::-1].index(0) if 0 in special else 0
        (empty,) = tokenizer.input_ids([""])
        self._before, self._after = empty[: self.head], empty[self.head :]
        added = tokenizer(["a"], ["a"]).special_tokens_mask[0].count(1) if of_pairs else self.head + self.tail
        self.least = added + 1 + of_pairs
        if limit < self.least:
            what, own = ("pair of texts", "each text") if of_pairs else ("text", "the text")
            raise ValueError(
                f"--max-text-tokens must be {self.least} or more, got {limit}: the tokenizer adds {added} tokens to "
                f"every {what}, and one token of {own} has to be left"
            )
        self.vocab_size = tokenizer.vocab_size

    @property
    def tokenizer(self) -> Tokenizer:
        return self._of_side[self.side]

    def ids(
        self, texts: Sequence[str], truncate: bool, side: str | None = None, limit: int | None = None
    ) -> tuple[list[list[int]], int]:
        """(ids of each text, how many texts were cut).

        limit: tokens of a text at most, here and below; the model's own limit where that is less.

        Raises: ServiceError where a text is too long and is not to be cut, or cannot be cut before it is tokenised, or
        is no valid Unicode, or for a limit that leaves no token of a text.
        """
        side, limit = side or self.side, self._limit(limit)
        with _readable():
            found = self._of_side[side].input_ids(texts, limit + 1)
        return self._cut(found, truncate, side, limit)

    def of_ids(
        self,
        given: Sequence[Sequence[int]],
        truncate: bool,
        side: str | None = None,
        prompt: str = "",
        limit: int | None = None,
    ) -> tuple[list[list[int]], int]:
        """The same of ids that a client made: [CLS] and [SEP] are added where they are not there, and the tokens of the
        prompt are put before them.

        Raises: ServiceError where an id is none of the vocabulary.
        """
        found, limit = [], self._limit(limit)
        (of_prompt,) = self.tokenizer.input_ids([prompt])
        before = of_prompt[: len(of_prompt) - self.tail]
        for number, ids in enumerate(given):
            if bad := next((i for i in ids if not 0 <= i < self.vocab_size), None):
                raise ServiceError(
                    "invalid",
                    f"input {number} has the token id {bad}, and the vocabulary has {self.vocab_size:,}: these are ids "
                    "of another model's tokenizer. Send texts. langchain-openai sends ids unless it is given "
                    "check_embedding_ctx_length=False",
                    param="input",
                )
            inner = ids[self.head :] if ids[: self.head] == self._before else ids
            ids = before + inner
            if self._after and ids[-len(self._after) :] != self._after:
                ids += self._after
            found.append(ids)
        return self._cut(found, truncate, side or self.side, limit)

    def pairs(
        self,
        firsts: Sequence[str],
        seconds: Sequence[str],
        truncate: bool,
        side: str | None = None,
        most: int | None = None,
        limit: int | None = None,
    ) -> tuple[list[Any], int]:
        """(encodings of pairs, how many pairs were cut). Raises as `ids`.

        most: tokens of a second text at most. Its end is cut off first, whatever `truncate` and `side` say.
        """
        limit = self._limit(limit)
        tokenizer, shortened = self._of_side[side or self.side], [False] * len(seconds)
        if most is not None and most < limit:
            with _readable():
                seconds = _each_once(lambda text: self._of_side["right"].shortened(text, most + 1), seconds)
            found, _ = self._encodings((seconds,), True, "right", self.limit, add_special_tokens=False)
            shortened = [len(encoding.ids) > most for encoding in found]
            seconds = [
                text[: encoding.offsets[most - 1][1]] if is_cut else text
                for text, encoding, is_cut in zip(seconds, found, shortened, strict=True)
            ]
        with _readable():
            firsts, seconds = (
                _each_once(lambda text: tokenizer.shortened(text, limit), texts) for texts in (firsts, seconds)
            )
            pairs = [tokenizer.shortened_pair(*pair, limit) for pair in zip(firsts, seconds, strict=True)]
        found, cut = self._encodings(tuple(zip(*pairs, strict=True)), truncate, side, limit)
        return found, sum(map(max, cut, shortened))

    def located(
        self, texts: Sequence[str], truncate: bool, special: bool
    ) -> tuple[list[list[tuple[int, str, bool, int, int]]], int]:
        """((id, token, whether it is a special one, its start and end in characters of the text) of each token of each
        text; how many texts were cut). Raises as `ids`, and ServiceError for a text whose tokens are too far apart.

        special: whether [CLS] and [SEP] are among the tokens.
        """
        parts, places = [], []
        for number, text in enumerate(texts):
            with _readable():
                part, of_part = self.tokenizer.located(text, self.limit)
            if len(part) > MOST_SEARCHED:
                raise ServiceError(
                    "too_large",
                    f"text {number}: its {self.limit} tokens are found in {len(part):,} characters, and at most "
                    f"{MOST_SEARCHED:,} are searched for their places",
                )
            parts.append(part)
            places.append(of_part)
        found, cut = self._encodings((parts,), truncate, None, self.limit, add_special_tokens=special)
        rows = []
        for e, of_part in zip(found, places, strict=True):
            marks = map(bool, e.special_tokens_mask)
            spans = [(int(of_part[a]), int(of_part[b - 1]) + 1) if a < b else (a, b) for a, b in e.offsets]
            rows.append([(i, t, m, *span) for i, t, m, span in zip(e.ids, e.tokens, marks, spans, strict=True)])
        return rows, sum(cut)

    def _encodings(
        self, given: tuple[Sequence[str], ...], truncate: bool, side: str | None, limit: int, **options: Any
    ) -> tuple[list[Any], list[bool]]:
        with _readable():
            found = self._of_side[side or self.side](*given, max_length=limit, **options).encodings
        cut = [bool(encoding.overflowing) for encoding in found]
        if not truncate and any(cut):
            raise self._too_long(cut.index(True), limit)
        return found, cut

    def _cut(self, found: list[list[int]], truncate: bool, side: str, limit: int) -> tuple[list[list[int]], int]:
        cut = 0
        for number, ids in enumerate(found):
            if len(ids) > limit:
                if not truncate:
                    raise self._too_long(number, limit)
                cut += 1
                if side == "right":
                    found[number] = ids[: limit - self.tail] + ids[len(ids) - self.tail :]
                else:
                    found[number] = ids[: self.head] + ids[len(ids) - limit + self.head :]
        return found, cut

    def _limit(self, asked: int | None) -> int:
        if asked is not None and asked < self.least:
            raise ServiceError(
                "invalid", f"truncate_prompt_tokens must be {self.least} or more with this model, or -1, got {asked}",
                param="truncate_prompt_tokens",
            )  # fmt: skip
        return self.limit if asked is None else min(asked, self.limit)

    def _too_long(self, number: int, limit: int) -> ServiceError:
        # Clients look for the words "context length", some of them to send the text again in parts.
        return ServiceError(
            "too_large",
            f"text {number} exceeds the context length of {limit} tokens that this model is served with, and the "
            "request says that it must not be cut",
            code="context_length_exceeded",
        )


def _each_once(function: Callable[[str], str], texts: Sequence[str]) -> list[str]:
    """function(text) of each text; one that occurs several times, as a query in each pair, is computed once."""
    found = {text: function(text) for text in dict.fromkeys(texts)}
    return [found[text] for text in texts]


@contextmanager
def _readable() -> Iterator[None]:
    """Makes errors of the tokenizer errors of the request."""
    try:
        yield
    except UncutError as error:
        raise ServiceError("too_large", str(error)) from error
    except ValueError as error:
        raise ServiceError("tokenizer", str(error)) from error


def announced(texts: Sequence[Any], limit: int | None) -> int:
    """Tokens that texts, lists of ids or pairs are taken to have until they are tokenised: of a word of English with
    its space, one for four characters. limit: tokens at which each is cut; None for texts that are not cut."""
    tokens = (2 + length_of(text) // 4 for text in texts)
    return sum(tokens if limit is None else (min(limit, n) for n in tokens))


def length_of(text: Any) -> int:
    """Characters of a text, of a pair of texts together; of ids four for each."""
    if isinstance(text, str):
        return len(text)
    return sum(len(part) if isinstance(part, str) else 4 for part in text)
