"""Modules that share an accelerated module's attributes: shallow copies, and modules of another class made from it."""

import copy
import importlib
import types

import pytest
import torch
import torch.nn as nn

import fastbert
from accelerated_sentences import TEXTS, build, folders  # noqa: F401
from dropin_changes import MASK, accelerated, assert_same, batch_of, plain_model
from fastbert.dropin.forward import Forward, forward_of

transformers = pytest.importorskip("transformers", reason="its models are copied")

pytestmark = pytest.mark.native


def own_modules(module: nn.Module) -> None:
    """Gives a shallow copy, which shares the dictionary of children with its original, children of its own."""
    module._modules = {name: copy.deepcopy(child) for name, child in module._modules.items()}


def without_tables(model: nn.Module) -> None:
    own_modules(model)
    with torch.no_grad():
        getattr(model, model.base_model_prefix, model).embeddings.word_embeddings.weight.mul_(3.0)


def other_config(model: nn.Module) -> None:
    model.config = copy.deepcopy(model.config)
    model.config.output_hidden_states = model.config.return_dict = True


def other_layer(model: nn.Module) -> None:
    own_modules(model)
    layers = getattr(model, model.base_model_prefix, model).encoder.layer
    layers[0] = layers[1]


@pytest.mark.parametrize("called", [False, True], ids=["at_first", "after_a_call"])
@pytest.mark.parametrize("change", [without_tables, other_config, other_layer])
@pytest.mark.parametrize("head", ["Model", "ForTokenClassification"])
def test_a_shallow_copy_calls_itself(head, change, called):
    """`copy.copy(model)` took over the instance's `forward`, bound to the model it was copied from: changes of the copy
    had no effect, and restoring the copy restored the original."""
    plain = plain_model(head)
    ours = accelerated(plain, "exact")
    if called:
        assert_same(ours, plain)
    copies = [copy.copy(model) for model in (ours, plain)]
    for model in copies:
        change(model)
    assert_same(*copies, torch.ones_like(MASK))
    got, want = (model(**batch_of()) for model in copies)
    assert list(got.keys()) == list(want.keys())
    assert isinstance(vars(ours)["forward"], Forward)
    fastbert.restore(copies[0])
    assert isinstance(vars(ours)["forward"], Forward)
    assert_same(ours, plain, torch.ones_like(MASK))


def test_a_shallow_copy_is_accelerated_by_itself():
    plain = plain_model()
    ours = accelerated(plain, "exact")
    other = copy.copy(ours)
    own_modules(other)
    fastbert.accelerate(other, padding="exact")
    with torch.no_grad():
        other.embeddings.word_embeddings.weight.mul_(3.0)
    want = copy.deepcopy(plain)
    with torch.no_grad():
        want.embeddings.word_embeddings.weight.mul_(3.0)
    assert_same(other, want, torch.ones_like(MASK))
    assert_same(ours, plain, torch.ones_like(MASK))
    assert not ours.forward.warned
    assert not other.forward.warned
    assert_same(copy.deepcopy(copy.copy(other)), want, torch.ones_like(MASK))


def test_a_copied_layer_in_an_encoder():
    """A copy of layer 0, with an output layer of its own, in place of layer 1 ran layer 0."""
    plain = plain_model()
    ours = accelerated(plain, "exact")
    for model in (ours, plain):
        layer = copy.copy(model.encoder.layer[0])
        own_modules(layer)
        with torch.no_grad():
            layer.output.dense.weight.mul_(2.0)
        model.encoder.layer[1] = layer
    assert_same(ours, plain, torch.ones_like(MASK))
    assert "in place of an accelerated layer" in str(fastbert.explain(ours))


@pytest.mark.parametrize("kind", ["encoder", "layer", "attention"])
def test_a_shallow_copy_of_torchs_modules(kind):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    plain = {"encoder": nn.TransformerEncoder(layer, 2), "layer": layer, "attention": layer.self_attn}[kind].eval()
    ours = fastbert.accelerate(copy.deepcopy(plain), impl="native")
    x = torch.randn(2, 5, 32)
    given = (x, x, x) if kind == "attention" else (x,)
    outputs = []
    for model in (ours, plain):
        model(*given)
        other = copy.copy(model)
        own_modules(other)
        other._parameters = {name: None if p is None else p * 2 for name, p in other._parameters.items()}
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(1.5)
        if kind == "attention":
            outputs.append(other(*given, need_weights=False)[0])
        else:
            outputs.append(other(*given))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)


def another(layer: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    return nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True).eval()


def a_copy(layer: nn.Module) -> nn.Module:
    other = copy.copy(layer)
    own_modules(other)
    with torch.no_grad():
        other.linear1.weight.mul_(2.0)
    return other


@pytest.mark.parametrize("made", [another, a_copy])
def test_a_layer_in_place_of_one_of_torchs(made):
    """A plain layer in place of one in an accelerated nn.TransformerEncoder raised an AttributeError."""
    torch.manual_seed(0)
    plain = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True), 2).eval()
    ours = fastbert.accelerate(copy.deepcopy(plain), impl="native")
    x = torch.randn(2, 5, 32)
    for model in (ours, plain):
        model.layers[1] = made(model.layers[0])
    torch.testing.assert_close(ours(x), plain(x), atol=1e-5, rtol=1e-4)
    assert list(ours.forward.warned) == ["a layer is in place of an accelerated one"]


class Louder(transformers.BertModel):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * 2.0
        return output


def by_update(model: nn.Module, cls: type) -> nn.Module:
    made = cls.__new__(cls)
    made.__dict__.update(model.__dict__)
    return made


def by_dict(model: nn.Module, cls: type) -> nn.Module:
    made = cls.__new__(cls)
    made.__dict__ = dict(model.__dict__)
    return made


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("make", [by_update, by_dict])
def test_another_class_with_the_same_attributes(make, hooked):
    """A model of a subclass was made of an accelerated one by copying its `__dict__`. The subclass's forward was left
    out, since the instance's came first."""
    plain = plain_model()
    ours = accelerated(plain, "exact")
    others = [make(model, Louder) for model in (ours, plain)]
    if hooked:
        for other in others:
            other._forward_hooks = type(other._forward_hooks)()
            other.register_forward_hook(lambda module, given, output: None)
    assert_same(*others, torch.ones_like(MASK))
    assert not fastbert.explain(others[0]).replaced
    fastbert.restore(others[0])
    assert "forward" not in vars(others[0])
    assert_same(*others, torch.ones_like(MASK))


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.inner = model
        self.forward = model.forward


def test_a_module_that_is_given_the_forward_of_another():
    """A wrapper whose `forward` is the accelerated one of its child calls the child, as in the original."""
    plain = plain_model()
    ours = accelerated(plain, "exact")
    wrapped = Wrapper(ours)
    assert_same(wrapped, Wrapper(plain), torch.ones_like(MASK))
    assert not ours.forward.warned
    fastbert.restore(wrapped)
    assert forward_of(ours) is None
    assert_same(wrapped, Wrapper(plain), torch.ones_like(MASK))


def test_restoring_keeps_the_hooks_of_accelerate():
    """A hook of the library accelerate keeps the `forward` that it found as `_old_forward`. `restore` took away the
    hook's `forward` instead of that one."""
    hooks = pytest.importorskip("accelerate.hooks", reason="makes the hooks")

    class Louder(hooks.ModelHook):
        def post_forward(self, module, output):
            output.last_hidden_state = output.last_hidden_state * 2.0
            return output

    plain = plain_model()
    ours = accelerated(plain, "exact")
    for model in (ours, plain):
        hooks.add_hook_to_module(model, Louder())
    assert_same(ours, plain, torch.ones_like(MASK))
    fastbert.restore(ours)
    assert not isinstance(vars(ours)["_old_forward"], Forward)
    assert_same(ours, plain, torch.ones_like(MASK))
    for model in (ours, plain):
        hooks.remove_hook_from_module(model)
    assert_same(ours, plain, torch.ones_like(MASK))


@pytest.mark.parametrize("duplicate", [None, copy.copy, copy.deepcopy])
def test_a_forward_that_is_made_a_method(duplicate):
    """The library accelerate does this in `unwrap_model(model, keep_fp32_wrapper=False)`. The module then came to the
    `forward` as the first argument, as if it were input_ids."""
    plain = plain_model()
    ours = accelerated(plain, "exact")
    ours.forward = types.MethodType(ours.forward, ours)
    if duplicate is not None:
        ours = duplicate(ours)
        with torch.no_grad():
            for model in (ours, plain):
                model.encoder.layer[0].output.dense.weight[3] *= 5.0
    else:
        assert isinstance(forward_of(ours), Forward)
    assert_same(ours, plain, torch.ones_like(MASK))
    fastbert.restore(ours)
    assert forward_of(ours) is None
    assert_same(ours, plain, torch.ones_like(MASK))


def test_code_that_changes_the_function_of_a_forward_is_refused():
    """The library adapters does this when it is put on a model with a head."""
    ours = accelerated(plain_model())
    assert not hasattr(ours.forward, "__func__")
    with pytest.raises(AttributeError, match=r"call fastbert\.restore\(model\) before"):
        ours.forward.__func__.__signature__ = None


class Forgetful(transformers.BertModel):
    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "notes"}


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_a_class_that_chooses_its_state(duplicate):
    plain = Forgetful(plain_model().config).eval()
    plain.notes = "anything"
    ours = accelerated(plain, "exact")
    ours.notes = plain.notes
    other = duplicate(ours)
    assert not hasattr(other, "notes")
    assert (forward_of(other) is None) == (duplicate is copy.copy)
    assert_same(other, plain, torch.ones_like(MASK))


def test_a_parametrized_model_is_not_copied():
    """torch refuses to copy a parametrized module by its state, and so does an accelerated one."""
    ours = accelerated(plain_model(), "exact")
    importlib.import_module("torch.nn.utils.parametrize").register_parametrization(
        ours.encoder.layer[0].output.dense, "weight", nn.Identity()
    )
    copy.deepcopy(ours)
    with pytest.raises(RuntimeError, match="parametrized"):
        copy.copy(ours.encoder.layer[0].output.dense)


def test_a_shallow_copy_of_a_sentence_transformer(build):  # noqa: F811
    """Its `encode` and `forward` were the original's: a shallow copy with other weights gave the same vectors."""
    plain = build()
    ours = fastbert.accelerate(copy.deepcopy(plain))
    vectors = []
    for model in (ours, plain):
        other = copy.copy(model)
        own_modules(other)
        with torch.no_grad():
            for p in other[0].parameters():
                p.mul_(1.1)
        for of in (other, model):
            vectors.append(torch.from_numpy(of.encode(TEXTS)))
            vectors.append(of(of.preprocess(TEXTS))["sentence_embedding"].detach())
    got, want = vectors[:4], vectors[4:]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(got[0], got[2], atol=1e-3)
