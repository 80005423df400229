"""`fastbert convert`: what it prints and writes, from folders and archives; after an error it has written nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastbert.checkpoint import CheckpointError
from fastbert.cli.main import main
from fastbert.convert import convert
from fastbert.encoding.encoder import Encoder
from fastbert.formats.safetensors_file import write_safetensors
from fastbert.formats.tensorflow_bundle import read_bundle, write_bundle
from fastbert.formats.variable import Variable
from fastbert.models.bert import BertModel
from fastbert.text.tokenizer import Tokenizer
from formats_models import FIXTURES, GOOGLE_FILES, as_transformers_writes, flip, google_without_a_name, names_in

pytestmark = pytest.mark.once


@pytest.fixture
def google(tmp_path) -> Path:
    return google_without_a_name(tmp_path)


# ---- the command -----------------------------------------------------------------------------------------


def test_convert_prints_what_it_did_and_writes_a_folder(google, capsys):
    out = google.parent / "out"
    assert main(["convert", str(google), "-o", str(out), "--lower-case", "--verify"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "46 variables used, 0 skipped" in printed
    assert "46 variables have their checksums." in printed
    assert any(line.startswith('"gelu" in its config is gelu_new, computed by tanh') for line in printed)
    assert names_in(out) == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    }
    source, written = (BertModel.from_pretrained(path).state_dict() for path in (google, out))
    assert source.keys() == written.keys()
    assert all(torch.equal(t, written[name]) for name, t in source.items())


def test_list_prints_every_variable_and_writes_nothing(google, capsys):
    variables = {name: v.read().clone() for name, v in read_bundle(google / "bert_model.ckpt").items()}
    variables |= {"global_step": torch.tensor(7), "bert/pooler/dense/bias/adam_m": torch.zeros(32)}
    write_bundle(google / "bert_model.ckpt", variables.items())
    assert main(["convert", "--list", str(google)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "global_step int64 [] skipped: training counter" in lines
    assert "bert/pooler/dense/bias/adam_m float32 [32] skipped: optimiser state" in lines
    assert "bert/pooler/dense/kernel float32 [32, 32] -> bert.pooler.dense.weight" in lines
    assert "46 variables used, 2 skipped" in lines
    assert names_in(google.parent) == {"bert"}


def test_list_prints_the_variables_even_if_they_cannot_be_converted(google, capsys):
    write_bundle(google / "bert_model.ckpt", [("bert/embeddings/word_embeddings", torch.zeros(60, 32))])
    assert main(["convert", "--list", str(google)]) == 1
    captured = capsys.readouterr()
    assert "bert/embeddings/word_embeddings" in captured.out
    assert "it lacks" in captured.err


@pytest.mark.parametrize("arguments", [[], ["--list", "-o", "x"]])
def test_either_a_folder_or_list(google, arguments, capsys):
    assert main(["convert", str(google), *arguments]) == 2
    assert "give either -o FOLDER or --list" in capsys.readouterr().err


def test_lower_casing_is_never_guessed(google, capsys):
    out = google.parent / "out"
    assert main(["convert", str(google), "-o", str(out)]) == 1
    assert "give --lower-case or --no-lower-case" in capsys.readouterr().err
    assert not out.exists()
    with pytest.raises(CheckpointError, match="does not say whether its tokenizer lower-cases"):
        Tokenizer.from_pretrained(google)
    with pytest.raises(CheckpointError, match="does not say whether its tokenizer lower-cases"):
        Encoder.from_pretrained(google)
    BertModel.from_pretrained(google)  # a model without a tokenizer
    named = google.rename(google.with_name("multi_cased_L-2_H-32_A-2"))
    assert main(["convert", str(named), "-o", str(out)]) == 0
    assert json.loads((out / "tokenizer_config.json").read_text())["do_lower_case"] is False
    assert Tokenizer.from_pretrained(named).tokenize("A") == Tokenizer.from_pretrained(out).tokenize("A")


def test_the_same_ids_and_vectors_from_the_source_as_from_the_folder_it_becomes(google):
    named = google.rename(google.with_name("uncased_L-2_H-32_A-2"))
    convert(named, google.parent / "out", say=lambda line: None)
    texts = ["a b c d", "B a", ""]
    tokenizers = [Tokenizer.from_pretrained(path) for path in (named, google.parent / "out")]
    assert tokenizers[0].input_ids(texts) == tokenizers[1].input_ids(texts)
    options = {"dtype": "float32", "device": "cpu"}
    direct, folder = (Encoder.from_pretrained(path, **options) for path in (named, google.parent / "out"))
    assert torch.equal(direct.encode(texts), folder.encode(texts))


# ---- transformers' and sentence-transformers' folders ----------------------------------------------------


@pytest.fixture
def ours(google) -> Path:
    return as_transformers_writes(google)


def test_a_folder_with_only_a_vocabulary_keeps_the_given_case(ours):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (ours / name).unlink()
    (ours / "added_tokens.json").write_text('{"[new]": 60}')
    with pytest.raises(CheckpointError, match="give --lower-case or --no-lower-case"):
        convert(ours, ours.parent / "out", say=lambda line: None)
    for lower_case in (True, False):
        out = ours.parent / str(lower_case)
        convert(ours, out, lower_case=lower_case, say=lambda line: None)
        tokenizer = Tokenizer.from_pretrained(out)
        assert (tokenizer.tokenize("A") == tokenizer.tokenize("a")) is lower_case
        assert tokenizer.token_to_id("[new]") == 60
        theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(out)
        assert theirs("A a B [new]")["input_ids"] == tokenizer.input_ids(["A a B [new]"])[0]


def test_a_sentencepiece_tokenizers_own_settings_are_kept(ours):
    (ours / "spiece.model").write_bytes(b"a sentencepiece model")
    (ours / "tokenizer_config.json").write_text('{"do_lower_case": true, "keep_accents": false}')
    convert(ours, ours.parent / "out", say=lambda line: None)
    for name in ("spiece.model", "tokenizer_config.json"):
        assert (ours.parent / "out" / name).read_bytes() == (ours / name).read_bytes()


def add_modules(folder: Path, *modules: tuple[str, str]) -> None:
    """Writes modules.json of sentence-transformers: (kind, path) of each module after the Transformer."""
    listed = [("Transformer", ""), *modules]
    (folder / "modules.json").write_text(
        json.dumps([{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in listed])
    )
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 5, "do_lower_case": true}')


def test_sentence_transformers_folders_give_the_same_vectors(ours):
    texts = ["a b c d a b c d", "B"]
    options = {"dtype": "float32", "device": "cpu"}
    plain = Encoder.from_pretrained(ours, **options).encode(texts)
    add_modules(ours, ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
    convert(ours, ours.parent / "out", say=lambda line: None)
    expected = Encoder.from_pretrained(ours, **options).encode(texts)
    assert torch.equal(Encoder.from_pretrained(ours.parent / "out", **options).encode(texts), expected)
    assert not torch.allclose(expected, plain, atol=1e-3)


def test_modules_after_bert_are_kept(ours):
    add_modules(ours, ("Pooling", "1_Pooling"), ("Asym", "2_Asym"), ("Normalize", "3_Normalize"))
    width = BertModel.from_pretrained(ours).config.hidden_size
    dense = ours / "2_Asym" / "140_Dense"
    dense.mkdir(parents=True)
    (dense / "config.json").write_text(f'{{"in_features": {width}, "out_features": 3}}')
    torch.save({"linear.weight": torch.randn(3, width), "linear.bias": torch.randn(3)}, dense / "pytorch_model.bin")
    routes = {"types": {"140_Dense": "sentence_transformers.models.Dense"}, "structure": {"query": ["140_Dense"]}}
    (ours / "2_Asym" / "config.json").write_text(json.dumps({**routes, "parameters": {"allow_empty_key": True}}))
    convert(ours, ours.parent / "out", say=lambda line: None)
    vectors = [
        Encoder.from_pretrained(f, dtype="float32", device="cpu").encode(["a b"]) for f in (ours, ours.parent / "out")
    ]
    assert torch.equal(*vectors)
    assert vectors[0].shape == (1, 3)


def test_an_encoder_in_a_folder_of_its_own_moves_to_the_root(ours):
    """sentence-transformers before version 2 wrote such folders."""
    add_modules(ours, ("Pooling", "1_Pooling"))
    inside = ours / "0_Transformer"
    inside.mkdir()
    for path in [path for path in ours.iterdir() if path.is_file() and path.name != "modules.json"]:
        path.rename(inside / path.name)
    text = (ours / "modules.json").read_text().replace('"path": ""', '"path": "0_Transformer"')
    (ours / "modules.json").write_text(text)
    convert(ours, ours.parent / "out", say=lambda line: None)
    before, after = (
        Encoder.from_pretrained(folder, dtype="float32", device="cpu").encode(["a b c d a b c d", "B"])
        for folder in (ours, ours.parent / "out")
    )
    assert torch.equal(before, after)
    BertModel.from_pretrained(ours.parent / "out")


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([("Transformer", ""), ("Pooling", "../1_Pooling")], "the path '../1_Pooling' leads out of the folder"),
        ([("Transformer", ""), ("Pooling", "")], "Pooling in '.' comes after the encoder"),
        ([("Transformer", ""), ("Transformer", "1_Transformer")], "Transformer in '1_Transformer' comes after"),
        ([("Router", "")], "must have types, the class of each module by its folder"),
    ],
)
def test_modules_that_would_be_lost_are_refused(ours, modules, message):
    listed = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in modules]
    (ours / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match=message):
        convert(ours, ours.parent / "out", say=lambda line: None)
    assert not (ours.parent / "out").exists()


@pytest.mark.parametrize("modules", ["[]", "{}", "[1]", '[{"type": "sentence_transformers.models.Pooling"}]'])
def test_invalid_lists_of_modules_are_refused(ours, modules):
    (ours / "modules.json").write_text(modules)
    with pytest.raises(CheckpointError, match="must list one module or more, each with a type and a path"):
        convert(ours, ours.parent / "out", say=lambda line: None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"types": {"bert": 3}}, "must have types, the class of each module by its folder"),
        ({"structure": {"query": [["bert"]]}}, "must have the structure of its routes"),
        ({"structure": {"query": ["other"]}}, "must have the structure of its routes"),
        ({"structure": ["bert"]}, "must have the structure of its routes"),
        ({"structure": {}}, "must have the structure of its routes"),
        ({"structure": {"query": ["bert", "bert"]}}, "the route 'query' has the Transformer bert twice"),
    ],
)
def test_invalid_routers_are_refused(ours, changes, message):
    folder = ours.parent / "routed"
    shutil.copytree(ours, folder / "bert")
    (folder / "modules.json").write_text('[{"type": "sentence_transformers.models.Router", "path": ""}]')
    router = {"types": {"bert": "sentence_transformers.models.Transformer"}, "structure": {"query": ["bert"]}}
    (folder / "router_config.json").write_text(json.dumps(router))
    convert(folder, ours.parent / "whole", say=lambda line: None)
    (folder / "router_config.json").write_text(json.dumps(router | changes))
    with pytest.raises(CheckpointError, match=message):
        convert(folder, ours.parent / "out", say=lambda line: None)


def test_to_tensorflow_takes_the_vocabulary_from_a_tokenizer_json(ours):
    (ours / "vocab.txt").unlink()
    add_modules(ours, ("Pooling", "1_Pooling"))
    lines = []
    convert(ours, ours.parent / "out", to="tensorflow", say=lines.append)
    assert (ours.parent / "out" / "vocab.txt").read_text() == (FIXTURES / "vocab.txt").read_text()
    assert any("modules.json says is not written" in line for line in lines)


# ---- all or nothing --------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE = {
    "index cut": (lambda folder: truncate(folder / GOOGLE_FILES[0]), "truncated or damaged"),
    "index flipped": (lambda folder: flip(folder / GOOGLE_FILES[0], 40), "does not have its checksum"),
    "data cut": (lambda folder: truncate(folder / GOOGLE_FILES[1]), "is truncated: "),
    "data flipped": (lambda folder: flip(folder / GOOGLE_FILES[1], 5), "bert/embeddings/LayerNorm/beta do not have"),
    "no data": (lambda folder: (folder / GOOGLE_FILES[1]).unlink(), "lacks the shard"),
    "no config": (lambda folder: (folder / "bert_config.json").unlink(), "there is no bert_config.json"),
    "config cut": (lambda folder: truncate(folder / "bert_config.json"), "not valid JSON"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_line_and_nothing_is_written(damage, google, capsys):
    spoil, message = DAMAGE[damage]
    spoil(google)
    assert main(["convert", str(google), "-o", str(google.parent / "out"), "--lower-case", "--verify"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert names_in(google.parent) == {"bert"}


def test_existing_files_are_not_overwritten(google):
    out = google.parent / "out"
    out.mkdir()
    convert(google, out, lower_case=True, say=lambda line: None)  # an empty folder is allowed
    before = (out / "model.safetensors").stat()
    with pytest.raises(CheckpointError, match="exists, and is no empty folder"):
        convert(google, out, lower_case=True, say=lambda line: None)
    assert (out / "model.safetensors").stat() == before


def test_the_folder_may_be_the_current_one(google, monkeypatch):
    (google.parent / "out").mkdir()
    monkeypatch.chdir(google.parent / "out")
    convert(google, ".", lower_case=True, say=lambda line: None)
    assert (google.parent / "out" / "model.safetensors").is_file()


def test_a_full_disk_is_found_before_anything_is_written(google, monkeypatch):
    usage = shutil.disk_usage(google)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="has 1,000 free"):
        convert(google, google.parent / "out", lower_case=True, say=lambda line: None)
    assert names_in(google.parent) == {"bert"}


def test_an_interruption_leaves_nothing(google, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastbert.convert.write_safetensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(google, google.parent / "out", lower_case=True, say=lambda line: None)
    assert names_in(google.parent) == {"bert"}


# ---- the safetensors writer ------------------------------------------------------------------------------


def test_safetensors_have_the_bytes_that_their_own_library_writes(tmp_path):
    tensors = {
        "b": torch.arange(12.0).reshape(3, 4), "half": torch.ones(5).half(), "double": torch.ones(2).double(),
        "ü": torch.ones(3, dtype=torch.int64), "c": torch.ones(4).bfloat16(), "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.0), "i": torch.ones(1, dtype=torch.int32), "bytes": torch.ones(3, dtype=torch.int8),
        "flags": torch.ones(3).bool(), "transposed": torch.arange(6.0).reshape(2, 3).t(),
        "written in pieces": torch.arange(200_000.0),
    }  # fmt: skip
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "a", metadata={"format": "pt"})
    write_safetensors(tmp_path / "b", {name: Variable.of_tensor(name, t) for name, t in tensors.items()})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
