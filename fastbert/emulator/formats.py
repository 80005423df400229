"""Number formats that numpy lacks: bfloat16, and two numbers in one register.

Values of 16-bit formats are held as float32, which represents all of them.
"""

from __future__ import annotations

import numpy as np

if np.lib.NumpyVersion(np.__version__) < "2.0.0":  # numpy 1 derives a scalar's type from its value
    raise ImportError(f"fastbert.emulator needs numpy 2, found {np.__version__}")

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
i8, i16, i32, i64 = np.int8, np.int16, np.int32, np.int64
f16, f32, f64 = np.float16, np.float32, np.float64

RAW = {1: np.bool_, 8: u8, 16: u16, 32: u32, 64: u64}
SIGNED = {8: i8, 16: i16, 32: i32, 64: i64}
FLOAT = {16: f16, 32: f32, 64: f64}

_HIGH = u32(0xFFFF0000)
_S16 = u32(16)


# ---- 16-bit numbers, each in its own register --------------------------------------------------------------


def from_bf16(bits):
    """bfloat16 bits (uint16) -> float32."""
    return (bits.astype(u32) << _S16).view(f32)


def from_f16(bits):
    """float16 bits (uint16) -> float32."""
    return bits.view(f16).astype(f32)


def to_bf16(x):
    """float32 -> bfloat16 bits, to nearest even; any NaN becomes 0x7fff, as PTX says."""
    return (_rounded_bf16(x) >> _S16).astype(u16)


def to_f16(x):
    """float32 -> float16 bits, to nearest even; any NaN becomes 0x7fff, as PTX says."""
    return np.where(np.isnan(x), u16(0x7FFF), x.astype(f16).view(u16))


def _rounded_bf16(x):
    """float32 -> its bits rounded to bfloat16 in the upper half; the lower half is left over."""
    bits = x.view(u32)
    rounded = bits + u32(0x7FFF) + ((bits >> _S16) & u32(1))
    # with the sign off, bits above infinity's are a NaN's
    return np.where((bits & u32(0x7FFFFFFF)) > u32(0x7F800000), u32(0x7FFF0000), rounded)


# ---- two 16-bit numbers in a word --------------------------------------------------------------------------


def low_bf16(word):
    return (word << _S16).view(f32)


def high_bf16(word):
    return (word & _HIGH).view(f32)


def low_f16(word):
    return word.astype(u16).view(f16).astype(f32)


def high_f16(word):
    return (word >> _S16).astype(u16).view(f16).astype(f32)


def pack_bf16(low, high):
    """Two float32 -> bfloat16 pair in a word."""
    return (_rounded_bf16(low) >> _S16) | (_rounded_bf16(high) & _HIGH)


def pack_f16(low, high):
    """Two float32 -> float16 pair in a word."""
    return to_f16(low).astype(u32) | (to_f16(high).astype(u32) << _S16)


# ---- two float32 in 64 bits --------------------------------------------------------------------------------


def low_f32(bits):
    return bits.astype(u32).view(f32)


def high_f32(bits):
    return (bits >> u64(32)).astype(u32).view(f32)


def pack_f32(low, high):
    return low.view(u32).astype(u64) | (high.view(u32).astype(u64) << u64(32))


def flush(x):
    """Denormals of float32 become zero of their sign (.ftz)."""
    return np.where(np.abs(x) < f32(1.1754943508222875e-38), np.copysign(f32(0), x), x)
