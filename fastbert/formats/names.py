"""Renames variables to transformers' names, by kinds of modules and families of names.

A family (they are in `families`) is a table of modules, (their name, our name, kind). "{n}" in a name stands for a
number. A kind lists the variables of a module, their names in transformers, and how each array is transposed:

    ("bert/encoder/layer_{n}/intermediate/dense", "bert.encoder.layer.{n}.intermediate.dense", LINEAR)
    .../kernel [in, out] -> ....weight [out, in];  .../bias [out] -> ....bias [out]

Our names are those of transformers' pre-training models, with the prefix "bert.", "albert." or "electra.".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ..storage import CheckpointError
from .variable import Variable


class Turn(NamedTuple):
    """How an array of a checkpoint becomes transformers' matrix or vector.

    Attributes:
        transposed: the checkpoint's array is [in, out], transformers' is [out, in].
        heads: the axis of the array that may count attention heads, or None. This axis and the next one, the width of a
            head, are joined.
    """

    transposed: bool = False
    heads: int | None = None

    def applies(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape has an axis of heads."""
        return self.heads is not None and len(shape) == (3 if self.transposed else 2)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in transformers."""
        if self.applies(shape):
            shape = (*shape[: self.heads], shape[self.heads] * shape[self.heads + 1], *shape[self.heads + 2 :])
        return shape[::-1] if self.transposed else shape

    def variable(self, name: str, theirs: Variable) -> Variable:
        """The variable under transformers' name and in its shape, read on access."""
        if not self.transposed and not self.applies(theirs.shape):
            return replace(theirs, name=name)
        shape = self.shape(theirs.shape)

        def read():
            if not self.transposed:
                return theirs.read().reshape(shape)
            return theirs.read().reshape(shape[::-1]).t().contiguous()

        return replace(theirs, name=name, shape=shape, read=read)


# A kind: ending of the checkpoint's name -> (ending of transformers' name, how to transpose the array)
Kind = dict[str, tuple[str, Turn]]

ARRAY: Kind = {"": ("", Turn())}
TABLE: Kind = {"": (".weight", Turn())}
LINEAR: Kind = {"/kernel": (".weight", Turn(transposed=True)), "/bias": (".bias", Turn())}
# [in, heads, width of a head] and [heads, width of a head, out] in newer frameworks
LINEAR_TO_HEADS: Kind = {
    "/kernel": (".weight", Turn(transposed=True, heads=1)),
    "/bias": (".bias", Turn(heads=0)),
}
LINEAR_FROM_HEADS: Kind = {"/kernel": (".weight", Turn(transposed=True, heads=0)), "/bias": (".bias", Turn())}
NORM: Kind = {"/gamma": (".weight", Turn()), "/beta": (".bias", Turn())}
EMBEDDING: Kind = {"/embeddings": (".weight", Turn())}
# keras-hub numbers the variables of a layer
KERAS_TABLE: Kind = {"/0": (".weight", Turn())}
KERAS_LINEAR: Kind = {"/0": (".weight", Turn(transposed=True)), "/1": (".bias", Turn())}
KERAS_LINEAR_TO_HEADS: Kind = {"/0": (".weight", Turn(transposed=True, heads=1)), "/1": (".bias", Turn(heads=0))}
KERAS_LINEAR_FROM_HEADS: Kind = {"/0": (".weight", Turn(transposed=True, heads=0)), "/1": (".bias", Turn())}
KERAS_NORM: Kind = {"/0": (".weight", Turn()), "/1": (".bias", Turn())}
# the same names as ours; Paddle's matrices are [in, out]
SAME: Kind = {".weight": (".weight", Turn()), ".bias": (".bias", Turn())}
PADDLE_LINEAR: Kind = {".weight": (".weight", Turn(transposed=True)), ".bias": (".bias", Turn())}

Module = tuple[str, str, Kind]


class Rule(NamedTuple):
    """One variable of a family, or one for each number in its name."""

    theirs: str
    ours: str
    turn: Turn


@dataclass(frozen=True)
class Family:
    """The names of one framework.

    Attributes:
        title: the family's name in messages.
        model_type: transformers' name of the architecture.
        anchor: a variable that every model of the family has. The text before it in a file is the scope, which is also
            the prefix of all other names.
        modules: the table.
        activation: what "gelu" means in this framework, in transformers' words.
        ending: the end of every variable's name.
        not_weights: further variables that are no weights, as in NOT_WEIGHTS.
        differs: (prefix of transformers' names, a sentence) for parts that the framework computes in another way than
            transformers.
    """

    title: str
    model_type: str
    anchor: str
    modules: tuple[Module, ...]
    activation: str
    ending: str = ""
    not_weights: tuple[tuple[str, str], ...] = ()
    differs: tuple[tuple[str, str], ...] = ()

    def rules(self) -> Iterator[Rule]:
        for theirs, ours, kind in self.modules:
            for their_ending, (our_ending, turn) in kind.items():
                yield Rule(theirs + their_ending, ours + our_ending, turn)


# Variables of a checkpoint that are no weights: (a pattern of names, why they are not read).
NOT_WEIGHTS = (
    (r"(^|/)(adam_[mv]|lamb_[mv]|Adam(_\d+)?|LAMB(_\d+)?|Momentum|RMSProp(_\d+)?|Adagrad)$", "optimiser state"),
    (r"(^|/)(optimizer|_optimizer)/|/\.OPTIMIZER_SLOT/", "optimiser state"),
    (r"(^|/)(beta[12]_power|loss_scale|current_loss_scale|good_steps|bad_steps)(/|$)", "optimiser state"),
    (r"(^|/)(global_step|save_counter|train_counter)(/|$)", "training counter"),
    (r"ExponentialMovingAverage|(^|/)(average|ema)$", "moving average of a weight"),
    (r"^_CHECKPOINTABLE_OBJECT_GRAPH$", "TensorFlow's description of its objects"),
    (r"(^|/)do_lower_case/", "a setting of the tokenizer"),
    (r"(^|\.)embeddings\.(position_ids|token_type_ids)$", "a buffer, not a weight"),
)


def pattern_of(template: str) -> re.Pattern[str]:
    """A pattern for the names that a template stands for; {n} matches a number, in the group n."""
    parts = re.split(r"\{(\w+)\}", template)
    return re.compile("".join(f"(?P<{part}>\\d+)" if i % 2 else re.escape(part) for i, part in enumerate(parts)))


class Named(NamedTuple):
    """The result of `assign`.

    Attributes:
        tensors: transformers' name -> the variable, under this name and in transformers' shape.
        used: the checkpoint's name -> transformers' name.
        skipped: the checkpoint's name -> why the variable is not read.
        heads: the different sizes of the axes of attention heads; empty if no array has such an axis.
    """

    tensors: dict[str, Variable]
    used: dict[str, str]
    skipped: dict[str, str]
    heads: set[int]


def assign(family: Family, variables: dict[str, Variable]) -> Named:
    """The checkpoint's variables under transformers' names. Raises CheckpointError on unknown and duplicate names."""
    anchor = family.anchor + family.ending
    scopes = {name.removesuffix(anchor) for name in variables if name == anchor or name.endswith("/" + anchor)}
    if len(scopes) > 1:
        listed = ", ".join(scope or "no scope" for scope in sorted(scopes))
        raise CheckpointError(f"it holds several models, in the scopes {listed}; one is expected")
    scope = next(iter(scopes), "")
    patterns = [(pattern_of(rule.theirs + family.ending), rule) for rule in family.rules()]
    named = Named({}, {}, {}, set())
    unknown = []
    for name, theirs in variables.items():
        others = (*NOT_WEIGHTS, *family.not_weights)
        reason = next((why for pattern, why in others if re.search(pattern, name)), None)
        if reason is not None:
            named.skipped[name] = reason
            continue
        plain = name.removeprefix(scope)
        match, rule = next(((m, rule) for pattern, rule in patterns if (m := pattern.fullmatch(plain))), (None, None))
        if match is None:
            unknown.append(name)
            continue
        ours = rule.ours.format(**match.groupdict())
        if ours in named.tensors:
            first = next(other for other, target in named.used.items() if target == ours)
            raise CheckpointError(f"both {first} and {name} become {ours}")
        if rule.turn.applies(theirs.shape):
            named.heads.add(theirs.shape[rule.turn.heads])
        named.tensors[ours] = rule.turn.variable(ours, theirs)
        named.used[name] = ours
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise CheckpointError(f"{family.title} has {len(unknown)} unknown variables: {', '.join(unknown[:5])}{more}")
    return named


_OLD_ENDINGS = ((".gamma", ".weight"), (".beta", ".bias"))
_TIED = ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight")


def assign_plain(model_type: str, variables: dict[str, Variable]) -> Named:
    """Variables that have transformers' names, or older spellings of them, as `assign` gives them.

    DataParallel's prefix "module." is removed, LayerNorm.gamma and beta become weight and bias, and an encoder that
    was saved alone gets its prefix. Raises: CheckpointError if two names become the same.
    """
    prefix = model_type + "."
    alone = not any(name.removeprefix("module.").startswith(prefix) for name in variables)
    named = Named({}, {}, {}, set())
    for name, theirs in variables.items():
        reason = next((why for pattern, why in NOT_WEIGHTS if re.search(pattern, name)), None)
        if reason is not None:
            named.skipped[name] = reason
            continue
        ours = name.removeprefix("module.")
        for old, new in _OLD_ENDINGS:
            if ours.endswith("LayerNorm" + old):
                ours = ours.removesuffix(old) + new
        if alone and ours.startswith(("embeddings.", "encoder.", "pooler.", "embeddings_project.")):
            ours = prefix + ours
        if ours in named.tensors:
            raise CheckpointError(f"{name} becomes {ours}, which already exists")
        named.tensors[ours] = Turn().variable(ours, theirs)
        named.used[name] = ours
    return named


def drop_tied(named: Named) -> None:
    """Drops the output matrix of the masked-word head if it equals the table of words, to which models tie it.

    Raises: CheckpointError if it is another matrix, or its bias differs from cls.predictions.bias.
    """
    for copy, original in (_TIED, ("cls.predictions.decoder.bias", "cls.predictions.bias")):
        if copy not in named.tensors or original not in named.tensors:
            continue
        if not torch.equal(named.tensors[copy].read(), named.tensors[original].read()):
            raise CheckpointError(f"{copy} differs from {original}, to which it is tied")
        theirs = next(name for name, ours in named.used.items() if ours == copy)
        del named.tensors[copy], named.used[theirs]
        named.skipped[theirs] = f"the same as {original}"
