"""What Unicode does with characters that stand side by side, of all that Python knows."""

import functools
import unicodedata

import pytest

from fastbert.text.characters import BEGINNING, SURROGATE, WHITE, is_apart, is_ending, is_space, is_white, joins

pytestmark = pytest.mark.once

ALL = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
FORMS = ("NFC", "NFD", "NFKC", "NFKD")
SEPARATORS = "\x1c\x1d\x1e\x1f"


@functools.cache
def seconds() -> set[str]:
    """All that normalisation joins with a character before it."""
    parts = [unicodedata.decomposition(char).split() for char in ALL]
    jamo = {chr(code) for code in (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))}
    return {chr(int(of[-1], 16)) for of in parts if len(of) == 2 and "<" not in of[0]} | jamo


def begins(char: str, form: str) -> bool:
    """Whether this form neither moves the beginning of a character nor joins it with one before it."""
    first = unicodedata.normalize(form, char)[0]
    return not unicodedata.combining(first) and first not in seconds()


def test_characters_that_begin_a_segment():
    """Normalised apart from whatever is before them."""
    behind = [char for char in ALL if BEGINNING.match(char)]
    assert len(behind) > 30_000
    assert all(begins(char, form) for char in behind for form in FORMS)
    assert seconds() >= {"\u0301", "\u3099", "\u1161", "\u11a8"}


def test_clusters():
    """A character that ends a cluster is in none with a character that begins one."""
    clusters = functools.partial(pytest.importorskip("regex").findall, r"\X")
    for char in filter(is_ending, ALL):
        for behind in ("a", "가", "😀"):
            assert clusters(char + behind)[-1] == behind, (char, behind)
    for char in filter(BEGINNING.match, ALL):
        assert clusters("a" + char) == ["a", char]
    assert clusters("\u0d4ea") == ["\u0d4ea"]


@pytest.mark.parametrize("char", ["a", "中", "Ⅷ", "7", ".", "€", "\u0301"])
def test_characters_that_end_a_cluster(char):
    assert is_ending(char)
    assert not any(map(is_ending, ["\u1100", "\ua960", "\ud7b0", "\u0d4e", "\U00011a3a", "\u200d", "\u0600", *WHITE]))


def test_characters_that_are_apart():
    """Normalised apart from a space or a character of `BEGINNING`, such as a syllable, before them."""
    apart = list(filter(is_apart, ALL))
    assert all(begins(char, form) for char in apart for form in FORMS)
    assert {*"a7٣中가Ⅷéไ "} <= {*apart}
    assert {*"\u0301\u1161\u11a8\u314f\u3133\uff9e\uffc2\u0e33"}.isdisjoint(apart)  # vowels, voice marks


def test_characters_that_join_others():
    assert all(map(joins, "\u1100\u11ff\ua960\ua97f\ud7b0\ud7ff\u0d4e\U00011000\U00011fff\u0e33\u0eb3\uff9e\uff9f"))
    assert not any(map(joins, "a가ไ中\u10ff\u1200\ua95f\ua980\u0d4d\u0d4f\U00010fff\U00012000"))


def test_white_space():
    """Python counts four separators as white space, and Unicode does not."""
    assert {*WHITE} == {*filter(str.isspace, ALL)} - {*SEPARATORS}
    assert all(map(is_white, WHITE))
    assert is_white(WHITE)
    for text in ("", *SEPARATORS, " \x1c", "a", " a", "\u200b"):
        assert not is_white(text)
    assert all(map(is_space, (*WHITE, *SEPARATORS, "▁")))
    assert not any(map(is_space, "a_\u200b"))


def test_lone_surrogates():
    assert all(map(SURROGATE.search, ("\ud800", "a\udfff", "\udbff\udc00")))
    assert not any(map(SURROGATE.search, ("", "a", "\ud7ff", "\ue000", "😀")))
