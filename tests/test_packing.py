"""The packed batch: unpacking restores what was packed, for every mask."""

from dataclasses import fields, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert import functional as F
from fastbert.packing import PackedBatch

pytestmark = pytest.mark.once

MASKS = {
    "right_padded": [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]],
    "left_padded": [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]],
    "with_holes": [[1, 0, 1, 0], [0, 1, 1, 0], [1, 1, 0, 1]],
    "with_an_empty_row": [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]],
    "all_empty": [[0, 0, 0, 0]] * 3,
    "full": [[1, 1, 1, 1]] * 3,
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_pad_undoes_unpad(mask):
    mask = torch.tensor(mask)
    ids = torch.arange(12).reshape(3, 4) + 100
    batch = PackedBatch.from_padded(ids, mask)
    assert batch.input_ids.tolist() == ids[mask.bool()].tolist()
    assert batch.positions.tolist() == torch.arange(4).expand(3, 4)[mask.bool()].tolist()
    assert batch.cu_seqlens.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    assert batch.cu_seqlens.dtype == torch.int32
    x = torch.randn(3, 4, 5)
    assert torch.equal(batch.pad(batch.unpad(x)), x * mask[..., None])
    assert torch.equal(batch.pad(batch.unpad(x), value=7.0)[~mask.bool()], torch.full((12 - mask.sum(), 5), 7.0))


def test_a_batch_without_a_mask_is_only_reshaped():
    ids = torch.arange(12).reshape(3, 4)
    batch = PackedBatch.from_padded(ids)
    assert batch.input_ids.data_ptr() == ids.data_ptr()
    assert batch.cu_seqlens.tolist() == [0, 4, 8, 12]
    assert torch.equal(batch.pad(batch.unpad(ids)), ids)


def test_lists_are_packed_end_to_end():
    batch = PackedBatch.from_lists([[5, 6, 7], [], [8]], [[0, 0, 1], [], [1]])
    assert batch.input_ids.tolist() == [5, 6, 7, 8]
    assert batch.token_type_ids.tolist() == [0, 0, 1, 1]
    assert batch.positions.tolist() == [0, 1, 2, 0]
    assert batch.cu_seqlens.tolist() == [0, 3, 3, 4]
    assert (batch.max_seqlen, batch.batch_size, batch.total_tokens) == (3, 3, 4)
    padded = batch.pad(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert padded.tolist() == [[1, 2, 3], [0, 0, 0], [4, 0, 0]]


def test_no_sequences():
    batch = PackedBatch.from_lists([])
    assert (batch.total_tokens, batch.batch_size, batch.max_seqlen) == (0, 0, 0)
    assert batch.cu_seqlens.tolist() == [0]
    assert batch.pad(torch.zeros(0, 3)).shape == (0, 0, 3)


def test_row_ids_do_not_depend_on_the_padding():
    ids = torch.arange(8).reshape(2, 4)
    packed = PackedBatch.from_lists([[1, 2, 3], [4, 5]]).row_ids()
    for mask in ([[1, 1, 1, 0], [1, 1, 0, 0]], [[0, 1, 1, 1], [0, 0, 1, 1]], [[1, 0, 1, 1], [1, 0, 0, 1]]):
        assert torch.equal(PackedBatch.from_padded(ids, torch.tensor(mask)).row_ids(), packed)
    assert packed.tolist() == [0, 1, 2, 1 << 32, (1 << 32) + 1]


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"attention_mask must be \(2, 4\), got \(2, 3\)"):
        PackedBatch.from_padded(torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 3))
    with pytest.raises(ValueError, match="lengths of input_ids"):
        PackedBatch.from_lists([[1, 2]], [[0]])
    with pytest.raises(ValueError, match=r"padded batch \(2, 4\), got \(2, 3, 1\)"):
        PackedBatch.from_padded(torch.zeros(2, 4, dtype=torch.long)).unpad(torch.zeros(2, 3, 1))


def test_gradients_pass_through_pad_and_unpad():
    batch = PackedBatch.from_padded(torch.zeros(2, 3, dtype=torch.long), torch.tensor([[1, 1, 0], [0, 1, 1]]))
    x = torch.randn(2, 3, 4, requires_grad=True)
    dy = torch.randn(2, 3, 4)
    batch.pad(batch.unpad(x) * 2).backward(dy)
    assert torch.equal(x.grad, 2 * dy * torch.tensor([[1, 1, 0], [0, 1, 1]])[..., None])


# ---- on its way to a device ------------------------------------------------------------------------------


class Copies(TorchDispatchMode):
    """Records the sizes in bytes of the tensors that are copied to a device of this kind."""

    def __init__(self, device: str):
        super().__init__()
        self.device, self.sizes = torch.device(device), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") == self.device:
            self.sizes.append(args[0].nbytes)
        return func(*args, **kwargs)


def tensors_of(batch: PackedBatch) -> dict[str, torch.Tensor]:
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


ROWS, TYPES = [[5, 6, 7], [], [8] * 70], [[0, 0, 1], [], [1] * 70]


def test_a_batch_goes_to_a_device_in_one_copy():
    host = PackedBatch.from_lists(ROWS, TYPES)
    expected = tensors_of(host)
    with Copies("meta") as copies:
        there = PackedBatch.from_lists(ROWS, TYPES, device="meta")
    sizes = sorted(t.nbytes for t in expected.values())
    assert len(copies.sizes) == 1
    assert 0 <= copies.sizes[0] - sum(sizes) < 16 * len(sizes)
    found = tensors_of(there)
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        name: (t.dtype, t.shape) for name, t in expected.items()
    }
    assert {t.device.type for t in found.values()} == {"meta"}
    assert len({t.untyped_storage()._cdata for t in found.values()}) == 1
    assert all(t.storage_offset() * t.itemsize % 16 == 0 for t in found.values())


def test_tensors_in_one_copy_keep_their_values():
    """The same copy, but to this machine."""
    host = PackedBatch.from_lists(ROWS, TYPES)
    there = host._in_one_copy(torch.device("cpu"))
    found, expected = tensors_of(there), tensors_of(host)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (there.max_seqlen, there.lengths, there.padded_shape) == (70, (3, 0, 70), None)


def test_the_list_of_tiles_is_made_only_for_the_kernels(monkeypatch):
    monkeypatch.setattr("fastbert.functional._choice.why_not_triton", lambda device: None)
    batch = PackedBatch.from_lists([[5] * n for n in (3, 0, 70, 300)])
    assert batch.entries.tolist() == [[3, 0], [3, 1], [3, 2], [2, 0], [0, 0], [1, 0]]
    schedule = batch.schedule("triton")
    assert schedule.entries is batch.entries
    assert (schedule.n_long, schedule.n_medium) == (3, 1)
    monkeypatch.setattr("fastbert.functional._choice.why_not_triton", lambda device: "no")
    assert PackedBatch.from_lists([[5]]).entries is None


def test_the_list_of_tiles_is_dropped_with_its_lengths():
    """A batch with other cu_seqlens kept the old list: attention then wrote 3 rows of a sequence of 70."""
    batch, turned = (PackedBatch.from_lists([[5] * n for n in lengths]) for lengths in ((70, 3), (3, 70)))
    changed = replace(batch, cu_seqlens=turned.cu_seqlens)
    q = torch.randn(73, 2, 16, dtype=torch.float32)
    expected, found = (
        F.attention(q, q, q, b.cu_seqlens, b.max_seqlen, schedule=b.schedule()) for b in (turned, changed)
    )
    assert torch.equal(found, expected)


def test_what_a_replaced_batch_keeps(monkeypatch):
    monkeypatch.setattr("fastbert.functional.why_not_triton", lambda device: None)
    batch = PackedBatch.from_lists([[5] * 70, [5] * 3])
    other = torch.tensor([0, 3, 73], dtype=torch.int32)

    def kept(**changes):
        changed = replace(batch, **changes)
        return changed.lengths, changed.entries is batch.entries

    assert kept() == kept(positions=batch.positions + 1) == ((70, 3), True)
    assert kept(cu_seqlens=other) == (None, False)
    assert kept(cu_seqlens=other, lengths=(3, 70)) == ((3, 70), False)
    assert kept(lengths=None) == (None, False)
    assert replace(batch, cu_seqlens=other).entries is None
    there = batch.to("cpu").to("meta")
    assert there.lengths == (70, 3)
    assert there.entries.shape == batch.entries.shape
    assert replace(there, cu_seqlens=other).lengths is None


def test_known_lengths_are_used():
    ids, mask = torch.arange(12).reshape(3, 4), torch.tensor(MASKS["with_holes"])
    asked, given = (PackedBatch.from_padded(ids, mask, lengths=lengths) for lengths in (None, [2, 2, 3]))
    assert asked.lengths == given.lengths == (2, 2, 3)
    assert asked.max_seqlen == given.max_seqlen == 3
    assert torch.equal(asked.indices, given.indices)
    assert PackedBatch.from_padded(ids).lengths == (4, 4, 4)


def test_names_of_sequences_belong_to_their_tokens():
    """They are used for dropout only: padding puts a token into the same place whatever the names are."""
    batch = PackedBatch.from_lists([[1, 2, 3], [4, 5]], sequence_ids=[7, 2**31 - 1])
    assert batch.row_ids().tolist() == [
        7 << 32,
        (7 << 32) + 1,
        (7 << 32) + 2,
        (2**31 - 1) << 32,
        ((2**31 - 1) << 32) + 1,
    ]
    assert batch.sequence_names.tolist() == [7, 2**31 - 1]
    assert batch.pad(batch.input_ids).tolist() == [[1, 2, 3], [4, 5, 0]]
    with pytest.raises(ValueError, match="sequence_ids must be 2, one for each sequence, got 1"):
        PackedBatch.from_lists([[1], [2]], sequence_ids=[1])
