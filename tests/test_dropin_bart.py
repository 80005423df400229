"""BART, mBART and PLBART: the encoder is packed, and the decoder runs its own code."""

import copy

import pytest
import torch

import fastbert
from dropin_models import MASKS, WIDTH, assert_gradients, three
from fastbert.testing import assert_within_budget
from test_dropin_families import BART, assert_fused, batch_of, build

transformers = pytest.importorskip("transformers", minversion="5.24", reason="these rows are of it")
pytestmark = pytest.mark.once

SIZES = BART | {
    "vocab_size": 60, "max_position_embeddings": 40, "decoder_layers": 1, "decoder_attention_heads": 4,
    "decoder_ffn_dim": 96, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
    "forced_eos_token_id": 2, "attn_implementation": "eager",
}  # fmt: skip


def whole(name: str, **more) -> torch.nn.Module:
    torch.manual_seed(0)
    kind = name.partition("For")[0]
    model = getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**SIZES, **more)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.1)
    return model


def test_pairs_of_texts_are_classified():
    """Every returned tensor, the encoder's at padding too, and every gradient."""
    models = three(whole("BartForSequenceClassification", num_labels=3), padding="auto")
    mask = MASKS["right"]
    ids = torch.where(mask, torch.randint(5, 60, mask.shape), 1)
    last = mask.sum(1) - 1
    ids[torch.arange(4), last] = 2  # the head takes the decoder's state at the last such token
    batch = {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.tensor([0, 1, 2, 1])}
    outputs = [model(**batch) for model in models]
    for name in ("logits", "encoder_last_hidden_state"):
        assert_within_budget(*(output[name] for output in outputs), name=name)
    assert_gradients(*models, [output.loss for output in outputs])
    assert_fused(models[0])


@pytest.mark.parametrize("name", ["BartForConditionalGeneration", "MBartForConditionalGeneration"])
def test_the_same_tokens_are_generated(name):
    plain = whole(name)
    ours = fastbert.accelerate(copy.deepcopy(plain), impl="native")
    mask = MASKS["right"]
    batch = {"input_ids": torch.where(mask, torch.randint(5, 60, mask.shape), 1), "attention_mask": mask.long()}
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 1}
    assert torch.equal(ours.generate(**batch, **options), plain.generate(**batch, **options))
    report = fastbert.explain(ours)
    assert "Encoder: unpads once" in report.replaced["model.encoder"]
    assert "model.decoder" not in report.replaced
    assert "tables are called one by one" in report.left["model.encoder.embed_tokens"]
    assert_fused(ours)


def test_training_that_leaves_out_layers_runs_the_originals_code():
    ours, plain, _ = three(build("BartEncoder", encoder_layerdrop=0.5), padding="exact")
    batch = batch_of("BartEncoder", plain, MASKS["right"])
    torch.manual_seed(1)
    with torch.no_grad(), pytest.warns(UserWarning, match="leaves out layers at random"):
        got = ours.train()(**batch).last_hidden_state
    torch.manual_seed(1)
    with torch.no_grad():
        assert torch.equal(got, plain.train()(**batch).last_hidden_state)
        ours.eval()(**batch)
    assert list(ours.forward.warned.values()) == [1]  # evaluation runs all layers


def test_more_tokens_than_positions_raise_as_in_the_original():
    ours, plain, _ = three(build("BartEncoder"), padding="exact")
    ids = torch.randint(5, 60, (1, 41))
    with torch.no_grad():
        assert_within_budget(*(model(ids[:, :40]).last_hidden_state for model in three(plain)))
        with pytest.raises(IndexError):
            plain(ids)
        with pytest.warns(UserWarning, match="more than the position table holds"), pytest.raises(IndexError):
            ours(ids)


def test_in_float16_the_originals_code_clamps_overflow():
    ours, plain, _ = three(build("BartEncoder"), torch.float16)
    ids = torch.randint(5, 60, (2, WIDTH))
    with torch.no_grad(), pytest.warns(UserWarning, match="clamps values that overflow"):
        got = ours(ids).last_hidden_state
    with torch.no_grad():
        assert torch.equal(got, plain(ids).last_hidden_state)
