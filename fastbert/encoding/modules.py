"""sentence-transformers' modules after BERT, on packed rows: poolings, Dense, LayerNorm, weighted layers, routes.

As in sentence-transformers, a module takes a dict of features, reads some of them and writes others.

    token_embeddings      [T, C], a row a token of the packed batch
    sentence_embedding    [B, C], a row a text
    all_layer_embeddings  of the embeddings and of each layer [T, C], for `WeightedLayerPooling`
    token_weights_sum     [B], from `WordWeights`
    batch                 the PackedBatch
    prompt_length         tokens of the prompt at the start of each text, [CLS] included; 0 without a prompt
    task                  "query", "document", or another name of a route; None without
    impl                  of `fastbert.functional`

Everything except the pooling of BERT's rows is computed in float32 or float64, whatever BERT's dtype. Parameters have
sentence-transformers' names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional as F
from ..packing import PackedBatch

TOKENS, VECTOR, LAYERS = "token_embeddings", "sentence_embedding", "all_layer_embeddings"

Features = dict[str, Any]


class Size(NamedTuple):
    """Size of a feature: one row for each "token" or "text", and the rows' width. (For LAYERS: the number of
    layers.)"""

    row: str
    width: int


Sizes = dict[str, Size]


def wide(x: Tensor) -> Tensor:
    """x in float32, or unchanged if it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class SentenceModule(nn.Module):
    """A step from BERT's output to vectors."""

    def forward(self, features: Features) -> None:
        """Changes the features."""
        raise NotImplementedError

    def check(self, sizes: Sizes) -> None:
        """Updates the sizes of the features as `forward` updates the features.

        Raises: ValueError if a feature is missing or has another size than this module needs.
        """
        raise NotImplementedError

    def _size(self, sizes: Sizes, name: str, *, row: str | None = None, width: int | None = None) -> Size:
        kind = type(self).__name__
        if name not in sizes:
            raise ValueError(f"{kind} reads {name!r}, which no module before it writes")
        found = sizes[name]
        if row is not None and found.row != row:
            raise ValueError(f"{kind} takes {name!r} with a row a {row}, and gets a row a {found.row}")
        if width is not None and found.width != width:
            raise ValueError(f"{kind} takes {name!r} {width} wide, and gets {found.width}")
        return found


Modules = Sequence[SentenceModule] | nn.ModuleList


# ---- pooling ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """The rows of tokens that are pooled.

    `x` [N, C] are the rows, `places` [N] their positions in their texts, from 0. `all` are (rows, cu_seqlens) including
    the prompt's tokens. `weights` [B, 1] are sums of `WordWeights`, or None.
    """

    x: Tensor
    cu_seqlens: Tensor
    places: Tensor
    all: tuple[Tensor, Tensor]
    weights: Tensor | None
    impl: F.Impl | None

    @cached_property
    def counts(self) -> Tensor:
        """[B, 1]: number of rows of each text."""
        return wide(self.cu_seqlens.diff()[:, None].to(self.x.dtype))

    def pool(self, mode: str) -> Tensor:
        return wide(F.pool(self.x, self.cu_seqlens, mode, impl=self.impl))

    def divisor(self) -> Tensor:
        """[B, 1]: divisor of a mean."""
        return self.counts.clamp(min=1) if self.weights is None else self.weights.clamp(min=1e-9)

    def sum(self, x: Tensor) -> Tensor:
        return wide(F.pool(x, self.cu_seqlens, "mean", impl=self.impl)) * self.counts


def _mean(rows: _Rows) -> Tensor:
    return rows.pool("mean") if rows.weights is None else rows.pool("mean") * rows.counts / rows.divisor()


def _mean_sqrt_len(rows: _Rows) -> Tensor:
    return rows.pool("mean") * rows.counts / rows.divisor().sqrt()


def _weighted_mean(rows: _Rows) -> Tensor:
    weights = wide(rows.x).new_tensor(1) + rows.places[:, None]
    divisor = rows.sum(weights).clamp(min=1e-9) if rows.weights is None else rows.divisor()
    return rows.sum(wide(rows.x) * weights) / divisor


def _first(rows: _Rows) -> Tensor:
    whole = F.pool(*rows.all, "cls", impl=rows.impl)
    return wide(whole) if rows.x is rows.all[0] else torch.where(rows.counts > 0, rows.pool("cls"), wide(whole))


def _last(rows: _Rows) -> Tensor:
    last = rows.cu_seqlens[1:].long().sub(1).clamp(min=0)
    if rows.x.shape[0] == 0:
        return wide(rows.x).new_zeros(len(last), rows.x.shape[1])
    return wide(rows.x[last]) * (rows.counts > 0)


def _max(rows: _Rows) -> Tensor:
    return rows.pool("max").masked_fill(rows.counts == 0, float("-inf"))


POOLINGS: dict[str, Callable[[_Rows], Tensor]] = {
    "mean": _mean,
    "cls": _first,
    "max": _max,
    "mean_sqrt_len_tokens": _mean_sqrt_len,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}


class Pooling(SentenceModule):
    """Pools the rows of a text's tokens to one vector; the vectors of several modes are put side by side.

    Args:
        modes: names of POOLINGS. weightedmean weights each token by its position in the text, from 1.
        include_prompt: whether a prompt's tokens are pooled too. If they are not and a text has no other tokens, then,
            as in sentence-transformers, `cls` is its first token, `max` is -inf, and the other modes are zero.
    """

    def __init__(self, modes: Sequence[str] = ("mean",), include_prompt: bool = True):
        super().__init__()
        if not modes or any(mode not in POOLINGS for mode in modes):
            raise ValueError(f"pooling must be one of {tuple(POOLINGS)}, got {' + '.join(map(repr, modes)) or 'none'}")
        self.modes, self.include_prompt = tuple(modes), include_prompt

    def forward(self, features: Features) -> None:
        rows = self._rows(features)
        vectors = [POOLINGS[mode](rows) for mode in self.modes]
        features[VECTOR] = torch.cat(vectors, dim=-1) if len(vectors) > 1 else vectors[0]

    def _rows(self, features: Features) -> _Rows:
        x, batch = features[TOKENS], features["batch"]
        skipped = 0 if self.include_prompt else features["prompt_length"]
        cu_seqlens, places, kept = batch.cu_seqlens, batch.positions, x
        if skipped:
            lengths = (cu_seqlens.diff() - skipped).clamp(min=0)
            cu_seqlens = torch.cat([cu_seqlens[:1], lengths.cumsum(0, dtype=torch.int32)])
            # The lengths are known on the host, so this does not wait for a GPU.
            count = sum(max(length - skipped, 0) for length in batch.lengths)
            indices = (places >= skipped).nonzero_static(size=count).squeeze(1)
            places, kept = places[indices], x[indices]
        sums = features.get("token_weights_sum")
        return _Rows(
            kept, cu_seqlens, places, (x, batch.cu_seqlens), None if sums is None else sums[:, None], features["impl"]
        )

    def check(self, sizes: Sizes) -> None:
        sizes[VECTOR] = Size("text", len(self.modes) * self._size(sizes, TOKENS, row="token").width)


# ---- on tokens -------------------------------------------------------------------------------------------


class WeightedLayerPooling(SentenceModule):
    """Replaces the rows of tokens by the weighted mean of the outputs of the layers from `layer_start` (0 is the
    embeddings). As in sentence-transformers, it does nothing if the folder does not request every layer's output.
    """

    def __init__(self, layer_start: int, layer_weights: Tensor):
        super().__init__()
        self.layer_start = layer_start
        self.layer_weights = nn.Parameter(wide(layer_weights), requires_grad=False)

    def forward(self, features: Features) -> None:
        if LAYERS not in features:
            return
        layers = features[LAYERS][self.layer_start :]
        total = sum(weight * wide(layer) for weight, layer in zip(self.layer_weights, layers, strict=True))
        features[TOKENS] = total / self.layer_weights.sum()

    def check(self, sizes: Sizes) -> None:
        if LAYERS not in sizes:
            return
        layers, weights = sizes[LAYERS].width, len(self.layer_weights)
        if self.layer_start < 0 or layers - self.layer_start != weights:
            raise ValueError(
                f"WeightedLayerPooling has {weights} weights for the layers from {self.layer_start} on, "
                f"and the model has {layers}, embeddings included"
            )
        self._size(sizes, TOKENS, row="token")


class WordWeights(SentenceModule):
    """Multiplies each token's row by the weight of its word; a mean after that divides by the sum of the weights.

    Args:
        weights: [words, 1].
    """

    def __init__(self, weights: Tensor):
        super().__init__()
        self.emb_layer = nn.Embedding.from_pretrained(wide(weights))

    def forward(self, features: Features) -> None:
        batch = features["batch"]
        weights = self.emb_layer(batch.input_ids)  # [T, 1]
        mean = F.pool(weights, batch.cu_seqlens, "mean", impl=features["impl"])
        features["token_weights_sum"] = mean[:, 0] * batch.cu_seqlens.diff()
        features[TOKENS] = wide(features[TOKENS]) * weights

    def check(self, sizes: Sizes) -> None:
        self._size(sizes, TOKENS, row="token")


# ---- on vectors, or on tokens ----------------------------------------------------------------------------


class Dense(SentenceModule):
    """activation(x @ weight.T + bias), plus the input with `use_residual`.

    Args:
        input_name, output_name: names of the features that are read and written.
        use_residual: add the input, multiplied by another matrix if the widths differ.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        activation: nn.Module,
        input_name: str = VECTOR,
        output_name: str = VECTOR,
        use_residual: bool = False,
    ):
        super().__init__()
        options = {"device": "cpu", "dtype": torch.float32}
        self.linear = nn.Linear(in_features, out_features, bias=bias, **options)
        self.activation_function, self.use_residual = activation, use_residual
        self.input_name, self.output_name = input_name, output_name
        if use_residual and in_features != out_features:
            self.residual = nn.Linear(in_features, out_features, bias=False, **options)

    def forward(self, features: Features) -> None:
        x = wide(features[self.input_name])
        y = self.activation_function(self.linear(x))
        if self.use_residual:
            y = y + (self.residual(x) if hasattr(self, "residual") else x)
        features[self.output_name] = y

    def check(self, sizes: Sizes) -> None:
        found = self._size(sizes, self.input_name, width=self.linear.in_features)
        sizes[self.output_name] = found._replace(width=self.linear.out_features)


class LayerNorm(SentenceModule):
    """torch's LayerNorm of vectors."""

    def __init__(self, dimension: int):
        super().__init__()
        self.norm = nn.LayerNorm(dimension, device="cpu", dtype=torch.float32)

    def forward(self, features: Features) -> None:
        features[VECTOR] = self.norm(wide(features[VECTOR]))

    def check(self, sizes: Sizes) -> None:
        self._size(sizes, VECTOR, width=self.norm.normalized_shape[0])


class Normalize(SentenceModule):
    """x divided by its L2 norm, computed in float32 or float64 whatever BERT's dtype."""

    def __init__(self, input_name: str = VECTOR, output_name: str = VECTOR):
        super().__init__()
        self.input_name, self.output_name = input_name, output_name

    def forward(self, features: Features) -> None:
        features[self.output_name] = nn.functional.normalize(wide(features[self.input_name]), dim=-1)

    def check(self, sizes: Sizes) -> None:
        sizes[self.output_name] = self._size(sizes, self.input_name)


class Truncate(SentenceModule):
    """Keeps the first `dimension` numbers of each vector."""

    def __init__(self, dimension: int):
        super().__init__()
        if dimension < 1:
            raise ValueError(f"truncate_dim must be at least 1, got {dimension}")
        self.dimension = dimension

    def forward(self, features: Features) -> None:
        features[VECTOR] = features[VECTOR][:, : self.dimension]

    def check(self, sizes: Sizes) -> None:
        found = self._size(sizes, VECTOR)
        sizes[VECTOR] = found._replace(width=min(self.dimension, found.width))


# ---- routes ----------------------------------------------------------------------------------------------


class Router(SentenceModule):
    """Several lists of modules, of which the task chooses one.

    Args:
        routes: name -> modules.
        default: the route of a call without a task; None makes such a call an error.
        mappings: (task or None for any, modality or None for any) -> name of a route. Inputs here are of modality text.
    """

    def __init__(
        self,
        routes: Mapping[str, Sequence[SentenceModule]],
        default: str | None = None,
        mappings: Mapping[tuple[str | None, Any], str] | None = None,
    ):
        super().__init__()
        self.routes = nn.ModuleDict({name: nn.ModuleList(modules) for name, modules in routes.items()})
        self.default, self.mappings = default, dict(mappings or {})
        for name in (*self.mappings.values(), *([] if default is None else [default])):
            if name not in self.routes:
                raise ValueError(f"Router has no route {name!r}; it has {', '.join(self.routes)}")

    def route(self, task: str | None) -> str:
        """The name of a task's route. Raises ValueError if the task has none."""
        for key in ((task, "text"), (task, None), (None, "text"), (None, None)):
            if key in self.mappings:
                return self.mappings[key]
        if task and task in self.routes:
            return task
        if "text" in self.routes:
            return "text"
        if task is not None or self.default is None:
            tasks = dict.fromkeys([*self.routes, *(of for of, _ in self.mappings if of)])
            asked = "no task" if task is None else f"task {task!r}"
            raise ValueError(f"{asked}: the model has no route for that; tasks are {', '.join(tasks)}")
        return self.default

    def forward(self, features: Features) -> None:
        for module in self.routes[self.route(features["task"])]:
            module(features)

    def check(self, sizes: Sizes) -> None:
        ends = {name: check_modules(modules, dict(sizes)) for name, modules in self.routes.items()}
        widths = {name: end[VECTOR].width if VECTOR in end else None for name, end in ends.items()}
        if len(set(widths.values())) > 1:
            listed = ", ".join(f"{name} {width}" for name, width in widths.items())
            raise ValueError(f"the routes of Router must make vectors of one width, and they make these: {listed}")
        same = set.intersection(*(set(end.items()) for end in ends.values()))
        sizes.clear()
        sizes.update(same)


def check_modules(modules: Modules, sizes: Sizes) -> Sizes:
    """The sizes after these modules. Raises ValueError if modules do not fit each other."""
    for module in modules:
        module.check(sizes)
    return sizes


def parts_of(modules: Modules, kind: type[SentenceModule]) -> list:
    """The modules of a class among these, also on the routes of a Router."""
    return [inner for module in modules for inner in module.modules() if isinstance(inner, kind)]


def is_normalised(modules: Modules) -> bool:
    """Whether every vector has length 1 after these modules."""
    last = modules[-1] if len(modules) else None
    if isinstance(last, Router):
        return all(map(is_normalised, last.routes.values()))
    return isinstance(last, Normalize) and last.output_name == VECTOR


def modes_of(modules: Modules) -> str:
    """Names of the poolings, joined by +; empty if there are none outside a Router."""
    return "+".join(mode for module in modules if isinstance(module, Pooling) for mode in module.modes)


def kinds_of(modules: Modules) -> list[str]:
    """The class names of these modules, for messages."""
    return [type(module).__name__ for module in modules]


def run_modules(modules: Modules, batch: PackedBatch, outputs: Mapping[str, Any], **others: Any) -> Tensor:
    """Runs the modules; returns the vectors [B, C]. outputs: BERT's outputs, by their names as features."""
    features = {**outputs, "batch": batch, **others}
    for module in modules:
        module(features)
    return features[VECTOR]
