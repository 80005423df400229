"""Any JSON gets an answer or an error with a message, never an internal error, never a traceback."""

import json

import pytest

pytest.importorskip("orjson", reason="needs the serve extra")
pytest.importorskip("prometheus_client", reason="needs the serve extra")
pytest.importorskip("starlette", reason="needs the serve extra")
pytest.importorskip("hypothesis", reason="needs the test extra")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastbert.service.app import application
from fastbert.service.models import Models, load
from fastbert.service.openapi import BODIES
from fastbert.service.service import Service
from fastbert.service.settings import Settings
from service_models import CLASSES, Client, make_folder

pytestmark = pytest.mark.once

STATUSES = {200, 400, 404, 413, 422, 424, 429}
NAMES = st.sampled_from([*CLASSES, "gpt", ""])
LETTERS = "ab [MASK]\x00\n\t\u00e9\u6f22\U0001f600\u200b\u0301\ufffd"
TEXT = st.sampled_from(["", "a b", "[MASK]", "[MASK] a [MASK]", "a" * 300]) | st.text(LETTERS, max_size=20)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def strategy(schema):
    """JSON that a schema of the API description allows. Only the keywords that the description uses are supported."""
    if "anyOf" in schema:
        return st.one_of(*map(strategy, schema["anyOf"]))
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kinds = schema.get("type", [])
    kinds = kinds if isinstance(kinds, list) else [kinds]
    return st.one_of(*(_OF_KIND[kind](schema) for kind in kinds)) if kinds else ANYTHING


def _object(schema):
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not properties:
        return st.dictionaries(
            st.sampled_from(["top_k", "targets", "question", "context", "source_sentence", "sentences",
                             "candidate_labels", "aggregation_strategy", "max_answer_len", "function_to_apply"]),
            ANYTHING, max_size=3,
        )  # fmt: skip
    return st.fixed_dictionaries(
        {name: strategy(properties[name]) for name in required},
        optional={n: NAMES if n == "model" else strategy(s) for n, s in properties.items() if n not in required},
    )


_OF_KIND = {
    "string": lambda schema: TEXT,
    "boolean": lambda schema: st.booleans(),
    "null": lambda schema: st.none(),
    "integer": lambda schema: st.integers(schema.get("minimum", -9), 40) | st.integers(0, 2**66),
    "array": lambda schema: st.lists(
        strategy(schema.get("items", {})), min_size=schema.get("minItems", 0), max_size=schema.get("maxItems", 4)
    ),
    "object": _object,
}


def bodies(path):
    """Bodies that the description allows; the same with one field of another kind; anything."""
    properties, required = BODIES[path]
    right = _object({"properties": properties, "required": list(required)})
    wrong = st.builds(lambda body, name, value: {**body, name: value}, right, st.sampled_from([*properties]), ANYTHING)
    return st.one_of(right, right, wrong, ANYTHING)


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    options = Settings(dtype="float32", device="cpu", impl="native", max_queue_tokens=3000)
    loaded = [load(kind, make_folder(tmp_path_factory.mktemp(kind), kind), options) for kind in CLASSES]
    client = Client(application(Service(options, Models(loaded))))
    yield client
    client.close()


def check(reply, path, body):
    told = f"{path} {json.dumps(body)[:500]}: {reply.status} {reply.content[:300]}"
    assert reply.status in STATUSES, told
    answer = reply.json()
    assert "Traceback" not in reply.content.decode(), told
    if reply.status != 200:
        is_nested = path in ("/v1/embeddings", "/v1/score")
        said = answer["error"]["message"] if is_nested else answer.get("error", answer.get("message"))
        assert isinstance(said, str), told
        assert said, told


@pytest.mark.parametrize("path", [*BODIES, "/models/feelings", "/models/names", "/models/answers", "/models/masks"])
def test_any_body(client, path):
    @settings(max_examples=40, deadline=None, database=None, derandomize=True, suppress_health_check=[*HealthCheck])
    @given(bodies("/" if path.startswith("/models") else path))
    def ask(body):
        check(client.post(path, body), path, body)

    ask()
    assert client.application.service.engine.is_alive
    assert client.application.service.engine.tokens_waiting() == 0


def test_the_description_is_complete(client):
    """It describes every address, and every request that our own page and clients make."""
    found = client.get("/openapi.json").json()
    assert found["openapi"].startswith("3.1")
    routes = {route.path.replace(":path", "") for route in client.application.rest.routes if "POST" in route.methods}
    assert routes == set(found["paths"])
    for path in found["paths"].values():
        assert path["post"]["summary"]
        assert path["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
