"""A head that reads only first tokens computes the last layer only for these, with the results of the whole layer."""

import copy

import pytest
import torch

import fastbert
from fastbert import BertConfig, BertModel, PackedBatch
from fastbert.functional import LayerWeights
from fastbert.kernels.cpu import operators as cpp
from fastbert.testing import TINY, relative_rms

CONFIG = BertConfig(
    vocab_size=91, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=80, initializer_range=0.3, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3,
    num_labels=3,
)  # fmt: skip
# equal lengths in a row, empty sequences at the start, between and at the end, and more than one tile of keys
LENGTHS = [0, 5, 5, 0, 70, 1, 9, 0]


def packed(lengths: list[int]) -> PackedBatch:
    return PackedBatch.from_lists([torch.randint(1, 91, (length,)).tolist() for length in lengths])


def whole(model: torch.nn.Module) -> torch.nn.Module:
    """A copy that computes its whole last layer."""
    model = copy.deepcopy(model)
    model.FIRST_ONLY = False
    return model


@pytest.mark.parametrize(
    ("impl", "training", "dtype", "lengths"),
    [
        *(
            (impl, training, dtype, LENGTHS)
            for impl in ("native", "reference")
            for training in (True, False)
            for dtype in (torch.float32, torch.bfloat16)
        ),
        ("triton", True, torch.float32, [0, 7, 1, 2]),  # the interpreter is slow
    ],
    ids=lambda value: f"{value}".removeprefix("torch."),
)
def test_logits_and_gradients_are_those_of_the_whole_layer(impl, training, dtype, lengths):
    ours = fastbert.BertForSequenceClassification(CONFIG, impl=impl).to(dtype).train(training)
    truth = fastbert.BertForSequenceClassification(CONFIG, impl="reference").train(training)
    truth.load_state_dict(ours.state_dict())
    models = {"ours": ours, "plain": whole(ours), "truth": whole(truth).double()}
    batch, upstream = packed(lengths), torch.randn(len(lengths), 3)
    found = {}
    for name, model in models.items():
        torch.manual_seed(5)  # the masks' seeds are drawn from this generator
        logits = model(batch).logits
        (logits * upstream.to(logits.dtype)).sum().backward()
        found[name] = {"logits": logits} | {n: p.grad for n, p in model.named_parameters() if "key.bias" not in n}
    for name, expected in found["truth"].items():
        error, plain = (relative_rms(found[who][name], expected) for who in ("ours", "plain"))
        floor = TINY if dtype == torch.float32 else 2e-3
        assert error <= 2 * plain + floor, f"{name}: relative RMS error {error:.2e}, that of the whole {plain:.2e}"


def test_only_first_rows_go_through_the_last_layer():
    """Counted at its feed-forward block. Not if the layer's output is requested, and not in earlier layers."""
    model = fastbert.BertForSequenceClassification(CONFIG, impl="native").eval()
    rows = []
    for number, layer in enumerate(model.bert.encoder["layer"]):
        layer.output["dense"].register_forward_hook(
            lambda module, given, output, number=number: rows.append((number, len(output)))
        )
    batch = packed(LENGTHS)
    expected = model(batch).logits
    assert rows == [(0, 90), (1, 8)]
    for asked in ({"output_hidden_states": True}, {"output_attentions": True}):
        rows.clear()
        torch.testing.assert_close(model(batch, **asked).logits, expected, rtol=1e-4, atol=1e-5)
        assert rows == [(0, 90), (1, 90)]


@pytest.mark.parametrize("impl", ["native", "triton"])
def test_the_model_without_a_head(impl):
    """Left-padded and packed input; only empty sequences; no layers; in one C++ call where there is one."""
    model = BertModel(CONFIG, impl=impl).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # without biases a sequence without tokens would be zero anyway
    mask = (torch.arange(6) >= torch.tensor([0, 4, 6])[:, None]).long()
    ids = torch.randint(1, 91, (3, 6))
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            expected = model(ids, mask)
            output = model(ids, mask, first_only=True)
            torch.testing.assert_close(output.pooler_output, expected.pooler_output)
            first = torch.stack([expected.last_hidden_state[0, 0], expected.last_hidden_state[1, 4], torch.zeros(32)])
            torch.testing.assert_close(output.last_hidden_state, first)
    nothing = model(packed([0, 0]), first_only=True).last_hidden_state
    assert torch.equal(nothing, torch.zeros(2, 32))
    with pytest.raises(ValueError, match="first_only leaves out"):
        model(ids, first_only=True, output_attentions=True)
    config = copy.deepcopy(CONFIG)
    config.num_hidden_layers = 0
    no_layers = BertModel(config, impl=impl).eval()
    torch.testing.assert_close(
        no_layers(ids, first_only=True).last_hidden_state, no_layers(ids).last_hidden_state[:, 0]
    )


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("lengths", [[5, 0, 3], [60, 40, 0, 9]], ids=["few_tokens", "many"])
def test_in_one_call_of_all_layers_or_all_but_the_last(monkeypatch, layers, lengths):
    """Without gradients, where the C++ computes layers."""
    config = copy.deepcopy(CONFIG)
    config.num_hidden_layers = layers
    model = BertModel(config, impl="native").eval()
    batch = packed(lengths)
    expected = model(batch, first_only=True).pooler_output
    in_calls, call = [], cpp.encoder_layers

    def counted(x, tensors, *others):
        in_calls.append(len(tensors) // len(LayerWeights._fields))
        return call(x, tensors, *others)

    monkeypatch.setattr(cpp, "encoder_layers", counted)
    with torch.no_grad():
        torch.testing.assert_close(model(batch, first_only=True).pooler_output, expected)
    in_one = layers if sum(lengths) < 64 else layers - 1
    assert in_calls == ([in_one] if in_one and cpp.dtypes() else [])


def test_compiles_in_one_graph():
    """While a graph is traced, the number of tokens of a padded batch is unknown."""
    model = BertModel(CONFIG, impl="native").eval()
    ids, mask = torch.randint(1, CONFIG.vocab_size, (2, 6)), torch.tensor([[1] * 6, [1] * 2 + [0] * 4])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = model(ids, mask).pooler_output
        torch.testing.assert_close(compiled(ids, mask, first_only=True).pooler_output, expected)
