"""The whole post-norm layer as one autograd node: against float64, against its separate operators, and its costs.

Small widths that reach every kernel: sequences of one token, of less than a block, and longer ones.
"""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastbert
from fastbert import BertConfig
from fastbert import functional as F
from fastbert.models.bert import BertLayer
from fastbert.packing import PackedBatch
from fastbert.stack import layer as stack
from fastbert.stack.shared import Pass
from fastbert.testing import assert_within_budget

WHY_NOT = F.why_not_triton(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
pytestmark = [pytest.mark.triton, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]
if WHY_NOT is None:
    from fastbert.kernels import encoder_layer as kernels

LENGTHS = [70, 5, 1]
CONFIG = BertConfig(
    hidden_size=32, num_attention_heads=2, intermediate_size=48, hidden_dropout_prob=0.2,
    attention_probs_dropout_prob=0.3,
)  # fmt: skip


def layer_of(dtype: torch.dtype, device: str, training: bool = True) -> BertLayer:
    layer = BertLayer(CONFIG, index=3)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.3) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.2)
    return layer.to(device, dtype).train(training)


def pass_of(device: str, impl: str = "triton", drops: bool = False, lengths: list[int] = LENGTHS) -> Pass:
    names = [3 * i + 5 for i in range(len(lengths))] if drops else None
    batch = PackedBatch.from_lists([[5] * n for n in lengths], sequence_ids=names, device=device)
    schedule = F.attention_schedule(batch.cu_seqlens, batch.total_tokens, impl)
    if not drops:
        return Pass(batch, schedule, impl)
    seed = torch.tensor([11], dtype=torch.int64, device=device)
    return Pass(batch, schedule, impl, seed=seed, row_ids=batch.row_ids())


def results(layer: BertLayer, x: torch.Tensor, dy: torch.Tensor, shared: Pass) -> dict[str, torch.Tensor]:
    """The output, and the gradients of x and of every parameter that requires one."""
    x = x.detach().requires_grad_()
    leaves = {"x": x} | {name: p for name, p in layer.named_parameters() if p.requires_grad}
    y = layer(x, shared)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y))
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def inputs(device: str, dtype: torch.dtype = torch.float64, lengths: list[int] = LENGTHS) -> list[torch.Tensor]:
    return [torch.randn(sum(lengths), CONFIG.hidden_size, dtype=dtype, device=device) for _ in range(2)]


@pytest.fixture
def one_by_one(monkeypatch):
    """one_by_one(f): the result of f() with every layer computed by its operators, with the kernels' own products."""

    def compose(f):
        with monkeypatch.context() as patch:
            patch.setattr(stack, "as_one_operator", lambda *_, **__: None)
            patch.setattr(
                F, "linear", lambda x, weight, bias=None, impl=None: torch.nn.functional.linear(x, weight, bias)
            )
            return f()

    return compose


@pytest.fixture
def nodes(monkeypatch):
    """A list with an entry for each layer that was computed as one operator."""
    seen, original = [], F.encoder_layer

    def watched(*args, **kwargs):
        y = original(*args, **kwargs)
        seen.extend([1] * (y is not None))
        return y

    monkeypatch.setattr(F, "encoder_layer", watched)
    return seen


# ---- numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("training", "drops"), [(True, True), (True, False), (False, False)])
def test_output_and_every_gradient(training, drops, dtype, device, nodes):
    layer, (x, dy) = layer_of(torch.float64, device, training), inputs(device)
    ours = copy.deepcopy(layer).to(dtype)
    truth = results(layer, x, dy, pass_of(device, "reference", drops))
    plain = results(copy.deepcopy(ours), x.to(dtype), dy, pass_of(device, "reference", drops))
    found = results(ours, x.to(dtype), dy, pass_of(device, "triton", drops))
    assert len(nodes) == 1
    for name, expected in truth.items():
        if not name.endswith("self.key.bias"):  # truly zero
            assert_within_budget(found[name], plain[name], expected, name)


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_bits_equal_those_of_the_separate_operators(training, drops, device, nodes, one_by_one):
    """The whole forward pass, and those gradients that come before two of them are summed inside a product."""
    layer, (x, dy) = layer_of(torch.float16, device, training), inputs(device, torch.float16)
    shared = pass_of(device, drops=drops)
    with torch.no_grad():
        assert torch.equal(layer(x, shared), one_by_one(lambda: layer(x, shared)))
    found, expected = results(layer, x, dy, shared), one_by_one(lambda: results(layer, x, dy, shared))
    assert len(nodes) == 2
    same = ("y", "doutput.dense", "doutput.LayerNorm", "dintermediate")
    assert sum(name.startswith(same) for name in found) == 7
    for name, value in expected.items():
        if name.startswith(same):
            assert torch.equal(found[name], value), name


WANTED = {
    "nothing_but_x": ("x",),
    "last_norm": ("output.LayerNorm.bias",),
    "last_bias": ("output.dense.bias",),
    "feed_forward": ("intermediate.dense.weight",),
    "first_norm": ("attention.output.LayerNorm.weight",),
    "first_bias": ("attention.output.dense.bias",),
    "some_of_qkv": ("attention.self.query.weight", "attention.self.value.bias"),
    "no_biases": ("x", *(name for name, p in BertLayer(CONFIG, 0).named_parameters() if p.dim() > 1)),
}
# number of products in the backward pass (the activation's included), of nine for all gradients
PRODUCTS = {
    "nothing_but_x": 4, "last_norm": 0, "last_bias": 0, "feed_forward": 2, "first_norm": 2, "first_bias": 2,
    "some_of_qkv": 4, "no_biases": 8,
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("wanted", WANTED)
def test_frozen_parameters_cost_nothing_and_change_no_bits(wanted, training, device, monkeypatch):
    layer, (x, dy) = layer_of(torch.float32, device, training), inputs(device, torch.float32)
    shared = pass_of(device)
    every = results(layer, x, dy, shared)
    for name, p in layer.named_parameters():
        p.requires_grad_(name in WANTED[wanted])
    x.requires_grad_("x" in WANTED[wanted])
    leaves = [x if name == "x" else layer.get_parameter(name) for name in WANTED[wanted]]
    y = layer(x, shared)

    products = []
    for name in ("matmul", "add_product", "down_backward"):
        original = getattr(kernels, name)
        counted = lambda *args, _original=original, **kwargs: products.append(1) or _original(*args, **kwargs)  # noqa: E731
        monkeypatch.setattr(kernels, name, counted)
    gradients = torch.autograd.grad(y, leaves, dy)
    assert len(products) == PRODUCTS[wanted]
    for name, gradient in zip(WANTED[wanted], gradients, strict=True):
        if name in ("attention.self.query.weight", "attention.self.value.weight"):
            torch.testing.assert_close(gradient, every[f"d{name}"])  # from a product of its own, with other tiles
        else:
            assert torch.equal(gradient, every[f"d{name}"]), name


def test_a_layer_with_pruned_heads(device, nodes, one_by_one):
    """q, k and v are narrower than x."""
    layer, (x, dy) = layer_of(torch.float32, device), inputs(device, torch.float32)
    for name in ("query", "key", "value"):
        linear = layer.attention["self"][name]
        linear.weight, linear.bias = (torch.nn.Parameter(p.detach()[:16].clone()) for p in (linear.weight, linear.bias))
    dense = layer.attention["output"]["dense"]
    dense.weight = torch.nn.Parameter(dense.weight.detach()[:, :16].clone())
    layer.heads = 1
    shared = pass_of(device, drops=True)
    found, expected = results(layer, x, dy, shared), one_by_one(lambda: results(layer, x, dy, shared))
    assert len(nodes) == 1
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_a_sequence_keeps_its_bits_in_any_batch(device):
    layer, (x, dy) = layer_of(torch.float16, device), inputs(device, torch.float16)
    with fastbert.batch_invariant():
        together = results(layer, x, dy, pass_of(device))
        for start, n in ((0, 70), (70, 5), (75, 1)):
            rows = slice(start, start + n)
            alone = results(layer, x[rows], dy[rows], pass_of(device, lengths=[n]))
            assert torch.equal(alone["y"], together["y"][rows])
            assert torch.equal(alone["dx"], together["dx"][rows])


def test_a_second_backward_pass_gives_the_same(device):
    """Buffers for sums belong to one pass: saved tensors are not written to."""
    layer, (x, dy) = layer_of(torch.float32, device), inputs(device, torch.float32)
    leaves = [x.requires_grad_(), *layer.parameters()]
    y = layer(x, pass_of(device))
    first, second = (torch.autograd.grad(y, leaves, dy, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_no_more_is_saved_than_by_the_separate_operators(device, one_by_one, saved_by):
    layer, (x, _) = layer_of(torch.float16, device), inputs(device, torch.float16)
    shared = pass_of(device, drops=True)

    def saved() -> int:
        y, storages = saved_by(lambda: layer(x.detach().requires_grad_(), shared))
        storages.pop(y.untyped_storage().data_ptr(), None)
        return sum(storages.values())

    assert 0 < saved() <= one_by_one(saved)


# ---- what torch does around it ---------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, device, nodes):
    layer, (x, dy) = layer_of(torch.float32, device), inputs(device, torch.float32)
    shared = pass_of(device, drops=True)
    expected = results(layer, x, dy, shared)
    x.requires_grad_()
    y = checkpoint(layer, x, shared, use_reentrant=reentrant)
    y.backward(dy)
    # with the other kind, torch leaves the second pass as soon as everything is saved again
    assert len(nodes) == (3 if reentrant else 2)
    assert torch.equal(y, expected["y"])
    assert torch.equal(x.grad, expected["dx"])
    assert all(torch.equal(p.grad, expected[f"d{name}"]) for name, p in layer.named_parameters())


def test_second_derivatives_are_refused(device):
    layer, (x, _) = layer_of(torch.float32, device), inputs(device, torch.float32)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(layer(x, pass_of(device)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_a_copy_has_weights_of_its_own(device):
    layer, (x, _) = layer_of(torch.float32, device, training=False), inputs(device, torch.float32)
    shared = pass_of(device)
    with torch.no_grad():
        before = layer(x, shared)
        other = copy.deepcopy(layer)
        assert torch.equal(other(x, shared), before)
        other.attention["self"]["key"].weight.mul_(2.0)
        assert not torch.equal(other(x, shared), before)
        assert torch.equal(layer(x, shared), before)
        layer.attention["self"]["key"].weight.mul_(2.0)
        assert torch.equal(layer(x, shared), other(x, shared))


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Mode(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_what_needs_the_separate_operators(device, nodes, one_by_one):
    """Hooks, modes and changed modules find the separate operators, with the same result."""
    layer, (x, _) = layer_of(torch.float32, device), inputs(device, torch.float32)
    shared = pass_of(device)
    expected = one_by_one(lambda: layer(x, shared))

    def run(of: BertLayer = layer, **of_call) -> torch.Tensor:
        y = of(x, shared)
        assert not nodes
        return y

    hook = layer.attention["self"].register_forward_hook(lambda *_: None)
    torch.testing.assert_close(run(), expected)
    hook.remove()
    with Mode():
        torch.testing.assert_close(run(), expected)
    torch.testing.assert_close(torch.func.functional_call(layer, dict(layer.named_parameters()), (x, shared)), expected)
    assert len(nodes) == 1  # swaps parameters without watching operators
    nodes.clear()
    with pytest.raises(RuntimeError, match="setup_context"):  # no operator supports these
        torch.func.vjp(lambda t: layer(t, shared), x)
    assert not nodes
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        run()
    changed = copy.deepcopy(layer)
    changed.intermediate["dense"].__class__ = Doubled
    run(changed)
    changed = copy.deepcopy(layer)
    torch.nn.utils.parametrize.register_parametrization(changed.output["dense"], "weight", torch.nn.Identity())
    torch.testing.assert_close(run(changed), expected)
    layer(x, shared)
    assert nodes


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"up": torch.zeros(48, 31)}, "a width that is not x's"),
        ({"out_norm": torch.zeros(31)}, "a norm of another width"),
        ({"down_bias": torch.zeros(33)}, "a bias of another width"),
        ({"key": torch.zeros(16, 32)}, "fewer keys than queries"),
        ({"key_bias": None}, "a bias for two of three"),
        ({"up": torch.zeros(32, 48).t()}, "a transposed weight"),
        ({"value": torch.zeros(32, 32, dtype=torch.float16)}, "another dtype"),
        ({"down_norm": None}, "no weight"),
        ({"activation": "geglu"}, "a gated activation"),
        ({"heads": 3}, "heads that do not divide the width"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_arguments_that_do_not_fit_are_refused(change, reason, device):
    tensors = [t.detach().cpu() for t in layer_of(torch.float32, "cpu").tensors()]
    weights, options = F.LayerWeights(*tensors), F.LayerOptions(heads=2)
    x = torch.zeros(3, 32)
    assert kernels.takes(x, weights, options)
    weights = weights._replace(**{name: t for name, t in change.items() if name in weights._fields})
    options = options._replace(**{name: value for name, value in change.items() if name in options._fields})
    assert not kernels.takes(x, weights, options)


def test_x_that_does_not_fit_is_refused():
    weights, options = F.LayerWeights(*layer_of(torch.float32, "cpu").tensors()), F.LayerOptions(heads=2)
    for x in (torch.zeros(0, 32), torch.zeros(2, 3, 32), torch.zeros(32, 3).t(), torch.zeros(3, 32).double()):
        assert not kernels.takes(x, weights, options)


# ---- accelerated models ----------------------------------------------------------------------------------

FAMILIES = {  # prefix in transformers -> sizes, and how many of its two layers run as one operator
    "Bert": ({"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}, 2),
    "DistilBert": ({"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}, 2),
    "MPNet": (
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48},
        0,
    ),  # bias
}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_an_accelerated_model(family, nodes, one_by_one):
    """Layers without a bias on their scores run as one operator, with every gradient of the original."""
    transformers = pytest.importorskip("transformers")
    sizes, count = FAMILIES[family]
    config = getattr(transformers, f"{family}Config")(vocab_size=60, attn_implementation="eager", **sizes)
    model = getattr(transformers, f"{family}Model")(config).eval()
    ids, mask = torch.randint(5, 60, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[1, 4:] = 0
    real = mask.bool()

    def gradients() -> list[torch.Tensor]:
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state[real]
        leaves = [p for name, p in model.named_parameters() if "pooler" not in name and "key.bias" not in name]
        return [hidden.detach(), *torch.autograd.grad(hidden, leaves, torch.ones_like(hidden).cumsum(1))]

    expected = gradients()
    fastbert.accelerate(model, impl="triton", padding="zero")
    for ours, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert len(nodes) == count
