"""The rule of the drop-in: all outputs and all that hooks see equal the original's, or the original's code runs."""

import copy

import pytest
import torch
from torch.nn.utils import parametrize

import fastbert
from fastbert.testing import assert_within_budget

transformers = pytest.importorskip("transformers", reason="its models are accelerated")

pytestmark = pytest.mark.native
SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40, "initializer_range": 0.2,
}  # fmt: skip
MASK = torch.arange(9) < torch.tensor([9, 4, 2])[:, None]
IDS = torch.where(MASK, torch.arange(5, 32).view(3, 9), 0)


def plain(**settings) -> torch.nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SIZES, **settings)).eval()


def state(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, attention_mask=MASK.long()).last_hidden_state


def test_exact_padding_is_the_originals():
    """A user's module above the encoder (BiLSTM, convolution, unmasked mean) read zeros at padding."""
    model = plain()
    exact = fastbert.accelerate(copy.deepcopy(model), impl="native", padding="exact")
    torch.testing.assert_close(state(exact), state(model), atol=1e-5, rtol=1e-4)
    below = torch.nn.Sequential(fastbert.restore(copy.deepcopy(model)))
    fastbert.accelerate(below, impl="native")
    torch.testing.assert_close(state(below[0]), state(model), atol=1e-5, rtol=1e-4)


def test_a_bare_encoder_says_that_padding_is_zeros():
    model = fastbert.accelerate(plain(), impl="native")
    with pytest.warns(UserWarning, match='padding="exact"'):
        assert not state(model)[~MASK].any()
    assert 'padding="exact"' in str(fastbert.explain(model))


class Louder(transformers.models.bert.modeling_bert.BertSelfOutput):
    def forward(self, hidden_states, input_tensor):
        return super().forward(hidden_states, input_tensor) * 2


def test_a_users_output_layer_runs():
    """The fused code does not call this module; a subclass in its place was ignored without a word."""
    model = plain()
    ours = fastbert.accelerate(copy.deepcopy(model), impl="native")
    for m in (model, ours):
        torch.manual_seed(1)
        m.encoder.layer[0].attention.output = Louder(m.config).eval()
    with pytest.warns(UserWarning, match="Louder has a forward of its own"):
        assert torch.equal(state(ours), state(model))


def test_a_layer_that_is_causal_runs_its_own_code():
    """Without a mask, transformers' sdpa is causal if a layer says so; with a mask it never is."""
    model = plain(attn_implementation="sdpa")
    ours = fastbert.accelerate(copy.deepcopy(model), impl="native")
    ids = torch.arange(5, 32).view(3, 9)
    with torch.no_grad():
        everywhere = model(ids).last_hidden_state
        for m in (model, ours):
            m.encoder.layer[1].attention.self.is_causal = True
        expected = model(ids).last_hidden_state
        assert not torch.allclose(expected, everywhere, atol=1e-3)
        with pytest.warns(UserWarning, match="is causal"):
            assert torch.equal(ours(ids).last_hidden_state, expected)


@pytest.mark.filterwarnings("ignore")
def test_tables_that_a_look_up_changes_run_their_own_code():
    """With max_norm every look-up writes to the table; with scale_grad_by_freq gradients depend on how often an id
    occurs. The fused code only reads rows and adds up gradients."""
    for setting, value in {"max_norm": 0.5, "scale_grad_by_freq": True}.items():
        model = plain()
        ours = fastbert.accelerate(copy.deepcopy(model), impl="native", padding="exact")
        found = []
        for m in (ours, model):
            table = m.embeddings.word_embeddings
            setattr(table, setting, value)
            m(torch.full((2, 9), 7)).last_hidden_state.square().sum().backward()
            found.append((table.weight.detach(), table.weight.grad))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)
        assert setting in str(fastbert.explain(ours))


def test_no_dropout_draws_nothing():
    """In training with every dropout at 0, a number was drawn from torch's generator; the original draws none."""
    model = plain(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    fastbert.accelerate(model, impl="native", padding="zero")
    before = torch.get_rng_state()
    state(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_hidden_states_have_gradients():
    """They were copies that were not on the path to the loss."""
    model = fastbert.accelerate(plain(), impl="native", padding="exact")
    output = model(IDS, attention_mask=MASK.long(), output_hidden_states=True)
    grads = torch.autograd.grad(output.pooler_output.sum(), output.hidden_states)
    assert all(g.any() for g in grads)


def test_a_penalty_on_gradients_is_the_originals():
    """In evaluation mode, gradients with create_graph=True were 30% off: LayerNorm's backward pass counted the path
    through its first input in the gradient of the second one too. In training mode other code runs, so a test of that
    mode alone passed."""
    model = plain(attn_implementation="eager")
    ours, truth = copy.deepcopy(model), copy.deepcopy(model).double()
    fastbert.accelerate(ours, impl="native", padding="exact")
    found = []
    for m in (ours, model, truth):
        weights, of_inputs = [layer.intermediate.dense.weight for layer in m.encoder.layer], []
        # errors of eight inputs together: for one input, plain torch's error may be half of its mean, by chance
        for shift in range(8):
            embeds = m.get_input_embeddings()(IDS + shift * MASK).detach().requires_grad_()
            output = m(inputs_embeds=embeds, attention_mask=MASK.long()).last_hidden_state
            upstream = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).to(output.dtype).view_as(output)
            (first,) = torch.autograd.grad(output, embeds, upstream.roll(shift), create_graph=True)
            of_inputs.append((first, *torch.autograd.grad(first.square().sum(), weights)))
        found.append([torch.stack(of_one) for of_one in zip(*of_inputs, strict=True)])
    for one, other, right in zip(*found, strict=True):
        assert_within_budget(one, other, right)


def test_many_gradients_in_one():
    """jacobian(vectorize=True) and grad(is_grads_batched=True) pass many upstream gradients in one tensor without
    memory, and the C++ operators raised "Cannot access data pointer"."""
    model = plain()
    ours, truth = copy.deepcopy(model), copy.deepcopy(model).double()
    fastbert.accelerate(ours, impl="native", padding="exact")
    found = []
    for m in (ours, model, truth):
        first = m(IDS, attention_mask=MASK.long()).last_hidden_state[:, 0].flatten()
        used = [p for name, p in m.named_parameters() if not name.startswith("pooler")]
        one_each = torch.eye(first.numel(), dtype=first.dtype)[::7]
        found.append(torch.autograd.grad(first, used, one_each, is_grads_batched=True))
    for one, other, right in zip(*found, strict=True):
        assert_within_budget(one, other, right)


def test_a_checkpointed_run_draws_the_same_masks():
    """Gradient checkpointing puts a hook on the word embeddings, and the dropout after them then used torch's
    generator: with one seed, losses differed with and without checkpointing."""
    model = fastbert.accelerate(plain().train(), impl="native", padding="exact")
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        output = model(IDS, attention_mask=MASK.long()).last_hidden_state
        model.zero_grad()
        (output * torch.linspace(-1, 2, output.numel()).sin().view_as(output)).sum().backward()
        found.append((output, model.encoder.layer[0].output.dense.weight.grad))
    for before, after in zip(*found, strict=True):
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)


def test_a_norm_that_is_called_has_the_same_masks():
    """A parametrised LayerNorm whose weight has the same numbers changed the masks of the dropout before it."""
    model = fastbert.accelerate(plain().train(), impl="native", padding="exact")
    found = []
    for parametrized in (False, True):
        if parametrized:
            parametrize.register_parametrization(model.encoder.layer[0].output.LayerNorm, "weight", torch.nn.Identity())
        torch.manual_seed(3)
        found.append(model(IDS, attention_mask=MASK.long()).last_hidden_state)
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("path", ["output.dense", "attention.self.query"])
def test_a_sparse_weight(path):
    """torch can multiply by a weight in compressed sparse rows, but is_contiguous raises for it."""
    model = plain()
    ours = fastbert.accelerate(copy.deepcopy(model), impl="native", padding="exact")
    state(ours)
    for m in (model, ours):
        linear = m.encoder.layer[0].get_submodule(path)
        linear.weight = torch.nn.Parameter(linear.weight.detach().relu().to_sparse_csr())
    torch.testing.assert_close(state(ours), state(model), atol=1e-5, rtol=1e-4)
    assert "sparse" in str(fastbert.explain(ours))
