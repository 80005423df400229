"""What all APIs share: readiness, counters, limits, the key, late and lost clients, large answers."""

import asyncio
import gc
import threading
import time
import weakref
import zlib
from concurrent.futures import CancelledError

import numpy as np
import pytest

pytest.importorskip("orjson", reason="needs the serve extra")
pytest.importorskip("prometheus_client", reason="needs the serve extra")
pytest.importorskip("starlette", reason="needs the serve extra")
import orjson

from fastbert import batch_invariant
from fastbert.service import service
from fastbert.service.app import WAYS, as_json
from fastbert.service.engine import Engine, Job
from fastbert.service.errors import ServiceError
from fastbert.service.models import Models
from fastbert.service.service import Call
from fastbert.service.settings import Settings
from service_models import TEXTS, close

pytest_plugins = ("service_fixtures",)
pytestmark = pytest.mark.once


def test_a_large_answer_is_written_in_parts():
    """The JSON is the same, and no part is long, however unequal the rows are."""
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


def test_it_is_ready_once_a_first_batch_has_run(served):
    client = served("texts")
    assert {client.get(path).status for path in ("/ready", "/health", "/ping", "/live")} == {200}
    assert client.service.metrics.counted("te_request_count") == 0
    client.service.is_stopping = True
    assert client.get("/ready").status == 503
    assert client.get("/live").status == 200
    client.service.is_stopping = False
    client.service.is_warm = False
    assert client.get("/health").json()["error_type"] == "Unhealthy"


def test_metrics_have_the_names_of_tei(served):
    client = served("texts", "ranks")
    client.post("/embed", {"inputs": ["a", "b"]})
    client.post("/embed", {})
    client.post("/rerank", {"query": "q", "texts": ["a", "b", "c"]})
    text = client.get("/metrics").content.decode()
    assert 'te_request_count{method="embed"} 2.0' in text
    assert 'te_request_success{method="embed"} 1.0' in text
    assert 'te_request_failure{err="invalid"} 1.0' in text
    assert "te_request_inference_duration_count 2.0" in text
    for name, texts in (("embed", "2.0"), ("predict", "3.0")):  # texts and pairs, not requests
        assert f"te_{name}_count {texts}" in text
        assert f"te_{name}_success {texts}" in text
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
    client.service.open = 1  # as if another request were open
    reply = client.post("/embed", {"inputs": "a"})
    of_openai = client.post("/v1/embeddings", {"input": "a"}).json()["error"]
    client.service.open = 0
    assert (reply.status, reply.headers["retry-after"]) == (429, "1")
    assert of_openai["type"] == "rate_limit_error"


def test_a_compressed_body_is_refused_by_name(served):
    """The error said that the body is no JSON because of surrogates."""
    client, body = served("texts"), b'{"inputs": "a"}'
    for coding in ("gzip", "deflate", "br", "zstd"):
        reply = client.post("/embed", zlib.compress(body), {"content-encoding": coding})
        assert reply.status == 415
        assert reply.headers["accept-encoding"] == "identity"
        assert "Content-Encoding" in reply.json()["error"]
    assert client.post("/embed", body, {"content-encoding": "identity"}).status == 200


def test_only_a_long_unread_body_closes_the_connection(served):
    """The client then stops sending. A client that has sent everything keeps its connection."""
    client = served("texts", payload_limit=100_000, api_key="right")
    for key, length, is_closed in (
        ("right", {"content-length": "100001"}, True), ("wrong", {"content-length": "65537"}, True),
        ("wrong", {"content-length": "65536"}, False), ("wrong", {}, False),
        ("wrong", {"transfer-encoding": "chunked"}, True), ("right", {"transfer-encoding": "chunked"}, False),
        ("wrong", {"content-length": "many"}, True), ("right", {"content-length": "70000"}, False),
    ):  # fmt: skip
        reply = client.post("/embed", {"inputs": 7}, {"authorization": f"Bearer {key}", **length})
        assert reply.status in (401, 413, 422)
        assert (reply.headers.get("connection") == "close") is is_closed, (key, length)
    assert client.ask("GET", "/info", headers={"content-length": "70000"}).headers.get("connection") is None


def test_a_body_that_turns_out_too_long_closes_the_connection():
    """Its rest is not read."""

    async def receive():
        return {"type": "http.request", "body": b"x" * 60, "more_body": True}

    call = Call("embed", {"headers": [(b"transfer-encoding", b"chunked")]}, receive)
    with pytest.raises(ServiceError, match="larger than 100 bytes"):
        asyncio.run(call.read(100))
    assert call.has_long_rest


def test_the_key(served):
    client = served("texts", api_key="right")
    for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": "right"}, {"authorization": "Bearer rightx"},
                  {"authorization": "Bearer righ"}, {"authorization": "Digest right"}):  # fmt: skip
        reply = client.post("/v1/embeddings", {"input": "a"}, given)
        assert reply.status == 401
        assert reply.headers["www-authenticate"] == "Bearer"
        assert reply.json()["error"]["type"] == "authentication_error"
    assert client.post("/v1/embeddings", {"input": "a"}, {"authorization": "Bearer right"}).status == 200
    assert client.get("/ready").status in (200, 503)
    for way in WAYS:
        for path in way.paths:
            assert client.ask(way.method, path.replace("{name:path}", "texts")).status == 401, path


def test_a_body_that_does_not_arrive_times_out(served):
    client = served("texts")
    reply = client.start("POST", "/embed", b'{"inp', {"x-timeout-seconds": "0.05"}, more=True).result(30)
    assert reply.status == 504
    assert "body" in reply.json()["error"]
    assert client.service.open == 0


def test_a_body_has_a_little_time_when_the_server_stops(served, monkeypatch):
    """Also one that begins to arrive after that; one that arrives in time is accepted."""
    monkeypatch.setattr(service, "GRACE", 0.05)
    client = served("texts")
    try:
        first = client.start("POST", "/embed", b'{"inp', more=True)
        while not client.service._reading:
            time.sleep(0.001)
        client.service.begin_to_stop()
        second = client.start("POST", "/embed", b'{"inp', more=True)
        third = client.start("POST", "/embed", {"inputs": "a"})
        for reply in (first.result(30), second.result(30)):
            assert (reply.status, reply.headers["connection"], reply.headers["retry-after"]) == (503, "close", "1")
            assert reply.json()["error_type"] == "Unhealthy"
        assert third.result(30).status == 200
        assert client.service._reading == {}
        assert client.service.open == 0
    finally:
        client.service.is_stopping = False


def test_a_request_that_is_cancelled_while_its_body_is_read_ends(served):
    """uvicorn does that when it is told to end at once. It is not taken for a body that is late."""
    client = served("texts")
    given = client.start("POST", "/embed", b'{"inp', more=True)
    while not client.service._reading:
        time.sleep(0.001)
    given.cancel()
    with pytest.raises(CancelledError):
        given.result(30)
    until = time.monotonic() + 30
    while client.service.open and time.monotonic() < until:
        time.sleep(0.001)
    assert (client.service.open, client.service._reading) == (0, {})


def test_functions_of_the_api_are_called_without_starlette(served, monkeypatch):
    """All but those whose address has a name in it; and none where a page of another origin may ask."""
    client = served("texts")

    async def never(*given):
        raise AssertionError("starlette was called")

    monkeypatch.setattr(client.application, "rest", never)
    assert client.post("/embed", {"inputs": "a"}).status == 200
    assert client.get("/info").status == 200
    named = {(way.method, path) for way in WAYS for path in way.paths}
    assert set(client.application.endpoints) == {address for address in named if "{" not in address[1]}
    assert served("texts", cors_allow_origin=("http://page.test",)).application.endpoints == {}


def test_a_late_request_gets_an_error_and_leaves_the_queue(served):
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
        while queue.tokens:  # a request that is being tokenised leaves after that
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
    assert 'te_request_failure{err="gone"} 1.0' in client.get("/metrics").content.decode()
    for wrong in ("soon", "0", "-1", "nan", "inf"):
        assert client.post("/embed", {"inputs": "a"}, {"x-timeout-seconds": wrong}).status == 422


@pytest.mark.parametrize("case", ["the server's limit", "a header above it", "the body came late"])
def test_a_request_has_no_more_time_than_the_server_gives(served, monkeypatch, case):
    """The time counts from the beginning of the request, and a header can only shorten it."""
    client = served("texts", timeout=1000.0 if case == "the body came late" else 0.05)
    lane, go = client.service.models.served[0].abilities["vectors"]._plain, threading.Event()
    read = client.service.read

    async def reads_late(call):
        await read(call)
        call.began -= 1000.0

    if case == "the body came late":
        monkeypatch.setattr(client.service, "read", reads_late)
    monkeypatch.setattr(lane, "compute", lambda data: go.wait(60))
    try:
        given = {"x-timeout-seconds": "1000"} if case == "a header above it" else {}
        reply = client.start("POST", "/v1/embeddings", {"input": "a"}, given).result(30)
    finally:
        go.set()
    assert reply.status == 504
    assert reply.json()["error"]["type"] == "server_error"


def test_an_answered_request_leaves_no_timer(served, monkeypatch):
    """A timer would keep the texts and vectors of its request in memory for two minutes."""
    client, timers = served("texts"), []
    call_later = client.loop.call_later

    def kept(*given, **options):
        timers.append(call_later(*given, **options))
        return timers[-1]

    monkeypatch.setattr(client.loop, "call_later", kept)
    assert client.post("/embed", {"inputs": "a"}).status == 200
    assert len(timers) > 0
    assert all(timer.cancelled() for timer in timers if timer.when() > client.loop.time())


def test_batch_invariance_gives_the_same_bits_alone_and_together(served):
    client = served("texts")
    with batch_invariant():
        together = client.post("/embed", {"inputs": TEXTS}).json()
        assert [client.post("/embed", {"inputs": text}).json()[0] for text in TEXTS] == together


def test_cors_is_off_by_default(served):
    origin = {"origin": "http://page.test"}
    assert "access-control-allow-origin" not in served("texts").post("/embed", {"inputs": "a"}, origin).headers
    client = served("texts", cors_allow_origin=("http://page.test",))
    reply = client.post("/embed", {"inputs": "a"}, origin)
    assert reply.headers["access-control-allow-origin"] == "http://page.test"


def test_servers_of_the_same_models_answer_their_own_requests(served, monkeypatch):
    """If two servers shared a queue, the threads of one that has just answered would take the other's requests, and
    answer on an event loop that nothing wakes: one recorded request in thousands got no answer."""
    answer, prepare = Engine._answer, Engine._prepare

    def answers_late(self, over):  # the thread looks for a batch while the next request waits at the other server
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


def test_a_prompt_for_requests_that_name_none(served):
    wanted = served("texts").post("/embed", {"inputs": "a b", "prompt_name": "query"}).json()
    other = served("texts").post("/embed", {"inputs": "a b", "prompt_name": "document"}).json()
    for setting in ({"default_prompt": "q q "}, {"default_prompt_name": "query"}):
        client = served("texts", **setting)
        assert close(client.post("/embed", {"inputs": "a b"}).json(), wanted)
        assert close([client.post("/v1/embeddings", {"input": "a b"}).json()["data"][0]["embedding"]], wanted)
        assert close(client.post("/embed", {"inputs": "a b", "prompt_name": "document"}).json(), other)


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
    assert Settings.read({}, {"POOLING": "last-token"}).pooling == "lasttoken"
    assert Settings.read({}, {"API_KEY_FILE": str(tmp_path / "key")}).api_key == "of the file"
    assert Settings.read({}, {}).api_key is None
    (tmp_path / "key").write_text("\n")
    with pytest.raises(ValueError, match="key has no key in it"):
        Settings.read({}, {"API_KEY_FILE": str(tmp_path / "key"), "API_KEY": "of the environment"})
    assert Settings.read({}, {"DEFAULT_PROMPT": "query: "}).default_prompt == "query: "
    with pytest.raises(ValueError, match="default_prompt or default_prompt_name, not both"):
        Settings.read({"default_prompt": "q "}, {"DEFAULT_PROMPT_NAME": "query"})
    with pytest.raises(ValueError, match="PORT"):
        Settings.read({}, {"PORT": "x"})
    with pytest.raises(ValueError, match="port must be from 1 to 65535, got 65536"):
        Settings.read({"port": 65_536}, {})
    with pytest.raises(ValueError, match="prometheus_port must differ from port, which is 8080"):
        Settings.read({"prometheus_port": 8080}, {})


def test_errors_have_the_form_of_the_address(served):
    """Also where nothing is at an address, and where its method is another one."""
    client = served("ranks")
    for method, path, body, status, form in (
        ("POST", "/v1/nowhere", {}, 404, "openai"), ("POST", "/nowhere", {}, 404, "tei"),
        ("GET", "/v1/embeddings", {}, 405, "openai"), ("GET", "/embed", {}, 405, "tei"),
        ("POST", "/rerank", {"query": 7, "documents": ["a"]}, 400, "cohere"),
        ("POST", "/rerank", {"query": 7, "texts": ["a"]}, 422, "tei"),
        ("POST", "/v1/rerank", {"query": "a", "documents": [7]}, 400, "cohere"),
        ("POST", "/v2/embed", {"texts": ["a"]}, 400, "cohere"), ("POST", "/embed", {"inputs": "a"}, 424, "tei"),
    ):  # fmt: skip
        reply = client.ask(method, path, body)
        error = reply.json()
        assert reply.status == status, path
        assert reply.headers.get("allow") == ("POST" if status == 405 else None)
        if form == "openai":
            assert set(error["error"]) == {"message", "type", "param", "code"}
            assert error["detail"] == error["error"]["message"]
        elif form == "tei":
            assert set(error) == {"error", "error_type"}
            assert isinstance(error["error"], str)
        else:
            assert set(error) == {"message", "detail"}
            assert error["message"] == error["detail"]
    reply = client.post("/predict", {"inputs": "a\ud800"}, {})
    assert (reply.status, reply.json()["error_type"]) == (400, "Validation")


def test_other_slashes_in_an_address(served):
    """Clients join "http://host/" and "/embed"."""
    client = served("texts", "ranks")
    wanted = client.post("/embed", {"inputs": "a"}).json()
    for path in ("//embed", "/embed/", "///embed//"):
        assert client.post(path, {"inputs": "a"}).json() == wanted
    assert client.post("//", {"inputs": "a"}).json() == wanted
    assert client.post("/v1//embeddings/", {"input": "a"}).status == 200
    assert client.post("//models/ranks", {"query": "a", "texts": ["b"]}).status == 200
    for path in ("//info", "/v1/models/", "//health", "/metrics/"):
        assert client.get(path).status == 200, path
    reply = client.post("//nowhere//", {})
    assert (reply.status, reply.json()["error_type"]) == (404, "Validation")
    assert client.get("//embed").status == 405
    assert served("texts", api_key="right").post("//embed", {"inputs": "a"}).status == 401


def test_all_functions_have_an_address_behind_v1(served):
    """For clients whose base URL ends with /v1. Only /v1/embed is something else, of Cohere's API."""
    client = served("texts", "feelings", "names", "answers", "masks")
    for path, body in (
        ("/embed_all", {"inputs": "a b"}), ("/predict", {"inputs": "a b"}), ("/decode", {"ids": [5, 6]}),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b"]}}), ("/tokenize", {"inputs": "a b"}),
        ("/token_classify", {"inputs": "a b"}), ("/fill_mask", {"inputs": "a [MASK]"}),
        ("/question_answer", {"inputs": {"question": "a", "context": "b"}}),
    ):  # fmt: skip
        found, wanted = client.post(f"/v1{path}", body), client.post(path, body)
        assert (found.status, found.json()) == (200, wanted.json()), path
        wrong = client.post(f"/v1{path}", {}), client.post(path, {})
        assert [(reply.status, reply.json()) for reply in wrong] == [(422, wrong[0].json())] * 2, path
    for path in ("/info", "/health", "/live", "/ready"):
        found = client.get(f"/v1{path}")
        assert (found.status, found.json()) == (200, client.get(path).json()), path
    paths = client.get("/openapi.json").json()["paths"]
    assert paths["/v1/fill_mask"] == paths["/fill_mask"]


def test_an_answered_request_does_not_stay_in_memory(served, monkeypatch):
    """Jobs referred to themselves, so that texts of megabytes stayed until Python collected garbage, a minute later."""
    client, made, create = served("texts", "masks"), [], Job.__init__

    def recording(self, *given):
        create(self, *given)
        made.append(weakref.ref(self))

    monkeypatch.setattr(Job, "__init__", recording)
    gc.collect()
    gc.disable()
    try:
        for path, body, status in (
            ("/embed", {"inputs": ["a", "b"]}, 200), ("/fill_mask", {"inputs": "a [MASK]"}, 200),
            ("/fill_mask", {"inputs": "a"}, 422), ("/embed", {"inputs": "a " * 99, "truncate": False}, 413),
        ):  # fmt: skip
            assert client.post(path, body).status == status
            began = time.monotonic()
            while made[-1]() is not None:
                assert time.monotonic() < began + 30, path
                time.sleep(0.001)
        assert len(made) == 4
    finally:
        gc.enable()


def test_metrics_of_texts(served):
    """Only the first text of a request was counted among the lengths, and times were those of requests alone."""
    client = served("texts", "ranks")

    def found():
        lines = client.get("/metrics").content.decode().splitlines()
        return {name: float(number) for name, _, number in (line.rpartition(" ") for line in lines if line[0] != "#")}

    client.post("/embed", {"inputs": ["a", "a b", "c"]})
    client.post("/rerank", {"query": "a", "texts": ["b", "c"]})
    client.post("/embed", {"inputs": "a"})
    after = found()
    for name in ("duration", "tokenization_duration", "queue_duration", "inference_duration"):
        for of, count in (("request", 3), ("embed", 4), ("predict", 2)):
            assert after[f"te_{of}_{name}_count"] == after[f'te_{of}_{name}_bucket{{le="+Inf"}}'] == count
            assert after[f"te_{of}_{name}_sum"] > 0
    assert after["te_embed_duration_sum"] > after["te_embed_inference_duration_sum"]
    assert after["te_request_input_length_count"] == 6
    assert after["te_request_input_length_sum"] == 3 + 4 + 3 + 5 + 5 + 3
    assert after['te_request_input_length_bucket{le="8.0"}'] == 6
    assert after["te_batch_next_tokens_sum"] >= 23


def test_texts_are_not_logged(served, caplog):
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
    assert "test_service_server.py" in failure.trace
    assert "secretword" not in caplog.text
