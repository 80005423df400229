"""The `fastbert` command: read the arguments here, import torch only once there is work to do.

A command is a file in this folder, which nothing else names; where the command has a "-", the file has a "_". In it are
SUMMARY, a line about it; ORDER, its place in the list of commands; `add_arguments(parser)`, asked only when the command
is run, or without it everything behind the command's name comes as `args.arguments`; `run(args)`, which gives the exit
code. At its top it imports nothing that takes time.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 141 the reader of the output went away. Whatever goes
wrong is said in one line on standard error; FASTBERT_DEBUG=1 shows the traceback instead.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pkgutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn

from .. import __version__
from .options import UsageError, among_ranks


class Parser(argparse.ArgumentParser):
    """argparse, saying what is wrong in one line, and asking a command for its arguments only if it is run."""

    command: ModuleType | None = None

    def parse_known_args(self, args=None, namespace=None):
        if self.command is not None:
            command, self.command = self.command, None
            self.set_defaults(run=command.run)
            if not hasattr(command, "add_arguments"):
                return argparse.Namespace(run=command.run, arguments=list(args)), []
            command.add_arguments(self)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fastbert: error: {message} (see '{self.prog} --help')\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    _open_standard_descriptors()
    args = build_parser().parse_args(argv)
    return run_command(args.run, args)


def run_command(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """run(args): its exit code, or that of what went wrong."""
    try:
        with _clean_up_when_terminated():
            code = run(args)
            _flush_standard_output()
            return code
    except UsageError as error:
        return _fail(error, code=2)
    except KeyboardInterrupt as interruption:
        return _fail(str(interruption) or "interrupted", code=130)
    except BrokenPipeError:
        _forget_standard_output()
        return 141
    except Exception as error:
        if os.environ.get("FASTBERT_DEBUG") == "1":
            raise
        return _fail(error, code=1)


def _flush_standard_output() -> None:
    """Where what was printed does not reach its file, the error names it, and it is the command's."""
    from ..storage import naming

    if sys.stdout is not None:
        try:
            with naming("standard output"):
                sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError:
            _forget_standard_output()
            raise


def _forget_standard_output() -> None:
    """Python flushes standard output once more on its way out, and would complain there."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(error: Exception | str, code: int) -> int:
    words = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename and error.strerror:
        words = f"{error.filename}: {error.strerror}"
    if not isinstance(error, (str, UsageError, ValueError, RuntimeError, OSError, ImportError)) or not words:
        # Not an error anyone wrote for a person to read: say what kind it is, and where to see more.
        words = f"{type(error).__name__}: {words} (FASTBERT_DEBUG=1 shows where)"
    rank = f"rank {os.environ['RANK']}: " if among_ranks() else ""
    print(f"fastbert: error: {rank}{words}", file=sys.stderr)
    return code


def _open_standard_descriptors() -> None:
    """Where this process was started with one of them closed, the next file opened would get its number, and a library
    that writes to standard error would write into that file."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  print(file=None) is standard output


@contextlib.contextmanager
def _clean_up_when_terminated() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind the stack as Ctrl-C does, so that no temporary file stays behind.

    Where this process was started with one of them ignored, it stays ignored, as Python leaves SIGINT then.
    """

    def leave(signum: int, frame: Any) -> NoReturn:
        raise SystemExit(128 + signum)

    before = {}
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        if number is None or signal.getsignal(number) is signal.SIG_IGN:
            continue
        # elsewhere than in the main thread, whoever runs us there minds the signals
        with contextlib.suppress(ValueError):
            before[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- arguments -------------------------------------------------------------------------------------------


def commands_found() -> list[ModuleType]:
    names = {module.name for module in pkgutil.iter_modules(import_module(__package__).__path__)} - {
        "main",
        "options",
        "progress",
        "retraining",
        "tables",
    }
    return sorted((import_module(f".{name}", __package__) for name in names), key=lambda command: command.ORDER)


def build_parser() -> Parser:
    """The parser of `fastbert`, with `run` in what it parses: a function of the parsed arguments."""
    parser = Parser(
        prog="fastbert",
        description="BERT without padding: text in, vectors out.",
        epilog="'fastbert COMMAND --help' explains a command, with examples.",
    )
    parser.add_argument("--version", action="version", version=f"fastbert {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in commands_found():
        name, summary = command.__name__.rpartition(".")[2].replace("_", "-"), command.SUMMARY
        added = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        added.command = command
    return parser
