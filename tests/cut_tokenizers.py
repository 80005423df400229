"""Tokenizers with byte-level BPE and with Unigram, and texts of difficult characters, for tests of cutting texts."""

import functools
import itertools
import json
import random
import struct
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors, trainers

import fastbert
from fastbert.text import characters, seams

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


def of_bytes(kind: str) -> tokenizers.Tokenizer:
    """With tokens for the bytes of characters that have none."""
    state = json.loads(trained(kind).to_str())
    model, pieces = state["model"], [f"<0x{byte:02X}>" for byte in range(256)]
    model["byte_fallback"] = True
    if isinstance(model["vocab"], list):
        model["vocab"] += [[piece, -20.0] for piece in pieces]
    else:
        model["vocab"] |= {piece: i for i, piece in enumerate(pieces, len(model["vocab"]))}
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def made(kind, normalizer, pre_tokenizer, added=()):
    """A tokenizer with [CLS], [SEP] and [UNK], as our `Tokenizer` demands, and RoBERTa's <mask>."""
    backend = of_bytes(kind[: -len(" of bytes")]) if kind.endswith(" of bytes") else trained(kind)
    backend = tokenizers.Tokenizer.from_str(backend.to_str())
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
    "Unigram of bytes": lambda: made("unigram of bytes", None, P.Metaspace()),
    "BPE of bytes": lambda: made("bpe of letters of bytes", None, P.Metaspace()),
    "no split": lambda: made("unigram", N.Prepend("▁"), P.Metaspace(split=False)),
    "BPE added": lambda: made("bpe", N.NFC(), BYTES, MADE_UP),
    "Unigram added": lambda: made("unigram", SENTENCEPIECE, XLM_R, MADE_UP),
    "gaps added": lambda: made("bpe", None, BYTES, [AddedToken("\n\n", normalized=False), AddedToken("  ")]),
}  # fmt: skip

# ---- texts -----------------------------------------------------------------------------------------------

LETTERS = list("abcdefgxyzABCXYZ0189")
# Each is difficult at a cut: marks, joiners, what is removed, all kinds of spaces, what decomposes or grows, scripts.
NASTY = [
    "\u0301", "\u0327", "\u0323", "\u0302", "\u20dd", "\u200d", "\u200c", "\u200b", "\ufe0f", "\u00ad", "\x00", "\x01",
    "\x7f", "\ufffd", "\ufeff", " ", "\t", "\n", "\r", "\u00a0", "\u2003", "\u3000", "\u2028", "\x85", "\x1c", "\x0b",
    "中", "文", "㐀", "\uf900", "\U0002a6d6", "の", "ア", "か", "\u3099", "ﾊ", "ﾞ", "가", "각", "ᄀ", "ᅡ", "ᆨ", "ㄱ", "ㅏ",
    "ไ", "ำ", "é", "İ", "ß", "ﬁ", "≠", "Σ", "ς", "ᾂ", "😀", "👩\u200d👩", "🇩", "🇪", "\u0d4e", "\U00011a3a", "क", "्",
    "ष", "ि", "\u09be", "\u0600", "¨", "\u00b4", "\u037a", "▁", "ﷺ", "㈱", "①", "½", "``", "''", "\u017f",
    "\uff07", "\U0001d165", "\U0001d16d", "##", *".,-[]#'。、",
]  # fmt: skip


def alphabets(words: list[str]) -> dict[str, list[str]]:
    """What texts are made of, for every tokenizer; words: strings that some tokenizers treat as one."""
    return {
        "words": LETTERS + [" "] * 8,
        "spaces": LETTERS + [" ", "\t", "\n", "\r", "  ", "\u00a0", "\u3000"] * 3,
        "chinese": [*"中文字㐀一二三。他是最合适的人选 a", "\u0301"],
        "all": LETTERS + [" "] * 10 + NASTY + words,
        "no letters": NASTY,
        "tokens": [*words, *[" "] * 6, "a", "中", "\u0301"],
        "one word": LETTERS,
    }


WORDS = [
    "<mask>", "<s>", "[SEP]", "foo", "Foo", "<e>", "New York", "don't", "we're", "I'll", " the", "tion", "123456",
    "....", "qqqq", "aaaaaaa",
]  # fmt: skip
ALPHABETS = alphabets(WORDS) | {
    "apostrophes": ["'", "r", "e", "s", "t", " ", "l", "\u0301", "\uff07"],
    "only apostrophes": ["'", "'" * 3, ".", "x", "'R", "'v"],
    "white": [*characters.WHITE, "\x1c", " \n", "<mask>", "a"],
    "unknown": [*map(chr, range(0x12000, 0x12010)), *"ไทยกขค\x01𝄞"],
    "unknown words": [*map(chr, range(0x12000, 0x12010)), " ", "a", "ﾞ", "\u0301", "ᅡ"],
    "one letter": ["a", "aa", "aaa"],
    "gaps": [" ", "  ", "   ", "<mask>", "a", "\n"],
    "lines": [" ", "\t", "\n", "\r", "\r\n", "  ", "\u00a0", "a", "."],
    "empty lines": [" ", "\t", "\n", "\r\n"],
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
