"""`fastbert predict`: writes a fine-tuned model's answer for each row of a file, one JSON object in each line."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .options import IMPLS, UsageError, positive, same_file

ORDER = 4
SUMMARY = "label texts, find entities or answer questions with a fine-tuned model"

DESCRIPTION = """\
Run a model of 'fastbert finetune' on each example of FILE. The output has a JSON object for each, in the order of FILE:

  sentence, pair   {"label": ..., "score": its probability}; {"score": number} if labels are numbers;
                   {"labels": [{"label", "score"}, ...]} if a text can have several
  token            {"text": ..., "entities": [{"type", "text", "start", "end", "score"}]}
  qa               {"id": ..., "answer": "", "score", "start", "end"}; start and end are characters of the context

FILE has the format of training files and needs no labels; for qa it can also be a .jsonl with question and context.

A checkpoint that was pre-trained on next sentences, such as bert-base-uncased, predicts for a table of pairs whether
the second text follows the first: {"label": "is_next" or "not_next", "score"}."""

EXAMPLES = """\
examples:
  fastbert predict sentiment reviews.tsv                      to standard output
  fastbert predict sentiment reviews.csv -o labels.jsonl --all-scores
  fastbert predict answers dev-v2.0.json -o answers.jsonl
  fastbert predict bert-base-uncased pairs.tsv                columns sentence1 and sentence2, or text1 and text2"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.description, p.epilog = DESCRIPTION, EXAMPLES
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("model", metavar="DIR", help="a folder written by fastbert finetune; or a pre-trained BERT")
    p.add_argument("file", metavar="FILE", help="the examples")
    p.add_argument("-o", "--output", metavar="OUT", type=Path, help="default: standard output")
    p.add_argument(
        "--all-scores", action="store_true", help="also write the score of every label, or the tag of every word"
    )
    p.add_argument("--batch-tokens", metavar="N", type=positive, help="tokens computed at once (default: by device)")
    p.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="dtype of matrix products (default: a 16-bit type if the hardware multiplies it fast)",
    )  # fmt: skip
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if there is a GPU")
    p.add_argument("--impl", choices=IMPLS, help="implementation of the operators (default: the fastest)")


def run(args: argparse.Namespace) -> int:
    if args.output and same_file(args.file, args.output):
        raise UsageError(f"input and output are the same file: {args.output}")
    from ..storage import write_atomically
    from ..training.pipeline import pipeline

    model = pipeline(args.model, device=args.device, dtype=args.dtype, impl=args.impl)
    examples = model.task.read(args.file, gold=False)
    records = model.records(examples, args.all_scores, args.batch_tokens)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if args.output is None:
        sys.stdout.buffer.write(lines.encode())
        sys.stdout.buffer.flush()
        return 0
    with write_atomically(args.output) as temporary:
        temporary.write_text(lines, encoding="utf-8")
    return 0
