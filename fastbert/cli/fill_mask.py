"""`fastbert fill-mask`: finds the most probable words for every [MASK] of every line."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import DTYPES, IMPLS, UsageError, open_input, open_output, positive, same_file

if TYPE_CHECKING:
    from ..encoding.masks import MaskFiller
    from ..text.files import Line

ORDER = 5
SUMMARY = "find the most probable words for [MASK]"
LINES = 256  # lines of FILE that are processed at a time

DESCRIPTION = """\
Find the most probable words for every [MASK]. The output has one JSON object for each line of FILE, in order:

  {"text": "Paris is [MASK].", "masks": [[{"token": "beautiful", "id": 3376, "score": 0.12}, ...]]}

"masks" has a list for each [MASK] of the text, in order. Each list begins with the most probable word; a score is the
word's probability among all words of the vocabulary. A line without [MASK], or with one past the model's limit, is an
error."""

EXAMPLES = """\
examples:
  echo 'Paris is the [MASK] of France.' | fastbert fill-mask - --model bert-base-uncased --top-k 3
  fastbert fill-mask sentences.txt -o words.jsonl --model bert-base-german-cased
  fastbert fill-mask rows.jsonl --field sentence --model my-folder"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "file", metavar="FILE", help="texts in UTF-8, one in each line; or a .jsonl file; or - for standard input"
    )
    parser.add_argument(
        "--model", metavar="ID_OR_PATH", required=True,
        help="a folder or hub id of a BERT with its head for masked words, or a checkpoint that convert reads",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", metavar="OUT", type=Path,
        help="a .jsonl file, which appears complete or not at all (default: standard output)",
    )  # fmt: skip
    parser.add_argument("--top-k", metavar="N", type=positive, default=5, help="words for each mask (default: 5)")
    parser.add_argument(
        "--field",
        metavar="NAME",
        help="each line is a JSON object, with its text under NAME (default for a .jsonl FILE: text)",
    )
    parser.add_argument(
        "--dtype", choices=[name for name in DTYPES if name != "int8"], default="auto",
        help="precision of the model (default: auto, by device)",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if there is a GPU"
    )
    parser.add_argument("--impl", choices=IMPLS, help="implementation of the operators (default: the fastest)")


def run(args: argparse.Namespace) -> int:
    """Runs the command. Returns its exit code."""
    if args.output and args.file != "-" and same_file(args.file, args.output):
        raise UsageError(f"input and output are the same file: {args.output}")
    with open_input(args.file) as source, open_output(args.output) as sink:
        from ..encoding.masks import MaskFiller
        from ..text.files import read_chunks

        filler = MaskFiller.from_pretrained(args.model, dtype=args.dtype, device=args.device, impl=args.impl)
        field = args.field or ("text" if args.file.endswith(".jsonl") else None)
        name, done = "standard input" if args.file == "-" else args.file, 0
        for chunk in read_chunks(source, name, field, lines=LINES):
            for record in _records(filler, chunk, args.top_k, name, done):
                sink.write((json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8"))
            sink.flush()
            done += len(chunk)
    return 0


def _records(filler: MaskFiller, chunk: list[Line], top_k: int, name: str, done: int) -> list[dict[str, Any]]:
    """The objects of these lines with their masks. done: the number of lines before them."""
    from ..encoding.masks import MaskError
    from ..text.files import InputError

    try:
        filled = filler.fill([line.text for line in chunk], top_k)
    except MaskError as error:
        raise InputError(f"{name}, line {done + error.row + 1}: {error}") from None
    return [
        line.record | {"masks": [[word._asdict() for word in of_mask] for of_mask in masks]}
        for line, masks in zip(chunk, filled, strict=True)
    ]
