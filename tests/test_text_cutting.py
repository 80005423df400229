"""A long text is cut before it is tokenised, and this changes no token, offset or word."""

import os
import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from fastbert.text import cutting
from fastbert.text.cutting import Cutter
from fastbert.text.tokenizer import Tokenizer as OurTokenizer

pytestmark = pytest.mark.once

# Number of strings in the property test. 100,000 take some minutes: FASTBERT_CUT_STRINGS=100000.
STRINGS = int(os.environ.get("FASTBERT_CUT_STRINGS", "4000"))

LETTERS = list("abcdefgxyzABCXYZ0189")
# each is difficult at a cut: marks, joiners, what is removed, all kinds of spaces, what decomposes or grows, scripts
NASTY = [
    "\u0301", "\u0327", "\u20dd", "\u200d", "\u200c", "\u200b", "\ufe0f", "\u00ad", "\x00", "\x01", "\x7f", "\ufffd",
    "\ufeff", " ", "\t", "\n", "\r", "\u00a0", "\u2003", "\u3000", "\u2028", "\x85", "\x1c", "\x0b",
    "中", "文", "㐀", "\uf900", "\U0002a6d6", "の", "ア", "가", "각", "ไ", "é", "İ", "ß", "ﬁ", "≠", "Σ", "ς",
    "ᾂ", "😀", "👩\u200d👩", ".", ",", "-", "[", "]", "#", "##", "'", "。", "、",
]  # fmt: skip
WORDS = [
    "[MASK]",
    "[SEP]",
    "[UNK]",
    "[mask]",
    "new york",
    "New York",
    "foo",
    "Foo",
    "<e>",
    "中文",
    "q" * 120,
    "ab" * 30,
]
ALPHABETS = {
    "words": LETTERS + [" "] * 8,
    "spaces": LETTERS + [" ", "\t", "\n", "\r", "  ", "\u00a0", "\u3000"] * 3,
    "chinese": [*"中文字㐀一二三。 a", "\u0301"],
    "all": LETTERS + [" "] * 10 + NASTY + WORDS,
    "no letters": NASTY,
    "tokens": [*WORDS, *[" "] * 6, "a", "中", "\u0301"],
    "vanishing": ["\x00", "\u200b", "\u0301", " ", "a"],
    "one word": LETTERS,
    "two boundaries a token": ["New York ", "中文"],
}


def backend(lowercase=True, chinese=True, accents=None, added=()) -> Tokenizer:
    pieces = [*"abcdefgxyz0189ABCXYZ.,[]#中文字。", "ab", "xyz", "foo", "new", "york"]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces, *(f"##{piece}" for piece in pieces), "##\u0301"]
    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate(vocab)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, handle_chinese_chars=chinese, strip_accents=accents
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.add_tokens(list(added))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab.index("[CLS]")), ("[SEP]", vocab.index("[SEP]"))],
    )  # fmt: skip
    return tokenizer


BACKENDS = {
    "uncased": lambda: backend(),
    "cased": lambda: backend(lowercase=False, accents=False),
    "uncased with accents": lambda: backend(accents=False),
    "no chinese": lambda: backend(chinese=False),
    "added": lambda: backend(added=[AddedToken("foo", normalized=True), AddedToken("<e>", normalized=False)]),
    "added with a space": lambda: backend(added=[AddedToken("New York", normalized=True)]),
    "added chinese": lambda: backend(added=[AddedToken("中文", normalized=True)]),
    "single word": lambda: backend(added=[AddedToken("foo", single_word=True), AddedToken("<e>", single_word=True)]),
    "takes spaces": lambda: backend(added=[AddedToken("<e>", rstrip=True), AddedToken("foo", lstrip=True)]),
}


def text_of(draw: random.Random, alphabet: list[str]) -> str:
    return "".join(draw.choices(alphabet, k=draw.choice((0, 1, 5, 30, 120, 300))))


def told(tokenizer: OurTokenizer, *args, **options):
    try:
        encoded = tokenizer(*args, **options)
    except ValueError as error:
        return str(error)
    return [
        (e.ids, e.type_ids, e.offsets, e.special_tokens_mask, e.word_ids, e.sequence_ids) for e in encoded.encodings
    ]


@pytest.mark.parametrize("name", BACKENDS)
def test_cutting_changes_no_token(name, monkeypatch):
    """Random strings of difficult characters, as in the plain call: ids, segments, offsets, words and errors."""
    ours, plain = OurTokenizer(BACKENDS[name]()), OurTokenizer(BACKENDS[name]())
    monkeypatch.setattr(plain._cutter, "_boundary", None)
    draw = random.Random(name)
    alphabets, cut = list(ALPHABETS.values()), 0
    for _ in range(max(STRINGS // len(BACKENDS) // 3, 1)):
        one, two, three = (text_of(draw, draw.choice(alphabets)) for _ in range(3))
        length = draw.choice((3, 4, 5, 6, 7, 8, 12, 20))
        cut += ours._cutter.text(one, length - 2) != one
        special = draw.random() < 0.8
        options = {"max_length": length, "add_special_tokens": special}
        assert told(ours, [one, two], **options) == told(plain, [one, two], **options)
        assert ours.input_ids([one, three], length) == plain.input_ids([one, three], length)
        options["truncation"] = draw.choice(("longest_first", "only_first", "only_second"))
        assert told(ours, [one, three], [two, one], **options) == told(plain, [one, three], [two, one], **options)
        assert told(ours, [three], **options) == told(plain, [three], **options)
        options |= {"overflow": True, "stride": draw.choice((0, 1)) if length > 6 else 0}
        assert told(ours, [two], **options) == told(plain, [two], **options)
    assert cut > 0


@pytest.mark.parametrize("name", BACKENDS)
def test_pairs_with_an_odd_limit(name, monkeypatch):
    """If both texts of a pair are cut, the longer one keeps the odd token, as without cutting."""
    ours, plain = OurTokenizer(BACKENDS[name]()), OurTokenizer(BACKENDS[name]())
    monkeypatch.setattr(plain._cutter, "_boundary", None)
    draw = random.Random("odd " + name)
    alphabets, cut = [ALPHABETS["words"], ALPHABETS["all"], ALPHABETS["chinese"]], 0
    for _ in range(max(STRINGS // len(BACKENDS) // 16, 1)):
        short = "".join(draw.choices(draw.choice(alphabets), k=20))
        long = "".join(draw.choices(draw.choice(alphabets), k=400))
        pair = (short, long) if draw.random() < 0.5 else (long, short)
        kept = draw.choice((1, 3))
        now = ours._cutter.pair(*pair, kept, "longest_first")
        cut += len(now[0]) < len(pair[0]) and len(now[1]) < len(pair[1])
        options = {"max_length": kept, "add_special_tokens": False}
        assert told(ours, [pair[0]], [pair[1]], **options) == told(plain, [pair[0]], [pair[1]], **options)
    # "New York" leaves only Chinese characters as boundaries, and these texts have too few of them
    assert cut > 0 or name == "added with a space"


def test_texts_are_cut_near_what_is_kept():
    """Otherwise the test above would also pass if nothing was ever cut."""
    cutter = Cutter(backend())
    assert cutter.text("abc " * 1000, 10) == "abc " * 11 + "abc"
    assert cutter.text("中文" * 1000, 10) == "中文" * 5 + "中"
    assert cutter.text("abc " * 20, 10) == "abc " * 20
    assert cutter.pair("a b", "abc " * 1000, 10, "longest_first") == ("a b", "abc " * 11 + "abc")
    assert cutter.pair("a á", "abc " * 1000, 10, "longest_first") == ("a á", "abc " * 13 + "abc")
    assert cutter.pair("abc " * 1000, "abc " * 1000, 10, "longest_first") == ("abc " * 11 + "abc",) * 2
    odd = ("abc " * 1000, "abc " * 1001)
    assert cutter.pair(*odd, 9, "longest_first") == odd  # it depends on which is longer, so neither is cut
    assert cutter.pair("abc " * 9000, "abc " * 1000, 9, "longest_first") == ("abc " * 44 + "abc", "abc " * 10 + "abc")
    assert cutter.pair("abc " * 1000, "abc " * 9000, 9, "longest_first") == ("abc " * 10 + "abc", "abc " * 44 + "abc")
    # normalisation may make four tokens of each of the first text's 460
    unlike = ("á" * 60 + "abc " * 100, "abc " * 1800)
    assert cutter.pair(*unlike, 9, "longest_first") == unlike


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_end_of_a_text_is_kept_if_the_settings_say_so(side):
    tokenizer = OurTokenizer(backend(), {"truncation_side": side})
    text = "a " * 500 + "b"
    assert tokenizer.decode(tokenizer.input_ids([text], 4)[0]) == ("a b" if side == "left" else "a a")


def test_texts_of_other_tokenizers_are_never_cut():
    other = backend()
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    assert Cutter(other).text("a " * 1000, 3) == "a " * 1000
    other = backend()
    other.normalizer = normalizers.Lowercase()
    assert Cutter(other).text("a " * 1000, 3) == "a " * 1000


def test_little_more_than_the_kept_part_of_ten_megabytes_is_tokenised():
    """A line of English prose, repeated: at most twice as many characters as the first 256 words have."""
    line = "He was, in a word, the very man for it; and so, at last, they went (all of them) down to the sea.\n"
    long = line * (10_000_000 // len(line))
    kept = " ".join(long[:10_000].split()[:256])
    assert len(Cutter(backend()).text(long, 256)) <= 2 * len(kept)


LINES = {
    "english": "He was, in a word, the very man for it.\n",
    "russian": "Он был, одним словом, самый нужный человек.\n",
    "greek": "Ήταν, με μια λέξη, ο άνθρωπος γι' αυτό.\n",  # noqa: RUF001
    "arabic": "كان باختصار الرجل المناسب لذلك\n",
    "hindi": "वह एक शब्द में इसके लिए सही आदमी था\n",
    "korean": "그는 한마디로 그 일에 꼭 맞는 사람이었다\n",
    "marks": "?!-- ...;;",
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", LINES)
def test_long_texts_of_many_scripts_are_cut_on_either_side(name, side):
    """The ids are those of the whole text, and few of the characters are tokenised."""
    long, tokenizer = LINES[name] * 400, OurTokenizer(backend(), {"truncation_side": side})
    cut = tokenizer._cutter.text(long, 30) if side == "right" else tokenizer._cutter.ending(long, 30)
    assert len(cut) < 600
    whole = tokenizer._backend.encode(long, add_special_tokens=False).ids
    ids = tokenizer.input_ids([long], 32)[0]
    assert ids[1:-1] == (whole[:30] if side == "right" else whole[-30:])


# ---- ids by another package --------------------------------------------------------------------------------


@pytest.fixture
def fast(monkeypatch):
    """Every call uses the ids of nanotoken."""
    pytest.importorskip("nanotoken")
    monkeypatch.setattr("fastbert.text.tokenizer._WORTH_FAST_IDS", 0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", BACKENDS)
def test_nanotoken_gives_the_same_ids(name, side, fast):
    """Random strings of difficult characters, compared with `tokenizers`, whole and truncated."""
    ours, plain = OurTokenizer(BACKENDS[name](), {"truncation_side": side}), BACKENDS[name]()
    draw = random.Random(name + side)
    alphabets = list(ALPHABETS.values())
    for _ in range(max(STRINGS // len(BACKENDS) // 2 // 50, 1)):
        texts = [text_of(draw, draw.choice(alphabets)) for _ in range(50)]
        plain.no_truncation()
        assert ours.input_ids(texts) == [e.ids for e in plain.encode_batch(texts)]
        length = draw.choice((2, 3, 4, 7, 20))
        plain.enable_truncation(length, direction=side)
        assert ours.input_ids(texts, length) == [e.ids for e in plain.encode_batch(texts)]
    assert ours._fast_ids is not None


def test_nanotoken_is_used_for_many_texts_only(monkeypatch):
    pytest.importorskip("nanotoken")
    ours = OurTokenizer(backend())
    ours.input_ids(["a"] * 255)
    assert "_fast_ids" not in ours.__dict__
    ours.input_ids(["a"] * 256)
    assert ours.__dict__["_fast_ids"] is not None
    with pytest.raises(ValueError, match=r"text 1 is not valid Unicode: lone surrogate U\+D800 at character 1"):
        ours.input_ids(["a", "b\ud800"])
    with pytest.raises(ValueError, match="max_length must be at least 2, the special tokens, got 1"):
        ours.input_ids(["a"], 1)


def test_what_nanotoken_does_not_support_is_left_to_tokenizers(fast, monkeypatch):
    splitting = OurTokenizer(backend(), {"split_special_tokens": True})
    assert splitting.tokenize("[SEP]") == splitting._backend.encode("[SEP]", add_special_tokens=False).tokens
    assert splitting.input_ids(["a [SEP]"]) == splitting(["a [SEP]"]).input_ids
    assert splitting._fast_ids is None
    other = backend()
    other.pre_tokenizer = pre_tokenizers.Split("b", "removed")
    assert OurTokenizer(other).input_ids(["abc"]) == OurTokenizer(other)(["abc"]).input_ids
    assert OurTokenizer(other)._fast_ids is None
    monkeypatch.setattr("fastbert.text.fast._TESTED", ("0.0.",))
    assert OurTokenizer(backend())._fast_ids is None


def test_texts_are_searched_in_pieces(monkeypatch):
    """A search cannot be interrupted either. A match across the border of two pieces counts once, and only a space at
    the end of a piece may be missed."""
    tokenizer = OurTokenizer.from_words(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"], lowercase=True)
    cutter = tokenizer._cutter
    for text in ("a a \u4e00\u4e00, a" * 40, "a " * 300, "\u4e00" * 300):
        whole = cutter.text(text, 20)
        exact = {match.start() for match in cutter._boundaries(text)}
        for size in (1, 2, 3, 7, 50):
            monkeypatch.setattr(cutting, "_SEARCHED", size)
            found = [match.start() for match in cutter._boundaries(text)]
            assert found == sorted({*found})
            assert exact.issuperset(found)
            assert all(text[n] == " " and (n + 1) % size == 0 for n in exact.difference(found))
            assert cutter.text(text, 20).startswith(whole)
        monkeypatch.undo()
