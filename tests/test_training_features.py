"""Windows: every word and token of a context belongs to exactly one window; answers come back as the exact text."""

import random
from itertools import pairwise

import pytest

from fastbert import Tokenizer
from fastbert.training.features import (
    IGNORED,
    NO_ANSWER,
    _spans,
    gold_tokens,
    question_features,
    text_features,
    word_features,
)
from fastbert.training.files import Answer, Question, Sentence, read_questions

pytestmark = pytest.mark.once

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij", *(f"##{c}" for c in "abcdefghij")]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_words(PIECES, lowercase=True)


def test_texts_that_are_cut_are_counted(tokenizer):
    features = text_features(tokenizer, ["a b c", "a b c d"], None, [0, 1], max_length=5)
    assert [len(w.input_ids) for w in features.windows] == [5, 5]
    assert [w.target for w in features.windows] == [0, 1]
    assert features.notes == {"examples cut at 5 tokens": 1}
    pair = text_features(tokenizer, ["a"], ["b c"], None, max_length=9).windows[0]
    assert pair.token_type_ids == [0, 0, 0, 1, 1, 1]
    # also if a long text is shortened before it is tokenised
    assert text_features(tokenizer, ["a " * 500], None, None, max_length=5).notes == {"examples cut at 5 tokens": 1}


# ---- words ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_length", "stride"), [(6, 0), (6, 3), (12, 4), (12, 9), (64, 16)])
def test_every_word_belongs_to_one_window_where_its_context_is_longest(tokenizer, max_length, stride):
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(1, 5))) for _ in range(40)]
    features = word_features(tokenizer, [Sentence("s", words, ["O"] * 40)], {"O": 0}, max_length, stride)
    assert max(len(w.input_ids) for w in features.windows) <= max_length
    seen = {}
    for number, window in enumerate(features.windows):
        assert window.input_ids[0] == tokenizer.cls_token_id
        assert window.input_ids[-1] == tokenizer.sep_token_id
        # labels at the first pieces of its own words, and nowhere else
        assert [place for place, label in enumerate(window.target) if label != IGNORED] == [p for _, p in window.words]
        for word, place in window.words:
            assert tokenizer.id_to_token(window.input_ids[place]) == words[word][0]
            assert word not in seen
            seen[word] = number
    assert sorted(seen) == list(range(40))
    assert sorted(seen.values()) == [seen[word] for word in range(40)], "a window's own words are neighbours"


def test_words_in_the_middle_of_a_window_have_context(tokenizer):
    """With windows of 8 words that share 4, every word within the sentence has at least 2 words on either side."""
    words = ["a"] * 30
    features = word_features(tokenizer, [Sentence("s", words, None)], None, max_length=10, stride=4)
    for number, window in enumerate(features.windows):
        for word, place in window.words:
            before, after = place - 1, len(window.input_ids) - 2 - place
            assert number == 0 or before >= 2, word
            assert number == len(features.windows) - 1 or after >= 1, word
    assert features.notes["sentences in several windows of 10 tokens"] == 1


def test_of_two_windows_with_equal_context_a_word_belongs_to_the_earlier(tokenizer):
    """The windows have words 0 to 7 and 5 to 12: in either, word 6 has one word on its shorter side."""
    windows = word_features(tokenizer, [Sentence("s", ["a"] * 13, None)], None, max_length=10, stride=3).windows
    assert [[word for word, _ in w.words] for w in windows] == [[0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]]


def test_every_window_ends_later_than_the_one_before():
    """However long the next word is. Neighbouring windows share at most `stride` tokens."""
    draw = random.Random(3)
    for _ in range(200):
        room = draw.randint(2, 9)
        lengths, stride = draw.choices(range(1, room + 1), k=draw.randint(1, 15)), draw.randrange(room)
        spans = _spans(lengths, room, stride)
        assert spans[0][0] == 0
        assert spans[-1][1] == len(lengths)
        assert all(sum(lengths[first:end]) <= room for first, end in spans)
        for (first, end), (next_first, next_end) in pairwise(spans):
            assert first < next_first <= end < next_end
            assert sum(lengths[next_first:end]) <= stride


def test_words_without_tokens_and_words_that_are_too_long(tokenizer):
    features = word_features(
        tokenizer, [Sentence("s", ["\u200d", "a" * 20, "b"], ["O", "B-x", "O"])], {"O": 0, "B-x": 1}, 6, 1
    )
    owned = {word: w.input_ids[place] for w in features.windows for word, place in w.words}
    assert owned == {word: tokenizer.token_to_id(piece) for word, piece in enumerate(["[UNK]", "a", "b"])}
    assert features.notes["words cut"] == 1
    assert max(len(w.input_ids) for w in features.windows) == 6


# ---- questions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [10, 11])
def test_answers_come_back_as_the_exact_text(tokenizer, stride):
    """Every window with the whole answer points to it, at any place of a long context; other windows point to [CLS]."""
    context = " ".join("abcdefghij"[i % 10] * (1 + i % 3) for i in range(60))
    starts = [i for i, c in enumerate(context) if c != " " and (i == 0 or context[i - 1] == " ")]
    for first, start in enumerate(starts[:-1]):
        end = context.index(" ", starts[min(first + 2, 58)])
        question = Question("q", "a b", context, [Answer(context[start:end], start)])
        windows = question_features(
            tokenizer, [question], max_length=30, stride=stride, training=True, longest=30
        ).windows
        held = 0
        for window in windows:
            inside = [o for o in window.offsets if o is not None]
            if inside[0][0] <= start and end <= inside[-1][1]:
                a, b = window.target
                assert context[window.offsets[a][0] : window.offsets[b][1]] == context[start:end]
                held += 1
            else:
                assert window.target == NO_ANSWER
        assert held


def test_every_token_of_a_context_belongs_to_one_window(tokenizer):
    context = "a bc def " * 30
    windows = question_features(tokenizer, [Question("q", "a", context)], 24, 8, training=False, longest=30).windows
    owned = [window.offsets[place] for window in windows for place in sorted(window.owned)]
    assert owned == tokenizer([context], truncation=None, add_special_tokens=False).offsets[0]
    assert all(len(w.input_ids) == len(w.token_type_ids) == len(w.offsets) <= 24 for w in windows)
    assert windows[0].token_type_ids[:4] == [0, 0, 0, 1]


def test_a_context_is_read_once_however_many_windows_it_has(tokenizer, monkeypatch):
    """Each look at the ids or offsets of an encoding makes a list of all its tokens: windows of a context of a megabyte
    took minutes."""

    class Counted:
        def __init__(self, encoding):
            self.encoding, self.looks = encoding, 0

        def __getattr__(self, name):
            self.looks += 1
            return getattr(self.encoding, name)

    made = []

    def counting(self, texts, *pairs, **options):
        encoded = call(self, texts, *pairs, **options)
        encoded.encodings[:] = [Counted(encoding) for encoding in encoded.encodings]
        made.extend(encoded.encodings)
        return encoded

    call = Tokenizer.__call__
    monkeypatch.setattr(Tokenizer, "__call__", counting)
    looks = []
    for context in ("a bc def " * 10, "a bc def " * 100):
        made.clear()
        windows = question_features(tokenizer, [Question("q", "a", context)], 24, 8, training=False, longest=30).windows
        assert len(windows) > 3
        looks.append(made[0].looks)
    assert looks[0] == looks[1]


def test_little_is_tokenised_of_questions_and_words_of_megabytes(tokenizer, monkeypatch):
    call, given = Tokenizer.__call__, []

    def recording(self, texts, *pairs, **options):
        given.extend(texts)
        return call(self, texts, *pairs, **options)

    monkeypatch.setattr(Tokenizer, "__call__", recording)
    for question in ("a bc def " * 200_000, "a" * 2_000_000):
        found = question_features(tokenizer, [Question("q", question, "a bc")], 24, 8, training=False, longest=30)
        short = question_features(tokenizer, [Question("q", question[:500], "a bc")], 24, 8, training=False, longest=30)
        assert (found.windows[0].input_ids, found.notes) == (short.windows[0].input_ids, short.notes)
    for word in ("a.b," * 500_000, "a" * 2_000_000):
        found = word_features(tokenizer, [Sentence("", [word], None)], None, 24, 8)
        short = word_features(tokenizer, [Sentence("", [word[:500]], None)], None, 24, 8)
        assert (found.windows[0].input_ids, found.notes) == (short.windows[0].input_ids, short.notes)
    assert max(map(len, given)) < 2_000


@pytest.mark.parametrize(
    ("text", "start", "tokens"),
    [("a", 0, (0, 0)), ("c", 5, (2, 2)), ("bb c", 2, (1, 2)), (" bb", 1, (1, 1)), ("b", 3, (1, 1)), (" ", 1, None)],
)
def test_gold_tokens_share_a_character_with_the_answer(text, start, tokens):
    """The context is "a bb c", its tokens are the words. A gold answer may begin within a word, or with a space."""
    found = gold_tokens(Question("q", "", "a bb c", [Answer(text, start)]), [(0, 1), (2, 4), (5, 6)])
    assert found == ([] if tokens is None else [tokens])


def test_questions_that_cannot_be_learnt_are_left_out_and_counted(tokenizer):
    questions = [
        Question("lost", "a", "b c", [Answer("x", None)]),
        Question("none", "a", "b c", []),
        Question("long", "a", "b " * 40, [Answer("b " * 30, 0)]),
        Question("wordy", "a " * 99, "b", [Answer("b", 0)]),
    ]
    features = question_features(tokenizer, questions, 24, 8, training=True, longest=30)
    assert {w.example for w in features.windows} == {1, 2, 3}
    assert features.notes == {
        "contexts in several windows of 24 tokens": 1,
        "questions cut at 12 tokens": 1,
        "questions left out, whose answers are not in their context": 1,
        "answers that no window holds whole": 1,
    }
    # For prediction all questions stay. Answers that no window holds, or that are too long, cannot be predicted.
    for longest, beyond in ((30, 1), (1, 2)):
        whole = [*questions, Question("two", "a", "b c", [Answer("b c", 0)])]
        to_answer = question_features(tokenizer, whole, 24, 8, training=False, longest=longest)
        assert {w.example for w in to_answer.windows} == {0, 1, 2, 3, 4}
        assert to_answer.notes[f"questions without a gold answer of up to {longest} tokens within a window"] == beyond


def test_windows_must_leave_room(tokenizer):
    with pytest.raises(ValueError, match="windows with room for 8 tokens cannot overlap by 8"):
        word_features(tokenizer, [Sentence("s", ["a"], None)], None, max_length=10, stride=8)


def test_real_answers_come_back(shared):
    """All of 1,002 Chinese answers are found, except those that begin or end within a Latin word or with white
    space."""
    questions = read_questions(shared / "data" / "cmrc2018" / "cmrc2018_trial.json").questions
    characters = sorted({c for q in questions for c in q.context + q.question if not c.isspace()})
    tokenizer = Tokenizer.from_words([*PIECES[:5], *characters, *(f"##{c}" for c in characters)], lowercase=False)
    features = question_features(tokenizer, questions, 384, 128, training=True, longest=30)
    wrong = set()
    for window in features.windows:
        if window.target != NO_ANSWER:
            (start, _), (_, end) = (window.offsets[place] for place in window.target)
            question = questions[window.example]
            if question.context[start:end] != question.answers[0].text:
                wrong.add(question.answers[0].text)
    assert all(text != text.strip() for text in wrong)
    assert len(wrong) <= 3
