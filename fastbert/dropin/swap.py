"""accelerate, restore, explain: find what is known in a model, give it another `forward`, take it away again."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch.nn as nn

from .. import functional as F
from ..graphs import Graphs, graphs_for
from . import sentence, torch_layers
from .encoder import EncoderForward, HeadForward
from .facts import FAMILIES, FAMILIES_OF_4, Family
from .forward import Forward
from .graphs import GraphedEncoderForward
from .layer import LayerForward, not_plain
from .pieces import at, has, plain_table

# torch's modules and their forwards, outermost first
TORCH = {
    nn.TransformerEncoder: torch_layers.StackForward,
    nn.TransformerEncoderLayer: torch_layers.LayerForward,
    nn.MultiheadAttention: torch_layers.AttentionForward,
}


@dataclass
class Report:
    """What `explain` found: `replaced` and `left`, each {path: what}. Printed, one line each."""

    model: str
    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.replaced)} modules replaced, {len(self.left)} left alone"]
        for title, entries in (("replaced", self.replaced), ("left alone", self.left)):
            width = max(map(len, entries), default=0)
            lines += [f"{title}:", *(f"  {path:{width}}  {what}" for path, what in entries.items())] if entries else []
        return "\n".join(lines)


def accelerate(model: nn.Module, *, impl: F.Impl | None = None, cuda_graphs: bool = False) -> nn.Module:
    """Makes a model somebody already has run packed, on fused operators, in place.

        model = fastbert.accelerate(AutoModelForSequenceClassification.from_pretrained(...))

    Classes, parameters, state_dict and save_pretrained stay as they are, and it trains as before. Hidden states at
    padding are zero where nothing reads them (never in the first column, and not where a head's loss does). A call
    that asks for what the fused code cannot do runs the model's own, with a warning that says why, once.

    Evaluating without gradients on a CPU whose vendor library is ahead of our products multiplies from copies of the
    layers' weights, laid out as it wants them (`fastbert.prepack`): they are held twice, until `restore`. Changes are
    noticed as `prepack` says.

    Args:
        model: of transformers (BERT, RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT, ELECTRA, ALBERT, MPNet, ModernBERT,
            with any head), of torch (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention), or
            any module that contains some, as sentence-transformers' do; their `encode`, `predict` and `rank` then also
            make batches of tokens, sorted by the texts' lengths in tokens.
        impl: which implementation every operator uses; None lets each device choose. See `fastbert.functional`.
        cuda_graphs: of transformers' encoders on a CUDA device, record the launches of a pass once for each bucket of
            total tokens, 16 to 4,096 of them, and replay them as one. For inference: calls with gradients on, with
            labels a token, with hidden states, adapters or hooks, and larger batches, run as without. A recording is
            dropped when a parameter or a module changes; the 32 used last are kept, in one pool of memory. The first
            call of a bucket waits for its recording. `explain` counts the calls, with reasons.

    Returns: the same model.
    Raises: ValueError on an unknown impl; with cuda_graphs where the model is not on one CUDA device, or holds no
        encoder of transformers. The model is then as it was.
    """
    if impl is not None and impl not in F.IMPLS:
        raise ValueError(f"impl must be one of {F.IMPLS} or None, got {impl!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    graphs = _graphs_of(model, impl) if cuda_graphs else {}
    restore(model)
    for module in list(model.modules()):
        family = family_of(module)
        if family is not None and why_left(module, family) is None:
            _swap_encoder(module, family, impl, graphs.get(module))
    for module in list(model.modules()):
        _swap_head(module)
    _swap_torch(model, impl)
    for module in list(model.modules()):
        _swap_sentence(module)
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


def family_of(module: nn.Module) -> Family | None:
    """The facts of this very class, or of one it derives from without a forward of its own."""
    for cls in type(module).__mro__:
        if cls.__name__ in FAMILIES and cls.__module__.startswith("transformers.models."):
            import transformers

            families = FAMILIES_OF_4 if transformers.__version__.startswith("4.") else FAMILIES
            return families[cls.__name__] if type(module).forward is cls.forward else None
    return None


def why_left(encoder: nn.Module, family: Family) -> str | None:
    """Why an encoder of a known family cannot be replaced, or None."""
    if "forward" in encoder.__dict__ and not isinstance(encoder.__dict__["forward"], Forward):
        return "its forward was replaced already"
    config = encoder.config
    if getattr(config, "is_decoder", False):
        return "it is a decoder"
    if getattr(config, "position_embedding_type", "absolute") not in ("absolute", None):
        return f"its positions are {config.position_embedding_type}"
    paths = [family.layers, family.word, family.position, family.token_type, family.norm, family.dropout]
    own_tables = family.layer.rotary is not None  # every layer makes those of its rotation
    if own_tables and config._attn_implementation == "flash_attention_2":
        return "its flash_attention_2 runs packed already, and rotates in its own way"
    paths += [family.final_norm, "rotary_emb" if family.positions == "rotary" and not own_tables else None]
    for path in paths:
        if path is not None and not has(encoder, path):
            return f"this version of transformers has no {path} in it"
    facts = family.layer
    parts = (*facts.qkv, facts.head_dim, facts.probs_dropout, facts.out, facts.out_dropout, facts.out_norm, facts.up)
    parts += (facts.activation, facts.inner_dropout, facts.down, facts.down_dropout, facts.down_norm)
    parts += (facts.attention_type, facts.rotary)
    for _, layer in EncoderForward(encoder, family, None).layers():
        if facts.kind not in (cls.__name__ for cls in type(layer).__mro__):
            return f"a layer is a {type(layer).__name__}, not a {facts.kind}"
        if "forward" in layer.__dict__ and not isinstance(layer.__dict__["forward"], Forward):
            return f"the forward of a {type(layer).__name__} was replaced already"
        for path in parts:
            if path is not None and not has(layer, path):
                return f"this version of transformers has no {path} in a {facts.kind}"
    return None


def _swap_encoder(encoder: nn.Module, family: Family, impl: F.Impl | None, graphs: Graphs | None) -> None:
    forward = EncoderForward(encoder, family, impl)
    if graphs is not None:
        forward = GraphedEncoderForward(encoder, family, impl, graphs)
    for layer in {id(layer): layer for _, layer in forward.layers()}.values():
        LayerForward(layer, family.layer).put()
    forward.put()


def _swap_head(head: nn.Module) -> None:
    """Heads whose loss may read padding tell the encoder so. ELECTRA's discriminator does not: it takes the mask."""
    name = type(head).__name__
    if "For" not in name or not type(head).__module__.startswith("transformers.models.") or "forward" in head.__dict__:
        return
    if name == "ElectraForPreTraining":
        return
    for path, child in head.named_children():
        if isinstance(child.__dict__.get("forward"), EncoderForward):
            HeadForward(head, path).put()


def _swap_sentence(model: nn.Module) -> None:
    kind = sentence.kind_of(model)
    if kind is not None and sentence.why_left(model, kind) is None:
        sentence.BatchedMethod(model, kind).put()


def _swap_torch(module: nn.Module, impl: F.Impl | None) -> None:
    """torch's modules, the outermost of them: what is inside one that was replaced belongs to it."""
    if isinstance(module.__dict__.get("forward"), EncoderForward):
        return
    if why_left_torch(module) is None:
        if isinstance(module, nn.TransformerEncoder):
            for layer in module.layers:
                torch_layers.LayerForward(layer, impl).put()
        kind = next(kind for kind in TORCH if isinstance(module, kind))
        TORCH[kind](module, impl).put()
        return
    for child in module.children():
        _swap_torch(child, impl)


def why_left_torch(module: nn.Module) -> str | None:
    """Why a module is not replaced by what `TORCH` has for it, or None."""
    kind = next((kind for kind in TORCH if torch_layers.is_torch(module, kind)), None)
    if kind is None:
        return "it is not torch's own"
    if "forward" in module.__dict__ and not isinstance(module.__dict__["forward"], Forward):
        return "its forward was replaced already"
    if kind is nn.TransformerEncoder:
        return next((reason for layer in module.layers if (reason := torch_layers.why_not_layer(layer))), None)
    return (
        torch_layers.why_not_layer if kind is nn.TransformerEncoderLayer else torch_layers.why_not_attention
    )(module)  # fmt: skip


def explain(model: nn.Module) -> Report:
    """What was replaced in `model`, by what, and why anything was left alone, module by module."""
    report = Report(type(model).__name__)
    for path, module in model.named_modules():
        forward = module.__dict__.get("forward")
        name = path or "(the model)"
        _explain_sentence(report, path, module)
        if isinstance(forward, EncoderForward):
            _explain_encoder(report, path, forward)
        elif isinstance(forward, HeadForward):
            report.left[name] = f"{type(module).__name__}: its own code; it says where its loss reads padding"
        elif isinstance(forward, torch_layers.TorchForward):
            what = {
                torch_layers.StackForward: "unpads once, pads once",
                torch_layers.LayerForward: "attention, feed_forward, add_layer_norm",
                torch_layers.AttentionForward: "attention_padded, where need_weights=False",
            }[type(forward)]
            report.replaced[name] = f"{type(module).__name__}: {what}"
            _explain_calls(report, name, forward)
        elif any(isinstance(module, kind) for kind in TORCH) and not _inside(report, path):
            report.left[name] = f"{type(module).__name__}: {why_left_torch(module) or 'not accelerated'}"
        elif (family := family_of(module)) is not None:
            report.left[name] = f"{type(module).__name__}: {why_left(module, family) or 'not accelerated'}"
        compiled = getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        if compiled and any(isinstance(m.__dict__.get("forward"), Forward) for m in module.modules()):
            report.left[f"{name}, under torch.compile"] = "padding stays: how much there is, no graph can ask"
    if not report.replaced and not report.left:
        report.left["(the model)"] = (
            f"{type(model).__name__}: nothing in it is in the table of known models; fastbert.register_attention() "
            'makes attn_implementation="fastbert" known to transformers'
        )
    return report


def _explain_encoder(report: Report, path: str, forward: EncoderForward) -> None:
    encoder, family = forward.module, forward.facts

    def name(inner: str) -> str:
        return f"{path}.{inner}" if path else inner

    reason = F.why_not_triton(next(encoder.parameters()).device)
    impl = forward.impl or ("triton" if reason is None else f"native ({reason})")
    report.replaced[path or "(the model)"] = f"{type(encoder).__name__}: unpads once, pads once; impl={impl}" + (
        f"; {forward.graphs.summary()}" if isinstance(forward, GraphedEncoderForward) else ""
    )
    tables = [p for p in (family.word, family.position, family.token_type) if p is not None]
    if family.position is not None and all(plain_table(at(encoder, p)) for p in tables):
        report.replaced[name(family.word.rpartition(".")[0])] = "embedding_layer_norm"
    else:
        report.left[name(family.word.rpartition(".")[0])] = "tables are called one by one, then add_layer_norm"
    if getattr(encoder, "pooler", None) is not None:
        report.left[name("pooler")] = f"{type(encoder.pooler).__name__}: its own code, of the first token"
    paths = {id(module): p for p, module in encoder.named_modules()}
    for layer in {id(layer): layer for _, layer in forward.layers()}.values():
        _explain_layer(report, name(paths[id(layer)]), layer, family)
    _explain_calls(report, path or "(the model)", forward)


def _explain_sentence(report: Report, path: str, module: nn.Module) -> None:
    kind = sentence.kind_of(module)
    if kind is None:
        return
    name = f"{path}.{sentence.PUBLIC[kind]}" if path else sentence.PUBLIC[kind]
    method = module.__dict__.get(sentence.method_of(module, kind))
    if isinstance(method, sentence.BatchedMethod):
        report.replaced[name] = f"{type(module).__name__}: batches of tokens, sorted by their number"
        _explain_calls(report, name, method)
    else:
        report.left[name] = f"{type(module).__name__}: {sentence.why_left(module, kind) or 'not accelerated'}"


def _explain_calls(report: Report, name: str, forward: Forward) -> None:
    for reason, calls in forward.warned.items():
        report.left[f"{name}, {calls} calls"] = f"ran its own code: {reason}"
    if isinstance(forward, GraphedEncoderForward):
        for reason, calls in forward.graphs.calls.items():
            if reason != "replayed":
                report.left[f"{name}, {calls} calls without a CUDA graph"] = reason


def _inside(report: Report, path: str) -> bool:
    """Is a module above this one replaced?"""
    return any(done == "(the model)" or path.startswith(done + ".") for done in report.replaced)


def _explain_layer(report: Report, path: str, layer: nn.Module, family: Family) -> None:
    facts, reasons = family.layer, not_plain(layer, family.layer)
    steps = []
    if len(facts.qkv) > 1 and not reasons.keys() & set(facts.qkv):
        steps.append("q, k, v in one product")
    steps.append("attention")
    if not reasons.keys() & {facts.up, facts.down, facts.activation}:
        steps.append("feed_forward")
    if not {facts.out_norm, facts.down_norm} <= reasons.keys():
        steps.append("add_layer_norm_sum" if facts.pre_norm else "add_layer_norm")
    report.replaced[path] = f"{type(layer).__name__}: {', '.join(steps)}"
    for part, reason in reasons.items():
        report.left[f"{path}.{part}"] = f"called as it is: {reason}"
