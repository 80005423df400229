"""torch.nn.TransformerEncoder, made fast in place: `python examples/torch_encoder.py`."""

import torch
from torch import nn

import fastbert


def main() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(d_model=64, nhead=4, dim_feedforward=128, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, num_layers=2)
    x = torch.randn(4, 32, 64)
    padding = torch.arange(32) >= torch.tensor([32, 5, 17, 9])[:, None]  # True is padding

    before = encoder(x, src_key_padding_mask=padding)[~padding]
    fastbert.accelerate(encoder)
    after = encoder(x, src_key_padding_mask=padding)[~padding]
    after.square().mean().backward()  # it trains as before
    print(fastbert.explain(encoder))
    print(f"largest difference: {(before - after).abs().max():.1e}")
    assert torch.allclose(before, after, atol=1e-5)


if __name__ == "__main__":
    main()
