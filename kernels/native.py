"""The same operators from PyTorch's own fast ones: oneDNN's matrix products, fused SDPA and LayerNorm.

What a machine without a GPU runs. Everything here is ordinary torch, so autograd and torch.compile need no help.
Signatures are those of `functional`, where every argument is described.
"""

from . import reference

# a reduction or a lookup that torch already does in one pass
linear_act = reference.linear_act
feed_forward = reference.feed_forward
linear_cross_entropy = reference.linear_cross_entropy
embedding_layer_norm = reference.embedding_layer_norm
add_layer_norm = reference.add_layer_norm
add_layer_norm_sum = reference.add_layer_norm_sum
add_rms_norm = reference.add_rms_norm
pool = reference.pool
attention = reference.attention
attention_padded = reference.attention_padded


def attention_schedule(cu_seqlens, total_tokens):
    return None
