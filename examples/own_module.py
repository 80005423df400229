"""A model of one's own from the building blocks: `python examples/own_module.py`."""

import torch
from torch import nn

from fastbert.layers import AddLayerNorm, FeedForward, MultiheadAttention


class Block(nn.Module):
    """Post-norm, with one query that reads the whole sequence."""

    def __init__(self, width: int = 64, heads: int = 4):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, width))
        self.attention = MultiheadAttention(width, heads, batch_first=True)
        self.norm1, self.norm2 = AddLayerNorm(width, dropout=0.1), AddLayerNorm(width, dropout=0.1)
        self.feed_forward = FeedForward(width, 4 * width, activation="gelu")

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        query = self.query.expand(len(x), -1, -1)
        read, _ = self.attention(query, x, x, key_padding_mask=padding)
        h = self.norm1(read, residual=query)
        return self.norm2(self.feed_forward(h), residual=h)[:, 0]


def main() -> None:
    torch.manual_seed(0)
    block = Block()
    padding = torch.arange(32) >= torch.tensor([32, 5, 17, 9])[:, None]
    vectors = block(torch.randn(4, 32, 64), padding)
    vectors.square().sum().backward()
    print(
        f"vectors {tuple(vectors.shape)}, gradients for {sum(p.grad is not None for p in block.parameters())} tensors"
    )


if __name__ == "__main__":
    main()
