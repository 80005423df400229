"""What makes fastbert record launches again, or run without a recording: changed models and unusual calls."""

import copy
import pickle
import threading
import time
import warnings

import pytest
import torch
from torch import nn

import fastbert
from dropin_recordings import SIZES, assert_same, batch_of, build, pair, record_on_cpus
from fastbert.config import BertConfig
from fastbert.inference import graphs as recordings
from fastbert.inference.graphs import Graphs
from fastbert.models.bert import BertModel

pytestmark = pytest.mark.native


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    return record_on_cpus(monkeypatch)


# ---- what changes a recording ----------------------------------------------------------------------------


def _in_place(model):
    model.encoder.layer[0].attention.self.query.weight.data.mul_(1.5)  # part of a joined weight
    model.encoder.layer[0].attention.self.query.weight.add_(0.1)


def _other_storage(model):
    model.encoder.layer[1].output.dense.weight.data = model.encoder.layer[0].output.dense.weight.detach() * 2


def _other_parameter(model):
    model.embeddings.word_embeddings.weight = nn.Parameter(torch.linspace(-1, 1, 1920).view(60, 32))


def _other_module(model):
    model.encoder.layer[1].output.LayerNorm = nn.LayerNorm(32)


def _fewer_layers(model):
    model.encoder.layer = model.encoder.layer[:1]


def _cast(model):
    model.double()


CHANGES = [_in_place, _other_storage, _other_parameter, _other_module, _fewer_layers, _cast]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_a_changed_model_is_recorded_anew(change):
    ours, plain, graphs = pair()
    batch = batch_of(11, 4)
    assert_same(ours, plain, batch)
    with torch.no_grad():
        for model in (ours, plain):
            change(model)
    assert_same(ours, plain, batch)
    assert graphs.recorded == 2
    assert len(graphs) == graphs._recorder.forgotten == 1
    assert_same(ours, plain, batch)
    assert graphs.recorded == 2


def test_an_activation_that_is_a_function_is_recorded_anew():
    """It is neither a module nor a tensor, so the recording of one function was replayed after another replaced it."""
    ours, plain, graphs = pair()
    batch = batch_of(11, 4)
    for recorded, function in enumerate((nn.functional.gelu, nn.functional.relu), 1):
        for model in (ours, plain):
            part = model.encoder.layer[1].intermediate
            part._modules.pop("intermediate_act_fn", None)
            part.intermediate_act_fn = function
        assert_same(ours, plain, batch)
        assert graphs.recorded == recorded


def test_a_training_step_in_between():
    ours, plain, graphs = pair(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    batch = batch_of(11, 4)
    assert_same(ours, plain, batch)
    for model in (ours, plain):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        model.train()
        model(**batch).pooler_output.square().sum().backward()
        optimizer.step()
        model.eval()
    assert_same(ours, plain, batch)
    assert graphs.recorded == 2


def test_switches_have_recordings_of_their_own():
    ours, plain, graphs = pair()
    batch = batch_of(11, 4)
    for _ in range(2):
        assert_same(ours, plain, batch)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                a, b = ours(**batch).last_hidden_state, plain(**batch).last_hidden_state
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, atol=0.1, rtol=0.05)
        with fastbert.batch_invariant():
            assert_same(ours, plain, batch)
    assert graphs.recorded == 3


def test_the_least_recently_used_recording_is_dropped():
    ours, plain, _ = pair()
    graphs = ours.forward.graphs = Graphs(torch.device("cpu"), limit=2)
    for length in (10, 20, 10, 40):  # the recording for 20 is dropped
        assert_same(ours, plain, batch_of(length))
    assert len(graphs) == 2
    assert graphs.recorded == 3
    assert_same(ours, plain, batch_of(10))
    assert graphs.recorded == 3
    assert_same(ours, plain, batch_of(20))
    assert graphs.recorded == 4


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
                         ids=["deepcopy", "pickle"])  # fmt: skip
def test_a_copy_has_recordings_of_its_own(duplicate):
    ours, plain, graphs = pair()
    batch = batch_of(11, 4)
    assert_same(ours, plain, batch)
    other = duplicate(ours)
    with torch.no_grad():
        for p in ours.parameters():
            p.zero_()
    assert len(other.forward.graphs) == 0
    assert_same(other, plain, batch)
    assert other.forward.graphs is not graphs


def test_two_threads(recorder, monkeypatch):
    record = recorder.record

    def slowly(self, function):
        replay, output = record(self, function)

        def replay_slowly():  # long enough for the other threads to arrive
            time.sleep(1e-3)
            replay()
            time.sleep(1e-3)

        return replay_slowly, output

    monkeypatch.setattr(recorder, "record", slowly)
    ours, plain, _ = pair()
    batches = [batch_of(16), batch_of(9, 7), batch_of(5, 5, 6)]
    with torch.no_grad():
        expected = [plain(**batch).last_hidden_state for batch in batches]
    wrong = []

    def serve(start: int) -> None:
        for i in range(start, start + 9):
            with torch.no_grad():
                y = ours(**batches[i % 3]).last_hidden_state
            if not torch.allclose(y, expected[i % 3], atol=1e-5, rtol=1e-4):
                wrong.append(i)

    threads = [threading.Thread(target=serve, args=(start,)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- what runs without a recording -----------------------------------------------------------------------


def _hook(model):
    model.encoder.layer[0].intermediate.dense.register_forward_hook(lambda *_: None)


def _small_buckets(model):
    if hasattr(model.forward, "graphs"):
        model.forward.graphs.most = 8


def _adapter(model):
    model.encoder.layer[0].output.dense = nn.Sequential(model.encoder.layer[0].output.dense)


def _dropout_on(model):
    model.encoder.layer[0].output.dropout.train()


LEFT = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
WITHOUT = {
    "hidden_states": ({"output_hidden_states": True}, None, "output_hidden_states"),
    "left_padding": ({"attention_mask": LEFT}, None, "padding is read"),
    "too_many": ({}, _small_buckets, "over 8 tokens"),
    "hook": ({}, _hook, "a Linear has a hook"),
    "adapter": ({}, _adapter, "a Sequential"),
    "dropout": ({}, _dropout_on, "training mode"),
}


@pytest.mark.parametrize(("more", "change", "reason"), WITHOUT.values(), ids=WITHOUT.keys())
@pytest.mark.filterwarnings("error", "ignore:.*has a hook")
def test_runs_without_a_recording_and_explain_says_why(more, change, reason):
    ours, plain, graphs = pair(hidden_dropout_prob=0.0)
    ids = torch.randint(5, 60, (2, 6))
    for model in (ours, plain):
        if change is not None:
            change(model)
    assert_same(ours, plain, {"input_ids": ids} | more)
    assert graphs.calls["replayed"] == 0
    report = fastbert.explain(ours)
    assert any(reason in why for what, why in report.left.items() if "without a CUDA graph" in what)
    assert "0 calls replayed, 1 without" in report.replaced["(the model)"]


def test_rotary_tables_that_depend_on_the_batch():
    """A recording has rotary tables of one width; with dynamic scaling they change beyond the original's maximum."""
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    ours, plain, graphs = pair("JinaEmbeddingsV3Model", max_position_embeddings=16, rope_parameters=scaling)
    for width in (12, 24):
        assert_same(ours, plain, {"input_ids": torch.randint(5, 60, (2, width))})
    assert graphs.calls == {"its rotary tables depend on the batch": 2}


def test_embeddings_gradients_and_training():
    ours, plain, graphs = pair(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    assert_same(ours, plain, {"inputs_embeds": torch.randn(2, 5, 32)})
    batch = batch_of(6, 3)
    grads = []
    for model in (ours, plain):
        model.train()
        loss = model(**batch).pooler_output.sum()
        grads.append(torch.autograd.grad(loss, list(model.parameters())[:5]))
    torch.testing.assert_close(*grads)
    assert_same(ours, plain, batch)  # without gradients, but in training mode
    assert graphs.calls.keys() == {
        "there are no input_ids", "gradients are on; torch.inference_mode() or torch.no_grad() turns them off",
        "a module is in training mode",
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*has a hook")
def test_hooks_added_after_the_recording_are_called():
    ours, plain, graphs = pair()
    batch = batch_of(7, 7)  # a hook gets the original's values at padding
    assert_same(ours, plain, batch)
    heard = []
    handle = ours.encoder.layer[1].output.dense.register_forward_hook(lambda *_: heard.append(1))
    assert_same(ours, plain, batch)
    assert heard == [1]
    handle.remove()
    assert_same(ours, plain, batch)
    assert heard == [1]
    assert graphs.calls["replayed"] == 2


def test_dropout_turned_on_after_the_recording_drops():
    ours, _, graphs = pair(hidden_dropout_prob=0.5)
    batch = batch_of(11, 4)
    with torch.no_grad():
        before = ours(**batch).last_hidden_state
        ours.encoder.layer[0].output.dropout.train()
        assert not torch.allclose(ours(**batch).last_hidden_state, before)
        ours.eval()
        assert torch.equal(ours(**batch).last_hidden_state, before)
    assert graphs.calls == {"replayed": 2, "a module is in training mode": 1}


def test_calls_that_run_the_originals_code_are_not_recorded():
    ours, _, graphs = pair()
    with pytest.warns(UserWarning, match="output_attentions was given"), torch.no_grad():
        assert ours(**batch_of(5), output_attentions=True).attentions is not None
    assert graphs.calls == {"output_attentions was given": 1}


def test_a_failed_recording_warns_once_and_runs_without(recorder):
    ours, plain, graphs = pair()
    recorder.error = "operation not permitted when stream is capturing\nand more"
    with pytest.warns(UserWarning, match="recording failed: operation not permitted"):
        assert_same(ours, plain, batch_of(11, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(ours, plain, batch_of(11, 4))
    assert len(graphs) == 0
    assert "recording failed" in str(fastbert.explain(ours))


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_is_not_replayed():
    ours, plain, graphs = pair()
    batch = batch_of(11, 4)
    with torch.no_grad():
        y = torch.compile(ours, fullgraph=True, backend="aot_eager")(**batch).last_hidden_state
        mask = batch["attention_mask"].bool()
        torch.testing.assert_close(y[mask], plain(**batch).last_hidden_state[mask], atol=1e-5, rtol=1e-4)
    assert graphs.recorded == 0


# ---- what is refused -------------------------------------------------------------------------------------


def test_other_devices_are_refused_and_the_model_is_as_it_was(monkeypatch):
    monkeypatch.delitem(recordings.RECORDERS, "cpu")
    model = build()
    with pytest.raises(ValueError, match="expected cuda, found cpu"):
        fastbert.accelerate(model, cuda_graphs=True)
    assert not any("forward" in m.__dict__ for m in model.modules())
    with pytest.raises(ValueError, match="expected cuda, found cpu"):
        BertModel(BertConfig(**SIZES)).use_cuda_graphs()


def test_models_without_an_encoder_of_transformers_are_refused():
    layer = nn.TransformerEncoderLayer(32, 2, 48, batch_first=True)
    with pytest.raises(ValueError, match="expected an encoder of transformers"):
        fastbert.accelerate(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), cuda_graphs=True)


def test_other_implementations_are_refused(recorder, monkeypatch):
    monkeypatch.setattr(recorder, "impls", ("triton",))
    with pytest.raises(ValueError, match="expected impl triton, found native"):
        fastbert.accelerate(build(), impl="native", cuda_graphs=True)


def test_restore_removes_the_recordings():
    ours, _, _ = pair()
    fastbert.restore(ours)
    assert "forward" not in ours.__dict__
    assert not hasattr(fastbert.accelerate(ours, impl="native").forward, "graphs")
