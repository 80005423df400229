"""A long text is cut before byte-level BPE or Unigram tokenises it, and this changes no token that is kept."""

import functools
import itertools
import os
import random
import struct
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors, trainers

import fastbert
from fastbert.text import characters, seams, unknown
from fastbert.text.cutting import Cutter, KeptCutter
from fastbert.text.seams import Seams
from fastbert.text.tokenizer import Tokenizer as OurTokenizer

pytestmark = pytest.mark.once

# Number of texts for each tokenizer, on which 20,000 take half a minute: FASTBERT_CUT_STRINGS=20000.
STRINGS = int(os.environ.get("FASTBERT_CUT_STRINGS", "100"))

CHINESE = ["他是最合适的人选。", "所以,他们最后都去了海边!", "我们 喜欢机器学习", "中文字一二三"] * 20
ENGLISH = (Path(fastbert.__file__).parent / "data" / "devils_dictionary.txt").read_text("utf-8").splitlines()
CORPUS = [*ENGLISH, *CHINESE, "don't we're I'll he's ''quoted'' ``so``", "é è ﬁne ½ 12345 678 .... ---- ==== !!"]


def charsmap(replaced: dict[str, str]) -> bytes:
    """The rules of a Precompiled normalizer: a double array of the bytes that are replaced, then the new texts."""
    trie, texts = {}, b""
    for old, new in replaced.items():
        node = trie
        for byte in old.encode():
            node = node.setdefault(byte, {})
        node[None] = len(texts)
        texts += new.encode() + b"\0"
    units, used = {0: 0}, {0}

    def place(node: dict, at: int) -> None:
        labels = [byte or 0 for byte in node]
        offset = next(o for o in itertools.count(1) if not used & {at ^ o ^ label for label in labels})
        used.update(at ^ offset ^ label for label in labels)
        units[at] |= offset << 10 | (None in node) << 8
        for byte, below in node.items():
            units[at ^ offset ^ (byte or 0)] = 1 << 31 | below if byte is None else byte
            if byte is not None:
                place(below, at ^ offset ^ byte)

    place(trie, 0)
    size = (max(used) | 0xFF) + 1
    array = struct.pack(f"<{size}I", *(units.get(at, 1 << 31) for at in range(size)))
    return struct.pack("<I", len(array)) + array + texts


# As in sentencepiece's nmt_nfkc: spaces of all kinds are one, and what NFKC joins or takes apart.
REPLACED = {
    "\t": " ", "\n": " ", "\r": " ", "\u00a0": " ", "\u3000": " ", "\u2003": " ", "ﬁ": "fi", "½": "1\u20442", "①": "1",
    "e\u0301": "é", "か\u3099": "が", "\u00a8": " \u0308", "\uff0c": ",", "㈱": "(株)", "\u200b": " ", "ﷺ": "صلى الله",
    "\u1100\u1161": "가", "x\u0302": "^", "\uff07": "'",
}  # fmt: skip


@functools.cache
def trained(kind: str) -> tokenizers.Tokenizer:
    if kind == "bpe":
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    elif kind == "bpe of letters":
        backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        options = {"special_tokens": ["<unk>"], "limit_alphabet": 60, "show_progress": False}
        trainer = trainers.BpeTrainer(vocab_size=900, **options)
    else:
        backend = tokenizers.Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=900, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
        )
    backend.train_from_iterator([*CORPUS, "aaaa aaaaaa xyxyxy ......"] * 2, trainer)
    return backend


def made(kind, normalizer, pre_tokenizer, added=()):
    """A tokenizer with [CLS], [SEP] and [UNK], as our `Tokenizer` demands, and RoBERTa's <mask>."""
    backend = tokenizers.Tokenizer.from_str(trained(kind).to_str())
    backend.normalizer = normalizer or normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.Sequence([])
    backend.add_special_tokens(["[CLS]", "[SEP]", "[UNK]", "<s>", AddedToken("<mask>", lstrip=True)])
    backend.add_tokens(list(added))
    cls, sep = (backend.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] [SEP] $B:1 [SEP]:1", [("[CLS]", cls), ("[SEP]", sep)]
    )
    return backend


def as_in_gpt_4(number: int) -> pre_tokenizers.Sequence:
    split = P.Split(Regex(seams._OF_WORDS[number]), "isolated")
    return P.Sequence([split, P.ByteLevel(add_prefix_space=False, use_regex=False)])


N, P = normalizers, pre_tokenizers
BYTES = P.ByteLevel(add_prefix_space=False)
SENTENCEPIECE = N.Precompiled(charsmap(REPLACED))
XLM_R = P.Sequence([P.WhitespaceSplit(), P.Metaspace()])
MADE_UP = [
    AddedToken("foo", single_word=True), AddedToken("New York"), AddedToken("é", normalized=True),
    AddedToken("<e>", normalized=False, rstrip=True), AddedToken("ab", normalized=False),
]  # fmt: skip
BACKENDS = {
    "RoBERTa": lambda: made("bpe", None, BYTES),
    "ModernBERT": lambda: made("bpe", N.NFC(), BYTES),
    "Qwen": lambda: made("bpe", N.NFC(), as_in_gpt_4(2)),
    "GPT-4": lambda: made("bpe", N.NFKC(), as_in_gpt_4(1)),
    "a prefix space": lambda: made("bpe", N.Lowercase(), P.ByteLevel(add_prefix_space=True)),
    "no words": lambda: made("bpe", None, P.ByteLevel(add_prefix_space=False, use_regex=False)),
    "XLM-R": lambda: made("unigram", SENTENCEPIECE, XLM_R),
    "DeBERTa": lambda: made(
        "unigram", N.Sequence([N.Strip(), SENTENCEPIECE, N.Replace(Regex(" {2,}"), " ")]), P.Metaspace()
    ),
    "ALBERT": lambda: made(
        "unigram",
        N.Sequence([N.Replace("``", '"'), N.Replace("''", '"'), N.NFKD(), N.StripAccents(), N.Lowercase()]),
        XLM_R,
    ),
    "NFKC": lambda: made("unigram", N.NFKC(), P.Metaspace(prepend_scheme="first")),
    "BARThez": lambda: made("bpe of letters", SENTENCEPIECE, XLM_R),
    "newlines are spaces": lambda: made("unigram", N.Replace(Regex(r"(\n){1,}"), " "), P.Metaspace()),
    "no split": lambda: made("unigram", N.Prepend("▁"), P.Metaspace(split=False)),
    "BPE added": lambda: made("bpe", N.NFC(), BYTES, MADE_UP),
    "Unigram added": lambda: made("unigram", SENTENCEPIECE, XLM_R, MADE_UP),
    "gaps added": lambda: made("bpe", None, BYTES, [AddedToken("\n\n", normalized=False), AddedToken("  ")]),
}  # fmt: skip

LETTERS = list("abcdefgxyzABCXYZ0189")
NASTY = [
    "\u0301", "\u0327", "\u0323", "\u0302", "\u20dd", "\u200d", "\u200c", "\u200b", "\ufe0f", "\u00ad", "\x00", "\x01",
    "\x7f", "\ufffd", "\ufeff", " ", "\t", "\n", "\r", "\u00a0", "\u2003", "\u3000", "\u2028", "\x85", "\x1c", "\x0b",
    "中", "㐀", "\uf900", "\U0002a6d6", "の", "か", "\u3099", "ﾊ", "ﾞ", "가", "각", "ᄀ", "ᅡ", "ᆨ", "ㄱ", "ㅏ", "ไ", "ำ",
    "é", "İ", "ß", "ﬁ", "≠", "Σ", "ς", "ᾂ", "😀", "👩\u200d👩", "🇩", "🇪", "\u0d4e", "\U00011a3a", "क", "्", "ष", "ि",
    "\u09be", "\u0600", "¨", "\u00b4", "\u037a", "▁", "ﷺ", "㈱", "①", "½", "``", "''", "\u017f", "\uff07", "\U0001d165",
    "\U0001d16d", *".,-[]#'。、",
]  # fmt: skip
WORDS = [
    "<mask>", "<s>", "[SEP]", "foo", "Foo", "<e>", "New York", "don't", "we're", "I'll", " the", "tion", "123456",
    "....", "qqqq", "aaaaaaa",
]  # fmt: skip
ALPHABETS = {
    "words": LETTERS + [" "] * 8,
    "spaces": LETTERS + [" ", "\t", "\n", "\r", "  ", "\u00a0", "\u3000"] * 3,
    "chinese": [*"中文字㐀一二三。他是最合适的人选 a", "\u0301"],
    "all": LETTERS + [" "] * 10 + NASTY + WORDS,
    "no letters": NASTY,
    "tokens": [*WORDS, *[" "] * 6, "a", "中", "\u0301"],
    "one word": LETTERS,
    "apostrophes": ["'", "r", "e", "s", "t", " ", "l", "\u0301", "\uff07"],
    "only apostrophes": ["'", "'" * 3, ".", "x", "'R", "'v"],
    "white": [*characters.WHITE, "\x1c", " \n", "<mask>", "a"],
    "unknown": [*map(chr, range(0x12000, 0x12010)), *"ไทยกขค\x01𝄞"],
    "unknown words": [*map(chr, range(0x12000, 0x12010)), " ", "a", "ﾞ", "\u0301", "ᅡ"],
    "one letter": ["a", "aa", "aaa"],
    "gaps": [" ", "  ", "   ", "<mask>", "a", "\n"],
    "long gaps": [" " * 40, "\n" * 30, "<mask>", "abc ", ".", " \n" * 40],
    "accents": ["e\u0301", "a\u0300\u0323", "\u0301", " e", "é", "x\u0302"],
    "marks": [*".,;!?'-()[]", " ", "a"],
    "digits": list("0123456789"),
    "hindi": list("हिन्दी मे लिखा "),
    "thai": list("ภาษาไทยำ "),
}


def text_of(draw: random.Random) -> str:
    """Parts of which some are one string many times over, and some lines of the corpus."""
    parts = []
    for _ in range(draw.choice((1, 1, 2, 3))):
        alphabet, kind = draw.choice(list(ALPHABETS.values())), draw.random()
        if kind < 0.15:
            parts.append(" ".join(draw.choices(CORPUS, k=draw.choice((1, 5)))))
        elif kind < 0.3:
            parts.append(draw.choice(alphabet) * draw.choice((20, 200, 800)))
        else:
            parts.append("".join(draw.choices(alphabet, k=draw.choice((30, 200, 900)))))
    return "".join(parts)


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
        one, two = one[:500], two[-500:]
        found, whole = ours([one], [two], max_length=length).encodings[0], plain.encode(one, two)
        assert (found.ids, found.offsets) == (whole.ids, whole.offsets), (one, two, length)
        short = ours.shortened(one, two, length)
        shorter += short != (one, two)
        found = plain.encode(*short)
        assert (found.ids, bool(found.overflowing)) == (whole.ids, bool(whole.overflowing)), (one, two, length)
    assert shorter > 0 or side == "left"


def test_a_backend_that_truncates_and_pads(soon):
    """As transformers leaves its backends behind: tokens are counted as without."""
    plain, backend = BACKENDS["RoBERTa"](), BACKENDS["RoBERTa"]()
    backend.enable_truncation(8)
    backend.enable_padding(length=30, direction="left")
    draw = random.Random(0)
    for _ in range(100):
        soon(draw)
        text = text_of(draw)
        assert Cutter(backend).text(text, 20) == Cutter(plain).text(text, 20)
    backend.enable_truncation(8, stride=2)
    assert Cutter(backend).text("ab " * 5000, 20) == "ab " * 5000  # its windows overlap


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
    "signs": "\u200b",
}


UNCUT = {
    ("Qwen", "white"): "newlines decide how its gaps are split, so that only gaps of equal spaces are cut",
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


def test_characters_that_begin_a_segment():
    """Normalised apart from whatever is before them, of all characters that Unicode knows how to normalise."""
    codes = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    behind = [char for char in codes if characters.BEGINNING.match(char)]
    before = [char for char in codes if unicodedata.decomposition(char) or unicodedata.combining(char)]
    before += [chr(code) for code in (*range(0x1100, 0x1200), *range(0x41, 0x5B), 0x995, 0x3046)]
    draw = random.Random(0)
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        normalise = functools.partial(unicodedata.normalize, form)
        for char in before:
            for other in draw.choices(behind, k=6):
                assert normalise(char + other) == normalise(char) + normalise(other), (form, char, other)
    assert not any(unicodedata.combining(char) for char in behind)


OTHERS = {
    "an unknown normalizer": lambda: made("bpe", N.Replace(Regex("a b"), "c"), BYTES),
    "an unknown expression": lambda: made("bpe", None, P.Sequence([P.Split(Regex(r"\w+ \w+"), "isolated"), BYTES])),
    "spaces go before words are made": lambda: made("unigram", None, P.Sequence([P.Metaspace(), P.WhitespaceSplit()])),
    "words are split by another rule": lambda: made("bpe", None, P.Punctuation()),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_tokenizers_are_left_alone(name):
    assert Seams.of(OTHERS[name]()) is None
    assert Cutter(OTHERS[name]()).text("a b " * 5000, 3) == "a b " * 5000


@pytest.mark.parametrize("option", [{"dropout": 0.1}, {"ignore_merges": True}, {"end_of_word_suffix": "</w>"}])
def test_models_of_other_rules_are_left_alone(option):
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "a</w>": 1}, merges=[], **option))
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
    by_bytes = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    by_bytes.pre_tokenizer = XLM_R
    assert len(Seams(by_bytes)._shortened("\u0e44" * 1000)) == 1000


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
    "another space behind": (small(None, GPT_4), "a\t\t\t|\t\t\t b"),
    "a newline behind": (small(None, GPT_4), "a   |   \nb"),
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
    assert small(None, GPT_4)._is_in_gap("a\t\t\t\t\tb", 3)


def test_ends_of_texts_that_begin_with_other_tokens():
    xlm_r = small(None, XLM_R)
    assert xlm_r._begins("a b", 1)
    assert not xlm_r._begins("a  b", 1)
    assert not small(N.NFC(), XLM_R)._begins("a \u0301", 1)
    assert not small(None, XLM_R, [" x"])._begins("a b", 1)
    for name in ("NFKC", "no split", "no words"):
        assert Seams(BACKENDS[name]()).ending("ab ab " * 999, 2) == "ab ab " * 999


SHORT = [
    "a \n \n \n \n. b", "foo.... ----", "x" * 30, "xyxyxyxyxyxy a aaaa", "aaaa aaaaaa<mask>", "don't 'we're'",
    "中文字一二三中文字", "a<mask>  b", "..,,..,,..", "ไไไไ ไ",
]  # fmt: skip


@pytest.mark.parametrize("name", ["RoBERTa", "Qwen", "XLM-R", "BARThez", "no split"])
def test_tokens_that_are_final(name):
    """At all places of short texts: if as many tokens are final there, the whole text has them."""
    backend = BACKENDS[name]()
    seen, sure = Seams(backend), 0
    for text in SHORT:
        whole = backend.encode(text, add_special_tokens=False).ids
        for at in range(1, len(text)):
            if not (seen._is_seam(text, at) or (text[at - 1 : at + 1].isspace() and seen._is_in_gap(text, at))):
                continue
            here = backend.encode(text[:at], add_special_tokens=False).ids
            for wanted in range(1, len(here) + 2):
                if seen._has_final(text, at, wanted):
                    sure += 1
                    assert len(here) >= wanted
                    assert here[:wanted] == whole[:wanted], (text, at, wanted)
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
