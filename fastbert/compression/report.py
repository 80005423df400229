"""`fastbert compress-report`: scores, sizes and speed of smaller models, compared with the first model in one run.

Scores are computed on the whole file. Speed is measured on some of its examples, tokenised before: in batches for
tokens per second, and one by one for the latency. Every model runs once in each round, so that other load on the
machine affects all of them. A ratio is the median of the rounds' ratios to the first model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..formats import opened
from ..formats.sentence_folder import folder_of_config
from ..inference.eight_bits import Int8Linear, holds_integers
from ..storage import CheckpointError
from ..training.pipeline import SPEC_FILE, Pipeline, pipeline
from ..training.predicting import outputs_of, scores_of
from .folders import steps_of
from .sampling import sample

IN_8_BITS = "int8"
_WEIGHTS = (".safetensors", ".bin")


@dataclass
class Party:
    """A model of the report.

    Attributes:
        name: the path or id that the user gave.
        dtype: of its products; int8 if its weights are stored in 8 bits.
        ready: the model with its task.
        disk, memory: bytes of its weights in files and in memory.
        steps: the records in its HISTORY.
    """

    name: str
    dtype: str
    ready: Pipeline
    disk: int
    memory: int
    steps: list[dict[str, Any]]

    @property
    def title(self) -> str:
        return f"{self.name} {self.dtype}"


def parties(folders: Sequence[str], dtypes: Sequence[str], impl: str | None) -> list[Party]:
    """Each folder in each dtype (once if stored in 8 bits). All must have the same task and labels.

    Raises: CheckpointError, in one line.
    """
    found: list[Party] = []
    for folder in folders:
        for dtype in dtypes:
            party = _party(folder, dtype, impl)
            first = (found or [party])[0]
            one, other = (p.ready.task for p in (first, party))
            if (one.spec.task, one.spec.metric, one.labels) != (other.spec.task, other.spec.metric, other.labels):
                raise CheckpointError(
                    f"{folder} is for {_of_task(other)}, and {folders[0]} for {_of_task(one)}: a report is of one task"
                )
            found.append(party)
            if party.dtype == IN_8_BITS:
                break
    return found


def _of_task(task: Any) -> str:
    labels = f" with the labels {', '.join(task.labels)}" if task.labels else ""
    return f"{task.spec.task} by {task.spec.metric}{labels}"


def _party(folder: str, dtype: str, impl: str | None) -> Party:
    with opened(folder) as path:
        if not (path / SPEC_FILE).is_file():
            raise CheckpointError(f"{folder} has no {SPEC_FILE}: a report is of models that fastbert finetune made")
        ready = pipeline(path, device="cpu", dtype=dtype, impl=impl)
        if holds_integers(ready.model):
            dtype, ready = IN_8_BITS, pipeline(path, device="cpu", dtype="auto", impl=impl)
        elif dtype == "auto":
            dtype = str(ready.dtype).removeprefix("torch.")
        disk = sum(file.stat().st_size for file in folder_of_config(path).iterdir() if file.suffix in _WEIGHTS)
        return Party(folder, dtype, ready, disk, memory_of(ready.model), steps_of(path))


def memory_of(model: torch.nn.Module) -> int:
    """Bytes that the model's weights take."""
    integers = sum(module.nbytes for module in model.modules() if isinstance(module, Int8Linear))
    return integers + sum(p.nbytes for p in model.parameters())


def compare(
    found: Sequence[Party], data: str, rounds: int, texts: int, batch_tokens: int, seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """The report as JSON values, with a row for each model in order.

    Args:
        data: a file of examples with labels. texts: the number of examples that are timed, drawn by `seed`.
        rounds: number of rounds of the timing. batch_tokens: tokens computed at once.
        say: is called with a line about the progress.
    """
    metric = found[0].ready.task.spec.metric
    rows = []
    for party in found:
        say(f"scores of {party.title}")
        rows.append({**_scored(party, data, batch_tokens), **_described(party)})
    examples = sample(found[0].ready.task.read(data), texts, seed)
    whole, single = _timed(found, examples, rounds, batch_tokens, say)
    for place, row in enumerate(rows):
        row |= {
            "tokens per second": statistics.median(whole[place]),
            "times as many tokens per second": _ratios(whole[place], whole[0]),
            "milliseconds for one text": statistics.median(single[place]),
            "times faster for one text": _ratios(single[0], single[place]),
        }
    return {
        "data": data, "task": found[0].ready.task.spec.task, "metric": metric, "rows": rows, "rounds": rounds,
        "timed examples": len(examples), "tokens at once": batch_tokens, "threads": torch.get_num_threads(),
        "baseline": found[0].title,
    }  # fmt: skip


def _described(party: Party) -> dict[str, Any]:
    config = party.ready.model.config
    return {
        "model": party.name, "dtype": party.dtype, "bytes on disk": party.disk, "bytes in memory": party.memory,
        "layers": config.num_hidden_layers, "feed-forward width": config.intermediate_size,
        "heads of layers": [config.heads_of(layer) for layer in range(config.num_hidden_layers)],
        "steps": [step.get("command") for step in party.steps],
    }  # fmt: skip


def _scored(party: Party, data: str, batch_tokens: int) -> dict[str, Any]:
    ready, task = party.ready, party.ready.task
    examples = task.read(data)
    task.check(examples)
    windows = task.features(examples, training=False).windows
    scores = scores_of(ready.model, task, examples, windows, batch_tokens, ready.dtype, ready.processes)
    return {"examples": len(examples), "scores": scores.values, "definitions": scores.definitions}


def _timed(
    found: Sequence[Party], examples: Sequence[Any], rounds: int, batch_tokens: int, say: Callable[[str], None]
) -> tuple[list[list[float]], list[list[float]]]:
    """(tokens per second, median milliseconds for a text), each for every model and round."""
    windows = [party.ready.task.features(examples, training=False).windows for party in found]
    whole: list[list[float]] = [[] for _ in found]
    single: list[list[float]] = [[] for _ in found]
    for number in range(-1, rounds):  # the first round warms caches, and does not count
        say("a round to warm up" if number < 0 else f"round {number + 1} of {rounds}")
        for place in _rotated(len(found), number):
            ready, of_texts = found[place].ready, windows[place]

            def run(chosen: Sequence[Any], ready: Pipeline = ready) -> float:
                start = time.perf_counter()
                outputs_of(ready.model, ready.task, chosen, batch_tokens, ready.dtype, ready.processes)
                return time.perf_counter() - start

            seconds = run(of_texts)
            one_by_one = [run([window]) for window in of_texts[:SINGLES]]
            if number >= 0:
                whole[place].append(sum(len(w.input_ids) for w in of_texts) / seconds)
                single[place].append(1000 * statistics.median(one_by_one))
    return whole, single


SINGLES = 32  # texts that are run one by one in a round


def _rotated(count: int, by: int) -> Iterator[int]:
    """The numbers 0 to count - 1, rotated by the number of the round."""
    return ((place + by) % count for place in range(count))


def _ratios(of: Sequence[float], to: Sequence[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(of, to, strict=True)]
    return {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """A block in which torch has `count` threads; None changes nothing."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
