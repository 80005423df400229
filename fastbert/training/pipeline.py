"""Predictions of a fine-tuned model: `fastbert.pipeline(DIR)`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import BertConfig
from ..encoding.encoder import resolve_device, resolve_dtype
from ..formats import opened
from ..inference.eight_bits import holds_integers
from ..models import heads
from ..models.head import expecting_new_weights
from ..storage import CheckpointError, read_json
from ..text.batching import tokens_per_batch
from ..text.tokenizer import Tokenizer
from .features import Features
from .files import Question, Sentence
from .labels import Text
from .predicting import outputs_of
from .processes import Processes
from .task import Spec
from .tasks import make_task
from .text_tasks import NextSentenceTask

SPEC_FILE = "fastbert_task.json"
WORDS = re.compile(r"\w+|[^\w\s]")  # the words of a text that is tagged


class Pipeline:
    """Predictions of a model that `fastbert finetune` made.

        classify = fastbert.pipeline("sentiment")
        classify(["a fine film"])                       # [{"label": "positive", "score": 0.98}]
        tag(["Ada Lovelace wrote it"])                  # [{"text": ..., "entities": [{"type": ..., "start": 0, ...}]}]
        answer([("who wrote it?", "Ada wrote it.")])    # [{"answer": "Ada", "start": 0, "end": 3, "score": ...}]

    `pipeline` makes one. `task` holds the labels and what the model was trained for.
    """

    def __init__(self, model: Any, task: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.task, self.dtype = model, task, dtype
        self.processes = Processes(0, 1, device)

    def __call__(
        self, inputs: Sequence[Any], *, all_scores: bool = False, batch_tokens: int | None = None
    ) -> list[dict[str, Any]]:
        """A dict for each input, in their order.

        Args:
            inputs: texts; pairs of texts; for entities texts or lists of words; for answers (question, context).
            all_scores: also return the score of every label, the tag of every word, or the difference between the
                scores of no answer and of the best answer.
            batch_tokens: tokens computed at once; by default a number that suits the device.

        Returns: {"label", "score"}; {"score"} if labels are numbers; {"labels"}, a list of {"label", "score"} with the
            likeliest first, if a text may have any number of labels; {"text", "entities"}, each entity with type, text,
            start and end in characters of the text, and score, the mean probability of its words' tags; {"id",
            "answer", "score", "start", "end"}, with "" and None if there is no answer.

        Raises: TypeError if an input has another type, or if a single text is given instead of a list.
        """
        if isinstance(inputs, str):
            raise TypeError("expected a list of inputs, got a single text")
        return self.records([self.example(i, given) for i, given in enumerate(inputs)], all_scores, batch_tokens)

    def records(
        self, examples: Sequence[Any], all_scores: bool, batch_tokens: int | None = None
    ) -> list[dict[str, Any]]:
        """A dict for each example that the task's `read` returned."""
        if not examples:
            return []
        features: Features = self.task.features(examples, training=False)
        batch_tokens = batch_tokens or tokens_per_batch(self.processes.device)
        found = outputs_of(self.model, self.task, features.windows, batch_tokens, self.dtype, self.processes)
        predictions = self.task.predictions(examples, features.windows, found)
        return [self.task.record(e, p, all_scores) for e, p in zip(examples, predictions, strict=True)]

    def example(self, number: int, given: Any) -> Any:
        """An input as an example of the task. number: its index, for messages. Raises: TypeError."""
        kind, place = self.task.spec.task, f"inputs[{number}]"
        if kind == "token":
            return _sentence(given, place)
        if kind != "qa" and self.task.n_texts == 1:
            return Text(place, _text(given, place), None, None)
        if isinstance(given, str) or len(given) != 2:
            raise TypeError(f"{place} must be two texts, got {given!r}")
        first, second = (_text(part, place) for part in given)
        return Question(str(number), first, second) if kind == "qa" else Text(place, first, second, None)


def pipeline(
    folder: str | Path, *, device: str = "auto", dtype: str | torch.dtype = "auto", impl: str | None = None
) -> Pipeline:
    """Predictions of the model in a folder that `fastbert finetune` made, or of a pre-trained checkpoint with a head
    for next sentences, which tells whether the second of two texts follows the first: is_next or not_next.

    Args:
        folder: a folder; for next sentences also one of another format, or a hub id.
        dtype: of products; "auto" for one that the device multiplies fast.
        impl: which implementation every operator uses; None lets each device choose.

    Raises: CheckpointError if the folder holds no such model.
    """
    where = resolve_device(device)
    with opened(folder) as path:
        config, tokenizer = BertConfig.from_pretrained(path), Tokenizer.from_pretrained(path)
        spec = spec_in(path / SPEC_FILE)
        labels: Sequence[str] = [label for _, label in sorted((config.id2label or {}).items())]
        if spec is None:
            spec = Spec("next-sentence", "accuracy", max_length=config.max_position_embeddings)
            labels = NextSentenceTask.LABELS
        elif spec.task == "qa":
            labels = []
        task = make_task(spec, tokenizer, labels)
        model = load_head(task, path, where, impl)
    if model.initialised:
        missing = ", ".join(model.initialised)
        if spec.task == "next-sentence":
            missing = f"{SPEC_FILE}, so fastbert finetune did not make it; and no head for next sentences ({missing})"
        raise CheckpointError(f"{folder} has no {missing}")
    return ready(model, task, where, resolve_dtype(dtype, where))


def load_head(task: Any, path: Path, device: torch.device, impl: str | None) -> Any:
    """The model of a task in float32, in evaluation mode. Its `initialised` names missing weights."""
    with expecting_new_weights():
        return getattr(heads, task.head).from_pretrained(path, dtype=torch.float32, device=device, impl=impl, seed=0)


def ready(model: Any, task: Any, device: torch.device, dtype: torch.dtype) -> Pipeline:
    """A pipeline of a model in float32 with products in `dtype`. If weights are in 8 bits the encoder is cast to
    `dtype`, because autocast would round its rounded products again."""
    if holds_integers(model):
        model.bert.to(dtype)
    return Pipeline(model, task, device, dtype)


def spec_in(file: Path) -> Spec | None:
    """The spec in a file; None if the file does not exist."""
    if not file.is_file():
        return None
    found = read_json(file)
    try:
        return Spec(**{**found, "columns": tuple(found["columns"])})
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{file} is not of this version of fastbert: {error}") from None


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{place} must be a text, got {type(value).__name__}")
    return value


def _sentence(given: Any, place: str) -> Sentence:
    """The words of a text, which are runs of letters and digits, or single marks; or the words that are given."""
    if isinstance(given, str):
        words, starts = [], []
        for found in WORDS.finditer(given):  # a list of all would stop other threads for a second
            words.append(found.group())
            starts.append(found.start())
        return Sentence(place, words, None, given, starts)
    return Sentence(place, [_text(word, place) for word in given], None)
