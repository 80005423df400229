"""`fastbert prune`: a smaller model out of a folder, by cutting out heads, feed-forward columns, layers or weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import IMPLS, UsageError, positive
from .retraining import add_training_arguments, expect_free_or_begun, expect_training, training_request, whole_numbers

ORDER = 14
SUMMARY = "cut heads, feed-forward columns or layers out of a model, or set single weights to zero"

DESCRIPTION = """\
Cut parts out of a model and write what is left as a new folder, with its tokenizer and all else beside it.

  --heads 0:1,3;2:5   attention heads by name: heads 1 and 3 of layer 0, and head 5 of layer 2
  --heads 0.5         half of all heads, those that matter least for the loss on --data
  --ffn 0.5           half of the feed-forward columns of each layer, those that matter least on --data
  --layers 1,3,5      whole layers; what is left is numbered anew
  --magnitude 0.8     80% of the single weights set to zero, those of least magnitude

The first four make every matrix truly smaller, so the model is faster and its file shorter; they can be given together,
and count layers and heads as MODEL has them. A layer may lose all of its heads, the model not. Numbers begin with 0.

--magnitude leaves the shapes as they are: zeros in a matrix give no speed, here or in any other library of dense
products. With --train the zeros grow in number while the rest is trained (a cubic schedule over the first two thirds of
the steps), which loses far less than all at once; of evaluations after that the model of the best one is kept. Ctrl-C
finishes the step, saves, and --resume goes on from there.

After cutting, fine-tune what is left: 'fastbert finetune --model OUT ...'. 'predict', 'encode' and 'serve' read OUT as
any other folder. transformers reads it too where no head is missing: its version 5 has no pruned heads any more."""

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
    p.add_argument("model", metavar="MODEL", help="a folder or hub id of a BERT; for shares of heads and columns one "
                   "that fastbert finetune made")  # fmt: skip
    p.add_argument("-o", "--out", required=True, metavar="OUT", type=Path, help="must not exist yet, or be empty")
    p.add_argument("--heads", metavar="LIST|SHARE", type=_heads, help="heads that go, by name or by importance")
    p.add_argument("--ffn", metavar="SHARE", type=_share, help="of each layer's feed-forward columns, by importance")
    p.add_argument("--layers", metavar="N,...", type=whole_numbers, default=(), help="layers that go")
    p.add_argument("--magnitude", metavar="SHARE", type=_share, help="of the layers' weights that become zero")
    p.add_argument(
        "--scope", choices=("global", "layer"),
        help="least magnitude of all matrices together (global, the default) or in each one (layer)",
    )  # fmt: skip
    p.add_argument("--data", metavar="FILE", help="examples with labels, by whose loss importance is measured")
    p.add_argument(
        "--examples", metavar="N", type=positive, default=1024,
        help="how many of them, drawn by --seed (default: 1,024)",
    )  # fmt: skip
    add_training_arguments(p, "set weights to zero step by step while training on these")
    p.add_argument("--impl", choices=IMPLS, help="who computes the operators (default: the fastest)")
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
        raise UsageError("--scope says where --magnitude looks for the smallest weights: give both")
    args.scope = args.scope or "global"
    if args.data and not isinstance(args.heads, float) and args.ffn is None:
        raise UsageError("--data is what shares of heads and columns are chosen by: give --heads SHARE or --ffn SHARE")
    if args.train and (cuts or args.magnitude is None):
        raise UsageError("--train sets weights to zero step by step, so it goes with --magnitude alone")
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
    print(f"heads of the layers: {', '.join(map(str, record['heads of layers']))}")
    if record["heads"]:
        print(f"heads that went: {record['heads']}")
    if record["feed-forward columns"]:
        print("feed-forward columns: {} -> {}".format(*record["feed-forward columns"]))
    if record["layers"]:
        print(f"layers that went: {', '.join(map(str, record['layers']))}")
    if "share of zeros" in record:
        print(f"zeros among the layers' weights: {record['share of zeros']:.1%}")
    for note in record["notes"]:
        print(f"note: {note}")
    print(f"the model is in {out}")
