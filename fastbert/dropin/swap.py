"""accelerate and restore: find what is known in a model, give it another `forward`, take it away again."""

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
from .forward import Forward
from .graphs import GraphedEncoderForward
from .heads import HeadForward, kind_of
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
    """Makes a model somebody already has run packed, on fused operators, in place.

        model = fastbert.accelerate(AutoModelForSequenceClassification.from_pretrained(...))

    Classes, parameters, state_dict and save_pretrained stay as they are, and it trains as before. The rule: it gives
    the original's numbers for the original's inputs, within rounding, on every tensor that it returns and to everything
    that listens; a call for which the fused code cannot do that runs the model's own, with a warning that says why.

    Below heads of transformers that read the first column (classifiers of sequences, multiple choice, next sentence)
    the last layer of a post-norm model computes first tokens alone, if the call returns no states and nobody listens.

    Evaluating without gradients on a CPU whose vendor library is ahead of our products multiplies from copies of the
    layers' weights, laid out as it wants them (`fastbert.prepack`): they are held twice, until `restore`. Changes are
    noticed as `prepack` says.

    Args:
        model: of transformers (the encoders that docs/families.md lists as equal, BERT to ESM-2, with any head, and
            decoders that texts are embedded or reranked with, in calls that return no cache), of
            torch (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention), or any module that
            contains some, as sentence-transformers' do; their `encode`, `predict` and `rank` then also make batches of
            tokens, sorted by the texts' lengths in tokens.
        impl: which implementation every operator uses; None lets each device choose. See `fastbert.functional`.
        cuda_graphs: of transformers' encoders on a CUDA device, record the launches of a pass once for each bucket of
            total tokens, 16 to 4,096 of them (more where the model is narrower than BERT-base), and replay them as one.
            For inference: calls with gradients on, with labels a token, with hidden states, adapters or hooks, and
            larger batches, run as without. A recording is
            dropped when a parameter or a module changes; the 32 used last are kept, in one pool of memory. The first
            call of a bucket waits for its recording. `explain` counts the calls, with reasons.
        padding: what an encoder returns at padding, where its mask is 0.
            "auto": what the original returns, unless it is known that nobody looks: zeros, not computed at all, below
            transformers' heads that read the first column, or whose labels do not count there, and below
            sentence-transformers' poolings by mask. An encoder that is accelerated by itself also gives zeros, and says
            so once in a warning, but computes all rows of a batch where a masked token is none of padding.
            "exact": always what the original returns.
            "zero": the caller does not look. Zeros wherever the code of a head does not look either.
            The first column is always computed, but of decoders, whose padding on the left sees no token.
            nn.TransformerEncoder gives zeros where torch's own gives them.
        labelled_logits: of masked language models called with labels, compute logits of the n tokens that have one
            alone, some 15% of them: `logits` is then [1, n, vocabulary], in the order of the batch, where the original
            gives [batch, tokens, vocabulary]. The loss and its gradients stay as they are. For training, where nobody
            reads the logits; counting the labels waits for the device once more.

    Returns: the same model.
    Raises: ValueError on an unknown impl or padding; with cuda_graphs where the model is not on one CUDA device, or
        holds no encoder of transformers. The model is then as it was.
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
    _swap_torch(model, impl, padding, model)
    for module in list(model.modules()):
        _swap_sentence(module, padding)
    report = explain(model)
    if not report.replaced:
        warnings.warn(f"fastbert replaced nothing in this model\n{report}", stacklevel=2)
    return model


def _graphs_of(model: nn.Module, impl: F.Impl | None) -> dict[nn.Module, Graphs]:
    """Empty `Graphs` for each encoder that is going to be replaced. Raises ValueError where they cannot be."""
    encoders = [m for m in model.modules() if (family := family_of(m)) is not None and why_left(m, family) is None]
    if not encoders:
        raise ValueError("cuda_graphs=True expected an encoder of transformers in the model, found none that is known")
    return {encoder: graphs_for(encoder, impl) for encoder in encoders}


def restore(model: nn.Module) -> nn.Module:
    """Undoes `accelerate`, in place: every module has its own forward again. Returns the same model."""
    for module in model.modules():
        for forward in [value for value in module.__dict__.values() if isinstance(value, Forward)]:
            forward.remove()
    return model


def _swap_encoder(
    encoder: nn.Module, family: Family, impl: F.Impl | None, padding: Policy, bare: bool, graphs: Graphs | None
) -> None:
    forward = EncoderForward(encoder, family, impl, padding, bare)
    if graphs is not None:
        forward = GraphedEncoderForward(encoder, family, impl, padding, bare, graphs)
    for layer in {id(layer): layer for _, layer in forward.layers()}.values():
        LayerForward(layer, family.layer).put()
    forward.put()


def _swap_head(head: nn.Module, labelled_logits: bool) -> None:
    """Heads that are known say what they read of the encoder right below them."""
    if kind_of(head) is None or "forward" in head.__dict__:
        return
    for path, child in head.named_children():
        if isinstance(child.__dict__.get("forward"), EncoderForward):
            HeadForward(head, path, labelled_logits).put()


def _swap_sentence(model: nn.Module, padding: Policy) -> None:
    if sentence.is_pipeline(model) and "forward" not in model.__dict__:
        sentence.PooledForward(model).put()
    kind = sentence.kind_of(model)
    if kind is not None and sentence.why_left(model, kind) is None:
        sentence.BatchedMethod(model, kind, padding).put()


def _swap_torch(module: nn.Module, impl: F.Impl | None, padding: Policy, model: nn.Module) -> None:
    """torch's modules, the outermost of them: what is inside one that was replaced belongs to it."""
    if isinstance(module.__dict__.get("forward"), EncoderForward):
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
        _swap_torch(child, impl, padding, model)
