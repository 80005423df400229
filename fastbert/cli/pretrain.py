"""`fastbert pretrain`: a BERT from text, and the report of what came of it."""

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
SUMMARY = "train a BERT from text, or go on from one: masked words, sentence pairs, ELECTRA"

DESCRIPTION = """\
Train a BERT from text, or go on from an existing one with text of yours.

  mlm        masked words (the default)
  mlm+nsp    and whether the second of two parts follows the first, or is of another document
  mlm+sop    and whether two neighbouring parts are in order
  electra    a small generator puts words in the place of others, and the model finds them

Text: .txt (a sentence or a paragraph a line, a blank line between documents), .jsonl or Parquet (a document each), or
folders of these. It is tokenised once, into files in OUT, so that it may be larger than memory.

The folder OUT then holds the model, which transformers reads and 'fastbert finetune --model OUT' goes on from,
report.json, metrics.jsonl (a line a step, with the loss of each objective), curve.svg, and checkpoints. Ctrl-C finishes
the step, saves, and --resume goes on from there, to the same bits on a CPU.

Masks and order are a function of the seed, the epoch and the example: the same for any number of processes, workers
and parts of a step. Logits are computed only where a word is masked."""

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
    p.add_argument("--out", required=True, metavar="DIR", type=Path, help="a folder for all that comes of it")
    p.add_argument("--objective", choices=("mlm", "mlm+nsp", "mlm+sop", "electra"), default="mlm", help="default: mlm")
    p.add_argument(
        "--config", metavar="SIZE",
        help="tiny, mini, small, medium, base or large, or a config.json (default: tiny)",
    )  # fmt: skip
    p.add_argument("--init", metavar="MODEL", help="go on from this model, a folder or a hub id, with its tokenizer")
    p.add_argument("--eval", nargs="+", metavar="CORPUS", default=[], help="text that was held back, to measure on")

    text = p.add_argument_group("text and tokenizer")
    text.add_argument(
        "--tokenizer", metavar="train|PATH",
        help="make a vocabulary of the corpus (train, the default), or that of a folder, a hub id or a vocab.txt",
    )  # fmt: skip
    text.add_argument(
        "--vocab-size", metavar="N", type=positive,
        help="pieces at most of a vocabulary that is made (default: 30,522)",
    )  # fmt: skip
    add_vocabulary_arguments(text)
    text.add_argument(
        "--pad-vocab", metavar="N", type=positive,
        help="the table of words gets a multiple of N rows; those beyond the vocabulary are never predicted "
        "(default: 64)",
    )  # fmt: skip
    add_text_arguments(text)
    text.add_argument(
        "--segmenter", metavar="jieba|FILE",
        help="mask whole Chinese words, as jieba cuts them (a package of its own) or by a list, a word a line",
    )  # fmt: skip

    masks = p.add_argument_group("examples and masks")
    masks.add_argument("--max-length", metavar="N", type=positive, default=128, help="tokens at most (default: 128)")
    masks.add_argument(
        "--masking", choices=("clean", "google"), default="clean",
        help="clean: each word with the same chance, and no special or unused word in the place of another (default); "
        "google: as Google's BERT, a fixed number of tokens, replaced by any word of the vocabulary",
    )  # fmt: skip
    masks.add_argument(
        "--mask-share", metavar="X", type=share_of_1, default=0.15, help="of the tokens, that are guessed (0.15)"
    )
    masks.add_argument(
        "--no-whole-words", dest="whole_words", action="store_false",
        help="mask pieces of words by themselves (default: a word's pieces together)",
    )  # fmt: skip

    steps = p.add_argument_group("training")
    steps.add_argument("--steps", metavar="N", type=positive, default=0, help="optimiser steps")
    steps.add_argument(
        "--time-budget", metavar="SECONDS", type=at_least_0, default=0.0,
        help="end after so many seconds, with a learning rate that falls with the time left; the last evaluation comes "
        "on top (in place of --steps, or beside it)",
    )  # fmt: skip
    steps.add_argument(
        "--batch-tokens", metavar="N", type=positive, default=8192, help="tokens of an optimiser step (default: 8,192)"
    )
    steps.add_argument(
        "--grow-batch", metavar="N", type=whole_number, default=0,
        help="grow the step from a tenth of --batch-tokens to all of it over the first N steps (default: 0)",
    )  # fmt: skip
    steps.add_argument(
        "--memory-tokens", metavar="N", type=positive, default=8192,
        help="tokens computed at once; fewer take less memory and change no gradient (default: 8,192)",
    )  # fmt: skip
    steps.add_argument(
        "--lr", metavar="X", type=at_least_0,
        help="the peak of the learning rate (default: by the width of the model, 1e-3 up to 256, 5e-4 up to 512, "
        "else 1e-4)",
    )  # fmt: skip
    steps.add_argument(
        "--warmup", metavar="X", type=share_of_1, default=0.1,
        help="share of all steps in which the rate rises; then it falls to 0 (default: 0.1)",
    )  # fmt: skip
    steps.add_argument("--weight-decay", metavar="X", type=at_least_0, default=0.01, help="default: 0.01")
    steps.add_argument(
        "--clip", metavar="X", type=at_least_0, default=1.0, help="the gradient's largest norm (default: 1)"
    )
    steps.add_argument("--dropout", metavar="X", type=share_of_1, default=0.1, help="default: 0.1")
    steps.add_argument("--seed", metavar="N", type=seed_number, default=0, help="of weights, order, masks and dropout")
    steps.add_argument(
        "--workers", metavar="N", type=whole_number, default=1,
        help="threads that make coming batches; they change no result (default: 1)",
    )  # fmt: skip
    steps.add_argument(
        "--evaluate-every", metavar="N", type=positive, default=1000, help="steps between evaluations (default: 1,000)"
    )
    steps.add_argument(
        "--save-every", metavar="N", type=positive, default=1000, help="steps between checkpoints (default: 1,000)"
    )
    steps.add_argument("--keep", metavar="N", type=positive, default=2, help="how many checkpoints stay (default: 2)")
    steps.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUT, if there is one")
    steps.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="of matrix products; parameters stay float32 (default: what the hardware multiplies fast)",
    )  # fmt: skip
    steps.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if there is one"
    )
    steps.add_argument("--fsdp", action="store_true", help="under torchrun: shard the parameters over the processes")
    steps.add_argument(
        "--checkpoint-activations", action="store_true",
        help="keep of each layer its input alone: less memory for one more forward pass, the same gradients",
    )  # fmt: skip
    steps.add_argument("--impl", choices=IMPLS, help="who computes the operators (default: the fastest)")
    p.add_argument("-q", "--quiet", action="store_true", help="no progress bar, no table")


def run(args: argparse.Namespace) -> int:
    if not args.steps and not args.time_budget:
        raise UsageError("say how long to train: --steps N, or --time-budget SECONDS")
    if args.fsdp and not among_ranks():
        raise UsageError("--fsdp needs several processes: torchrun --nproc-per-node N -m fastbert pretrain ...")
    if args.init and (args.config or args.tokenizer):
        raise UsageError("--init brings its own sizes and tokenizer: leave --config and --tokenizer out")
    made = {"--vocab-size": args.vocab_size, "--cased": args.cased, "--alphabet": args.alphabet,
            "--min-frequency": args.min_frequency}  # fmt: skip
    given = [name for name, value in made.items() if value]
    if given and (args.init or args.tokenizer not in (None, "train")):
        raise UsageError(f"{given[0]} is for a vocabulary that is made, and this one is given")
    if args.init and args.pad_vocab:
        raise UsageError("--pad-vocab is for a new model, and --init goes on from one")
    if args.segmenter and not args.whole_words:
        raise UsageError("--segmenter is for whole words: leave --no-whole-words out")
    if not args.mask_share:
        raise UsageError("--mask-share 0 leaves nothing to be guessed: give a share above 0, up to 1")
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
    """The table at the end, on standard output: each score with its definition."""
    print(
        f"{report['tokens']:,} tokens of {report['documents']:,} documents, {report['parameters']:,} parameters, "
        f"{report['steps']:,} steps, seed {report['seed']}"
    )
    if report["scores"]:
        print(f"of {', '.join(report['eval'])}, where a word alone has {report['unigram entropy']:.4f} nats:")
        for name, value in report["scores"].items():
            print(f"  {name:<24} {shown(value):>10}   {report['definitions'][name]}")
    for name in ("unknown share", "sentences in no pair", "tokens joined by the segmenter"):
        if report[name]:
            print(f"  {name}: {report[name]:.2%}" if name == "unknown share" else f"  {name}: {report[name]:,}")
    print(f"the model is in {out}")
