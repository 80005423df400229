"""An accelerated encoder runs all layers in one C++ call on a CPU, unless code has to run between the layers."""

import copy

import pytest
import torch

import fastbert
import fastbert.inference.weights
from fastbert.kernels.cpu import operators as cpp
from fastbert.testing import assert_within_budget

transformers = pytest.importorskip("transformers", reason="its models are accelerated")
pytestmark = pytest.mark.cpp

FAMILIES = {
    "bert": {},
    "roberta": {"pad_token_id": 1},
    "electra": {"embedding_size": 24},
    "distilbert": {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4},
    "albert": {"embedding_size": 24},  # gelu_new, our gelu_tanh
    "relu": {"hidden_act": "relu"},
}
REAL = torch.arange(9) < torch.tensor([9, 4, 7])[:, None]


def build(family: str = "bert", **more):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = {"vocab_size": 60} | ({} if family == "distilbert" else sizes)
    config = transformers.AutoConfig.for_model(
        "bert" if family == "relu" else family, **{**sizes, **FAMILIES[family], **more}
    )
    return transformers.AutoModel.from_config(config).eval()


def batch(model) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 60, REAL.shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.masked_fill(~REAL, model.config.pad_token_id), "attention_mask": REAL.long()}


@pytest.fixture
def calls(monkeypatch) -> list:
    """A list with an entry for each C++ call that runs a stack of layers."""
    made, right = [], cpp.encoder_layers

    def counted(*args):
        made.append(args)
        return right(*args)

    monkeypatch.setattr(cpp, "encoder_layers", counted)
    return made


@torch.no_grad()
def infer(model, **more):
    return model(**batch(model), **more)


@pytest.mark.parametrize("dtype", cpp.dtypes(), ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_call_gives_the_original_numbers(family, dtype, calls):
    plain = build(family).to(dtype)
    truth = infer(copy.deepcopy(plain).double()).last_hidden_state
    ours = fastbert.accelerate(copy.deepcopy(plain), impl="native")
    states = infer(ours).last_hidden_state
    assert len(calls) == 1
    assert_within_budget(states[REAL], infer(plain).last_hidden_state[REAL], truth[REAL])


def hook(model):
    model.encoder.layer[1].register_forward_hook(lambda module, args, output: None)


def hook_inside(model):
    model.encoder.layer[0].output.dense.register_forward_hook(lambda module, args, output: output + 1)


def own_linear(model):
    class Linear(torch.nn.Linear):
        pass

    model.encoder.layer[0].output.dense.__class__ = Linear


def own_forward(model):
    dense = model.encoder.layer[0].intermediate.dense
    dense.forward = lambda x: torch.nn.functional.linear(x, dense.weight, dense.bias) * 2


def other_eps(model):
    model.encoder.layer[1].output.LayerNorm.eps = 0.5


def no_bias(model):
    model.encoder.layer[0].attention.self.query.bias = None


def int8(model):
    fastbert.layers.quantise(model)


def dropping(model):
    model.encoder.layer[0].output.dropout.train()


@pytest.mark.filterwarnings("ignore:.*fastbert leaves this call")
@pytest.mark.parametrize("change", [hook, hook_inside, own_linear, own_forward, other_eps, no_bias, dropping])
def test_code_between_the_layers_runs(change, calls):
    """The model is changed after it was accelerated and called."""
    plain = build()
    ours = fastbert.accelerate(copy.deepcopy(plain), impl="native")
    infer(ours)
    assert len(calls) == 1
    change(plain), change(ours)
    state = torch.random.get_rng_state()
    states = infer(ours).last_hidden_state
    assert len(calls) == 1
    if change is not dropping:
        torch.random.set_rng_state(state)
        torch.testing.assert_close(states[REAL], infer(plain).last_hidden_state[REAL], atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(fastbert.inference.eight_bits.why_not() is not None, reason="no 8-bit products here")
def test_8_bit_weights_are_multiplied_in_8_bits(calls):
    ours = fastbert.accelerate(build(), impl="native")
    int8(ours)
    infer(ours)
    assert not calls


def test_calls_that_ask_for_more_go_layer_by_layer(calls):
    ours = fastbert.accelerate(build(), impl="native")
    assert len(infer(ours, output_hidden_states=True).hidden_states) == 3
    ours(**batch(ours)).last_hidden_state.sum().backward()
    fastbert.accelerate(build(), impl="native", padding="exact")(**batch(ours))
    fastbert.accelerate(build(), impl="reference")(**batch(ours))
    with torch.no_grad():
        ours.train()(**batch(ours))
    assert not calls


def test_no_copy_of_the_weights_is_kept(calls):
    """So a change by any means takes effect."""
    plain = build()
    ours = fastbert.accelerate(copy.deepcopy(plain), impl="native")
    before = infer(ours).last_hidden_state
    for model in (plain, ours):
        model.encoder.layer[1].output.dense.weight.data[3, 5] += 1.0
    after = infer(ours).last_hidden_state
    assert len(calls) == 2
    assert not torch.equal(before[REAL], after[REAL])
    torch.testing.assert_close(after[REAL], infer(plain).last_hidden_state[REAL], atol=1e-5, rtol=1e-4)


def test_explain_tells(calls):
    told = "inference runs all layers in one C++ call"
    ours = fastbert.accelerate(build(), impl="native")
    assert told in str(fastbert.explain(ours))
    other_eps(ours)
    hook_inside(ours)
    assert told not in str(fastbert.explain(ours))
