"""Settings in the files of a sentence-transformers folder: followed as that library does, or refused by name."""

import json
import shutil
from pathlib import Path

import pytest

from fastbert import Encoder
from fastbert.checkpoint import CheckpointError
from sentence_folders import (
    BERT_CONFIG,
    LIBRARY_CONFIG,
    assert_same,
    change,
    load,
    make_bert,
    save,
    save_usual,
    transformer,
)

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return make_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def saved(bert, tmp_path) -> Path:
    return save_usual(bert, tmp_path / "model")


POOLING, DENSE, NORMALIZE = (f"{name}/config.json" for name in ("1_Pooling", "2_Dense", "3_Normalize"))
OLD_POOLING = {"pooling_mode": ..., "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False}
HONOURED = {
    "truncate_dim": (LIBRARY_CONFIG, {"truncate_dim": 5}),
    "truncate_dim_beyond": (LIBRARY_CONFIG, {"truncate_dim": 500}),
    "default_prompt_name": (LIBRARY_CONFIG, {"prompts": {"q": "find "}, "default_prompt_name": "q"}),
    "default_prompt_name_without_prompts": (LIBRARY_CONFIG, {"prompts": ..., "default_prompt_name": "query"}),
    "max_seq_length": (BERT_CONFIG, {"max_seq_length": 7, "modality_config": ...}),
    "no_max_seq_length": (BERT_CONFIG, {"max_seq_length": None}),
    "do_lower_case": (BERT_CONFIG, {"do_lower_case": True}),
    "model_max_length": (BERT_CONFIG, {"processor_kwargs": {"model_max_length": 6}}),
    "old_tokenizer_args": (BERT_CONFIG, {"tokenizer_args": {"model_max_length": 6, "use_fast": True}}),
    "model_max_length_before_max_seq_length": (
        BERT_CONFIG, {"processor_kwargs": {"model_max_length": 6}, "max_seq_length": 9}),
    "max_length_of_text": (BERT_CONFIG, {"processing_kwargs": {"text": {"max_length": 5}}}),
    "max_length_of_all": (
        BERT_CONFIG, {"processing_kwargs": {"text": {"max_length": 9}, "common": {"max_length": 5}}}),
    "padding": (BERT_CONFIG, {"processing_kwargs": {"text": {"padding": "max_length", "truncation": True}}}),
    "config_args": (BERT_CONFIG, {"config_args": {"attn_implementation": "eager", "use_cache": False}}),
    "legacy_pooling_with_nothing_on": (
        POOLING, OLD_POOLING),
    "legacy_pooling_with_two_on": (
        POOLING, OLD_POOLING | {"pooling_mode_max_tokens": True, "pooling_mode_lasttoken": True}),
}  # fmt: skip


@pytest.mark.parametrize(("file", "settings"), HONOURED.values(), ids=HONOURED.keys())
def test_settings_that_are_followed(saved, file, settings):
    if settings.get("pooling_mode_lasttoken"):
        shutil.rmtree(saved / "2_Dense")
        (saved / "modules.json").write_text(json.dumps(json.loads((saved / "modules.json").read_text())[:2]))
    change(saved, file, **settings)
    assert_same(saved)


OUTPUTS = {
    "a_layer": ("token_embeddings", ["hidden_states", 1], [1, 2]),
    "a_layer_from_above": ("token_embeddings", ["hidden_states", -2], [1, 2]),
    "pooler": ("sentence_embedding", ["pooler_output"], [2]),
    "pooler_as_text": ("sentence_embedding", "pooler_output", [2]),
    "pooler_thrown_away": ("sentence_embedding", "pooler_output", [2]),
}


@pytest.mark.parametrize(("name", "keys", "kept"), OUTPUTS.values(), ids=OUTPUTS.keys())
def test_outputs_of_bert(saved, name, keys, kept):
    text = {"method": "forward", "method_output_name": keys}
    change(saved, BERT_CONFIG, module_output_name=name, modality_config={"text": text})
    modules = json.loads((saved / "modules.json").read_text())
    (saved / "modules.json").write_text(json.dumps([modules[0], *(modules[i] for i in kept)]))
    assert_same(saved)


def test_lower_casing_is_done_by_the_tokenizer(saved):
    """Python makes "ς" of a "Σ" at a word's end; and "[MASK]" in a text is found before lower-casing."""
    change(saved, BERT_CONFIG, do_lower_case=True)
    texts = ["ΣΣ CaT [MASK] THE", "İ", "CAT " * 200]
    assert_same(saved, texts=texts)


REFUSED = {
    "output": (BERT_CONFIG, {"modality_config": {"text": {"method": "forward", "method_output_name": "logits"}}},
               "the setting 'method_output_name' = .*logits"),
    "method": (BERT_CONFIG, {"modality_config": {"text": {"method": "get_text_features", "method_output_name": "x"}}},
               "the setting 'method' = 'get_text_features'"),
    "message": (BERT_CONFIG, {"modality_config": {"message": {"method": "forward", "method_output_name": "x"}}},
                "'modality_config' .* chat template"),
    "no_output_name": (BERT_CONFIG, {"module_output_name": ...}, "'module_output_name' must be there"),
    "task": (BERT_CONFIG, {"transformer_task": "fill-mask"}, "'transformer_task' = 'fill-mask'"),
    "processing_kwargs": (BERT_CONFIG, {"processing_kwargs": {"text": {"add_special_tokens": False}}},
                          "processing_kwargs: text: the setting 'add_special_tokens' = False"),
    "no_mask": (BERT_CONFIG, {"processing_kwargs": {"common": {"return_attention_mask": False}}},
                "'return_attention_mask' = False"),
    "processing_of_what": (BERT_CONFIG, {"processing_kwargs": {"texts": {}}}, "processing_kwargs: the setting 'texts'"),
    "processor_kwargs": (BERT_CONFIG, {"processor_kwargs": {"do_lower_case": True}},
                         "processor_kwargs: the setting 'do_lower_case' = True"),
    "padding_on_the_left": ("tokenizer_config.json", {"padding_side": "left"},
                            "tokenizer_config.json: the setting 'padding_side' = 'left' is not supported"),
    "tokenizer_args": (BERT_CONFIG, {"tokenizer_args": {"padding_side": "left"}}, "tokenizer_args: .*'padding_side'"),
    "config_args": (BERT_CONFIG, {"config_args": {"num_hidden_layers": 1}}, "config_args: .*'num_hidden_layers' = 1"),
    "model_args": (BERT_CONFIG, {"model_args": {"add_pooling_layer": False}}, "model_args: .*'add_pooling_layer'"),
    "query_expansion": (BERT_CONFIG, {"query_expansion": {"strategy": "fixed", "length": 8}}, "'query_expansion'"),
    "other_tokenizer": (BERT_CONFIG, {"tokenizer_name_or_path": "other"}, "'tokenizer_name_or_path' = 'other'"),
    "unknown_of_bert": (BERT_CONFIG, {"pool_first": True}, "the setting 'pool_first' = True is not supported"),
    "not_a_number": (BERT_CONFIG, {"max_seq_length": "12"}, "'max_seq_length' must be int or null, got '12'"),
    "true_is_no_number": (BERT_CONFIG, {"max_seq_length": True}, "'max_seq_length' must be int or null, got True"),
    "two_names": (BERT_CONFIG, {"config_args": {"use_cache": True}, "config_kwargs": {"use_cache": False}},
                  "the settings 'config_kwargs' and 'config_args' say different things"),
    "unknown_of_library": (LIBRARY_CONFIG, {"whiten": True}, "config_sentence_transformers.json: .*'whiten' = True"),
    "default_prompt": (LIBRARY_CONFIG, {"default_prompt_name": "passage"}, "default_prompt_name is 'passage'"),
    "truncate_dim": (LIBRARY_CONFIG, {"truncate_dim": 0}, "truncate_dim must be at least 1, got 0"),
    "pooling_mode": (POOLING, {"pooling_mode": "attention"}, "pooling must be one of .*'attention'"),
    "no_pooling_mode": (POOLING, {"pooling_mode": []}, "pooling must be one of .*got none"),
    "unknown_of_pooling": (POOLING, {"pooling_mode_attention": True}, "'pooling_mode_attention'"),
    "activation": (DENSE, {"activation_function": "mine.Swish"}, "'activation_function' = 'mine.Swish'"),
    "activation_with_arguments": (DENSE, {"activation_function": "torch.nn.Threshold"}, "'torch.nn.Threshold'"),
    "not_an_activation": (DENSE, {"activation_function": "torch.nn.Flatten"}, "'torch.nn.Flatten'"),
    "unknown_of_dense": (DENSE, {"scale": 2}, "2_Dense/config.json: the setting 'scale' = 2"),
    "dense_without_width": (DENSE, {"in_features": ...}, "the setting 'in_features' is missing"),
    "unknown_of_normalize": (NORMALIZE, {"p": 1}, "3_Normalize/config.json: the setting 'p' = 1"),
    "normalize_of_nothing": (NORMALIZE, {"module_input_name": "other"}, "Normalize reads 'other'"),
}  # fmt: skip


@pytest.mark.parametrize(("file", "settings", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_settings_that_are_refused_by_name(saved, file, settings, message):
    change(saved, file, **settings)
    with pytest.raises(ValueError, match=message) as raised:
        Encoder.from_pretrained(saved)
    assert "\n" not in str(raised.value)


def relist(folder: Path, number: int, **changes) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules[number] |= changes
    (folder / "modules.json").write_text(json.dumps(modules))


TYPES = {
    "of_another_package": (
        "pylate.models.Dense",
        CheckpointError,
        "'pylate.models.Dense' is not of",
    ),
    "of_the_folder": ("modeling_x.Dense", CheckpointError, "'modeling_x.Dense' is not of"),
    "by_its_end": ("sentence_transformers_x.models.Dense", CheckpointError, "is not of sentence-transformers, so"),
    "sparse": (
        "sentence_transformers.sparse_encoder.modules.Pooling",
        ValueError,
        "sparse_encoder.modules.Pooling' is not",
    ),
    "cnn": ("sentence_transformers.models.CNN", ValueError, "'CNN' is not supported: it reads the padding"),
    "bow": ("sentence_transformers.models.BoW", ValueError, "module 'BoW' is not supported; known are Transformer,"),
}


@pytest.mark.parametrize(("name", "error", "message"), TYPES.values(), ids=TYPES.keys())
def test_types_that_are_refused_by_name(saved, name, error, message):
    relist(saved, 2, type=name)
    with pytest.raises(error, match=message):
        Encoder.from_pretrained(saved)


def test_unknown_settings_in_a_list_of_modules_are_refused(saved):
    relist(saved, 2, kwargs=["task"])
    with pytest.raises(CheckpointError, match="the setting 'kwargs' of a module is not known"):
        Encoder.from_pretrained(saved)
    relist(saved, 2, kwargs=[])
    Encoder.from_pretrained(saved)
    (saved / "modules.json").write_text("[]")
    with pytest.raises(CheckpointError, match="must list one module or more"):
        Encoder.from_pretrained(saved)


ROWS = {
    "dense_of_tokens": (DENSE, {"module_input_name": "token_embeddings", "module_output_name": "sentence_embedding"},
                        "no module makes a vector of a text: Pooling, Dense, Normalize"),
    "tokens_as_a_vector": (BERT_CONFIG, {"module_output_name": "sentence_embedding"}, "Pooling reads 'token_embed"),
    "pooler_as_tokens": (BERT_CONFIG, {"modality_config": {"text": {"method": "forward",
                                                                    "method_output_name": "pooler_output"}}},
                         "Pooling takes 'token_embeddings' with a row a token, and gets a row a text"),
}  # fmt: skip


@pytest.mark.parametrize(("file", "settings", "message"), ROWS.values(), ids=ROWS.keys())
def test_modules_that_give_no_vector_of_a_text_are_refused(saved, file, settings, message):
    change(saved, file, **settings)
    with pytest.raises(ValueError, match=message):
        load(saved)


def test_an_adapter_beside_the_weights_is_refused(saved):
    (saved / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config\.json: weights of an adapter are not read"):
        Encoder.from_pretrained(saved)


def test_modules_that_do_not_fit_each_other(bert, tmp_path, saved):
    change(saved, "1_Pooling/config.json", pooling_mode=["mean", "max"])
    with pytest.raises(ValueError, match="Dense takes 'sentence_embedding' 32 wide, and gets 64"):
        Encoder.from_pretrained(saved)
    change(saved, "2_Dense/config.json", in_features=64)
    with pytest.raises(CheckpointError, match=r"linear.weight: \[8, 32\] in the file, \[8, 64\] in the module"):
        Encoder.from_pretrained(saved)
    no_vector = save(tmp_path / "tokens", transformer(bert))
    with pytest.raises(ValueError, match="no module makes a vector of a text: there is none"):
        Encoder.from_pretrained(no_vector)
