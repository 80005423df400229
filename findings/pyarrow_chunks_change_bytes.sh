#!/usr/bin/env bash
# pyarrow: two tables that are equal give Parquet files with different bytes if their columns are cut into other chunks.
#
# Package: pyarrow 26.0.1. The same values as one chunk and as chunks of 300 rows, written with the same options.
#
# With long texts the pages of the file end at other rows. Short columns hide this, because they fit into one page. To get
# the same file from the same rows, call combine_chunks() on every table before writing.
#
# Output seen:
#   numbers      the same bytes  after combine_chunks the same
#   short texts  the same bytes  after combine_chunks the same
#   long texts   other bytes     after combine_chunks the same
#   lists        the same bytes  after combine_chunks the same
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q pyarrow==26.0.1
cd "$tmp"
cat > case.py <<'PY'
import hashlib
import io

import pyarrow as pa
from pyarrow import parquet


def bytes_of(table):
    file = io.BytesIO()
    parquet.write_table(table, file, compression="none", use_dictionary=False)
    return hashlib.sha256(file.getvalue()).hexdigest()[:12]


def chunked(table, rows):
    return pa.concat_tables([table.slice(start, rows) for start in range(0, len(table), rows)])


tables = {
    "numbers": pa.table({"a": range(5000)}),
    "short texts": pa.table({"a": [str(i) for i in range(5000)]}),
    "long texts": pa.table({"a": [f"{i} " * 1000 for i in range(1000)]}),
    "lists": pa.table({"a": [[i, i] for i in range(5000)]}),
}
outcomes = {}
for name, table in tables.items():
    one, other = table.combine_chunks(), chunked(table, 300)
    assert one.equals(other)
    outcomes[name] = bytes_of(one) == bytes_of(other)
    again = bytes_of(one) == bytes_of(other.combine_chunks())
    print(f"{name:12} {'the same bytes' if outcomes[name] else 'other bytes':15} after combine_chunks {'the same' if again else 'other'}")
    assert again
assert outcomes["numbers"]
assert not outcomes["long texts"]
PY
"$tmp/venv/bin/python" case.py
