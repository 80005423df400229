"""The libraries of the C++ operators: what they are built of, what their functions take, whether they are this code's.

The same sources are compiled once for each set of instructions in INSTRUCTIONS, each into a library of its own. Only
what this CPU can run is ever opened, so that no code of the others is reached: not even an inlined function of C++'s
own library, of which a linker would keep one for all. `setup.py` builds the libraries by this file and `operators.py`
opens them by this file. Two stamps are compiled in, since ctypes does not notice an old build:

    interface   what Python expects of the library: DTYPES, the fields of structures and the constants that size memory
    sources     every .cpp and .h in this folder, at any depth, FLAGS and INSTRUCTIONS; compared where the sources lie
                beside the library, as in a checkout. A wheel has none of them, so there nothing is read.

What its functions take is declared once, in operators.h, and compiled into the library as text (`signatures`).

Only the standard library is imported here: a build runs without torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

# The two warnings that are off are about variables of GCC 12's own immintrin.h.
FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-fvisibility=hidden", "-Wno-maybe-uninitialized", "-Wno-uninitialized")
# A set of instructions -> what lets the compiler use it. `simd.h` takes the header that is written in it.
INSTRUCTIONS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma"),
    "avx2": ("-mavx2", "-mfma"),
}
REBUILD = "python setup.py build_ext --inplace"

WIDTH = 16  # elements that a row must be a multiple of: what the widest registers hold
NORM_BLOCK = 64  # in simd.h: rows whose gradients of weight and bias are summed into one row
LOSS_ROWS = 32  # PANEL registers of them in loss.cpp: what its number of rows must be a multiple of
UNBOUNDED = 1 << 29  # in operators.h: a side of attention's window that has no bound
NO_MEMORY = 1  # in simd.h: what a function returns where it had none; 2 where cu_seqlens are no sequences
UP_ROWS = 1024  # in layer.cpp: rows of the feed-forward network's inner matrix that are held at once
INT8_PANEL = 64  # in int8.h, PANEL: columns of a weight in 8 bits that lie side by side

TYPES = {
    "p": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_int64, "u": ctypes.c_uint32, "U": ctypes.c_uint64,
    "f": ctypes.c_float, "v": None,
}  # fmt: skip
DTYPES = ("float32", "bfloat16")  # each function is there once for each of them
HEADER = "operators.h"  # declares all of them
# of what is no pointer
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
        ("i", "sequences rows width attended inner heads activation wide"),
    )
    for name in names.split()
)


class UnusableLibrary(Exception):
    """Why the library there is not called."""


def sources(folder: Path) -> list[Path]:
    """Every C++ file under the folder, in an order of their own; none where only the library was installed."""
    return sorted(path for path in folder.rglob("*") if path.suffix in (".cpp", ".h"))


def sources_stamp(folder: Path) -> str | None:
    """Names and bytes of `sources`, FLAGS and INSTRUCTIONS, as 16 hexadecimal digits; None without sources."""
    digest = hashlib.sha256(repr((FLAGS, INSTRUCTIONS)).encode())
    found = sources(folder)
    for path in found:
        content = path.read_bytes()
        digest.update(f"\n{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16] if found else None


def interface_stamp() -> str:
    """What Python expects of the library, as 16 hexadecimal digits."""
    sizes = (WIDTH, NORM_BLOCK, LOSS_ROWS, UNBOUNDED, NO_MEMORY, UP_ROWS, INT8_PANEL)
    expected = (DTYPES, DROPOUT_FIELDS, LAYER_FIELDS, *sizes)
    return hashlib.sha256(repr(expected).encode()).hexdigest()[:16]


def signatures(header: str) -> dict[str, tuple[str, str]]:
    """Function -> its result and its arguments, as letters of TYPES, of the text of operators.h."""
    declared = re.findall(r"EXPORT (\w+) (\w+)_##name\(([^)]*)\)", header.replace("\\\n", " "))

    def letter(words: str) -> str:
        return "p" if "*" in words else C_TYPES[words.split()[0]]

    return {name: (letter(result), "".join(map(letter, of.split(",")))) for result, name, of in declared}


def as_text(found: dict[str, tuple[str, str]]) -> str:
    """`signatures` as the library carries them."""
    return ";".join(f"{name} {result} {arguments}" for name, (result, arguments) in found.items())


def name_of(instructions: str) -> str:
    """Of the library in this set of instructions, one of INSTRUCTIONS."""
    return f"_operators_{instructions}"


def find(folder: Path, instructions: str) -> Path | None:
    """The library in these instructions for this version of Python, or None."""
    candidates = (folder / f"{name_of(instructions)}{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.exists()), None)


def open_library(path: Path) -> ctypes.CDLL:
    """The library, with the signatures of its functions set.

    Raises: UnusableLibrary where it does not load, or one of its stamps is not this code's.
    """
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise UnusableLibrary(f"they do not load: {error}") from error
    expected = {"interface": interface_stamp(), "sources": sources_stamp(path.parent)}
    for what, stamp in expected.items():
        if stamp is not None and _text_of(library, f"{what}_stamp") != stamp:
            raise UnusableLibrary(f"{path.name} was built of another version's {what}; build it anew: {REBUILD}")
    for signature in _text_of(library, "signatures").split(";"):
        name, result, arguments = signature.split()
        for dtype in DTYPES:
            function = getattr(library, f"{name}_{dtype}")
            function.restype = TYPES[result]
            function.argtypes = [TYPES[letter] for letter in arguments]
    return library


def _text_of(library: ctypes.CDLL, name: str) -> str | None:
    """What was compiled in under this name; None in a library that is older than such texts."""
    try:
        function = getattr(library, name)
    except AttributeError:
        return None
    function.restype = ctypes.c_char_p
    return function().decode()
