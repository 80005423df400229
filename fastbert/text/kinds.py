"""What each character of a text becomes, and long runs of characters shortened without a change of the tokens.

BERT's normalizer and pre-tokenizer treat a character alike wherever it stands, so each character is of one kind:

    DROPPED  it disappears: control characters, and accents where they are stripped
    PARTING  it disappears as well, but only after marks have been sorted, which it keeps from changing places
    SPACE    it ends a word, and is dropped
    LETTER   it is a part of a word, or several parts
    MARK     it is a word by itself: punctuation, a Chinese character
    INNER    a mark behind whose beginning an added token may go on ("]" of "[MASK]")
    OTHER    anything else

A word longer than WordPiece's limit is [UNK] whatever its letters are, spaces are dropped however many there are. So of
a run of letters, or of spaces, with dropped characters between, the middle can be left out, as long as enough remains
on both sides: enough letters for [UNK], and as many characters as the longest added token has, which is searched first.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from unicodedata import combining

import numpy as np
import tokenizers

_UNKNOWN, DROPPED, PARTING, SPACE, LETTER, MARK, INNER, OTHER = range(8)
_CODES = 0x110000
_SURROGATES = slice(0xD800, 0xE000)
_CHUNK = 65_536  # characters looked at together: few enough for the processor's cache


class Kinds:
    """The kinds of characters for one tokenizer with WordPiece and BERT's pre-tokenizer.

    Its normalizer must treat each character by itself: BertNormalizer, or that after Lowercase.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._table = np.zeros(_CODES, np.uint8)
        self._table[_SURROGATES] = OTHER
        self._sorts = backend.normalizer.normalize_str("a\u0301a") == "aa"  # accents, before it strips them
        added = [token.content for token in backend.get_added_tokens_decoder().values()]
        contents = {*added, *map(backend.normalizer.normalize_str, added)}
        self._inner = set("".join(content[1:] for content in contents))
        kinds = [{self.of(char) for char in content} for content in contents]
        self._spaces_end_words = not any(SPACE in of_content for of_content in kinds)
        # An added token of letters alone could stand in a run of them.
        self._shortened = [
            kind
            for kind in (LETTER, SPACE, DROPPED)
            if not any(of_content <= {kind, DROPPED, PARTING} for of_content in kinds)
        ]
        self._ascii = bytes(self.of(chr(code)) for code in range(256))
        self._ends = max(map(len, contents), default=0) + 1
        self._kept = max(backend.model.max_input_chars_per_word, self._ends) + 1

    def of(self, char: str) -> int:
        """The kind of a character."""
        code = ord(char)
        if self._table[code] == _UNKNOWN:
            self._table[code] = self._find(char)
        return int(self._table[code])

    def _find(self, char: str) -> int:
        between = self._backend.normalizer.normalize_str(f"a{char}a")
        made = between[1:-1]
        if not made:
            return PARTING if self._sorts and unicodedata.category(char) == "Mn" and not combining(char) else DROPPED
        if self._sorts and any(map(combining, (char, *made))):
            return OTHER
        words = [word for word, _ in self._backend.pre_tokenizer.pre_tokenize_str(between)]
        if words == ["a", "a"]:
            return SPACE
        if words == [between]:
            return LETTER
        if len(words) == 3 and len(words[1]) == 1:
            return INNER if self._inner.intersection((char, *made)) - {" "} else MARK
        return OTHER

    def beginning(self, text: str, tokens: int, shorten: bool) -> str:
        """A text with the same first `tokens` tokens, and one more if the text has more: a beginning of the text.

        shorten: whether long runs may also be shortened, which changes the places of the tokens.
        """
        return self._part(text, tokens, shorten, range(0, len(text), _CHUNK))

    def ending(self, text: str, tokens: int, shorten: bool) -> str:
        """The same of the end of the text."""
        return self._part(text, tokens, shorten, range(0, len(text), _CHUNK)[::-1])

    def _part(self, text: str, tokens: int, shorten: bool, chunks: range) -> str:
        # The first boundary can be the start of the text, so n + 1 tokens stand before boundary n + 2.
        missing, parts, is_cut = tokens + 2, [], False
        for at in chunks:
            chunk, boundaries = self._looked_at(text[at : at + _CHUNK], shorten)
            is_cut = len(boundaries) >= missing
            if is_cut:
                chunk = chunk[: boundaries[missing - 1]] if chunks.step > 0 else chunk[boundaries[-missing] :]
            parts.append(chunk)
            if is_cut:
                break
            missing -= len(boundaries)
        if not is_cut and not shorten:
            return text
        found = "".join(parts[:: 1 if chunks.step > 0 else -1])
        # A run that goes on over several chunks was shortened in each of them.
        return self.shortened(found) if shorten and len(parts) > 1 and len(found) < len(text) else found

    def shortened(self, text: str) -> str:
        """A text with the same tokens."""
        while True:
            found = "".join(self._looked_at(text[at : at + _CHUNK], True)[0] for at in range(0, len(text), _CHUNK))
            if len(found) == len(text) or len(text) <= _CHUNK:
                return found
            text = found

    def located(self, text: str) -> tuple[str, np.ndarray]:
        """(the shortened text, the place in the text of each of its characters). The first character of a word, and the
        last one that is not dropped, are among them.

        Where marks are sorted, the library gives places that depend on characters between, so nothing is left out.
        """
        whole, places = text, None
        while True:
            parts, kept = [], [np.empty(0, np.intp)]
            for at in range(0, len(text), _CHUNK):
                chunk = text[at : at + _CHUNK]
                encoding, codes, kinds = self._kinds_of(chunk)
                if ((kinds == PARTING) | (kinds == OTHER)).any():
                    return whole, np.arange(len(whole))
                of_chunk = self._kept_of(kinds)
                if of_chunk is not None:
                    chunk = codes[of_chunk].tobytes().decode(encoding, "surrogatepass")
                parts.append(chunk)
                kept.append(at + (np.arange(len(chunk)) if of_chunk is None else np.flatnonzero(of_chunk)))
            found, of_text = "".join(parts), np.concatenate(kept)
            places = of_text if places is None else places[of_text]
            if len(found) == len(text) or len(text) <= _CHUNK:
                return found, places
            text = found

    def last_boundary(self, text: str) -> int:
        """The last place where the text can be cut in two parts with the same tokens together; 0 if there is none."""
        _, boundaries = self._looked_at(text, False)
        return int(boundaries[-1]) if len(boundaries) else 0

    def _looked_at(self, chunk: str, shorten: bool) -> tuple[str, Sequence[int]]:
        """(the chunk, shortened if asked for; places in it where a text can be cut: marks, and spaces before letters).

        From one such place to the next there is a mark or a letter, and so at least one token.
        """
        encoding, codes, kinds = self._kinds_of(chunk)
        if shorten:
            kept = self._kept_of(kinds)
            if kept is not None:
                codes, kinds = codes[kept], kinds[kept]
                chunk = codes.tobytes().decode(encoding, "surrogatepass")
        boundaries = kinds == MARK
        if self._spaces_end_words:
            boundaries[:-1] |= (kinds[:-1] == SPACE) & (kinds[1:] == LETTER)
        return chunk, np.flatnonzero(boundaries)

    def _kinds_of(self, chunk: str) -> tuple[str, np.ndarray, np.ndarray]:
        """(an encoding, the characters of the chunk as numbers in this encoding, their kinds)."""
        if chunk.isascii():  # twice as fast as by the table
            codes = np.frombuffer(chunk.encode("latin-1"), np.uint8)
            return "latin-1", codes, np.frombuffer(codes.tobytes().translate(self._ascii), np.uint8)
        codes = np.frombuffer(chunk.encode("utf-32-le", "surrogatepass"), np.uint32)
        kinds = self._table[codes]
        if not kinds.all():
            for code in np.unique(codes[kinds == _UNKNOWN]).tolist():
                self.of(chr(code))
            kinds = self._table[codes]
        return "utf-32-le", codes, kinds

    def _kept_of(self, kinds: np.ndarray) -> np.ndarray | None:
        """[characters] bool, which of them are kept; None for all."""
        if len(kinds) <= 4 * (self._ends + self._kept):
            return None
        runs, dropped = kinds, kinds <= PARTING
        if dropped.all():
            runs = np.full_like(kinds, DROPPED)
        elif dropped.any() and (only := self._only_run(kinds)):
            runs = np.full_like(kinds, only)
        elif dropped.any():  # such characters are parts of the run of letters or spaces before them, if there is one
            places = np.arange(len(kinds), dtype=np.int32)
            before = kinds[np.maximum.accumulate(np.where(dropped, 0, places))]
            runs = np.where(dropped & ((before <= PARTING) | (before == MARK) | (before == INNER)), DROPPED, before)
        ends = np.flatnonzero(runs[1:] != runs[:-1]) + 1
        starts, ends = np.concatenate(([0], ends)), np.concatenate((ends, [len(runs)]))
        long = ends - starts > 4 * (self._ends + self._kept)
        long &= np.isin(runs[starts], self._shortened)
        if not long.any():
            return None
        kept = np.ones(len(kinds), bool)
        for start, end in zip(starts[long].tolist(), ends[long].tolist(), strict=True):
            middle = slice(start + self._ends, end - self._ends)
            if runs[start] == DROPPED:
                staying = np.flatnonzero(kinds[middle] == PARTING)[:1]
            elif dropped[middle].any():
                staying = np.flatnonzero(~dropped[middle])
            else:
                staying = range(end - start - 2 * self._ends)
            if len(staying) > 2 * self._kept:
                staying = [*staying[: self._kept], *staying[-self._kept :]]
            kept[middle] = False
            kept[middle][staying] = True
        return kept

    def _only_run(self, kinds: np.ndarray) -> int:
        """LETTER or SPACE if the characters are one run of that kind, which begins with it; else 0."""
        if kinds[0] not in (LETTER, SPACE):
            return 0
        others = np.bincount(kinds, minlength=OTHER + 1)
        others[[DROPPED, PARTING, kinds[0]]] = 0
        return 0 if others.any() else int(kinds[0])
