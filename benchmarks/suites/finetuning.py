"""Compares fine-tuning with transformers' Trainer on real data: scores over several seeds, real tokens a second.

    python -m benchmarks.suites.finetuning sick-entailment wnut17 --data DIR [--seeds 3] [--json FILE]

Both rows read the same examples as the same tokens, begin with the same weights, and have the same hyper-parameters:
epochs, examples of a step (for ours, the tokens that this number of examples has on average), AdamW, warm-up and linear
decay, clipping, dropout, bfloat16 by autocast if the machine multiplies it fast, and a heap that keeps freed memory,
which avoids page faults in both. transformers' Trainer pads each batch to its longest example and groups examples by
length, so its order differs from ours. In the row trainer-our-steps Trainer takes the examples of our steps in our
order, which needs more padding. Each run is a process; the rows take turns, seed by seed. The model of the last epoch
is scored, so nothing is chosen by the test set.

The time of a step is from the end of the step before it in the same epoch, so checkpoints and the start do not count;
both wall and processor time are recorded. Tokens are real tokens, without padding. With --json FILE the runs are added
to those in FILE, and the table shows all of them; without a task the command only prints it.

    python -m benchmarks.suites.finetuning sst2 --data DIR --turns 6 [--steps 50]

measures speed only, also on a machine with other work: both trainings exist at the same time, and one waits while the
other does its 50 steps. A turn of each is a pair; printed are the median of the pairs' ratios and their range. Trainer
sorts the examples of 50 steps at a time by length, so a turn of 50 steps has batches of all lengths.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

import fastbert
from fastbert.cli.options import HUB_ID, default_model, positive
from fastbert.encoding.encoder import resolve_dtype
from fastbert.models import heads
from fastbert.storage import read_json, write_json
from fastbert.text.tokenizer import Tokenizer
from fastbert.training.files import read_text
from fastbert.training.finetune import EXAMPLES_PER_STEP, Request, finetune, usual_step_tokens
from fastbert.training.loop import Settings
from fastbert.training.memory import keep_freed_memory
from fastbert.training.metrics import Scores
from fastbert.training.plan import Plan
from fastbert.training.predicting import outputs_of
from fastbert.training.processes import Processes
from fastbert.training.tasks import NUMBERS, Spec, make_task

from ..harness import machine
from ..harness.finetuning_lines import line, pairs, table
from ..harness.turns import Turns, TurnsOver, pipes

SICK = ("sick/SICK_train.txt", "sick/SICK_test_annotated.txt")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Study:
    """A task and its data. train, test: files in the data folder; if they are the same file, it is divided by
    article."""

    spec: Spec
    train: str
    test: str
    epochs: int
    lr: float
    labels: tuple[str, ...] = ()


STUDIES = {
    "sst2": Study(Spec("sentence", "accuracy"), "sst2/train.tsv", "sst2/dev.tsv", 2, 1e-4),
    "sick-entailment": Study(
        Spec("pair", "accuracy", ("sentence_A", "sentence_B", "entailment_judgment")), *SICK, 2, 2e-4
    ),
    "sick-relatedness": Study(
        Spec("pair", "pearson", ("sentence_A", "sentence_B", "relatedness_score")), *SICK, 2, 2e-4, NUMBERS
    ),
    "wnut17": Study(
        Spec("token", "entity_f1", stride=32), "wnut17/wnut17train.conll", "wnut17/emerging.test.annotated", 3, 3e-4
    ),
    "xquad-en": Study(
        Spec("qa", "squad", max_length=384, stride=128), "xquad/xquad.en.json", "xquad/xquad.en.json", 2, 1e-4
    ),
}


@dataclass(frozen=True)
class Job:
    """The work of one process."""

    study: str
    row: str
    seed: int
    epochs: int
    lr: float
    model: str
    train: str
    test: str
    out: str
    turns: dict[str, Any] | None = None  # the arguments of harness.turns.Turns; None for a whole training


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="TASK", help=f"of {', '.join(STUDIES)}")
    parser.add_argument("--data", type=Path, help="folder with sst2, sick, wnut17 and xquad")
    parser.add_argument("--rows", default="fastbert,trainer", help=f"any of {', '.join(ROWS)} (default: %(default)s)")
    parser.add_argument("--seeds", type=positive, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--examples", type=positive, help="number of examples, spread over the file (default: by task)")
    parser.add_argument("--epochs", type=positive, help="default: by task")
    parser.add_argument("--lr", type=float, help="learning rate (default: by task)")
    parser.add_argument("--model", default=default_model(), help="the BERT to start from (default: all-MiniLM-L6-v2)")
    parser.add_argument("--json", type=Path, help="file of all runs")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the trained models and curves in this folder")
    parser.add_argument("--turns", type=positive, metavar="N", help="measure speed only: rows alternate, N turns each")
    parser.add_argument("--steps", type=positive, default=50, help="steps of a turn (default: %(default)s)")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.job is not None:
        print(json.dumps(run(Job(**json.loads(args.job)))))
        return
    if unknown := [name for name in args.studies if name not in STUDIES]:
        parser.error(f"no task {', '.join(unknown)}; there are {', '.join(STUDIES)}")
    if unknown := [name for name in args.rows.split(",") if name not in ROWS]:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    if args.studies and args.data is None:
        parser.error("--data is needed: the folder with the examples")
    if args.turns and (args.json or args.rows.count(",") != 1):
        parser.error("--turns compares two --rows, and writes no --json")
    if args.turns and args.steps < 2:
        parser.error("--steps must be at least 2: the first step of an epoch is not timed")
    runs = read_json(args.json)["runs"] if args.json and args.json.exists() else []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        for name in args.studies:
            if args.turns:
                print(pairs(name, *in_turns(jobs_of(name, args, folder)[:2], args.turns, args.steps)), flush=True)
                continue
            for job in jobs_of(name, args, folder):
                runs.append(in_a_process(job) | {"examples": args.examples})
                if args.json:
                    write_json(args.json, {"schema": "fastbert-finetuning/1", "runs": runs})
                print(line(runs[-1]), file=sys.stderr, flush=True)
    if not args.turns:
        print(table(runs))


def jobs_of(name: str, args: argparse.Namespace, folder: Path) -> list[Job]:
    """The runs of a task, seed by seed. Writes their files."""
    study = STUDIES[name]
    here = folder / name
    here.mkdir(parents=True, exist_ok=True)
    train, test = args.data / study.train, args.data / study.test
    if train == test:
        train, test = halves(train, here)
    if args.examples:
        train = shortened(train, args.examples, here)
    jobs = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for row in args.rows.split(","):
            out = str(here / f"{row}-{seed}")
            epochs, lr = args.epochs or study.epochs, args.lr or study.lr
            jobs.append(Job(name, row, seed, epochs, lr, args.model, str(train), str(test), out))
    return jobs


def in_a_process(job: Job) -> dict[str, Any]:
    command = [sys.executable, "-m", __spec__.name, "--job", json.dumps(vars(job))]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(said.splitlines()[-1])


def in_turns(jobs: list[Job], count: int, steps: int) -> list[dict[str, Any]]:
    """Trains two rows in alternation. Returns the measurements of each."""
    processes = []
    for first, job, ends in zip((True, False), jobs, pipes(), strict=True):
        turns = {"read": ends[0], "write": ends[1], "first": first, "steps": steps, "count": count}
        command = [sys.executable, "-m", __spec__.name, "--job", json.dumps(vars(job) | {"turns": turns})]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=ends))
        for end in ends:
            os.close(end)
    said = [process.communicate()[0] for process in processes]
    for job, process in zip(jobs, processes, strict=True):
        if process.returncode:
            raise RuntimeError(f"the row {job.row} ended with {process.returncode}")
    return [json.loads(words.splitlines()[-1]) for words in said]


# ---- files -----------------------------------------------------------------------------------------------


def halves(path: Path, folder: Path) -> tuple[Path, Path]:
    """Writes the articles of a SQuAD file with even and with odd numbers into two files."""
    whole = read_json(path)
    parts = folder / "even.json", folder / "odd.json"
    for odd, part in enumerate(parts):
        write_json(part, {**whole, "data": whole["data"][odd::2]})
    return parts


def shortened(path: Path, count: int, folder: Path) -> Path:
    """Writes a table with `count` of the lines, spread evenly."""
    if path.suffix not in (".tsv", ".txt"):
        raise ValueError(f"--examples shortens tables, not {path.name}")
    head, *rows = (
        read_text(path).removesuffix("\n").split("\n")
    )  # str.splitlines also splits at characters within texts
    if not 0 < count <= len(rows):
        raise ValueError(f"{path} has {len(rows):,} examples, not {count:,}")
    chosen = [rows[place * len(rows) // count] for place in range(count)]
    short = folder / f"{count}-{path.name}"
    short.write_text("\n".join([head, *chosen, ""]), encoding="utf-8")
    return short


# ---- a run -----------------------------------------------------------------------------------------------


@dataclass
class Steps:
    """Records each optimiser step's epoch, real tokens, wall time and processor time. The time of a step begins with
    the end of the step before it, or with its turn."""

    turns: Turns | None = None
    epochs: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    clock: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    begun: tuple[float, float] = (0.0, 0.0)

    def end(self, epoch: int) -> None:
        clock, processor = now()
        self.epochs.append(epoch)
        self.clock.append(clock - self.begun[0])
        self.processor.append(processor - self.begun[1])
        waited = self.turns is not None and self.turns.after_step()
        self.begun = now() if waited else (clock, processor)

    def figures(self) -> dict[str, float]:
        """The figures of all steps except the first of each epoch. Raises ValueError if no epoch has a second step."""
        counted = [n for n in range(1, len(self.epochs)) if self.epochs[n] == self.epochs[n - 1]]
        if not counted:
            raise ValueError(
                "each epoch is a single step, and the first of an epoch is not timed: train on more examples"
            )
        tokens = sum(self.tokens[n] for n in counted)
        seconds = sum(self.clock[n] for n in counted)
        processor = sum(self.processor[n] for n in counted)
        return {
            "steps": len(self.epochs), "tokens": sum(self.tokens), "seconds": seconds, "processor_seconds": processor,
            "tokens_per_second": tokens / seconds, "tokens_per_processor_second": tokens / processor,
        }  # fmt: skip

    def of_turns(self) -> list[dict[str, float]]:
        """Tokens per second of wall and processor time for each turn, without the first step of an epoch."""
        found = []
        for begin in range(1, len(self.epochs), self.turns.steps):
            turn = range(begin, begin + self.turns.steps)
            counted = [n for n in turn if self.epochs[n] == self.epochs[n - 1]]
            tokens = sum(self.tokens[n] for n in counted)
            found.append({
                "clock": tokens / sum(self.clock[n] for n in counted),
                "processor": tokens / sum(self.processor[n] for n in counted),
            })  # fmt: skip
        return found


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def run(job: Job) -> dict[str, Any]:
    """One training and its scores on the test file, or with turns the speed of each turn."""
    keep_freed_memory()  # for all rows, as `fastbert finetune` does; Trainer by itself does not
    if job.turns is not None:
        steps = Steps(Turns(**job.turns))
        with suppress(TurnsOver):
            ROWS[job.row](job, STUDIES[job.study], steps)
            raise ValueError("the training has fewer steps than its turns: more --epochs are needed")
        return {"row": job.row, "turns": steps.of_turns(), "threads": torch.get_num_threads()}
    began, steps = time.perf_counter(), Steps()
    model, task = ROWS[job.row](job, STUDIES[job.study], steps)
    trained = time.perf_counter()
    scores = scores_of(model, task, job.test)
    return {
        "study": job.study, "row": job.row, "seed": job.seed, "epochs": job.epochs, "lr": job.lr,
        "model": HUB_ID if job.model == default_model() else job.model,
        "scores": scores.values, "definitions": scores.definitions, **steps.figures(),
        "whole_seconds": trained - began, "threads": torch.get_num_threads(), "notes": notes_of(task),
        "device": machine.describe(CPU), "versions": machine.versions(), "commit": machine.commit(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip


def notes_of(task: Any) -> dict[str, int]:
    """The notes about the files, by their names without folders."""
    found = {}
    for key, count in task.notes.items():
        path, what = key.split(": ", 1)
        if count:
            found[f"{Path(path).name}: {what}"] = count
    return found


def scores_of(model: Any, task: Any, test: str) -> Scores:
    """The scores of our head with trained weights, from either training."""
    examples = task.read(test)
    task.check(examples)
    windows = task.features(examples, training=False).windows
    found = outputs_of(model, task, windows, 2048, resolve_dtype("auto", CPU), Processes(0, 1, CPU))
    return task.scores(examples, task.predictions(examples, windows, found))


def with_fastbert(job: Job, study: Study, steps: Steps) -> tuple[Any, Any]:
    """Trains with `fastbert finetune`, without evaluations."""

    def note(record: dict[str, Any], all_steps: int) -> None:
        steps.tokens.append(record["tokens"])
        steps.end(record["epoch"])

    request = Request(
        job.model, job.train, Path(job.out), study.spec, labels=study.labels, epochs=job.epochs, lr=job.lr,
        seed=job.seed,
    )  # fmt: skip
    finetune(request, note)
    answering = fastbert.pipeline(job.out)
    return answering.model, answering.task


def with_trainer(job: Job, study: Study, steps: Steps, our_steps: bool = False) -> tuple[Any, Any]:
    """Trains with transformers' Trainer and BERT, from the same initial weights as ours.

    our_steps: each step has the examples of one of our steps, in our order; to Trainer all epochs are then one.
    """
    import transformers

    task = make_task(study.spec, Tokenizer.from_pretrained(job.model))
    task.labels = list(study.labels)
    train = task.read(job.train)
    task.settle(train, study.labels, None)
    windows = task.features(train, training=True).windows
    rows = [row_of(window, study.spec.task) for window in windows]

    ours = getattr(heads, task.head).from_pretrained(
        job.model, dtype=torch.float32, device=CPU, seed=job.seed, new_head=True, **task.changes
    )
    task.begin(ours, windows)
    theirs = getattr(transformers, task.head).from_pretrained(job.model, attn_implementation="sdpa", **task.changes)
    theirs.load_state_dict(ours.state_dict())
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.model)
    collator = transformers.DataCollatorWithPadding(tokenizer)
    if study.spec.task == "token":
        collator = transformers.DataCollatorForTokenClassification(tokenizer)

    def collate(batch: list[dict[str, Any]]) -> Any:
        padded = collator(batch)
        steps.tokens.append(int(padded["attention_mask"].sum()))
        return padded

    class Clock(transformers.TrainerCallback):
        epoch = -1

        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            self.epoch += 1

        def on_step_end(self, *_: Any, **__: Any) -> None:
            steps.end(self.epoch)

    plan = Plan(job.seed, lengths := [len(row["input_ids"]) for row in rows], usual_step_tokens(lengths), sum(lengths))

    class InOurSteps(transformers.Trainer):
        def get_train_dataloader(self) -> DataLoader:
            every = [step for epoch in range(job.epochs) for step in plan.steps(epoch)]
            return DataLoader(self.train_dataset, batch_sampler=every, collate_fn=self.data_collator)

    arguments = transformers.TrainingArguments(
        job.out, num_train_epochs=1 if our_steps else job.epochs, per_device_train_batch_size=EXAMPLES_PER_STEP,
        learning_rate=job.lr, lr_scheduler_type="linear", warmup_steps=Settings.warmup,
        weight_decay=Settings.weight_decay, max_grad_norm=Settings.clip, adam_epsilon=Settings.eps,
        seed=job.seed, use_cpu=True, bf16=resolve_dtype("auto", CPU) == torch.bfloat16,
        train_sampling_strategy="group_by_length", save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    kind = InOurSteps if our_steps else transformers.Trainer
    kind(theirs, arguments, train_dataset=rows, data_collator=collate, callbacks=[Clock()]).train()
    ours.load_state_dict(theirs.state_dict())
    return ours, task


ROWS = {"fastbert": with_fastbert, "trainer": with_trainer, "trainer-our-steps": partial(with_trainer, our_steps=True)}


def row_of(window: Any, task: str) -> dict[str, Any]:
    """A window in the form of transformers' collators."""
    row = {"input_ids": window.input_ids, "token_type_ids": window.token_type_ids or [0] * len(window.input_ids)}
    if task == "qa":
        return {**row, "start_positions": window.target[0], "end_positions": window.target[1]}
    return {**row, "labels": window.target}


if __name__ == "__main__":
    main()
