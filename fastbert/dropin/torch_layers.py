"""The swap for torch's own modules: nn.TransformerEncoder, nn.TransformerEncoderLayer and nn.MultiheadAttention."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from .. import functional as F
from ..layers import activation_name, attention_masks, multi_head_attention, same_where_same, torch_drops, torch_layer
from ..packing import PackedBatch
from ..stack.description import Layer, Part
from ..stack.layer import in_one_call, run
from ..stack.shared import Pass
from .forward import Forward, count
from .once import only_once
from .own import LIBRARY, Watch, listeners, why_library, why_not_here, why_own, written_on
from .padding import EMPTY, ZEROS, Policy
from .parts import verdict, why_list, why_not_dropout
from .plain import by_token, fused_activation, usable

TORCH_NN = "torch.nn.modules."
DROPOUTS = ("dropout", "dropout1", "dropout2")


def why_not_attention(module: nn.MultiheadAttention) -> str | None:
    if why := why_own(module, ("MultiheadAttention",), TORCH_NN):
        return why
    if is_parametrized(module) or is_parametrized(module.out_proj):
        return "its weights are computed anew each time that they are read"  # at random, or by a step of an iteration
    if module.bias_k is not None or module.add_zero_attn:
        return "add_bias_kv and add_zero_attn are not among the fused operators' options"
    if not all(usable(p) for p in module.parameters()):
        return "its weights are not ordinary tensors"
    return None


def why_not_layer(layer: nn.Module) -> str | None:
    if why := why_own(layer, ("TransformerEncoderLayer",), TORCH_NN):
        return why
    attention = layer.self_attn
    if why := why_not_attention(attention):
        return why
    if attention.in_proj_weight is None:
        return "q, k and v are projected from different widths"
    # which function torch computes without gradients is settled by the class of the activation that __init__ was given
    known = {1: "relu", 2: "gelu"}.get(getattr(layer, "activation_relu_or_gelu", 0))
    if known is not None and activation_name(layer.activation) != known:
        return f"torch's fast path takes its activation for {known}"
    dropouts = (why_not_dropout(getattr(layer, name)) for name in DROPOUTS)
    return next((why for why in dropouts if why), None)


def why_not_stack(stack: nn.Module) -> str | None:
    if why := why_own(stack, ("TransformerEncoder",), TORCH_NN) or why_list(stack.layers):
        return why
    if reason := next((r for layer in stack.layers if (r := why_not_layer(layer))), None):
        return reason
    heads = {layer.self_attn.num_heads for layer in stack.layers}
    return None if len(heads) == 1 else "layers differ in their number of heads"


@dataclass(frozen=True)
class Seen:
    """What a close look at a module found; good as long as `watch.is_same()`.

    Attributes:
        reason: why every call runs the original's code, or None.
        whole: a part that may look at more than a token: with it in place padding is computed; or None.
        parts: whether linear1, linear2, norm1, norm2 and activation of a layer are taken apart, and called whole.
        name: the operators' name of the activation.
    """

    watch: Watch | None
    reason: str | None
    whole: str | None = None
    parts: tuple[tuple[bool, bool], ...] = ()
    name: str | None = None


class TorchForward(Forward):
    """What these three share: fallback with a warning, and torch's shapes.

    padding, bare: as in `EncoderForward`.
    """

    why_left = None  # module -> why it cannot be replaced

    def __init__(self, module: nn.Module, impl: F.Impl | None, padding: Policy = "auto", bare: bool = True):
        super().__init__(module)
        self.impl, self.padding, self.bare = impl, padding, bare
        self.seen: Seen | None = None
        self.told: dict[str, int] = {}

    def over(self, replica: nn.Module) -> TorchForward:
        forward = super().over(replica)
        forward.seen = None
        return forward

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"seen": None}

    def look(self) -> Seen:
        if torch.compiler.is_compiling():
            return Seen(None, *constants(self))
        seen = self.seen  # one thread may put another one there meanwhile
        if seen is None or not seen.watch.is_same():
            reason = self.why_not_replaced()
            found = (None,) if reason else self.look_closely()
            inner = list(self.module.modules())
            written = [place for module in inner for place in written_on(module)]
            seen = self.seen = Seen(Watch(inner, [*LIBRARY, *written]), reason, *found)
        return seen

    def look_closely(self) -> tuple:
        """The fields of `Seen` after `reason`."""
        return (None,)

    def why_not_replaced(self) -> str | None:
        return why_library() or type(self).why_left(self.module) or self.who_listens()

    def who_listens(self) -> str | None:
        for path, module in self.module.named_modules():
            # torch never calls the output layer of its attention, whose weight it takes
            if not path or path.endswith("out_proj"):
                continue
            # attention is walked past, so that what computes its weight anew before each call would not run
            walked_past = isinstance(module, nn.MultiheadAttention) and module._forward_pre_hooks
            if walked_past or listeners(module):
                return f"a {type(module).__name__} has a hook"
        return None

    def fall_back(self, reason: str, given: dict):
        self.warn(reason)
        return self.original(**given)

    def computes(self, given: dict, zeros: bool) -> bool:
        """Is padding computed? zeros: torch would give zeros there too."""
        if given.get("src_key_padding_mask") is None or self.look().whole is not None:
            return True
        if zeros or self.padding == "zero":
            return False
        if self.padding == "exact" or not self.bare or listeners(self.module):
            return True
        if not torch.compiler.is_compiling() and count(self.told, ZEROS) == 1:
            warnings.warn(f"{type(self.module).__name__}: {ZEROS}", stacklevel=5)
        return False

    def says(self) -> str:
        raise TypeError(f"{type(self).__name__} says nothing")


@torch.compiler.assume_constant_result
def constants(forward: TorchForward) -> tuple:
    """The fields of `Seen` after `watch`, for a traced pass."""
    reason = forward.why_not_replaced()
    found = (None,) if reason else forward.look_closely()
    return (reason, *found, *(None, (), None)[len(found) :])


class TorchLayerForward(TorchForward):
    """nn.TransformerEncoderLayer: packed where an encoder gives what its layers share, else on its own."""

    why_left = staticmethod(why_not_layer)

    def look_closely(self) -> tuple:
        layer = self.module
        linears = tuple(verdict(getattr(layer, name), nn.Linear) for name in ("linear1", "linear2"))
        norms = tuple(verdict(getattr(layer, name), nn.LayerNorm) for name in ("norm1", "norm2"))
        parts = (*linears, *norms, (False, not by_token(layer.activation)))
        names = ("linear1", "linear2", "norm1", "norm2", "activation")
        whole = next((name for name, (_, whole) in zip(names, parts, strict=True) if whole), None)
        return whole, parts, fused_activation(layer.activation)

    def says(self) -> str:
        return "attention, feed_forward, add_layer_norm"

    def __call__(self, *args, **kwargs):
        if len(args) == 3 and isinstance(args[1], Pass):
            return self.run(*args)
        given = self.named(args, kwargs)
        src = given["src"]
        reason = (
            why_not_here(given)
            or self.look().reason
            or why_not_masks(given, self.module.self_attn)
            or self.why_not_now()
        )
        if reason is not None:
            return self.fall_back(reason, given)
        attention = self.module.self_attn
        shared, x = pack(given, attention, self.impl, self.computes(given, zeros=False), any(torch_drops(self.module)))
        if shared is None:
            return self.fall_back(EMPTY, given)
        return unpack(only_once(self.run(x, shared, 0), self.impl), shared, src, attention.batch_first)

    def why_not_now(self) -> str | None:
        """torch's inference path drops nothing whatever its dropout modules say, and its other path does."""
        if not self.module.training and any(torch_drops(self.module)):
            return "a dropout is on in a layer that evaluates"
        return None

    def described(self) -> Layer:
        """As it was when it was looked at."""
        layer, seen = self.module, self.look()
        modules = (layer.linear1, layer.linear2, layer.norm1, layer.norm2, layer.activation)
        parts = {module: Part(module, *v) for module, v in zip(modules, seen.parts, strict=True)}
        return torch_layer(layer, lambda module, kind: parts[module])._replace(
            activation=parts[layer.activation], activation_name=seen.name
        )

    def run(self, x: Tensor, shared: Pass, index: int) -> Tensor:
        return run(x, self.described(), torch_drops(self.module), shared, index, self.module.training)


class StackForward(TorchForward):
    """nn.TransformerEncoder: unpads once, pads once. Zeros at padding come through the last norm if there is one: what
    torch's own inference path gives there."""

    why_left = staticmethod(why_not_stack)

    def look_closely(self) -> tuple:
        return (next((f"a {w}" for layer in self.module.layers if (w := layer.forward.look().whole)), None),)

    def says(self) -> str:
        if self.bare and self.padding == "auto":
            return f"unpads once, pads once; {ZEROS}"
        return "unpads once, pads once; zeros at padding where torch's own code gives them" + (
            ', and elsewhere, as padding="zero" asks' if self.padding == "zero" else ""
        )

    def __call__(self, *args, **kwargs):
        given, module = self.named(args, kwargs), self.module
        reason, layers = why_not_here(given) or self.look().reason, []
        if reason is None:
            layers = [layer.__dict__.get("forward") for layer in module.layers]
            if not all(isinstance(forward, TorchLayerForward) for forward in layers):
                reason = "a layer came in place of an accelerated one"
        reason = reason or why_not_masks(given, module.layers[0].self_attn)
        reason = reason or next((why for f in layers if (why := f.why_not_now())), None)
        if reason is None:
            first = module.layers[0].self_attn
            exact = self.computes(given, zeros=nests(module, given))
            drops = any(any(torch_drops(layer)) for layer in module.layers)
            shared, x = pack({**given, "src_mask": given.get("mask")}, first, self.impl, exact, drops)
            reason = EMPTY if shared is None else None
        if reason is not None:
            return self.fall_back(reason, given)
        y = None if module.training else in_one_call(x, (forward.described() for forward in layers), shared)
        if y is None:
            for index, layer in enumerate(module.layers):
                x = layer(x, shared, index)
        else:
            x = y
        y = unpack(only_once(x, self.impl), shared, given["src"], first.batch_first)
        return y if module.norm is None else module.norm(y)


class AttentionForward(TorchForward):
    """nn.MultiheadAttention(need_weights=False), for itself."""

    why_left = staticmethod(why_not_attention)

    def says(self) -> str:
        return "attention_padded, where need_weights=False"

    def fits(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> bool:
        """Are these of shapes that torch takes?"""
        if not query.dim() == key.dim() == value.dim() or key.shape[:-1] != value.shape[:-1]:
            return False
        (batch, queries), (batch_of_keys, keys) = (batch_and_tokens(x, self.module.batch_first) for x in (query, key))
        if batch != batch_of_keys:
            return False
        return masks_fit(batch, self.module.num_heads, queries, keys, key_padding_mask, attn_mask)

    def __call__(self, *args, **kwargs):
        given, module = self.named(args, kwargs), self.module
        query, key, value = given["query"], given["key"], given["value"]
        key_padding_mask, attn_mask = given.get("key_padding_mask"), given.get("attn_mask")
        reason = why_not_here(given) or self.look().reason
        if given.get("need_weights", True):
            reason = "need_weights=True asks for the attention weights"
        elif given.get("is_causal"):  # torch then may look at the mask or at the hint alone
            reason = "is_causal=True"
        elif query.is_nested or query.dim() not in (2, 3):
            reason = "query is nested, or neither [S, C] nor [B, S, C]"
        elif not self.fits(query, key, value, key_padding_mask, attn_mask):
            reason = MISFIT
        elif reason is None:
            reason = why_not_autocast(query)
        if reason is not None:
            return self.fall_back(reason, given)
        if query.dim() == 2:
            query, key, value = same_where_same([query, key, value], 0)
            padding = None if key_padding_mask is None else key_padding_mask[None]
            o = multi_head_attention(module, query, key, value, padding, attn_mask, self.impl)
            return only_once(o, self.impl)[0], None
        query, key, value = same_where_same([query, key, value], None if module.batch_first else 1)
        o = multi_head_attention(module, query, key, value, key_padding_mask, attn_mask, self.impl)
        o = only_once(o, self.impl)
        return (o if module.batch_first else o.transpose(0, 1).contiguous()), None


MISFIT = "its arguments do not fit each other"  # torch has an error of its own for these


def why_not_autocast(x: Tensor) -> str | None:
    """On a CPU torch's fast path, without gradients, gives autocast's dtype, where its other code gives float32."""
    fast = x.device.type == "cpu" and not torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
    return "torch's fast path has another dtype within autocast" if fast else None


def why_not_masks(given: dict, attention: nn.MultiheadAttention) -> str | None:
    if given.get("is_causal"):
        return "is_causal=True"
    if reason := why_not_autocast(given["src"]):
        return reason
    src, mask = given["src"], given.get("mask", given.get("src_mask"))
    if src.is_nested or src.dim() not in (2, 3):
        return "src is nested, or neither [S, C] nor [B, S, C]"
    batch, width = batch_and_tokens(src, attention.batch_first)
    fit = masks_fit(batch, attention.num_heads, width, width, given.get("src_key_padding_mask"), mask)
    return None if fit else MISFIT


def batch_and_tokens(x: Tensor, batch_first: bool) -> tuple[int | None, int]:
    """(B, S) of [B, S, C], of [S, B, C] where the batch is not first, and (None, S) of [S, C]."""
    if x.dim() == 2:
        return None, x.shape[0]
    return (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])


def masks_fit(
    batch: int | None, heads: int, queries: int, keys: int, key_padding_mask: Tensor | None, attn_mask: Tensor | None
) -> bool:
    """Is key_padding_mask [B, Sk] or, without a batch, [Sk], and attn_mask [Sq, Sk] or [B * H, Sq, Sk]?"""
    padded = (keys,) if batch is None else (batch, keys)
    allowed = (queries, keys), ((1 if batch is None else batch) * heads, queries, keys)
    if key_padding_mask is not None and key_padding_mask.shape != padded:
        return False
    return attn_mask is None or tuple(attn_mask.shape) in allowed


def nests(module: nn.TransformerEncoder, given: dict) -> bool:
    """Would torch's own code take its path over nested tensors, which gives zeros at padding? As that asks."""
    src, padding, layer = given["src"], given.get("src_key_padding_mask"), module.layers[0]
    checks = getattr(module, "mask_check", True)
    if padding is None or given.get("mask") is not None or src.dim() != 3 or layer.training:
        return False
    if not (torch.backends.mha.get_fastpath_enabled() and getattr(module, "use_nested_tensor", False)):
        return False
    if torch.is_autocast_enabled() or (checks and torch.compiler.is_compiling()):
        return False
    if torch.is_grad_enabled() and (src.requires_grad or any(p.requires_grad for p in layer.parameters())):
        return False
    real = padding.logical_not() if padding.dtype == torch.bool else padding == 0
    return not checks or torch._nested_tensor_from_mask_left_aligned(src, real)


def pack(
    given: dict, attention: nn.MultiheadAttention, impl: F.Impl | None, exact: bool, drops: bool
) -> tuple[Pass | None, Tensor | None]:
    """(what the layers share, src [T, C]) of torch's arguments; (None, None) where a sequence has no token.

    exact: all rows stay, behind a mask.
    """
    src, padding, attn_mask = given["src"], given.get("src_key_padding_mask"), given.get("src_mask")
    if src.dim() == 2:
        src, padding = src[None], None if padding is None else padding[None]
    elif not attention.batch_first:
        src = src.transpose(0, 1)
    rows, width = src.shape[:2]
    columns = torch.arange(width, dtype=torch.int64, device=src.device)[None]
    real = lengths = None
    if padding is not None and not torch.compiler.is_compiling():
        kept = ~padding if padding.dtype == torch.bool else padding != float("-inf")
        ragged = (kept[:, 1:] & ~kept[:, :-1]).any(1)
        lengths, holes = torch.stack((kept.sum(1), ragged.to(torch.int64))).tolist()
        if min(lengths, default=1) == 0:
            return None, None
        if padding.dtype == torch.bool and not exact and not any(holes):
            real = kept  # only what is padded on the right is packed, as in torch's own inference path
    batch = PackedBatch.from_padded(None, real, None, columns, shape=(rows, width), lengths=lengths)
    # where padding is gone, a token still stands in the row and column that it had
    mask, bias = attention_masks(None if real is not None else padding, attn_mask, rows, attention.num_heads)
    shape = (-1, -1, width, width)
    padded = real is None and (padding is not None or torch.compiler.is_compiling())
    shared = Pass(
        batch,
        None if padded else batch.schedule(impl),
        impl,
        mask=None if mask is None else mask.expand(shape),
        bias=None if bias is None else bias.expand(shape),
        padded=padded,
    )
    return shared.dropping() if drops else shared, batch.unpad(src)


def unpack(x: Tensor, shared: Pass, src: Tensor, batch_first: bool) -> Tensor:
    y = shared.batch.pad(x)
    if src.dim() == 2:
        return y[0]
    return y if batch_first else y.transpose(0, 1).contiguous()
