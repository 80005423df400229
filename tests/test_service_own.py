"""Entities, answers and filled masks, and a model's own address as the hub's clients use it."""

import numpy as np
import pytest

pytest.importorskip("orjson", reason="needs the serve extra")
pytest.importorskip("prometheus_client", reason="needs the serve extra")
pytest.importorskip("starlette", reason="needs the serve extra")
from fastbert.encoding.masks import MaskFiller
from fastbert.service.app import application
from fastbert.service.models import Models, load
from fastbert.service.service import Service
from fastbert.service.settings import Settings
from service_models import LABELS, PLAIN, Client, close, logits_of

pytest_plugins = ("service_fixtures",)
pytestmark = pytest.mark.once


def test_entities(client, folders):
    wanted = logits_of(folders["names"], "names", ["a b c"])[0].softmax(-1)[1:-1]  # of tokens
    words = client.post("/token_classify", {"inputs": "a b c", "parameters": {
        "aggregation_strategy": "none", "ignore_labels": []}}).json()  # fmt: skip
    assert [word["word"] for word in words] == ["a", "b", "c"]
    assert [(word["start"], word["end"]) for word in words] == [(0, 1), (2, 3), (4, 5)]
    assert close([word["score"] for word in words], wanted.max(-1).values)
    assert [word["entity"] for word in words] == [LABELS["names"][i] for i in wanted.argmax(-1).tolist()]
    entities = client.post("/token_classify", {"inputs": ["a b c", ""]}).json()
    assert len(entities) == 2
    assert entities[1] == []
    for entity in entities[0]:
        assert entity["entity_group"] == "PER"
        assert entity["word"] == "a b c"[entity["start"] : entity["end"]]


def test_answers(client):
    context = "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 4  # several windows
    body = {"inputs": {"question": "a b", "context": context}}
    answer = client.post("/question_answer", body).json()
    assert answer["answer"] == context[answer["start"] : answer["end"]] != ""
    three = client.post("/question_answer", {**body, "parameters": {"top_k": 3, "max_answer_len": 2}}).json()
    assert len(three) == 3
    assert all(len(found["answer"].split()) <= 2 for found in three)
    assert [found["score"] for found in three] == sorted((found["score"] for found in three), reverse=True)
    both = client.post("/question_answer", {"inputs": [body["inputs"], body["inputs"]]}).json()
    assert both == [answer, answer]
    assert client.post("/question_answer", {"inputs": {"question": "a"}}).status == 422


def test_texts_too_long_for_the_queue_are_refused_before_they_are_tokenised(served, monkeypatch):
    """They are not cut but computed in windows. A request of 15 MB was tokenised whole, which took minutes, and two of
    them held up all others."""
    client = served("names", "answers", max_queue_tokens=1000)
    for model in client.service.models.served:
        (way,) = model.abilities.values()
        monkeypatch.setattr(way, "prepare", lambda *given, **options: 1 / 0)
    long, question = "a" * 4000, {"question": "a", "context": "b"}
    for path, inputs in (
        ("/token_classify", long), ("/token_classify", ["b", long]), ("/question_answer", question | {"context": long}),
        ("/question_answer", question | {"question": long}),
    ):  # fmt: skip
        reply = client.post(path, {"inputs": inputs})
        assert reply.status == 413
        assert "--max-queue-tokens" in reply.json()["error"]
    assert client.post("/token_classify", {"inputs": "a" * 3900}).status == 500


def test_texts_with_more_tokens_than_announced_are_refused_before_windows_are_made(served, monkeypatch):
    """One token for four characters is announced. 2 MB of full stops took seconds and gigabytes before they were
    refused."""
    client = served("names", "answers", max_queue_tokens=300_000)
    for model in client.service.models.served:
        (way,) = model.abilities.values()
        monkeypatch.setattr(way.pipeline.task, "features", lambda *given, **options: 1 / 0)
    dots = "." * 400_000
    for path, inputs in (
        ("/token_classify", [dots]), ("/token_classify", ["[MASK]" * 110_000]),
        ("/question_answer", {"question": "a", "context": dots}),
    ):  # fmt: skip
        reply = client.post(path, {"inputs": inputs})
        assert reply.status == 413
        assert "more than 300,000 tokens" in reply.json()["error"]
        short = inputs | {"context": dots[:9]} if isinstance(inputs, dict) else dots[:9]
        assert client.post(path, {"inputs": short}).status == 500


def test_labels_in_a_long_template(served):
    """The template is repeated for each label: 10 MB for each of thousands would need gigabytes."""
    client = served("feelings", payload_limit=100_000)
    for labels, template, status in (
        (["x"] * 9, "{} " * 2_000, 200), (["x"] * 20, "{} " * 2_000, 413), (["x" * 10_000], "{}" * 9, 200),
        (["x" * 10_000], "{}" * 11, 413), (["x"] * 5_000, "{}", 413),
    ):  # fmt: skip
        parameters = {"candidate_labels": labels, "hypothesis_template": template}
        reply = client.post("/", {"inputs": "a", "parameters": parameters})
        assert reply.status == status, reply.content


def test_filled_words(client, folders):
    filler = MaskFiller.from_pretrained(folders["masks"], **PLAIN)
    wanted = filler.fill(["a [MASK] c"], 3)[0][0]
    found = client.post("/fill_mask", {"inputs": "a [MASK] c", "top_k": 3}).json()
    assert [word["token_str"] for word in found] == [word.token for word in wanted]
    assert close([word["score"] for word in found], [word.score for word in wanted])
    assert found[0]["sequence"].split()[0::2] == ["a", "c"] or found[0]["token_str"].startswith("##")
    two = client.post("/fill_mask", {"inputs": ["[MASK] [MASK]", "[MASK]"], "targets": ["a", "b"]}).json()
    assert [len(masks) for masks in two] == [2, 2]
    assert {word["token_str"] for word in two[0][1]} == {"a", "b"}
    for bad in ({"inputs": "a"}, {"inputs": "[MASK]", "targets": ["no word"]}, {"inputs": "[MASK]", "top_k": 999}):
        assert client.post("/fill_mask", bad).status == 422
    assert client.post("/fill_mask", {"inputs": "a " * 99 + "[MASK]"}).status == 413


def test_vectors_and_filled_words_share_one_encoder(client):
    model = client.service.models.by_name["masks"]
    trunk, filler = model.abilities["vectors"].encoder.model, model.abilities["masks"].filler.model
    assert filler.bert is trunk
    assert filler.cls["predictions"].decoder.weight is trunk.embeddings.word_embeddings.weight


def test_a_models_address_may_have_slashes(folders):
    """Ids of the hub have a slash."""
    settings = Settings(**PLAIN)
    client = Client(application(Service(settings, Models([load("someones/texts", folders["texts"], settings)]))))
    try:
        assert np.shape(client.post("/models/someones/texts", {"inputs": "a"}).json()) == (1, 32)
        assert client.post("/models/texts", {"inputs": "a"}).status == 404
    finally:
        client.close()


def test_a_models_address_does_the_models_task(client):
    for path, name in (("/", None), ("/v1", None), ("/invocations", None), ("/models/texts", "texts")):
        assert np.shape(client.post(path, {"inputs": "a"}).json()) == (1, 32), name
    assert len(client.post("/models/feelings", {"inputs": "a", "parameters": {"top_k": 2}}).json()[0]) == 2
    assert len(client.post("/models/feelings", {"inputs": "a", "parameters": {"candidate_labels": ["x", "y"]}}
                           ).json()) == 2  # fmt: skip
    long = {"inputs": "a " * 99, "parameters": {"candidate_labels": ["x", "y", "z"]}}
    assert client.post("/models/feelings", long).headers["x-truncated-texts"] == "3"
    assert client.post("/models/masks", {"inputs": "[MASK]", "parameters": {}}).json()[0]["token_str"]
    assert np.shape(client.post("/models/masks", {"inputs": "a"}).json()) == (1, 32)
    assert client.post("/models/answers", {"inputs": {"question": "a", "context": "b"}}).json()["answer"]
    assert client.post("/models/other", {"inputs": "a"}).status == 404
