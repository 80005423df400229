"""Small models, examples and runs for the tests of fine-tuning."""

import json
import random
from pathlib import Path

import torch

from fastbert import BertConfig, Tokenizer
from fastbert.models import heads
from fastbert.training.files import Answer, Question, Sentence
from fastbert.training.labels import Text
from fastbert.training.loop import Settings
from fastbert.training.predicting import outputs_of
from fastbert.training.processes import Processes
from fastbert.training.run import Run
from fastbert.training.tasks import NUMBERS, Spec, make_task

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij", *(f"##{c}" for c in "abcdefghij")]
ALONE = Processes(0, 1, torch.device("cpu"))


def words(draw: random.Random, least: int = 2, most: int = 9) -> list[str]:
    return ["".join(draw.choices("abcdefghij", k=draw.choice([1, 1, 2]))) for _ in range(draw.randint(least, most))]


def examples_of(task: str, count: int) -> list:
    """Examples that can be learnt: the first letter decides the class, tags are letters, answers are words."""
    draw = random.Random(0)
    made = []
    for number in range(count):
        of_text = words(draw)
        if task == "several":
            label = tuple(
                name for name in ("early", "short") if (of_text[0][0] < "f" if name == "early" else len(of_text) < 5)
            )
            made.append(Text(f"line {number}", " ".join(of_text), None, label))
        elif task == "number":
            made.append(Text(f"line {number}", " ".join(of_text), None, len(of_text) / 4))
        elif task in ("sentence", "pair"):
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


KINDS = ("sentence", "pair", "several", "number", "token", "qa")


def task_of(kind: str, count: int = 24):
    """(task, its examples, their windows). "several" and "number" are sentences with such labels."""
    metric = {"token": "entity_f1", "qa": "squad", "number": "pearson", "several": "f1_micro"}.get(kind, "accuracy")
    name = "sentence" if kind in ("number", "several") else kind
    spec = Spec(name, metric, max_length=28, stride=6, multi_label=kind == "several")
    labels = NUMBERS if kind == "number" else ()
    task = make_task(spec, Tokenizer.from_words(PIECES, lowercase=True), labels)
    examples = examples_of(kind, count)
    task.settle(examples, None, None)
    return task, examples, task.features(examples, training=True).windows


def model_of(task, dropout: float = 0.1, impl: str = "native", seed: int = 0, layers: int = 2):
    config = BertConfig(
        vocab_size=len(PIECES), hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=32, initializer_range=0.2, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout, **task.changes,
    )  # fmt: skip
    torch.manual_seed(seed)
    return getattr(heads, task.head)(config, impl=impl)


def run_of(
    out: Path, kind: str = "sentence", processes: Processes = ALONE, evaluated: bool = False, impl: str = "native",
    class_weights: str = "none", dropout: float = 0.1, **options,
) -> Run:  # fmt: skip
    """A run of a small model. `options` are fields of Settings."""
    task, examples, windows = task_of(kind)
    task.weigh(class_weights, windows)
    chosen = {"epochs": 2, "step_tokens": 90, "batch_tokens": 10**6, "lr": 1e-3, "seed": 3, **options}
    settings = Settings(**chosen)

    def evaluate(model):
        to_score = task.features(examples, training=False).windows
        found = outputs_of(model, task, to_score, 200, settings.dtype, processes)
        return task.scores(examples, task.predictions(examples, to_score, found))

    out.mkdir(parents=True, exist_ok=True)
    metric = "f1" if kind == "qa" else task.spec.metric
    model = model_of(task, dropout, impl)
    if task.class_weights is not None:
        model.class_weights = torch.tensor(task.class_weights, dtype=torch.float32, device="cpu")
    return Run(model, task, windows, settings, out, processes, metric=metric, evaluate=evaluate if evaluated else None)


def gradients(run: Run, training: bool = True) -> dict[str, torch.Tensor]:
    """The gradients of the first step of the second epoch, whose loss is then in `run.loss_of_step`."""
    run.shared.train(training)
    run.loss_of_step = run._gradients(run.plan.steps(1)[0], 1)
    return {name: p.grad.clone() for name, p in run.model.named_parameters()}


def losses(out: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def weights(run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


if __name__ == "__main__":
    # One of the two processes of a test: python training_models.py OUT TASK FSDP
    import sys

    torch.set_num_threads(1)
    joined = Processes.join("cpu")
    run_of(
        Path(sys.argv[1]), sys.argv[2], joined, evaluated=True, class_weights="b-x=3,o=.5", batch_tokens=40,
        average=0.5, evaluations=2, fsdp=sys.argv[3] == "fsdp",
    ).train()  # fmt: skip
    joined.leave()
