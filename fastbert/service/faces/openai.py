"""OpenAI's face: /v1/embeddings and /v1/models."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from ..errors import ServiceError
from ..models import Served
from ..service import Call, Service
from ..work.vectors import Vectors
from . import fields

ENCODINGS = ("float", "base64")


async def embeddings(service: Service, call: Call) -> dict[str, Any]:
    """Vectors of texts, or of token ids of the model's vocabulary, in input order.

    `dimensions` keeps that many numbers of each vector and restores its length; 0 and null keep all. Beyond OpenAI's
    fields: `prompt_name`, one of the model's prompts, and `truncate`; false refuses texts that would be cut.
    """
    body = call.body
    encoding = body.get("encoding_format") or "float"
    if encoding not in ENCODINGS:
        raise ServiceError("invalid", f"encoding_format must be {' or '.join(ENCODINGS)}", param="encoding_format")
    if fields.take(body, "modality", str, "text") != "text":
        raise ServiceError("invalid", "modality must be text", param="modality")
    given = fields.texts_or_ids(body.get("input"), "input")
    model = service.models.with_ability("vectors", fields.take(body, "model", str))
    vectors: Vectors = model.abilities["vectors"]
    dimensions = fields.count(body, "dimensions", "output_dimension")
    vectors.expect_choice(None, dimensions)
    prompt = vectors.prompt(fields.take(body, "prompt_name", str))
    truncate = fields.take(body, "truncate", bool, service.settings.auto_truncate)
    found = await service.run(
        call, model, given,
        lambda: vectors.prepare(given, prompt=prompt, truncate=truncate, dimensions=dimensions),
    )  # fmt: skip
    made = encoded(found) if encoding == "base64" else found
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(made)],
        "model": model.name,
        "usage": {"prompt_tokens": call.tokens, "total_tokens": call.tokens},
    }


def encoded(vectors: np.ndarray) -> list[str]:
    """Little-endian float32 of each row, in base64."""
    return [base64.b64encode(row.astype("<f4", copy=False).tobytes()).decode() for row in vectors]


async def models(service: Service, call: Call) -> dict[str, Any]:
    """The models' names."""
    return {"object": "list", "data": [_described(service, model) for model in service.models.served]}


async def model(service: Service, call: Call) -> dict[str, Any]:
    """The model of a name."""
    return _described(service, service.models.named(call.scope["path_params"]["name"]))


def _described(service: Service, model: Served) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": service.created, "owned_by": "fastbert"}
