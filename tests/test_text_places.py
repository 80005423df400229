"""How much of a long text is tokenised to cut it, at which places, and which texts are refused."""

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, models

from cut_tokenizers import BACKENDS, BYTES, REPLACED, SENTENCEPIECE, XLM_R, N, P, charsmap, made
from fastbert.text import seams
from fastbert.text.cutting import Cutter
from fastbert.text.seams import Seams
from fastbert.text.tokenizer import Tokenizer as OurTokenizer

pytestmark = pytest.mark.once


@pytest.fixture
def tokenised(monkeypatch):
    """The number of characters of each text that is tokenised to cut others."""
    lengths, of = [], Seams._tokenised
    monkeypatch.setattr(Seams, "_tokenised", lambda self, text: lengths.append(len(text)) or of(self, text))
    return lengths


def told(tokenizer: OurTokenizer, text: str) -> list | str:
    try:
        return tokenizer.input_ids([text], 8)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["RoBERTa", "ModernBERT", "XLM-R", "no words"])
def test_a_lone_surrogate_wherever_it_is(name, side):
    """A text is refused for it if it is in the part that is looked at. Otherwise the ids are those without."""
    tokenizer = OurTokenizer(BACKENDS[name](), {"truncation_side": side})
    for part in ("a b ", "a \u0301\u0323"):
        text = part * 500
        ids, found = told(tokenizer, text), []
        for place in range(140):
            at = place if side == "right" else len(text) - 1 - place
            char = "\ud800\udfff"[place % 2]
            refused = f"text 0 is not valid Unicode: lone surrogate U+{ord(char):04X} at character {at}"
            found.append(told(tokenizer, text[:at] + char + text[at + 1 :]))
            assert found[-1] in (ids, refused)
        assert all(isinstance(one, str) for one in found[:56])


def test_little_of_a_text_without_spaces_is_tokenised(tokenised):
    assert Cutter(BACKENDS["RoBERTa"]()).ending("中" * 100_000, 9) == "中" * 100_000
    assert len(Cutter(BACKENDS["XLM-R"]()).ending("中" * 100_000, 9)) < 100
    assert max(tokenised, default=0) < 10_000


def test_texts_that_are_hardly_too_long_are_not_tokenised(tokenised):
    cutter = Cutter(BACKENDS["XLM-R"]())
    for text in ("ab " * 3, "ab " * 53):
        assert cutter.ending(text, 9) == cutter.text(text, 9) == text
    assert not tokenised
    assert len(cutter.ending("ab " * 54, 9)) < 162


def test_long_gaps_before_the_end_of_a_text():
    """They are shortened where places may change."""
    cutter = Cutter(BACKENDS["DeBERTa"]())
    text = "ab" * 50 + " " * 100_000 + "ab"
    assert cutter.ending(text, 9) == text
    assert len(cutter.ending(text, 9, True)) < 1000


GAPS = {
    "two spaces become a letter": N.Replace("  ", "q"),
    "two spaces of any kind become a letter": N.Sequence([N.Nmt(), N.Replace("  ", "q")]),
    "each two spaces become a letter, and others disappear": N.Sequence(
        [N.Replace("  ", "q"), N.Replace(Regex(r"\s+"), "")]
    ),
    "a space becomes a separator": N.Replace("\t", " \x1c"),
    "spaces become a letter": N.Replace(Regex(" {2,}"), "q"),
    "spaces disappear": N.Replace(Regex(" {2,}"), ""),
}


@pytest.mark.parametrize("name", GAPS)
def test_gaps_that_are_more_than_the_end_of_a_word(name):
    """A pre-tokenizer drops spaces, but a normalizer puts something else in their place."""
    backend = made("unigram", GAPS[name], XLM_R)
    for gap in (" " * 100, "\t" + " " * 100, " " + "\t" * 100, " " * 100 + "\t", " \t" * 50, " " + "\t" * 98 + " "):
        text = f"ab{gap}ab"
        assert backend.encode(Seams(backend)._shortened(text)).ids == backend.encode(text).ids, gap
    assert len(Seams(made("unigram", N.Replace(Regex(r"\s+"), " "), XLM_R))._shortened(text)) < len(text)


JOINED = N.Replace(Regex(" {2,}"), " ")


def test_signs_that_disappear_behind_joined_spaces():
    """A gap of spaces and such signs in turns is as many spaces, and one of spaces is one."""
    backend = made("unigram", N.Sequence([JOINED, N.Replace("\u200b", "")]), P.Metaspace())
    seen = Seams(backend)
    for gap in (" \u200b" * 50, "\u200b " * 50, "\u200b" * 100):
        assert backend.encode(seen._shortened(f"ab{gap}ab")).ids == backend.encode(f"ab{gap}ab").ids
    assert seen._shortened("ab" + " " * 100 + "ab") == "ab  ab"


def test_the_end_of_a_line_is_one_space():
    """Its two characters are one to this normalizer, so a gap may not be shortened to these."""
    backend = made("unigram", N.Sequence([SENTENCEPIECE, N.Replace(Regex(" {2,}"), "q")]), P.Metaspace())
    text = "ab\r" + "\t" * 98 + "\nab"
    assert backend.encode(Seams(backend)._shortened(text)).ids == backend.encode(text).ids


@pytest.mark.parametrize("words", [XLM_R, P.Metaspace()], ids=["dropped", "joined"])
def test_added_tokens_of_spaces_in_a_gap(words):
    """They are found before spaces are joined or dropped."""
    backend = made("unigram", JOINED, words, [AddedToken("  ", normalized=False)])
    text = "ab" + " " * 100 + "ab"
    assert Seams(backend)._shortened(text) == text
    assert len(Seams(made("unigram", JOINED, words))._shortened(text)) < len(text)


def test_tokens_that_stand_for_a_whole_gap():
    """Here three, of the bytes of one letter. Their place is the whole gap, and so no text is cut within it."""
    backend = made("bpe", N.Replace(Regex(r"\s{2,}"), "▁"), BYTES)
    for text in ("\n" * 500 + "0 ab", "ab" + " " * 500 + "ab"):
        whole = backend.encode(text, add_special_tokens=False)
        for kept in (1, 2, 3, 4):
            cut = backend.encode(Cutter(backend).text(text, kept), add_special_tokens=False)
            assert cut.offsets[:kept] == whole.offsets[:kept]
            assert cut.ids[:kept] == whole.ids[:kept]


NO_SPACES = {
    "a letter": (N.Replace(" ", "b"), "unigram", P.Metaspace()),
    "a sign": (N.Replace(" ", "."), "bpe", BYTES),
    "a letter for several": (N.Replace(Regex(" {2,}"), "e"), "unigram", P.Metaspace()),
}


@pytest.mark.parametrize("name", NO_SPACES)
def test_spaces_that_end_no_words(name, monkeypatch):
    """A normalizer makes something else of them, and so the word before goes on."""
    monkeypatch.setattr(seams, "_WORTH_CUTTING", 1)
    monkeypatch.setattr(seams, "_SIZES", (1, 2, 3, 4, 5, 6, 7, 8))
    normalizer, model, words = NO_SPACES[name]
    backend = made(model, normalizer, words)
    cutter = Cutter(backend)
    for part in ("a b ", ". . ", ".. ab ", "the a", "th  "):
        text = part * 30
        whole = backend.encode(text, add_special_tokens=False)
        for kept in range(1, 40):
            cut = backend.encode(cutter.text(text, kept), add_special_tokens=False)
            assert cut.ids[: kept + 1] == whole.ids[: kept + 1]
            assert cut.offsets[:kept] == whole.offsets[:kept]
            cut = backend.encode(cutter.ending(text, kept), add_special_tokens=False)
            assert cut.ids[-kept - 1 :] == whole.ids[-kept - 1 :]


def test_tokens_across_spaces(monkeypatch):
    """Where a pre-tokenizer does not split at spaces."""
    monkeypatch.setattr(seams, "_WORTH_CUTTING", 1)
    monkeypatch.setattr(seams, "_SIZES", (1, 2, 3))
    pieces = [("<unk>", 0.0), ("▁", -3.0), ("a", -3.0), ("b", -3.0), ("b▁a", -1.0)]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = P.Metaspace(split=False)
    text = "ab " * 30
    whole, cutter = backend.encode(text).ids, Cutter(backend)
    for kept in range(1, 20):
        assert backend.encode(cutter.text(text, kept)).ids[: kept + 1] == whole[: kept + 1]
        assert backend.encode(cutter.ending(text, kept)).ids[-kept - 1 :] == whole[-kept - 1 :]


def test_bars_for_several_spaces():
    """As in T5: they end words as spaces do, and gaps of them are shortened."""
    backend = made(
        "unigram", N.Sequence([N.Precompiled(charsmap(REPLACED)), N.Replace(Regex(" {2,}"), "▁")]), P.Metaspace()
    )
    cutter = Cutter(backend)
    assert len(cutter.text("ab ab " * 9000, 9)) < 200
    assert len(cutter.ending("ab ab " * 9000, 9)) < 200
    for gap in (" " * 100, "\t" + " " * 100, " \t" * 50):
        text = f"ab{gap}ab"
        short = Seams(backend)._shortened(text)
        assert len(short) == 6
        assert backend.encode(short).ids == backend.encode(text).ids


def test_more_tokens_than_the_normalized_text_has_letters():
    """Those that were added are found in the text as it is."""
    backend = made("unigram", N.Replace(Regex(" {2,}"), " "), XLM_R, [AddedToken("  ", normalized=False)])
    assert Seams(backend).most_tokens(" " * 100) >= len(backend.encode(" " * 100, add_special_tokens=False)) == 50
    prefixed = P.Sequence([P.Split(Regex(seams._OF_WORDS[2]), "isolated"), P.ByteLevel(use_regex=False)])
    backend = made("bpe", None, prefixed)
    assert Seams(backend).most_tokens("٣" * 100) >= len(backend.encode("٣" * 100, add_special_tokens=False)) == 300


def test_tokens_counted_in_a_whole_text():
    """The text is cut behind a token, where what is before it has the same tokens."""
    backend = made("bpe", None, BYTES, [AddedToken("qzj", single_word=True)])
    seen = Seams(backend)
    text = "a b qzjb qzjb" + " x qzjb" * 100
    whole = backend.encode(text, add_special_tokens=False).ids
    cut = 0
    for tokens in range(len(whole) + 2):
        part = seen.counted(text, tokens)
        cut += part != text
        assert backend.encode(part, add_special_tokens=False).ids[: tokens + 1] == whole[: tokens + 1]
    assert cut > 20
    assert seen.counted("a " * 80, 9) == "a " * 80  # hardly too long
    assert seen.counted("a " * 81, 9) == "a " * 10 + "a"
