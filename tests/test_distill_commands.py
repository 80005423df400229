"""`fastbert distill` from files to a folder, which transformers can read, and what is refused."""

import json
import shutil

import pytest
import torch

from command_line import run
from compression_models import needs_products
from distill_models import model_of
from fastbert import BertConfig, BertModel, Encoder, Tokenizer
from fastbert.checkpoint import load_state_dict
from fastbert.models.heads import BertForMaskedLM
from fastbert.training.finetune import save_model
from pretraining_models import WORDS, text_of
from training_models import KINDS, examples_of, task_of

pytestmark = pytest.mark.once

COMMON = ("--impl", "native", "--dtype", "float32", "--device", "cpu")


def write_examples(kind: str, path, labelled: bool = True):
    """Writes the examples of `training_models` to a file."""
    examples = examples_of(kind, 24)
    if kind == "token":
        rows = [
            "\n".join(f"{w} {t}" if labelled else w for w, t in zip(e.words, e.tags, strict=True)) for e in examples
        ]
        path = path.with_suffix(".conll")
        path.write_text("\n\n".join(rows) + "\n")
    elif kind == "qa":
        path = path.with_suffix(".json")
        entries = [
            {"context": e.context, "qas": [{"id": e.id, "question": e.question, "answers": [
                {"text": a.text, "answer_start": a.start} for a in e.answers if labelled]}]} for e in examples
        ]  # fmt: skip
        path.write_text(json.dumps({"data": [{"paragraphs": entries}]}))
    else:
        path = path.with_suffix(".jsonl")
        rows = []
        for e in examples:
            row = {"text": e.text} if kind != "pair" else {"text1": e.text, "text2": e.pair}
            rows.append(row | ({"label": e.label} if labelled else {}))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """A folder for each kind, as `fastbert finetune` writes it."""
    home, made = tmp_path_factory.mktemp("teachers"), {}
    for kind in KINDS:
        task, made[kind] = task_of(kind)[0], home / kind
        made[kind].mkdir()
        model = model_of(task, 3, seed=2)
        save_model(made[kind], model, model.state_dict(), task.tokenizer, task.spec)
    return made


def distill(teacher, kind, data, out, *others, student=2) -> int:
    task = "sentence" if kind in ("several", "number") else kind
    return run(
        "distill", "--teacher", teacher, "--student", student, "--task", task, "--data", data, "--out", out, *COMMON,
        "-q", *others,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_task_without_labels(kind, teachers, tmp_path, capsysbinary):
    """The student agrees with its teacher more often than before, and transformers reads it."""
    import transformers

    data = write_examples(kind, tmp_path / "unlabelled", labelled=False)
    gold, out = write_examples(kind, tmp_path / "gold"), tmp_path / "out"
    args = ("--eval", gold, "--epochs", 2, "--lr", "1e-3", "--losses", "logits,hidden,minilm2", "--batch-tokens", 80)
    assert distill(teachers[kind], kind, data, out, *args) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["scores of the teacher"].keys() == report["scores"].keys()
    assert (report["layers"], report["layers of the teacher"], report["pairs of layers"]) == (2, 3, [[0, 0], [1, 2]])
    assert [step["command"] for step in json.loads((out / "compression.json").read_text())["steps"]] == ["distill"]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["logits_loss"] + rows[0]["hidden_loss"] + rows[0]["minilm2_loss"] == pytest.approx(rows[0]["loss"])
    auto = {"token": "AutoModelForTokenClassification", "qa": "AutoModelForQuestionAnswering"}
    theirs = getattr(transformers, auto.get(kind, "AutoModelForSequenceClassification")).from_pretrained(out)
    assert theirs.config.num_hidden_layers == 2
    assert not any("projection" in name for name in theirs.state_dict())
    assert theirs.config.id2label == transformers.AutoConfig.from_pretrained(teachers[kind]).id2label
    capsysbinary.readouterr()
    assert run("predict", out, data, *COMMON) == 0
    assert len(capsysbinary.readouterr().out.splitlines()) == 24
    assert Encoder.from_pretrained(out, dtype="float32").encode(["a b"]).shape == (1, 32)


def test_an_interrupted_run_continues(teachers, tmp_path, monkeypatch):
    """It ends with the same bits. Another teacher, loss or temperature is refused."""
    task, changed = task_of("sentence")[0], tmp_path / "changed"
    changed.mkdir()
    model = model_of(task, 3, seed=3)
    save_model(changed, model, model.state_dict(), task.tokenizer, task.spec)
    from fastbert.compression.distill import Distilling

    data = write_examples("sentence", tmp_path / "data")
    args = ("--losses", "logits,labels=0.5,first", "--epochs", 2, "--batch-tokens", 60)
    assert distill(teachers["sentence"], "sentence", data, tmp_path / "whole", *args) == 0
    of_step, out = Distilling._step, tmp_path / "parts"

    def interrupted(self, step, epoch, asked):
        return of_step(self, step, epoch, [2] if self.progress.step == 2 else asked)

    monkeypatch.setattr(Distilling, "_step", interrupted)
    assert distill(teachers["sentence"], "sentence", data, out, *args) == 130
    monkeypatch.undo()
    other = (args[0], "logits,labels=0.6,first", *args[2:])
    assert distill(teachers["sentence"], "sentence", data, out, *other, "--resume") == 1
    assert distill(teachers["sentence"], "sentence", data, out, *args, "--temperature", 3, "--resume") == 1
    assert distill(changed, "sentence", data, out, *args, "--resume") == 1
    assert distill(teachers["sentence"], "sentence", data, out, *args) == 1, "without --resume"
    assert distill(teachers["sentence"], "sentence", data, out, *args, "--resume") == 0
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (out / "metrics.jsonl").read_text().count("logits_loss") == 2 * (
        (tmp_path / "whole" / "metrics.jsonl").read_text().count("logits_loss") // 2
    )


def test_a_student_has_the_settings_of_its_teacher(teachers, tmp_path):
    """Metric, length and stride of windows are the teacher's, so that both are measured alike; options replace them."""
    data, settings = write_examples("qa", tmp_path / "data"), tmp_path / "teacher" / "fastbert_task.json"
    shutil.copytree(teachers["qa"], settings.parent)
    given = json.loads(settings.read_text()) | {"metric": "cmrc", "max_length": 27, "stride": 5}
    settings.write_text(json.dumps(given))
    for name, options, changes in (
        ("same", (), {}),
        ("other", ("--metric", "squad", "--max-length", 26), {"metric": "squad", "max_length": 26, "stride": 8}),
        ("stride", ("--stride", 4), {"stride": 4}),
    ):
        assert distill(settings.parent, "qa", data, tmp_path / name, "--epochs", 1, *options) == 0
        assert json.loads((tmp_path / name / "fastbert_task.json").read_text()) == given | changes


# ---- masked words --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guesser(tmp_path_factory):
    """(a model with a head for masked words, text)."""
    folder = tmp_path_factory.mktemp("guesser")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=24, initializer_range=0.2,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    Tokenizer.from_words(WORDS, lowercase=True).save_pretrained(folder)
    text = folder / "text.txt"
    text.write_text(text_of())
    return folder, text


def words(guesser, out, *others, student=1) -> int:
    folder, text = guesser
    return run(
        "distill", "--teacher", folder, "--student", student, "--mlm", "--data", text, "--out", out, "--max-length", 24,
        "--batch-tokens", 300, *COMMON, "-q", *others,
    )  # fmt: skip


def test_masked_words(guesser, tmp_path):
    """With logits over the vocabulary the student's guesses come nearer; a continued run ends with the same bits."""
    import transformers

    args = ("--losses", "logits,labels=0.5,cosine,attention", "--steps", 8, "--lr", "2e-3", "--eval", guesser[1])
    assert words(guesser, tmp_path / "whole", *args) == 0
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    logits = [row["logits_loss"] for row in rows if "loss" in row]
    assert len(logits) == 8
    assert sum(logits[-3:]) < 0.9 * sum(logits[:3])
    assert transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "whole").config.num_hidden_layers == 1
    assert json.loads((tmp_path / "whole" / "report.json").read_text())["scores"]["masked_loss"] > 0


def test_relations_of_an_encoder_without_a_head(guesser, tmp_path):
    """The student has another width. A plain BERT is saved, because no head was trained."""
    plain = tmp_path / "plain"
    BertModel.from_pretrained(guesser[0]).save_pretrained(plain)
    Tokenizer.from_pretrained(guesser[0]).save_pretrained(plain)
    narrow = tmp_path / "narrow.json"
    narrow.write_text(json.dumps({"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 1,
                                  "intermediate_size": 24, "max_position_embeddings": 24}))  # fmt: skip
    out, args = tmp_path / "out", ("--losses", "minilm2", "--relation-heads", 4, "--steps", 3, "--mask-share", 0)
    assert words((plain, guesser[1]), out, *args, student=narrow) == 0
    assert not any(
        name.startswith(("cls.", "bert.", "projections")) for name in BertModel.from_pretrained(out).state_dict()
    )
    assert Encoder.from_pretrained(out, dtype="float32").encode(["a b"]).shape == (1, 16)
    progress = json.loads((out / "checkpoints" / "step-00000003" / "progress.json").read_text())
    assert progress["settings"]["mask share"] == 0.0
    assert words((plain, guesser[1]), out, *args, "--resume", student=narrow) == 0
    assert words((plain, guesser[1]), tmp_path / "no", "--steps", 3) == 1, "logits need a head"


# ---- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher", "kind", "args", "says"),
    [
        ("pair", "sentence", (), "was fine-tuned for --task pair, not for --task sentence"),
        ("sentence", "sentence", ("--losses", "hidden", "--layers", "0,3"), "layers 0 to 2, and no layer 3"),
        ("sentence", "sentence", ("--losses", "minilm", "--relation-layer", "3"), "the teacher has the layers 0 to 2"),
        ("sentence", "sentence", ("--metric", "pearson"), "--metric pearson does not fit labels that are classes"),
        ("several", "sentence", ("--metric", "accuracy"), "--metric of --task sentence is one of"),
    ],
)  # fmt: skip
def test_a_teacher_that_does_not_fit_is_refused(teacher, kind, args, says, teachers, tmp_path, capsys):
    data = write_examples(kind, tmp_path / "data", labelled=False)
    assert distill(teachers[teacher], kind, data, tmp_path / "out", *args) == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_labels_unknown_to_the_teacher_are_refused(teachers, tmp_path, capsys):
    data = tmp_path / "data.tsv"
    data.write_text("text\tlabel\na b\tearly\nc d\tmiddle\n")
    assert distill(teachers["sentence"], "sentence", data, tmp_path / "out", "--losses", "logits,labels") == 1
    said = capsys.readouterr().err
    assert "line 3: the label 'middle' was never seen in training: early, Late, which are the labels of the" in said
    assert distill(teachers["sentence"], "sentence", data, tmp_path / "out", "--epochs", 1) == 0, "labels are not read"
    assert distill(teachers["sentence"], "sentence", data, tmp_path / "other", "--eval", data) == 1


def test_incomplete_folders_are_refused(teachers, tmp_path, capsys):
    """A teacher without weights, truncated weights, a head of another task. OUT keeps its old files."""
    data, out = write_examples("sentence", tmp_path / "data", labelled=False), tmp_path / "out"
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in teachers["sentence"].iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    whole = (broken / "model.safetensors").read_bytes()
    out.mkdir()
    (out / "model.safetensors").write_text("of before")
    for spoil in (whole[: len(whole) // 2], None):
        (broken / "model.safetensors").unlink()
        if spoil is not None:
            (broken / "model.safetensors").write_bytes(spoil)
        assert distill(broken, "sentence", data, out) == 1
        assert "broken" in capsys.readouterr().err
        assert distill(teachers["sentence"], "sentence", data, out, student=broken) == 1
        assert "broken" in capsys.readouterr().err
    assert (out / "model.safetensors").read_text() == "of before"
    (teachers["sentence"] / "fastbert_task.json").rename(tmp_path / "kept.json")
    try:
        tags = write_examples("token", tmp_path / "tags", labelled=False)
        assert distill(teachers["sentence"], "token", tags, out) == 1
        assert (
            "it has BertForSequenceClassification, and --task token a BertForTokenClassification"
            in capsys.readouterr().err
        )
        assert distill(teachers["sentence"], "sentence", data, out, "--epochs", 1) == 0, "the config says enough"
    finally:
        (tmp_path / "kept.json").rename(teachers["sentence"] / "fastbert_task.json")


def test_a_folder_with_another_model_is_not_overwritten(teachers, tmp_path, capsys):
    """The student replaced its teacher if --out named the teacher's folder, and with --resume any model."""
    data, own = write_examples("sentence", tmp_path / "data"), tmp_path / "own"
    shutil.copytree(teachers["sentence"], own)
    whole = (own / "model.safetensors").read_bytes()
    assert distill(own, "sentence", data, own, "--epochs", 1) == 2
    assert f"--out {own} is the teacher's folder" in capsys.readouterr().err
    training = ("--train", data, "--impl", "native", "-q")
    for command in (
        ("distill", "--teacher", teachers["sentence"], "--student", 2, "--task", "sentence", "--data", data, *COMMON),
        ("finetune", "--model", teachers["sentence"], "--task", "sentence", *training),
        ("prune", teachers["sentence"], "--magnitude", 0.5, *training, "--resume"),
    ):
        assert run(*command, "--out", own) == 1
        assert f"{own} has a model already: give another --out\n" in capsys.readouterr().err
    (own / "metrics.jsonl").write_text("")  # as of a run whose checkpoints were removed
    assert run("finetune", "--model", teachers["sentence"], "--task", "sentence", *training, "--out", own) == 1
    assert "give another --out, or --resume to go on with the run that made it" in capsys.readouterr().err
    assert run("finetune", "--model", own, "--task", "sentence", *training, "--out", own) == 1
    assert "is the folder of the model to begin with" in capsys.readouterr().err
    assert (own / "model.safetensors").read_bytes() == whole


def test_an_invalid_history_is_refused_before_the_training(teachers, tmp_path, capsys):
    data, own = write_examples("sentence", tmp_path / "data"), tmp_path / "own"
    shutil.copytree(teachers["sentence"], own)
    training = ("--train", data, "--impl", "native", "-q")
    for content, says in (('{"steps": [', "is not valid JSON"), ('{"steps": [1]}', "must hold a list of steps")):
        (own / "compression.json").write_text(content)
        assert distill(own, "sentence", data, tmp_path / "out") == 1
        assert says in capsys.readouterr().err
        assert run("prune", own, "--magnitude", 0.5, *training, "--out", tmp_path / "out") == 1
        assert says in capsys.readouterr().err
        assert run("finetune", "--model", own, "--task", "sentence", *training, "--out", tmp_path / "out") == 1
        assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_student_that_is_a_model_continues_its_own_history(teachers, tmp_path):
    """A pruned student that learns from its teacher again once had the steps of the teacher alone."""
    data, first, pruned, out = write_examples("sentence", tmp_path / "data"), *(tmp_path / name for name in "abc")
    assert distill(teachers["sentence"], "sentence", data, first, "--epochs", 1) == 0
    assert run("prune", first, "-o", pruned, "--heads", "0:1", "-q") == 0
    assert distill(teachers["sentence"], "sentence", data, out, "--epochs", 1, student=pruned) == 0
    steps = json.loads((out / "compression.json").read_text())["steps"]
    assert [step["command"] for step in steps] == ["distill", "prune", "distill"]


def test_layers_without_heads_are_not_compared(teachers, tmp_path, capsys):
    """They have no queries: the losses raised a division by zero, or a KeyError."""
    data, pruned = write_examples("sentence", tmp_path / "data"), tmp_path / "pruned"
    assert run("prune", teachers["sentence"], "-o", pruned, "--heads", "2:0,1", "-q") == 0
    for losses in ("attention", "minilm", "minilm2"):
        assert distill(pruned, "sentence", data, tmp_path / "out", "--losses", losses) == 1
        assert "student's layer 1 has none: choose other layers" in capsys.readouterr().err
    others = ("--losses", "minilm2,hidden", "--init", "0,1", "--relation-layer")
    assert distill(pruned, "sentence", data, tmp_path / "out", *others, 2) == 1
    assert "the teacher's layer 2 has none" in capsys.readouterr().err
    assert distill(pruned, "sentence", data, tmp_path / "out", *others, 1, "--epochs", 1) == 0


@needs_products
def test_a_teacher_in_8_bits(teachers, tmp_path):
    """It can teach, and its parameters include its integers."""
    data, small, out = write_examples("sentence", tmp_path / "data"), tmp_path / "small", tmp_path / "out"
    assert run("quantize", teachers["sentence"], "-o", small, "--data", data, "-q") == 0
    assert distill(small, "sentence", data, out, "--epochs", 1, "--losses", "logits,hidden,minilm2") == 0
    report, given = json.loads((out / "report.json").read_text()), load_state_dict(teachers["sentence"])
    assert report["parameters of the teacher"] == sum(t.numel() for t in given.values()) > report["parameters"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--mlm",), "--mlm needs --steps"),
        (("--mlm", "--steps", 2, "--epochs", 2), "--epochs is for --task"),
        (("--task", "sentence", "--steps", 2), "--steps is for --mlm"),
        (("--task", "sentence", "--losses", "logits,speed"), "'speed' is none of labels, logits"),
        (("--task", "sentence", "--losses", "logits,logits=2"), "'logits' comes twice"),
        (("--task", "sentence", "--losses", "logits=0"), "the weight of logits is 0"),
        (("--task", "sentence", "--losses", "logits=x"), "expected a number from 0 up"),
        (("--task", "sentence", "--temperature", 0), "--temperature divides"),
        (("--task", "sentence", "--losses", "hidden", "--temperature", 3), "--temperature is for the losses logits"),
        (("--task", "sentence", "--layers", "last"), "--layers is for the losses hidden, cosine, first, attention"),
        (("--task", "sentence", "--relation-layer", 0), "--relation-layer is for the losses minilm, minilm2"),
        (
            ("--task", "sentence", "--losses", "minilm", "--relation-heads", 2),
            "--relation-heads is for the losses minilm2",
        ),
        (("--task", "sentence", "--patience", 2), "--patience is an option of evaluation"),
        (("--task", "token", "--columns", "a,b"), "--columns is for tables"),
        (("--task", "sentence", "--fsdp"), "--fsdp needs several processes"),
        ((), "one of the arguments --task --mlm is required"),
    ],
)
def test_arguments_that_exclude_each_other(args, says, tmp_path, capsys):
    assert run("distill", "--teacher", "t", "--student", 1, "--data", "d", "--out", tmp_path / "out", *args) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
