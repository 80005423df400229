#!/usr/bin/env bash
# safetensors: a slice of a stored tensor may not end past the last row, nor begin with a negative number, but may be one such row.
#
# Packages: safetensors 0.8.0, numpy 2.4.6. A tensor of 10 rows is read in parts by safe_open(...).get_slice(...), which is there so
# that a large table need not fit into memory.
#
# A loop over parts of 4 rows ends with rows 8 to 12. numpy, torch and h5py give the two rows that exist, so such loops are
# written without a test of the end. Here the last part raises, after all others have been read. A single negative number
# counts from the end as everywhere else, whereas a negative bound of a slice is an OverflowError.
#
# Output seen:
#   [0:4]    4 rows
#   [8:12]   SafetensorError: Error during slicing [8:12] with shape [10, 4]
#   [8:]     2 rows
#   [-1]     the last row
#   [-3:]    OverflowError: can't convert negative int to unsigned
#   [:-3]    OverflowError: can't convert negative int to unsigned
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q safetensors==0.8.0 numpy==2.4.6
cd "$tmp"
cat > case.py <<'PY'
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

table = np.arange(40, dtype=np.float32).reshape(10, 4)
save_file({"table": table}, "file.safetensors")
with safe_open("file.safetensors", framework="np") as file:
    stored = file.get_slice("table")
    for name, index in {
        "[0:4]": np.s_[0:4], "[8:12]": np.s_[8:12], "[8:]": np.s_[8:], "[-1]": -1, "[-3:]": np.s_[-3:], "[:-3]": np.s_[:-3]
    }.items():
        try:
            rows = stored[index]
            assert np.array_equal(rows, table[index])
            found = "the last row" if rows.ndim == 1 else f"{len(rows)} rows"
        except (SafetensorError, OverflowError) as error:
            found = f"{type(error).__name__}: {str(error).split(': index')[0]}"
        print(f"{name:8} {found}")
PY
venv/bin/python case.py | tee found
diff found - <<'SEEN'
[0:4]    4 rows
[8:12]   SafetensorError: Error during slicing [8:12] with shape [10, 4]
[8:]     2 rows
[-1]     the last row
[-3:]    OverflowError: can't convert negative int to unsigned
[:-3]    OverflowError: can't convert negative int to unsigned
SEEN
