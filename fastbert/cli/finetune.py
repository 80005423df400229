"""`fastbert finetune`: trains a BERT for one task from files, and reports its scores."""

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
SUMMARY = "train a BERT for your task: labels for texts or pairs, entities, answers"

DESCRIPTION = """\
Train a BERT for one of four tasks with a file of examples, and evaluate it with another file.

  sentence   a label or a number for a text
  pair       a label or a number for two texts
  token      a tag for each word: entities
  qa         the part of a text that answers a question

Files: for sentence and pair a table with a header (.csv, .jsonl, or .tsv, where quotes have no meaning); for token
CoNLL columns (word first, tag last, an empty line between sentences); for qa JSON of SQuAD 1.1 or 2.0. Labels are
names.

OUT is a folder for the best model, which transformers reads and 'fastbert predict' runs; report.json, the scores with
their definitions; metrics.jsonl, a line for each step; curve.svg; and checkpoints. Ctrl-C finishes the step and saves;
--resume continues from there, on a CPU with the same bits as without the interruption.

Texts are packed without padding. An optimiser step has --batch-tokens tokens. Its gradient does not depend on how many
processes or parts compute it: the sum of losses is divided once by the step's examples (labelled words, windows)."""

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
    p.add_argument("--train", required=True, metavar="FILE", help="training examples")
    p.add_argument("--eval", metavar="FILE", help="examples for an evaluation after each epoch; the best model is kept")
    p.add_argument("--out", required=True, metavar="DIR", type=Path, help="folder for the model and the reports")
    p.add_argument("--model", metavar="ID_OR_PATH", help="the BERT to start from (default: all-MiniLM-L6-v2)")
    p.add_argument(
        "--columns",
        metavar="NAME,...",
        type=names_between_commas,
        default=(),
        help="columns of a table: its text, or both texts, and its label (default: text or sentence; for pairs "
        "sentence1 and sentence2, text1 and text2, premise and hypothesis, or question and sentence; and label)",
    )
    p.add_argument(
        "--labels",
        metavar="NAME,...",
        type=names_between_commas,
        default=(),
        help="the labels in order, or the word number if labels are numbers (default: the labels of the model's own "
        "classifier, else those of the training file, sorted)",
    )
    p.add_argument(
        "--multi-label", action="store_true",
        help="a text can have several labels or none: names separated by | in a table, a list of names in .jsonl",
    )  # fmt: skip
    p.add_argument(
        "--class-weights", metavar="none|balanced|NAME=W,...", default="none",
        help="the weight of an example or word in the loss, a weighted mean: equal for all (none, the default); by "
        "label so that all labels have the same total (balanced); or W for the named labels, and 1 for the others",
    )  # fmt: skip
    metrics = "; ".join(f"{task}: {names}" for task, names in TASK_METRICS.items())
    p.add_argument("--metric", help=f"the score that decides which model is best. {metrics}")
    p.add_argument("--max-length", metavar="N", type=positive, help="tokens of a text or window (default: 128, qa 384)")
    p.add_argument(
        "--stride",
        metavar="N",
        type=whole_number,
        help="tokens that adjacent windows of a long text share (default: token 32, qa 128, at most a third)",
    )
    p.add_argument(
        "--max-answer", metavar="N", type=positive, default=30, help="most tokens of an answer (default: 30)"
    )
    add_training_arguments(p)
    p.add_argument(
        "--freeze", metavar="N", type=whole_number, help="do not train the embeddings and the first N layers"
    )
    p.add_argument(
        "--no-bias-correction",
        action="store_true",
        help="AdamW as in Google's BERT, without bias correction of the moments",
    )
    p.add_argument(
        "--seeds", metavar="N", type=positive, default=1,
        help="train N times, with seeds from --seed on, into OUT/seed-...; OUT gets the best model, median and range",
    )  # fmt: skip
    p.add_argument(
        "--tensorboard", action="store_true",
        help="also write the metrics into OUT/tensorboard (needs the package tensorboard)",
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
        raise UsageError("--patience depends on evaluations, and needs --eval")
    if args.evaluations > 1 and not args.eval:
        raise UsageError("--evaluations is the number of evaluations, and needs --eval")
    from ..compression.folders import continue_steps, history_of
    from ..training.finetune import finetune, several
    from ..training.memory import keep_freed_memory

    keep_freed_memory()
    request = _request(args)
    history_of(request.model)
    with TrainingBar("finetune", args.quiet) as bar:
        report = several(request, args.seeds, bar) if args.seeds > 1 else finetune(request, bar)
    if os.environ.get("RANK", "0") != "0":
        return 0
    continue_steps(request.model, args.out, {"command": "finetune", "model": request.model})
    if not args.quiet:
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
    """Prints the table at the end: each score with its definition, and counts of examples that were dropped or cut."""
    examples, windows, epochs = report["examples"], report["windows"], report["epochs"]
    print(f"{examples:,} examples in {windows:,} windows, epochs: {epochs}, seed {report['seed']}")
    if report.get("scores"):
        whole, best, metric = report["evaluation examples"], report["best epoch"], report["metric"]
        print(f"scores on {whole:,} examples of {report['eval']} after epoch {best}, which is the best by {metric}:")
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
