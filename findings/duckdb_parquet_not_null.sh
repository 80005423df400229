#!/usr/bin/env bash
# DuckDB: the schema of a Parquet file says whether its rows happen to hold a null, so the parts of one table have several.
#
# Packages: duckdb 2.0.1, pyarrow 26.0.1. A table with a nullable column is written by COPY three times: before and after a row with
# a null was inserted, and selected by "is not null" after it.
#
# DuckDB marks a column as required where it knows from statistics or from the query that no null occurs, although the
# table declares it as nullable. Parts that were written day by day therefore differ in their schemas. pyarrow reads each of them,
# and a list of them; concat_tables of the parts that were read one by one is refused, and a ParquetWriter with the schema of the
# first part refuses the second. A good engineer takes the schema of a part for that of the table.
#
# Output seen:
#   before       score: float not null
#   after        score: float
#   is not null  score: float not null
#   concat_tables: ArrowInvalid: Schema at index 1 was different
#   ParquetWriter: ValueError: Table schema does not match schema used to create file
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q duckdb==2.0.1 pyarrow==26.0.1
cd "$tmp"
cat > case.py <<'PY'
import duckdb
import pyarrow as pa
from pyarrow import parquet

duckdb.sql("create table found(id bigint, score float)")
duckdb.sql("insert into found values (1, 0.5)")
duckdb.sql("copy found to 'before.parquet'")
duckdb.sql("insert into found values (2, null)")
duckdb.sql("copy found to 'after.parquet'")
duckdb.sql("copy (select * from found where score is not null) to 'is not null.parquet'")
for name in ("before", "after", "is not null"):
    print(f"{name:12} {parquet.read_schema(f'{name}.parquet').field('score')}".replace("pyarrow.Field<", "").rstrip(">"))

parts = [parquet.read_table(f"{name}.parquet") for name in ("before", "after")]


def attempt(name: str, action) -> None:
    try:
        action()
        print(f"{name}: no error")
    except (pa.ArrowInvalid, ValueError) as error:
        print(f"{name}: {type(error).__name__}: {str(error).split(':')[0].strip()}")


def write() -> None:
    with parquet.ParquetWriter("joined.parquet", parts[0].schema) as writer:
        for part in parts:
            writer.write_table(part)


assert parquet.read_table(["before.parquet", "after.parquet"]).num_rows == 3
attempt("concat_tables", lambda: pa.concat_tables(parts))
attempt("ParquetWriter", write)
PY
venv/bin/python case.py | tee found
diff found - <<'SEEN'
before       score: float not null
after        score: float
is not null  score: float not null
concat_tables: ArrowInvalid: Schema at index 1 was different
ParquetWriter: ValueError: Table schema does not match schema used to create file
SEEN
