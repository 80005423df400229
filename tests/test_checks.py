"""Lengths and indices that do not fit are refused before anything computes with them."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import fastbert.functional as F
from fastbert import BertConfig, BertModel
from fastbert.kernels import _checks
from fastbert.packing import PackedBatch

IMPLS = ("triton", "native", "reference")
TOKENS = 48
# What a program that packs batches itself may get wrong -> starts of sequences over 48 tokens.
BAD = {
    "falls": [0, 32, 16, 48],
    "past_the_end": [0, 16, 64],
    "far_past_the_end": [0, 16, 2**31 - 1],
    "too_short": [0, 16, 32],
    "starts_later": [4, 16, 48],
    "starts_before": [-16, 16, 48],
    "negative_inside": [0, -16, 48],
    "falls_and_ends_right": [0, 64, 48],
    "no_sequences_of_tokens": [0],
}
bad = pytest.mark.parametrize("starts", BAD.values(), ids=BAD)
impls = pytest.mark.parametrize("impl", IMPLS)


def starts_of(numbers):
    return torch.tensor(numbers, dtype=torch.int32)


@bad
@impls
@pytest.mark.parametrize("width", [16, 10], ids=("in_cpp", "odd_width"))
@pytest.mark.parametrize("grad", [False, True], ids=("inference", "training"))
def test_attention_refuses_lengths(starts, impl, width, grad):
    """On a CPU such lengths corrupted the heap, looped for a minute, or left rows unwritten."""
    q, k, v = (torch.randn(TOKENS, 2, width, requires_grad=grad) for _ in range(3))
    with pytest.raises(ValueError, match="cu_seqlens must start at 0, never fall and end at 48"):
        F.attention(q, k, v, starts_of(starts), TOKENS, impl=impl)
    with pytest.raises(ValueError, match="cu_seqlens must start at 0"):
        F.attention(q, k, v, starts_of(starts), TOKENS, impl=impl, dropout_p=0.1, seed=torch.tensor([1]))
    if impl != "reference":
        with pytest.raises(ValueError, match="cu_seqlens must start at 0"):
            F.attention_schedule(starts_of(starts), TOKENS, impl)


@bad
@impls
def test_cross_attention_refuses_lengths(starts, impl):
    q, k, v = torch.randn(8, 2, 16), torch.randn(TOKENS, 2, 16), torch.randn(TOKENS, 2, 16)
    of_q = starts_of([0, *[8] * (len(starts) - 1)])
    with pytest.raises(ValueError, match=r"cu_seqlens(_k)? must start at 0"):
        F.attention(q, k, v, of_q, 8, cu_seqlens_k=starts_of(starts), max_seqlen_k=TOKENS, impl=impl)


@impls
def test_a_bound_below_the_longest_sequence_is_refused(impl):
    """Triton kernels are launched for max_seqlen rows: the rows beyond it would stay unwritten."""
    q, k, v = (torch.randn(TOKENS, 2, 16) for _ in range(3))
    with pytest.raises(ValueError, match="max_seqlen is 31"):
        F.attention(q, k, v, starts_of([0, 16, 48]), 31, impl=impl)


@impls
@pytest.mark.parametrize("lengths", [[3, 17], [3, -1], [2**31 - 1, 4]])
def test_padded_attention_refuses_lengths(impl, lengths):
    q, k, v = (torch.randn(2, 16, 2, 16) for _ in range(3))
    with pytest.raises(ValueError, match="seqlens must lie in 0 to 16"):
        F.attention_padded(q, k, v, starts_of(lengths), impl=impl)
    with pytest.raises(ValueError, match="seqlens_k must lie in 0 to 16"):
        F.attention_padded(q, k, v, None, starts_of(lengths), impl=impl)


@bad
@impls
@pytest.mark.parametrize("mode", F.POOLING_MODES)
@pytest.mark.parametrize("width", [32, 10])
def test_pooling_refuses_lengths(starts, impl, mode, width):
    with pytest.raises(ValueError, match="pool: cu_seqlens must start at 0"):
        F.pool(torch.randn(TOKENS, width), starts_of(starts), mode, impl=impl)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    return BertModel(config).eval()


@bad
@pytest.mark.parametrize("grad", [False, True], ids=("inference", "training"))
def test_the_model_refuses_a_packed_batch_made_by_hand(model, starts, grad):
    batch = PackedBatch.from_lists([[5] * 16, [7] * 32])
    with torch.set_grad_enabled(grad):
        model(batch)
        with pytest.raises(ValueError, match="cu_seqlens must start at 0"):
            model(replace(batch, cu_seqlens=starts_of(starts)))


def test_batches_made_by_hand_are_checked_wherever_their_lengths_are_used(model):
    """`pad` and the row names for dropout put rows into other sequences. `lengths` that agreed with cu_seqlens only in
    their sum decided which tokens attend to which. No lengths at all raised an IndexError."""
    batch = PackedBatch.from_lists([[5] * 16, [7] * 32])
    for starts in ([0, 32, 16, 48], [0, 16, 64], [0, 16, 2**31 - 1], [-16, 16, 48], []):
        wrong = replace(batch, cu_seqlens=starts_of(starts))
        for used in (lambda w=wrong: w.pad(torch.ones(TOKENS, 2)), wrong.row_ids, lambda w=wrong: model(w)):
            with pytest.raises(ValueError, match="cu_seqlens must start at 0"):
                used()
    with pytest.raises(ValueError, match="cu_seqlens must start at 0"):
        F.attention_schedule(starts_of([]), TOKENS, "native")
    for kind in (batch.cu_seqlens.long(), batch.cu_seqlens[None], batch.cu_seqlens.float()):
        with pytest.raises(ValueError, match=r"cu_seqlens must be \[B \+ 1\] int32"):
            model(replace(batch, cu_seqlens=kind))
    for lengths in ((32, 16), (-16, 64), (48,)):
        with pytest.raises(ValueError, match="lengths"):
            F.attention_schedule(batch.cu_seqlens, TOKENS, "native", lengths=lengths)


def test_the_model_refuses_a_bound_and_indices_that_do_not_fit(model):
    batch = PackedBatch.from_lists([[5] * 16, [7] * 32], [[0] * 16, [1] * 32])
    for wrong, message in (
        ({"max_seqlen": 31}, "max_seqlen is 31"),
        ({"input_ids": batch.input_ids + 53}, "token ids must lie in 0 to 59, got 58 to 60"),
        ({"input_ids": batch.input_ids - 6}, "token ids must lie in 0 to 59, got -1 to 1"),
        ({"token_type_ids": batch.token_type_ids + 1}, "segments must lie in 0 to 1, got 1 to 2"),
        ({"positions": batch.positions + 33}, "positions must lie in 0 to 63, got 33 to 64"),
        ({"positions": batch.positions[:-1]}, "cu_seqlens must start at 0, never fall and end at 47"),
        ({"input_ids": batch.input_ids[:-1]}, "input_ids is"),
    ):
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            model(replace(batch, **wrong))


@impls
def test_indices_outside_of_their_tables_are_refused(impl):
    """The Triton kernels read a row of zeros for such an id; torch raises."""
    word, position, types = torch.randn(9, 32), torch.randn(5, 32), torch.randn(2, 32)
    weight, bias, good = torch.ones(32), torch.zeros(32), torch.tensor([0, 1, 1])
    for place, wrong in ((0, 9), (0, -1), (1, 2), (2, 5)):
        indices = [good.clone(), good.clone(), good.clone()]
        indices[place][1] = wrong
        for grad in (False, True):
            with pytest.raises((IndexError, ValueError)):
                F.embedding_layer_norm(
                    *indices, word.requires_grad_(grad), position, types, weight, bias, impl=impl
                )  # fmt: skip
    hidden, labels = torch.randn(3, 32), torch.tensor([0, -100, 9])
    for wrong in (9, -1):
        labels[0] = wrong
        with pytest.raises((IndexError, ValueError)):
            F.linear_cross_entropy(hidden, word.detach(), None, labels.clamp(max=9), impl=impl)


def test_good_lengths_pass():
    _checks.expect_sequences("op", "cu_seqlens", starts_of([0]), 0)
    _checks.expect_sequences("op", "cu_seqlens", starts_of([0, 0, 3, 3, 9]), 9, 6)
    _checks.expect_lengths("op", "seqlens", starts_of([]), 0)
    _checks.expect_indices("op", "labels", torch.tensor([-100, 3, 0]), 4, ignored=-100)
    _checks.expect_indices("op", "labels", torch.tensor([9, 3, 0]), 4, ignored=9)
    with pytest.raises(ValueError, match="got -7 to 3"):
        _checks.expect_indices("op", "labels", torch.tensor([-100, -7, 3]), 4, ignored=-100)


@pytest.mark.once
def test_tensors_on_a_device_are_checked_only_on_request(monkeypatch):
    """The check would wait for a GPU. A stub stands for a tensor on a GPU."""
    script = "import torch; from fastbert.kernels import _checks; print(_checks.CHECKS_DEVICES)"
    for value, expected in (("1", "True"), ("0", "False"), (None, "False")):
        environment = {name: v for name, v in os.environ.items() if name != "FASTBERT_CHECK"}
        environment |= {} if value is None else {"FASTBERT_CHECK": value}
        run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert run.stdout.strip() == expected, run.stderr
    assert not _checks.can_look(torch.empty(3, device="meta"))

    class OnDevice:
        is_cpu, is_cuda, is_meta = False, True, False

    monkeypatch.setattr(_checks, "Tensor", OnDevice)
    for asked, busy, expected in ((False, False, False), (True, False, True), (True, True, False)):
        monkeypatch.setattr(_checks, "CHECKS_DEVICES", asked)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda busy=busy: busy)
        assert _checks.can_look(OnDevice()) is expected

    def refuses():
        raise RuntimeError("torch was built without CUDA")

    monkeypatch.setattr(_checks, "CHECKS_DEVICES", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", refuses)
    OnDevice.is_cuda = False  # another kind of device
    assert _checks.can_look(OnDevice())
