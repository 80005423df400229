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
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..inference.eight_bits import holds_integers
from ..storage import write_atomically
from .averaging import WeightAverage
from .checkpoints import Checkpoints
from .features import Window
from .metrics import Scores, is_better
from .optimizer import GroupedAdamW, freeze, groups_of
from .plan import Plan, dropout_seed, rate, warmup_steps
from .predicting import autocast, pack
from .processes import Processes
from .shaping import Shaping


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
        seconds: of training, 0 for no limit. With a limit the learning rate falls with the time that is left, so that
            it comes to 0 when the time is up, and the run ends there; then it takes other steps each time.
        average: what is evaluated and kept is the running mean of the weights over about this share of all steps; 0 for
            the weights themselves. Needs a number of steps.
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
    seconds: float = 0.0
    average: float = 0.0
    fsdp: bool = False

    def binding(self) -> dict[str, Any]:
        """What must be the same where a run goes on: all but memory, processes and checkpoints."""
        free = ("batch_tokens", "save_every", "keep", "seconds", "fsdp")
        settings = {name: value for name, value in asdict(self).items() if name not in free}
        return json.loads(json.dumps({**settings, "dtype": str(self.dtype)}))


@dataclass
class Progress:
    """Where a run is: steps done, how many of them float16 skipped, the seconds they took, its best metric so far, the
    evaluations since, and what float16 scales by."""

    step: int = 0
    skipped: int = 0
    seconds: float = 0.0
    best: float | None = None
    since_best: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


class Loop:
    """What fine-tuning and pre-training have in common. A subclass has the fields below, calls `begin`, and says what a
    step is made of: `share` and `losses`.

    Attributes:
        plan: `steps(epoch)` are the steps of an epoch, `tokens(step)` those of a step.
        steps: of the run; 0 where only its time is limited.
        report: called in the first process with each record of metrics.jsonl.
        shaping: what changes the weights beside the optimiser.
    """

    PARTS: ClassVar[tuple[str, ...]] = ()  # the objectives whose losses are recorded beside the loss
    SAVES_EPOCHS: ClassVar[bool] = True  # whether a checkpoint follows each epoch, whatever `save_every` says

    model: nn.Module
    settings: Settings
    out: Path
    processes: Processes
    report: Callable[[dict[str, Any]], None] | None
    plan: Any
    steps: int
    shaping: Shaping = Shaping()

    def begin(self, plan: Any, steps: int, binding: dict[str, Any]) -> None:
        """binding: what else must be the same where the run goes on, such as its data, as JSON has it."""
        s = self.settings
        if holds_integers(self.model):
            raise TrainingError("the model is in 8 bits, which cannot be trained: give the one that it was made of")
        self.plan, self.steps = plan, steps
        self.warmup = warmup_steps(steps, s.warmup)
        freeze(self.model, s.freeze)
        self.shared = self.processes.share(self.model, s.fsdp)
        groups = groups_of(self.shared.named_parameters(), s.weight_decay, s.layer_decay)
        self.optimizer = GroupedAdamW(groups, s.betas, s.eps, s.bias_correction)
        self.scaler = torch.amp.GradScaler(self.processes.device.type, enabled=s.dtype == torch.float16)
        self.checkpoints = Checkpoints(self.out, s.keep, self.processes)
        self.average = WeightAverage(self.shared, steps, s.average) if s.average else None
        self.progress = Progress(settings=s.binding() | binding)
        self.start = time.perf_counter()  # where the run begins on the clock; see `train`

    # ---- what a subclass says --------------------------------------------------------------------------

    def epochs(self) -> Iterator[tuple[int, int]]:
        """(epoch, how many steps it has), in order."""
        raise NotImplementedError

    def share(self, step: Any, epoch: int) -> tuple[list[tuple[Any, bool]], Any]:
        """What this process computes of a step: batches, of every process as many, each with whether it counts; and
        what the losses are divided by, which is of the whole step."""
        raise NotImplementedError

    def losses(self, batch: Any, epoch: int, divisor: Any) -> tuple[Tensor, ...]:
        """The loss of a batch, which is differentiated, then those of PARTS."""
        raise NotImplementedError

    def evaluated(self, epoch: int) -> None:
        """Evaluates the model, and saves it."""
        raise NotImplementedError

    def is_due(self, number: int, steps: int) -> bool:
        """Whether an evaluation follows the step of this number, from 0 up, of an epoch of so many."""
        raise NotImplementedError

    def is_over(self) -> bool:
        """Whether the run ends after this epoch, although there are others."""
        return False

    # ---- the whole -------------------------------------------------------------------------------------

    def resume(self) -> int:
        """Goes on from the last checkpoint; the steps that are done, 0 where there is none.

        Raises: TrainingError where the checkpoint is of another run.
        """
        path = self.checkpoints.last()
        if path is None:
            return 0
        loaded = Progress(**self.checkpoints.progress(path))
        for name, value in self.progress.settings.items():
            if loaded.settings.get(name) != value:
                raise TrainingError(
                    f"{path} is of a run with {name} {loaded.settings.get(name)}, not {value}: "
                    "go on with the same settings and data, or begin another --out"
                )
        self.checkpoints.load(path, self.shared, self.optimizer, self._means())
        self.progress = loaded
        self.scaler.load_state_dict(loaded.scaler)
        return loaded.step

    def train(self) -> None:
        """To the end, or to the end of an epoch after which `patience` is spent.

        Raises: KeyboardInterrupt after a checkpoint where SIGINT or SIGTERM came; TrainingError where the loss or the
            gradient is not finite, before the model takes that step.
        """
        begun = 0
        # Where the run began on the clock, had it never been interrupted.
        self.start = time.perf_counter() - self.progress.seconds
        self.shaping.begin(self.model)
        with _asked_to_stop() as asked:
            for epoch, count in self.epochs():
                if self.has_ended():
                    return
                if begun + count > self.progress.step:
                    self._epoch(epoch, begun, count, asked)
                begun += count
                if self.is_over():
                    return

    def _epoch(self, epoch: int, begun: int, count: int, asked: list[int]) -> None:
        steps, s = self.plan.steps(epoch), self.settings
        for number in range(self.progress.step - begun, count):
            record, stop = self._step(steps[number], epoch, asked)
            self._record(record)
            done = self.progress.step
            last = number + 1 == count or self.has_ended()
            saves = (last and self.SAVES_EPOCHS) or self.has_ended() or stop
            saves = saves or (s.save_every > 0 and done % s.save_every == 0)
            evaluates = self.is_due(number, count)
            if saves or evaluates:
                self._expect_finite()
            if evaluates:
                with nullcontext() if self.average is None else self.average.applied():
                    self.evaluated(epoch)
            if saves:
                self._save()
            if stop:
                of = f" of {self.steps:,}" if self.steps else ""
                raise KeyboardInterrupt(
                    f"stopped after step {done:,}{of}, which is saved; "
                    "the same command with --resume goes on from there"
                )
            if last:
                return

    def has_ended(self) -> bool:
        """Whether all steps are done, or the time is up."""
        done, limit = self.progress, self.settings.seconds
        return done.step == self.steps > 0 or 0.0 < limit <= done.seconds

    def _rate(self) -> float:
        """The coming step's learning rate as a share of its peak."""
        limit = self.settings.seconds
        if not limit:
            return rate(self.progress.step, self.steps, self.warmup)
        return max(0.0, rate(self.progress.seconds, limit, limit * self.settings.warmup))

    # ---- a step ----------------------------------------------------------------------------------------

    def _step(self, step: Any, epoch: int, asked: list[int]) -> tuple[dict[str, Any], bool]:
        """One optimiser step: its record, and whether any process was asked to stop."""
        s, done, share_of_rate = self.settings, self.progress.step, self._rate()
        begin = time.perf_counter()
        self.shared.train()
        losses = self._gradients(step, epoch)
        self.scaler.unscale_(self.optimizer)
        norm = self.optimizer.clip(self.settings.clip or math.inf)
        # One sum over processes for all: what each has of the losses, whether it was asked to stop, and the time, which
        # is the first process' own.
        seconds = 0.0 if self.processes.rank else time.perf_counter() - self.start
        told = self.processes.sum(torch.cat((losses, losses.new_tensor([float(bool(asked)), seconds]))))
        loss, *parts, asked_to, self.progress.seconds = told.tolist()
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.scaler.is_enabled()):
            raise self._failure(f"step {done + 1:,}: the loss is {loss:.6g} and its gradient's norm {norm:.6g}")
        lr = s.lr * share_of_rate
        self.optimizer.set_rate(lr, done + 1 - self.progress.skipped)
        self.scaler.step(self.optimizer)
        scale = self.scaler.get_scale()
        self.scaler.update()
        self.progress.skipped += self.scaler.get_scale() < scale
        self.optimizer.zero_grad()
        self.progress.step = done + 1
        self.shaping.after_step(self.model, done + 1, self.steps)
        if self.average is not None:
            self.average.update(done + 1)
        tokens = self.plan.tokens(step)
        return {
            "step": done + 1, "epoch": epoch, "loss": loss, **dict(zip(self.PARTS, parts, strict=True)), "lr": lr,
            "grad_norm": norm, "tokens": tokens,
            "tokens_per_second": round(tokens / (time.perf_counter() - begin), 1),
        }, asked_to > 0  # fmt: skip

    def _gradients(self, step: Any, epoch: int) -> Tensor:
        """Adds the gradient of a step's loss to the parameters; this process' part of the loss and of PARTS, detached,
        [1 + parts] float64."""
        batches, divisor = self.share(step, epoch)
        total = torch.zeros(1 + len(self.PARTS), dtype=torch.float64, device=self.processes.device)
        for place, (batch, counts) in enumerate(batches):
            # The model draws its seed from torch's generator. What is in a batch is told apart by its names.
            torch.manual_seed(dropout_seed(self.settings.seed, epoch))
            with self._without_exchange(place + 1 < len(batches)):
                with autocast(self.processes.device, self.settings.dtype):
                    losses = self.losses(batch, epoch, divisor)
                if not counts:  # a process with nothing left to do takes part in the exchange of gradients
                    losses = [loss * 0.0 for loss in losses]
                # Processes' gradients are averaged, and a step's are to be added.
                self.scaler.scale(losses[0] * self.processes.count).backward()
            total += torch.stack([loss.detach().double() for loss in losses])
        return total

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

    # ---- files -----------------------------------------------------------------------------------------

    def _save(self) -> None:
        self.progress.scaler = self.scaler.state_dict()
        progress = asdict(self.progress)
        self.checkpoints.save(self.shared, self.optimizer, self._means(), progress.pop("step"), progress)

    def _means(self) -> dict[str, Tensor]:
        return {} if self.average is None else self.average.means

    def _record(self, record: dict[str, Any]) -> None:
        if self.processes.rank:
            return
        with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        if self.report is not None:
            self.report(record)


@dataclass
class Run(Loop):
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
    shaping: Shaping = field(default_factory=Shaping)

    def __post_init__(self) -> None:
        s = self.settings
        plan = Plan(s.seed, [len(w.input_ids) for w in self.windows], s.step_tokens, s.batch_tokens)
        self.steps_of_epochs = plan.count_steps(s.epochs)
        self.begin(plan, sum(self.steps_of_epochs), {"windows": len(self.windows)} | self.binding)

    def train(self) -> None:
        if self.progress.step == 0 and self.evaluate is not None and self.shaping.keeps_first():
            self.evaluated(0)
        super().train()

    def epochs(self) -> Iterator[tuple[int, int]]:
        yield from enumerate(self.steps_of_epochs)

    def is_due(self, number: int, steps: int) -> bool:
        """Evaluations are spread evenly over the epoch; without one the model is kept at its end."""
        wanted = self.settings.evaluations if self.evaluate is not None else 1
        return (number + 1) * wanted // steps > number * wanted // steps

    def is_over(self) -> bool:
        return 0 < self.settings.patience <= self.progress.since_best

    def share(self, step: list[int], epoch: int) -> tuple[list[tuple[list[int], bool]], float]:
        return self.own_batches(step), sum(self.task.weight(self.windows[row]) for row in step)

    def own_batches(self, step: list[int]) -> list[tuple[list[int], bool]]:
        """The batches of this process, each with whether it counts."""
        batches = self.plan.batches(step, self.processes.rank, self.processes.count)
        return [(rows or step[:1], bool(rows)) for rows in batches]

    def losses(self, batch: list[int], epoch: int, divisor: float) -> tuple[Tensor]:
        chosen, device = [self.windows[row] for row in batch], self.processes.device
        packed = pack(chosen, batch, device)
        return (self.shared(packed, num_items_in_batch=divisor, **self.task.arguments(chosen, device)).loss,)

    def evaluated(self, epoch: int) -> None:
        """Of evaluations the model of the best one is kept, once what changes its weights has changed all."""
        scores, whole = None, self.shaping.is_whole(self.progress.step, self.steps)
        if self.evaluate is not None:
            scores = self.evaluate(self.shared)
            value = scores.values[self.metric]
            better = whole and is_better(value, self.progress.best)
            if whole:
                self.progress.since_best = 0 if better else self.progress.since_best + 1
            self.progress.best = value if better else self.progress.best
            values = {name: None if math.isnan(v) else v for name, v in scores.values.items()}
            self._record({"step": self.progress.step, "epoch": epoch, "scores": values, "best": better})
            # Until some epoch has a score that is a number, the last one's model is kept.
            if not better and self.progress.best is not None:
                return
        if whole and self.keep_best is not None:
            self.keep_best(self.shared, scores)


def forget_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Drops the records of metrics.jsonl behind `step`, which a run that goes on from there writes again; the rest.
    With 0 the run begins anew, and none is left."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:  # the last line of a process that was killed
                break
    records = [record for record in records if record["step"] <= step] if step else []
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
