"""Cells and tables of a page: formats numbers, and rows in Markdown."""

from __future__ import annotations

from collections.abc import Iterable


def ratio(row: dict | None) -> str:
    if row is None or row["ratio_to_ours"] is None:
        return ""
    r = row["ratio_to_ours"]
    return f"{r['value']:.2f}x ({r['low']:.2f} - {r['high']:.2f})"


def duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:,.2f} s"
    return f"{1e3 * seconds:,.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:,.3g} µs"


def mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a table in Markdown, without columns that are empty in every row."""
    head, rows = list(head), [list(row) for row in rows]
    kept = [n for n in range(len(head)) if n == 0 or any(row[n] for row in rows)]
    lines = [head, ["---"] * len(head), *rows]
    return [*("| " + " | ".join(line[n] for n in kept) + " |" for line in lines), ""]


def with_block(text: str, block: str) -> str:
    """`text` with `block` in place of the lines from the block's first line (a marker) to its last line."""
    begin, *_, end = block.splitlines()
    before, began, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not (began and ended):
        raise ValueError(f"the page has no {begin} ... {end}")
    return before + block + after
