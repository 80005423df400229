"""`attn_implementation="fastbert"` in models that are not in the table of families."""

import ast
import inspect
from pathlib import Path

import pytest
import torch

import fastbert
from fastbert.dropin.attention_interface import BY_SDPA, HARMLESS, PACKED, REFUSED, attention_forward
from fastbert.testing import assert_within_budget

transformers = pytest.importorskip("transformers", reason="tests its interface")
sdpa = pytest.importorskip("transformers.integrations.sdpa_attention").sdpa_attention_forward

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "encoder": ("Ernie", {}),
    "decoder": ("Llama", {"num_key_value_heads": 2}),  # causal, with two query heads for each key head
    "sliding_window": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 4}),
}
RIGHT = (torch.arange(9) < torch.tensor([9, 4, 2])[:, None]).long()


def small(prefix: str, implementation: str = "fastbert", suffix: str = "Model", **more) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, prefix + "Config")(**SIZES, **more)
    config._attn_implementation = implementation
    model = getattr(transformers, prefix + suffix)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.1)
    return model


def model_of(name: str, implementation: str) -> torch.nn.Module:
    prefix, more = MODELS[name]
    return small(prefix, implementation, **more)


@pytest.mark.parametrize("mask", [None, RIGHT], ids=["no_mask", "mask"])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_no_table(name, mask):
    fastbert.register_attention()
    # in float64, transformers' eager attention is NaN where padding sees no token in its window; sdpa is not
    ours, plain, truth = model_of(name, "fastbert"), model_of(name, "eager"), model_of(name, "sdpa").double()
    assert ours.config._attn_implementation == "fastbert"
    ids = torch.randint(1, 60, (3, 9))
    real = torch.ones(3, 9, dtype=torch.bool) if mask is None else mask.bool()
    with torch.no_grad():
        outputs = [m(ids, attention_mask=mask).last_hidden_state[real] for m in (ours, plain, truth)]
    assert_within_budget(*outputs)


def test_generation_with_a_cache():
    """One query and many keys, then a causal block of several queries and keys."""
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


# ---- what a model asks for beyond queries, keys and values -------------------------------------------------

FULL, PADDED = torch.ones(3, 9, dtype=torch.long), RIGHT


@pytest.mark.parametrize("mask", [None, FULL, PADDED], ids=["no_mask", "full", "padded"])
@pytest.mark.parametrize("prefix", ["Splinter", "ClapText", "AlignText", "MarkupLM"])
def test_attention_without_is_causal_is_refused(prefix, mask):
    """The attention of these models has no `is_causal`, and transformers' interface treats that as causal.

    transformers has no sdpa for these models. Ours ran them, and every batch without padding was causal, 1.3 to 1.6
    away from the truth: the mask of a full batch is None, and nothing else says that a token may see later ones.
    """
    fastbert.register_attention()
    model = small(prefix)
    with pytest.raises(ValueError, match=r"Attention does not say whether it is causal.*eager"):
        model(torch.randint(1, 60, (3, 9)), attention_mask=mask)


def test_sdpa_without_is_causal_is_causal_here_too():
    """If the model allows sdpa, transformers treats attention without the attribute as causal, and so do we."""
    fastbert.register_attention()
    module = transformers.models.layoutlm.modeling_layoutlm.LayoutLMSelfAttention(
        transformers.LayoutLMConfig(**SIZES)
    )  # fmt: skip
    q, k, v = torch.randn(3, 2, 4, 6, 8)
    ours, theirs = attention_forward(module, q, k, v, None)[0], sdpa(module, q, k, v, None)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(ours, sdpa(module, q, k, v, None, is_causal=False)[0])


def test_attention_sinks_are_refused():
    """GptOss gives every head a sink: a score in the softmax that has no value. Without sinks all rows differ."""
    fastbert.register_attention()
    model = small("GptOss", num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, head_dim=8)
    with pytest.raises(ValueError, match=r"GptOssAttention passes s_aux.*sinks.*eager"):
        model(torch.randint(1, 60, (3, 9)))


def test_a_soft_cap_is_refused():
    fastbert.register_attention()
    with pytest.raises(ValueError, match=r"Gemma2Attention passes softcap.*eager"):
        small("Gemma2", num_key_value_heads=2, head_dim=8)(torch.randint(1, 60, (3, 9)))


def test_sparse_indices_are_refused():
    """DeepseekV32 puts its choice of keys into the mask only for "eager" and "sdpa"; other functions get `indices`."""
    fastbert.register_attention()
    model = small(
        "DeepseekV32", num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=1, moe_intermediate_size=16,
        q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_group=1, topk_group=1,
        index_topk=3, index_n_heads=2, index_head_dim=16, first_k_dense_replace=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"DeepseekV32Attention passes indices.*eager"):
        model(torch.randint(1, 60, (3, 9)))


def test_probabilities_and_unknown_arguments_are_refused():
    module, (q, k, v) = torch.nn.Linear(1, 1), torch.randn(3, 2, 4, 6, 8)
    for name in ("output_attentions", "temperature"):
        with pytest.raises(ValueError, match=f"Linear passes {name}"):
            attention_forward(module, q, k, v, None, is_causal=False, **{name: True})
        attention_forward(module, q, k, v, None, is_causal=False, **{name: None})


def test_packed_sequences_need_a_mask():
    """Flash attention's lengths mean that a row holds several sequences; without a mask they would see each other."""
    module, (q, k, v) = torch.nn.Linear(1, 1), torch.randn(3, 1, 4, 6, 8)
    lengths = torch.tensor([0, 2, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        attention_forward(module, q, k, v, None, is_causal=False, cu_seq_lens_q=lengths, max_length_q=4)
    apart = torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)).bool()[None, None]
    o, _ = attention_forward(module, q, k, v, apart, is_causal=False, cu_seq_lens_q=lengths, max_length_q=4)
    alone, _ = attention_forward(module, *(t[:, :, :2] for t in (q, k, v)), None, is_causal=False)
    torch.testing.assert_close(o[:, :2], alone)


def test_a_position_bias_is_added():
    """T5 passes its distances beside the mask; transformers' sdpa adds them."""
    fastbert.register_attention()
    ids, more = torch.randint(1, 60, (3, 9)), {"d_model": 32, "num_heads": 4, "d_kv": 8, "d_ff": 48, "num_layers": 2}
    for mask in (None, PADDED):
        with torch.no_grad():
            ours, plain, truth = (
                small("T5", name, "EncoderModel", **more).to(dtype)(ids, attention_mask=mask).last_hidden_state
                for name, dtype in (("fastbert", torch.float32), ("eager", torch.float32), ("eager", torch.float64))
            )
        real = PADDED.bool() if mask is not None else torch.ones(3, 9, dtype=torch.bool)
        assert_within_budget(ours[real], plain[real], truth[real])


def test_every_argument_of_every_model_is_known():
    """The keyword arguments with which transformers' own models call their attention function."""
    folder = Path(transformers.__file__).parent / "models"
    passed = {}
    for file in sorted(folder.glob("*/modeling_*.py")):
        text = file.read_text()
        if "attention_interface(" not in text:
            continue
        for call in ast.walk(ast.parse(text)):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "attention_interface":
                passed |= {keyword.arg: file.name for keyword in call.keywords if keyword.arg is not None}
    own = set(inspect.signature(attention_forward).parameters) - {"options"}
    known = own | BY_SDPA | HARMLESS | PACKED | REFUSED.keys()
    assert len(passed) > 15
    assert {name: file for name, file in passed.items() if name not in known} == {}
