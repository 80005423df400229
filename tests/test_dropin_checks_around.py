"""Changes around an accelerated encoder (library code, attention functions, hooks, config, inputs), and its copies."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn as nn

import fastbert
from dropin_changes import MASK, SIZES, accelerated, assert_same, batch_of, hook_that_edits, plain_model

transformers = pytest.importorskip("transformers", reason="its models are changed here")
pytestmark = [pytest.mark.native, pytest.mark.filterwarnings("ignore")]

modeling = transformers.models.bert.modeling_bert


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
    """Libraries for kernels and for profiling change classes and functions, not models."""
    plain = plain_model()
    ours, before, original = accelerated(plain), plain(**batch_of())[0], getattr(where, name)
    if called:
        assert_same(ours, plain)
    monkeypatch.setattr(where, name, lambda *given, **named: original(*given, **named) * 1.25)
    assert not torch.allclose(plain(**batch_of())[0][MASK], before[MASK], atol=1e-3)
    assert_same(ours, plain)


def louder(call):
    def called(*given, **named):
        y = call(*given, **named)
        return y + y.abs() * 0.5 if isinstance(y, torch.Tensor) else y

    return called


@pytest.mark.parametrize("called", [False, True], ids=["at_first", "after_a_call"])
@pytest.mark.parametrize(
    ("where", "name"),
    [
        (nn.Linear, "__call__"),
        (nn.LayerNorm, "__call__"),
        (nn.Embedding, "__call__"),
        (nn.Dropout, "__call__"),
        (transformers.activations.GELUActivation, "__call__"),
        (nn.Module, "_call_impl"),
        (nn.Linear, "_call_impl"),
        (torch, "matmul"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_calls_that_go_another_way(where, name, called, monkeypatch):
    """A class's `__call__` and the function behind it are ways to a module beside its forward. They were not looked at,
    nor was torch.matmul, by which eager attention multiplies: all numbers differed, without a word."""
    plain = plain_model(attn_implementation="eager")
    ours, before = accelerated(plain), plain(**batch_of())[0]
    if called:
        assert_same(ours, plain)
    monkeypatch.setattr(where, name, louder(getattr(where, name)), raising=False)
    assert not torch.allclose(plain(**batch_of())[0][MASK], before[MASK], atol=1e-3)
    assert_same(ours, plain)
    assert f"{name} was replaced" in str(fastbert.explain(ours))


@pytest.mark.parametrize("called", [False, True], ids=["at_first", "after_a_call"])
@pytest.mark.parametrize("name", ["_call_impl", "_compiled_call_impl"])
@pytest.mark.parametrize("path", ["encoder.layer.0.output.dense", "encoder.layer.1", "embeddings"])
def test_a_call_of_one_module_that_goes_another_way(path, name, called):
    """What `Module.compile` sets, somebody else may set too."""
    plain = plain_model()
    ours, before = accelerated(plain), plain(**batch_of())[0]
    if called:
        assert_same(ours, plain)
    for model in (ours, plain):
        module = model.get_submodule(path)
        vars(module)[name] = louder(module._call_impl)
    assert not torch.allclose(plain(**batch_of())[0][MASK], before[MASK], atol=1e-3)
    assert_same(ours, plain)
    assert f"the {name} of a" in str(fastbert.explain(ours))


@pytest.mark.parametrize("called", [False, True], ids=["at_first", "after_a_call"])
@pytest.mark.parametrize("how", ["in_place_of_sdpas", "within_it", "within_the_models"])
def test_a_mask_that_is_somebodys_own_is_made(how, called, monkeypatch):
    """transformers' table of functions that make masks is open to everybody, as that of attention is, and the functions
    of its file can be replaced one by one. Both were looked at only in the model's own file."""
    masks = pytest.importorskip("transformers.masking_utils", reason="this transformers makes masks in another way")
    if not hasattr(masks, "bidirectional_mask_function"):
        pytest.skip("this transformers makes masks in another way")
    plain = plain_model()
    ours, before = accelerated(plain), plain(**batch_of())[0]
    if called:
        assert_same(ours, plain)
    if how == "in_place_of_sdpas":
        functions = masks.ALL_MASK_ATTENTION_FUNCTIONS
        monkeypatch.setitem(functions._local_mapping, "sdpa", lambda *given, **named: MASK.new_ones(9, 9).tril())
    elif how == "within_it":
        original = masks.and_masks
        monkeypatch.setattr(masks, "and_masks", lambda *given: original(*given, lambda b, h, q, k: q >= k))
    else:
        monkeypatch.setattr(masks, "bidirectional_mask_function", lambda b, h, q, k: q >= k)
    assert not torch.allclose(plain(**batch_of())[0][MASK], before[MASK], atol=1e-3), "the change changes nothing"
    assert_same(ours, plain)
    assert ours.forward.warned


def louder_attention(*given, **named):
    o, weights = transformers.integrations.sdpa_attention.sdpa_attention_forward(*given, **named)
    return o * 1.5, weights


@pytest.mark.parametrize("called", [False, True], ids=["at_first", "after_a_call"])
@pytest.mark.parametrize("how", ["asked_for_by_name", "in_place_of_sdpa"])
def test_an_attention_function_of_the_user_runs(how, called, monkeypatch):
    """Users may write to transformers' table of attention functions, under new names and under existing ones."""
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
    assert "is not transformers' own" in str(fastbert.explain(ours))


def test_an_unknown_attention_name_raises_as_in_transformers():
    """For a name that is not in its table transformers raises an error, and so must an accelerated model."""
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


def test_hooks_see_what_they_see_in_the_original():
    """A hook on one module, and one on all modules: shapes, order and number of calls are the original's."""
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
    """These hooks are only called with gradients, so they are only looked for with gradients."""
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
        ("output_hidden_states", "some", "output_hidden_states names single states"),
    ],
)
@pytest.mark.parametrize("of", ["the_config", "another_config", "its_class"])
def test_a_config_that_changes_after_a_call(name, value, reason, of, monkeypatch):
    """What the config says is remembered until somebody writes to the config or replaces it."""
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
    """A subclass, as libraries use it that follow tensors through a program."""


@pytest.mark.parametrize("name", ["input_ids", "attention_mask"])
def test_a_subclass_of_tensor_runs_the_originals_code(name):
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
    """The C++ operators read addresses, which a subclass may lack: they raised in inference."""
    model, batch = fastbert.BertModel(fastbert.BertConfig(**SIZES), impl="native").eval(), batch_of()
    with torch.no_grad():
        want = model(**batch)[0]
        got = model(**batch | {name: batch[name].as_subclass(Marked)})[0]
    torch.testing.assert_close(got.as_subclass(torch.Tensor), want, atol=1e-5, rtol=1e-4)


def test_the_length_limit_follows_the_position_table():
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
    """A copy has its own weights and checks, and the model's padding mode. A saved folder holds the plain model."""
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
