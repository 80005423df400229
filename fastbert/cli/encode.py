"""`fastbert encode`: encodes the lines of a file into another file; with --out-dir, tables into a folder.

Lines are encoded by one process, by several that it starts (workers.py), or by several that torchrun started
(ranks.py). Lines are always read in chunks, vectors are written in the order of the lines as soon as they are computed,
and OUT either appears complete or not at all. `fastbert.corpus` encodes tables.
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
from typing import TYPE_CHECKING, Any, BinaryIO

from .options import (
    WORD_VECTORS,
    UsageError,
    add_model_arguments,
    among_ranks,
    encoder_options,
    load_encoder,
    open_input,
    open_output,
    positive,
    same_file,
    summary,
)
from .tables import add_table_arguments, encode_tables, options_given

if TYPE_CHECKING:
    from ..text.files import Line

ORDER = 1
SUMMARY = "turn texts into vectors"
# Limits for lines whose tokens' vectors are in memory at once: with four layers of BERT-base a token takes 12 KB.
PART_LINES, PART_BYTES = 256, 64_000
SUFFIXES = (".npy", ".safetensors", ".jsonl")

DESCRIPTION = """\
Turn texts into vectors: one vector for each line of FILE, in the order of the lines.

Memory use does not grow with FILE, and OUT appears complete or not at all. Texts longer than the model's limit are cut
to it. An empty line is an empty text and also gets a vector; an empty FILE gives an OUT without rows. A byte order mark
and Windows line ends are removed.

Instead of one vector for a text, --tokens gives one for every token, --words one for every word: BERT's output, neither
pooled nor normalised. In .jsonl an object has a list "tokens" of {"token", "start", "end", "embedding"}, or "words" of
{"word", ...}; start and end count characters of the text. In .safetensors all lines are concatenated in "embeddings"
[tokens of all lines, width] and "offsets" [tokens, 2]; line i has the rows "cu_seqlens"[i] to "cu_seqlens"[i + 1].
The part that is cut off a long text has no vectors, nor has a word that is cut in two. Words are the tokenizer's:
BERT's tokenizer ends them at white space and punctuation.

To use several GPUs or machines, start the command with torchrun: each process uses its own GPU and encodes its share of
the lines. FILE must be readable for all processes, and one OUT is written. On CPUs also set OMP_NUM_THREADS, because
torchrun by default gives each process one thread."""

EXAMPLES = """\
examples:
  fastbert encode notes.txt -o notes.npy                     a row for each line; numpy.load reads it
  fastbert encode reviews.jsonl --field body -o out.jsonl    each object with its "embedding" added
  sort -u words.txt | fastbert encode - | head -n 3          standard input to standard output
  fastbert encode notes.txt -o notes.npy --model BAAI/bge-small-en-v1.5 --dtype bfloat16
  fastbert encode notes.txt -o notes.npy --model bert-base-cased --layers 9,10,11,12 --combine concat
  fastbert encode notes.txt -o words.jsonl --model bert-base-cased --layers=-4,-3,-2,-1 --words first
  torchrun --nproc-per-node 8 -m fastbert encode notes.txt -o notes.npy"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="+",
        help="texts in UTF-8, one in each line; or a .jsonl file; or - for standard input; with --out-dir, tables",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        type=_output_path,
        help="OUT.npy and OUT.safetensors: a float32 matrix with a row for each line; OUT.jsonl: an object in each "
        "line, "
        'that of the input or {"text": ...}, with "embedding" added (default: such objects to standard output)',
    )
    parser.add_argument(
        "--field",
        "--text-column",
        metavar="NAME",
        help="each line is a JSON object, with its text under NAME (default for a .jsonl FILE: text); or the column of "
        "texts in tables (default: text)",
    )
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--tokens", action="store_true", help="a vector for every token; .jsonl or .safetensors")
    parts.add_argument(
        "--words",
        choices=WORD_VECTORS,
        help="a vector for every word: that of its first token, or the mean of its tokens",
    )
    parser.add_argument("--special-tokens", action="store_true", help="with --tokens: also for [CLS] and [SEP]")
    add_model_arguments(parser)
    parser.add_argument(
        "--max-tokens-per-batch",
        metavar="N",
        type=positive,
        help="how many tokens the model computes at once; more need more memory (default: by device)",
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=positive,
        default=1,
        help="divide the lines among N processes, each with its part of the threads, and with a NUMA node or GPU of "
        "its own; useful with several nodes or GPUs, or dozens of cores (default: 1)",
    )
    parser.add_argument(
        "--max-line-bytes",
        metavar="N",
        type=positive,
        default=10_000_000,
        help="refuse lines longer than N bytes, because a whole line is held in memory (default: 10,000,000)",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar, no summary")
    add_table_arguments(parser)


def _output_path(text: str) -> Path:
    path = Path(text)
    if path.suffix not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"the name must end in one of {', '.join(SUFFIXES)}, got {text!r}")
    return path


def run(args: argparse.Namespace) -> int:
    """Runs the command. Returns its exit code."""
    if args.combine and not args.layers:
        raise UsageError("--combine is for several layers: name them with --layers")
    if args.layers and args.layer != -1:
        raise UsageError("--layer or --layers, not both")
    if args.out_dir is not None:
        return _run_corpus(args)
    if given := options_given(args):
        raise UsageError(f"{given[0]} goes with --out-dir")
    if len(args.files) > 1:
        raise UsageError("several files go with --out-dir")
    (args.file,) = args.files
    if args.output and args.file != "-" and same_file(args.file, args.output):
        raise UsageError(f"input and output are the same file: {args.output}")
    if args.special_tokens and not args.tokens:
        raise UsageError("--special-tokens goes with --tokens")
    if args.tokens or args.words:
        return _run_parts(args)
    if among_ranks():
        return _run_among_ranks(args)
    # Input and output are opened first, so that a wrong path is reported before the model is loaded.
    with open_input(args.file) as source, open_output(args.output) as sink, _encoder(args) as encoder:
        encode_chunks = partial(encoder.encode_chunks, max_tokens_per_batch=args.max_tokens_per_batch)
        _write(args, encode_chunks, _chunks(args, source, encoder), sink, encoder.dimension, _size(source))
    _say(args, encoder.stats)
    return 0


def _run_corpus(args: argparse.Namespace) -> int:
    """Tables into a folder."""
    if args.output or args.tokens or args.words:
        raise UsageError("--out-dir is for vectors of texts, not with -o, --tokens or --words")
    ranks = None
    if among_ranks():
        from ..encoding.ranks import Ranks

        ranks = Ranks.from_environment()
    counted = encode_tables(args, encoder_options(args), ranks)
    if counted is not None:
        _say(args, counted)
    return 0


def _run_parts(args: argparse.Namespace) -> int:
    """Vectors of tokens or words."""
    if args.output and args.output.suffix == ".npy":
        raise UsageError("a .npy file cannot tell where a text ends: use .jsonl or .safetensors")
    if args.workers != 1 or among_ranks():
        raise UsageError("--tokens and --words are for a single process")
    for name in ("pooling", "normalize", "truncate_dim"):
        if getattr(args, name):
            raise UsageError(f"--{name.replace('_', '-')} is for vectors of texts, not of tokens or words")
    from ..text.part_files import part_writer

    with open_input(args.file) as source, open_output(args.output) as sink:
        encoder = load_encoder(args)
        out = part_writer(args.output.suffix if args.output else ".jsonl", sink, encoder.token_dimension, args.words)
        options = {"words": args.words, "special_tokens": args.special_tokens}
        lines = _chunks(args, source, encoder, lines=PART_LINES, n_bytes=PART_BYTES)
        with _bar(args, _size(source)) as bar, _counting(args, out):
            for chunk in lines:
                texts = _texts(chunk)
                parts = encoder.encode_tokens(texts, max_tokens_per_batch=args.max_tokens_per_batch, **options)
                out.write(parts, [line.record for line in chunk])
                bar.update(sum(line.n_bytes for line in chunk))
        out.finish()
    _say(args, encoder.stats)
    return 0


def _run_among_ranks(args: argparse.Namespace) -> int:
    if args.workers != 1:
        raise UsageError("--workers is for a single process; torchrun has --nproc-per-node")
    if args.file == "-":
        raise UsageError("under torchrun FILE must be a file: standard input reaches one process only")
    from ..encoding.ranks import Ranks

    ranks = Ranks.from_environment()
    budget = {"max_tokens_per_batch": args.max_tokens_per_batch}
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(open_input(args.file))
        sink = stack.enter_context(open_output(args.output)) if ranks.rank == 0 else None
        encoder = load_encoder(args, device=ranks.device(args.device))
        facts = {"bytes of FILE": _size(source) or 0, "width of a vector": encoder.dimension}
        stack.enter_context(ranks.joined(facts))
        chunks = _chunks(args, source, encoder)
        if sink is None:
            ranks.contribute(encoder, map(_texts, chunks), **budget)
        else:
            _write(args, partial(ranks.gather, encoder, **budget), chunks, sink, encoder.dimension, _size(source))
    if ranks.rank == 0:
        _say(args, encoder.stats)
    return 0


def _encoder(args: argparse.Namespace) -> contextlib.AbstractContextManager:
    if args.workers == 1:
        return contextlib.nullcontext(load_encoder(args))
    from ..encoding.workers import EncoderPool

    return EncoderPool(args.workers, **encoder_options(args))


def _write(
    args: argparse.Namespace,
    encode_chunks: Callable[[Iterator[list[str]]], Iterator[Any]],
    chunks: Iterator[list[Line]],
    sink: BinaryIO,
    dimension: int,
    size: int | None,
) -> None:
    from ..text.files import writer

    waiting = deque()  # chunks of lines that the encoder has received, but not returned vectors for

    def texts() -> Iterator[list[str]]:
        for chunk in chunks:
            waiting.append(chunk)
            yield _texts(chunk)

    out = writer(args.output.suffix if args.output else ".jsonl", sink, dimension)
    with _bar(args, size) as bar, _counting(args, out):
        for vectors in encode_chunks(texts()):
            chunk = waiting.popleft()
            out.write(vectors.numpy(), [line.record for line in chunk])
            bar.update(sum(line.n_bytes for line in chunk))
    out.finish()


def _bar(args: argparse.Namespace, size: int | None) -> Any:
    from tqdm import tqdm

    # None makes tqdm show the bar only if standard error is a terminal.
    return tqdm(total=size, unit="B", unit_scale=True, desc="encode", disable=args.quiet or None)


@contextlib.contextmanager
def _counting(args: argparse.Namespace, out: Any) -> Iterator[None]:
    """Adds the number of encoded lines to an interruption's message."""
    try:
        yield
    except KeyboardInterrupt:
        lost = f"; {args.output} was not written" if args.output else ""
        raise KeyboardInterrupt(f"interrupted after {out.rows:,} lines{lost}") from None


def _say(args: argparse.Namespace, stats: Any) -> None:
    if not args.quiet and sys.stderr.isatty():
        print(f"fastbert: {summary(stats)}", file=sys.stderr)


# ---- files -----------------------------------------------------------------------------------------------


def _chunks(args: argparse.Namespace, source: BinaryIO, encoder: Any, **bounds: int) -> Iterator[list[Line]]:
    from ..text.files import read_chunks

    field = args.field or ("text" if args.file.endswith(".jsonl") else None)
    name = "standard input" if args.file == "-" else args.file
    # The bar moves once for each chunk: a CPU needs seconds for 1,024 texts, a GPU needs larger chunks to be busy.
    lines = 1024 if encoder.device.type == "cpu" else 8192
    return read_chunks(source, name, field, **{"lines": lines, **bounds}, line_bytes=args.max_line_bytes)


def _texts(chunk: list[Line]) -> list[str]:
    return [line.text for line in chunk]


def _size(source: BinaryIO) -> int | None:
    """Bytes of a regular file; None for a pipe or a terminal."""
    try:
        return os.fstat(source.fileno()).st_size or None
    except (OSError, ValueError):
        return None
