"""`fastbert finetune` and `fastbert predict` with files, and transformers with the resulting folder."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastbert
from command_line import run
from fastbert.checkpoint import CheckpointError
from fastbert.training.finetune import epochs_done
from fastbert.training.processes import Processes
from fastbert.training.run import Run
from small_bert import save_bert

pytestmark = pytest.mark.once

PATIENCE = 300  # seconds; a process that takes longer counts as hanging


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A plain BERT whose vocabulary is the letters."""
    return save_bert(tmp_path_factory.mktemp("bert"), max_position_embeddings=40, initializer_range=0.3)


def rows(n: int) -> list[tuple[str, str]]:
    return [(f"{'good' if i % 2 else 'bad'} {'abcdefgh'[i % 8]} x", "Yes" if i % 2 else "No") for i in range(n)]


def spaced(text: str) -> str:
    """The text with a space after each letter."""
    return " ".join(text.replace(" ", ""))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    made = {task: folder / name for task, name in (
        ("sentence", "a.tsv"), ("pair", "a.csv"), ("numbers", "n.jsonl"), ("token", "a.conll"), ("qa", "a.json"),
        ("silent", "s.json"),
    )}  # fmt: skip
    table = [(spaced(text), label) for text, label in rows(24)]
    made["sentence"].write_text("text\tlabel\n" + "".join(f"{t}\t{label}\n" for t, label in table))
    made["pair"].write_text("label,one,two\n" + "".join(f"{label},{t},x y\n" for t, label in table))
    made["numbers"].write_text("".join(json.dumps({"text": t, "label": len(t)}) + "\n" for t, _ in table))
    made["token"].write_text("a B-x\nb I-x\nc O\n\nd O\na B-x\n\n" * 6)
    context = "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 2

    def questions(answered):
        return [
            {"id": str(i), "question": letter, "is_impossible": not answered(i),
             "answers": [{"text": letter, "answer_start": context.index(letter)}] if answered(i) else []}
            for i, letter in enumerate("bcdefghi")
        ]  # fmt: skip

    for name, answered in (("qa", lambda i: True), ("silent", lambda i: i % 2 == 0)):
        data = {"data": [{"paragraphs": [{"context": context, "qas": questions(answered)}]}]}
        made[name].write_text(json.dumps(data))
    return made


def finetune(bert, out, task, train, *others) -> int:
    return run(
        "finetune", "--model", bert, "--task", task, "--train", train, "--out", out, "--impl", "native", "--dtype",
        "float32", "--device", "cpu", "-q", *others,
    )  # fmt: skip


def predictions(folder, file, capsysbinary, *others) -> list[dict]:
    capsysbinary.readouterr()
    assert run("predict", folder, file, "--impl", "native", "--dtype", "float32", "--device", "cpu", *others) == 0
    return [json.loads(line) for line in capsysbinary.readouterr().out.splitlines()]


@pytest.fixture(scope="module")
def tuned(bert, files, tmp_path_factory) -> Path:
    """A classifier of letters that has learnt its task."""
    out = tmp_path_factory.mktemp("tuned") / "out"
    args = ("--eval", files["sentence"], "--epochs", 12, "--lr", "3e-3", "--batch-tokens", 60)
    assert finetune(bert, out, "sentence", files["sentence"], *args) == 0
    return out


# ---- what comes out ------------------------------------------------------------------------------------------


def test_a_classifier_learns_and_predicts_by_name(tuned, files, capsysbinary):
    report = json.loads((tuned / "report.json").read_text())
    assert report["scores"]["accuracy"] == 1.0
    assert report["labels"] == ["No", "Yes"]
    assert report["definitions"].keys() == report["scores"].keys()
    assert "labels: 0 = No, 1 = Yes" in report["definitions"]["accuracy"]
    assert (report["evaluation examples"], report["max length"], report["stride"]) == (24, 40, 0)
    records = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    scored = [row["scores"] for row in records if "scores" in row]
    assert scored[report["best epoch"] - 1] == report["scores"]
    assert scored[report["best epoch"] - 1]["accuracy"] == max(scores["accuracy"] for scores in scored)
    found = predictions(tuned, files["sentence"], capsysbinary, "--all-scores")
    assert [record["label"] for record in found] == [label for _, label in rows(24)]
    for record in found:
        assert record["score"] == max(record["scores"].values())
        assert sum(record["scores"].values()) == pytest.approx(1.0)
    picture = (tuned / "curve.svg").read_text()
    assert picture.startswith("<svg")
    assert picture.count("<polyline") == 2


def test_transformers_reads_the_folder(tuned):
    transformers = pytest.importorskip("transformers", reason="needs the test extra")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tuned).eval()
    assert theirs.config.id2label == {0: "No", 1: "Yes"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tuned)
    texts = [spaced(text) for text, _ in rows(6)]
    with torch.no_grad():
        expected = theirs(**tokenizer(texts, padding=True, return_tensors="pt")).logits.softmax(-1)
    classify = fastbert.pipeline(tuned, impl="native", dtype="float32", device="cpu")
    found = torch.tensor([list(r["scores"].values()) for r in classify(texts, all_scores=True)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_pairs_numbers_entities_and_answers(bert, files, tmp_path, capsysbinary):
    """Each task with its own kind of file. Answers and entities have the right places in the text."""
    pair = ("--columns", "one,two,label", "--epochs", 1)
    assert finetune(bert, tmp_path / "pair", "pair", files["pair"], *pair) == 0
    assert {r["label"] for r in predictions(tmp_path / "pair", files["pair"], capsysbinary)} <= {"Yes", "No"}

    numbers = ("--labels", "number", "--eval", files["numbers"], "--epochs", 1)
    assert finetune(bert, tmp_path / "numbers", "sentence", files["numbers"], *numbers) == 0
    assert json.loads((tmp_path / "numbers" / "report.json").read_text())["metric"] == "pearson"
    assert all(r.keys() == {"score"} for r in predictions(tmp_path / "numbers", files["numbers"], capsysbinary))

    token = ("--eval", files["token"], "--epochs", 8, "--lr", "3e-3", "--batch-tokens", 40)
    assert finetune(bert, tmp_path / "token", "token", files["token"], *token) == 0
    assert json.loads((tmp_path / "token" / "report.json").read_text())["scores"]["entity_f1"] == 1.0
    first = predictions(tmp_path / "token", files["token"], capsysbinary)[0]
    assert [(e["type"], e["text"], e["start"], e["end"]) for e in first["entities"]] == [("x", "a b", 0, 3)]
    tag = fastbert.pipeline(tmp_path / "token", impl="native", device="cpu")
    (record,) = tag(["  c  a  b, c"])
    assert [record["text"][e["start"] : e["end"]] for e in record["entities"]] == [
        e["text"] for e in record["entities"]
    ]

    answers = ("--eval", files["silent"], "--metric", "squad_v2", "--max-length", 24, "--epochs", 1)
    assert finetune(bert, tmp_path / "qa", "qa", files["silent"], *answers) == 0
    scores = json.loads((tmp_path / "qa" / "report.json").read_text())["scores"]
    assert {"f1", "exact_match", "has_answer_f1", "no_answer_f1", "threshold"} <= scores.keys()
    data = json.loads(files["silent"].read_text())["data"][0]["paragraphs"][0]
    found = predictions(tmp_path / "qa", files["silent"], capsysbinary)
    assert [r["id"] for r in found] == [q["id"] for q in data["qas"]]
    for record in found:
        assert (record["answer"] == "") == (record["start"] is None)
        if record["answer"]:
            assert data["context"][record["start"] : record["end"]] == record["answer"]
    right = [
        r["answer"] == (q["answers"][0]["text"] if q["answers"] else "")
        for r, q in zip(found, data["qas"], strict=True)
    ]
    assert sum(right) / len(right) == pytest.approx(scores["exact_match"]), "predict uses the threshold of the report"


@pytest.mark.parametrize(("step", "epochs"), [(0, 0), (1, 0.25), (4, 1), (5, 1.33), (7, 2)])
def test_the_best_evaluation_may_lie_within_an_epoch(step, epochs):
    found = epochs_done([4, 3], step)
    assert found == epochs
    assert type(found) is type(epochs)


def test_a_new_head_for_numbers_begins_at_their_mean(bert, files, tmp_path):
    """A trained head continues from its own bias."""

    def bias() -> float:
        return load_file(tmp_path / "out" / "model.safetensors")["classifier.bias"].item()

    numbers = [json.loads(line)["label"] for line in files["numbers"].read_text().splitlines()]
    still = ("--labels", "number", "--epochs", 1, "--lr", "0")
    assert finetune(bert, tmp_path / "out", "sentence", files["numbers"], *still) == 0
    assert bias() == pytest.approx(sum(numbers) / len(numbers), rel=1e-6)
    others = tmp_path / "others.tsv"
    others.write_text("text\tlabel\na b\t100\nb c\t200\n")
    assert finetune(tmp_path / "out", tmp_path / "again", "sentence", others, *still) == 0
    kept = load_file(tmp_path / "again" / "model.safetensors")["classifier.bias"].item()
    assert kept == bias()


def test_windows_fit_a_model_of_few_positions(bert, files, tmp_path):
    """Their default overlap is a third of the model's positions."""
    assert finetune(bert, tmp_path / "out", "qa", files["qa"], "--epochs", 1) == 0
    spec = json.loads((tmp_path / "out" / "fastbert_task.json").read_text())
    assert (spec["max_length"], spec["stride"]) == (40, 13)


def test_quiet_prints_nothing(bert, files, tmp_path, capfd):
    args = ("--eval", files["sentence"], "--epochs", 1, "--class-weights", "balanced", "--checkpoint-activations")
    assert finetune(bert, tmp_path / "out", "sentence", files["sentence"], *args) == 0
    assert capfd.readouterr() == ("", "")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["class weights"] == [1.0, 1.0]


def test_missing_tensorboard_is_named_before_anything_is_read(bert, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert finetune(bert, tmp_path / "out", "sentence", tmp_path / "nowhere.tsv", "--tensorboard") == 1
    assert "--tensorboard needs the package tensorboard: pip install tensorboard" in capsys.readouterr().err


def test_several_seeds_and_their_range(bert, files, tmp_path, monkeypatch):
    joined, join = [], Processes.join
    monkeypatch.setattr(Processes, "join", lambda device: joined.append(device) or join(device))
    args = ("--eval", files["sentence"], "--epochs", 1, "--seeds", 2, "--lr", "1e-3")
    assert finetune(bert, tmp_path / "out", "sentence", files["sentence"], *args) == 0
    assert len(joined) == 1, "processes that leave and join the group again may never meet"
    report = json.loads((tmp_path / "out" / "report.json").read_text())["seeds"]
    of_each = [json.loads((tmp_path / "out" / f"seed-{n}" / "report.json").read_text()) for n in range(2)]
    assert report["seeds"] == [each["seed"] for each in of_each] == [0, 1]
    assert report["values"] == [each["scores"]["accuracy"] for each in of_each]
    assert report["lowest"] <= report["median"] <= report["highest"]
    best = max(range(2), key=lambda n: of_each[n]["scores"]["accuracy"])
    model = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert model == (tmp_path / "out" / f"seed-{best}" / "model.safetensors").read_bytes()
    # Runs that go on find the model that they wrote.
    assert finetune(bert, tmp_path / "out", "sentence", files["sentence"], *args, "--resume") == 0


def test_several_seeds_replace_no_model(bert, files, tmp_path, capsys):
    """The best of several runs is written into OUT, which is no folder of a single run."""
    folder, other = tmp_path / "own", tmp_path / "other"
    for copy in (folder, other):
        shutil.copytree(bert, copy)
    args = ("--eval", files["sentence"], "--epochs", 1, "--seeds", 2)
    for out, resume, message in (
        (folder, (), "is the folder of the model to begin with"),
        (other, (), "has a model already"),
        (other, ("--resume",), "has a model already"),
    ):
        assert finetune(folder, out, "sentence", files["sentence"], *args, *resume) == 1
        assert message in capsys.readouterr().err
        for name in ("config.json", "model.safetensors"):
            assert (out / name).read_bytes() == (bert / name).read_bytes()
        assert not list(out.glob("seed-*"))


def test_a_classifier_continues_by_the_names_of_its_labels(tuned, tmp_path, capsys):
    """In another order or case. An unknown name is refused, unless --labels starts a new head."""
    swapped = tmp_path / "b.tsv"
    table = [(spaced(text), label.upper()) for text, label in reversed(rows(24))]
    swapped.write_text("text\tlabel\n" + "".join(f"{t}\t{label}\n" for t, label in table))
    assert (
        finetune(tuned, tmp_path / "more", "sentence", swapped, "--eval", swapped, "--epochs", 1, "--lr", "1e-9") == 0
    )
    report = json.loads((tmp_path / "more" / "report.json").read_text())
    assert report["labels"] == ["No", "Yes"]
    assert report["scores"]["accuracy"] == 1.0
    before, after = (load_file(folder / "model.safetensors") for folder in (tuned, tmp_path / "more"))
    torch.testing.assert_close(after["classifier.weight"], before["classifier.weight"], atol=1e-6, rtol=1e-6)
    swapped.write_text("text\tlabel\na\tyes\nb\tperhaps\n")
    assert finetune(tuned, tmp_path / "other", "sentence", swapped, "--epochs", 1) == 1
    assert "line 3: the label 'perhaps' is none of No, Yes" in capsys.readouterr().err
    assert finetune(tuned, tmp_path / "new", "sentence", swapped, "--labels", "perhaps,yes", "--epochs", 1) == 0


# ---- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "others", "message"),
    [
        ("", (), "has no rows"),
        ("text\tlabel\na\tx\nb\tx\n", (), "the only label is 'x'; a classifier needs two or more"),
        ("text\tlabel\na\n", (), "line 2: 1 cells, but the header has 2"),
        (
            "review\tlabel\na\tx\n",
            (),
            "has the columns review, label; expected text, label or sentence, label or others by --columns",
        ),
        ("text\tlabel\na\tx\n", ("--columns", "text,stars"), "no column 'stars'"),
        ("text\tlabel\na\tx\n", ("--columns", "text"), "--columns must name 2 columns for --task sentence"),
        ("text\tlabel\na\tx\n", ("--columns", "text,text"), "--columns names 'text' twice"),
        ("text\tlabel\na\tx\nb\ty\n", ("--labels", "number"), "line 2: expected a number for a label, got 'x'"),
        ("text\tlabel\na\tx\nb\ty\n", ("--metric", "squad"), "--metric of --task sentence is one of accuracy"),
        ("text\tlabel\n" + "".join(f"yes\ttext {i}\n" for i in range(30)), (), "are the columns swapped?"),
    ],
)
def test_errors_in_examples_are_one_line(bert, tmp_path, capsys, content, others, message):
    train = tmp_path / "train.tsv"
    train.write_text(content)
    assert finetune(bert, tmp_path / "out", "sentence", train, *others) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_bad_evaluations_are_found_before_training(bert, files, tmp_path, capsys):
    other = tmp_path / "dev.tsv"
    other.write_text("text\tlabel\na\tyes\nb\tperhaps\n")
    assert finetune(bert, tmp_path / "out", "sentence", files["sentence"], "--eval", other) == 1
    assert "dev.tsv, line 3: the label 'perhaps' was never seen in training: No, Yes" in capsys.readouterr().err
    lost = tmp_path / "lost.json"
    answer = {"id": "1", "question": "?", "answers": [{"text": "zz", "answer_start": 0}]}
    lost.write_text(json.dumps({"data": [{"paragraphs": [{"context": "a b", "qas": [answer]}]}]}))
    assert finetune(bert, tmp_path / "out", "qa", lost) == 1
    expected = "no example can be learnt from (questions left out, whose answers are not in their context: 1)"
    assert expected in capsys.readouterr().err
    assert finetune(bert, tmp_path / "out", "qa", files["silent"]) == 1
    assert "question '1' has no answer; --metric squad_v2 is for such" in capsys.readouterr().err


def test_a_folder_with_a_run_is_not_overwritten(tuned, bert, files, capsys):
    assert finetune(bert, tuned, "sentence", files["sentence"]) == 1
    assert "has checkpoints of a run: --resume goes on with it, or give another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (("--metric", "f1"), "--metric f1 is of one of two labels, and there are 3"),
        (("--metric", "pearson"), "--metric pearson does not fit labels that are classes"),
        (
            ("--columns", "text,number", "--labels", "number", "--metric", "matthews"),
            "does not fit labels that are num",
        ),
        (("--evaluations", 2), "--evaluations is the number of evaluations, and needs --eval"),
        (("--patience", 2), "--patience depends on evaluations, and needs --eval"),
        (("--clip", -1), "expected a number from 0 up, got '-1'"),
        (("--lr", "nan"), "expected a number from 0 up, got 'nan'"),
        (("--seed", 2**32), "expected a seed below 2^32 = 4,294,967,296, got 4294967296"),
        (("--class-weights", "w=2"), "--class-weights: 'w' is none of x, y, z"),
        (
            ("--columns", "text,number", "--labels", "number", "--class-weights", "balanced"),
            "--class-weights is for classes, and the labels are numbers",
        ),
    ],
)
def test_settings_without_meaning_are_refused_before_training(bert, tmp_path, capsys, others, message):
    train = tmp_path / "a.tsv"
    train.write_text("text\tlabel\tnumber\na b\tx\t1\nb c\ty\t2\nc d\tz\t3\n")
    assert finetune(bert, tmp_path / "out", "sentence", train, *others) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_columns_are_refused_for_files_that_are_no_tables(bert, files, tmp_path, capsys):
    assert finetune(bert, tmp_path / "out", "token", files["token"], "--columns", "a,b") == 2
    assert "--columns is for tables, and --task token reads none" in capsys.readouterr().err


def test_a_run_is_not_resumed_with_other_data_or_another_metric(bert, files, tmp_path, capsys):
    train, out = tmp_path / "a.tsv", tmp_path / "out"
    text = files["sentence"].read_text()
    train.write_text(text)
    first = ("--eval", train, "--epochs", 1)
    assert finetune(bert, out, "sentence", train, *first) == 0
    assert finetune(bert, out, "sentence", train, *first, "--resume") == 0
    capsys.readouterr()
    assert finetune(bert, out, "sentence", train, *first, "--resume", "--metric", "f1") == 1
    assert "is of a run with metric accuracy, not f1: go on with the same settings and data" in capsys.readouterr().err
    other = tmp_path / "b.tsv"
    other.write_text(text.replace(" x\t", " y\t"))
    assert finetune(bert, out, "sentence", other, *first, "--resume") == 1
    assert "is of a run with training data of SHA-256" in capsys.readouterr().err
    assert finetune(bert, out, "sentence", train, "--eval", other, "--epochs", 1, "--resume") == 1
    assert "is of a run with evaluation data of SHA-256" in capsys.readouterr().err


def test_a_full_disk_is_reported_with_the_last_checkpoint(bert, files, tmp_path, capsys, monkeypatch):
    def record(run, row, before=Run._record):
        if row["step"] == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        before(run, row)

    monkeypatch.setattr(Run, "_record", record)
    assert finetune(bert, tmp_path / "out", "sentence", files["sentence"], "--save-every", 1, "--batch-tokens", 60) == 1
    said = capsys.readouterr().err
    assert f"cannot write into {tmp_path / 'out'}: No space left on device; the last checkpoint is" in said
    assert said.endswith("step-00000001\n")


def test_a_closed_pipe_is_not_reported_as_a_full_disk(bert, files, tmp_path, capsys, monkeypatch):
    """If the program that reads the progress ends, the exit code is that of a closed pipe."""

    def tell(bar, record, steps):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(fastbert.cli.finetune.TrainingBar, "__call__", tell)
    assert finetune(bert, tmp_path / "out", "sentence", files["sentence"]) == 141


def test_a_metric_that_is_undefined_for_every_seed(bert, files, tmp_path, capsys):
    """Pearson's correlation with constant gold values."""
    (tmp_path / "same.jsonl").write_text("".join(json.dumps({"text": t, "label": 1}) + "\n" for t in ("a b", "c", "d")))
    arguments = ("--labels", "number", "--eval", tmp_path / "same.jsonl", "--epochs", 1, "--seeds", 2)
    base = ("finetune", "--model", bert, "--task", "sentence", "--train", files["numbers"], "--out", tmp_path / "out")
    assert run(*base, *arguments, "--device", "cpu", "--impl", "native") == 0
    assert "pearson of 2 seeds: median undefined, from undefined to undefined" in capsys.readouterr().out


def test_predictions_do_not_overwrite_their_examples(tuned, files, capsys):
    before = files["sentence"].read_bytes()
    assert run("predict", tuned, files["sentence"], "-o", files["sentence"]) == 2
    assert "input and output are the same file" in capsys.readouterr().err
    assert files["sentence"].read_bytes() == before


def test_a_folder_that_finetune_did_not_make_is_refused(bert):
    with pytest.raises(CheckpointError, match=r"has no fastbert_task.json, so fastbert finetune did not make it"):
        fastbert.pipeline(bert)


def test_inputs_of_another_kind_are_refused(tuned):
    classify = fastbert.pipeline(tuned, impl="native", device="cpu")
    assert classify([]) == []
    with pytest.raises(TypeError, match=r"inputs\[1\] must be a text, got tuple"):
        classify(["a", ("a", "b")])
    with pytest.raises(TypeError, match="expected a list of inputs, got a single text"):
        classify("a b")


# ---- killed --------------------------------------------------------------------------------------------------


def test_a_killed_run_resumes_to_the_same_bits(bert, files, tmp_path):
    """kill -9 after a few steps, then --resume, compared with an uninterrupted run."""
    common = ("--eval", files["sentence"], "--epochs", 4, "--lr", "1e-3", "--batch-tokens", 40, "--save-every", 2)
    assert finetune(bert, tmp_path / "whole", "sentence", files["sentence"], *common) == 0
    out = tmp_path / "killed"
    command = [
        sys.executable, "-m", "fastbert", "finetune", "--model", bert, "--task", "sentence", "--train",
        files["sentence"], "--out", out, "--impl", "native", "--dtype", "float32", "--device", "cpu", "-q", *common,
    ]  # fmt: skip
    process = subprocess.Popen([str(word) for word in command], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + PATIENCE
    while not list(out.glob("checkpoints/step-*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(PATIENCE) == -signal.SIGKILL
    assert finetune(bert, out, "sentence", files["sentence"], *common, "--resume") == 0

    def losses(folder):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]

    assert losses(out) == losses(tmp_path / "whole")
    ours, whole = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "whole"))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
