"""accelerate and restore: give the known modules of a model another `forward`, and remove it again."""

from __future__ import annotations

import warnings

import torch.nn as nn

from .. import functional as F
from ..inference.graphs import Graphs, graphs_for
from . import sentence, torch_layers
from .encoder import EncoderForward
from .explain import explain
from .facts import Family
from .find import TORCH, family_of, is_bare, why_left, why_left_torch
from .forward import forward_of, remove_forwards
from .graphs import GraphedEncoderForward
from .heads import HeadForward, what_it_reads
from .layer import LayerForward
from .padding import POLICIES, Policy


def accelerate(
    model: nn.Module,
    *,
    impl: F.Impl | None = None,
    cuda_graphs: bool = False,
    padding: Policy = "auto",
    labelled_logits: bool = False,
) -> nn.Module:
    """Makes an existing model run on packed batches and fused operators, in place. Returns the same model.

        model = fastbert.accelerate(AutoModelForSequenceClassification.from_pretrained(...))

    Classes, parameters, state_dict and save_pretrained stay as they are, and the model trains as before. For the same
    inputs, all tensors that it returns or that hooks see equal the original's within rounding. If the fused code cannot
    do that for a call, the model's own code runs the call, and a warning gives the reason.

    Below heads of transformers that read the first column (sequence classification, multiple choice, next sentence),
    the last layer of a post-norm model computes first tokens only, unless the call returns hidden states or a hook sees
    them.

    On a CPU whose vendor library multiplies faster than our products, inference without gradients keeps a second copy
    of each layer's weights, laid out for that library (see `fastbert.prepack`), until `restore`.

    Args:
        model: a model of transformers (the encoders that docs/families.md lists as equal, BERT to ESM-2, with any head,
            and decoders for embedding or reranking texts, in calls that return no cache), a module of torch
            (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention), or any module that contains
            some, such as a model of sentence-transformers, whose `encode`, `predict` and `rank` then also sort texts by
            their number of tokens, and make batches by tokens.
        impl: which implementation every operator uses; None lets each device choose. See `fastbert.functional`.
        cuda_graphs: for transformers' encoders on a CUDA device: record the launches of a pass once for each bucket of
            total tokens (16 to 4,096, or more if the model is narrower than BERT-base), and replay them as one. For
            inference only: calls with gradients, labels for each token, hidden states, adapters, hooks or more tokens
            run without. The first call of a bucket waits for its recording. The 32 last used recordings are kept, in
            one pool of memory, until a parameter or a module changes. `explain` counts the calls by reason.
        padding: what an encoder returns at padding, where its mask is 0.
            "auto": the original's values, unless it is known that they are not read. They are not computed then, and
            zeros returned: below transformers' heads that read one column, language models that are given
            `logits_to_keep`, heads whose labels do not count at padding, and sentence-transformers' poolings by mask.
            An encoder that is accelerated by itself also returns zeros, with one warning, but computes all rows of a
            batch that masks other tokens than padding.
            "exact": always the original's values.
            "zero": a promise not to read them. Zeros, except for rows that a head's own code reads.
            The first column is always computed, except in decoders, where padding on the left sees no token.
            nn.TransformerEncoder returns zeros where torch's own does.
        labelled_logits: for masked language models that are called with labels: compute logits of the n labelled tokens
            only, about 15% of all. `logits` is then [1, n, vocabulary], in the order of the batch, in place of [batch,
            tokens, vocabulary]. The loss and its gradients stay the same. For training that does not read the logits.
            Counting the labels waits for the device once more.

    Raises: ValueError on an unknown impl or padding, and with cuda_graphs if the model is not on one CUDA device or
        holds no encoder of transformers. The model is unchanged then.
    """
    if impl is not None and impl not in F.IMPLS:
        raise ValueError(f"impl must be one of {F.IMPLS} or None, got {impl!r}")
    if padding not in POLICIES:
        raise ValueError(f"padding must be one of {POLICIES}, got {padding!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    graphs = _graphs_of(model, impl) if cuda_graphs else {}
    restore(model)
    for module in list(model.modules()):
        family = family_of(module)
        if family is not None and why_left(module, family) is None:
            _swap_encoder(module, family, impl, padding, is_bare(model, module, family.passes), graphs.get(module))
    for module in list(model.modules()):
        _swap_head(module, labelled_logits)
    _swap_torch(model, impl, padding, model, set())
    for module in list(model.modules()):
        _swap_sentence(module, padding)
    report = explain(model)
    if not report.replaced:
        warnings.warn(f"fastbert replaced nothing in this model\n{report}", stacklevel=2)
    return model


def _graphs_of(model: nn.Module, impl: F.Impl | None) -> dict[nn.Module, Graphs]:
    """Empty `Graphs` for each encoder that is going to be accelerated. Raises ValueError if it cannot be recorded."""
    encoders = [m for m in model.modules() if (family := family_of(m)) is not None and why_left(m, family) is None]
    if not encoders:
        raise ValueError("cuda_graphs=True expected an encoder of transformers in the model, found none that is known")
    return {encoder: graphs_for(encoder, impl) for encoder in encoders}


def restore(model: nn.Module) -> nn.Module:
    """Undoes `accelerate` in place: every module has its class's forward again. Returns the same model."""
    for module in model.modules():
        remove_forwards(module)
    return model


def _swap_encoder(
    encoder: nn.Module, family: Family, impl: F.Impl | None, padding: Policy, bare: bool, graphs: Graphs | None
) -> None:
    options = (encoder, family, impl, padding, bare)
    forward = EncoderForward(*options) if graphs is None else GraphedEncoderForward(*options, graphs=graphs)
    for layer in {id(layer): layer for _, layer in forward.layers()}.values():
        LayerForward(layer, family.layer).put()
    forward.put()


def _swap_head(head: nn.Module, labelled_logits: bool) -> None:
    """Known heads declare what they read of the encoder that they call."""
    if what_it_reads(head) is None or "forward" in head.__dict__:
        return
    for path, child in head.named_children():
        if isinstance(forward_of(child), EncoderForward):
            HeadForward(head, path, labelled_logits).put()


def _swap_sentence(model: nn.Module, padding: Policy) -> None:
    if sentence.is_pipeline(model) and "forward" not in model.__dict__:
        sentence.PooledForward(model).put()
    kind = sentence.model_kind(model)
    if kind is not None and sentence.why_left(model, kind) is None:
        sentence.BatchedMethod(model, kind, padding).put()


def _swap_torch(
    module: nn.Module, impl: F.Impl | None, padding: Policy, model: nn.Module, seen: set[nn.Module]
) -> None:
    """Replaces torch's modules, the outermost ones, whose `forward` stands for everything within. seen: the modules
    that were visited, since a module may hold one that holds it."""
    if module in seen:
        return
    seen.add(module)
    if isinstance(forward_of(module), EncoderForward):
        return
    if why_left_torch(module) is None:
        bare = is_bare(model, module)
        if isinstance(module, nn.TransformerEncoder):
            for layer in module.layers:
                torch_layers.TorchLayerForward(layer, impl, padding, bare).put()
        kind = next(kind for kind in TORCH if isinstance(module, kind))
        TORCH[kind](module, impl, padding, bare).put()
        return
    for child in module.children():
        _swap_torch(child, impl, padding, model, seen)
