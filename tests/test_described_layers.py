"""BertModel describes its layers once, and again after every change on which the description depends."""

import copy
import pickle
from contextlib import ExitStack

import pytest
import torch
import torch.nn as nn

from fastbert.config import BertConfig
from fastbert.models.bert import BertLayer, BertModel

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]], dtype=torch.int64, device="cpu")


@pytest.fixture
def model() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():  # layers differ, and activations matter
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def states(model: BertModel, gradients: bool) -> torch.Tensor:
    with torch.set_grad_enabled(gradients):
        return model(IDS).last_hidden_state.detach()


class Doubling(nn.Linear):
    def forward(self, x):
        return 2.0 * super().forward(x)


class Turned(BertLayer):
    def forward(self, x, shared, first_only=False):
        return -super().forward(x, shared, first_only)


def doubled(module, given, output):
    return 2.0 * output


def up(model: BertModel) -> nn.Linear:
    return model.encoder["layer"][1].intermediate["dense"]


def put(modules, name, module) -> None:
    modules[name] = module


def doubling() -> Doubling:
    torch.manual_seed(1)
    return Doubling(32, 48)


CHANGES = {
    "hook": lambda model: up(model).register_forward_hook(doubled),
    "hook_without_a_handle": lambda model: put(up(model)._forward_hooks, 10**6, doubled),
    "hook_in_another_dictionary": lambda model: setattr(up(model), "_forward_hooks", {0: doubled}),
    "hook_before": lambda model: up(model).register_forward_pre_hook(lambda module, given: (2.0 * given[0],)),
    "hook_on_a_norm": lambda model: model.encoder["layer"][0].output["LayerNorm"].register_forward_hook(doubled),
    "hook_on_a_layer": lambda model: model.encoder["layer"][0].register_forward_hook(doubled),
    "hook_on_all": lambda model: nn.modules.module.register_module_forward_hook(
        lambda module, given, output: 2.0 * output if isinstance(module, nn.Linear) else output
    ),
    "forward_of_an_instance": lambda model: setattr(up(model), "forward", lambda x: torch.ones(*x.shape[:-1], 48)),
    "class_of_an_instance": lambda model: setattr(up(model), "__class__", Doubling),
    "class_of_a_layer": lambda model: setattr(model.encoder["layer"][0], "__class__", Turned),
    "module": lambda model: put(model.encoder["layer"][0].intermediate, "dense", doubling()),
    "module_of_the_same_class": lambda model: put(
        model.encoder["layer"][0].intermediate, "dense", copy.deepcopy(up(model))
    ),
    "children_in_another_dictionary": lambda model: setattr(
        model.encoder["layer"][0].intermediate, "_modules", {"dense": doubling()}
    ),
    "projection": lambda model: put(
        model.encoder["layer"][0].attention["self"], "value",
        copy.deepcopy(model.encoder["layer"][1].attention["self"]["value"]),
    ),
    "parameter": lambda model: setattr(up(model), "weight", nn.Parameter(torch.ones(48, 32))),
    "layer_gone": lambda model: model.encoder["layer"].pop(1),
    "layer_more": lambda model: model.encoder["layer"].append(copy.deepcopy(model.encoder["layer"][0])),
    "layers_swapped": lambda model: put(
        model.encoder, "layer", nn.ModuleList([model.encoder["layer"][1], model.encoder["layer"][0]])
    ),
    "encoder": lambda model: setattr(
        model, "encoder", nn.ModuleDict({"layer": nn.ModuleList(list(model.encoder["layer"])[:1])})
    ),
    "activation": lambda model: setattr(model.config, "hidden_act", "relu"),
}  # fmt: skip


TAKEN_BACK = ("hook", "hook_before", "hook_on_a_norm", "hook_on_a_layer", "hook_on_all")


@pytest.mark.parametrize("gradients", [False, True], ids=["one_call", "layer_by_layer"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_a_call_counts(model, change, gradients):
    """The results are those of a model that was changed before its first call."""
    fresh = copy.deepcopy(model)
    before = states(model, gradients)
    with ExitStack() as stack:
        for each in (model, fresh):
            handle = CHANGES[change](each)
            if hasattr(handle, "remove"):
                stack.callback(handle.remove)
            if change == "hook_on_all":
                break
        now = states(model, gradients)
        assert torch.equal(now, states(fresh, gradients))
        assert not torch.equal(now, before)
    if change in TAKEN_BACK:  # and again after the change is undone
        assert torch.equal(states(model, gradients), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_describes_its_own_layers(model, copied):
    before = states(model, False)
    other = copied(model)
    up(other).register_forward_hook(doubled)
    assert not torch.equal(states(other, False), before)
    with torch.no_grad():
        up(model).weight.zero_()
    assert not torch.equal(states(model, False), before)
    assert torch.equal(up(other).weight, up(copied(other)).weight)
    assert up(other).weight.abs().max() > 0.0


@pytest.mark.parametrize("gradients", [False, True], ids=["one_call", "layer_by_layer"])
def test_without_a_change_a_layer_is_described_once(model, gradients, monkeypatch):
    described = []
    original = BertLayer.described

    def counting(layer, impl):
        described.append(layer)
        return original(layer, impl)

    monkeypatch.setattr(BertLayer, "described", counting)
    for _ in range(3):
        states(model, gradients)
    assert described == [*model.encoder["layer"]]
    model.impl = "reference"
    states(model, gradients)
    assert described == 2 * [*model.encoder["layer"]]
