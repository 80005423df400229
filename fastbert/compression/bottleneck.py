"""A narrower student from a teacher's layers. Like the bottlenecks around the blocks of MobileBERT (arXiv:2004.02984),
a linear map goes before and after each linear layer; here the three are multiplied into one matrix.

A basis P [C, c] with orthonormal columns maps the teacher's hidden states y [C] to the student's, x = Pᵀ y [c]. Its
columns are the directions in which the teacher's hidden states for some texts are largest. The student has

    W P          for a linear layer W that reads hidden states (query, key, value, intermediate, pooler), in kept rows
    Pᵀ W         for a linear layer W that computes hidden states, in kept columns
    E P          for the embeddings E

Heads are kept as a whole. The heads and the columns of the feed-forward block with the largest weights, in and out, are
kept. A LayerNorm is not linear: the student's LayerNorms get the weight and bias that bring their outputs for these
texts nearest to Pᵀ y. They are fitted one after another, since each one changes the input of the next.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
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
    """Sets a student's weights; its layer s comes from the teacher's layer `layers[s]`. Both are on one device.

    texts: the basis and the LayerNorms are fitted to them.

    Raises: InputError if a size of the student is larger than the teacher's, or if its heads have another width.
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
    """name of a LayerNorm -> its output [T, C] for the tokens of these texts."""
    found: dict[str, Tensor] = {}

    def note(module: nn.Module, inputs: Any, output: Tensor, name: str) -> None:
        found[name] = output

    _run_with_hooks(model, texts, note)
    return found


def _run_with_hooks(model: BertHead, texts: PackedBatch, hook: Any) -> None:
    """Runs a pass with `hook(module, inputs, output, name)` after each LayerNorm."""
    with ExitStack() as hooks:
        for name, norm in _norms(model).items():
            hooks.callback(norm.register_forward_hook(partial(hook, name=name)).remove)
        model.eval()(texts, output_hidden_states=True)  # with hidden states the last layer computes all tokens


def _basis(states: list[Tensor], width: int) -> Tensor:
    """[C, width]: the eigenvectors with the largest eigenvalues of the second moment of all rows of states [T, C]."""
    moments = sum(y.double().T @ y.double() for y in states)
    return torch.linalg.eigh(moments).eigenvectors[:, -width:].flip(1).to(states[0].dtype)


def _weights(student: BertHead, teacher: dict[str, Tensor], layers: list[int], basis: Tensor) -> dict[str, Tensor]:
    """The student's new state_dict. LayerNorms are not changed: `_fit_norms` fits all but the one of a head for masked
    words, whose input is not a hidden state."""
    own = student.state_dict()
    kept: dict[str, Tensor] = {}  # part of a layer -> the rows of its weights that are kept
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
        elif old.dim() == 1:  # the bias of the last linear layer, one number for each label or word
            new = old
        else:
            new = old[:, kept["pooled"]] if has_pooler else old @ basis
        own[name] = new
    return own


def _rows(t: Tensor, rows: Tensor, basis: Tensor) -> Tensor:
    """The weight or bias of a layer that reads hidden states."""
    return t[rows] @ basis if t.dim() == 2 else t[rows]


def _back(t: Tensor, columns: Tensor, basis: Tensor) -> Tensor:
    """The weight or bias of a layer that computes hidden states."""
    return basis.T @ t[:, columns] if t.dim() == 2 else basis.T @ t


def _largest_heads(teacher: dict[str, Tensor], of_layer: str, inside: int, head_dim: int) -> Tensor:
    """The kept rows of query, key and value."""
    value, out = teacher[f"{of_layer}attention.self.value.weight"], teacher[f"{of_layer}attention.output.dense.weight"]
    if inside > value.shape[0]:
        raise InputError(f"the student has more heads than the teacher's {of_layer.removeprefix('bert.encoder.')[:-1]}")
    by_head = value.unflatten(0, (-1, head_dim)).flatten(1).norm(dim=1) * out.unflatten(1, (-1, head_dim)).transpose(
        0, 1
    ).flatten(1).norm(dim=1)
    heads = _largest(by_head, inside // head_dim)
    return (heads[:, None] * head_dim + torch.arange(head_dim, dtype=torch.int64, device=heads.device)).flatten()


def _largest(size: Tensor, count: int) -> Tensor:
    """The indices of the `count` largest numbers, rising."""
    return size.topk(count).indices.sort().values


def _fit_norms(student: BertHead, targets: dict[str, Tensor], texts: PackedBatch) -> None:
    """Fits each LayerNorm's weight and bias, in the order of a pass, by least squares in each column:
    target = weight * normalised input + bias."""

    def fit(module: nn.LayerNorm, inputs: tuple[Tensor], output: Tensor, name: str) -> Tensor:
        x = nn.functional.layer_norm(inputs[0], inputs[0].shape[-1:], eps=module.eps)
        y = targets[name]
        mean_x, mean_y = x.mean(0), y.mean(0)
        spread = (x - mean_x).square().mean(0).clamp_min(1e-6)
        module.weight.copy_(((x - mean_x) * (y - mean_y)).mean(0) / spread)
        module.bias.copy_(mean_y - module.weight * mean_x)
        return x * module.weight + module.bias

    _run_with_hooks(student, texts, fit)
