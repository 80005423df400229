"""A masked batch waits for the device once, and a batch whose lengths the host knows never waits.

No device is needed: calls that would wait for one are counted (`waits` in conftest.py). Layers run without Triton's
kernels, since the interpreter reads every tensor.
"""

import pytest
import torch

import fastbert
from fastbert import BertConfig, BertModel
from fastbert.dropin.padding import POLICIES
from fastbert.packing import PackedBatch

pytestmark = [pytest.mark.once, pytest.mark.filterwarnings("ignore:.*come back as zeros.*")]

MASKS = {
    "right_padded": [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]],
    "left_padded": [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]],
    "with_holes": [[1, 0, 1, 0], [1, 1, 1, 0], [1, 1, 0, 1]],
}
IDS = torch.arange(5, 17).reshape(3, 4)
SMALL = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 16,
}  # fmt: skip


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_packing_waits_once(waits, mask):
    mask, lengths = torch.tensor(mask), [sum(row) for row in mask]
    assert waits(lambda: PackedBatch.from_padded(IDS, mask)) == ["tolist"]
    assert waits(lambda: PackedBatch.from_padded(IDS, mask, lengths=lengths)) == []


def test_packing_without_a_mask_does_not_wait(waits):
    assert waits(lambda: PackedBatch.from_padded(IDS)) == []
    assert waits(lambda: PackedBatch.from_lists([[5, 6], [7]]).to("meta")) == []


def test_our_model(waits, monkeypatch):
    monkeypatch.setattr(BertModel, "_check", lambda self, batch: None)  # checks tensors on a CPU only
    model = BertModel(BertConfig(**SMALL), impl="native").eval()
    mask, packed = torch.tensor(MASKS["left_padded"]), PackedBatch.from_lists([[5, 6], [7]])
    with torch.no_grad():
        assert waits(lambda: model(IDS, mask)) == ["tolist"]
        assert waits(lambda: model(IDS)) == []
        assert waits(lambda: model(packed)) == []


FAMILIES = ("bert", "roberta", "mpnet", "modernbert")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("padding", POLICIES)
@pytest.mark.filterwarnings("error:.*leaves this call.*")
def test_accelerated_models(waits, family, mask, padding):
    """Right-padded, left-padded (where padding has query rows too) and with holes, in every mode of padding."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(family, **SMALL, pad_token_id=1)
    model = fastbert.accelerate(transformers.AutoModel.from_config(config).eval(), impl="native", padding=padding)
    mask = torch.tensor(mask)
    with torch.no_grad():
        model(IDS, attention_mask=mask)  # fastbert inspects the model's parts
        seen = waits(lambda: model(IDS, attention_mask=mask))
    assert seen == ["tolist"]


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_torch_encoder(waits, mask):
    layer = torch.nn.TransformerEncoderLayer(32, 2, 48, batch_first=True)
    encoder = fastbert.accelerate(
        torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), impl="native"
    )
    x, padding = torch.randn(3, 4, 32), torch.tensor(mask) == 0
    with torch.no_grad():
        assert waits(lambda: encoder(x, src_key_padding_mask=padding)) == ["tolist"]
