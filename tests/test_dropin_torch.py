"""torch's own transformer modules, accelerated, beside themselves: float64 as truth, twice their error as budget."""

import copy
import pickle
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastbert
from fastbert.kernels.cpu import operators as cpp
from fastbert.testing import assert_within_budget, relative_rms

pytestmark = pytest.mark.native

WIDTH, LENGTHS = 9, torch.tensor([9, 4, 1])
RIGHT = torch.arange(WIDTH) >= LENGTHS[:, None]  # True is padding, as torch has it
LEFT = torch.arange(WIDTH) < WIDTH - LENGTHS[:, None]
BAND = (torch.arange(WIDTH)[:, None] - torch.arange(WIDTH)).abs() > 3  # True is forbidden
SCATTERED = torch.arange(WIDTH)[:, None] * 5 % 7 > torch.arange(WIDTH) * 3 % 8  # not a function of the distance
SCATTERED.fill_diagonal_(False)
SLOPE = -0.3 * (torch.arange(WIDTH)[:, None] - torch.arange(WIDTH)).abs().float()

LAYERS = {
    "post_norm": {},
    "pre_norm": {"norm_first": True},
    "gelu": {"activation": "gelu"},
    "activation_unknown": {"activation": nn.Tanh()},
    "no_bias": {"bias": False},
    "sequence_first": {"batch_first": False},
}
MASKS = {
    "none": {},
    "right": {"src_key_padding_mask": RIGHT},
    "left": {"src_key_padding_mask": LEFT},
    "float_padding": {"src_key_padding_mask": torch.zeros(3, WIDTH).masked_fill(RIGHT, float("-inf"))},
    "src_mask": {"mask": BAND},
    "src_mask_float": {"mask": SLOPE},
    "src_mask_minus_inf": {"mask": torch.zeros(WIDTH, WIDTH).masked_fill(BAND, float("-inf"))},
    "src_mask_and_padding": {"mask": BAND, "src_key_padding_mask": RIGHT},
    "src_mask_and_left_padding": {"mask": SCATTERED, "src_key_padding_mask": LEFT},
    "src_mask_of_each_head": {"mask": torch.stack([BAND.roll(i, 0) & ~torch.eye(WIDTH).bool() for i in range(6)])},
}


def encoder(depth: int = 2, norm: bool = True, inner: int = 48, **options) -> nn.TransformerEncoder:
    options = {"batch_first": True, "dropout": 0.0, **options}
    layer = nn.TransformerEncoderLayer(32, 2, inner, **options)
    model = nn.TransformerEncoder(
        layer, depth, nn.LayerNorm(32) if norm else None, enable_nested_tensor=not options.get("norm_first")
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def three(model: nn.Module, impl: str = "native") -> tuple:
    """(accelerated, plain, truth) with one set of weights."""
    return fastbert.accelerate(copy.deepcopy(model), impl=impl), model, copy.deepcopy(model).double()


def in_float64(options: dict) -> dict:
    return {name: t.double() if t.is_floating_point() else t for name, t in options.items()}


def padding_of(options: dict) -> torch.Tensor:
    padding = options.get("src_key_padding_mask", torch.zeros(3, WIDTH, dtype=torch.bool))
    return padding if padding.dtype == torch.bool else padding.isinf()


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize(("impl", "options"), [*(("native", o) for o in LAYERS.values()), ("triton", {})],
                         ids=[*LAYERS, "triton"])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*nested")
def test_outputs_and_every_gradient(impl, options, masks):
    ours, plain, truth = three(encoder(**options), impl)
    real = ~padding_of(masks)
    x, dy = torch.randn(3, WIDTH, 32), torch.randn(3, WIDTH, 32)
    grads, outputs = [], []
    for model in (ours, plain, truth):
        double = model is truth
        model.train()
        src = x.to(torch.float64 if double else torch.float32).requires_grad_()
        second = not options.get("batch_first", True)
        y = model(src.transpose(0, 1) if second else src, **(in_float64(masks) if double else masks))
        assert y.is_contiguous()
        y = y.transpose(0, 1) if second else y
        outputs.append(y[real].detach())
        grads.append(torch.autograd.grad((y[real] * dy[real].to(y.dtype)).sum(), [src, *model.parameters()]))
    assert_within_budget(*outputs)
    assert_within_budget(*(torch.cat([g.flatten() for g in of]) for of in grads), name="all gradients")
    names = ["src", *(name for name, _ in ours.named_parameters())]
    for name, mine, theirs, exact in zip(names, *grads, strict=True):
        assert relative_rms(mine, exact) <= 4 * relative_rms(theirs, exact) + 1e-6, name


@pytest.mark.filterwarnings("ignore:.*nested")
def test_padding_comes_out_as_from_torchs_inference_path():
    for norm in (True, False):
        ours, plain, _ = three(encoder(norm=norm).eval())
        x = torch.randn(3, WIDTH, 32)
        with torch.no_grad():
            expected = plain(x, src_key_padding_mask=RIGHT)
            torch.testing.assert_close(ours(x, src_key_padding_mask=RIGHT), expected, atol=1e-5, rtol=1e-4)


def test_unbatched():
    ours, plain, truth = three(encoder().eval())
    x, padding = torch.randn(WIDTH, 32), RIGHT[1]
    with torch.no_grad():
        outputs = [m(x.to(t), src_key_padding_mask=padding)[~padding]
                   for m, t in ((ours, x.dtype), (plain, x.dtype), (truth, torch.float64))]  # fmt: skip
    assert_within_budget(*outputs)


@pytest.mark.parametrize(
    "masks", [{}, {"src_key_padding_mask": RIGHT}, {"src_mask": BAND}], ids=["none", "pad", "mask"]
)
def test_a_layer_by_itself(masks):
    ours, plain, truth = three(encoder().layers[0].train())
    x, real = torch.randn(3, WIDTH, 32), ~masks.get("src_key_padding_mask", torch.zeros(3, WIDTH).bool())
    assert_within_budget(*(m(x.to(m.linear1.weight.dtype), **masks)[real] for m in (ours, plain, truth)))


ATTENTION = {
    "self": {},
    "cross": {"cross": True},
    "padding": {"cross": True, "key_padding_mask": torch.arange(6) >= torch.tensor([6, 2, 4])[:, None]},
    "other_widths": {"cross": True, "kdim": 16, "vdim": 16},
    "sequence_first": {"cross": True, "batch_first": False},
    "bool_mask": {"attn_mask": BAND},
    "float_mask": {"attn_mask": SLOPE},
}


@pytest.mark.parametrize("options", ATTENTION.values(), ids=ATTENTION.keys())
def test_multi_head_attention(options):
    options = dict(options)
    cross, masks = options.pop("cross", False), {k: options.pop(k) for k in ("key_padding_mask", "attn_mask")
                                                 if k in options}  # fmt: skip
    module = nn.MultiheadAttention(32, 4, **{"batch_first": True, **options})
    nn.init.normal_(module.out_proj.bias)
    models = three(module)
    query, memory = torch.randn(3, WIDTH, 32), torch.randn(3, 6, options.get("kdim", 32))
    outputs = []
    for model in models:
        dtype = model.out_proj.weight.dtype
        q, k = query.to(dtype), memory.to(dtype) if cross else None
        if not module.batch_first:
            q, k = q.transpose(0, 1), k.transpose(0, 1)
        k = q if k is None else k
        given = in_float64(masks) if dtype == torch.float64 else masks
        y, weights = model(q, k, k, need_weights=False, **given)
        assert weights is None
        outputs.append(y)
    assert outputs[0].shape == outputs[1].shape
    assert_within_budget(*outputs)


def test_attention_weights_come_from_torch():
    ours, plain, _ = three(nn.MultiheadAttention(32, 4, batch_first=True).eval())
    x = torch.randn(2, 5, 32)
    with pytest.warns(UserWarning, match="need_weights"):
        y, weights = ours(x, x, x)
    expected = plain(x, x, x)
    assert torch.equal(y, expected[0])
    assert torch.equal(weights, expected[1])


def test_causal_is_left_to_torch():
    ours, plain, _ = three(encoder().eval())
    x, causal = torch.randn(2, 5, 32), nn.Transformer.generate_square_subsequent_mask(5)
    with pytest.warns(UserWarning, match="is_causal=True"):
        y = ours(x, mask=causal, is_causal=True)
    assert torch.equal(y, plain(x, mask=causal, is_causal=True))
    assert "is_causal" in str(fastbert.explain(ours))


def test_the_hint_of_attention_is_left_to_torch():
    """torch's own test of training with is_causal turned red: told is_causal, torch does not look at the mask, which
    there did not even fit, and ours did."""
    ours, plain, _ = three(nn.MultiheadAttention(32, 4).eval())
    x, other = torch.randn(5, 2, 32), torch.zeros(5, 5)
    with pytest.warns(UserWarning, match="is_causal=True"):
        y, _ = ours(x, x, x, attn_mask=other, need_weights=False, is_causal=True)
    assert torch.equal(y, plain(x, x, x, attn_mask=other, need_weights=False, is_causal=True)[0])


KEYS = torch.zeros(2, 5, 32)


@pytest.mark.filterwarnings("ignore:.*so fastbert leaves")
@pytest.mark.parametrize(
    "wrong",
    [
        {"key": KEYS[0]},
        {"value": KEYS[0]},
        {"value": KEYS[:, :4]},
        {"key": KEYS[:1], "value": KEYS[:1]},
        {"key_padding_mask": torch.zeros(5, dtype=torch.bool)},
        {"key_padding_mask": torch.zeros(1, 5, dtype=torch.bool)},
        {"attn_mask": torch.zeros(5, dtype=torch.bool)},
        {"attn_mask": torch.zeros(1, 5, dtype=torch.bool)},
        {"attn_mask": torch.zeros(4, 5, 5, dtype=torch.bool)},
    ],
    ids=lambda wrong: "_".join((*wrong, *(str(tuple(t.shape)) for t in wrong.values()))),
)
def test_arguments_that_do_not_fit_have_torchs_own_error(wrong):
    """torch's own test of invalid shapes turned red: two of the errors came from a product, not from torch's checks,
    and masks of one row were broadcast, where torch refuses them."""
    ours, plain, _ = three(nn.MultiheadAttention(32, 4, batch_first=True).eval())
    given = {"query": torch.zeros(2, 5, 32), "key": KEYS, "value": KEYS, "need_weights": False} | wrong
    with pytest.raises((AssertionError, RuntimeError)) as expected:
        plain(**given)
    with pytest.raises(type(expected.value), match=re.escape(str(expected.value))):
        ours(**given)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "wrong", [{"mask": BAND[:1]}, {"src_key_padding_mask": RIGHT[:1]}], ids=lambda wrong: next(iter(wrong))
)
def test_masks_of_an_encoder_that_do_not_fit_have_torchs_own_error(wrong):
    ours, plain, _ = three(encoder().train())
    with pytest.raises((AssertionError, RuntimeError)) as expected:
        plain(torch.zeros(3, WIDTH, 32), **wrong)
    with pytest.raises(type(expected.value), match=re.escape(str(expected.value))):
        ours(torch.zeros(3, WIDTH, 32), **wrong)


def test_scripting_says_what_to_do():
    with pytest.raises(AttributeError, match=r"fastbert\.restore"):
        torch.jit.script(fastbert.accelerate(encoder()))


@pytest.mark.filterwarnings("ignore:.*nested")
def test_a_sequence_without_tokens_is_left_to_torch():
    ours, _, _ = three(encoder().train())
    padding = RIGHT.clone()
    padding[1] = True
    with pytest.warns(UserWarning, match="a sequence has no token"):
        ours(torch.randn(3, WIDTH, 32), src_key_padding_mask=padding)


@pytest.mark.parametrize("shape", [(0, WIDTH, 32), (3, 0, 32)], ids=["no_sequences", "no_tokens"])
def test_a_batch_of_nothing_gives_every_parameter_a_gradient(shape):
    """As torch's own tests ask: zeros, where the projections of query, key and value had none."""
    ours = fastbert.accelerate(encoder().double(), impl="native")  # float64, which no C++ takes
    x = torch.empty(shape, dtype=torch.float64, requires_grad=True)
    y = ours(x)
    assert y.shape == shape
    y.backward(torch.empty_like(y))
    assert torch.equal(x.grad, torch.zeros_like(x))
    for name, p in ours.named_parameters():
        assert torch.equal(p.grad, torch.zeros_like(p)), name


def test_a_hook_inside_is_heard():
    ours, _, _ = three(encoder().eval())
    heard = []
    ours.layers[1].norm1.register_forward_hook(lambda *_: heard.append(1))
    ours.layers[0].linear1.register_forward_hook(lambda *_: heard.append(2))
    with pytest.warns(UserWarning, match="LayerNorm has a hook"):
        ours(torch.randn(2, 5, 32))
    assert sorted(heard) == [1, 2]


@pytest.mark.filterwarnings("ignore:.*so fastbert leaves")
def test_pruned_attention_is_computed_anew():
    """Pruning hangs a hook on attention that makes its weight anew before each call. Where the hook did not run, the
    weight stayed that of the first step, and the second backward pass failed."""
    plain = encoder()
    for layer in plain.layers:
        prune.l1_unstructured(layer.self_attn, "in_proj_weight", 0.5)
    ours = fastbert.accelerate(plain, impl="native")
    optimizer = torch.optim.SGD(ours.parameters(), 0.1)
    x = torch.randn(2, 5, 32)
    for _ in range(2):
        ours(x).square().sum().backward()
        optimizer.step()
    y = ours(x)
    torch.testing.assert_close(y, fastbert.restore(ours)(x))


@pytest.mark.filterwarnings("ignore:.*so fastbert leaves")
def test_attention_alone_in_training_mode():
    """torch's inference path drops nothing then, and its other path does."""
    ours = fastbert.accelerate(encoder(dropout=0.5).eval(), impl="native")
    ours.layers[0].self_attn.train()
    x = torch.randn(2, 5, 32)
    assert not torch.equal(ours(x), ours(x))
    with torch.no_grad():
        assert torch.equal(ours(x), ours(x))


def test_restore_copy_and_pickle():
    plain = encoder().eval()
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        before, keys = plain(x), list(plain.state_dict())
        ours = fastbert.accelerate(plain, impl="native")
        assert list(ours.state_dict()) == keys
        y = ours(x)
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(other(x), y)
            assert other.forward.module is other
            assert other.layers[1].forward.module is other.layers[1]
        assert torch.equal(fastbert.restore(ours)(x), before)
    assert not any("forward" in m.__dict__ for m in plain.modules())


def test_dropout_drops_and_repeats():
    ours = fastbert.accelerate(encoder(dropout=0.3), impl="native").train()
    x = torch.randn(3, WIDTH, 32)

    def run(seed):
        torch.manual_seed(seed)
        return ours(x, src_key_padding_mask=RIGHT)

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_dropout_of_an_encoder_that_evaluates():
    ours = fastbert.accelerate(encoder(dropout=0.3).eval(), impl="native")
    x = torch.randn(3, WIDTH, 32)
    for module in (ours, ours.layers[1]):
        before = module(x)
        ours.layers[1].dropout1.train()
        assert not torch.equal(module(x), before)
        ours.eval()
        assert torch.equal(module(x), before)


def test_explain():
    ours = fastbert.accelerate(nn.Sequential(nn.Linear(4, 32), encoder()), impl="native")
    report = fastbert.explain(ours)
    assert list(report.replaced) == ["1", "1.layers.0", "1.layers.1"]
    ours = nn.Transformer(32, 2, 1, 1, 48, batch_first=True, dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fastbert.accelerate(ours, impl="native")
    names = fastbert.explain(ours).replaced
    assert "encoder" in names
    assert "decoder.layers.0.multihead_attn" in names


def test_encoder_and_decoder_together():
    ours, plain, truth = three(nn.Transformer(32, 2, 1, 1, 48, batch_first=True, dropout=0.0).train())
    src, tgt, causal = torch.randn(2, 7, 32), torch.randn(2, 5, 32), nn.Transformer.generate_square_subsequent_mask(5)
    outputs = [m(src.to(t), tgt.to(t), tgt_mask=causal.to(t))
               for m, t in ((ours, src.dtype), (plain, src.dtype), (truth, torch.float64))]  # fmt: skip
    assert_within_budget(*outputs)


@pytest.mark.filterwarnings("ignore")
def test_compiles_in_one_graph():
    ours = fastbert.accelerate(encoder().eval(), impl="native")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, WIDTH, 32)
    with torch.no_grad():
        y = compiled(x, src_key_padding_mask=RIGHT)
        torch.testing.assert_close(y[~RIGHT], ours(x, src_key_padding_mask=RIGHT)[~RIGHT])


@pytest.mark.parametrize("change", ["tanh", "changed_later"])
def test_an_activation_that_torch_takes_for_another_is_left_to_torch(change):
    """Without gradients torch computes GELU by erf for nn.GELU("tanh"), and ReLU where ReLU was replaced later: whoever
    accelerates such a model gets the same two functions."""
    plain = encoder(activation=nn.GELU("tanh") if change == "tanh" else "relu").eval()
    if change == "changed_later":
        for layer in plain.layers:
            layer.activation = nn.SiLU()
    ours, x = fastbert.accelerate(copy.deepcopy(plain), impl="native"), torch.randn(3, WIDTH, 32)
    with_gradients = plain(x)
    with torch.no_grad():
        assert not torch.allclose(plain(x), with_gradients, atol=1e-5), "torch computes one function: the rule can go"
        assert torch.equal(ours(x), plain(x))
    assert torch.equal(ours(x), with_gradients)
    assert "fast path takes its activation for" in str(fastbert.explain(ours))


@pytest.mark.filterwarnings("ignore:.*so fastbert leaves")
def test_spectral_norm_of_attention_takes_as_many_steps():
    """In training each look at such a weight is a step of the power iteration, and the fused code looked twice."""
    plain = encoder()
    for part, name in ((plain.layers[0].self_attn, "in_proj_weight"), (plain.layers[1].self_attn.out_proj, "weight")):
        parametrizations.spectral_norm(part, name)
    ours, x = fastbert.accelerate(copy.deepcopy(plain), impl="native"), torch.randn(3, WIDTH, 32)
    for _ in range(2):
        torch.testing.assert_close(ours(x), plain(x))
    for (name, one), (_, other) in zip(ours.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(one, other), name


class Backwards(nn.ModuleList):
    def __iter__(self):
        return reversed([*super().__iter__()])


def list_of_somebodys_own(model):
    model.layers = Backwards(model.layers)


def activation_in_place(model):
    for layer in model.layers:
        layer.activation.approximate = "tanh"


def norms_first(model):
    for layer in model.layers:
        layer.norm_first = True


def more_heads(model):
    for layer in model.layers:
        layer.self_attn.num_heads, layer.self_attn.head_dim = 4, 8


@pytest.mark.parametrize("change", [list_of_somebodys_own, activation_in_place, norms_first, more_heads])
@pytest.mark.filterwarnings("ignore:.*so fastbert leaves")
def test_what_is_changed_after_a_call_counts(change):
    """The order of the layers was torch's own, and the name of an activation that of the first call."""
    plain = encoder(activation=nn.GELU()).eval()
    ours, x = fastbert.accelerate(copy.deepcopy(plain), impl="native"), torch.randn(3, WIDTH, 32)
    before = ours(x)
    for model in (plain, ours):
        change(model)
    assert not torch.allclose(plain(x), before, atol=1e-4), "the change changes nothing"
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(ours(x), plain(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("made", ["encoder", "layer", "attention"])
def test_autocast_on_a_cpu_gives_torchs_dtype(made, grad):
    """Without gradients torch's encoders return bfloat16 within autocast, with gradients float32."""
    plain = {
        "encoder": encoder,
        "layer": lambda: encoder().layers[0],
        "attention": lambda: encoder().layers[0].self_attn,
    }[made]().eval()
    ours, x = fastbert.accelerate(copy.deepcopy(plain), impl="native"), torch.randn(3, WIDTH, 32)
    given, more = ((x, x, x), {"need_weights": False}) if made == "attention" else ((x,), {})
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        found, expected = (model(*given, **more) for model in (ours, plain))
    if made == "attention":
        found, expected = found[0], expected[0]
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


ONE_CALL = {  # options of the layers, arguments of the call -> calls of the C++ through all layers
    "right": ({}, "right", 1),
    "no_padding": ({}, "none", 1),
    "relu": ({"activation": "relu"}, "right", 1),
    "left": ({}, "left", 0),
    "src_mask": ({}, "src_mask", 0),
    "pre_norm": ({"norm_first": True}, "right", 0),
    "no_bias": ({"bias": False}, "right", 0),
    "silu": ({"activation": nn.SiLU()}, "right", 0),
}


@pytest.mark.cpp
@pytest.mark.parametrize(("options", "masks", "count"), ONE_CALL.values(), ids=ONE_CALL)
@pytest.mark.filterwarnings("ignore:.*")
@torch.no_grad()
def test_all_layers_in_one_call(monkeypatch, options, masks, count):
    ours, plain, truth = three(encoder(inner=64, **{"activation": "gelu", **options}).eval())
    made, right = [], cpp.encoder_layers

    def counted(*args):
        y = right(*args)
        made.extend([args] * (y is not None))
        return y

    monkeypatch.setattr(cpp, "encoder_layers", counted)
    x, given = torch.randn(3, WIDTH, 32), MASKS[masks]
    found = ours(x, **given)
    assert len(made) == count
    keep = ~padding_of(given)
    theirs, expected = plain(x, **given), truth(x.double(), **in_float64(given))
    assert_within_budget(found[keep], theirs[keep], expected[keep])
