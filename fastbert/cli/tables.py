"""`fastbert encode --out-dir`: its arguments, and the function that runs it."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ..corpus.job import NULLS, PRECISIONS, Job
from ..storage import CheckpointError
from .options import names_between_commas, place, positive

if TYPE_CHECKING:
    from ..encoding.ranks import Ranks
    from ..encoding.stats import EncodeStats


OPTIONS = (
    "--id-column", "--keep", "--precision", "--nulls", "--empty-is-null", "--dedup", "--batch-invariant", "--part-rows",
    "--verify",
)  # fmt: skip


def options_given(args: argparse.Namespace) -> list[str]:
    """The names in OPTIONS whose values differ from their defaults."""
    defaults = argparse.ArgumentParser()
    add_table_arguments(defaults)
    names = {option: option[2:].replace("-", "_") for option in OPTIONS}
    return [option for option, name in names.items() if getattr(args, name) != defaults.get_default(name)]


def add_table_arguments(parser: argparse.ArgumentParser) -> None:
    tables = parser.add_argument_group("tables", "with --out-dir; each part of an input becomes a Parquet file")
    tables.add_argument(
        "--out-dir",
        metavar="DIR",
        type=place,
        help="write DIR/data/*.parquet, with a column embedding; FILE may be .parquet, .arrow, .feather, .jsonl or "
        ".csv, a folder, a pattern, and like DIR a URL that fsspec supports. Running it again writes the missing parts",
    )
    tables.add_argument(
        "--id-column",
        metavar="NAME",
        help="a column that identifies rows in messages and in search results; it is copied to DIR",
    )
    tables.add_argument("--keep", metavar="NAME,...", type=names_between_commas, default=(), help="columns to keep")
    tables.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="dtype of the vectors in the files; with int8 the column embedding_scale has a scale for each row "
        "(default: float32)",
    )
    tables.add_argument(
        "--nulls",
        choices=NULLS,
        default="null",
        help="what to do with a row without a text: no vector (null, the default); zeros, and false in a column "
        "embedding_valid (fill); the vector of the empty text (encode); an error (refuse)",
    )
    tables.add_argument(
        "--empty-is-null",
        action="store_true",
        help="treat texts that are empty or only white space as rows without a text (default: they get vectors)",
    )
    tables.add_argument("--dedup", action="store_true", help="compute equal texts once within 8,192 rows")
    tables.add_argument(
        "--batch-invariant",
        action="store_true",
        help="a text's vector does not depend on its batch, to the last bit, so the files are the same with any number "
        "of workers",
    )
    tables.add_argument(
        "--part-rows",
        metavar="N",
        type=positive,
        default=50_000,
        help="the most rows in an output file; .jsonl is cut every N times 512 bytes, and .csv is not cut "
        "(default: 50,000)",
    )
    tables.add_argument(
        "--verify", action="store_true", help="do not encode, but read every part of DIR and report all errors"
    )


def job_of(args: argparse.Namespace, encoder: dict[str, Any]) -> Job:
    return Job(
        args.out_dir, encoder, text=args.field or "text", id=args.id_column, keep=args.keep, precision=args.precision,
        nulls=args.nulls, empty_is_null=args.empty_is_null, dedup=args.dedup, batch_invariant=args.batch_invariant,
        part_rows=args.part_rows, max_tokens_per_batch=args.max_tokens_per_batch, line_bytes=args.max_line_bytes,
    )  # fmt: skip


def encode_tables(args: argparse.Namespace, encoder: dict[str, Any], ranks: Ranks | None) -> EncodeStats | None:
    """Runs the command. Returns the counts of the encoder, or None after --verify.

    Args:
        encoder: arguments of `Encoder.from_pretrained`.
        ranks: the processes of torchrun, if there are any.
    """
    try:
        from ..corpus.manifest import Manifest
        from ..corpus.run import expect_done
        from ..corpus.units import largest_first, plan
    except ImportError as error:
        raise ImportError(f"--out-dir needs pyarrow and fsspec: pip install pyarrow fsspec ({error})") from error
    job, units = plan(args.files, job_of(args, encoder))
    manifest = Manifest(args.out_dir)
    if args.verify:
        return _verify(manifest, units)
    missing = manifest.missing(units)
    if ranks is not None:
        from ..engines.torchrun import share_of

        open_units, (job, own) = set(missing), share_of(ranks, job, units)
        missing = [unit for unit in own if unit in open_units]
    if args.workers > 1:
        missing = largest_first(missing, units)
    with _maker(job, min(args.workers, len(missing))) as maker:
        try:
            expect_done(_shown(args, maker.encode(missing), len(missing)))
        finally:
            manifest.place.tidy()
        return maker.stats


def _maker(job: Job, workers: int) -> contextlib.AbstractContextManager:
    if workers > 1:
        from ..corpus.pool import CorpusPool

        return CorpusPool(workers, job)
    from ..corpus.run import CorpusEncoder

    return contextlib.nullcontext(CorpusEncoder(job))


def _shown(args: argparse.Namespace, outcomes: Iterable[Any], count: int) -> Iterator[Any]:
    """Yields the outcomes, with a progress bar of parts on a terminal. Prints the reason of each failed part."""
    from tqdm import tqdm

    from ..corpus.run import Failed

    with tqdm(total=count, unit="part", desc="encode", disable=args.quiet or None) as bar:
        for outcome in outcomes:
            bar.update()
            if isinstance(outcome, Failed) and not args.quiet:
                bar.write(f"fastbert: {outcome.reason}", file=sys.stderr)
            yield outcome


def _verify(manifest: Any, units: list[Any]) -> None:
    """Prints everything that is wrong, one line each. Raises: CheckpointError if anything is."""
    from ..corpus.verify import verify

    found = 0
    for fault in verify(manifest, units):
        print(fault)
        found += 1
    if found:
        raise CheckpointError(f"{manifest.place.url}: {found:,} things are wrong, of {len(units):,} parts")
    rows = sum(receipt["rows"] for receipt in manifest.receipts().values())
    print(f"{manifest.place.url}: {len(units):,} parts, {rows:,} rows, all as they were written")
