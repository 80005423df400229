"""Words of English text by the rules of the Penn Treebank, as in nltk's `word_tokenize`, which CMRC's scorer calls.

Each rule puts spaces around its matches, and the text is then split at white space. The text counts as one sentence;
nltk would first split it into sentences, which needs a trained model. Lower-case text is expected.
"""

from __future__ import annotations

import re

_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # opening quotes
        (r"[«“‘„]|`+", r" \g<0> "),  # noqa: RUF001
        (r'^"', "``"),
        (r"``", r" \g<0> "),
        (r"([ (\[{<])(?:\"|'')", r"\1 `` "),
        (r"(?<!\w)'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)", "' "),
        # a full stop at the end of the text or before closing marks; others belong to abbreviations and numbers
        (r"([^.])\.([\])}>\"'»”’ ]*)\s*$", r"\1 . \2 "),  # noqa: RUF001
        # a colon or a comma, but not within a number
        (r"([:,])(\D)", r" \1 \2"),
        (r"[:,]$", r" \g<0> "),
        (r"\.{2,}", r" \g<0> "),
        (r"[;@#$%&\u2012-\u2015?!]", r" \g<0> "),
        (r"([^'])' ", r"\1 ' "),
        (r"[*\][(){}<>]|--", r" \g<0> "),
        # the rules below expect a space after the last word
        (r"$", " "),
        # closing quotes
        (r"[»”’]", r" \g<0> "),  # noqa: RUF001
        (r"''|\"", " '' "),
        (r"\s+", " "),
        # contractions
        (r"([^' ])('[smd]|') ", r"\1 \2 "),
        (r"([^' ])('ll|'re|'ve|n't) ", r"\1 \2 "),
        (r"\b(can)(not)\b|\b(gim|lem)(me)\b|\b(gon)(na)\b|\b(got)(ta)\b|\b(wan)(na)(?=\s)", None),
        (r"\b(d)('ye)\b|\b(more)('n)\b", None),
        (r" ('t)(is)\b", None),
        (r" ('t)(was)\b", None),
    )
)


def words(text: str) -> list[str]:
    """The words and marks of a lower-case text."""
    for pattern, replacement in _RULES:
        text = pattern.sub(_apart if replacement is None else replacement, text)
    return text.split()


def _apart(match: re.Match) -> str:
    """The groups that matched, with spaces between and around them."""
    return f" {' '.join(group for group in match.groups() if group)} "
