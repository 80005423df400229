"""A narrower student out of a teacher's layers: each linear layer between a linear layer in and one out, as MobileBERT
(arXiv:2004.02984) has them around its blocks, here multiplied into one matrix.

A basis P [C, c] with orthonormal columns joins the teacher's hidden states y [C] and the student's x = Pᵀ y [c]: the
directions in which the teacher's hidden states of some texts are largest. Of a linear layer W of the teacher the
student has

    W P          from hidden states to heads, to the feed-forward block, to the pooler; of the rows that are kept
    Pᵀ W         back to hidden states; of the columns that are kept
    E P          of the embeddings E

Whole heads are kept, and those of them, and of the columns of the feed-forward block, whose weights in and out are
largest. A LayerNorm is not linear: the student's get the weight and bias that bring their output for these texts
nearest to Pᵀ y, one after another, since each changes what the next one sees.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..config import BertConfig
from ..models.head import BertHead
from ..packing import PackedBatch
from ..text.files import InputError

_NORM = re.compile(r"bert\..*LayerNorm")
_LAYER = re.compile(r"(?<=\.layer\.)\d+(?=\.)")


@torch.no_grad()
def fill_through_bottleneck(student: BertHead, teacher: BertHead, layers: list[int], texts: PackedBatch) -> None:
    """Gives a student weights, of the teacher's layer `layers[s]` for its layer s. Both are on one device.

    texts: what the basis and the LayerNorms are measured on.

    Raises: InputError where a size of the student is larger than the teacher's, or its heads have another width.
    """
    _expect_fit(student.config, teacher.config)
    outputs = _outputs_of_norms(teacher, texts)
    source = {name: _LAYER.sub(lambda number: str(layers[int(number[0])]), name) for name in _norms(student)}
    basis = _basis([outputs[name] for name in source.values()], student.config.hidden_size)
    state = _weights(student, teacher.state_dict(), layers, basis)
    student.load_state_dict(state)
    targets = {name: outputs[of_teacher] @ basis for name, of_teacher in source.items()}
    _fit_norms(student, targets, texts)


def _expect_fit(student: BertConfig, teacher: BertConfig) -> None:
    if student.head_dim != teacher.head_dim:
        raise InputError(
            f"a bottleneck keeps whole heads: the student's are {student.head_dim} wide, the teacher's "
            f"{teacher.head_dim}; --init new draws the weights"
        )
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings"):
        if getattr(student, name) > getattr(teacher, name):
            raise InputError(
                f"a bottleneck makes a student narrower, and its {name} is {getattr(student, name)}, the teacher's "
                f"{getattr(teacher, name)}; --init new draws the weights"
            )


def _norms(model: BertHead) -> dict[str, nn.LayerNorm]:
    return {name: module for name, module in model.named_modules() if _NORM.fullmatch(name)}


def _outputs_of_norms(model: BertHead, texts: PackedBatch) -> dict[str, Tensor]:
    """What each LayerNorm gives for the tokens of these texts, [T, C] by its name."""
    found: dict[str, Tensor] = {}

    def note(module: nn.Module, inputs: Any, output: Tensor, name: str) -> None:
        found[name] = output

    _run_with_hooks(model, texts, note)
    return found


def _run_with_hooks(model: BertHead, texts: PackedBatch, hook: Any) -> None:
    """A pass in which `hook(module, inputs, output, name)` is called after each LayerNorm."""
    hooks = [norm.register_forward_hook(partial(hook, name=name)) for name, norm in _norms(model).items()]
    try:
        # Hidden states are asked for so that the last layer computes all tokens.
        model.eval()(texts, output_hidden_states=True)
    finally:
        for each in hooks:
            each.remove()


def _basis(states: list[Tensor], width: int) -> Tensor:
    """[C, width]: of the second moment of all rows of the states [T, C], the eigenvectors of its largest values."""
    moments = sum(y.double().T @ y.double() for y in states)
    return torch.linalg.eigh(moments).eigenvectors[:, -width:].flip(1).to(states[0].dtype)


def _weights(student: BertHead, teacher: dict[str, Tensor], layers: list[int], basis: Tensor) -> dict[str, Tensor]:
    """The student's state_dict but for its LayerNorms, which stay as they are; that of a head for masked words, whose
    input is no hidden state, for good."""
    own = student.state_dict()
    kept: dict[str, Tensor] = {}  # a layer's part -> which rows of its weights are kept
    for s, t in enumerate(layers):
        of_layer = f"bert.encoder.layer.{t}."
        inside = own[f"bert.encoder.layer.{s}.attention.self.query.weight"].shape[0]
        kept[f"{s}.heads"] = _largest_heads(teacher, of_layer, inside, student.config.head_dim)
        size = teacher[f"{of_layer}intermediate.dense.weight"].norm(dim=1) * teacher[
            f"{of_layer}output.dense.weight"
        ].norm(dim=0)
        kept[f"{s}.columns"] = _largest(size, student.config.intermediate_size)
    has_pooler = "bert.pooler.dense.weight" in own
    if has_pooler:
        kept["pooled"] = _largest(teacher["classifier.weight"].norm(dim=0), student.config.hidden_size)
    for name, t in own.items():
        number = _LAYER.search(name)
        old = teacher[_LAYER.sub(str(layers[int(number[0])]), name) if number else name]
        s = number[0] if number else ""
        if "LayerNorm" in name:
            continue
        if "embeddings" in name:
            new = old[: t.shape[0]] @ basis
        elif ".attention.self." in name:
            new = _rows(old, kept[f"{s}.heads"], basis)
        elif ".intermediate." in name:
            new = _rows(old, kept[f"{s}.columns"], basis)
        elif ".layer." in name:
            new = _back(old, kept[f"{s}.heads" if ".attention." in name else f"{s}.columns"], basis)
        elif name.startswith("bert.pooler."):
            new = _rows(old, kept["pooled"], basis)
        elif name.startswith("cls.predictions.transform."):
            new = basis.T @ old @ basis if old.dim() == 2 else basis.T @ old
        elif old.dim() == 1:  # as many as there are labels or words
            new = old
        else:
            new = old[:, kept["pooled"]] if has_pooler else old @ basis
        own[name] = new
    return own


def _rows(t: Tensor, rows: Tensor, basis: Tensor) -> Tensor:
    """Of a layer that reads hidden states."""
    return t[rows] @ basis if t.dim() == 2 else t[rows]


def _back(t: Tensor, columns: Tensor, basis: Tensor) -> Tensor:
    """Of a layer that gives hidden states."""
    return basis.T @ t[:, columns] if t.dim() == 2 else basis.T @ t


def _largest_heads(teacher: dict[str, Tensor], of_layer: str, inside: int, head_dim: int) -> Tensor:
    """The rows of query, key and value that are kept."""
    value, out = teacher[f"{of_layer}attention.self.value.weight"], teacher[f"{of_layer}attention.output.dense.weight"]
    if inside > value.shape[0]:
        raise InputError(f"the student has more heads than the teacher's {of_layer.removeprefix('bert.encoder.')[:-1]}")
    by_head = value.unflatten(0, (-1, head_dim)).flatten(1).norm(dim=1) * out.unflatten(1, (-1, head_dim)).transpose(
        0, 1
    ).flatten(1).norm(dim=1)
    heads = _largest(by_head, inside // head_dim)
    return (heads[:, None] * head_dim + torch.arange(head_dim, dtype=torch.int64, device=heads.device)).flatten()


def _largest(size: Tensor, count: int) -> Tensor:
    """The places of the `count` largest, in order."""
    return size.topk(count).indices.sort().values


def _fit_norms(student: BertHead, targets: dict[str, Tensor], texts: PackedBatch) -> None:
    """Sets each LayerNorm's weight and bias, in the order in which a pass comes to them, by least squares for each
    number: target = weight * normalised input + bias."""

    def fit(module: nn.LayerNorm, inputs: tuple[Tensor], output: Tensor, name: str) -> Tensor:
        x = nn.functional.layer_norm(inputs[0], inputs[0].shape[-1:], eps=module.eps)
        y = targets[name]
        mean_x, mean_y = x.mean(0), y.mean(0)
        spread = (x - mean_x).square().mean(0).clamp_min(1e-6)
        module.weight.copy_(((x - mean_x) * (y - mean_y)).mean(0) / spread)
        module.bias.copy_(mean_y - module.weight * mean_x)
        return x * module.weight + module.bias

    _run_with_hooks(student, texts, fit)
