"""A long text is cut before it is tokenised, and this changes no token, offset or word."""

import os
import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from cut_tokenizers import LETTERS, alphabets
from fastbert.text import cutting, kinds, tokenizer
from fastbert.text.cutting import Cutter
from fastbert.text.tokenizer import Tokenizer as OurTokenizer

pytestmark = pytest.mark.once

# Number of strings in the property test. 100,000 take some minutes: FASTBERT_CUT_STRINGS=100000.
STRINGS = int(os.environ.get("FASTBERT_CUT_STRINGS", "4000"))

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
ALPHABETS = alphabets(WORDS) | {
    "vanishing": ["\x00", "\u200b", "\u0301", " ", "a"],
    "two boundaries a token": ["New York ", "中文"],
}


def backend(lowercase=True, chinese=True, accents=None, added=()) -> Tokenizer:
    pieces = [*"abcdefgxyz0189ABCXYZ.,[]#中文字。", "ab", "xyz", "foo", "new", "york"]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces, *(f"##{piece}" for piece in pieces), "##\u0301"]
    vocab += ["##\U0001d165", "##\U0001d16d"]  # marks of music, which normalisation sorts
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
    monkeypatch.setattr(cutting, "_COUNTED", 37)
    ours, plain = OurTokenizer(BACKENDS[name]()), OurTokenizer(BACKENDS[name]())
    monkeypatch.setattr(plain._cutter, "_boundary", None)
    draw = random.Random("odd " + name)
    alphabets, cut = [ALPHABETS["words"], ALPHABETS["all"], ALPHABETS["chinese"]], 0
    for _ in range(max(STRINGS // len(BACKENDS) // 16, 1)):
        short = "".join(draw.choices(draw.choice(alphabets), k=20))
        long = "".join(draw.choices(draw.choice(alphabets), k=400))
        if draw.random() < 0.3:  # of about as many tokens
            short = "".join(draw.choices(draw.choice(alphabets), k=380))
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
    assert cutter.pair(*odd, 9, "longest_first") == ("abc " * 10 + "abc", "abc " * 44 + "abc")  # the second is longer
    assert cutter.pair(*odd[::-1], 9, "longest_first") == ("abc " * 44 + "abc", "abc " * 10 + "abc")
    assert cutter.pair("abc " * 9000, "abc " * 1000, 9, "longest_first") == ("abc " * 44 + "abc", "abc " * 10 + "abc")
    assert cutter.pair("abc " * 1000, "abc " * 9000, 9, "longest_first") == ("abc " * 10 + "abc", "abc " * 44 + "abc")
    # normalisation may make four tokens of each of the first text's 460
    unlike = ("á" * 60 + "abc " * 100, "abc " * 1800)
    short = "á" * 60 + "abc " * 10 + "abc"
    assert cutter.pair(*unlike, 9, "longest_first") == (short, "abc " * (4 * len(short) + 1) + "abc")
    single = Cutter(backend(added=[AddedToken("foo", single_word=True)]))
    assert single.pair(*odd, 9, "longest_first") == odd  # its tokens cannot be counted in parts, so neither is cut


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


# ---- long words, and long gaps -----------------------------------------------------------------------------

RUNS = [
    "a", "\u0301", " ", "\x00", "\u200b", "e\u0301", "\x00 ", "\u0301 \u0327", "\u034f\u0301", "中", "\U0002a6d6", "。",
    ".", "]", "[", "é", "각", "İ", "≠", "ﬁ", "ไ", "😀", "\ufffd", "\U00016ff0", "\U0001d165\u0301", "ु", "ि", "\u3000",
    "\n", "q\x7f",
]  # fmt: skip


def text_with_runs(draw: random.Random) -> str:
    """Parts of which some are one character, or two, many times over."""
    parts = []
    for _ in range(draw.choice((1, 1, 2, 3, 6))):
        kind = draw.random()
        if kind < 0.5:
            parts.append(draw.choice(RUNS) * draw.choice((1, 3, 40, 200, 700)))
        elif kind < 0.7:
            parts.append("".join(draw.choices(draw.choices(RUNS, k=2), k=draw.choice((20, 200, 700)))))
        elif kind < 0.85:
            parts.append("".join(draw.choices([*LETTERS, "\u0301", "\x00"], k=draw.choice((20, 200, 700)))))
        elif kind < 0.95:
            parts.append("".join(draw.choices(ALPHABETS["all"], k=draw.choice((1, 10, 60)))))
        else:
            parts.append(draw.choice(WORDS) + draw.choice(("\x00", "\u0301")) * 90 + draw.choice(LETTERS) * 90)
    return "".join(parts)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", BACKENDS)
def test_shortening_changes_no_id(name, side, monkeypatch):
    """Texts with long words and gaps, of characters that normalisation drops, doubles or sorts."""
    made = BACKENDS[name]()
    made.model.max_input_chars_per_word = 9
    ours, plain = OurTokenizer(made, {"truncation_side": side}), BACKENDS[name]()
    plain.model.max_input_chars_per_word = 9
    draw = random.Random("runs " + name + side)
    shorter = 0
    for _ in range(max(STRINGS // len(BACKENDS), 1)):
        monkeypatch.setattr(kinds, "_CHUNK", draw.choice((97, 150, 400, 65_536)))
        text, length = text_with_runs(draw), draw.choice((3, 4, 7, 12, 30))
        plain.no_truncation()
        whole = plain.encode(text).ids
        shortened = ours._cutter._kinds.shortened(text)
        assert plain.encode(shortened).ids == whole, repr(text)
        plain.enable_truncation(length, direction=side)
        assert ours.input_ids([text], length) == [plain.encode(text).ids], repr(text)
        for kept in (1, 2, draw.choice((5, 12, 30))):
            for part, of in ((whole[1:-1][:kept], ours._cutter._kinds.beginning),
                             (whole[1:-1][-kept:], ours._cutter._kinds.ending)):  # fmt: skip
                plain.no_truncation()
                ids = plain.encode(of(text, kept, draw.random() < 0.5), add_special_tokens=False).ids
                assert (ids[:kept] if of.__name__ == "beginning" else ids[-kept:]) == part, (repr(text), kept)
                assert len(ids) > kept or ids == whole[1:-1]
        # A service sees by one token more whether a text is too long.
        assert len(ours.input_ids([text], length + 1)[0]) == min(len(whole), length + 1)
        shorter += len(shortened) < len(text) / 2
    assert shorter > 0


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", BACKENDS)
def test_tokens_of_a_shortened_text_have_their_places(name, side, monkeypatch):
    monkeypatch.setattr(cutting, "_WORTH_SHORTENING", 0)
    monkeypatch.setattr(cutting, "_CHARACTERS_PER_TOKEN", 1)
    made, plain = BACKENDS[name](), BACKENDS[name]()
    made.model.max_input_chars_per_word = plain.model.max_input_chars_per_word = 9
    ours, draw, shorter = OurTokenizer(made, {"truncation_side": side}), random.Random("places " + name + side), 0
    for _ in range(max(STRINGS // len(BACKENDS) // 2, 1)):
        monkeypatch.setattr(kinds, "_CHUNK", draw.choice((97, 150, 400, 65_536)))
        text, length = text_with_runs(draw), draw.choice((3, 4, 7, 12, 30, 500))
        plain.no_truncation()
        whole = plain.encode(text, add_special_tokens=False)
        short, places = ours.located(text, length)
        found = plain.encode(short, add_special_tokens=False)
        assert len(places) == len(short)
        spans = [(places[a], places[b - 1] + 1) if a < b else (a, b) for a, b in found.offsets]
        kept = slice(length) if side == "right" else slice(-length, None)
        assert (found.ids[kept], spans[kept]) == (whole.ids[kept], whole.offsets[kept]), (repr(text), length)
        assert len(found.ids) > length or found.ids == whole.ids
        shorter += len(short) < len(text) / 2
    assert shorter > 0


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", BACKENDS)
def test_shortened_pairs_have_the_same_ids(name, side, monkeypatch):
    monkeypatch.setattr(cutting, "_WORTH_SHORTENING", 0)
    ours, plain = OurTokenizer(BACKENDS[name](), {"truncation_side": side}), BACKENDS[name]()
    draw = random.Random("pairs " + name + side)
    shorter = 0
    for _ in range(max(STRINGS // len(BACKENDS) // 8, 1)):
        length = draw.choice((5, 6, 8, 13, 20))
        texts = [text_with_runs(draw) if draw.random() < 0.7 else "a b" for _ in range(2)]
        plain.no_truncation()
        whole = plain.encode(*texts)
        pair = [ours.shortened(text, length) for text in texts]
        same = plain.encode(*pair)
        assert (same.ids, same.type_ids) == (whole.ids, whole.type_ids)
        plain.enable_truncation(length, direction=side)
        whole, short = plain.encode(*texts), ours.shortened_pair(*pair, length)
        same = plain.encode(*short)
        assert (same.ids, same.type_ids) == (whole.ids, whole.type_ids), (texts, length)
        assert bool(same.overflowing) == bool(whole.overflowing)
        shorter += sum(map(len, short)) < sum(map(len, texts))
    assert shorter > 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_little_of_two_texts_of_megabytes_is_tokenised(side, monkeypatch):
    """Where the limit is odd, both were tokenised whole to see which is longer. The first tokens tell, unless both have
    thousands; then one token more of either text may be kept."""
    ours, plain = OurTokenizer(backend(), {"truncation_side": side}), backend()
    long = "the man is eating food, and so on. " * 90_000
    assert sum(len(ours.shortened(text, 255)) for text in (long, " " + long)) < 200_000

    monkeypatch.setattr(tokenizer, "_COMPARED", 60)
    long, middle = "the man is eating food, and so on. " * 30, "a man, " * 15
    for texts in ((long, middle), (middle, long), (middle, middle + "a"), (long, long + "a"), (long + "a", long)):
        for length in (19, 20):
            short = ours.shortened_pair(*(ours.shortened(text, length) for text in texts), length)
            assert max(map(len, short)) < 500
            plain.enable_truncation(length, direction=side)
            found, whole = plain.encode(*short), plain.encode(*texts)
            if length % 2 == 1 or middle in texts:
                assert found.ids == whole.ids
            kept = [[e.type_ids.count(number) for number in (0, 1)] for e in (found, whole)]
            assert len(found.ids) == length
            assert abs(kept[0][0] - kept[1][0]) <= 1

    # Also where words have many tokens, of which the library makes windows.
    plain.no_truncation()
    long = "eee" * 20 + " "
    short = ours.shortened(long * 100, 20)
    ids, whole = (plain.encode(text, add_special_tokens=False).ids for text in (short, long * 100))
    assert 60 < len(ids) < 120 < len(whole)


def test_a_mark_that_parts_others_stays(monkeypatch):
    """Normalisation sorts the marks of music unless U+034F stands between them, and then drops U+034F."""
    made = backend()
    of = kinds.Kinds(made)
    monkeypatch.setattr(kinds, "_CHUNK", 1000)
    accents = "\u0301" * 2000
    text = " " * 997 + "ba\U0001d16d" + accents + "\u034f" + accents + "\U0001d165"
    assert len(of.shortened(text)) < 2000
    assert made.encode(of.shortened(text)).tokens == made.encode(text).tokens
    assert made.encode(text).tokens != made.encode(text.replace("\u034f", "")).tokens


def test_an_added_token_of_letters_keeps_long_words_whole():
    """It could stand in the middle of one."""
    ours, plain = (OurTokenizer(backend(added=["foo"])) for _ in range(2))
    text = "x" * 5000 + "foo" + "x" * 5000
    assert ours._cutter._kinds.shortened(text) == text
    assert ours.input_ids([text], 8) == [plain._backend.encode(text).ids]
    assert len(ours.input_ids([text], 8)[0]) == 5


MEGABYTES = {
    "a word": "ab1" * 1_000_000, "a word without end": "x" * 3_000_000 + " a", "spaces": " \t" * 1_500_000 + "a",
    "accents": "\u0301" * 1_500_000, "letters with accents": "e\u0301" * 1_000_000, "control": "\x00\x7f" * 1_500_000,
    "chinese": "漢字" * 500_000, "rare chinese": "\U0002a6d6" * 750_000, "full stops": "。" * 1_000_000,
    "hangul": "각" * 1_000_000, "opening brackets": "[" * 3_000_000,
    "words after a word": "x" * 1_500_000 + " a" * 750_000,
    "smileys": "😀" * 750_000, "thai": "ไ" * 1_000_000, "accents behind a mark": "." + "\u0301" * 1_500_000,
}  # fmt: skip


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MEGABYTES)
def test_little_of_a_text_of_megabytes_is_tokenised(name, side):
    """At most ten characters a token, and the ids are those of the whole text."""
    tokenizer = OurTokenizer(backend(), {"truncation_side": side})
    long, cutter = MEGABYTES[name], tokenizer._cutter
    cut = cutter.text(long, 254, True) if side == "right" else cutter.ending(long, 254, True)
    assert len(cut) < 2560
    short = long[:1000] + long[-1000:]
    ids = tokenizer._backend.encode(short, add_special_tokens=False).ids
    kept = 16 if len(ids) > 16 else len(ids)
    found = tokenizer.input_ids([long], 256)[0][1:-1]
    assert found[:kept] == ids[:kept] if side == "right" else found[-kept:] == ids[-kept:]


def test_texts_are_looked_at_in_chunks(monkeypatch):
    """At the end of a chunk only a space may be missed, so that the text is cut a little later."""
    tokenizer = OurTokenizer.from_words(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"], lowercase=True)
    of = tokenizer._cutter._kinds
    for text in ("a a \u4e00\u4e00, a" * 40, "a " * 300, "\u4e00" * 300):
        whole = of.beginning(text, 20, False)
        assert text.startswith(whole)
        assert len(whole) < len(text)
        assert of.beginning(text, 2000, False) is text  # `pair` asks by `is` whether anything was cut
        for size in (1, 2, 3, 7, 50):
            monkeypatch.setattr(kinds, "_CHUNK", size)
            assert of.beginning(text, 20, False).startswith(whole)
        monkeypatch.undo()


def test_an_added_token_at_the_end_of_a_long_word_is_found():
    """It holds a letter of the word, an accent that normalisation drops, and the mark behind the word."""
    added = [AddedToken("e\u0301.", normalized=False), AddedToken(".\u0301e", normalized=False)]
    ours, plain = (OurTokenizer(backend(added=added)) for _ in range(2))
    for text in ("x" * 5000 + "e\u0301.", ".\u0301e" + "x" * 5000):
        assert len(ours._cutter._kinds.shortened(text)) < 2000
        assert ours.input_ids([text], 8) == [plain._backend.encode(text).ids]


def test_a_lone_surrogate_within_a_long_word_is_refused():
    """It is no letter, and so it is not left out with the middle of the word."""
    with pytest.raises(ValueError, match=r"text 0 is not valid Unicode: lone surrogate U\+D800"):
        OurTokenizer(backend()).input_ids(["x" * 20_000 + "\ud800" + "x" * 20_000], 8)
