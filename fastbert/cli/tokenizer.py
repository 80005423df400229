"""`fastbert tokenizer train`: makes a WordPiece vocabulary from text."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .options import positive

ORDER = 8
SUMMARY = "make a WordPiece vocabulary from your text"

DESCRIPTION = """\
Make the vocabulary of a BERT from text: plain text (.txt, a sentence or paragraph in each line), .jsonl, Parquet, or
folders of these. The same text and options give the same files, on any machine and with any number of threads.

The command writes vocab.txt, tokenizer.json and tokenizer_config.json into OUT. transformers reads OUT, and 'fastbert
pretrain --tokenizer OUT' uses it. Chinese text is split into single characters, as in BERT."""

EXAMPLES = """\
examples:
  fastbert tokenizer train books/ news.jsonl --vocab-size 30522 --out english
  fastbert tokenizer train notes.txt --cased --vocab-size 8000 --out cased
  fastbert tokenizer train zh.parquet --field content --vocab-size 21128 --out chinese"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.description, p.epilog = DESCRIPTION, EXAMPLES
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("action", choices=("train",), help="what to do")
    p.add_argument("corpus", nargs="+", metavar="CORPUS", help="files of text, or folders of such files")
    p.add_argument("--out", required=True, metavar="DIR", type=Path, help="a folder for the tokenizer")
    p.add_argument(
        "--vocab-size", metavar="N", type=positive, default=30522,
        help="most pieces, including the five special tokens (default: 30,522, as in BERT-base)",
    )  # fmt: skip
    add_vocabulary_arguments(p)
    add_text_arguments(p)
    p.add_argument("-q", "--quiet", action="store_true", help="print no summary")


def add_vocabulary_arguments(p: argparse.ArgumentParser) -> None:
    """Adds the options for making a vocabulary, except its size; `fastbert pretrain` has them too."""
    p.add_argument("--cased", action="store_true", help="keep upper case and accents (default: lower case, no accents)")
    p.add_argument(
        "--alphabet", metavar="N", type=positive,
        help="most pieces of a single character; words with other characters are unknown (default: three quarters of "
        "the vocabulary)",
    )  # fmt: skip
    p.add_argument(
        "--min-frequency", metavar="N", type=positive,
        help="how often a character or a pair of pieces must occur to become a piece (default: 2)",
    )  # fmt: skip


def add_text_arguments(p: argparse.ArgumentParser) -> None:
    """Adds the options for reading text; `fastbert pretrain` has them too."""
    p.add_argument(
        "--field", metavar="NAME", default="text", help="field of .jsonl and Parquet that has the text (default: text)"
    )
    p.add_argument(
        "--max-line-bytes", metavar="N", type=positive, default=10_000_000,
        help="refuse longer lines (default: 10,000,000)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from ..pretraining.texts import files_of
    from ..pretraining.vocabulary import train_tokenizer

    files = files_of(args.corpus)
    tokenizer, facts = train_tokenizer(
        files, args.vocab_size, lowercase=not args.cased, alphabet=args.alphabet, min_frequency=args.min_frequency or 2,
        field=args.field, line_bytes=args.max_line_bytes,
    )  # fmt: skip
    tokenizer.save_pretrained(args.out)
    if not args.quiet:
        print(
            f"{tokenizer.vocab_size:,} pieces, {facts['characters']:,} of them of one character, from "
            f"{facts['words']:,} words, {facts['different words']:,} different ones, in {args.out}",
            file=sys.stderr,
        )
        for name in ("words with a character that is no piece", "words of over 100 characters"):
            if facts[name]:
                print(f"  {name}, unknown now: {facts[name]:,}", file=sys.stderr)
    return 0
