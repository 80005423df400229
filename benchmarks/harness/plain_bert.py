"""BERT in padded plain torch, as usually written: for true values, for budgets, and for exporters."""

from __future__ import annotations

import torch
import torch.nn.functional as tf
from torch import Tensor, nn

HEAD = "cls.predictions.transform."  # the head of masked words, as transformers names it


class PlainBert(nn.Module):
    """Hidden states [B, S, C] of input_ids and attention_mask [B, S]. `state` has transformers' names."""

    def __init__(self, state: dict[str, Tensor], layers: int, heads: int, eps: float = 1e-12):
        super().__init__()
        self.layers, self.heads, self.eps = layers, heads, eps
        self.weights = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(value.clone(), requires_grad=False) for name, value in state.items()}
        )

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        path = name.replace(".", "/")
        return self.weights[path + "/weight"], self.weights[path + "/bias"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.of(name)
        return tf.layer_norm(x, weight.shape, weight, bias, self.eps)

    def of_token_types(self, table: Tensor, input_ids: Tensor) -> Tensor:
        """The vectors of the tokens' types, all 0. One row: exported models look up no types."""
        return table[0]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        table = "embeddings/{}_embeddings/weight"
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = tf.embedding(input_ids, self.weights[table.format("word")])
        x = x + tf.embedding(positions, self.weights[table.format("position")])
        x = x + self.of_token_types(self.weights[table.format("token_type")], input_ids)
        x = self.norm(x, "embeddings.LayerNorm")
        allowed = (attention_mask != 0)[:, None, None, :]
        for n in range(self.layers):
            layer = f"encoder.layer.{n}."
            q, k, v = (
                tf.linear(x, *self.of(f"{layer}attention.self.{part}")).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for part in ("query", "key", "value")
            )
            o = tf.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).flatten(2)
            o = tf.linear(o, *self.of(layer + "attention.output.dense"))
            x = self.norm(o + x, layer + "attention.output.LayerNorm")
            h = tf.gelu(tf.linear(x, *self.of(layer + "intermediate.dense")))
            x = self.norm(tf.linear(h, *self.of(layer + "output.dense")) + x, layer + "output.LayerNorm")
        return x


class PlainMaskedLM(PlainBert):
    """The mean loss of masked words, given labels [B, S] (-100: none); logits of every token, as transformers has them.

    `state` has transformers' names, those of the encoder without "bert.". Parameters have gradients.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.requires_grad_()

    def of_token_types(self, table: Tensor, input_ids: Tensor) -> Tensor:
        """As models usually look them up, since this decides how exact the table's gradient is in bfloat16."""
        return tf.embedding(torch.zeros_like(input_ids), table)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        hidden = super().forward(input_ids, attention_mask)
        hidden = self.norm(tf.gelu(tf.linear(hidden, *self.of(HEAD + "dense"))), HEAD + "LayerNorm")
        table = self.weights["embeddings/word_embeddings/weight"]
        logits = tf.linear(hidden, table, self.weights["cls/predictions/bias"])
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return tf.cross_entropy(logits.flatten(0, 1), labels.flatten())


class PlainMeanBert(PlainBert):
    """The mean [B, C] of the hidden states without padding, as part of the model, so that a runtime computes it too."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask[..., None].float()
        return (super().forward(input_ids, attention_mask) * mask).sum(1) / mask.sum(1)
