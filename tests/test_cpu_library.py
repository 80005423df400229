"""The library of C++ operators is used only if it was built from these sources: stamps, signatures, building.

It used to be found by name alone, so a library of older sources was called with newer signatures.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastbert.kernels.cpu import library
from fastbert.kernels.cpu import operators as cpp

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]
KERNELS = Path(library.__file__).parent
BUILT = {name: library.find(KERNELS, name) for name in library.INSTRUCTIONS}
HERE = cpp.instructions(cpp.torch.float32)  # the instructions that this CPU uses
built = pytest.mark.skipif(HERE is None or BUILT[HERE] is None, reason=f"no C++ operators: {cpp.load()[1]}")


def text_of(name: str) -> str:
    return (KERNELS / name).read_text()


# ---- Python's declarations and the C++ -------------------------------------------------------------------


@built
def test_signatures_are_those_of_the_header():
    """ctypes checks nothing: for a forgotten argument the function reads whatever lies on the stack."""
    header = text_of(library.HEADER)
    found = library.signatures(header)
    assert found["mean_of_sequences"] == ("i", "pppili")
    assert found["int8_linear"] == ("i", "pppliiii")
    opened = library.open_library(BUILT[HERE])
    for name, (result, arguments) in found.items():
        for dtype in library.DTYPES:
            function = getattr(opened, f"{name}_{dtype}")
            assert function.argtypes == [library.TYPES[letter] for letter in arguments]
            assert function.restype == library.TYPES[result]


def test_every_function_is_declared_in_the_header():
    """A function without a declaration compiles too, but nothing checks its definition."""
    files = [path for path in library.sources(KERNELS) if path.suffix == ".cpp" and path.name != "stamp.cpp"]
    defined = [name for path in files for name in re.findall(r"EXPORT \w+ (\w+)_##name", path.read_text())]
    # int8.cpp defines each function twice: for compilers with the instructions, and for those without
    assert set(defined) == set(library.signatures(text_of(library.HEADER)))


def test_constants_for_buffer_sizes_are_equal_in_both_languages():
    def constant(name, file):
        return int(re.search(rf"constexpr int(?:64_t)? {name} = (\d+);", text_of(file)).group(1))

    assert constant("NORM_BLOCK", "simd.h") == library.NORM_BLOCK
    assert constant("UP_ROWS", "layer.cpp") == library.UP_ROWS
    for instructions in library.INSTRUCTIONS:
        width = constant("WIDTH", f"{instructions}.h")
        assert library.WIDTH % width == 0
        assert library.LOSS_ROWS % (constant("PANEL", "loss.cpp") * width) == 0


@built
def test_every_set_of_instructions_has_a_library_of_these_sources():
    """If only one header of registers has a function, the other library stays unbuilt or old, without an error."""
    stamps = library.sources_stamp(KERNELS), library.interface_stamp()
    for path in BUILT.values():
        content = path.read_bytes()
        assert all(stamp.encode() in content for stamp in stamps)


# ---- stamps ----------------------------------------------------------------------------------------------


def copied(folder: Path) -> Path:
    """Copies the library and its sources into a folder, as in a checkout."""
    for path in library.sources(KERNELS):
        (folder / path.relative_to(KERNELS)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.relative_to(KERNELS))
    return Path(shutil.copy(BUILT[HERE], folder))


@built
def test_a_library_is_used_with_and_without_sources_beside_it(tmp_path):
    assert library.open_library(copied(tmp_path)).linear_float32.argtypes is not None
    alone = tmp_path / "installed"
    alone.mkdir()
    assert library.sources_stamp(alone) is None
    library.open_library(Path(shutil.copy(BUILT[HERE], alone)))


@built
@pytest.mark.parametrize("change", ["a line", "a header below", "a file less", "a flag"])
def test_a_library_of_other_sources_is_refused(change, tmp_path, monkeypatch):
    path = copied(tmp_path)
    if change == "a line":
        with (tmp_path / "norm.cpp").open("a") as file:
            file.write("// changed\n")
    elif change == "a header below":
        (tmp_path / "deeper" / "deep").mkdir(parents=True)
        (tmp_path / "deeper" / "deep" / "new.h").write_text("#pragma once\n")
    elif change == "a file less":
        (tmp_path / "loss.cpp").unlink()
    else:
        monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-ffast-math"))
    with pytest.raises(library.UnusableLibrary, match=r"version's sources; rebuild it: python setup\.py"):
        library.open_library(path)


@built
@pytest.mark.parametrize(
    ("name", "value"),
    [("DTYPES", ("float32",)), ("DROPOUT_FIELDS", library.DROPOUT_FIELDS[:-1]), ("NORM_BLOCK", 128)],
)  # fmt: skip
def test_a_library_with_another_interface_is_always_refused(name, value, tmp_path, monkeypatch):
    alone = Path(shutil.copy(BUILT[HERE], tmp_path))
    monkeypatch.setattr(library, name, value)
    with pytest.raises(library.UnusableLibrary, match="another version's interface"):
        library.open_library(alone)


@built
def test_a_library_without_stamps_and_other_files_are_refused(tmp_path):
    import _ctypes  # any other shared library

    with pytest.raises(library.UnusableLibrary, match="another version's interface"):
        library.open_library(Path(_ctypes.__file__))
    (tmp_path / "broken.so").write_text("no library")
    with pytest.raises(library.UnusableLibrary, match="they do not load"):
        library.open_library(tmp_path / "broken.so")


@built
def test_a_refused_library_gives_a_warning_and_torch_computes(tmp_path, monkeypatch):
    path = copied(tmp_path)
    (tmp_path / "new.cpp").touch()
    monkeypatch.setattr(library, "find", lambda folder, instructions: path)
    with pytest.warns(RuntimeWarning, match="computes without its C\\+\\+ operators: .* rebuild it"):
        found, reason = cpp._open.__wrapped__(HERE)
    assert found is None
    assert "another version's sources" in reason


def test_an_environment_variable_turns_the_operators_off():
    code = (
        "import torch, fastbert\nfrom fastbert.kernels.cpu import operators as cpp\n"
        "x = fastbert.functional.linear(torch.ones(2, 32), torch.ones(16, 32))\n"
        "print(cpp.load(), x.sum().item())"
    )
    environment = {**os.environ, "FASTBERT_CPP": "0", "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "(None, 'FASTBERT_CPP=0 turns them off') 1024.0\n"
    assert done.stderr == ""


# ---- building --------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize("file", ["kernels/cpu/simd.h", "kernels/cpu/deep/new.cpp", "kernels/cpu/library.py", None])
def test_make_rebuilds_after_any_change(file, tmp_path):
    """The Makefile once listed only two of the headers."""
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
