"""Measures the cost of an accelerated model's checks: the same calls with and without checks, in turns.

    python -m benchmarks.inspection.check_price [--dtype float32 bfloat16] [--case query texts] [--pairs 300]
        [--threads 1] [--cpu-time]

A model of MiniLM's shape (6 layers of 384) with random weights encodes one query of 16 tokens, and a batch of 32 texts
of 128 tokens, each with all checks and with none. Checked are: changed modules and hooks, modes and transformations,
arguments, lengths, and indices. A pair is a few calls with checks and a few without; the order alternates. Printed are
the median of the pairs' ratios, which a temporary slowdown of the machine hardly changes, and its 95% interval by
resampling the pairs. The goals: a query takes at most 1.02 times as long with checks, and texts a second are at least
0.99 of those without. `--cpu-time` measures the process' own time, for a machine with other work.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from unittest.mock import patch

import torch
from transformers import BertConfig, BertModel

import fastbert
from fastbert.dropin import encoder, original

SHAPE = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
CONTENTS = ("expect_sequences", "expect_lengths", "expect_indices")  # the checks of lengths and indices
CALLS = 3  # calls in a row, of which the median counts
CASES = {"query": (1, 16), "texts": (32, 128)}  # [B, S]


def _passes(*args, **kwargs) -> None:
    """Replaces a check; never raises."""


def without_checks() -> ExitStack:
    """A context in which calls are not checked."""
    stack = ExitStack()
    stack.enter_context(patch.object(original.Watch, "is_same", lambda self: True))
    stack.enter_context(patch.object(encoder, "why_not_here", _passes))
    stack.enter_context(patch.object(encoder.EncoderForward, "why_not_given", _passes))
    for module in [module for name, module in sys.modules.items() if name.startswith("fastbert.")]:
        for name in CONTENTS:
            if name in vars(module):
                stack.enter_context(patch.object(module, name, _passes))
    return stack


def ratios(call: Callable[[], object], pairs: int, clock: Callable[[], float]) -> list[float]:
    """For each pair, the time of a call with checks divided by that of a call without."""

    def seconds(checked: bool) -> float:
        found = []
        with ExitStack() if checked else without_checks():
            call()  # not timed, because other code runs than in the call before
            for _ in range(CALLS):
                start = clock()
                call()
                found.append(clock() - start)
        return statistics.median(found)

    found = []
    for pair in range(pairs):
        times = {checked: seconds(checked) for checked in ((True, False) if pair % 2 else (False, True))}
        found.append(times[True] / times[False])
    return found


def interval(found: list[float], drawings: int = 1000) -> tuple[float, float]:
    """The 95% interval of the median, by resampling."""
    draw = random.Random(0).choices
    medians = [statistics.median(draw(found, k=len(found))) for _ in range(drawings)]
    return tuple(statistics.quantiles(medians, n=40)[::38])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--case", nargs="+", default=[*CASES], choices=[*CASES])
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for dtype in args.dtype:
        torch.manual_seed(0)
        model = BertModel(BertConfig(**SHAPE)).eval().to(getattr(torch, dtype))
        fastbert.accelerate(model, padding="zero")
        for case in args.case:
            rows, width = CASES[case]
            given = {
                "input_ids": torch.randint(1000, 20000, (rows, width), dtype=torch.int64, device="cpu"),
                "attention_mask": torch.ones(rows, width, dtype=torch.int64, device="cpu"),
            }
            pairs = args.pairs if case == "query" else max(args.pairs // 30, 2)
            call = partial(model, **given)
            with torch.inference_mode():
                call()  # makes everything that is made only once
                call()
                start = time.perf_counter()
                call()
                once = time.perf_counter() - start
                found = ratios(call, pairs, time.process_time if args.cpu_time else time.perf_counter)
            middle, (low, high) = statistics.median(found), interval(found)
            shown = f"time {middle:.4f} ({low:.4f} to {high:.4f})"
            if case == "texts":
                shown = f"texts a second {1 / middle:.4f} ({1 / high:.4f} to {1 / low:.4f})"
            print(f"{dtype} {case} {rows} x {width}, {once * 1e3:.2f} ms: {shown}, {pairs} pairs", flush=True)


if __name__ == "__main__":
    main()
