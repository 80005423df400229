"""Ids by the package nanotoken, where it is installed: those of `tokenizers`, in a tenth of the time or less.

It keeps the ids of words that it has met, and knows only single texts without offsets. Which releases are used is
written here, because the property test in tests/test_text_cutting.py has run with these.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import metadata

import tokenizers

_TESTED = ("0.1.",)
# Words that each thread keeps, 30 MB for all it keeps; the package's own number is 2**20, for which it takes 350 MB.
_KEPT_WORDS = 2**16

# (texts, max_length=the most tokens of each with its special ones, side=which is cut off) -> ids
IdsOf = Callable[..., list[list[int]]]


def fast_ids(backend: tokenizers.Tokenizer) -> IdsOf | None:
    """What gives this tokenizer's ids; None where the package is not there, or does not know such a tokenizer.

    backend: neither truncates nor pads. It must not change afterwards.
    """
    try:
        import nanotoken
    except ImportError:
        return None
    if not metadata.version("nanotoken").startswith(_TESTED) or backend.encode_special_tokens:
        return None
    try:
        tokenizer = nanotoken.WordPieceTokenizer.from_json(backend.to_str())
    except nanotoken.UnsupportedTokenizerError:
        return None
    if "NANOTOKEN_CACHE_ENTRIES" not in os.environ:
        nanotoken.set_cache_entries(_KEPT_WORDS)

    def ids(texts: list[str], max_length: int | None, side: str) -> list[list[int]]:
        return tokenizer.encode_batch_list(texts, max_length=max_length, truncation_side=side)

    return ids
