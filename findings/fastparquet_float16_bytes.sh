#!/usr/bin/env bash
# fastparquet: float16 numbers in a Parquet file come back as pairs of bytes, where other readers give numbers.
#
# Packages: fastparquet 2026.9.0, pyarrow 26.0.1, polars 2.1.0, duckdb 2.0.1. pyarrow writes a column of float16 numbers and a
# column of lists of them, as vectors are stored at half the size.
#
# Parquet stores float16 as two bytes of fixed length with a logical type. fastparquet ignores that type and gives the stored bytes:
# no error, an object column of strings of bytes. DuckDB gives float32, and a file that it writes again is twice as large. polars
# and pyarrow give float16. float32 and 8-bit columns of the same file are right in all four.
#
# Output seen (type and first value of the number, and of the list):
#   pyarrow      float16  1.5    float16  [1.5, -2.0]
#   polars       Float16  1.5    Float16  [1.5, -2.0]
#   duckdb       FLOAT  1.5    FLOAT[]  [1.5, -2.0]
#   fastparquet  object  b'\x00>'    object  [b'\x00>', b'\x00\xc0']
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q fastparquet==2026.9.0 pyarrow==26.0.1 polars==2.1.0 duckdb==2.0.1 numpy==2.4.6 pandas==3.1.1
cd "$tmp"
cat > case.py <<'PY'
import duckdb
import fastparquet
import numpy as np
import polars
import pyarrow as pa
from pyarrow import parquet

numbers = np.array([1.5, -2.0], dtype=np.float16)
table = {"number": pa.array(numbers[:1]), "vector": pa.array([numbers], pa.list_(pa.float16()))}
parquet.write_table(pa.table(table), "file.parquet")


def show(name: str, *found) -> None:
    print(f"{name:12}", "    ".join(f"{kind}  {value}" for kind, value in found))


of_pyarrow = parquet.read_table("file.parquet")
kind = of_pyarrow.schema.field("number").type
show("pyarrow", ("float16" if kind == pa.float16() else kind, of_pyarrow["number"][0].as_py()),
     ("float16" if of_pyarrow["vector"].type.value_type == pa.float16() else "other", of_pyarrow["vector"][0].as_py()))
of_polars = polars.read_parquet("file.parquet")
show("polars", (of_polars["number"].dtype, of_polars["number"][0]),
     (of_polars["vector"].dtype.inner, of_polars["vector"][0].to_list()))
of_duckdb = duckdb.sql("select * from 'file.parquet'")
show("duckdb", *zip(of_duckdb.types, of_duckdb.fetchall()[0]))
of_fastparquet = fastparquet.ParquetFile("file.parquet").to_pandas()
show("fastparquet", (of_fastparquet["number"].dtype, bytes(of_fastparquet["number"][0])),
     (of_fastparquet["vector"].dtype, [bytes(number) for number in of_fastparquet["vector"][0]]))
PY
venv/bin/python case.py | tee found
diff found - <<'SEEN'
pyarrow      float16  1.5    float16  [1.5, -2.0]
polars       Float16  1.5    Float16  [1.5, -2.0]
duckdb       FLOAT  1.5    FLOAT[]  [1.5, -2.0]
fastparquet  object  b'\x00>'    object  [b'\x00>', b'\x00\xc0']
SEEN
