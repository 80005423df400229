"""ALBERT and ELECTRA from TensorFlow checkpoints."""

import json

import pytest
import torch

from fastbert.checkpoint import CheckpointError
from fastbert.convert import convert
from fastbert.formats.tensorflow_bundle import write_bundle
from fastbert.models.bert import BertModel

pytestmark = pytest.mark.once


def tf_name(name: str, replacements: tuple[tuple[str, str], ...]) -> str:
    for old, new in replacements:
        name = name.replace(old, new)
    for old, new in (("LayerNorm.weight", "LayerNorm/gamma"), ("LayerNorm.bias", "LayerNorm/beta")):
        name = name.replace(old, new)
    name = name.replace("_embeddings.weight", "_embeddings").replace(".weight", "/kernel")
    return name.replace(".", "/")


def as_tf(name: str, t: torch.Tensor) -> torch.Tensor:
    return t.t().contiguous() if name.endswith("kernel") else t.contiguous()


def test_albert(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.AlbertConfig(
        vocab_size=50, embedding_size=8, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=16, hidden_act="gelu_new",
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(3)
    reference = transformers.AlbertForPreTraining(config).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    replacements = (
        ("albert.encoder.albert_layer_groups.0.albert_layers.0.", "bert.encoder.transformer.group_0.inner_group_0."),
        ("full_layer_layer_norm.weight", "LayerNorm_1/gamma"), ("full_layer_layer_norm.bias", "LayerNorm_1/beta"),
        ("ffn_output.", "ffn_1.intermediate.output.dense."), ("ffn.", "ffn_1.intermediate.dense."),
        ("inner_group_0.attention.LayerNorm", "inner_group_0.LayerNorm"),
        ("attention.dense.", "attention_1.output.dense."),
        ("attention.query", "attention_1.self.query"), ("attention.key", "attention_1.self.key"),
        ("attention.value", "attention_1.self.value"), ("albert.pooler.", "bert.pooler.dense."),
        ("albert.", "bert."), ("predictions.bias", "cls.predictions.output_bias"),
        ("predictions.dense", "cls.predictions.transform.dense"),
        ("predictions.LayerNorm", "cls.predictions.transform.LayerNorm"),
        ("sop_classifier.classifier.weight", "cls/seq_relationship/output_weights"),
        ("sop_classifier.classifier.bias", "cls/seq_relationship/output_bias"),
    )  # fmt: skip
    variables = {}
    for name, t in reference.state_dict().items():
        if "decoder" not in name and "position_ids" not in name:
            theirs = tf_name(name, replacements)
            variables[theirs] = as_tf(theirs, t)
    assert "bert/encoder/transformer/group_0/inner_group_0/ffn_1/intermediate/output/dense/kernel" in variables
    folder = tmp_path / "albert_base"
    folder.mkdir()
    write_bundle(folder / "model.ckpt-best", (variables | {"global_step": torch.tensor(1)}).items())
    numbers = json.loads(config.to_json_string())
    keys = ("vocab_size", "embedding_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
            "intermediate_size", "max_position_embeddings", "type_vocab_size")  # fmt: skip
    (folder / "albert_config.json").write_text(json.dumps({key: numbers[key] for key in keys} | {"hidden_act": "gelu"}))
    (folder / "30k-clean.model").write_bytes(b"a sentencepiece model")
    with pytest.raises(CheckpointError, match="give --lower-case"):
        convert(folder, tmp_path / "out", say=lambda line: None)
    convert(folder, tmp_path / "out", lower_case=True, say=lambda line: None)
    assert (tmp_path / "out" / "spiece.model").read_bytes() == b"a sentencepiece model"
    model, report = transformers.AlbertForPreTraining.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        got, expected = model.eval()(ids), reference(ids)
    assert torch.equal(got.prediction_logits, expected.prediction_logits)
    assert torch.equal(got.sop_logits, expected.sop_logits)
    with pytest.raises(CheckpointError, match="albert"):
        BertModel.from_pretrained(folder)


def test_electra_gives_both_of_its_models(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "embedding_size": 16, "num_hidden_layers": 2, "max_position_embeddings": 16,
             "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
    torch.manual_seed(4)
    big = transformers.ElectraConfig(hidden_size=128, num_attention_heads=2, intermediate_size=256, **sizes)
    small = transformers.ElectraConfig(hidden_size=64, num_attention_heads=1, intermediate_size=96, **sizes)
    discriminator = transformers.ElectraForPreTraining(big).eval()
    generator = transformers.ElectraForMaskedLM(small).eval()
    for parameter in (*discriminator.parameters(), *generator.parameters()):
        torch.nn.init.normal_(parameter, std=0.2)
    generator.electra.embeddings.load_state_dict(discriminator.electra.embeddings.state_dict())
    discriminator_names = (("layer.", "layer_"), ("dense_prediction", "dense_1"))
    generator_names = (
        ("layer.", "layer_"), ("electra.", "generator."),
        ("generator_lm_head.bias", "generator_predictions.output_bias"),
    )  # fmt: skip
    variables = {}
    for model, names in ((discriminator, discriminator_names), (generator, generator_names)):
        for name, t in model.state_dict().items():
            shared = names is generator_names and name.startswith("electra.embeddings.")
            if not shared and "position_ids" not in name and name != "generator_lm_head.weight":
                theirs = tf_name(name, names)
                variables[theirs] = as_tf(theirs, t)
    assert "generator/embeddings_project/kernel" in variables
    assert "discriminator_predictions/dense_1/kernel" in variables
    folder = tmp_path / "electra"
    folder.mkdir()
    write_bundle(folder / "electra_small", variables.items())
    lines = []
    convert(folder, tmp_path / "out", say=lines.append)
    assert any("computed by erf" in line for line in lines)
    assert any("attention heads are 64 wide" in line for line in lines)
    ids = torch.arange(12).reshape(2, 6)
    for path, cls, reference in (
        ("out", transformers.ElectraForPreTraining, discriminator),
        ("out/generator", transformers.ElectraForMaskedLM, generator),
    ):
        model, report = cls.from_pretrained(tmp_path / path, output_loading_info=True)
        assert not report["missing_keys"], path
        assert not report["unexpected_keys"], path
        with torch.no_grad():
            assert torch.equal(model.eval()(ids).logits, reference(ids).logits), path
