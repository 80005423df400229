"""CRC-32C (Castagnoli) in numpy, the checksum of TensorFlow's files.

A CRC register is linear over GF(2): R(s, data) = R(s, zeros) ^ R(0, data), where `zeros` are as many zero bytes as
data has. So data is cut into lanes of equal length that numpy steps through side by side, eight bytes at a step, and
the lanes' registers are then joined in pairs:

    R(0, a || b) = R(R(0, a), zeros of len(b)) ^ R(0, b)

Zero bytes in front of data do not change R(0, data), so data of any length can be filled up to whole lanes.
"""

from __future__ import annotations

import functools

import numpy as np

_POLYNOMIAL = 0x82F63B78  # bits reversed
_LANE = 512  # bytes; a power of two
_BLOCK = 4096 * _LANE  # bytes of one pass over the lanes: 2 MiB, so that the copy stays in the cache
_MASK_DELTA = 0xA282EAD8


def crc32c(data: bytes | memoryview | np.ndarray) -> int:
    """The CRC-32C of bytes, or of a one-dimensional array of uint8: an int of 32 bits."""
    data = np.frombuffer(data, dtype=np.uint8)
    register = np.uint32(0)
    first = len(data) % _BLOCK
    for start, stop in [(0, first)] * (first > 0) + [(i, i + _BLOCK) for i in range(first, len(data), _BLOCK)]:
        # R(previous blocks || this block) = R(R(previous blocks), zeros of this block) ^ R(0, this block)
        register = _after_zeros(register, stop - start) ^ _register(data[start:stop])
    return int(~(_after_zeros(np.uint32(0xFFFFFFFF), len(data)) ^ register))


def masked(crc: int) -> int:
    """A CRC as TensorFlow and LevelDB store it: rotated, plus a constant, so that data that contains CRCs has a useful
    CRC too."""
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF


def _register(data: np.ndarray) -> np.uint32:
    """R(0, data) of at most one block."""
    lane = _LANE if len(data) >= _LANE * 64 else 64
    lanes = 1 << max((len(data) - 1) // lane, 0).bit_length()
    filled = np.zeros(lanes * lane, dtype=np.uint8)
    filled[len(filled) - len(data) :] = data
    # column c holds bytes 2c and 2c + 1 of every lane
    columns = np.ascontiguousarray(filled.view("<u2").reshape(lanes, lane // 2).T)
    tables = _step_tables()
    registers = np.zeros(lanes, dtype=np.uint32)
    for c in range(0, lane // 2, 4):
        low = columns[c] ^ (registers & 0xFFFF).astype(np.uint16)
        high = columns[c + 1] ^ (registers >> 16).astype(np.uint16)
        registers = tables[0][low] ^ tables[1][high] ^ tables[2][columns[c + 2]] ^ tables[3][columns[c + 3]]
    while len(registers) > 1:
        registers = _after_zeros(registers[0::2], lane) ^ registers[1::2]
        lane *= 2
    return registers[0]


def _after_zeros(register, count: int):
    """R(register, `count` zero bytes), of one register or an array of them."""
    for bit in range(count.bit_length()):
        if count >> bit & 1:
            register = _apply(_zeros_tables(bit), register)
    return register


def _apply(tables: np.ndarray, register):
    """Applies a linear map of registers, given by the images of each value of a register's four bytes, [4, 256]."""
    by_byte = [tables[k][(register >> np.uint32(8 * k)) & np.uint32(0xFF)] for k in range(4)]
    return by_byte[0] ^ by_byte[1] ^ by_byte[2] ^ by_byte[3]


@functools.cache
def _zeros_tables(bit: int) -> np.ndarray:
    """The tables of `_apply` for 2**bit zero bytes."""
    if bit:  # the map of half as many zero bytes, applied twice
        half = _zeros_tables(bit - 1)
        return _apply(half, half)
    register = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        register = (register >> 1) ^ np.where(register & 1, np.uint32(_POLYNOMIAL), np.uint32(0))
    one_byte = np.zeros((4, 256), dtype=np.uint32)
    one_byte[0] = register
    for k in range(1, 4):
        one_byte[k] = np.arange(256, dtype=np.uint32) << np.uint32(8 * (k - 1))
    return one_byte


@functools.cache
def _step_tables() -> list[np.ndarray]:
    """For each pair of bytes in the eight bytes of a step: the pair's share of the register after the step, [65536]."""
    low, high = np.arange(65536, dtype=np.uint32) & 0xFF, np.arange(65536, dtype=np.uint32) >> 8
    tables = []
    for word in range(4):
        image = low | (high << 8)
        # a register holds the next four bytes, so two bytes at the front of a register pass eight bytes less 2 * word
        tables.append(_after_zeros(image, 8 - 2 * word))
    return tables
