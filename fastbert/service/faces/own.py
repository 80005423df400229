"""Entities, answers and filled words; and the requests that the Hugging Face hub's clients send to a model's
address."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ..errors import ServiceError
from ..service import Call, Service
from ..work.heads import Labels, probabilities
from . import cohere, fields, tei

AGGREGATIONS = ("none", "simple", "first", "average", "max")


def _parameters(call: Call) -> dict[str, Any]:
    """The options of a request, which are under "parameters", as the hub's clients send them, or beside the inputs."""
    return call.body | fields.take(call.body, "parameters", dict, {})


async def token_classify(service: Service, call: Call) -> list:
    """Entities of a text, or of each of a list: entity_group, score, word, start and end in characters.

    `aggregation_strategy` "none" gives every word with its tag as `entity`, except tags in `ignore_labels` (by default
    ["O"]). All other strategies give entities, since fastbert tags words and not pieces of words.
    """
    given, options = call.body.get("inputs"), _parameters(call)
    texts = fields.texts(given, "inputs")
    strategy = fields.choice(options, "aggregation_strategy", AGGREGATIONS)
    ignored = fields.take(options, "ignore_labels", list, ["O"])
    model = service.models.with_ability("entities", fields.take(call.body, "model", str))
    way, most = model.abilities["entities"], service.settings.max_queue_tokens
    form = partial(_words_of if strategy == "none" else _entities_of, ignored)
    made = await service.run(call, model, texts, lambda: way.prepare(texts, most, form), in_windows=True)
    return made[0] if isinstance(given, str) else made


def _entities_of(ignored: list, record: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"entity_group": e["type"], "score": e["score"], "word": e["text"], "start": e["start"], "end": e["end"]}
        for e in record["entities"]
        if e["type"] not in ignored
    ]


def _words_of(ignored: list, record: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"entity": t["tag"], "score": t["score"], "index": i, "word": t["word"], "start": t["start"], "end": t["end"]}
        for i, t in enumerate(record["tags"], 1)
        if t["tag"] not in ignored
    ]


async def question_answer(service: Service, call: Call) -> dict[str, Any] | list:
    """The answer to {"question", "context"}, or to each of a list: answer, score, start and end in characters.

    `top_k` above 1 gives several answers for each question. `max_answer_len` counts tokens. `handle_impossible_answer`
    allows the answer "".
    """
    given, options = call.body.get("inputs"), _parameters(call)
    questions = given if isinstance(given, list) else [given]
    if not questions or not all(isinstance(question, dict) for question in questions):
        raise ServiceError("invalid", "inputs must be an object with question and context, or a list of them")
    pairs = [(fields.needed(q, "question", str), fields.needed(q, "context", str)) for q in questions]
    top_k, longest = fields.count(options, "top_k") or 1, fields.count(options, "max_answer_len")
    silent = fields.take(options, "handle_impossible_answer", bool)
    model = service.models.with_ability("answers", fields.take(call.body, "model", str))
    way = model.abilities["answers"]
    if longest is not None and longest > model.texts.limit:
        longest = model.texts.limit
    found = await service.run(
        call, model, pairs,
        lambda: way.prepare(pairs, service.settings.max_queue_tokens, top_k=top_k, longest=longest,
                            may_be_silent=silent),
        in_windows=True,
    )  # fmt: skip
    made = [answers[0] if top_k == 1 else answers for answers in found]
    return made if isinstance(given, list) else made[0]


async def fill_mask(service: Service, call: Call) -> list:
    """Words for the masks of a text, or of each of a list: score, token, token_str, sequence; a list for each mask if a
    text has several. The best `top_k` words, or those among `targets` if given."""
    given, options = call.body.get("inputs"), _parameters(call)
    texts = fields.texts(given, "inputs")
    top_k, targets = fields.count(options, "top_k") or 5, fields.take(options, "targets", list)
    if targets is not None:
        fields.texts(targets, "targets")
    model = service.models.with_ability("masks", fields.take(call.body, "model", str))
    way = model.abilities["masks"]
    found = await service.run(call, model, texts, lambda: way.prepare(texts, top_k=top_k, targets=targets))
    made = [masks[0] if len(masks) == 1 else masks for masks in found]
    return made[0] if isinstance(given, str) else made


async def zero_shot(service: Service, call: Call) -> list:
    """Scores for the caller's labels, by a classifier of pairs with a label "entailment"."""
    options = _parameters(call)
    text = fields.needed(call.body, "inputs", str)
    names = fields.texts(options.get("candidate_labels"), "candidate_labels")
    template = fields.take(options, "hypothesis_template", str, "This example is {}.")
    service.expect_count(names)
    characters = sum(len(template) + template.count("{}") * len(name) for name in names)
    if characters > service.settings.payload_limit:
        raise ServiceError(
            "too_large", f"hypothesis_template with each of candidate_labels has {characters:,} characters together, "
            f"and at most {service.settings.payload_limit:,} are read (--payload-limit)", param="hypothesis_template",
        )  # fmt: skip
    model = service.models.with_ability("labels", fields.take(call.body, "model", str))
    labels: Labels = model.abilities["labels"]
    lowered = [name.lower() for name in labels.labels]
    if "entailment" not in lowered:
        raise ServiceError("unable", "this model has no label entailment, so it cannot judge labels of the caller's")
    pairs = [(text, template.replace("{}", name)) for name in names]
    logits = await service.run(call, model, pairs, lambda: labels.prepare(pairs))
    yes = logits[:, lowered.index("entailment")]
    if fields.take(options, "multi_label", bool, False):
        others = next((i for i, name in enumerate(lowered) if name == "contradiction"), None)
        no = np.zeros_like(yes) if others is None else logits[:, others]
        scores = [float(probabilities(pair)[0]) for pair in zip(yes, no, strict=True)]
    else:
        scores = probabilities(yes).tolist()
    return sorted(({"label": n, "score": s} for n, s in zip(names, scores, strict=True)), key=lambda x: -x["score"])


async def hub(service: Service, call: Call) -> Any:
    """POST on a model's own address: the task depends on the body, and on what the model supports."""
    body = call.body
    model = service.models.named(call.scope.get("path_params", {}).get("name"))
    call.body = body = {**body, "model": model.name}
    inputs, parameters = body.get("inputs"), fields.take(body, "parameters", dict)
    if "query" in body and "inputs" not in body:  # text-embeddings-inference with a reranker
        return await (cohere if "documents" in body else tei).rerank(service, call)
    if "texts" in body and "inputs" not in body:  # litellm posts Cohere's requests here
        return await cohere.embed_v2(service, call)
    if isinstance(inputs, dict) and "source_sentence" in inputs:
        return await tei.similarity(service, call)
    if isinstance(inputs, dict) or "answers" in model.abilities:
        return await question_answer(service, call)
    if parameters is not None and "candidate_labels" in parameters:
        return await zero_shot(service, call)
    if "entities" in model.abilities:
        return await token_classify(service, call)
    if "masks" in model.abilities and parameters is not None:  # which the client sends with none in it, too
        return await fill_mask(service, call)
    if "labels" in model.abilities:
        return await _classify(service, call, parameters or {})
    return await tei.embed(service, call)


async def _classify(service: Service, call: Call, parameters: dict[str, Any]) -> list:
    """Nested for one text too: the hub's client takes the first of what it gets."""
    given = call.body.get("inputs")
    sequences = fields.texts(given, "inputs")
    function = fields.choice(parameters, "function_to_apply", ("softmax", "sigmoid", "none"))
    found = await tei.labelled(service, call, sequences, call.body, function)
    return [labels[: fields.count(parameters, "top_k")] for labels in found]
