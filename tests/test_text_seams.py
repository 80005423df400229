"""A long text is cut before byte-level BPE or Unigram tokenises it, and this changes no token that is kept."""

import os
import random

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, models, pre_tokenizers

from cut_tokenizers import BACKENDS, BYTES, XLM_R, N, P, made, text_of
from fastbert.text import seams, unknown
from fastbert.text.cutting import Cutter, KeptCutter
from fastbert.text.seams import Seams
from fastbert.text.tokenizer import Tokenizer as OurTokenizer

pytestmark = pytest.mark.once

# Number of texts for each tokenizer, on which 20,000 take half a minute: FASTBERT_CUT_STRINGS=20000.
STRINGS = int(os.environ.get("FASTBERT_CUT_STRINGS", "100"))


@pytest.fixture
def soon(monkeypatch):
    """Short texts are cut, too."""
    monkeypatch.setattr(seams, "_WORTH_CUTTING", 2)
    monkeypatch.setattr(unknown, "_PART", 20)
    monkeypatch.setattr(unknown, "_CHUNK", 60)

    def sizes(draw: random.Random) -> None:
        choices = ((2, 4, 8, 16, 32, 64), (1, 3, 9, 27), (8, 32, 128, 512), (5, 6, 7, 10, 20, 50))
        monkeypatch.setattr(seams, "_SIZES", draw.choice(choices))

    return sizes


@pytest.mark.parametrize("name", BACKENDS)
def test_cutting_changes_no_token(name, soon):
    """Ids, places and words of the kept tokens of random strings of difficult characters."""
    backend = BACKENDS[name]()
    cutter, draw = Cutter(backend), random.Random(name)
    beginnings = endings = 0
    for _ in range(STRINGS):
        soon(draw)
        text, kept = text_of(draw), draw.choice((1, 2, 3, 5, 9, 20, 60))
        whole = backend.encode(text, add_special_tokens=False)
        cut = cutter.text(text, kept)
        if cut != text:
            beginnings += 1
            found = backend.encode(cut, add_special_tokens=False)
            assert found.ids[: kept + 1] == whole.ids[: kept + 1], (text, cut, kept)
            assert found.offsets[:kept] == whole.offsets[:kept], (text, cut, kept)
            assert found.word_ids[:kept] == whole.word_ids[:kept], (text, cut, kept)
            assert text.startswith(cut)
            assert len(found) > kept
        # A gap may be shortened as well: the ids stay, and whether there are more than are kept.
        found = backend.encode(cutter.text(text, kept, True), add_special_tokens=False)
        assert found.ids[: kept + 1] == whole.ids[: kept + 1], (text, kept)
        cut = cutter.ending(text, kept, draw.random() < 0.5)
        endings += len(cut) < len(text)
        found = backend.encode(cut, add_special_tokens=False)
        assert found.ids[-kept - 1 :] == whole.ids[-kept - 1 :], (text, cut, kept)
    assert beginnings > STRINGS / 4
    assert endings > 0 or name in ("no words", "NFKC", "no split", "gaps added")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", BACKENDS)
def test_calls_of_our_tokenizer(name, side, soon):
    """Texts and pairs, truncated by our tokenizer and by the library."""
    ours, plain = OurTokenizer(BACKENDS[name](), {"truncation_side": side}), BACKENDS[name]()
    draw, shorter = random.Random("calls " + name + side), 0
    for _ in range(max(STRINGS // 5, 1)):
        soon(draw)
        one, two = text_of(draw), text_of(draw)
        length = draw.choice((13, 14, 20, 31))
        plain.enable_truncation(length, direction=side)
        assert ours.input_ids([one], length) == [plain.encode(one).ids], (one, length)
        # The library makes a window of each two windows, so that of two long texts it makes millions.
        one, two = one[:250], two[-250:]
        found, whole = ours([one], [two], max_length=length).encodings[0], plain.encode(one, two)
        assert (found.ids, found.offsets) == (whole.ids, whole.offsets), (one, two, length)
        short = ours.shortened_pair(*(ours.shortened(text, length) for text in (one, two)), length)
        shorter += short != (one, two)
        found = plain.encode(*short)
        assert (found.ids, bool(found.overflowing)) == (whole.ids, bool(whole.overflowing)), (one, two, length)
    assert shorter > 0 or side == "left"


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_backend_that_truncates_and_pads(side, soon):
    """As transformers leaves its backends behind: tokens are counted as without."""
    plain, backend = BACKENDS["RoBERTa"](), BACKENDS["RoBERTa"]()
    backend.enable_truncation(8)
    backend.enable_padding(length=30, direction=side)
    assert Seams(backend)._tokenised("") == ([], [], [])
    draw = random.Random(0)
    for _ in range(100):
        soon(draw)
        text = text_of(draw)
        assert Cutter(backend).text(text, 20) == Cutter(plain).text(text, 20)
    backend.enable_truncation(8, stride=2)
    assert Cutter(backend).text("ab " * 5000, 20) == "ab " * 5000  # its windows overlap
    backend.enable_truncation(8, direction="left")
    assert Cutter(backend).text("ab " * 5000, 20) == "ab " * 5000  # its windows begin with the last


TEN_MEGABYTES = {
    "words": "He was, in a word, the very man for it; and so they went (all of them) down to the sea.\n",
    "a word": "qwertzuiopasdfghjk",
    "one letter": "x",
    "accents": "e\u0301",
    "chinese": "他是最合适的人选所以他们最后都去了海边",
    "digits": "1234567890",
    "marks": "?!.,;",
    "hindi": "वह एक शब्द में इसके लिए सही आदमी था\n",
    "thai": "ภาษาไทย",
    "spaces": " ",
    "newlines": "\n",
    "unknown": "\U00012000",
    "apostrophes": "'",
    "quotations": "'r",
    "white": " \t\u00a0",
    "empty lines": " \t\r\n",
    "lines of a letter": "a\n \n",
    "signs": "\u200b",
}


UNCUT = {
    **{
        (name, "lines of a letter"): "only a space behind another character is a seam, and a place within a word"
        for name in ("XLM-R", "DeBERTa", "BARThez")
    },
    ("BARThez", "accents"): "marks are normalised with the letters before them, so that they count as known",
    **{
        (name, kind): "not among the characters that begin a segment"
        for name in ("ModernBERT", "Qwen")
        for kind in ("unknown", "signs")
    },
}


@pytest.mark.parametrize("name", ["RoBERTa", "ModernBERT", "Qwen", "XLM-R", "DeBERTa", "BARThez"])
@pytest.mark.parametrize("kind", TEN_MEGABYTES)
def test_little_of_a_text_of_megabytes_is_tokenised(name, kind):
    """At most 128 characters for each kept token. A gap of DeBERTa's is shortened, and with RoBERTa cut."""
    part, cutter = TEN_MEGABYTES[kind], Cutter(BACKENDS[name]())
    long = part * (10_000_000 // len(part))
    if (name, kind) in UNCUT:
        pytest.skip(UNCUT[name, kind])
    assert len(cutter.text(long, 254, True)) <= 255 * 128
    if kind in ("words", "hindi"):
        assert len(cutter.ending(long, 254, True)) <= 255 * 128


def test_a_gap_of_megabytes_before_a_newline():
    """Qwen's expression ends in a panic of the library there."""
    assert len(Cutter(BACKENDS["Qwen"]()).text("a" + " " * 10_000_000 + "\nb", 254)) <= 255 * 128


OTHERS = {
    "an added token that disappears": lambda: made(
        "unigram", N.Strip(), P.Metaspace(), [AddedToken(" ", normalized=True)]
    ),
    "an unknown normalizer": lambda: made("bpe", N.Replace(Regex("a b"), "c"), BYTES),
    "an unknown expression": lambda: made("bpe", None, P.Sequence([P.Split(Regex(r"\w+ \w+"), "isolated"), BYTES])),
    "spaces go before words are made": lambda: made("unigram", None, P.Sequence([P.Metaspace(), P.WhitespaceSplit()])),
    "words are split by another rule": lambda: made("bpe", None, P.Punctuation()),
    "bytes go before words are made": lambda: made("bpe", None, P.Sequence([BYTES, P.WhitespaceSplit()])),
    "a model of whole words": lambda: tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_tokenizers_are_left_alone(name):
    assert Seams.of(OTHERS[name]()) is None
    assert Cutter(OTHERS[name]()).text("a b " * 5000, 3) == "a b " * 5000


def test_an_added_token_that_would_disappear_if_it_were_normalized():
    backend = made("unigram", N.Strip(), P.Metaspace(), [AddedToken(" ", normalized=False)])
    assert Seams.of(backend) is not None


@pytest.mark.parametrize(
    "option",
    [
        {"dropout": 0.1}, {"ignore_merges": True}, {"end_of_word_suffix": "</w>"}, {"continuing_subword_prefix": "#"},
    ],
)  # fmt: skip
def test_models_of_other_rules_are_left_alone(option):
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "a</w>": 1, "#a": 2}, merges=[], **option))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert Seams.of(backend) is None


def test_lone_surrogates_in_the_kept_part_are_refused():
    """As in whole texts. Those behind are not looked at."""
    tokenizer = OurTokenizer(BACKENDS["XLM-R"]())
    with pytest.raises(ValueError, match=r"text 0 is not valid Unicode: lone surrogate U\+D800 at character 2"):
        tokenizer.input_ids(["a \ud800" + " b" * 5000], 8)
    assert tokenizer.input_ids(["a" + " b" * 5000 + "\ud800"], 8) == tokenizer.input_ids(["a" + " b" * 5000], 8)
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer(["\ud800"], ["a b" * 5000], max_length=9)


def test_a_mask_takes_the_whole_gap_before_it():
    """Of RoBERTa's <mask>, which takes the spaces before it, whatever their number and kind."""
    backend = BACKENDS["RoBERTa"]()
    for gap in (" " * 900, "\n" * 900, "\n" * 450 + " " * 450, "\n" * 899 + " "):
        for text in (gap + "<mask>", "a" + gap + "<mask> b", gap + "a<mask>"):
            ids = backend.encode(Cutter(backend).text(text, 9), add_special_tokens=False).ids
            assert ids[:9] == backend.encode(text, add_special_tokens=False).ids[:9]


def test_a_mark_behind_the_letter_at_a_seam():
    """Normalisation joins a halfwidth mark with the letter before it, and so the place is within an added token."""
    backend = made("bpe", N.NFKC(), BYTES, ["xガ"])
    seen, text = Seams(backend), "." * 40 + "xカ"
    assert not seen._is_seam(text + "ﾞ", 41)
    assert seen._is_seam(text + ".", 41)


def test_a_jamo_behind_the_syllable_at_a_seam():
    """Normalisation makes a jamo of the letter, and joins it with the syllable before it."""
    backend = made("bpe", N.NFKC(), BYTES, ["x갃"])
    assert Seams(backend)._is_seam("." * 40 + "x가나", 41)
    assert not Seams(backend)._is_seam("." * 40 + "x가ㄳ", 41)
    text = ("." * 39 + " x가ㄳ") * 100
    whole = backend.encode(text, add_special_tokens=False).ids
    for kept in range(1, 30):
        ids = backend.encode(Cutter(backend).text(text, kept), add_special_tokens=False).ids
        assert ids[:kept] == whole[:kept]


def test_a_cutter_is_kept_until_its_tokenizer_changes():
    backend, kept = BACKENDS["RoBERTa"](), KeptCutter()
    cutter = kept.of(backend)
    assert kept.of(backend) is cutter
    backend.add_tokens(["new"])
    assert kept.of(backend) is not cutter
    for part, value in (("normalizer", N.NFC()), ("pre_tokenizer", P.Punctuation()), ("model", models.BPE())):
        cutter = kept.of(backend)
        setattr(backend, part, value)
        assert kept.of(backend) is not cutter
    assert kept.of(BACKENDS["RoBERTa"]()) is not cutter


@pytest.mark.parametrize("name", ["RoBERTa", "XLM-R", "no split", "BARThez"])
def test_pairs_of_texts_that_cannot_be_cut(name, monkeypatch):
    """They are tokenised whole, one by one, and then cut at the end of a token."""
    monkeypatch.setattr(seams, "_SIZES", ())
    backend = BACKENDS[name]()
    cutter, draw = Cutter(backend), random.Random(name)
    cut = 0
    for _ in range(30):
        one, two, kept = text_of(draw)[:600], text_of(draw)[:600], draw.choice((8, 9, 20, 21))
        monkeypatch.setattr(seams, "_WORTH_CUTTING", draw.choice((2, 16)))
        short = cutter.pair(one, two, kept, "longest_first")
        cut += short != (one, two)
        backend.enable_truncation(kept, strategy="longest_first")
        found, whole = (backend.encode(*pair, add_special_tokens=False) for pair in (short, (one, two)))
        backend.no_truncation()
        assert (found.ids, found.type_ids) == (whole.ids, whole.type_ids), (one, two, kept)
    assert cut > 10
    assert len(cutter.pair("ab" * 5000, "ab" * 9000, 8, "longest_first")[1]) < 200
    assert cutter.pair("ab" * 5000, "a\ud800" * 9000, 8, "longest_first")[1] == "a\ud800" * 9000
    monkeypatch.undo()
    refused = ("ab " * 5000, "ab " * 5000 + "\ud800")
    assert cutter.pair(*refused, 9, "longest_first") == refused


def small(normalizer=None, pre_tokenizer=None, added=()) -> Seams:
    backend = tokenizers.Tokenizer(models.BPE())
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer or BYTES
    backend.add_tokens(list(added))
    return Seams(backend)


# What is not certain at the place "|", where another text is certain.
NO_SEAMS = {
    "a space that becomes a sign": (small(N.Replace(" ", "_")), "a |b", "a|b"),
    "a sign of a pattern before": (small(N.Replace("ab", "c")), "a|x", "x|x"),
    "a sign of a pattern behind": (small(N.Replace("ab", "c")), "x|b", "x|x"),
    "a joiner": (small(N.NFC()), "a\u200d|a", "a|a"),
    "a jamo": (small(N.NFC()), "\u1100|a", "\uac00|a"),
    "a letter in one cluster with any": (small(N.NFC()), "\u0d4e|a", "\u0d15|a"),
    "a mark": (small(N.NFC()), "e|\u0301", "e\u0301|e"),
    "a mark that disappears": (small(N.StripAccents()), "\u0301|b", "a\u0301|b"),
    "a letter that disappears": (small(N.Replace("b", "")), "a|b", "a|c"),
    "a letter that becomes a space": (small(N.Replace("a", " ")), "a|b", "b|b"),
    "a letter behind that becomes a space": (small(N.Replace("b", " ")), "a|b", "a|c"),
    "the end of an added token": (small(added=["xa"]), "xa|b", "ax|b"),
    "the end of an added token, normalised": (small(N.Replace("q", "a"), added=["xa"]), "xq|b", "xb|b"),
    "within an added token": (small(added=["abc"]), "a|b", "b|a"),
    "within an added token, normalised": (small(N.Replace("a", "q"), added=["qbc"]), "a|b", "x|b"),
    "a mark that changes an added token": (small(N.NFC(), added=["aéb"]), "a|e\u0301", "x|e\u0301"),
    "a mark on a space": (small(N.NFKC()), "a| \u0301", "a| x"),
    "within re": (small(), "x'r|e", "x's|a"),
    "within ve": (small(), "x'v|e", "x't|a"),
    "within ll": (small(), "x'l|l", "x'm|a"),
    "within re, in capitals": (small(), "'R|E", "'S|E"),
    "re behind many marks": (small(N.StripAccents()), "xx'r" + "\u0301" * 20 + "|e", "xxr\u0301|e"),
    "many marks in a cluster": (small(N.NFC()), "e" + "\u0301" * 80 + "|e", "e" + "\u0301" * 40 + "|e"),
    "a cluster whose beginning is joined": (small(N.NFC()), "\u200da\u0301|e", "xa\u0301|e"),
}


@pytest.mark.parametrize("name", NO_SEAMS)
def test_places_that_are_no_seams(name):
    seen, unsure, sure = NO_SEAMS[name]
    assert not seen._is_seam(unsure.replace("|", ""), unsure.index("|"))
    assert seen._is_seam(sure.replace("|", ""), sure.index("|"))


GPT_4 = P.Split(Regex(seams._OF_WORDS[1]), "isolated")
NO_GAPS = {
    "a token with a space": (small(added=["a b"]), "a   |   b"),
    "spaces of a pattern": (small(N.Replace("  ", " ")), "a   |   b"),
    "a space that becomes a sign": (small(N.Replace("\n", "_")), "a\n\n\n|\n\n\nb"),
    "the end of a stripped text": (small(N.Strip()), "a   |   "),
    "one space more": (small(), "a   | b"),
    "between two newlines": (small(None, GPT_4), "a\n\t\t|\t\t \n \tb"),
    "within an end of a line": (small(None, GPT_4), "a \t\r|\n \tb"),
    "before the last newline": (small(None, GPT_4), "a\r   |   \nb"),
    "an added token behind": (small(added=["<m>"]), "a   |   <"),
    "an added token behind, normalised": (small(N.Replace("q", "<"), added=["<m>"]), "a   |   q"),
    "a letter that no segment begins with": (small(), "a   |   \u0301"),
}


@pytest.mark.parametrize("name", NO_GAPS)
def test_gaps_that_are_not_cut(name):
    seen, text = NO_GAPS[name]
    assert not seen._is_in_gap(text.replace("|", ""), text.index("|"))
    assert small()._is_in_gap("a   |  b".replace("|", ""), 4)
    assert small()._is_in_gap("a \t \u00a0\t", 4)
    for gap in ("\t\t|\t\t\t", "\t\t|\t\t ", "\n\t|\t\t ", "\t\n| \n\n", "\t\n|  ", "\t\r|  \n", "\t\t|\t\n\t\n"):
        assert small(None, GPT_4)._is_in_gap(f"a{gap}b".replace("|", ""), gap.index("|") + 1)


def test_ends_of_texts_that_begin_with_other_tokens():
    xlm_r = small(None, XLM_R)
    assert xlm_r._begins("a b", 1)
    assert not xlm_r._begins("a  b", 1)
    assert not xlm_r._begins("xa  bx", 2)
    assert not small(N.NFC(), XLM_R)._begins("a \u0301", 1)
    assert not small(None, XLM_R, [" x"])._begins("a b", 1)
    for name in ("NFKC", "no split", "no words"):
        assert Seams(BACKENDS[name]()).ending("ab ab " * 999, 2) == "ab ab " * 999


SHORT = [
    "a \n \n \n \n. b", "foo.... ----", "x" * 30, "xyxyxyxyxyxy a aaaa", "aaaa aaaaaa<mask>", "don't 'we're'",
    "中文字一二三中文字", "a<mask>  b", "..,,..,,..", "ไไไไ ไ", "aไไไbไไa",
    "a   \t \n  \n\n  \r\n \t b", "\t\t\t \r \n b", "a.\n\n   \r\r  \t a", "a     \n",
]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["RoBERTa", "Qwen", "XLM-R", "BARThez", "no split", "Unigram of bytes", "BPE of bytes"]
)
def test_tokens_that_are_final(name):
    """At all places of short texts: if as many tokens are final there, the whole text has them."""
    backend = BACKENDS[name]()
    seen, sure = Seams(backend), 0
    for text in SHORT:
        whole = backend.encode(text, add_special_tokens=False)
        for at in range(1, len(text)):
            if not (seen._is_seam(text, at) or (text[at - 1 : at + 1].isspace() and seen._is_in_gap(text, at))):
                continue
            here = backend.encode(text[:at], add_special_tokens=False)
            for wanted in range(1, len(here) + 2):
                if seen._has_final(text, at, wanted):
                    sure += 1
                    assert len(here) >= wanted
                    assert here.ids[:wanted] == whole.ids[:wanted], (text, at, wanted)
                    assert here.offsets[: wanted - 1] == whole.offsets[: wanted - 1], (text, at, wanted)
    assert sure > 20


def test_a_space_behind_a_newline_begins_no_word():
    """They are one gap, and here one token."""
    backend = tokenizers.Tokenizer(models.BPE({"Ċ": 0, "Ġ": 1, "ĊĠ": 2}, [("Ċ", "Ġ")]))
    backend.pre_tokenizer = BYTES
    seen, text = Seams(backend), "\n \n \n \n "
    assert seen._is_in_gap(text, 3)
    assert backend.encode(text[:3]).ids == [2, 0]
    assert not seen._has_final(text, 3, 2)
    assert backend.encode(text).ids[:2] == [2, 2]


def test_a_space_behind_a_space_begins_no_word():
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "Ġ": 1, "ĠĠ": 2}, [("Ġ", "Ġ")]))
    backend.pre_tokenizer = BYTES
    seen, text = Seams(backend), "a    a"
    assert seen._is_in_gap(text, 2)
    assert backend.encode(text[:2]).ids == [0, 1]
    assert not seen._has_final(text, 2, 2)
    assert backend.encode(text).ids[:2] == [0, 2]


def test_a_sign_that_stands_for_a_whole_gap_goes_on():
    """It is three tokens of bytes, whose place is the gap."""
    seen = Seams(made("bpe", N.Replace(Regex(r"\s+"), "▁"), BYTES))
    count = len(seen._tokenised("ab")[0])
    for gap in ("  ", " " * 9):
        for at in range(3, 2 + len(gap)):
            assert not seen._has_final(f"ab{gap}ab", at, count + 1)
    assert seen._has_final("ab ab", 3, count + 1)
    assert seen._has_final("qzj  ab", 3, 1)


def test_bytes_of_an_unknown_character_before_a_seam():
    """They are those of a token with what is behind, where that has one."""
    bytes_of = {f"<0x{byte:02X}>": -9.0 for byte in range(256)}
    model = models.Unigram([*{"<unk>": 0.0, "a": -3.0, "ไa": -1.0, **bytes_of}.items()], unk_id=0, byte_fallback=True)
    seen, text = Seams(tokenizers.Tokenizer(model)), "." * 3 + "ไa"
    assert len(seen._tokenised(text)[0]) == 3 + 1
    assert len(seen._tokenised(text[:4])[0]) == 3 + 3
    assert not seen._has_final(text, 4, 5)
    assert not seen._has_final(text, 4, 4)
    assert seen._has_final("กaaaa", 4, 4)  # the first letter is final, and behind three bytes


def test_the_longest_token_may_reach_over_a_seam():
    """By one letter, so that only tokens before it are final."""
    pieces = [("?", 0.0), *((letter, -3.0) for letter in "xabcd"), ("abcd", -1.0)]
    seen = Seams(tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0)))
    assert list(seen._ends_of_tokens("xxabc")) == [5, 2]
    assert seen._has_final("xxabcd", 5, 1)
    assert not seen._has_final("xxabcd", 5, 3)


def test_characters_that_are_normalized_otherwise_by_themselves():
    """Here "▁" is put before each unknown one, and so their word would have more tokens than it has."""
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "▁", "a", "b", "c", "bc"])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("b", "c")], unk_token="<unk>"))
    backend.normalizer = N.Prepend("▁")
    seen, text = Seams(backend), "ไaไaไabc"
    assert seen._is_seam(text, 7)
    assert backend.encode(text[:7]).ids == [1, 0, 2, 0, 2, 0, 2, 3]
    assert backend.encode(text).ids == [1, 0, 2, 0, 2, 0, 2, 5]
    assert not seen._has_final(text, 7, 8)


def test_a_space_ends_a_word():
    """All tokens before it are final, the last one, too."""
    seen = Seams(BACKENDS["XLM-R"]())
    count = len(seen._tokenised("xq")[0])
    assert seen._has_final("xq xq", 2, count)
    assert not seen._has_final("xq xq", 2, count + 1)
    assert not seen._has_final("xqxq", 2, count)
    assert seen._has_final("xq xqxq", 5, count)
    assert seen._has_final("xq  xq", 2, count)


def test_tokens_before_the_last_word_are_final():
    """Whatever the model makes of several words as one."""
    pieces = [("<unk>", 0.0), *((piece, -3.0) for piece in "▁ab"), ("▁a", -2.0), ("b▁a", -1.0)]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = P.Metaspace()
    assert Seams(backend)._has_final("ab abab", 5, 2)


def test_an_unknown_token_may_go_on():
    """As the last one before a seam, it is not final, although its id stays."""
    seen, text = Seams(BACKENDS["XLM-R"]()), "ab" + "ไ" * 9
    assert seen._is_seam(text, 5)
    count = len(seen._tokenised(text[:5])[0])
    assert seen._tokenised(text[:5])[0] == seen._tokenised(text)[0]
    assert not seen._has_final(text, 5, count)


@pytest.mark.parametrize("name", ["RoBERTa", "XLM-R", "ALBERT", "no split"])
def test_the_most_tokens_of_a_text(name):
    backend = BACKENDS[name]()
    for text in ("é" * 99, "\U00012000 " * 99, "a b " * 99, "ﷺ" * 9, "", "x"):
        assert Seams(backend).most_tokens(text) >= len(backend.encode(text, add_special_tokens=False))
