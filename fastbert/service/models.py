"""The models of a server by name, and the abilities of each."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import BertConfig
from ..encoding.devices import resolve_device, resolve_dtype
from ..encoding.encoder import Encoder
from ..encoding.masks import MaskFiller
from ..formats import opened
from ..formats.sentence_folder import has_modules
from ..models import heads
from ..storage import CheckpointError
from ..text.batching import tokens_per_batch
from ..text.tokenizer import Tokenizer
from ..training.pipeline import SPEC_FILE, Pipeline, pipeline, ready
from ..training.task import Spec
from ..training.tasks import make_task
from .errors import ServiceError
from .settings import Settings
from .work.heads import Answers, Entities, Labels
from .work.masks import Masks
from .work.texts import Texts
from .work.vectors import Vectors

# ability -> what a model with this ability gives, in messages
ABILITIES = {
    "vectors": "vectors", "labels": "labels", "scores": "scores of pairs", "entities": "entities",
    "answers": "answers", "masks": "words for masks",
}  # fmt: skip
# The heads of transformers' checkpoints: architecture -> (task and metric of a Spec, stride of windows).
_HEADS = {
    "BertForSequenceClassification": ("sentence", "accuracy", 0),
    "BertForTokenClassification": ("token", "entity_f1", 32),
    "BertForQuestionAnswering": ("qa", "squad", 128),
}
_WITH_MASKS = ("BertForMaskedLM", "BertForPreTraining")


class Served:
    """A loaded model.

    Attributes:
        name: the model's name in requests.
        abilities: ability -> the object that prepares its requests; names as in ABILITIES.
        config: the model's config. texts: turns texts into ids.
        batch_tokens: most tokens of a batch.
    """

    def __init__(
        self,
        name: str,
        abilities: dict[str, Any],
        config: BertConfig,
        texts: Texts,
        dtype: torch.dtype,
        batch_tokens: int,
    ):
        self.name, self.abilities, self.config, self.texts, self.dtype = name, abilities, config, texts, dtype
        self.batch_tokens = batch_tokens

    @property
    def kind(self) -> dict[str, Any]:
        """The model's type in the form of text-embeddings-inference's /info."""
        if "vectors" in self.abilities:
            return {"embedding": {"pooling": self.abilities["vectors"].encoder.pooling or "mean"}}
        labels = self.config.id2label or {}
        kind = {"id2label": {str(i): name for i, name in labels.items()},
                "label2id": {name: i for i, name in labels.items()}}  # fmt: skip
        return {"reranker" if "scores" in self.abilities else "classifier": kind}


def load(name: str, source: str | Path, settings: Settings) -> Served:
    """A model from anything that `Encoder.from_pretrained` takes, or a model with a head.

    Raises: CheckpointError and ValueError, in one line.
    """
    device = resolve_device(settings.device)
    limit = settings.max_text_tokens
    batch_tokens = settings.max_batch_tokens or tokens_per_batch(device)
    with opened(source) as path:
        head = None if has_modules(path) else _head_of(path)
        if head is not None:
            found = _pipeline(path, head, settings)
            abilities = _abilities_of(found, limit)
            texts = _texts_of(abilities, found, limit)
            return Served(name, abilities, found.model.config, texts, found.dtype, batch_tokens)
        encoder = Encoder.from_pretrained(
            path, dtype=settings.dtype, device=settings.device, impl=settings.impl, pooling=settings.pooling,
            prompt_name=settings.default_prompt_name,
        )  # fmt: skip
        if settings.default_prompt is not None:
            encoder = encoder.asked(prompt=settings.default_prompt)
        vectors = Vectors(encoder, limit)
        abilities = {"vectors": vectors}
        if not has_modules(path) and set(_architectures(path)) & set(_WITH_MASKS) and settings.dtype != "int8":
            try:
                filler = MaskFiller.from_pretrained(
                    path, dtype=settings.dtype, device=settings.device, impl=settings.impl
                )
                # The encoder and the head share one BERT, whose word embedding is the head's decoder.
                filler.model.bert = encoder.model
                filler.model.tie_weights()
                abilities["masks"] = Masks(filler, limit)
            except CheckpointError as error:  # the checkpoint was saved without that head
                warnings.warn(f"{source} gives vectors only: {error}", stacklevel=2)
    return Served(name, abilities, encoder.config, vectors.texts, encoder.dtype, batch_tokens)


def _architectures(path: Path) -> list[str]:
    try:
        return BertConfig.from_pretrained(path).architectures or []
    except CheckpointError:  # a format that has no config.json
        return []


def _head_of(path: Path) -> str | None:
    """The head of a folder: SPEC_FILE if `fastbert finetune` made it, else its architecture; None for an encoder."""
    if (path / SPEC_FILE).is_file():
        return SPEC_FILE
    return next((name for name in _architectures(path) if name in _HEADS), None)


def _pipeline(path: Path, head: str, settings: Settings) -> Pipeline:
    dtype = "auto" if settings.dtype == "int8" else settings.dtype
    if head == SPEC_FILE:
        return pipeline(path, device=settings.device, dtype=dtype, impl=settings.impl)
    device = resolve_device(settings.device)
    tokenizer, config = Tokenizer.from_pretrained(path), BertConfig.from_pretrained(path)
    longest = min(config.max_position_embeddings, tokenizer.model_max_length or config.max_position_embeddings)
    task, metric, stride = _HEADS[head]
    spec = Spec(task, metric, max_length=longest, stride=min(stride, longest // 3))
    labels = [] if task == "qa" else [config.id2label[i] for i in range(config.num_labels)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the warning of a missing head, which is an error here
        model = getattr(heads, head).from_pretrained(path, dtype=torch.float32, device=device, impl=settings.impl)
    if model.initialised:
        raise CheckpointError(f"{path} has no {', '.join(model.initialised)}")
    return ready(model, make_task(spec, tokenizer, labels), device, resolve_dtype(dtype, device))


def _abilities_of(found: Pipeline, limit: int | None) -> dict[str, Any]:
    kind = found.task.spec.task
    if kind == "token":
        return {"entities": Entities(found)}
    if kind == "qa":
        return {"answers": Answers(found)}
    labels = Labels(found, limit)
    return {"labels": labels, "scores": labels} if labels.is_reranker else {"labels": labels}


def _texts_of(abilities: dict[str, Any], found: Pipeline, limit: int | None) -> Texts:
    if "labels" in abilities:
        return abilities["labels"].texts
    own = found.task.spec.max_length
    return Texts(found.task.tokenizer, min(own, limit or own))


class Models:
    """All models of a server. The first one answers requests that name no model.

    Raises: ValueError if two models have the same name.
    """

    def __init__(self, served: Sequence[Served]):
        self.served = list(served)
        self.by_name = {model.name: model for model in served}
        if len(self.by_name) < len(self.served):
            raise ValueError("two models have the same name: give them as NAME=FOLDER")

    def with_ability(self, ability: str, name: str | None = None) -> Served:
        """The model for a request.

        If no model has the name and only one model has the ability, that model is taken: clients must name a model, and
        many name one of OpenAI's.

        Raises: ServiceError.
        """
        able = [model for model in self.served if ability in model.abilities]
        if name in self.by_name:
            model = self.by_name[name]
            if model in able:
                return model
            gives = " and ".join(ABILITIES[a] for a in model.abilities)
            raise ServiceError(
                "unable", f"model {name!r} gives {gives}, not {ABILITIES[ability]}", param="model",
                code="model_not_able",
            )  # fmt: skip
        if not able:
            raise ServiceError("unable", f"no model here gives {ABILITIES[ability]}", code="model_not_able")
        if name and len(able) > 1:
            known = ", ".join(model.name for model in able)
            raise ServiceError(
                "no_model", f"there is no such model; those that give {ABILITIES[ability]} are {known}", param="model",
                code="model_not_found",
            )  # fmt: skip
        return able[0]

    def named(self, name: str | None) -> Served:
        """The model of this name, or the first one. Raises ServiceError for a name that no model has."""
        if name is None:
            return self.served[0]
        if name not in self.by_name:
            raise ServiceError(
                "no_model", f"there is no such model; models are {', '.join(self.by_name)}", param="model",
                code="model_not_found",
            )  # fmt: skip
        return self.by_name[name]
