"""`fastbert convert`: writes a BERT of another format as a folder that transformers and fastbert read."""

from __future__ import annotations

import argparse

from .options import UsageError

ORDER = 12
SUMMARY = "turn a BERT of TensorFlow, old PyTorch, Keras, Paddle or GGUF into a folder of safetensors"

DESCRIPTION = """\
Turn a BERT of another format into a folder that transformers and fastbert read, without the framework that made it.

SOURCE is a folder, the prefix of a TensorFlow checkpoint (bert_model.ckpt), a file (.gguf, .pdparams), a .zip or
.tar.gz as you downloaded it, or a hub id. Every variable is either converted, or skipped for a reason that is printed.
A variable that is not known, or does not fit the config, is an error; then FOLDER is not written."""

EXAMPLES = """\
examples:
  fastbert convert uncased_L-12_H-768_A-12.zip -o bert-base        Google's BERT as it is downloaded
  fastbert convert my_run/model.ckpt-30000 -o fine-tuned --no-lower-case
  fastbert convert --list model.gguf                               print the contents, write nothing
  fastbert convert bert-base-uncased.tar.gz -o bert-base           pytorch-pretrained-bert
  fastbert convert bert-base -o for-tensorflow --to tensorflow     from safetensors to TensorFlow"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.description, p.epilog = DESCRIPTION, EXAMPLES
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("source", metavar="SOURCE", help="a folder, a checkpoint's prefix, a file, an archive, or a hub id")
    p.add_argument("-o", "--output", metavar="FOLDER", help="where to write; must not exist yet, or be empty")
    p.add_argument("--list", action="store_true", help="print every variable and what becomes of it, write nothing")
    p.add_argument(
        "--to",
        choices=("safetensors", "tensorflow"),
        default="safetensors",
        help="safetensors: for transformers (default); tensorflow: bert_model.ckpt, for Google's code",
    )
    p.add_argument(
        "--activation",
        choices=("gelu", "gelu_new"),
        help="how the model computes GELU where its config says gelu: gelu is by erf, gelu_new by tanh (default: as "
        "the framework of SOURCE does: by tanh in Google's TensorFlow code since February 2019, the Model Garden, "
        "keras-hub and GGUF, by erf in PyTorch, Paddle and ELECTRA)",
    )
    p.add_argument(
        "--lower-case",
        action=argparse.BooleanOptionalAction,
        help="whether the tokenizer lower-cases; needed if neither SOURCE nor its name tells",
    )
    p.add_argument("--verify", action="store_true", help="also compare the weights with SOURCE's checksums")


def run(args: argparse.Namespace) -> int:
    from ..convert import convert, listing

    if args.list == (args.output is not None):
        raise UsageError("give either -o FOLDER or --list (see 'fastbert convert --help')")
    if args.list:
        for line in listing(args.source, activation=args.activation):
            print(line)
        return 0
    convert(
        args.source,
        args.output,
        to=args.to,
        activation=args.activation,
        lower_case=args.lower_case,
        verify=args.verify,
    )
    return 0
