"""`fastbert bench`: starts the benchmarks, which are in a checkout and not in the installed package."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

ORDER = 11
SUMMARY = "time fastbert and the alternatives to it on this machine"
WHERE = (
    "the benchmarks are in fastbert's repository, not in the installed package: clone it, then run "
    "`fastbert bench` (or `python -m benchmarks`) from its root"
)


def _checkout() -> Path | None:
    """The checkout that fastbert was installed from, or the working folder if that is one."""
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (root / "benchmarks" / "run.py").is_file() and (root / "kernels" / "reference.py").is_file():
            return root
    return None


def run(args: argparse.Namespace) -> NoReturn:
    """Replaces this process by `python -m benchmarks` with the same arguments."""
    root = _checkout()
    if root is None:
        raise RuntimeError(WHERE)
    there = f"import runpy, sys; sys.path[0] = {str(root)!r}; runpy.run_module('benchmarks', run_name='__main__')"
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it was closed when this process started
        stream.flush()
    os.execv(sys.executable, [sys.executable, "-c", there, *args.arguments])
