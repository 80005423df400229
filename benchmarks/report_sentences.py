"""README's table of `SentenceTransformer.encode`, from the result files: a row each way, a column each dtype."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- sentences: begin -->", "<!-- sentences: end -->"
SUITE = "sentences"


def newest(folder: Path) -> list[dict[str, Any]]:
    """The last whole result of each device that has rows of this suite."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*/*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        rows = [row for row in result.get("rows", ()) if row.get("suite") == SUITE]
        if rows and result["complete"] and "--quick" not in result["command"].split():
            before = found.get(path.parent.name)
            if before is None or before["created"] < result["created"]:
                found[path.parent.name] = {**result, "rows": rows}
    return list(found.values())


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["median_s"] is None:
        return f"{row['status']}: {row['reason']}"
    ratio = row["ratio_to_ours"]
    slower = f" ({ratio['value']:.1f}x our time)" if ratio else ""
    return f"{row['tokens_per_second']:,.0f}{slower}"


def table(result: dict[str, Any]) -> list[str]:
    rows = result["rows"]
    dtypes, ways = (list(dict.fromkeys(row[name] for row in rows)) for name in ("dtype", "row"))
    at = {(row["row"], row["dtype"]): row for row in rows}
    texts, device = rows[0]["shape"]["sequences"], result["device"]
    cores = f", {device['cores']} cores" if device["type"] == "cpu" else ""
    title = f"`SentenceTransformer.encode`, {texts} docstrings, real tokens/s, {device['name']}{cores}"
    lines = [f"| {title} | " + " | ".join(dtypes) + " |", "| --- |" + " --- |" * len(dtypes)]
    for way in ways:
        ours = next(row for row in rows if row["row"] == way)["peer"] == "fastbert"
        cells = [_cell(at.get((way, dtype))) for dtype in dtypes]
        cells = [f"**{cell}**" if ours and cell else cell for cell in (way, *cells)]
        lines.append("| " + " | ".join(cells) + " |")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if name != "python")
    return [*lines, "", f"In one run, each row's vectors checked: `{result['command']}`; {versions}."]


def readme(folder: Path) -> str:
    """What stands between the markers, and they."""
    tables = [line for result in newest(folder) for line in ("", *table(result))]
    return "\n".join([BEGIN, *(tables or ["", "not measured"]), "", END])


def with_table(text: str, folder: Path) -> str:
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"README.md has no {BEGIN} ... {END}")
    return before + readme(folder) + after
