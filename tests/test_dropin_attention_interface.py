"""`attn_implementation="fastbert"` in models that no table knows."""

import pytest
import torch

import fastbert
from fastbert.testing import assert_within_budget

transformers = pytest.importorskip("transformers", reason="whose interface it is")

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "encoder": ("Ernie", {}),
    "decoder": ("Llama", {"num_key_value_heads": 2}),  # causal, and two query heads to a key head
    "sliding_window": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 4}),
}
RIGHT = (torch.arange(9) < torch.tensor([9, 4, 2])[:, None]).long()


def model_of(name: str, implementation: str) -> torch.nn.Module:
    prefix, more = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, prefix + "Config")(**SIZES, **more)
    config._attn_implementation = implementation
    model = getattr(transformers, prefix + "Model")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.mark.parametrize("mask", [None, RIGHT], ids=["no_mask", "mask"])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_no_table(name, mask):
    fastbert.register_attention()
    ours, plain, truth = model_of(name, "fastbert"), model_of(name, "eager"), model_of(name, "eager").double()
    assert ours.config._attn_implementation == "fastbert"
    ids = torch.randint(1, 60, (3, 9))
    real = torch.ones(3, 9, dtype=torch.bool) if mask is None else mask.bool()
    with torch.no_grad():
        outputs = [m(ids, attention_mask=mask).last_hidden_state[real] for m in (ours, plain, truth)]
    assert_within_budget(*outputs)


def test_generation_with_a_cache():
    """One query against many keys, then a causal block of both."""
    fastbert.register_attention()
    ours, plain = model_of("decoder", "fastbert"), model_of("decoder", "eager")
    ids = torch.randint(1, 60, (2, 6))
    with torch.no_grad():
        for model in (ours, plain):
            model.first = model(ids, use_cache=True)
            model.next = model(ids[:, :1], past_key_values=model.first.past_key_values).last_hidden_state
            model.block = model(ids[:, :3], past_key_values=model.first.past_key_values).last_hidden_state
    torch.testing.assert_close(ours.next, plain.next, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.block, plain.block, atol=1e-5, rtol=1e-4)


def test_the_operator_was_called(monkeypatch):
    fastbert.register_attention()
    calls = []
    original = fastbert.functional.attention_padded
    monkeypatch.setattr(
        fastbert.functional, "attention_padded", lambda *args, **kw: calls.append(1) or original(*args, **kw)
    )
    with torch.no_grad():
        model_of("encoder", "fastbert")(torch.randint(1, 60, (2, 5)))
    assert len(calls) == 2
