"""Code shared by `fastbert prune` and `fastbert quantize`: further training of a fine-tuned model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import UsageError, at_least_0, positive, seed_number

OF_TRAINING = ("eval", "epochs", "lr", "batch_tokens", "resume")  # options that need --train


def add_training_arguments(p: argparse.ArgumentParser, purpose: str) -> None:
    """Adds the options of training. purpose: the beginning of --train's help."""
    p.add_argument("--train", metavar="FILE", help=f"{purpose}; MODEL is then a folder of fastbert finetune")
    p.add_argument("--eval", metavar="FILE", help="with --train: evaluate on these after each epoch; the best is kept")
    p.add_argument("--epochs", metavar="N", type=positive, help="with --train: number of epochs (default: 1)")
    p.add_argument("--lr", metavar="X", type=at_least_0, help="with --train: peak of the learning rate (default: 2e-5)")
    p.add_argument(
        "--batch-tokens", metavar="N", type=positive,
        help="with --train: tokens of an optimiser step (default: 32 average examples)",
    )  # fmt: skip
    p.add_argument("--resume", action="store_true", help="with --train: continue from the last checkpoint in OUT")
    p.add_argument("--seed", metavar="N", type=seed_number, default=0, help="seed of drawn examples and of training")


def expect_training(args: argparse.Namespace) -> None:
    """Raises UsageError for options of training without --train."""
    given = [name for name in OF_TRAINING if getattr(args, name) not in (None, False)]
    if given and not args.train:
        raise UsageError(f"--{given[0].replace('_', '-')} is an option of training, and needs --train")


def training_request(args: argparse.Namespace, impl: str | None) -> Any:
    """The request to fine-tune MODEL further for its task. Raises CheckpointError where MODEL has no task."""
    from ..compression.folders import steps_of
    from ..formats import opened
    from ..storage import CheckpointError
    from ..training.finetune import Request
    from ..training.pipeline import SPEC_FILE, spec_in

    with opened(args.model) as path:
        spec = spec_in(Path(path) / SPEC_FILE)
        steps_of(Path(path))
    if spec is None:
        raise CheckpointError(f"{args.model} has no {SPEC_FILE}: fastbert finetune comes before --train")
    return Request(
        model=args.model, train=args.train, out=args.out, spec=spec, stride=spec.stride, eval=args.eval,
        epochs=args.epochs or 1, lr=2e-5 if args.lr is None else args.lr, batch_tokens=args.batch_tokens,
        seed=args.seed, resume=args.resume, impl=impl,
    )  # fmt: skip


def expect_free_or_begun(args: argparse.Namespace) -> None:
    """Raises CheckpointError, before anything is read, if OUT has files that are not from a run. The fine-tuning itself
    checks whether --resume can continue a run."""
    from ..compression.folders import expect_free

    if not args.resume and not (args.out / "checkpoints").exists():
        expect_free(args.out)


def whole_numbers(text: str) -> tuple[int, ...]:
    """The whole numbers in a list like "1,3,5"."""
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"expected whole numbers from 0 up between commas, got {text!r}")
    return tuple(sorted({int(part) for part in text.split(",")}))
