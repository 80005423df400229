"""Checkpoints of a run by torch.distributed.checkpoint. A checkpoint is complete, or it does not exist.

    OUT/checkpoints/step-00000120/    model, optimiser, mean of the weights, and in progress.json the rest of the
                                      run's state

A checkpoint is written into a folder of another name, which is renamed when it is complete. The next process that saves
removes an incomplete folder that a killed process has left.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from ..storage import CheckpointError, make_folder, read_json
from .processes import Processes

RECORDS = "metrics.jsonl"  # every run writes it before it saves anything else
_NAME = re.compile(r"step-\d{8}")


def folder_of_run(out: Path, resume: bool, source: str = "", records: str = RECORDS) -> Path:
    """The folder `out` of a run, created if it does not exist.

    source: path or id of the model with which the run begins. records: pattern of the files that show that a model in
    `out` is of an earlier part of this run.

    Raises: CheckpointError if the run would replace a model that is not its own, or other checkpoints.
    """
    folder = make_folder(out)
    if source and os.path.exists(source) and os.path.samefile(source, folder):
        raise CheckpointError(f"{folder} is the folder of the model to begin with: give another --out")
    if not resume and (folder / "checkpoints").exists():
        raise CheckpointError(f"{folder} has checkpoints of a run: --resume goes on with it, or give another --out")
    is_of_a_run = any(folder.glob(records))
    if (folder / "config.json").exists() and not (resume and is_of_a_run):
        choice = ", or --resume to go on with the run that made it" if is_of_a_run else ""
        raise CheckpointError(f"{folder} has a model already: give another --out{choice}")
    return folder


class Checkpoints:
    """The checkpoints of one run. keep: how many of the last ones are kept."""

    def __init__(self, out: Path, keep: int, processes: Processes) -> None:
        self.folder, self.keep, self.processes = out / "checkpoints", keep, processes

    def last(self) -> Path | None:
        """The latest checkpoint; None if there is none."""
        if not self.folder.is_dir():
            return None
        return max((path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)), default=None)

    def save(
        self, model: nn.Module, optimizer: Any, means: dict[str, Tensor], step: int, progress: dict[str, Any]
    ) -> Path:
        """Writes a checkpoint unless there is one of this step.

        means: `WeightAverage.means`, empty if weights are not averaged.
        progress: the rest of the run's state; `step` is added.

        Raises: CheckpointError, in one line that names the last complete checkpoint.
        """
        path = self.folder / f"step-{step:08d}"
        # The first process decides for all of them, before any of them writes.
        if self.processes.gather(path.exists())[0]:
            return path
        temporary = self.folder / f".{path.name}.writing"
        first = self.processes.rank == 0
        if first:
            make_folder(self.folder)
            for left in self.folder.glob(".step-*.writing"):
                shutil.rmtree(left)
        self.processes.wait()
        try:
            state = _state(model, optimizer, means)
            with _alone():
                dcp.save(state, checkpoint_id=temporary, no_dist=self.processes.count == 1)
            if first:
                with open(temporary / "progress.json", "w", encoding="utf-8") as stream:
                    json.dump({**progress, "step": step}, stream)
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(temporary, path)
                self._prune()
        except (OSError, dcp.CheckpointException) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            last = self.last()
            left = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
            raise CheckpointError(f"cannot save {path}: {_reason(error)}; {left}") from error
        self.processes.wait()
        return path

    def progress(self, path: Path) -> dict[str, Any]:
        """The state of a checkpoint's run besides model, optimiser and means."""
        return read_json(path / "progress.json")

    def load(self, path: Path, model: nn.Module, optimizer: Any, means: dict[str, Tensor]) -> None:
        """Loads a checkpoint, of any number of processes, into model, optimiser and means."""
        state = _state(model, optimizer, means)
        try:
            with _alone():
                dcp.load(state, checkpoint_id=path, no_dist=self.processes.count == 1)
        except (OSError, dcp.CheckpointException) as error:
            raise CheckpointError(f"cannot read {path}: {_reason(error)}") from error
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    def _prune(self) -> None:
        found = sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))
        for path in found[: -self.keep]:
            shutil.rmtree(path)


def _state(model: nn.Module, optimizer: Any, means: dict[str, Tensor]) -> dict[str, Any]:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer} | ({"means": means} if means else {})


@contextmanager
def _alone() -> Iterator[None]:
    """A block without torch's warning that there is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _reason(error: BaseException) -> str:
    """The cause of torch's report of all ranks, in one line. If a file could not be written, this is the system's
    error; torch's own error only names a position in the file."""
    if isinstance(error, dcp.CheckpointException):
        causes = [cause[0] if isinstance(cause, tuple) else cause for cause in error.failures.values()]
        error = next(iter(causes), error)
    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, OSError):
        behind = behind.__cause__ or behind.__context__
    if behind is not None and behind.strerror:
        return behind.strerror
    return " ".join(str(error).split()) or type(error).__name__
