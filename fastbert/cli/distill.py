"""`fastbert distill`: trains a smaller model to imitate a larger one, and reports its scores."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from .options import (
    UsageError,
    add_training_arguments,
    among_ranks,
    at_least_0,
    names_between_commas,
    positive,
    same_file,
    share_of_1,
    shown,
    whole_number,
)  # fmt: skip
from .progress import TrainingBar

ORDER = 13
SUMMARY = "train a smaller BERT, the student, to imitate a larger one, the teacher"

DESCRIPTION = """\
Train a small BERT, the student, to give the same answers as a larger one, the teacher.

The teacher is a model of 'fastbert finetune', or any BERT with a head for --task, or with --mlm a BERT with a head for
masked words. DATA needs no labels, because the student learns the teacher's answers. The student is one of

  N              a model with the teacher's sizes and N layers; it begins with the weights of N of the teacher's layers
  FILE.json      a new model with the sizes of this config.json; or tiny, mini, small, medium, base, large
  DIR or ID      an existing model, with the teacher's vocabulary

--losses names the losses to minimise and their weights: NAME=WEIGHT,... (a name alone has weight 1)

  logits         KL divergence of the teacher's and student's answers, both divided by --temperature T, times T^2
  labels         cross-entropy with the labels of DATA, or with the masked words. The classifier learns from these two
  hidden         hidden states of each token, mean squared difference        compares the pairs of --layers
  cosine         hidden states of each token, by their cosine                compares the pairs of --layers
  first          first token of each text, scaled to length 1 (PKD)          compares the pairs of --layers
  embeddings     embeddings of each token, mean squared difference
  attention      attention scores before the softmax (TinyBERT)              compares the pairs of --layers
  minilm         attention probabilities, relations of values (MiniLM)       compares the last layers
  minilm2        relations of queries, of keys, of values (MiniLMv2)         compares the last layers, with any heads

Layers count from 0. If the student has another width, its hidden states go through a linear layer, which is trained but
not saved. Nothing is computed for padding, and each loss is divided by the texts or tokens of the optimiser step.

OUT is a folder like that of 'fastbert finetune' (with --mlm, of 'fastbert pretrain'): transformers reads it, and
'fastbert predict', 'encode' and 'serve' run it. Ctrl-C finishes the step and saves; --resume continues from there."""

EXAMPLES = """\
examples:
  fastbert distill --teacher sentiment --student 3 --task sentence --data reviews.tsv --eval dev.tsv --out small
  fastbert distill --teacher sentiment --student 3 --task sentence --data train.tsv --eval dev.tsv --out small \\
      --losses logits,labels=0.5,hidden --temperature 4 --epochs 4 --lr 2e-4
  fastbert distill --teacher entities --student narrow.json --task token --data text.conll --out small
  fastbert distill --teacher bert-base-uncased --student 6 --mlm --data text/ --steps 20000 --out distilbert \\
      --losses logits,labels,cosine --layers 1,3,5,7,9,11
  fastbert distill --teacher bert-base-uncased --student small --mlm --data text/ --steps 20000 --out minilm \\
      --losses minilm2 --relation-heads 48

A student that learns hidden states first and answers afterwards, as TinyBERT does:
  fastbert distill --teacher T --student 3 --task pair --data F --losses hidden,attention,embeddings --out first
  fastbert distill --teacher T --student first --task pair --data F --losses logits --out second"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.description, p.epilog = DESCRIPTION, EXAMPLES
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("--teacher", required=True, metavar="DIR", help="the model to learn from")
    p.add_argument("--student", required=True, metavar="N|CONFIG|MODEL", help="the model that learns; see above")
    kind = p.add_mutually_exclusive_group(required=True)
    kind.add_argument("--task", choices=("sentence", "pair", "token", "qa"), help="the teacher's task")
    kind.add_argument("--mlm", action="store_true", help="train on masked words of plain text, without a task")
    p.add_argument(
        "--data", required=True, nargs="+", metavar="DATA",
        help="training texts: a file as for 'fastbert finetune', with or without labels; with --mlm files or folders "
        "of text as for 'fastbert pretrain'",
    )  # fmt: skip
    p.add_argument(
        "--eval", nargs="+", metavar="FILE", default=[], help="labelled examples, or with --mlm text, for evaluation"
    )
    p.add_argument("--out", required=True, metavar="DIR", type=Path, help="folder for the model and the reports")

    method = p.add_argument_group("what is learnt")
    method.add_argument(
        "--losses",
        metavar="NAME=W,...",
        type=losses_by_name,
        default={"logits": 1.0},
        help="see above (default: logits)",
    )
    method.add_argument(
        "--temperature", metavar="T", type=at_least_0, default=2.0,
        help="for the loss logits: 1 uses the teacher's probabilities unchanged; a higher temperature gives more "
        "weight to its less probable answers (default: 2)",
    )  # fmt: skip
    method.add_argument(
        "--layers", metavar="skip|last|first|N,...|S:T,...", default="skip",
        help="which of the teacher's layers each of the student's is compared with: evenly spread and ending with the "
        "last one (skip, the default), the last ones, the first ones, a number for each, or STUDENT:TEACHER for some",
    )  # fmt: skip
    method.add_argument(
        "--relation-layer", metavar="N", type=whole_number,
        help="for minilm and minilm2: the teacher's layer (default: the last)",
    )  # fmt: skip
    method.add_argument(
        "--relation-heads", metavar="N", type=positive,
        help="for minilm2: the number of heads into which both models are divided (default: the teacher's)",
    )  # fmt: skip
    method.add_argument(
        "--init", metavar="skip|last|first|N,...|bottleneck|new",
        help="initial weights of a new student: layers of the teacher, chosen as with --layers (skip, last, first); "
        "the teacher's weights projected to another width (bottleneck); or random weights (new) (default: skip if the "
        "width is the same, else bottleneck)",
    )  # fmt: skip

    task = p.add_argument_group("options of --task (default: those with which the teacher was fine-tuned)")
    task.add_argument(
        "--columns",
        metavar="NAME,...",
        type=names_between_commas,
        help="columns of a table: its text or texts, and its label",
    )
    task.add_argument("--metric", help="the score that decides which model is best; see 'fastbert finetune --help'")
    task.add_argument(
        "--max-length", metavar="N", type=positive, help="tokens of a text or window (with --mlm: default 128)"
    )
    task.add_argument("--stride", metavar="N", type=whole_number, help="tokens that neighbouring windows share")

    words = p.add_argument_group("masked words")
    words.add_argument("--steps", metavar="N", type=positive, help="optimiser steps; needed with --mlm")
    words.add_argument("--mask-share", metavar="X", type=share_of_1, help="share of the tokens that are masked (0.15)")
    words.add_argument("--evaluate-every", metavar="N", type=positive, help="steps between evaluations (1,000)")

    add_training_arguments(
        p.add_argument_group(
            "training", "With --mlm, --lr has the default of 'fastbert pretrain', and there is no --epochs."
        )
    )
    p.set_defaults(lr=None, epochs=None)
    p.add_argument("-q", "--quiet", action="store_true", help="no progress bar, no table")


def losses_by_name(text: str) -> dict[str, float]:
    # The names of distilled.LOSSES, repeated here so that --help does not import torch.
    known = ("labels", "logits", "hidden", "cosine", "first", "embeddings", "attention", "minilm", "minilm2")
    found: dict[str, float] = {}
    for part in text.split(","):
        name, sign, weight = (word.strip() for word in part.partition("="))
        if name not in known or name in found:
            why = "comes twice" if name in found else f"is none of {', '.join(known)}"
            raise argparse.ArgumentTypeError(f"{name!r} {why}")
        found[name] = at_least_0(weight) if sign else 1.0
        if not found[name]:
            raise argparse.ArgumentTypeError(f"the weight of {name} is 0: leave it out")
    return found


def run(args: argparse.Namespace) -> int:
    if args.fsdp and not among_ranks():
        raise UsageError("--fsdp needs several processes: torchrun --nproc-per-node N -m fastbert distill ...")
    if args.temperature == 0.0:
        raise UsageError("--temperature divides the logits, and must be above 0")
    if same_file(args.teacher, args.out):
        raise UsageError(f"--out {args.out} is the teacher's folder: give another")
    _expect_one_kind(args)
    _expect_losses(args)
    from ..compression.distill import distill, distill_words
    from ..training.memory import keep_freed_memory

    keep_freed_memory()
    method = _method(args)
    with TrainingBar("distill", args.quiet, epochs=not args.mlm) as bar:
        if args.mlm:
            report = distill_words(_words_request(args), method, bar)
        else:
            report = distill(_task_request(args), method, _changes(args), bar)
    if not args.quiet and os.environ.get("RANK", "0") == "0":
        _print(report, args.out)
    return 0


def _expect_one_kind(args: argparse.Namespace) -> None:
    """Raises UsageError for options of --task with --mlm, and the other way round."""
    of_words, of_tasks = ("steps", "mask_share", "evaluate_every"), ("columns", "metric", "stride", "epochs", "average")
    given = [name for name in (of_tasks if args.mlm else of_words) if getattr(args, name)]
    defaults = {"patience": 0, "evaluations": 1, "layer_decay": 1.0}
    changed = [name for name, value in defaults.items() if getattr(args, name) != value]
    if given or (args.mlm and changed):
        name = [*given, *changed][0].replace("_", "-")
        raise UsageError(f"--{name} is for {'--task' if args.mlm else '--mlm'}")
    if args.mlm and not args.steps:
        raise UsageError("--mlm needs --steps, the number of optimiser steps")
    if not args.mlm and (len(args.data) > 1 or len(args.eval) > 1):
        raise UsageError("--task reads one file: put all examples into it")
    for name in ("patience", "evaluations"):
        if name in changed and not args.eval:
            raise UsageError(f"--{name} is an option of evaluation, and needs --eval")
    if args.columns and args.task in ("token", "qa"):
        raise UsageError(f"--columns is for tables, and --task {args.task} reads none")


def _expect_losses(args: argparse.Namespace) -> None:
    """Raises UsageError for an option of a loss that --losses does not name."""
    defaults = {"temperature": 2.0, "layers": "skip", "relation_layer": None, "relation_heads": None}
    of = {
        "temperature": ("logits",), "layers": ("hidden", "cosine", "first", "attention"),
        "relation_layer": ("minilm", "minilm2"), "relation_heads": ("minilm2",),
    }  # fmt: skip
    for name, default in defaults.items():
        if getattr(args, name) != default and not args.losses.keys() & {*of[name]}:
            raise UsageError(f"--{name.replace('_', '-')} is for the losses {', '.join(of[name])}: --losses has none")


def _method(args: argparse.Namespace) -> Any:
    from ..compression.distill import Method

    return Method(
        args.student, args.init, args.losses, args.temperature, args.layers, args.relation_layer, args.relation_heads
    )


_SAME = (
    "out", "memory_tokens", "warmup", "weight_decay", "clip", "seed", "keep", "resume", "dtype", "device", "fsdp",
    "checkpoint_activations", "impl",
)  # fmt: skip


def _task_request(args: argparse.Namespace) -> Any:
    from ..training.finetune import Request
    from ..training.tasks import DEFAULT_METRICS, Spec

    # For a teacher that has no spec of its own.
    spec = Spec(args.task, DEFAULT_METRICS[args.task], max_length=384 if args.task == "qa" else 128)
    own = ("batch_tokens", "layer_decay", "evaluations", "patience", "average", "save_every", "stride")
    given = {name: getattr(args, name) for name in ("epochs", "lr") if getattr(args, name) is not None}
    return Request(
        model=args.teacher, train=args.data[0], spec=spec, eval=args.eval[0] if args.eval else None, **given,
        **{name: getattr(args, name) for name in (*_SAME, *own)},
    )  # fmt: skip


def _changes(args: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(args, name) for name in ("columns", "metric", "max_length")}
    return {name: value for name, value in given.items() if value is not None}


def _words_request(args: argparse.Namespace) -> Any:
    from ..pretraining.pretrain import Request

    given = {"max_length": args.max_length, "mask_share": args.mask_share, "evaluate_every": args.evaluate_every,
             "save_every": args.save_every or None, "batch_tokens": args.batch_tokens}  # fmt: skip
    return Request(
        corpus=tuple(args.data), eval=tuple(args.eval), config=args.student, tokenizer=args.teacher, steps=args.steps,
        lr=args.lr, **{name: value for name, value in given.items() if value is not None},
        **{name: getattr(args, name) for name in _SAME},
    )  # fmt: skip


def _print(report: dict[str, Any], out: Path) -> None:
    """Prints the table at the end: each score with its definition, and the teacher's score."""
    share = report["parameters"] / report["parameters of the teacher"]
    print(
        f"{report['layers']} layers beside the teacher's {report['layers of the teacher']}, {report['parameters']:,} "
        f"parameters, {share:.0%} of the teacher's; seed {report['seed']}"
    )
    of_teacher = report.get("scores of the teacher")
    for name, value in (report.get("scores") or {}).items():
        beside = "" if of_teacher is None else f"   teacher {shown(of_teacher[name]):>9}"
        print(f"  {name:<20} {shown(value):>9}{beside}   {report['definitions'][name]}")
    print(f"the student is in {out}")
