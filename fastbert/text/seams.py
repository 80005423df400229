"""Cuts long texts for tokenizers with byte-level BPE or Unigram, without changing the tokens that are kept.

Such a tokenizer finds added tokens in a text, normalises what is between them, finds added tokens there too, splits the
rest into words, and makes tokens of each word by itself. Two questions decide where a text may be cut.

**Is the place a seam?** The text before a seam becomes the same normalised text with the same added tokens, whatever
follows. That is certain under these conditions on the characters beside it:

    The one behind is of `BEGINNING`: Unicode neither moves such a character nor joins it with one before it, so a
    normalised segment and a grapheme cluster end there. The one before is no Hangul jamo, joiner or control character,
    and none of the few letters that are in one cluster with whatever follows.
    The one before is no whitespace, so neither an added token nor a normalizer takes spaces from both sides.
    No added token contains the two in this order, or ends with the one before. So no added token reaches over the
    seam, and whether there is one before the seam does not depend on what is behind.
    Neither is in a pattern of several characters that the normalizer replaces.

A place within a gap is as good as a seam under other conditions, see `_is_in_gap`.

**Which tokens before a seam are final?** The pre-tokenizers here split from left to right, and look no further than to
the character behind a word, except for an apostrophe; so no seam is within "'re" or the like. All words before a seam
are therefore final except for the last, which may go on.

    A space behind another character always begins a word, so at such a seam the last word is final, too.
    Where the last word may go on: in every longer word the seam is the end of a token, or a token reaches over it. No
    merge of BPE has joined what is before the beginning of that token with what is behind, so the tokens before it are
    those of a word that ends there. The same is true of Unigram, whose best path to a place does not depend on what
    follows. The vocabulary tells where a token that reaches over the seam can begin. If the words that end at these
    places and at the seam all have the same first tokens, every longer word has them.
"""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from .calling import encoded
from .characters import BEGINNING, SURROGATE, WHITE, is_apart, is_ending, is_space, is_white
from .paths import BYTE
from .runs import Runs
from .unknown import Unknown

_CHARACTER_BY_CHARACTER = (
    normalizers.NFC, normalizers.NFD, normalizers.NFKC, normalizers.NFKD, normalizers.Precompiled, normalizers.Nmt,
    normalizers.Lowercase, normalizers.StripAccents, normalizers.Strip, normalizers.Prepend,
)  # fmt: skip
# Patterns of normalizers that match whitespace only.
_OF_SPACES = (" {2,}", r"\s{2,}", r"\s+", r"\n", r"[\n\r\t]", r"\s{2,}|[\n\r\t]", r"(\n){1,}")
# Patterns that split words: of GPT-2, and with numbers of three digits (GPT-4, Llama 3) or one (Qwen).
_AS_IN_GPT_4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_OF_WORDS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    _AS_IN_GPT_4 % "{1,3}",
    _AS_IN_GPT_4 % "",
)
_NEWLINE = re.compile(r"[\r\n]")
# Two words, or one with the letter behind, as in "'re", "'ve" and "'ll".
_CONTRACTED = re.compile("'[rvl]$", re.IGNORECASE)
# Characters per wanted token from which on a text is cut. The beginning is tokenised once more to count its tokens.
_WORTH_CUTTING = 16
# Characters per wanted token of the beginnings that are tried.
_SIZES = (8, 32, 128, 512)
# How many of them are tried before a text is shortened, which looks at all of it.
_BEFORE_SHORTENING = 2
# Characters before the end of such a beginning in which a seam is searched.
_SEARCHED = 512
_LONGEST_CLUSTER = 64
_GAPS = WHITE + "\u200b\ufeff"
_LONG_GAP = 64
_KEPT = 4096


class Seams:
    """Cuts texts for one tokenizer, for which `of` says whether that is possible."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        steps, words = _flat(backend.normalizer), _flat(backend.pre_tokenizer)
        contents = [token.content for token in backend.get_added_tokens_decoder().values()]
        self._contents = {*contents, *map(self._normalised, contents)} - {""}
        self._ends = {content[-1] for content in self._contents}
        self._starts = {content[0] for content in self._contents}
        patterns = [_pattern(step) for step in steps if isinstance(step, normalizers.Replace)]
        self._avoided = set("".join(of_text for of_text, _ in patterns if of_text and len(of_text) > 1))
        # What a normalizer puts in place of several spaces.
        self._for_spaces = [content for _, (expression, content) in patterns if expression]
        self._is_plain = not steps
        self._strips = any(isinstance(step, normalizers.Strip) for step in steps)
        self._by_expression = any(isinstance(p, (pre_tokenizers.ByteLevel, pre_tokenizers.Split)) for p in words)
        # Whether a gap of different spaces is split as one of equal spaces, or at its last newline, too.
        replaces = any(isinstance(step, normalizers.Replace) for step in steps)
        self._splits_at_newlines = not replaces and any(map(_splits_at_newlines, words))
        self._mixes_spaces = self._splits_at_newlines or (
            not replaces and all(isinstance(part, pre_tokenizers.ByteLevel) and part.use_regex for part in words)
        )
        self._drops_spaces = all(map(str.isspace, self._for_spaces)) and any(
            isinstance(part, pre_tokenizers.WhitespaceSplit) for part in words
        )
        # Where an end of a text is tokenised by itself, its first word must not get another mark of a beginning.
        self._keeps_ends = not any(isinstance(step, normalizers.Prepend) for step in steps) and all(
            part.prepend_scheme == "always" for part in words if isinstance(part, pre_tokenizers.Metaspace)
        )
        self._begins_words_at_signs = self._by_expression and (
            all(isinstance(part, pre_tokenizers.ByteLevel) for part in words)
            or not any(part.add_prefix_space for part in words if isinstance(part, pre_tokenizers.ByteLevel))
        )
        self._made: dict[str, str] = {}
        signs = {one[:1] for one in (self._becomes(" "), *self._for_spaces)}
        self._spaces_end_words = any(_splits_at(part, signs) for part in words)

    @classmethod
    def of(cls, backend: tokenizers.Tokenizer) -> Seams | None:
        """None if the tokenizer has a part of which it is not known what it does across a place in a text."""
        model, words = backend.model, _flat(backend.pre_tokenizer)
        if isinstance(model, models.BPE):
            if model.dropout or model.ignore_merges or model.continuing_subword_prefix or model.end_of_word_suffix:
                return None
        elif not isinstance(model, models.Unigram):
            return None
        if not all(map(_is_local, _flat(backend.normalizer))) or not all(map(_splits_forwards, words)):
            return None
        if any(isinstance(part, (pre_tokenizers.Metaspace, pre_tokenizers.ByteLevel)) for part in words[:-1]):
            return None  # the parts behind it would not see spaces
        added, normalizer = backend.get_added_tokens_decoder().values(), backend.normalizer
        if normalizer is not None and not all(normalizer.normalize_str(a.content) for a in added if a.normalized):
            return None  # the library finds nothing, which such a token becomes, between any two characters
        return cls(backend)

    def beginning(self, text: str, tokens: int, shorten: bool = False) -> str:
        """As `Cutter.text`."""
        wanted = tokens + 1
        if len(text) <= _WORTH_CUTTING * wanted:
            return text
        if (at := self._cut_at(text, wanted, _SIZES[:1])) is not None:
            return text[:at]
        if (found := self._runs.beginning(text, wanted, shorten)) is not None:
            return found
        at = self._cut_at(text, wanted, _SIZES[1:_BEFORE_SHORTENING])
        if at is None and shorten and len(short := self._shortened(text)) < len(text):
            return self.beginning(short, tokens)
        return text[: at or self._cut_at(text, wanted, _SIZES[_BEFORE_SHORTENING:])]

    def _cut_at(self, text: str, wanted: int, sizes: tuple[int, ...]) -> int | None:
        for size in sizes:
            if size * wanted >= len(text):
                return None
            if SURROGATE.search(text, 0, size * wanted + 1):
                return len(text)  # the text is refused when it is tokenised
            at = self._seam_before(text, size * wanted)
            if at and self._has_final(text, at, wanted):
                return at
        return None

    def ending(self, text: str, tokens: int, shorten: bool = False) -> str:
        """As `Cutter.ending`."""
        wanted = tokens + 1
        if not (self._keeps_ends and self._spaces_end_words) or len(text) <= _WORTH_CUTTING * wanted:
            return text
        for size in _SIZES:
            start = len(text) - size * wanted
            if start <= 0 or SURROGATE.search(text, max(start - _LONGEST_CLUSTER, 0)):
                return text
            at = next((at for at in self._spaces(text, start, start + _SEARCHED)[::-1] if self._begins(text, at)), None)
            if at is not None and len(self._tokenised(text[at:])[0]) >= wanted:
                return text[at:]
            if size in _SIZES[:_BEFORE_SHORTENING] and (at := self._place_without_space(text, start, wanted)):
                return text[at:]
        short = self._shortened(text) if shorten else text
        return self.ending(short, tokens) if len(short) < len(text) else text

    def _place_without_space(self, text: str, start: int, wanted: int) -> int | None:
        """A place behind this one from which on a text has the same last tokens.

        Expressions begin a word at a sign behind a letter. In Unigram it is any place, as a word's last tokens soon do
        not depend on its first characters.
        """
        is_unigram = isinstance(self._backend.model, models.Unigram)
        if not is_unigram and not self._begins_words_at_signs:
            return None
        places = range(start, min(start + _SEARCHED, len(text)))
        at = next((at for at in places if self._parts(text, at) and (is_unigram or _is_sign(text, at))), None)
        if at is None:
            return None
        ids, pieces, words = self._tokenised(text[at:])
        if len(ids) < wanted:
            return None
        of_first = words.count(words[0])  # which may get a space before it
        if len(ids) - of_first >= wanted:
            return at
        if not is_unigram:
            return None
        word, rest = ("".join(pieces[slice(*part)]) for part in ((0, of_first), (len(ids) - wanted, of_first)))
        if [token.id for token in self._backend.model.tokenize(word)] != ids[:of_first]:
            return None
        paths = self._runs.paths
        return at if paths.are_as_expected and paths.is_settled(word, len(word) - len(rest), at) else None

    def _parts(self, text: str, at: int) -> bool:
        """Whether the text on each side of this place is normalised, and added tokens found in it, by itself."""
        if not self._is_seam(text, at):
            return False
        behind = self._becomes(text[at])
        return not ({text[at], behind[0]} & self._starts or is_space(text[at]) or is_space(behind[0]))

    def counted(self, text: str, tokens: int) -> str:
        """As `beginning`, by tokenising the whole text: up to a token's end, its tokens are those of the beginning."""
        if len(text) <= _WORTH_CUTTING * (tokens + 1) or self._backend.truncation or SURROGATE.search(text):
            return text
        whole = encoded(self._backend.encode_batch, [text], add_special_tokens=False)[0]
        if len(whole) < tokens + 2:
            return text
        part = text[: whole.offsets[tokens + 1][1]]
        ids, _, _ = self._tokenised(part)
        return part if len(ids) > tokens and ids[: tokens + 1] == whole.ids[: tokens + 1] else text

    def most_tokens(self, text: str) -> int:
        """Upper bound of a text's tokens: a token has a byte, or marks the beginning of a word, which has a byte.

        The bytes of added tokens may be those of the text as it is.
        """
        if SURROGATE.search(text):
            return len(text)  # the text is refused when it is tokenised
        size = len(text.encode())
        return 2 * (size if self._is_plain else size + len(self._normalised(text).encode())) + 2

    # ---- seams -------------------------------------------------------------------------------------------

    def _seam_before(self, text: str, end: int) -> int:
        """A seam shortly before this place; 0 if there is none. A space is preferred, which always begins a word."""
        start = max(end - _SEARCHED, 1)
        if self._spaces_end_words:
            for at in self._spaces(text, start, end):
                if self._is_seam(text, at):
                    return at
        untried = {False, True}  # of a gap one place of each kind is looked at: behind a newline, or not
        for at in range(end, start, -1):
            near = text[at - 1 : at + 2]
            if is_white(near) and (self._mixes_spaces or near == len(near) * near[0]):
                is_behind = self._splits_at_newlines and _is_behind_newline(text, at)
                if is_behind in untried and self._is_in_gap(text, at):
                    return at
                untried.discard(is_behind)
            else:
                if self._is_seam(text, at):
                    return at
                untried = {False, True}
        return 0

    def _seam_in(self, text: str, start: int, end: int) -> tuple[int, bool] | None:
        """(the last seam in a part of a text, whether a space is there, which always begins a word)."""
        for at in range(end, start - 1, -1):
            if self._is_seam(text, at):
                return at, self._spaces_end_words and text[at] == " " and not text[at - 1].isspace()
        return None

    def _spaces(self, text: str, start: int, end: int) -> list[int]:
        """The places of spaces behind other characters, the last first."""
        places = [start + match.start() for match in re.finditer(" ", text[start:end])]
        return [at for at in reversed(places) if not text[at - 1].isspace()]

    def _is_seam(self, text: str, at: int) -> bool:
        before, behind, following = text[at - 1], text[at], text[at + 1 : at + 2] or "x"
        if {before, behind} & self._avoided:
            return False
        if not self._is_plain and not (BEGINNING.match(behind) and is_ending(before)):
            return False
        cluster = self._cluster(text, at)
        first, second = self._becomes(cluster), self._becomes(behind)
        if not cluster or not first or not second or is_space(first[-1]):
            return False
        if behind != " " and any(map(is_space, second)):
            return False
        if {before, first[-1]} & self._ends:
            return False
        is_changed = not (self._is_plain or is_apart(following))  # by a mark
        if is_changed and (behind == " " or any(first[-1] in content for content in self._contents)):
            return False
        if any(pair in content for pair in (before + behind, first[-1] + second[0]) for content in self._contents):
            return False
        if not self._by_expression:
            return True
        # Normalisation makes one character of up to three.
        last = self._normalised(text[max(at - 16, 0) : at])
        return not _CONTRACTED.search(last) and (len(last) > 3 or at <= 16)

    def _cluster(self, text: str, at: int) -> str:
        """The characters before a place that are normalised apart from those before them; "" if that is not certain."""
        if self._is_plain:
            return text[at - 1]
        for start in range(at - 1, max(at - _LONGEST_CLUSTER, 0) - 1, -1):
            if BEGINNING.match(text[start]):
                return text[start:at] if start == 0 or text[start - 1].isspace() or is_ending(text[start - 1]) else ""
        return text[:at] if at < _LONGEST_CLUSTER else ""

    def _begins(self, text: str, at: int) -> bool:
        """Whether the text from the space at this seam on has the tokens that it has within the text."""
        behind = text[at + 1 : at + 2]
        return not (" " in self._starts or behind.isspace()) and self._is_seam(text, at)

    def _is_in_gap(self, text: str, at: int) -> bool:
        """Whether this place, between two spaces, is as good as a seam. They are equal if `_mixes_spaces` is not set.

        A space is normalised by itself. The gap must not end at an added token, which may take all of its spaces, or at
        the end of a text that is stripped of them. Where a gap is split at its last newline, this must be before the
        place, or the first one behind it.
        """
        if any(map(is_space, "".join(self._contents))):
            return False
        for space in text[at - 1 : at + 1]:
            if space in self._avoided or self._becomes(space) not in (" ", space):
                return False
        end = _end_of_gap(text, at) if self._mixes_spaces else _end_of_run(text, at)
        if self._splits_at_newlines and _is_within_line(text, at) and _NEWLINE.search(text, at, end):
            return False
        if end == len(text):
            return not self._strips
        behind = text[end]
        if end - at < 2 or behind == " " or not BEGINNING.match(behind) or not (second := self._becomes(behind)):
            return False
        return not {behind, second[0]} & self._starts

    def _becomes(self, char: str) -> str:
        """A normalised character, or several; "" if nothing is left, or a letter before is changed."""
        made = self._made.get(char)
        if made is None:
            if len(self._made) >= _KEPT:
                self._made.clear()
            before, _, rest = self._normalised("xx").rpartition("xx")
            between = self._normalised(f"x{char}x")
            fits = between.startswith(before + "x") and between.endswith("x" + rest)
            made = between[len(before) + 1 : len(between) - 1 - len(rest)] if fits else ""
            self._made[char] = made
        return made

    def _normalised(self, text: str) -> str:
        normalizer = self._backend.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)

    def _shortened(self, text: str) -> str:
        """A text with the same tokens at other places: two characters of each long gap that counts as so many, and
        less of each long run of unknown characters that is one token."""
        if self._gaps:
            text = self._gaps.sub(lambda gap: gap[0][0] + gap[0][-1], text)
        return self._unknown.shortened(text) if self._unknown else text

    @cached_property
    def _runs(self) -> Runs:
        return Runs(self._backend, self._tokenised, self._seam_in)

    @cached_property
    def _unknown(self) -> Unknown | None:
        if self._by_expression:
            return None  # its bytes are all known
        return Unknown(self._backend, self._becomes, self._contents, self._avoided, self._spaces_end_words)

    @cached_property
    def _gaps(self) -> re.Pattern[str] | None:
        """Matches long gaps that count as two spaces, as a normalizer joins spaces or a pre-tokenizer drops them."""
        if any(map(is_space, "".join(self._contents))):
            return None
        made = {space: self._becomes(space) for space in _GAPS}
        spaces = [space for space in _GAPS if not {space, *made[space]} & self._avoided]
        if self._drops_spaces:
            spaces = [space for space in spaces if is_white(made[space])]
        else:
            two = self._normalised("x  x")
            spaces = [space for space in spaces if all(self._normalised(f"x{' ' * n}{space}x") == two for n in (1, 2))]
            pairs = {pair: self._normalised(f"x{pair}x") for pair in map("".join, itertools.product(spaces, repeat=2))}
            spaces = [
                space for space in spaces if all(joined == two for pair, joined in pairs.items() if space in pair)
            ]
        return re.compile(f"[{''.join(spaces)}]{{{_LONG_GAP},}}") if spaces else None

    # ---- final tokens ------------------------------------------------------------------------------------

    def _has_final(self, text: str, at: int, wanted: int) -> bool:
        """Whether the text up to this seam has at least so many tokens that do not depend on what follows."""
        ids, pieces, words = self._tokenised(text[:at])
        if len(ids) < wanted:
            return False
        if self._spaces_end_words and text[at] == " " and not text[at - 1].isspace():
            return True
        before = words.index(words[-1])  # the tokens before the last word
        if before >= wanted:
            return True
        if self._for_spaces and text[at - 1 : at + 1].isspace():
            return False  # the place of what stands for all spaces of a gap goes on
        missing, word = wanted - before, "".join(pieces[before:])
        own = self._of_word(word)
        if [index for index, _ in own] != ids[before:]:  # an added token, or tokens of other characters than their own
            return False
        for end in self._ends_of_tokens(word):
            found = own if end == len(word) else self._of_word(word[:end])
            # A last token of unknown characters would go on. In Unigram, all their bytes have one place.
            if found[:missing] != own[:missing] or found[missing - 1][1] == found[-1][1]:
                return False
        return True

    def _of_word(self, word: str) -> list[tuple[int, tuple[int, int]]]:
        """(id, place) of each token."""
        return [(token.id, token.offsets) for token in self._backend.model.tokenize(word)]

    def _ends_of_tokens(self, word: str) -> Iterator[int]:
        """Each place at which a token of a longer word can end and another begin that reaches over the word's end."""
        yield len(word)
        for start in range(max(len(word) - self._longest + 1, 0), len(word)):
            rest = word[start:]
            at = bisect_right(self._vocabulary, rest)
            if at < len(self._vocabulary) and self._vocabulary[at].startswith(rest):
                yield start

    @cached_property
    def _vocabulary(self) -> list[str]:
        return sorted(self._backend.get_vocab(with_added_tokens=False))

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._vocabulary), default=0)

    def _tokenised(self, text: str) -> tuple[list[int], list[str], list[int | None]]:
        """(ids, pieces, numbers of words), without special tokens, by a backend that may truncate and pad.

        In place of a token of unknown characters, or of the first of their bytes, is what it stands for.
        """
        truncation = self._backend.truncation
        if truncation is not None and (truncation["stride"] or truncation["direction"] != "right"):
            return [], [], []
        encoding = encoded(self._backend.encode_batch, [text], add_special_tokens=False)[0]
        found: tuple[list[int], list[str], list[int | None]] = ([], [], [])
        unknown = getattr(self._backend.model, "unk_token", None)  # a BPE model gives this for what it stands for
        for part in (encoding, *encoding.overflowing):
            real = sum(part.attention_mask)
            at = slice(real) if not real or part.attention_mask[0] else slice(-real, None)
            pieces, last = part.tokens, None
            for i, (piece, place) in enumerate(zip(pieces, part.offsets, strict=True)):
                if piece == unknown or BYTE.fullmatch(piece):
                    pieces[i] = self._normalised(text[slice(*place)]) if place != last else ""
                    last = place
            for whole, of_part in zip(found, (part.ids, pieces, part.word_ids), strict=True):
                whole.extend(of_part[at])
        return found


def _flat(part: Any) -> list[Any]:
    """The parts of a normalizer or a pre-tokenizer, in order."""
    if part is None:
        return []
    if isinstance(part, (normalizers.Sequence, pre_tokenizers.Sequence)):
        return [inner for one in part for inner in _flat(one)]
    return [part]


def _pattern(part: Any) -> tuple[str | None, tuple[str | None, str]]:
    """(the text that a Replace or Split looks for, (or the regular expression, what a Replace puts there))."""
    state = json.loads(part.__getstate__())
    return state["pattern"].get("String"), (state["pattern"].get("Regex"), state.get("content", ""))


def _is_local(step: Any) -> bool:
    """Whether a normalizer's step is known not to look across a seam."""
    if isinstance(step, normalizers.Replace):
        of_text, (expression, _) = _pattern(step)
        return bool(of_text) or expression in _OF_SPACES
    return isinstance(step, _CHARACTER_BY_CHARACTER)


def _splits_forwards(part: Any) -> bool:
    """Whether a pre-tokenizer splits from left to right, as the module's docstring says."""
    if isinstance(part, pre_tokenizers.Split):
        state = json.loads(part.__getstate__())
        return state["behavior"] == "Isolated" and not state["invert"] and _pattern(part)[1][0] in _OF_WORDS
    return isinstance(part, (pre_tokenizers.WhitespaceSplit, pre_tokenizers.Metaspace, pre_tokenizers.ByteLevel))


def _splits_at(part: Any, signs: set[str]) -> bool:
    """Whether each of these signs, which stand for spaces, always begins a word behind another character."""
    if isinstance(part, pre_tokenizers.Metaspace):
        return part.split and signs <= {" ", "\u2581"}
    return signs == {" "} and not (isinstance(part, pre_tokenizers.ByteLevel) and not part.use_regex)


def _splits_at_newlines(part: Any) -> bool:
    """Whether a pre-tokenizer's expression splits a gap at its last newline."""
    return isinstance(part, pre_tokenizers.Split) and _pattern(part)[1][0] in _OF_WORDS[1:]


def _is_sign(text: str, at: int) -> bool:
    """Whether a sign other than an apostrophe is at this place, and a letter or digit before it."""
    first, second = (unicodedata.normalize("NFKC", char) for char in text[at - 1 : at + 1])
    if not (BEGINNING.match(text[at - 1]) and BEGINNING.match(text[at])) or second[0] == "'":
        return False
    return unicodedata.category(first[-1])[0] in "LN" and unicodedata.category(second[0])[0] in "PS"


def _is_behind_newline(text: str, at: int) -> bool:
    """Whether a line, in the sense of those expressions, ends at this place."""
    return text[at - 1] == "\n" or (text[at - 1] == "\r" and text[at : at + 1] != "\n")


def _is_within_line(text: str, at: int) -> bool:
    """Whether the gap at this place has a newline before, but not directly before."""
    last = max(text.rfind("\n", 0, at), text.rfind("\r", 0, at))
    return last >= 0 and not _is_behind_newline(text, at) and not text[last + 1 : at].strip(WHITE)


def _end_of_run(text: str, at: int) -> int:
    """Where the equal characters that begin here end."""
    block = text[at] * 65_536
    while text.startswith(block, at):
        at += len(block)
    rest = text[at : at + len(block)]
    return at + len(rest) - len(rest.lstrip(block[0]))


def _end_of_gap(text: str, at: int) -> int:
    """Where the spaces of all kinds that begin here end."""
    while is_white(block := text[at : at + 65_536]):
        at += len(block)
    return at + len(block) - len(block.lstrip(WHITE))
