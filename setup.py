"""Builds the C++ operators of kernels/cpu/; all else about the package is in pyproject.toml.

FASTBERT_SANITIZE=1 builds them with AddressSanitizer and UBSan, for `make fuzz-asan` and not for use.
"""

import os
import runpy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OPERATORS = ROOT / "kernels" / "cpu"
library = runpy.run_path(str(OPERATORS / "library.py"))
STAMPS = {"SOURCES_STAMP": library["sources_stamp"](OPERATORS), "INTERFACE_STAMP": library["interface_stamp"]()}
SIGNATURES = library["as_text"](library["signatures"]((OPERATORS / library["HEADER"]).read_text()))
SANITIZE = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"]
SANITIZE = SANITIZE if os.environ.get("FASTBERT_SANITIZE") == "1" else []


class BuildOperators(build_ext):
    """As setuptools builds, and also where what lies there is newer than the sources but was built of others."""

    def build_extension(self, ext: Extension) -> None:
        built = Path(self.get_ext_fullpath(ext.name))
        if built.exists():
            content = built.read_bytes()
            self.force = self.force or not all(stamp.encode() in content for stamp in STAMPS.values())
        super().build_extension(ext)


files = [path.relative_to(ROOT).as_posix() for path in library["sources"](OPERATORS)]
operators = Extension(
    f"fastbert.kernels.cpu.{library['NAME']}",
    sources=[name for name in files if name.endswith(".cpp")],
    depends=[*(name for name in files if name.endswith(".h")), "kernels/cpu/library.py"],
    define_macros=[(name, f'"{text}"') for name, text in (*STAMPS.items(), ("SIGNATURES", SIGNATURES))],
    extra_compile_args=[*library["FLAGS"], *SANITIZE],
    extra_link_args=SANITIZE,
    # Left out where they cannot be compiled. OpenMP is torch's, found when the library is loaded.
    optional=not SANITIZE,
)

setup(ext_modules=[operators], cmdclass={"build_ext": BuildOperators})
