"""`fastbert compress-report`: compares the scores, sizes and speed of models with those of the first one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .options import IMPLS, UsageError, positive, seed_number

ORDER = 16
SUMMARY = "compare smaller models with the one they were made from: score, size, speed"

DESCRIPTION = """\
Compare models of one task: the score on the examples of --data and its definition, the size of the weights on disk and
in memory, tokens per second in batches, and the time for a single text. All models are compared with the first one, in
one run: in each round every model runs once, and a ratio is the median over the rounds.

DIR is a folder written by 'fastbert finetune', 'distill', 'prune' or 'quantize'. A model in 8 bits runs as it is
stored. Any other model runs with matrix products in --dtype, or several times if --dtype names several."""

EXAMPLES = """\
examples:
  fastbert compress-report teacher student student-int8 --data dev.tsv
  fastbert compress-report teacher pruned int8 --data dev.tsv --dtype float32,bfloat16 --json r.json --picture r.svg"""

DTYPES = ("auto", "float32", "bfloat16")


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.description, p.epilog = DESCRIPTION, EXAMPLES
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("models", metavar="DIR", nargs="+", help="models of one task; the first is what others compare with")
    p.add_argument("--data", required=True, metavar="FILE", help="examples with labels")
    p.add_argument(
        "--dtype", metavar="NAME,...", type=_dtypes, default=("float32",),
        help="dtypes of matrix products, for models that are not in 8 bits: float32 (default), bfloat16, auto",
    )  # fmt: skip
    p.add_argument("--rounds", metavar="N", type=positive, default=5, help="rounds of timing (default: 5)")
    p.add_argument("--texts", metavar="N", type=positive, default=256, help="how many examples to time (default: 256)")
    p.add_argument(
        "--batch-tokens", metavar="N", type=positive, default=2048, help="tokens computed at once (default: 2,048)"
    )
    p.add_argument("--seed", metavar="N", type=seed_number, default=0, help="which examples to time (default: 0)")
    p.add_argument("--threads", metavar="N", type=positive, help="threads of the CPU (default: torch's choice)")
    p.add_argument("--json", metavar="OUT", type=Path, help="also write the report as JSON")
    p.add_argument("--picture", metavar="OUT", type=Path, help="also write a plot of score over speed as SVG")
    p.add_argument("--impl", choices=IMPLS, help="implementation of the operators (default: the fastest)")
    p.add_argument("-q", "--quiet", action="store_true", help="no progress on standard error")


def _dtypes(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if not set(names) <= set(DTYPES):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(DTYPES)} between commas, got {text!r}")
    return names


def run(args: argparse.Namespace) -> int:
    for out in (args.json, args.picture):
        if out is not None and not out.absolute().parent.is_dir():
            raise UsageError(f"no folder {str(out.parent)!r} to write {out.name} into")
        if out is not None and out.is_dir():
            raise UsageError(f"{out} is a folder: give the name of a file")
    if args.json is not None and args.json == args.picture:
        raise UsageError(f"--json and --picture are both {args.json}")
    from ..compression.report import compare, parties, threads
    from ..compression.report_picture import picture, table
    from ..storage import without_nan, write_atomically, write_json

    def say(line: str) -> None:
        if not args.quiet:
            print(line, file=sys.stderr)

    with threads(args.threads):
        found = parties(args.models, args.dtype, args.impl)
        report = compare(found, args.data, args.rounds, args.texts, args.batch_tokens, args.seed, say)
    print("\n".join(table(report)))
    if args.json is not None:
        write_json(args.json, without_nan(report))
    if args.picture is not None:
        with write_atomically(args.picture) as temporary:
            temporary.write_text(picture(report), encoding="utf-8")
    return 0
