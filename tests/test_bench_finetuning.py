"""The benchmarks of fine-tuning that are started by hand: the files they make, the steps they count, their output."""

import json
import os
from contextlib import suppress
from pathlib import Path
from threading import Thread

import pytest

from benchmarks.harness.finetuning_lines import pairs
from benchmarks.harness.turns import Turns, TurnsOver, pipes
from benchmarks.suites import chinese_answers, finetuning
from fastbert.training.features import Window
from fastbert.training.finetune import usual_step_tokens
from fastbert.training.plan import Plan
from fastbert.training.tasks import Spec
from training_models import model_of, task_of

pytestmark = pytest.mark.once


def squad(counts: list[int]) -> dict:
    """Articles of one paragraph, with these numbers of questions."""
    articles = []
    for n, count in enumerate(counts):
        questions = [{"id": f"{n}.{q}"} for q in range(count)]
        articles.append({"title": str(n), "paragraphs": [{"context": f"text {n}", "qas": questions}]})
    return {"version": "1.1", "data": articles}


def test_halves_share_no_article(tmp_path):
    whole = tmp_path / "whole.json"
    whole.write_text(json.dumps(squad([1, 1, 1, 1, 1])), encoding="utf-8")
    even, odd = (json.loads(part.read_text(encoding="utf-8")) for part in finetuning.halves(whole, tmp_path))
    assert [article["title"] for article in even["data"]] == ["0", "2", "4"]
    assert [article["title"] for article in odd["data"]] == ["1", "3"]
    assert even["version"] == odd["version"] == "1.1"


def test_a_shortened_table_is_spread_over_the_whole(tmp_path):
    whole = tmp_path / "train.tsv"
    whole.write_text("sentence\tlabel\n" + "".join(f"text {n}\u2028\t1\n" for n in range(10)), encoding="utf-8")
    short = finetuning.shortened(whole, 4, tmp_path)
    assert short.read_text(encoding="utf-8").split("\n") == [
        "sentence\tlabel", *(f"text {n}\u2028\t1" for n in (0, 2, 5, 7)), "",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="10 examples, not 11"):
        finetuning.shortened(whole, 11, tmp_path)
    with pytest.raises(ValueError, match=r"not x\.json"):
        finetuning.shortened(Path("x.json"), 1, tmp_path)


def test_first_questions_end_within_a_paragraph():
    chosen = chinese_answers.first_questions(squad([2, 3, 2]), 4)
    ids = [[q["id"] for p in article["paragraphs"] for q in p["qas"]] for article in chosen["data"]]
    assert ids == [["0.0", "0.1"], ["1.0", "1.1"]]


def test_the_first_step_of_an_epoch_is_not_timed():
    """It follows the start, or an evaluation and a checkpoint."""
    steps = finetuning.Steps()
    steps.tokens = [1000, 10, 20, 2000, 30]
    steps.epochs, steps.clock = [0, 0, 0, 1, 1], [5.0, 1.0, 2.0, 82.0, 1.0]
    steps.processor = [0.5, 0.5, 1.0, 58.5, 0.5]
    figures = steps.figures()
    assert figures["tokens_per_second"] == 60 / 4
    assert figures["tokens_per_processor_second"] == 60 / 2
    assert (figures["steps"], figures["tokens"]) == (5, 3060)
    steps.epochs = [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="each epoch is a single step"):
        steps.figures()


def test_waiting_for_the_other_row_is_not_timed(monkeypatch):
    """A step's time begins with its turn. The first step, and the first step of each epoch, are not counted."""
    clock = iter([(5.0, 1.0), (20.0, 1.0), (21.0, 2.0), (23.0, 3.0), (90.0, 3.0), (91.0, 4.0), (99.0, 9.0)])
    monkeypatch.setattr(finetuning, "now", lambda: next(clock))

    class Twos:
        steps, done = 2, 0

        def after_step(self) -> bool:
            self.done += 1
            return self.done in (1, 3)

    steps = finetuning.Steps(Twos(), tokens=[1000, 10, 20, 30, 2000])
    for epoch in (0, 0, 0, 0, 1):
        steps.end(epoch)
    assert steps.clock[1:] == [1.0, 2.0, 1.0, 8.0]
    assert steps.of_turns() == [{"clock": 30 / 3, "processor": 30 / 2}, {"clock": 30 / 1, "processor": 30 / 1}]
    words = pairs(
        "sst2",
        {"row": "fastbert", "threads": 1, "turns": [{"clock": 30, "processor": 10}, {"clock": 20, "processor": 20}]},
        {"row": "trainer", "threads": 1, "turns": [{"clock": 10, "processor": 10}, {"clock": 20, "processor": 10}]},
    )
    assert "of the clock: fastbert 25, trainer 15; ratio 2.00 (1.00 - 3.00)" in words
    assert "of the processor: fastbert 15, trainer 10; ratio 1.50 (1.00 - 2.00)" in words


def test_two_processes_take_turns():
    """Each makes one step, then they alternate. None falls behind, and a partner that dies is noticed."""
    order = []

    def work(name: str, turns: Turns) -> None:
        with suppress(TurnsOver):
            while True:
                order.append(name)
                turns.after_step()

    sides = [Turns(*ends, first, steps=3, count=2) for ends, first in zip(pipes(), (True, False), strict=True)]
    threads = [Thread(target=work, args=(name, side)) for name, side in zip("ab", sides, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(order[:2]) == ["a", "b"]
    assert "".join(order[2:]) == "aaabbbaaabbb"
    for side in sides:
        os.close(side.write)
    with pytest.raises(RuntimeError, match="ended before its last turn"):
        Turns(sides[0].read, sides[1].write, True, 3, 2).after_step()
    for side in sides:
        os.close(side.read)


@pytest.mark.filterwarnings("ignore:.*weights were drawn from normal:UserWarning")
def test_trainer_takes_our_steps(tmp_path):
    """Trainer batches the same examples in the same order over two epochs. With its own batching it would not."""
    pytest.importorskip("transformers", reason="its Trainer")
    task, _, _ = task_of("sentence")
    model = tmp_path / "model"
    task.tokenizer.save_pretrained(model)
    model_of(task).save_pretrained(model)
    train = tmp_path / "train.tsv"
    train.write_text("text\tlabel\n" + "".join(f"{'a ' * (n % 7)}b\t{('early', 'Late')[n % 2]}\n" for n in range(70)))
    study = finetuning.Study(Spec("sentence", "accuracy"), "", "", 2, 1e-3)
    job = finetuning.Job("tiny", "trainer", 3, 2, 1e-3, str(model), str(train), str(train), str(tmp_path / "out"))
    tokens = {}
    for our_steps in (True, False):
        steps = finetuning.Steps()
        _, made = finetuning.with_trainer(job, study, steps, our_steps)
        tokens[our_steps] = steps.tokens
        assert len(steps.clock) == len(steps.tokens)
    windows = made.features(made.read(train), training=True).windows
    lengths = [len(window.input_ids) for window in windows]
    plan = Plan(3, lengths, usual_step_tokens(lengths), 10**6)
    expected = [sum(lengths[row] for row in step) for epoch in range(2) for step in plan.steps(epoch)]
    assert tokens[True] == expected != tokens[False]


def test_unknown_rows_and_tasks_are_refused(capsys):
    for words, message in (
        (["sst2", "--rows", "fastbert,other"], "no row other"),
        (["sst3"], "no task sst3"),
        (["sst2", "--data", ".", "--turns", "2", "--rows", "trainer"], "--turns compares two"),
    ):
        with pytest.raises(SystemExit):
            finetuning.main(words)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("task", ["sentence", "token", "qa"])
def test_rows_for_the_other_loop(task):
    target = {"sentence": 1, "token": [-100, 2, -100], "qa": (0, 2)}[task]
    window = Window([1, 2, 3], None, 0, target)
    row = finetuning.row_of(window, task)
    assert row["input_ids"] == [1, 2, 3]
    assert row["token_type_ids"] == [0, 0, 0]
    labels = {name: row[name] for name in row if name not in ("input_ids", "token_type_ids")}
    assert labels == ({"start_positions": 0, "end_positions": 2} if task == "qa" else {"labels": target})


def test_the_table_has_median_range_and_ratio():
    def one(row: str, seed: int, accuracy: float, speed: float) -> dict:
        return {
            "study": "sst2", "examples": None, "epochs": 2, "lr": 1e-4, "row": row, "seed": seed,
            "scores": {"accuracy": accuracy}, "tokens_per_second": speed, "tokens_per_processor_second": speed / 2,
        }  # fmt: skip

    runs = [one("fastbert", seed, value, 3000) for seed, value in enumerate((0.7, 0.9, 0.8))]
    table = finetuning.table([*runs, one("trainer", 0, 0.85, 1000)]).splitlines()
    assert table[2] == (
        "| sst2 | all | 2, 0.0001 | fastbert | 3 | accuracy 0.8000 (0.7000 - 0.9000) | 3,000 | 1,500 | 3.00 |"
    )
    assert table[3].endswith("| trainer | 1 | accuracy 0.8500 (0.8500 - 0.8500) | 1,000 | 500 |  |")
    # Runs with other settings are not compared.
    other = finetuning.table([*runs, {**one("trainer", 0, 0.85, 1000), "epochs": 3}]).splitlines()
    assert other[2].endswith("| 1,500 |  |")
