"""Small folders for the tests of compression: a model that was fine-tuned for one of the tasks, and its examples."""

import csv
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from fastbert import BertConfig, Tokenizer
from fastbert.inference.eight_bits import why_not
from fastbert.models import heads
from fastbert.storage import write_json
from fastbert.training.pipeline import SPEC_FILE
from fastbert.training.run import Run
from fastbert.training.tasks import Spec, make_task
from training_models import PIECES, examples_of

LABELS = ["early", "Late"]
needs_products = pytest.mark.skipif(why_not() is not None, reason=f"no 8-bit products: {why_not()}")


def config_of(**changes) -> BertConfig:
    """A config of three layers with 4 heads of width 16."""
    sizes = {
        "vocab_size": len(PIECES), "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 96, "max_position_embeddings": 40, "initializer_range": 0.2,
        "id2label": dict(enumerate(LABELS)),
    }  # fmt: skip
    return BertConfig(**(sizes | changes))


def tuned(folder: Path, **changes) -> Path:
    """A folder like those of `fastbert finetune`, with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = heads.BertForSequenceClassification(config_of(**changes))
    with torch.no_grad():  # biases and LayerNorms no longer at their initial values
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn(p.shape, dtype=p.dtype, device="cpu"), alpha=0.1)
    model.save_pretrained(folder)
    Tokenizer.from_words(PIECES, lowercase=True).save_pretrained(folder)
    write_json(folder / SPEC_FILE, asdict(Spec("sentence", "accuracy", ("text", "label"), 28)))
    return folder


def table(path: Path, count: int) -> Path:
    """Examples from which a model can learn."""
    with open(path, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None, lineterminator="\n")
        writer.writerow(["text", "label"])
        writer.writerows((example.text, example.label) for example in examples_of("sentence", count))
    return path


def stopped_after(monkeypatch, steps: int) -> None:
    """Stops every training after `steps` steps, as Ctrl-C does, until the patch is undone."""
    of_step = Run._step
    monkeypatch.setattr(
        Run, "_step", lambda run, step, epoch, asked: of_step(run, step, epoch, [2] * (run.progress.step + 1 == steps))
    )


def task_and_windows(count: int = 24):
    """(the task, its windows), of the examples in `table`."""
    spec = Spec("sentence", "accuracy", ("text", "label"), 28)
    task = make_task(spec, Tokenizer.from_words(PIECES, lowercase=True), LABELS)
    return task, task.features(examples_of("sentence", count), training=True).windows
