"""A layer in training as one autograd node in C++ has the bits of its separate operators. Hooks, modes and changed
modules, which need the separate operators, still get them."""

import contextlib
import copy
import dataclasses

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastbert
from cpu_dtypes import needs_bf16
from fastbert import BertConfig
from fastbert import functional as F
from fastbert.kernels.cpu import encoder_layer as cpu_layer
from fastbert.models.bert import BertLayer
from fastbert.packing import PackedBatch
from fastbert.stack import layer as stack
from fastbert.stack.shared import Pass
from fastbert.testing import assert_within_budget

pytestmark = pytest.mark.cpp
FLOAT32 = pytest.param(torch.float32, "plain", id="float32")
AUTOCAST = pytest.param(torch.float32, "autocast", marks=needs_bf16, id="autocast")
KINDS = [FLOAT32, AUTOCAST, pytest.param(torch.bfloat16, "plain", marks=needs_bf16, id="bfloat16")]
# more than one block of a norm's rows, an odd number, no token, one token
LENGTHS = [70, 5, 0, 1]
CONFIG = BertConfig(
    hidden_size=64, num_attention_heads=2, intermediate_size=96, hidden_dropout_prob=0.2,
    attention_probs_dropout_prob=0.3,
)  # fmt: skip


def layer_of(dtype=torch.float32) -> BertLayer:
    layer = BertLayer(CONFIG, index=3)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.2) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.2)
    return layer.to(dtype).train()


def pass_of(impl="native", drops=True) -> Pass:
    names = [3 * i + 5 for i in range(len(LENGTHS))]
    batch = PackedBatch.from_lists([[5] * n for n in LENGTHS], sequence_ids=names)
    schedule = F.attention_schedule(batch.cu_seqlens, batch.total_tokens, impl)
    if not drops:
        return Pass(batch, schedule, impl)
    return Pass(batch, schedule, impl, seed=torch.tensor([11], dtype=torch.int64), row_ids=batch.row_ids())


def inputs(dtype=torch.float32) -> list[torch.Tensor]:
    return [torch.randn(sum(LENGTHS), CONFIG.hidden_size, dtype=torch.float64).to(dtype) for _ in range(2)]


def amid(kind):
    return torch.autocast("cpu", torch.bfloat16) if kind == "autocast" else contextlib.nullcontext()


def results(layer, x, dy, shared, kind="plain", want_x=True, first_only=False) -> dict[str, torch.Tensor]:
    """The output, and the gradients of x and of every parameter that requires one. With `first_only`, those of the
    first rows of the sequences that have tokens."""
    x = x.detach().requires_grad_(want_x)
    leaves = {"x": x} | dict(layer.named_parameters())
    leaves = {name: p for name, p in leaves.items() if p.requires_grad}
    with amid(kind):
        y = layer(x, shared, first_only)
        if first_only:
            y, dy = (t[torch.tensor(LENGTHS) > 0] for t in (y, dy[: len(LENGTHS)]))
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y))
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


@pytest.fixture
def one_by_one(monkeypatch):
    """one_by_one(f): the result of f() with every layer computed by its separate operators."""

    def compose(f):
        with monkeypatch.context() as patch:
            patch.setattr(stack, "as_one_operator", lambda *_, **__: None)
            return f()

    return compose


@pytest.fixture
def nodes(monkeypatch):
    """A list with an entry for each layer that was computed as one operator."""
    seen, original = [], cpu_layer.encoder_layers

    def watched(x, layers, *args, **kwargs):
        seen.extend(1 for _ in layers)
        return original(x, layers, *args, **kwargs)

    monkeypatch.setattr(cpu_layer, "encoder_layers", watched)
    return seen


# ---- numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_only", [False, True], ids=["all", "first"])
@pytest.mark.parametrize("drops", [True, False])
@pytest.mark.parametrize(("dtype", "kind"), KINDS)
def test_output_and_every_gradient(dtype, kind, drops, first_only, nodes):
    layer, (x, dy) = layer_of(torch.float64), inputs(torch.float64)
    ours = copy.deepcopy(layer).to(dtype)
    truth = results(layer, x, dy, pass_of("reference", drops), first_only=first_only)
    plain = results(copy.deepcopy(ours), x.to(dtype), dy, pass_of("reference", drops), kind, first_only=first_only)
    found = results(ours, x.to(dtype), dy, pass_of(drops=drops), kind, first_only=first_only)
    assert len(nodes) == 1
    for name, expected in truth.items():
        assert found[name].dtype == plain[name].dtype
        if not name.endswith("self.key.bias"):  # zero except for rounding
            assert_within_budget(found[name], plain[name], expected, name)


@pytest.mark.parametrize("drops", [True, False])
@pytest.mark.parametrize(("dtype", "kind"), KINDS)
def test_bits_equal_those_of_the_separate_operators(dtype, kind, drops, nodes, one_by_one):
    """Compares the gradients that are equal to the bit. In a bfloat16 layer these are the ones before two gradients are
    added, because the node adds them before rounding."""
    layer, (x, dy), shared = layer_of(dtype), inputs(dtype), pass_of(drops=drops)
    found = results(layer, x, dy, shared, kind)
    assert len(nodes) == 1
    expected = one_by_one(lambda: results(layer, x, dy, shared, kind))
    assert len(nodes) == 1
    if dtype == torch.bfloat16:
        expected = {name: t for name, t in expected.items() if name.startswith(("y", "doutput", "dintermediate"))}
    assert len(expected) == (7 if dtype == torch.bfloat16 else 18)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("drops", [True, False])
@pytest.mark.parametrize(("dtype", "kind"), KINDS)
def test_first_rows_have_the_bits_of_the_separate_operators(dtype, kind, drops, nodes, one_by_one):
    """Also the gradients of all parameters, in float32 and under autocast."""
    layer, (x, dy), shared = layer_of(dtype), inputs(dtype), pass_of(drops=drops)
    found = results(layer, x, dy, shared, kind, first_only=True)
    assert len(nodes) == 1
    expected = one_by_one(lambda: results(layer, x, dy, shared, kind, first_only=True))
    if dtype == torch.bfloat16:
        expected = {name: t for name, t in expected.items() if name.startswith(("y", "doutput", "dintermediate"))}
    for name, value in expected.items():
        if name != "dx":  # the separate operators round the gradients that come through k and v before adding them
            assert torch.equal(found[name], value), name
    torch.testing.assert_close(found["dx"], expected.get("dx", found["dx"]), rtol=2e-2, atol=2e-3)


def test_the_first_row_of_no_tokens_is_zero_and_has_no_gradient(nodes):
    layer, (x, _), shared = layer_of(), inputs(), pass_of()
    empty = LENGTHS.index(0)
    x.requires_grad_()
    y = layer(x, shared, True)
    assert len(nodes) == 1
    assert y.shape == (len(LENGTHS), CONFIG.hidden_size)
    assert (y[empty] == 0.0).all()
    assert (y[:empty] != 0.0).any(1).all()
    gradients = torch.autograd.grad(y[empty].sum(), [x, *layer.parameters()])
    assert all((g == 0.0).all() for g in gradients)


@pytest.mark.parametrize("zero", ["attention_probs_dropout_prob", "hidden_dropout_prob"])
def test_one_of_two_kinds_of_dropout(zero, nodes, one_by_one):
    layer, (x, dy), shared = layer_of(), inputs(), pass_of()
    layer.config = dataclasses.replace(CONFIG, **{zero: 0.0})
    found, expected = results(layer, x, dy, shared), one_by_one(lambda: results(layer, x, dy, shared))
    assert len(nodes) == 1
    assert all(torch.equal(found[name], value) for name, value in expected.items())


# what requires a gradient
WANTED = {
    "nothing_but_x": ("x",),
    "all_but_x": tuple(name for name, _ in BertLayer(CONFIG, 0).named_parameters()),
    "some_of_qkv": ("attention.self.query.weight", "attention.self.value.weight", "attention.self.value.bias"),
    "key_and_last": ("attention.self.key.weight", "output.dense.weight", "output.LayerNorm.bias"),
    "no_biases": ("x", *(name for name, p in BertLayer(CONFIG, 0).named_parameters() if p.dim() > 1)),
    "norms": ("x", "attention.output.LayerNorm.weight", "output.LayerNorm.bias"),
    "biases_alone": tuple(name for name, _ in BertLayer(CONFIG, 0).named_parameters() if name.endswith("bias")),
    "attention_output": ("attention.output.dense.weight", "attention.output.dense.bias"),
    "attention_norm": ("attention.output.LayerNorm.weight", "attention.output.LayerNorm.bias"),
    "feed_forward": ("intermediate.dense.weight", "intermediate.dense.bias"),
    "down": ("output.dense.weight",),
    "last_bias": ("output.dense.bias",),
    "last_norm": ("output.LayerNorm.weight", "output.LayerNorm.bias"),
}


@pytest.mark.parametrize("wanted", WANTED)
def test_frozen_parameters_change_no_bits(wanted, nodes):
    layer, (x, dy), shared = layer_of(), inputs(), pass_of()
    every = results(layer, x, dy, shared)
    nodes.clear()
    names = WANTED[wanted]
    for name, p in layer.named_parameters():
        p.requires_grad_(name in names)
    found = results(layer, x, dy, shared, want_x="x" in names)
    assert len(nodes) == 1
    assert found.keys() == {"y", *(f"d{name}" for name in names)}
    for name, gradient in found.items():
        assert torch.equal(gradient, every[name]), name


@pytest.mark.parametrize("name", ["output.dense.weight", "intermediate.dense.bias", "attention.output.dense.bias"])
def test_a_single_gradient_equals_the_one_among_all(name):
    """The backward pass ends after the feed-forward network, or after a norm, if nothing before requires a gradient."""
    layer, (x, dy), shared = layer_of(), inputs(), pass_of()
    every, y = results(layer, x, dy, shared), layer(x, shared)
    (gradient,) = torch.autograd.grad(y, layer.get_parameter(name), dy)
    assert torch.equal(gradient, every[f"d{name}"])


def test_gradients_of_frozen_parts_are_not_computed(monkeypatch):
    """If gradients end at the last norm, NaN in everything before it has no effect."""
    layer, (x, dy), shared = layer_of(), inputs(), pass_of()
    weights = [p.detach() for p in layer.tensors()]
    of = F.LayerWeights(*(w.requires_grad_(i >= 14) for i, w in enumerate(weights)))
    options = F.LayerOptions(2, fold=True)
    names = cpu_layer.Names(shared.batch.cu_seqlens, None, None)
    _, saved = cpu_layer.forward(x, [of], names, [options], 0, torch.float32)
    poisoned = F.LayerWeights(*(w if i >= 14 else torch.full_like(w, torch.nan) for i, w in enumerate(of)))._replace(
        down_bias=of.down_bias
    )
    wanted = [False] * 15 + [True] * 2
    gradients = cpu_layer.backward(dy, [x], [poisoned], saved, names, [options], 0, torch.float32, wanted)
    assert all(g is None for g in gradients[:15])
    assert all(g.isfinite().all() for g in gradients[15:])


@pytest.mark.parametrize("trained", [0, 1, 2])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_layers_before_the_first_gradient_are_not_gone_through(trained, name, monkeypatch):
    """Three layers in one node, of which one product is trained: its gradient is that of all gradients."""
    counts, call = [], cpu_layer.cpp.call

    def counted(function, dtype, *arguments):
        if function == "trained_layers_backward":
            counts.append(arguments[1])
        return call(function, dtype, *arguments)

    monkeypatch.setattr(cpu_layer.cpp, "call", counted)
    (x, dy), shared, options = inputs(), pass_of(), F.LayerOptions(2, fold=True)
    layers = [[p.detach().clone() for p in layer_of().tensors()] for _ in range(3)]
    for layer in layers:
        for p in layer:
            p += 0.1 * torch.randn_like(p)

    def gradients(*wanted):
        for t in wanted:
            t.requires_grad_()
        of = [F.LayerWeights(*layer) for layer in layers]
        y = F.encoder_layers(x.detach(), of, shared.batch.cu_seqlens, [options] * 3)
        return torch.autograd.grad(y, wanted, dy)

    of = 10 if name == "weight" else 11  # of the first product of the feed-forward network
    (alone,) = gradients(layers[trained][of])
    every = gradients(*(p for layer in layers for p in layer))
    assert counts == [3 - trained, 3]
    assert torch.equal(alone, every[trained * 16 + of])


def test_fewer_heads_than_the_width_holds(nodes, one_by_one):
    """With pruned heads, q, k and v are narrower than x."""
    layer, (x, dy), shared = layer_of(), inputs(), pass_of()
    for name in ("query", "key", "value"):
        linear = layer.attention["self"][name]
        linear.weight, linear.bias = (torch.nn.Parameter(p.detach()[:32].clone()) for p in (linear.weight, linear.bias))
    dense = layer.attention["output"]["dense"]
    dense.weight = torch.nn.Parameter(dense.weight.detach()[:, :32].clone())
    layer.heads = 1
    found, expected = results(layer, x, dy, shared), one_by_one(lambda: results(layer, x, dy, shared))
    assert len(nodes) == 1
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_threads_change_no_bits():
    layer, (x, dy), shared, threads = layer_of(), inputs(), pass_of(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results(layer, x, dy, shared)
        torch.set_num_threads(3)
        assert all(torch.equal(t, alone[name]) for name, t in results(layer, x, dy, shared).items())
    finally:
        torch.set_num_threads(threads)


# ---- within torch ----------------------------------------------------------------------------------------


def test_a_second_backward_pass_gives_the_same():
    """Buffers for sums belong to one pass, and the mask does not change with the caller's seed."""
    layer, (x, dy), shared = layer_of(), inputs(), pass_of()
    leaves = [x.requires_grad_(), *layer.parameters()]
    y = layer(x, shared)
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    shared.seed.add_(1)
    second = torch.autograd.grad(y, leaves, dy)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize(("dtype", "kind"), KINDS)
def test_no_more_is_saved_than_by_the_separate_operators(dtype, kind, nodes, one_by_one, saved_by):
    layer, (x, _), shared = layer_of(dtype), inputs(dtype), pass_of()
    known = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), shared.batch.cu_seqlens, shared.row_ids)}

    def saved() -> int:
        with amid(kind):
            y, storages = saved_by(lambda: layer(x.detach().requires_grad_(), shared))
        return sum(n for at, n in storages.items() if at not in known | {y.untyped_storage().data_ptr()})

    one, others = saved(), one_by_one(saved)
    assert len(nodes) == 1
    # the tolerance is whole cache lines, and names of sequences, for each of some ten tensors
    assert 0 < one <= others + 64 * 12


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, nodes):
    layer, (x, dy), shared = layer_of(), inputs(), pass_of()
    expected = results(layer, x, dy, shared)
    x.requires_grad_()
    y = checkpoint(layer, x, shared, use_reentrant=reentrant)
    y.backward(dy)
    assert len(nodes) == (2 if reentrant else 3)  # with the other kind, the first pass is without gradients
    torch.testing.assert_close(y, expected["y"])
    assert torch.equal(x.grad, expected["dx"])
    assert all(torch.equal(p.grad, expected[f"d{name}"]) for name, p in layer.named_parameters())


def test_gradients_accumulate_and_their_hooks_are_called(nodes):
    """A hook on each gradient, as DDP sets it, is called once for each. Gradients of two batches are added."""
    layer, (x, dy), shared = layer_of(), inputs(), pass_of()
    expected = results(layer, x, dy, shared)
    heard = []
    for name, p in layer.named_parameters():
        p.register_hook(lambda g, name=name: heard.append(name))
        p.register_post_accumulate_grad_hook(lambda p, name=name: heard.append(name))
    for _ in range(2):
        heard.clear()
        layer(x, shared).backward(dy)
        assert sorted(heard) == sorted(2 * [name for name, _ in layer.named_parameters()])
    for name, p in layer.named_parameters():
        assert torch.equal(p.grad, 2 * expected[f"d{name}"])


def test_no_gradient_shares_memory_with_another():
    layer, (x, dy) = layer_of(), inputs()
    layer(x, pass_of()).backward(dy)
    assert len({p.grad.untyped_storage().data_ptr() for p in layer.parameters()}) == 16


@pytest.mark.parametrize("first_only", [False, True], ids=["all", "first"])
@pytest.mark.parametrize(("dtype", "kind"), [FLOAT32, AUTOCAST])
def test_second_derivatives(dtype, kind, first_only, nodes):
    """They are those of the separate operators, with the same masks."""
    layer, (x, dy) = layer_of(dtype), inputs(dtype)

    def twice(layer, x, shared, kind=kind):
        x = x.detach().requires_grad_()
        with amid(kind):
            y = layer(x, shared, first_only)
        upstream = dy[: len(LENGTHS)] * (torch.tensor(LENGTHS) > 0)[:, None] if first_only else dy
        (dx,) = torch.autograd.grad(y, x, upstream.to(y), create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, layer.attention["self"]["query"].weight])

    found = twice(layer, x, pass_of())
    assert len(nodes) == 1
    plain, truth = (
        twice(layer, x, pass_of("reference")),
        twice(layer.double(), x.double(), pass_of("reference"), "plain"),
    )
    for ours, theirs, expected in zip(found, plain, truth, strict=True):
        assert_within_budget(ours, theirs, expected)


def test_many_gradients_at_once(nodes):
    layer, (x, dy), shared = layer_of(), inputs(), pass_of()
    y = layer(x.requires_grad_(), shared)
    both = torch.stack([dy, 2 * dy])
    (together,) = torch.autograd.grad(y, x, both, is_grads_batched=True, retain_graph=True)
    assert len(nodes) == 1
    for upstream, found in zip(both, together, strict=True):
        torch.testing.assert_close(found, torch.autograd.grad(y, x, upstream, retain_graph=True)[0])


def test_a_weight_changed_before_backward_is_an_error():
    layer, (x, dy) = layer_of(), inputs()
    y = layer(x, pass_of())
    with torch.no_grad():
        layer.intermediate["dense"].weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


class Mode(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_what_needs_the_separate_operators(nodes, one_by_one):
    layer, (x, _), shared = layer_of(), inputs(), pass_of()
    expected = one_by_one(lambda: layer(x, shared))

    def run(of: BertLayer = layer) -> None:
        torch.testing.assert_close(of(x, shared), expected)
        assert not nodes

    hook = layer.attention["self"]["query"].register_forward_hook(lambda *_: None)
    run()
    hook.remove()
    with Mode():
        run()
    with fastbert.batch_invariant():
        run()
    with torch.no_grad():
        run()
    changed = copy.deepcopy(layer)
    torch.nn.utils.parametrize.register_parametrization(changed.output["dense"], "weight", torch.nn.Identity())
    run(changed)
    changed = copy.deepcopy(layer)
    changed.output["dense"].bias = None
    changed(x, shared)
    with torch.autocast("cpu", torch.float16):
        layer(x, shared)
    layer.eval()(x, pass_of(drops=False))
    assert not nodes
    torch.testing.assert_close(
        torch.func.functional_call(layer.train(), dict(layer.named_parameters()), (x, shared)), expected
    )
    assert len(nodes) == 1  # swaps parameters without watching operators


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"up": torch.zeros(96, 32)}, "a width that is not x's"),
        ({"out_norm": torch.zeros(48)}, "a norm of another width"),
        ({"key": torch.zeros(32, 64)}, "fewer keys than queries"),
        ({"up": torch.zeros(64, 96).t()}, "a transposed weight"),
        ({"down_norm": torch.zeros(64).double()}, "another dtype"),
        ({"up_bias": None}, "no bias"),
        ({"activation": "silu"}, "an activation without a number"),
        ({"heads": 3}, "heads that do not divide the width"),
        ({"heads": 8}, "heads that are too narrow"),
        ({"fold": False}, "biases within the products"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_layers_that_the_cpp_cannot_take(change, reason):
    weights, options = F.LayerWeights(*layer_of().tensors()), F.LayerOptions(heads=2, fold=True)
    x = torch.zeros(3, 64)
    assert cpu_layer.takes(x, [weights], [options])
    weights = weights._replace(**{name: t for name, t in change.items() if name in weights._fields})
    options = options._replace(**{name: value for name, value in change.items() if name in options._fields})
    assert not cpu_layer.takes(x, [weights], [options])


def test_invalid_lengths_are_refused():
    layer, (x, _), shared = layer_of(), inputs(), pass_of(drops=False)
    shared.batch.cu_seqlens[1] = 77
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 76"):
        layer(x, shared)


# ---- models ----------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}


def test_heads_and_accelerated_models(nodes):
    """All layers of both, and a classifier's last one for first tokens."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=60, attn_implementation="eager", **SIZES)
    theirs = transformers.BertForSequenceClassification(config).train()
    ours = fastbert.BertForSequenceClassification(fastbert.BertConfig.from_dict(config.to_dict())).train()
    ids, mask = torch.randint(5, 60, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[1, 4:] = 0
    fastbert.accelerate(theirs, impl="native")
    ours.bert.impl = "native"
    for model in (theirs, ours):
        nodes.clear()
        model(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1])).loss.backward()
        assert len(nodes) == 3
        assert all(p.grad is not None for p in model.parameters())
