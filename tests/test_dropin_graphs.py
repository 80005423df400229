"""Replays of recorded launches. Without a GPU a replay calls the recorded function again on the same static buffers, so
all except the device's part is tested: buckets, filling, what is kept, dropped and refused."""

import copy
import itertools

import pytest
import torch

import fastbert
from dropin_recordings import SIZES, assert_same, batch_of, build, pair, record_on_cpus
from fastbert.config import BertConfig
from fastbert.dropin.families import FAMILIES_OF_4
from fastbert.inference import graphs as recordings
from fastbert.inference.graphs import TOKENS, bucket_of, most_tokens
from fastbert.models.bert import BertModel
from fastbert.packing import PackedBatch

transformers = pytest.importorskip("transformers", reason="its models are accelerated")
pytestmark = pytest.mark.native


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    return record_on_cpus(monkeypatch)


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
    """By the square of the width, as the work for a token grows. No bucket is larger than a batch of `Encoder`."""
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


def test_at_most_a_third_of_a_bucket_is_filling():
    for below, size in itertools.pairwise(TOKENS):
        assert (size - below - 1) / size < 1 / 3


# ---- the numbers -----------------------------------------------------------------------------------------


# three batches of one bucket (48 tokens, 4 sequences): large, small, one of full length; then another bucket
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
def test_the_same_bits_as_without_graphs(name):
    """Within `batch_invariant()`, where bits do not depend on the number of rows in a product."""
    ours, plain, _ = pair(name)
    with fastbert.batch_invariant(), torch.no_grad():
        for lengths in LENGTHS:
            batch = batch_of(*lengths, types=name == "BertModel")
            assert torch.equal(ours(**batch).last_hidden_state, plain(**batch).last_hidden_state)


def test_results_do_not_depend_on_earlier_batches():
    """A recording that ran larger batches, one with poisoned buffers and a fresh one give the same bits."""
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


def test_the_filling_of_a_bucket_may_be_longer_than_the_position_table():
    """385 tokens in a bucket of 512: the filling is one sequence of 127 tokens, which MPNet's bias must cover too."""
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


def test_layers_removed_before():
    """A slice of an nn.ModuleList is in training mode, whatever the list's mode; this changes no result."""
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


def test_encoder_replays_by_itself_where_launches_can_be_recorded(tmp_path, monkeypatch):
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
    """Under the interpreter. The recording itself makes the list of tiles, from the cu_seqlens in its buffer."""
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
        if turn == 1:  # a stale recording of the old parameters would show here
            with torch.no_grad():
                for m in (ours, plain):
                    for p in m.parameters():
                        p.mul_(0.9)
    assert graphs.recorded == 4
    assert set(graphs.calls) == {"replayed"}
    with fastbert.batch_invariant(), torch.inference_mode():
        assert torch.equal(ours(**batch).last_hidden_state, plain(**batch).last_hidden_state)
