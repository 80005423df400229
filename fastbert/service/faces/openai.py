"""OpenAI's face: /v1/embeddings and /v1/models; and /v1/score, which vLLM adds."""

from __future__ import annotations

import time
import uuid
from typing import Any

from ..errors import ServiceError
from ..models import Served
from ..service import Call, Service
from ..work.heads import Labels
from ..work.vectors import Vectors
from . import fields
from .numbers import TYPES, encoded

ENCODINGS = ("float", "base64")


async def embeddings(service: Service, call: Call) -> dict[str, Any]:
    """Vectors of texts, or of token ids of the model's vocabulary, in input order.

    `dimensions` keeps that many numbers of each vector and restores its length; 0 and null keep all. Beyond OpenAI's
    fields: `prompt_name`, one of the model's prompts; `truncate`, where false refuses texts that would be cut;
    `normalize`. Of Voyage and Jina: `output_dtype` or `embedding_type`, such as "int8" or "binary"; `input_type` or
    `task`, which choose the model's prompt for queries or documents; `truncation`, `normalized`. Of vLLM:
    `truncate_prompt_tokens`, `truncation_side`.
    """
    body = call.body
    encoding, numbers = _form(body)
    if fields.take(body, "modality", str, "text") != "text":
        raise ServiceError("invalid", "modality must be text", param="modality")
    if body.get("late_chunking"):
        raise ServiceError("invalid", "late_chunking is not computed here", param="late_chunking")
    given = fields.texts_or_ids(body.get("input"), "input")
    model = service.models.with_ability("vectors", fields.take(body, "model", str))
    vectors: Vectors = model.abilities["vectors"]
    dimensions = fields.count(body, "dimensions", "output_dimension")
    normalize = fields.take(body, "normalize", bool, fields.take(body, "normalized", bool))
    vectors.expect_choice(normalize, dimensions)
    task = body.get("task")  # a field of Jina's alone; others may mean something else by that name
    role = fields.take(body, "input_type", str, task if isinstance(task, str) else None)
    name = fields.take(body, "prompt_name", str)
    prompt = vectors.prompt_for(role) if name is None else vectors.prompt(name)
    cut = fields.cutting(body, service.settings.auto_truncate)
    found = await service.run(
        call, model, given,
        lambda: vectors.prepare(given, prompt=prompt, normalize=normalize, dimensions=dimensions, **cut),
    )  # fmt: skip
    found = TYPES[numbers](found)
    made = encoded(found) if encoding == "base64" else found
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(made)],
        "model": model.name,
        "usage": {"prompt_tokens": call.tokens, "total_tokens": call.tokens},
    }


def _form(body: dict[str, Any]) -> tuple[str, str]:
    """(one of ENCODINGS, one of TYPES). Jina's field names either of them."""
    encoding = body.get("encoding_format") or "float"
    if encoding not in ENCODINGS:
        raise ServiceError("invalid", f"encoding_format must be {' or '.join(ENCODINGS)}", param="encoding_format")
    numbers = fields.choice(body, "embedding_type", (*TYPES, "base64"))
    if numbers == "base64":
        encoding, numbers = numbers, None
    return encoding, numbers or fields.choice(body, "output_dtype", tuple(TYPES)) or "float"


async def score(service: Service, call: Call) -> dict[str, Any]:
    """Scores of pairs, in input order: of the text `text_1` with each of `text_2`, or of each with each where there are
    as many. In vLLM's form, with its other names `queries` and `documents`."""
    body = call.body
    first, second = ("queries", "documents") if "queries" in body else ("text_1", "text_2")
    ones, others = fields.texts(body.get(first), first), fields.texts(body.get(second), second)
    if len(ones) not in (1, len(others)):
        raise ServiceError("invalid", f"{first} must have one text or as many as {second}", param=first)
    model = service.models.with_ability("scores", fields.take(body, "model", str))
    labels: Labels = model.abilities["scores"]
    pairs = list(zip(ones if len(ones) > 1 else ones * len(others), others, strict=True))
    cut = fields.cutting(body, service.settings.auto_truncate)
    logits = await service.run(call, model, pairs, lambda: labels.prepare(pairs, **cut))
    scores = labels.scores(logits, fields.take(body, "raw_scores", bool, False))[:, 0].tolist()
    return {
        "id": f"score-{uuid.uuid4()}", "object": "list", "created": int(time.time()), "model": model.name,
        "data": [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores)],
        "usage": {"prompt_tokens": call.tokens, "total_tokens": call.tokens},
    }  # fmt: skip


async def models(service: Service, call: Call) -> dict[str, Any]:
    """The models' names."""
    return {"object": "list", "data": [_described(service, model) for model in service.models.served]}


async def model(service: Service, call: Call) -> dict[str, Any]:
    """The model of a name; all models where there is only a slash."""
    name = call.scope["path_params"]["name"]
    return _described(service, service.models.named(name)) if name else await models(service, call)


def _described(service: Service, model: Served) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": service.created, "owned_by": "fastbert"}
