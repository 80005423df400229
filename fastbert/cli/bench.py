"""`fastbert bench`: the door to the benchmarks, which live in a checkout and are not part of the installed package."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

ORDER = 4
SUMMARY = "time fastbert beside the real alternatives on this machine"
WHERE = (
    "the benchmarks are in fastbert's repository, not in the installed package: clone it, then run "
    "`fastbert bench` (or `python -m benchmarks`) from its root"
)


def _benchmarks() -> ModuleType | None:
    """benchmarks.run of the checkout that fastbert was installed from, or of the working folder."""
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (root / "benchmarks" / "run.py").is_file() and (root / "kernels" / "reference.py").is_file():
            sys.path.insert(0, str(root))
            try:
                return import_module("benchmarks.run")
            finally:
                sys.path.remove(str(root))
    return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmarks = _benchmarks()
    if benchmarks is None:
        parser.epilog = WHERE
        parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    else:
        benchmarks.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    benchmarks = _benchmarks()
    if benchmarks is None:
        raise RuntimeError(WHERE)
    args.argv = sys.argv[2:]
    return benchmarks.run(args)
