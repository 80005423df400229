"""Every parameter's gradient of a whole encoder through the Triton kernels, at real widths.

Two layers of MiniLM (and of BERT-base once), 16-bit and float32, with and without dropout, packed and padded: within
twice plain torch's own error against float64. With dropout all three draw the same masks, since a mask depends on
(seed, sequence, position) and not on the layout in memory.
"""

import pytest
import torch

from fastbert import BertConfig, BertModel, PackedBatch
from fastbert.kernels import _device
from fastbert.testing import assert_within_budget

WIDTHS = {
    "minilm": {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
    "base": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}
LENGTHS = (7, 1, 70)  # the last crosses a block of every kernel


def model_with(config: BertConfig, impl: str, state=None) -> BertModel:
    model = BertModel(config, impl=impl).train()
    if state is not None:
        model.load_state_dict(state)
        return model
    with torch.no_grad():  # larger than initial ones: attention is not uniform, every bias counts
        for p in model.parameters():
            p.normal_(std=0.05) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.1)
    return model


def gradients(model: BertModel, rows: list[list[int]], padded: bool, dy, dpooled, device) -> dict[str, torch.Tensor]:
    torch.manual_seed(11)  # the forward pass draws the seed of the dropout masks
    model.to(device)
    if padded:
        width = max(map(len, rows)) + 3
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        output = model(ids, mask)
        hidden = output.last_hidden_state[mask.bool()]
    else:
        output = model(PackedBatch.from_lists(rows, device=device))
        hidden = output.last_hidden_state
    torch.autograd.backward([hidden, output.pooler_output], [dy.to(hidden), dpooled.to(hidden)])
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.triton
@pytest.mark.skipif(_device.INTERPRETING, reason="the interpreter truncates to bf16, and takes minutes for this many")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_two_hundred_tokens_of_bert_base(dtype, device):
    """Compiled kernels with their real tiles, on a GPU or emulated."""
    hold("base", dtype, 0.1, False, device, lengths=(130, 1, 69))


@pytest.mark.triton
@pytest.mark.parametrize(
    ("widths", "dtype", "dropout", "padded"),
    [
        ("minilm", torch.float32, 0.0, False),
        ("minilm", torch.float32, 0.1, True),
        ("minilm", torch.float16, 0.0, True),  # in place of bfloat16, to which the interpreter truncates
        ("minilm", torch.float16, 0.1, False),
        ("base", torch.float32, 0.1, False),
    ],
    ids=["fp32", "fp32-dropout-padded", "fp16-padded", "fp16-dropout", "base-fp32-dropout"],
)
def test_every_parameter(widths, dtype, dropout, padded, device):
    hold(widths, dtype, dropout, padded, device)


def hold(widths, dtype, dropout, padded, device, lengths=LENGTHS):
    config = BertConfig(
        vocab_size=200, num_hidden_layers=2, max_position_embeddings=max(lengths) + 10,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **WIDTHS[widths],
    )  # fmt: skip
    state = model_with(config, "reference").state_dict()
    rows = [torch.randint(1, 200, (n,)).tolist() for n in lengths]
    dy, dpooled = torch.randn(sum(lengths), config.hidden_size), torch.randn(len(lengths), config.hidden_size)

    def of(impl: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return gradients(model_with(config, impl, state).to(dtype), rows, padded, dy, dpooled, device)

    truth, plain, ours = of("reference", torch.float64), of("reference", dtype), of("triton", dtype)
    for name, expected in truth.items():
        if name.endswith("self.key.bias"):
            continue  # truly zero, because a shift of all scores does not change a softmax
        assert_within_budget(ours[name], plain[name], expected, name=name)
