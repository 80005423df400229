"""Ollama's API, as its clients use it for vectors."""

import pytest

from service_models import CLASSES, TEXTS, close

pytest_plugins = ("service_fixtures",)
pytestmark = pytest.mark.once


def test_vectors_of_texts(client, encoder):
    wanted = encoder.encode(TEXTS)
    found = client.post("/api/embed", {"model": "texts", "input": TEXTS, "options": {}, "keep_alive": "5m"}).json()
    assert found["model"] == "texts"
    assert close(found["embeddings"], wanted)
    assert found["prompt_eval_count"] == sum(map(len, encoder.tokenise(TEXTS)))
    assert all(type(found[name]) is int for name in ("total_duration", "load_duration"))
    for name in ("texts:latest", None):
        assert close(client.post("/api/embed", {"model": name, "input": TEXTS[0]}).json()["embeddings"], wanted[:1])
    assert close(client.post("/api/embeddings", {"model": "texts", "prompt": TEXTS[0]}).json()["embedding"], wanted[0])
    short = client.post("/api/embed", {"input": TEXTS, "dimensions": 8}).json()["embeddings"]
    assert {len(row) for row in short} == {8}


@pytest.mark.parametrize("given", ["", [], None])
def test_no_text_loads_the_model(client, given):
    assert client.post("/api/embed", {"model": "texts", "input": given}).json()["embeddings"] == []
    if not isinstance(given, list):
        assert client.post("/api/embeddings", {"model": "texts", "prompt": given}).json() == {"embedding": []}


def test_long_texts(client):
    reply = client.post("/api/embed", {"model": "texts", "input": "a " * 99})
    assert reply.headers["x-truncated-texts"] == "1"
    reply = client.post("/api/embed", {"model": "texts", "input": "a " * 99, "truncate": False})
    assert reply.status == 413
    assert set(reply.json()) == {"error"}
    assert "context length" in reply.json()["error"]  # at these words cognee sends the text in parts


def test_several_models_by_name(served, encoder):
    from fastbert.service.app import application
    from fastbert.service.models import Models
    from fastbert.service.service import Service
    from service_models import Client

    one = served("texts").service.models.served[0]
    other = type(one)("other", one.abilities, one.config, one.texts, one.dtype, one.batch_tokens)
    client = Client(application(Service(served("texts").service.settings, Models([one, other]))))
    try:
        assert client.post("/api/embed", {"model": "other:latest", "input": "a"}).status == 200
        reply = client.post("/api/embed", {"model": "third:latest", "input": "a"})
        assert reply.status == 404
        assert "texts, other" in reply.json()["error"]
    finally:
        client.close()


def test_what_clients_ask_about_models(client):
    for path in ("/api/tags", "/api/ps"):
        found = client.get(path).json()["models"]
        assert [item["model"] for item in found] == [f"{name}:latest" for name in CLASSES]
        assert all(item["details"]["family"] == "bert" for item in found)
    shown = client.post("/api/show", {"model": "texts:latest"}).json()
    assert shown["capabilities"] == ["embedding"]
    assert shown["model_info"]["bert.embedding_length"] == 32
    assert shown["model_info"]["bert.context_length"] == 64
    assert client.post("/api/show", {"name": "ranks"}).json()["capabilities"] == []
    assert client.post("/api/show", {"model": "x"}).status == 404
    assert isinstance(client.get("/api/version").json()["version"], str)
