"""A vocabulary from text: the same bytes each time, at most the requested size, made of the most frequent pieces."""

import json
import os
import random
import re
import subprocess
import sys
from itertools import pairwise

import pytest

from fastbert import Tokenizer
from fastbert.cli.main import main
from fastbert.pretraining.texts import files_of, lines_of
from fastbert.pretraining.vocabulary import SPECIAL, count_words, train_vocabulary
from fastbert.text.files import InputError

pytestmark = pytest.mark.once

ENGLISH = "The cat sat on the mat. The dog sat; the cats' hats, naïve and HATTED.\n"
CHINESE = "我们喜欢学习机器学习，学习使我们快乐。GPU计算很快。\n"


def test_words_are_those_of_the_tokenizer():
    """Also with other white space, control characters, accents and ideographs between spaces."""
    text = "Ünïted\tcafé  a\u3000b\x1cc don't 我们ok \u200bzero\u00a0width e\u0301"
    for lowercase in (True, False):
        tokenizer = Tokenizer.from_words([*SPECIAL], lowercase)
        backend = tokenizer._backend
        expected = [w for w, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))]
        assert sorted(count_words([text, None], lowercase).elements()) == sorted(expected)


def test_the_most_frequent_pair_becomes_a_piece_and_of_equals_the_first():
    """Worked out by hand. "ab" and "cd" occur 5 times each: the pair that comes first as strings is joined first."""
    assert train_vocabulary({"abcd": 3, "cd": 2, "xab": 1, "ab": 2}, 99, min_frequency=3)[len(SPECIAL) :] == [
        # a and ##b 5 times each, ##d 5, ##c 3; rarer characters are left out
        "##b", "##d", "a", "##c", "ab", "##cd", "abcd"
    ]  # fmt: skip


def plain_merges(words: dict[str, int], wanted: int) -> list[str]:
    """The definition, which counts everything again for every piece."""
    cut = {word: [word[0], *("##" + c for c in word[1:])] for word in words}
    made: list[str] = []
    while len(made) < wanted:
        counts: dict[tuple[str, str], int] = {}
        for word, pieces in cut.items():
            for pair in pairwise(pieces):
                counts[pair] = counts.get(pair, 0) + words[word]
        count, pair = min(((-c, p) for p, c in counts.items()), default=(0, None))
        if -count < 2:
            break
        piece = pair[0] + pair[1].removeprefix("##")
        if piece not in made:
            made.append(piece)
        for pieces in cut.values():
            place = 0
            while place + 1 < len(pieces):
                if (pieces[place], pieces[place + 1]) == pair:
                    pieces[place : place + 2] = [piece]
                place += 1
    return made


@pytest.mark.parametrize("letters", ["ab", "abcdef"])
def test_pieces_are_those_of_the_definition(letters):
    """With words of few letters, pairs overlap and a piece can be made in two ways."""
    draw = random.Random(1)
    words = {"".join(draw.choices(letters, k=draw.randint(1, 9))): draw.randint(1, 9) for _ in range(60)}
    made = [p for p in train_vocabulary(words, 200, min_frequency=2)[len(SPECIAL) :] if len(p.removeprefix("##")) > 1]
    assert made == plain_merges(words, len(made))
    assert len(made) > 30


def test_the_same_bytes_whatever_the_threads_and_the_order(tmp_path):
    """tokenizers 0.23.3's WordPiece trainer makes 13 different vocabularies in 20 trainings on three lines."""
    lines = [ENGLISH, CHINESE, "the same text, the same bytes: naïvely thought\n"]
    (tmp_path / "a.txt").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "b.txt").write_text("".join(reversed(lines)), encoding="utf-8")
    options = ["-q", "--vocab-size", "90", "--min-frequency", "1"]
    for name in "ab":
        assert main(["tokenizer", "train", str(tmp_path / f"{name}.txt"), "--out", str(tmp_path / name), *options]) == 0
    command = [sys.executable, "-m", "fastbert", "tokenizer", "train", tmp_path / "a.txt", "--out", tmp_path / "c"]
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}
    subprocess.run([*command, *options], env=environment, check=True)
    found = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "abc"]
    assert found[0] == found[1] == found[2]
    assert set(found[0]) == {"vocab.txt", "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("size", [30, 60, 500])
def test_a_vocabulary_is_no_larger_than_it_should_be(size):
    """Chinese has more characters than fit a small vocabulary: the most frequent ones become pieces."""
    words = count_words([CHINESE, ENGLISH, "一二三四五六七八九十百千万亿"], lowercase=True)
    pieces = train_vocabulary(words, size, min_frequency=1)
    assert len(pieces) == len(set(pieces)) <= size
    assert pieces[:5] == list(SPECIAL)
    characters = [p for p in pieces[5:] if len(p.removeprefix("##")) == 1]
    assert len(characters) <= (size - 5) * 3 // 4
    assert "学" in characters, "the most frequent ideograph"
    assert (
        len(
            [p for p in train_vocabulary(words, 60, alphabet=20, min_frequency=1)[5:] if len(p.removeprefix("##")) == 1]
        )
        == 20
    )


def test_a_tokenizer_that_transformers_reads(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(ENGLISH * 2 + CHINESE * 2, encoding="utf-8")
    out = tmp_path / "out"
    assert main(["tokenizer", "train", str(tmp_path), "--out", str(out), "--vocab-size", "99", "--cased"]) == 0
    assert "pieces" in capsys.readouterr().err
    text = "The HATTED cats 学习 naïve."
    ours = Tokenizer.from_pretrained(out)
    assert "[UNK]" not in ours.tokenize(text)
    transformers = pytest.importorskip("transformers", reason="needs the test extra")
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert theirs(text)["input_ids"] == ours.input_ids([text])[0]
    assert json.loads((out / "tokenizer_config.json").read_text())["do_lower_case"] is False


# ---- text out of files ---------------------------------------------------------------------------------------


def test_lines_and_documents(tmp_path):
    expected = ["a b", " c", None, "d", None]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf\r\n \na b\r\n c\n\n\t\n\nd")
    rows = [{"text": "a b\n\n c\n"}, {"text": " "}, {"text": "d", "other": 1}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(lines_of([tmp_path / "a.txt"])) == expected
    assert list(lines_of([tmp_path / "a.jsonl"])) == expected
    assert list(lines_of(files_of([tmp_path]))) == expected * 2
    pyarrow = pytest.importorskip("pyarrow", reason="needs the parquet extra")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": [row["text"] for row in rows]}), tmp_path / "a.parquet")
    assert list(lines_of([tmp_path / "a.parquet"])) == expected
    with pytest.raises(InputError, match="no column 'content'; it has text"):
        list(lines_of([tmp_path / "a.parquet"], field="content"))
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"b\.parquet is not a Parquet file"):
        list(lines_of([tmp_path / "b.parquet"]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "there is no text in"),
        ("a.txt", b" \n\t\n", "there is no text in"),
        ("a.txt", b"abc\xff", r"a.txt, line 1: not UTF-8 \(byte 0xff"),
        ("a.txt", b"ab\n" + b"x" * 5000, r"a.txt, line 2: longer than 1,000 bytes; --max-line-bytes allows more"),
        ("a.txt", b"abc", "no character occurs 2 times or more"),
        ("a.jsonl", b'{"content": "x"}', "a.jsonl, line 1: no field 'text'; it has 'content'"),
        ("a.jsonl", b"[1]", "a.jsonl, line 1: expected a JSON object, got list"),
        ("a.csv", b"x", r"a.csv: expected a file that ends in .txt, .jsonl, .parquet, or a folder"),
    ],
)
def test_bad_text_is_named_in_one_line(tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    argv = ["tokenizer", "train", str(tmp_path / name), "--out", str(tmp_path / "out"), "--max-line-bytes", "1000"]
    assert main(argv) == 1
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_missing_files(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        files_of([tmp_path / "none.txt"])
    with pytest.raises(InputError, match=r"has no file that ends in .txt, .jsonl, .parquet"):
        files_of([tmp_path])
