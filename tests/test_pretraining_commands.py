"""`fastbert pretrain` with files: models with which transformers and `fastbert finetune` continue, and its errors."""

import json

import pytest
import torch
from safetensors.torch import load_file

from command_line import run
from fastbert import BertConfig, BertModel, Tokenizer
from fastbert.models.heads import BertForMaskedLM
from pretraining_models import WORDS, text_of

pytestmark = pytest.mark.once

CPU = ("--device", "cpu", "--dtype", "float32", "--impl", "native", "-q")


@pytest.fixture
def files(tmp_path):
    (tmp_path / "text.txt").write_text(text_of())
    (tmp_path / "held.txt").write_text(text_of(4, seed=1))
    small = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, max_position_embeddings=32
    )
    (tmp_path / "small.json").write_text(json.dumps(small.to_dict()))
    return tmp_path


def options(files, *others):
    return (
        "pretrain", files / "text.txt", "--config", files / "small.json", "--max-length", 24, "--steps", 4,
        "--batch-tokens", 300, "--vocab-size", 40, "--out", files / "out", *CPU, *others,
    )  # fmt: skip


def test_a_model_with_which_other_programs_continue(files, capsys):
    assert run(*options(files, "--objective", "mlm+nsp", "--eval", files / "held.txt", "--evaluate-every", 3)) == 0
    out = files / "out"
    report = json.loads((out / "report.json").read_text())
    assert report["steps"] == 4
    assert report["vocabulary"] < report["rows of the vocabulary's table"] == 64
    assert set(report["scores"]) == {"masked_loss", "perplexity", "masked_accuracy", "next_sentence_accuracy"}
    assert (out / "curve.svg").read_text().startswith("<svg")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 3, 4, 4]
    assert {"loss", "masked_loss", "pair_loss"} <= set(rows[0])

    transformers = pytest.importorskip("transformers", reason="needs the test extra")
    for kind in (transformers.AutoModelForPreTraining, transformers.AutoModelForMaskedLM):
        theirs, info = kind.from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"]
        assert type(theirs).__name__ in ("BertForPreTraining", "BertForMaskedLM")
        assert theirs.cls.predictions.decoder.weight is theirs.bert.embeddings.word_embeddings.weight
        with torch.no_grad():
            logits = theirs(torch.tensor([[2, 5, 4, 3]]))[0]
        assert logits[0, 2].argmax() < report["vocabulary"]
        assert logits[0, :, report["vocabulary"] :].max() < -9000

    table = files / "table.tsv"
    table.write_text("text\tlabel\na b c\tx\nd e f\ty\n")
    assert run("finetune", "--model", out, "--task", "sentence", "--train", table, "--out", files / "tuned", *CPU) == 0

    # Training continues from this model with its tokenizer, and ends where it ends without a break.
    onward = ("pretrain", files / "held.txt", "--init", out, "--max-length", 24, "--steps", 2, "--lr", 0, *CPU)
    assert run(*onward, "--out", files / "onward", "--objective", "mlm+nsp") == 0
    before, after = (BertForMaskedLM.from_pretrained(folder, seed=0).state_dict() for folder in (out, files / "onward"))
    assert all(torch.equal(t, before[name]) for name, t in after.items())
    assert (out / "vocab.txt").read_bytes() == (files / "onward" / "vocab.txt").read_bytes()

    capsys.readouterr()
    assert run(*options(files)) == 1
    assert "out has checkpoints of a run: --resume goes on with it" in capsys.readouterr().err
    assert run(*options(files, "--objective", "mlm+nsp", "--resume", "--seed", 1)) == 1
    assert "is of a run with seed 0, not 1" in capsys.readouterr().err
    assert run(*options(files, "--objective", "mlm+nsp", "--resume", "--dropout", 0)) == 1
    assert "is of a run with dropout 0.1, not 0.0" in capsys.readouterr().err
    (files / "text.txt").write_text(text_of(13))
    assert run(*options(files, "--objective", "mlm+nsp", "--resume")) == 1
    assert "is of a run with corpus of SHA-256" in capsys.readouterr().err


def test_electra_by_the_clock_with_a_table_at_the_end(files, capsys):
    argv = [word for word in options(files, "--objective", "electra", "--eval", files / "held.txt") if word != "-q"]
    place = argv.index("--steps")
    argv[place : place + 2] = ["--time-budget", "0.05"]
    assert run(*argv) == 0
    out, err = capsys.readouterr()
    assert "detection_auc" in out
    assert "nats: the mean over" in out
    assert f"the model is in {files / 'out'}" in out
    assert "step" in err
    for folder in ("", "discriminator", "generator"):
        assert (files / "out" / folder / "config.json").exists()


@pytest.mark.parametrize(
    ("others", "code", "message"),
    [
        (["--init", "x"], 2, "the model of --init has its own sizes and tokenizer"),
        (["--tokenizer", "x"], 2, "--vocab-size is for a new vocabulary, and this one is given"),
        (["--fsdp"], 2, "--fsdp needs several processes"),
        (["--segmenter", "jieba", "--no-whole-words"], 2, "--segmenter is for whole words"),
        (["--max-length", "7"], 2, "has no room for text"),
        (["--mask-share", "0"], 2, "--mask-share 0 masks nothing"),
        (["--mask-share", "1.5"], 2, "expected a number from 0 to 1"),
        (["--config", "huge"], 1, "--config huge: neither one of tiny, mini, small"),
        (["--eval", "none.txt"], 1, "none.txt does not exist"),
    ],
)
def test_invalid_arguments_are_refused(files, capsys, others, code, message):
    assert run(*options(files, *others)) == code
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_length_of_training_is_required(files, capsys):
    assert run("pretrain", files / "text.txt", "--out", files / "out") == 2
    assert "give the length of training: --steps N, or --time-budget SECONDS" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "others", "message"),
    [
        ("", [], "there is no text in"),
        ("a b. c d.\n", ["--objective", "mlm+nsp"], "is one document, and the next-sentence objective takes"),
        ("a b\n\nc d\n", ["--objective", "mlm+sop"], "no document has two sentences"),
        ("a b\n" + "c " * 600, ["--max-line-bytes", "1000"], "line 2: longer than 1,000 bytes; --max-line-bytes"),
        ("X Y Z\n", ["--tokenizer", "TOKENIZER"], "the tokenizer knows no word of"),
    ],
)
def test_unusable_text_is_refused(files, capsys, content, others, message):
    Tokenizer.from_words(WORDS, lowercase=False).save_pretrained(files / "tokenizer")
    (files / "text.txt").write_text(content)
    argv = list(options(files, "--min-frequency", 1, *others))
    if "--tokenizer" in others:
        argv = [files / "tokenizer" if word == "TOKENIZER" else word for word in argv]
        for name in ("--vocab-size", "--min-frequency"):
            del argv[argv.index(name) : argv.index(name) + 2]
    assert run(*argv) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (files / "out" / "checkpoints").exists()


def test_a_vocabulary_in_upper_case(files, capsys):
    """Text was lower-cased for a cased vocab.txt, and --cased was refused."""
    (files / "vocab.txt").write_text("\n".join([*WORDS, "A"]))
    (files / "text.txt").write_text("A b a. A a b.\n")
    argv = ("pretrain", files / "text.txt", "--config", files / "small.json", "--max-length", 24, "--steps", 1,
            "--tokenizer", files / "vocab.txt", "--out", files / "out", *CPU)  # fmt: skip
    assert run(*argv) == 1
    assert "vocab.txt has words in upper case, such as A: give --cased" in capsys.readouterr().err
    assert run(*argv, "--cased") == 0
    assert Tokenizer.from_pretrained(files / "out")(["A a"], add_special_tokens=False).input_ids == [
        [len(WORDS), WORDS.index("a")]
    ]


def test_a_tokenizer_of_another_model(files, capsys):
    config = BertConfig.from_dict(json.loads((files / "small.json").read_text()), vocab_size=20)
    BertForMaskedLM(config).save_pretrained(files / "model")
    Tokenizer.from_words(WORDS, lowercase=True).save_pretrained(files / "model")
    argv = ("pretrain", files / "text.txt", "--init", files / "model", "--steps", 1, "--out", files / "out", *CPU)
    assert run(*argv, "--max-length", 24) == 1
    assert "its tokenizer has 26 words, and its model 20 rows" in capsys.readouterr().err
    config.vocab_size = 26
    BertForMaskedLM(config).save_pretrained(files / "model")
    assert run(*argv, "--max-length", 64) == 1
    assert "takes 32 tokens at most, fewer than --max-length 64" in capsys.readouterr().err


def test_a_new_head_never_predicts_rows_that_pad_the_vocabulary(files, capsys):
    """Also if training continues from a model without this head: a plain BERT, or a BERT as the start of an ELECTRA."""
    config = BertConfig.from_dict(json.loads((files / "small.json").read_text()), vocab_size=40)
    BertModel(config).save_pretrained(files / "model")
    Tokenizer.from_words(WORDS, lowercase=True).save_pretrained(files / "model")
    for objective, name in (("mlm", "cls.predictions.bias"), ("electra", "generator_lm_head.bias")):
        out = files / objective
        argv = ("pretrain", files / "text.txt", "--init", files / "model", "--objective", objective, "--out", out)
        assert run(*argv, "--max-length", 24, "--steps", 1, *CPU) == 0
        state = load_file(out / ("generator" if objective == "electra" else "") / "model.safetensors")
        assert state[name].shape == (40,)
        assert (state[name][len(WORDS) :] < -9000).all()
        assert (state[name][: len(WORDS)] > -1).all()
