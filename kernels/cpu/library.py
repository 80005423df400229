"""The libraries of the C++ operators: their sources, their functions' arguments, and a check that a build is current.

The same sources are compiled for each instruction set in INSTRUCTIONS, into separate libraries. A process opens only
one that its CPU can run. In one common library the linker would keep a single copy of each inlined function of C++'s
standard library, perhaps one with instructions that the CPU does not have. `setup.py` builds and `operators.py` opens
the libraries with this file. Two stamps are compiled in, because ctypes does not notice an old build:

    interface   what Python expects of the library: DTYPES, the fields of structures, constants that set buffer sizes
    sources     FLAGS, INSTRUCTIONS, and every .cpp and .h in this folder and below. Compared only where the sources are
                beside the library, as in a checkout; a wheel has no sources.

The functions' arguments are declared in operators.h alone and compiled into the library as text (`signatures`).

Only the standard library is imported here, because a build runs without torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

# The two disabled warnings are about variables in GCC 12's own immintrin.h.
FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-fvisibility=hidden", "-Wno-maybe-uninitialized", "-Wno-uninitialized")
# Instruction set -> compiler flags that allow it. `simd.h` includes the header written for the set.
INSTRUCTIONS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma"),
    "avx2": ("-mavx2", "-mfma"),
}
REBUILD = "python setup.py build_ext --inplace"

WIDTH = 16  # float32 elements in the widest register; row widths must be multiples of it
NORM_BLOCK = 64  # in simd.h: rows whose gradients of weight and bias are summed into one partial sum
LOSS_ROWS = 32  # in loss.cpp: the number of rows must be a multiple of this, PANEL registers
UNBOUNDED = 1 << 29  # in operators.h: a side of attention's window without a bound
NO_MEMORY = 1  # in simd.h: a function's result when memory ran out; 2 means invalid cu_seqlens
UP_ROWS = 1024  # in layer.cpp: rows of the feed-forward network's inner matrix that are computed at a time
DEFERRED = 8  # in adamw.cpp: most steps by which the decay of a row at rest is late
INT8_PANEL = 64  # in int8.h, PANEL: columns of an 8-bit weight that are stored together

TYPES = {
    "p": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_int64, "u": ctypes.c_uint32, "U": ctypes.c_uint64,
    "f": ctypes.c_float, "v": None,
}  # fmt: skip
DTYPES = ("float32", "bfloat16")  # every function exists for each of them
HEADER = "operators.h"  # declares all functions
# C types that are not pointers -> letters of TYPES
C_TYPES = {"int": "i", "int64_t": "l", "uint32_t": "u", "uint64_t": "U", "float": "f", "void": "v"}
# The structure that the last argument of `attention` points to.
DROPOUT_FIELDS = (("sequence_ids", "p"), ("seed", "U"), ("stream", "U"), ("threshold", "u"), ("scale", "f"))
# The structure that describes a layer in training.
LAYER_FIELDS = tuple(
    (name, letter)
    for letter, names in (
        ("p", "starts sequence_ids row_ids"),
        ("U", "seed probs_stream out_stream down_stream"),
        ("u", "probs_threshold out_threshold down_threshold"),
        ("f", "probs_scale out_scale down_scale out_eps down_eps attention_scale"),
        ("i", "sequences rows width attended inner heads activation wide first_only"),
    )
    for name in names.split()
)


class UnusableLibrary(Exception):
    """A library was found but cannot be used; the message says why."""


def sources(folder: Path) -> list[Path]:
    """Every C++ file under the folder, sorted; none where only the library was installed."""
    return sorted(path for path in folder.rglob("*") if path.suffix in (".cpp", ".h"))


def sources_stamp(folder: Path) -> str | None:
    """A hash of FLAGS, INSTRUCTIONS and all `sources` with their names, 16 hexadecimal digits; None without sources."""
    digest = hashlib.sha256(repr((FLAGS, INSTRUCTIONS)).encode())
    found = sources(folder)
    for path in found:
        content = path.read_bytes()
        digest.update(f"\n{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16] if found else None


def interface_stamp() -> str:
    """A hash of what Python expects of the library, 16 hexadecimal digits."""
    sizes = (WIDTH, NORM_BLOCK, LOSS_ROWS, UNBOUNDED, NO_MEMORY, UP_ROWS, DEFERRED, INT8_PANEL)
    expected = (DTYPES, DROPOUT_FIELDS, LAYER_FIELDS, *sizes)
    return hashlib.sha256(repr(expected).encode()).hexdigest()[:16]


def signatures(header: str) -> dict[str, tuple[str, str]]:
    """Function -> (result, arguments) as letters of TYPES, parsed from the text of operators.h."""
    declared = re.findall(r"EXPORT (\w+) (\w+)_##name\(([^)]*)\)", header.replace("\\\n", " "))

    def letter(words: str) -> str:
        return "p" if "*" in words else C_TYPES[words.split()[0]]

    return {name: (letter(result), "".join(map(letter, of.split(",")))) for result, name, of in declared}


def as_text(found: dict[str, tuple[str, str]]) -> str:
    """`signatures` as the text that is compiled into the library."""
    return ";".join(f"{name} {result} {arguments}" for name, (result, arguments) in found.items())


def name_of(instructions: str) -> str:
    """The name of the library for this instruction set, one of INSTRUCTIONS."""
    return f"_operators_{instructions}"


def find(folder: Path, instructions: str) -> Path | None:
    """The library's file for this instruction set and this version of Python, or None."""
    candidates = (folder / f"{name_of(instructions)}{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.exists()), None)


def open_library(path: Path) -> ctypes.CDLL:
    """The library, with the signatures of its functions set.

    Raises: UnusableLibrary where it does not load, or where one of its stamps differs from this code's.
    """
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise UnusableLibrary(f"they do not load: {error}") from error
    expected = {"interface": interface_stamp(), "sources": sources_stamp(path.parent)}
    for what, stamp in expected.items():
        if stamp is not None and _text_of(library, f"{what}_stamp") != stamp:
            raise UnusableLibrary(f"{path.name} was built from another version's {what}; rebuild it: {REBUILD}")
    for signature in _text_of(library, "signatures").split(";"):
        name, result, arguments = signature.split()
        for dtype in DTYPES:
            function = getattr(library, f"{name}_{dtype}")
            function.restype = TYPES[result]
            function.argtypes = [TYPES[letter] for letter in arguments]
    return library


def _text_of(library: ctypes.CDLL, name: str) -> str | None:
    """The text compiled in under this name; None in a library older than these texts."""
    try:
        function = getattr(library, name)
    except AttributeError:
        return None
    function.restype = ctypes.c_char_p
    return function().decode()
