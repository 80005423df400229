"""Of a text without spaces the end alone is tokenised where the end is kept, and this changes no token that is kept.

Texts that no such place is known in can be refused.
"""

import functools
import itertools
import random

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, models, processors

from cut_tokenizers import ALPHABETS, BACKENDS, CHINESE, ENGLISH, XLM_R, N, P, as_in_gpt_4, made
from fastbert.service.errors import ServiceError
from fastbert.service.work.texts import Texts
from fastbert.text import paths, seams
from fastbert.text.cutting import Cutter, UncutError
from fastbert.text.paths import Paths
from fastbert.text.tokenizer import Tokenizer

pytestmark = pytest.mark.once

# Those of Unigram that mark the first word of every text, and those of BPE that begin words at signs.
MARKING = ["XLM-R", "DeBERTa", "ALBERT", "newlines are spaces", "Unigram of bytes", "Unigram added"]
AT_SIGNS = ["RoBERTa", "ModernBERT", "Qwen", "GPT-4", "a prefix space", "BPE added"]
WITHOUT_SPACES = {
    "chinese": "".join(CHINESE).replace(" ", ""),
    "english": "".join("".join(ENGLISH).split())[:60_000],
    "lines": "\n".join(line.replace(" ", "_") for line in ENGLISH)[:60_000],
}


@functools.cache
def cutter(name: str) -> Cutter:
    return Cutter(BACKENDS[name]())


def with_scores(scores: dict[str, float], added=()) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), *scores.items()], 0))
    backend.pre_tokenizer = XLM_R
    backend.add_tokens(list(added))
    return backend


def ids_of(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", WITHOUT_SPACES)
@pytest.mark.parametrize("name", MARKING + AT_SIGNS)
def test_little_is_tokenised_of_a_text_without_spaces(name, kind):
    text, short = WITHOUT_SPACES[kind] * 10, 0
    whole = ids_of(cutter(name)._backend, text)
    for kept in (30, 60, 90, 120):
        cut = cutter(name).ending(text, kept)
        short += len(cut) <= 32 * (kept + 1)
        assert ids_of(cutter(name)._backend, cut)[-kept - 1 :] == whole[-kept - 1 :]
    assert short >= 2  # the others end in a run, or two ways to make their tokens are equally good


@pytest.mark.parametrize("name", MARKING + AT_SIGNS)
def test_an_end_changes_no_token(name, monkeypatch):
    """Random strings of difficult characters, most of them without spaces."""
    monkeypatch.setattr(seams, "_WORTH_CUTTING", 2)
    cut, draw, found = cutter(name), random.Random(name), 0
    for _ in range(250):
        alphabet = [c for c in draw.choice(list(ALPHABETS.values())) if draw.random() < 0.1 or not c.isspace()]
        text = "".join(draw.choices(alphabet or ["a"], k=draw.choice((200, 700, 2_000))))
        kept = draw.choice((2, 5, 9, 20))
        end, whole = cut.ending(text, kept), ids_of(cut._backend, text)
        found += len(end) < len(text)
        ids = ids_of(cut._backend, end)
        assert ids[-kept:] == whole[-kept:], (text, kept)
        assert (len(ids) > kept) == (len(whole) > kept), (text, kept)
    assert found > 40


def test_a_word_begins_at_a_sign_behind_a_letter():
    assert [at for at in range(1, 11) if seams._is_sign("ab,c'd。1-?\u0301", at)] == [2, 6, 8]
    assert not seams._is_sign("a\u00b4", 1)  # NFKC makes a space and an accent of it
    assert not seams._is_sign("a\uff07", 1)
    assert not seams._is_sign("a\u0301.", 2)
    split = P.Sequence([P.Split(Regex(seams._OF_WORDS[1]), "isolated"), P.ByteLevel(use_regex=False)])
    spaced = made("bpe", None, split)  # a space before the first sign parts it from the letters behind it
    for text in (",a" * 9_000, "(ab" * 9_000):
        assert Cutter(spaced).ending(text, 9) == text


def test_numbers_are_split_from_their_beginning():
    """By threes, so that a cut in the middle of a number would split it in other ways."""
    vocabulary = {sign: i for i, sign in enumerate([*P.ByteLevel.alphabet(), "12", "23", "31"])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("1", "2"), ("2", "3"), ("3", "1")]))
    backend.pre_tokenizer = as_in_gpt_4(1)
    text = "123" * 3_000
    for kept in (8, 9, 10):
        assert ids_of(backend, Cutter(backend).ending(text, kept))[-kept:] == ids_of(backend, text)[-kept:]


def test_a_path_that_depends_on_what_is_before():
    """Whether an even or an odd number of letters is before decides on each token of the rest."""
    backend = with_scores({"▁": -3.0, "ab": -2.0, "ba": -2.0, "a": -9.0, "b": -9.0})
    for text in ("ab" * 5_000, "b" + "ab" * 5_000, "ab" * 5_000 + "a"):
        assert Cutter(backend).ending(text, 20) == text


def test_two_ways_that_are_equally_good():
    """They differ by what is rounded, which depends on the sum of all scores before."""
    scores = {"▁": -3.0, "ab": -8.1, "c": -8.2, "a": -8.2, "bc": -8.1, "b": -30.0, "d": -7.3}
    backend = with_scores(scores)
    text = "d" * 60_001 + "abc" * 40
    assert Cutter(backend).ending(text, 9) == text
    text = text + "d" * 200  # where the kept tokens do not depend on it
    end = Cutter(backend).ending(text, 9)
    assert len(end) < 200
    assert ids_of(backend, end)[-9:] == ids_of(backend, text)[-9:]
    backend = with_scores(scores | {"bc": -8.1 - 1e-9})  # as good but for the rounding of so long a text's sum
    text = "d" * 60_001 + "abc" * 40
    assert Cutter(backend).ending(text, 9) == text
    # So much worse that no rounding makes it the better one.
    backend = with_scores(scores | {"bc": -8.101})
    text = "d" * 60_001 + "abc" * 40
    end = Cutter(backend).ending(text, 9)
    assert len(end) < 100
    assert ids_of(backend, end)[-9:] == ids_of(backend, text)[-9:]


def test_all_places_within_reach_of_a_token_are_tried():
    """A path may come in with a token that reaches over the place of the cut, and go on in another way."""
    scores = {"▁": -3.0, **dict.fromkeys("xyzc", -9.0)}
    found = Paths(models.Unigram([("<unk>", 0.0), *scores.items(), ("xyzc", -4.0)], 0))
    word = "▁" + "xyzc" * 20
    assert all(found.is_settled(word, at, 10) for at in (5, 77))
    assert not found.is_settled(word, 76, 10)  # in the middle of a token
    assert not found.is_settled(word, 1, 10)  # a token from before may end behind it


def test_a_token_that_ends_as_far_behind_the_place_as_it_can():
    """After "abab" alone the path goes on by "cd", after all others by "dc"."""
    scores = {"▁": -3.0, **dict.fromkeys("abcd", -9.0), "cd": -2.0, "dc": -1.9, "bc": -1.0, "abab": -1.0}
    found = Paths(models.Unigram([("?", 0.0), *scores.items()], 0))
    assert not any(found.is_settled("▁bab" + "cd" * 40, at, 10) for at in range(85))


def test_a_settled_place_is_one_whatever_is_before(monkeypatch):
    """Random models of two letters, with each text of up to six letters before."""
    monkeypatch.setattr(paths, "_MEETING", 3)
    draw, found = random.Random(0), 0
    befores = ["".join(b) for n in range(7) for b in itertools.product("ab", repeat=n)]
    for _ in range(150):
        tokens = {"".join(draw.choices("ab", k=draw.choice((2, 3, 4)))) for _ in range(draw.choice((2, 4, 6)))}
        scores = {"▁": -3.0, **{token: -draw.uniform(1, 9) for token in sorted(tokens | {"a", "b"})}}
        model = models.Unigram([("<unk>", 0.0), *scores.items()], 0)
        end = "".join(draw.choices("ab", k=40))
        words = ["▁" + end, *("▁" + before + end for before in befores)]
        rests = [[len(word) - at for at in (0, *ends_of(model, word))] for word in words]
        for at in range(1, len(end) + 1, 3):
            if Paths(model).is_settled("▁" + end, at + 1, 10):
                found += 1
                rest = len(end) - at
                assert all(rest in one for one in rests)
                assert len({tuple(place for place in one if place <= rest) for one in rests}) == 1
    assert found > 100


def ends_of(model: models.Unigram, word: str) -> list[int]:
    return list(itertools.accumulate(len(token.value) for token in model.tokenize(word)))


def test_an_added_token_at_the_place_of_the_cut():
    """One that needs a word's boundary before it is none behind another letter."""
    backend = with_scores(
        {"▁": -3.0, **dict.fromkeys("abcdfox", -5.0)}, [AddedToken("foo", single_word=True), AddedToken("xx")]
    )
    for text in ("abfoo" * 3_000, "abxx" * 3_000, "abxxx" * 3_000):
        for kept in range(3, 9):
            end = Cutter(backend).ending(text, kept)
            assert len(end) < 1_000
            assert ids_of(backend, end)[-kept:] == ids_of(backend, text)[-kept:]


def test_no_added_token_begins_at_the_place_of_the_cut():
    """Behind a letter this one is none, and "o.a" is a token, after which the path goes on by "ba"."""
    scores = {"▁": -3.0, **dict.fromkeys("abfo.", -9.0), "ab": -2.0, "ba": -1.9, "o.a": -1.0}
    backend = with_scores(scores, [AddedToken("foo", single_word=True)])
    text = "ab" * 9_000 + "foo." + "ab" * 38  # from "foo" on, as many characters as are looked at first
    end = Cutter(backend).ending(text, 9)
    assert ids_of(backend, end)[-9:] == ids_of(backend, text)[-9:]


def test_unknown_characters_at_the_place_of_the_cut():
    """They are one token, which goes on to the left."""
    backend = with_scores({"▁": -3.0, **dict.fromkeys("abc", -5.0)})
    for unit in ("aqqqqqqqq", "qqqqqqqqqqqqqqqqqqa", "abcq"):
        text = unit * 3_000
        for kept in range(3, 9):
            end = Cutter(backend).ending(text, kept)
            assert len(end) < 1_000
            assert ids_of(backend, end)[-kept:] == ids_of(backend, text)[-kept:]


def test_a_library_with_other_paths(monkeypatch):
    text = WITHOUT_SPACES["english"]
    assert len(Cutter(BACKENDS["XLM-R"]()).ending(text, 9)) < 1_000
    assert Cutter(BACKENDS["XLM-R"]())._seams._runs.beginning("a" * 60_000, 9, False)
    monkeypatch.setattr(Paths, "ends", lambda self, word: [1, len(word)])
    assert Cutter(BACKENDS["XLM-R"]()).ending(text, 9) == text
    assert Cutter(BACKENDS["XLM-R"]())._seams._runs.beginning("a" * 60_000, 9, False) is None


@pytest.mark.parametrize("name", ["NFKC", "no split", "RoBERTa"])
def test_others_are_left_whole(name):
    """A cut in the middle of a word would mark it as the first one, or BPE would join other pairs."""
    assert cutter(name).ending("中文x" * 5_000, 9) == "中文x" * 5_000


# ---- refused texts ---------------------------------------------------------------------------------------

UNCUT = "\u0301\u0300\u0323" * 4_000


def test_a_text_that_cannot_be_cut_is_refused_if_asked_for():
    backend = BACKENDS["Qwen"]()
    free, bounded = Cutter(backend), Cutter(backend, is_bounded=True)
    for cut in (free.text, free.ending):
        assert cut(UNCUT, 9) == UNCUT
    for cut in (bounded.text, bounded.ending, lambda text, n: bounded.texts(["a", text], n)):
        with pytest.raises(UncutError, match=r"a text has 12,000 characters .* at most 5,120 here"):
            cut(UNCUT, 9)
        assert cut(UNCUT, 23)
    assert bounded.text(UNCUT[:5_120], 9) == UNCUT[:5_120]
    assert len(bounded.text("a b " * 9_000, 9)) < 200
    assert Cutter(bert(), is_bounded=True).text("b" * 12_000, 9) == "b" * 12_000  # BERT's own takes any text
    for pair in ((UNCUT, "a"), ("a", UNCUT)):
        assert free.pair(*pair, 9, "longest_first") == pair
        for strategy in ("longest_first", f"only_{'second' if pair[0] == 'a' else 'first'}"):
            with pytest.raises(UncutError, match=r"12,000 characters"):
                bounded.pair(*pair, 9, strategy)


def test_texts_of_a_tokenizer_that_cannot_stop_are_refused():
    backend = made("bpe", N.NFC(), P.Split(" ", "merged_with_previous"))
    bounded = Cutter(backend, is_bounded=True)
    assert bounded.texts(["a b " * 1_280], 9) == ["a b " * 1_280]
    with pytest.raises(UncutError, match="5,121 characters"):
        bounded.texts(["a b " * 1_280 + "c"], 9)
    with pytest.raises(UncutError):
        bounded.texts(["a", "a b " * 1_281], 9)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_server_refuses_them(side):
    texts = Texts(Tokenizer(BACKENDS["Qwen"]()), 23, of_pairs=True)
    for call in (
        lambda text: texts.ids([text], True, side),
        lambda text: texts.pairs([text], ["a"], True, side),
        lambda text: texts.pairs(["a"], [text], True, side),
    ):
        assert call(UNCUT[:9_000])
        with pytest.raises(ServiceError, match="12,000 characters") as error:
            call(UNCUT)
        assert error.value.kind == "too_large"
    assert texts.located([UNCUT[:9_000]], True, True)
    with pytest.raises(ServiceError, match="12,000 characters"):
        texts.located([UNCUT], True, True)


def bert() -> tokenizers.Tokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##b"]
    backend = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = N.BertNormalizer(), P.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return backend


@pytest.mark.parametrize("side", ["right", "left"])
def test_which_text_of_a_pair_is_longer(side):
    """Of the text with more characters no more is counted than has to be."""
    for backend in (bert(), BACKENDS["XLM-R"]()):
        cut = Cutter(backend)
        direction = backend.__class__.from_str(backend.to_str())
        direction.enable_truncation(9 + direction.num_special_tokens_to_add(True), direction=side)
        texts = ["a b " * 90, "a b " * 91, "b" * 400, "b " * 180, "b  " * 180, "a b " * 300, "\u0301" * 300 + "a " * 30]
        for first in texts:
            for second in texts:
                found = direction.encode(*cut.pair(first, second, 9, "longest_first", side == "left"))
                assert found.ids == direction.encode(first, second).ids, (first[:9], second[:9])
