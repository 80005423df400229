"""Heads and checkpoints: tied weights, what is read and written, and what is initialised if the file lacks it."""

import copy
import json
import pickle
import warnings

import pytest
import torch

import fastbert
from fastbert import BertConfig, BertModel
from fastbert.checkpoint import CheckpointError, load_state_dict

transformers = pytest.importorskip("transformers", reason="compared with transformers")

SIZES = {
    "vocab_size": 91, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40,
}  # fmt: skip
HEADS = (
    "SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice", "MaskedLM",
    "NextSentencePrediction", "PreTraining",
)  # fmt: skip
WITH_WORDS = ("MaskedLM", "PreTraining")


def ours_of(head: str) -> type:
    return getattr(fastbert, f"BertFor{head}")


def config_of(head: str) -> BertConfig:
    labels = {0: "B-place", 1: "ä"} if head == "QuestionAnswering" else {0: "B-place", 1: "ä", 2: "O"}
    return BertConfig(**SIZES, id2label=labels)


def example(head: str) -> torch.Tensor:
    return torch.randint(1, 91, (1, 2, 7) if head == "MultipleChoice" else (2, 7))


each_head = pytest.mark.parametrize("head", HEADS)
each_with_words = pytest.mark.parametrize("head", WITH_WORDS)


# ---- transformers' folders -------------------------------------------------------------------------------


@each_head
@pytest.mark.once
def test_transformers_reads_our_folder(head, tmp_path):
    """The auto class of transformers gets every weight and the labels' names."""
    ours = ours_of(head)(config_of(head)).eval()
    ours.save_pretrained(tmp_path)
    auto = getattr(transformers, f"AutoModelFor{head}")
    theirs, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == f"BertFor{head}"
    assert not any(report.values()), report
    assert theirs.config.id2label == ours.config.id2label
    ids = example(head)
    torch.testing.assert_close(theirs(ids)[0], ours(ids)[0])
    assert ours.config.architectures is None, "saving changed the model's config"


@each_head
@pytest.mark.once
def test_we_read_transformers_folder(head, tmp_path):
    theirs = getattr(transformers, f"BertFor{head}")(transformers.BertConfig(**config_of(head).to_dict())).eval()
    theirs.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = ours_of(head).from_pretrained(tmp_path)
    assert not ours.initialised
    assert not ours.training
    assert ours.config.id2label == config_of(head).id2label
    ids = example(head)
    torch.testing.assert_close(ours(ids)[0], theirs(ids)[0])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


# ---- what is initialised ---------------------------------------------------------------------------------


@each_head
def test_the_head_of_a_plain_bert_is_initialised(head, tmp_path):
    """normal(0, initializer_range) by the seed, zero biases. A warning says which; the encoder is the checkpoint's."""
    config = BertConfig(**SIZES, initializer_range=0.5)
    plain = BertModel(config)
    plain.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"has no .*\.weight.*normal\(0, 0.5\) by seed 3"):
        ours = ours_of(head).from_pretrained(tmp_path, seed=3)
    fresh = [name for name, _ in ours.named_parameters() if not name.startswith("bert.")]
    assert list(ours.initialised) == fresh
    for name, p in ours.named_parameters():
        if name.startswith("bert."):
            assert torch.equal(p, plain.state_dict()[name.removeprefix("bert.")])
        elif name.endswith("LayerNorm.weight"):
            assert torch.equal(p, torch.ones_like(p))
        elif p.dim() == 1:
            assert not p.any()
        else:
            assert p.std().item() == pytest.approx(0.5, rel=0.35)
    with pytest.warns(UserWarning, match="by seed"):
        again, other = (ours_of(head).from_pretrained(tmp_path, seed=seed) for seed in (3, 4))
    drawn = next(name for name in fresh if name.endswith("weight") and "LayerNorm" not in name)
    assert torch.equal(again.get_parameter(drawn), ours.get_parameter(drawn))
    assert not torch.equal(other.get_parameter(drawn), ours.get_parameter(drawn))


def test_a_missing_pooler_is_initialised(tmp_path):
    BertModel(BertConfig(**SIZES), add_pooling_layer=False).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="bert.pooler.dense.weight"):
        ours = fastbert.BertForSequenceClassification.from_pretrained(tmp_path)
    assert ours.bert.pooler["dense"].weight.std() > 0


def test_an_encoder_with_a_part_missing_is_refused(tmp_path):
    model = fastbert.BertForTokenClassification(BertConfig(**SIZES))
    state = {name: t for name, t in model.state_dict().items() if "layer.0.output.dense.bias" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError, match=r"1 missing \(bert\.encoder\.layer\.0\.output\.dense\.bias"):
        fastbert.BertForTokenClassification.from_pretrained(tmp_path)


def test_another_number_of_labels(tmp_path):
    """A head that does not fit is an error; `new_head` initialises one, and keeps the encoder."""
    trained = fastbert.BertForTokenClassification(BertConfig(**SIZES, num_labels=3))
    trained.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"classifier.weight: \[3, 32\] in the file, \[5, 32\] in the module"):
        fastbert.BertForTokenClassification.from_pretrained(tmp_path, num_labels=5)
    with pytest.warns(UserWarning, match="classifier.weight, classifier.bias"):
        ours = fastbert.BertForTokenClassification.from_pretrained(tmp_path, num_labels=5, new_head=True)
    assert ours.classifier.weight.shape == (5, 32)
    assert torch.equal(ours.get_input_embeddings().weight, trained.get_input_embeddings().weight)
    with pytest.warns(UserWarning, match="classifier.weight"):
        same = fastbert.BertForTokenClassification.from_pretrained(tmp_path, new_head=True)
    assert not torch.equal(same.classifier.weight, trained.classifier.weight)


def test_a_head_of_another_task_is_ignored(tmp_path):
    fastbert.BertForPreTraining(BertConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="qa_outputs.weight, qa_outputs.bias"):
        fastbert.BertForQuestionAnswering.from_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next_sentence = fastbert.BertForNextSentencePrediction.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert next_sentence.dtype == torch.bfloat16


def test_the_heads_of_a_tensorflow_checkpoint_are_read(tmp_path):
    """Google's pre-training model, as `fastbert convert --to tensorflow` writes it."""
    from fastbert.convert import convert

    model = fastbert.BertForPreTraining(BertConfig(**{**SIZES, "vocab_size": 5}, hidden_act="gelu_new")).eval()
    model.save_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) + "\n")
    convert(tmp_path / "ours", tmp_path / "theirs", to="tensorflow", lower_case=True, say=lambda line: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = fastbert.BertForPreTraining.from_pretrained(tmp_path / "theirs")
    ids = torch.tensor([[2, 4, 1, 3]])
    for ours, theirs in zip(back(ids).to_tuple(), model(ids).to_tuple(), strict=True):
        torch.testing.assert_close(ours, theirs)


# ---- tied weights ----------------------------------------------------------------------------------------


def expect_tied(model: torch.nn.Module) -> None:
    decoder = model.get_output_embeddings()
    assert decoder.weight is model.get_input_embeddings().weight
    assert decoder.bias is model.cls["predictions"].bias


@each_with_words
def test_the_decoder_stays_tied(head, tmp_path):
    model = ours_of(head)(BertConfig(**SIZES))
    expect_tied(model)
    expect_tied(copy.deepcopy(model))
    expect_tied(pickle.loads(pickle.dumps(model)))
    state = {name: t.clone() for name, t in model.state_dict().items()}
    other = ours_of(head)(BertConfig(**SIZES))
    other.load_state_dict(state, assign=True)
    expect_tied(other)
    assert torch.equal(other.get_output_embeddings().weight, state["cls.predictions.decoder.weight"])
    expect_tied(model.to(torch.float64).float())
    with torch.device("meta"):
        empty = ours_of(head)(BertConfig(**SIZES))
    expect_tied(empty.to_empty(device="cpu"))

    model.save_pretrained(tmp_path)
    assert "cls.predictions.decoder.weight" not in load_state_dict(tmp_path), "the embedding was written twice"
    expect_tied(ours_of(head).from_pretrained(tmp_path))
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in getattr(transformers, f"BertFor{head}")(transformers.BertConfig(**SIZES)).parameters()
    )


@each_with_words
def test_a_tied_weight_may_have_either_name(head):
    model = ours_of(head)(BertConfig(**SIZES))
    with torch.no_grad():
        model.cls["predictions"].bias.normal_()
    for dropped in ("cls.predictions.bias", "cls.predictions.decoder.bias"):
        for assign in (False, True):
            state = model.state_dict()
            del state[dropped]
            other = ours_of(head)(BertConfig(**SIZES))
            other.load_state_dict(state, assign=assign)
            expect_tied(other)
            assert torch.equal(other.cls["predictions"].bias, model.cls["predictions"].bias)


@pytest.mark.once
def test_the_state_can_be_written_by_safetensors(tmp_path):
    """transformers' Trainer passes `state_dict()` to this function, which refuses two names for the same memory."""
    from safetensors.torch import load_file, save_file

    model = fastbert.BertForMaskedLM(BertConfig(**SIZES))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    kept = model.state_dict(keep_vars=True)
    assert kept["cls.predictions.decoder.weight"] is model.get_input_embeddings().weight


@pytest.mark.once
def test_untied_weights_stay_untied(tmp_path):
    model = fastbert.BertForMaskedLM(BertConfig(**SIZES, tie_word_embeddings=False)).eval()
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = fastbert.BertForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(again.get_output_embeddings().weight, model.get_output_embeddings().weight)
    ids = example("MaskedLM")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
