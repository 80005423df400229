"""Small models of transformers' families, batches for them, and comparisons of their outputs with float64."""

import copy
from functools import partial

import pytest
import torch

import fastbert
from fastbert.dropin.families import FAMILIES
from fastbert.stack.description import NormKind
from fastbert.testing import assert_within_budget, relative_rms

transformers = pytest.importorskip("transformers", reason="its models are accelerated")

# heads of 16 columns, and widths that are multiples of 32: what attention and whole layers in C++ take
SIZES = {
    "vocab_size": 60, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "max_position_embeddings": 40,
}  # fmt: skip
WIDTH = 13
HEADS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering",
         "ForMultipleChoice")  # fmt: skip

# the ALBERT of transformers 4 cannot run a group of two layers
GROUP = 2 if int(transformers.__version__.split(".")[0]) >= 5 else 1

# family -> (prefix of its class names, settings of its config beyond SIZES, heads beyond HEADS)
MODELS = {
    "bert": ("Bert", {}, ("ForPreTraining", "ForNextSentencePrediction")),
    "roberta": ("Roberta", {"pad_token_id": 1}, ()),
    "xlm_roberta": ("XLMRoberta", {"pad_token_id": 1}, ()),
    "camembert": ("Camembert", {"pad_token_id": 1}, ()),
    "electra": ("Electra", {"embedding_size": 24}, ("ForPreTraining",)),
    "albert": ("Albert", {"embedding_size": 24, "num_hidden_groups": 2, "inner_group_num": GROUP}, ("ForPreTraining",)),
    "mpnet": ("MPNet", {}, ()),
    "distilbert": ("DistilBert", {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96}, ()),
    "modernbert": (
        "ModernBert",
        {"num_hidden_layers": 3, "local_attention": 6, "global_attn_every_n_layers": 2, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
        (),
    ),
}  # fmt: skip
_GROUPED = {"num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
_DECODER = _GROUPED | {"use_cache": False, "tie_word_embeddings": False}
# T5's bias is added by torch's operators for any size. Its scores have no scale: in wider heads bfloat16 rounds more.
_T5 = {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48, "relative_attention_num_buckets": 8,
       "relative_attention_max_distance": 10}  # fmt: skip
# Encoders with RMSNorm or norms of q and k: class -> (class of its config, settings beyond SIZES). With a narrower
# window these models would read padding, and would not be accelerated.
RMS = {
    "EuroBertModel": ("EuroBertConfig", _GROUPED),
    "UltrabertModel": (
        "UltrabertConfig", _GROUPED | {"sliding_window": 11, "layer_types": ["sliding_attention", "full_attention"]}
    ),
    "EsmcModel": ("EsmcConfig", {"pad_token_id": 1, "mask_token_id": 4}),
    "Gemma3TextModel": (
        "Gemma3TextConfig",
        _DECODER
        | {"use_bidirectional_attention": True, "sliding_window": 22, "query_pre_attn_scalar": 16}
        | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "Qwen3Model": (
        "Qwen3Config", _DECODER | {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}
    ),
    "GemmaModel": ("GemmaConfig", _DECODER),
    "Qwen2Model": ("Qwen2Config", _DECODER),
    "MistralModel": ("MistralConfig", _DECODER | {"sliding_window": 12}),
    "LlamaModel": ("LlamaConfig", _DECODER | {"attention_bias": True, "mlp_bias": True}),
    "T5EncoderModel": ("T5Config", _T5),
    "MT5EncoderModel": ("MT5Config", _T5 | {"feed_forward_proj": "gated-gelu"}),
    "UMT5EncoderModel": ("UMT5Config", _T5 | {"feed_forward_proj": "gated-gelu"}),
}  # fmt: skip
_TOWER = {"eos_token_id": 3, "attn_implementation": "sdpa", "hidden_act": "quick_gelu"}
# the text towers of CLIP's kind: their eager attention takes its softmax in float32, whatever the model's dtype
TOWERS = {
    "CLIPTextModel": ("CLIPTextConfig", _TOWER),
    "CLIPSegTextModel": ("CLIPSegTextConfig", _TOWER | {"eos_token_id": 2}),
    "XCLIPTextModel": ("XCLIPTextConfig", _TOWER),
    "MetaClip2TextModel": ("MetaClip2TextConfig", _TOWER | {"eos_token_id": 2}),
    "OwlViTTextTransformer": ("OwlViTTextConfig", _TOWER),
    "Owlv2TextTransformer": ("Owlv2TextConfig", _TOWER),
    "SiglipTextModel": ("SiglipTextConfig", _TOWER | {"projection_size": 16, "hidden_act": "gelu_pytorch_tanh"}),
    "Siglip2TextModel": ("Siglip2TextConfig", _TOWER | {"projection_size": 16, "hidden_act": "gelu_pytorch_tanh"}),
}
T5 = ("T5EncoderModel", "MT5EncoderModel", "UMT5EncoderModel")
MASKS = {
    "right": torch.arange(WIDTH) < torch.tensor([WIDTH, 7, 2, 4])[:, None],
    "left": torch.arange(WIDTH) >= WIDTH - torch.tensor([WIDTH, 7, 2, 4])[:, None],
    "holes": torch.arange(WIDTH) % torch.tensor([WIDTH, 2, 3, 5])[:, None] != 1,
    "none": None,
}


def config_of(family: str, **more):
    prefix, settings, _ = MODELS[family]
    sizes = {"vocab_size": 60, "max_position_embeddings": 40} if family == "distilbert" else SIZES
    # ModernBERT's eager attention takes its softmax in float32 whatever the model's dtype, and is NaN in float64
    attention = "sdpa" if family == "modernbert" else "eager"
    settings = {**sizes, **settings, "attn_implementation": attention, **more}
    return getattr(transformers, prefix + "Config")(**settings)


def build(family: str, head: str = "Model", **more) -> torch.nn.Module:
    """A small model in evaluation mode. Its weights are larger than initial ones, so that attention is not uniform."""
    model = getattr(transformers, MODELS[family][0] + head)(config_of(family, **more)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.1)
    return model


def batch_of(model: torch.nn.Module, mask: torch.Tensor | None, choices: int = 0) -> dict[str, torch.Tensor]:
    rows = 4 if mask is None else mask.shape[0]
    ids = torch.randint(5, 60, (rows, WIDTH))
    batch = {"input_ids": ids}
    if mask is not None:
        batch = {"input_ids": torch.where(mask, ids, model.config.pad_token_id), "attention_mask": mask.long()}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        batch["token_type_ids"] = torch.randint(0, 2, ids.shape)
    return {name: t.view(2, 2, WIDTH) for name, t in batch.items()} if choices else batch


def labels_of(head: str, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
    per_token = torch.randint(0, 2, (4, WIDTH))
    if mask is not None:
        per_token = torch.where(mask, per_token, -100)
    return {
        "ForMaskedLM": {"labels": per_token},
        "ForTokenClassification": {"labels": per_token},
        "ForSequenceClassification": {"labels": torch.randint(0, 2, (4,))},
        "ForNextSentencePrediction": {"labels": torch.randint(0, 2, (4,))},
        "ForMultipleChoice": {"labels": torch.randint(0, 2, (2,))},
        "ForQuestionAnswering": {
            "start_positions": torch.randint(0, 4, (4,)), "end_positions": torch.randint(0, 4, (4,))
        },
        "ForPreTraining": {"labels": per_token},
    }[head]  # fmt: skip


def assert_tensor(ours: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, name: str) -> None:
    """The budget. Plain torch may be right by luck in a small tensor, which gets twice that and some roundings."""
    if truth.numel() >= 64:
        assert_within_budget(ours, plain, truth, name=name)
    else:
        allowed = 4 * relative_rms(plain, truth) + 8 * torch.finfo(plain.dtype).eps
        assert relative_rms(ours, truth) <= allowed, name


def three(
    model: torch.nn.Module, dtype: torch.dtype = torch.float32, impl: str = "native", padding: str = "zero"
) -> tuple:
    """(accelerated, plain, truth) with the same weights."""
    rounded = model.to(dtype)
    ours = fastbert.accelerate(copy.deepcopy(rounded), impl=impl, padding=padding)
    return ours, rounded, exact(copy.deepcopy(rounded).double())


def exact(model: torch.nn.Module) -> torch.nn.Module:
    """The same model with norms that compute in its dtype; the RMSNorms of transformers compute in float32."""
    for module in model.modules():
        kinds = [family.layer.norm for family in FAMILIES.values() if family.layer.norm is not None]
        kind = next((kind for kind in kinds if kind.rms and type(module).__name__ in kind.classes), None)
        if kind is not None:
            module.forward = partial(_norm_of, module, kind)
    return model


def _norm_of(module: torch.nn.Module, kind: NormKind, x: torch.Tensor) -> torch.Tensor:
    mean_square = x.pow(2).mean(-1, keepdim=True)
    return x * torch.rsqrt(mean_square + getattr(module, kind.eps)) * (module.weight + kind.offset)


def assert_gradients(ours, plain, truth, losses) -> None:
    """All gradients together are within the budget. A single tensor's error in a single batch depends on luck, so each
    alone has a wider limit; `test_every_parameter_within_twice_the_originals_error` compares many batches.

    Where the true gradient is zero (a shift of all scores does not change a softmax), only its size is compared.
    """
    grads = []
    for model, loss in zip((ours, plain, truth), losses, strict=True):
        parameters = dict(model.named_parameters())
        of = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        grads.append(dict(zip(parameters, of, strict=True)))
    assert [name for name, g in grads[0].items() if g is None] == [name for name, g in grads[2].items() if g is None]
    kept = [name for name, g in grads[2].items() if g is not None]
    joined = [torch.cat([g[name].flatten() for name in kept]) for g in grads]
    assert_within_budget(*joined, name="all gradients")
    assert joined[2].isfinite().all()
    size = joined[2].norm()
    eps = torch.finfo(joined[1].dtype).eps
    for name in kept:
        mine, theirs, exact = (g[name].double() for g in grads)
        allowed = 4 * (theirs - exact).norm() + 8 * eps * exact.norm() + eps * size
        assert (mine - exact).norm() <= allowed, name
