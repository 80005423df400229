"""torch: its attention in all backends, the usual code of other operators, BERT in plain torch, nested tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..harness.peer import (
    GPU_ONLY,
    AttentionPeer,
    EncoderPeer,
    Missing,
    OperatorPeer,
    Prepared,
    Run,
    TrainingPeer,
    need,
)
from .fastbert import attention

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..harness.jobs import Job

# ---- attention -------------------------------------------------------------------------------------------


def _sdpa(backend: str | None) -> Callable[[dict[str, Any]], Prepared]:
    """scaled_dot_product_attention on the padded batch, with this backend, or with torch's choice if None."""

    def prepare(inputs: dict[str, Any]) -> Prepared:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        lengths, width = inputs["cu_seqlens"].diff().long(), inputs["max_seqlen"]
        device = inputs["q"].device
        real = torch.arange(width, device=device) < lengths[:, None]  # [B, S]
        index = real.reshape(-1).nonzero().squeeze(1)
        even = bool(real.all())
        if backend == "FLASH_ATTENTION" and device.type == "cuda" and not even:
            raise Missing("the flash backend takes no mask: uneven lengths need torch's varlen kernel")
        mask = None if even else real[:, None, None, :]
        dropout_p = inputs.get("dropout_p", 0.0)

        def there(t: Tensor) -> Tensor:
            flat = t.new_zeros(real.numel(), *t.shape[1:])
            return flat.index_copy(0, index, t).unflatten(0, real.shape).transpose(1, 2).contiguous()

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            attend = torch.nn.functional.scaled_dot_product_attention
            if backend is None:
                return attend(q, k, v, attn_mask=mask, dropout_p=dropout_p)
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return attend(q, k, v, attn_mask=mask, dropout_p=dropout_p)

        return Prepared(call, there, lambda t: t.transpose(1, 2).flatten(0, 1)[index])

    return prepare


def _varlen(inputs: dict[str, Any]) -> Prepared:
    if inputs["q"].device.type != "cuda":
        raise Missing("torch.nn.attention.varlen needs a CUDA device")
    varlen_attn = need("torch", "torch.nn.attention.varlen").varlen_attn
    if inputs.get("dropout_p"):
        raise Missing("torch.nn.attention.varlen has no dropout")
    cu, longest = inputs["cu_seqlens"], inputs["max_seqlen"]
    return Prepared(lambda q, k, v: varlen_attn(q, k, v, cu, cu, longest, longest))


ATTENTION = (
    AttentionPeer("torch sdpa", "torch", _sdpa(None)),
    AttentionPeer("torch sdpa flash", "torch", _sdpa("FLASH_ATTENTION")),
    AttentionPeer("torch sdpa cudnn", "torch", _sdpa("CUDNN_ATTENTION"), devices=GPU_ONLY),
    AttentionPeer("torch sdpa efficient", "torch", _sdpa("EFFICIENT_ATTENTION"), devices=GPU_ONLY),
    AttentionPeer("torch sdpa math", "torch", _sdpa("MATH"), slow=True),
    AttentionPeer("torch varlen", "torch", _varlen, devices=GPU_ONLY),
    AttentionPeer("plain torch", "torch", attention("reference"), slow=True),
)

# ---- the other operators ---------------------------------------------------------------------------------


def add_layer_norm(x, residual, weight, bias, eps=1e-12, *, dropout_p=0.0, **_) -> Tensor:
    import torch.nn.functional as tf

    return tf.layer_norm(tf.dropout(x, dropout_p) + residual, weight.shape, weight, bias, eps)


def feed_forward(x, up_weight, up_bias, down_weight, down_bias, activation="gelu", **_) -> Tensor:
    import torch.nn.functional as tf

    return tf.linear(tf.gelu(tf.linear(x, up_weight, up_bias)), down_weight, down_bias)


def linear_cross_entropy(hidden, weight, bias, labels, **_) -> Tensor:
    import torch.nn.functional as tf

    return tf.cross_entropy(tf.linear(hidden, weight, bias).float(), labels)


def embedding_layer_norm(
    input_ids, token_type_ids, positions, word, position, token_type, weight, bias, eps=1e-12, **_
) -> Tensor:
    import torch.nn.functional as tf

    x = tf.embedding(input_ids, word) + tf.embedding(token_type_ids, token_type) + tf.embedding(positions, position)
    return tf.layer_norm(x, weight.shape, weight, bias, eps)


def pool(x, cu_seqlens, mode="mean", normalize=False, **_) -> Tensor:
    import torch

    lengths = cu_seqlens.diff().long()
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=x.device), lengths, output_size=x.shape[0])
    sums = torch.zeros(len(lengths), x.shape[1], device=x.device).index_add_(0, owner, x.float())
    return (sums / lengths[:, None]).to(x.dtype)


PLAIN = {
    function.__name__: function
    for function in (add_layer_norm, feed_forward, linear_cross_entropy, embedding_layer_norm, pool)
}
OPERATORS = {
    name: (OperatorPeer("torch", "torch", lambda device, function=function: function),)
    for name, function in PLAIN.items()
}

# ---- whole models ----------------------------------------------------------------------------------------


def plain(size: int, change: Callable[[nn.Module, Job], nn.Module] = lambda model, job: model):
    """BERT in plain torch, which runs wherever torch is installed; `change` may compile it."""

    def make(job: Job) -> Run:
        from ..harness.jobs import padded_run

        return padded_run(change(job.once("plain torch", lambda: job.plain(job.dtype)), job), job, size, True)

    return make


def _nested(size: int) -> Callable[[Job], Run]:
    """torch.nn.TransformerEncoder, whose fast path packs the tokens into a nested tensor without padding."""

    def make(job: Job) -> Run:
        import torch
        import torch.nn.functional as tf

        from ..harness.jobs import padded_run
        from ..harness.plain_bert import PlainBert

        config, state = job.model
        layer = torch.nn.TransformerEncoderLayer(
            config.hidden_size, config.num_attention_heads, config.intermediate_size, 0.0, "gelu",
            config.layer_norm_eps, batch_first=True,
        )  # fmt: skip
        stack = torch.nn.TransformerEncoder(layer, config.num_hidden_layers, enable_nested_tensor=True)
        for n, theirs in enumerate(stack.layers):
            at = f"encoder.layer.{n}."
            pairs = {
                "self_attn.out_proj": "attention.output.dense", "norm1": "attention.output.LayerNorm",
                "linear1": "intermediate.dense", "linear2": "output.dense", "norm2": "output.LayerNorm",
            }  # fmt: skip
            loaded = {f"{t}.{kind}": state[f"{at}{o}.{kind}"] for t, o in pairs.items() for kind in ("weight", "bias")}
            for kind in ("weight", "bias"):
                qkv = [state[f"{at}attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
                loaded[f"self_attn.in_proj_{kind}"] = torch.cat(qkv)
            theirs.load_state_dict(loaded)
        stack.to(job.device, job.dtype).eval()
        embed = PlainBert(state, 0, config.num_attention_heads, config.layer_norm_eps).to(job.device, job.dtype)

        def call(ids: Tensor, mask: Tensor) -> Tensor:
            out = stack(embed(ids, mask), src_key_padding_mask=mask == 0)
            return tf.pad(out, (0, 0, 0, ids.shape[1] - out.shape[1])).nan_to_num()

        return padded_run(call, job, size, True)

    return make


def step(job: Job, change: Callable[[nn.Module], nn.Module] = lambda model: model, dtype: Any = None) -> Run:
    """A training step of plain torch, in the job's dtype or this one."""
    from ..harness.steps import batch_of, stepping

    dtype = dtype or job.dtype
    model, batch = job.plain_masked_lm(dtype), batch_of(job)
    changed = change(model)
    return stepping(model, lambda: changed(**batch), dtype)


ENCODERS = (
    EncoderPeer("nn.TransformerEncoder nested, sorted, batches of 32", "torch", _nested(32), single=False),
    EncoderPeer("plain torch sdpa, sorted, batches of 32", "torch", plain(32), GPU_ONLY),
)
TRAINING = (TrainingPeer("plain torch sdpa", "torch", step),)
