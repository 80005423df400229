"""The faces of Cohere and Jina, and of Infinity and Voyage, which rerank like them: /v1/rerank, /v1/embed, /v2/embed.

In rerank, `max_tokens_per_doc` cuts each document before it is paired with the query, and `rank_fields` names the
fields to read of documents that are objects.
"""

from __future__ import annotations

import uuid
from typing import Any

from ..errors import ServiceError
from ..models import Served
from ..service import Call, Service
from ..work.vectors import Vectors
from . import fields
from .numbers import TYPES, encoded
from .tei import scored

_TYPES = TYPES | {"base64": encoded}


async def rerank(service: Service, call: Call) -> dict[str, Any]:
    """Scores of documents for a query, the best first; only the first `top_n`, or Voyage's `top_k`. Of each document at
    most `max_tokens_per_doc` tokens are read, and no more than the model takes."""
    body = call.body
    of_objects = fields.take(body, "rank_fields", list, ["text"])
    documents = fields.documents(body.get("documents"), "documents", [str(name) for name in of_objects])
    query, most = fields.needed(body, "query", str), fields.count(body, "max_tokens_per_doc")
    model, ranked = await scored(service, call, query, documents, body, most)
    ranked = ranked[: fields.count(body, "top_n", "top_k")]
    with_text = fields.take(body, "return_documents", bool, False)
    results = [
        {"index": i, "relevance_score": score, **({"document": {"text": documents[i]}} if with_text else {})}
        for i, score in ranked
    ]
    reply = {
        "id": str(uuid.uuid4()), "object": "rerank", "model": model.name, "results": results,
        "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
        "usage": {"prompt_tokens": call.tokens, "total_tokens": call.tokens},
    }  # fmt: skip
    return reply | {"data": results} if body.get("top_k") else reply  # Voyage's name


async def embed_v1(service: Service, call: Call) -> dict[str, Any]:
    """Like `embed_v2`, but a plain list of vectors if there are no `embedding_types`."""
    by_type = await embed_v2(service, call)
    if call.body.get("embedding_types"):
        return by_type
    return by_type | {"response_type": "embeddings_floats", "embeddings": by_type["embeddings"]["float"]}


async def embed_v2(service: Service, call: Call) -> dict[str, Any]:
    """Vectors of texts in each of `embedding_types`: see `as_type`."""
    body = call.body
    texts = _texts_of(body)
    model: Served = service.models.with_ability("vectors", fields.take(body, "model", str))
    vectors: Vectors = model.abilities["vectors"]
    dimensions = fields.count(body, "output_dimension")
    vectors.expect_choice(None, dimensions)
    prompt = vectors.prompt_for(fields.take(body, "input_type", str))
    cut = fields.cutting(body, service.settings.auto_truncate)
    types = fields.take(body, "embedding_types", list) or ["float"]
    for name in types:
        if not isinstance(name, str) or name not in _TYPES:
            raise ServiceError("invalid", f"embedding_types must be of {', '.join(_TYPES)}", param="embedding_types")
    found = await service.run(
        call, model, texts,
        lambda: vectors.prepare(texts, prompt=prompt, dimensions=dimensions, **cut),
    )  # fmt: skip
    return {
        "id": str(uuid.uuid4()), "response_type": "embeddings_by_type",
        "embeddings": {name: _TYPES[name](found) for name in types}, "texts": texts,
        "meta": {"api_version": {"version": "2"}, "billed_units": {"input_tokens": call.tokens}},
    }  # fmt: skip


def _texts_of(body: dict[str, Any]) -> list[str]:
    """The `texts`, or the texts of `inputs`, whose contents are lists of parts. Raises ServiceError for images."""
    inputs = fields.take(body, "inputs", list)
    if body.get("texts") is not None or inputs is None:
        return fields.texts(body.get("texts"), "texts")
    texts = []
    for item in inputs:
        parts = item.get("content") if isinstance(item, dict) else None
        parts = parts if isinstance(parts, list) else []
        found = [part.get("text") if isinstance(part, dict) else None for part in parts]
        if not found or not all(isinstance(text, str) for text in found):
            raise ServiceError("invalid", "inputs must have a content of texts alone, no images", param="inputs")
        texts.append("\n".join(found))
    return fields.texts(texts, "inputs")
