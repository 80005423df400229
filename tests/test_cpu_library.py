"""The library of C++ operators is called only where it is this code's own: stamps, signatures, and what builds it.

It was once found by name alone, so that a library of last week's sources computed with this week's signatures.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastbert.kernels import _cpu, _cpu_library

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]
KERNELS = Path(_cpu_library.__file__).parent
BUILT = _cpu_library.find(KERNELS)
built = pytest.mark.skipif(BUILT is None, reason="the C++ operators are not built")


def text_of(name: str) -> str:
    return (ROOT / "kernels" / name).read_text()


# ---- Python's table and the C++ ---------------------------------------------------------------------------


def test_signatures_are_those_of_the_sources():
    """ctypes believes what it is told: a forgotten argument is read from whatever lies on the stack."""
    text = "\n".join(path.read_text() for path in _cpu_library.sources(ROOT / "kernels"))
    text = text.replace("\\\n", " ")

    def letter(declared: str) -> str:
        if "*" in declared:
            return "p"
        return {"int": "i", "int64_t": "l", "uint32_t": "u", "float": "f", "void": "v"}[declared.split()[0]]

    found = {}
    for result, name, arguments in re.findall(r"EXPORT (\w+) (\w+)_##name\(([^)]*)\)", text):
        found[name] = (letter(result), "".join(letter(argument) for argument in arguments.split(",")))
    table = {name: (result, words.replace(" ", "")) for name, (result, words) in _cpu_library.SIGNATURES.items()}
    assert found == table


def test_what_sizes_memory_is_the_same_in_both_languages():
    for name, file, value in (
        ("WIDTH", "_cpu_simd.h", _cpu_library.WIDTH),
        ("BLOCK", "_cpu_norm.cpp", _cpu_library.NORM_BLOCK),
        ("UP_ROWS", "_cpu_layer.cpp", _cpu_library.UP_ROWS),
    ):
        assert re.search(rf"constexpr int(?:64_t)? {name} = (\d+);", text_of(file)).group(1) == str(value)


# ---- stamps ----------------------------------------------------------------------------------------------


def copied(folder: Path) -> Path:
    """The library with its sources beside it, as in a checkout."""
    for path in _cpu_library.sources(KERNELS):
        (folder / path.relative_to(KERNELS)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.relative_to(KERNELS))
    return Path(shutil.copy(BUILT, folder))


@built
def test_with_and_without_its_sources_beside_it(tmp_path):
    assert _cpu_library.open_library(copied(tmp_path)).linear_float32.argtypes is not None
    alone = tmp_path / "installed"
    alone.mkdir()
    assert _cpu_library.sources_stamp(alone) is None
    _cpu_library.open_library(Path(shutil.copy(BUILT, alone)))


@built
@pytest.mark.parametrize("change", ["a line", "a header below", "a file less", "a flag"])
def test_a_library_of_other_sources_is_refused(change, tmp_path, monkeypatch):
    library = copied(tmp_path)
    if change == "a line":
        with (tmp_path / "_cpu_norm.cpp").open("a") as file:
            file.write("// changed\n")
    elif change == "a header below":
        (tmp_path / "cpu" / "deep").mkdir(parents=True)
        (tmp_path / "cpu" / "deep" / "new.h").write_text("#pragma once\n")
    elif change == "a file less":
        (tmp_path / "_cpu_loss.cpp").unlink()
    else:
        monkeypatch.setattr(_cpu_library, "FLAGS", (*_cpu_library.FLAGS, "-ffast-math"))
    with pytest.raises(_cpu_library.UnusableLibrary, match=r"version's sources; build it anew: python setup\.py"):
        _cpu_library.open_library(library)


@built
@pytest.mark.parametrize(
    ("name", "value"),
    [("SIGNATURES", {**_cpu_library.SIGNATURES, "linear": ("i", "pppp liiii")}),
     ("DROPOUT_FIELDS", _cpu_library.DROPOUT_FIELDS[:-1]), ("NORM_BLOCK", 128)],
)  # fmt: skip
def test_a_library_of_another_interface_is_refused_wherever_it_lies(name, value, tmp_path, monkeypatch):
    alone = Path(shutil.copy(BUILT, tmp_path))
    monkeypatch.setattr(_cpu_library, name, value)
    with pytest.raises(_cpu_library.UnusableLibrary, match="another version's interface"):
        _cpu_library.open_library(alone)


@built
def test_a_library_without_stamps_and_a_file_that_is_none_are_refused(tmp_path):
    import _ctypes  # a library as good as any

    with pytest.raises(_cpu_library.UnusableLibrary, match="another version's interface"):
        _cpu_library.open_library(Path(_ctypes.__file__))
    (tmp_path / "broken.so").write_text("no library")
    with pytest.raises(_cpu_library.UnusableLibrary, match="they do not load"):
        _cpu_library.open_library(tmp_path / "broken.so")


@built
def test_what_is_refused_is_said_and_torch_computes(tmp_path, monkeypatch):
    if not _cpu.torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        pytest.skip("needs a CPU with AVX-512")
    library = copied(tmp_path)
    (tmp_path / "new.cpp").touch()
    monkeypatch.setattr(_cpu_library, "find", lambda folder: library)
    monkeypatch.delenv("FASTBERT_CPP", raising=False)
    with pytest.warns(RuntimeWarning, match="computes without its C\\+\\+ operators: .* build it anew"):
        found, reason = _cpu.load.__wrapped__()
    assert found is None
    assert "another version's sources" in reason


def test_they_are_turned_off_by_the_environment():
    code = (
        "import torch, fastbert\nfrom fastbert.kernels import _cpu\n"
        "x = fastbert.functional.linear(torch.ones(2, 32), torch.ones(16, 32))\n"
        "print(_cpu.load(), x.sum().item())"
    )
    environment = {**os.environ, "FASTBERT_CPP": "0", "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "(None, 'FASTBERT_CPP=0 turns them off') 1024.0\n"
    assert done.stderr == ""


# ---- building --------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize("file", ["kernels/_cpu_simd.h", "kernels/cpu/deep/new.cpp", "kernels/_cpu_library.py", None])
def test_make_builds_anew_after_any_change(file, tmp_path):
    """A list of two headers once stood for all of them."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for path in [*tmp_path.rglob("*")]:
        os.utime(path, (1e9, 1e9))
    for stamp in (".installed", ".built"):
        (tmp_path / "venv" / stamp).touch()
    if file is not None:
        changed = tmp_path / file
        changed.parent.mkdir(parents=True, exist_ok=True)
        changed.touch()
        os.utime(changed, (4e9, 4e9))
    said = subprocess.run(
        ["make", "-n", "test-cpp", f"VENV={tmp_path}/venv"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert ("setup.py" in said) == (file is not None)
    assert "-m pytest" in said
