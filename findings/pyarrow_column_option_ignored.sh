#!/usr/bin/env bash
# pyarrow: an option of the Parquet writer for a column that does not exist is ignored without an error.
#
# Package: pyarrow 26.0.1. A table with a column of lists, written with compression, dictionary and statistics for its values.
#
# The options take the path of a column in the Parquet file. The path of a list's values is tags.list.element, whatever
# the Arrow schema calls the child. With any other name, such as the name of the table's column, write_table() succeeds, and
# the column gets none of the three options. Only the metadata of the file shows this, so check there.
#
# Output seen:
#   tags.list.element    compression ZSTD         dictionary True   statistics True
#   tags                 compression UNCOMPRESSED dictionary False  statistics False
#   tags.list.item       compression UNCOMPRESSED dictionary False  statistics False
#   no such column       compression UNCOMPRESSED dictionary False  statistics False
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q pyarrow==26.0.1
cd "$tmp"
cat > case.py <<'PY'
import io

import pyarrow as pa
from pyarrow import parquet

table = pa.table({"number": range(1000), "tags": [[str(i)] for i in range(1000)]})


def seen(name):
    """Compression and dictionary of the list's column where the options name `name`."""
    file = io.BytesIO()
    others = {"number": "NONE"}
    parquet.write_table(table, file, compression={**others, name: "ZSTD"}, use_dictionary=[name], write_statistics=[name])
    column = parquet.ParquetFile(file).metadata.row_group(0).column(1)
    return column.compression, column.has_dictionary_page, column.is_stats_set


for name in ("tags.list.element", "tags", "tags.list.item", "no such column"):
    print(f"{name:20} compression {seen(name)[0]:12} dictionary {seen(name)[1]!s:6} statistics {seen(name)[2]}")
assert seen("tags.list.element") == ("ZSTD", True, True)
assert seen("no such column") != ("ZSTD", True, True)
PY
"$tmp/venv/bin/python" case.py
