"""The progress bar of `fastbert finetune` and `fastbert pretrain`, on standard error."""

from __future__ import annotations

import os
import sys
from typing import Any

from .options import shown


class TrainingBar:
    """A progress bar with the loss, the learning rate and real tokens per second, and a line for each evaluation.

    Args:
        command: the command's name, which begins the bar.
        quiet: show nothing. Only the first process shows anything.
        epochs: whether the line of an evaluation names the epoch.
    """

    def __init__(self, command: str, quiet: bool, epochs: bool = True) -> None:
        from tqdm import tqdm

        self.quiet = quiet or os.environ.get("RANK", "0") != "0"
        self.epochs = epochs
        # None makes tqdm show the bar only if standard error is a terminal.
        self.bar = tqdm(unit="step", desc=command, disable=self.quiet or None)

    def __enter__(self) -> TrainingBar:
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def __call__(self, record: dict[str, Any], steps: int) -> None:
        """Shows a record of metrics.jsonl. steps: the number of steps of the run, 0 if unknown."""
        if self.quiet:
            return
        if "scores" in record:
            epoch = f"epoch {record['epoch'] + 1}, " if self.epochs and record["step"] else ""
            words = ", ".join(f"{name} {shown(value)}" for name, value in record["scores"].items())
            self.bar.write(f"{epoch}step {record['step']:,}: {words}", file=sys.stderr)
            return
        if self.bar.total != (steps or None) or record["step"] < self.bar.n:
            self.bar.reset(total=steps or None)
        self.bar.set_postfix_str(
            f"loss {record['loss']:.4f}, lr {record['lr']:.2e}, {record['tokens_per_second']:,.0f} tokens/s",
            refresh=False,
        )
        self.bar.update(record["step"] - self.bar.n)
