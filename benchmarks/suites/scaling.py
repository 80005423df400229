"""Time against tokens, sequence length, padding and processes: each point of a curve is a case, and curves have slopes.

A slope is that of log seconds over log x. Tokens: 1 for work proportional to the input, less with a constant overhead.
Length of a single sequence: 1 if products dominate, 2 if attention does. Padding, with a constant number of real
tokens: 0 if padding takes no time, 1 if it takes as much as words. Processes that share one training batch: -1 without
any loss.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastbert.testing import MODELS, Workload, natural_lengths

from ..harness import costs, timing, workloads
from ..harness.case import Case, Row
from ..harness.child import first_layer_gradient
from ..harness.children import ChildCase, Files, Launch, Said, common
from ..harness.jobs import Job
from ..harness.peer import OURS
from ..peers import fastbert, openvino, transformers
from ..peers.transformers import masked_folder, masked_lm

# curve -> all of its points
POINTS = {
    "tokens": (16, 64, 256, 1024, 4096, 16384, 65536),
    "sequence length": (128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    "padding share": (0.0, 0.5, 0.75, 0.875),
    "processes": (1, 2, 4, 8),  # not in --quick: starting them takes longer than all the rest
}
# the last point on a CPU: (with --quick, without)
LAST = {"tokens": (1024, 16384), "sequence length": (1024, 4096), "padding share": (0.75, 0.875)}

LABELS = {
    "tokens": "real tokens of a batch of natural lengths",
    "sequence length": "tokens of one sequence",
    "padding share": "positions for each real token, once padded",
    "processes": "processes that share a training batch",
}
X = {"tokens": "tokens", "sequence length": "longest", "padding share": "positions_per_token", "processes": "processes"}


def points(curve: str, device: torch.device, quick: bool) -> tuple[tuple[float, ...], str | None]:
    """(the points that are measured, the reason why others are not)."""
    wanted = POINTS[curve]
    if curve == "processes":
        count, what = (torch.cuda.device_count(), "GPU") if device.type == "cuda" else (torch.get_num_threads(), "core")
        kept = [n for n in wanted if n <= max(count, 1)]
        why = f"{count} {what}{'' if count == 1 else 's'} here"
    elif device.type == "cuda":
        kept, why = list(wanted), ""
    else:
        last = LAST[curve][not quick]
        kept, why = [n for n in wanted if n <= last], "a CPU" + (", --quick" if quick else "")
    if len(kept) == len(wanted):
        return wanted, None
    return tuple(kept), f"to {kept[-1]:,} of {wanted[-1]:,}: {why}"


# ---- encoders --------------------------------------------------------------------------------------------


def _encoder(name: str, workload: Workload, rows: Sequence[Row], priority: int, job: Job, **shape: float) -> Case:
    exact = torch.float64 if job.dtype == torch.float32 else torch.float32
    return Case(
        "scaling", name, rows, functools.partial(job.truth, exact), functools.partial(job.truth, job.dtype),
        workloads.model_name(name), None, "forward", job.dtype, workloads.shape_of(workload) | shape, workload.tokens,
        costs.encoder_flops(workload), None, priority, True, close=job.close,
    )  # fmt: skip


def _ours(job: Job) -> Row:
    return Row("fastbert", OURS, functools.partial(fastbert.encode, job))


def _rows(job: Job, batches: bool = True) -> list[Row]:
    """Our row, and other libraries' with batches that are fast for them."""
    size = 2 if job.device.type == "cpu" else 32
    many = f", sorted, batches of {size}" if batches else ""
    rows = [
        _ours(job),
        Row("transformers sdpa" + many, "transformers", functools.partial(transformers.sdpa(size), job)),
    ]
    if job.device.type == "cpu":
        rows.append(Row("openvino" + many, "openvino", functools.partial(openvino.encoder(size), job), slow=True))
    return rows


def _one_padded_batch(job: Job) -> list[Row]:
    """Rows with one padded batch, as in a server that batches requests in arrival order, or in a trainer's collator."""
    run = transformers.padded("sdpa", len(job.rows), False)
    return [_ours(job), Row("transformers sdpa, one padded batch", "transformers", functools.partial(run, job))]


def padded_share(tokens: int, longest: int, share: float) -> tuple[int, ...]:
    """Lengths with a sum of about `tokens`, one of them `longest`; padded to it, this share of positions is padding."""
    count = round(tokens / (longest * (1 - share)))
    if count == 1 or share == 0:
        return (longest,) * count
    rest, extra = divmod(tokens - longest, count - 1)
    return (longest, *(rest + (n < extra) for n in range(count - 1)))


# ---- processes -------------------------------------------------------------------------------------------


def _processes(model: str, world: int, sequences: int, length: int, dtype: torch.dtype, device: torch.device) -> Case:
    """A training step on `world` shares of one batch. All sequences have the same number of labels, so the mean of the
    shares' gradients is the gradient of the batch."""
    workload = Workload(MODELS[model], (length,) * sequences)
    job = Job(workload, dtype, device)
    files = Files(job)
    ids = torch.tensor(job.rows)
    chosen = torch.arange(length) % 7 == 1
    tensors = {"input_ids": ids, "labels": torch.where(chosen, ids, -100)}

    def truth(working: torch.dtype) -> list[Tensor]:
        whole = masked_lm(job, working)
        whole(**{name: t.to(device) for name, t in tensors.items()}).loss.backward()
        return [torch.from_numpy(first_layer_gradient(whole))]

    def jobs(engine: str) -> list[dict[str, Any]]:
        store = files.new_folder() + "/store"
        shares = zip(*(t.chunk(world) for t in tensors.values()), strict=True)
        return [
            {**common(job, "", engine), "threads": 1, "rank": rank, "world": world, "store": store, "steps": 5,
             "folder": masked_folder(files), "tensors": {n: t.tolist() for n, t in zip(tensors, share, strict=True)}}
            for rank, share in enumerate(shares)
        ]  # fmt: skip

    def make(engine: str) -> Launch:
        return Launch(files, functools.partial(jobs, engine), "benchmarks.harness.child_parallel")

    rows = [
        Row("fastbert.accelerate", OURS, functools.partial(make, "fastbert"), settings={"threads": 1}),
        Row("transformers sdpa", "transformers", functools.partial(make, "transformers"), settings={"threads": 1}),
    ]
    exact = torch.float64 if dtype == torch.float32 else torch.float32
    shape = workloads.shape_of(workload) | {"processes": world}
    return ChildCase(
        "scaling", f"{model}_processes_{world}", rows, functools.partial(truth, exact), functools.partial(truth, dtype),
        model, None, "step", dtype, shape, workload.tokens, priority=116, quick=True, files=files, finish=finish,
        runs=(1, 1),
    )  # fmt: skip


def finish(result: dict[str, Any], said: list[Said]) -> None:
    seconds = [t for events in said for t in events["done"]["seconds"]]
    result |= {"seconds": seconds, "median_s": statistics.median(seconds), "spread": timing.spread(seconds)}
    result["tokens_per_second"] = result["tokens"] / result["median_s"]


# ---- cases and curves ------------------------------------------------------------------------------------


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    model = "minilm" if device.type == "cpu" else "base"
    shape = MODELS[model]
    natural = Workload(shape, tuple(natural_lengths(2048)))
    for tokens in points("tokens", device, quick)[0]:
        workload = workloads.cut(natural, tokens)
        job = Job(workload, dtype, device)
        yield _encoder(f"{model}_tokens_{tokens}", workload, _rows(job), 110, job)
    for length in points("sequence length", device, quick)[0]:
        workload = Workload(shape, (length,))
        job = Job(workload, dtype, device)
        yield _encoder(f"{model}_length_{length}", workload, _rows(job, batches=False), 112, job)
    total = 16384 if device.type == "cuda" else 512 if quick else 2048
    for share in points("padding share", device, quick)[0]:
        workload = Workload(shape, padded_share(total, 128, share))
        job = Job(workload, dtype, device)
        positions = 128 * len(workload.lengths) / workload.tokens
        yield _encoder(
            f"{model}_padding_{share:g}", workload, _one_padded_batch(job), 114, job,
            positions_per_token=positions, padding_share=1 - 1 / positions,
        )  # fmt: skip
    sequences, length = (256, 128) if device.type == "cuda" else (16, 64)
    for world in () if quick else points("processes", device, quick)[0]:
        yield _processes(model, int(world), sequences, length, dtype, device)


def curves(rows: Sequence[dict[str, Any]], device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """A curve for each row of each kind, through the points that were measured."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["suite"] == "scaling" and row["status"] == "ok":
            # a workload's name is <model>_<curve>_<x>, with the first word of the curve or, for length, the last
            curve = next(name for name in POINTS if row["workload"].split("_")[1] in name)
            found.setdefault((curve, row["row"], row["dtype"], row["model"]), []).append(row)
    made = []
    for (curve, name, dtype, model), of_curve in found.items():
        of_curve.sort(key=lambda row: row["shape"][X[curve]])
        x = [row["shape"][X[curve]] for row in of_curve]
        wanted, why = points(curve, device, quick)
        made.append({
            "name": curve, "row": name, "dtype": dtype, "model": model, "x": x,
            "y_seconds": [row["median_s"] for row in of_curve], "x_label": LABELS[curve],
            **timing.bootstrap_slope(x, [row["seconds"] for row in of_curve]),
            "complete": len(x) == len(wanted), "cut": why,
        })  # fmt: skip
    return made
