"""What is installed, and under which names."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fastbert.kernels.cpu import library
from fastbert.kernels.cpu import operators as cpp

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs code in a fresh interpreter; `cwd` is on its sys.path, as when somebody types `python` there."""
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=inherited | environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this source tree, built in a copy of it, so that nothing old in build/ gets in."""
    pytest.importorskip("build", reason="needs the test extra")
    folder = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("fastbert", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = (folder / "dist").glob("*.whl")
    return built


def test_wheel_holds_every_module_and_no_other_top_level_name(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, installed in (("fastbert", "fastbert"), ("kernels", "fastbert/kernels")):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{installed}/{path.relative_to(ROOT / folder).as_posix()}" in names
    assert {"fastbert/py.typed", "fastbert/data/devils_dictionary.txt", "fastbert/data/README.md"} <= names
    assert "fastbert/service/page.html" in names
    if cpp.dtypes():  # a compiler that built operators here builds them for every instruction set
        libraries = "\n".join(name for name in names if name.endswith(".so"))
        assert all(library.name_of(instructions) in libraries for instructions in library.INSTRUCTIONS)
    # without sources of the C++ operators: a library would be compared with them, which takes time
    assert not [name for name in names if name.endswith((".cpp", ".h"))]
    top_level = {name.split("/")[0] for name in names}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"fastbert"}


def test_wheel_runs(wheel, tmp_path):
    """Unpacked in another folder, the wheel finds its kernels and data, and computes."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import fastbert, fastbert.demo, fastbert.kernels, torch\n"
        "model = fastbert.BertModel(fastbert.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1,\n"
        "    num_attention_heads=2, intermediate_size=8), impl='native').eval()\n"
        "print(fastbert.__file__, fastbert.kernels.__file__, len(fastbert.demo.entries()),\n"
        "    tuple(model(torch.tensor([[1, 2, 3]])).last_hidden_state.shape), sep='\\n')"
    )
    result = python(code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    files = [str(tmp_path / "fastbert" / name) for name in ("__init__.py", "kernels/__init__.py")]
    assert result.stdout.splitlines() == [*files, "400", "(1, 3, 8)"]


def test_the_module_kernels_is_empty():
    """`kernels` is another package's name. Imported by accident in the repository's root, it must hold nothing."""
    code = "import kernels; print(kernels.__version__, list(kernels.__path__)); from kernels import native"
    result = python(code, cwd=ROOT)
    assert result.stdout == "0 []\n"
    assert "ImportError: cannot import name 'native' from 'kernels'" in result.stderr
    # outside the root it is not found
    found = python("from importlib.util import find_spec; print(find_spec('kernels'))", cwd=ROOT / "tests")
    assert str(ROOT / "kernels") not in found.stdout + found.stderr


@pytest.mark.parametrize("first", ["", "import fastbert.functional; "], ids=["alone", "after_fastbert"])
def test_transformers_works_in_the_root_of_the_repository(first):
    """transformers looks for a package named kernels: it imported our folder, which raised an error."""
    pytest.importorskip("transformers", reason="transformers must work")
    result = python(first + "from transformers import BertModel; print(BertModel.__name__)", cwd=ROOT)
    assert result.stdout == "BertModel\n", result.stderr


WITHOUT = """
import sys
for name in {blocked}:
    sys.modules[name] = None  # importing it raises ImportError
import fastbert, torch
from fastbert import BertConfig, BertModel, Encoder
from fastbert.cli.main import main
sizes = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
model = BertModel(BertConfig(**sizes)).eval()
model(torch.tensor([[1, 2, 3]])).last_hidden_state.sum().backward()
print([name for name in ("triton", "transformers", "sentence_transformers") if sys.modules.get(name)])
try:
    BertModel(BertConfig(**sizes), impl="triton")(torch.tensor([[1, 2, 3]]))
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("blocked", [["triton", "transformers"], []], ids=["absent", "unused"])
def test_neither_triton_nor_transformers_is_needed_on_a_cpu(blocked):
    result = python(WITHOUT.format(blocked=blocked), cwd=ROOT)
    assert result.returncode == 0, result.stderr
    used, refusal = result.stdout.splitlines()
    assert used == "[]"
    assert refusal.startswith('impl="triton" cannot run here: ')
    assert ("triton is not installed" in refusal) == bool(blocked)
