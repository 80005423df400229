"""The swap for torch's own modules: nn.TransformerEncoder, nn.TransformerEncoderLayer and nn.MultiheadAttention."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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
from .checks import why_list, why_not_dropout
from .forward import InspectedForward, forward_of
from .once import only_once
from .original import LIBRARY, Watch, tensor_hooks, why_call, why_library, why_not_here, why_not_original, written_on
from .padding import EMPTY, ZEROS, Policy
from .parts import verdict
from .plain import by_token, fused_activation, usable

TORCH_NN = "torch.nn.modules."
DROPOUTS = ("dropout", "dropout1", "dropout2")


def why_not_attention(module: nn.MultiheadAttention) -> str | None:
    if why := why_not_original(module, ("MultiheadAttention",), TORCH_NN):
        return why
    if is_parametrized(module) or is_parametrized(module.out_proj):
        return "its weights are computed again each time they are read"  # such as by a step of spectral norm
    if module.bias_k is not None or module.add_zero_attn:
        return "add_bias_kv and add_zero_attn are not among the fused operators' options"
    if not all(usable(p) for p in module.parameters()):
        return "its weights are not ordinary tensors"
    return None


def why_not_layer(layer: nn.Module) -> str | None:
    if why := why_not_original(layer, ("TransformerEncoderLayer",), TORCH_NN):
        return why
    attention = layer.self_attn
    if why := why_not_attention(attention):
        return why
    if attention.in_proj_weight is None:
        return "q, k and v are projected from different widths"
    # Without gradients torch computes ReLU or GELU, as __init__ noted by the class of the activation that it was given.
    known = {1: "relu", 2: "gelu"}.get(getattr(layer, "activation_relu_or_gelu", 0))
    if known is not None and activation_name(layer.activation) != known:
        return f"torch's fast path treats its activation as {known}"
    dropouts = (why_not_dropout(getattr(layer, name)) for name in DROPOUTS)
    return next((why for why in dropouts if why), None)


def why_not_stack(stack: nn.Module) -> str | None:
    if why := why_not_original(stack, ("TransformerEncoder",), TORCH_NN) or why_list(stack.layers):
        return why
    if reason := next((r for layer in stack.layers if (r := why_not_layer(layer))), None):
        return reason
    heads = {layer.self_attn.num_heads for layer in stack.layers}
    return None if len(heads) == 1 else "layers differ in their number of heads"


@dataclass(frozen=True)
class Seen:
    """The result of an inspection, valid as long as `watch.is_same()`.

    Attributes:
        reason: why every call runs the original's code, or None.
        whole: a called part that may look at more than one token, so that padding is computed; or None.
        parts: the verdicts of a layer's linear1, linear2, norm1, norm2 and activation.
        name: the operators' name of the activation.
    """

    watch: Watch | None
    reason: str | None
    whole: str | None = None
    parts: tuple[tuple[bool, bool], ...] = ()
    name: str | None = None


class TorchForward(InspectedForward):
    """The common part of the three classes below.

    padding, bare: as in `EncoderForward`.
    """

    why_left = None  # module -> why it cannot be replaced

    def __init__(self, module: nn.Module, impl: F.Impl | None, padding: Policy = "auto", bare: bool = True):
        super().__init__(module)
        self.impl, self.padding, self.bare = impl, padding, bare

    def look(self) -> Seen:
        return Seen(None, *constants(self)) if torch.compiler.is_compiling() else super().look()

    def inspect(self) -> Seen:
        inner = list(self.module.modules())
        written = [place for module in inner for place in written_on(module)]
        return Seen(Watch(inner, [*LIBRARY, *written]), *self.reason_and_parts())

    def reason_and_parts(self) -> tuple:
        """The fields of `Seen` after `watch`; the last ones may be missing."""
        reason = why_library() or type(self).why_left(self.module) or self.why_hooked()
        return (reason,) if reason else (None, *self.inspect_parts())

    def inspect_parts(self) -> tuple:
        """The fields of `Seen` after `reason`; the last ones may be missing."""
        return ()

    def why_hooked(self) -> str | None:
        for path, module in self.module.named_modules():
            # torch never calls the output layer of its attention: it reads the weight
            if not path or path.endswith("out_proj"):
                continue
            if why := why_call(module):
                return why
            # The fused code does not call attention either, so hooks that compute its weight before each call would
            # not run.
            makes_weights = isinstance(module, nn.MultiheadAttention) and module._forward_pre_hooks
            if makes_weights or tensor_hooks(module):
                return f"a {type(module).__name__} has a hook"
        return None

    def fall_back(self, reason: str, given: dict):
        self.warn(reason)
        return self.original(**given)

    def computes_padding(self, given: dict, zeros: bool) -> bool:
        """Whether rows of padding are computed. zeros: whether torch's own code gives zeros for them."""
        if given.get("src_key_padding_mask") is None or self.look().whole is not None:
            return True
        if zeros or self.padding == "zero":
            return False
        if self.padding == "exact" or not self.bare or tensor_hooks(self.module):
            return True
        if not torch.compiler.is_compiling():
            self.warn_of_zeros()
        return False

    def summary(self) -> str:
        """What `explain` says of the module."""
        raise NotImplementedError


@torch.compiler.assume_constant_result
def constants(forward: TorchForward) -> tuple:
    """The fields of `Seen` after `watch`, which are constants under torch.compile."""
    return forward.reason_and_parts()


class TorchLayerForward(TorchForward):
    """nn.TransformerEncoderLayer. Within an accelerated nn.TransformerEncoder it gets a `Pass` and packed tokens."""

    why_left = staticmethod(why_not_layer)

    def inspect_parts(self) -> tuple:
        layer = self.module
        linears = tuple(verdict(getattr(layer, name), nn.Linear) for name in ("linear1", "linear2"))
        norms = tuple(verdict(getattr(layer, name), nn.LayerNorm) for name in ("norm1", "norm2"))
        parts = (*linears, *norms, (False, not by_token(layer.activation)))
        names = ("linear1", "linear2", "norm1", "norm2", "activation")
        whole = next((name for name, (_, whole) in zip(names, parts, strict=True) if whole), None)
        return whole, parts, fused_activation(layer.activation)

    def summary(self) -> str:
        return "attention, feed_forward, add_layer_norm"

    def call(self, *args, **kwargs):
        given = self.named(args, kwargs)
        src = given["src"]
        reason = why_not_here(given) or self.look().reason or why_not_masks(given, [self.module]) or self.why_not_now()
        if reason is not None:
            return self.fall_back(reason, given)
        attention = self.module.self_attn
        shared, x = pack(
            given, attention, self.impl, self.computes_padding(given, zeros=False), any(torch_drops(self.module))
        )
        if shared is None:
            return self.fall_back(EMPTY, given)
        return unpack(only_once(self.call_packed(x, shared, 0), self.impl), shared, src, attention.batch_first)

    def why_not_now(self) -> str | None:
        """If a dropout module is in training mode in a layer that is not, only one of torch's two paths drops."""
        if not self.module.training and any(torch_drops(self.module)):
            return "a dropout is in training mode in a layer that is not"
        return None

    def described(self) -> Layer:
        layer, seen = self.module, self.look()
        modules = (layer.linear1, layer.linear2, layer.norm1, layer.norm2, layer.activation)
        parts = {module: Part(module, *v) for module, v in zip(modules, seen.parts, strict=True)}
        return torch_layer(layer, lambda module, kind: parts[module])._replace(
            activation=parts[layer.activation], activation_name=seen.name
        )

    def call_packed(self, x: Tensor, shared: Pass, index: int) -> Tensor:
        return run(x, self.described(), torch_drops(self.module), shared, index, self.module.training)


class StackForward(TorchForward):
    """nn.TransformerEncoder: unpads once, pads once. Padding gets zeros, or what the last norm makes of zeros, as from
    torch's own inference path."""

    why_left = staticmethod(why_not_stack)

    def inspect_parts(self) -> tuple:
        layers = [f for layer in self.module.layers if isinstance(f := forward_of(layer), TorchLayerForward)]
        return (next((f"a {w}" for layer in layers if (w := layer.look().whole)), None),)

    def summary(self) -> str:
        if self.bare and self.padding == "auto":
            return f"unpads once, pads once; {ZEROS}"
        return "unpads once, pads once; padding gets zeros if torch's own code gives zeros there" + (
            ', and otherwise because of padding="zero"' if self.padding == "zero" else ""
        )

    def call(self, *args, **kwargs):
        given, module = self.named(args, kwargs), self.module
        reason, layers = why_not_here(given) or self.look().reason, []
        if reason is None:
            layers = [forward_of(layer) for layer in module.layers]
            if not all(isinstance(forward, TorchLayerForward) for forward in layers):
                reason = "a layer is in place of an accelerated one"
        reason = reason or why_not_masks(given, module.layers)
        reason = reason or next((why for f in layers if (why := f.why_not_now())), None)
        if reason is None:
            first = module.layers[0].self_attn
            nested, padding = takes_nested_path(module, given), given.get("src_key_padding_mask")
            exact = self.computes_padding(given, zeros=nested)
            drops = any(any(torch_drops(layer)) for layer in module.layers)
            if nested and padding.dtype != torch.bool:  # 0 or -infinity
                padding = padding != 0
            options = {**given, "src_mask": given.get("mask"), "src_key_padding_mask": padding}
            shared, x = pack(options, first, self.impl, exact, drops)
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
    """nn.MultiheadAttention that is called by itself, with need_weights=False."""

    why_left = staticmethod(why_not_attention)

    def summary(self) -> str:
        return "attention_padded, in calls with need_weights=False"

    def fits(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> bool:
        """Whether torch takes tensors of these shapes."""
        if not query.dim() == key.dim() == value.dim() or key.shape[:-1] != value.shape[:-1]:
            return False
        (batch, queries), (batch_of_keys, keys) = (batch_and_tokens(x, self.module.batch_first) for x in (query, key))
        if batch != batch_of_keys:
            return False
        return masks_fit(batch, self.module.num_heads, queries, keys, key_padding_mask, attn_mask)

    def call(self, *args, **kwargs):
        given, module = self.named(args, kwargs), self.module
        query, key, value = given["query"], given["key"], given["value"]
        key_padding_mask, attn_mask = given.get("key_padding_mask"), given.get("attn_mask")
        reason = why_not_here(given) or self.look().reason
        if given.get("need_weights", True):
            reason = "need_weights=True asks for the attention weights"
        elif given.get("is_causal"):  # torch may then read the mask, or ignore it
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


MISFIT = "its arguments do not fit each other"  # torch's own code raises an error for these


def why_not_autocast(x: Tensor) -> str | None:
    """Under autocast on a CPU torch's path without gradients returns autocast's dtype, and its other path float32."""
    fast = x.device.type == "cpu" and not torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
    return "torch's path without gradients returns another dtype under autocast" if fast else None


def takes_fast_path(modules: Iterable[nn.Module], *inputs: Tensor) -> bool:
    """Whether torch's own code might take its path without gradients in one of these modules."""
    if torch.compiler.is_compiling() or not torch.backends.mha.get_fastpath_enabled():
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return False
    evaluate = [module for module in modules if not module.training]
    return any(not (torch.is_grad_enabled() and any(p.requires_grad for p in m.parameters())) for m in evaluate)


def why_not_numbers(*masks: Tensor | None) -> str | None:
    """torch's path without gradients treats every number but 0 as a masked token; its other path adds the number."""
    floats = (mask for mask in masks if mask is not None and mask.dtype != torch.bool)
    if all(((mask == 0) | (mask == float("-inf"))).all() for mask in floats):
        return None
    return "torch's path without gradients treats a mask of numbers as one of bools"


def why_not_masks(given: dict, layers: Sequence[nn.Module]) -> str | None:
    if given.get("is_causal"):
        return "is_causal=True"
    if reason := why_not_autocast(given["src"]):
        return reason
    src, mask, attention = given["src"], given.get("mask", given.get("src_mask")), layers[0].self_attn
    padding = given.get("src_key_padding_mask")
    if src.is_nested or src.dim() not in (2, 3):
        return "src is nested, or neither [S, C] nor [B, S, C]"
    batch, width = batch_and_tokens(src, attention.batch_first)
    if not masks_fit(batch, attention.num_heads, width, width, padding, mask):
        return MISFIT
    if (padding is None and mask is None) or not takes_fast_path(layers, src):
        return None
    return why_not_numbers(padding, mask)


def batch_and_tokens(x: Tensor, batch_first: bool) -> tuple[int | None, int]:
    """(B, S) of [B, S, C], or of [S, B, C] if not `batch_first`; (None, S) of [S, C]."""
    if x.dim() == 2:
        return None, x.shape[0]
    return (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])


def masks_fit(
    batch: int | None, heads: int, queries: int, keys: int, key_padding_mask: Tensor | None, attn_mask: Tensor | None
) -> bool:
    """Whether key_padding_mask is [B, Sk], or [Sk] without a batch, and attn_mask [Sq, Sk] or [B * H, Sq, Sk]."""
    padded = (keys,) if batch is None else (batch, keys)
    allowed = (queries, keys), ((1 if batch is None else batch) * heads, queries, keys)
    if key_padding_mask is not None and key_padding_mask.shape != padded:
        return False
    return attn_mask is None or tuple(attn_mask.shape) in allowed


def takes_nested_path(module: nn.TransformerEncoder, given: dict) -> bool:
    """Whether torch's own code would take its path over nested tensors, which gives zeros at padding. The conditions
    are those of `nn.TransformerEncoder.forward`."""
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
    """(the pass, src [T, C]) of torch's arguments; (None, None) if a sequence has no token.

    exact: padding is kept, and masked.
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
            real = kept  # as in torch's own inference path, only batches padded on the right are packed
    batch = PackedBatch.from_padded(None, real, None, columns, shape=(rows, width), lengths=lengths)
    # In a packed batch that was padded on the right every token keeps its row and column of the mask.
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
