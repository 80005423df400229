"""A fine-tuned model and what it says about texts: `fastbert.pipeline(DIR)`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import BertConfig
from ..encoding.encoder import resolve_device, resolve_dtype
from ..formats import opened
from ..inference.eight_bits import holds_integers
from ..models import heads
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


class Pipeline:
    """Predictions of a model that `fastbert finetune` made.

        classify = fastbert.pipeline("sentiment")
        classify(["a fine film"])                       # [{"label": "positive", "score": 0.98}]
        tag(["Ada Lovelace wrote it"])                  # [{"text": ..., "entities": [{"type": ..., "start": 0, ...}]}]
        answer([("who wrote it?", "Ada wrote it.")])    # [{"answer": "Ada", "start": 0, "end": 3, "score": ...}]

    Make one with `pipeline`. `task` holds the labels and what the model was trained for.
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
            all_scores: also the score of every label, the tag of every word, or how far no answer is from the best one.
            batch_tokens: tokens computed at once; by default what the device likes.

        Returns: {"label", "score"}; {"score"} where labels are numbers; {"labels"}, a list of {"label", "score"} with
            the likeliest first, where a text has any number of them; {"text", "entities"}, each with type, text,
            start and end in characters of the text, and score, the mean probability of its words' tags; {"id",
            "answer", "score", "start", "end"}, with "" and None where there is no answer.

        Raises: TypeError where an input is no such thing, or a text stands in place of the list.
        """
        if isinstance(inputs, str):
            raise TypeError("expected a list of inputs, got a single text")
        return self.records([self.example(i, given) for i, given in enumerate(inputs)], all_scores, batch_tokens)

    def records(
        self, examples: Sequence[Any], all_scores: bool, batch_tokens: int | None = None
    ) -> list[dict[str, Any]]:
        """The same of examples as the task's `read` gives them."""
        if not examples:
            return []
        features: Features = self.task.features(examples, training=False)
        batch_tokens = batch_tokens or tokens_per_batch(self.processes.device)
        found = outputs_of(self.model, self.task, features.windows, batch_tokens, self.dtype, self.processes)
        predictions = self.task.predictions(examples, features.windows, found)
        return [self.task.record(e, p, all_scores) for e, p in zip(examples, predictions, strict=True)]

    def example(self, number: int, given: Any) -> Any:
        """An input as the task has it; `number` is its place, which messages name. Raises: TypeError."""
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
    """Predictions of the model in a folder that `fastbert finetune` made, or of a checkpoint whose pre-training left a
    head for next sentences: that says of pairs of texts whether the second follows the first, is_next or not_next.

    Args:
        folder: of another format or a hub id too, where it is of next sentences.
        dtype: of products; "auto": what the device multiplies fast.
        impl: which implementation every operator uses; None lets each device choose.

    Raises: CheckpointError where the folder holds no such model.
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
        with warnings.catch_warnings():
            # A head that is missing is an error here, below.
            warnings.filterwarnings("ignore", message=".*weights were drawn from normal.*", category=UserWarning)
            model = getattr(heads, task.head).from_pretrained(
                path, dtype=torch.float32, device=where, impl=impl, seed=0
            )
    if model.initialised:
        missing = ", ".join(model.initialised)
        if spec.task == "next-sentence":
            missing = f"{SPEC_FILE}, so fastbert finetune did not make it; and no head for next sentences ({missing})"
        raise CheckpointError(f"{folder} has no {missing}")
    return ready(model, task, where, resolve_dtype(dtype, where))


def ready(model: Any, task: Any, device: torch.device, dtype: torch.dtype) -> Pipeline:
    """A pipeline of a model in float32 whose products are in `dtype`. Beside weights in 8 bits all of the encoder is in
    that, and autocast would only round what is rounded already."""
    if holds_integers(model):
        model.bert.to(dtype)
    return Pipeline(model, task, device, dtype)


def spec_in(file: Path) -> Spec | None:
    """What a model was fine-tuned for; None where the file does not exist."""
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
    """Words of a text, which are runs of letters and digits and single marks, with their places; or words as given."""
    if isinstance(given, str):
        found = list(re.finditer(r"\w+|[^\w\s]", given))
        return Sentence(place, [m.group() for m in found], None, given, [m.start() for m in found])
    return Sentence(place, [_text(word, place) for word in given], None)
