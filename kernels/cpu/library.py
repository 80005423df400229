"""The library of the C++ operators: what it is built of, what its functions take, and whether it is this code's own.

`setup.py` builds it by this file and `_cpu.py` opens it by this file. Two stamps are compiled in, since ctypes notices
neither a changed signature nor an old build:

    interface   what Python expects of the library: SIGNATURES, DROPOUT_FIELDS and the constants that size memory
    sources     every .cpp and .h in this folder, at any depth, and FLAGS; compared where the sources lie beside the
                library, as in a checkout. A wheel has none of them, so there nothing is read.

Only the standard library is imported here: a build runs without torch.
"""

from __future__ import annotations

import ctypes
import hashlib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

NAME = "_cpu_operators"
FLAGS = (
    "-O3", "-std=c++17", "-fopenmp", "-fvisibility=hidden", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl",
    "-mavx512bf16", "-mfma", "-Wno-maybe-uninitialized",
)  # fmt: skip
REBUILD = "python setup.py build_ext --inplace"

WIDTH = 16  # elements that a row must be a multiple of
NORM_BLOCK = 64  # BLOCK in _cpu_norm.cpp: rows whose gradients of weight and bias are summed into one row
LOSS_ROWS = 32  # PANEL registers of them in _cpu_loss.cpp: what its number of rows must be a multiple of
NO_MEMORY = 1  # in _cpu_simd.h: what a function returns where it had none; 2 where cu_seqlens are no sequences
UP_ROWS = 1024  # in _cpu_layer.cpp: rows of the feed-forward network's inner matrix that are held at once

TYPES = {
    "p": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_int64, "u": ctypes.c_uint32, "U": ctypes.c_uint64,
    "f": ctypes.c_float, "v": None,
}  # fmt: skip
# Function, which there is once for each of DTYPES -> its result and its arguments, as letters of TYPES.
DTYPES = ("float32", "bfloat16")
SIGNATURES = {
    "attention": ("i", "ppppp piliii llllll fp"),
    "attention_backward": ("i", "ppppppppp piliii llllllll fp"),
    "add_layer_norm": ("v", "ppppp lif"),
    "dropout_add_layer_norm": ("v", "pppppp lifuf"),
    "add_layer_norm_backward": ("v", "pppppppp lifuf"),
    "quantise_rows": ("v", "ppp lif"),
    "scale_rows": ("v", "pppp lii"),
    "linear": ("i", "pppp liiiii"),
    "sum_logits": ("v", "ppppppp iii"),
    "logit_gradients": ("v", "ppppppp iiiff"),
    "embedding_layer_norm": ("i", "ppppppppp lpif"),
    "mean_of_sequences": ("i", "ppp ili"),
    "encoder_layers": ("i", "pp i p iiiii fip"),
}
# The structure that the last argument of `attention` points to.
DROPOUT_FIELDS = (("sequence_ids", "p"), ("seed", "U"), ("stream", "U"), ("threshold", "u"), ("scale", "f"))


class UnusableLibrary(Exception):
    """Why the library there is not called."""


def sources(folder: Path) -> list[Path]:
    """Every C++ file under the folder, in an order of their own; none where only the library was installed."""
    return sorted(path for path in folder.rglob("*") if path.suffix in (".cpp", ".h"))


def sources_stamp(folder: Path) -> str | None:
    """Names and bytes of `sources`, and FLAGS, as 16 hexadecimal digits; None where there are no sources."""
    digest = hashlib.sha256(repr(FLAGS).encode())
    found = sources(folder)
    for path in found:
        content = path.read_bytes()
        digest.update(f"\n{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16] if found else None


def interface_stamp() -> str:
    """What Python expects of the library, as 16 hexadecimal digits."""
    expected = (DTYPES, SIGNATURES, DROPOUT_FIELDS, WIDTH, NORM_BLOCK, LOSS_ROWS, NO_MEMORY, UP_ROWS)
    return hashlib.sha256(repr(expected).encode()).hexdigest()[:16]


def find(folder: Path) -> Path | None:
    """The library for this version of Python, or None."""
    candidates = (folder / f"{NAME}{suffix}" for suffix in EXTENSION_SUFFIXES)
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
        if stamp is not None and _stamp_in(library, what) != stamp:
            raise UnusableLibrary(f"{path.name} was built of another version's {what}; build it anew: {REBUILD}")
    for name, (result, arguments) in SIGNATURES.items():
        for dtype in DTYPES:
            function = getattr(library, f"{name}_{dtype}")
            function.restype = TYPES[result]
            function.argtypes = [TYPES[letter] for letter in arguments.replace(" ", "")]
    return library


def _stamp_in(library: ctypes.CDLL, what: str) -> str | None:
    """The stamp that was compiled in; None in a library that is older than stamps."""
    try:
        function = getattr(library, f"{what}_stamp")
    except AttributeError:
        return None
    function.restype = ctypes.c_char_p
    return function().decode()
