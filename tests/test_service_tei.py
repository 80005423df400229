"""The API of text-embeddings-inference, compared with what the models themselves compute."""

import numpy as np
import pytest

pytest.importorskip("orjson", reason="needs the serve extra")
pytest.importorskip("prometheus_client", reason="needs the serve extra")
pytest.importorskip("starlette", reason="needs the serve extra")
from fastbert import Encoder
from fastbert.service.app import application
from fastbert.service.models import Models, load
from fastbert.service.service import Service
from fastbert.service.settings import Settings
from service_models import LABELS, PLAIN, Client, close, logits_of, make_folder

pytest_plugins = ("service_fixtures",)
pytestmark = pytest.mark.once


def test_embed_normalises_unless_told_otherwise(client, folders):
    raw = Encoder.from_pretrained(folders["texts"], normalize=False, **PLAIN).encode(["a b", "c"]).numpy()
    found = client.post("/embed", {"inputs": ["a b", "c"], "normalize": False}).json()
    assert close(found, raw)
    lengths = np.linalg.norm(client.post("/embed", {"inputs": ["a b", "c"]}).json(), axis=1)
    assert close(lengths, [1, 1])
    assert np.shape(client.post("/embed", {"inputs": "a b"}).json()) == (1, 32)


def test_prompts_and_both_ways_to_cut(client, encoder):
    found = client.post("/embed", {"inputs": ["a b"], "prompt_name": "query"}).json()
    assert close(found, encoder.encode(["a b"], prompt_name="query"))
    text = "a b " * 40 + "c d"
    left = encoder.tokenizer.input_ids([text])[0]
    left = left[:1] + left[-63:]
    found = client.post("/embed", {"inputs": [text], "truncation_direction": "Left"})
    assert found.headers["x-truncated-texts"] == "1"
    assert close(found.json(), encoder.encode_ids([left], 100))
    assert client.post("/embed", {"inputs": [text], "truncate": False}).status == 413
    assert client.post("/embed", {"inputs": [text], "truncation_direction": "up"}).status == 422


def test_an_error_does_not_repeat_a_long_name(client):
    reply = client.post("/embed", {"inputs": "a", "prompt_name": "x" * 100_000})
    assert reply.status == 422
    assert len(reply.content) < 300


def test_a_query_is_prepared_once(client, monkeypatch):
    """It was for each document, in 40 ms if it had 10 MB."""
    tokenizer = type(client.service.models.by_name["ranks"].texts.tokenizer)
    shortened, given = tokenizer.shortened, []
    monkeypatch.setattr(
        tokenizer, "shortened", lambda self, text, *rest: given.append(text) or shortened(self, text, *rest)
    )
    for more in ({}, {"max_tokens_per_doc": 3}):
        given.clear()
        reply = client.post("/rerank", {"query": "a " * 99, "documents": ["a", "b", "c", "a"], **more})
        assert len(reply.json()["results"]) == 4
        assert given.count("a " * 99) == 1
        assert len(given) == (7 if more else 4)


def test_prompts_that_are_not_pooled(tmp_path):
    """A folder can say that the tokens of a prompt are left out of the mean."""
    folder = make_folder(tmp_path / "texts", "texts")
    (folder / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 32, "include_prompt": false}')
    encoder, settings = Encoder.from_pretrained(folder, **PLAIN), Settings(**PLAIN)
    client = Client(application(Service(settings, Models([load("texts", folder, settings)]))))
    try:
        for name in ("query", "document", None):
            found = client.post("/embed", {"inputs": ["a b", "c"], "prompt_name": name}).json()
            assert close(found, encoder.encode(["a b", "c"], prompt_name=name))
    finally:
        client.close()


def test_embed_all_gives_every_token(client, encoder):
    found = client.post("/embed_all", {"inputs": ["a b", "c"]}).json()
    wanted = encoder.encode_tokens(["a b", "c"], special_tokens=True)
    assert [len(rows) for rows in found] == [4, 3]
    assert all(close(rows, parts.vectors) for rows, parts in zip(found, wanted, strict=True))


def test_predict_gives_labels_best_first(client, folders):
    wanted = logits_of(folders["feelings"], "feelings", ["a b", "c"]).softmax(-1).numpy()
    single = client.post("/predict", {"inputs": "a b", "model": "feelings"}).json()
    batch = client.post("/predict", {"inputs": [["a b"], ["c"]], "model": "feelings"}).json()
    assert [item["label"] for item in single] == [item["label"] for item in batch[0]]
    assert close([item["score"] for item in single], [item["score"] for item in batch[0]])
    for found, row in zip(batch, wanted, strict=True):
        assert [item["score"] for item in found] == sorted((item["score"] for item in found), reverse=True)
        by_label = {item["label"]: item["score"] for item in found}
        assert close([by_label[name] for name in LABELS["feelings"].values()], row)
    pair = client.post("/predict", {"inputs": ["a b", "c"], "model": "feelings", "raw_scores": True}).json()
    wanted = logits_of(folders["feelings"], "feelings", ["a b"], ["c"])[0]
    assert close(max(item["score"] for item in pair), wanted.max())
    assert client.post("/predict", {"inputs": ["a", "b", "c"], "model": "feelings"}).status == 422


def test_every_cut_text_is_counted(client):
    """Of texts, and of pairs and texts together."""
    long = "a " * 99
    for path, body, count in (
        ("/embed", {"inputs": [long, "a", long]}, 2), ("/embed", {"inputs": [[5] * 99, [5], [5] * 99, [5] * 63]}, 3),
        ("/predict", {"inputs": [[long], ["a", long], ["a"], ["a", "b"], [long, "a"]], "model": "feelings"}, 3),
        ("/rerank", {"query": "a", "texts": [long, "b", long]}, 2),
        ("/similarity", {"inputs": {"source_sentence": long, "sentences": [long, "a"]}}, 2),
        ("/tokenize", {"inputs": [long, "a", long]}, 2),
    ):  # fmt: skip
        assert client.post(path, body).headers["x-truncated-texts"] == str(count), path


def test_similarity_is_the_cosine(client, encoder):
    found = client.post("/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b", "a"]}}).json()
    vectors = encoder.encode(["a", "b"])
    assert close(found, [float(vectors[0] @ vectors[1]), 1.0])


def test_tokenize_and_decode(client):
    (found,) = client.post("/tokenize", {"inputs": "a bc"}).json()
    assert [token["text"] for token in found] == ["[CLS]", "a", "b", "##c", "[SEP]"]
    assert found[2] == {"id": 6, "text": "b", "special": False, "start": 2, "stop": 3}
    assert found[0] == {"id": 2, "text": "[CLS]", "special": True, "start": None, "stop": None}
    ids = [token["id"] for token in found]
    assert client.post("/decode", {"ids": ids}).json() == ["a bc"]
    assert client.post("/decode", {"ids": [ids, [5]]}).json() == ["a bc", "a"]
    assert client.post("/decode", {"ids": [10**6]}).status == 422


def test_places_in_texts_of_megabytes(served, monkeypatch):
    """They were tokenised whole, in seconds, if they had no spaces or nothing else."""
    client = served("texts")
    own = client.service.models.served[0].texts.tokenizer
    whole, given = type(own).__call__, []
    monkeypatch.setattr(
        type(own), "__call__", lambda self, texts, **more: given.extend(texts) or whole(self, texts, **more)
    )
    million = 1_000_000
    for text, wanted in (
        ("x" * million + " a", [("[UNK]", 0, million), ("a", million + 1, million + 2)]),
        (" " * million + "a\x00c", [("a", million, million + 1), ("##c", million + 2, million + 3)]),
        ("a" + "\x00" * million + "b", [("a", 0, 1), ("##b", million + 1, million + 2)]),
        ("a" + "\u3000" * million, [("a", 0, 1)]),
    ):  # fmt: skip
        (found,) = client.post("/tokenize", {"inputs": text}).json()
        assert [(t["text"], t["start"], t["stop"]) for t in found[1:-1]] == wanted
    assert max(map(len, given)) < 10_000
    scattered = "\U0001d165" + "x" * 300_000  # a mark that is sorted
    reply = client.post("/tokenize", {"inputs": ["a", scattered]})
    assert (reply.status, "text 1" in reply.json()["error"]) == (413, True)
    assert client.post("/tokenize", {"inputs": scattered[:200_000]}).status == 200
    assert client.post("/embed", {"inputs": scattered}).status == 200


def test_tokenize_stops_at_the_limit(client):
    long = "a " * 100
    reply = client.post("/tokenize", {"inputs": ["a", long]})
    assert [len(tokens) for tokens in reply.json()] == [3, 64]
    assert reply.headers["x-truncated-texts"] == "1"
    reply = client.post("/tokenize", {"inputs": long, "add_special_tokens": False})
    assert [token["id"] for token in reply.json()[0]] == [5] * 64
    reply = client.post("/tokenize", {"inputs": "a " * 62, "truncate": False})
    assert (reply.status, len(reply.json()[0]), reply.headers["x-truncated-texts"]) == (200, 64, "0")
    assert client.post("/tokenize", {"inputs": long, "truncate": False}).status == 413


def test_the_size_of_answers_is_limited(client, monkeypatch):
    """Otherwise one request could need more than the machine's memory."""
    monkeypatch.setattr("fastbert.service.work.vectors.MOST_NUMBERS", 7 * 32)
    assert client.post("/embed_all", {"inputs": ["a b", "c"]}).status == 200
    assert client.post("/embed_all", {"inputs": ["a b", "c d"]}).status == 413
    monkeypatch.setattr("fastbert.service.work.masks.MOST_WORDS", 6)
    assert client.post("/fill_mask", {"inputs": ["[MASK] [MASK]", "[MASK]"], "top_k": 2}).status == 200
    assert client.post("/fill_mask", {"inputs": ["[MASK] [MASK]", "[MASK]"], "top_k": 3}).status == 413
    assert client.post("/fill_mask", {"inputs": "[MASK] " * 3, "top_k": 3, "targets": ["a", "b"]}).status == 200


def test_tei_errors_are_flat(client):
    reply = client.post("/embed", {"inputs": []})
    assert reply.status == 400
    assert reply.json() == {"error": "`inputs` cannot be empty", "error_type": "Empty"}
    assert client.post("/predict", {"inputs": "a", "model": "texts"}).json()["error_type"] == "Backend"
    assert client.post("/nowhere", {}).status == 404
    assert client.get("/embed").status == 405


def test_info_has_what_clients_read(client):
    info = client.get("/info").json()
    wanted = "model_id sha docker_label model_sha model_dtype model_type max_concurrent_requests max_input_length "
    wanted += "max_batch_tokens max_batch_requests max_client_batch_size auto_truncate tokenization_workers version"
    assert set(wanted.split()) <= set(info)
    assert info["max_input_length"] == 64
    assert info["model_type"] == {"embedding": {"pooling": "mean"}}
