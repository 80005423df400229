"""Examples from files: what counts as text, what is an error, and the places of gold answers."""

import json

import pytest

from fastbert.training.files import DataError, place_of, read_conll, read_questions, read_table

pytestmark = pytest.mark.once


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def cells(path, columns=()):
    return [list(row.cells.values()) for row in read_table(path, list(columns))]


# ---- tables --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", 'text\tlabel\nNA\tnull\n"quoted\tnan\n a \u2028b \t1\n'),
        ("a.txt", 'text\tlabel\r\nNA\tnull\r\n"quoted\tnan\r\n a \u2028b \t1'),
        ("a.csv", 'text,label\nNA,null\n"""quoted",nan\n" a \u2028b ",1\n'),
        ("a.jsonl", "".join(json.dumps({"text": a, "label": b}) + "\n" for a, b in
                            [("NA", "null"), ('"quoted', "nan"), (" a \u2028b ", "1")])),
        ("bom.tsv", b"\xef\xbb\xbf" + 'text\tlabel\nNA\tnull\n"quoted\tnan\n a \u2028b \t1\n'.encode()),
    ],
)  # fmt: skip
def test_texts_are_read_exactly(name, content, write):
    """NA, null and nan are texts, a quote is an ordinary character in .tsv, and only a line feed ends a line."""
    assert cells(write(name, content), ["text", "label"]) == [["NA", "null"], ['"quoted', "nan"], [" a \u2028b ", "1"]]


def test_a_cell_of_a_csv_may_hold_lines(write):
    assert cells(write("a.csv", 'text,label\n"one\ntwo, three",x\n')) == [["one\ntwo, three", "x"]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "", "a.tsv has no rows"),
        ("a.tsv", "text\tlabel\n", "a.tsv has no rows"),
        ("a.jsonl", "\n", "a.jsonl has no rows"),
        ("a.tsv", "sentence\tlabel\na\tb\n", "line 2: no column 'text'; it has 'sentence', 'label'"),
        ("a.jsonl", '{"text": "a"}\n{"label": "b"}\n', "line 2: no column 'text'; it has 'label'"),
        ("a.tsv", "text\tlabel\na\tb\na\n", "line 3: 1 cells, but the header has 2"),
        ("a.tsv", "text\ttext\na\tb\n", "the column 'text' is there twice"),
        ("a.csv", 'text,label\n"a,b\n', "line 2: unexpected end of data"),
        ("a.jsonl", '{"text": "a"\n', "line 1: not JSON"),
        ("a.jsonl", "[1]\n", "line 1: expected a JSON object, got list"),
        ("a.tsv", b"text\n\nb\xff\n", "line 3: not UTF-8 (byte 0xff)"),
        ("a.xlsx", "text\na\n", "expected a table, a file that ends in .tsv"),
    ],
)
def test_broken_tables_are_named_in_one_line(name, content, message, write):
    with pytest.raises(DataError) as caught:
        read_table(write(name, content), ["text"])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- tagged words --------------------------------------------------------------------------------------------


def test_sentences_end_at_lines_of_white_space(write):
    content = "-DOCSTART- -X- O O\n\nEU NNP B-ORG\nrejects VBZ O\n\t\n\n#tag\tO\na b\tB-x\n"
    sentences = read_conll(write("a.conll", content))
    assert [(s.words, s.tags) for s in sentences] == [
        (["EU", "rejects"], ["B-ORG", "O"]),
        (["#tag", "a b"], ["O", "B-x"]),
    ]
    assert sentences[1].place.endswith("line 7")


def test_words_without_tags(write):
    sentences = read_conll(write("a.conll", "one\ntwo x\n"), tagged=False)
    assert [(s.words, s.tags) for s in sentences] == [(["one", "two"], None)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no sentences"),
        ("a O\nb\n", "line 2: one column, expected a word and its tag"),
        ("B-PER\tJohn\n", "line 1: 'John' is no tag; expected O, or B-, I-, E- or S- with a type (columns swapped?)"),
        ("a B-\n", "line 1: 'B-' is no tag"),
    ],
)
def test_broken_sentences_are_named_in_one_line(content, message, write):
    with pytest.raises(DataError) as caught:
        read_conll(write("a.conll", content))
    assert message in str(caught.value)


# ---- questions -----------------------------------------------------------------------------------------------


def squad(*questions, context="one two two three"):
    return json.dumps({"data": [{"paragraphs": [{"context": context, "qas": list(questions)}]}]})


def answer(text, start):
    return {"text": text, "answer_start": start}


def test_gold_answers_are_searched_near_their_offset(write):
    path = write("a.json", squad(
        {"id": "right", "question": "?", "answers": [answer("two", 4)]},
        {"id": "near", "question": "?", "answers": [answer("two", 7), answer("three", 99)]},
        {"id": "nowhere", "question": "?", "answers": [answer("four", 0)]},
        {"id": "none", "question": "?", "answers": [answer("two", 4)], "is_impossible": True},
    ))  # fmt: skip
    questions, repaired, lost = read_questions(path)
    starts = {q.id: [a.start for a in q.answers] for q in questions}
    assert starts == {"right": [4], "near": [8, 12], "nowhere": [None], "none": []}
    assert (repaired, lost) == (2, 1)


@pytest.mark.parametrize(
    ("stated", "found"), [(0, 0), (1, 0), (3, 4), (4, 4), (5, 4), (6, 4), (7, 8), (8, 8), (50, 8), (-7, 0)]
)
def test_of_two_places_the_nearer_one_and_of_equals_the_earlier(stated, found):
    assert place_of("ab", "ab__ab__ab", stated) == found


def test_questions_without_gold(write):
    path = write("a.jsonl", '{"question": "who?", "context": "me"}\n{"id": 7, "question": "why?", "context": "so"}\n')
    assert [(q.id, q.context, q.answers) for q in read_questions(path).questions] == [("0", "me", []), ("7", "so", [])]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "is not laid out as SQuAD: no 'data'"),
        ('{"data": []}', "has no questions"),
        (squad({"question": "?", "answers": []}), "no 'id'"),
        (squad({"id": "1", "question": 3, "answers": []}), "'question' must be a string, got a number"),
        ("[]", "is not laid out as SQuAD: expected an object with 'data', got a list"),
        ('{"data": null}', "'data' must be a list, got null"),
        ('{"data": ["text"]}', "expected an object with 'paragraphs', got a string"),
        (squad("?"), "expected an object with 'id', got a string"),
        (squad({"id": "1", "question": "?", "answers": [{"text": "x"}]}), "no 'answer_start'"),
        (squad({"id": "1", "question": "?"}, {"id": "1", "question": "?"}), "the id '1' is there twice"),
    ],
)
def test_broken_questions_are_named_in_one_line(content, message, write):
    with pytest.raises(DataError) as caught:
        read_questions(write("a.json", content))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- real files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "questions", "repaired", "lost"),
    [("xquad/xquad.en.json", 1190, 0, 0), ("cmrc2018/cmrc2018_trial.json", 1002, 5, 0)],
)
def test_real_questions(shared, file, questions, repaired, lost):
    read = read_questions(shared / "data" / file)
    assert (len(read.questions), read.repaired, read.lost) == (questions, repaired, lost)
    assert all(q.context.startswith(a.text, a.start) for q in read.questions for a in q.answers)


def test_real_tables_and_sentences(shared):
    assert len(read_table(shared / "data" / "sst2" / "dev.tsv", ["sentence", "label"])) == 872
    sentences = read_conll(shared / "data" / "wnut17" / "emerging.dev.conll")
    assert (len(sentences), sum(len(s.words) for s in sentences)) == (1009, 15733)
    assert sum(tag.startswith("B-") for s in sentences for tag in s.tags) == 836
