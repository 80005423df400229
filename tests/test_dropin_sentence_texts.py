"""Which tokens accelerated models of sentence-transformers compute: batches, long texts, scores of pairs."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import fastbert
from accelerated_sentences import (
    FOLDER,
    MANY,
    TEXTS,
    assert_same,
    by_the_library,
    quietly,
    sentence_transformers,
    tiny,
    transformers,
)
from cut_tokenizers import BACKENDS
from fastbert.dropin import sentence
from fastbert.text import batching

pytest_plugins = ["accelerated_sentences"]  # has the fixtures
pytestmark = [pytest.mark.native, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]


# ---- what runs -------------------------------------------------------------------------------------------


def test_batches_are_sorted_and_bounded_by_tokens(build, batches, monkeypatch):
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


@pytest.mark.parametrize(("kind", "pooling"), [("qwen3", "lasttoken"), ("qwen3", "mean"), ("t5", "mean")])
def test_left_padding_is_replaced_where_that_changes_nothing(build, batches, kind, pooling, monkeypatch):
    """Without a table of positions, batches are padded on the right and sorted by number of tokens."""
    monkeypatch.setitem(batching.TOKENS_PER_BATCH, "cpu", 200)
    model = build(kind, pooling=pooling)
    model.tokenizer.padding_side = "left"
    before = by_the_library(lambda: model.encode(MANY))
    fastbert.accelerate(model, impl="native")
    assert_same(quietly(lambda: model.encode(MANY)), before)
    widths = [width for _, width, _ in batches]
    assert len(widths) > 1
    assert widths == sorted(widths, reverse=True)
    assert not any("ran its own code" in why for why in fastbert.explain(model).left.values())
    with torch.no_grad():  # as the library pads them
        one = model(dict(model.preprocess(MANY[:5])))["sentence_embedding"]
    assert_same(one.numpy(), before[:5])


def test_a_small_batch_size_bounds_the_tokens(build, batches):
    """Users ask for batches of two texts to save memory: a batch then has no more tokens than two texts can have."""
    model = fastbert.accelerate(build(), impl="native")
    model.encode(MANY, batch_size=2)
    assert max(tokens for _, _, tokens in batches) <= 2 * 64
    assert len(batches) > 5


def test_threads_change_nothing(build, two_threads, monkeypatch):
    """Several batches at once give the same vectors, without a graph, and under the caller's autocast."""
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
    assert (alone - together).abs().max() > 1e-4  # it really computed in bfloat16
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
def test_long_texts_are_cut_without_changing_their_tokens(build, inputs, options, longest):
    """For an even, an odd and a small number of kept tokens, the tokenizer gets only a beginning of the text."""
    model = build()
    model.max_seq_length = longest
    cut = sentence.cut(model, inputs, options)
    assert [type(text) for text in cut] == [type(text) for text in inputs]
    if inputs is LONG:
        assert [len(a) < len(b) for a, b in zip(cut, inputs, strict=True)] == [True, True, True, True, False]
    else:
        assert (cut != inputs) == (not options)  # a prompt makes the first text of a pair longer, so pairs are not cut
    before, after = by_the_library(lambda: (model.preprocess(inputs, **options), model.preprocess(cut, **options)))
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        assert torch.equal(after[name], before[name]), name


@pytest.mark.parametrize("options", [{}, {"prompt": "a query: "}], ids=["alone", "prompt"])
@pytest.mark.parametrize("name", ["RoBERTa", "XLM-R"])
def test_long_texts_of_other_tokenizers_are_cut(build, name, options):
    """Also one long word. A text with spaces at an end stays, since older releases of the library strip it."""
    model = build()
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "<s>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=BACKENDS[name](), **special)
    setattr(model[0], "processor" if hasattr(model[0], "processor") else "tokenizer", tokenizer)
    model.max_seq_length = 64
    long = ["an unbelievable story, told once more: " * 90 + "end", "qwertzuiop" * 400, "short", "stays " * 900]
    long += ["a" + " " * 3000 + "b"]  # if it is cut, then in the gap
    for inputs in (long, [(a, b) for a in long for b in long]):
        cut = sentence.cut(model, inputs, options)
        if inputs is long:
            assert [len(a) < len(b) for a, b in zip(cut, inputs, strict=True)] == [True, True, False, False, False]
        else:
            assert (cut != inputs) == (not options)
        before, after = by_the_library(lambda: [model.preprocess(texts, **options) for texts in (inputs, cut)])  # noqa: B023
        for key in ("input_ids", "attention_mask"):
            assert torch.equal(after[key], before[key]), key
    model[0].do_lower_case = True
    assert sentence.cut(model, long, options) == long


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
    monkeypatch.setattr(sentence, "why_left", lambda model, kind: None)  # it would notice the spy
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
def test_texts_are_not_cut_if_other_tokens_may_be_kept(build, change, monkeypatch):
    model = build()
    # so that it is restored afterwards
    monkeypatch.setattr(type(model.tokenizer), "__module__", type(model.tokenizer).__module__)
    assert sentence.cut(model, LONG, {}) != LONG
    assert sentence.cut(model, LONG, {"max_length": 70}) == LONG
    change(model)
    assert sentence.cut(model, LONG, {}) == LONG


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


@pytest.fixture
def yes_or_no(tmp_path):
    """A CrossEncoder over a small Qwen3ForCausalLM: the logit of "yes" minus that of "no" at the last token."""
    logit_score = pytest.importorskip(
        "sentence_transformers.cross_encoder.modules.logit_score", reason="this version scores no logits"
    )
    assert logit_score.LogitScore.__name__ == sentence.LAST
    torch.manual_seed(3)
    small = tiny("qwen3")
    model = transformers.Qwen3ForCausalLM(small.config).eval()
    model.model.load_state_dict(small.state_dict())
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(tmp_path)
    return sentence_transformers.CrossEncoder(str(tmp_path), device="cpu")


def test_scores_by_yes_and_no(yes_or_no, batches):
    """Only real tokens are computed; batches are padded on the left, as the last column gives the score. The encoder
    ran its own code, because all its rows counted as read."""
    before = by_the_library(lambda: yes_or_no.predict(PAIRS))
    model = fastbert.accelerate(yes_or_no, impl="native")
    assert_same(quietly(lambda: model.predict(PAIRS)), before)
    report = fastbert.explain(model)
    assert not any("own code" in why and "calls" in name for name, why in report.left.items()), report
    assert not any("computed as the original does" in why for why in report.left.values()), report
    assert [width for _, width, _ in batches] == sorted((width for _, width, _ in batches), reverse=True)
    assert len(batches) <= 2  # rather than three of 32 pairs


def test_scores_of_texts_padded_on_the_right_are_the_librarys(yes_or_no):
    """If the user makes the tokenizer pad on the right, the last column, which gives the score, may be padding."""
    model = fastbert.accelerate(yes_or_no, impl="native")
    features = model.preprocess(PAIRS[:5])
    real = features["attention_mask"].bool()
    for name in ("input_ids", "attention_mask"):
        turned = torch.zeros_like(features[name])
        for row, values, mask in zip(turned, features[name], real, strict=True):
            row[: mask.sum()] = values[mask]
        features[name] = turned
    with torch.no_grad():
        got = model(dict(features))["scores"]
        expected = fastbert.restore(model)(dict(features))["scores"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
