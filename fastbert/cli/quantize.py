"""`fastbert quantize`: writes a model whose linear layers multiply 8-bit integers, by calibration or by training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import UsageError, positive
from .retraining import add_training_arguments, expect_free_or_begun, expect_training, training_request

ORDER = 15
SUMMARY = "store a model's weights as 8-bit integers, by calibration or by training"

DESCRIPTION = """\
Write MODEL with the weights of its linear layers as 8-bit integers: a quarter of float32's size, and on a CPU with VNNI
or AMX the products are products of integers. 'predict', 'encode' and 'serve' read OUT like any other folder and
multiply the stored integers; on a machine without such products they convert them to floating-point numbers.

A weight has a scale for each output; activations have a range for each token, computed at run time. Residuals,
LayerNorms, attention's scores and embeddings are not quantised; they are in bfloat16 (or --dtype).

  --data FILE    calibration: run the model on a few hundred texts, and store it. FILE has the format of 'fastbert
                 predict' and needs no labels; for a model without a task it has a text in each line
  --train FILE   quantisation-aware training: products are rounded as in inference, and training adapts the weights to
                 that. MODEL is a folder of fastbert finetune. With --eval the model is measured before the first step
                 too, as --data would store it, and the best model is kept. Ctrl-C finishes the step and saves; --resume
                 continues from there

If some columns of an input are much larger than others, the others lose precision; so part of the difference is moved
into the weights (smoothing). The size of a column is measured on the calibration texts: the root of its mean square, or
the --percentile of its magnitudes. The sensitivity of a group of layers is the change of the model's outputs if only
this group is in 8 bits. --error X leaves the most sensitive groups in --dtype until the outputs change by at most X
(0.05: 5%); such a model is slower, because its layers no longer run in one call.

The format is int-quantized of the library compressed-tensors. Smoothing adds factors, which other libraries do not know
and refuse; --no-smooth omits them."""

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
    p.add_argument(
        "-o", "--out", required=True, metavar="OUT", type=Path, help="where to write; must not exist yet, or be empty"
    )
    p.add_argument("--data", metavar="FILE", help="texts to calibrate on")
    p.add_argument(
        "--texts", metavar="N", type=positive, default=256,
        help="how many texts of --data or --train to calibrate on, drawn by --seed; at most 8,192 tokens (default: "
        "256)",
    )  # fmt: skip
    p.add_argument(
        "--percentile", metavar="P", type=_percentile,
        help="measure a column by the magnitude that P%% of its elements do not exceed (default: root mean square)",
    )  # fmt: skip
    p.add_argument("--no-smooth", action="store_true", help="no smoothing, so that other libraries can read OUT")
    p.add_argument(
        "--error", metavar="X", type=_error, help="largest relative change of the outputs (default: no limit)"
    )
    p.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="dtype of all else (default: bfloat16)"
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
        raise UsageError("--percentile is for smoothing, which --no-smooth turns off")
    import torch

    from ..compression.quantize import FEWEST_TEXTS, Settings, quantize

    if args.texts < FEWEST_TEXTS:
        raise UsageError(f"--texts {args.texts}: calibration needs at least {FEWEST_TEXTS}, better hundreds")

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
    """Prints which layers are in 8 bits, and how much this changes the outputs on the calibration texts, before any
    training."""
    print(f"{record['layers in 8 bits']} linear layers in 8 bits; the outputs change by {record['error']:.2%}")
    worst = list(record["sensitivities"].items())[:5]
    print("most sensitive, each alone: " + ", ".join(f"{name} {error:.2%}" for name, error in worst))
    if record["kept"]:
        print(
            f"kept out of 8 bits, for {record['error with all in 8 bits']:.2%} with them: {', '.join(record['kept'])}"
        )
    for note in record["notes"]:
        print(f"note: {note}")
