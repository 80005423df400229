"""Writes vectors of tokens or words to a file, a text at a time.

.jsonl        the input's objects, each with a list "tokens" of {"token", "start", "end", "embedding"}, or "words" of
              {"word", ...}
.safetensors  "embeddings" [T, C] float32 and "offsets" [T, 2] int64 of all texts end to end, -1 for special tokens, and
              "cu_seqlens" [N + 1] int64: text i has the rows cu_seqlens[i] to cu_seqlens[i + 1]. Embeddings are written
              as they come; offsets, 16 bytes a row, are kept for the end.
"""

from __future__ import annotations

import json
import struct
from array import array
from collections.abc import Sequence
from typing import Any, BinaryIO, Protocol

import numpy as np

from .files import json_numbers, json_object

HEADER_BYTES = 512


class Parts(Protocol):
    """The n tokens or words of a text, their offsets in it, and their vectors [n, C] float32."""

    parts: list[str]
    offsets: list[tuple[int, int] | None]
    vectors: Any


class PartLinesWriter:
    """Writes one object per text."""

    def __init__(self, file: BinaryIO, name: str):
        self.file, self.name = file, name
        self.rows = 0

    def write(self, parts: Sequence[Parts], records: Sequence[dict[str, Any]]) -> None:
        for of_text, record in zip(parts, records, strict=True):
            self.rows += 1
            listed = []
            for part, offset, vector in zip(*of_text, strict=True):
                start, end = offset or (None, None)
                numbers = json_numbers(vector.numpy(), self.rows)
                head = json.dumps({self.name: part, "start": start, "end": end})
                listed.append(f'{head[:-1]}, "embedding": {numbers}}}')
            self.file.write(json_object(record, f"{self.name}s", f"[{', '.join(listed)}]", self.rows).encode("ascii"))
        self.file.flush()

    def finish(self) -> None:
        self.file.flush()


class PartMatrixWriter:
    """Writes rows of float32 after a header of HEADER_BYTES, which `finish` fills in, and then all offsets."""

    def __init__(self, file: BinaryIO, columns: int):
        self.file, self.columns = file, columns
        self.offsets, self.ends, self.rows = array("q"), array("q", [0]), 0
        file.write(bytes(HEADER_BYTES))

    def write(self, parts: Sequence[Parts], records: Sequence[dict[str, Any]]) -> None:
        for of_text in parts:
            self.file.write(np.ascontiguousarray(of_text.vectors.numpy(), dtype="<f4").data)
            for offset in of_text.offsets:
                self.offsets.extend(offset or (-1, -1))
            self.ends.append(self.ends[-1] + len(of_text.offsets))
            self.rows += 1

    def finish(self) -> None:
        tokens = self.ends[-1]
        entries, place = {}, 0
        for name, dtype, shape, size in (
            ("embeddings", "F32", [tokens, self.columns], 4 * tokens * self.columns),
            ("offsets", "I64", [tokens, 2], 16 * tokens),
            ("cu_seqlens", "I64", [len(self.ends)], 8 * len(self.ends)),
        ):
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
            place += size
        self.file.write(np.asarray(self.offsets, dtype="<i8").data)
        self.file.write(np.asarray(self.ends, dtype="<i8").data)
        self.file.seek(0)
        header = json.dumps(entries, separators=(",", ":")).ljust(HEADER_BYTES - 8)
        self.file.write(struct.pack("<Q", len(header)) + header.encode("ascii"))


def part_writer(
    suffix: str, file: BinaryIO, columns: int, words: str | None
) -> PartLinesWriter | PartMatrixWriter:  # fmt: skip
    """The writer for a file name's suffix; each has write(parts of texts, records) and finish().

    words: None if the parts are tokens.
    """
    if suffix == ".jsonl":
        return PartLinesWriter(file, "token" if words is None else "word")
    return PartMatrixWriter(file, columns)
