"""`fastbert finetune`: a BERT trained for one task from files, and the report of what came of it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from .options import (
    UsageError,
    add_training_arguments,
    among_ranks,
    default_model,
    names_between_commas,
    positive,
    shown,
    whole_number,
)  # fmt: skip
from .progress import TrainingBar

ORDER = 3
SUMMARY = "train a BERT for a task of yours: labels for texts or pairs, entities, answers"

DESCRIPTION = """\
Train a BERT for one of four tasks, from a file of examples, and measure it on another.

  sentence   a label or a number for a text
  pair       a label or a number for two texts
  token      a tag for each word: entities
  qa         the part of a text that answers a question

Files: tables with a header (.tsv, where a quote is a letter; .csv; .jsonl) for sentence and pair, CoNLL columns (word
first, tag last, an empty line between sentences) for token, JSON of SQuAD 1.1 or 2.0 for qa. Labels are names.

The folder OUT then holds the best model, which transformers reads and 'fastbert predict' runs, and
report.json, where every number says what it measures; metrics.jsonl, a line a step; curve.svg; and checkpoints.
Ctrl-C finishes the step, saves, and --resume goes on from there, to the same bits on a CPU.

Texts are packed without padding. An optimiser step takes --batch-tokens tokens, however many processes compute it and
in however many parts: the loss is divided once, by the examples (labelled words, questions' windows) of the step."""

EXAMPLES = """\
examples:
  fastbert finetune --task sentence --train train.tsv --eval dev.tsv --out sentiment
  fastbert finetune --task pair --train SICK_train.txt --eval SICK_trial.txt --out entailment \\
      --columns sentence_A,sentence_B,entailment_judgment
  fastbert finetune --task pair --train SICK_train.txt --eval SICK_trial.txt --out relatedness \\
      --columns sentence_A,sentence_B,relatedness_score --labels number --metric pearson
  fastbert finetune --task token --model bert-base-cased --train train.conll --eval dev.conll --out entities
  fastbert finetune --task qa --train train-v2.0.json --eval dev-v2.0.json --metric squad_v2 --out answers
  torchrun --nproc-per-node 8 -m fastbert finetune --task qa ...             DDP; --fsdp shards the parameters"""

TASK_METRICS = {
    "sentence, pair": "accuracy (default), f1 (of the second of two labels), f1_macro, matthews; pearson, spearman; "
    "with --multi-label f1_micro (default), f1_macro, subset_accuracy",
    "token": "entity_f1 (default, conlleval's), strict_f1 (strict IOB2), surface_f1 (WNUT-17's)",
    "qa": "squad (default), squad_v2, cmrc, drcd",
}


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.description, p.epilog = DESCRIPTION, EXAMPLES
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("--task", required=True, choices=("sentence", "pair", "token", "qa"))
    p.add_argument("--train", required=True, metavar="FILE", help="the examples to learn from")
    p.add_argument("--eval", metavar="FILE", help="examples to measure on after each epoch; the best model is kept")
    p.add_argument("--out", required=True, metavar="DIR", type=Path, help="a folder for all that comes of it")
    p.add_argument("--model", metavar="ID_OR_PATH", help="the BERT to begin with (default: all-MiniLM-L6-v2)")
    p.add_argument(
        "--columns",
        metavar="NAME,...",
        type=names_between_commas,
        default=(),
        help="of a table, its columns for the text or both texts and the label (default: text or sentence; sentence1 "
        "and sentence2, text1 and text2, premise and hypothesis, or question and sentence; label)",
    )
    p.add_argument(
        "--labels",
        metavar="NAME,...",
        type=names_between_commas,
        default=(),
        help="the labels and their order, or the word number where labels are numbers (default: the labels of the "
        "model's own classifier, else those of the training file, sorted)",
    )
    p.add_argument(
        "--multi-label", action="store_true",
        help="a text has any number of labels: names with | between them in a table, a list of names in .jsonl",
    )  # fmt: skip
    p.add_argument(
        "--class-weights", metavar="none|balanced|NAME=W,...", default="none",
        help="how much an example or word of each label counts in the loss, which stays a mean: all the same (none, "
        "the default), each label as much as every other (balanced), or W, and 1 for labels without one",
    )  # fmt: skip
    metrics = "; ".join(f"{task}: {names}" for task, names in TASK_METRICS.items())
    p.add_argument("--metric", help=f"the score that decides which model is best. {metrics}")
    p.add_argument("--max-length", metavar="N", type=positive, help="tokens of a text or window (default: 128, qa 384)")
    p.add_argument(
        "--stride",
        metavar="N",
        type=whole_number,
        help="tokens that neighbouring windows of a long text share (default: token 32, qa 128, a third at most)",
    )
    p.add_argument("--max-answer", metavar="N", type=positive, default=30, help="tokens of an answer (default: 30)")
    add_training_arguments(p)
    p.add_argument(
        "--freeze", metavar="N", type=whole_number, help="do not train the embeddings and the first N layers"
    )
    p.add_argument(
        "--no-bias-correction",
        action="store_true",
        help="AdamW as in Google's BERT, which does not correct its moments for their start at 0",
    )
    p.add_argument(
        "--seeds", metavar="N", type=positive, default=1,
        help="run N seeds from --seed on, each into OUT/seed-N; OUT gets the best one, and median and range",
    )  # fmt: skip
    p.add_argument(
        "--tensorboard", action="store_true",
        help="also write what metrics.jsonl has into OUT/tensorboard (needs the package tensorboard)",
    )  # fmt: skip
    p.add_argument("-q", "--quiet", action="store_true", help="no progress bar, no table")


def run(args: argparse.Namespace) -> int:
    if args.fsdp and not among_ranks():
        raise UsageError("--fsdp needs several processes: torchrun --nproc-per-node N -m fastbert finetune ...")
    if args.seeds > 1 and not args.eval:
        raise UsageError("--seeds compares runs by their metric, and needs --eval")
    if args.columns and args.task in ("token", "qa"):
        raise UsageError(f"--columns is for tables, and --task {args.task} reads none")
    if args.multi_label and args.task in ("token", "qa"):
        raise UsageError(f"--multi-label is for texts and pairs, not for --task {args.task}")
    if args.patience and not args.eval:
        raise UsageError("--patience waits for a better metric, and needs --eval")
    if args.evaluations > 1 and not args.eval:
        raise UsageError("--evaluations says how often to measure, and needs --eval")
    from ..training.finetune import finetune, several
    from ..training.memory import keep_freed_memory

    keep_freed_memory()
    request = _request(args)
    with TrainingBar("finetune", args.quiet) as bar:
        report = several(request, args.seeds, bar) if args.seeds > 1 else finetune(request, bar)
    if not args.quiet and os.environ.get("RANK", "0") == "0":
        print_report(report, args.out)
    return 0


def _request(args: argparse.Namespace) -> Any:
    from ..training.finetune import Request
    from ..training.tasks import DEFAULT_METRICS, NUMBERS, Spec

    default = "f1_micro" if args.multi_label else "pearson" if args.labels == NUMBERS else DEFAULT_METRICS[args.task]
    metric = args.metric or default
    length = args.max_length or (384 if args.task == "qa" else 128)
    spec = Spec(args.task, metric, args.columns, length, longest=args.max_answer, multi_label=args.multi_label)
    return Request(
        model=args.model or default_model(), train=args.train, out=args.out, spec=spec, stride=args.stride,
        eval=args.eval, labels=args.labels, epochs=args.epochs, batch_tokens=args.batch_tokens,
        memory_tokens=args.memory_tokens,
        lr=args.lr, seed=args.seed, warmup=args.warmup, weight_decay=args.weight_decay, clip=args.clip,
        layer_decay=args.layer_decay, freeze=args.freeze, bias_correction=not args.no_bias_correction,
        evaluations=args.evaluations, patience=args.patience, average=args.average,
        save_every=args.save_every, keep=args.keep, resume=args.resume, dtype=args.dtype,
        device=args.device, fsdp=args.fsdp, impl=args.impl, class_weights=args.class_weights,
        checkpoint_activations=args.checkpoint_activations, tensorboard=args.tensorboard,
    )  # fmt: skip


def print_report(report: dict[str, Any], out: Path) -> None:
    """The table at the end, on standard output: each score with its definition, and what was lost on the way."""
    examples, windows, epochs = report["examples"], report["windows"], report["epochs"]
    print(f"{examples:,} examples in {windows:,} windows, epochs: {epochs}, seed {report['seed']}")
    if report.get("scores"):
        whole, best, metric = report["evaluation examples"], report["best epoch"], report["metric"]
        print(f"of {whole:,} examples of {report['eval']}, after epoch {best}, the best of these by {metric}:")
    for name, value in (report.get("scores") or {}).items():
        print(f"  {name:<20} {shown(value):>9}   {report['definitions'][name]}")
    if "seeds" in report:
        seeds = report["seeds"]
        median, lowest, highest = (shown(seeds[name]) for name in ("median", "lowest", "highest"))
        count = len(seeds["values"])
        print(
            f"  {seeds['metric']} of {count} seeds: median {median}, from {lowest} to {highest}; the model is the best"
        )
    if report["class weights"] is not None:
        weights = zip(report["labels"], report["class weights"], strict=True)
        print(f"  weights in the loss: {', '.join(f'{label} {weight:.4g}' for label, weight in weights)}")
    for part in ("files", "training notes", "evaluation notes"):
        for what, count in (report[part] or {}).items():
            if count:
                print(f"  {part}: {what}: {count:,}")
    print(f"the model is in {out}")
