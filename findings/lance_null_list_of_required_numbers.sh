#!/usr/bin/env bash
# Lance: a table from Parquet with a null fixed-size list is refused if the numbers of the lists are not nullable.
#
# Packages: pylance 14.0.2, pyarrow 26.0.1. A column FixedSizeList(4) of float32 with a null in its second row, written to
# Parquet by pyarrow, read again, and written to Lance.
#
# pyarrow reads the numbers of the null list as four nulls, although their type is not nullable. Lance then raises "non-nullable
# child of type Float32 contains nulls not present in parent", although all of these nulls are inside the null list. A table
# that never went through Parquet is accepted, because the numbers inside its null list are not null. So write `nullable=True` for the numbers
# of lists that may be null.
#
# Output seen:
#   numbers not null, made in memory: written
#   numbers not null, from Parquet:   refused
#   numbers nullable, from Parquet:   written
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q pylance==14.0.2 pyarrow==26.0.1
cd "$tmp"
cat > case.py <<'PY'
import lance
import pyarrow as pa
from pyarrow import parquet


def table_of(nullable):
    kind = pa.list_(pa.field("element", pa.float32(), nullable=nullable), 4)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(range(12), pa.float32()), type=kind, mask=pa.array([False, True, False]))
    return pa.table([lists], schema=pa.schema([("vector", kind)]))


def by_parquet(table):
    parquet.write_table(table, "table.parquet")
    return parquet.read_table("table.parquet")


def written(table):
    try:
        lance.write_dataset(table, "table.lance", mode="overwrite")
    except OSError as error:
        assert "contains nulls not present in parent" in str(error), error
        return "refused"
    return "written"


seen = [written(table_of(False)), written(by_parquet(table_of(False))), written(by_parquet(table_of(True)))]
print(f"numbers not null, made in memory: {seen[0]}")
print(f"numbers not null, from Parquet:   {seen[1]}")
print(f"numbers nullable, from Parquet:   {seen[2]}")
assert seen == ["written", "refused", "written"]
PY
"$tmp/venv/bin/python" case.py 2> /dev/null
