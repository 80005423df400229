"""The weights of a BERT, an ALBERT and an ELECTRA with their shapes, under transformers' names.

A shape is written in letters that stand for numbers of the config: ("V", "C") is [vocab_size, hidden_size]. The same
table serves to compare a checkpoint with its config, and to find the numbers if there is no config.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..storage import CheckpointError
from .names import pattern_of
from .variable import Variable

Letters = tuple[str, ...]
Shapes = dict[str, Letters]

LETTERS = {
    "V": "vocab_size",
    "C": "hidden_size",
    "E": "embedding_size",
    "F": "intermediate_size",
    "P": "max_position_embeddings",
    "T": "type_vocab_size",
}
COUNTS = {"n": "num_hidden_layers", "g": "num_hidden_groups", "i": "inner_group_num"}
_ATTENTION_HEADS = "num_attention_heads"
_LABELS = "N"  # number of a classifier's labels, the same for all heads of a checkpoint
_HEADS = "A"  # width of all of a layer's attention heads: hidden_size, or less if heads are pruned


def _linear(name: str, to: str, of: str) -> Shapes:
    return {f"{name}.weight": (to, of), f"{name}.bias": (to,)}


def _norm(name: str, width: str) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _embeddings(prefix: str, width: str) -> Shapes:
    tables = {"word_embeddings": "V", "position_embeddings": "P", "token_type_embeddings": "T"}
    shapes: Shapes = {f"{prefix}embeddings.{name}.weight": (rows, width) for name, rows in tables.items()}
    return shapes | _norm(f"{prefix}embeddings.LayerNorm", width)


def _layers(prefix: str) -> Shapes:
    layer = prefix + "encoder.layer.{n}."
    shapes: Shapes = {}
    for name in ("query", "key", "value"):
        shapes |= _linear(f"{layer}attention.self.{name}", _HEADS, "C")
    return (
        shapes
        | {f"{layer}attention.output.dense.weight": ("C", _HEADS), f"{layer}attention.output.dense.bias": ("C",)}
        | _norm(f"{layer}attention.output.LayerNorm", "C")
        | _linear(f"{layer}intermediate.dense", "F", "C")
        | _linear(f"{layer}output.dense", "C", "F")
        | _norm(f"{layer}output.LayerNorm", "C")
    )


_ALBERT_LAYER = "albert.encoder.albert_layer_groups.{g}.albert_layers.{i}."


@dataclass(frozen=True)
class Architecture:
    """The weights of one of transformers' model types.

    Attributes:
        required: the encoder's weights, all of which a checkpoint must have.
        heads: weights of heads; of each head a checkpoint has all weights or none.
        classes: heads -> transformers' class of a model with these heads; the first match counts.
        optional: single weights that a checkpoint may have.
    """

    required: Shapes
    heads: dict[str, Shapes]
    classes: tuple[tuple[frozenset[str], str], ...]
    optional: Shapes = field(default_factory=dict)

    def shapes(self) -> Shapes:
        """Name -> shape, of every weight that a checkpoint can have."""
        shapes = dict(self.required)
        for head in self.heads.values():
            shapes |= head
        return shapes | self.optional

    def knows(self, name: str) -> bool:
        return any(pattern_of(template).fullmatch(name) for template in self.shapes())


BERT = Architecture(
    required=_embeddings("bert.", "C") | _layers("bert."),
    heads={
        "pooler": _linear("bert.pooler.dense", "C", "C"),
        "masked words": _linear("cls.predictions.transform.dense", "C", "C")
        | _norm("cls.predictions.transform.LayerNorm", "C")
        | {"cls.predictions.bias": ("V",)},
        "next sentence": _linear("cls.seq_relationship", "2", "C"),
        "classifier": _linear("classifier", _LABELS, "C"),
        "question answering": _linear("qa_outputs", "2", "C"),
    },
    classes=(
        (frozenset({"masked words", "next sentence"}), "BertForPreTraining"),
        (frozenset({"masked words"}), "BertForMaskedLM"),
        (frozenset({"next sentence"}), "BertForNextSentencePrediction"),
        (frozenset({"question answering"}), "BertForQuestionAnswering"),
        (frozenset({"classifier"}), "BertForSequenceClassification"),
        (frozenset(), "BertModel"),
    ),
    optional={"cls.predictions.decoder.weight": ("V", "C"), "cls.predictions.decoder.bias": ("V",)},
)

ALBERT = Architecture(
    required=_embeddings("albert.", "E")
    | _linear("albert.encoder.embedding_hidden_mapping_in", "C", "E")
    | {
        name: shape
        for part in ("query", "key", "value", "dense")
        for name, shape in _linear(f"{_ALBERT_LAYER}attention.{part}", "C", "C").items()
    }
    | _norm(f"{_ALBERT_LAYER}attention.LayerNorm", "C")
    | _linear(f"{_ALBERT_LAYER}ffn", "F", "C")
    | _linear(f"{_ALBERT_LAYER}ffn_output", "C", "F")
    | _norm(f"{_ALBERT_LAYER}full_layer_layer_norm", "C"),
    heads={
        "pooler": _linear("albert.pooler", "C", "C"),
        "masked words": _linear("predictions.dense", "E", "C")
        | _norm("predictions.LayerNorm", "E")
        | {"predictions.bias": ("V",)},
        "sentence order": _linear("sop_classifier.classifier", "2", "C"),
        "classifier": _linear("classifier", _LABELS, "C"),
    },
    classes=(
        (frozenset({"masked words", "sentence order"}), "AlbertForPreTraining"),
        (frozenset({"masked words"}), "AlbertForMaskedLM"),
        (frozenset({"classifier"}), "AlbertForSequenceClassification"),
        (frozenset(), "AlbertModel"),
    ),
)

ELECTRA = Architecture(
    required=_embeddings("electra.", "E") | _layers("electra."),
    heads={
        "projection of the embeddings": _linear("electra.embeddings_project", "C", "E"),
        "discriminator": _linear("discriminator_predictions.dense", "C", "C")
        | _linear("discriminator_predictions.dense_prediction", "1", "C"),
        "masked words": _linear("generator_predictions.dense", "E", "C")
        | _norm("generator_predictions.LayerNorm", "E")
        | {"generator_lm_head.bias": ("V",)},
    },
    classes=(
        (frozenset({"discriminator"}), "ElectraForPreTraining"),
        (frozenset({"masked words"}), "ElectraForMaskedLM"),
        (frozenset(), "ElectraModel"),
    ),
)

ARCHITECTURES = {"bert": BERT, "albert": ALBERT, "electra": ELECTRA}


@dataclass(frozen=True)
class Fit:
    """The result of `fit`: the config's numbers, the heads of the checkpoint, and the number of labels or None."""

    sizes: dict[str, int]
    heads: frozenset[str]
    labels: int | None


def fit(architecture: Architecture, tensors: dict[str, Variable], config: dict[str, Any]) -> Fit:
    """Compares weights with a config, and finds the numbers that the config lacks.

    Raises: CheckpointError that names missing weights, unknown weights, and wrong shapes.
    """
    _check_numbers(config)
    patterns = [(pattern_of(name), name, letters) for name, letters in architecture.shapes().items()]
    numbers: dict[str, tuple[int, str]] = {}  # letter -> (its number, the config or the weight that it is from)
    for letter, key in LETTERS.items():
        if config.get(key) is not None:
            numbers[letter] = config[key], f"the config's {key}"
    counts: dict[str, int] = {}
    there: set[str] = set()  # names with their counts left open
    for name, variable in tensors.items():
        match, template, letters = next(
            ((m, t, letters) for pattern, t, letters in patterns if (m := pattern.fullmatch(name))), (None, "", ())
        )
        if match is None:
            raise CheckpointError(f"it has an unknown weight, {name}")
        there.add(template)
        for count, number in match.groupdict().items():
            counts[count] = max(counts.get(count, 0), int(number) + 1)
        _check_shape(name, variable.shape, letters, numbers, config, match.groupdict())
    for count, number in counts.items():
        key = COUNTS[count]
        if config.get(key, number) != number:
            raise CheckpointError(f"it has {number} of what the config's {key} says are {config[key]}")
    heads = frozenset(title for title, head in architecture.heads.items() if there & head.keys())
    wanted = list(architecture.required)
    for title in heads:
        wanted += architecture.heads[title]
    missing = [name for template in wanted for name in _all_of(template, counts) if name not in tensors]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise CheckpointError(f"it lacks {len(missing)} weights: {', '.join(missing[:5])}{more}")
    sizes = {LETTERS[letter]: number for letter, (number, _) in numbers.items() if letter in LETTERS}
    sizes |= {COUNTS[count]: number for count, number in counts.items()}
    return Fit(sizes, heads, numbers[_LABELS][0] if _LABELS in numbers else None)


def _check_numbers(config: dict[str, Any]) -> None:
    for key in (*LETTERS.values(), *COUNTS.values(), _ATTENTION_HEADS):
        value = config.get(key)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise CheckpointError(f"its config's {key} must be a positive integer, got {value!r}")
    width, heads = config.get("hidden_size"), config.get(_ATTENTION_HEADS)
    if width and heads and width % heads:
        raise CheckpointError(f"its config's hidden_size {width} is no multiple of its {_ATTENTION_HEADS} {heads}")
    if config.get("pruned_heads") and not (width and heads):
        raise CheckpointError(f"its config has pruned_heads, but not hidden_size and {_ATTENTION_HEADS}")


def _check_shape(
    name: str,
    shape: tuple[int, ...],
    letters: Letters,
    numbers: dict[str, tuple[int, str]],
    config: dict[str, Any],
    indices: dict[str, str],
) -> None:
    if len(shape) != len(letters):
        raise CheckpointError(f"{name} is {list(shape)}, and has {len(letters)} axes here")
    for size, letter in zip(shape, letters, strict=True):
        if letter.isdecimal():
            wanted, who = int(letter), "this head"
        elif letter == _HEADS and (pruned := len(set((config.get("pruned_heads") or {}).get(indices["n"], ())))):
            heads = config[_ATTENTION_HEADS]
            wanted = config["hidden_size"] // heads * (heads - pruned)
            who = f"hidden_size with {pruned} of {heads} heads pruned"
        else:
            wanted, who = numbers.setdefault("C" if letter == _HEADS else letter, (size, name))
        if size != wanted:
            raise CheckpointError(f"{name} is {list(shape)}, but {who} says {wanted} where it has {size}")


def _all_of(template: str, counts: dict[str, int]) -> list[str]:
    """All names that a template with counts stands for."""
    names = [template]
    for count, number in counts.items():
        if f"{{{count}}}" in template:
            names = [name.replace(f"{{{count}}}", str(i)) for name in names for i in range(number)]
    return names
