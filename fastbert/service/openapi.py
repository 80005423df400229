"""The server's description in OpenAPI 3.1, made from the table of addresses and the tables here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

TEXT = {"type": "string"}
FLAG = {"type": ["boolean", "null"]}
COUNT = {"type": ["integer", "null"], "minimum": 0}
NAME = {"type": ["string", "null"], "description": "a model; the first one that can where there is none"}
TEXTS = {"anyOf": [TEXT, {"type": "array", "items": TEXT, "minItems": 1}]}
IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
TEXTS_OR_IDS = {"anyOf": [*TEXTS["anyOf"], IDS, {"type": "array", "items": IDS, "minItems": 1}]}
SIDE = {"enum": ["Right", "Left", "right", "left", None]}
PARAMETERS = {"type": ["object", "null"]}
CUT = {
    "truncate": FLAG, "truncation_direction": SIDE,
    "truncate_prompt_tokens": {"type": ["integer", "null"], "minimum": -1}, "truncation_side": SIDE,
}  # fmt: skip
NUMBERS = ["float", "int8", "uint8", "binary", "ubinary"]
DOCUMENT = {"anyOf": [TEXT, {"type": "object", "properties": {"text": TEXT}, "required": ["text"]}]}
DOCUMENTS = {"type": "array", "items": DOCUMENT}
RERANK = {
    "query": TEXT, "documents": DOCUMENTS, "model": NAME, "top_n": COUNT, "return_documents": FLAG, "raw_scores": FLAG,
    "max_tokens_per_doc": COUNT, **CUT,
}  # fmt: skip
CONTENT = {
    "type": "object",
    "properties": {"content": {
        "type": "array", "items": {"type": "object", "properties": {"text": TEXT}, "required": ["text"]}, "minItems": 1,
    }},
    "required": ["content"],
}  # fmt: skip
SEQUENCE = {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 2}
PAIR = {"type": "array", "items": TEXT, "minItems": 2, "maxItems": 2}
QUESTION = {
    "type": "object", "properties": {"question": TEXT, "context": TEXT}, "required": ["question", "context"],
}  # fmt: skip
EMBED_TYPES = {"enum": [*NUMBERS, "base64"]}

# address -> (fields, required fields)
BODIES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "/v1/embeddings": (
        {"input": TEXTS_OR_IDS, "model": NAME, "encoding_format": {"enum": ["float", "base64", None]},
         "dimensions": COUNT, "user": TEXT, "prompt_name": {"type": ["string", "null"]}, **CUT, "normalize": FLAG,
         "output_dtype": {"enum": [*NUMBERS, None]}, "embedding_type": {"enum": [*NUMBERS, "base64", None]},
         "input_type": {"type": ["string", "null"]}, "task": {"type": ["string", "null"]}},
        ("input",),
    ),
    "/api/embed": ({"input": TEXTS, "model": NAME, "truncate": FLAG, "dimensions": COUNT}, ("input",)),
    "/api/embeddings": ({"prompt": TEXT, "model": NAME}, ("prompt",)),
    "/api/show": ({"model": NAME}, ()),
    "/embed": (
        {"inputs": TEXTS_OR_IDS, "model": NAME, "normalize": FLAG, "dimensions": COUNT,
         "prompt_name": {"type": ["string", "null"]}, **CUT},
        ("inputs",),
    ),
    "/embed_all": ({"inputs": TEXTS_OR_IDS, "model": NAME, "prompt_name": {"type": ["string", "null"]}, **CUT},
                   ("inputs",)),
    "/predict": (
        {"inputs": {"anyOf": [TEXT, PAIR, {"type": "array", "items": SEQUENCE, "minItems": 1}]}, "model": NAME,
         "raw_scores": FLAG, **CUT},
        ("inputs",),
    ),
    "/rerank": (
        RERANK | {"texts": {"type": "array", "items": TEXT, "minItems": 1}, "return_text": FLAG}, ("query",),
    ),
    "/v1/score": ({"text_1": TEXTS, "text_2": TEXTS, "queries": TEXTS, "documents": TEXTS, "model": NAME, **CUT}, ()),
    "/v1/embed": (
        {"texts": {"type": "array", "items": TEXT, "minItems": 1},
         "inputs": {"type": "array", "items": CONTENT, "minItems": 1}, "model": NAME, "input_type": TEXT,
         "embedding_types": {"type": ["array", "null"], "items": EMBED_TYPES}, "output_dimension": COUNT,
         "truncate": {"enum": ["NONE", "START", "END", None]}},
        (),
    ),
    "/similarity": (
        {"inputs": {"type": "object",
                    "properties": {"source_sentence": TEXT, "sentences": {"type": "array", "items": TEXT}},
                    "required": ["source_sentence", "sentences"]},
         "model": NAME, "parameters": PARAMETERS},
        ("inputs",),
    ),
    "/tokenize": ({"inputs": TEXTS, "model": NAME, "add_special_tokens": FLAG, "truncate": FLAG,
                   "prompt_name": {"type": ["string", "null"]}}, ("inputs",)),
    "/decode": ({"ids": {"anyOf": [IDS, {"type": "array", "items": IDS}]}, "model": NAME, "skip_special_tokens": FLAG},
                ("ids",)),
    "/token_classify": ({"inputs": TEXTS, "model": NAME, "parameters": PARAMETERS}, ("inputs",)),
    "/question_answer": (
        {"inputs": {"anyOf": [QUESTION, {"type": "array", "items": QUESTION, "minItems": 1}]}, "model": NAME,
         "parameters": PARAMETERS},
        ("inputs",),
    ),
    "/fill_mask": ({"inputs": TEXTS, "model": NAME, "parameters": PARAMETERS}, ("inputs",)),
    "/": ({"inputs": {"anyOf": [*TEXTS["anyOf"], {"type": "object"}]}, "parameters": PARAMETERS}, ()),
}  # fmt: skip
# address -> another address with the same fields; for others under /v1 that is the address without /v1
_SAME = {
    "/embeddings": "/v1/embeddings",
    "/score": "/v1/score",
    "/v1/rerank": "/rerank",
    "/v2/rerank": "/rerank",
    "/v2/embed": "/v1/embed",
    "/v1": "/",
    "/invocations": "/",
    "/models/{name}": "/",
}
_ERRORS = {"400": "what was sent is wrong", "401": "no key", "404": "no such model", "413": "too much was sent",
           "415": "what was sent is compressed",
           "422": "what was sent is wrong", "424": "the model has no such head", "429": "overloaded; see Retry-After",
           "503": "not ready", "504": "too late"}  # fmt: skip


def description(version: str, ways: Sequence[Any]) -> dict[str, Any]:
    """The description. ways: functions of the API; the docstring of `answer` describes each."""
    paths = {_plain(path): {"post": _operation(_plain(path), way.answer)} for way in ways for path in way.paths}
    return {
        "openapi": "3.1.0", "info": {"title": "fastbert serve", "version": version}, "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }  # fmt: skip


def _plain(path: str) -> str:
    """An address in OpenAPI's spelling, without starlette's ":path" for parameters that may contain slashes."""
    return path.replace(":path}", "}")


def _operation(path: str, answer: Callable) -> dict[str, Any]:
    same = _SAME.get(path, path)
    properties, required = BODIES[same if same in BODIES else same.removeprefix("/v1")]
    schema = {"type": "object", "properties": properties, "required": list(required)}
    operation = {
        "summary": " ".join((answer.__doc__ or "").split()),
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {"200": {"description": "the answer", "content": {"application/json": {"schema": {}}}}}
        | {
            status: {"description": text, "content": {"application/json": {"schema": {"type": "object"}}}}
            for status, text in _ERRORS.items()
        },
    }
    if "{name}" in path:
        operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": TEXT}]
    return operation
