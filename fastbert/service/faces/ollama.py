"""Ollama's face: /api/embed, /api/embeddings, and what its clients ask about models."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from typing import Any

from ..models import Served
from ..service import Call, Service
from ..work.vectors import Vectors
from . import fields, tei

LATEST = ":latest"  # Ollama's clients put it behind a name without a tag


def _name(service: Service, body: dict[str, Any]) -> str | None:
    name = fields.take(body, "model", str, fields.take(body, "name", str))
    return name if name is None or name in service.models.by_name else name.removesuffix(LATEST)


async def embed(service: Service, call: Call) -> dict[str, Any]:
    """Vectors of a text or of several as `embeddings`; none for "" alone, by which clients load a model."""
    body, given = call.body, call.body.get("input")
    name = _name(service, body)
    model = service.models.with_ability("vectors", name)
    found: Any = []
    if given not in (None, "", []):
        asked = {field: body.get(field) for field in ("truncate", "dimensions")} | {"model": name}
        found = await tei.vectors_of(service, call, fields.texts(given, "input"), asked, normalize=None)
    duration = int(1e9 * (time.perf_counter() - call.began))
    return {"model": body.get("model") or model.name, "embeddings": found, "total_duration": duration,
            "load_duration": 0, "prompt_eval_count": call.tokens}  # fmt: skip


async def embeddings(service: Service, call: Call) -> dict[str, Any]:
    """The vector of the text `prompt`; none for ""."""
    prompt = fields.take(call.body, "prompt", str, "")
    asked = {"model": _name(service, call.body)}
    if not prompt:
        service.models.with_ability("vectors", asked["model"])
        return {"embedding": []}
    return {"embedding": (await tei.vectors_of(service, call, [prompt], asked, normalize=None))[0]}


async def tags(service: Service, call: Call) -> dict[str, Any]:
    """The models' names."""
    since = datetime.fromtimestamp(service.created, timezone.utc).isoformat()
    return {
        "models": [
            {"name": model.name + LATEST, "model": model.name + LATEST, "modified_at": since,
             "details": _details(model)}
            for model in service.models.served
        ]
    }  # fmt: skip


async def show(service: Service, call: Call) -> dict[str, Any]:
    """What a model is."""
    model = service.models.named(_name(service, call.body))
    about = {"general.architecture": "bert", "bert.context_length": model.texts.limit,
             "bert.block_count": model.config.num_hidden_layers}  # fmt: skip
    vectors: Vectors | None = model.abilities.get("vectors")
    if vectors is not None:
        about["bert.embedding_length"] = vectors.dimension
    return {"details": _details(model), "model_info": about,
            "capabilities": [] if vectors is None else ["embedding"]}  # fmt: skip


def _details(model: Served) -> dict[str, Any]:
    kind = str(model.dtype).removeprefix("torch.")
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}
    return {"parent_model": "", "format": "safetensors", "family": "bert", "families": ["bert"],
            "quantization_level": names.get(kind, kind)}  # fmt: skip


async def version(service: Service, call: Call) -> dict[str, Any]:
    """The version of fastbert."""
    return {"version": service.version}
