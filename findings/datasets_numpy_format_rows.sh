#!/usr/bin/env bash
# datasets: in the numpy format a row keeps its float64 and uint64 numbers, and a slice of rows has rounded or negative ones.
#
# Packages: datasets 5.2.0. A data set with a time in float64, a 64-bit hash in uint64 and an int8 vector component, read with
# with_format("numpy") by row, by slice and by column.
#
# One row gives numpy scalars of the columns' types. For several rows, and for a list within a row, the formatter converts all
# floating-point numbers to float32 and all integers to int64. A time in seconds is off by up to a minute, a hash of
# 2**63 and above becomes negative, 8-bit vectors take eight times the memory, and nothing is said. So d[0]["time"] and
# d[:1]["time"][0] differ. with_format("numpy", dtype=None), in no documentation of it, keeps the types.
#
# Output seen:
#   row       float64 1764460800.25   uint64 9223372036854775813   int8 7
#   slice     float32 1764460800.0   int64 -9223372036854775803   int64 7
#   column    float32 1764460800.0   int64 -9223372036854775803   int64 7
#   pandas    float64 1764460800.25   uint64 9223372036854775813   int8 7
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q datasets==5.2.0 numpy==2.4.6 pyarrow==26.0.1 pandas==3.1.1
cd "$tmp"
export HF_HOME="$tmp/home" HF_HUB_OFFLINE=1
cat > case.py <<'PY'
import pyarrow as pa
from datasets import Dataset

rows = Dataset(pa.table({
    "time": pa.array([1764460800.25, 0.5], pa.float64()),
    "hash": pa.array([2**63 + 5, 1], pa.uint64()),
    "part": pa.array([7, -7], pa.int8()),
}))
arrays = rows.with_format("numpy")
found = {
    "row": arrays[0],
    "slice": {name: column[0] for name, column in arrays[:2].items()},
    "column": {name: arrays[name][:][0] for name in rows.column_names},
    "pandas": {name: column[0] for name, column in rows.with_format("pandas")[:2].items()},
}
for how, of in found.items():
    print(f"{how:9}", "   ".join(f"{of[name].dtype} {of[name]}" for name in rows.column_names))
PY
venv/bin/python case.py | tee found
diff found - <<'SEEN'
row       float64 1764460800.25   uint64 9223372036854775813   int8 7
slice     float32 1764460800.0   int64 -9223372036854775803   int64 7
column    float32 1764460800.0   int64 -9223372036854775803   int64 7
pandas    float64 1764460800.25   uint64 9223372036854775813   int8 7
SEEN
