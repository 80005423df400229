"""CLIP's and similar text encoders, and their models of pictures and texts: pooled token, padding, refusals."""

import copy
import json
import warnings

import pytest
import torch

import fastbert
from dropin_models import MASKS, SIZES, TOWERS, WIDTH, assert_gradients, three
from fastbert.testing import assert_within_budget
from test_dropin_families import assert_fused, batch_of, build

transformers = pytest.importorskip("transformers", minversion="5.24", reason="these rows are of it")
pytestmark = pytest.mark.once

CAUSAL = [name for name in TOWERS if not name.startswith("Siglip")]
EOS = 3


def with_ends(batch: dict[str, torch.Tensor], end: int) -> dict[str, torch.Tensor]:
    """The batch with `end` as each text's last token and as padding, as CLIP's own tokenizer pads."""
    mask = batch["attention_mask"]
    last = mask.sum(1, keepdim=True) - 1
    columns = torch.arange(mask.shape[1])
    return batch | {"input_ids": torch.where(columns >= last, end, batch["input_ids"])}


@pytest.mark.parametrize("end", [EOS, 59], ids=["eos", "largest"])
@pytest.mark.parametrize("name", TOWERS)
def test_padding_is_left_out_and_the_pooled_token_is_the_originals(name, end):
    """Padding has another id than the config's pad_token_id. SigLIP pools the last column, which is padding."""
    models = three(build(name), padding="auto")
    ours, mask = models[0], MASKS["right"]
    batch = with_ends(batch_of(name, models[1], mask), end)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about zeros at padding
        outputs = [model(**batch, output_hidden_states=True) for model in models]
    assert_within_budget(*(output.pooler_output for output in outputs), name="pooler_output")
    assert_within_budget(*(output.last_hidden_state[mask] for output in outputs), name="last_hidden_state")
    for number, states in enumerate(zip(*(output.hidden_states for output in outputs), strict=True)):
        assert_within_budget(*(state[mask] for state in states), name=f"state {number}")
    left_out = ~mask
    left_out[:, -1] &= name in CAUSAL
    assert not outputs[0].last_hidden_state[left_out].any()
    weights = torch.randn(outputs[1].pooler_output.shape)
    losses = [(output.pooler_output * weights.to(output.pooler_output.dtype)).sum() for output in outputs]
    assert_gradients(*models, losses)
    assert_fused(ours)


@pytest.mark.parametrize("name", ["CLIPTextModel", "SiglipTextModel"])
@pytest.mark.parametrize("padding", ["auto", "zero"])
def test_a_pooled_token_that_is_masked(name, padding):
    """It is still computed."""
    models = three(build(name), padding=padding)
    batch = batch_of(name, models[1], MASKS["right"])
    batch["input_ids"] = batch["input_ids"].clamp(min=4)
    batch["input_ids"][:, -1] = EOS  # CLIP pools the first such token
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_within_budget(*(model(**batch).pooler_output for model in models))
    assert_fused(models[0])


@pytest.mark.parametrize("name", ["CLIPTextModel", "Owlv2TextTransformer"])
def test_later_tokens_change_nothing(name):
    model = fastbert.accelerate(build(name), impl="native")
    ids = torch.randint(5, 60, (2, WIDTH))
    other = torch.cat([ids[:, :9], torch.randint(5, 60, (2, WIDTH - 9))], 1)
    with torch.no_grad():
        before, after = (model(one).last_hidden_state for one in (ids, other))
    torch.testing.assert_close(after[:, :9], before[:, :9])
    assert not torch.allclose(after[:, 9:], before[:, 9:])


def clip(kind: str = "CLIP") -> torch.nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = sizes | {"vocab_size": 60, "max_position_embeddings": 40, "eos_token_id": EOS}
    vision = sizes | {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    more = {"projection_dim": 16} if kind == "CLIP" else {}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, **more)
    model = getattr(transformers, f"{kind}Model")(config)
    with torch.no_grad():
        for p in model.text_model.parameters():
            p.normal_(std=0.2) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def test_the_text_features_and_scores_of_clip():
    """The model of pictures and texts passes on what its text tower returns."""
    models = three(clip(), padding="auto")
    mask = MASKS["right"]
    ids = torch.where(mask, torch.randint(5, 60, mask.shape), EOS)
    batch = with_ends({"input_ids": ids, "attention_mask": mask.long()}, EOS)
    pictures = torch.randn(3, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = [model(**batch, pixel_values=pictures.to(model.dtype)) for model in models]
        features = [model.get_text_features(**batch).pooler_output for model in models]
    assert_within_budget(*features)
    assert_within_budget(*(output.logits_per_text for output in outputs))
    assert_gradients(*models, [output.logits_per_text.square().sum() for output in outputs])
    assert_fused(models[0])
    assert not any("computed as the original does" in why for why in fastbert.explain(models[0]).left.values())


def test_embeddings_in_place_of_ids_are_refused_as_in_the_original():
    ours, plain, _ = three(build("CLIPTextModel"))
    embeds = torch.randn(2, WIDTH, SIZES["hidden_size"])
    with pytest.raises(ValueError, match="input_ids") as expected:
        plain(inputs_embeds=embeds)
    with pytest.warns(UserWarning, match="there are no input_ids"), pytest.raises(ValueError, match="input_ids") as got:
        ours(inputs_embeds=embeds)
    assert str(got.value) == str(expected.value)


def test_a_config_that_turns_causal_attention_off_is_refused():
    """CLIP's code then has it on in attention, and off in its masks."""
    model = build("CLIPTextModel")
    model.config.is_causal = False
    with pytest.warns(UserWarning, match="replaced nothing"):
        fastbert.accelerate(model)
    assert "turns causal attention off" in str(fastbert.explain(model))


@pytest.mark.parametrize("name", ["LlamaModel", "Qwen3Model", "GemmaModel"])
def test_layers_that_are_set_to_see_later_tokens(name):
    """In a batch with padding the original's masks still hide later tokens. An accelerated model did not."""
    ours, plain, _ = three(build(name))
    batch = batch_of(name, plain, MASKS["right"])
    for model in (ours, plain):
        for layer in model.layers:
            layer.self_attn.is_causal = False
    with torch.no_grad(), pytest.warns(UserWarning, match="its masks do not"):
        got = ours(**batch).last_hidden_state
    with torch.no_grad():
        assert torch.equal(got, plain(**batch).last_hidden_state)


def test_a_copy_of_a_tower_and_restore():
    plain = build("CLIPTextModel")
    ours = fastbert.accelerate(copy.deepcopy(plain), impl="native", padding="exact")
    batch = batch_of("CLIPTextModel", plain, MASKS["right"])
    with torch.no_grad():
        first = ours(**batch).pooler_output
        assert torch.equal(copy.deepcopy(ours)(**batch).pooler_output, first)
        assert torch.equal(fastbert.restore(ours)(**batch).pooler_output, plain(**batch).pooler_output)


# ---- sentence-transformers -----------------------------------------------------------------------------------

TEXTS = ["a cat", "the dog runs", "x " * 20, "hello world of cats and dogs", "no"] * 10


@pytest.fixture
def sentence_model(tmp_path):
    """sentence_model(kind) -> SentenceTransformer of a small CLIP or SigLIP, whose tokenizer knows letters."""
    sentence_transformers = pytest.importorskip("sentence_transformers", minversion="6", reason="it reads such folders")
    pytest.importorskip("PIL", reason="transformers' processors of pictures need it")
    letters = [chr(letter) for letter in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(tmp_path, model_max_length=40)

    def build(kind: str):
        model = clip(kind)
        model.save_pretrained(tmp_path)
        pictures = getattr(transformers, f"{kind}ImageProcessor")(size={"height": 16, "width": 16})
        getattr(transformers, f"{kind}Processor")(pictures, tokenizer).save_pretrained(tmp_path)
        return sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")

    return build


def test_texts_encoded_by_clip_in_sentence_transformers(sentence_model):
    model = sentence_model("CLIP")
    before = model.encode(TEXTS)
    fastbert.accelerate(model, impl="native")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = model.encode(TEXTS)
    assert abs(got - before).max() <= 1e-5 * abs(before).max()
    report = fastbert.explain(model)
    assert "encode" in report.replaced
    assert not any("computed as the original does" in why for why in report.left.values()), report


def test_texts_encoded_by_siglip_stay_in_their_batches(sentence_model):
    """It pools the last column, so that a text's vector depends on where its batch ends."""
    model = sentence_model("Siglip")
    before = model.encode(TEXTS)
    fastbert.accelerate(model, impl="native")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = model.encode(TEXTS)
    assert abs(got - before).max() <= 1e-5 * abs(before).max()
    assert "reads the last column" in fastbert.explain(model).left["encode"]
