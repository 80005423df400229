"""`fastbert search`: finds the rows of a corpus that are nearest to a question."""

from __future__ import annotations

import argparse
import json

from ..storage import without_nan
from .options import place, positive

ORDER = 2
SUMMARY = "find the rows of an encoded corpus that are nearest to a question"

DESCRIPTION = """\
Find the rows of DIR, which `fastbert encode ... --out-dir DIR` wrote, that are nearest to each QUERY.

The search is exact: the question's vector is compared with that of every row, by cosine, in blocks, so memory use does
not grow with DIR. Each found row is a line of JSON: the question, the score, the part and the row's number in it from
0, and the kept columns, with null for NaN and infinity. The question is encoded by the model of DIR, with its prompt
for questions if it has one."""

EXAMPLES = """\
examples:
  fastbert search vectors "who invented the telescope?"
  fastbert search vectors "first question" "second question" --top-k 3 --device cuda"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("dir", metavar="DIR", type=place, help="a folder or URL of encoded tables")
    parser.add_argument("queries", metavar="QUERY", nargs="+", help="a text")
    parser.add_argument(
        "-k",
        "--top-k",
        metavar="N",
        type=positive,
        default=10,
        help="how many rows to find for each QUERY (default: 10)",
    )
    parser.add_argument(
        "--model",
        metavar="ID_OR_PATH",
        help="where the model of DIR is now (default: the same place as when DIR was written)",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if there is a GPU"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command. Returns its exit code."""
    try:
        from ..corpus.manifest import Manifest
        from ..corpus.search import asking, search
    except ImportError as error:
        raise ImportError("search needs pyarrow and fsspec: pip install pyarrow fsspec") from error
    manifest = Manifest(args.dir)
    encoder = asking(manifest, model=args.model, device=args.device)
    found = search(manifest, encoder.encode_query(args.queries).numpy(), args.top_k)
    for query, hits in zip(args.queries, found, strict=True):
        for hit in hits:
            found_at = {"query": query, "score": round(hit.score, 6), "part": hit.part, "row": hit.row}
            line = found_at | {"columns": without_nan(hit.columns)}
            print(json.dumps(line, default=str, ensure_ascii=False, allow_nan=False))
    return 0
