#!/usr/bin/env bash
# DuckDB: a Parquet file with a null in a column of fixed-size arrays is read by polars and fastparquet, and refused by pyarrow.
#
# Packages: duckdb 2.0.1, pyarrow 26.0.1, polars 2.1.0, fastparquet 2026.9.0. A table of three vectors FLOAT[2], the second of
# them null, written by COPY.
#
# In memory DuckDB keeps room for the numbers of a null array, and it counts one of them too many in the file: the metadata
# names 6 values, where Parquet has 5 for two lists of two and a null. pyarrow follows the numbers of entries and raises; the other
# readers follow the levels. The same table cast to FLOAT[] is read by all, as is a table without nulls. So the export of a
# vector column works until the first text without a vector.
#
# Output seen:
#   FLOAT[2]  values in the metadata  6
#   FLOAT[2]  duckdb       [[1.0, 2.0], None, [5.0, 6.0]]
#   FLOAT[2]  polars       [[1.0, 2.0], None, [5.0, 6.0]]
#   FLOAT[2]  fastparquet  [[1.0, 2.0], None, [5.0, 6.0]]
#   FLOAT[2]  pyarrow      ArrowInvalid: Length spanned by list offsets (5) larger than values array (length 4)
#   FLOAT[]   values in the metadata  5
#   FLOAT[]   pyarrow      [[1.0, 2.0], None, [5.0, 6.0]]
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q duckdb==2.0.1 pyarrow==26.0.1 polars==2.1.0 fastparquet==2026.9.0 numpy==2.4.6 pandas==3.1.1
cd "$tmp"
cat > case.py <<'PY'
import duckdb
import fastparquet
import polars
from pyarrow import ArrowInvalid, parquet

duckdb.sql("create table texts(id int, vector float[2])")
duckdb.sql("insert into texts values (1, [1, 2]), (2, null), (3, [5, 6])")
duckdb.sql("copy texts to 'fixed.parquet'")
duckdb.sql("copy (select id, vector::float[] as vector from texts) to 'any.parquet'")


def listed(rows) -> list:
    return [None if row is None else [float(number) for number in row] for row in rows]


READERS = {
    "duckdb": lambda file: [row[0] for row in duckdb.sql(f"select vector from '{file}' order by id").fetchall()],
    "polars": lambda file: polars.read_parquet(file)["vector"].to_list(),
    "fastparquet": lambda file: fastparquet.ParquetFile(file).to_pandas()["vector"].tolist(),
    "pyarrow": lambda file: parquet.read_table(file)["vector"].to_pylist(),
}
for kind, file, readers in (("FLOAT[2]", "fixed.parquet", READERS), ("FLOAT[]", "any.parquet", ["pyarrow"])):
    count = parquet.ParquetFile(file).metadata.row_group(0).column(1).num_values
    print(f"{kind:9} values in the metadata  {count}")
    for name in readers:
        try:
            found = listed(READERS[name](file))
        except ArrowInvalid as error:
            found = f"ArrowInvalid: {error}"
        print(f"{kind:9} {name:12} {found}")
PY
venv/bin/python case.py | tee found
diff found - <<'SEEN'
FLOAT[2]  values in the metadata  6
FLOAT[2]  duckdb       [[1.0, 2.0], None, [5.0, 6.0]]
FLOAT[2]  polars       [[1.0, 2.0], None, [5.0, 6.0]]
FLOAT[2]  fastparquet  [[1.0, 2.0], None, [5.0, 6.0]]
FLOAT[2]  pyarrow      ArrowInvalid: Length spanned by list offsets (5) larger than values array (length 4)
FLOAT[]   values in the metadata  5
FLOAT[]   pyarrow      [[1.0, 2.0], None, [5.0, 6.0]]
SEEN
