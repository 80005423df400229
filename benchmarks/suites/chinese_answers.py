"""Trains a tokenizer and a small BERT from random weights on a hundred Chinese questions of CMRC 2018.

    python -m benchmarks.suites.chinese_answers --data DIR/cmrc2018 [--out DIR] [--questions 100]

The `tokenizers` library trains the tokenizer on the contexts and questions of both files; each Chinese character is a
word. The model overfits the first questions of the trial file, and then answers them and the whole dev file. The exit
code is 1 unless two conditions hold: the F1 on the training questions, by CMRC's definition, is at least 90, and every
answer is exactly the text of its context at its offsets. The F1 on dev is low in any case, because a small model learns
no Chinese from so few questions.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import tokenizers
import torch

import fastbert
from fastbert import BertConfig, BertModel, Tokenizer
from fastbert.cli.options import positive
from fastbert.storage import read_json, write_json
from fastbert.training.files import read_questions
from fastbert.training.finetune import Request, finetune
from fastbert.training.memory import keep_freed_memory
from fastbert.training.tasks import Spec

SPEC = Spec("qa", "cmrc", max_length=512, stride=128, longest=100)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
EXPECTED_F1 = 0.9


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of cmrc2018_trial.json and _dev.json")
    parser.add_argument("--out", type=Path, help="keep the model and its curve in this folder")
    parser.add_argument("--questions", type=positive, default=100, help="how many questions to train on (default: 100)")
    parser.add_argument("--epochs", type=positive, default=60, help="default: 60")
    parser.add_argument(
        "--batch-tokens", type=positive, default=2048, help="tokens of an optimiser step (default: 2,048)"
    )
    parser.add_argument("--lr", type=float, default=1e-3, help="default: 0.001")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        return fit_and_answer(args, args.out or Path(temporary))


def fit_and_answer(args: argparse.Namespace, out: Path) -> int:
    trial, dev = (args.data / f"cmrc2018_{part}.json" for part in ("trial", "dev"))
    out.mkdir(parents=True, exist_ok=True)
    vocabulary = words_of(texts_of(trial, dev))
    beginning = out / "beginning"
    Tokenizer.from_words(vocabulary, lowercase=True).save_pretrained(beginning)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(beginning)
    learnt = out / "learnt.json"
    write_json(learnt, first_questions(read_json(trial), args.questions))

    keep_freed_memory()
    began = time.perf_counter()
    request = Request(
        str(beginning), str(learnt), out / "model", SPEC, epochs=args.epochs, batch_tokens=args.batch_tokens,
        lr=args.lr, weight_decay=0.0,
    )  # fmt: skip
    report = finetune(request, say)
    seconds = time.perf_counter() - began
    print(
        f"vocabulary {len(vocabulary):,}; {report['examples']} questions in {report['windows']} windows, "
        f"{report['tokens an epoch']:,} tokens an epoch, {args.epochs} epochs in {seconds:.0f} s, "
        f"{report['products in']}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    f1 = answered(out / "model", learnt)
    answered(out / "model", dev)
    return 0 if f1 >= EXPECTED_F1 else 1


def answered(model: Path, path: Path) -> float:
    """Answers the questions of a file, and prints the scores. Returns F1.

    Raises: AssertionError if an answer is not the text at its offsets.
    """
    answering = fastbert.pipeline(model)
    questions = read_questions(path).questions
    answers = answering.records(questions, all_scores=False)
    for question, answer in zip(questions, answers, strict=True):
        found = question.context[answer["start"] : answer["end"]]
        if not found or found != answer["answer"]:
            raise AssertionError(f"{question.id}: {answer} where the context has {found!r}")
    scores = answering.task.scores(questions, answers).values
    figures = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
    print(f"{path.name}: {figures}; {len(answers):,} answers of {len(questions):,} are the text at their offsets")
    return scores["f1"]


def texts_of(*paths: Path) -> Iterator[str]:
    for path in paths:
        for article in read_json(path)["data"]:
            for paragraph in article["paragraphs"]:
                yield paragraph["context"]
                yield from (entry["question"] for entry in paragraph["qas"])


def words_of(texts: Iterator[str]) -> list[str]:
    """The vocabulary that `tokenizers` trains on texts, in the order of its ids."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=8000, limit_alphabet=6000, special_tokens=SPECIAL, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return sorted(vocabulary := backend.get_vocab(), key=vocabulary.__getitem__)


def first_questions(whole: dict, count: int) -> dict:
    """The content of a SQuAD file with only its first `count` questions."""
    articles = []
    for article in whole["data"]:
        paragraphs = []
        for paragraph in article["paragraphs"]:
            chosen = paragraph["qas"][:count]
            count -= len(chosen)
            if chosen:
                paragraphs.append({**paragraph, "qas": chosen})
        if paragraphs:
            articles.append({**article, "paragraphs": paragraphs})
    return {**whole, "data": articles}


def say(record: dict, steps: int) -> None:
    if record["step"] % 50 == 0:
        print(json.dumps(record), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
