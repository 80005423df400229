"""Distillation from files to a folder, by the training loops of fine-tuning and of pre-training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import BertConfig
from ..encoding.encoder import resolve_dtype
from ..formats import opened
from ..inference.eight_bits import Int8Linear
from ..models import heads
from ..models.head import BertHead, expecting_new_weights
from ..packing import PackedBatch
from ..pretraining import pretrain as pretraining
from ..pretraining.batches import MaskedBatch
from ..pretraining.objectives import Divisor as WordsDivisor
from ..pretraining.objectives import MaskedWords
from ..pretraining.texts import files_of, lines_of
from ..storage import CheckpointError
from ..text.files import InputError
from ..text.tokenizer import Tokenizer
from ..training import finetune as finetuning
from ..training.features import Window
from ..training.files import DataError
from ..training.pipeline import SPEC_FILE, spec_in
from ..training.predicting import pack, scores_of
from ..training.processes import Processes
from ..training.run import Run
from ..training.tasks import DEFAULT_METRICS, NUMBERS, Spec, Task, make_task
from .distilled import RELATIONS, Distilled, Divisor, Recipe, TaskDistilled, WordsDistilled
from .folders import add_step, digest_of, history_of
from .layer_maps import layer_pairs
from .logits import logits_of
from .students import is_new, make_student

TEXTS_MEASURED = 64  # texts to which a bottleneck is fitted


@dataclass(frozen=True)
class Method:
    """How a student is made, and its losses; names as in `fastbert distill`.

    Attributes:
        weights: name of a loss -> its weight.
        layers: the argument of `layer_pairs`. relation_layer: a layer of the teacher, from 0; None for its last one.
        relation_heads: None for as many as the teacher has.
    """

    student: str
    init: str | None = None
    weights: dict[str, float] = field(default_factory=lambda: {"logits": 1.0})
    temperature: float = 2.0
    layers: str = "skip"
    relation_layer: int | None = None
    relation_heads: int | None = None

    def recipe(self, student: BertConfig, teacher: BertConfig) -> Recipe:
        """The recipe for a student and a teacher. Raises: InputError if the two do not fit."""
        pairs: list[tuple[int, int]] = []
        layers = student.num_hidden_layers, teacher.num_hidden_layers
        if any(name in self.weights for name in ("hidden", "cosine", "first", "attention")):
            pairs = layer_pairs(self.layers, "--layers", *layers)
        relation_layer = layers[1] - 1 if self.relation_layer is None else self.relation_layer
        if relation_layer >= layers[1]:
            raise InputError(
                f"--relation-layer {relation_layer}: the teacher has the layers 0 to {layers[1] - 1}"
            )  # fmt: skip
        relation_heads = self.relation_heads or teacher.heads_of(relation_layer)
        recipe = Recipe(
            self.weights, self.temperature, tuple(pairs), (layers[0] - 1, relation_layer), relation_heads
        )  # fmt: skip
        recipe.expect_fit(student, teacher)
        return recipe

    def binding(self, teacher: BertHead) -> dict[str, Any]:
        """Values that must be the same when a run is resumed."""
        return {**asdict(self), "teacher of SHA-256": digest_of(teacher.state_dict())}

    def begins_with(self, teacher: str) -> str:
        """The model whose HISTORY the student continues: a student that is a model, or the teacher."""
        return teacher if is_new(self.student) else self.student

    def note(self, teacher: str, out: Path, processes: Processes) -> None:
        """Writes HISTORY into `out`, with this command added."""
        if processes.rank == 0:
            add_step(self.begins_with(teacher), out, {"command": "distill", "model": teacher, **asdict(self)})

    def facts(self, teacher: str, models: tuple[BertHead, BertHead], recipe: Recipe) -> dict[str, Any]:
        """Entries of the report. models: (student, teacher)."""
        compared = {"pairs of layers": [list(pair) for pair in recipe.pairs]} if recipe.pairs else {}
        if any(name in self.weights for name in RELATIONS):
            compared["pair of layers of relations"] = list(recipe.relation_pair)
        counts = [parameters_of(model) for model in models]
        return {
            "teacher": teacher, "student": self.student, "init": self.init, "losses": self.weights,
            "temperature": self.temperature, "parameters": counts[0], "parameters of the teacher": counts[1],
            "layers": models[0].config.num_hidden_layers, "layers of the teacher": models[1].config.num_hidden_layers,
            **compared,
        }  # fmt: skip


def parameters_of(model: nn.Module) -> int:
    """The number of weights, with those that are stored in 8 bits."""
    linears = [module for module in model.modules() if isinstance(module, Int8Linear)]
    integers = sum(linear.out_features * (linear.in_features + linear.has_bias) for linear in linears)
    return integers + sum(p.numel() for p in model.parameters())


def _expect_length(whose: str, model: BertHead, length: int) -> None:
    most = model.config.max_position_embeddings
    if most < length:
        raise InputError(f"the {whose} takes {most} tokens at most: give --max-length, which is {length}")


# ---- a task ----------------------------------------------------------------------------------------------


@dataclass
class Distilling(Run):
    """A run in which the model is a `TaskDistilled`."""

    model: TaskDistilled

    DEFERS = False

    def __post_init__(self) -> None:
        self.PARTS = self.model.PARTS
        self.has_labels = "labels" in self.model.recipe.weights
        super().__post_init__()

    def share(self, step: list[int], epoch: int) -> tuple[list[tuple[list[int], bool]], Divisor]:
        windows = [self.windows[row] for row in step]
        labels = sum(map(self.task.weight, windows)) if self.has_labels else 1.0
        rows = sum(map(self.model.logits.rows, windows))
        # a step of empty texts may have no word to compare
        divisor = Divisor(max(1.0, labels), max(1, rows), self.plan.tokens(step), len(step))
        return self.own_batches(step), divisor

    def losses(self, batch: list[int], epoch: int, divisor: Divisor) -> tuple[Tensor, ...]:
        chosen, device = [self.windows[row] for row in batch], self.processes.device
        labels = self.task.arguments(chosen, device) if self.has_labels else {}
        places = self.model.logits.places(chosen, device)
        return self.shared(pack(chosen, batch, device), divisor=divisor, places=places, **labels)


def distill(
    request: finetuning.Request, method: Method, changes: dict[str, Any], report: Callable[..., None] | None = None
) -> dict[str, Any]:  # fmt: skip
    """One run on a task. Returns the content of report.json.

    request: a request for fine-tuning. Its model is the teacher; of its spec only the task is used.
    changes: fields of the spec that replace the teacher's.

    Raises: as `finetune`, and InputError if teacher, student and data do not fit.
    """
    history_of(method.begins_with(request.model))
    with Processes.join(request.device) as processes:
        prepare = partial(_task_prepared, method=method, changes=changes)
        done = finetuning.carry_out(request, processes, report, prepare)
        method.note(request.model, request.out, processes)
        return done


def _task_prepared(
    request: finetuning.Request, processes: Processes, method: Method, changes: dict[str, Any]
) -> finetuning.Prepared:  # fmt: skip
    tokenizer = Tokenizer.from_pretrained(request.model)
    config = BertConfig.from_pretrained(request.model)
    task = _task_of_teacher(_spec(request, config, changes), tokenizer, config, request.model)
    has_labels = "labels" in method.weights
    train = task.read(request.train, gold=has_labels)
    if has_labels:
        _expect_labels(task, train, request.model)
    features = task.features(train, training=has_labels)
    finetuning.expect_windows(features, request.train)
    held_out, to_score = finetuning.read_held_out(task, request.eval)

    teacher = finetuning.load_model(request, task, processes.device, new_head=False)
    if teacher.initialised:
        raise CheckpointError(f"the teacher {request.model} has no {', '.join(teacher.initialised)}")
    texts = pack(features.windows[:TEXTS_MEASURED], range(TEXTS_MEASURED)[: len(features.windows)], processes.device)
    student = make_student(method.student, method.init, teacher, tokenizer, texts, request.seed, request.impl)
    _expect_length("student", student, task.spec.max_length)
    recipe = method.recipe(student.config, teacher.config)
    trained = TaskDistilled(student, teacher, recipe, logits_of(task))
    facts = method.facts(request.model, (student, teacher), recipe)
    if to_score is not None:
        dtype = resolve_dtype(request.dtype, processes.device)
        scores = scores_of(teacher, task, held_out, to_score.windows, request.memory_tokens, dtype, processes)
        facts["scores of the teacher"] = scores.values
    return finetuning.Prepared(
        task, tokenizer, len(train), features, held_out, to_score, student, trained, Distilling, facts,
        method.binding(teacher),
    )  # fmt: skip


def _spec(request: finetuning.Request, config: BertConfig, changes: dict[str, Any]) -> Spec:
    """The teacher's spec with `changes`. Raises: DataError if the teacher was fine-tuned for another task."""
    task = request.spec.task
    with opened(request.model) as path:
        found = spec_in(path / SPEC_FILE)
    if found is not None and found.task != task:
        raise DataError(f"the teacher {request.model} was fine-tuned for --task {found.task}, not for --task {task}")
    stride = request.stride
    if found is None:  # `fastbert finetune` did not make the teacher: its config gives the metric
        several = config.problem_type == "multi_label_classification"
        metric = "f1_micro" if several else "pearson" if _gives_numbers(task, config) else DEFAULT_METRICS[task]
        found = replace(request.spec, metric=metric, multi_label=several)
    elif stride is None and "max_length" not in changes:
        stride = found.stride
    return finetuning.settled(replace(request, spec=replace(found, **changes), stride=stride), config)


def _gives_numbers(task: str, config: BertConfig) -> bool:
    of_texts = task in ("sentence", "pair")
    return of_texts and (
        config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1)
    )


def _task_of_teacher(spec: Spec, tokenizer: Tokenizer, config: BertConfig, teacher: str) -> Any:
    """The task with the labels of the teacher. Raises: DataError if the teacher has no head for it."""
    labels: Sequence[str] = [config.id2label[i] for i in sorted(config.id2label)]
    if spec.task == "qa":
        labels = []
    elif _gives_numbers(spec.task, config):
        labels = NUMBERS
    task = make_task(spec, tokenizer, labels)
    if not finetuning.has_own_head(config, task):
        has = ", ".join(config.architectures or ()) or "no head"
        raise DataError(f"the teacher {teacher} is of another task: it has {has}, and --task {spec.task} a {task.head}")
    task.expect_metric()
    return task


def _expect_labels(task: Task, examples: Sequence[Any], teacher: str) -> None:
    """Raises: DataError if an example has a label that the teacher does not have."""
    try:
        task.check(examples)
    except DataError as error:
        raise DataError(f"{error}, which are the labels of the teacher {teacher}") from None


# ---- masked words ----------------------------------------------------------------------------------------


class DistilledWords(MaskedWords):
    """The objective of masked words with a teacher."""

    def __init__(self, trained: Distilled) -> None:
        self.PARTS = trained.PARTS

    def losses(self, model: nn.Module, batch: MaskedBatch, divisor: WordsDivisor) -> tuple[Tensor, ...]:
        of_step = Divisor(divisor.guessed, divisor.guessed, divisor.tokens, divisor.examples)
        return model(batch.shown, divisor=of_step, labels=batch.labels)


def distill_words(
    request: pretraining.Request, method: Method, report: Callable[..., None] | None = None
) -> dict[str, Any]:  # fmt: skip
    """One run on text with masked words. Returns the content of report.json.

    request: a request for pre-training, whose tokenizer is the teacher's folder.

    Raises: as `pretrain`, and InputError if teacher, student and text do not fit.
    """
    history_of(method.begins_with(request.tokenizer))
    with Processes.join(request.device) as processes:
        done = pretraining.carry_out(request, processes, report, partial(_words_prepared, method=method))
        method.note(request.tokenizer, request.out, processes)
        return done


def _words_prepared(
    request: pretraining.Request, tokenizer: Tokenizer, processes: Processes, method: Method
) -> pretraining.Learner:  # fmt: skip
    source = request.tokenizer
    with expecting_new_weights():
        teacher = heads.BertForMaskedLM.from_pretrained(
            source, dtype=torch.float32, device=processes.device, impl=request.impl, seed=0
        )  # fmt: skip
    trains_head = bool({"labels", "logits"} & method.weights.keys())
    if teacher.initialised and trains_head:
        raise CheckpointError(
            f"the teacher {source} has no {', '.join(teacher.initialised)}, and labels and logits need them; hidden "
            "states and relations do not"
        )
    if request.eval and not trains_head:
        raise InputError("--eval measures guesses of masked words, and these losses train no head for such")
    texts = _measured(request, tokenizer, processes.device)
    student = make_student(method.student, method.init, teacher, tokenizer, texts, request.seed, request.impl)
    _expect_length("teacher", teacher, request.max_length)
    _expect_length("student", student, request.max_length)
    recipe = method.recipe(student.config, teacher.config)
    trained = WordsDistilled(student, teacher, recipe)
    facts = method.facts(source, (student, teacher), recipe)
    saved = student if trains_head else student.bert
    return pretraining.Learner(DistilledWords(trained), saved, trained, facts, method.binding(teacher))


def _measured(request: pretraining.Request, tokenizer: Tokenizer, device: torch.device) -> PackedBatch:
    """The first texts of a corpus."""
    lines = lines_of(files_of(request.corpus), request.field, request.max_line_bytes)
    texts = [line for line, _ in zip((line for line in lines if line), range(TEXTS_MEASURED), strict=False)]
    ids = tokenizer(texts, max_length=request.max_length).input_ids
    return pack([Window(row, None, number) for number, row in enumerate(ids)], range(len(ids)), device)
