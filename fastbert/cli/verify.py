"""`fastbert verify`: compares every operator on this machine with the reference."""

from __future__ import annotations

import argparse
from pathlib import Path

ORDER = 10
SUMMARY = "check every operator on this machine against the reference"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..verify.cases import ARCHITECTURES, CASES, DTYPES, SHAPES

    parser.add_argument("--op", action="append", choices=tuple(CASES), help="only this operator; may be repeated")
    parser.add_argument("--dtype", action="append", choices=tuple(DTYPES), help="only this dtype; may be repeated")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the GPU, if there is one)")
    parser.add_argument(
        "--impl", choices=("triton", "native"), default="triton", help="implementation to check (default: triton)"
    )
    parser.add_argument(
        "--shapes", choices=SHAPES, default="auto",
        help="real: BERT-base and -large, sequences of 1 to 4,096 tokens; medium: BERT-base's width, 200 tokens; "
        "small; auto (default): real on a GPU, medium on a GPU with --record, else small",
    )  # fmt: skip
    parser.add_argument(
        "--emulate", metavar="ARCH", choices=ARCHITECTURES,
        help="without a GPU: compile the kernels for this architecture (sm_90, ...), and emulate them on the CPU",
    )  # fmt: skip
    files = parser.add_mutually_exclusive_group()
    files.add_argument(
        "--record", metavar="FILE", type=Path, help="also save the inputs and outputs of every case (safetensors)"
    )
    files.add_argument(
        "--replay", metavar="FILE", type=Path,
        help="run the cases of this recording, and compare the results with the recorded ones",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--json-lines", metavar="FILE", type=Path, help="append a line of JSON for each case as soon as it is done"
    )
    parser.add_argument(
        "--jobs", metavar="N", type=int,
        help="divide the cases among N processes; if one crashes or loses the GPU, only its current case is lost",
    )  # fmt: skip
    parser.add_argument(
        "--case-seconds",
        metavar="S",
        type=float,
        default=300.0,
        help="with --jobs: a case that takes longer counts as failed, and its process is ended (default: 300)",
    )


def run(args: argparse.Namespace) -> int:
    from ..verify.run import run

    return run(args)
