"""Features: several layers combined, for texts, tokens and words, compared with transformers' hidden_states."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fastbert import Encoder
from fastbert.cli.main import main
from fastbert.encoding.layers import layer_numbers
from fastbert.testing import allowed_factor, assert_within_budget
from small_bert import save_bert

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", *"abcdefgh", *(f"##{c}" for c in "abcdefgh")]
TEXTS = ["ab c, def", "", "Hab", "a b c d e f g h " * 6, "gh,gh"]
LAYERS = 3


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    sizes = {"num_hidden_layers": LAYERS, "max_position_embeddings": 24}
    return save_bert(tmp_path_factory.mktemp("bert"), WORDS, initializer_range=0.3, **sizes)


def encoder_of(bert, **options) -> Encoder:
    return Encoder.from_pretrained(bert, **{"device": "cpu", "dtype": "float32", "impl": "native", **options})


def theirs(bert, ids: list[list[int]], dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """transformers' hidden_states of texts one at a time: [text][layer] -> [tokens, C]."""
    transformers = pytest.importorskip("transformers", reason="compared with transformers")
    model = transformers.BertModel.from_pretrained(bert, attn_implementation="eager").to(dtype).eval()
    with torch.no_grad():
        found = [model(torch.tensor([row]), output_hidden_states=True).hidden_states for row in ids]
    return [[state[0] for state in states] for states in found]


def put_together(states: list[torch.Tensor], layers: tuple[int, ...], combine: str) -> torch.Tensor:
    chosen = [states[layer] for layer in layers]
    if combine == "concat":
        return torch.cat(chosen, -1)
    return sum(chosen) / (len(chosen) if combine == "mean" else 1)


# ---- texts and tokens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["native", pytest.param("triton", marks=pytest.mark.triton)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_vectors_of_layers_equal_those_of_transformers(bert, dtype, impl):
    """For each token, and for the mean over each text, with [CLS] and [SEP], by every way of combining layers."""
    encoder = encoder_of(bert, dtype=dtype, impl=impl, max_length=20)
    ids = encoder.tokenise(TEXTS)
    plain, truth = theirs(bert, ids, dtype), theirs(bert, ids, torch.float64)
    factor = allowed_factor(dtype)
    ways = [((0, -1), "concat"), ((1, 2), "sum"), ((0, -2, 3), "mean"), ((2,), "concat")]
    for layers, combine in ways if impl != "triton" else ways[:1]:
        options = {"layers": layers, "combine": combine}
        expected = [[put_together(states, layers, combine) for states in found] for found in (plain, truth)]
        tokens = encoder.encode_tokens(TEXTS, special_tokens=True, **options)
        name = f"{combine} of {layers}"
        assert [len(of_text.vectors) for of_text in tokens] == [len(row) for row in ids]
        rows = torch.cat([of_text.vectors for of_text in tokens])
        assert_within_budget(rows, *map(torch.cat, expected), name=name, factor=factor)
        vectors = encoder.encode(TEXTS, **options)
        means = [torch.stack([rows.mean(0) for rows in found]) for found in expected]
        assert_within_budget(vectors, *means, name=f"mean of {name}", factor=factor)


def test_one_layer_is_the_layer_and_the_last_is_the_default(bert):
    encoder = encoder_of(bert)
    assert torch.equal(encoder.encode(TEXTS, layers=[-1]), encoder.encode(TEXTS))
    torch.testing.assert_close(encoder.encode(TEXTS, layers=[1]), encoder_of(bert, layer=1).encode(TEXTS))
    assert torch.equal(encoder.encode_tokens(TEXTS)[0].vectors, encoder.encode_tokens(TEXTS, layers=[3])[0].vectors)
    vectors = encoder_of(bert, pooling="pooler").encode_tokens(TEXTS)[0].vectors
    torch.testing.assert_close(vectors, encoder.encode_tokens(TEXTS)[0].vectors)


def test_an_encoder_loads_no_layers_above_the_chosen_ones(bert):
    whole = encoder_of(bert, normalize=True)
    encoder = encoder_of(bert, layers=[-4, 2], combine="concat", normalize=True)
    assert len(encoder.model.encoder["layer"]) == 2
    assert (encoder.dimension, encoder.token_dimension, whole.dimension) == (64, 64, 32)
    vectors = encoder.encode(TEXTS)
    assert torch.equal(vectors, whole.encode(TEXTS, layers=[0, 2]))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(TEXTS)))
    assert torch.equal(encoder.encode(TEXTS, combine="sum"), whole.encode(TEXTS, layers=[0, 2], combine="sum"))
    assert encoder.asked(layers=[1]).combine == "concat"
    assert encoder.encode(TEXTS).shape == (len(TEXTS), 64), "one call does not change the next"


def test_batches_change_nothing_but_rounding(bert):
    encoder = encoder_of(bert)
    for options in ({}, {"words": "mean"}):
        together = encoder.encode_tokens(TEXTS * 3, layers=[1, 2], **options)
        alone = encoder.encode_tokens(TEXTS * 3, layers=[1, 2], max_tokens_per_batch=1, **options)
        for a, b in zip(together, alone, strict=True):
            assert a[:2] == b[:2]
            torch.testing.assert_close(a.vectors, b.vectors, atol=1e-5, rtol=1e-4)


# ---- pieces, words, places -----------------------------------------------------------------------------------


def test_tokens_and_words_and_their_places(bert):
    encoder = encoder_of(bert)
    (tokens,) = encoder.encode_tokens(["ab c, Def"], special_tokens=True)
    assert tokens.parts == ["[CLS]", "a", "##b", "c", ",", "d", "##e", "##f", "[SEP]"]
    assert tokens.offsets == [None, (0, 1), (1, 2), (3, 4), (4, 5), (6, 7), (7, 8), (8, 9), None]
    own = encoder.encode_tokens(["ab c, Def"])[0]
    assert (own.parts, own.offsets) == (tokens.parts[1:-1], tokens.offsets[1:-1])
    assert torch.equal(own.vectors, tokens.vectors[1:-1])
    first, mean = (encoder.encode_tokens(["ab c, Def"], words=how)[0] for how in ("first", "mean"))
    assert first.parts == mean.parts == ["ab", "c", ",", "Def"]
    assert first.offsets == mean.offsets == [(0, 2), (3, 4), (4, 5), (6, 9)]
    assert torch.equal(first.vectors, own.vectors[[0, 2, 3, 4]])
    rows = own.vectors
    expected = torch.stack([rows[:2].mean(0), rows[2], rows[3], rows[4:].mean(0)])
    torch.testing.assert_close(mean.vectors, expected)


def test_nothing_and_too_much(bert):
    encoder = encoder_of(bert, max_length=6)
    for options in ({}, {"words": "first"}, {"words": "mean"}):
        empty, cut = encoder.encode_tokens(["", "ab cde"], **options)
        assert (empty.parts, empty.offsets, empty.vectors.shape) == ([], [], (0, 32))
        assert cut.offsets == ([(0, 1), (1, 2), (3, 4), (4, 5)] if not options else [(0, 2)])
    assert encoder.encode_tokens([]) == []


def test_a_word_whose_end_is_cut_off_has_no_vector(bert):
    """The vector would be that of another word, which is the beginning of this one."""
    text, at_most = (
        "ab cde f",
        {3: [], 4: ["ab"], 6: ["ab"], 7: ["ab", "cde"], 8: ["ab", "cde", "f"], 9: ["ab", "cde", "f"]},
    )
    for length, parts in at_most.items():
        found = encoder_of(bert, max_length=length).encode_tokens(text, words="mean")
        assert found.parts == parts, length
        whole = encoder_of(bert, max_length=length).encode_tokens(text)
        assert len(whole.parts) == min(length - 2, 6), "tokens are kept"
    found = encoder_of(bert, max_length=6).encode_tokens("ab cd " * 2000, words="first")
    assert found.parts == ["ab", "cd"], "also in a text that is cut before it is tokenised"


def test_a_word_whose_beginning_is_cut_off_has_no_vector(bert, tmp_path):
    """For a tokenizer that cuts off the beginning of texts."""
    folder = shutil.copytree(bert, tmp_path / "left")
    (folder / "tokenizer_config.json").write_text('{"truncation_side": "left"}')
    for length, parts in {3: ["f"], 5: ["f"], 6: ["cde", "f"], 7: ["cde", "f"], 8: ["ab", "cde", "f"]}.items():
        encoder = encoder_of(folder, max_length=length)
        assert len(encoder.encode_tokens("ab cde f").parts) == length - 2
        assert encoder.encode_tokens("ab cde f", words="mean").parts == parts, length


def test_a_single_text_and_its_stats(bert):
    encoder = encoder_of(bert)
    single, (listed,) = encoder.encode_tokens(TEXTS[0]), encoder.encode_tokens([TEXTS[0]])
    assert single[:2] == listed[:2]
    assert torch.equal(single.vectors, listed.vectors)
    assert encoder.stats.texts == 2
    assert encoder.stats.seconds > 0.0


def test_a_prompt_has_no_vectors_and_does_not_shift_places(bert):
    encoder = encoder_of(bert)
    plain = encoder.encode_tokens(["c def"])[0]
    prompted = encoder.encode_tokens(["c def"], prompt="ab, ")[0]
    assert prompted[:2] == plain[:2]
    assert not torch.allclose(prompted.vectors, plain.vectors), "the prompt was read"
    whole = encoder.encode_tokens(["ab, c def"])[0]
    torch.testing.assert_close(prompted.vectors, whole.vectors[3:])
    words = encoder.encode_tokens(["c def"], prompt="ab, ", words="mean")[0]
    assert (words.parts, words.offsets) == (["c", "def"], [(0, 1), (2, 5)])


# ---- what is refused -----------------------------------------------------------------------------------------


def test_numbers_of_layers():
    assert layer_numbers([0, -1, 2], 3) == (0, 3, 2)
    for layers, message in (
        ([4], "layers must be -4 to 3 for a model of 3 layers, got 4"),
        ([-5], "got -5"),
        ([], "must name one layer at least"),
        ([3, -1], "3 comes twice in 3, -1"),
    ):
        with pytest.raises(ValueError, match=message):
            layer_numbers(layers, 3)


def test_unavailable_layers_are_refused(bert):
    encoder = encoder_of(bert)
    with pytest.raises(ValueError, match="combine must be one of concat, sum, mean, got 'max'"):
        encoder.encode(TEXTS, layers=[1], combine="max")
    with pytest.raises(ValueError, match="combine 'sum' is for several layers"):
        encoder.encode(TEXTS, combine="sum")
    with pytest.raises(ValueError, match="layers cannot be chosen: the model's pooling"):
        encoder_of(bert, pooling="pooler").encode(TEXTS, layers=[1])
    with pytest.raises(ValueError, match="not both"):
        encoder_of(bert, layer=1, layers=[1, 2])
    with pytest.raises(ValueError, match="words must be None, 'first' or 'mean', got 'last'"):
        encoder.encode_tokens(TEXTS, words="last")
    with pytest.raises(ValueError, match="special tokens belong to no word"):
        encoder.encode_tokens(TEXTS, words="mean", special_tokens=True)


# ---- the command ---------------------------------------------------------------------------------------------


def encode(bert, *words) -> int:
    base = ["encode", "--model", bert, "--device", "cpu", "--dtype", "float32", "--impl", "native", "-q"]
    try:
        return main([str(word) for word in (*base, *words)])
    except SystemExit as leaving:  # argparse
        return leaving.code


@pytest.fixture
def lines(tmp_path) -> Path:
    path = tmp_path / "in.txt"
    path.write_text("\n".join(TEXTS) + "\n")
    return path


@pytest.mark.once
def test_layers_from_the_shell(bert, lines, tmp_path):
    out = tmp_path / "out.npy"
    assert encode(bert, lines, "-o", out, "--layers=-2,-1", "--combine", "sum") == 0
    expected = encoder_of(bert).encode(TEXTS, layers=[2, 3], combine="sum")
    np.testing.assert_allclose(np.load(out), expected.numpy(), atol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize("arguments", [["--tokens"], ["--tokens", "--special-tokens"], ["--words", "mean"]])
def test_tokens_and_words_from_the_shell(bert, lines, tmp_path, arguments):
    """Both kinds of file hold the same."""
    words = "mean" if "--words" in arguments else None
    options = {"layers": [0, 3], "words": words, "special_tokens": "--special-tokens" in arguments}
    expected = encoder_of(bert).encode_tokens(TEXTS, **options)
    name = "word" if words else "token"
    assert encode(bert, lines, "-o", tmp_path / "out.jsonl", "--layers", "0,3", *arguments) == 0
    for line, text, of_text in zip((tmp_path / "out.jsonl").open(), TEXTS, expected, strict=True):
        record = json.loads(line)
        assert list(record) == ["text", f"{name}s"]
        assert record["text"] == text
        assert [part[name] for part in record[f"{name}s"]] == of_text.parts
        places = [None if part["start"] is None else (part["start"], part["end"]) for part in record[f"{name}s"]]
        assert places == of_text.offsets
        if of_text.parts:
            found = np.array([part["embedding"] for part in record[f"{name}s"]], dtype=np.float32)
            np.testing.assert_array_equal(found, of_text.vectors.numpy())
    assert encode(bert, lines, "-o", tmp_path / "out.safetensors", "--layers", "0,3", *arguments) == 0
    found = load_file(tmp_path / "out.safetensors")
    ends = found["cu_seqlens"]
    assert ends.tolist() == np.cumsum([0, *(len(of_text.parts) for of_text in expected)]).tolist()
    for i, of_text in enumerate(expected):
        rows = slice(ends[i], ends[i + 1])
        np.testing.assert_array_equal(found["embeddings"][rows], of_text.vectors.numpy())
        assert found["offsets"][rows].tolist() == [list(place or (-1, -1)) for place in of_text.offsets]


@pytest.mark.once
def test_an_empty_file_has_no_rows(bert, tmp_path):
    (tmp_path / "in.txt").write_text("")
    assert encode(bert, tmp_path / "in.txt", "-o", tmp_path / "out.safetensors", "--tokens") == 0
    found = load_file(tmp_path / "out.safetensors")
    assert (found["embeddings"].shape, found["offsets"].shape) == ((0, 32), (0, 2))
    assert found["cu_seqlens"].tolist() == [0]


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--combine", "sum"), 2, "--combine is for several layers: name them with --layers"),
        (("--layers", "1,2", "--layer", "1"), 2, "--layer or --layers, not both"),
        (("--layers", "one"), 2, "expected whole numbers between commas, got 'one'"),
        (("--layers", "9,10"), 1, "layers must be -4 to 3 for a model of 3 layers, got 9"),
        (("--special-tokens",), 2, "--special-tokens goes with --tokens"),
        (("--tokens", "--words", "first"), 2, "not allowed with argument --tokens"),
        (("--tokens", "-o", "out.npy"), 2, "a .npy file cannot tell where a text ends: use .jsonl or .safetensors"),
        (("--tokens", "--workers", "2"), 2, "--tokens and --words are for a single process"),
        (("--words", "first", "--normalize"), 2, "--normalize is for vectors of texts, not of tokens or words"),
        (("--tokens", "--pooling", "cls"), 2, "--pooling is for vectors of texts"),
    ],
)
def test_arguments_that_exclude_each_other(bert, lines, capsys, arguments, code, message):
    assert encode(bert, lines, *arguments) == code
    assert message in capsys.readouterr().err
