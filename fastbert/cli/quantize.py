"""`fastbert quantize`: a model whose linear layers multiply 8-bit integers, after training or by training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import UsageError, positive
from .retraining import add_training_arguments, expect_free_or_begun, expect_training, training_request

ORDER = 15
SUMMARY = "put a model's weights into 8-bit integers, and train it for them"

DESCRIPTION = """\
Write MODEL with the weights of its linear layers as 8-bit integers: a fourth of float32's size, and on a CPU with VNNI
or AMX products of integers. 'predict', 'encode' and 'serve' read OUT as any other folder, and compute with the very
integers that are stored; where a machine has no such products they become floating-point numbers again.

Weights have a scale for each output, activations a range of their own for each token, found as they come. Residuals,
LayerNorms, attention's scores and embeddings are never in 8 bits; they are in bfloat16 (or --dtype).

  --data FILE    after training: run the model on a few hundred texts, and store it. FILE is as 'fastbert predict' reads
                 it, without need of labels; for a model without a task, lines of text
  --train FILE   by training: every product is the one of inference, rounding and all, while the weights learn to live
                 with it (quantisation-aware training). MODEL is one that fastbert finetune made. Ctrl-C finishes the
                 step, saves, and --resume goes on from there

Columns of an input that are much larger than others lose the others their digits; part of the difference is moved into
the weights (smoothing). How large a column is comes from the calibration texts: the root of its mean square, or
--percentile of its sizes. Each group of layers is tried alone in 8 bits, and how much the model's outputs change is
its sensitivity. --error X keeps the most sensitive groups out of 8 bits until the outputs change by X at most (0.05:
5%); a model with such layers is slower, since its layers no longer run in one call.

The layout is that of the library compressed-tensors, int-quantized. Smoothing adds factors, which other libraries do
not know and refuse; --no-smooth leaves them out."""

EXAMPLES = """\
examples:
  fastbert quantize sentiment -o sentiment-int8 --data train.tsv
  fastbert quantize sentiment -o sentiment-int8 --train train.tsv --eval dev.tsv --epochs 1 --lr 1e-5
  fastbert quantize sentiment -o sentiment-int8 --data train.tsv --error 0.03 --percentile 99.9
  fastbert quantize sentence-transformers/all-MiniLM-L6-v2 -o minilm-int8 --data texts.txt
  fastbert predict sentiment-int8 dev.tsv -o labels.jsonl"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.description, p.epilog = DESCRIPTION, EXAMPLES
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("model", metavar="MODEL", help="a folder or hub id of a BERT")
    p.add_argument("-o", "--out", required=True, metavar="OUT", type=Path, help="must not exist yet, or be empty")
    p.add_argument("--data", metavar="FILE", help="texts to calibrate on")
    p.add_argument(
        "--texts", metavar="N", type=positive, default=256,
        help="how many of them, or of the training file, drawn by --seed; 8,192 tokens at most (default: 256)",
    )  # fmt: skip
    p.add_argument(
        "--percentile", metavar="P", type=_percentile,
        help="a column's size is what P%% of its elements do not exceed (default: their root mean square)",
    )  # fmt: skip
    p.add_argument("--no-smooth", action="store_true", help="leave columns as they are, for other libraries to read")
    p.add_argument(
        "--error", metavar="X", type=_error, help="how much the outputs may change, as a share (default: no limit)"
    )
    p.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of all else (default: bfloat16)"
    )
    add_training_arguments(p, "train for 8 bits on these examples")
    p.add_argument("-q", "--quiet", action="store_true", help="print nothing")


def _percentile(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 50.0 <= value <= 100.0:
        raise argparse.ArgumentTypeError(f"expected a percentile from 50 to 100, got {text!r}")
    return value


def _error(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < 1.0:
        raise argparse.ArgumentTypeError(f"expected a share between 0 and 1, got {text!r}")
    return value


def run(args: argparse.Namespace) -> int:
    expect_training(args)
    if (args.data is None) == (args.train is None):
        raise UsageError("give either --data FILE, to calibrate on, or --train FILE, to train for 8 bits")
    if args.no_smooth and args.percentile is not None:
        raise UsageError("--percentile is of smoothing, which --no-smooth leaves out")
    import torch

    from ..compression.quantize import FEWEST_TEXTS, Settings, quantize

    if args.texts < FEWEST_TEXTS:
        raise UsageError(f"--texts {args.texts}: calibration takes {FEWEST_TEXTS} at least, and better hundreds")

    settings = Settings(
        percentile=args.percentile, smooth=not args.no_smooth, error=args.error, texts=args.texts, seed=args.seed,
        dtype=getattr(torch, args.dtype),
    )  # fmt: skip
    if args.train:
        return _train(args, settings)
    record = quantize(args.model, args.out, args.data, settings)
    if not args.quiet:
        print_plan(record)
        print(f"{record['before']['bytes']:,} -> {record['after']['bytes']:,} bytes of weights")
        print(f"the model is in {args.out}")
    return 0


def _train(args: argparse.Namespace, settings: Any) -> int:
    from ..compression.quantize import QuantisedTraining, expect_products
    from ..training.finetune import finetune
    from ..training.memory import keep_freed_memory
    from .finetune import print_report
    from .progress import TrainingBar

    expect_products()
    expect_free_or_begun(args)
    keep_freed_memory()
    shaping = QuantisedTraining(settings, args.model)
    with TrainingBar("quantize", args.quiet) as bar:
        report = finetune(training_request(args, "native"), bar, shaping)
    if not args.quiet:
        print_plan(shaping.record())
        print_report(report, args.out)
    return 0


def print_plan(record: dict[str, Any]) -> None:
    """What went into 8 bits, and what the outputs lost by that on the calibration texts, before any training."""
    print(f"{record['layers in 8 bits']} linear layers in 8 bits; the outputs change by {record['error']:.2%}")
    worst = list(record["sensitivities"].items())[:5]
    print("most sensitive, each alone: " + ", ".join(f"{name} {error:.2%}" for name, error in worst))
    if record["kept"]:
        print(
            f"kept out of 8 bits, for {record['error with all in 8 bits']:.2%} with them: {', '.join(record['kept'])}"
        )
    for note in record["notes"]:
        print(f"note: {note}")
