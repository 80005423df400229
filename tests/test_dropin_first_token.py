"""Below heads that read the first column, the last layer computes only first tokens, with the same results."""

import copy

import pytest
import torch

import fastbert
from fastbert.dropin import layer as dropin_layer
from fastbert.testing import TINY, relative_rms

transformers = pytest.importorskip("transformers", reason="its models are accelerated")

SIZES = {"vocab_size": 60, "max_position_embeddings": 40, "num_labels": 3, "attn_implementation": "eager"}
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
# class with this head -> settings of its config; what comes between the first token and the loss differs
CLASSIFIERS = {
    "Bert": BERT,  # the encoder has the pooler
    "Roberta": BERT | {"pad_token_id": 1},  # the head takes the column itself
    "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "Albert": BERT | {"embedding_size": 16},  # one layer runs twice: for all tokens, then for first tokens
    "ModernBert": BERT | {"pad_token_id": 0, "attn_implementation": "sdpa"},  # pre-norm: computes every token
}
KEY_BIASES = ("key.bias", "k_lin.bias")  # their gradient is zero except for rounding
MASK = torch.arange(9) < torch.tensor([9, 4, 4, 1])[:, None]
FULL = torch.ones_like(MASK)


def build(name: str, dropout: float = 0.0) -> torch.nn.Module:
    settings = SIZES | CLASSIFIERS[name]
    config = getattr(transformers, name + "Config")(**settings)
    for key in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"):
        if hasattr(config, key):
            setattr(config, key, dropout)
    model = getattr(transformers, name + "ForSequenceClassification")(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.1)
    return model


def batch_of(model: torch.nn.Module, mask: torch.Tensor = MASK) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 60, mask.shape)
    labels = torch.arange(len(mask), dtype=torch.int64, device="cpu") % 3
    return {
        "input_ids": torch.where(mask, ids, model.config.pad_token_id),
        "attention_mask": mask.long(),
        "labels": labels,
    }


@pytest.fixture
def walks(monkeypatch) -> list[str]:
    """The way that each layer has run."""
    gone = []

    def follow(name: str) -> None:
        walk = getattr(dropin_layer, name)

        def followed(*given):
            gone.append(name)
            return walk(*given)

        monkeypatch.setattr(dropin_layer, name, followed)

    follow("run")
    follow("run_for_first")
    return gone


@pytest.mark.parametrize("name", list(CLASSIFIERS))
def test_loss_and_gradients_are_the_originals(name, walks):
    plain = build(name).train()
    ours = fastbert.accelerate(copy.deepcopy(plain), impl="native")
    batch, found = batch_of(plain), {}
    for who, model in {"ours": ours, "plain": plain, "truth": copy.deepcopy(plain).double()}.items():
        output = model(**batch)
        output.loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if not n.endswith(KEY_BIASES)}
        found[who] = {"logits": output.logits} | {n: grad for n, grad in grads.items() if grad is not None}
    assert walks[-1] == ("run" if name == "ModernBert" else "run_for_first")
    assert "run_for_first" not in walks[:-1]
    assert found["ours"].keys() == found["truth"].keys()
    for key, expected in found["truth"].items():
        error, budget = (relative_rms(found[who][key], expected) for who in ("ours", "plain"))
        assert error <= 2 * budget + 10 * TINY, f"{key}: relative RMS error {error:.2e}, the original's {budget:.2e}"


def test_dropout_draws_the_masks_of_the_whole_layer(walks):
    """A hook on the encoder needs every token, so the whole layer runs; with one seed both ways agree."""
    model = fastbert.accelerate(build("Bert", dropout=0.3), impl="native").train()
    batch, found = batch_of(model), []
    for hooked in (False, True):
        handle = model.bert.register_forward_hook(lambda *given: None) if hooked else None
        torch.manual_seed(3)
        found.append(model(**batch).logits)
        if handle is not None:
            handle.remove()
    assert walks == ["run", "run_for_first", "run", "run"]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def states(model, batch):
    assert model(**batch, output_hidden_states=True).hidden_states[-1].shape == (4, 9, 32)


def states_by_the_encoders_config(model, batch):
    """The head has another config object, which does not ask for them."""
    model.bert.config = copy.deepcopy(model.config)
    model.bert.config.output_hidden_states = True
    assert model(**batch).hidden_states[-1].shape == (4, 9, 32)


def hook_on_the_pooler(model, batch):
    shapes = []
    model.bert.pooler.register_forward_hook(lambda module, given, output: shapes.append(given[0].shape))
    model(**batch)
    assert shapes == [(4, 9, 32)]


def hook_on_the_encoder(model, batch):
    shapes = []
    model.bert.register_forward_hook(lambda module, given, output: shapes.append(output[0].shape))
    model(**batch)
    assert shapes == [(4, 9, 32)]


def own_head(model, batch):
    """A user's classifier may read anything, and so may a forward of the user's."""

    class Summed(type(model)):
        def forward(self, input_ids, attention_mask, labels):
            return self.bert(input_ids, attention_mask=attention_mask).last_hidden_state.sum()

    model.__class__ = Summed
    model(**batch)


def encoder_alone(model, batch):
    assert model.bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state.shape == (4, 9, 32)


def first_column_masked(model, batch):
    flipped = batch | {name: batch[name].flip(1) for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(model(**flipped).logits, fastbert.restore(model)(**flipped).logits, rtol=1e-4, atol=1e-5)


CALLS = [states, states_by_the_encoders_config, hook_on_the_pooler, hook_on_the_encoder, own_head, encoder_alone]


@pytest.mark.parametrize(
    ("call", "mask"), [*((call, FULL) for call in CALLS), (states, MASK), (first_column_masked, MASK)]
)
def test_every_token_is_computed_if_it_may_be_read(call, mask, walks):
    """Also in a batch without padding, where only the call itself tells."""
    model = fastbert.accelerate(build("Bert"), impl="native").train()
    call(model, batch_of(model, mask))
    assert walks
    assert "run_for_first" not in walks


def test_inference_gives_the_originals_logits():
    """The batch has more tokens than FEW_TOKENS; with fewer, one C++ call may compute all layers."""
    plain = build("Bert").eval()
    ours = fastbert.accelerate(copy.deepcopy(plain), impl="native")
    with torch.no_grad():
        for width in (9, 40):
            batch = batch_of(plain, torch.arange(width) < torch.tensor([width, 30, 2])[:, None])
            torch.testing.assert_close(ours(**batch).logits, plain(**batch).logits, rtol=1e-4, atol=1e-5)
