"""What `fastbert prune` and `fastbert quantize` share: a fine-tuned model trained on while it is changed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import UsageError, at_least_0, positive, seed_number

OF_TRAINING = ("eval", "epochs", "lr", "batch_tokens", "resume")  # options that say nothing without --train


def add_training_arguments(p: argparse.ArgumentParser, purpose: str) -> None:
    """purpose: of --train, for --help."""
    p.add_argument("--train", metavar="FILE", help=f"{purpose}; MODEL is then one that fastbert finetune made")
    p.add_argument("--eval", metavar="FILE", help="with --train: measure on these after each epoch; the best is kept")
    p.add_argument("--epochs", metavar="N", type=positive, help="with --train (default: 1)")
    p.add_argument("--lr", metavar="X", type=at_least_0, help="with --train: the learning rate's peak (default: 2e-5)")
    p.add_argument(
        "--batch-tokens", metavar="N", type=positive,
        help="with --train: tokens of an optimiser step (default: 32 average examples)",
    )  # fmt: skip
    p.add_argument("--resume", action="store_true", help="with --train: go on from the last checkpoint in OUT")
    p.add_argument("--seed", metavar="N", type=seed_number, default=0, help="of examples that are drawn, of training")


def expect_training(args: argparse.Namespace) -> None:
    """Raises UsageError where options of training are given without --train."""
    given = [name for name in OF_TRAINING if getattr(args, name) not in (None, False)]
    if given and not args.train:
        raise UsageError(f"--{given[0].replace('_', '-')} is of training, and needs --train")


def training_request(args: argparse.Namespace, impl: str | None) -> Any:
    """A fine-tuning of MODEL for the task that it was fine-tuned for. Raises: CheckpointError."""
    from ..formats import opened
    from ..storage import CheckpointError
    from ..training.finetune import Request
    from ..training.pipeline import SPEC_FILE, spec_in

    with opened(args.model) as path:
        spec = spec_in(Path(path) / SPEC_FILE)
    if spec is None:
        raise CheckpointError(f"{args.model} has no {SPEC_FILE}: fastbert finetune comes before --train")
    return Request(
        model=args.model, train=args.train, out=args.out, spec=spec, stride=spec.stride, eval=args.eval,
        epochs=args.epochs or 1, lr=2e-5 if args.lr is None else args.lr, batch_tokens=args.batch_tokens,
        seed=args.seed, resume=args.resume, impl=impl,
    )  # fmt: skip


def expect_free_or_begun(args: argparse.Namespace) -> None:
    """Raises CheckpointError, before anything is read, where OUT holds something other than a run. What there is to say
    of a run that --resume could go on with, the fine-tuning says."""
    from ..compression.folders import expect_free

    if not args.resume and not (args.out / "checkpoints").exists():
        expect_free(args.out)


def whole_numbers(text: str) -> tuple[int, ...]:
    """Numbers from 0 up between commas."""
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"expected whole numbers from 0 up between commas, got {text!r}")
    return tuple(sorted({int(part) for part in text.split(",")}))
