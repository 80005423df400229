"""In the sanitizers' builds an access past a part of a thread's scratch memory is reported.

AddressSanitizer knows allocations alone: a row written past the end of one part landed in the next one, or in what an
earlier, larger call had left, and `make fuzz-asan` stayed silent.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from fastbert.kernels.cpu import library

pytestmark = pytest.mark.once

COMPILER = shutil.which("c++") or shutil.which("g++")
PROGRAM = """
#include "scratch.h"

// Arguments: an element of the first part, an element of the next call's part, the size of the second part.
int main(int, char** arguments) {
    const int element = std::atoi(arguments[1]), of_next_call = std::atoi(arguments[2]);
    const int floats = std::atoi(arguments[3]);
    if (!scratch.reserve(sizeof(float) * 64)) return 1;
    Parts parts(scratch);
    float *first = parts.floats(48), *second = parts.floats(floats);
    second[0] = 2;
    first[element] = 3;
    if (!scratch.reserve(sizeof(float) * 16)) return 1;
    Parts(scratch).floats(16)[of_next_call] = 4;
    std::puts("done");
}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the program, without the sanitizer and with it."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("scratch")
    (folder / "program.cpp").write_text(PROGRAM)
    command = [COMPILER, "-std=c++17", "-O1", f"-I{Path(library.__file__).parent}", folder / "program.cpp", "-o"]
    subprocess.run([*command, folder / "plain"], check=True)
    if subprocess.run([*command, folder / "asan", "-fsanitize=address"], check=False, capture_output=True).returncode:
        pytest.skip("the compiler has no AddressSanitizer")
    return folder


def said_by(program: Path, *arguments: int) -> str:
    done = subprocess.run([program, *map(str, arguments)], check=False, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_accesses_within_the_parts_are_in_order(folder):
    assert said_by(folder / "asan", 47, 15, 16) == "done\n"


@pytest.mark.parametrize(
    "arguments", [(48, 15, 16), (60, 15, 16), (47, 16, 16), (47, 40, 16)],
    ids=["next_element", "next_row", "past_what_a_call_reserved", "part_of_the_call_before"],
)  # fmt: skip
def test_accesses_past_a_part_are_reported(arguments, folder):
    assert said_by(folder / "plain", *arguments) == "done\n"
    assert "use-after-poison" in said_by(folder / "asan", *arguments)


def test_parts_that_are_more_than_was_reserved_are_reported(folder):
    assert said_by(folder / "plain", 47, 15, 17) == "done\n"
    assert "part 2 of a scratch memory has 68 bytes, and 64 are left" in said_by(folder / "asan", 47, 15, 17)
