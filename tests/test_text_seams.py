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
from fastbert.text import seams
from fastbert.text.cutting import Cutter
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
}


@pytest.mark.parametrize("name", ["RoBERTa", "ModernBERT", "Qwen", "XLM-R", "DeBERTa"])
@pytest.mark.parametrize("kind", TEN_MEGABYTES)
def test_little_of_a_text_of_megabytes_is_tokenised(name, kind):
    """At most 128 characters for each kept token. A gap of DeBERTa's is shortened, and with RoBERTa cut."""
    part, cutter = TEN_MEGABYTES[kind], Cutter(BACKENDS[name]())
    long = part * (10_000_000 // len(part))
    if name in ("XLM-R", "DeBERTa") and kind == "thai":
        pytest.skip("its letters are all unknown here, and so one token")
    assert len(cutter.text(long, 254, True)) <= 255 * 128
    if kind in ("words", "hindi"):
        assert len(cutter.ending(long, 254, True)) <= 255 * 128


def test_characters_that_begin_a_segment():
    """Normalised apart from whatever is before them, of all characters that Unicode knows how to normalise."""
    codes = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    behind = [char for char in codes if seams._BEGINNING.match(char)]
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
