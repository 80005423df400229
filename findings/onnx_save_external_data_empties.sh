#!/usr/bin/env bash
# onnx: saving a model with external data takes the weights out of the model in memory, so a second file of it has none.
#
# Packages: onnx 1.23.2, numpy 2.4.6. A model of one product by a weight of 400 KB, saved to one folder with
# save_as_external_data=True, and then as a single file to another folder.
#
# Saving looks like reading. But the tensors that were written become references to the file in the object itself. The
# second call writes 146 bytes without an error; they name a file next to them that does not exist, and
# only loading fails. to_array of the weight and SerializeToString have the same gap. A script that writes a model
# twice, for instance before and after a quantisation, is where this happens. Way out: save a copy (ModelProto().CopyFrom), or
# load the model again.
#
# Output seen:
#   first  model.onnx and weights.bin of 400000 bytes
#   second model.onnx of 146 bytes, weights in memory: none, loading: ValidationError
#   second of a model whose copy was saved first: 400000 bytes and more
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q onnx==1.23.2 numpy==2.4.6
cd "$tmp"
export PYTHONWARNINGS=ignore
cat > case.py <<'PY'
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def product() -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.ones((1000, 100), np.float32), "w")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, n]) for name, n in (("x", 1000), ("y", 100))]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    return helper.make_model(helper.make_graph(nodes, "product", ends[:1], ends[1:], [weight]))


def second(copied: bool) -> tuple[int, int, str]:
    """The size of the second file, the weight's bytes in memory after the first, and what loading the second gives."""
    first, other = Path(f"first-{copied}"), Path(f"second-{copied}")
    model = saved = product()
    if copied:
        saved = onnx.ModelProto()
        saved.CopyFrom(model)
    for folder in (first, other):
        folder.mkdir()
    onnx.save_model(saved, first / "model.onnx", save_as_external_data=True, location="weights.bin")
    assert (first / "weights.bin").stat().st_size == 400000
    onnx.save_model(model, other / "model.onnx")
    try:
        loaded = str(numpy_helper.to_array(onnx.load(other / "model.onnx").graph.initializer[0]).shape)
    except Exception as error:
        loaded = type(error).__name__
    return (other / "model.onnx").stat().st_size, len(model.graph.initializer[0].raw_data), loaded


for copied in (False, True):
    size, held, loaded = second(copied)
    print(f"a copy saved first: {copied!s:5}   second file {size} bytes, weight in memory {held} bytes, loading {loaded}")
    if copied:
        assert size > 400000 and held == 400000 and loaded == "(1000, 100)"
    else:
        assert size < 1000 and held == 0 and loaded == "ValidationError", "saving leaves the model whole now"
PY
"$tmp/venv/bin/python" case.py
