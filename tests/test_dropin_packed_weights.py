"""In inference on a CPU, an accelerated model may multiply copies of its weights; it must notice all changes."""

import copy
import gc

import pytest
import torch

import fastbert
import fastbert.layers
from fastbert.dropin.layer import LayerForward
from fastbert.kernels.cpu import layouts
from fastbert.kernels.cpu import operators as cpp
from fastbert.testing import assert_within_budget

pytestmark = pytest.mark.native

transformers = pytest.importorskip("transformers", reason="its models are accelerated")

FAMILIES = {
    "bert": {"hidden_size": 32, "intermediate_size": 48},
    "albert": {"hidden_size": 32, "intermediate_size": 48, "embedding_size": 24},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "modernbert": {"hidden_size": 32, "intermediate_size": 48, "pad_token_id": 0},
}
IDS = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "attention_mask": (torch.arange(9) < torch.tensor([9, 4, 7])[:, None]).long()}


def build(family: str = "bert", **more):
    torch.manual_seed(0)
    common = {"vocab_size": 60, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 40}
    common = {} if family == "distilbert" else common
    config = transformers.AutoConfig.for_model(family, **{"vocab_size": 60, **common, **FAMILIES[family], **more})
    return transformers.AutoModel.from_config(config).eval()


@pytest.fixture(autouse=True)
def _tiles(monkeypatch):
    """As on a CPU whose vendor library has instructions that our products lack."""
    monkeypatch.setattr(cpp, "multiplies", lambda dtype: False)
    monkeypatch.setattr(cpp, "LINEAR_ROWS", cpp.LINEAR_ROWS_LAID_OUT)


def packed(model) -> int:
    """The number of the layers' weights that have a copy."""
    names = ("query", "key", "value", "dense", "ffn", "lin", "W", "mlp")
    weights = [p for name, p in model.named_parameters() if p.dim() == 2 and any(word in name for word in names)]
    return sum(layouts._marked[w].packed is not None for w in weights if w in layouts._marked)


def infer(model):
    with torch.no_grad():
        return model(**BATCH).last_hidden_state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_states_from_copies(family, dtype):
    plain = build(family).to(dtype)
    truth = infer(copy.deepcopy(plain).double())
    keys = {name: p.data_ptr() for name, p in plain.state_dict().items()}
    ours = fastbert.accelerate(copy.deepcopy(plain), impl="native")
    real = BATCH["attention_mask"].bool()
    first = infer(ours)
    assert packed(ours) >= 3  # in each layer: attention's output and both weights of the feed-forward block
    assert_within_budget(first[real], infer(plain)[real], truth[real])
    assert torch.equal(infer(ours), first)
    assert list(ours.state_dict()) == list(keys)


@pytest.mark.cpp
@pytest.mark.parametrize(
    "bias", [torch.tensor([0.3]).expand(32), torch.linspace(-1, 1, 64)[::2]], ids=["expanded", "every_second"]
)
def test_a_bias_with_gaps(bias):
    """oneDNN's product reads a bias one element after another, whatever its stride: of an expanded one, memory behind
    it. States were off by 1e25, or NaN."""
    model = build(hidden_dropout_prob=0.0)
    for layer in model.encoder.layer:
        layer.output.dense.bias = torch.nn.Parameter(bias)
    ours = fastbert.accelerate(copy.deepcopy(model), impl="native")
    for layer in ours.encoder.layer:  # a copy has none
        layer.output.dense.bias = torch.nn.Parameter(bias)
    torch.testing.assert_close(infer(ours), infer(fastbert.restore(copy.deepcopy(ours))), atol=1e-5, rtol=1e-4)
    assert packed(ours)


@pytest.mark.cpp
def test_no_copies_for_our_own_products(monkeypatch):
    monkeypatch.setattr(cpp, "multiplies", lambda dtype: True)
    plain = build()
    ours = fastbert.accelerate(copy.deepcopy(plain), impl="native")
    real = BATCH["attention_mask"].bool()
    first = infer(ours)
    assert packed(ours) == 0
    assert_within_budget(first[real], infer(plain)[real], infer(plain.double())[real])


@pytest.mark.parametrize("how", ["gradients", "training", "restored"])
def test_only_inference_makes_copies(how):
    model = fastbert.accelerate(build(), impl="native")
    if how == "gradients":
        model(**BATCH).last_hidden_state.sum().backward()
    elif how == "training":
        infer(model.train())
    else:
        infer(model)
        assert packed(model)
        fastbert.restore(model)
        assert not any(p in layouts._marked for p in model.parameters())
    assert packed(model) == 0


def step(model, ours):
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    ours(**BATCH).last_hidden_state.square().sum().backward()
    optimizer.step()


def average(model, ours):
    """As averaged weights are swapped in for an evaluation, through `.data`, which torch does not count."""
    for p in ours.parameters():
        p.data.copy_(p.data * 0.5)


def average_in_inference_mode(model, ours):
    with torch.inference_mode():
        for p in ours.parameters():
            p.mul_(0.5)


CHANGES = {
    "an optimizer's step": step,
    "an average through data": average,
    "in inference mode": average_in_inference_mode,
    "another checkpoint": lambda model, ours: ours.load_state_dict(build(initializer_range=0.3).state_dict()),
    "assigned": lambda model, ours: ours.load_state_dict(build(initializer_range=0.3).state_dict(), assign=True),
    "another dtype": lambda model, ours: ours.to(torch.bfloat16),
    "there and back": lambda model, ours: ours.double().float(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_weights_take_effect(change):
    """Joined q, k, v weights were kept after a change through `.data`, so an evaluation mixed old and new."""
    ours = fastbert.accelerate(build(), impl="native")
    before = infer(ours)
    change(None, ours)
    plain = fastbert.restore(copy.deepcopy(ours))
    real = BATCH["attention_mask"].bool()
    after = infer(ours)[real].float()
    bound = {"atol": 0.1, "rtol": 0.1} if ours.dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(after, infer(plain)[real].float(), **bound)
    if change not in (CHANGES["another dtype"], CHANGES["there and back"]):
        assert (after - before[real]).abs().max() > 1e-2  # otherwise this test shows nothing


def test_own_model_notices_averages_too():
    config = fastbert.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model = fastbert.BertModel(config, impl="native").eval()
    before = infer(model)
    average(None, model)
    fresh = fastbert.BertModel(config, impl="native").eval()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(infer(model), infer(fresh))
    assert (infer(model) - before).abs().max() > 1e-2


def test_adapters_and_hooks_are_called():
    model = build()
    heard = []
    model.encoder.layer[0].attention.output.dense.register_forward_hook(lambda *_: heard.append(1))
    fastbert.accelerate(model, impl="native")
    infer(model)
    infer(model)
    assert len(heard) == 2
    assert model.encoder.layer[0].attention.output.dense.weight not in layouts._marked


def test_copies_are_freed_with_the_model():
    gc.collect()
    before = len(layouts._marked)
    model = fastbert.accelerate(build(), impl="native")
    infer(model)
    assert len(layouts._marked) > before
    assert any(isinstance(module.__dict__.get("forward"), LayerForward) for module in model.modules())
    del model
    gc.collect()
    assert len(layouts._marked) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["accelerated", "own"])
@pytest.mark.parametrize("heads", [4, 1], ids=["even", "odd_width"])
@pytest.mark.parametrize("tiles", [True, False], ids=["tiles", "our_products"])
def test_one_element_written_through_data_counts(kind, dtype, heads, tiles, monkeypatch):
    """Before a copy was reused, only 64 bytes of a weight were compared (joined weights, and weights laid out for the
    vendor library): a head or neuron set to zero through `.data` had no effect, without an error."""
    monkeypatch.setattr(cpp, "multiplies", lambda dtype: not tiles)
    sizes = {"hidden_size": 32, "intermediate_size": 48} if heads == 4 else {"hidden_size": 33, "intermediate_size": 67}
    model = build(num_attention_heads=heads, **sizes).to(dtype)
    if kind == "own":
        own = fastbert.BertModel(fastbert.BertConfig.from_dict(model.config.to_dict()), impl="native").eval()
        own.load_state_dict(model.state_dict())
        model = own.to(dtype)
    else:
        model = fastbert.accelerate(model, impl="native")
    before = infer(model)
    for name, parameter in model.named_parameters():
        if "encoder" not in name:
            continue
        for place in (0, -1):
            kept = parameter.data.view(-1)[place].item()
            parameter.data.view(-1)[place] = 100.0 if "weight" in name else 20.0
            fresh = copy.deepcopy(model)
            if ".key.bias" not in name:  # key biases do not change a softmax
                assert not torch.equal(infer(model), before), name
            assert torch.equal(infer(model), infer(fresh)), name
            parameter.data.view(-1)[place] = kept
    assert torch.equal(infer(model), before)


def test_any_change_of_a_weight_changes_its_sums():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for shape in ((3, 8), (5, 7), (4, 6), (1, 1)):
            weight = (torch.randn(shape) * 50).to(dtype)
            sums = layouts.sums_of(weight)
            assert torch.equal(layouts.sums_of(weight.clone()), sums)
            for place in range(weight.numel()):
                changed = weight.clone()
                changed.view(torch.int8).view(-1)[place * weight.element_size()] ^= 1
                assert not torch.equal(layouts.sums_of(changed), sums)
            if min(shape) > 1:
                assert not torch.equal(layouts.sums_of(weight.flip(0)), sums)
                assert not torch.equal(layouts.sums_of(weight.roll(1, 1)), sums)


def test_prepack_marks_weights_before_and_after_accelerate():
    model = build()
    fastbert.layers.prepack(model)
    fastbert.accelerate(model, impl="native")
    infer(model)
    weight = model.encoder.layer[0].attention.output.dense.weight
    assert layouts.is_promised(weight)
    other = fastbert.accelerate(build(), impl="native")
    infer(other)
    weight = other.encoder.layer[0].attention.output.dense.weight
    assert weight in layouts._marked
    assert not layouts.is_promised(weight)
    fastbert.layers.prepack(other)
    assert layouts.is_promised(weight)
