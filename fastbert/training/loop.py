"""The loop: optimiser steps of a plan, an evaluation after each epoch, checkpoints that a run goes on from exactly.

The loss of a step is the sum over its items (texts, labelled words, questions' windows) divided by their number in the
whole step, over all batches and processes. Order and dropout are functions of (seed, epoch, window), so that the same
run on other processes, or cut into other batches, computes the same gradients but for rounding; and one that goes on
from a checkpoint, on as many processes and in the same batches, computes the same bits on a CPU.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..storage import write_atomically
from .checkpoints import Checkpoints
from .features import Window
from .metrics import Scores, is_better
from .optimizer import GroupedAdamW, freeze, groups_of
from .plan import Plan, dropout_seed, rate, warmup_steps
from .predicting import autocast, pack
from .processes import Processes


class TrainingError(RuntimeError):
    """Why a run cannot go on, and what of it remains; one line."""


@dataclass(frozen=True)
class Settings:
    """What a run is made of, but for its data and its model.

    Attributes:
        step_tokens: tokens of an optimiser step.
        batch_tokens: tokens computed at once; fewer take less memory and change nothing else.
        lr: the peak of the learning rate, reached after the `warmup` share of all steps, then linear to 0.
        clip: the largest norm of a step's gradient; 0 for no limit.
        layer_decay: each layer's learning rate as a share of that of the layer above.
        freeze: None, or how many layers are not trained, and the embeddings with them.
        bias_correction: of AdamW's moments; False is the optimiser of Google's BERT.
        dtype: of products; float16 scales the loss.
        evaluations: in each epoch, as evenly spread as steps allow; the last one is at its end.
        patience: evaluations without a better metric after which the run ends with its epoch; 0 for never.
        save_every: steps from one checkpoint to the next; 0 for one an epoch. keep: how many stay.
    """

    epochs: int
    step_tokens: int
    batch_tokens: int
    lr: float
    seed: int = 0
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    bias_correction: bool = True
    layer_decay: float = 1.0
    freeze: int | None = None
    dtype: torch.dtype = torch.float32
    evaluations: int = 1
    patience: int = 0
    save_every: int = 0
    keep: int = 2
    fsdp: bool = False

    def binding(self) -> dict[str, Any]:
        """What must be the same where a run goes on: all but memory, processes and checkpoints."""
        free = ("batch_tokens", "save_every", "keep", "fsdp")
        settings = {name: value for name, value in asdict(self).items() if name not in free}
        return json.loads(json.dumps({**settings, "dtype": str(self.dtype)}))


@dataclass
class Progress:
    """Where a run is: steps done, how many of them float16 skipped, its best metric so far, the evaluations since, and
    what float16 scales by."""

    step: int = 0
    skipped: int = 0
    best: float | None = None
    since_best: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """One fine-tuning.

    Args:
        windows: what is trained on.
        evaluate: gives the scores of the model as it is, the same in every process; None without an evaluation.
        metric: the name of the score that decides, more is better.
        keep_best: saves the model, called in every process after each evaluation whose metric is the best so far, or
            while no metric has been a number; without an evaluation after each epoch.
        report: called in the first process with each record of metrics.jsonl.
        binding: what else must be the same where the run goes on, such as its data, as JSON has it.
    """

    model: nn.Module
    task: Any
    windows: Sequence[Window]
    settings: Settings
    out: Path
    processes: Processes
    metric: str = ""
    evaluate: Callable[[nn.Module], Scores] | None = None
    keep_best: Callable[[nn.Module, Scores | None], None] | None = None
    report: Callable[[dict[str, Any]], None] | None = None
    binding: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        s = self.settings
        self.plan = Plan(s.seed, [len(w.input_ids) for w in self.windows], s.step_tokens, s.batch_tokens)
        self.steps_of_epochs = self.plan.count_steps(s.epochs)
        self.steps = sum(self.steps_of_epochs)
        self.warmup = warmup_steps(self.steps, s.warmup)
        freeze(self.model, s.freeze)
        self.shared = self.processes.share(self.model, s.fsdp)
        groups = groups_of(self.shared.named_parameters(), s.weight_decay, s.layer_decay)
        self.optimizer = GroupedAdamW(groups, s.betas, s.eps, s.bias_correction)
        self.scaler = torch.amp.GradScaler(self.processes.device.type, enabled=s.dtype == torch.float16)
        self.checkpoints = Checkpoints(self.out, s.keep, self.processes)
        self.progress = Progress(settings=s.binding() | {"windows": len(self.windows)} | self.binding)

    # ---- the whole -------------------------------------------------------------------------------------

    def resume(self) -> int:
        """Goes on from the last checkpoint; the steps that are done, 0 where there is none.

        Raises: TrainingError where the checkpoint is of another run.
        """
        path = self.checkpoints.last()
        if path is None:
            return 0
        loaded = Progress(**self.checkpoints.load(path, self.shared, self.optimizer))
        for name, value in self.progress.settings.items():
            if loaded.settings.get(name) != value:
                raise TrainingError(
                    f"{path} is of a run with {name} {loaded.settings.get(name)}, not {value}: "
                    "go on with the same settings and data, or begin another --out"
                )
        self.progress = loaded
        self.scaler.load_state_dict(loaded.scaler)
        return loaded.step

    def train(self) -> None:
        """To the end, or to the end of an epoch after which `patience` is spent.

        Raises: KeyboardInterrupt after a checkpoint where SIGINT or SIGTERM came; TrainingError where the loss or the
            gradient is not finite, before the model takes that step.
        """
        begun = 0
        with _asked_to_stop() as asked:
            for epoch, count in enumerate(self.steps_of_epochs):
                if begun + count > self.progress.step:
                    self._epoch(epoch, begun, asked)
                begun += count
                if 0 < self.settings.patience <= self.progress.since_best:
                    return

    def _epoch(self, epoch: int, begun: int, asked: list[int]) -> None:
        steps = self.plan.steps(epoch)
        for number in range(self.progress.step - begun, len(steps)):
            record, stop = self._step(steps[number], epoch, asked)
            self._record(record)
            last, every = number + 1 == len(steps), self.settings.save_every
            saves = last or stop or (every and self.progress.step % every == 0)
            evaluates = last or (self.evaluate is not None and self._is_due(number, len(steps)))
            if saves or evaluates:
                self._expect_finite()
            if evaluates:
                self._evaluate(epoch)
            if saves:
                self._save()
            if stop:
                raise KeyboardInterrupt(
                    f"stopped after step {self.progress.step:,} of {self.steps:,}, which is saved; "
                    "the same command with --resume goes on from there"
                )

    # ---- a step ----------------------------------------------------------------------------------------

    def _step(self, step: list[int], epoch: int, asked: list[int]) -> tuple[dict[str, Any], bool]:
        """One optimiser step: its record, and whether any process was asked to stop."""
        s, done = self.settings, self.progress.step
        begin = time.perf_counter()
        self.shared.train()
        loss = self._gradients(step, epoch)
        self.scaler.unscale_(self.optimizer)
        norm = self.optimizer.clip(self.settings.clip or math.inf)
        # One sum over processes for both: what each has of the loss, and whether it was asked to stop.
        told = self.processes.sum(torch.stack((loss, loss.new_tensor(float(bool(asked))))))
        loss, stop = float(told[0]), bool(told[1] > 0)
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.scaler.is_enabled()):
            raise self._failure(f"step {done + 1:,}: the loss is {loss:.6g} and its gradient's norm {norm:.6g}")
        lr = s.lr * rate(done, self.steps, self.warmup)
        self.optimizer.set_rate(lr, done + 1 - self.progress.skipped)
        self.scaler.step(self.optimizer)
        scale = self.scaler.get_scale()
        self.scaler.update()
        self.progress.skipped += self.scaler.get_scale() < scale
        self.optimizer.zero_grad()
        self.progress.step = done + 1
        tokens = sum(self.plan.lengths[row] for row in step)
        return {
            "step": done + 1, "epoch": epoch, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": tokens,
            "tokens_per_second": round(tokens / (time.perf_counter() - begin), 1),
        }, stop  # fmt: skip

    def _gradients(self, step: list[int], epoch: int) -> Tensor:
        """Adds the gradient of a step's loss to the parameters; this process' part of the loss, detached."""
        items = sum(self.task.weight(self.windows[row]) for row in step)
        batches = self.plan.batches(step, self.processes.rank, self.processes.count)
        total = torch.zeros((), dtype=torch.float64, device=self.processes.device)
        for place, rows in enumerate(batches):
            with self._without_exchange(place + 1 < len(batches)):
                loss = self._loss(rows or step[:1], epoch, items)
                if not rows:  # a process with nothing left to do takes part in the exchange of gradients
                    loss = loss * 0.0
                # Processes' gradients are averaged, and a step's are to be added.
                self.scaler.scale(loss * self.processes.count).backward()
            total += loss.detach()
        return total

    def _loss(self, rows: list[int], epoch: int, items: int) -> Tensor:
        """The sum of the losses of windows, divided by `items`."""
        chosen, device = [self.windows[row] for row in rows], self.processes.device
        # The model draws its seed from torch's generator. Windows are told apart by their names.
        torch.manual_seed(dropout_seed(self.settings.seed, epoch))
        with autocast(device, self.settings.dtype):
            batch = pack(chosen, rows, device)
            return self.shared(batch, num_items_in_batch=items, **self.task.arguments(chosen, device)).loss

    def _without_exchange(self, without: bool) -> Any:
        """Gradients of a batch that is not the step's last stay in this process."""
        if not without or self.processes.count == 1 or self.settings.fsdp:
            return nullcontext()
        return self.shared.no_sync()

    def _expect_finite(self) -> None:
        """Nothing is saved that no run could go on from."""
        bad = torch.zeros((), dtype=torch.float32, device=self.processes.device)
        for p in self.shared.parameters():
            local = p.to_local() if hasattr(p, "to_local") else p
            bad += (~torch.isfinite(local.detach())).sum()
        if (count := int(self.processes.sum(bad))) > 0:
            raise self._failure(f"step {self.progress.step:,}: {count:,} parameters are no longer finite")

    def _failure(self, what: str) -> TrainingError:
        return TrainingError(f"{what}; a lower --lr may help; {self.remains()}")

    def remains(self) -> str:
        """What a run that fails leaves, in words."""
        last = self.checkpoints.last()
        return f"the last checkpoint is {last}" if last else "there is no checkpoint yet"

    # ---- evaluations and checkpoints -------------------------------------------------------------------

    def _is_due(self, number: int, steps: int) -> bool:
        """Whether an evaluation follows the step of this number, from 0 up, of an epoch of so many."""
        wanted = self.settings.evaluations
        return (number + 1) * wanted // steps > number * wanted // steps

    def _evaluate(self, epoch: int) -> None:
        scores = None
        if self.evaluate is not None:
            scores = self.evaluate(self.shared)
            value = scores.values[self.metric]
            better = is_better(value, self.progress.best)
            self.progress.since_best = 0 if better else self.progress.since_best + 1
            self.progress.best = value if better else self.progress.best
            values = {name: None if math.isnan(v) else v for name, v in scores.values.items()}
            self._record({"step": self.progress.step, "epoch": epoch, "scores": values, "best": better})
            # Until some epoch has a score that is a number, the last one's model is kept.
            if not better and self.progress.best is not None:
                return
        if self.keep_best is not None:
            self.keep_best(self.shared, scores)

    def _save(self) -> None:
        self.progress.scaler = self.scaler.state_dict()
        progress = asdict(self.progress)
        self.checkpoints.save(self.shared, self.optimizer, progress.pop("step"), progress)

    def _record(self, record: dict[str, Any]) -> None:
        if self.processes.rank:
            return
        with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        if self.report is not None:
            self.report(record)


def forget_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Drops the records of metrics.jsonl behind `step`, which a run that goes on from there writes again; the rest."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:  # the last line of a process that was killed
                break
    records = [record for record in records if record["step"] <= step]
    with write_atomically(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return records


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """A list that gets the number of the first SIGINT or SIGTERM; a second one interrupts at once."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt("interrupted")
        asked.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # elsewhere than in the main thread, whoever runs us there minds the signals
        before = {}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
