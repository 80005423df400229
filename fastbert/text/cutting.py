"""Cuts long texts before they are tokenised, without changing the tokens that are kept.

The `tokenizers` library tokenises a whole text and then throws away what a maximum length cuts off. `seams` cuts texts
for tokenizers with byte-level BPE or Unigram, and this module for those of BERT. BERT's tokens are made of one word at
a time, and a word ends at a space, and on either side of a Chinese character or a punctuation mark. So a text may be
cut at such a boundary if there are enough tokens before it. A lower bound of their number is known without tokenising:

    a boundary is a space before a letter or a digit; or the place before a Chinese character or a punctuation mark
    from a boundary to the next there is one of these characters, and so at least one token
    before the boundary of number n there are at least n - 1 tokens

Added tokens ("[MASK]") are searched in the text before it is split into words. A kind of boundary that an added token
could contain is not used; where no kind is left, texts are not cut. An added token that depends on what follows it
(spaces, or a letter) may change if it is the last before the cut, so one token more than is kept stands before the cut.

Where such boundaries are rare, as in a text that is one long word, the kinds of all characters are looked at.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import islice

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from .calling import encoded
from .characters import SURROGATE
from .kinds import Kinds
from .seams import Seams

# Characters that remain letters when a text is lower-cased or stripped of accents: Latin, Greek, Cyrillic, Hebrew,
# Arabic, Devanagari, kana and Hangul, without the marks and signs between them.
_LETTERS = (
    "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0391-\u03a1\u03a3-\u03c9\u0400-\u0481\u048a-\u052f\u05d0-\u05ea"
    "\u0621-\u063a\u0641-\u064a\u0904-\u0939\u3041-\u3096\u30a1-\u30fa\uac00-\ud7a3"
)
_SPACE = f"[ \\t\\n\\r](?=[{_LETTERS}0-9])"
# Punctuation: each mark is a token by itself.
_MARKS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
# Two of the blocks that BERT's normalizer treats as Chinese characters.
_CHINESE = "(?=[\u3400-\u4dbf\u4e00-\u9fff])"
# Texts of fewer characters per wanted token are not searched: most of them have no surplus tokens.
_CHARACTERS_PER_TOKEN = 8
# Most tokens of one character outside ASCII: normalisation makes up to four characters of it, each possibly a token.
_TOKENS_PER_CHARACTER = 4
# Characters per wanted token in which boundaries are searched one by one.
_SEARCHED_PER_TOKEN = 64
# Characters tokenised at once to count tokens.
_COUNTED = 65_536
# Characters of a text from which on it is searched for long words and gaps.
_WORTH_SHORTENING = 16_384
# Characters per wanted token up to which a text that cannot be cut is tokenised whole where others are refused.
_MOST_PER_TOKEN = 512


class UncutError(ValueError):
    """A text is too long to be tokenised whole, and no place is known at which its tokenizer could stop."""


class Cutter:
    """Cuts texts for one tokenizer. Its added tokens and its normalizer must not change afterwards.

    Args:
        is_bounded: whether the methods that cut raise UncutError for a text of more than 512 characters for each wanted
            token that cannot be cut, instead of returning it as it is.
    """

    def __init__(self, backend: tokenizers.Tokenizer, is_bounded: bool = False) -> None:
        self._backend, self._is_bounded = backend, is_bounded
        self._boundary = _boundary_of(backend)
        self._seams = Seams.of(backend) if self._boundary is None else None

    @cached_property
    def _kinds(self) -> Kinds:
        return Kinds(self._backend)

    def text(self, text: str, tokens: int, shorten: bool = False) -> str:
        """The text, or a beginning of it with the same first `tokens` tokens and at least one more token.

        shorten: whether characters within may be left out as well, which changes the places of the tokens.
        """
        return self._expect_cut(self._beginning(text, tokens, shorten), tokens)

    def ending(self, text: str, tokens: int, shorten: bool = False) -> str:
        """The text, or an end of it with the same last `tokens` tokens and at least one more token."""
        return self._expect_cut(self._ending(text, tokens, shorten), tokens)

    def _expect_cut(self, text: str, tokens: int) -> str:
        """A text that is to be tokenised. BERT's own tokens are quickly made of any text."""
        most = _MOST_PER_TOKEN * (tokens + 1)
        if self._is_bounded and self._boundary is None and len(text) > most:
            raise UncutError(
                f"a text has {len(text):,} characters without a place at which this model's tokenizer could stop; such "
                f"a text may have at most {most:,} here"
            )
        return text

    def _beginning(self, text: str, tokens: int, shorten: bool = False) -> str:
        if self._seams is not None:
            return self._seams.beginning(text, tokens, shorten)
        if self._boundary is None or len(text) <= _CHARACTERS_PER_TOKEN * (tokens + 1):
            return text
        # The first boundary can be the start of the text, so n + 1 tokens stand before boundary n + 2.
        boundaries = self._boundary.finditer(text, 0, _SEARCHED_PER_TOKEN * (tokens + 1))
        boundary = next(islice(boundaries, tokens + 1, None), None)
        if boundary is not None:
            return text[: boundary.start()]
        return self._kinds.beginning(text, tokens, shorten)

    def _ending(self, text: str, tokens: int, shorten: bool = False) -> str:
        """`ending`; as in `_beginning`, there is at least one token from one boundary to the next."""
        if self._seams is not None:
            return self._seams.ending(text, tokens, shorten)
        if self._boundary is None or len(text) <= _CHARACTERS_PER_TOKEN * (tokens + 1):
            return text
        size = _CHARACTERS_PER_TOKEN * (tokens + 1)
        while size <= _SEARCHED_PER_TOKEN * (tokens + 1):
            start = max(len(text) - size, 0)
            boundaries = [match.start() for match in self._boundary.finditer(text, start)]
            if len(boundaries) > tokens + 1:
                return text[boundaries[-tokens - 2] :]
            size *= 2
        return self._kinds.ending(text, tokens, shorten)

    @property
    def ignores_outer_spaces(self) -> bool:
        """Whether spaces at the ends of a text certainly make no tokens."""
        return self._seams is None

    def shortened(self, text: str) -> str:
        """A text with the same tokens, at other places: without the middle of long words and gaps."""
        if self._boundary is None or len(text) <= _WORTH_SHORTENING:
            return text
        return self._kinds.shortened(text)

    def alone(self, text: str, tokens: int, is_ending: bool) -> str:
        """A text with the same first (or last) `tokens` ids, at other places, and few more.

        It is for a pair, of which the library makes a window of each two windows of its texts.
        """
        text = self.shortened((self.ending if is_ending else self.text)(text, tokens, True))
        if self._boundary is None or len(text) <= tokens:
            return text
        try:
            (whole,) = encoded(self._backend.encode_batch, [text], add_special_tokens=False)
        except ValueError:  # the text is refused when it is tokenised for the model
            return text
        if len(whole.ids) <= 2 * tokens:
            return text
        part = text[whole.offsets[-tokens - 8][0] :] if is_ending else text[: whole.offsets[tokens + 8][1]]
        ids = self._backend.encode(part, add_special_tokens=False).ids
        kept = slice(-tokens, None) if is_ending else slice(tokens)
        return part if len(ids) > tokens and ids[kept] == whole.ids[kept] else text

    def located(self, text: str, tokens: int, is_ending: bool) -> tuple[str, Sequence[int] | np.ndarray]:
        """(a text with the same first (or last) `tokens` ids, and at least one more if this text has more; the place in
        this text of each of its characters)."""
        part = self.ending(text, tokens) if is_ending else self.text(text, tokens)
        start = len(text) - len(part) if is_ending else 0
        if self._boundary is None or len(part) <= _WORTH_SHORTENING:
            return part, range(start, start + len(part))
        short, places = self._kinds.located(part)
        return short, places + start

    def texts(self, texts: list[str], tokens: int, shorten: bool = False) -> list[str]:
        """`text` of each."""
        is_never = self._boundary is None and self._seams is None and not self._is_bounded
        if is_never or max(map(len, texts), default=0) <= _CHARACTERS_PER_TOKEN * (tokens + 1):
            return texts
        return [self.text(text, tokens, shorten) for text in texts]

    def _count(self, text: str) -> int:
        """The tokens of a whole text, which is tokenised part by part: at once, megabytes would take gigabytes."""
        count, rest, text = 0, "", self.shortened(text)
        for at in range(0, len(text), _COUNTED):
            rest += text[at : at + _COUNTED]
            end = self._kinds.last_boundary(rest)
            count += self._tokens(rest[:end])
            rest = rest[end:]
        return count + self._tokens(rest)

    def _has_more_tokens(self, first: str, second: str, part: Callable[[str, int], str]) -> bool:
        """Whether the first text has more tokens. Of the one with more characters no more than needed are counted."""
        count = self._count if self._seams is None else self._tokens
        if len(first) < len(second):
            tokens = count(first)
            return part(second, tokens) is second and tokens > count(second)
        tokens = count(second)
        return part(first, tokens) is not first or count(first) > tokens

    def _tokens(self, text: str) -> int:
        return len(self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def pair(self, first: str, second: str, tokens: int, strategy: str, is_ending: bool = False) -> tuple[str, str]:
        """A pair that truncates to the same `tokens` tokens by this strategy; is_ending: if ends of texts are kept."""
        cut = self.ending if is_ending else self.text
        if strategy == "only_first":
            return cut(first, tokens), second
        if strategy == "only_second":
            return first, cut(second, tokens)
        # longest_first takes tokens from the longer text until both have the same number. If the limit is odd, the text
        # that was longer keeps the odd token, so the cut texts must not change which one is longer.
        short_first, short_second = cut(first, tokens), cut(second, tokens)
        part = self._ending if is_ending else self._beginning
        if self._seams is not None and not is_ending:
            # The library makes a window of each two windows, so that of two texts left whole it may make millions.
            short_first, short_second = (self._seams.counted(text, tokens) for text in (short_first, short_second))
        if short_first is not first and short_second is not second:
            if tokens % 2 == 0:
                return short_first, short_second
            if part(second, self._most_tokens(first)) is not second:  # the second text certainly has more tokens
                return short_first, part(second, self._most_tokens(short_first))
            if part(first, self._most_tokens(second)) is not first:
                return part(first, self._most_tokens(short_second)), short_second
            if self._backend.truncation or self._backend.padding:
                return first, second  # such a backend does not tell how many tokens a whole text has
            if any(map(SURROGATE.search, (first, second))):
                return first, second  # the pair is refused when it is tokenised
            if self._seams is None and any(
                token.single_word for token in self._backend.get_added_tokens_decoder().values()
            ):
                return first, second  # whether such a token is one depends on characters behind a boundary, too
            if self._has_more_tokens(first, second, part):
                return part(first, self._most_tokens(short_second)), short_second
            return short_first, part(second, self._most_tokens(short_first))
        if short_second is not second:
            return first, part(second, max(tokens, self._most_tokens(first)))
        return part(first, max(tokens, self._most_tokens(second))), second

    def _most_tokens(self, text: str) -> int:
        """Upper bound of a text's tokens. Of BERT's, each has at least one character after normalisation."""
        if self._seams is not None:
            return self._seams.most_tokens(text)
        return len(text) if text.isascii() else _TOKENS_PER_CHARACTER * len(text)


class KeptCutter:
    """The cutter of a tokenizer that others use too: made anew if that has changed, or is another one."""

    def __init__(self) -> None:
        self._kept: tuple[tuple, tokenizers.Tokenizer, Cutter] | None = None

    def of(self, backend: tokenizers.Tokenizer) -> Cutter:
        parts = [None if part is None else part.__getstate__() for part in (backend.normalizer, backend.pre_tokenizer)]
        added, model = sorted(map(str, backend.get_added_tokens_decoder().items())), backend.model
        options = [getattr(model, name, None) for name in ("dropout", "ignore_merges", "unk_token", "fuse_unk")]
        facts = (added, *parts, type(model), *options, backend.get_vocab_size())
        if self._kept is None or self._kept[0] != facts or self._kept[1] is not backend:
            self._kept = facts, backend, Cutter(backend)
        return self._kept[2]


def _boundary_of(backend: tokenizers.Tokenizer) -> re.Pattern[str] | None:
    """A pattern that matches at boundaries that are safe for this tokenizer; None if no kind of boundary is safe."""
    normalizer = backend.normalizer
    if isinstance(normalizer, normalizers.Sequence):  # lower-casing first is harmless: letters remain letters
        normalizer, *others = [part for part in normalizer if not isinstance(part, normalizers.Lowercase)] or [None]
        normalizer = None if others else normalizer
    if not (
        isinstance(backend.model, models.WordPiece)
        and isinstance(normalizer, normalizers.BertNormalizer)
        and isinstance(backend.pre_tokenizer, pre_tokenizers.BertPreTokenizer)
    ):
        return None
    kinds = []
    added = [token.content for token in backend.get_added_tokens_decoder().values()]
    if not any(re.search(r"\s", content) for content in added):
        kinds.append(_SPACE)
    if normalizer.handle_chinese_chars and not any(re.search(_CHINESE, content) for content in added):
        kinds.append(_CHINESE)
    # A punctuation mark that an added token contains ("[MASK]") is no boundary.
    if marks := [mark for mark in _MARKS if not any(mark in content for content in added)]:
        kinds.append(f"(?=[{re.escape(''.join(marks))}])")
    return re.compile("|".join(kinds)) if kinds else None
