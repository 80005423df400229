#!/usr/bin/env bash
# pyarrow: a fixed-size list that is null can be written to Parquet, and the file cannot be read before version 26.
#
# Packages: pyarrow 25.0.1 (the newest one for Python 3.10) and 26.0.1. A column FixedSizeList(4) of float32, as vectors are
# stored, with a null in its second row, is written to Parquet and read again by the same version.
#
# Version 25.0.1 writes the file without a word and raises "Expected all lists to be of size=4 but index 2 had size=0" when it
# is read. Version 26.0.1 reads it, and a file of version 25.0.1 too. A list of any size (pa.list_ without a size) that is null
# is read by both. So a file of vectors may be unreadable where it was made and fine elsewhere.
#
# Output seen:
#   25.0.1 reads 25.0.1, fixed size: ArrowInvalid: Expected all lists to be of size=4 but index 2 had size=0
#   25.0.1 reads 25.0.1, any size:   1 null
#   26.0.1 reads 25.0.1, fixed size: 1 null
#   26.0.1 reads 26.0.1, fixed size: 1 null
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
cat > write.py <<'PY'
import pyarrow as pa
from pyarrow import parquet

rows = [[1.0, 2.0, 3.0, 4.0], None, [5.0, 6.0, 7.0, 8.0]]
for name, kind in (("fixed", pa.list_(pa.float32(), 4)), ("any", pa.list_(pa.float32()))):
    parquet.write_table(pa.table({"vector": pa.array(rows, kind)}), f"{name}-{pa.__version__}.parquet")
PY
cat > read.py <<'PY'
import sys

import pyarrow as pa
from pyarrow import parquet

name, by = sys.argv[1:]
try:
    found = f"{parquet.read_table(f'{name}-{by}.parquet')['vector'].null_count} null"
except pa.ArrowInvalid as error:
    found = f"ArrowInvalid: {error}"
print(f"{pa.__version__} reads {by}, {'fixed size: ' if name == 'fixed' else 'any size:   '}{found}")
PY
for version in 25.0.1 26.0.1; do
    "${PYTHON:-python3}" -m venv "venv-$version"
    "venv-$version/bin/pip" install -q "pyarrow==$version"
    "venv-$version/bin/python" write.py
done
{
    venv-25.0.1/bin/python read.py fixed 25.0.1
    venv-25.0.1/bin/python read.py any 25.0.1
    venv-26.0.1/bin/python read.py fixed 25.0.1
    venv-26.0.1/bin/python read.py fixed 26.0.1
} | tee found
diff found - <<'SEEN'
25.0.1 reads 25.0.1, fixed size: ArrowInvalid: Expected all lists to be of size=4 but index 2 had size=0
25.0.1 reads 25.0.1, any size:   1 null
26.0.1 reads 25.0.1, fixed size: 1 null
26.0.1 reads 26.0.1, fixed size: 1 null
SEEN
