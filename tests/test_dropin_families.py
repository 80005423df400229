"""The encoders of transformers beyond those of test_dropin_transformers, compared with the originals and float64.

Each is one row of the table of families. The code is the same for all, so the tests cover the few things in which rows
differ: values and gradients with padding on either side, outputs, heads, dropout.
"""

import copy
import importlib
import warnings

import pytest
import torch

import fastbert
from dropin_models import HEADS, MASKS, MODELS, RMS, SIZES, T5, TOWERS, WIDTH, assert_gradients, labels_of, three
from fastbert.dropin.families import FAMILIES, FAMILIES_OF_4
from fastbert.testing import assert_within_budget

transformers = pytest.importorskip("transformers", minversion="5.24", reason="these encoders are accelerated")
pytestmark = pytest.mark.once

FROM_PAD = {"pad_token_id": 1}  # the first position is after that of padding
BART = {  # models with a decoder too
    "d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 96, "scale_embedding": True,
}  # fmt: skip
ESM = FROM_PAD | {"mask_token_id": 4, "position_embedding_type": "rotary"}
# class name of the encoder -> (class name of its config, settings beyond SIZES)
OTHERS = {
    "DebertaV2Model": (
        "DebertaV2Config",
        {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 6, "type_vocab_size": 2},
    ),
    "ErnieModel": ("ErnieConfig", {}),
    "Data2VecTextModel": ("Data2VecTextConfig", FROM_PAD),
    "RemBertModel": ("RemBertConfig", {"input_embedding_size": 24, "output_embedding_size": 24}),
    "SplinterModel": ("SplinterConfig", {}),
    "BertGenerationEncoder": ("BertGenerationConfig", {}),
    "ChineseCLIPTextModel": ("ChineseCLIPTextConfig", {}),
    "AlignTextModel": ("AlignTextConfig", {}),
    "BridgeTowerTextModel": ("BridgeTowerTextConfig", FROM_PAD),
    "ClapTextModel": ("ClapTextConfig", FROM_PAD),
    "AltRobertaModel": ("AltCLIPTextConfig", FROM_PAD | {"project_dim": 16}),
    "MegatronBertModel": ("MegatronBertConfig", {}),
    "XLMRobertaXLModel": ("XLMRobertaXLConfig", FROM_PAD),
    "RobertaPreLayerNormModel": ("RobertaPreLayerNormConfig", FROM_PAD),
    "NomicBertModel": ("NomicBertConfig", {}),
    "GteModel": ("GteConfig", {}),
    "JinaEmbeddingsV3Model": ("JinaEmbeddingsV3Config", {}),
    "EsmModel": ("EsmConfig", ESM | {"token_dropout": True}),
    "LayoutLMModel": ("LayoutLMConfig", {"max_2d_position_embeddings": 32}),
    "RoCBertModel": (
        "RoCBertConfig",
        {"pronunciation_vocab_size": 60, "shape_vocab_size": 60, "pronunciation_embed_dim": 8, "shape_embed_dim": 8},
    ),
    "MarkupLMModel": (
        "MarkupLMConfig",
        FROM_PAD
        | {"max_xpath_tag_unit_embeddings": 20, "max_xpath_subs_unit_embeddings": 20, "xpath_unit_hidden_size": 8}
        | {"max_depth": 4, "tag_pad_id": 19, "subs_pad_id": 19},
    ),
    "TapasModel": ("TapasConfig", {}),
    "VisualBertModel": ("VisualBertConfig", {"visual_embedding_dim": 20}),
    "ModernBertDecoderModel": (
        "ModernBertDecoderConfig",
        {"local_attention": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1}
        | {"sep_token_id": 2, "use_cache": False, "attn_implementation": "sdpa"}
        | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    **RMS,
    **TOWERS,
    **{f"{name}Encoder": (f"{name}Config", BART) for name in ("Bart", "MBart", "PLBart")},
}  # fmt: skip
# families whose heads read what BERT's heads do, or the last token
WITH_HEADS = (
    "DebertaV2", "Ernie", "Data2VecText", "RemBert", "MegatronBert", "XLMRobertaXL", "RobertaPreLayerNorm", "EuroBert",
    "Ultrabert", "Esmc", "ModernBertDecoder", "Gemma3Text", "Gemma", "Qwen3", "Qwen2", "Mistral", "Llama",
)  # fmt: skip


NOT_EXPORTED = {  # name of a class -> its module
    "AltRobertaModel": "altclip",
    "BartEncoder": "bart",
    "BridgeTowerTextModel": "bridgetower",
    "MBartEncoder": "mbart",
    "OwlViTTextTransformer": "owlvit",
    "Owlv2TextTransformer": "owlv2",
    "PLBartEncoder": "plbart",
}


DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "dropout_rate", "dropout",
    "activation_dropout",
)  # fmt: skip


def class_of(name: str) -> type:
    home = NOT_EXPORTED.get(name)
    return getattr(
        transformers if home is None else importlib.import_module(f"transformers.models.{home}.modeling_{home}"), name
    )


def build(name: str, head: str | None = None, dropout: float = 0.0, **more) -> torch.nn.Module:
    kind, settings = OTHERS[name]
    # models with Llama's structure compute eager attention's softmax in float32, whatever their dtype
    attention = "sdpa" if name in RMS else "eager"
    config = getattr(transformers, kind)(**{**SIZES, "attn_implementation": attention, **settings, **more})
    for probability in DROPOUTS:
        setattr(config, probability, dropout)
    cls = class_of(name) if head is None else getattr(transformers, name.removesuffix("Model") + head)
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.1)
    return model


def batch_of(name: str, model: torch.nn.Module, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """A batch with every input that the encoder's embeddings take."""
    ids = torch.randint(5, 60, (4, WIDTH))
    if name == "EsmModel":
        ids[:, 1] = model.config.mask_token_id  # ESM scales the other embeddings by the number of masked tokens
    batch = {"input_ids": ids}
    if mask is not None:
        batch = {"input_ids": torch.where(mask, ids, model.config.pad_token_id), "attention_mask": mask.long()}
    if getattr(model.config, "type_vocab_size", 0) > 1 and name not in ("BertGenerationEncoder", "EsmModel"):
        batch["token_type_ids"] = torch.randint(0, 2, ids.shape)
    if name == "LayoutLMModel":
        batch["bbox"] = torch.randint(0, 8, (*ids.shape, 4)).cumsum(-1)
    if name == "TapasModel":
        batch["token_type_ids"] = torch.randint(0, 2, (*ids.shape, 7))
    if name == "RoCBertModel":
        batch |= {f"input_{of}_ids": torch.randint(0, 60, ids.shape) for of in ("shape", "pronunciation")}
    if name == "MarkupLMModel":
        batch |= {f"xpath_{of}_seq": torch.randint(0, 19, (*ids.shape, 4)) for of in ("tags", "subs")}
    return batch


def assert_fused(model: torch.nn.Module) -> None:
    """Every call so far ran packed, and none ran the original's code."""
    report = fastbert.explain(model)
    assert report.replaced, report
    assert not any("ran its own code" in why or "runs its own code" in why for why in report.left.values()), report


def test_every_family_of_the_table_is_tested():
    named = {name.replace("EncoderModel", "Stack") for name in OTHERS}
    assert {prefix + "Model" for prefix, _, _ in MODELS.values()} | named == set(FAMILIES)
    assert {f"{name}Model" for name in WITH_HEADS} == {
        name for name in OTHERS if name not in T5 and FAMILIES[name].heads
    }


# one row of each kind in bfloat16
KINDS = (
    "DebertaV2Model", "ErnieModel", "RemBertModel", "MegatronBertModel", "NomicBertModel", "GteModel", "EsmModel",
    "LayoutLMModel", "EuroBertModel", "EsmcModel", "T5EncoderModel", "UMT5EncoderModel",
)  # fmt: skip
DECODERS = ("Gemma3TextModel", "Qwen3Model", "MistralModel", "GemmaModel", "ModernBertDecoderModel")
RUNS = [(name, "right", torch.float32) for name in OTHERS] + [(name, "left", torch.bfloat16) for name in KINDS]
RUNS += [(name, side, torch.bfloat16) for name in (*DECODERS, *TOWERS) for side in ("left", "right")]


@pytest.mark.parametrize(("name", "mask", "dtype"), RUNS, ids=lambda value: str(value).removeprefix("torch."))
def test_values_and_gradients(name, mask, dtype):
    """Every returned tensor, at padding too, and the gradient of every parameter."""
    models = ours, plain, truth = three(build(name), dtype, padding="exact")
    batch = batch_of(name, plain, MASKS[mask])
    outputs = [model(**batch, output_hidden_states=True) for model in models]
    assert type(outputs[0]) is type(outputs[1])
    assert list(outputs[0]) == list(outputs[1])
    for field in outputs[1]:
        values = [output[field] for output in outputs]
        values = values if field == "hidden_states" else [[value] for value in values]
        for number, of_each in enumerate(zip(*values, strict=True)):
            assert_within_budget(*of_each, name=f"{field} {number}")
    weights = torch.randn(outputs[1].last_hidden_state.shape)
    losses = [(o.last_hidden_state * weights.to(o.last_hidden_state.dtype)).sum() for o in outputs]
    assert_gradients(ours, plain, truth, losses)
    assert_fused(ours)


@pytest.mark.parametrize("name", OTHERS)
def test_ids_alone_and_a_tuple_as_output(name):
    """Arguments that are not given have the original's defaults."""
    ours, plain, truth = three(build(name), padding="exact")
    ids = batch_of(name, plain, None)["input_ids"]
    with torch.no_grad():
        outputs = [model(ids, return_dict=False) for model in (ours, plain, truth)]
    assert [t is None for t in outputs[0]] == [t is None for t in outputs[1]]
    for of_each in zip(*outputs, strict=True):
        if of_each[0] is not None:
            assert_within_budget(*of_each)
    assert_fused(ours)


@pytest.mark.parametrize("family", WITH_HEADS)
def test_heads_read_no_padding(family):
    """Losses that leave out padding: each head reads what BERT's head of the same name reads."""
    mask = MASKS["right"]
    for head in (*HEADS, "ForPreTraining", "ForNextSentencePrediction"):
        if not hasattr(transformers, family + head):
            continue
        models = ours, plain, truth = three(build(f"{family}Model", head), padding="auto")
        batch = batch_of(f"{family}Model", plain, mask) | labels_of(head, mask)
        if head == "ForPreTraining":
            batch["next_sentence_label"] = torch.randint(0, 2, (4,))
        if head == "ForMultipleChoice":
            batch = {k: v if k == "labels" else v.view(2, 2, WIDTH) for k, v in batch.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # some heads clamp given positions in place
            losses = [model(**{k: v.clone() for k, v in batch.items()}).loss for model in models]
        for loss in losses[:2]:
            torch.testing.assert_close(loss.double(), losses[2].double(), rtol=1e-5, atol=1e-5, msg=head)
        if head in ("ForTokenClassification", "ForQuestionAnswering"):
            assert_gradients(ours, plain, truth, losses)
        assert_fused(ours)


@pytest.mark.parametrize("name", OTHERS)
def test_dropout_is_drawn_in_training_and_only_there(name):
    """Two passes in training differ; the mean of many is near that without dropout. Evaluation draws nothing."""
    model = fastbert.accelerate(build(name, dropout=0.1), impl="native", padding="exact")
    batch = batch_of(name, model, MASKS["right"])
    with torch.no_grad():
        kept = model(**batch).last_hidden_state
        state = torch.get_rng_state()
        assert torch.equal(model(**batch).last_hidden_state, kept)
        assert torch.equal(torch.get_rng_state(), state)
        model.train()
        drawn = torch.stack([model(**batch).last_hidden_state for _ in range(12)])
    assert not torch.equal(drawn[0], drawn[1])
    spread = drawn.std(0).mean()
    assert spread > 0.01
    assert (drawn.mean(0) - kept).abs().mean() < spread  # the mean of twelve has an error of 0.29 of the spread
    assert_fused(model)


@pytest.mark.parametrize("name", ["NomicBertModel", "EsmModel", "MegatronBertModel"])
def test_copies_and_restore(name):
    plain = build(name)
    ours = fastbert.accelerate(copy.deepcopy(plain), impl="native", padding="exact")
    batch = batch_of(name, plain, MASKS["right"])
    with torch.no_grad():
        first = ours(**batch).last_hidden_state
        assert torch.equal(copy.deepcopy(ours)(**batch).last_hidden_state, first)
        restored = fastbert.restore(ours)(**batch).last_hidden_state
        assert torch.equal(restored, plain(**batch).last_hidden_state)


def test_esm_does_not_change_inputs_embeds():
    """In the original they skip the embeddings' LayerNorm, and the zeros for padding."""
    models = three(build("EsmModel", emb_layer_norm_before=True), padding="exact")
    mask = MASKS["right"].long()
    embeds = torch.randn(*mask.shape, SIZES["hidden_size"])
    with torch.no_grad():
        outputs = [model(inputs_embeds=embeds.to(model.dtype), attention_mask=mask) for model in models]
    assert_within_budget(*(output.last_hidden_state for output in outputs))
    assert_fused(models[0])


@pytest.mark.parametrize("side", ["right", "left", "holes"])
def test_esm_with_a_table_of_positions(side):
    """ESM-1b and ESM-1v, whose embeddings also have a norm."""
    more = {"position_embedding_type": "absolute", "emb_layer_norm_before": True}
    models = ours, plain, truth = three(build("EsmModel", **more), padding="exact")
    batch = batch_of("EsmModel", plain, MASKS[side])
    outputs = [model(**batch, output_hidden_states=True) for model in models]
    for number, states in enumerate(zip(*(output.hidden_states for output in outputs), strict=True)):
        assert_within_budget(*states, name=f"state {number}")
    assert_within_budget(*(output.pooler_output for output in outputs))
    weights = torch.randn(outputs[1].last_hidden_state.shape)
    losses = [(o.last_hidden_state * weights.to(o.last_hidden_state.dtype)).sum() for o in outputs]
    assert_gradients(ours, plain, truth, losses)
    assert_fused(ours)


def test_tapas_with_other_types():
    """Its config gives the number of token types. Without token types, zeros stand for as many."""
    ours, plain, truth = three(build("TapasModel", type_vocab_sizes=[3, 4] * 4), padding="exact")
    ids = batch_of("TapasModel", plain, None)["input_ids"]
    with torch.no_grad():
        assert_within_budget(*(model(ids).last_hidden_state for model in (ours, plain, truth)))
    assert_fused(ours)


# ---- what is left alone, by name -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("ErnieModel", {"use_task_id": True}, "has no embeddings.task_type_embeddings.weight"),
        ("EsmModel", {"position_embedding_type": "relative_key"}, "its positions are relative_key"),
        ("RemBertModel", {"is_decoder": True}, "it is a decoder"),
    ],
    ids=["ernie_with_tasks", "esm_with_distances", "a_decoder"],
)
def test_unsupported_settings_are_refused(name, settings, why):
    with pytest.warns(UserWarning, match="replaced nothing"):
        model = fastbert.accelerate(build(name, **settings))
    assert why in str(fastbert.explain(model))


def test_layers_that_the_config_leaves_out_do_not_run():
    """Nomic BERT, GTE and Jina v3 run the first `num_hidden_layers` of their layers; the number may be set later."""
    ours, plain, _ = three(build("NomicBertModel"), padding="exact")
    batch = batch_of("NomicBertModel", plain, MASKS["right"])
    with torch.no_grad():
        both = ours(**batch).last_hidden_state
        ours.config.num_hidden_layers = plain.config.num_hidden_layers = 1
        with pytest.warns(UserWarning, match="1 of its 2 layers"):
            one = ours(**batch).last_hidden_state
        assert torch.equal(one, plain(**batch).last_hidden_state)
    assert not torch.allclose(one, both)


def test_pictures_beside_text_run_the_originals_code():
    """VisualBERT's `visual_embeds` make sequences longer than `input_ids`."""
    ours, plain, _ = three(build("VisualBertModel"), padding="exact")
    batch = batch_of("VisualBertModel", plain, MASKS["right"]) | {"visual_embeds": torch.randn(4, 3, 20)}
    with torch.no_grad(), pytest.warns(UserWarning, match="visual_embeds was given"):
        got = ours(**batch).last_hidden_state
    assert torch.equal(got, plain(**batch).last_hidden_state)


def test_gte_without_token_types():
    """gte-base-en-v1.5 has None in place of the table of token types."""
    ours, plain, truth = three(build("GteModel", type_vocab_size=0), padding="exact")
    batch = batch_of("GteModel", plain, MASKS["right"])
    with torch.no_grad():
        assert_within_budget(*(model(**batch).last_hidden_state for model in (ours, plain, truth)))
    assert_fused(ours)


VALUES = {  # of a mask [B, S]: numbers of parts, a value for padding, weights
    "parts": lambda mask: mask * (1 + (torch.arange(WIDTH) > 4) + (torch.arange(WIDTH) > 8)),
    "minus_one": lambda mask: mask - (1 - mask),
    "weights": lambda mask: mask * torch.linspace(0.1, 1.0, WIDTH),
}


@pytest.mark.filterwarnings("ignore:.*leaves this call")
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("name", [name for name in OTHERS if name not in TOWERS])
def test_values_of_a_mask_other_than_0_and_1(name, values):
    """Most models ask only which of them are 0. DeBERTa multiplies its embeddings by them, and LayoutLM and MarkupLM
    subtract them from 1, so that a value of 2 hides all other tokens."""
    plain = build(name)
    batch = batch_of(name, plain, MASKS["right"])
    batch["attention_mask"] = VALUES[values](batch["attention_mask"])
    ours = fastbert.accelerate(copy.deepcopy(plain), impl="native", padding="zero")
    with torch.no_grad():
        mine, theirs = ours(**batch)[0], plain(**batch)[0]
    real = MASKS["right"]
    torch.testing.assert_close(mine[real], theirs[real], atol=2e-4, rtol=1e-3, equal_nan=True)


def test_transformers_4_computes_with_the_values_of_a_mask():
    assert all(family.zero_or_one for family in FAMILIES_OF_4.values())
