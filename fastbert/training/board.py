"""A run's metrics for TensorBoard, in OUT/tensorboard: the records of metrics.jsonl as scalars over the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

OF_STEPS = ("loss", "lr", "grad_norm", "tokens_per_second")


def summary_writer() -> type:
    """torch's SummaryWriter. Raises: ImportError, in one line, if the package tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter


class Board:
    """Writes records of metrics.jsonl.

    done: number of steps that are done when the run is resumed. Later steps that it wrote before are hidden.
    """

    def __init__(self, folder: Path, done: int) -> None:
        self.writer = summary_writer()(str(folder), purge_step=done + 1)

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *error: Any) -> None:
        self.writer.close()

    def write(self, record: dict[str, Any]) -> None:
        step = record["step"]
        for name in OF_STEPS:
            if name in record:
                self.writer.add_scalar(f"train/{name}", record[name], step)
        for name, value in record.get("scores", {}).items():
            if value is not None:
                self.writer.add_scalar(f"eval/{name}", value, step)
