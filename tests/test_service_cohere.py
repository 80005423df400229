"""Ranking, in the form of each API, and vectors in Cohere's types."""

import numpy as np
import pytest

from service_models import close, logits_of

pytest_plugins = ("service_fixtures",)
pytestmark = pytest.mark.once


def test_rerank_answers_in_the_form_of_the_callers_api(client, folders):
    documents = ["a", "b c d", "e"]
    raw = logits_of(folders["ranks"], "ranks", ["q"] * 3, documents)[:, 0]
    order = raw.argsort(descending=True).tolist()
    tei = client.post("/rerank", {"query": "q", "texts": documents, "return_text": True}).json()
    assert [item["index"] for item in tei] == order
    assert [item["text"] for item in tei] == [documents[i] for i in order]
    assert close([item["score"] for item in tei], raw.sigmoid()[order])
    assert close([x["score"] for x in client.post("/rerank", {"query": "q", "texts": documents, "raw_scores": True}
                                                  ).json()], raw[order])  # fmt: skip
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        body = {"query": "q", "documents": [documents[0], {"text": documents[1]}, documents[2]], "top_n": 2}
        found = client.post(path, {**body, "return_documents": True}).json()
        assert [item["index"] for item in found["results"]] == order[:2]
        assert close([item["relevance_score"] for item in found["results"]], raw.sigmoid()[order[:2]])
        assert found["results"][0]["document"] == {"text": documents[order[0]]}
        assert found["usage"]["total_tokens"] == 17  # three pairs, each with 3 special tokens and a query
    assert client.post("/v2/rerank", {"query": "q", "documents": []}).json()["results"] == []
    for path in ("/v1/rerank", "/v2/rerank", "/models/ranks"):  # `texts` were refused there
        assert client.post(path, {"query": "q", "texts": documents, "return_text": True}).json() == tei
    reply = client.post("/v1/rerank", {"query": 7, "texts": documents})
    assert (reply.status, set(reply.json())) == (422, {"error", "error_type"})
    assert "documents" in client.post("/v1/rerank", {"query": "q"}).json()["message"]
    assert "texts" in client.post("/rerank", {"query": "q"}).json()["error"]


def test_scores_of_pairs_in_the_form_of_vllm(client, folders):
    ones, others = ["q", "a b", "c"], ["a", "b c d", "e"]
    for first, given in (("q", ["q"] * 3), (["q"], ["q"] * 3), (ones, ones)):
        wanted = logits_of(folders["ranks"], "ranks", given, others)[:, 0].sigmoid()
        for path, names in (("/v1/score", ("text_1", "text_2")), ("/score", ("queries", "documents"))):
            found = client.post(path, {"model": "ranks", names[0]: first, names[1]: others}).json()
            assert [item["index"] for item in found["data"]] == [0, 1, 2]
            assert {item["object"] for item in found["data"]} == {"score"}
            assert close([item["score"] for item in found["data"]], wanted)
            assert found["usage"]["total_tokens"] > 0
    assert len(client.post("/score", {"text_1": "q", "text_2": "a"}).json()["data"]) == 1
    for body, param in (({}, "text_1"), ({"text_1": "q"}, "text_2"), ({"text_1": ones, "text_2": ["a", "b"]}, "text_1"),
                        ({"queries": "q", "documents": []}, "documents")):  # fmt: skip
        reply = client.post("/v1/score", body)
        assert (reply.status, reply.json()["error"]["param"]) == (400, param)


def test_vllms_limit_of_tokens_for_pairs(client, folders):
    long, body = "a b c d e f", {"query": "q", "documents": ["b " * 80, "c"]}
    wanted = logits_of(folders["ranks"], "ranks", ["q"], ["a b c d"])[0, 0].sigmoid()
    for path, given, score in (
        ("/v1/score", {"text_1": "q", "text_2": long}, lambda found: found["data"][0]["score"]),
        ("/v1/rerank", {"query": "q", "documents": [long]}, lambda found: found["results"][0]["relevance_score"]),
    ):
        reply = client.post(path, {**given, "truncate_prompt_tokens": 8})
        assert reply.headers["x-truncated-texts"] == "1"
        assert close(score(reply.json()), wanted), path
        assert client.post(path, {**given, "truncate_prompt_tokens": 4}).status == 400
    assert client.post("/v1/rerank", {**body, "truncate_prompt_tokens": -1}).headers["x-truncated-texts"] == "1"


def test_documents_are_cut_to_the_requested_tokens(client):
    body = {"query": "q", "documents": ["a b c d e f", "abc d", "e", "f g"]}
    short = client.post("/v2/rerank", {"query": "q", "documents": ["a b", "ab", "e", "f g"]})
    found = client.post("/v2/rerank", {**body, "max_tokens_per_doc": 2, "return_documents": True, "truncate": False})
    assert found.headers["x-truncated-texts"] == "2"
    assert [(x["index"], x["relevance_score"]) for x in found.json()["results"]] == [
        (x["index"], pytest.approx(x["relevance_score"], abs=1e-5)) for x in short.json()["results"]
    ]
    assert found.json()["results"][0]["document"]["text"] in body["documents"]
    whole = client.post("/v2/rerank", body).json()["results"]
    for many in (None, 0, 63, 10**9):
        reply = client.post("/v2/rerank", {**body, "max_tokens_per_doc": many})
        assert reply.headers["x-truncated-texts"] == "0"
        assert [x["index"] for x in reply.json()["results"]] == [x["index"] for x in whole]
    both = client.post("/v2/rerank", {"query": "q", "documents": ["a " * 99], "max_tokens_per_doc": 62})
    assert both.headers["x-truncated-texts"] == "1"
    assert client.post("/v2/rerank", {**body, "max_tokens_per_doc": -1}).status == 400


def test_vectors_in_each_of_coheres_types(client, encoder):
    types = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    body = {"texts": ["a b", "c"], "input_type": "search_query", "embedding_types": types}
    found = client.post("/v2/embed", body).json()["embeddings"]
    wanted = encoder.encode_query(["a b", "c"]).numpy()
    assert close(found["float"], wanted)
    assert found["int8"] == np.rint(wanted * 127).astype(int).tolist()
    assert found["uint8"] == (np.rint(wanted * 127).astype(int) + 128).tolist()
    assert (np.unpackbits(np.array(found["ubinary"], np.uint8), axis=1) == (wanted > 0)).all()
    assert found["binary"] == (np.array(found["ubinary"]) - 128).tolist()
    few = client.post("/v2/embed", {"texts": ["a b", "c"], "output_dimension": 3, "model": "masks"}).json()
    raw = client.post("/embed", {"inputs": ["a b", "c"], "normalize": False, "model": "masks"}).json()
    assert close(few["embeddings"]["float"], np.array(raw)[:, :3])
    plain = client.post("/v1/embed", {"texts": ["a b"], "input_type": "search_document"}).json()
    assert close(plain["embeddings"], encoder.encode_document(["a b"]))
    parts = [[{"type": "text", "text": "a b"}], [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}]]
    body = {"inputs": [{"content": content} for content in parts], "input_type": "search_query"}
    assert close(client.post("/v2/embed", body).json()["embeddings"]["float"], encoder.encode_query(["a b", "c d"]))
    image = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]
    for inputs in ([], [7], [{}], [{"content": "a"}], [{"content": []}], [{"content": image}]):
        reply = client.post("/v2/embed", {"inputs": inputs})
        assert reply.status == 400
        assert "inputs" in reply.json()["message"]
    assert client.post("/v2/embed", {"texts": ["a"], "embedding_types": ["float64"]}).json()["message"]
    assert client.post("/v2/embed", {"texts": ["a"], "embedding_types": [[]]}).status == 400


def test_cohere_names_the_end_that_is_cut(served, encoder):
    """NONE refuses a long text, and a request that does not say has the server's default."""
    client = served("texts", auto_truncate=False)
    text = "a b " * 40 + "c d"
    (ids,) = encoder.tokenizer.input_ids([text])
    for name, kept in (("START", ids[:1] + ids[-63:]), ("END", ids[:63] + ids[-1:])):
        reply = client.post("/v2/embed", {"texts": [text], "truncate": name})
        assert reply.headers["x-truncated-texts"] == "1"
        assert close(reply.json()["embeddings"]["float"], encoder.encode_ids([kept], 100))
    for body in ({"texts": [text], "truncate": "NONE"}, {"texts": [text]}):
        assert client.post("/v2/embed", body).status == 413
