"""Folders of sentence-transformers: the vectors of that library itself, or a refusal that names what is not supported.

Folders of version 6.2 are written by the library; those of older versions from what these wrote, file by file.
"""

import json
import shutil
from pathlib import Path

import numpy
import pytest
import torch

import fastbert
from fastbert import BertConfig, BertModel, Encoder
from fastbert.checkpoint import CheckpointError
from fastbert.cli import options
from fastbert.cli.main import main
from fastbert.convert import convert
from fastbert.encoding import encoder
from fastbert.encoding.folder import SentenceConfig
from fastbert.testing import assert_within_budget
from fastbert.text.tokenizer import Tokenizer

library = pytest.importorskip("sentence_transformers", reason="compared with sentence-transformers")
if not library.__version__.startswith(("6.2", "6.3", "6.4")):
    pytest.skip(f"folders of sentence-transformers 6.2, not of {library.__version__}", allow_module_level=True)
from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.sentence_transformer import modules as st  # noqa: E402

WIDTH, LAYERS, LIMIT = 32, 3, 12
# The last of them are letters whose lower case Python and the tokenizers library write in different ways.
WORDS = "the a cat dog sat ran on under mat tree and query : find ##s İ i ̇ ß Σ σ ς C c".split()  # noqa: RUF001
TEXTS = ["the cat sat", "", "dogs ran and ran " * 20, "a dog", "query : the mat under a tree [MASK] Cat"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A folder with a small random BERT and a cased vocabulary of a few words."""
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    settings = {"do_lower_case": False, "tokenizer_class": "BertTokenizer", "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=64, initializer_range=0.3, architectures=["BertModel"],
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def transformer(bert: Path, **options) -> st.Transformer:
    return st.Transformer(str(bert), **{"max_seq_length": LIMIT, **options})


def save(folder: Path, *modules, **options) -> Path:
    """A folder of these modules, with weights that tell each of them apart."""
    torch.manual_seed(1)
    model = SentenceTransformer(modules=list(modules), device="cpu", **options)
    for module in list(model.modules()):
        if isinstance(module, (st.LayerNorm, st.WeightedLayerPooling)):
            for parameter in module.parameters():
                parameter.data.uniform_(0.5, 1.5)
    model.save(str(folder), create_model_card=False)
    return folder


def theirs(folder: Path, how: str = "encode", texts: list[str] = TEXTS, **call) -> list[torch.Tensor]:
    """Vectors by the library, in float32 and in float64."""
    model = SentenceTransformer(str(folder), device="cpu")
    return [
        getattr(model.to(dtype), how)(texts, convert_to_tensor=True, batch_size=2, **call)
        for dtype in (torch.float32, torch.float64)
    ]


def load(folder: Path, **options) -> Encoder:
    return Encoder.from_pretrained(folder, **{"dtype": "float32", "device": "cpu", "impl": "native", **options})


def assert_same(folder: Path, how: str = "encode", texts: list[str] = TEXTS, **call) -> torch.Tensor:
    encoder = load(folder)
    vectors = getattr(encoder, how)(texts, **call)
    assert vectors.shape == (len(texts), encoder.dimension)
    assert_within_budget(vectors, *theirs(folder, how, texts, **call))
    return vectors


# ---- modules ---------------------------------------------------------------------------------------------

MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
PIPELINES = {
    **{mode: lambda mode=mode: [st.Pooling(WIDTH, mode)] for mode in MODES},
    "all_joined": lambda: [st.Pooling(WIDTH, MODES)],
    "dense": lambda: [st.Pooling(WIDTH), st.Dense(WIDTH, 8)],
    "dense_of_other_activation": lambda: [
        st.Pooling(WIDTH, "cls"),
        st.Dense(WIDTH, 8, bias=False, activation_function=torch.nn.GELU()),
        st.Dense(8, 8, activation_function=None, use_residual=True),
        st.Dense(8, 20, use_residual=True),
        st.Normalize(),
    ],
    "dense_of_tokens": lambda: [
        st.Dense(WIDTH, 8, module_input_name="token_embeddings"),
        st.Normalize(module_input_name="token_embeddings"),
        st.Pooling(8, ("max", "weightedmean")),
    ],
    "dense_beside": lambda: [
        st.Pooling(WIDTH),
        st.Dense(WIDTH, 8, module_output_name="beside"),
        st.Normalize(module_input_name="beside", module_output_name="sentence_embedding"),
    ],
    "normalize_of_what_is_thrown_away": lambda: [st.Pooling(WIDTH), st.Normalize(module_output_name="beside")],
    "layer_norm": lambda: [st.Pooling(WIDTH), st.LayerNorm(WIDTH), st.Dropout(0.5), st.Normalize()],
    "word_weights": lambda: [
        st.WordWeights(["w"] * 5 + WORDS, {word: 0.1 * i for i, word in enumerate(WORDS)}, 0.7),
        st.Pooling(WIDTH, ("mean", "mean_sqrt_len_tokens", "weightedmean", "max")),
    ],
    "route_at_the_end": lambda: [
        st.Pooling(WIDTH),
        st.Router({"query": [st.Dense(WIDTH, 8)], "document": [st.Dense(WIDTH, 8), st.Normalize()]}, "document"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("pipeline", PIPELINES.values(), ids=PIPELINES.keys())
def test_modules(bert, tmp_path, pipeline):
    assert_same(save(tmp_path / "model", transformer(bert), *pipeline()))


@pytest.mark.once
@pytest.mark.parametrize("asked_for", [True, False], ids=["hidden_states", "no_hidden_states"])
def test_weighted_layers_count_only_where_the_config_asks_for_all_layers(bert, tmp_path, asked_for):
    first = transformer(bert, config_kwargs={"output_hidden_states": True} if asked_for else {})
    weighted = st.WeightedLayerPooling(WIDTH, LAYERS, layer_start=1)
    folder = save(tmp_path / "weighted", first, weighted, st.Pooling(WIDTH))
    plain = save(tmp_path / "plain", transformer(bert), st.Pooling(WIDTH))
    assert torch.allclose(assert_same(folder), load(plain).encode(TEXTS), atol=1e-4) == (not asked_for)


@pytest.mark.once
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prompt", ["query : ", "find"], ids=["words", "merges_with_the_text"])
def test_prompts_that_the_pooling_leaves_out(bert, tmp_path, mode, prompt):
    first, pooling = transformer(bert), st.Pooling(WIDTH, mode, include_prompt=False)
    folder = save(tmp_path / "model", first, pooling, prompts={"query": prompt}, default_prompt_name="query")
    texts = [*TEXTS, "s" * 3]  # "find" and "s" are two tokens of one word, "finds" and so on are none
    left_out = assert_same(folder, texts=texts)
    assert_same(folder, texts=texts, prompt="")
    assert_same(folder, texts=texts, prompt="the cat sat on the mat and the dog sat on the cat under a tree")
    with_it = save(tmp_path / "with", first, st.Pooling(WIDTH, mode), prompts={"query": prompt})
    assert_same(with_it, texts=texts, prompt_name="query")
    assert (
        not torch.allclose(left_out, load(with_it).encode(texts, prompt_name="query"), atol=1e-3) or mode == "lasttoken"
    )


@pytest.mark.triton
def test_poolings_by_the_triton_kernels(bert, tmp_path):
    pooling = st.Pooling(WIDTH, MODES, include_prompt=False)
    folder = save(tmp_path / "model", transformer(bert), *PIPELINES["word_weights"]()[:1], pooling)
    by_triton, native = (load(folder, impl=impl).encode(TEXTS[:2], prompt="find ") for impl in ("triton", "native"))
    torch.testing.assert_close(by_triton, native, atol=1e-5, rtol=1e-4)


@pytest.mark.once
def test_a_prompt_longer_than_its_text_with_it(bert, tmp_path):
    """ "finds" is one word that is not in the vocabulary, "find" with "##s" two tokens: nothing is left to pool."""
    vocab = (bert / "vocab.txt").read_text(encoding="utf-8").replace("\nquery\n", "\nfindss\n")
    changed = shutil.copytree(bert, tmp_path / "bert")
    (changed / "vocab.txt").write_text(vocab, encoding="utf-8")
    folder = save(tmp_path / "model", transformer(changed), st.Pooling(WIDTH, MODES, include_prompt=False))
    texts = ["s", "the cat"]
    vectors = load(folder).encode(texts, prompt="finds")
    expected, _ = theirs(folder, texts=texts, prompt="finds")
    assert torch.isneginf(expected).sum() == WIDTH  # the maximum of nothing
    torch.testing.assert_close(vectors, expected)


# ---- tasks and prompts -----------------------------------------------------------------------------------


def routed(bert: Path, folder: Path, **options) -> Path:
    both = transformer(bert)
    query = [both, st.Pooling(WIDTH, "cls"), st.Dense(WIDTH, 8), st.Normalize()]
    document = [both, st.Pooling(WIDTH), st.Dense(WIDTH, 8), st.Normalize()]
    return save(folder, st.Router({"query": query, "document": document}, **options), prompts={"query": "find "})


@pytest.mark.once
def test_a_router_with_one_bert_behind_both_sides(bert, tmp_path):
    folder = routed(bert, tmp_path / "model", default_route="document")
    queries, documents = assert_same(folder, "encode_query"), assert_same(folder, "encode_document")
    assert not torch.allclose(queries, documents, atol=1e-3)
    assert torch.equal(load(folder).encode(TEXTS), documents)
    assert_same(folder, task="query")
    assert_same(folder, task="query", prompt_name="query")
    encoder = load(folder, task="query", prompt_name="query")
    assert torch.equal(encoder.encode(TEXTS), queries)
    assert encoder.normalize
    with pytest.raises(ValueError, match="task 'passage': the model has no route for that; tasks are query, document"):
        encoder.encode("a", task="passage")
    with pytest.raises(ValueError, match="there is no prompt 'passage'; prompts are query, document"):
        encoder.encode("a", prompt_name="passage")


ROUTES = {
    "none_without_a_task": {"allow_empty_key": False},
    "first_without_a_task": {},
    "by_task": {"route_mappings": {("passage", None): "document", (None, ("image", "text")): "query"}},
    "by_text": {"route_mappings": {("query", "text"): "document", (None, "text"): "query"}},
}


@pytest.mark.once
@pytest.mark.parametrize("options", ROUTES.values(), ids=ROUTES.keys())
def test_which_route_a_task_takes(bert, tmp_path, options):
    folder = routed(bert, tmp_path / "model", **options)
    model = SentenceTransformer(str(folder), device="cpu")
    encoder = load(folder)
    for task in (None, "query", "document", "passage"):
        try:
            expected = model.encode(TEXTS, task=task, convert_to_tensor=True)
        except ValueError:
            with pytest.raises(ValueError, match="the model has no route for that"):
                encoder.encode(TEXTS, task=task)
        else:
            torch.testing.assert_close(encoder.encode(TEXTS, task=task), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.once
def test_two_berts_behind_a_router_are_refused(bert, tmp_path):
    sides = {side: [transformer(bert), st.Pooling(WIDTH)] for side in ("query", "document")}
    folder = save(tmp_path / "model", st.Router(sides))
    for reader in (
        Encoder.from_pretrained,
        BertModel.from_pretrained,
        lambda folder: convert(folder, tmp_path / "out"),
    ):
        with pytest.raises(
            CheckpointError, match="must begin with one Transformer, and they begin with document_0_Transformer"
        ):
            reader(folder)


@pytest.mark.once
def test_a_router_is_converted_in_place(bert, tmp_path):
    """The library's own vectors of what is written, on either side, and the same bits from it as from the source."""
    folder = routed(bert, tmp_path / "model", default_route="document")
    convert(folder, tmp_path / "out", say=lambda line: None)
    for how in ("encode", "encode_query", "encode_document"):
        assert torch.equal(assert_same(tmp_path / "out", how), assert_same(folder, how))
    # all but the README, and what transformers writes and nothing reads
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    written = {
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    assert names - written <= {"README.md"}
    assert written <= names


@pytest.mark.once
def test_a_bert_in_a_folder_of_its_own_is_found(bert, tmp_path):
    """Behind a Router, and in 0_Transformer: its weights, its config and its tokenizer."""
    expected = BertModel.from_pretrained(bert).state_dict()
    words = Tokenizer.from_pretrained(bert).input_ids(TEXTS)
    for folder in (routed(bert, tmp_path / "router"), old_folder(bert, tmp_path / "old", "0_Transformer")):
        state = BertModel.from_pretrained(folder).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)
        assert BertConfig.from_pretrained(folder).hidden_size == WIDTH
        assert Tokenizer.from_pretrained(folder).input_ids(TEXTS) == words


@pytest.mark.once
def test_a_router_in_itself_is_refused(bert, tmp_path):
    """It would be read until Python's stack is full."""
    folder = save(tmp_path / "model", transformer(bert), st.Pooling(WIDTH), st.Router({"text": [st.Dense(WIDTH, 8)]}))
    file = folder / "2_Router" / "router_config.json"
    router = json.loads(file.read_text())
    router |= {"types": {".": "sentence_transformers.models.Router"}, "structure": {"text": ["."]}}
    file.write_text(json.dumps(router))
    with pytest.raises(CheckpointError, match="a module lies in the Router's own folder"):
        Encoder.from_pretrained(folder)


@pytest.mark.once
def test_lengths_by_task(bert, tmp_path):
    folder = save(tmp_path / "model", transformer(bert, query_length=5, document_length=20), st.Pooling(WIDTH))
    for how in ("encode", "encode_query", "encode_document"):
        assert_same(folder, how)


@pytest.mark.once
@pytest.mark.parametrize(
    ("prompts", "how"),
    [
        ({"passage": "the "}, "encode_document"),
        ({"query": "find ", "document": "a "}, "encode_document"),
        ({"query": "find ", "document": "a "}, "encode_query"),
        ({"query": "find ", "document": None}, "encode_document"),
    ],
)
def test_prompts_by_name(bert, tmp_path, prompts, how):
    options = {"prompts": {"other": "dog ", **prompts}, "default_prompt_name": "other"}
    folder = save(tmp_path / "model", transformer(bert), st.Pooling(WIDTH), **options)
    assert_same(folder)
    assert_same(folder, how)
    assert_same(folder, how, prompt_name="other")
    assert_same(folder, how, prompt="cat ")


# ---- settings --------------------------------------------------------------------------------------------


@pytest.fixture
def saved(bert, tmp_path) -> Path:
    return save(tmp_path / "model", transformer(bert), st.Pooling(WIDTH), st.Dense(WIDTH, 8), st.Normalize())


def change(folder: Path, name: str, **settings) -> None:
    """Other settings in a file; ... takes one away."""
    path = folder / name
    content = (json.loads(path.read_text()) if path.is_file() else {}) | settings
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


BERT_CONFIG, LIBRARY_CONFIG = "sentence_bert_config.json", "config_sentence_transformers.json"
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


@pytest.mark.once
@pytest.mark.parametrize(("file", "settings"), HONOURED.values(), ids=HONOURED.keys())
def test_settings_that_are_honoured(saved, file, settings):
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


@pytest.mark.once
@pytest.mark.parametrize(("name", "keys", "kept"), OUTPUTS.values(), ids=OUTPUTS.keys())
def test_outputs_of_bert(saved, name, keys, kept):
    text = {"method": "forward", "method_output_name": keys}
    change(saved, BERT_CONFIG, module_output_name=name, modality_config={"text": text})
    modules = json.loads((saved / "modules.json").read_text())
    (saved / "modules.json").write_text(json.dumps([modules[0], *(modules[i] for i in kept)]))
    assert_same(saved)


@pytest.mark.once
def test_lower_casing_is_the_tokenizers_and_not_pythons(saved):
    """A "Σ" at a word's end is "ς" to Python, and "[MASK]" in a text is a token before anything is lowered."""
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


@pytest.mark.once
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


@pytest.mark.once
@pytest.mark.parametrize(("name", "error", "message"), TYPES.values(), ids=TYPES.keys())
def test_types_that_are_refused_by_name(saved, name, error, message):
    relist(saved, 2, type=name)
    with pytest.raises(error, match=message):
        Encoder.from_pretrained(saved)


@pytest.mark.once
def test_what_else_a_list_of_modules_can_have(saved):
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


@pytest.mark.once
@pytest.mark.parametrize(("file", "settings", "message"), ROWS.values(), ids=ROWS.keys())
def test_a_row_of_a_token_is_no_vector_of_a_text(saved, file, settings, message):
    change(saved, file, **settings)
    with pytest.raises(ValueError, match=message):
        load(saved)


@pytest.mark.once
def test_an_adapter_beside_the_weights_is_refused(saved):
    (saved / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config\.json: weights of an adapter are not read"):
        Encoder.from_pretrained(saved)


@pytest.mark.once
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


# ---- folders of other versions, and other kinds ----------------------------------------------------------


def old_folder(bert: Path, folder: Path, inside: str = "", type_of: str = "sentence_transformers.models.{}") -> Path:
    """As version 2.7 wrote it, and 5.2 but for the weights of Dense: BERT at the root or, older still, in a folder."""
    shutil.copytree(bert, folder / inside)
    (folder / inside / BERT_CONFIG).write_text('{"max_seq_length": 9, "do_lower_case": true}')
    (folder / LIBRARY_CONFIG).write_text('{"__version__": {"sentence_transformers": "2.7.0"}, "prompts": {}, '
                                         '"default_prompt_name": null}')  # fmt: skip
    kinds = ("Transformer", "Pooling", "Asym", "Normalize")
    paths = (inside, "1_Pooling", "2_Asym", "3_Normalize")
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": type_of.format(kind)}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    for path in paths[1:]:
        (folder / path).mkdir()
    names = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    modes = {f"pooling_mode_{name}": name in ("cls_token", "mean_tokens") for name in names}
    pooling = {"word_embedding_dimension": WIDTH, **modes, "include_prompt": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    torch.manual_seed(2)
    for side in ("140_Dense", "141_Dense"):
        (folder / "2_Asym" / side).mkdir()
        dense = {"in_features": 2 * WIDTH, "out_features": 8, "bias": True,
                 "activation_function": "torch.nn.modules.activation.Tanh"}  # fmt: skip
        (folder / "2_Asym" / side / "config.json").write_text(json.dumps(dense))
        weights = {f"linear.{name}": t for name, t in torch.nn.Linear(2 * WIDTH, 8).state_dict().items()}
        torch.save(weights, folder / "2_Asym" / side / "pytorch_model.bin")
    routes = {
        "types": {side: type_of.format("Dense") for side in ("140_Dense", "141_Dense")},
        "structure": {"query": ["140_Dense"], "doc": ["141_Dense"]},
        "parameters": {"allow_empty_key": True},
    }
    (folder / "2_Asym" / "config.json").write_text(json.dumps(routes))
    return folder


@pytest.mark.once
@pytest.mark.parametrize("inside", ["", "0_Transformer"], ids=["root", "0_Transformer"])
def test_folders_of_version_2(bert, tmp_path, inside):
    folder = old_folder(bert, tmp_path / "model", inside)
    queries = assert_same(folder, task="query")
    assert torch.equal(load(folder).encode(TEXTS), queries)
    assert not torch.allclose(assert_same(folder, task="doc"), queries, atol=1e-3)


@pytest.mark.once
def test_a_reranker_gives_the_vectors_of_its_bert_without_its_prompts(saved):
    change(saved, LIBRARY_CONFIG, model_type="CrossEncoder", prompts={"rank": "find "}, default_prompt_name="rank")
    vectors = assert_same(saved)
    assert vectors.shape[1] == WIDTH
    assert SentenceConfig.from_folder(saved) == SentenceConfig()


# ---- sentence-transformers' own object, accelerated ------------------------------------------------------


def routes_in_front(bert: Path) -> list:
    both = transformer(bert)
    return [st.Router({"query": [both, st.Pooling(WIDTH, "cls")], "document": [both, st.Pooling(WIDTH)]})]


def weighted_layers(bert: Path) -> list:
    first = transformer(bert, config_kwargs={"output_hidden_states": True})
    return [first, st.WeightedLayerPooling(WIDTH, LAYERS, layer_start=1), st.Pooling(WIDTH)]


ACCELERATED = {name: lambda bert, after=after: [transformer(bert), *after()] for name, after in PIPELINES.items()} | {
    "weighted_layers": weighted_layers,
    "routes_in_front": routes_in_front,
    "convolution_that_reads_padding": lambda bert: [transformer(bert), st.CNN(WIDTH, 4), st.Pooling(12, "max")],
}  # fmt: skip


@pytest.mark.once
@pytest.mark.filterwarnings("ignore:SentenceTransformer")
@pytest.mark.parametrize("modules", ACCELERATED.values(), ids=ACCELERATED.keys())
def test_accelerated_models_give_their_own_vectors(bert, modules):
    model = SentenceTransformer(modules=modules(bert), device="cpu", prompts={"query": "find "}, truncate_dim=6)
    calls = [("encode", {}), ("encode_query", {}), ("encode", {"output_value": "token_embeddings"})]

    def vectors() -> list:
        return [getattr(model, how)(TEXTS, convert_to_tensor=True, batch_size=3, **options) for how, options in calls]

    expected = vectors()
    fastbert.accelerate(model, impl="native")
    for theirs_, ours in zip(expected, vectors(), strict=True):
        torch.testing.assert_close(ours, theirs_, atol=1e-5, rtol=1e-4)


# ---- what the caller wants otherwise ---------------------------------------------------------------------


@pytest.mark.once
def test_what_the_caller_wants_otherwise(bert, tmp_path, saved):
    found = SentenceConfig.from_folder(saved)
    assert (found.pooling, found.normalize, found.max_length, found.lowercase) == ("mean", True, None, False)
    assert load(saved).normalize
    assert not load(saved, normalize=False).normalize
    raw, cut = (theirs(saved, **options)[0] for options in ({}, {"truncate_dim": 5}))
    torch.testing.assert_close(load(saved, truncate_dim=5).encode(TEXTS), cut, atol=1e-5, rtol=1e-4)
    both = load(saved, truncate_dim=5, normalize=True).encode(TEXTS)
    torch.testing.assert_close(both, torch.nn.functional.normalize(cut, dim=1), atol=1e-5, rtol=1e-4)
    longer = load(saved, normalize=False).encode(TEXTS)
    torch.testing.assert_close(torch.nn.functional.normalize(longer, dim=1), raw, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(longer, raw, atol=1e-2)
    with pytest.raises(ValueError, match=r"pooling 'cls' cannot stand in place of .* Pooling, Dense, Normalize"):
        load(saved, pooling="cls")
    simple = save(tmp_path / "simple", transformer(bert), st.Pooling(WIDTH), st.Normalize())
    encoder = load(simple, pooling="lasttoken")
    assert (encoder.pooling, encoder.normalize, encoder.max_length) == ("lasttoken", True, LIMIT)
    weighted = save(
        tmp_path / "weighted", transformer(bert, config_kwargs={"output_hidden_states": True}),
        st.WeightedLayerPooling(WIDTH, LAYERS, layer_start=1), st.Pooling(WIDTH),
    )  # fmt: skip
    with pytest.raises(ValueError, match="layer 1 cannot be pooled: the model's modules say which layers are read"):
        load(weighted, layer=1)


@pytest.mark.once
def test_the_command_line_and_workers_take_a_route(bert, tmp_path):
    assert options.POOLINGS == encoder.POOLING
    folder, texts = routed(bert, tmp_path / "model", default_route="document"), tmp_path / "texts.txt"
    texts.write_text("the cat sat\na dog\n")
    asked = ["--task", "query", "--prompt-name", "query", "--truncate-dim", "5", "--workers", "2"]
    how = ["--dtype", "float32", "--impl", "native", "--device", "cpu", "--quiet", "-o", str(tmp_path / "out.npy")]
    assert main(["encode", str(texts), "--model", str(folder), *asked, *how]) == 0
    expected = load(folder).encode_query(["the cat sat", "a dog"])[:, :5]
    torch.testing.assert_close(torch.from_numpy(numpy.load(tmp_path / "out.npy")), expected, atol=1e-6, rtol=1e-5)
