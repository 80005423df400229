"""`fastbert prune`: removes heads, feed-forward columns, layers or weights from a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import IMPLS, UsageError, positive
from .retraining import add_training_arguments, expect_free_or_begun, expect_training, training_request, whole_numbers

ORDER = 14
SUMMARY = "remove heads, feed-forward columns or layers of a model, or set single weights to zero"

DESCRIPTION = """\
Remove parts of a model and write the smaller model into a new folder, with the tokenizer and all other files.

  --heads 0:1,3;2:5   attention heads by name: heads 1 and 3 of layer 0, and head 5 of layer 2
  --heads 0.5         half of all heads, those with the least effect on the loss on --data
  --ffn 0.5           half of the feed-forward columns of each layer, those with the least effect on --data
  --layers 1,3,5      whole layers; the remaining ones are numbered again
  --magnitude 0.8     80% of the single weights are set to zero, those of least magnitude

The first four make the matrices smaller, so the model is faster and its file shorter. They can be combined, and use
MODEL's numbers of layers and heads, which begin with 0. A layer may lose all of its heads, but not all layers may.

--magnitude does not change shapes: zeros in a matrix give no speed, here or in any other library of dense products.
With --train, more and more weights become zero while the others are trained (a cubic schedule over the first two thirds
of the steps), which loses far less than setting all at once. The best model of the evaluations after that is kept.
Ctrl-C finishes the step and saves; --resume continues from there.

After removing parts, fine-tune the model again: 'fastbert finetune --model OUT ...'. 'predict', 'encode' and 'serve'
read OUT like any other folder. transformers reads it if no head is missing; its version 5 does not support pruned
heads."""

EXAMPLES = """\
examples:
  fastbert prune sentiment -o smaller --heads 0.5 --data train.tsv
  fastbert finetune --task sentence --model smaller --train train.tsv --eval dev.tsv --epochs 1 --out smaller-tuned
  fastbert prune sentiment -o smaller --heads "0:1,3;2:5" --layers 5
  fastbert prune sentiment -o half --ffn 0.5 --heads 0.25 --data train.tsv
  fastbert prune sentiment -o sparse --magnitude 0.8 --train train.tsv --eval dev.tsv --epochs 2"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.description, p.epilog = DESCRIPTION, EXAMPLES
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("model", metavar="MODEL", help="a folder or hub id of a BERT; for shares of heads and columns "
                   "a folder of fastbert finetune")  # fmt: skip
    p.add_argument(
        "-o", "--out", required=True, metavar="OUT", type=Path, help="where to write; must not exist yet, or be empty"
    )
    p.add_argument(
        "--heads", metavar="LIST|SHARE", type=_heads, help="heads to remove: by number, or a share by importance"
    )
    p.add_argument("--ffn", metavar="SHARE", type=_share, help="share of each layer's feed-forward columns to remove")
    p.add_argument("--layers", metavar="N,...", type=whole_numbers, default=(), help="layers that go")
    p.add_argument("--magnitude", metavar="SHARE", type=_share, help="share of the layers' weights to set to zero")
    p.add_argument(
        "--scope", choices=("global", "layer"),
        help="with --magnitude: the smallest weights of all matrices together (global, the default) or of each (layer)",
    )  # fmt: skip
    p.add_argument("--data", metavar="FILE", help="labelled examples; importance is the effect on their loss")
    p.add_argument(
        "--examples", metavar="N", type=positive, default=1024,
        help="how many examples of --data to use, drawn by --seed (default: 1,024)",
    )  # fmt: skip
    add_training_arguments(p, "set weights to zero step by step while training on these")
    p.add_argument("--impl", choices=IMPLS, help="implementation of the operators (default: the fastest)")
    p.add_argument("-q", "--quiet", action="store_true", help="print nothing")


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < 1.0:
        raise argparse.ArgumentTypeError(f"expected a share between 0 and 1, got {text!r}")
    return value


def _heads(text: str) -> str | float:
    if ":" in text:
        return text
    try:
        return _share(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; heads by name are LAYER:HEAD,... such as 0:1,3;2:5") from None


def run(args: argparse.Namespace) -> int:
    cuts = args.heads is not None or args.ffn is not None or bool(args.layers)
    if not cuts and args.magnitude is None:
        raise UsageError("nothing to prune: give --heads, --ffn, --layers or --magnitude")
    expect_training(args)
    if args.scope and args.magnitude is None:
        raise UsageError("--scope is an option of --magnitude: give both")
    args.scope = args.scope or "global"
    if args.data and not isinstance(args.heads, float) and args.ffn is None:
        raise UsageError("--data is for shares of heads and columns: give --heads SHARE or --ffn SHARE")
    if args.train and (cuts or args.magnitude is None):
        raise UsageError("--train sets weights to zero step by step: give it with --magnitude only")
    if args.train:
        return _gradually(args)
    from ..compression.prune import Request, prune

    record = prune(
        Request(
            model=args.model, out=args.out, heads=args.heads, ffn=args.ffn, layers=args.layers,
            magnitude=args.magnitude, scope=args.scope, data=args.data, examples=args.examples, seed=args.seed,
            impl=args.impl,
        )
    )  # fmt: skip
    if not args.quiet:
        _print(record, args.out)
    return 0


def _gradually(args: argparse.Namespace) -> int:
    from ..compression.folders import add_step
    from ..compression.prune_magnitude import NO_SPEED, GradualPruning
    from ..training.finetune import finetune
    from ..training.memory import keep_freed_memory
    from .finetune import print_report
    from .progress import TrainingBar

    expect_free_or_begun(args)
    keep_freed_memory()
    with TrainingBar("prune", args.quiet) as bar:
        report = finetune(training_request(args, args.impl), bar, GradualPruning(args.magnitude, args.scope))
    add_step(args.model, args.out, {"command": "prune --train", "model": args.model, "share of zeros": args.magnitude,
                                    "zeros chosen": args.scope, "notes": [NO_SPEED]})  # fmt: skip
    if not args.quiet:
        print_report(report, args.out)
        print(f"note: {NO_SPEED}")
    return 0


def _print(record: dict[str, Any], out: Path) -> None:
    before, after = record["before"], record["after"]
    for what, unit in (("parameters", ""), ("bytes", " bytes")):
        share = after[what] / before[what]
        print(f"{before[what]:,}{unit or ' ' + what} -> {after[what]:,}{unit or ' ' + what} ({share:.0%})")
    print(f"heads left in the layers: {', '.join(map(str, record['heads of layers']))}")
    if record["heads"]:
        print(f"removed heads: {record['heads']}")
    if record["feed-forward columns"]:
        print("feed-forward columns: {} -> {}".format(*record["feed-forward columns"]))
    if record["layers"]:
        print(f"removed layers: {', '.join(map(str, record['layers']))}")
    if "share of zeros" in record:
        print(f"zeros among the layers' weights: {record['share of zeros']:.1%}")
    for note in record["notes"]:
        print(f"note: {note}")
    print(f"the model is in {out}")
