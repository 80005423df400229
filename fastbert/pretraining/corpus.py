"""Tokenised text in memory-mapped files, so that a corpus may be larger than memory.

    ids.bin         a token's id, uint16 or uint32
    joins.bin       1 where a token continues the word of the token before it, uint8
    segments.bin    the token at which each segment begins, int64; a segment is a sentence, or a part of a long one
    documents.bin   the segment with which each document begins, int64
    facts.json      sizes, digest and notes; written last

A line may be a paragraph: it is cut into sentences after full stops, question marks and exclamation marks.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..storage import make_folder, read_json, write_json
from ..text.files import LINE_BYTES, InputError
from ..text.tokenizer import Tokenizer
from .chinese import Segmenter, joins_of_words
from .texts import files_of, lines_of
from .vocabulary import CONTINUING

FACTS = "facts.json"
ENDS = ".?!…。？！"
CLOSERS = "\"')]}”’»」』）》】"
# Lines tokenised at once, bounded in number and in characters.
CHUNK_LINES, CHUNK_CHARACTERS = 4096, 2_000_000


class Corpus:
    """Tokens of documents.

    Attributes:
        ids: [tokens] uint16 or uint32. joins: [tokens] uint8. segments: [segments + 1] int64, the last one is the
            number of tokens. documents: [documents + 1] int64, the last one is the number of segments.
        facts: counts, and the SHA-256 of ids, joins and boundaries.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.facts = folder, read_json(folder / FACTS)
        self.ids = _mapped(folder / "ids.bin", np.dtype(self.facts["dtype"]))
        self.joins = _mapped(folder / "joins.bin", np.dtype(np.uint8))
        self.segments = _mapped(folder / "segments.bin", np.dtype(np.int64))
        self.documents = _mapped(folder / "documents.bin", np.dtype(np.int64))

    @property
    def n_documents(self) -> int:
        return len(self.documents) - 1

    @property
    def digest(self) -> str:
        return self.facts["digest"]

    def unigram_entropy(self) -> float:
        """Entropy of the tokens' frequencies, in nats: the loss of a model that knows nothing but these frequencies."""
        counts = np.zeros(int(self.facts["vocabulary"]), np.int64)
        for start in range(0, len(self.ids), 1 << 24):
            counts += np.bincount(self.ids[start : start + (1 << 24)], minlength=len(counts))
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())


def _mapped(path: Path, dtype: np.dtype) -> NDArray[Any]:
    return np.memmap(path, dtype=dtype, mode="r")


def build_corpus(
    folder: Path, paths: Sequence[str | Path], tokenizer: Tokenizer, longest: int, *,
    segmenter: Segmenter | None = None, field: str = "text", line_bytes: int = LINE_BYTES,
) -> Corpus:  # fmt: skip
    """Tokenises text into `folder`, or opens the corpus there if it was made from the same files with the same
    settings.

    longest: most tokens of a segment; longer sentences are cut.

    Raises: InputError if there is no text, or no token that the tokenizer knows.
    """
    files = files_of(paths)
    made_of = {
        "files": [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "longest": longest, "field": field, "segmenter": None if segmenter is None else segmenter.name,
        "tokenizer": tokenizer_digest(tokenizer),
    }  # fmt: skip
    if (folder / FACTS).is_file():
        found = Corpus(folder)
        if found.facts["made of"] == made_of:
            return found
    temporary = folder.with_name(f".{folder.name}.writing")
    for left in (temporary, folder):
        if left.exists():
            shutil.rmtree(left)
    make_folder(temporary)
    facts = _Writer(temporary, tokenizer, longest, segmenter).write(lines_of(files, field, line_bytes))
    named = ", ".join(map(str, files[:3])) + (", ..." if len(files) > 3 else "")
    if not facts["tokens"]:
        raise InputError(f"there is no text in {named}")
    if facts["unknown tokens"] == facts["tokens"]:
        raise InputError(f"the tokenizer knows no word of {named}: it is one of another language or writing")
    write_json(temporary / FACTS, {**facts, "made of": made_of})
    temporary.rename(folder)
    return Corpus(folder)


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Digest of the vocabulary with its ids, and of the tokenizer's settings."""
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return sha256(repr((words, sorted(tokenizer.config.items(), key=str))).encode()).hexdigest()


class _Writer:
    """Tokenises lines and writes them, a few thousand at once."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, longest: int, segmenter: Segmenter | None) -> None:
        self.folder, self.tokenizer, self.longest, self.segmenter = folder, tokenizer, longest, segmenter
        vocabulary = tokenizer.get_vocab()
        self.size = tokenizer.vocab_size
        self.dtype = np.dtype(np.uint16 if self.size <= 1 << 16 else np.uint32)
        self.continues = np.zeros(self.size, np.uint8)
        for word, index in vocabulary.items():
            self.continues[index] = word.startswith(CONTINUING) and len(word) > len(CONTINUING)
        self.is_end, self.is_closer = (_of_characters(vocabulary, self.size, marks) for marks in (ENDS, CLOSERS))
        self.tokens = self.segments = self.documents = self.unknown = self.lines = self.joined = 0
        self.hash = sha256()
        self.in_document = False

    def write(self, lines: Iterator[str | None]) -> dict[str, Any]:
        names = ("ids.bin", "joins.bin", "segments.bin", "documents.bin")
        streams = [open(self.folder / name, "wb") for name in names]  # noqa: SIM115 (closed below)
        try:
            for chunk in _chunks(lines):
                self._add(chunk, *streams)
            for stream, end in zip(streams[2:], (self.tokens, self.segments), strict=True):
                stream.write(np.int64(end).tobytes())
        finally:
            for stream in streams:
                stream.close()
        return {
            "tokens": self.tokens, "segments": self.segments, "documents": self.documents, "lines": self.lines,
            "unknown tokens": self.unknown, "tokens joined by the segmenter": self.joined, "vocabulary": self.size,
            "dtype": self.dtype.name, "digest": self.hash.hexdigest(),
        }  # fmt: skip

    def _add(self, chunk: list[str | None], to_ids: Any, to_joins: Any, to_segments: Any, to_documents: Any) -> None:
        texts = [line for line in chunk if line is not None]
        found = iter(self._tokenised(texts))
        all_ids, all_joins, starts, documents = [], [], [], []
        for line in chunk:
            if line is None:
                self.in_document = False
                continue
            ids, joins = next(found)
            if not len(ids):
                continue
            if not self.in_document:
                documents.append(self.segments)
                self.in_document = True
            begins = self._segment_starts(ids)
            starts.append(begins + self.tokens)
            self.segments += len(begins)
            self.tokens += len(ids)
            all_ids.append(ids)
            all_joins.append(joins)
        if not all_ids:
            return
        ids = np.concatenate(all_ids)
        self.unknown += int((ids == self.tokenizer.unk_token_id).sum())
        self.documents += len(documents)
        self.lines += len(texts)
        parts = (
            ids.astype(self.dtype), np.concatenate(all_joins), np.concatenate(starts), np.array(documents, np.int64)
        )  # fmt: skip
        for stream, part in zip((to_ids, to_joins, to_segments, to_documents), parts, strict=True):
            content = part.tobytes()
            self.hash.update(content)
            stream.write(content)

    def _tokenised(self, texts: list[str]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
        """(ids, joins) for each text."""
        if self.segmenter is None:
            for with_special in self.tokenizer.input_ids(texts):
                ids = np.array(with_special[1:-1], np.int64)
                yield ids, self.continues[ids]
            return
        encoded = self.tokenizer(texts, add_special_tokens=False)
        for text, of_text, offsets in zip(texts, encoded.input_ids, encoded.offsets, strict=True):
            ids = np.array(of_text, np.int64)
            within_words = joins_of_words(text, offsets, self.segmenter)
            self.joined += int(within_words.sum())
            yield ids, self.continues[ids] | within_words

    def _segment_starts(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The tokens at which segments of a line begin: after the end of a sentence, and where a segment would become
        too long."""
        end, closer = self.is_end[ids], self.is_closer[ids]
        # A closing token, such as a quotation mark, belongs to the sentence that has just ended.
        places = np.arange(len(ids))
        last_other = np.maximum.accumulate(np.where(closer, -1, places))
        ended = (last_other >= 0) & end[last_other]
        begins = np.flatnonzero(ended[:-1] & ~end[1:] & ~closer[1:]) + 1
        edges = np.concatenate(([0], begins, [len(ids)]))
        sizes = np.diff(edges)
        if sizes.max() <= self.longest:
            return edges[:-1].astype(np.int64)
        parts = [np.arange(start, start + size, self.longest) for start, size in zip(edges[:-1], sizes, strict=True)]
        return np.concatenate(parts).astype(np.int64)


def _of_characters(vocabulary: dict[str, int], size: int, marks: str) -> NDArray[np.bool_]:
    table = np.zeros(size, np.bool_)
    table[[vocabulary[mark] for mark in marks if mark in vocabulary]] = True
    return table


def _chunks(lines: Iterator[str | None]) -> Iterator[list[str | None]]:
    chunk: list[str | None] = []
    characters = 0
    for line in lines:
        chunk.append(line)
        characters += 0 if line is None else len(line)
        if len(chunk) >= CHUNK_LINES or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
