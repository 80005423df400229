"""torch's own transformer modules, accelerated, compared with the originals; twice their error against float64."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import fastbert
from dropin_torch_models import BAND, MASKS, RIGHT, SLOPE, WIDTH, encoder, in_float64, padding_of, three
from fastbert.kernels.cpu import operators as cpp
from fastbert.testing import assert_within_budget, relative_rms

pytestmark = pytest.mark.native

LAYERS = {
    "post_norm": {},
    "pre_norm": {"norm_first": True},
    "gelu": {"activation": "gelu"},
    "activation_unknown": {"activation": nn.Tanh()},
    "no_bias": {"bias": False},
    "sequence_first": {"batch_first": False},
}


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


@pytest.mark.parametrize("shape", [(0, WIDTH, 32), (3, 0, 32)], ids=["no_sequences", "no_tokens"])
def test_an_empty_batch_gives_every_parameter_a_gradient(shape):
    """torch's own tests expect zeros; the projections of query, key and value had no gradient."""
    ours = fastbert.accelerate(encoder().double(), impl="native")  # float64, which the C++ does not compute
    x = torch.empty(shape, dtype=torch.float64, requires_grad=True)
    y = ours(x)
    assert y.shape == shape
    y.backward(torch.empty_like(y))
    assert torch.equal(x.grad, torch.zeros_like(x))
    for name, p in ours.named_parameters():
        assert torch.equal(p.grad, torch.zeros_like(p)), name


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


def test_dropout_of_an_encoder_in_evaluation_mode():
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


ONE_CALL = {  # options of the layers, arguments of the call -> number of C++ calls for all layers
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


@pytest.mark.filterwarnings("ignore:fastbert replaced nothing")
def test_a_module_that_holds_a_module_that_holds_it():
    """sentence-transformers' own test of a router that holds its model: RecursionError in `accelerate`."""
    outer = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), encoder())
    outer[0].append(outer)
    fastbert.accelerate(outer, impl="native")
    assert "unpads once" in str(fastbert.explain(outer))
