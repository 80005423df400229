"""Folders of sentence-transformers: the vectors of that library, or a refusal that names what is not supported.

The library writes folders of version 6.2; folders of older versions are made file by file from what they wrote.
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
from fastbert.text.tokenizer import Tokenizer
from sentence_folders import (
    BERT_CONFIG,
    LAYERS,
    LIBRARY_CONFIG,
    LIMIT,
    TEXTS,
    WIDTH,
    WORDS,
    SentenceTransformer,
    assert_same,
    change,
    load,
    make_bert,
    save,
    save_usual,
    st,
    theirs,
    transformer,
)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return make_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def saved(bert, tmp_path) -> Path:
    return save_usual(bert, tmp_path / "model")


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
def test_weighted_layers_need_a_config_that_asks_for_all_layers(bert, tmp_path, asked_for):
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
    texts = [*TEXTS, "s" * 3]  # "find" and "s" are two tokens of one word; "finds" and longer ones are unknown
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
def test_a_prompt_with_more_tokens_than_prompt_and_text(bert, tmp_path):
    """ "finds" is one unknown word, but "find" with "##s" is two tokens: nothing remains for the pooling."""
    vocab = (bert / "vocab.txt").read_text(encoding="utf-8").replace("\nquery\n", "\nfindss\n")
    changed = shutil.copytree(bert, tmp_path / "bert")
    (changed / "vocab.txt").write_text(vocab, encoding="utf-8")
    folder = save(tmp_path / "model", transformer(changed), st.Pooling(WIDTH, MODES, include_prompt=False))
    texts = ["s", "the cat"]
    vectors = load(folder).encode(texts, prompt="finds")
    expected, _ = theirs(folder, texts=texts, prompt="finds")
    assert torch.isneginf(expected).sum() == WIDTH  # the maximum of no tokens
    torch.testing.assert_close(vectors, expected)


# ---- tasks and prompts -----------------------------------------------------------------------------------


def routed(bert: Path, folder: Path, **options) -> Path:
    both = transformer(bert)
    query = [both, st.Pooling(WIDTH, "cls"), st.Dense(WIDTH, 8), st.Normalize()]
    document = [both, st.Pooling(WIDTH), st.Dense(WIDTH, 8), st.Normalize()]
    return save(folder, st.Router({"query": query, "document": document}, **options), prompts={"query": "find "})


@pytest.mark.once
def test_a_router_with_one_bert_for_both_routes(bert, tmp_path):
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
def test_a_router_with_two_berts_is_refused(bert, tmp_path):
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
    """From the converted folder the library computes its own vectors, on both routes; ours are the source's bits."""
    folder = routed(bert, tmp_path / "model", default_route="document")
    convert(folder, tmp_path / "out", say=lambda line: None)
    for how in ("encode", "encode_query", "encode_document"):
        assert torch.equal(assert_same(tmp_path / "out", how), assert_same(folder, how))
    # except for the README, and files that transformers writes and nothing reads
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    written = {
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    assert names - written <= {"README.md"}
    assert written <= names


@pytest.mark.once
def test_a_bert_in_a_subfolder_is_found(bert, tmp_path):
    """In a Router's folder, and in 0_Transformer: weights, config and tokenizer."""
    expected = BertModel.from_pretrained(bert).state_dict()
    words = Tokenizer.from_pretrained(bert).input_ids(TEXTS)
    for folder in (routed(bert, tmp_path / "router"), old_folder(bert, tmp_path / "old", "0_Transformer")):
        state = BertModel.from_pretrained(folder).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)
        assert BertConfig.from_pretrained(folder).hidden_size == WIDTH
        assert Tokenizer.from_pretrained(folder).input_ids(TEXTS) == words


@pytest.mark.once
def test_a_router_that_contains_itself_is_refused(bert, tmp_path):
    """Reading it would recurse without end."""
    folder = save(tmp_path / "model", transformer(bert), st.Pooling(WIDTH), st.Router({"text": [st.Dense(WIDTH, 8)]}))
    file = folder / "2_Router" / "router_config.json"
    router = json.loads(file.read_text())
    router |= {"types": {".": "sentence_transformers.models.Router"}, "structure": {"text": ["."]}}
    file.write_text(json.dumps(router))
    with pytest.raises(CheckpointError, match="a module's path is the Router's own folder"):
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


# ---- folders of other versions, and other kinds ----------------------------------------------------------


def old_folder(bert: Path, folder: Path, inside: str = "", type_of: str = "sentence_transformers.models.{}") -> Path:
    """A folder as version 2.7 wrote it (and 5.2, except for Dense's weights): BERT at the root, or in a subfolder."""
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
def test_encoder_of_a_reranker_gives_its_berts_vectors_without_prompts(saved):
    change(saved, LIBRARY_CONFIG, model_type="CrossEncoder", prompts={"rank": "find "}, default_prompt_name="rank")
    vectors = assert_same(saved)
    assert vectors.shape[1] == WIDTH
    assert SentenceConfig.from_folder(saved) == SentenceConfig()


# ---- sentence-transformers' own models, accelerated ------------------------------------------------------


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


# ---- options of the caller -------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match=r"pooling 'cls' cannot replace .* Pooling, Dense, Normalize"):
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
