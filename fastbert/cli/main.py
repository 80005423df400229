"""The `fastbert` command. This file parses arguments; torch is imported only when a command runs.

A command is a file in this folder that is not listed anywhere; a "-" in the command is a "_" in the file's name. The
file has

    SUMMARY                 one line about the command
    ORDER                   its place in the list of commands
    add_arguments(parser)   called only when the command runs; without it, everything after the command's name is in
                            `args.arguments`
    run(args)               runs the command and returns the exit code

and no slow imports at its top.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 141 the reader of the output closed it. An error is one
line on standard error; with FASTBERT_DEBUG=1 its traceback is shown instead.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
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
    """argparse with errors of one line. It calls a command's `add_arguments` only if that command runs."""

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
    """Runs one command. Returns the exit code.

    argv: the arguments; None takes those of the process, which then ends with this command.
    """
    _open_standard_descriptors()
    args = build_parser().parse_args(argv)
    code = run_command(args.run, args)
    if argv is None:
        gc.freeze()  # Python collects garbage once more at exit, which takes 0.2 s with torch's objects
    return code


def run_command(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Calls run(args). Returns its exit code, or that of its error, which is printed."""
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
    """Flushes standard output, so that an error of writing it is an error of the command."""
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
    """Replaces standard output, because Python flushes it again at exit and would report the error again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(error: Exception | str, code: int) -> int:
    words = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename and error.strerror:
        words = f"{error.filename}: {error.strerror}"
    if not isinstance(error, (str, UsageError, ValueError, RuntimeError, OSError, ImportError)) or not words:
        # This error's message was not written for users of the command, so its type is added.
        words = f"{type(error).__name__}: {words} (FASTBERT_DEBUG=1 shows where)"
    rank = f"rank {os.environ['RANK']}: " if among_ranks() else ""
    print(f"fastbert: error: {rank}{words}", file=sys.stderr)
    return code


def _open_standard_descriptors() -> None:
    """Opens closed ones among file descriptors 0, 1 and 2. Otherwise the next opened file would get the number, and a
    library that writes to standard error would write into that file."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  print(file=None) is standard output


@contextlib.contextmanager
def _clean_up_when_terminated() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP unwind the stack as Ctrl-C does, so that temporary files are removed.

    A signal that was ignored when this process started stays ignored, as Python does with SIGINT.
    """

    def leave(signum: int, frame: Any) -> NoReturn:
        raise SystemExit(128 + signum)

    before = {}
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        if number is None or signal.getsignal(number) is signal.SIG_IGN:
            continue
        # Only the main thread can set handlers; in another thread signals are left to the calling program.
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
    """The parser of `fastbert`. Parsed arguments have `run`, the function to call with them."""
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
