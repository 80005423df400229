"""Prints the time of one encoder layer by kernel.

    python -m benchmarks.inspection.profile_layer [--workload base_natural]

torch's profiler runs over forward and backward of one layer on a packed batch of real lengths. It needs no special
rights and no other tool.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import torch

from fastbert.config import BertConfig
from fastbert.encoding.encoder import resolve_device, resolve_dtype
from fastbert.models.bert import BertModel
from fastbert.packing import PackedBatch
from fastbert.testing import WORKLOADS

from ..harness import workloads


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inspection.profile_layer",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--workload", choices=list(WORKLOADS), default="base_natural", help="default: base_natural")
    parser.add_argument("--device", default="auto", help="default: cuda if there is a GPU")
    parser.add_argument("--dtype", default="auto", help="default: bfloat16 if the hardware multiplies it fast")
    parser.add_argument("--quick", action="store_true", help="a few hundred tokens")
    parser.add_argument("--trace", metavar="FILE", help="also write a trace for chrome://tracing")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    workload = workloads.fit(args.workload, device, workloads.model_name(args.workload), args.quick)
    shape = replace(workload.model, layers=1)
    config = BertConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, num_hidden_layers=1, num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate, max_position_embeddings=max(512, *workload.lengths),
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False).to(device, dtype).train()
    batch = PackedBatch.from_lists(workloads.token_ids(workload.lengths, shape.vocab), device=device)
    upstream = torch.randn(workload.tokens, shape.hidden, device=device).to(dtype)

    def step() -> None:
        model(batch).last_hidden_state.backward(upstream)
        model.zero_grad(set_to_none=True)

    for _ in range(2):
        step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(f"{args.workload}: {workload.tokens:,} tokens, one layer and its embeddings, forward and backward, {dtype}")
    print(profile.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=60))
    if args.trace:
        profile.export_chrome_trace(args.trace)
    return 0


if __name__ == "__main__":
    sys.exit(main())
