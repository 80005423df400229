"""Examples and masks from a corpus: their shares, wrong pairs, and that only (seed, epoch, example) decides."""

import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from fastbert import Tokenizer
from fastbert.pretraining.chinese import joins_of_words, segmenter_of
from fastbert.pretraining.corpus import build_corpus
from fastbert.pretraining.counters import Stream, below, philox
from fastbert.pretraining.documents import (
    NEXT_SENTENCE,
    SENTENCE_ORDER,
    check_pairs,
    examples_of,
    longest_segment,
    tokens_of,
)
from fastbert.pretraining.masking import GOOGLE, IGNORED, Masking
from fastbert.text.files import InputError

pytestmark = pytest.mark.once

UNUSED = [f"[unused{i}]" for i in range(40)]
PIECES = ["[PAD]", *UNUSED, "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *"abcdefghij", *(f"##{c}" for c in "abcdefghij")]
LENGTH = 64


def tokenizer():
    return Tokenizer.from_words(PIECES, lowercase=True)


def text_of(documents: int, lines: int = 12) -> str:
    """Documents of lines with one or two sentences. The words of a document begin with the same letter."""
    draw = random.Random(0)
    made = []
    for number in range(documents):
        first = "abcdefghij"[number % 10]
        sentences = [
            " ".join(first + "".join(draw.choices("abcdefghij", k=draw.randint(0, 3))) for _ in range(size))
            for size in draw.choices(range(1, 10), k=lines * 2)
        ]  # fmt: skip
        made.append("\n".join(f"{a}. {b}." for a, b in zip(sentences[::2], sentences[1::2], strict=True)))
    return "\n\n".join(made)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text(text_of(120))
    return build_corpus(folder / "made", [folder / "a.txt"], tokenizer(), longest_segment(LENGTH))


def document_of(corpus, place):
    """The document in which a token is."""
    segment = np.searchsorted(corpus.segments, place, side="right") - 1
    return int(np.searchsorted(corpus.documents, segment, side="right") - 1)


# ---- random numbers ------------------------------------------------------------------------------------------


def test_philox_gives_the_numbers_of_its_authors():
    """The known answers for philox4x32-10 in Random123's kat_vectors."""
    ones = 0xFFFFFFFF
    for counter, key, expected in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):  # fmt: skip
        found = philox(tuple(np.full(3, c, np.uint64) for c in counter), key)
        assert [set(word.tolist()) for word in found] == [{value} for value in expected]


def test_numbers_below_a_bound_are_equally_likely():
    places = np.arange(40_000, dtype=np.uint64)
    word = philox((places, *[np.uint64(0)] * 3), (1, 0))[0]
    counts = np.bincount(below(word, 7).astype(np.int64), minlength=7)
    assert len(counts) == 7
    assert np.abs(counts / 40_000 - 1 / 7).max() < 0.01
    stream, again, other = Stream(1, 2, 3), Stream(1, 2, 3), Stream(1, 2, 4)
    drawn = [stream.below(5) for _ in range(9000)]
    assert drawn == [again.below(5) for _ in range(9000)] != [other.below(5) for _ in range(9000)]
    assert max(abs(count / 9000 - 0.2) for count in Counter(drawn).values()) < 0.02
    assert sum(stream.heads(100) for _ in range(200)) / 20_000 == pytest.approx(0.5, abs=0.02)
    assert stream.heads(0) == 0


# ---- a corpus ------------------------------------------------------------------------------------------------


def test_segments_are_sentences_and_parts_of_long_ones(tmp_path):
    (tmp_path / "a.txt").write_text("a b. c\nd\n\ne e e e e e e.. f.\n\n \n\ng\n")
    made = build_corpus(tmp_path / "made", [tmp_path / "a.txt"], tokenizer(), 5)
    words = [[made_of(made, s) for s in range(a, b)] for a, b in pairwise(made.documents)]
    assert words == [["a b .", "c", "d"], ["e e e e e", "e e . .", "f ."], ["g"]]
    assert made.facts["lines"] == 4
    assert made.joins.tolist() == [0] * len(made.ids)


def made_of(corpus, segment):
    ids = corpus.ids[corpus.segments[segment] : corpus.segments[segment + 1]]
    return " ".join(PIECES[index] for index in ids)


def test_a_corpus_is_made_once_and_again_where_its_files_changed(tmp_path):
    file, out = tmp_path / "a.txt", tmp_path / "made"
    file.write_text(text_of(3))
    first = build_corpus(out, [file], tokenizer(), 30)
    made = (out / "ids.bin").stat().st_ino
    assert build_corpus(out, [file], tokenizer(), 30).digest == first.digest
    assert (out / "ids.bin").stat().st_ino == made, "the corpus on disk is used"
    file.write_text(text_of(4))
    assert build_corpus(out, [file], tokenizer(), 30).digest != first.digest
    other = Tokenizer.from_words([*PIECES, "bad"], lowercase=True)
    assert build_corpus(out, [file], other, 30).facts["vocabulary"] == len(PIECES) + 1


def test_the_entropy_of_a_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("a a b c\n")
    made = build_corpus(tmp_path / "made", [tmp_path / "a.txt"], tokenizer(), 30)
    assert made.unigram_entropy() == pytest.approx(1.5 * np.log(2))


def test_unusable_text_is_refused(tmp_path):
    for content, message in (("", "no text"), ("xyz xyz\n", "the tokenizer knows no word of .*another language")):
        (tmp_path / "a.txt").write_text(content)
        with pytest.raises(InputError, match=message):
            build_corpus(tmp_path / "made", [tmp_path / "a.txt"], tokenizer(), 30)
    (tmp_path / "a.txt").write_text("a b. c d.\ne f.\n")
    one = build_corpus(tmp_path / "made", [tmp_path / "a.txt"], tokenizer(), 30)
    with pytest.raises(InputError, match=r"a.txt is one document, and the next-sentence objective .* blank lines"):
        check_pairs(one, NEXT_SENTENCE, "a.txt")
    check_pairs(one, SENTENCE_ORDER, "a.txt")
    (tmp_path / "a.txt").write_text("a b\n\nc d\n\ne f.\n")
    single = build_corpus(tmp_path / "made", [tmp_path / "a.txt"], tokenizer(), 30)
    for pairs in (NEXT_SENTENCE, SENTENCE_ORDER):
        with pytest.raises(InputError, match="no document has two sentences"):
            check_pairs(single, pairs, "a.txt")


# ---- examples ------------------------------------------------------------------------------------------------


def test_masked_words_use_every_token_once_an_epoch(corpus):
    epochs = [examples_of(corpus, None, LENGTH, 7, epoch) for epoch in range(2)]
    for made in epochs:
        places = np.concatenate([np.arange(a, b) for a, b in made.first])
        assert np.array_equal(places, np.arange(len(corpus.ids)))
        assert made.lengths.max() <= LENGTH
        assert {document_of(corpus, a) == document_of(corpus, b - 1) for a, b in made.first} == {True}
        full = made.lengths > LENGTH - longest_segment(LENGTH)
        assert 0.6 < full.mean() < 0.95, "most are packed to the limit, and about one in ten is short"
    assert not np.array_equal(epochs[0].first[:50], epochs[1].first[:50])
    again = examples_of(corpus, None, LENGTH, 7, 1)
    assert np.array_equal(again.first, epochs[1].first)


def test_half_of_the_next_sentences_come_from_another_document(corpus):
    made = [examples_of(corpus, NEXT_SENTENCE, LENGTH, seed, 0) for seed in range(4)]
    labels = np.concatenate([examples.labels for examples in made])
    assert labels.mean() == pytest.approx(0.5, abs=4 * 0.5 / len(labels) ** 0.5)
    assert set(labels.tolist()) == {0, 1}
    lengths = np.concatenate([examples.lengths for examples in made])
    assert lengths.max() == LENGTH
    assert lengths.min() >= 5
    for examples in made[:2]:
        for (a, b), (c, d), label in zip(examples.first, examples.second, examples.labels, strict=True):
            assert a < b
            assert c < d
            ours, theirs = document_of(corpus, a), document_of(corpus, c)
            if label:
                assert ours != theirs
            else:
                # at most what was cut off is between them
                assert ours == theirs
                assert b <= c < b + LENGTH
    # A model must not tell them apart by their lengths.
    means = [lengths[labels == label].mean() for label in (0, 1)]
    assert abs(means[0] - means[1]) < 4
    full = [(lengths[labels == label] == LENGTH).mean() for label in (0, 1)]
    assert abs(full[0] - full[1]) < 0.12


def test_the_second_part_alone_does_not_tell_the_label(tmp_path):
    """Documents for wrong pairs were drawn without regard to their length, then any of their sentences. Short documents
    and short sentences were then more frequent in wrong pairs. With articles and the shorter chapters of a novel, a
    model that never compared the parts classified 58% of the pairs correctly."""
    draw = random.Random(1)

    def sentence(letters: str, words: int) -> str:
        return " ".join(draw.choices(letters, k=words)) + "."

    long = ["\n".join(sentence("abcde", 2 if line < 160 else 12) for line in range(240)) for _ in range(12)]
    short = ["\n".join(sentence("fghij", 6) for _ in range(30)) for _ in range(40)]
    (tmp_path / "a.txt").write_text("\n\n".join([*long, *short]))
    made = build_corpus(tmp_path / "made", [tmp_path / "a.txt"], tokenizer(), longest_segment(LENGTH))
    drawn = [examples_of(made, NEXT_SENTENCE, LENGTH, seed, 0) for seed in range(12)]
    labels = np.concatenate([examples.labels for examples in drawn])
    seconds = np.concatenate([examples.second for examples in drawn])
    in_short = seconds[:, 0] >= made.segments[made.documents[len(long)]]
    shares = [in_short[labels == label].mean() for label in (0, 1)]
    assert shares[0] == pytest.approx(shares[1], abs=0.05), "0.34 and 0.77 if documents are equally likely"
    ends = np.searchsorted(made.segments, seconds[~in_short], side="left")
    sentences = [np.diff(ends)[labels[~in_short] == label].mean() for label in (0, 1)]
    assert sentences[0] == pytest.approx(sentences[1], rel=0.15), "4.4 and 7.2 if sentences are"


def test_pairs_that_are_too_long_lose_tokens_at_both_ends(corpus):
    examples = examples_of(corpus, NEXT_SENTENCE, LENGTH, 0, 0)
    starts = set(corpus.segments.tolist())
    in_front, behind = (
        np.mean([place not in starts for part in (examples.first, examples.second) for place in part[:, side]])
        for side in (0, 1)
    )
    assert 0.1 < in_front < 0.9
    assert in_front == pytest.approx(behind, abs=0.06)


def test_sentence_order_swaps_half_of_the_neighbours(corpus):
    examples = examples_of(corpus, SENTENCE_ORDER, LENGTH, 0, 0)
    assert examples.labels.mean() == pytest.approx(0.5, abs=4 * 0.5 / len(examples) ** 0.5)
    assert examples.lengths.max() <= LENGTH
    for (a, b), (c, d), label in zip(examples.first, examples.second, examples.labels, strict=True):
        assert document_of(corpus, a) == document_of(corpus, c)
        gap = a - d if label else c - b
        assert 0 <= gap < LENGTH


def test_tokens_of_examples(corpus):
    examples = examples_of(corpus, NEXT_SENTENCE, LENGTH, 0, 0)
    ids, joins, types = (of_row[0] for of_row in tokens_of(corpus, examples, [3], 42, 43))
    (a, b), (c, d) = examples.first[3], examples.second[3]
    assert ids.tolist() == [42, *corpus.ids[a:b], 43, *corpus.ids[c:d], 43]
    assert types.tolist() == [0] * (b - a + 2) + [1] * (d - c + 1)
    assert joins[[0, 1, 1 + b - a, 2 + b - a, -1]].tolist() == [0] * 5
    plain = examples_of(corpus, None, LENGTH, 0, 0)
    ids, _, types = (of_row[0] for of_row in tokens_of(corpus, plain, [3], 42, 43))
    assert ids.tolist() == [42, *corpus.ids[slice(*plain.first[3])], 43]
    assert not types.any()


# ---- masks ---------------------------------------------------------------------------------------------------


def masked(masking, corpus, examples, rows, seed=0, epoch=0):
    """(shown, labels, ids, joins) of all rows together."""
    ids, joins, _ = tokens_of(corpus, examples, rows, PIECES.index("[CLS]"), PIECES.index("[SEP]"))
    shown, labels, _ = masking.apply(ids, joins, rows, seed, epoch)
    return shown, labels, np.concatenate(ids), np.concatenate(joins)


@pytest.fixture(scope="module")
def examples(corpus):
    return examples_of(corpus, None, LENGTH, 0, 0)


@pytest.mark.parametrize("rule", ["clean", "google"])
def test_shares_of_masks(corpus, examples, rule):
    """15% of tokens, of these 80/10/10; which random words are drawn, and which tokens are masked."""
    masking = Masking(tokenizer(), rule)
    shown, labels, ids, _ = masked(masking, corpus, examples, range(len(examples)))
    guessed = labels != IGNORED
    assert np.array_equal(labels[guessed], ids[guessed])
    assert np.array_equal(shown[~guessed], ids[~guessed])
    words = ids >= PIECES.index(".")
    assert not guessed[~words].any(), "[CLS] and [SEP] are never guessed"
    count = guessed.sum()
    share = count / (words.sum() if rule == "clean" else len(ids))
    assert share == pytest.approx(0.15, abs=0.01 if rule == "clean" else 0.005)
    as_mask = (shown[guessed] == PIECES.index("[MASK]")).mean()
    drawn = shown[guessed & (shown != PIECES.index("[MASK]")) & (shown != ids)]
    error = 4 * 0.4 / count**0.5
    assert as_mask == pytest.approx(0.8, abs=error)
    assert len(drawn) / count == pytest.approx(0.1, abs=error)
    of_no_text = set(range(PIECES.index(".")))
    if rule == "clean":
        assert not of_no_text & set(drawn.tolist())
    else:
        assert len(of_no_text & set(drawn.tolist())) > 20, "Google draws from the whole vocabulary"


def test_a_words_chance_does_not_depend_on_its_length(corpus, examples):
    masking = Masking(tokenizer())
    sizes, chosen = [], []
    for epoch in range(3):
        _, labels, _, joins = masked(masking, corpus, examples, range(len(examples)), epoch=epoch)
        first = np.flatnonzero(joins == 0)
        of_words = np.add.reduceat(labels != IGNORED, first)
        of_sizes = np.diff(first, append=len(joins))
        assert ((of_words == 0) | (of_words == of_sizes)).all(), "a word is guessed whole or not at all"
        text = np.add.reduceat(np.ones(len(joins), int), first) > 0
        sizes.append(of_sizes[text])
        chosen.append(of_words[text] > 0)
    sizes, chosen = np.concatenate(sizes), np.concatenate(chosen)
    for size in (2, 3, 4):
        of_size = chosen[sizes == size]
        assert of_size.mean() == pytest.approx(0.15, abs=4 * 0.36 / len(of_size) ** 0.5)


def test_without_whole_words_pieces_are_masked_separately(corpus, examples):
    _, labels, _, joins = masked(Masking(tokenizer(), whole_words=False), corpus, examples, range(200))
    first = np.flatnonzero(joins == 0)
    of_words, sizes = np.add.reduceat(labels != IGNORED, first), np.diff(first, append=len(joins))
    assert ((of_words > 0) & (of_words < sizes)).any()


@pytest.mark.parametrize("rule", ["clean", "google"])
def test_masks_are_a_function_of_seed_epoch_and_example(corpus, examples, rule):
    """They do not depend on other examples of the batch. With a seed and two workers, transformers' collator repeats
    its masks in every epoch."""
    masking, rows = Masking(tokenizer(), rule), list(range(40))
    shown, labels, *_ = masked(masking, corpus, examples, rows, seed=5, epoch=1)
    ends = np.cumsum(examples.lengths[:40])
    for row in (0, 17, 39):
        alone = masked(masking, corpus, examples, [row], seed=5, epoch=1)
        part = slice(ends[row] - examples.lengths[row], ends[row])
        assert np.array_equal(alone[0], shown[part])
        assert np.array_equal(alone[1], labels[part])
    for seed, epoch in ((5, 2), (6, 1), (5 + 2**32, 1)):
        other = masked(masking, corpus, examples, rows, seed=seed, epoch=epoch)[1]
        both = ((other >= 0) & (labels >= 0)).sum() / (labels >= 0).sum()
        assert both == pytest.approx(0.15, abs=0.08), "two epochs agree by chance alone"


def test_unknown_words_are_not_masked():
    words = tokenizer()
    ids = np.array([PIECES.index(p) for p in ("[CLS]", "a", "b", "[UNK]", "[SEP]")])
    guessed = {rule: Counter() for rule in ("clean", "google")}
    for rule, counts in guessed.items():
        for name in range(300):
            labels = Masking(words, rule).apply([ids], [np.zeros(5, np.uint8)], [name], 0, 0)[1]
            counts.update(np.flatnonzero(labels >= 0).tolist())
    assert set(guessed["clean"]) == {1, 2}
    assert set(guessed["google"]) == {1, 2, 3}
    words.mask_token = "[none]"
    with pytest.raises(InputError, match=r"the tokenizer has no \[none\]"):
        Masking(words)


def test_shares_equal_those_of_transformers_collator(corpus, examples, tmp_path):
    """For the same tokens, piece by piece, as many are masked, and shown in the same three ways. Only random words
    differ: transformers may draw [CLS] or an unused word."""
    transformers = pytest.importorskip("transformers", reason="needs the test extra")
    tokenizer().save_pretrained(tmp_path)
    collate = transformers.DataCollatorForLanguageModeling(transformers.AutoTokenizer.from_pretrained(tmp_path))
    rows = range(min(400, len(examples)))
    shown, labels, ids, _ = masked(Masking(tokenizer(), whole_words=False), corpus, examples, rows)
    torch.manual_seed(0)
    special = torch.from_numpy(ids < PIECES.index("."))
    of_theirs = collate.torch_mask_tokens(torch.from_numpy(ids)[None].clone(), special[None])
    found = []
    for seen, wanted in ((shown, labels), (part[0].numpy() for part in of_theirs)):
        guessed = wanted != IGNORED
        assert not guessed[special.numpy()].any()
        of_text, count = int((~special).sum()), int(guessed.sum())
        as_mask, as_it_is = seen[guessed] == PIECES.index("[MASK]"), seen[guessed] == ids[guessed]
        drawn = seen[guessed][~as_mask & ~as_it_is]
        found.append((count / of_text, as_mask.mean(), as_it_is.mean(), set(drawn.tolist())))
    (share, as_mask, as_it_is, drawn), (of_their, their_mask, their_own, their_drawn) = found
    assert share == pytest.approx(of_their, abs=6 * (0.15 * 0.85 / of_text) ** 0.5)
    assert as_mask == pytest.approx(their_mask, abs=6 * (0.8 * 0.2 / count) ** 0.5)
    # the word itself may be drawn, by ours out of 21, by transformers out of 66
    assert as_it_is == pytest.approx(their_own, abs=6 * (0.1 * 0.9 / count) ** 0.5)
    text = set(range(PIECES.index("."), len(PIECES)))
    assert drawn <= text
    assert their_drawn - text


# ---- Chinese -------------------------------------------------------------------------------------------------

SENTENCE = "我们喜欢机器学习，也喜欢音乐。"
WORDS = ["我们", "喜欢", "机器学习", "学习", "音乐", "器学"]


@pytest.fixture
def segmenter(tmp_path):
    (tmp_path / "words.txt").write_text("\n".join(WORDS), encoding="utf-8")
    return segmenter_of(str(tmp_path / "words.txt"))


def test_a_word_list_cuts_into_few_words(segmenter, tmp_path):
    assert segmenter.cut("我们喜欢机器学习") == ["我们", "喜欢", "机器学习"]
    assert segmenter.cut("机器学") == ["机", "器学"]
    assert segmenter.cut("他们") == ["他", "们"]
    (tmp_path / "none.txt").write_text(" \n")
    with pytest.raises(InputError, match="has no words"):
        segmenter_of(str(tmp_path / "none.txt"))


def test_jieba_cuts_words():
    pytest.importorskip("jieba", reason="needs the segmenter extra")
    found = segmenter_of("jieba")
    assert list(found.cut("我们喜欢机器学习")) == ["我们", "喜欢", "机器", "学习"]
    assert found.name.startswith("jieba ")


def test_characters_stand_alone_where_words_and_tokens_disagree(segmenter):
    text = "a我们x喜欢"
    one_each = [(i, i + 1) for i in range(len(text))]
    assert joins_of_words(text, one_each, segmenter).tolist() == [0, 0, 1, 0, 0, 1]
    across = [(0, 1), (1, 2), (2, 5), (5, 6)]  # a token across the end of a word and the beginning of the next one
    assert joins_of_words(text, across, segmenter).tolist() == [0, 0, 0, 0]
    assert joins_of_words("abc", [(0, 3)], segmenter).tolist() == [0]
    assert joins_of_words("我", [], segmenter).tolist() == []


def test_chinese_words_are_guessed_whole(segmenter, tmp_path):
    """15% of a sentence's words are masked, each whole, by the ids of its characters. The whole-word collator of
    transformers 5.24 masks 0 or 16 of 16."""
    characters = sorted(set(SENTENCE))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
    words = Tokenizer.from_words(pieces, lowercase=True)
    (tmp_path / "a.txt").write_text(f"{SENTENCE}\n" * 40, encoding="utf-8")
    made = build_corpus(tmp_path / "made", [tmp_path / "a.txt"], words, 30, segmenter=segmenter)
    assert made.joins[:15].tolist() == [0, 1, 0, 1, 0, 1, 1, 1, 0, 0, 0, 1, 0, 1, 0]
    assert made.facts["tokens joined by the segmenter"] == 40 * 7
    examples = examples_of(made, None, 20, 0, 0)
    masking = Masking(words)
    of_words = Counter()
    total = guessed = 0
    for epoch in range(50):
        ids, joins, _ = tokens_of(made, examples, range(len(examples)), words.cls_token_id, words.sep_token_id)
        _, labels, _ = masking.apply(ids, joins, range(len(examples)), 0, epoch)
        place = 0
        for of_example in ids:
            labels_here = labels[place : place + len(of_example)]
            place += len(of_example)
            for start, size in ((1, 2), (3, 2), (5, 4), (11, 2), (13, 2)):
                if len(of_example) == 17:
                    of_words[int((labels_here[start : start + size] >= 0).sum()) / size] += 1
            total += len(of_example) - 2
            guessed += int((labels_here >= 0).sum())
        assert set(labels[labels >= 0]) <= {pieces.index(c) for c in characters}
    assert set(of_words) == {0.0, 1.0}
    assert guessed / total == pytest.approx(0.15, abs=0.02)


@pytest.mark.parametrize("rule", ["clean", "google"])
def test_google_takes_words_while_they_fit(corpus, examples, rule):
    """Each example has round(15% of its tokens) masked, counting [CLS] and [SEP], or fewer if words do not fit."""
    rows = list(range(300))
    _, labels, *_ = masked(Masking(tokenizer(), rule), corpus, examples, rows)
    ends = np.cumsum(examples.lengths[:300])
    counts = np.diff(np.cumsum(labels >= 0)[ends - 1], prepend=0)
    budget = np.maximum(1, np.round(examples.lengths[:300] * 0.15))
    if rule == GOOGLE:
        assert (counts <= budget).all()
        assert (counts == budget).mean() > 0.7
    else:
        assert (counts > budget).any()
