"""`fastbert pretrain`: trains a BERT from text, and reports its scores."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from .options import (
    IMPLS,
    UsageError,
    among_ranks,
    at_least_0,
    positive,
    seed_number,
    share_of_1,
    shown,
    whole_number,
)  # fmt: skip
from .progress import TrainingBar
from .tokenizer import add_text_arguments, add_vocabulary_arguments

ORDER = 7
SUMMARY = "train a new or existing BERT on text: masked words, sentence pairs, ELECTRA"

DESCRIPTION = """\
Train a new BERT on text, or train an existing one further on your text. --objective is one of

  mlm        masked words (the default)
  mlm+nsp    masked words, and whether the second of two parts follows the first or comes from another document
  mlm+sop    masked words, and whether two adjacent parts are in order
  electra    a small generator replaces words, and the model finds the replaced words

CORPUS is .txt (a sentence or a paragraph in each line, a blank line between documents), .jsonl or Parquet (a document
in each row), or a folder of these. The text is tokenised once, into files in OUT, so it may be larger than memory.

OUT is a folder for the model, which transformers reads and which 'fastbert finetune --model OUT' starts from;
report.json; metrics.jsonl (a line for each step, with the loss of each objective); curve.svg; and checkpoints. Ctrl-C
finishes the step and saves; --resume continues from there, on a CPU with the same bits as without the interruption.

Masks and order depend only on the seed, the epoch and the example, not on the number of processes, workers or parts of
a step. Logits are computed only for masked words."""

EXAMPLES = """\
examples:
  fastbert pretrain text/ --config small --objective mlm+sop --steps 10000 --eval held-out.txt --out model
  fastbert pretrain papers.jsonl --init bert-base-uncased --steps 2000 --lr 5e-5 --out adapted
  fastbert pretrain text/ --config mini --time-budget 3600 --out an-hour
  fastbert pretrain zh/ --segmenter jieba --vocab-size 21128 --steps 10000 --out chinese
  fastbert pretrain text/ --config base --objective electra --steps 100000 --max-length 512 --out electra
  torchrun --nproc-per-node 8 -m fastbert pretrain ...                       DDP; --fsdp shards the parameters"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.description, p.epilog = DESCRIPTION, EXAMPLES
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("corpus", nargs="+", metavar="CORPUS", help="files of text, or folders of such files")
    p.add_argument("--out", required=True, metavar="DIR", type=Path, help="folder for the model and the reports")
    p.add_argument("--objective", choices=("mlm", "mlm+nsp", "mlm+sop", "electra"), default="mlm", help="default: mlm")
    p.add_argument(
        "--config", metavar="SIZE",
        help="sizes of a new model: tiny, mini, small, medium, base or large, or a config.json (default: tiny)",
    )  # fmt: skip
    p.add_argument("--init", metavar="MODEL", help="train this model further, a folder or a hub id, with its tokenizer")
    p.add_argument("--eval", nargs="+", metavar="CORPUS", default=[], help="held-out text, for evaluation")

    text = p.add_argument_group("text and tokenizer")
    text.add_argument(
        "--tokenizer", metavar="train|PATH",
        help="train: make a vocabulary from the corpus (the default); or use that of a folder, a hub id or a vocab.txt "
        "(with --cased if it is cased)",
    )  # fmt: skip
    text.add_argument(
        "--vocab-size", metavar="N", type=positive,
        help="most pieces of a new vocabulary (default: 30,522)",
    )  # fmt: skip
    add_vocabulary_arguments(text)
    text.add_argument(
        "--pad-vocab", metavar="N", type=positive,
        help="round the rows of the word table up to a multiple of N; rows beyond the vocabulary are never predicted "
        "(default: 64)",
    )  # fmt: skip
    add_text_arguments(text)
    text.add_argument(
        "--segmenter", metavar="jieba|FILE",
        help="mask whole Chinese words, found by the package jieba or by a list with a word in each line",
    )  # fmt: skip

    masks = p.add_argument_group("examples and masks")
    masks.add_argument("--max-length", metavar="N", type=positive, default=128, help="most tokens (default: 128)")
    masks.add_argument(
        "--masking", choices=("clean", "google"), default="clean",
        help="clean: every word is masked with the same probability, and special or unused words never replace another "
        "(default); google: as in Google's BERT, a fixed number of tokens, and any word of the vocabulary as "
        "replacement",
    )  # fmt: skip
    masks.add_argument(
        "--mask-share", metavar="X", type=share_of_1, default=0.15, help="share of the tokens that are masked (0.15)"
    )
    masks.add_argument(
        "--no-whole-words", dest="whole_words", action="store_false",
        help="mask single pieces of words (default: all pieces of a word together)",
    )  # fmt: skip

    steps = p.add_argument_group("training")
    steps.add_argument("--steps", metavar="N", type=positive, default=0, help="optimiser steps")
    steps.add_argument(
        "--time-budget", metavar="SECONDS", type=at_least_0, default=0.0,
        help="stop after N seconds; the learning rate falls with the remaining time, and the last evaluation takes "
        "extra time (instead of --steps, or with it)",
    )  # fmt: skip
    steps.add_argument(
        "--batch-tokens", metavar="N", type=positive, default=8192, help="tokens of an optimiser step (default: 8,192)"
    )
    steps.add_argument(
        "--grow-batch", metavar="N", type=whole_number, default=0,
        help="increase the batch from a tenth of --batch-tokens to all of it during the first N steps (default: 0)",
    )  # fmt: skip
    steps.add_argument(
        "--memory-tokens", metavar="N", type=positive, default=8192,
        help="tokens computed at once; fewer need less memory and give the same gradient (default: 8,192)",
    )  # fmt: skip
    steps.add_argument(
        "--lr", metavar="X", type=at_least_0,
        help="peak of the learning rate (default, by the width of the model: 1e-3 up to 256, 5e-4 up to 512, else "
        "1e-4)",
    )  # fmt: skip
    steps.add_argument(
        "--warmup", metavar="X", type=share_of_1, default=0.1,
        help="share of all steps in which the learning rate rises; then it falls to 0 (default: 0.1)",
    )  # fmt: skip
    steps.add_argument("--weight-decay", metavar="X", type=at_least_0, default=0.01, help="default: 0.01")
    steps.add_argument(
        "--clip", metavar="X", type=at_least_0, default=1.0, help="largest norm of the gradient (default: 1)"
    )
    steps.add_argument("--dropout", metavar="X", type=share_of_1, default=0.1, help="default: 0.1")
    steps.add_argument(
        "--seed", metavar="N", type=seed_number, default=0, help="seed of weights, order, masks and dropout"
    )
    steps.add_argument(
        "--workers", metavar="N", type=whole_number, default=1,
        help="threads that prepare batches; their number changes no result (default: 1)",
    )  # fmt: skip
    steps.add_argument(
        "--evaluate-every", metavar="N", type=positive, default=1000, help="steps between evaluations (default: 1,000)"
    )
    steps.add_argument(
        "--save-every", metavar="N", type=positive, default=1000, help="steps between checkpoints (default: 1,000)"
    )
    steps.add_argument(
        "--keep", metavar="N", type=positive, default=2, help="how many checkpoints to keep (default: 2)"
    )
    steps.add_argument(
        "--resume", action="store_true", help="continue from the last checkpoint in OUT, if there is one"
    )
    steps.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="dtype of matrix products; parameters stay float32 (default: a 16-bit type if the hardware multiplies it "
        "fast)",
    )  # fmt: skip
    steps.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if there is a GPU"
    )
    steps.add_argument("--fsdp", action="store_true", help="under torchrun: shard the parameters over the processes")
    steps.add_argument(
        "--checkpoint-activations", action="store_true",
        help="save only each layer's input: less memory for one more forward pass, and the same gradients",
    )  # fmt: skip
    steps.add_argument("--impl", choices=IMPLS, help="implementation of the operators (default: the fastest)")
    p.add_argument("-q", "--quiet", action="store_true", help="no progress bar, no table")


def run(args: argparse.Namespace) -> int:
    if not args.steps and not args.time_budget:
        raise UsageError("give the length of training: --steps N, or --time-budget SECONDS")
    if args.fsdp and not among_ranks():
        raise UsageError("--fsdp needs several processes: torchrun --nproc-per-node N -m fastbert pretrain ...")
    if args.init and (args.config or args.tokenizer):
        raise UsageError("the model of --init has its own sizes and tokenizer: leave --config and --tokenizer out")
    made = {"--vocab-size": args.vocab_size, "--cased": args.cased, "--alphabet": args.alphabet,
            "--min-frequency": args.min_frequency}  # fmt: skip
    if args.tokenizer and args.tokenizer.endswith(".txt"):  # such a file does not say whether it is in lower case
        del made["--cased"]
    given = [name for name, value in made.items() if value]
    if given and (args.init or args.tokenizer not in (None, "train")):
        raise UsageError(f"{given[0]} is for a new vocabulary, and this one is given")
    if args.init and args.pad_vocab:
        raise UsageError("--pad-vocab is for a new model, and --init names an existing one")
    if args.segmenter and not args.whole_words:
        raise UsageError("--segmenter is for whole words: leave --no-whole-words out")
    if not args.mask_share:
        raise UsageError("--mask-share 0 masks nothing: give a share above 0, up to 1")
    if args.max_length < 8:
        raise UsageError(f"--max-length {args.max_length} has no room for text between [CLS] and [SEP]: 8 at least")
    from ..pretraining.pretrain import pretrain
    from ..training.memory import keep_freed_memory

    keep_freed_memory()
    with TrainingBar("pretrain", args.quiet, epochs=False) as bar:
        report = pretrain(_request(args), bar)
    if not args.quiet and os.environ.get("RANK", "0") == "0":
        _print(report, args.out)
    return 0


def _request(args: argparse.Namespace) -> Any:
    from ..pretraining.pretrain import TRAIN, Request

    same = (
        "out", "objective", "init", "cased", "alphabet", "field", "max_line_bytes", "max_length", "masking",
        "mask_share", "whole_words", "segmenter", "steps", "batch_tokens", "memory_tokens", "lr", "warmup",
        "weight_decay", "clip", "dropout", "seed", "workers", "save_every", "evaluate_every", "keep", "resume", "dtype",
        "device", "fsdp", "checkpoint_activations", "impl",
    )  # fmt: skip
    return Request(
        corpus=tuple(args.corpus), eval=tuple(args.eval), config=args.config or "tiny",
        tokenizer=args.tokenizer or TRAIN, seconds=args.time_budget, growing=args.grow_batch,
        vocab_size=args.vocab_size or 30522, min_frequency=args.min_frequency or 2, pad_vocab=args.pad_vocab or 64,
        **{name: getattr(args, name) for name in same},
    )  # fmt: skip


def _print(report: dict[str, Any], out: Path) -> None:
    """Prints the table at the end: each score with its definition."""
    print(
        f"{report['tokens']:,} tokens of {report['documents']:,} documents, {report['parameters']:,} parameters, "
        f"{report['steps']:,} steps, seed {report['seed']}"
    )
    if report["scores"]:
        print(
            f"scores on {', '.join(report['eval'])} (entropy of single tokens: {report['unigram entropy']:.4f} nats):"
        )
        for name, value in report["scores"].items():
            print(f"  {name:<24} {shown(value):>10}   {report['definitions'][name]}")
    for name in ("unknown share", "sentences in no pair", "tokens joined by the segmenter"):
        if report[name]:
            print(f"  {name}: {report[name]:.2%}" if name == "unknown share" else f"  {name}: {report[name]:,}")
    print(f"the model is in {out}")
