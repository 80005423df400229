"""Long runs of characters that no token covers are shortened, and this changes no id."""

import functools

import pytest
import tokenizers
from tokenizers import models

from cut_tokenizers import BACKENDS, XLM_R, N, P, charsmap
from fastbert.text.cutting import Cutter
from fastbert.text.seams import Seams

pytestmark = pytest.mark.once


def unigram(pieces=(), normalizer=None, words=XLM_R) -> tokenizers.Tokenizer:
    """Of "a", spaces, and these pieces."""
    scores = [("<unk>", 0.0), ("▁", -1.0), ("a", -2.0), *((piece, -3.0) for piece in pieces)]
    backend = tokenizers.Tokenizer(models.Unigram(scores, unk_id=0))
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = words
    return backend


def assert_same_ids(backend: tokenizers.Tokenizer, text: str) -> str:
    """The shortened text."""
    short = Seams(backend)._shortened(text)
    assert backend.encode(short).ids == backend.encode(text).ids
    return short


def test_unknown_characters_are_left_out_of_long_runs():
    """All are one token, so only a few stay; not if the word goes on behind them, or if they may be a token."""
    backend, run = BACKENDS["XLM-R"](), "\U00012000\u0e44" * 5000
    plain = functools.partial(backend.encode, add_special_tokens=False)
    for text in (run, "ab" + run, "ab" + run + " ab" + run + "\nab"):
        short = Seams(backend)._shortened(text)
        assert len(short) < 600
        assert plain(short).ids == plain(text).ids
    for text in (run + "ab", run + "\u0301", run + "<mask>", "가" * 10_000 + "각"):
        assert plain(Seams(backend)._shortened(text)).ids == plain(text).ids
    assert Seams(backend)._shortened(run + "ab") == run + "ab"
    backend.add_tokens(["\u0e44\U00012000"])
    assert Seams(backend)._shortened(run) == run
    of_letters = BACKENDS["BARThez"]()
    assert len(Seams(of_letters)._shortened(run + "ab" + run)) < 600  # BPE adds up no scores
    of_letters.model.fuse_unk = False
    assert Seams(of_letters)._shortened(run) == run


def test_a_token_of_characters_that_are_none_themselves():
    """In such a text they are not unknown."""
    pieces = [("<unk>", 0.0), ("▁", -1.0), ("a", -2.0), ("\u0e44\U00012000", -3.0), ("\u0e44a", -3.0)]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = XLM_R
    for text, is_shorter in (("\u0e44\U00012000" * 500, False), ("\u0e44" * 1000, True), ("\u0e44" * 999 + "a", False)):
        short = Seams(backend)._shortened(text)
        assert (len(short) < len(text)) == is_shorter
        assert backend.encode(short).ids == backend.encode(text).ids
    beside = "\u0e44\U00012000 " + "ก" * 1000
    assert len(assert_same_ids(backend, beside)) < 300
    by_bytes = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    by_bytes.pre_tokenizer = XLM_R
    assert len(Seams(by_bytes)._shortened("\u0e44" * 1000)) == 1000


@pytest.mark.parametrize("char", ["ไ", "٣", "€", "。", "\x01", "\ue000"])
def test_unknown_characters_of_each_category(char):
    """Letters, digits, signs, punctuation, control characters, and those of private use."""
    assert len(assert_same_ids(unigram(), "a " + char * 1000)) < 256


def replacing(*pairs: str) -> N.Sequence:
    return N.Sequence([N.Replace(*pair.split(" ")) for pair in pairs])


def of_clusters(cluster: str) -> N.Precompiled:
    """A normalizer that makes "a" of this grapheme cluster, of two characters that are unknown by themselves."""
    return N.Precompiled(charsmap({cluster: "a"}))


KNOWN = {
    "a mark": (unigram((), of_clusters("Ж\u0301")), "Ж\u0301"),
    "a joiner": (unigram((), of_clusters("Ж\u200d")), "Ж\u200d"),
    "a mark newer than the Unicode of Python 3.11": (unigram((), of_clusters("Ж\u0897")), "Ж\u0897"),
    "a modifier of smileys": (unigram((), of_clusters("q\U0001f3fb")), "q\U0001f3fb"),
    "a vowel of Thai": (unigram((), of_clusters("Ж\u0e33")), "Ж\u0e33"),
    "a vowel of Lao": (unigram((), of_clusters("Ж\u0eb3")), "Ж\u0eb3"),
    "a vowel that becomes a consonant": (
        unigram((), N.Precompiled(charsmap({"Ж\u0e33": "a", "\u0e33": "ค"}))),
        "Ж\u0e33",
    ),
    "a halfwidth mark": (unigram((), of_clusters("Ж\uff9e")), "Ж\uff9e"),
    "another halfwidth mark": (unigram((), of_clusters("Ж\uff9f")), "Ж\uff9f"),
    "a letter in one cluster with any": (unigram((), of_clusters("\u0d4eЖ")), "\u0d4eЖ"),
    "a rare letter in one cluster with any": (unigram((), of_clusters("\U00011a3aq")), "\U00011a3aq"),
    "parts of a syllable": (unigram(["가"], N.NFC()), "\u1100\u1161"),
    "letters that become parts of a syllable": (unigram(["가"], N.NFKC()), "ㄱㅏ"),
    "a sign that becomes a space and a mark": (unigram((), N.NFKC()), "‾"),
    "a normalizer that changes all letters beside one another": (unigram((), replacing("xx y")), "a"),
    "a pattern whose letters are replaced": (unigram((), replacing("กข a", "ก ค", "ข ค")), "กข"),
    "letters replaced by those of a pattern": (unigram((), replacing("ค ก", "ง ข", "กข a")), "คง"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_characters_that_are_known_beside_others(name):
    backend, part = KNOWN[name]
    text = part * 500
    assert backend.token_to_id("<unk>") not in backend.encode("a" + text).ids[2:-1] or name.startswith("a sign")
    assert assert_same_ids(backend, text) == text


def test_a_token_longer_than_what_stays_of_a_run():
    """Its beginning is known, so that it may cover unknown characters of any number."""
    backend, text = unigram(["a" + "ไ" * 150]), "." * 63 + "a" + "ไ" * 640
    assert len(backend.encode(text)) == 4
    assert assert_same_ids(backend, text) == text
    backend = unigram(["a" + "ไ" * 63])
    assert len(assert_same_ids(backend, text)) == 64 + 128


def test_short_runs_stay():
    """The first 64 characters and the last stay, counted from the beginning of the text."""
    for before in (0, 1, 63):
        for length in (63, 64, 65, 127, 128, 129, 190, 192):
            text = "a" * before + "ไ" * length
            assert assert_same_ids(unigram(), text) == text or length - (-before % 64) >= 192
    assert len(assert_same_ids(unigram(), "ไ" * 192)) == 128


def test_lone_surrogates_stay():
    """The text is refused when it is tokenised."""
    for char in "\ud800\udfff":
        text = "a" + char + "ไ" * 1000 + " " + char * 10
        short = Seams(unigram())._shortened(text)
        assert short.startswith("a" + char)
        assert short.endswith(" " + char * 10)
        assert len(short) < 300


def test_bytes_of_unknown_characters_are_tokens():
    """Of BPE and of Unigram with byte_fallback."""
    pieces = ["<unk>", "▁", "a", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    for model in (
        models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True),
        models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True),
    ):
        backend = tokenizers.Tokenizer(model)
        backend.pre_tokenizer = XLM_R
        text = "a" + "ไ" * 1000
        assert len(backend.encode(text)) == 3002
        assert assert_same_ids(backend, text) == text


@pytest.mark.parametrize("words", [XLM_R, P.Metaspace(split=False)], ids=["words", "one word"])
def test_scores_behind_a_run(words):
    """Of paths of equal score, the rounding of the sum decides, which depends on the length of the run before it."""
    scores = [("<unk>", 0.0), ("▁", -1.3), ("a", -1.3), ("b", -1.9), ("ab", -3.2)]
    backend = tokenizers.Tokenizer(models.Unigram(scores, unk_id=0))
    backend.pre_tokenizer = words
    plain = functools.partial(backend.encode, add_special_tokens=False)
    behind = {tuple(plain("ไ" * length + "ab").ids[2:]) for length in range(64, 2000, 64)}
    assert len(behind) > 1
    for end in ("ab", " ab", " aba"):
        for length in range(448, 2000, 64):
            assert_same_ids(backend, "ไ" * length + end)
    is_shorter = len(assert_same_ids(backend, "ไ" * 1000 + " ab")) < 1000
    assert is_shorter == (words is XLM_R)


def test_an_empty_vocabulary():
    backend = tokenizers.Tokenizer(models.BPE(fuse_unk=True))
    backend.pre_tokenizer = XLM_R
    backend.add_tokens(["b"])
    for text in ("a" * 1000 + "b", "a" * 1000 + " b" * 1000):
        assert Cutter(backend).text(text, 3, True) in text
        assert_same_ids(backend, text)
    assert len(assert_same_ids(backend, "a" * 1000 + "b")) < 300  # what no token stands for is left out
