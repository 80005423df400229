"""Decoders that embed and rerank texts, and T5: padding on the left, windows, the last token, caches."""

import copy
import warnings

import pytest
import torch

import fastbert
from dropin_models import MASKS, SIZES, T5, WIDTH, assert_gradients, exact, three
from fastbert.testing import assert_within_budget
from test_dropin_families import assert_fused, batch_of, build

transformers = pytest.importorskip("transformers", minversion="5.24", reason="its decoders are accelerated")
pytestmark = pytest.mark.once

NARROW = {  # windows that do not cover a text of thirteen tokens
    "UltrabertModel": {"sliding_window": 3},
    "Gemma3TextModel": {"sliding_window": 6},
    "Qwen3Model": {"sliding_window": 4},
    "MistralModel": {"sliding_window": 4},
}
CAUSAL = ("Qwen3Model", "Qwen2Model", "MistralModel", "LlamaModel")


# a model that reads its first column computes all rows when padding is on the left; some of these see no token
SIDES = [(name, side) for name in (*NARROW, "Qwen2Model", "LlamaModel") for side in ("left", "right")]
SIDES.remove(("UltrabertModel", "left"))


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_every_token_with_windows_and_padding_on_either_side(name, side):
    """Padding is left out. The original's rows there see no token, and are not compared."""
    models = ours, plain, truth = three(build(name, **NARROW.get(name, {})))
    mask = MASKS[side]
    batch = batch_of(name, plain, mask)
    outputs = [model(**batch, output_hidden_states=True) for model in models]
    for number, states in enumerate(zip(*(output.hidden_states for output in outputs), strict=True)):
        assert_within_budget(*(state[mask] for state in states), name=f"state {number}")
    assert not outputs[0].last_hidden_state[~mask].any()
    weights = torch.randn(int(mask.sum()), SIZES["hidden_size"])
    losses = [(output.last_hidden_state[mask] * weights.to(output.last_hidden_state.dtype)).sum() for output in outputs]
    assert_gradients(ours, plain, truth, losses)
    assert_fused(ours)


def test_gemma_without_bidirectional_attention_is_causal():
    models = three(build("Gemma3TextModel", use_bidirectional_attention=False, sliding_window=4))
    mask = MASKS["left"]
    batch = batch_of("Gemma3TextModel", models[1], mask)
    with torch.no_grad():
        assert_within_budget(*(model(**batch).last_hidden_state[mask] for model in models))
    assert_fused(models[0])


@pytest.mark.parametrize("name", CAUSAL)
def test_later_tokens_change_nothing(name):
    model = fastbert.accelerate(build(name), impl="native")
    ids = torch.randint(5, 60, (2, WIDTH))
    other = ids.clone()
    other[:, 9:] = torch.randint(5, 60, (2, WIDTH - 9))
    with torch.no_grad():
        before, after = (model(one).last_hidden_state for one in (ids, other))
    torch.testing.assert_close(after[:, :9], before[:, :9])
    assert not torch.allclose(after[:, 9:], before[:, 9:])


def test_a_config_that_turns_causal_attention_off():
    """config.is_causal = False makes bidirectional encoders of decoders without windows."""
    models = three(build("Qwen2Model", is_causal=False))
    mask = MASKS["right"]
    batch = batch_of("Qwen2Model", models[1], mask)
    with torch.no_grad():
        outputs = [model(**batch).last_hidden_state[mask] for model in models]
    assert_within_budget(*outputs)
    assert_fused(models[0])
    causal = build("Qwen2Model")
    with torch.no_grad():
        assert not torch.allclose(causal(**batch).last_hidden_state[mask], outputs[1])


@pytest.mark.parametrize(
    ("given", "why"),
    [({"use_cache": True}, "it returns a cache"), ({"is_causal": False}, "is_causal was given")],
    ids=["use_cache", "is_causal"],
)
def test_calls_that_run_a_decoders_own_code(given, why):
    ours, plain, _ = three(build("Qwen2Model"))
    ids = torch.randint(5, 60, (2, WIDTH))
    with torch.no_grad(), pytest.warns(UserWarning, match=why):
        got = ours(ids, **given)
    with torch.no_grad():
        expected = plain(ids, **given)
    assert list(got) == list(expected)
    assert torch.equal(got.last_hidden_state, expected.last_hidden_state)


def test_padding_on_the_left_that_is_read_runs_the_originals_code():
    """Its rows see no token, and eager attention gives them the mean of all values."""
    ours, plain, _ = three(build("Qwen2Model", attn_implementation="eager"), padding="exact")
    batch = batch_of("Qwen2Model", plain, MASKS["left"])
    with torch.no_grad(), pytest.warns(UserWarning, match="sees no token"):
        got = ours(**batch).last_hidden_state
    with torch.no_grad():
        assert torch.equal(got, plain(**batch).last_hidden_state)


def causal_lm(**more) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8, pad_token_id=0, **more)
    return transformers.Qwen3ForCausalLM(config).eval()


def test_generate_and_its_cache_are_the_originals():
    plain = causal_lm()
    ours = fastbert.accelerate(copy.deepcopy(plain), impl="native")
    ids = torch.randint(5, 60, (2, 7))
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(ours.generate(ids, **options), plain.generate(ids, **options))
        assert torch.equal(ours(ids).logits, plain(ids).logits)


def test_a_language_model_is_trained():
    """Without a cache, training steps are packed. The layers above the encoder read all rows."""
    models = three(causal_lm(use_cache=False), padding="auto")
    mask = MASKS["right"]
    ids = torch.randint(5, 60, mask.shape)
    batch = {"input_ids": torch.where(mask, ids, 0), "attention_mask": mask.long()}
    labels = torch.where(mask, ids, -100)
    losses = [model.train()(**batch, labels=labels).loss for model in models]
    assert_gradients(*models, losses)
    assert_fused(models[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_reranker_reads_the_last_token(side):
    """Below a head that takes the last token, no padding is computed, on whichever side it is."""
    models = three(build("Qwen3Model", head="ForSequenceClassification", num_labels=1), padding="auto")
    mask = MASKS[side]
    batch = batch_of("Qwen3Model", models[1], mask)
    with torch.no_grad():
        assert_within_budget(*(model(**batch).logits for model in models), name=side)
    assert_fused(models[0])
    assert not any("computed as the original does" in why for why in fastbert.explain(models[0]).left.values())


KEEPS = {
    "all": {},
    "the_last": {"logits_to_keep": 1},
    "the_last_three": {"logits_to_keep": 3},
    "columns": {"logits_to_keep": torch.tensor([-1, 5])},
    "each_text_its_own": {"logits_to_keep": torch.tensor([[12, 3], [11, 12], [12, 12], [10, 12]])},
    "a_mask": {"logits_to_keep": torch.arange(4 * WIDTH).view(4, WIDTH) % 3 == 0},
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS)
def test_the_logits_of_a_language_model(side, keep):
    """Every returned logit and every gradient, at padding too. Padding on the left sees no token: torch's SDPA gives
    zeros there."""
    models = three(build("Qwen3Model", head="ForCausalLM", sliding_window=4), padding="auto")
    batch = batch_of("Qwen3Model", models[1], MASKS[side]) | keep
    logits = [model(**batch).logits for model in models]
    assert_within_budget(*logits)
    weights = torch.randn(logits[1].shape)
    assert_gradients(*models, [(each * weights.to(each.dtype)).sum() for each in logits])
    assert_fused(models[0])


@pytest.mark.parametrize("name", ["Qwen3", "Qwen2", "Mistral", "Llama", "Gemma3"])
def test_a_reranker_by_yes_and_no_computes_no_padding(name):
    """Qwen3-Reranker reads logits at the last token, with padding on the left. Its encoder ran its own code, as all
    rows counted as read."""
    of = "Gemma3TextModel" if name == "Gemma3" else f"{name}Model"
    head = "ForCausalLM"
    models = three(causal_lm_of(of, f"{name}{head}"), padding="auto")
    batch = batch_of(of, models[1], MASKS["left"])
    with torch.no_grad():
        logits = [model(**batch, logits_to_keep=1).logits[:, -1] for model in models]
    assert_within_budget(*(each[:, [7, 9]].log_softmax(1) for each in logits))
    assert_fused(models[0])
    assert not any("computed as the original does" in why for why in fastbert.explain(models[0]).left.values())


def causal_lm_of(of: str, name: str) -> torch.nn.Module:
    encoder = build(of)
    torch.manual_seed(0)
    model = getattr(transformers, name)(encoder.config).eval()
    model.model.load_state_dict(encoder.state_dict())
    return model


def test_hidden_states_with_kept_logits():
    """They are returned at padding too."""
    models = three(build("Qwen3Model", head="ForCausalLM"), padding="auto")
    batch = batch_of("Qwen3Model", models[1], MASKS["left"])
    with torch.no_grad():
        outputs = [model(**batch, logits_to_keep=1, output_hidden_states=True) for model in models]
    assert_within_budget(*(output.logits for output in outputs))
    for states in zip(*(output.hidden_states for output in outputs), strict=True):
        assert_within_budget(*states)
    assert_fused(models[0])


def test_layers_in_another_order_are_refused():
    """config.layer_types gives the window for a layer's place, but here the layer has another number."""
    model = build("Qwen3Model")
    model.layers = torch.nn.ModuleList([model.layers[1], model.layers[0]])
    with pytest.warns(UserWarning, match="replaced nothing"):
        fastbert.accelerate(model)
    assert "layer 0 of its list is numbered 1" in str(fastbert.explain(model))


@pytest.mark.parametrize("changed", [[1, 0], [1, 1]], ids=["exchanged", "all_with_a_window"])
def test_layer_types_that_are_changed_in_place(changed):
    """The list stayed the same object, so the layers kept the windows of the first look."""
    ours, plain, _ = three(build("Qwen3Model", sliding_window=3))
    ids = torch.randint(5, 60, (2, WIDTH))
    with torch.no_grad():
        before = ours(ids).last_hidden_state
    for model in (ours, plain):
        types = model.config.layer_types
        types[:] = [types[number] for number in changed]
    with torch.no_grad(), pytest.warns(UserWarning, match="window of its own"):
        got = ours(ids).last_hidden_state
    with torch.no_grad():
        assert torch.equal(got, plain(ids).last_hidden_state)
    assert not torch.allclose(got, before, atol=1e-3)


def test_a_window_in_a_config_that_turns_causal_attention_off_is_refused():
    with pytest.warns(UserWarning, match="replaced nothing"):
        model = fastbert.accelerate(build("MistralModel", is_causal=False))
    assert "turns causal attention off, and it has a window" in str(fastbert.explain(model))


def test_gemma_whose_config_was_changed_runs_its_own_code():
    """Its masks follow the config, but its layers keep the setting with which they were made."""
    ours, plain, _ = three(build("Gemma3TextModel"))
    batch = batch_of("Gemma3TextModel", plain, MASKS["right"])
    for model in (ours, plain):
        model.config.use_bidirectional_attention = False
    with torch.no_grad(), pytest.warns(UserWarning, match="another use_bidirectional_attention"):
        got = ours(**batch).last_hidden_state
    with torch.no_grad():
        assert torch.equal(got, plain(**batch).last_hidden_state)


# ---- T5 ----------------------------------------------------------------------------------------------------


def test_only_the_encoder_of_t5_is_packed():
    """Its decoder has the encoder's class, runs its own code, and generates the same tokens."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=60, d_model=64, num_layers=2, num_heads=4, d_kv=16, d_ff=96, decoder_start_token_id=0
    )
    plain = transformers.T5ForConditionalGeneration(config).eval()
    ours = fastbert.accelerate(copy.deepcopy(plain), impl="native")
    mask = MASKS["right"]
    batch = {"input_ids": torch.randint(5, 60, mask.shape), "attention_mask": mask.long()}
    labels = torch.randint(5, 60, (4, 6))
    models = ours, plain, exact(copy.deepcopy(plain).double())
    assert_gradients(*models, [model(**batch, labels=labels).loss for model in models])
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(ours.generate(**batch, **options), plain.generate(**batch, **options))
    report = fastbert.explain(ours)
    assert "T5Stack: unpads once" in report.replaced["encoder"]
    assert "decoder" not in report.replaced
    assert_fused(ours)


@pytest.mark.parametrize("name", T5)
def test_t5_refuses_a_cache_as_the_original(name):
    """Only T5's decoder allows use_cache=True. An accelerated encoder returned its states without an error."""
    ours, plain, _ = three(build(name))
    ids = torch.randint(5, 60, (2, WIDTH))
    with torch.no_grad():
        with pytest.raises(ValueError, match="use_cache") as expected:
            plain(ids, use_cache=True)
        with (
            pytest.warns(UserWarning, match="use_cache=True was given"),
            pytest.raises(ValueError, match="use_cache") as got,
        ):
            ours(ids, use_cache=True)
    assert str(got.value) == str(expected.value)


@pytest.mark.parametrize("name", T5)
def test_t5_in_float16_clamps_overflow(name):
    ours, plain, _ = three(build(name), torch.float16)
    ids = torch.randint(5, 60, (2, WIDTH))
    with torch.no_grad(), pytest.warns(UserWarning, match="clamps values that overflow"):
        got = ours(ids).last_hidden_state
    with torch.no_grad():
        assert torch.equal(got, plain(ids).last_hidden_state)


def test_t5_with_a_layer_in_float32():
    """transformers keeps `wo` in float32 if a checkpoint asks for it, and casts to it and back."""
    ours, plain, _ = three(build("T5EncoderModel"), torch.bfloat16)
    for model in (ours, plain):
        for block in model.encoder.block:
            block.layer[1].DenseReluDense.wo.float()
    ids = torch.randint(5, 60, (2, WIDTH))
    with torch.no_grad(), pytest.warns(UserWarning, match="several dtypes"):
        got = ours(ids).last_hidden_state
    with torch.no_grad():
        assert torch.equal(got, plain(ids).last_hidden_state)
