"""`_random.py` inside Triton kernels, with the same bits."""

import triton
import triton.language as tl

from ._random import GOLDEN as _GOLDEN
from ._random import HEAD_STREAMS as _HEAD_STREAMS
from ._random import MIX32_A as _MIX32_A
from ._random import MIX32_B as _MIX32_B
from ._random import MIX64_A as _MIX64_A
from ._random import MIX64_B as _MIX64_B

GOLDEN = tl.constexpr(_GOLDEN)
HEAD_STREAMS = tl.constexpr(_HEAD_STREAMS)
MIX32_A, MIX32_B = tl.constexpr(_MIX32_A), tl.constexpr(_MIX32_B)
MIX64_A, MIX64_B = tl.constexpr(_MIX64_A), tl.constexpr(_MIX64_B)


@triton.jit
def _mix64(z):
    z = (z ^ (z >> 30)) * tl.full((), MIX64_A, tl.uint64)
    z = (z ^ (z >> 27)) * tl.full((), MIX64_B, tl.uint64)
    return z ^ (z >> 31)


@triton.jit
def _row_keys(seed_ptr, stream_id, rows):
    """Keys of `rows` (int64, any shape), uint64. `stream_id`: an integer, or one a row."""
    seed = tl.load(seed_ptr).to(tl.uint64)
    # tl.cast, because an argument of value 1 may be a compile-time constant, which has no .to
    stream_offset = (tl.full((), 1, tl.uint64) + tl.cast(stream_id, tl.uint64)) * tl.full((), GOLDEN, tl.uint64)
    return _mix64(_mix64(seed + stream_offset) ^ rows.to(tl.uint64))


@triton.jit
def _keep_mask(keys, cols, threshold):
    """Keep mask of elements; keys (uint64) and cols (int32) broadcast, e.g. [M, 1] with [1, N].

    `threshold` is `_random.keep_threshold(p)`, a 32-bit value in an int64 argument.
    """
    low, high = keys.to(tl.uint32), (keys >> 32).to(tl.uint32)
    x = cols.to(tl.uint32) ^ low
    x = (x ^ (x >> 16)) * tl.full((), MIX32_A, tl.uint32)
    x = (x ^ (x >> 15)) + high
    x = x * tl.full((), MIX32_B, tl.uint32)
    return (x ^ (x >> 15)) >= tl.cast(threshold, tl.uint32)
