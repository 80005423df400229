"""Students and teachers for the tests of distilling, and the losses again in plain torch, one text at a time."""

import copy
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from fastbert import BertConfig
from fastbert.compression.distill import Distilling
from fastbert.compression.distilled import LOSSES, Divisor, Recipe, TaskDistilled
from fastbert.compression.logits import logits_of
from fastbert.models import heads
from fastbert.training.loop import Settings
from fastbert.training.predicting import pack
from fastbert.training.processes import Processes
from training_models import ALONE, PIECES, task_of

CPU = torch.device("cpu")
TEMPERATURE = 1.7
PAIRS = ((0, 1), (2, 3))
ALL = tuple(name for name in LOSSES if name != "minilm")  # minilm needs as many heads as the teacher has
INNER = tuple(name for name in LOSSES if name not in ("labels", "logits"))


def model_of(
    task, layers: int, width: int = 32, head_count: int = 2, seed: int = 0, dropout: float = 0.0, impl="native"
):
    config = BertConfig(
        vocab_size=len(PIECES), hidden_size=width, num_hidden_layers=layers, num_attention_heads=head_count,
        intermediate_size=40, max_position_embeddings=32, initializer_range=0.3, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout, **task.changes,
    )  # fmt: skip
    torch.manual_seed(seed)
    return getattr(heads, task.head)(config, impl=impl)


def recipe_of(*names: str, pairs=PAIRS, relation_heads: int = 4) -> Recipe:
    weights = {name: 1.0 + 0.5 * place for place, name in enumerate(names)}
    return Recipe(weights, TEMPERATURE, pairs, (2, 3), relation_heads)


def distilled_of(kind: str, *names: str, width: int = 32, dropout: float = 0.0, impl: str = "native", pairs=PAIRS):
    """(the trained module, task, windows): a student of three layers, a teacher of four layers and of width 32."""
    task, _, windows = task_of(kind, 8)
    student = model_of(task, 3, width, seed=1, dropout=dropout, impl=impl)
    teacher = model_of(task, 4, seed=2, impl=impl)
    torch.manual_seed(3)
    return TaskDistilled(student, teacher, recipe_of(*names, pairs=pairs), logits_of(task)), task, windows


def run_of(
    out: Path, kind: str, *names: str, width: int = 32, dropout: float = 0.3, processes: Processes = ALONE, **options
) -> Distilling:  # fmt: skip
    """`options` are fields of Settings."""
    trained, task, windows = distilled_of(kind, *names, width=width, dropout=dropout)
    chosen = {"epochs": 2, "step_tokens": 60, "batch_tokens": 10**6, "lr": 1e-3, "seed": 3, **options}
    out.mkdir(exist_ok=True)
    return Distilling(trained, task, windows, Settings(**chosen), out, processes)


def divisor_of(trained, task, windows) -> Divisor:
    labels, rows = (sum(map(count, windows)) for count in (task.weight, trained.logits.rows))
    return Divisor(labels, rows, sum(len(w.input_ids) for w in windows), len(windows))


def losses_of(trained, task, windows, divisor: Divisor) -> tuple[Tensor, ...]:
    labels = task.arguments(windows, CPU) if "labels" in trained.recipe.weights else {}
    if labels and labels[next(iter(labels))].is_floating_point():
        labels = {name: t.to(trained.student.dtype) for name, t in labels.items()}
    batch = pack(windows, range(len(windows)), CPU)
    return trained(batch, divisor=divisor, places=trained.logits.places(windows, CPU), **labels)


def doubled(trained):
    """A copy of the trained module in float64."""
    both = copy.deepcopy(trained).double()
    both._beside = (copy.deepcopy(trained.teacher).double(),)
    return both


def gradients(trained, loss: Tensor) -> dict[str, Tensor]:
    trained.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in trained.named_parameters() if p.grad is not None}


# ---- the specification ---------------------------------------------------------------------------------------


def plain_losses(trained, task, windows, divisor: Divisor) -> dict[str, Tensor]:
    """Every loss of the recipe, text by text. `windows` may be a part of the step that `divisor` counts."""
    totals = {name: torch.zeros((), dtype=torch.float64) for name in trained.recipe.weights}
    for window in windows:
        for name, value in _of_text(trained, task, window).items():
            totals[name] = totals[name] + value
    by = {"labels": divisor.labels, "logits": divisor.rows, "first": divisor.texts}
    return {name: total / by.get(name, divisor.tokens) for name, total in totals.items()}


def _of_text(trained, task, window) -> dict[str, Tensor]:
    student, teacher, recipe = trained.student, trained.teacher, trained.recipe
    batch, labels = pack([window], [0], CPU), task.arguments([window], CPU)
    labels = {name: t.to(student.dtype) if t.is_floating_point() else t for name, t in labels.items()}
    own = student(batch, output_hidden_states=True, num_items_in_batch=1, **labels)
    with torch.no_grad():
        given = teacher(batch, output_hidden_states=True)
    project = trained.projections["states"] if "states" in trained.projections else nn.Identity()
    states = [(project(own.hidden_states[s + 1]), given.hidden_states[t + 1]) for s, t in recipe.pairs]
    s, t = recipe.relation_pair
    own_qkv, given_qkv = _qkv(student, own, s), _qkv(teacher, given, t)
    n = len(window.input_ids)
    embedded = own.hidden_states[0]
    if "embeddings" in trained.projections:
        embedded = trained.projections["embeddings"](embedded)

    def mean(values):
        return sum(values) / len(recipe.pairs)

    def scores():
        for one, other in recipe.pairs:
            (q, k, _), (u, v, _) = _qkv(student, own, one), _qkv(teacher, given, other)
            yield n * (_scores(q, k) - _scores(u, v)).square().mean()

    def relations(which):
        return sum(n * _divergence(_scores(a, b), _scores(c, d)).mean() for a, b, c, d in which)

    cut = [[x.reshape(n, recipe.relation_heads, -1) for x in qkv] for qkv in (own_qkv, given_qkv)]
    (q, k, v), (u_q, u_k, u_v) = own_qkv, given_qkv
    found = {
        "labels": lambda: own.loss,
        "logits": lambda: _answers(task, window, own, given),
        "hidden": lambda: mean([((x - y) ** 2).mean(1).sum() for x, y in states]),
        "cosine": lambda: mean([(1 - (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))).sum() for x, y in states]),
        "first": lambda: mean([((x[0] / x[0].norm() - y[0] / y[0].norm()) ** 2).sum() for x, y in states]),
        "embeddings": lambda: ((embedded - given.hidden_states[0]) ** 2).mean(1).sum(),
        "attention": lambda: mean(list(scores())),
        "minilm": lambda: relations([(q, k, u_q, u_k), (v, v, u_v, u_v)]),
        "minilm2": lambda: relations([(a, a, b, b) for a, b in zip(*cut, strict=True)]),
    }
    return {name: found[name]() for name in recipe.weights}


def _qkv(model, output, layer: int) -> list[Tensor]:
    """Query, key and value of a layer, from the hidden states that it reads: [n, H, D] each."""
    linears = model.bert.encoder["layer"][layer].attention["self"].values()
    x = output.hidden_states[layer]
    return [linear(x).unflatten(1, (model.config.num_attention_heads, -1)) for linear in linears]


def _scores(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("ihd,jhd->hij", a, b) / a.shape[-1] ** 0.5


def _divergence(own: Tensor, given: Tensor, temperature: float = 1.0) -> Tensor:
    """KL of the teacher's distribution from the student's, over the last dimension."""
    p, q = (given / temperature).softmax(-1), (own / temperature).softmax(-1)
    return (p * (p / q).log()).sum(-1)


def _answers(task, window, own, given) -> Tensor:
    t = TEMPERATURE
    if task.spec.task == "qa":
        sides = [(own.start_logits, given.start_logits), (own.end_logits, given.end_logits)]
        return t**2 * sum(_divergence(x, y, t) for x, y in sides) / 2
    if task.spec.task == "token":
        return t**2 * sum(_divergence(own.logits[place], given.logits[place], t) for _, place in window.words)
    z, u = own.logits[0], given.logits[0]
    if task.spec.multi_label:
        q, p = (z / t).sigmoid(), (u / t).sigmoid()
        return t**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    if task.problem_type == "regression":
        return ((z - u) ** 2).mean()
    return t**2 * _divergence(z, u, t)


if __name__ == "__main__":
    # One of the two processes of the test with several processes: python distill_models.py DDP_OUT FSDP_OUT
    torch.set_num_threads(1)
    joined = Processes.join("cpu")
    for folder, fsdp in zip(sys.argv[1:], (False, True), strict=True):
        run_of(Path(folder), "token", *ALL, width=16, processes=joined, batch_tokens=40, fsdp=fsdp).train()
    joined.leave()
