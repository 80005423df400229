"""Changes inside an accelerated encoder, one for each check of the drop-in: afterwards the results equal those of the
original with the same change."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn as nn

import fastbert
from dropin_changes import MASK, accelerated, assert_same, batch_of, hook_that_edits, plain_model

transformers = pytest.importorskip("transformers", reason="its models are changed here")
pytestmark = [pytest.mark.native, pytest.mark.filterwarnings("ignore")]

modeling = transformers.models.bert.modeling_bert


class Louder(modeling.BertOutput):
    def forward(self, *arguments):
        return super().forward(*arguments) * 1.5


class Always(nn.Dropout):
    def forward(self, x):
        return x * 0.5


def of_instance(model):
    part = model.encoder.layer[1].intermediate
    part.forward = lambda x: modeling.BertIntermediate.forward(part, x) + 1.0


def other_method_of_instance(model):
    layer = model.encoder.layer[1]
    layer.feed_forward_chunk = lambda x: modeling.BertLayer.feed_forward_chunk(layer, x) * 1.5


def of_subclass(model):
    model.encoder.layer[0].output.__class__ = Louder


def other_child(model):
    layer = model.encoder.layer[0]
    layer.output = copy.deepcopy(layer.output)
    of_subclass(model)


def one_more_layer(model):
    """The single call for all layers ignored it, until the lists of children were compared."""
    model.encoder.layer.append(copy.deepcopy(model.encoder.layer[0]))


def layers_in_another_order(model):
    layers = model.encoder.layer._modules
    layers["0"], layers["1"] = layers["1"], layers["0"]


def names_in_another_order(model):
    """The same children in the same order, with their names exchanged."""
    children = model.encoder.layer[0].attention.self._modules
    query, key, *rest = children.items()
    children.clear()
    children.update({key[0]: query[1], query[0]: key[1], **dict(rest)})
    model.encoder.layer[0].attention.self.key.weight.data *= 2.0


def other_activation(model):
    model.encoder.layer[1].intermediate.intermediate_act_fn = nn.Tanh()


def dropout_that_stays(model):
    model.encoder.layer[0].output.dropout = Always(0.1)


def scale(model):
    model.encoder.layer[1].attention.self.scaling = 0.9


def buffer(model):
    model.embeddings.position_ids += 3


def buffer_through_data(model):
    """torch's version counter does not see such a change."""
    model.embeddings.position_ids.data += 3


def other_buffer(model):
    model.embeddings.position_ids = model.embeddings.position_ids + 3


def wider_heads(model):
    """A layer's description kept the head width of the first look at the model."""
    for layer in model.encoder.layer:
        attention = layer.attention.self
        attention.num_attention_heads, attention.attention_head_size, attention.scaling = 1, 32, 32**-0.5


def function_of_an_activation(model):
    """transformers' GELU calls whatever its `act` is."""
    model.encoder.layer[1].intermediate.intermediate_act_fn.act = torch.tanh


class Backwards(nn.ModuleList):
    def __iter__(self):
        return reversed([*super().__iter__()])


def list_of_another_class(model):
    model.encoder.layer = Backwards(model.encoder.layer)


def hook_written_in(model):
    """Written without `register_forward_hook`, which counts the handles that it returns."""
    model.encoder.layer[0].attention.self.query._forward_hooks[-1] = lambda module, given, y: y * 2


def hook_in_another_dictionary(model):
    """A new, empty dictionary removes all hooks of a module; hooks that were added to it later were not seen."""
    model.encoder.layer[0].attention.self.query._forward_hooks = OrderedDict()
    model.encoder.layer[0].attention.self.query.register_forward_hook(lambda module, given, y: y * 2)


def children_in_another_dictionary(model):
    part = model.encoder.layer[1].intermediate
    dense = copy.deepcopy(part.dense)
    dense.weight.data *= 2
    part._modules = {**part._modules, "dense": dense}


def causal(model):
    model.encoder.layer[0].attention.self.is_causal = True
    model.encoder.layer[0].attention.self.register_forward_pre_hook(
        lambda module, given, named: (given, named | {"attention_mask": None}), with_kwargs=True
    )


CHANGES = [
    of_instance, other_method_of_instance, of_subclass, other_child, one_more_layer, layers_in_another_order,
    names_in_another_order, other_activation, dropout_that_stays, scale, buffer, hook_that_edits, hook_written_in,
    hook_in_another_dictionary, children_in_another_dictionary, causal, buffer_through_data, other_buffer, wider_heads,
    function_of_an_activation, list_of_another_class,
]  # fmt: skip


@pytest.mark.parametrize("called", [False, True], ids=["at_first", "after_a_call"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_encoder_gives_the_changed_numbers(change, called):
    plain = plain_model()
    ours, before = accelerated(plain), plain(**batch_of())[0]
    if called:
        assert_same(ours, plain)
    change(plain)
    change(ours)
    assert not torch.allclose(plain(**batch_of())[0][MASK], before[MASK], atol=1e-3), "the change changes nothing"
    assert_same(ours, plain)


@pytest.mark.parametrize("called", [False, True], ids=["at_first", "after_a_call"])
def test_a_dropout_that_drops_everything(called):
    """torch allows a probability of 1, where our operators' 1 / (1 - p) does not exist: training raised."""
    plain = plain_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ours = accelerated(plain)
    if called:
        assert_same(ours, plain)
    for model in (plain, ours):
        model.encoder.layer[0].output.dropout.p = 1.0
        model.train()
    assert_same(ours, plain)
    assert "it drops everything" in str(fastbert.explain(ours))


def test_an_activation_that_is_changed_in_place():
    """The activation's name was kept from the first look at the model, and its attribute was not checked again."""
    plain = plain_model()
    for layer in plain.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.GELU()
    ours, before = accelerated(plain), plain(**batch_of())[0]
    assert_same(ours, plain)
    for model in (plain, ours):
        for layer in model.encoder.layer:
            layer.intermediate.intermediate_act_fn.approximate = "tanh"
    assert not torch.allclose(plain(**batch_of())[0][MASK], before[MASK], atol=1e-4)
    assert_same(ours, plain)


class LayerDrop(nn.ModuleList):
    """Leaves out layers at random in training, each time that the list is iterated, as fairseq's list does."""

    def __iter__(self):
        for layer, drawn in zip(super().__iter__(), torch.rand(len(self)), strict=True):
            if not self.training or drawn > 0.5:
                yield layer


@pytest.mark.parametrize("called", [False, True], ids=["before", "after_a_call"])
def test_layers_left_out_at_random(called):
    """fastbert iterated the list more than once in a call, so other layers ran than were described, and torch's
    generator advanced further than in the original."""
    plain = plain_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ours = accelerated(plain) if called else copy.deepcopy(plain)
    if called:
        assert_same(ours, plain)
    for model in (plain, ours):
        model.encoder.layer = LayerDrop(model.encoder.layer)
        model.train()
    if not called:
        fastbert.accelerate(ours, impl="native")
    batch, seen = batch_of(), set()
    for seed in range(8):
        found = []
        for model in (plain, ours):
            torch.manual_seed(seed)
            found += [model(**batch)[0], torch.get_rng_state()]
        torch.testing.assert_close(found[2][MASK], found[0][MASK], atol=1e-5, rtol=1e-4)
        assert torch.equal(found[3], found[1])
        seen.add(round(found[0][0, 0, 0].item(), 3))
    assert len(seen) > 2, "nothing was left out"


def test_a_scripted_module_within_an_encoder_is_called():
    """The children of a scripted module are not in a dictionary: the second call raised SystemError."""
    plain = plain_model()
    part = plain.encoder.layer[1].intermediate
    part.dense = torch.jit.script(nn.Sequential(part.dense, nn.Tanh()))
    ours = accelerated(plain)
    for _ in range(2):
        assert_same(ours, plain)
    ours.encoder.layer[0].output.dense.register_forward_hook(lambda module, given, y: y * 2)
    plain.encoder.layer[0].output.dense.register_forward_hook(lambda module, given, y: y * 2)
    assert_same(ours, plain)
