"""`fastbert encode`: the lines of a file through an Encoder into another file.

By one process, by several that it starts (workers.py), or by several that torchrun started (ranks.py). Either way
lines are read in chunks, vectors are written in the order of the lines as they come, and OUT is whole or not there.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from . import cli
from .files import Line, read_chunks, writer

Chunks = Iterator[list[Line]]


def run(args: argparse.Namespace) -> int:
    """The command; its exit code."""
    if args.output and args.file != "-" and _same_file(args.file, args.output):
        raise cli.UsageError(f"input and output are the same file: {args.output}")
    if cli.among_ranks():
        return _run_among_ranks(args)
    # Input and output are opened first: who misspelt a folder should not wait for a model to load.
    with _open_input(args.file) as source, _open_output(args.output) as sink, _encoder(args) as encoder:
        encode_chunks = partial(encoder.encode_chunks, max_tokens_per_batch=args.max_tokens_per_batch)
        _write(args, encode_chunks, _chunks(args, source, encoder), sink, encoder.dimension, _size(source))
    _say(args, encoder)
    return 0


def _run_among_ranks(args: argparse.Namespace) -> int:
    if args.workers != 1:
        raise cli.UsageError("--workers is for a single process; torchrun has --nproc-per-node")
    if args.file == "-":
        raise cli.UsageError("under torchrun FILE must be a file: standard input reaches one process only")
    from .ranks import Ranks

    ranks = Ranks.from_environment()
    budget = {"max_tokens_per_batch": args.max_tokens_per_batch}
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(_open_input(args.file))
        sink = stack.enter_context(_open_output(args.output)) if ranks.rank == 0 else None
        encoder = cli.load_encoder(args, device=ranks.device(args.device))
        facts = {"bytes of FILE": _size(source) or 0, "width of a vector": encoder.dimension}
        stack.enter_context(ranks.joined(facts))
        chunks = _chunks(args, source, encoder)
        if sink is None:
            ranks.contribute(encoder, map(_texts, chunks), **budget)
        else:
            _write(args, partial(ranks.gather, encoder, **budget), chunks, sink, encoder.dimension, _size(source))
    if ranks.rank == 0:
        _say(args, encoder)
    return 0


def _encoder(args: argparse.Namespace) -> contextlib.AbstractContextManager:
    if args.workers == 1:
        return contextlib.nullcontext(cli.load_encoder(args))
    from .workers import EncoderPool

    return EncoderPool(args.workers, **cli.encoder_options(args))


def _write(
    args: argparse.Namespace,
    encode_chunks: Callable[[Iterator[list[str]]], Iterator[Any]],
    chunks: Chunks,
    sink: BinaryIO,
    dimension: int,
    size: int | None,
) -> None:
    from tqdm import tqdm

    waiting = deque()  # chunks of lines that the encoder has taken, and given no vectors for yet

    def texts() -> Iterator[list[str]]:
        for chunk in chunks:
            waiting.append(chunk)
            yield _texts(chunk)

    out = writer(args.output.suffix if args.output else ".jsonl", sink, dimension)
    # tqdm's None means: only where standard error is a terminal.
    bar = tqdm(total=size, unit="B", unit_scale=True, desc="encode", disable=args.quiet or None)
    try:
        with bar:
            for vectors in encode_chunks(texts()):
                chunk = waiting.popleft()
                out.write(vectors.numpy(), [line.record for line in chunk])
                bar.update(sum(line.n_bytes for line in chunk))
    except KeyboardInterrupt:
        lost = f"; {args.output} was not written" if args.output else ""
        raise KeyboardInterrupt(f"interrupted after {out.rows:,} lines{lost}") from None
    out.finish()


def _say(args: argparse.Namespace, encoder: Any) -> None:
    if not args.quiet and sys.stderr.isatty():
        print(f"fastbert: {cli.summary(encoder.stats)}", file=sys.stderr)


# ---- files -----------------------------------------------------------------------------------------------


def _chunks(args: argparse.Namespace, source: BinaryIO, encoder: Any) -> Chunks:
    field = args.field or ("text" if args.file.endswith(".jsonl") else None)
    name = "standard input" if args.file == "-" else args.file
    # The bar moves once a chunk: 1,024 texts keep a CPU busy for seconds, a GPU wants more at once.
    return read_chunks(source, name, field, lines=1024 if encoder.device.type == "cpu" else 8192)


def _texts(chunk: list[Line]) -> list[str]:
    return [line.text for line in chunk]


def _same_file(a: str | Path, b: str | Path) -> bool:
    return os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)


def _size(source: BinaryIO) -> int | None:
    """Bytes of a regular file; None for a pipe or a terminal."""
    try:
        return os.fstat(source.fileno()).st_size or None
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def _open_input(name: str) -> Iterator[BinaryIO]:
    if name == "-":
        yield sys.stdin.buffer
        return
    with open(name, "rb") as stream:
        yield stream


@contextlib.contextmanager
def _open_output(path: Path | None) -> Iterator[BinaryIO]:
    if path is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    if not path.parent.is_dir():
        raise NotADirectoryError(f"no folder {str(path.parent)!r} to write {path.name} into")
    from .checkpoint import write_atomically

    with write_atomically(path) as temporary, open(temporary, "wb") as stream:
        yield stream
