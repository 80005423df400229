"""Replays of recorded launches. Without a GPU a recording runs its function again over the same static buffers, so
everything but the device's own part is tested: buckets, filling, what is kept, what is dropped and what is refused."""

import copy
import itertools
import pickle
import threading
import time
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import fastbert
from fastbert.config import BertConfig
from fastbert.dropin.families import FAMILIES_OF_4
from fastbert.inference import graphs as recordings
from fastbert.inference.graphs import TOKENS, Graphs, bucket_of, most_tokens
from fastbert.models.bert import BertModel
from fastbert.packing import PackedBatch

transformers = pytest.importorskip("transformers", reason="what is accelerated")

pytestmark = pytest.mark.native

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
SETTINGS = {
    "RobertaModel": {"pad_token_id": 1}, "XLMRobertaModel": {"pad_token_id": 1}, "CamembertModel": {"pad_token_id": 1},
    "ElectraModel": {"embedding_size": 24}, "AlbertModel": {"embedding_size": 24},
    "DistilBertModel": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "hidden_size": None},
    "ModernBertModel": {"local_attention": 6, "global_attn_every_n_layers": 2, "pad_token_id": 0, "bos_token_id": 1,
                        "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
}  # fmt: skip


class Rerun:
    """The device's part without the device: a replay is the function once more, into the same output."""

    impls = ("triton", "native", "reference")
    error: str | None = None

    def __init__(self, device: torch.device):
        self.forgotten = 0

    def forget(self) -> None:
        self.forgotten += 1

    def busy(self) -> bool:
        return False

    def in_order(self):
        return nullcontext()

    def record(self, function):
        if self.error:
            raise RuntimeError(self.error)
        output = function()
        return (lambda: output.copy_(function())), output


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    monkeypatch.setitem(recordings.RECORDERS, "cpu", Rerun)
    monkeypatch.setattr(Rerun, "error", None)
    return Rerun


def build(name: str = "BertModel", **more) -> nn.Module:
    settings = {k: v for k, v in {**SIZES, **SETTINGS.get(name, {}), **more}.items() if v is not None}
    model = getattr(transformers, name)(getattr(transformers, name.replace("Model", "Config"))(**settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def pair(name: str = "BertModel", **more) -> tuple[nn.Module, nn.Module, Graphs]:
    """(replaying, without graphs, the recordings) with one set of weights."""
    model = build(name, **more)
    plain = fastbert.accelerate(copy.deepcopy(model), impl="native", padding="zero")
    ours = fastbert.accelerate(model, impl="native", cuda_graphs=True, padding="zero")
    return ours, plain, ours.forward.graphs


def batch_of(*lengths: int, types: bool = True, pad: int = 0) -> dict[str, torch.Tensor]:
    width = max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids = torch.where(mask, torch.randint(5, 60, mask.shape), pad)
    batch = {"input_ids": ids, "attention_mask": mask.long()}
    return batch | ({"token_type_ids": torch.randint(0, 2, ids.shape)} if types else {})


def assert_same(ours: nn.Module, plain: nn.Module, batch: dict) -> None:
    with torch.no_grad():
        a, b = ours(**batch), plain(**batch)
    assert type(a) is type(b)
    assert list(a.keys()) == list(b.keys())
    for x, y in zip(a.to_tuple(), b.to_tuple(), strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


# ---- buckets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "sequences", "expected"),
    [(1, 1, (16, 1)), (16, 2, (16, 2)), (17, 3, (24, 4)), (4096, 65, (4096, 128)), (4097, 1, None), (0, 1, None)],
)
def test_bucket_of(tokens, sequences, expected):
    assert bucket_of(tokens, sequences) == expected


@pytest.mark.parametrize(
    ("width", "expected"),
    [(1024, 4096), (768, 4096), (767, 4096), (512, 8192), (384, 16384), (256, 32768), (32, 65536)],
)
def test_narrow_models_have_larger_buckets(width, expected):
    """By the square of the width, as the work of a token grows; no bucket is larger than a batch of `Encoder`."""
    assert most_tokens(width) == expected
    assert bucket_of(expected, 1, expected) == (expected, 1)
    assert bucket_of(expected + 1, 1, expected) is None


def test_the_largest_bucket_is_that_of_the_width():
    ours, _, graphs = pair()
    assert graphs.most == most_tokens(SIZES["hidden_size"])
    graphs.most = 16
    with torch.no_grad():
        ours(**batch_of(17))
        ours(**batch_of(16))
    assert graphs.calls == {"over 16 tokens": 1, "replayed": 1}
    assert copy.deepcopy(graphs).most == 16


def test_a_third_of_a_bucket_at_most_is_filled_up():
    for below, size in itertools.pairwise(TOKENS):
        assert (size - below - 1) / size < 1 / 3


# ---- the numbers -----------------------------------------------------------------------------------------

# three batches of one bucket (48 tokens, 4 sequences): large, small, and one of full length; then another bucket
LENGTHS = [(20, 17, 9), (11, 1, 23, 2), (12, 12, 12), (5,)]


@pytest.mark.parametrize("name", [*FAMILIES_OF_4, "JinaEmbeddingsV3Model", "MegatronBertModel"])
def test_batches_of_one_bucket_share_a_recording(name):
    ours, plain, graphs = pair(name)
    types = getattr(ours.config, "type_vocab_size", 0) > 1
    for lengths in (*LENGTHS, *LENGTHS[::-1]):
        assert_same(ours, plain, batch_of(*lengths, types=types, pad=ours.config.pad_token_id))
    assert graphs.recorded == len(graphs) == 2
    assert graphs.calls == {"replayed": 2 * len(LENGTHS)}


@pytest.mark.parametrize("name", ["BertModel", "ModernBertModel"])
def test_the_same_bits_as_without(name):
    """Within `batch_invariant()`, where bits do not depend on how many rows a product has."""
    ours, plain, _ = pair(name)
    with fastbert.batch_invariant(), torch.no_grad():
        for lengths in LENGTHS:
            batch = batch_of(*lengths, types=name == "BertModel")
            assert torch.equal(ours(**batch).last_hidden_state, plain(**batch).last_hidden_state)


def test_nothing_of_the_batch_before_is_left():
    """The same bits from a recording that ran larger batches, from a poisoned one and from a fresh one."""
    ours, _, graphs = pair()
    fresh, small = copy.deepcopy(ours), batch_of(11, 1, 23)
    with torch.no_grad():
        ours(**batch_of(20, 17, 11))
        after_large = ours(**small).last_hidden_state
        (recording,) = graphs._recordings.values()
        recording.static.buffer.fill_(-(2**40))
        recording.output.fill_(float("nan"))
        assert torch.equal(ours(**small).last_hidden_state, after_large)
        assert torch.equal(fresh(**small).last_hidden_state, after_large)


def test_an_output_is_not_overwritten_by_the_next_call():
    ours, _, _ = pair()
    first, second = batch_of(16), batch_of(16)
    with torch.no_grad():
        output = ours(**first).last_hidden_state
        kept = output.clone()
        ours(**second)
    assert torch.equal(output, kept)


def test_what_fills_a_bucket_may_be_longer_than_the_position_table():
    """385 tokens in a bucket of 512: the 127 that fill it are one sequence, and MPNet's bias must cover that too."""
    ours, plain, graphs = pair("MPNetModel")
    assert_same(ours, plain, batch_of(*[60] * 6, 25, types=False, pad=1))
    (recording,) = graphs._recordings.values()
    assert recording.static.max_seqlen == 128 > ours.forward.look().settings.longest


VARIANTS = {
    "no_mask": lambda b: {"input_ids": b["input_ids"]},
    "mask_of_ones": lambda b: b | {"attention_mask": torch.ones_like(b["input_ids"])},
    "bool_mask": lambda b: b | {"attention_mask": b["attention_mask"].bool()},
    "positions": lambda b: b | {"position_ids": torch.randint(0, 60, b["input_ids"].shape)},
    "positions_of_all": lambda b: b | {"position_ids": torch.arange(12)[None] * 2},
    "holes": lambda b: b | {"attention_mask": (torch.arange(12) % torch.tensor([[3], [4]]) != 1).long()},
    "int32": lambda b: {name: t.int() for name, t in b.items()},
    "tuple": lambda b: b,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_kinds_of_batches(variant):
    ours, plain, graphs = pair()
    batch = VARIANTS[variant](batch_of(12, 7))
    assert_same(ours, plain, batch)
    if variant == "tuple":
        with torch.inference_mode():
            a, b = (m(**batch, return_dict=False) for m in (ours, plain))
        assert [t.shape for t in a] == [t.shape for t in b]
    assert set(graphs.calls) == {"replayed"}


def test_layers_taken_away_before():
    """A slice of an nn.ModuleList is in training mode, whatever the list was; it computes nothing."""
    model = build(num_hidden_layers=3)
    model.encoder.layer = model.encoder.layer[:2]
    assert model.encoder.layer.training
    plain = fastbert.accelerate(copy.deepcopy(model), impl="native")
    ours = fastbert.accelerate(model, impl="native", cuda_graphs=True)
    assert_same(ours, plain, batch_of(7, 3))
    assert ours.forward.graphs.calls == {"replayed": 1}


def test_with_a_head_on_top():
    plain = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)).eval()
    ours = fastbert.accelerate(copy.deepcopy(plain), impl="native", cuda_graphs=True)
    batch = batch_of(9, 5) | {"labels": torch.tensor([0, 1])}
    with torch.inference_mode():
        a, b = ours(**batch), plain(**batch)
    torch.testing.assert_close(a.loss, b.loss)
    torch.testing.assert_close(a.logits, b.logits, atol=1e-5, rtol=1e-4)
    assert ours.bert.forward.graphs.calls == {"replayed": 1}


# ---- what changes a recording ----------------------------------------------------------------------------


def _in_place(model):
    model.encoder.layer[0].attention.self.query.weight.data.mul_(1.5)  # is part of a joined weight
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
    """Neither a module nor a tensor, so a recording of one was replayed after another came in its place."""
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


def test_the_recording_unused_for_longest_goes():
    ours, plain, _ = pair()
    graphs = ours.forward.graphs = Graphs(torch.device("cpu"), limit=2)
    for length in (10, 20, 10, 40):  # the one for 20 goes
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

        def replay_slowly():  # long enough for the other threads to come in
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


# ---- what runs as without --------------------------------------------------------------------------------


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
def test_runs_as_without_and_explain_says_why(more, change, reason):
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
    """A recording has its tables of one width; those of dynamic scaling are others beyond the original's maximum."""
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
def test_hooks_put_in_after_the_recording_are_heard():
    ours, plain, graphs = pair()
    batch = batch_of(7, 7)  # whoever listens is shown what the original has at padding
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


def test_what_the_original_does_it_still_does():
    ours, _, graphs = pair()
    with pytest.warns(UserWarning, match="output_attentions was given"), torch.no_grad():
        assert ours(**batch_of(5), output_attentions=True).attentions is not None
    assert graphs.calls == {"output_attentions was given": 1}


def test_a_failure_to_record_is_said_once_and_goes_on_without(recorder):
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


def test_restore_takes_the_recordings_away():
    ours, _, _ = pair()
    fastbert.restore(ours)
    assert "forward" not in ours.__dict__
    assert not hasattr(fastbert.accelerate(ours, impl="native").forward, "graphs")


# ---- fastbert's own model --------------------------------------------------------------------------------


def test_own_model():
    config = BertConfig(**SIZES)
    model = BertModel(config, impl="native").eval()
    ours = copy.deepcopy(model).use_cuda_graphs()
    with torch.no_grad():
        for lengths in LENGTHS:
            rows = [torch.randint(5, 60, (n,)).tolist() for n in lengths]
            packed = PackedBatch.from_lists(rows)
            for a, b in zip(ours(packed), model(packed), strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        batch = batch_of(20, 17, 9)
        for a, b in zip(ours(**batch), model(**batch), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        assert ours.graphs.recorded == 2
        ours.encoder["layer"][0].output["dense"].weight.mul_(2)
        assert not torch.allclose(ours(packed)[0], model(packed)[0])
        ours.encoder["layer"][0].output["dense"].weight.div_(2)
        torch.testing.assert_close(ours(packed)[0], model(packed)[0], atol=1e-5, rtol=1e-4)
        heard = []
        ours.encoder["layer"][1].register_forward_hook(lambda *_: heard.append(1))
        ours(packed)
        assert heard == [1]
        assert ours(**batch, output_hidden_states=True).hidden_states is not None
    assert ours.graphs.calls["replayed"] == 7
    assert ours(packed)[0].requires_grad
    assert ours.use_cuda_graphs(False).graphs is None


def test_the_encoder_does_so_by_itself_where_launches_are_recorded(tmp_path, monkeypatch):
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    texts = ["a b c", "d e f g h a", "b"]

    def encoder(**options):
        return fastbert.Encoder.from_pretrained(tmp_path, device="cpu", dtype="float32", impl="native", **options)

    ours, asked, plain = encoder(), encoder(cuda_graphs=True), encoder(cuda_graphs=False)
    expected = plain.encode(texts)
    for one in (ours, asked):
        torch.testing.assert_close(one.encode(texts), expected, atol=1e-5, rtol=1e-4)
        assert one.model.graphs.calls == {"replayed": 1}
    assert plain.model.graphs is None

    heard = []
    ours.model.encoder["layer"][1].register_forward_hook(lambda *_: heard.append(1))
    torch.testing.assert_close(ours.encode(texts), expected, atol=1e-5, rtol=1e-4)
    assert heard == [1]
    with torch.no_grad():
        asked.model.embeddings.LayerNorm.weight.mul_(3.0)
        plain.model.embeddings.LayerNorm.weight.mul_(3.0)
    torch.testing.assert_close(asked.encode(texts), plain.encode(texts), atol=1e-5, rtol=1e-4)
    assert asked.model.graphs.recorded == 2

    monkeypatch.delitem(recordings.RECORDERS, "cpu")
    assert encoder().model.graphs is None


@pytest.mark.triton
def test_through_the_kernels():
    """Under the interpreter: the list of tiles is made within the recording, of cu_seqlens in its buffer."""
    model = BertModel(BertConfig(**{**SIZES, "num_hidden_layers": 1}), impl="triton").eval()
    ours = copy.deepcopy(model).use_cuda_graphs()
    with torch.no_grad():
        for lengths in ((4, 9), (11, 1)):
            packed = PackedBatch.from_lists([torch.randint(5, 60, (n,)).tolist() for n in lengths])
            torch.testing.assert_close(ours(packed)[0], model(packed)[0], atol=1e-5, rtol=1e-4)
    assert ours.graphs.calls == {"replayed": 2}


# ---- on a GPU --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records launches of a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["BertModel", "MPNetModel", "ModernBertModel"])
def test_on_a_gpu(name, dtype):
    model = build(name).to("cuda", dtype)
    plain = fastbert.accelerate(copy.deepcopy(model))
    ours = fastbert.accelerate(model, cuda_graphs=True)
    graphs = ours.forward.graphs
    tolerance = {"atol": 1e-4, "rtol": 1e-3} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}
    side = torch.cuda.Stream()
    for turn in range(3):
        side.wait_stream(torch.cuda.current_stream())
        for lengths in LENGTHS:
            batch = {k: t.cuda() for k, t in batch_of(*lengths, types=name == "BertModel").items()}
            with torch.inference_mode(), torch.cuda.stream(side if turn == 2 else torch.cuda.current_stream()):
                a, b = ours(**batch).last_hidden_state, plain(**batch).last_hidden_state
            torch.cuda.synchronize()
            torch.testing.assert_close(a, b, **tolerance)
        if turn == 1:  # recordings of the old parameters would show
            with torch.no_grad():
                for m in (ours, plain):
                    for p in m.parameters():
                        p.mul_(0.9)
    assert graphs.recorded == 4
    assert set(graphs.calls) == {"replayed"}
    with fastbert.batch_invariant(), torch.inference_mode():
        assert torch.equal(ours(**batch).last_hidden_state, plain(**batch).last_hidden_state)
