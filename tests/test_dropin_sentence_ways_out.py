"""What accelerated models of sentence-transformers leave to the library; copies, saving and training still work."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch

import fastbert
from accelerated_sentences import MANY, TEXTS, assert_same, by_the_library, quietly
from fastbert.dropin import sentence

sentence_transformers = pytest.importorskip("sentence_transformers", reason="its models are accelerated")
modules = pytest.importorskip("sentence_transformers.models", reason="its models are accelerated")
pytest_plugins = ["accelerated_sentences"]  # has the fixtures
pytestmark = [pytest.mark.native, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]


# ---- what is left to the library -------------------------------------------------------------------------


def hook(model):
    model[1].register_forward_hook(lambda *_: None)


def other_forward(model):
    pooling = model[1]
    pooling.forward = lambda features: type(pooling).forward(pooling, features)


def compiled(model):
    model._compiled_call_impl = model._call_impl


def pads_left(model):
    model.tokenizer.padding_side = "left"


WAYS_OUT = {
    "a Pooling has a hook": (hook, {}),
    "the forward of a Pooling was replaced": (other_forward, {}),
    "the model is compiled": (compiled, {}),
    "texts are padded on the left": (pads_left, {"batch_size": 100}),
    "output_value=None asks for the padded batches": (lambda model: None, {"output_value": None}),
    "not all inputs are texts": (lambda model: None, {"inputs": [{"text": text} for text in TEXTS]}),
}


@pytest.mark.parametrize("reason", WAYS_OUT)
def test_what_the_library_does_itself(build, reason):
    """A single warning names the reason, and so does explain."""
    change, given = WAYS_OUT[reason]
    given = dict(given)
    inputs = given.pop("inputs", TEXTS)
    model = build()
    change(model)
    before = by_the_library(lambda: model.encode(inputs, **given))
    fastbert.accelerate(model, impl="native")
    with pytest.warns(UserWarning, match=f"SentenceTransformer: {reason}"):
        after = model.encode(inputs, **given)
    assert_same(after, before)
    quietly(lambda: model.encode(inputs, **given))
    assert any(reason in what and "2 calls" in name for name, what in fastbert.explain(model).left.items())


def test_a_router_is_left_alone(build, folders):
    if not hasattr(modules, "Router"):
        pytest.skip("this version has no Router")

    def route():
        return [modules.Transformer(folders(), max_seq_length=64), modules.Pooling(32)]

    model = sentence_transformers.SentenceTransformer(
        modules=[modules.Router.for_query_document(route(), route())], device="cpu"
    )
    before = model.encode_query(MANY)
    fastbert.accelerate(model, impl="native")
    report = fastbert.explain(model)
    assert "its first module is a Router" in report.left["encode"]
    assert sum("unpads once" in what for what in report.replaced.values()) == 2  # its encoders run packed
    assert_same(quietly(lambda: model.encode_query(MANY)), before)


def test_a_transformer_that_is_left_alone(build):
    model = build()
    layer = model[0].auto_model.encoder.layer[0]
    layer.forward = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs)
    with pytest.warns(UserWarning, match="replaced nothing"):
        fastbert.accelerate(model, impl="native")
    assert "its transformer was left alone" in fastbert.explain(model).left["encode"]


def test_other_kinds_and_own_methods_are_left_alone(build):
    class Own(sentence_transformers.SentenceTransformer):
        def forward(self, features, **kwargs):
            return super().forward(features, **kwargs)

    model = build()
    fastbert.accelerate(own := Own(modules=list(model), device="cpu"), impl="native")
    assert "Own has a forward of its own" in fastbert.explain(own).left["encode"]
    if hasattr(sentence_transformers, "SparseEncoder"):
        sparse = sentence_transformers.SparseEncoder(modules=list(build()), device="cpu")
        fastbert.accelerate(sparse, impl="native")
        assert not any(name.startswith("encode") for name in fastbert.explain(sparse).replaced)
        sparse.encode(TEXTS)


def test_modules_added_afterwards(build):
    """Each call decides what may be regrouped, from the modules that the model has then."""
    model = fastbert.accelerate(build(), impl="native")
    fastbert.restore(model[0])
    with pytest.warns(UserWarning, match="its transformer was left alone"):
        model.encode(TEXTS)


# ---- it stays the model that it was ----------------------------------------------------------------------


def test_restore_copies_and_pickles(build):
    model = build()
    attributes, keys, before = set(model.__dict__), list(model.state_dict()), model.encode(MANY)
    fastbert.accelerate(model, impl="native")
    added = set(model.__dict__) - attributes
    assert added - {"_inference", "encode"} == {"forward", "_replicate_for_data_parallel", "__getstate__"}
    assert len(added) == 4
    assert list(model.state_dict()) == keys
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        (method,) = (value for value in other.__dict__.values() if isinstance(value, sentence.BatchedMethod))
        assert method.module is other
        assert_same(other.encode(MANY), before)
    fastbert.accelerate(model, impl="native")  # a second call changes nothing
    fastbert.restore(model)
    assert set(model.__dict__) - {"_accelerate_placement_hook"} == attributes - {"_accelerate_placement_hook"}
    np.testing.assert_array_equal(model.encode(MANY), before)


def test_saved_and_loaded(build, tmp_path):
    model = fastbert.accelerate(build(), impl="native")
    expected = model.encode(TEXTS)
    model.save(str(tmp_path))
    assert_same(sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS), expected)


@pytest.mark.parametrize("training", [False, True])
def test_the_features_of_a_batch_may_be_used_twice(build, training):
    """Losses with several passes reuse the features, in which the first pass has stored its results. Because of the
    argument `token_embeddings` the second pass ran the original's code, so its bits differed."""
    model = fastbert.accelerate(build(pooling=("cls", "mean"))).train(training)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    features = model.preprocess(TEXTS)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        first = model(features)["sentence_embedding"]
        assert "token_embeddings" in features
        second = model(features)["sentence_embedding"]
    assert torch.equal(first, second)


def test_it_evaluates_and_can_train_afterwards(build):
    """`encode` leaves a model in evaluation mode, as without fastbert; gradients still work."""
    model = fastbert.accelerate(build(), impl="native")
    model.train()
    model.encode(TEXTS)
    assert not any(module.training for module in model.modules())
    model.train()
    features = model.tokenize(TEXTS) if not hasattr(model, "preprocess") else model.preprocess(TEXTS)
    model(features)["sentence_embedding"].square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "pooler" not in name)


@pytest.mark.once
def test_a_pool_of_processes(build):
    model = build()
    before = model.encode(MANY)
    fastbert.accelerate(model, impl="native")
    pool = model.start_multi_process_pool(["cpu"])
    try:
        encode = model.encode if hasattr(model, "_inference") else model.encode_multi_process
        after = encode(MANY, pool=pool)
    finally:
        model.stop_multi_process_pool(pool)
    assert_same(after, before)
