"""The training loop: the optimiser steps of a plan, evaluations, and checkpoints from which a run is resumed exactly.

The loss of a step is the sum over its items (texts, labelled words, questions' windows) divided by their number in the
whole step, over all batches and processes. Order and dropout are functions of (seed, epoch, window). So the gradients
do not depend on the processes and batches, except for rounding, and a run that is resumed from a checkpoint with as
many processes and the same batches computes the same bits on a CPU.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TextIO

import torch
from torch import Tensor, nn

from ..functional import kept_gradients
from ..inference.eight_bits import holds_integers
from ..storage import write_atomically
from .averaging import WeightAverage
from .checkpoints import Checkpoints
from .optimizer import GroupedAdamW, freeze, groups_of
from .plan import dropout_seed, rate, warmup_steps
from .predicting import autocast
from .processes import Processes
from .shaping import Shaping


class TrainingError(RuntimeError):
    """A run cannot continue. The message is one line, and names the last checkpoint."""


@dataclass(frozen=True)
class Settings:
    """The settings of a run, apart from its data and its model.

    Attributes:
        step_tokens: tokens of an optimiser step.
        batch_tokens: tokens computed at once; a smaller number takes less memory and changes nothing else.
        lr: the peak of the learning rate, which rises in the first `warmup` share of all steps, then falls linearly to
            0.
        clip: the largest norm of a step's gradient; 0 for no limit.
        layer_decay: each layer's learning rate as a share of that of the layer above.
        freeze: the number of layers that are not trained, and neither are the embeddings; None trains all.
        bias_correction: of AdamW's moments; False for the optimiser of Google's BERT.
        dtype: of products; float16 scales the loss.
        evaluations: their number in each epoch, evenly spread; the last one is at the epoch's end.
        patience: the run ends with the epoch after so many evaluations without a better metric; 0 for never.
        save_every: steps between checkpoints; 0 for one per epoch. keep: the number of checkpoints that are kept.
        seconds: limit of the training time; 0 for none. The learning rate then falls with the remaining time, to 0 at
            the limit, where the run ends. Such a run is not reproducible.
        average: the running mean of the weights over about this share of all steps is evaluated and kept; 0 for the
            weights themselves. Needs a known number of steps.
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
        """The settings that must be the same when a run is resumed: all but those of memory, processes, checkpoints and
        time."""
        free = ("batch_tokens", "save_every", "keep", "seconds", "fsdp")
        settings = {name: value for name, value in asdict(self).items() if name not in free}
        return json.loads(json.dumps({**settings, "dtype": str(self.dtype)}))


@dataclass
class Progress:
    """The progress of a run.

    Attributes:
        step: steps done. skipped: how many of them the scaler for float16 skipped. seconds: the time that they took.
        best: the best metric so far. since_best: evaluations since then.
        scaler: state of the scaler for float16.
        settings: the values that must be the same when the run is resumed.
    """

    step: int = 0
    skipped: int = 0
    seconds: float = 0.0
    best: float | None = None
    since_best: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


class Loop:
    """The common part of fine-tuning and pre-training. A subclass has the fields below, calls `begin`, and implements
    the methods that raise NotImplementedError.

    Attributes:
        plan: `steps(epoch)` are the steps of an epoch, `tokens(step)` is the number of tokens of a step.
        steps: number of steps of the run; 0 if only its time is limited.
        report: called in the first process with each record of metrics.jsonl.
        shaping: changes the weights besides the optimiser.
    """

    PARTS: ClassVar[tuple[str, ...]] = ()  # names of further losses that are recorded
    SAVES_EPOCHS: ClassVar[bool] = True  # whether there is a checkpoint after each epoch in addition to `save_every`

    model: nn.Module
    settings: Settings
    out: Path
    processes: Processes
    report: Callable[[dict[str, Any]], None] | None
    plan: Any
    steps: int
    shaping: Shaping = Shaping()

    def begin(self, plan: Any, steps: int, binding: dict[str, Any]) -> None:
        """binding: further values that must be the same when the run is resumed, such as its data; JSON values."""
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
        self.start = time.perf_counter()  # `train` sets it
        self._records: TextIO | None = None

    # ---- for subclasses --------------------------------------------------------------------------------

    def epochs(self) -> Iterator[tuple[int, int]]:
        """(epoch, its number of steps), in order."""
        raise NotImplementedError

    def share(self, step: Any, epoch: int) -> tuple[list[tuple[Any, bool]], Any]:
        """(batches, divisor) of this process for a step. All processes have as many batches; each batch comes with
        whether it counts. The divisor of the losses is that of the whole step."""
        raise NotImplementedError

    def losses(self, batch: Any, epoch: int, divisor: Any) -> tuple[Tensor, ...]:
        """The loss of a batch, which is differentiated, then the losses named in PARTS."""
        raise NotImplementedError

    def evaluated(self, epoch: int) -> None:
        """Evaluates the model, and saves it."""
        raise NotImplementedError

    def is_due(self, number: int, steps: int) -> bool:
        """Whether there is an evaluation after step `number`, from 0, of an epoch with so many steps."""
        raise NotImplementedError

    def is_over(self) -> bool:
        """Whether the run ends after this epoch although more epochs follow."""
        return False

    # ---- the run ---------------------------------------------------------------------------------------

    def resume(self) -> int:
        """Loads the last checkpoint. Returns the number of steps that are done, 0 if there is no checkpoint.

        Raises: TrainingError if the checkpoint is of another run.
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
        """Trains to the end of the run, or of the epoch after which `is_over`.

        Raises: KeyboardInterrupt, after a checkpoint, on SIGINT or SIGTERM; TrainingError, before the step changes the
            model, if the loss or the gradient is not finite.
        """
        begun = 0
        # the time at which the run would have begun without interruptions
        self.start = time.perf_counter() - self.progress.seconds
        self.shaping.begin(self.model)
        self.shared.train()
        # Gradients that are summed over processes are not those that our backward pass wrote.
        kept = kept_gradients.Kept() if self.processes.count == 1 else nullcontext()
        try:
            with kept, self._open_records(), _asked_to_stop() as asked:
                for epoch, count in self.epochs():
                    if self.has_ended():
                        return
                    if begun + count > self.progress.step:
                        self._epoch(epoch, begun, count, asked)
                    begun += count
                    if self.is_over():
                        return
        finally:
            self.optimizer.settle()

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
                self.optimizer.settle()
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
        """Whether all steps are done, or the time limit is reached."""
        done, limit = self.progress, self.settings.seconds
        return done.step == self.steps > 0 or 0.0 < limit <= done.seconds

    def _rate(self) -> float:
        """The next step's learning rate as a share of its peak."""
        limit = self.settings.seconds
        if not limit:
            return rate(self.progress.step, self.steps, self.warmup)
        return max(0.0, rate(self.progress.seconds, limit, limit * self.settings.warmup))

    # ---- a step ----------------------------------------------------------------------------------------

    def _step(self, step: Any, epoch: int, asked: list[int]) -> tuple[dict[str, Any], bool]:
        """One optimiser step. Returns its record, and whether a process got a signal to stop."""
        s, done, share_of_rate = self.settings, self.progress.step, self._rate()
        begin = time.perf_counter()
        if not (self.shared.training and self.model.training):  # an evaluation came before
            self.shared.train()
        losses = self._gradients(step, epoch)
        self.scaler.unscale_(self.optimizer)
        norm = self.optimizer.clip(self.settings.clip or math.inf)
        # One sum over processes: the losses of each, whether it got a signal, and the time of the first process.
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
        """Adds the gradient of a step's loss to the parameters. Returns this process's part of the loss and of PARTS,
        detached, [1 + parts] float64."""
        batches, divisor = self.share(step, epoch)
        total = torch.zeros(1 + len(self.PARTS), dtype=torch.float64, device=self.processes.device)
        for place, (batch, counts) in enumerate(batches):
            # The model draws its dropout seed from torch's generator. Masks differ by the numbers of the windows.
            _seed_generators(self.processes.device, dropout_seed(self.settings.seed, epoch))
            with self._without_exchange(place + 1 < len(batches)):
                with autocast(self.processes.device, self.settings.dtype):
                    losses = self.losses(batch, epoch, divisor)
                if not counts:  # a process without a batch of its own takes part in the exchange of gradients
                    losses = [loss * 0.0 for loss in losses]
                # The exchange gives the mean over processes, and the step needs the sum.
                self.scaler.scale(losses[0] * self.processes.count).backward()
            total += torch.stack([loss.detach().double() for loss in losses])
        return total

    def _without_exchange(self, without: bool) -> Any:
        """A block that exchanges no gradients if `without`: only the last batch of a step does."""
        if not without or self.processes.count == 1 or self.settings.fsdp:
            return nullcontext()
        return self.shared.no_sync()

    def _expect_finite(self) -> None:
        """Raises TrainingError if a parameter is not finite, since no run could be resumed from such a checkpoint."""
        bad = torch.zeros((), dtype=torch.float32, device=self.processes.device)
        for p in self.shared.parameters():
            local = p.to_local() if hasattr(p, "to_local") else p
            bad += (~torch.isfinite(local.detach())).sum()
        if (count := int(self.processes.sum(bad))) > 0:
            raise self._failure(f"step {self.progress.step:,}: {count:,} parameters are no longer finite")

    def _failure(self, what: str) -> TrainingError:
        return TrainingError(f"{what}; a lower --lr may help; {self.remains()}")

    def remains(self) -> str:
        """The last checkpoint of a run that failed, in words."""
        last = self.checkpoints.last()
        return f"the last checkpoint is {last}" if last else "there is no checkpoint yet"

    # ---- files -----------------------------------------------------------------------------------------

    def _save(self) -> None:
        self.progress.scaler = self.scaler.state_dict()
        progress = asdict(self.progress)
        self.checkpoints.save(self.shared, self.optimizer, self._means(), progress.pop("step"), progress)

    def _means(self) -> dict[str, Tensor]:
        return {} if self.average is None else self.average.means

    def _appending(self) -> TextIO:
        return open(self.out / "metrics.jsonl", "a", encoding="utf-8")

    @contextmanager
    def _open_records(self) -> Iterator[None]:
        """A block in which the file of records stays open: to open it takes longer than to write a record."""
        if self.processes.rank:
            yield
            return
        with self._appending() as self._records:
            try:
                yield
            finally:
                self._records = None

    def _record(self, record: dict[str, Any]) -> None:
        if self.processes.rank:
            return
        with self._appending() if self._records is None else nullcontext(self._records) as stream:
            stream.write(json.dumps(record) + "\n")
            stream.flush()
        if self.report is not None:
            self.report(record)


def _seed_generators(device: torch.device, seed: int) -> None:
    """torch.manual_seed for a run on this device. On a CPU it seeds torch's CPU generator alone: torch.manual_seed also
    records a stack trace for every other kind of device that is not initialised, 0.5 ms in each step."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def forget_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Removes the records of metrics.jsonl after `step`, which the resumed run writes again, or all if `step` is 0.
    Returns the others."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:  # an incomplete line of a process that was killed
                break
    records = [record for record in records if record["step"] <= step] if step else []
    with write_atomically(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return records


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """A block in which the first SIGINT or SIGTERM adds its number to the list; a second one interrupts at once."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt("interrupted")
        asked.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # only the main thread can set handlers
        before = {}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
