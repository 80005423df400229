"""Small models, examples and runs for the tests of fine-tuning."""

import random
from pathlib import Path

import torch

from fastbert import BertConfig, Tokenizer
from fastbert.models import heads
from fastbert.training.files import Answer, Question, Sentence
from fastbert.training.labels import Text
from fastbert.training.loop import Run, Settings
from fastbert.training.predicting import outputs_of
from fastbert.training.processes import Processes
from fastbert.training.tasks import Spec, make_task

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij", *(f"##{c}" for c in "abcdefghij")]
ALONE = Processes(0, 1, torch.device("cpu"))


def words(draw: random.Random, least: int = 2, most: int = 9) -> list[str]:
    return ["".join(draw.choices("abcdefghij", k=draw.choice([1, 1, 2]))) for _ in range(draw.randint(least, most))]


def examples_of(task: str, count: int) -> list:
    """Of which something can be learnt: the first letter decides the class, tags are letters, answers are words."""
    draw = random.Random(0)
    made = []
    for number in range(count):
        of_text = words(draw)
        if task in ("sentence", "pair"):
            pair = " ".join(words(draw)) if task == "pair" else None
            made.append(Text(f"line {number}", " ".join(of_text), pair, "early" if of_text[0][0] < "f" else "Late"))
        elif task == "token":
            made.append(Sentence(f"line {number}", of_text, ["B-x" if word[0] < "c" else "O" for word in of_text]))
        else:
            context = " ".join([*of_text, *words(draw, 20, 40)])
            start = context.index(of_text[1])
            made.append(Question(str(number), of_text[1], context, [Answer(of_text[1], start)]))
    if task == "token":
        made[0].tags[0] = "B-x"
    return made


def task_of(kind: str, count: int = 24):
    """(task, its examples, their windows)."""
    metric = {"token": "entity_f1", "qa": "squad"}.get(kind, "accuracy")
    spec = Spec(kind, metric, max_length=28, stride=6)
    task = make_task(spec, Tokenizer.from_words(PIECES, lowercase=True))
    examples = examples_of(kind, count)
    task.settle(examples, None, None)
    return task, examples, task.features(examples, training=True).windows


def model_of(task, dropout: float = 0.1, impl: str = "native", seed: int = 0):
    config = BertConfig(
        vocab_size=len(PIECES), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=32, initializer_range=0.2, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout, **task.changes,
    )  # fmt: skip
    torch.manual_seed(seed)
    return getattr(heads, task.head)(config, impl=impl)


def run_of(out: Path, kind: str = "sentence", processes: Processes = ALONE, evaluated: bool = False, **options) -> Run:
    """A run of a small model; options: of Settings."""
    task, examples, windows = task_of(kind)
    chosen = {"epochs": 2, "step_tokens": 90, "batch_tokens": 10**6, "lr": 1e-3, "seed": 3, **options}
    settings = Settings(**chosen)

    def evaluate(model):
        to_score = task.features(examples, training=False).windows
        found = outputs_of(model, task, to_score, 200, settings.dtype, processes)
        return task.scores(examples, task.predictions(examples, to_score, found))

    out.mkdir(parents=True, exist_ok=True)
    metric = "f1" if kind == "qa" else task.spec.metric
    return Run(
        model_of(task), task, windows, settings, out, processes, metric=metric, evaluate=evaluate if evaluated else None
    )


if __name__ == "__main__":
    # One of two processes, for the test of several: python training_models.py OUT TASK FSDP
    import sys

    torch.set_num_threads(1)
    joined = Processes.join("cpu")
    run_of(Path(sys.argv[1]), sys.argv[2], joined, evaluated=True, batch_tokens=40, fsdp=sys.argv[3] == "fsdp").train()
    joined.leave()
