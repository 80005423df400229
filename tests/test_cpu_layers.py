"""A short batch on a CPU: its layers run in one C++ call, unless something needs them one by one; and the C++ before
and after the layers."""

import copy
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastbert
import fastbert.layers
from cpu_dtypes import DTYPES
from fastbert import BertConfig, BertModel, PackedBatch
from fastbert.encoding.encoder import Encoder
from fastbert.kernels import native, reference
from fastbert.kernels.cpu import int8 as eight_bits
from fastbert.kernels.cpu import operators as cpp
from fastbert.models import bert
from fastbert.models.bert import BertLayer
from fastbert.testing import assert_within_budget, cu_seqlens_of
from fastbert.text.batching import use_threads

pytestmark = pytest.mark.cpp
HAS_INT8 = pytest.mark.skipif(not eight_bits.is_in_cpp(), reason="no C++ operators or no AVX512-VNNI")
ALLOWED = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
CONFIG = {
    "vocab_size": 120, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "max_position_embeddings": 80,
}  # fmt: skip


def model_of(dtype=torch.float32, impl="native", **changes) -> BertModel:
    """Weights are larger than initial ones, so that attention is not uniform and every bias counts."""
    model = BertModel(BertConfig(**CONFIG | changes), impl=impl).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.1)
    return model.to(dtype)


def batch_of(*lengths: int) -> PackedBatch:
    return PackedBatch.from_lists([torch.randint(1, 120, (n,)).tolist() for n in lengths])


@pytest.fixture
def calls(monkeypatch):
    """Counts how often the layers ran in one call."""
    made, call = [], cpp.encoder_layers

    def counted(*args):
        y = call(*args)
        if y is not None:
            made.append(args)
        return y

    monkeypatch.setattr(cpp, "encoder_layers", counted)
    return made


def one_by_one(model, batch, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(bert, "in_one_call", lambda *_: None)
        return model(batch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(1,), (7,), (5, 0, 12), (33, 31), (80,) * 17], ids=str)
@pytest.mark.parametrize(("heads", "inner"), [(4, 96), (1, 32)])
@torch.no_grad()
def test_in_one_call(calls, dtype, lengths, heads, inner):
    model = model_of(dtype, num_attention_heads=heads, intermediate_size=inner)
    batch = batch_of(*lengths)
    ours = model(batch)
    assert len(calls) == 1
    model.impl = "reference"
    plain, truth = model(batch), copy.deepcopy(model).double()(batch)
    assert len(calls) == 1
    assert_within_budget(ours.last_hidden_state, plain.last_hidden_state, truth.last_hidden_state)
    assert_within_budget(ours.pooler_output, plain.pooler_output, truth.pooler_output)


@torch.no_grad()
def test_padded_input_and_segments(calls):
    model = model_of()
    ids = torch.randint(1, 120, (3, 9))
    mask = (torch.arange(9) < torch.tensor([9, 4, 1])[:, None]).long()
    ours = model(ids, mask, torch.ones_like(ids)).last_hidden_state
    assert len(calls) == 1
    model.impl = "reference"
    plain = model(ids, mask, torch.ones_like(ids)).last_hidden_state
    assert_within_budget(ours, plain, model.double()(ids, mask, torch.ones_like(ids)).last_hidden_state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_a_text_gets_the_same_bits_with_others_and_on_one_thread(calls, dtype):
    """As long as both numbers of rows are multiplied in the same way, here that for few rows."""
    model, batch, threads = model_of(dtype), batch_of(7, 8, 3), torch.get_num_threads()
    together = model(batch).last_hidden_state
    alone = model(PackedBatch.from_lists([batch.input_ids[7:15].tolist()])).last_hidden_state
    assert torch.equal(together[7:15], alone)
    torch.set_num_threads(1)
    try:
        assert torch.equal(model(batch).last_hidden_state, together)
    finally:
        torch.set_num_threads(threads)
    assert len(calls) == 3


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param("int8", marks=HAS_INT8)], ids=str)
@pytest.mark.parametrize("lengths", [(7, 12), (80, 64, 77)], ids=["few rows", "many rows"])
@torch.no_grad()
def test_more_threads_than_processors(lengths, dtype):
    """Threads share the steps of a call. Each part is computed once, by whichever thread takes it, even if threads come
    late to a step, if there are more threads than queues (64), and if two Python threads call at once."""
    model, batch = model_of(hidden_size=256, intermediate_size=512), batch_of(*lengths)
    if dtype == "int8":
        fastbert.layers.quantise(model, lambda: model(batch))
    threads = torch.get_num_threads()

    def passes(count: int) -> None:
        torch.set_num_threads(count)
        with torch.no_grad():  # the mode belongs to a thread
            for _ in range(10):
                assert torch.equal(model(batch).last_hidden_state, expected)

    try:
        torch.set_num_threads(1)
        expected = model(batch).last_hidden_state
        for count in (2, 3, 7, 70):
            passes(count)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(passes, (3, 4)))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(len(ALLOWED) < 2, reason="needs two processors, and Linux")
def test_after_a_pause_threads_are_kept_off_the_processor_of_the_first():
    """In a virtual machine, Linux wakes a thread on the processor of the one that wakes it, though the other processor
    is idle: one text took 7.9 ms instead of 2.8. Afterwards each thread may run where it might before."""
    model, batch, found = model_of(hidden_size=256, intermediate_size=512), batch_of(7, 12), []
    here = min(ALLOWED)

    def passes() -> None:
        use_threads(2)
        before = set(os.listdir("/proc/self/task"))
        with torch.no_grad():
            model(batch)
            (helper,) = set(os.listdir("/proc/self/task")) - before
            os.sched_setaffinity(0, {here})  # of this thread alone
            for _ in range(5):
                time.sleep(0.05)
                model(batch)
                processor = Path(f"/proc/self/task/{helper}/stat").read_text().rpartition(")")[2].split()[36]
                found.append((int(processor) == here, os.sched_getaffinity(int(helper)) == ALLOWED))

    thread = threading.Thread(target=passes)
    thread.start()
    thread.join()
    on_that_processor, may_run_as_before = zip(*found, strict=True)
    assert all(may_run_as_before)
    assert not all(on_that_processor)  # other work on the machine may move it there


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param("int8", marks=HAS_INT8)], ids=str)
@torch.no_grad()
def test_layers_in_several_calls(monkeypatch, dtype):
    """Long passes are several calls, between which Python handles Ctrl-C; the last call may have fewer layers."""
    model, batch, made = model_of(num_hidden_layers=5, hidden_size=256, intermediate_size=512), batch_of(80, 80), []
    if dtype == "int8":
        fastbert.layers.quantise(model, lambda: model(batch))
    expected, call = model(batch).last_hidden_state, cpp.call
    monkeypatch.setattr(cpp, "FEW_BYTES", 160 * 256)
    monkeypatch.setattr(cpp, "PRODUCTS_OF_A_CALL", 2 * 160 * 256 * (4 * 256 + 2 * 512))
    monkeypatch.setattr(cpp, "call", lambda name, *args: (made.append(name), call(name, *args))[1])
    assert torch.equal(model(batch).last_hidden_state, expected)
    assert [name for name in made if name.endswith("layers")] == [
        "encoder_layers" if dtype == torch.float32 else "int8_layers"
    ] * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_batch_invariant_in_one_call(calls, dtype):
    """Also in a batch so large that another product would be faster."""
    model, batch = model_of(dtype), batch_of(80, 7, 80, 80)
    alone = PackedBatch.from_lists([batch.input_ids[80:87].tolist()])
    with fastbert.batch_invariant():
        together = model(batch).last_hidden_state
        assert torch.equal(together[80:87], model(alone).last_hidden_state)
    assert len(calls) == 2
    model.impl = "reference"
    plain, truth = model(batch).last_hidden_state, copy.deepcopy(model).double()(batch).last_hidden_state
    assert_within_budget(together, plain, truth)


@torch.no_grad()
def test_nan_stays_in_its_text(calls):
    model, batch = model_of(), batch_of(3, 4)
    clean = model(batch).last_hidden_state
    model.embeddings.word_embeddings.weight[batch.input_ids[0]] = torch.nan
    batch.input_ids[3:] = batch.input_ids[3:].where(batch.input_ids[3:] != batch.input_ids[0], 0)
    poisoned = model(batch).last_hidden_state
    assert poisoned[:3].isnan().all()
    assert clean.isfinite().all()
    assert not poisoned[3:].isnan().any()
    assert len(calls) == 2


@pytest.mark.parametrize("change", ["in place", "load_state_dict", "data", "parameter", "module", "dtype", "copy"])
@torch.no_grad()
def test_changed_weights_are_noticed(calls, monkeypatch, change):
    model, other, batch = model_of(), model_of(), batch_of(9)
    before = model(batch).last_hidden_state
    layer, new = model.encoder["layer"][1], other.encoder["layer"][1]
    if change == "in place":
        layer.attention["self"]["key"].weight.mul_(2.0)
    elif change == "load_state_dict":
        model.load_state_dict(other.state_dict())
    elif change == "data":
        layer.output["dense"].bias.data = new.output["dense"].bias.data + 1.0
    elif change == "parameter":
        layer.intermediate["dense"].weight = nn.Parameter(new.intermediate["dense"].weight)
    elif change == "module":
        layer.attention["output"]["dense"] = new.attention["output"]["dense"]
    elif change == "dtype":
        model.double().float()
        layer.attention["self"]["query"].weight.zero_()
    elif change == "copy":
        model = copy.deepcopy(model)
        model.encoder["layer"][0].output["LayerNorm"].weight.mul_(2.0)
    after = model(batch).last_hidden_state
    assert len(calls) == 2
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, one_by_one(model, batch, monkeypatch).last_hidden_state)


def seen(*_):
    """A hook."""
    seen.count += 1


WAYS_OUT = {
    "gradients": lambda model: model.requires_grad_(),
    "many tokens": lambda model: model,
    "hidden states": lambda model: model,
    "training": lambda model: model.train(),
    "hook of a layer": lambda model: model.encoder["layer"][1].register_forward_hook(seen),
    "hook of its projection": lambda model: model.encoder["layer"][0].attention["self"].register_forward_pre_hook(seen),
    "its forward is another": lambda model: setattr(
        model.encoder["layer"][1], "forward", lambda x, shared: BertLayer.forward(model.encoder["layer"][1], x, shared)
    ),
    "hook of all": lambda model: nn.modules.module.register_module_forward_hook(seen),
    "8 bits": lambda model: fastbert.layers.quantise(model),
    "autocast": lambda model: model,
    "batch_invariant": lambda model: model,
    "reference": lambda model: setattr(model, "impl", "reference"),
    "another linear": lambda model: setattr(model.encoder["layer"][1].output["dense"], "__class__", Doubled),
    "another layer": lambda model: model.encoder["layer"].append(nn.Identity()),
    "no bias": lambda model: setattr(model.encoder["layer"][0].attention["output"]["dense"], "bias", None),
    "a transposed weight": lambda model: setattr(
        model.encoder["layer"][0].attention["output"]["dense"].weight, "data", torch.randn(64, 64).t()
    ),
    "one layer in float64": lambda model: model.encoder["layer"][1].double(),
    "another eps in a whole layer": lambda model: [
        setattr(norm, "eps", 0.5) for norm in model.encoder["layer"][1].modules() if isinstance(norm, nn.LayerNorm)
    ],
    "another eps": lambda model: setattr(model.encoder["layer"][1].output["LayerNorm"], "eps", 0.5),
}


class Doubled(nn.Linear):
    """A subclass of Linear, by which an adapter library replaces a layer."""


@pytest.mark.parametrize("why", WAYS_OUT)
def test_layers_one_by_one(calls, monkeypatch, why):
    """In unusual cases the layers are called as modules."""
    model, batch = model_of(), batch_of(*([80] * 15 if why == "many tokens" else (9, 4)))
    seen.count = 0
    handle = WAYS_OUT[why](model)
    if why in ("many tokens", "batch_invariant"):  # as if the vendor library had AMX
        monkeypatch.setattr(cpp, "multiplies", lambda dtype: False)
    if why == "another layer":
        model.encoder["layer"][2].forward = lambda x, shared: x
    contexts = {
        "gradients": torch.enable_grad,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "batch_invariant": fastbert.batch_invariant,
    }
    try:
        with torch.no_grad(), contexts.get(why, torch.no_grad)():
            if why == "one layer in float64":
                with pytest.raises((RuntimeError, ValueError)):
                    model(batch)
            elif why == "hidden states":
                assert len(model(batch, output_hidden_states=True).hidden_states) == 3
            elif why == "training":
                model(batch)
            else:
                expected = one_by_one(model, batch, monkeypatch).last_hidden_state
                count = seen.count
                assert torch.equal(model(batch).last_hidden_state, expected)
                assert "hook" not in why or seen.count == 2 * count > 0
    finally:
        if "hook" in why:
            handle.remove()
    assert not calls


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "silu"},
        {"num_attention_heads": 8},
        {"hidden_size": 48, "num_attention_heads": 3},
        {"intermediate_size": 80},
    ],
    ids=str,
)
@torch.no_grad()
def test_models_that_the_one_call_does_not_support(calls, changes):
    assert model_of(**changes)(batch_of(9)).last_hidden_state.isfinite().all()
    assert not calls


@torch.no_grad()
def test_float16_and_no_tokens(calls):
    assert model_of(torch.float16)(batch_of(9)).last_hidden_state.isfinite().all()
    assert model_of()(batch_of(0)).last_hidden_state.shape == (0, 64)
    assert not calls


@torch.no_grad()
def test_compiled_it_is_the_plain_model(calls):
    model, batch = model_of(), batch_of(9)
    ours = model(batch).last_hidden_state
    compiled = torch.compile(lambda b: model(b).last_hidden_state, backend="aot_eager")(batch)
    assert len(calls) == 1
    torch.testing.assert_close(compiled, ours)


@pytest.mark.parametrize(("int8", "tokens"), [(False, 20), (True, 32)], ids=["plain", "8 bits"])
def test_small_batches_are_not_padded_for_onednn(monkeypatch, int8, tokens):
    """Without oneDNN kernels that are compiled for each number of tokens, a batch of 20 tokens is not rounded up."""
    model, seen = model_of(), []
    encoder = Encoder(model, SimpleNamespace(model_max_length=None))
    if int8:
        fastbert.layers.quantise(model)
    monkeypatch.setattr(BertModel, "_check", lambda _, batch: seen.append(batch.total_tokens))
    encoder.encode_ids([[5] * 20], 2048)
    assert seen == [tokens]


# ---- before and after the layers -----------------------------------------------------------------------------


def embedding_inputs(tokens, width=48, rows=(30, 2, 40)):
    """ids, positions, segments; tables word, position, segment, weight, bias; in the operator's order."""
    ids, types, places = (torch.randint(0, n, (tokens,)) for n in rows)
    word, segment, position = (torch.randn(n, width, dtype=torch.float64) for n in rows)
    return (ids, types, places), (word, position, segment, *torch.randn(2, width, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 5, 70])
def test_embedding(dtype, tokens):
    indices, tables = embedding_inputs(tokens)
    tables = [t.to(dtype) for t in tables]
    word, position, segment, *norm = tables
    assert cpp.fits_embedding(indices, (word, segment, position, *norm))
    ours = native.embedding_layer_norm(*indices, *tables, 1e-6)
    assert ours.shape == (tokens, 48)
    if tokens:
        plain = reference.embedding_layer_norm(*indices, *tables, 1e-6)
        truth = reference.embedding_layer_norm(*indices, *(t.double() for t in tables), 1e-6)
        assert_within_budget(ours, plain, truth)


@pytest.mark.parametrize("index", [0, 1, 2], ids=["id", "segment", "position"])
@pytest.mark.parametrize("value", [-1, 40, 2**40])
def test_an_index_out_of_range_is_an_error_not_a_crash(index, value):
    indices, tables = embedding_inputs(5)
    indices[index][3] = value
    with pytest.raises((IndexError, RuntimeError)):
        native.embedding_layer_norm(*indices, *(t.float() for t in tables), 1e-6)


@pytest.mark.parametrize("why", ["gradient", "int32", "no segments", "width", "float64", "stride"])
def test_embedding_that_the_cpp_for_inference_does_not_take(why):
    (ids, types, places), tables = embedding_inputs(5, width=40 if why == "width" else 48)
    tables = [t if why == "float64" else t.float() for t in tables]
    if why == "gradient":
        tables[0].requires_grad_()
    if why == "int32":
        ids = ids.int()
    if why == "no segments":
        types = tables[2] = None
    if why == "stride":
        tables[0] = tables[0].t().contiguous().t()
    word, position, segment, *norm = tables
    fits = cpp.fits_embedding((ids, types, places), (word, segment, position, *norm))
    assert fits == (why == "gradient")  # with gradients other C++ functions compute
    ours = native.embedding_layer_norm(ids, types, places, *tables, 1e-6)
    torch.testing.assert_close(ours, reference.embedding_layer_norm(ids, types, places, *tables, 1e-6))
    assert ours.requires_grad == (why == "gradient")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(1,), (5, 0, 70), (0,), (2, 3)], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_means(dtype, lengths, normalize):
    x, cu_seqlens = torch.randn(sum(lengths), 48).to(dtype), cu_seqlens_of(lengths, "cpu")
    assert cpp.takes_mean(x, cu_seqlens)
    ours = native.pool(x, cu_seqlens, "mean", normalize)
    plain = reference.pool(x, cu_seqlens, "mean", normalize)
    assert ours.dtype == dtype
    if any(lengths):
        assert_within_budget(ours, plain, reference.pool(x.double(), cu_seqlens, "mean", normalize))
    assert not ours[torch.tensor(lengths) == 0].any()


def test_means_that_go_to_torch():
    x, cu_seqlens = torch.randn(5, 48), cu_seqlens_of((2, 3), "cpu")
    assert not cpp.takes_mean(x.clone().requires_grad_(), cu_seqlens)
    assert not cpp.takes_mean(x.double(), cu_seqlens)
    assert not cpp.takes_mean(x[:, :40], cu_seqlens)
    assert not cpp.takes_mean(x[:, :32], cu_seqlens)
    assert not cpp.takes_mean(x, cu_seqlens.long())
    for starts in ([0, 2, 6], [0, 7, 5], [1, 5], [0, -1, 5]):
        with pytest.raises(ValueError, match="must rise from 0 to 5"):
            cpp.mean_of_sequences(x, torch.tensor(starts, dtype=torch.int32))
