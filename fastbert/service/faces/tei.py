"""The face of text-embeddings-inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import ServiceError
from ..models import Served
from ..service import Call, Service
from ..work.heads import Labels
from ..work.vectors import Vectors, normalised
from . import fields


async def vectors_of(
    service: Service, call: Call, given: Sequence[Any], body: dict[str, Any], *, normalize: bool | None
) -> np.ndarray:
    """[N, dimensions] float32 of texts or ids. normalize: where the body does not say."""
    model = service.models.with_ability("vectors", fields.take(body, "model", str))
    vectors: Vectors = model.abilities["vectors"]
    normalize = fields.take(body, "normalize", bool, normalize)
    dimensions = fields.count(body, "dimensions")
    vectors.expect_choice(normalize, dimensions)
    prompt, cut = (
        vectors.prompt(fields.take(body, "prompt_name", str)),
        fields.cutting(body, service.settings.auto_truncate),
    )
    return await service.run(
        call, model, given,
        lambda: vectors.prepare(given, prompt=prompt, normalize=normalize, dimensions=dimensions, **cut),
    )  # fmt: skip


async def embed(service: Service, call: Call) -> np.ndarray:
    """Vectors, normalised unless `normalize` is false; a list of them for one text too."""
    return await vectors_of(service, call, fields.texts_or_ids(call.body.get("inputs"), "inputs"), call.body,
                            normalize=True)  # fmt: skip


async def embed_all(service: Service, call: Call) -> list[np.ndarray]:
    """Of each text the vectors of all its tokens, special ones too, as the model's last layer has them."""
    given = fields.texts_or_ids(call.body.get("inputs"), "inputs")
    model = service.models.with_ability("vectors", fields.take(call.body, "model", str))
    vectors: Vectors = model.abilities["vectors"]
    prompt, cut = (
        vectors.prompt(fields.take(call.body, "prompt_name", str)),
        fields.cutting(call.body, service.settings.auto_truncate),
    )
    return await service.run(call, model, given, lambda: vectors.prepare_states(given, prompt=prompt, **cut))


# ---- labels and scores -------------------------------------------------------------------------------------


async def predict(service: Service, call: Call) -> list:
    """Labels with their scores, the likeliest first: of a text, of ["a", "pair"], or of each in a list of lists of one
    text or two."""
    given = call.body.get("inputs")
    single = isinstance(given, str) or (isinstance(given, list) and all(isinstance(text, str) for text in given))
    sequences = [given] if single else given
    if not isinstance(sequences, list) or not sequences:
        raise ServiceError("invalid", "inputs must be a string, a pair of strings, or a list of lists of them")
    made = [_sequence(sequence) for sequence in sequences]
    found = await labelled(service, call, made, call.body)
    return found[0] if single else found


def _sequence(given: Any) -> str | tuple[str, str]:
    if isinstance(given, str):
        return given
    if not isinstance(given, list) or not 1 <= len(given) <= 2 or not all(isinstance(text, str) for text in given):
        raise ServiceError(
            "invalid", 'inputs: each must be a string, or a list of one or two; several texts are [["a"], ["b"]]',
            param="inputs",
        )  # fmt: skip
    return given[0] if len(given) == 1 else (given[0], given[1])


async def labelled(
    service: Service, call: Call, given: Sequence[Any], body: dict[str, Any], function: str | None = None
) -> list[list[dict[str, Any]]]:
    """Of each text or pair its labels and scores, the likeliest first."""
    model = service.models.with_ability("labels", fields.take(body, "model", str))
    labels: Labels = model.abilities["labels"]
    raw, cut = fields.take(body, "raw_scores", bool, False), fields.cutting(body, service.settings.auto_truncate)
    logits = await service.run(call, model, given, lambda: labels.prepare(given, **cut))
    made = []
    for row in labels.scores(logits, raw, function):
        pairs = [{"score": float(score), "label": name} for name, score in zip(labels.labels, row, strict=True)]
        made.append(sorted(pairs, key=lambda pair: -pair["score"]))
    return made


async def scored(
    service: Service, call: Call, query: str, texts: Sequence[str], body: dict[str, Any], most: int | None = None
) -> tuple[Served, list[tuple[int, float]]]:
    """(the reranker, (number of a text, its score) with the best first). most: tokens of a text at most."""
    model = service.models.with_ability("scores", fields.take(body, "model", str))
    labels: Labels = model.abilities["scores"]
    raw, cut = fields.take(body, "raw_scores", bool, False), fields.cutting(body, service.settings.auto_truncate)
    if not texts:
        return model, []
    pairs = [(query, text) for text in texts]
    logits = await service.run(call, model, pairs, lambda: labels.prepare(pairs, most=most, **cut))
    scores = labels.scores(logits, raw)[:, 0].tolist()
    return model, sorted(enumerate(scores), key=lambda pair: -pair[1])


async def rerank(service: Service, call: Call) -> list[dict[str, Any]]:
    """Scores of texts for a query, the best first."""
    texts = fields.texts(call.body.get("texts"), "texts")
    with_text = fields.take(call.body, "return_text", bool, False)
    _, ranked = await scored(service, call, fields.needed(call.body, "query", str), texts, call.body)
    return [{"index": i, **({"text": texts[i]} if with_text else {}), "score": score} for i, score in ranked]


async def similarity(service: Service, call: Call) -> list[float]:
    """Cosines between a sentence and others."""
    given, parameters = fields.needed(call.body, "inputs", dict), fields.take(call.body, "parameters", dict, {})
    source, others = fields.needed(given, "source_sentence", str), fields.texts(given.get("sentences"), "sentences")
    body = {"model": call.body.get("model"), **parameters, "normalize": None, "dimensions": None}
    found = normalised(await vectors_of(service, call, [source, *others], body, normalize=None))
    return (found[1:] @ found[0]).tolist()


# ---- tokens ------------------------------------------------------------------------------------------------


async def tokenize(service: Service, call: Call) -> list[list[dict[str, Any]]]:
    """Tokens of texts with their ids and places, as many as the model takes: longer texts are cut, which the header
    x-truncated-texts says, or refused where `truncate` is false. Start and stop are characters of the text, behind its
    prompt where one is named."""
    given = fields.texts(call.body.get("inputs"), "inputs")
    service.expect_count(given)
    special = fields.take(call.body, "add_special_tokens", bool, True)
    model = service.models.named(fields.take(call.body, "model", str))
    prompt_name, prompt = fields.take(call.body, "prompt_name", str), ""
    if prompt_name is not None:
        prompt = service.models.with_ability("vectors", model.name).abilities["vectors"].prompt(prompt_name)

    truncate = fields.take(call.body, "truncate", bool, service.settings.auto_truncate)

    def made() -> tuple[list[list[dict[str, Any]]], int]:
        found, cut = model.texts.located([prompt + text for text in given], truncate, special)
        return [
            [
                {"id": i, "text": token, "special": is_special,
                 "start": None if is_special else start, "stop": None if is_special else stop}
                for i, token, is_special, start, stop in tokens
            ]
            for tokens in found
        ], cut  # fmt: skip

    answer, call.cut = await service.aside(made)
    call.report = [(b"x-truncated-texts", b"%d" % call.cut)]
    return answer


async def decode(service: Service, call: Call) -> list[str]:
    """Texts that ids stand for."""
    given = fields.needed(call.body, "ids", list)
    lists = [given] if not set(map(type, given)) - {int} else given
    service.expect_count(lists)
    tokenizer = service.models.named(fields.take(call.body, "model", str)).texts.tokenizer
    for ids in lists:
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids):
            raise ServiceError("invalid", f"ids must be whole numbers below {tokenizer.vocab_size}", param="ids")
    skip = fields.take(call.body, "skip_special_tokens", bool, True)
    return await service.aside(lambda: [tokenizer.decode(ids, skip) for ids in lists])


# ---- the server --------------------------------------------------------------------------------------------


async def info(service: Service, call: Call) -> dict[str, Any]:
    """What the first model is, and the server's limits."""
    model, settings = service.models.served[0], service.settings
    return {
        "model_id": model.name, "model_sha": None, "model_dtype": str(model.dtype).removeprefix("torch."),
        "model_type": model.kind, "served_model_name": model.name,
        "max_concurrent_requests": settings.max_concurrent_requests, "max_input_length": model.texts.limit,
        "max_batch_tokens": model.batch_tokens, "max_batch_requests": None,
        "max_client_batch_size": settings.max_client_batch_size, "auto_truncate": settings.auto_truncate,
        "tokenization_workers": 1, "version": service.version, "sha": None, "docker_label": None,
    }  # fmt: skip
