"""explain: which modules of a model are accelerated and how, what is computed at padding, and why others are not."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.nn as nn

from .. import functional as F
from . import sentence, torch_layers
from .encoder import EncoderForward
from .facts import Family, at, has
from .find import TORCH, family_of, why_left, why_left_torch, why_no_family
from .forward import Forward, forward_of
from .graphs import GraphedEncoderForward
from .heads import HeadForward
from .padding import ZEROS
from .parts import not_plain, plain_table
from .plain import by_token


@dataclass
class Report:
    """The result of `explain`. replaced, left: path of a module -> how it is computed, or why it is left alone. Printed
    with a line for each."""

    model: str
    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.replaced)} modules replaced, {len(self.left)} left alone"]
        for title, entries in (("replaced", self.replaced), ("left alone", self.left)):
            width = max(map(len, entries), default=0)
            lines += [f"{title}:", *(f"  {path:{width}}  {what}" for path, what in entries.items())] if entries else []
        return "\n".join(lines)


def explain(model: nn.Module) -> Report:
    """Which modules of `model` are accelerated, how, and why others are left alone.

    The report also counts the calls that ran the model's own code, with the reasons: see `accelerate`.
    """
    report = Report(type(model).__name__)
    for path, module in model.named_modules():
        forward = forward_of(module)
        name = path or "(the model)"
        _explain_sentence(report, path, module)
        if isinstance(forward, EncoderForward):
            _explain_encoder(report, path, forward)
        elif isinstance(forward, (HeadForward, sentence.PooledForward)):
            report.left[name] = f"{type(module).__name__}: its own code; {forward.summary()}"
        elif isinstance(forward, torch_layers.TorchForward):
            report.replaced[name] = f"{type(module).__name__}: {forward.summary()}"
            _explain_calls(report, name, forward)
        elif any(isinstance(module, kind) for kind in TORCH) and not _inside(report, path):
            report.left[name] = f"{type(module).__name__}: {why_left_torch(module) or 'not accelerated'}"
        elif (family := family_of(module)) is not None:
            report.left[name] = f"{type(module).__name__}: {why_left(module, family) or 'not accelerated'}"
        elif (why := why_no_family(module)) is not None:
            report.left[name] = f"{type(module).__name__}: {why}"
        compiled = getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        if compiled and any(forward_of(m) is not None for m in module.modules()):
            report.left[f"{name}, under torch.compile"] = "padding is kept: the number of tokens depends on data"
    if not report.replaced and not report.left:
        report.left["(the model)"] = (
            f"{type(model).__name__}: nothing in it is in the table of known models; fastbert.register_attention() "
            'makes attn_implementation="fastbert" known to transformers'
        )
    return report


def _explain_encoder(report: Report, path: str, forward: EncoderForward) -> None:
    encoder, family, own = forward.module, forward.facts, path or "(the model)"

    def name(inner: str) -> str:
        return f"{path}.{inner}" if path else inner

    reason = F.why_not_triton(next(encoder.parameters()).device)
    impl = forward.impl or ("triton" if reason is None else f"native ({reason})")
    report.replaced[own] = (
        f"{type(encoder).__name__}: unpads once, pads once; impl={impl}"
        + (f"; {forward.graphs.summary()}" if isinstance(forward, GraphedEncoderForward) else "")
        + ("; inference runs all layers in one C++ call if that is faster" if forward.may_run_in_one_call() else "")
        + f"; padding: {_padding(forward)}"
    )
    if (reason := forward.look().reason) is not None:
        report.left[f"{own}, as it is now"] = f"runs its own code: {reason}"
    if family.called is not None:
        report.left[name("embeddings")] = "called as they are, on [batch, tokens] with its padding"
    elif family.fuses_tables and all(plain_table(at(encoder, path)) for path in family.tables):
        report.replaced[name(family.word.rpartition(".")[0])] = "embedding_layer_norm"
    elif family.norm is None and family.word is not None and len(family.tables) == 1:
        report.left[name(family.word)] = "called with the tokens alone"
    else:
        norm, word = "" if family.norm is None else ", then add_layer_norm", family.word or ""
        report.left[name(word.rpartition(".")[0] or word)] = f"tables are called one by one{norm}"
    if getattr(encoder, "pooler", None) is not None:
        report.left[name("pooler")] = f"{type(encoder.pooler).__name__}: its own code"
    paths = {id(module): p for p, module in encoder.named_modules()}
    for layer in {id(layer): layer for _, layer in forward.layers()}.values():
        parts = (*family.layer.linears, *family.layer.norms, family.layer.activation)
        if all(has(layer, part) for part in parts if part is not None):
            _explain_layer(report, name(paths[id(layer)]), layer, family)
    _explain_calls(report, own, forward)
    for why, calls in forward.computed.items():
        report.left[f"{own}, padding in {calls} calls"] = f"computed as the original does: {why}"


def _padding(forward: EncoderForward) -> str:
    if forward.padding == "exact":
        return "computed as the original does"
    if forward.padding == "zero":
        return 'zeros, as padding="zero" asks, except in rows that a head reads'
    if forward.bare:
        return f"{ZEROS}; computed if a token other than padding is masked"
    return "computed as the original does, except below heads and poolings that are known not to read it"


def _explain_sentence(report: Report, path: str, module: nn.Module) -> None:
    kind = sentence.model_kind(module)
    if kind is None:
        return
    name = f"{path}.{sentence.PUBLIC[kind]}" if path else sentence.PUBLIC[kind]
    method = module.__dict__.get(sentence.method_of(module, kind) or "")
    if isinstance(method, sentence.BatchedMethod):
        report.replaced[name] = f"{type(module).__name__}: batches of tokens, sorted by their number"
        _explain_calls(report, name, method)
    else:
        report.left[name] = f"{type(module).__name__}: {sentence.why_left(module, kind) or 'not accelerated'}"


def _explain_calls(report: Report, name: str, forward: Forward) -> None:
    by_calls: dict[int, list[str]] = {}
    for reason, calls in forward.warned.items():
        by_calls.setdefault(calls, []).append(reason)
    for calls, reasons in by_calls.items():
        each = " each" if len(reasons) > 1 else ""
        report.left[f"{name}, {calls} calls{each}"] = f"ran its own code: {'; '.join(reasons)}"
    if isinstance(forward, GraphedEncoderForward):
        for reason, calls in forward.graphs.calls.items():
            if reason != "replayed":
                report.left[f"{name}, {calls} calls without a CUDA graph"] = reason


def _inside(report: Report, path: str) -> bool:
    """Whether a module above this one is replaced."""
    return any(done == "(the model)" or path.startswith(done + ".") for done in report.replaced)


def _explain_layer(report: Report, path: str, layer: nn.Module, family: Family) -> None:
    facts, reasons = family.layer, not_plain(layer, family.layer)
    steps = []
    if len(facts.qkv) > 1 and not reasons.keys() & set(facts.qkv):
        steps.append("q, k, v in one product")
    steps.append("attention")
    if not reasons.keys() & {facts.up, facts.down, facts.activation}:
        steps.append("feed_forward")
    if not set(facts.norms) <= reasons.keys():
        rms = facts.norm is not None and facts.norm.rms
        steps.append("add_rms_norm" if rms else "add_layer_norm_sum" if facts.pre_norm else "add_layer_norm")
    report.replaced[path] = f"{type(layer).__name__}: {', '.join(steps)}"
    for part, reason in reasons.items():
        whole = "" if by_token(at(layer, part)) else ", on [batch, tokens, width] with its padding"
        report.left[f"{path}.{part}"] = f"called as it is{whole}: {reason}"
