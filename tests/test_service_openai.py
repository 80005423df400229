"""OpenAI's API, compared with what the model itself computes."""

import base64

import numpy as np
import pytest

from service_models import TEXTS, close

pytest_plugins = ("service_fixtures",)
pytestmark = pytest.mark.once


def test_vectors_are_the_encoders_in_both_encodings_and_in_order(client, encoder):
    wanted = encoder.encode(TEXTS).numpy()
    reply = client.post("/v1/embeddings", {"input": TEXTS, "model": "texts"})
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/json"
    found = reply.json()
    assert [item["index"] for item in found["data"]] == list(range(len(TEXTS)))
    assert close([item["embedding"] for item in found["data"]], wanted)
    assert found["object"] == "list"
    assert {item["object"] for item in found["data"]} == {"embedding"}
    packed = client.post("/embeddings", {"input": TEXTS, "encoding_format": "base64"}).json()
    rows = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in packed["data"]]
    assert close(rows, wanted)


def test_usage_counts_kept_tokens_and_a_header_tells_what_was_cut(client, encoder):
    reply = client.post("/v1/embeddings", {"input": TEXTS})
    kept = sum(map(len, encoder.tokenise(TEXTS)))
    assert reply.json()["usage"] == {"prompt_tokens": kept, "total_tokens": kept}
    assert reply.headers["x-truncated-texts"] == "1"
    exact = client.post("/v1/embeddings", {"input": "a " * 62})  # 64 tokens, the model's limit
    assert exact.headers["x-truncated-texts"] == "0"
    assert exact.json()["usage"]["prompt_tokens"] == 64
    longer = client.post("/v1/embeddings", {"input": "a " * 63})
    assert longer.headers["x-truncated-texts"] == "1"
    assert longer.json()["usage"]["prompt_tokens"] == 64
    assert client.post("/v1/embeddings", {"input": "a " * 63, "truncate": False}).status == 413


def test_shortened_vectors_have_length_one(client, encoder):
    wanted = encoder.encode(["a b"]).numpy()[:, :8]
    wanted /= np.linalg.norm(wanted)
    for name in ("dimensions", "output_dimension"):
        reply = client.post("/v1/embeddings", {"input": "a b", name: 8}).json()
        assert close([reply["data"][0]["embedding"]], wanted)
    for none in (0, None):
        reply = client.post("/v1/embeddings", {"input": "a b", "dimensions": none}).json()
        assert len(reply["data"][0]["embedding"]) == 32
    for bad in (33, -1, "8", True, 1.5):
        assert client.post("/v1/embeddings", {"input": "a b", "dimensions": bad}).status == 400


def test_ids_of_the_vocabulary_are_accepted_and_others_refused(client, encoder):
    wanted = encoder.encode(["a b", "c"]).numpy()
    inside = client.post("/v1/embeddings", {"input": [[5, 6], [7]]}).json()
    whole = client.post("/v1/embeddings", {"input": [[2, 5, 6, 3], [2, 7, 3]]}).json()
    for found in (inside, whole):
        assert close([item["embedding"] for item in found["data"]], wanted)
    one = client.post("/v1/embeddings", {"input": [5, 6]}).json()
    assert close(one["data"][0]["embedding"], wanted[0])
    reply = client.post("/v1/embeddings", {"input": [[5], [15339, 1917]]})
    assert reply.status == 400
    assert "check_embedding_ctx_length=False" in reply.json()["error"]["message"]


def test_ids_are_cut_and_get_prompts_as_texts_do(client, encoder):
    text, ids = "a b " * 40 + "c d", [5, 6] * 40 + [7, 8]
    for more in ({}, {"truncation_direction": "Left"}, {"prompt_name": "query"},
                 {"prompt_name": "query", "truncation_direction": "left"}):  # fmt: skip
        wanted = client.post("/embed", {"inputs": text, **more})
        for given in (ids, [2, *ids, 3]):
            found = client.post("/embed", {"inputs": given, **more})
            assert found.headers["x-truncated-texts"] == wanted.headers["x-truncated-texts"] == "1"
            assert close(found.json(), wanted.json())
    found = client.post("/v1/embeddings", {"input": [5], "prompt_name": "document"}).json()
    assert close([found["data"][0]["embedding"]], encoder.encode(["a"], prompt_name="document"))


def test_numbers_of_voyages_and_jinas_clients(client, encoder):
    """Voyage's client asks for base64 of another type and reads the bytes as numbers of this type; LightRAG's class for
    Jina cannot read anything but base64. Both fields were taken without effect, so that the first read the bytes of
    float32 as int8."""
    wanted = encoder.encode(TEXTS).numpy()
    rounded = np.clip(np.rint(wanted * 127), -128, 127).astype(np.int8)
    bits = np.packbits(wanted > 0, axis=1)
    for name, rows, kind in (
        ("float", wanted, "<f4"), ("int8", rounded, "i1"), ("uint8", rounded.astype(int) + 128, "u1"),
        ("binary", bits.astype(int) - 128, "i1"), ("ubinary", bits, "u1"),
    ):  # fmt: skip
        for field in ("output_dtype", "embedding_type"):
            found = client.post("/v1/embeddings", {"input": TEXTS, field: name}).json()["data"]
            assert close([item["embedding"] for item in found], rows)
        packed = client.post("/v1/embeddings", {"input": TEXTS, "output_dtype": name, "encoding_format": "base64"})
        assert close([np.frombuffer(base64.b64decode(x["embedding"]), kind) for x in packed.json()["data"]], rows)
    packed = client.post("/v1/embeddings", {"input": [{"text": text} for text in TEXTS], "embedding_type": "base64"})
    assert close([np.frombuffer(base64.b64decode(x["embedding"]), "<f4") for x in packed.json()["data"]], wanted)


def test_what_a_text_is_for_chooses_the_models_prompt(client, encoder):
    def vector(**more):
        return client.post("/v1/embeddings", {"input": "a b", **more}).json()["data"][0]["embedding"]

    plain, query = encoder.encode(["a b"])[0], encoder.encode_query(["a b"])[0]
    document = encoder.encode(["a b"], prompt_name="document")[0]
    for field, words, wanted in (
        ("input_type", ("query", "search_query"), query), ("input_type", ("passage", "search_document"), document),
        ("task", ("retrieval.query",), query), ("task", ("retrieval.passage",), document),
        ("input_type", (None, "classification"), plain), ("task", ("text-matching", 7, {}), plain),
    ):  # fmt: skip
        for word in words:
            assert close(vector(**{field: word}), wanted), word
    assert close(vector(input_type="document", prompt_name="query"), query)


def test_cutting_and_length_by_the_fields_of_other_servers(client, encoder):
    long = "a b " * 40 + "c d"
    for more in ({"truncation": False}, {"truncate": "NONE"}):
        reply = client.post("/v1/embeddings", {"input": long, **more})
        assert reply.status == 413
        assert reply.json()["error"]["code"] == "context_length_exceeded"
    for more, side in (
        ({"truncation": True}, "right"), ({"truncate": "END"}, "right"), ({"truncate": "START"}, "left"),
        ({"truncation_direction": "Left"}, "left"),
    ):  # fmt: skip
        found = client.post("/v1/embeddings", {"input": long, **more})
        assert found.headers["x-truncated-texts"] == "1"
        wanted = client.post("/embed", {"inputs": long, "truncation_direction": side}).json()
        assert close([found.json()["data"][0]["embedding"]], wanted)
    wanted = client.post("/embed", {"inputs": "a b", "normalize": False}).json()
    assert np.linalg.norm(wanted) > 1.1
    for name in ("normalize", "normalized"):
        found = client.post("/v1/embeddings", {"input": "a b", name: False}).json()
        assert close([found["data"][0]["embedding"]], wanted)


def test_vllms_limit_of_tokens(client, served, encoder):
    """The field had no effect."""
    long, ids = "a b c d e f", [5, 6, 7, 8, 9, 10]
    for more, kept in (({}, "a b c"), ({"truncation_side": "left"}, "d e f"), ({"truncation_side": None}, "a b c")):
        wanted = encoder.encode([kept])
        for given in (long, ids):
            reply = client.post("/v1/embeddings", {"input": given, "truncate_prompt_tokens": 5, **more})
            assert (reply.headers["x-truncated-texts"], reply.json()["usage"]["prompt_tokens"]) == ("1", 5)
            assert close([reply.json()["data"][0]["embedding"]], wanted)
    for limit in (-1, 0, None, 64, 2**40):  # none but the model's own
        reply = client.post("/v1/embeddings", {"input": "a " * 99, "truncate_prompt_tokens": limit})
        assert reply.json()["usage"]["prompt_tokens"] == 64
    refused = client.post("/v1/embeddings", {"input": long, "truncate_prompt_tokens": 5, "truncate": False})
    assert (refused.status, refused.json()["error"]["code"]) == (413, "context_length_exceeded")
    strict = served("texts", auto_truncate=False)
    assert strict.post("/v1/embeddings", {"input": "a " * 99}).status == 413
    assert strict.post("/v1/embeddings", {"input": "a " * 99, "truncate_prompt_tokens": -1}).status == 200


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "input"), ({"input": []}, 400, "input"), ({"input": [1.5]}, 400, "input"),
        ({"input": ["a", 1]}, 400, "input"), ({"input": {}}, 400, "input"), ({"input": [[]]}, 400, "input"),
        ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format"),
        ({"input": "a", "encoding_format": 7}, 400, "encoding_format"), ({"input": "a", "model": 7}, 400, "model"),
        ({"input": "a", "modality": "image"}, 400, "modality"),
        ({"input": "a", "output_dtype": "int4"}, 400, "output_dtype"),
        ({"input": "a", "embedding_type": "multivector"}, 400, "embedding_type"),
        ({"input": "a", "late_chunking": True}, 400, "late_chunking"),
        ({"input": [{"image": "a"}]}, 400, "input"), ({"input": "a", "truncate": "middle"}, 400, "truncate"),
        ({"input": "a", "prompt_name": "x"}, 400, "prompt_name"),
        ({"input": "a", "truncate_prompt_tokens": -2}, 400, "truncate_prompt_tokens"),
        ({"input": "a", "truncate_prompt_tokens": 2}, 400, "truncate_prompt_tokens"),
        ({"input": "a", "truncation_side": "up"}, 400, "truncation_side"),
        ({"input": "a", "model": "ranks"}, 400, "model"),
    ],
)  # fmt: skip
def test_openai_errors_are_nested(client, body, status, param):
    reply = client.post("/v1/embeddings", body)
    assert reply.status == status
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_unknown_fields_and_model_names_are_accepted(served):
    client = served("texts", "ranks")
    reply = client.post("/v1/embeddings", {"input": "a", "model": "text-embedding-3-small", "user": "u", "more": {}})
    assert reply.status == 200
    assert reply.json()["model"] == "texts"
    listed = client.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["texts", "ranks"]
    assert client.get("/v1/models/ranks").json() == listed[1]
    reply = client.get("/v1/models/text-embedding-3-small")
    assert (reply.status, reply.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"a"', b'{"input": "\\ud800"}', b"\xff"])
def test_bodies_that_are_no_json_object_are_refused(client, content):
    for path in ("/v1/embeddings", "/embed", "/v1/rerank", "/"):
        assert client.post(path, content).status in (400, 422)
