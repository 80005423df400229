"""A program may set torch's default dtype or device: the results of every operator, BertModel, Encoder and an
accelerated model stay the same, forward and backward."""

import contextlib
import copy

import pytest
import torch

import fastbert.functional as F
from fastbert import BertConfig, BertModel, Encoder
from fastbert.testing import INPUTS, ModelShape

DEFAULTS = {
    "float64": ("dtype", torch.float64),
    "float16": ("dtype", torch.float16),
    "bfloat16": ("dtype", torch.bfloat16),
    "meta": ("device", "meta"),
    "in_a_with_block": ("with", "meta"),
}
defaults = pytest.mark.parametrize("default", DEFAULTS.values(), ids=DEFAULTS)


@contextlib.contextmanager
def hostile(kind, value):
    """meta stands for a GPU as default device: tensors made there by mistake cannot be computed with."""
    with torch.device(value) if kind == "with" else contextlib.nullcontext():
        if kind == "dtype":
            torch.set_default_dtype(value)
        elif kind == "device":
            torch.set_default_device(value)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)


def assert_same(found, expected):
    for ours, wanted in zip(found, expected, strict=True):
        assert (ours is None) == (wanted is None)
        if ours is not None:
            assert (ours.dtype, ours.device) == (wanted.dtype, wanted.device)
            assert torch.equal(ours, wanted)


def assert_same_or_as_close(found, expected):
    """Equal bits, with one exception: torch's device mode makes a layer run its separate operators, and without a GPU
    another engine computes their float32 products."""
    if not F.machine.INTERPRETING:
        return assert_same(found, expected)
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


SHAPE = ModelShape(hidden=32, heads=2, intermediate=64, layers=1, vocab=50)
CASES = {
    "attention": {},
    "attention-dropout": {"dropout_p": 0.2},
    "attention-bias": {"bias": True, "mask": True},
    "attention-alibi": {"alibi": True, "window": (3, 3)},
    "attention-rotary": {"rotary": True},
    "attention_padded": {},
    "attention_padded-dropout": {"dropout_p": 0.2},
    "disentangled_attention": {},
    "disentangled_attention-dropout": {"dropout_p": 0.2},
    "add_layer_norm": {},
    "add_layer_norm-dropout": {"dropout_p": 0.2},
    "add_layer_norm_sum": {"dropout_p": 0.2},
    "add_rms_norm": {},
    "linear_act": {},
    "linear_act-geglu": {"activation": "geglu"},
    "feed_forward": {},
    "embedding_layer_norm": {},
    "embedding_layer_norm-dropout": {"dropout_p": 0.2},
    "linear_cross_entropy": {},
    "linear_cross_entropy-smooth": {"label_smoothing": 0.1, "reduction": "none"},
    "pool": {},
    "pool-max": {"mode": "max"},
    "pool-cls": {"mode": "cls", "normalize": True},
}


@defaults
@pytest.mark.parametrize("impl", ["triton", "native", "reference"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_operators(default, impl, case, dtype):
    op = case.split("-")[0]
    inputs = INPUTS[op](SHAPE, [5, 19, 1, 40], **CASES[case])
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name != "alibi_slopes":
            inputs[name] = value.to(dtype).requires_grad_()

    def run():
        y = getattr(F, op)(**inputs, impl=impl)
        outputs = y if isinstance(y, tuple) else (y,)
        leaves = [t for t in inputs.values() if isinstance(t, torch.Tensor) and t.requires_grad]
        upstream = [torch.ones_like(o) for o in outputs]
        with torch.no_grad():
            without = getattr(F, op)(**inputs, impl=impl)
        grads = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
        return [*outputs, *(without if isinstance(without, tuple) else (without,)), *grads]

    expected = run()
    with hostile(*default):
        found = run()
    assert_same(found, expected)


CONFIG = BertConfig(
    vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
    max_position_embeddings=64, initializer_range=0.3,
)  # fmt: skip


@defaults
@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
def test_bert_model(default, impl, trains):
    model = BertModel(CONFIG, impl=impl).train(trains)
    ids = torch.randint(5, 50, (3, 24))
    mask = (torch.arange(24) < torch.tensor([24, 7, 13])[:, None]).long()

    def run():
        torch.manual_seed(3)
        model.zero_grad()
        with torch.set_grad_enabled(trains):
            output = model(ids, mask, output_hidden_states=True)
            if not trains:
                return [*output.hidden_states, output.pooler_output, *model(ids, output_attentions=True).attentions]
        (output.last_hidden_state.square().sum() + output.pooler_output.sum()).backward()
        return [output.last_hidden_state, *(p.grad for p in model.parameters())]

    expected = run()
    with hostile(*default):
        found = run()
    assert_same(found, expected)


@defaults
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_encoder(default, folder, dtype):
    texts = ["a b c", "d", "e f g h i j k l m n o"]

    def run(encoder):
        return [encoder.encode(texts), encoder.encode(texts[0]), encoder.encode(iter(texts))]

    try:
        encoder = Encoder.from_pretrained(folder, dtype=dtype)
    except (ValueError, RuntimeError) as error:
        pytest.skip(str(error))
    expected = run(encoder)
    with hostile(*default):
        found, again = run(encoder), run(Encoder.from_pretrained(folder, dtype=dtype))
    assert_same_or_as_close(found, expected)
    assert_same_or_as_close(again, expected)


@defaults
@pytest.mark.parametrize("kind", ["bert", "modernbert", "mpnet", "distilbert", "torch"])
def test_accelerated(default, kind):
    transformers = pytest.importorskip("transformers")
    import fastbert

    mask = torch.arange(12) < torch.tensor([12, 7, 3])[:, None]
    if kind == "torch":
        layer = torch.nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
        model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        x = torch.randn(3, 12, 32)
        call = lambda model: model(x, src_key_padding_mask=~mask)  # noqa: E731
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        if kind == "distilbert":
            sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
        config = transformers.AutoConfig.for_model(
            kind, vocab_size=50, max_position_embeddings=40, pad_token_id=0, **sizes
        )
        model = transformers.AutoModel.from_config(config)
        ids = torch.randint(5, 50, (3, 12)) * mask
        call = lambda model: model(ids, mask.long()).last_hidden_state  # noqa: E731
    model = fastbert.accelerate(copy.deepcopy(model), padding="zero").eval()

    def run():
        model.zero_grad()
        with torch.no_grad():
            without = call(model)[mask]
        y = call(model)[mask]
        y.square().sum().backward()
        return [without, y, *(p.grad for p in model.parameters())]

    expected = run()
    with hostile(*default):
        found = run()
    assert_same_or_as_close(found, expected)
