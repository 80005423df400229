"""Each check of the drop-in against a change that it is there for: the changed model's numbers are the original's."""

import copy
import io
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn as nn

import fastbert
from dropin_changes import MASK, SIZES, accelerated, assert_same, batch_of, plain_model

transformers = pytest.importorskip("transformers", reason="whose models are changed here")
pytestmark = [pytest.mark.native, pytest.mark.filterwarnings("ignore")]

modeling = transformers.models.bert.modeling_bert


# ---- changes inside an encoder ----------------------------------------------------------------------------


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
    """Walked past without a word where all layers run in one call, until the lists of children were compared."""
    model.encoder.layer.append(copy.deepcopy(model.encoder.layer[0]))


def layers_in_another_order(model):
    layers = model.encoder.layer._modules
    layers["0"], layers["1"] = layers["1"], layers["0"]


def names_in_another_order(model):
    """The same children in the same order, under each other's names."""
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
    """torch counts no such change."""
    model.embeddings.position_ids.data += 3


def other_buffer(model):
    model.embeddings.position_ids = model.embeddings.position_ids + 3


def wider_heads(model):
    """The description of a layer kept the width that a head had when the model was looked at."""
    for layer in model.encoder.layer:
        attention = layer.attention.self
        attention.num_attention_heads, attention.attention_head_size, attention.scaling = 1, 32, 32**-0.5


def function_of_an_activation(model):
    """transformers' GELU calls whatever lies in its `act`."""
    model.encoder.layer[1].intermediate.intermediate_act_fn.act = torch.tanh


class Backwards(nn.ModuleList):
    def __iter__(self):
        return reversed([*super().__iter__()])


def list_of_somebodys_own(model):
    model.encoder.layer = Backwards(model.encoder.layer)


def hook_that_edits(model):
    model.encoder.layer[0].attention.self.query.register_forward_hook(lambda module, given, y: y * 2)


def hook_written_in(model):
    """Not by `register_forward_hook`, which counts the handles that it gives out."""
    model.encoder.layer[0].attention.self.query._forward_hooks[-1] = lambda module, given, y: y * 2


def hook_in_another_dictionary(model):
    """An empty dictionary takes all hooks of a module away at once; hooks that came into it later were not seen."""
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
    function_of_an_activation, list_of_somebodys_own,
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
    """torch takes a probability of 1, whose 1 / (1 - p) the operators cannot have: ValueError in training."""
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
    """Its name was kept from the first look at the model, and its attribute was not watched."""
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
    """Leaves layers out at random in training, each time the list is iterated, as fairseq's list does."""

    def __iter__(self):
        for layer, drawn in zip(super().__iter__(), torch.rand(len(self)), strict=True):
            if not self.training or drawn > 0.5:
                yield layer


@pytest.mark.parametrize("called", [False, True], ids=["before", "after_a_call"])
def test_layers_left_out_at_random(called):
    """The list was iterated over more than once a call, so that other layers ran than were described, and torch's
    generator went on further than in the original."""
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
    """Its table of children is no dictionary: SystemError in the second call."""
    plain = plain_model()
    part = plain.encoder.layer[1].intermediate
    part.dense = torch.jit.script(nn.Sequential(part.dense, nn.Tanh()))
    ours = accelerated(plain)
    for _ in range(2):
        assert_same(ours, plain)
    ours.encoder.layer[0].output.dense.register_forward_hook(lambda module, given, y: y * 2)
    plain.encoder.layer[0].output.dense.register_forward_hook(lambda module, given, y: y * 2)
    assert_same(ours, plain)


@pytest.mark.parametrize("called", [False, True], ids=["at_first", "after_a_call"])
@pytest.mark.parametrize(
    ("where", "name"),
    [
        (modeling.BertSelfOutput, "forward"),
        (nn.LayerNorm, "forward"),
        (nn.functional, "linear"),
        (nn.functional, "scaled_dot_product_attention"),
    ],
    ids=["of_a_layer", "of_torch", "function", "attention"],
)
def test_code_that_is_replaced_for_all_models_runs(where, name, called, monkeypatch):
    """Libraries of kernels and of profiling change classes and functions, not models."""
    plain = plain_model()
    ours, before, original = accelerated(plain), plain(**batch_of())[0], getattr(where, name)
    if called:
        assert_same(ours, plain)
    monkeypatch.setattr(where, name, lambda *given, **named: original(*given, **named) * 1.25)
    assert not torch.allclose(plain(**batch_of())[0][MASK], before[MASK], atol=1e-3)
    assert_same(ours, plain)


def louder_attention(*given, **named):
    o, weights = transformers.integrations.sdpa_attention.sdpa_attention_forward(*given, **named)
    return o * 1.5, weights


@pytest.mark.parametrize("called", [False, True], ids=["at_first", "after_a_call"])
@pytest.mark.parametrize("how", ["asked_for_by_name", "in_place_of_sdpa"])
def test_attention_that_is_somebodys_own_runs(how, called, monkeypatch):
    """transformers' table of attention functions is there to be written to, under new names and under its own."""
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    plain = plain_model()
    ours, before = accelerated(plain), plain(**batch_of())[0]
    if called:
        assert_same(ours, plain)
    name = "louder" if how == "asked_for_by_name" else plain.config._attn_implementation
    monkeypatch.setitem(functions._local_mapping, name, louder_attention)
    if how == "asked_for_by_name":
        for model in (ours, plain):
            model.config._attn_implementation = name
    batch = batch_of(torch.ones_like(MASK))
    assert not torch.allclose(plain(**batch)[0][MASK], before[MASK], atol=1e-3), "the change changes nothing"
    assert_same(ours, plain, **batch)
    assert "attention is somebody's own" in str(fastbert.explain(ours))


def test_attention_of_a_name_that_nobody_has_is_the_originals_error():
    """A name in the config that transformers' table does not hold: transformers raises, and must go on to."""
    plain = plain_model()
    ours = accelerated(plain)
    assert_same(ours, plain)
    for model in (ours, plain):
        model.config._attn_implementation = "of_nobody"
    with pytest.raises(Exception, match="of_nobody") as error:
        plain(**batch_of())
    with pytest.raises(type(error.value), match="of_nobody"):
        ours(**batch_of())
    assert "its attention is of_nobody" in str(fastbert.explain(ours))


def test_listeners_see_what_the_original_shows_them():
    """A hook on one module, and one on all: shapes, order and number of calls are the original's."""
    plain = plain_model()
    ours = accelerated(plain)
    assert_same(ours, plain)
    for register in (
        lambda model, hook: model.encoder.layer[1].output.register_forward_hook(hook),
        lambda model, hook: nn.modules.module.register_module_forward_hook(hook),
    ):
        seen = []
        for model in (ours, plain):
            shapes = []
            handle = register(
                model,
                lambda module, given, y, to=shapes: to.append(
                    (type(module).__name__, given[0].shape if given else None)
                ),
            )
            model(**batch_of())
            handle.remove()
            seen.append(shapes)
        assert seen[0]
        assert seen[0] == seen[1]


@pytest.mark.parametrize("called", [False, True], ids=["at_first", "after_a_call"])
@pytest.mark.parametrize("written", [False, True], ids=["registered", "written_in"])
def test_a_backward_hook_changes_gradients(called, written):
    """Only looked for with gradients, because it is never called without them."""
    plain = plain_model()
    ours = accelerated(plain)
    if called:
        assert_same(ours, plain)
    grads = []
    for model in (ours, plain):
        part = model.encoder.layer[0].output.dense
        double = lambda module, dx, dy: tuple(2 * d for d in dx)  # noqa: E731
        if written:
            part._is_full_backward_hook, part._backward_hooks[-1] = True, double
        else:
            part.register_full_backward_hook(double)
        with torch.no_grad():
            model(**batch_of())
        y = model(**batch_of())[0][MASK]
        torch.manual_seed(2)
        y.backward(torch.randn_like(y))
        grads.append(model.embeddings.word_embeddings.weight.grad)
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("is_decoder", True, "the model is a decoder"),
        ("is_causal", True, "the model is a decoder"),
        ("_output_attentions", True, "the config asks for output_attentions"),
        ("output_hidden_states", "some", "single hidden states were asked for"),
    ],
)
@pytest.mark.parametrize("of", ["the_config", "another_config", "its_class"])
def test_a_config_that_changes_after_a_call(name, value, reason, of, monkeypatch):
    """What the config says is kept from the close look on, as long as nobody writes to it, or puts another in place."""
    ours = accelerated(plain_model(attn_implementation="eager"))
    given = ours.forward.named((), batch_of())
    assert ours.forward.why_not(given)[0] is None
    if of == "another_config":
        ours.config = copy.deepcopy(ours.config)
    if of == "its_class":
        vars(ours.config).pop(name, None)
        assert ours.forward.why_not(given)[0] is None
        monkeypatch.setattr(type(ours.config), name, value, raising=False)
    else:
        vars(ours.config)[name] = value  # transformers refuses some of these values
    assert ours.forward.why_not(given)[0] == reason


class Marked(torch.Tensor):
    """As libraries that follow tensors through a program have them."""


@pytest.mark.parametrize("name", ["input_ids", "attention_mask"])
def test_a_subclass_of_tensor_is_the_originals(name):
    plain = plain_model()
    ours, batch = accelerated(plain), batch_of()
    batch[name] = batch[name].as_subclass(Marked)
    with torch.no_grad():
        got, want = ours(**batch)[0], plain(**batch)[0]
    assert type(got) is type(want)
    assert torch.equal(got, want)
    assert ours.forward.warned == {f"{name} is a Marked": 1}


@pytest.mark.parametrize("name", ["input_ids", "attention_mask"])
def test_our_own_model_takes_a_subclass_of_tensor(name):
    """The C++ operators read addresses, which a subclass need not have: they raised, without gradients."""
    model, batch = fastbert.BertModel(fastbert.BertConfig(**SIZES), impl="native").eval(), batch_of()
    with torch.no_grad():
        want = model(**batch)[0]
        got = model(**batch | {name: batch[name].as_subclass(Marked)})[0]
    torch.testing.assert_close(got.as_subclass(torch.Tensor), want, atol=1e-5, rtol=1e-4)


def test_as_many_tokens_as_the_position_table_holds_now():
    ours = accelerated(plain_model())
    given = {"input_ids": torch.ones(1, 41, dtype=torch.int64)}
    assert "position table" in ours.forward.why_not(given)[0]
    ours.embeddings.position_embeddings = nn.Embedding(80, 32)
    assert ours.forward.why_not(given)[0] is None
    ours.embeddings.position_embeddings.num_embeddings = 20
    assert "position table" in ours.forward.why_not(given)[0]


# ---- copies -----------------------------------------------------------------------------------------------


def pickled(model, folder):
    return pickle.loads(pickle.dumps(model))


def saved(model, folder):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def save_pretrained(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


@pytest.mark.parametrize("called", [False, True], ids=["at_first", "after_a_call"])
@pytest.mark.parametrize("padding", ["auto", "exact", "zero"])
@pytest.mark.parametrize(
    "copied", [lambda model, folder: copy.deepcopy(model), pickled, saved, save_pretrained],
    ids=["deepcopy", "pickle", "torch.save", "save_pretrained"],
)  # fmt: skip
def test_copies_of_an_accelerated_model(copied, padding, called, tmp_path):
    """A copy has weights and checks of its own, and pads as the model did; a folder holds the plain model."""
    plain = plain_model("ForTokenClassification")
    ours = accelerated(plain, padding)
    if called:
        assert_same(ours, plain)
    other = copied(ours, tmp_path).eval()
    assert_same(other, plain)
    rows = MASK if padding == "zero" else torch.ones_like(MASK)
    assert_same(other, plain, rows)
    assert other.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        for model in (other, plain):
            model.bert.encoder.layer[0].output.dense.bias += 1.0
        hook_that_edits(other.bert)
    assert not torch.allclose(other(**batch_of())[0], plain(**batch_of())[0], atol=1e-3)
    assert_same(ours, plain_model("ForTokenClassification"))
