"""The faces of Cohere and Jina, and of Infinity and Voyage, which rerank like them: /v1/rerank, /v1/embed, /v2/embed.

In rerank, `max_tokens_per_doc` cuts each document before it is paired with the query, and `rank_fields` names the
fields to read of documents that are objects.
"""

from __future__ import annotations

import uuid
from typing import Any

import numpy as np

from ..errors import ServiceError
from ..models import Served
from ..service import Call, Service
from ..work.vectors import Vectors
from . import fields
from .openai import encoded
from .tei import scored

# input_type -> names of prompts; the first one that the model has is put before the texts
INPUT_TYPES = {"search_query": ("query",), "search_document": ("document", "passage", "corpus")}


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
    names = INPUT_TYPES.get(fields.take(body, "input_type", str, ""), ())
    prompt = vectors.prompt(next((name for name in names if vectors.prompts.get(name)), None))
    side = {"start": "left", "end": "right", "none": None, None: None}
    cut = fields.choice(body, "truncate", ("none", "start", "end"))
    truncate = service.settings.auto_truncate if cut is None else cut != "none"
    types = fields.take(body, "embedding_types", list) or ["float"]
    for name in types:
        if not isinstance(name, str) or name not in TYPES:
            raise ServiceError("invalid", f"embedding_types must be of {', '.join(TYPES)}", param="embedding_types")
    found = await service.run(
        call, model, texts,
        lambda: vectors.prepare(texts, prompt=prompt, truncate=truncate, side=side[cut], dimensions=dimensions),
    )  # fmt: skip
    return {
        "id": str(uuid.uuid4()), "response_type": "embeddings_by_type",
        "embeddings": {name: TYPES[name](found) for name in types}, "texts": texts,
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


def _int8(vectors: np.ndarray) -> np.ndarray:
    """The numbers of vectors of length 1, times 127, rounded."""
    return np.clip(np.rint(vectors * 127), -128, 127).astype(np.int8)


# The forms of vectors by name. A bit is 1 if the number is above 0; eight bits make a byte, the first one the highest.
# In the signed form each byte is 128 less.
TYPES = {
    "float": lambda vectors: vectors,
    "int8": _int8,
    "uint8": lambda vectors: (_int8(vectors).astype(np.int16) + 128).astype(np.uint8),
    "binary": lambda vectors: (np.packbits(vectors > 0, axis=1).astype(np.int16) - 128).astype(np.int8),
    "ubinary": lambda vectors: np.packbits(vectors > 0, axis=1),
    "base64": encoded,
}
