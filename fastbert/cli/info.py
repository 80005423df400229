"""`fastbert info`: prints versions, devices, and the implementation that each operator would use on this machine."""

from __future__ import annotations

import argparse
import sys

ORDER = 9
SUMMARY = "versions, devices, and which implementation each operator would use here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Print versions, devices, and which implementation each operator would use on this machine and why; with MODEL "
        "also a description of the model."
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a folder or a Hugging Face hub id")


def run(args: argparse.Namespace) -> int:
    if sys.stdout is None:
        raise OSError("standard output is closed")
    from ..info import describe
    from ..storage import naming

    with naming("standard output"):
        print(describe(args.model))
    return 0
