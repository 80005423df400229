"""Builds the C++ operators of kernels/cpu/, a library for each set of instructions; all else is in pyproject.toml.

FASTBERT_SANITIZE=1 builds them with AddressSanitizer and UBSan, for `make fuzz-asan` and not for use.
"""

import copy
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
    """Like setuptools, and rebuilds a library that is newer than the sources but was built from other sources."""

    def build_extension(self, ext: Extension) -> None:
        build = copy.copy(self)
        # the libraries have the same sources, so each gets its own folder for objects
        build.build_temp = str(Path(self.build_temp) / ext.name)
        built = Path(self.get_ext_fullpath(ext.name))
        if built.exists():
            content = built.read_bytes()
            build.force = self.force or not all(stamp.encode() in content for stamp in STAMPS.values())
        super(BuildOperators, build).build_extension(ext)


files = [path.relative_to(ROOT).as_posix() for path in library["sources"](OPERATORS)]
libraries = [
    Extension(
        f"fastbert.kernels.cpu.{library['name_of'](instructions)}",
        sources=[name for name in files if name.endswith(".cpp")],
        depends=[*(name for name in files if name.endswith(".h")), "kernels/cpu/library.py"],
        define_macros=[(name, f'"{text}"') for name, text in (*STAMPS.items(), ("SIGNATURES", SIGNATURES))],
        extra_compile_args=[*library["FLAGS"], *flags, *SANITIZE],
        extra_link_args=SANITIZE,
        # Left out where they cannot be compiled. OpenMP is torch's, found when the library is loaded.
        optional=not SANITIZE,
    )
    for instructions, flags in library["INSTRUCTIONS"].items()
]

setup(
    ext_modules=libraries, options={"build_ext": {"parallel": len(libraries)}}, cmdclass={"build_ext": BuildOperators}
)
