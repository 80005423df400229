"""Randomness as a pure function of (seed, stream, row, column): dropout without a stored mask.

    key(row)       = mix64(mix64(seed + GOLDEN * (stream + 1)) ^ row)      one 64-bit key a row
    bits(row, col) = a 32-bit mixing of col under the two halves of key(row)
    keep(row, col) = bits >= round(p * 2^32)

`row` is a 64-bit name that does not depend on where the row lies in memory: `sequence << 32 | position`
for a token, with the head folded into the stream for attention. So packed, padded and reordered batches
draw the same mask, and so do the reference (this file, in torch) and the kernels (`_random_triton.py`).

The mixers are splitmix64's finaliser (Steele, Lea, Flood 2014) for the key, and for the element Wellons'
`lowbias32` with the second half of the key added between its two rounds: five shifts and xors, two
multiplications an element, where Philox-4x32-10 needs about 20 instructions even if all four words are used.
"""

import torch

GOLDEN = 0x9E3779B97F4A7C15
MIX64_A, MIX64_B = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
MIX32_A, MIX32_B = 0x21F0AAAD, 0xD35A2D97
HEAD_STREAMS = 1 << 16  # attention's stream of (stream, head) is stream * HEAD_STREAMS + head
MASK32 = 0xFFFFFFFF


def keep_threshold(p: float) -> int:
    """The 32-bit threshold at or above which an element is kept: round(p * 2^32), at most 2^32 - 1."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {p}")
    return min(round(p * 2**32), MASK32)


def _signed(value: int) -> int:
    """A 64-bit pattern as an int64, which torch's wrapping arithmetic needs."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _shift_right(z: torch.Tensor, n: int) -> torch.Tensor:
    """Logical right shift of int64 (torch's own is arithmetic)."""
    return (z >> n) & ((1 << (64 - n)) - 1)


def _mix64(z: torch.Tensor) -> torch.Tensor:
    z = (z ^ _shift_right(z, 30)) * _signed(MIX64_A)
    z = (z ^ _shift_right(z, 27)) * _signed(MIX64_B)
    return z ^ _shift_right(z, 31)


def row_keys(seed: torch.Tensor, stream: int | torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Keys of `rows` (int64 or int32, any shape), int64. `stream` may be a tensor that broadcasts against rows."""
    if isinstance(stream, int):
        stream_offset = _signed(GOLDEN * (stream + 1))
    else:
        stream_offset = (stream.to(torch.int64) + 1) * _signed(GOLDEN)
    return _mix64(_mix64(seed.to(torch.int64).reshape(()) + stream_offset) ^ rows.to(torch.int64))


def keep_mask(keys: torch.Tensor, n_cols: int, p: float) -> torch.Tensor:
    """The boolean keep mask `[*keys.shape, n_cols]` of rows with these keys."""
    low, high = (keys & MASK32)[..., None], _shift_right(keys, 32)[..., None]
    x = torch.arange(n_cols, dtype=torch.int64, device=keys.device) ^ low
    x = ((x ^ (x >> 16)) * MIX32_A) & MASK32
    x = ((x ^ (x >> 15)) + high) & MASK32
    x = (x * MIX32_B) & MASK32  # the product may overflow int64; its low 32 bits are still correct
    return (x ^ (x >> 15)) >= keep_threshold(p)
