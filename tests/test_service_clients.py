"""Recorded requests of 17 current clients of embedding servers: each gets the answer that its client needs."""

import base64
import json
import re
import time

import pytest

pytest.importorskip("orjson", reason="needs the serve extra")
pytest.importorskip("prometheus_client", reason="needs the serve extra")
pytest.importorskip("starlette", reason="needs the serve extra")
from fastbert.service.app import application
from fastbert.service.models import Models, load
from fastbert.service.service import Service
from fastbert.service.settings import Settings
from service_models import CLASSES, Client, make_folder

pytestmark = pytest.mark.once

WIDTH = 32
# At a model's own address the model does its one task; this says which model a method of the hub's client needs.
OF_CALL = {
    "text_classification": "feelings", "zero_shot": "feelings", "token_classification": "names",
    "question_answering": "answers", "fill_mask": "masks",
}  # fmt: skip
NOT_ANSWERED = {"empty list": 400}  # an OpenAI server refuses it, and its client could not read an empty answer either


@pytest.fixture(scope="module")
def recorded(shared):
    file = shared / "fixtures" / "clients.json"
    if not file.is_file():
        pytest.skip(f"needs the recorded requests in {file}")
    return [r for r in json.loads(file.read_text(encoding="utf-8")) if r["method"] is not None]


@pytest.fixture(scope="module")
def clients(tmp_path_factory):
    """For each kind of model, a client of a server whose first model is of this kind."""
    settings = Settings(dtype="float32", device="cpu", impl="native")
    loaded = [load(kind, make_folder(tmp_path_factory.mktemp(kind), kind), settings) for kind in CLASSES]
    made = {}
    for first in loaded:
        order = [first, *(model for model in loaded if model is not first and model.name != "masks")]
        service = Service(settings, Models(order))
        made[first.name] = Client(application(service))
        while not service.is_warm:
            assert service.failure is None
            time.sleep(0.001)
    yield made
    for client in made.values():
        client.close()


def whole(value):
    """Restores what was cut from a body: '...(10 items)' and '...(9 chars)' stand for values of this length."""
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list):
        if value and isinstance(value[-1], str) and (cut := re.fullmatch(r"\.\.\.\((\d+) items\)", value[-1])):
            kept = [whole(item) for item in value[:-1]]
            return (kept * int(cut[1]))[: int(cut[1])]
        return [whole(item) for item in value]
    if isinstance(value, str) and (cut := re.fullmatch(r"(.*)\.\.\.\((\d+) chars\)", value, re.DOTALL)):
        return (cut[1] * int(cut[2]))[: int(cut[2])]
    return value


def is_vector(value, width=WIDTH):
    return isinstance(value, list) and len(value) == width and all(type(x) in (float, int) for x in value)


def check_openai(body, answer):
    assert answer["object"] == "list"
    assert isinstance(answer["model"], str)
    given = body["input"]
    single = isinstance(given, str) or isinstance(given[0], int)
    assert [item["index"] for item in answer["data"]] == list(range(1 if single else len(given)))
    width = body.get("dimensions") or body.get("output_dimension") or WIDTH
    for item in answer["data"]:
        assert item["object"] == "embedding"
        if body.get("encoding_format") == "base64":
            assert len(base64.b64decode(item["embedding"])) == 4 * width
        else:
            assert is_vector(item["embedding"], width)
    assert all(type(answer["usage"][name]) is int for name in ("prompt_tokens", "total_tokens"))


def check_vectors(body, answer):
    count = 1 if isinstance(body["inputs"], str) else len(body["inputs"])
    assert len(answer) == count
    assert all(is_vector(row, body.get("dimensions") or WIDTH) for row in answer)


def check_tei_ranks(body, answer):
    assert sorted(item["index"] for item in answer) == list(range(len(body["texts"])))
    scores = [item["score"] for item in answer]
    assert scores == sorted(scores, reverse=True)
    assert all(("text" in item) == bool(body.get("return_text")) for item in answer)


def check_ranks(body, answer):
    assert isinstance(answer["id"], str)
    wanted = body.get("top_n") or body.get("top_k") or len(body["documents"])
    assert len(answer["results"]) == min(wanted, len(body["documents"]))
    for item in answer["results"]:
        assert type(item["index"]) is int
        assert type(item["relevance_score"]) is float
        if body.get("return_documents"):
            assert isinstance(item["document"]["text"], str)
    assert type(answer["usage"]["total_tokens"]) is int


def check_cohere(body, answer):
    assert isinstance(answer["id"], str)
    if isinstance(answer["embeddings"], list):
        assert not body.get("embedding_types")
        assert answer["response_type"] == "embeddings_floats"
        rows = {"float": answer["embeddings"]}
    else:
        rows = answer["embeddings"]
        assert list(rows) == (body.get("embedding_types") or ["float"])
    assert all(len(of_type) == len(body["texts"]) for of_type in rows.values())
    assert type(answer["meta"]["billed_units"]["input_tokens"]) is int


def check_info(body, answer):
    assert {"sha", "docker_label", "version", "model_type", "max_input_length"} <= set(answer)


def check_models(body, answer):
    assert answer["object"] == "list"
    assert {"id", "object", "created", "owned_by"} <= set(answer["data"][0])


def check_hub(call, body, answer):
    """Checks the answer at a model's address, by the name of the client's method."""
    if call.startswith("text_classification"):
        assert all({"label", "score"} <= set(item) for item in answer[0])
    elif call.startswith("zero_shot"):
        assert [set(item) for item in answer] == [{"label", "score"}] * 2
    elif call.startswith("token_classification"):
        assert all({"score", "word", "start", "end"} < set(item) for item in answer)
    elif call.startswith("question_answering"):
        for item in answer if isinstance(answer, list) else [answer]:
            assert set(item) == {"answer", "score", "start", "end"}
    elif call.startswith("fill_mask"):
        assert all(set(item) == {"score", "token", "token_str", "sequence"} for item in answer)
    elif call == "sentence_similarity":
        assert [type(x) for x in answer] == [float, float]
    else:
        check_vectors(body, answer)


def check(request, body, answer):
    path = request["path"]
    if "texts" in body and "rerank" not in path:
        check_cohere(body, answer)
    elif path in ("/", "/v1"):
        check_hub(request["call"], body, answer)
    elif path == "/rerank" and "texts" in body:
        check_tei_ranks(body, answer)
    elif "rerank" in path:
        check_ranks(body, answer)
    else:
        checks = {"/embed": check_vectors, "/info": check_info, "/v1/models": check_models}
        checks.get(path, check_openai)(body, answer)


def ask(clients, request, body):
    kind = next((kind for call, kind in OF_CALL.items() if request["call"].startswith(call)), "texts")
    if kind == "masks" and "targets" in (body.get("parameters") or {}):
        body["parameters"]["targets"] = ["x"]
    if body.get("output_dimension") == 256:  # more dimensions than our small model has
        body["output_dimension"] = 8
    return clients[kind].ask(request["method"], request["path"], body, request["headers"])


def test_every_recorded_request_is_answered_as_its_client_needs(clients, recorded):
    assert len(recorded) > 250
    seen, refused = set(), 0
    for request in recorded:
        body = whole(request["body"] or {})
        key = (request["path"], json.dumps(body)[:5000], request["call"].split()[0])
        if key in seen:  # several clients send the same request
            continue
        seen.add(key)
        reply = ask(clients, request, body)
        told = f"{request['client']}: {request['call']}: {reply.status} {reply.content[:300]}"
        if request["call"] in NOT_ANSWERED:
            assert reply.status == NOT_ANSWERED[request["call"]], told
            continue
        given = body.get("input")
        ids = [i for ids in given if isinstance(ids, list) for i in ids] if isinstance(given, list) else []
        if ids and max(ids) >= 36:  # ids of cl100k, which langchain-openai sends
            assert reply.status == 400, told
            assert "check_embedding_ctx_length=False" in reply.json()["error"]["message"]
            refused += 1
            continue
        assert reply.status == 200, told
        check(request, body, reply.json())
    assert refused >= 4


def test_every_recorded_request_gets_an_overload_error_for_its_client(clients, recorded):
    """429 or 503 with a whole number of seconds below 60 to wait; the message is where each client looks for it."""
    client = clients["texts"]
    queue = client.application.service.queues["texts"]
    queue.announce(queue.bound)
    try:
        for path, where in (
            ("/v1/embeddings", lambda e: e["error"]["message"]), ("/embeddings", lambda e: e["error"]["message"]),
            ("/embed", lambda e: e["error"]), ("/", lambda e: e["error"]), ("/v2/embed", lambda e: e["message"]),
        ):  # fmt: skip
            request = next(r for r in recorded if r["path"] == path and "a" in json.dumps(r["body"]))
            reply = client.post(path, whole(request["body"]))
            assert reply.status == 429
            assert 1 <= int(reply.headers["retry-after"]) < 60
            assert where(reply.json()) == "Model is overloaded"
            if path == "/v1/embeddings":
                assert reply.json()["detail"] == "Model is overloaded"
    finally:
        queue.withdraw(queue.bound)
