"""Distils on real data: compares students that learn from a fine-tuned teacher with the same students trained on labels
only, and measures how much faster they are than the teacher.

    python -m benchmarks.suites.distilling sst2=DIR sick=DIR --data DIR [--layers 3] [--seeds 3] [--json FILE]
    python -m benchmarks.suites.distilling sst2=DIR --data DIR --rows distilled --longest --examples 16000 --epochs 1 \
        --batch-tokens 430 --average 0.2

TASK=DIR names the teacher, a folder of `fastbert finetune`. Both rows begin with the same layers of the teacher, read
the same examples in the same order for the same number of epochs, and have the same learning rate and dropout. `labels`
has the loss of fine-tuning, `distilled` the losses of --losses, which may include labels. Nothing is chosen by the test
set: the model after the last epoch is scored. Examples are spread evenly over the file, or with --longest those with
the most characters. A run's processor time is that of the whole training, for `distilled` with the teacher's forward
passes.

Speed is measured once for each task, on 256 of the test file's texts in batches of 2,048 tokens, as real tokens per
second of processor time. Teacher and student take turns in one process; the table shows the median of the turns' ratios
and their range.

The runs are ordered by seed, then by task and row, so that a benchmark that is stopped has complete pairs of rows. With
--json FILE each run is written to FILE when it is done; the same command continues with the runs that FILE lacks, and
the table shows all runs in FILE.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import fastbert
from fastbert.checkpoint import load_state_dict
from fastbert.cli.distill import losses_by_name
from fastbert.cli.options import positive, share_of_1
from fastbert.compression.distill import Method, distill
from fastbert.compression.folders import digest_of
from fastbert.storage import read_json, write_json
from fastbert.training.files import read_text
from fastbert.training.finetune import Request
from fastbert.training.memory import keep_freed_memory
from fastbert.training.predicting import outputs_of
from fastbert.training.tasks import DEFAULT_METRICS, Spec

from ..harness import machine
from .finetuning import shortened

CPU = torch.device("cpu")
BATCH_TOKENS = 2048
TEXTS_TIMED = 256


@dataclass(frozen=True)
class Study:
    """A task and its data. train, test: files in the data folder. epochs, lr and examples are the same for both
    rows."""

    task: str
    train: str
    test: str
    epochs: int
    lr: float
    examples: int


STUDIES = {
    "sst2": Study("sentence", "sst2/train.tsv", "sst2/dev.tsv", 3, 2e-4, 2000),
    "sick": Study("pair", "sick/SICK_train.txt", "sick/SICK_test_annotated.txt", 3, 2e-4, 2000),
}
ROWS = ("distilled", "labels")
# what older runs in a file had: their records do not have these fields
BEFORE = {"longest": False, "batch_tokens": None, "average": 0.0}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teachers", nargs="*", metavar="TASK=DIR", help=f"of {', '.join(STUDIES)}")
    parser.add_argument("--data", type=Path, help="folder with sst2 and sick")
    parser.add_argument("--rows", default=",".join(ROWS), help="default: %(default)s")
    parser.add_argument("--losses", type=losses_by_name, default={"logits": 1.0, "hidden": 3.0}, help="of `distilled`")
    parser.add_argument("--temperature", type=float, default=2.0, help="default: %(default)s")
    parser.add_argument("--init", default="skip", help="--init of fastbert distill (default: %(default)s)")
    parser.add_argument("--layers", type=positive, default=3, help="layers of the students (default: %(default)s)")
    parser.add_argument("--seeds", type=positive, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--examples", type=positive, help="number of examples, spread over the file (default: by task)")
    parser.add_argument("--epochs", type=positive, help="default: by task")
    parser.add_argument("--lr", type=float, help="learning rate (default: by task)")
    parser.add_argument("--longest", action="store_true", help="the examples with the most characters")
    parser.add_argument("--batch-tokens", type=positive, help="tokens of a step (default: 32 average examples)")
    parser.add_argument("--average", type=share_of_1, default=0.0, help="as in `fastbert distill` (default: 0)")
    parser.add_argument("--turns", type=positive, default=7, help="turns when measuring speed (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file of all runs")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the students in this folder")
    args = parser.parse_args(argv)
    teachers = dict(pair.partition("=")[::2] for pair in args.teachers)
    if unknown := [name for name in teachers if name not in STUDIES]:
        parser.error(f"no task {', '.join(unknown)}; there are {', '.join(STUDIES)}")
    if teachers and args.data is None:
        parser.error("--data is needed: the folder with the examples")
    keep_freed_memory()
    runs = read_json(args.json)["runs"] if args.json and args.json.exists() else []
    for asked in trainings(teachers, args):
        if any(asked.items() <= (BEFORE | run).items() for run in runs):
            continue
        runs.append(asked | measured(asked, teachers[asked["study"]], args))
        print(f"{asked['study']} {asked['row']} {asked['seed']}: {runs[-1]['score']:.4f}", file=sys.stderr, flush=True)
        if args.json:
            write_json(args.json, {"schema": "fastbert-distilling/1", "runs": runs})
    print(table(runs))


def trainings(teachers: dict[str, str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the fields that identify each run: first the scores of the teachers, then the students, ordered by seed.
    `teacher` is the SHA-256 of the teacher's weights."""
    digests = {name: digest_of(load_state_dict(teacher)) for name, teacher in teachers.items()}
    for name, digest in digests.items():
        yield {"study": name, "row": "teacher", "seed": 0, "teacher": digest}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for name in teachers:
            study = STUDIES[name]
            for row in args.rows.split(","):
                learns = row == "distilled"
                yield {
                    "study": name, "row": row, "seed": seed, "teacher": digests[name], "layers": args.layers,
                    "init": args.init, "losses": args.losses if learns else {"labels": 1.0},
                    "temperature": args.temperature if learns else None, "lr": args.lr or study.lr,
                    "epochs": args.epochs or study.epochs, "examples": args.examples or study.examples,
                    "longest": args.longest, "batch_tokens": args.batch_tokens, "average": args.average,
                }  # fmt: skip


def measured(asked: dict[str, Any], teacher: str, args: argparse.Namespace) -> dict[str, Any]:
    """Trains a student, unless the run is a teacher's, and measures it; returns the other fields of the record."""
    study = STUDIES[asked["study"]]
    train, test = args.data / study.train, args.data / study.test
    common = {
        "device": machine.describe(CPU), "versions": machine.versions(), "commit": machine.commit(),
        "threads": torch.get_num_threads(), "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip
    if asked["row"] == "teacher":
        return common | {"score": score_of(teacher, test)}
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        train = (longest if asked["longest"] else shortened)(train, asked["examples"], here)
        out = here / f"{asked['study']}-{asked['row']}-{asked['seed']}"
        spec = Spec(study.task, DEFAULT_METRICS[study.task])
        request = Request(
            teacher, str(train), out, spec, epochs=asked["epochs"], lr=asked["lr"], seed=asked["seed"], device="cpu",
            batch_tokens=asked["batch_tokens"], average=asked["average"],
        )  # fmt: skip
        method = Method(str(asked["layers"]), asked["init"], asked["losses"], args.temperature)
        begun = time.process_time()
        distill(request, method, {})
        seconds = time.process_time() - begun
        is_timed = (asked["row"], asked["seed"]) == ("distilled", args.first_seed)
        found = {
            "processor_seconds": seconds, "score": score_of(str(out), test),
            "speed": speed_beside(teacher, str(out), test, args.turns) if is_timed else None,
        }  # fmt: skip
        if args.keep:
            shutil.copytree(out, args.keep / out.name, ignore=shutil.ignore_patterns("checkpoints"), dirs_exist_ok=True)
    return common | found


def longest(path: Path, count: int, folder: Path) -> Path:
    """Writes a table with the `count` lines with the most characters, in their order."""
    head, *rows = read_text(path).removesuffix("\n").split("\n")
    if count > len(rows):
        raise ValueError(f"{path} has {len(rows):,} examples, not {count:,}")
    chosen = sorted(sorted(range(len(rows)), key=lambda row: -len(rows[row]))[:count])
    short = folder / f"longest-{count}-{path.name}"
    short.write_text("\n".join([head, *(rows[row] for row in chosen), ""]), encoding="utf-8")
    return short


def score_of(folder: str, test: Path) -> float:
    """The model's own metric on a file."""
    model = fastbert.pipeline(folder, device="cpu")
    examples = model.task.read(test)
    windows = model.task.features(examples, training=False).windows
    found = outputs_of(model.model, model.task, windows, BATCH_TOKENS, model.dtype, model.processes)
    return model.task.scores(examples, model.task.predictions(examples, windows, found)).values[model.task.spec.metric]


def speed_beside(teacher: str, student: str, test: Path, turns: int) -> dict[str, Any]:
    """Real tokens per second of processor time of both models, and the ratios of the turns, the lowest first."""
    models = [fastbert.pipeline(folder, device="cpu") for folder in (teacher, student)]
    examples = models[0].task.read(test)[:TEXTS_TIMED]
    windows = models[0].task.features(examples, training=False).windows
    tokens = sum(len(w.input_ids) for w in windows)
    rates: list[list[float]] = []
    for _ in range(turns + 1):
        turn = []
        for model in models:
            begun = time.process_time()
            outputs_of(model.model, model.task, windows, BATCH_TOKENS, model.dtype, model.processes)
            turn.append(tokens / (time.process_time() - begun))
        rates.append(turn)
    rates = rates[1:]  # the first turn makes copies of weights
    of_teacher, of_student = zip(*rates, strict=True)
    return {
        "dtype": str(models[0].dtype).removeprefix("torch."),
        "teacher": statistics.median(of_teacher), "student": statistics.median(of_student),
        "ratios": sorted(turn[1] / turn[0] for turn in rates),
    }  # fmt: skip


def table(runs: list[dict[str, Any]]) -> str:
    """The table of all seeds' scores, their share of the teacher's, and speed."""
    lines = ["| data | row | learnt | score: by seed | least, of the teacher's | tokens a second |", "| --- " * 6 + "|"]
    of_teacher = {(run["study"], run["teacher"]): run["score"] for run in runs if run["row"] == "teacher"}
    groups: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["study"], run["teacher"], run["row"], learnt(run)), []).append(run)
    for (study, teacher, row, what), some in groups.items():
        scores = [run["score"] for run in some]
        share = f"{min(scores) / of_teacher[study, teacher]:.1%}" if (study, teacher) in of_teacher else ""
        ratios = [ratio for run in some if run.get("speed") for ratio in run["speed"]["ratios"]]
        speed = ""
        if ratios:
            speed = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {study} | {row} | {what} | {', '.join(f'{s:.4f}' for s in scores)} | {share} | {speed} |")
    return "\n".join(lines)


def learnt(run: dict[str, Any]) -> str:
    """The losses and the length of a student's training; "" for a teacher."""
    if run["row"] == "teacher":
        return ""
    losses = ", ".join(f"{name}={weight:g}" for name, weight in run["losses"].items())
    softened = f" at temperature {run['temperature']:g}" if run["temperature"] else ""
    run = BEFORE | run
    which = "longest examples" if run["longest"] else "examples"
    step = f", steps of {run['batch_tokens']} tokens" if run["batch_tokens"] else ""
    mean = f", weights averaged over {run['average']:g}" if run["average"] else ""
    return f"{losses}{softened}; {run['examples']} {which}, epochs: {run['epochs']}, rate {run['lr']:g}{step}{mean}"


if __name__ == "__main__":
    main()
