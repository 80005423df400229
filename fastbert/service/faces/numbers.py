"""The types of numbers in which APIs send vectors, and their base64."""

from __future__ import annotations

import base64
from collections.abc import Callable

import numpy as np


def encoded(vectors: np.ndarray) -> list[str]:
    """The bytes of each row, little-endian, in base64."""
    return [base64.b64encode(row.astype(row.dtype.newbyteorder("<"), copy=False).tobytes()).decode() for row in vectors]


def _int8(vectors: np.ndarray) -> np.ndarray:
    """The numbers of vectors of length 1, times 127, rounded."""
    return np.clip(np.rint(vectors * 127), -128, 127).astype(np.int8)


# A bit is 1 if the number is above 0; eight bits make a byte, the first one the highest. In the signed form each byte
# is 128 less.
TYPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "float": lambda vectors: vectors,
    "int8": _int8,
    "uint8": lambda vectors: (_int8(vectors).astype(np.int16) + 128).astype(np.uint8),
    "binary": lambda vectors: (np.packbits(vectors > 0, axis=1).astype(np.int16) - 128).astype(np.int8),
    "ubinary": lambda vectors: np.packbits(vectors > 0, axis=1),
}
