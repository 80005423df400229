"""Fine-tuning from files to a folder: data, labels, model, training loop, and a report that defines its numbers."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import BertConfig
from ..encoding.encoder import resolve_dtype
from ..models import heads
from ..models.head import expecting_new_weights
from ..storage import without_nan, write_atomically, write_json
from ..text.tokenizer import Tokenizer
from .board import Board, summary_writer
from .checkpoints import RECORDS, folder_of_run
from .curve import draw
from .features import Features
from .files import DataError
from .loop import Settings, TrainingError, forget_after
from .metrics import Scores
from .pipeline import SPEC_FILE
from .predicting import scores_of
from .processes import Processes
from .run import Run
from .shaping import Shaping
from .tasks import DEFAULT_STRIDES, Spec, make_task

EXAMPLES_PER_STEP = 32  # if no number of tokens is given


@dataclass(frozen=True)
class Request:
    """The options of `fastbert finetune`, under the same names."""

    model: str
    train: str
    out: Path
    spec: Spec
    stride: int | None = None  # replaces the spec's; None for the task's default, at most a third of a window
    eval: str | None = None
    labels: tuple[str, ...] = ()
    class_weights: str = "none"
    epochs: int = 3
    batch_tokens: int | None = None
    memory_tokens: int = 16384
    lr: float = 5e-5
    seed: int = 0
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    layer_decay: float = 1.0
    freeze: int | None = None
    bias_correction: bool = True
    evaluations: int = 1
    patience: int = 0
    average: float = 0.0
    save_every: int = 0
    keep: int = 2
    resume: bool = False
    dtype: str = "auto"
    device: str = "auto"
    fsdp: bool = False
    checkpoint_activations: bool = False
    tensorboard: bool = False
    impl: str | None = None


def usual_step_tokens(lengths: Sequence[int]) -> int:
    """The default number of tokens of a step: EXAMPLES_PER_STEP windows of average length."""
    return math.ceil(EXAMPLES_PER_STEP * statistics.fmean(lengths))


def finetune(
    request: Request, report: Callable[[dict[str, Any], int], None] | None = None, shaping: Shaping | None = None
) -> dict[str, Any]:
    """One run. Returns the content of report.json.

    report: called in the first process with each record of metrics.jsonl and the total number of steps.
    shaping: changes the weights besides the optimiser.

    Raises: DataError, TrainingError or CheckpointError, in one line; KeyboardInterrupt after a checkpoint.
    """
    with Processes.join(request.device) as processes:
        return carry_out(request, processes, report, shaping=shaping)


@dataclass(frozen=True)
class Prepared:
    """A run on a task that is ready to begin.

    Attributes:
        examples: number of examples to train on.
        features: the features of these examples.
        held_out, to_score: the examples for evaluation and their features, or None.
        model: the model that is saved. trained: the module that the loop trains: the model, or a module around it.
        kind: `Run` or a subclass.
        facts: further entries of the report. binding: further values that must be the same when the run is resumed.
    """

    task: Any
    tokenizer: Tokenizer
    examples: int
    features: Features
    held_out: Sequence[Any] | None
    to_score: Features | None
    model: nn.Module
    trained: nn.Module
    kind: Callable[..., Run] = Run
    facts: dict[str, Any] = field(default_factory=dict)
    binding: dict[str, Any] = field(default_factory=dict)


def carry_out(
    request: Request, processes: Processes, report: Any,
    prepare: Callable[[Request, Processes], Prepared] | None = None, shaping: Shaping | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A run on a task that `prepare` makes from the request, by default a fine-tuning. Returns the content of
    report.json."""
    shaping = shaping or Shaping()
    out = folder_of_run(request.out, request.resume, request.model)
    if request.tensorboard:
        summary_writer()
    made = (prepare or prepared)(request, processes)
    task, model, spec = made.task, made.model, made.task.spec
    if request.checkpoint_activations:
        model.gradient_checkpointing_enable()
    shaping.prepare(model, task, made.features.windows)
    lengths = [len(w.input_ids) for w in made.features.windows]
    step_tokens = request.batch_tokens or usual_step_tokens(lengths)
    dtype = resolve_dtype(request.dtype, processes.device)
    settings = Settings(
        epochs=request.epochs, step_tokens=step_tokens, batch_tokens=request.memory_tokens, lr=request.lr,
        seed=request.seed, warmup=request.warmup, weight_decay=request.weight_decay, clip=request.clip,
        bias_correction=request.bias_correction, layer_decay=request.layer_decay, freeze=request.freeze, dtype=dtype,
        evaluations=request.evaluations, patience=request.patience, save_every=request.save_every, keep=request.keep,
        average=request.average, fsdp=request.fsdp,
    )  # fmt: skip
    facts = {
        "model": request.model, "train": request.train, "eval": request.eval, "task": spec.task, "metric": spec.metric,
        "labels": task.labels, "class weights": task.class_weights,
        "max length": spec.max_length, "stride": spec.stride,
        "examples": made.examples, "windows": len(lengths), "tokens an epoch": sum(lengths),
        "tokens a step": step_tokens, "products in": str(dtype).removeprefix("torch."), "processes": processes.count,
        "seed": request.seed, "epochs": request.epochs, "learning rate": request.lr,
        "weights averaged over a share of the steps": request.average,
        "training notes": made.features.notes, "files": task.notes,
        "evaluation examples": None if made.held_out is None else len(made.held_out),
        "evaluation notes": None if made.to_score is None else made.to_score.notes, **made.facts,
    }  # fmt: skip

    def evaluate(trained: nn.Module) -> Scores:
        windows, served = made.to_score.windows, shaping.served(trained)
        return scores_of(served, task, made.held_out, windows, request.memory_tokens, dtype, processes)

    best: dict[str, Any] = {}

    def keep_best(shared: nn.Module, scores: Scores | None) -> None:
        state = state_within(shared, made.trained, model)
        if processes.rank == 0:
            threshold = spec.threshold if scores is None else scores.values.get("threshold", spec.threshold)
            save_model(out, model, state, made.tokenizer, replace(spec, threshold=threshold), shaping)
            best.update(scores=scores and scores.values, definitions=scores and scores.definitions)
            best["best epoch"] = None if scores is None else epochs_done(run.steps_of_epochs, run.progress.step)
            write_json(out / "report.json", without_nan({**facts, **best}))

    run = made.kind(
        made.trained, task, made.features.windows, settings, out, processes,
        metric=spec.score, evaluate=evaluate if made.to_score else None, keep_best=keep_best,
        binding={
            "labels": task.labels, "class weights": task.class_weights, **json.loads(json.dumps(asdict(spec))),
            "training data of SHA-256": _digest(request.train),
            "evaluation data of SHA-256": None if request.eval is None else _digest(request.eval), **made.binding,
            **shaping.binding(),
        },
        shaping=shaping,
    )  # fmt: skip
    done = run.resume() if request.resume else 0
    if processes.rank == 0:
        forget_after(out / "metrics.jsonl", done)
    with Board(out / "tensorboard", done) if request.tensorboard and processes.rank == 0 else nullcontext() as board:

        def tell(record: dict[str, Any]) -> None:
            if board is not None:
                board.write(record)
            if report is not None:
                report(record, run.steps)

        run.report = tell
        try:
            run.train()
        except OSError as error:
            if isinstance(error, BrokenPipeError):  # the reader of the progress has gone; this is no error of a file
                raise
            what = f"cannot write into {out}: {error.strerror or error}"
            raise TrainingError(f"{what}; {run.remains()}") from error
    if processes.rank == 0:
        draw(out / "metrics.jsonl", out / "curve.svg", spec.score)
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def prepared(request: Request, processes: Processes) -> Prepared:
    """The data, labels and model of a fine-tuning."""
    tokenizer = Tokenizer.from_pretrained(request.model)
    config = BertConfig.from_pretrained(request.model)
    task = make_task(settled(request, config), tokenizer, request.labels)
    named = own_labels(config, task)
    train = task.read(request.train)
    task.settle(train, request.labels, named)
    features = task.features(train, training=True)
    expect_windows(features, request.train)
    task.weigh(request.class_weights, features.windows)
    held_out, to_score = read_held_out(task, request.eval)

    own_head = has_own_head(config, task) and (named or []) == task.labels
    model = load_model(request, task, processes.device, new_head=not own_head)
    if not own_head:
        task.begin(model, features.windows)
    weigh_classes(model, task)
    return Prepared(task, tokenizer, len(train), features, held_out, to_score, model, model)


def settled(request: Request, config: BertConfig) -> Spec:
    """The spec, with a length and a stride of windows that fit the model."""
    length = min(request.spec.max_length, config.max_position_embeddings)
    stride = min(DEFAULT_STRIDES.get(request.spec.task, 0), length // 3) if request.stride is None else request.stride
    return replace(request.spec, max_length=length, stride=stride)


def expect_windows(features: Features, path: str) -> None:
    """Raises: DataError if a file gave nothing to train on."""
    if not features.windows:
        why = "; ".join(f"{what}: {count:,}" for what, count in features.notes.items() if count)
        raise DataError(f"{path}: no example can be learnt from" + (f" ({why})" if why else ""))


def read_held_out(task: Any, path: str | None) -> tuple[Sequence[Any] | None, Features | None]:
    """(the examples of the evaluation file, their features); (None, None) without a file."""
    if path is None:
        return None, None
    held_out = task.read(path)
    task.check(held_out)
    return held_out, task.features(held_out, training=False)


def weigh_classes(model: nn.Module, task: Any) -> None:
    """Sets the weights of the classes in the loss of a head."""
    if task.class_weights is not None:
        model.class_weights = torch.tensor(task.class_weights, dtype=torch.float32, device=model.device)


def several(request: Request, seeds: int, report: Any = None) -> dict[str, Any]:
    """Runs with the seeds request.seed, request.seed + 1, ..., in the folders out/seed-N. Writes the model of the best
    run to `out`, and a report with the median and the range of the metric, which is returned."""
    folder_of_run(request.out, request.resume, request.model, records=f"seed-*/{RECORDS}")
    reports = []
    # All runs share one process group: processes that form a second one may still find the address of the first.
    with Processes.join(request.device) as processes:
        for seed in range(request.seed, request.seed + seeds):
            out = request.out / f"seed-{seed}"
            reports.append((carry_out(replace(request, seed=seed, out=out), processes, report), out))
    name = request.spec.score
    values = [each["scores"][name] for each, _ in reports]
    numbers = [-math.inf if value is None else value for value in values]
    best, folder = reports[numbers.index(max(numbers))]
    summary = without_nan({
        **best,
        "seeds": {
            "metric": name, "seeds": [each["seed"] for each, _ in reports], "values": values,
            "median": statistics.median(numbers), "lowest": min(numbers), "highest": max(numbers),
        },
    })  # fmt: skip
    if processes.rank == 0:
        for path in folder.iterdir():
            if path.is_file() and path.name not in ("metrics.jsonl", "curve.svg", "report.json"):
                with write_atomically(request.out / path.name) as temporary:
                    shutil.copy2(path, temporary)
        write_json(request.out / "report.json", summary)
    return summary


def _digest(path: str) -> str:
    return sha256(Path(path).read_bytes()).hexdigest()


def epochs_done(steps_of_epochs: Sequence[int], step: int) -> int | float:
    """The number of epochs after `step` steps: an integer before and after an epoch, else with two decimals."""
    if step == 0:
        return 0
    ends = list(accumulate(steps_of_epochs))
    epoch = bisect_left(ends, step)
    left = ends[epoch] - step
    return epoch + 1 if left == 0 else round(epoch + 1 - left / steps_of_epochs[epoch], 2)


def has_own_head(config: BertConfig, task: Any) -> bool:
    """Whether a checkpoint has a head for this task, with a loss of its kind."""
    kind = config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")
    return task.head in (config.architectures or ()) and task.problem_type in (None, kind)


def own_labels(config: BertConfig, task: Any) -> list[str] | None:
    """The labels of a checkpoint's own head for this task; None if it has no such head, or labels without names."""
    if not has_own_head(config, task) or not config.id2label:
        return None
    names = [config.id2label[i] for i in sorted(config.id2label)]
    return None if all(name.upper() == f"LABEL_{i}" for i, name in enumerate(names)) else names


def load_model(request: Request, task: Any, device: torch.device, new_head: bool) -> nn.Module:
    with expecting_new_weights():
        return getattr(heads, task.head).from_pretrained(
            request.model, dtype=torch.float32, device=device, impl=request.impl, seed=request.seed,
            new_head=new_head, **task.changes,
        )  # fmt: skip


def whole_state(shared: nn.Module) -> dict[str, torch.Tensor]:
    """name -> complete parameter on the CPU. All processes must call this."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(shared, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def state_within(shared: nn.Module, trained: nn.Module, model: nn.Module) -> dict[str, torch.Tensor]:
    """`whole_state` of `model` alone, where `trained` is the model or a module around it, and `shared` that module as
    the processes share it."""
    prefix = next(name for name, module in trained.named_modules() if module is model)
    prefix = f"{prefix}." if prefix else ""
    state = whole_state(shared)
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def save_model(
    out: Path,
    model: nn.Module,
    state: dict[str, torch.Tensor],
    tokenizer: Tokenizer,
    spec: Spec,
    shaping: Shaping | None = None,
) -> None:
    """Writes the folder that `fastbert predict` reads. Transformers reads it too, unless `shaping` writes weights in a
    format that it does not know."""
    tokenizer.save_pretrained(out)
    write_json(out / SPEC_FILE, asdict(spec))
    (shaping or Shaping()).save(model, out, state)
