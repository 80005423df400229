"""sentence-transformers on an accelerated model: the same vectors and scores, in the order of the inputs."""

import copy

import numpy as np
import pytest
import torch

import fastbert
from accelerated_sentences import FOLDER, MANY, TEXTS, assert_same, by_the_library, quietly
from fastbert.dropin import sentence
from fastbert.testing import assert_within_budget
from fastbert.text import batching

sentence_transformers = pytest.importorskip("sentence_transformers", reason="its models are accelerated")
modules = pytest.importorskip("sentence_transformers.models", reason="its models are accelerated")
pytest_plugins = ["accelerated_sentences"]  # has the fixtures
pytestmark = [pytest.mark.native, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]


# ---- the real checkpoint ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_minilm_gives_the_same_vectors_in_order(dtype):
    model = sentence_transformers.SentenceTransformer(FOLDER, device="cpu")
    truth = copy.deepcopy(model).double().encode(TEXTS, batch_size=4, convert_to_tensor=True)
    model.to(dtype)
    before = model.encode(TEXTS, batch_size=4, convert_to_tensor=True)
    assert fastbert.accelerate(model, impl="native") is model
    after = quietly(lambda: model.encode(TEXTS, batch_size=4, convert_to_tensor=True))
    assert after.dtype == before.dtype
    assert_within_budget(after, before, truth)
    for text, vector in zip(TEXTS, after, strict=True):
        alone = model.encode(text, convert_to_tensor=True)
        similarity = torch.nn.functional.cosine_similarity(alone.float(), vector.float(), dim=0)
        assert similarity > (0.999 if dtype.itemsize == 2 else 0.99999)
    fastbert.restore(model)
    assert torch.equal(model.encode(TEXTS, batch_size=4, convert_to_tensor=True), before)


# ---- every argument of encode ----------------------------------------------------------------------------


ARGUMENTS = {
    "numpy": {},
    "tensor": {"convert_to_tensor": True},
    "list of tensors": {"convert_to_numpy": False},
    "one text": {"inputs": TEXTS[0]},
    "one text as a tensor": {"inputs": TEXTS[0], "convert_to_tensor": True},
    "a list of one": {"inputs": TEXTS[:1]},
    "no texts": {"inputs": []},
    "no texts as a tensor": {"inputs": [], "convert_to_tensor": True},
    "array of texts": {"inputs": np.array(TEXTS)},
    "tuple of texts": {"inputs": tuple(TEXTS)},
    "pairs of texts": {"inputs": list(zip(TEXTS, TEXTS[::-1], strict=True))},
    "normalised": {"normalize_embeddings": True},
    "truncated": {"truncate_dim": 7, "normalize_embeddings": True},
    "tokens": {"output_value": "token_embeddings"},
    "tokens of one text": {"output_value": "token_embeddings", "inputs": TEXTS[0]},
    "int8": {"precision": "int8"},
    "ubinary": {"precision": "ubinary", "convert_to_tensor": True},
    "prompt": {"prompt": "what is said of "},
    "prompt by name": {"prompt_name": "query"},
    "batches of one": {"batch_size": 1},
    "large batches": {"batch_size": 1000},
    "progress bar": {"show_progress_bar": True},
    "device": {"device": "cpu"},
    "positional": {"args": ("query", None, 5)},
}


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_every_argument_of_encode(build, arguments):
    model = build()
    given = dict(arguments)
    inputs, args = given.pop("inputs", MANY), given.pop("args", ())
    before = by_the_library(lambda: model.encode(inputs, *args, **given))
    fastbert.accelerate(model, impl="native")
    after = quietly(lambda: model.encode(inputs, *args, **given))
    if given.get("precision") in ("int8", "ubinary"):  # rounding may differ by one step
        bits = np.unpackbits(np.asarray(after) ^ np.asarray(before)) if given["precision"] == "ubinary" else None
        assert bits is None or bits.mean() < 0.01
    if given.get("precision") != "ubinary":
        assert_same(after, before)


def test_errors_are_those_of_the_library(build):
    model = fastbert.accelerate(build(), impl="native")
    with pytest.raises(ValueError, match="not found in the configured prompts"):
        model.encode(TEXTS, prompt_name="unknown")
    with pytest.raises(ValueError, match="not supported"):
        model.encode(TEXTS, precision="int4")


def test_encode_query_and_document(build):
    if not hasattr(sentence_transformers.SentenceTransformer, "encode_query"):
        pytest.skip("this version has no encode_query")
    model = build()
    before = [model.encode_query(MANY), model.encode_document(MANY)]
    fastbert.accelerate(model, impl="native")
    assert_same(quietly(lambda: [model.encode_query(MANY), model.encode_document(MANY)]), before)


# ---- pipelines and families ------------------------------------------------------------------------------


PIPELINES = {
    **{mode: {"pooling": mode} for mode in ("mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")},
    "three modes": {"pooling": ("cls", "mean", "max")},
    "without its prompt": {"include_prompt": False},
    "cls without its prompt": {"pooling": "cls", "include_prompt": False},
}


@pytest.mark.parametrize("options", PIPELINES.values(), ids=PIPELINES)
def test_pooling(build, options):
    model = by_the_library(lambda: build(**options))
    before = model.encode(MANY, prompt_name="query")
    fastbert.accelerate(model, impl="native")
    assert_same(quietly(lambda: model.encode(MANY, prompt_name="query")), before)


def test_dense_and_normalise(build, two_threads, monkeypatch):
    monkeypatch.setitem(batching.TOKENS_PER_BATCH, "cpu", 100)
    model = build("bert", lambda: modules.Dense(32, 12), modules.Normalize)
    before = model.encode(MANY)
    fastbert.accelerate(model, impl="native")
    assert_same(quietly(lambda: model.encode(MANY)), before)


@pytest.mark.parametrize(
    "kind", ["roberta", "xlm-roberta", "camembert", "distilbert", "electra", "albert", "mpnet", "modernbert"]
)
def test_families(build, kind):
    model = build(kind)
    before = model.encode(MANY)
    fastbert.accelerate(model, impl="native")
    assert "encode" in fastbert.explain(model).replaced
    assert_same(quietly(lambda: model.encode(MANY)), before)


def test_a_users_module_is_called_by_one_thread(build, two_threads, monkeypatch):
    """It may keep state between calls, as this one does."""

    class Counts(torch.nn.Module):
        inside = most = 0

        def forward(self, features):
            self.inside += 1
            self.most = max(self.most, self.inside)
            features["sentence_embedding"] = features["sentence_embedding"] * 2
            self.inside -= 1
            return features

    monkeypatch.setitem(batching.TOKENS_PER_BATCH, "cpu", 100)
    used = []
    run = batching.run_batches
    monkeypatch.setattr(sentence, "run_batches", lambda *args: (used.append(1), run(*args)))
    model = build("bert", Counts)
    before = model.encode(MANY)
    # the module ignores padding, but fastbert cannot know that
    fastbert.accelerate(model, impl="native", padding="zero")
    assert_same(quietly(lambda: model.encode(MANY)), before)
    assert model[2].most == 1
    assert not used
    fastbert.accelerate(model, impl="native")
    with pytest.warns(UserWarning, match="a Counts may read padding, and other batches have other"):
        assert_same(model.encode(MANY), before)
