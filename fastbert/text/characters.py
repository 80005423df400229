"""Which characters Unicode normalises apart from those beside them."""

from __future__ import annotations

import re
import unicodedata

# Punctuation, digits and letters that begin a grapheme cluster, and that no normalisation joins with what is before.
BEGINNING = re.compile(
    "[ -~\u00a1-\u00ac\u00ae-\u02ff\u0391-\u03a1\u03a3-\u03c9\u0400-\u0481\u048a-\u052f\u05d0-\u05ea\u0621-\u063a"
    "\u0641-\u064a\u0e01-\u0e30\u0e40-\u0e45\u1e00-\u1eff\u2010-\u2027\u3001-\u3029\u3041-\u3096\u30a1-\u30fa\u3400-\u4dbf\u4e00-\u9fff"
    "\uac00-\ud7a3\uff01-\uff5e\U0001f600-\U0001f64f]"
)
_JAMO = re.compile("[\u1100-\u11ff\ua960-\ua97f\ud7b0-\ud7ff]")
# Letters that are in one grapheme cluster with whatever follows are U+0D4E, and further ones in these blocks.
_STICKING = re.compile("[\u0d4e\U00011000-\U00011fff]")
# Unicode's white space, without four separators that Python counts as such.
WHITE = "".join(char for char in map(chr, range(0x3001)) if char.isspace() and char not in "\x1c\x1d\x1e\x1f")
SURROGATE = re.compile("[\ud800-\udfff]")
# Behind another character, these are in its grapheme cluster, or normalisation may join them with it.
_JOINING = "\u0e33\u0eb3\uff9e\uff9f"


def joins(char: str) -> bool:
    """Whether a letter, digit or sign may be normalised or in one grapheme cluster with one beside it."""
    return bool(_JAMO.match(char) or _STICKING.match(char)) or char in _JOINING


def is_ending(char: str) -> bool:
    """Whether a character ends a grapheme cluster if one of `BEGINNING` follows, and is no whitespace."""
    return unicodedata.category(char)[0] in "LNPSM" and not (_JAMO.match(char) or _STICKING.match(char))


def is_white(text: str) -> bool:
    """Whether there are characters, and all are of `WHITE`."""
    return text.isspace() and not any(char in text for char in "\x1c\x1d\x1e\x1f")


def is_space(char: str) -> bool:
    return char.isspace() or char == "\u2581"


def is_apart(char: str) -> bool:
    """Whether a character is normalised apart from a space or a character of `BEGINNING` before it."""
    first = unicodedata.normalize("NFKD", char)[0]  # of some letters a mark or a jamo
    return bool(BEGINNING.match(char)) or (unicodedata.category(first)[0] in "LN" and not _JAMO.match(first))
