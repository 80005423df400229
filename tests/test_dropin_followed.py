"""Modes, hooks and tracers that follow each step of a call get the original's steps; the fused code has others."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastbert

transformers = pytest.importorskip("transformers", reason="its models are accelerated")

pytestmark = pytest.mark.native
SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40,
}  # fmt: skip
IDS = torch.arange(5, 32).view(3, 9)


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **kwargs or {})


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.functional":  # not a query of a tensor's shape
            self.seen.append(function.__name__)
        return function(*args, **kwargs or {})


def by_mode(mode):
    def seen(model):
        mode.seen = []
        with torch.no_grad(), mode:
            model(IDS)
        return mode.seen

    return seen


def by_a_hook_on_all(model):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, given, y: seen.append(type(m).__name__))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    return seen


def by_every_call(model):
    seen, call = [], nn.Module.__call__

    def noted(module, *args, **kwargs):
        seen.append(type(module).__name__)
        return call(module, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(nn.Module, "__call__", noted)
        model(IDS)
    return seen


def by_forward_mode(model):
    embeds = model.get_input_embeddings()(IDS).detach()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(embeds, torch.ones_like(embeds))
        output = model(inputs_embeds=dual).last_hidden_state
        return forward_ad.unpack_dual(output).tangent.tolist()


def by_a_transformation(model):
    embeds = model.get_input_embeddings()(IDS).detach()
    return torch.func.grad(lambda x: model(inputs_embeds=x).last_hidden_state[0].sum())(embeds).tolist()


FOLLOWERS = {
    "operators": (by_mode(Operators()), "a TorchDispatchMode is active"),
    "functions": (by_mode(Functions()), "a TorchFunctionMode is active"),
    "hook_on_all": (by_a_hook_on_all, "there is a hook on all modules"),
    "every_call": (by_every_call, "torch.nn.Module.__call__ was replaced"),
    "forward_mode": (by_forward_mode, "forward-mode derivatives are computed"),
    "transformation": (by_a_transformation, "a transformation of torch.func is active"),
}


@pytest.mark.parametrize(("follow", "reason"), FOLLOWERS.values(), ids=FOLLOWERS)
def test_a_call_that_is_followed_is_the_originals(follow, reason):
    """The hook is set before the first call, or after a call without it. A warning gives the reason."""
    config = transformers.BertConfig(**SIZES, attn_implementation="eager")
    model = transformers.BertModel(config).eval()
    ours = fastbert.accelerate(copy.deepcopy(model), impl="native", padding="zero")
    expected = follow(model)
    for _ in range(2):
        with pytest.warns(UserWarning, match=f"{reason}, so fastbert leaves this call"):
            assert follow(ours) == expected
        ours.forward.warned.clear()
        with torch.no_grad():
            ours(IDS)
        assert not ours.forward.warned
