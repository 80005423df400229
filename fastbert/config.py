"""The numbers of a BERT, under transformers' names, read from and written to its config.json."""

from __future__ import annotations

import copy
import os
from dataclasses import InitVar, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from ._moved import renamed
from .formats import Model, open_model, opened
from .formats.sentence_folder import folder_of_config
from .storage import CheckpointError, make_folder, read_json, write_json

# transformers' name -> the operators': several names there are one function.
HIDDEN_ACTS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
__getattr__ = renamed(__name__)

# Each label of a classifier has a name, which takes memory before any weight is looked at.
MOST_LABELS = 10_000_000

# What a config.json may leave out, and transformers leaves out where it says nothing new.
_WRITTEN_WHERE_SET = {
    "architectures": None,
    "dtype": None,
    "problem_type": None,
    "output_hidden_states": False,
    "output_attentions": False,
    "return_dict": True,
    "tie_word_embeddings": True,
    "pruned_heads": None,
    "is_decoder": False,
    "add_cross_attention": False,
}


@dataclass
class BertConfig:
    """Sizes and rates of a BERT encoder; the defaults are BERT-base, uncased (Devlin et al., arXiv:1810.04805).

    Fields are transformers' own. Also:
        num_labels: the width of a classifier; stands for id2label with names LABEL_0, LABEL_1, ...
        pruned_heads: of a layer, which of its heads are gone; the layer's weights are so much smaller. One layer may
            have lost all of them, not every layer.
        dtype: name of the dtype of the saved weights ("bfloat16"); config.json spells it torch_dtype or dtype.
        extra: what else the config.json held; written back untouched.

    Raises: ValueError on numbers that make no BERT, and on variants of BERT that this one is not.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    classifier_dropout: float | None = None
    position_embedding_type: str = "absolute"
    tie_word_embeddings: bool = True
    is_decoder: bool = False
    add_cross_attention: bool = False
    output_hidden_states: bool = False
    output_attentions: bool = False
    return_dict: bool = True
    architectures: list[str] | None = None
    dtype: str | None = None
    problem_type: str | None = None
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    if TYPE_CHECKING:
        num_labels: int = 2
    else:  # an argument of the constructor, and a property of the object, which is set below
        num_labels: InitVar[int | None] = None
    pruned_heads: dict[int, list[int]] | None = None

    def __post_init__(self, num_labels: int | None) -> None:  # type: ignore[override]
        if self.dtype is not None:
            self.dtype = str(self.dtype).removeprefix("torch.")
        if self.hidden_act == "gelu_tanh":
            self.hidden_act = "gelu_pytorch_tanh"  # the name that transformers reads
        if self.id2label is None:
            self.num_labels = 2 if num_labels is None else num_labels
        else:
            self.id2label = {int(index): label for index, label in self.id2label.items()}
            if self.label2id is None:
                self.label2id = {label: index for index, label in self.id2label.items()}
            if num_labels is not None and num_labels != len(self.id2label):
                raise ValueError(f"num_labels is {num_labels}, but id2label has {len(self.id2label)} entries")
        self._validate()

    def _validate(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size",
                     "max_position_embeddings", "type_vocab_size"):  # fmt: skip
            _expect(_is_int(getattr(self, name)) and getattr(self, name) > 0, name, "a positive integer", self)
        _expect(_is_int(self.num_hidden_layers) and self.num_hidden_layers >= 0, "num_hidden_layers", "0 or more", self)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} "
                f"and {self.num_attention_heads}"
            )
        known = isinstance(self.hidden_act, str) and self.hidden_act in HIDDEN_ACTS
        _expect(known, "hidden_act", f"one of {', '.join(HIDDEN_ACTS)}", self)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            _expect(_is_number(getattr(self, name)) and 0 <= getattr(self, name) < 1, name, "in [0, 1)", self)
        rate = self.classifier_dropout
        _expect(rate is None or (_is_number(rate) and 0 <= rate < 1), "classifier_dropout", "None or in [0, 1)", self)
        eps, spread = self.layer_norm_eps, self.initializer_range
        _expect(_is_number(eps) and 0 < eps < float("inf"), "layer_norm_eps", "positive and finite", self)
        _expect(_is_number(spread) and 0 <= spread < float("inf"), "initializer_range", "0 or more and finite", self)
        pad = self.pad_token_id
        _expect(
            pad is None or (_is_int(pad) and 0 <= pad < self.vocab_size),
            "pad_token_id", f"None or in [0, {self.vocab_size}), the vocabulary", self,
        )  # fmt: skip
        _expect(
            self.position_embedding_type == "absolute",
            "position_embedding_type", '"absolute" (relative positions are not supported)', self,
        )  # fmt: skip
        if self.pruned_heads is not None:
            self.pruned_heads = _checked_pruning(self.pruned_heads, self)
        for name in ("is_decoder", "add_cross_attention"):
            _expect(not getattr(self, name), name, "false (this BERT is an encoder)", self)

    @property
    def activation(self) -> str:
        """hidden_act under the name that `fastbert.functional` knows it by."""
        return HIDDEN_ACTS[self.hidden_act]

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def heads_of(self, layer: int) -> int:
        """How many attention heads a layer has, the pruned ones not counted."""
        return self.num_attention_heads - len((self.pruned_heads or {}).get(layer, ()))

    @property
    def torch_dtype(self) -> str | None:
        """transformers' older name for `dtype`."""
        return self.dtype

    @classmethod
    def base(cls, **changes: Any) -> BertConfig:
        """BERT-base: 12 layers of 768, 110 million parameters."""
        return cls(**changes)

    @classmethod
    def large(cls, **changes: Any) -> BertConfig:
        """BERT-large: 24 layers of 1024, 340 million parameters."""
        sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
        return cls(**(sizes | changes))

    @classmethod
    def from_dict(cls, data: dict[str, Any], **changes: Any) -> BertConfig:
        """From the content of a config.json; `changes` win over it. Unknown fields go to `extra`."""
        model_type = data.get("model_type", "bert")
        if model_type != "bert":
            raise ValueError(f'model_type must be "bert", got {model_type!r}')
        known = {f.name for f in fields(cls)} - {"extra"}
        values = {name: value for name, value in data.items() if name in known}
        extra = {
            name: copy.deepcopy(value)
            for name, value in data.items()
            if name not in known and name not in ("model_type", "torch_dtype", "num_labels")
        }
        if values.get("dtype") is None:
            values["dtype"] = data.get("torch_dtype")
        changes = {"dtype" if name == "torch_dtype" else name: value for name, value in changes.items()}
        if "num_labels" in changes and "id2label" not in changes:
            if values.get("id2label") is None or len(values["id2label"]) != changes["num_labels"]:
                values["id2label"] = values["label2id"] = None
        elif values.get("id2label") is None:
            values["num_labels"] = data.get("num_labels")
        return cls(**(values | {"extra": extra} | changes))

    @classmethod
    def from_pretrained(cls, id_or_path: str | os.PathLike, **changes: Any) -> BertConfig:
        """From the config.json of a model's folder, or of a hub id; of other formats, what `fastbert.formats` makes.

        Raises: CheckpointError, in one line.
        """
        with opened(id_or_path) as path:
            model = open_model(path)
            if model is not None:
                return cls.from_model(model, **changes)
            path = folder_of_config(path) / "config.json"
            data = read_json(path)
            try:
                return cls.from_dict(data, **changes)
            except ValueError as error:
                raise CheckpointError(f"{path}: {error}") from error

    @classmethod
    def from_model(cls, model: Model, **changes: Any) -> BertConfig:
        """Of a model in another framework's format. Raises CheckpointError."""
        try:
            return cls.from_dict(model.config, **changes)
        except ValueError as error:
            raise CheckpointError(f"{model.source.path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """What goes into config.json; transformers reads it, and `from_dict` gives this config back."""
        data = {f.name: copy.deepcopy(getattr(self, f.name)) for f in fields(self)}
        data = data.pop("extra") | data | {"model_type": "bert"}
        for name, default in _WRITTEN_WHERE_SET.items():
            if data[name] == default:
                del data[name]
        if self.pruned_heads is not None:
            data["pruned_heads"] = {str(layer): heads for layer, heads in self.pruned_heads.items()}
        if self.dtype is not None:
            data["torch_dtype"] = self.dtype  # transformers before 4.56 reads only this spelling
        if self.id2label == _default_labels(2):  # what an absent id2label means
            del data["id2label"], data["label2id"]
        else:
            data["id2label"] = {str(index): label for index, label in self.id2label.items()}
        return data

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes config.json into the folder, which is made where it does not exist."""
        path = make_folder(folder) / "config.json"
        try:
            write_json(path, self.to_dict())
        except OSError as error:
            raise CheckpointError(str(error)) from error


def _get_num_labels(self: BertConfig) -> int:
    assert self.id2label is not None  # __post_init__ sets it
    return len(self.id2label)


def _set_num_labels(self: BertConfig, num_labels: int) -> None:
    if not _is_int(num_labels) or not 1 <= num_labels <= MOST_LABELS:
        raise ValueError(f"num_labels must be an integer from 1 to {MOST_LABELS:,}, got {num_labels!r}")
    if self.id2label is None or len(self.id2label) != num_labels:
        self.id2label = _default_labels(num_labels)
        self.label2id = {label: index for index, label in self.id2label.items()}


# Set here because inside the class the name already means the constructor's argument.
BertConfig.num_labels = property(  # type: ignore[assignment]
    _get_num_labels, _set_num_labels, doc="Number of labels, the length of id2label."
)


def _default_labels(num_labels: int) -> dict[int, str]:
    return {i: f"LABEL_{i}" for i in range(num_labels)}


def _checked_pruning(pruned: Any, config: BertConfig) -> dict[int, list[int]] | None:
    """pruned_heads with layers as numbers, None where no head is gone. Raises ValueError."""
    count = config.num_hidden_layers
    what = f"layers of {count} with some of their {config.num_attention_heads} heads, not all heads of all layers"
    _expect(isinstance(pruned, dict), "pruned_heads", what, config)
    checked = {}
    for layer, heads in pruned.items():
        known = str(layer).isdecimal() and int(layer) < count and isinstance(heads, (list, tuple))
        _expect(known and all(_is_int(h) and 0 <= h < config.num_attention_heads for h in heads),
                "pruned_heads", what, config)  # fmt: skip
        if heads:
            checked[int(layer)] = sorted(set(heads))
    gone = sum(map(len, checked.values()))
    _expect(not checked or gone < count * config.num_attention_heads, "pruned_heads", what, config)
    return checked or None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _expect(condition: bool, name: str, what: str, config: BertConfig) -> None:
    if not condition:
        raise ValueError(f"{name} must be {what}, got {getattr(config, name)!r}")
