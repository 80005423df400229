"""Keyed randomness: torch and Triton give the bits that `_random.py` defines, and these are random."""

import math

import pytest
import torch

from fastbert import functional
from fastbert.kernels import _device, reference
from fastbert.kernels._random import HEAD_STREAMS, keep_mask, keep_threshold, row_keys

if _device.HAS_TRITON:
    import triton
    import triton.language as tl

    from fastbert.kernels._random_triton import _keep_mask, _row_keys

    @triton.jit
    def _draw(
        seed_ptr, rows_ptr,   # in:  [1], [M]
        keys_ptr, keep_ptr,   # out: [M], [M, N]
        stream, threshold,
        n_rows, n_cols,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        """Draws as a fused kernel does for its rows and columns."""
        offs_m = tl.arange(0, BLOCK_M)
        offs_n = tl.arange(0, BLOCK_N)
        mask_m = offs_m < n_rows

        keys = _row_keys(seed_ptr, stream, tl.load(rows_ptr + offs_m, mask=mask_m, other=0))
        keep = _keep_mask(keys[:, None], offs_n[None, :], threshold)  # [BLOCK_M, BLOCK_N]

        tl.store(keys_ptr + offs_m, keys.to(tl.int64), mask=mask_m)
        mask = mask_m[:, None] & (offs_n < n_cols)[None, :]
        tl.store(keep_ptr + offs_m[:, None] * n_cols + offs_n[None, :], keep.to(tl.int8), mask=mask)


MASK64 = 2**64 - 1

# dropout probability -> why
PROBABILITIES = {
    "zero": 0.0,
    "below_a_bit": 1e-12,  # rounds to threshold 0: everything is kept
    "tiny": 1e-9,
    "bert": 0.1,
    "half": 0.5,
    "nearly_one": 1 - 1e-9,
    "next_to_one": 1 - 2**-53,  # rounds to 2^32, which does not fit 32 bits
}
# (seed, stream, rows) that together use every bit of the arithmetic
KEYS = {
    "zeros": (0, 0, [0]),
    "small": (1, 1, list(range(37))),
    "token_rows": (1234567890123, 5, [b << 32 | i for b in (0, 1, 70000) for i in (0, 1, 511)]),
    "head_stream": (42, 3 * HEAD_STREAMS + 15, [0, 1, 2**31, 2**32 - 1]),
    "negative_seed": (-1, 2, [0, 2**63 - 1]),
    "extreme_seed": (2**63 - 1, 7, [1, 2**40]),
}


def _keys_by_hand(seed: int, stream: int, row: int) -> int:
    """The docstring's formula in Python's unbounded integers."""

    def mix64(z):
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK64
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK64
        return z ^ z >> 31

    return mix64(mix64((seed + 0x9E3779B97F4A7C15 * (stream + 1)) & MASK64) ^ row)


def _bits_by_hand(key: int, col: int) -> int:
    x = col ^ key & 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x21F0AAAD & 0xFFFFFFFF
    x = (x ^ x >> 15) + (key >> 32) & 0xFFFFFFFF
    x = x * 0xD35A2D97 & 0xFFFFFFFF
    return x ^ x >> 15


def _keys(seed: int, stream, rows) -> torch.Tensor:
    return row_keys(torch.tensor([seed]), stream, torch.as_tensor(rows))


# ---- the bits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KEYS)
def test_torch_gives_the_bits_of_the_formula(name):
    seed, stream, rows = KEYS[name]
    expected = [_keys_by_hand(seed, stream, row) for row in rows]
    keys = _keys(seed, stream, rows)

    assert [key & MASK64 for key in keys.tolist()] == expected
    for p in (0.1, 0.5):
        by_hand = [[_bits_by_hand(key, col) >= keep_threshold(p) for col in range(70)] for key in expected]
        assert keep_mask(keys, 70, p).tolist() == by_hand


@pytest.mark.triton
@pytest.mark.parametrize("p", PROBABILITIES.values(), ids=PROBABILITIES)
@pytest.mark.parametrize("name", KEYS)
def test_the_kernel_gives_torchs_bits(name, p, device):
    seed, stream, rows = KEYS[name]
    expected = _keys(seed, stream, rows)

    keys, keep = _drawn_by_kernel(seed, stream, rows, keep_threshold(p), 130, device)

    assert torch.equal(keys, expected)
    assert torch.equal(keep, keep_mask(expected, 130, p))


def test_an_element_at_the_threshold_is_kept(device):
    """keep is bits >= threshold. One element in 2^32 equals the threshold, so this one was searched for."""
    seed, stream, rows = KEYS["token_rows"]
    bits = _bits_by_hand(_keys_by_hand(seed, stream, rows[4]), 77)
    keys = _keys(seed, stream, rows)
    assert keep_mask(keys, 130, bits / 2**32)[4, 77]
    assert not keep_mask(keys, 130, (bits + 1) / 2**32)[4, 77]
    if functional.why_not_triton(torch.device(device)) is None:
        assert _drawn_by_kernel(seed, stream, rows, bits, 130, device)[1][4, 77]
        assert not _drawn_by_kernel(seed, stream, rows, bits + 1, 130, device)[1][4, 77]


def _drawn_by_kernel(seed, stream, rows, threshold, n_cols, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(keys, keep mask), both on the CPU."""
    keys = torch.empty(len(rows), dtype=torch.int64, device=device)
    keep = torch.empty(len(rows), n_cols, dtype=torch.int8, device=device)
    _draw[(1,)](
        torch.tensor([seed], device=device), torch.tensor(rows, device=device), keys, keep, stream, threshold,
        len(rows), n_cols, BLOCK_M=triton.next_power_of_2(len(rows)), BLOCK_N=triton.next_power_of_2(n_cols),
    )  # fmt: skip
    return keys.cpu(), keep.cpu().bool()


# ---- the randomness --------------------------------------------------------------------------------------
# A count of n independent draws of probability q is within 5 sqrt(n q (1 - q)) of n q except once in two million times.
# Seeds are fixed, so these tests never fail by chance.


def _assert_binomial(count: int, n: int, q: float, what: str) -> None:
    sigma = math.sqrt(n * q * (1 - q))
    assert abs(count - n * q) <= 5 * sigma + 1, f"{what}: {count} of {n}, expected {n * q:.0f} +- {sigma:.0f}"


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_the_share_kept_is_binomial(p):
    rows = torch.arange(2048) + (torch.arange(2048) // 512 << 32)  # tokens of four sequences
    keep = keep_mask(_keys(7, 2, rows), 512, p)

    _assert_binomial(int(keep.sum()), keep.numel(), 1 - p, "all")
    worst_row, worst_col = (int((keep.sum(d) - keep.shape[d] * (1 - p)).abs().argmax()) for d in (1, 0))
    _assert_binomial(int(keep[worst_row].sum()), 512, 1 - p, f"row {worst_row}")
    _assert_binomial(int(keep[:, worst_col].sum()), 2048, 1 - p, f"column {worst_col}")


def test_every_bit_is_fair():
    keys = _keys(3, 0, torch.arange(64)).tolist()
    bits = [_bits_by_hand(key & MASK64, col) for key in keys for col in range(512)]
    for bit in range(32):
        _assert_binomial(sum(b >> bit & 1 for b in bits), len(bits), 0.5, f"bit {bit}")


# what differs between two masks -> (keys of one, keys of the other)
NEIGHBOURS = {
    "next_seed": lambda rows: (_keys(11, 3, rows), _keys(12, 3, rows)),
    "next_stream": lambda rows: (_keys(11, 3, rows), _keys(11, 4, rows)),
    "next_head": lambda rows: (_keys(11, 3 * HEAD_STREAMS, rows), _keys(11, 3 * HEAD_STREAMS + 1, rows)),
    "seed_for_stream": lambda rows: (_keys(12, 3, rows), _keys(11, 4, rows)),  # seed + stream is equal
    "next_row": lambda rows: (_keys(11, 3, rows), _keys(11, 3, rows + 1)),
    "next_sequence": lambda rows: (_keys(11, 3, rows), _keys(11, 3, rows + (1 << 32))),
    "position_for_sequence": lambda rows: (_keys(11, 3, rows + 1), _keys(11, 3, rows << 32 | 1)),
    "sign_of_seed": lambda rows: (_keys(11, 3, rows), _keys(-11, 3, rows)),
}


@pytest.mark.parametrize("pair", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_neighbours_are_independent(pair):
    p, n_cols = 0.5, 256
    one, other = (keep_mask(keys, n_cols, p) for keys in pair(torch.arange(1, 1025)))
    for shift in (0, 1, 2, 16, 128):  # the same column, and columns at a fixed distance
        agree = one[:, : n_cols - shift] == other[:, shift:]
        _assert_binomial(int(agree.sum()), agree.numel(), 0.5, f"agreement at distance {shift}")


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 8, 64, 255])
def test_columns_of_a_row_are_independent(distance):
    keep = keep_mask(_keys(5, 1, torch.arange(2048)), 512, 0.3)
    both = keep[:, :-distance] & keep[:, distance:]
    # pairs overlap, so their count varies more than that of independent draws: at most three times as much
    n, q = both.numel(), 0.7**2
    assert abs(int(both.sum()) - n * q) <= 5 * math.sqrt(3 * n * q * (1 - q))


# ---- what a mask depends on ------------------------------------------------------------------------------


@pytest.mark.parametrize("p", ["zero", "below_a_bit"])
def test_nothing_is_dropped_at_zero(p):
    assert keep_mask(_keys(1, 0, torch.arange(4096)), 256, PROBABILITIES[p]).all()


@pytest.mark.parametrize("p", ["nearly_one", "next_to_one"])
def test_almost_nothing_is_kept_near_one(p):
    """In 32 bits a threshold of 2^32 would wrap to 0 and keep everything."""
    assert keep_mask(_keys(1, 0, torch.arange(4096)), 256, PROBABILITIES[p]).sum() <= 1


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_a_probability_outside_its_range_is_refused(p):
    with pytest.raises(ValueError, match=r"dropout_p must be in \[0, 1\)"):
        keep_threshold(p)


def test_an_element_of_a_mask_does_not_depend_on_others():
    """For any rows, in any order and layout, and any number of columns, each element keeps its bit."""
    rows = torch.arange(24).reshape(4, 6) * 3 + (5 << 32)
    whole = keep_mask(_keys(9, 1, rows), 64, 0.4)

    shuffled = torch.randperm(24)
    assert torch.equal(keep_mask(_keys(9, 1, rows.flatten()[shuffled]), 64, 0.4), whole.flatten(0, 1)[shuffled])
    assert torch.equal(keep_mask(_keys(9, 1, rows.t()), 64, 0.4), whole.transpose(0, 1))  # other strides
    assert torch.equal(keep_mask(_keys(9, 1, rows[2, 3]), 64, 0.4), whole[2, 3])
    assert torch.equal(keep_mask(_keys(9, 1, rows), 17, 0.4), whole[..., :17])
    assert keep_mask(_keys(9, 1, rows[:0]), 64, 0.4).shape == (0, 6, 64)


def test_a_stream_may_be_a_number_or_a_tensor():
    rows = torch.arange(10)
    heads = torch.arange(4)[:, None]
    by_head = row_keys(torch.tensor([3]), 2 * HEAD_STREAMS + heads, rows)
    assert by_head.shape == (4, 10)
    for head in range(4):
        assert torch.equal(by_head[head], row_keys(torch.tensor([3]), 2 * HEAD_STREAMS + head, rows))


def test_one_bit_of_the_seed_changes_half_of_the_mask():
    rows, base = torch.arange(64), 0x0123456789ABCDEF
    mask = keep_mask(_keys(base, 0, rows), 64, 0.5)
    for bit in range(63):
        changed = mask != keep_mask(_keys(base ^ 1 << bit, 0, rows), 64, 0.5)
        _assert_binomial(int(changed.sum()), changed.numel(), 0.5, f"seed bit {bit}")


def test_what_is_kept_is_scaled_to_the_same_mean():
    x = torch.ones(4096, 256, dtype=torch.float64)
    y = reference.dropout(x, 0.2, torch.tensor([1]), 0, None)
    assert set(y.unique().tolist()) == {0.0, 1 / 0.8}
    assert abs(y.mean().item() - 1.0) < 5 * math.sqrt(0.2 / 0.8 / x.numel())
