"""A text with a long run of few characters is cut, and this changes no token that is kept."""

import functools
import itertools
import random

import pytest
import tokenizers
from tokenizers import models

from cut_tokenizers import BACKENDS, MADE_UP, SENTENCEPIECE, XLM_R, N, P, made
from fastbert.text import paths, runs
from fastbert.text.cutting import Cutter
from fastbert.text.paths import Paths

pytestmark = pytest.mark.once

UNITS = [
    "a",
    "aa",
    ".",
    "xy",
    "abc",
    "-=",
    "'",
    "``",
    "0",
    "é",
    "e\u0301",
    "ﬁ",
    "㈱",
    "\u0301",
    "中",
    "ﷺ",
    "𝄞",
    "か\u3099",
    "\u200d",
]
HEADS = ["", "x", "a test ", "aaa.xy ", "<mask>", "  ", "foo"]
TAILS = ["", "x", " a test", "\u0301 and", "y" * 40, "<mask> .", "a" * 700, "x" + "b" * 700, "foo"]


@functools.cache
def cutter(name: str) -> Cutter:
    return Cutter(BACKENDS[name]())


def ids_of(name: str, text: str) -> list[int]:
    return cutter(name)._backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", BACKENDS)
def test_a_run_is_cut_without_a_change_of_tokens(name, monkeypatch):
    monkeypatch.setattr(runs, "_LEAST", 512)
    draw = random.Random(name)
    cases = list(itertools.product(UNITS, HEADS, TAILS))
    found = 0
    for unit, head, tail in draw.sample(cases, 60):
        text = head + unit * ((6_500 + draw.randrange(100)) // len(unit)) + tail
        kept, shorten = draw.choice((3, 10, 30)), draw.random() < 0.5
        part = cutter(name)._seams._runs.beginning(text, kept + 1, shorten)
        found += part is not None
        for cut in (part, cutter(name).text(text, kept, shorten)):
            if cut is not None:
                assert ids_of(name, cut)[: kept + 1] == ids_of(name, text)[: kept + 1], (unit, head, tail)
                assert shorten or text.startswith(cut)
    assert found > 5


@pytest.mark.parametrize("unit", [".", "a", "xy", "-=", "\u0301"])
@pytest.mark.parametrize("name", ["RoBERTa", "Qwen", "XLM-R", "DeBERTa", "ALBERT", "NFKC"])
def test_little_of_a_long_run_is_kept(name, unit):
    kept = 511
    for more in range(3):
        text = unit * (200_000 // len(unit) + more)
        cut = cutter(name).text(text, kept, shorten=True)
        assert len(cut) < 70_000
        if more == 2:
            assert ids_of(name, cut)[: kept + 1] == ids_of(name, text)[: kept + 1]


def test_two_runs_with_a_place_between_that_all_paths_go_through():
    text = "." * 300_000 + "中" * 300_000
    cut = cutter("XLM-R").text(text, 511)
    assert len(cut) < 10_000
    assert ids_of("XLM-R", cut)[:512] == ids_of("XLM-R", text)[:512]


def equally_good() -> tokenizers.Tokenizer:
    """The rest of a run of x or y, divided by three, can stand anywhere in it with the same sum."""
    scores = {"▁": -3.0, "x": -8.5, "xx": -12.75, "xxx": -12.625, "y": -8.5, "yy": -12.75, "yyy": -12.625, "xy": -17.0}
    backend = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), *scores.items()], 0))
    backend.pre_tokenizer = XLM_R
    return backend


def test_a_run_before_another_word_and_before_more_than_is_looked_at():
    backend = equally_good()
    cutter = Cutter(backend)
    for length in range(50_000, 50_003):
        text = "x" * length + " yy" * 400
        cut = cutter.text(text, 100)
        assert len(cut) < 10_000
        assert backend.encode(cut).ids[:101] == backend.encode(text).ids[:101]
        for behind in range(2_000, 2_003):
            text = "x" * length + "y" * behind
            assert backend.encode(cutter.text(text, 100)).ids[:101] == backend.encode(text).ids[:101]


def test_a_mark_behind_a_run_changes_its_last_letter():
    scores = {"▁": -3.0, "a": -8.5, "aa": -12.75, "aaa": -12.625}
    backend = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), *scores.items()], 0))
    backend.normalizer, backend.pre_tokenizer = N.NFC(), XLM_R
    for length in range(50_000, 50_003):
        text = "a" * length + "\u0301"
        assert backend.encode(Cutter(backend).text(text, 100)).ids[:101] == backend.encode(text).ids[:101]


def test_a_repetition_may_begin_at_any_character():
    """ALBERT replaces each two apostrophes."""
    for head in ("", "x"):
        text = head + "'" * 50_000
        cut = cutter("ALBERT")._seams._runs.beginning(text, 512, False)
        assert ids_of("ALBERT", cut)[:512] == ids_of("ALBERT", text)[:512]


def test_a_path_through_the_middle_of_a_character():
    """ﬁ becomes two letters, and the tokens are "if". Where only ids are asked for, the last ﬁ is written as them."""
    backend = tokenizers.Tokenizer(
        models.Unigram([("<unk>", 0.0), ("▁f", -1.0), ("if", -2.0), ("f", -9.0), ("i", -9.0)], 0)
    )
    backend.normalizer, backend.pre_tokenizer = N.NFKC(), P.Metaspace()
    text = "ﬁ" * 50_000 + "x"
    cut = Cutter(backend).text(text, 511, shorten=True)
    assert len(cut) < 10_000
    assert backend.encode(cut).ids[:512] == backend.encode(text).ids[:512]
    assert Cutter(backend).text(text, 511) == text


def test_signs_that_disappear_or_are_one_token():
    for name, unit in (("ALBERT", "\u0301"), ("XLM-R", "\U00013000")):
        assert len(cutter(name).text(unit * 100_000, 511, shorten=True)) < 9_000
        assert cutter(name).text(unit * 100_000, 511) == unit * 100_000
    # What is behind a run of unknown characters in Unigram would be rounded in another way.
    text = "\U00013000" * 100_000 + "aab"
    assert cutter("XLM-R").text(text, 511, shorten=True) == text


def test_the_end_of_a_run_in_bpe_is_far_behind_the_wanted_tokens():
    """A run of 8 m + 7 letters ends with tokens of 4, 2 and 1, and of 8 m + 6 with 4 and 2."""
    doubled = [letter * 2**n for letter in "ac" for n in range(5 if letter == "c" else 4)]
    merges = [(piece, piece) for piece in doubled if piece + piece in doubled]
    model = models.BPE({piece: i for i, piece in enumerate(doubled)}, merges)
    backend = tokenizers.Tokenizer(model)
    cutter = Cutter(backend)
    for wanted, head in itertools.product(range(20, 36), ("c" * 16, "c" * 33, "c" * 50)):
        text = head + "a" * 8_000
        cut = cutter._seams._runs.beginning(text, wanted, False)
        assert model.tokenize(cut)[wanted - 1].id == model.tokenize(text)[wanted - 1].id


def test_a_token_longer_than_the_runs_that_are_compared():
    """A sign that is no token by itself, but two hundred of it are."""
    backend = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -3.0), ("x" * 200, -5.0)], 0))
    backend.pre_tokenizer = XLM_R
    text = "x" * 50_000
    cut = Cutter(backend).text(text, 10, shorten=True)
    assert backend.encode(cut).ids[:11] == backend.encode(text).ids[:11]


def test_a_run_of_an_added_token_is_no_run_of_a_word():
    backend = made("unigram", SENTENCEPIECE, XLM_R, MADE_UP)
    text = "ab" * 20_000
    assert Cutter(backend)._seams._runs.beginning(text, 11, False) is None
    cut = Cutter(backend).text(text, 10)
    assert (
        backend.encode(cut, add_special_tokens=False).ids[:11]
        == backend.encode(text, add_special_tokens=False).ids[:11]
    )


def test_lone_surrogates_behind_the_kept_part():
    for behind in ("\ud800", "b\ud800" + "c" * 1_000):
        for unit in "ax":
            cut = cutter("XLM-R").text(unit * 50_000 + behind, 100)
            assert len(cut) < 10_000
    assert cutter("XLM-R")._seams._runs.beginning("x" * 900 + "\ud800" + "x" * 50_000, 101, False) is None


def test_a_library_with_other_paths_is_noticed(monkeypatch):
    monkeypatch.setattr(Paths, "ends", lambda self, word: list(range(1, len(word) + 1)))
    seams = Cutter(BACKENDS["XLM-R"]())._seams
    assert seams._runs.beginning("a" * 50_000, 101, False) is None


def test_a_model_without_an_unknown_token():
    backend = tokenizers.Tokenizer(models.Unigram([("▁", -3.0), ("x", -3.0), ("xx", -5.5)], None))
    backend.pre_tokenizer = P.Metaspace()
    assert Cutter(backend)._seams._runs.beginning("x" * 50_000, 101, False) is None


# ---- paths -----------------------------------------------------------------------------------------------


def vocabulary(draw: random.Random, letters: str) -> list[tuple[str, float]]:
    """Scores as they are in files, with few digits, equally good ones, and user-defined ones, which are 0."""
    kind = draw.choice(("drawn", "nearly equal", "equal", "few digits", "zeros"))
    pieces = {"<unk>": 0.0} | {letter: -3.7 if kind == "equal" else -draw.uniform(2, 12) for letter in letters}
    if draw.random() < 0.2:
        del pieces[draw.choice(letters)]
    for _ in range(draw.randrange(8)):
        piece = "".join(draw.choices(letters, k=draw.randrange(2, 9)))
        scores = sum(pieces.get(letter, -9.0) for letter in piece)
        pieces[piece] = {
            "drawn": -draw.uniform(2, 20), "nearly equal": scores * draw.uniform(0.9, 1.0001),
            "equal": -3.7 * len(piece),
            "few digits": -draw.randrange(10, 200) / 10, "zeros": draw.choice((0.0, -1.0)),
        }[kind]  # fmt: skip
    return list(pieces.items())


def ends_of_tokens(model: models.Unigram, word: str) -> list[int]:
    """Of a word in ASCII; unknown characters are one token each."""
    ends = []
    for token in model.tokenize(word):
        start, end = token.offsets
        ends.extend(range(start + 1, end + 1) if token.id == 0 else [end])
    return ends


@pytest.mark.parametrize("seed", range(40))
def test_the_place_on_the_path_of_a_long_word(seed):
    draw = random.Random(seed)
    letters = draw.choice(("a", "ab", "ab"))
    model = models.Unigram(vocabulary(draw, letters), 0)
    unit = "".join(draw.choices(letters, k=draw.choice((1, 1, 2, 3))))
    head = "".join(draw.choices(letters + "c", k=draw.randrange(20)))
    found = 0
    for after in (draw.randrange(40, 300), draw.randrange(1_000, 9_000), draw.randrange(20_000, 90_000)):
        before = draw.randrange(20, 60)
        tail, rest = ("".join(draw.choices(letters + "c", k=draw.choice((0, 3, 20, 40)))) for _ in range(2))
        is_whole = draw.random() < 0.6
        word = head + unit * (before + after) + tail
        back = Paths(model).through(head, unit, before, after, tail, is_whole)
        end = len(head) + before * len(unit)
        if back is not None:
            found += 1
            ends = ends_of_tokens(model, word if is_whole else word + rest)
            assert end - back == max(at for at in ends if at <= end)
        assert Paths(model).ends(word[:3_000]) == ends_of_tokens(model, word[:3_000])
    assert found


def test_ten_million_characters_are_passed_at_once(monkeypatch):
    """The tokens are equally good at any place, so that rounding decides, and with it the number of characters."""
    model = models.Unigram([("<unk>", 0.0), ("▁", -3.1), ("x", -8.66032), ("xx", -12.80779), ("xxx", -12.65925)], 0)
    passed = []
    monkeypatch.setattr(Paths, "_pass", lambda self, *args, old=Paths._pass: passed.append(1) or old(self, *args))
    found = {more: Paths(model).through("▁", "x", 4_096, 10_000_000 + more, "", True) for more in range(3)}
    assert len(set(found.values())) > 1
    assert len(passed) < 3 * 20_000


def test_half_of_the_smallest_part_is_rounded_to_even():
    """A score that is half of what sums can hold: whether it is rounded up depends on the sum before."""
    places: paths.Front = [paths.Place(-(2.0**30), 1, None)]
    model = models.Unigram([("<unk>", 0.0), ("x", -0.3), ("xx", -0.6)], 0)
    counted = Paths(model)
    smallest = 2.0**-22  # of numbers from 2**30 on
    counted._scores = {"x": -(1.0 + smallest / 2)}
    assert counted._times(places, -(1.0 + smallest), -1.1e9, "x") == 0
    assert counted._times(places, -2.0, -1.1e9, "x") > 0
    counted._scores = {"x": 1.0}  # sums would come nearer to 0, and get another exponent
    counted._found.clear()
    assert counted._times(places, -2.0, -1.1e9, "x") == 0
