"""The list of tiles for the Triton attention: every tile once, the longest sequence first, only for its own batch."""

import itertools

import pytest
import torch

from attention_checks import DEVICE, lengths_tensor, random_qkv
from fastbert.kernels import attention as kernels
from fastbert.testing import cu_seqlens_of


def test_shared_schedule_changes_nothing():
    cu_seqlens = cu_seqlens_of([70, 5], DEVICE)
    q, k, v = (t.half() for t in random_qkv([70, 5]))
    schedule = kernels.attention_schedule(cu_seqlens, 75)
    shared = kernels.attention(q, k, v, cu_seqlens, 70, schedule=schedule)
    assert torch.equal(shared, kernels.attention(q, k, v, cu_seqlens, 70))


def listed(schedule):
    """The entries of the three parts, without the surplus entries at the end of each part."""
    entries = [tuple(entry) for entry in schedule.entries.tolist()]
    bounds = (0, schedule.n_long, schedule.n_long + schedule.n_medium, len(entries))
    parts = [entries[first:end] for first, end in itertools.pairwise(bounds)]
    real = [[entry for entry in part if entry != (-1, 0)] for part in parts]
    assert all(part[: len(found)] == found for part, found in zip(parts, real, strict=True))
    return real


def longest_first(entries, lengths):
    """The tiles of the longest sequence first, in order; of equally long sequences, the first one's tiles first."""
    return sorted(entries, key=lambda entry: (-lengths[entry[0]], *entry))


SCHEDULED = [[1] * 70, [64, 65, 128, 129, 0], [513], [65] * 9, [127, 1000, 3], [129] * 40, [0, 0], []]


@pytest.mark.parametrize("lengths", SCHEDULED, ids=str)
def test_schedule_lists_every_tile_once_longest_first(lengths):
    """The kernel's list, with parts of the greatest possible length and of exact length, equals the host's list."""
    long = [(b, t) for b, n in enumerate(lengths) if n > 128 for t in range(-(-n // 128))]
    medium = [(b, 0) for b, n in enumerate(lengths) if 64 < n <= 128]
    short = [(b, 0) for b, n in enumerate(lengths) if n <= 64]
    expected = [longest_first(part, lengths) for part in (long, medium, short)]
    cu_seqlens = cu_seqlens_of(lengths, DEVICE)
    for known in (None, lengths):
        schedule = kernels.attention_schedule(cu_seqlens, sum(lengths), lengths=known)
        assert listed(schedule) == expected
        assert known is None or schedule.entries.shape[0] == sum(map(len, expected))
    assert torch.equal(kernels.attention_entries(lengths), schedule.entries.cpu())


def test_schedule_of_more_sequences_than_a_program_handles():
    lengths = [(37 * n) % 300 for n in range(300)]
    schedule = kernels.attention_schedule(cu_seqlens_of(lengths, DEVICE), sum(lengths))
    assert list(itertools.chain(*listed(schedule))) == [
        tuple(entry) for entry in kernels.attention_entries(lengths).tolist()
    ]


def test_schedule_over_rows_goes_by_the_longer_side():
    """A sequence of few rows and many keys does not go to the kernels for short sequences, nor one of many rows."""
    rows, keys = [300, 3, 0, 70, 5, 200], [2, 300, 100, 10, 5, 0]
    spans = [cu_seqlens_of(lengths, DEVICE) for lengths in (rows, keys)]
    of_rows = kernels.attention_schedule(spans[0], sum(rows), spans[1])
    assert listed(of_rows) == [[(0, 0), (0, 1), (0, 2), (5, 0), (5, 1), (1, 0)], [(3, 0), (2, 0)], [(4, 0)]]
    of_keys = kernels.attention_schedule(spans[1], sum(keys), spans[0])
    assert listed(of_keys) == [[(1, 0), (1, 1), (1, 2), (0, 0)], [(2, 0), (3, 0)], [(4, 0)]]


def test_schedule_of_padded_lengths_covers_the_padding():
    lengths = lengths_tensor([10, 200, 0, 64, 65])
    schedule = kernels.attention_schedule(lengths, 200, padded=True)
    assert listed(schedule) == [[], [(1, 0), (1, 1), (4, 0), (4, 1)], [(3, 0), (0, 0), (2, 0)]]
    q, k, v = (torch.randn(5, 200, 2, 16, device=DEVICE).half() for _ in range(3))
    shared = kernels.attention_padded(q, k, v, lengths, schedule=schedule)
    assert torch.equal(shared, kernels.attention_padded(q, k, v, lengths))


def test_schedule_of_another_batch_is_refused():
    cu_seqlens = cu_seqlens_of([70, 5], DEVICE)
    q, k, v = (t.half() for t in random_qkv([70, 5]))
    schedule = kernels.attention_schedule(cu_seqlens, 75)
    with pytest.raises(ValueError, match=r"made for 2 sequences, size 75, padded False, but the call has 1, 75, False"):
        kernels.attention(q, k, v, cu_seqlens_of([75], DEVICE), 75, schedule=schedule)
    padded = [t.expand(2, *t.shape) for t in (q, k, v)]
    with pytest.raises(ValueError, match=r"but the call has 2, 75, True"):
        kernels.attention_padded(*padded, lengths_tensor([70, 5]), schedule=schedule)
    with pytest.raises(TypeError, match="must come from attention_schedule"):
        kernels.attention(q, k, v, cu_seqlens, 70, schedule=[(0, 1, 70, 0)])
    for wrong in ([70], [70, 4]):
        with pytest.raises(ValueError, match="expected 2 lengths with sum 75"):
            kernels.attention_schedule(cu_seqlens, 75, lengths=wrong)
