"""What a server answers, and how: every face, against what the models themselves give."""

import asyncio
import base64
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("orjson", reason="needs the serve extra")
pytest.importorskip("prometheus_client", reason="needs the serve extra")
pytest.importorskip("starlette", reason="needs the serve extra")
import orjson

from fastbert import Encoder, Tokenizer, batch_invariant
from fastbert.encoding.masks import MaskFiller
from fastbert.models import heads
from fastbert.service.app import application, as_json
from fastbert.service.engine import Engine
from fastbert.service.models import Models, load
from fastbert.service.service import Service
from fastbert.service.settings import Settings

sys.path.append(str(Path(__file__).parent))
from service_models import CLASSES, LABELS, Client, make_folder

pytestmark = pytest.mark.once

PLAIN = {"dtype": "float32", "device": "cpu", "impl": "native"}
TEXTS = ["a b c", "", "d e f g h", "ab", "the quick [MASK]", "x " * 200]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: make_folder(tmp_path_factory.mktemp(kind), kind) for kind in CLASSES}


@pytest.fixture(scope="module")
def served(folders):
    """serve(*kinds, **settings): a client of a server of these models, the first of which is the server's own."""
    clients, loaded = [], {}

    def serve(*kinds, **changes):
        settings = Settings(**PLAIN | changes)
        own = {k: v for k, v in changes.items() if k in ("max_text_tokens", "max_queue_tokens", "max_batch_tokens")}
        models = []
        for kind in kinds:
            key = (kind, tuple(sorted(own.items())), "default_prompt_name" in changes)
            if key not in loaded:
                loaded[key] = load(kind, folders[kind], settings)
            models.append(loaded[key])
        service = Service(settings, Models(models))
        clients.append(Client(application(service)))
        clients[-1].service = service
        while not (service.is_warm or service.failure):
            time.sleep(0.001)
        return clients[-1]

    yield serve
    for client in clients:
        client.close()


@pytest.fixture(scope="module")
def client(served):
    return served(*CLASSES)


@pytest.fixture(scope="module")
def encoder(folders):
    return Encoder.from_pretrained(folders["texts"], **PLAIN)


def close(found, wanted, tolerance=1e-5):
    return np.abs(np.asarray(found, np.float32) - np.asarray(wanted, np.float32)).max() < tolerance


# ---- OpenAI ------------------------------------------------------------------------------------------------


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


def test_usage_counts_what_is_left_and_a_header_says_what_was_cut(client, encoder):
    reply = client.post("/v1/embeddings", {"input": TEXTS})
    kept = sum(map(len, encoder.tokenise(TEXTS)))
    assert reply.json()["usage"] == {"prompt_tokens": kept, "total_tokens": kept}
    assert reply.headers["x-truncated-texts"] == "1"
    exact = client.post("/v1/embeddings", {"input": "a " * 62})  # 64 tokens, as many as the model takes
    assert exact.headers["x-truncated-texts"] == "0"
    assert exact.json()["usage"]["prompt_tokens"] == 64
    longer = client.post("/v1/embeddings", {"input": "a " * 63})
    assert longer.headers["x-truncated-texts"] == "1"
    assert longer.json()["usage"]["prompt_tokens"] == 64
    assert client.post("/v1/embeddings", {"input": "a " * 63, "truncate": False}).status == 413


def test_dimensions_keep_the_length_of_one(client, encoder):
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


def test_ids_of_the_vocabulary_are_taken_and_those_of_others_refused(client, encoder):
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


def test_ids_are_cut_and_prompted_as_texts_are(client, encoder):
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


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "input"), ({"input": []}, 400, "input"), ({"input": [1.5]}, 400, "input"),
        ({"input": ["a", 1]}, 400, "input"), ({"input": {}}, 400, "input"), ({"input": [[]]}, 400, "input"),
        ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format"),
        ({"input": "a", "encoding_format": 7}, 400, "encoding_format"), ({"input": "a", "model": 7}, 400, "model"),
        ({"input": "a", "modality": "image"}, 400, "modality"),
        ({"input": "a", "prompt_name": "x"}, 400, "prompt_name"),
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


def test_unknown_fields_and_names_of_models_are_taken(served):
    client = served("texts", "ranks")
    reply = client.post("/v1/embeddings", {"input": "a", "model": "text-embedding-3-small", "user": "u", "more": {}})
    assert reply.status == 200
    assert reply.json()["model"] == "texts"
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["texts", "ranks"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"a"', b'{"input": "\\ud800"}', b"\xff"])
def test_what_is_no_json_object_is_refused(client, content):
    for path in ("/v1/embeddings", "/embed", "/v1/rerank", "/"):
        assert client.post(path, content).status in (400, 422)


# ---- text-embeddings-inference -----------------------------------------------------------------------------


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


def test_embed_all_gives_every_token(client, encoder):
    found = client.post("/embed_all", {"inputs": ["a b", "c"]}).json()
    wanted = encoder.encode_tokens(["a b", "c"], special_tokens=True)
    assert [len(rows) for rows in found] == [4, 3]
    assert all(close(rows, parts.vectors) for rows, parts in zip(found, wanted, strict=True))


def logits_of(folder, kind, texts, pairs=None):
    model = getattr(heads, CLASSES[kind].__name__).from_pretrained(folder, dtype=torch.float32, impl="native")
    rows = []
    for i, text in enumerate(texts):
        encoded = Tokenizer.from_pretrained(folder)([text], None if pairs is None else [pairs[i]], max_length=64)
        ids, types = torch.tensor(encoded.input_ids), torch.tensor(encoded.token_type_ids)
        with torch.no_grad():
            rows.append(model(ids, token_type_ids=types).logits[0].double())
    return torch.stack(rows)


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


def test_rerank_has_the_form_of_who_asks(client, folders):
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
        assert found["usage"]["total_tokens"] == 17  # three pairs with 3 special tokens and a query each
    assert client.post("/v2/rerank", {"query": "q", "documents": []}).json()["results"] == []


def test_documents_are_cut_to_the_tokens_asked_for(client):
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


def test_answers_have_a_bound(client, monkeypatch):
    """One request could ask for more than the memory holds."""
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


# ---- Cohere's vectors --------------------------------------------------------------------------------------


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
    assert client.post("/v2/embed", {"texts": ["a"], "embedding_types": ["float64"]}).json()["message"]
    assert client.post("/v2/embed", {"texts": ["a"], "embedding_types": [[]]}).status == 400


# ---- our own, and the hub's --------------------------------------------------------------------------------


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


def test_vectors_and_filled_words_share_a_trunk(client):
    model = client.service.models.by_name["masks"]
    trunk, filler = model.abilities["vectors"].encoder.model, model.abilities["masks"].filler.model
    assert filler.bert is trunk
    assert filler.cls["predictions"].decoder.weight is trunk.embeddings.word_embeddings.weight


def test_a_models_address_may_have_slashes(folders):
    """As ids of the hub have them."""
    settings = Settings(**PLAIN)
    client = Client(application(Service(settings, Models([load("someones/texts", folders["texts"], settings)]))))
    try:
        assert np.shape(client.post("/models/someones/texts", {"inputs": "a"}).json()) == (1, 32)
        assert client.post("/models/texts", {"inputs": "a"}).status == 404
    finally:
        client.close()


def test_a_models_address_answers_what_the_model_can(client):
    for path, name in (("/", None), ("/v1", None), ("/models/texts", "texts")):
        assert np.shape(client.post(path, {"inputs": "a"}).json()) == (1, 32), name
    assert len(client.post("/models/feelings", {"inputs": "a", "parameters": {"top_k": 2}}).json()[0]) == 2
    assert len(client.post("/models/feelings", {"inputs": "a", "parameters": {"candidate_labels": ["x", "y"]}}
                           ).json()) == 2  # fmt: skip
    assert client.post("/models/masks", {"inputs": "[MASK]", "parameters": {}}).json()[0]["token_str"]
    assert np.shape(client.post("/models/masks", {"inputs": "a"}).json()) == (1, 32)
    assert client.post("/models/answers", {"inputs": {"question": "a", "context": "b"}}).json()["answer"]
    assert client.post("/models/other", {"inputs": "a"}).status == 404


def test_a_large_answer_is_made_in_parts():
    """The same JSON as at once; none of the parts is long, however unequal the rows are."""
    numbers = np.random.default_rng(0).standard_normal((3000, 32)).astype(np.float32)
    tokens = [numbers[:1]] * 200 + [numbers, numbers[:5], numbers[:0]] + [numbers[:2]] * 300
    for answer in (
        numbers, numbers[:, :2], numbers[:7, ::3], tokens, [numbers], [[]], {"a": {}, "b": []}, [1.5] * 100_000,
        {"data": [{"index": i, "embedding": row} for i, row in enumerate(numbers)], "usage": {"tokens": 3}},
        {"embeddings": {"float": numbers, "int8": numbers.astype(np.int8)}, "texts": ["a, b]"] * 3000},
    ):  # fmt: skip
        parts = asyncio.run(as_json(answer))
        whole = np.ascontiguousarray(answer) if isinstance(answer, np.ndarray) else answer
        assert b"".join(parts) == orjson.dumps(whole, option=orjson.OPT_SERIALIZE_NUMPY)
        assert max(map(len, parts)) < 2**19


# ---- the server --------------------------------------------------------------------------------------------


def test_it_is_ready_once_a_first_batch_has_run(served):
    client = served("texts")
    assert client.get("/ready").status == client.get("/health").status == client.get("/live").status == 200
    assert client.service.metrics.counted("te_request_count") == 0
    client.service.is_stopping = True
    assert client.get("/ready").status == 503
    assert client.get("/live").status == 200
    client.service.is_stopping = False
    client.service.is_warm = False
    assert client.get("/health").json()["error_type"] == "Unhealthy"


def test_metrics_have_the_names_of_tei(served):
    client = served("texts")
    client.post("/embed", {"inputs": ["a", "b"]})
    client.post("/embed", {})
    text = client.get("/metrics").content.decode()
    assert 'te_request_count{method="embed"} 2.0' in text
    assert 'te_request_success{method="embed"} 1.0' in text
    assert 'te_request_failure{err="invalid"} 1.0' in text
    assert "te_request_inference_duration_count 1.0" in text
    assert "te_queue_size 0.0" in text
    assert "te_batch_next_tokens_bucket" in text


def test_limits(served):
    client = served(
        "texts", max_client_batch_size=3, payload_limit=400, max_text_tokens=5, max_queue_tokens=12,
        max_concurrent_requests=1, auto_truncate=False,
    )  # fmt: skip
    assert client.post("/embed", {"inputs": ["a"] * 3}).status == 200
    assert client.post("/embed", {"inputs": ["a"] * 4}).status == 413
    assert client.post("/v1/embeddings", {"input": ["a"] * 4}).json()["error"]["code"] == "too_large"
    assert client.post("/embed", {"inputs": "a" * 400}).status == 413
    assert client.post("/embed", {"inputs": "a"}, {"content-length": "401"}).status == 413
    assert client.post("/embed", {"inputs": "a b c d"}).status == 413
    reply = client.post("/embed", {"inputs": "a b c d", "truncate": True})
    assert reply.headers["x-compute-tokens"] == "5"
    assert "--max-queue-tokens" in client.post("/embed", {"inputs": ["a b c"] * 3}).json()["error"]
    client.service.open = 1  # as while another request is on its way
    reply = client.post("/embed", {"inputs": "a"})
    client.service.open = 0
    assert (reply.status, reply.headers["retry-after"]) == (429, "1")


def test_the_key(served):
    client = served("texts", api_key="right")
    for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": "right"}, {"authorization": "Bearer rightx"},
                  {"authorization": "Bearer righ"}):  # fmt: skip
        reply = client.post("/v1/embeddings", {"input": "a"}, given)
        assert reply.status == 401
        assert reply.json()["error"]["type"] == "authentication_error"
    assert client.post("/v1/embeddings", {"input": "a"}, {"authorization": "Bearer right"}).status == 200
    assert client.get("/ready").status in (200, 503)
    assert client.get("/info").status == 401


def test_a_body_that_does_not_come_is_not_waited_for(served):
    client = served("texts")
    reply = client.start("POST", "/embed", b'{"inp', {"x-timeout-seconds": "0.05"}, more=True).result(30)
    assert reply.status == 504
    assert "body" in reply.json()["error"]
    assert client.service.open == 0


def test_a_request_that_is_late_is_told_so_and_leaves_the_queue(served):
    client = served("texts")
    lane = client.service.models.served[0].abilities["vectors"]._plain
    engine, queue = client.service.engine, client.service.queues["texts"]
    compute = lane.compute
    began, go = threading.Event(), threading.Event()

    def held(data):
        began.set()
        assert go.wait(30)
        return compute(data)

    lane.compute = held
    try:
        first = client.start("POST", "/embed", {"inputs": "a"})
        assert began.wait(30)
        reply = client.post("/embed", {"inputs": "a b"}, {"x-timeout-seconds": "0.05"})
        assert reply.status == 504
        until = time.monotonic() + 60
        while queue.tokens:  # what is being tokenised leaves when that is done
            assert time.monotonic() < until
        event = asyncio.Event()
        second = client.start("POST", "/embed", {"inputs": "a b"}, gone=event)
        while queue.waiting != 4:
            pass
        client.loop.call_soon_threadsafe(event.set)
        assert second.result(30) is None
        assert queue.tokens == 0
    finally:
        go.set()
        del lane.compute
    assert first.result(30).status == 200
    assert engine.is_alive
    assert client.post("/embed", {"inputs": "a"}, {"x-timeout-seconds": "soon"}).status == 422


def test_batch_invariance_gives_the_same_bits_alone_and_together(served):
    client = served("texts")
    with batch_invariant():
        together = client.post("/embed", {"inputs": TEXTS}).json()
        assert [client.post("/embed", {"inputs": text}).json()[0] for text in TEXTS] == together


def test_cors_is_off_unless_asked_for(served):
    origin = {"origin": "http://page.test"}
    assert "access-control-allow-origin" not in served("texts").post("/embed", {"inputs": "a"}, origin).headers
    client = served("texts", cors_allow_origin=("http://page.test",))
    reply = client.post("/embed", {"inputs": "a"}, origin)
    assert reply.headers["access-control-allow-origin"] == "http://page.test"


def test_servers_of_the_same_models_answer_their_own_requests(served, monkeypatch):
    """The threads of one that has just answered would take what waits for another one, if they shared a queue; and
    would answer it on an event loop that nothing wakes: one recorded request in thousands was never answered."""
    answer, prepare = Engine._answer, Engine._prepare

    def answers_late(self, over):  # the thread looks for a batch when the next request waits at the other server
        answer(self, over)
        time.sleep(0.02)

    def prepares_and_rests(self, job):
        prepare(self, job)
        time.sleep(0.05)

    monkeypatch.setattr(Engine, "_answer", answers_late)
    monkeypatch.setattr(Engine, "_prepare", prepares_and_rests)
    clients = served("texts"), served("texts")
    assert clients[0].service.models.served == clients[1].service.models.served
    for client in clients * 3:
        assert client.start("POST", "/embed", {"inputs": "a b"}).result(30).status == 200


def test_names_of_models(served):
    client = served("masks", "texts")
    assert client.post("/embed", {"inputs": "a"}).status == 200
    assert client.post("/embed", {"inputs": "a", "model": "texts"}).status == 200
    reply = client.post("/v1/embeddings", {"input": "a", "model": "gpt"})
    assert reply.status == 404
    assert reply.json()["error"]["code"] == "model_not_found"
    with pytest.raises(ValueError, match="same name"):
        Models([client.service.models.served[0]] * 2)


def test_settings_from_flags_and_the_environment(tmp_path):
    (tmp_path / "key").write_text("of the file\n")
    environment = {"PORT": "9", "AUTO_TRUNCATE": "false", "API_KEY": "of the environment", "MAX_BATCH_TOKENS": "77"}
    settings = Settings.read({"port": 8, "host": None}, environment)
    assert (settings.port, settings.host, settings.auto_truncate) == (8, "127.0.0.1", False)
    assert (settings.api_key, settings.max_batch_tokens) == ("of the environment", 77)
    assert Settings.read({"api_key_file": str(tmp_path / "key")}, environment).api_key == "of the file"
    assert Settings.read({}, {}).api_key is None
    with pytest.raises(ValueError, match="PORT"):
        Settings.read({}, {"PORT": "x"})
    with pytest.raises(ValueError, match="port must be from 1 to 65535, got 65536"):
        Settings.read({"port": 65_536}, {})


def test_nothing_of_a_text_is_logged(served, caplog):
    client = served("texts")
    with caplog.at_level("DEBUG"):
        client.post("/embed", {"inputs": "secretword " * 200, "prompt_name": "secretword"})
        client.post("/embed", {"inputs": "secretword"})
        lane = client.service.models.served[0].abilities["vectors"]._plain
        lane.compute = lambda data: int("secretword")
        try:
            reply = client.post("/embed", {"inputs": "a"})
        finally:
            del lane.compute
    assert reply.status == 500
    assert "secretword" not in reply.content.decode()
    failure = next(record for record in caplog.records if record.levelname == "ERROR")
    assert "test_service_faces.py" in failure.trace
    assert "secretword" not in caplog.text
