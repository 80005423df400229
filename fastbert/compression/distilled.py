"""A student and its teacher: one pass of both over a packed batch, and the losses of the student.

    labels       the task's own loss                                                an item
    logits       the teacher's answers, softened by a temperature                   an item
    hidden       hidden states, mean squared difference                             a token, mean of the pairs of layers
    cosine       hidden states, 1 less their cosine                                 a token, mean of the pairs
    first        each text's first token, scaled to length 1 (PKD)                  a text, mean of the pairs
    embeddings   the embeddings' output, mean squared difference                    a token
    attention    attention's scores before the softmax, squared (TinyBERT)          a token, mean of the pairs
    minilm       attention's distribution and values' relation (MiniLM)             a token, of one layer
    minilm2      relations of queries, keys and values among themselves (MiniLMv2)  a token, of one layer

Each loss is a sum over the items, tokens or texts of a batch, divided by their number in the whole optimiser step. If
the student has another width, a linear layer maps its hidden states to the teacher's width; it is trained but not
saved.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..config import BertConfig
from ..models.head import IGNORED, BertHead, at_least_float32
from ..packing import PackedBatch
from ..text.files import InputError
from . import losses
from .logits import Classes

BY_TOKEN = {"hidden": losses.squared, "cosine": losses.cosine}
STATES = ("hidden", "cosine", "first", "embeddings")
RELATIONS = ("minilm", "minilm2")
_LAYER = re.compile(r"bert\.encoder\.layer\.(\d+)\.(.*)")
LOSSES = ("labels", "logits", *STATES, "attention", *RELATIONS)


@dataclass(frozen=True)
class Recipe:
    """The losses of a student.

    Attributes:
        weights: name of a loss -> its weight.
        temperature: of the loss `logits`.
        pairs: (layer of the student, layer of the teacher), from 0, for hidden, cosine, first and attention.
        relation_pair: the pair of layers for minilm and minilm2.
        relation_heads: the number of heads that minilm2 splits the width into.
    """

    weights: dict[str, float]
    temperature: float
    pairs: tuple[tuple[int, int], ...]
    relation_pair: tuple[int, int]
    relation_heads: int

    def projected(self) -> list[tuple[int, int]]:
        """The pairs of layers whose queries, keys and values are compared."""
        pairs = list(self.pairs) if "attention" in self.weights else []
        return pairs + ([self.relation_pair] if any(name in self.weights for name in RELATIONS) else [])

    def reaches(self, name: str) -> bool:
        """Whether a parameter of the student, given by its name, changes one of the losses. The other parameters are
        not trained, since weight decay would only make them smaller."""
        weights, layer = self.weights, _LAYER.match(name)
        if "labels" in weights or "logits" in weights or name.startswith("bert.embeddings."):
            return True
        if layer is None:
            return False
        number, place = int(layer[1]), layer[2]
        compared = [s for s, _ in self.pairs]
        whole = max(compared) if any(n in weights for n in ("hidden", "cosine", "first")) else -1
        looked_at = {"attention": (compared, ("query", "key"))}
        looked_at |= {name: ([self.relation_pair[0]], ("query", "key", "value")) for name in RELATIONS}
        for loss, (layers, parts) in looked_at.items():
            if loss in weights:
                whole = max(whole, max(layers) - 1)
                if number in layers and place.startswith(tuple(f"attention.self.{part}." for part in parts)):
                    return True
        return number <= whole

    def expect_fit(self, student: BertConfig, teacher: BertConfig) -> None:
        """Raises: InputError if these losses cannot compare the two."""
        for whose, config, layers in zip(
            ("student", "teacher"), (student, teacher), zip(*self.projected(), strict=True), strict=False
        ):
            for layer in layers:
                if not config.heads_of(layer):
                    raise InputError(
                        f"attention and relations need heads, and the {whose}'s layer {layer} has none: choose other "
                        "layers"
                    )
        for name, pairs in (("attention", self.pairs), ("minilm", (self.relation_pair,))):
            for s, t in pairs if name in self.weights else ():
                if student.heads_of(s) != teacher.heads_of(t):
                    raise InputError(
                        f"{name} compares heads one by one: the student's layer {s} has {student.heads_of(s)}, the "
                        f"teacher's layer {t} {teacher.heads_of(t)}; minilm2 takes any number"
                    )
        if "minilm2" in self.weights:
            for whose, config, layer in zip(
                ("student", "teacher"), (student, teacher), self.relation_pair, strict=True
            ):
                width = config.heads_of(layer) * config.head_dim
                if width % self.relation_heads:
                    raise InputError(
                        f"minilm2 cuts queries, keys and values into {self.relation_heads} heads, and those of the "
                        f"{whose}'s layer {layer} are {width} wide: --relation-heads must divide it"
                    )


class Divisor(NamedTuple):
    """The divisors of the losses in a step: its labelled items, rows of logits, tokens, and texts."""

    labels: float
    rows: float
    tokens: float
    texts: float


class Activations(NamedTuple):
    """The activations of a model for a batch: its output, and query, key and value [T, H, D] of some layers."""

    output: Any
    projected: dict[int, tuple[Tensor, Tensor, Tensor]]


class Distilled(nn.Module):
    """The trained module: a student, and projections to its teacher's width. Called without a `divisor` it is the
    student.

    Args:
        teacher: not trained, and not part of the `state_dict`.
    """

    PARTS: ClassVar[tuple[str, ...]]

    def __init__(self, student: BertHead, teacher: BertHead, recipe: Recipe) -> None:
        super().__init__()
        self.student, self.recipe = student, recipe
        self._beside = (teacher.requires_grad_(False).eval(),)  # in a tuple, so that it is not a submodule
        self.PARTS = tuple(f"{name}_loss" for name in recipe.weights)
        widths = student.config.hidden_size, teacher.config.hidden_size
        self.projections = nn.ModuleDict()
        for name, needed_by in (("states", ("hidden", "cosine", "first")), ("embeddings", ("embeddings",))):
            if widths[0] != widths[1] and any(loss in recipe.weights for loss in needed_by):
                self.projections[name] = nn.Linear(*widths, dtype=student.dtype, device=student.device)
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(recipe.reaches(name))

    @property
    def teacher(self) -> BertHead:
        return self._beside[0]

    def forward(self, batch: PackedBatch, divisor: Divisor | None = None, **arguments: Any) -> Any:
        """(the total loss, then the losses of PARTS). arguments: those of `sums`."""
        if divisor is None:
            return self.student(batch, **arguments)
        sums = self.sums(batch, divisor, **arguments)
        parts = [sums[name] for name in self.recipe.weights]
        total = torch.stack([part * w for part, w in zip(parts, self.recipe.weights.values(), strict=True)]).sum()
        return total, *parts

    def sums(self, batch: PackedBatch, divisor: Divisor, **arguments: Any) -> dict[str, Tensor]:
        """name -> loss of the batch, divided by the step's divisor."""
        raise NotImplementedError

    # ---- one pass of each --------------------------------------------------------------------------------

    def activations(
        self, batch: PackedBatch, labels: dict[str, Any], states: bool = False, **options: Any
    ) -> tuple[Activations, Activations | None]:  # fmt: skip
        """The activations of the student and of the teacher; None for the teacher if `labels` is the only loss.

        labels: arguments of the student's head. states: whether hidden states are needed besides those of the recipe.
        options: arguments of both heads.
        """
        options["output_hidden_states"] = states or any(name in self.recipe.weights for name in STATES)
        pairs = self.recipe.projected()
        student = self._through(self.student, [s for s, _ in pairs], batch, **options, **labels)
        if list(self.recipe.weights) == ["labels"]:
            return student, None
        with torch.no_grad():
            return student, self._through(self.teacher, [t for _, t in pairs], batch, **options)

    @staticmethod
    def _through(model: BertHead, layers: Sequence[int], batch: PackedBatch, **arguments: Any) -> Activations:
        with projections_of(model, layers) as projected:
            output = model(batch, output_attentions=False, return_dict=True, **arguments)
        heads = {layer: model.config.heads_of(layer) for layer in layers}
        return Activations(output, {
            layer: tuple(qkv.unflatten(-1, (3, heads[layer], -1)).unbind(1)) for layer, qkv in projected.items()
        })  # fmt: skip

    # ---- losses of hidden states and of attention --------------------------------------------------------

    def inner(
        self, student: Activations, teacher: Activations, batch: PackedBatch, divisor: Divisor
    ) -> dict[str, Tensor]:
        """The losses of hidden states and of attention in the recipe."""
        recipe, found = self.recipe, {}
        if any(name in recipe.weights for name in STATES):
            found |= self._of_states(student.output.hidden_states, teacher.output.hidden_states, batch, divisor)
        if "attention" in recipe.weights:
            sums = [
                losses.pairwise(*student.projected[s][:2], teacher.projected[t][:2], batch.lengths, "scores")
                for s, t in recipe.pairs
            ]
            found["attention"] = torch.stack(sums).sum() / (len(recipe.pairs) * divisor.tokens)
        if any(name in recipe.weights for name in RELATIONS):
            s, t = recipe.relation_pair
            found |= self._of_relations(student.projected[s], teacher.projected[t], batch, divisor)
        return found

    def _of_relations(
        self, own: Sequence[Tensor], given: Sequence[Tensor], batch: PackedBatch, divisor: Divisor
    ) -> dict[str, Tensor]:
        """own, given: query, key and value [T, H, D] of a layer of the student and of the teacher."""
        found = {}

        def related(a: Tensor, b: Tensor, teacher: tuple[Tensor, Tensor]) -> Tensor:
            return losses.pairwise(a, b, teacher, batch.lengths, "relations") / divisor.tokens

        if "minilm" in self.recipe.weights:
            (q, k, v), (teacher_q, teacher_k, teacher_v) = own, given
            found["minilm"] = related(q, k, (teacher_q, teacher_k)) + related(v, v, (teacher_v, teacher_v))
        if "minilm2" in self.recipe.weights:
            heads = self.recipe.relation_heads
            cut = [[x.flatten(1).unflatten(1, (heads, -1)) for x in qkv] for qkv in (own, given)]
            found["minilm2"] = torch.stack([related(a, a, (b, b)) for a, b in zip(*cut, strict=True)]).sum()
        return found

    def _of_states(
        self, own: Sequence[Tensor], given: Sequence[Tensor], batch: PackedBatch, divisor: Divisor
    ) -> dict[str, Tensor]:
        """own, given: the outputs [T, C] of the embeddings and of each layer, of the student and of the teacher."""
        weights, pairs, found = self.recipe.weights, self.recipe.pairs, {}
        project = self.projections["states"] if "states" in self.projections else nn.Identity()
        if any(name in weights for name in ("hidden", "cosine", "first")):
            states = [(project(at_least_float32(own[s + 1])), given[t + 1]) for s, t in pairs]
        for name, distance in BY_TOKEN.items():
            if name in weights:
                found[name] = torch.stack([distance(x, y) for x, y in states]).sum() / (len(pairs) * divisor.tokens)
        if "first" in weights:
            rows = batch.first_tokens
            sums = [losses.unit(x[rows], y[rows]) for x, y in states]
            found["first"] = torch.stack(sums).sum() / (len(pairs) * divisor.texts)
        if "embeddings" in weights:
            x = at_least_float32(own[0])
            x = self.projections["embeddings"](x) if "embeddings" in self.projections else x
            found["embeddings"] = losses.squared(x, given[0]) / divisor.tokens
        return found


class TaskDistilled(Distilled):
    """Distillation with a task's head. logits: the loss of its logits."""

    def __init__(self, student: BertHead, teacher: BertHead, recipe: Recipe, logits: Classes) -> None:
        super().__init__(student, teacher, recipe)
        self.logits = logits

    def sums(
        self, batch: PackedBatch, divisor: Divisor, places: Tensor | None = None, **labels: Tensor
    ) -> dict[str, Tensor]:  # fmt: skip
        """places: see `Classes.places`. labels: arguments of the student's head."""
        student, teacher = self.activations(batch, {**labels, "num_items_in_batch": divisor.labels})
        found = {"labels": student.output.loss} if "labels" in self.recipe.weights else {}
        if teacher is None:
            return found
        with without_autocast(batch):
            if "logits" in self.recipe.weights:
                loss = self.logits.loss(student.output, teacher.output, batch, places, self.recipe.temperature)
                found["logits"] = loss / divisor.rows
            return found | self.inner(student, teacher, batch, divisor)


class WordsDistilled(Distilled):
    """Distillation with masked words."""

    def sums(self, batch: PackedBatch, divisor: Divisor, labels: Tensor) -> dict[str, Tensor]:
        """labels: [T] int64, IGNORED at tokens that are not masked."""
        weights = self.recipe.weights
        guesses = {"labels": labels, "num_items_in_batch": divisor.labels} if "labels" in weights else {}
        student, teacher = self.activations(batch, guesses, states="logits" in weights, output_logits=False)
        found = {"labels": student.output.loss} if "labels" in weights else {}
        if teacher is None:
            return found
        if "logits" in weights:
            rows = (labels != IGNORED).nonzero().squeeze(1)
            sides = [
                (head.transformed(shown.output.hidden_states[-1][rows]), head.decoder.weight, head.decoder.bias)
                for shown, head in (
                    (student, self.student.cls["predictions"]),
                    (teacher, self.teacher.cls["predictions"]),
                )
            ]
            with without_autocast(batch):
                found["logits"] = losses.words(*sides[0], sides[1], self.recipe.temperature) / divisor.rows
        with without_autocast(batch):
            return found | self.inner(student, teacher, batch, divisor)


def without_autocast(batch: PackedBatch) -> torch.autocast:
    """A block without autocast, because differences of close numbers need full precision."""
    return torch.autocast(batch.cu_seqlens.device.type, enabled=False)


@contextmanager
def projections_of(model: BertHead, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """A block in which a forward pass fills a dict: layer -> query, key and value side by side, [T, 3A]."""
    found: dict[int, Tensor] = {}

    def note(module: nn.Module, inputs: Any, output: Tensor, layer: int) -> None:
        found[layer] = output

    with ExitStack() as hooks:
        for layer in {*layers}:
            attention = model.bert.encoder["layer"][layer].attention["self"]
            hooks.callback(attention.register_forward_hook(partial(note, layer=layer)).remove)
        yield found
