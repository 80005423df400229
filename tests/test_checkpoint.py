"""Checkpoints: found, read, written whole or not at all, and put into a module under the right names."""

import json
import os
import stat
import sys
from fnmatch import fnmatch

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fastbert.checkpoint import CheckpointError, load_into, load_state_dict, resolve, save_state_dict, write_atomically

pytestmark = pytest.mark.once


def state(**shapes) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def assert_equal(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name, t in expected.items():
        assert got[name].dtype == t.dtype, name
        assert torch.equal(got[name], t.cpu()), name


def temporaries(folder) -> list[str]:
    return [p.name for p in folder.iterdir() if ".tmp" in p.name]


# ---- write_atomically ------------------------------------------------------------------------------------


def test_write_replaces_whole(tmp_path):
    path = tmp_path / "out.npy"
    path.write_text("old")
    with write_atomically(path) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".npy"  # np.save would add it to a name without
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert temporaries(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_what_was_there(tmp_path, error):

    def write_half(path):
        with write_atomically(path) as temporary:
            temporary.write_text("half")
            raise error

    (tmp_path / "old.txt").write_text("old")
    for name in ("old.txt", "none.txt"):
        with pytest.raises(error):
            write_half(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["old.txt"]
    assert (tmp_path / "old.txt").read_text() == "old"


def test_a_body_may_remove_its_file(tmp_path):
    with pytest.raises(FileNotFoundError), write_atomically(tmp_path / "a") as temporary:
        temporary.unlink()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_written_file_has_ordinary_permissions(tmp_path):
    """A file made by tempfile is readable by its owner alone; a model in a shared folder was of use to nobody else."""
    before = os.umask(0o027)
    try:
        with write_atomically(tmp_path / "a") as temporary:
            temporary.write_text("x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.skipif(os.name == "nt", reason="POSIX special files")
def test_special_files_are_not_replaced(tmp_path):
    """os.replace onto /dev/null, as root, makes a plain file of it."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match=r"cannot write .*pipe: it is not a regular file"), write_atomically(pipe):
        pass
    with pytest.raises(IsADirectoryError, match="it is a folder"), write_atomically(tmp_path):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


def test_unwritable_places_are_named(tmp_path):
    path = tmp_path / "absent" / "out.txt"
    with pytest.raises(FileNotFoundError, match=r"absent.out.txt: No such file or directory"), write_atomically(path):
        pass
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "out.txt"
    with pytest.raises(NotADirectoryError, match=r"cannot write .*out.txt: Not a directory"), write_atomically(path):
        pass


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match=r"cannot write .*out.txt"), write_atomically(tmp_path / "out.txt"):
            pass
        with pytest.raises(CheckpointError, match="cannot write weights to"):
            save_state_dict(tmp_path, state(a=3))
    finally:
        tmp_path.chmod(0o700)


# ---- save and load ---------------------------------------------------------------------------------------

KINDS_OF_STATE = {
    "plain": lambda: state(a=(3, 4), b=5),
    "half_precision": lambda: {"bf16": torch.randn(4).bfloat16(), "fp16": torch.randn(3).half()},
    "integers": lambda: {"int": torch.arange(5), "bool": torch.eye(2) > 0},
    "scalar": lambda: {"scalar": torch.tensor(2.5)},
    "two_empty": lambda: {"empty": torch.zeros(0, 3), "empty_too": torch.zeros(0, 3)},
    "transposed": lambda: {"t": torch.randn(4, 6).T},
    "slices_of_one_buffer": lambda: dict(zip(("q", "k", "v"), torch.randn(6, 4).chunk(3), strict=True)),
    "overlapping": lambda: (lambda t: {"whole": t, "head": t[:2]})(torch.randn(6, 4)),
    "expanded": lambda: {"e": torch.randn(1, 4).expand(3, 4)},
    "parameters": lambda: dict(nn.Linear(3, 4).named_parameters()),
    "nothing": dict,
}  # fmt: skip


@pytest.mark.parametrize("max_shard_size", ["5GB", 40], ids=["one_file", "shards"])
@pytest.mark.parametrize("make", KINDS_OF_STATE.values(), ids=KINDS_OF_STATE)
def test_round_trip(tmp_path, make, max_shard_size):
    expected = make()
    written = save_state_dict(tmp_path / "new", expected, max_shard_size)
    assert_equal(load_state_dict(tmp_path / "new"), expected)
    assert sorted(written) == sorted((tmp_path / "new").iterdir())


def test_tied_tensors_are_written_once(tmp_path):
    t = torch.randn(5, 4)
    save_state_dict(tmp_path, {"embeddings": t, "bias": torch.randn(5), "decoder": nn.Parameter(t)})
    got = load_state_dict(tmp_path)
    assert sorted(got) == ["bias", "embeddings"]
    assert torch.equal(got["embeddings"], t)


def test_shards_are_as_transformers_writes_them(tmp_path):
    """Each at most the size, unless one tensor alone is more; an index of all names; metadata that says pt."""
    tensors = state(a=10, b=10, big=100, c=10, d=10, e=10)
    save_state_dict(tmp_path, tensors, max_shard_size="0.08KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 150 * 4
    shards = [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    expected = dict(zip(tensors, [shards[i] for i in (0, 0, 1, 2, 2, 3)], strict=True))
    assert index["weight_map"] == expected
    for shard in shards:
        with safe_open(tmp_path / shard, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
        assert sorted(load_file(tmp_path / shard)) == sorted(name for name in expected if expected[name] == shard)


@pytest.mark.parametrize("size", ["5 gigabytes", "", "GB", 0, -1])
def test_shard_sizes_that_are_none(tmp_path, size):
    with pytest.raises(ValueError, match="max_shard_size must be"):
        save_state_dict(tmp_path, state(a=1), size)


@pytest.mark.parametrize("sizes", [(40, "5GB"), ("5GB", 40), (40, 80)], ids=["to_one", "to_shards", "to_fewer"])
def test_saving_over_another_layout_leaves_no_stale_weights(tmp_path, sizes):
    """Old model.safetensors beside new shards was loaded in their place."""
    save_state_dict(tmp_path, state(a=10, b=10, c=10, gone=10), sizes[0])
    expected = state(a=10, b=10, c=10)
    written = save_state_dict(tmp_path, expected, sizes[1])
    assert_equal(load_state_dict(tmp_path), expected)
    assert sorted(tmp_path.iterdir()) == sorted(written)


@pytest.mark.parametrize("failing_call", [1, 2, 3])
def test_a_save_cut_short_while_writing_leaves_the_old_weights(tmp_path, monkeypatch, failing_call):
    old = state(a=10, b=10, c=10)
    save_state_dict(tmp_path, old, 40)
    before = sorted(p.name for p in tmp_path.iterdir())
    calls = []

    def failing_save(tensors, path, metadata):
        save_file(tensors, path, metadata)
        calls.append(path)
        if len(calls) == failing_call:
            raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", failing_save)
    with pytest.raises(KeyboardInterrupt):
        save_state_dict(tmp_path, state(a=10, b=10, c=10), 40)
    assert_equal(load_state_dict(tmp_path), old)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("old_size", [40, "5GB"], ids=["over_shards", "over_one_file"])
@pytest.mark.parametrize("failing_call", [1, 2, 3, 4])
def test_a_save_cut_short_while_renaming_never_mixes(tmp_path, monkeypatch, failing_call, old_size):
    """Several files cannot take their names in one step; what is left then is not a model, never half of each."""
    save_state_dict(tmp_path, state(a=10, b=10, c=10), old_size)
    calls, replace = [], os.replace

    def failing_replace(source, target):
        calls.append(target)
        if len(calls) == failing_call:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing_replace)
    with pytest.raises(CheckpointError, match=r"cannot write weights to .*: No space left on device"):
        save_state_dict(tmp_path, state(a=10, b=10, c=10), 40)
    with pytest.raises(CheckpointError, match="has no weights"):
        load_state_dict(tmp_path)
    assert temporaries(tmp_path) == []


@pytest.mark.parametrize("sharded", [False, True], ids=["one_file", "shards"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before_torch_1_6"])
def test_pickled_weights(tmp_path, sharded, zipped):
    expected = state(a=(3, 4), b=5)

    def save(part, name):
        torch.save(part, tmp_path / name, _use_new_zipfile_serialization=zipped)

    if sharded:
        names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
        for name, key in zip(names, expected, strict=True):
            save({key: expected[key]}, name)
        index = {"metadata": {}, "weight_map": dict(zip(expected, names, strict=True))}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        save(expected, "pytorch_model.bin")
    assert_equal(load_state_dict(tmp_path), expected)


def test_safetensors_come_before_pickles(tmp_path):
    torch.save(state(old=3), tmp_path / "pytorch_model.bin")
    save_state_dict(tmp_path, state(new=3))
    assert list(load_state_dict(tmp_path)) == ["new"]


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_pickles_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.zeros(1), "b": Malicious()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is .*not a file of plain tensors") as caught:
        load_state_dict(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_are_mapped_not_copied(tmp_path, name):
    """And what is written to them stays in memory: the mapping is private."""
    tensors = {"a": torch.zeros(100_000)}
    (save_file if name.endswith("safetensors") else torch.save)(tensors, tmp_path / name)
    got = load_state_dict(tmp_path)
    with open("/proc/self/maps") as maps:
        assert str(tmp_path / name) in maps.read()
    got["a"][0] = 1.0
    assert load_state_dict(tmp_path)["a"][0] == 0.0


def cut(path, share: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def overwrite(path) -> None:
    path.write_bytes(b"<html>not found</html>")


def empty(path) -> None:
    path.write_bytes(b"")


def almost_whole(path) -> None:
    cut(path, 0.999)


@pytest.mark.parametrize("spoil", [cut, almost_whole, overwrite, empty])
@pytest.mark.parametrize("kind", ["one_file", "shard", "pickle", "old_pickle"])
def test_spoilt_weights_are_named(tmp_path, kind, spoil):
    tensors = state(a=(50, 40), b=500)
    name = {"one_file": "model.safetensors", "shard": "model-00002-of-00002.safetensors"}.get(kind, "pytorch_model.bin")
    if "pickle" in kind:
        torch.save(tensors, tmp_path / name, _use_new_zipfile_serialization=kind == "pickle")
    else:
        save_state_dict(tmp_path, tensors, 4000 if kind == "shard" else "5GB")
    spoil(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name} is truncated or not a") as caught:
        load_state_dict(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, torch.zeros(3)], ids=["list", "numbers", "tensor"])
def test_pickles_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="must hold a dict of tensors"):
        load_state_dict(tmp_path)


BAD_INDEXES = {
    "lost_shard": ({"weight_map": {"a": "model-00009.safetensors"}}, "lacks the shard model-00009.safetensors"),
    "lost_name": ({"weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}}, "lack b"),
    "outside": ({"weight_map": {"a": "../model.safetensors"}}, "names a shard outside its folder"),
    "no_map": ({}, "has no weight_map"),
    "numbers": ({"weight_map": {"a": 1}}, "has no weight_map"),
}


@pytest.mark.parametrize(("index", "message"), BAD_INDEXES.values(), ids=BAD_INDEXES)
def test_bad_indexes(tmp_path, index, message):
    save_file(state(a=3), tmp_path / "model-1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        load_state_dict(tmp_path)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no weights: expected model.safetensors or pytorch_model.bin"):
        load_state_dict(tmp_path)


# ---- resolve ---------------------------------------------------------------------------------------------


def make_model(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize("marker", ["config.json", "modules.json", "tokenizer.json", "vocab.txt"])
def test_local_folders(tmp_path, marker, monkeypatch):
    folder = make_model(tmp_path / "model", marker)
    assert resolve(folder) == resolve(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert resolve("model").resolve() == folder  # before any hub id of that name
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/model") == folder


LOCAL_ERRORS = {
    "file": ("a.txt", "a.txt is a file; expected a model's folder"),
    "empty_folder": ("empty", "empty is not a model folder: it has none of config.json"),
    "no_folder": ("./absent", "'./absent' is neither an existing folder nor a hub id"),
    "absolute": ("/no/such/model", "'/no/such/model' is neither an existing folder nor a hub id"),
    "too_deep": ("a/b/c", "'a/b/c' is neither an existing folder nor a hub id"),
    "empty_name": ("\x20", "' ' is neither an existing folder nor a hub id"),
}


@pytest.mark.parametrize(("name", "message"), LOCAL_ERRORS.values(), ids=LOCAL_ERRORS)
def test_not_a_model(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=message):
        resolve(name)


class Hub:
    """Stands for the hub: a repository of files, of which a download takes what the patterns name."""

    def __init__(self, folder, *names, error=None):
        self.folder, self.names, self.error, self.calls = folder, names, error, []

    def snapshot_download(self, repo_id, *, revision, allow_patterns):
        self.calls.append((repo_id, revision))
        if self.error:
            raise self.error
        for name in self.names:
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / name).write_text("{}")
        return str(self.folder)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    def make(*names, error=None):
        fake = Hub(tmp_path / "snapshot", *names, error=error)
        monkeypatch.setattr("huggingface_hub.snapshot_download", fake.snapshot_download)
        monkeypatch.chdir(tmp_path)
        return fake

    return make


def files(folder) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


DESCRIPTIONS = ["1_Pooling/config.json", "config.json", "modules.json", "tokenizer.json", "vocab.txt"]
OTHERS = ["README.md", "model.onnx", "onnx/model.onnx", "openvino/model.bin", "tf_model.h5", "flax_model.msgpack",
          "coreml/model.safetensors", "rust_model.ot", "training_args.bin", "optimizer.pt"]  # fmt: skip


def test_the_hub_gives_only_what_is_needed(hub):
    fake = hub(*DESCRIPTIONS, *OTHERS, "model.safetensors", "pytorch_model.bin")
    folder = resolve("owner/name", revision="v1")
    assert files(folder) == sorted([*DESCRIPTIONS, "model.safetensors"])
    assert fake.calls == [("owner/name", "v1")]


def test_pickled_weights_come_only_where_there_are_no_safetensors(hub):
    fake = hub(*DESCRIPTIONS, *OTHERS, "pytorch_model.bin")
    assert files(resolve("name")) == sorted([*DESCRIPTIONS, "pytorch_model.bin"])
    assert fake.calls == [("name", None)] * 2


def test_other_frameworks_weights_come_only_where_there_are_no_others(hub):
    google = ["bert_config.json", "bert_model.ckpt.index", "bert_model.ckpt.data-00000-of-00001", "vocab.txt"]
    fake = hub(*google, *OTHERS, "bert-q4_0.gguf")
    assert files(resolve("name")) == sorted(google)
    assert fake.calls == [("name", None)] * 3
    fake = hub(*google, *OTHERS, "config.json", "pytorch_model.bin")
    resolve("name")
    assert fake.calls == [("name", None)] * 2


def test_shards_and_old_sentence_transformers_folders(hub):
    shards = ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    nested = ["modules.json", "0_Transformer/config.json", "0_Transformer/vocab.txt", "1_Pooling/config.json"]
    names = [*nested, *(f"0_Transformer/{name}" for name in shards), *shards]
    hub(*names, *OTHERS)
    assert files(resolve("name")) == sorted(names)


@pytest.mark.parametrize("inside", ["", "0_Transformer/", "query_0_Transformer/"])
def test_weights_of_sentence_transformers_modules_come_in_either_format(hub, inside):
    """Old repositories have Dense as a pickle alone, beside a BERT that was given safetensors later."""
    weights = [f"{inside}model.safetensors", "2_Dense/pytorch_model.bin", "2_Router/query_0_Dense/model.safetensors",
               "document_1_Dense/model.safetensors"]  # fmt: skip
    configs = ["modules.json", "router_config.json", "2_Router/router_config.json", "3_Asym/140_Dense/config.json",
               f"{inside}config.json", f"{inside}sentence_bert_config.json", "1_Pooling/config.json"]  # fmt: skip
    fake = hub(*weights, *configs, *OTHERS, f"{inside}pytorch_model.bin")
    assert files(resolve("name")) == sorted([*weights, *configs])
    assert fake.calls == [("name", None)]


def hub_error(name: str, text: str = "first line\nsecond line") -> Exception:
    from huggingface_hub import errors

    kind = getattr(errors, name)
    return kind.__new__(kind, text)  # their constructors want an HTTP response


HUB_ERRORS = {
    "RepositoryNotFoundError": "unknown model 'owner/name': no such folder here and no such model on the hub",
    "GatedRepoError": "owner/name is gated",
    "RevisionNotFoundError": "owner/name has no revision 'v9'",
    "LocalEntryNotFoundError": "the hub cannot be reached, and the model is not in the local cache",
}


@pytest.mark.parametrize(("name", "message"), HUB_ERRORS.items(), ids=HUB_ERRORS)
def test_hub_errors_are_one_line(hub, name, message):
    hub(error=hub_error(name))
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve("owner/name", revision="v9")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [ConnectionError("refused\nlog"), TimeoutError(), Exception("HTTP")])
def test_network_errors_are_one_line(hub, error):
    hub(error=error)
    with pytest.raises(CheckpointError, match=r"cannot get 'owner/name' from the hub: .+") as caught:
        resolve("owner/name")
    assert "\n" not in str(caught.value)


def test_offline_and_not_in_the_cache(monkeypatch, tmp_path):
    """The real client, told that there is no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="cannot get 'owner/no-such-model'"):
        resolve("owner/no-such-model")


def test_a_repository_that_is_no_model(hub):
    hub("README.md", "data.parquet")
    with pytest.raises(CheckpointError, match="owner/data on the hub is not a model"):
        resolve("owner/data")


# ---- load_into -------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """The shape of a BERT's names, small."""

    def __init__(self):
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.word_embeddings = nn.Embedding(7, 4)
        self.embeddings.LayerNorm = nn.LayerNorm(4)
        self.encoder = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])


class Head(nn.Module):
    """An encoder under `bert.` with a decoder tied to its embeddings."""

    def __init__(self):
        super().__init__()
        self.bert = Encoder()
        self.decoder = nn.Linear(4, 7)
        self.decoder.weight = self.bert.embeddings.word_embeddings.weight


def randomized(module: nn.Module) -> dict[str, torch.Tensor]:
    """A state with the module's names, its tied names holding one value, other than the module's."""
    values = {}
    return {
        name: values.setdefault(id(t), torch.randn(t.shape)).clone()
        for name, t in module.state_dict(keep_vars=True).items()
    }


def prefixed(tensors: dict) -> dict:
    return {f"bert.{name}": t for name, t in tensors.items()}


def test_load_exact_names():
    module = Encoder()
    tensors = randomized(module)
    assert load_into(module, tensors) == ([], [])
    assert_equal(module.state_dict(), tensors)


def test_prefix_is_taken_away():
    module = Encoder()
    tensors = randomized(module)
    assert load_into(module, prefixed(tensors)) == ([], [])
    assert_equal(module.state_dict(), tensors)


def test_prefix_is_added():
    module = Head()
    tensors = randomized(module)
    bare = {name.removeprefix("bert."): t for name, t in tensors.items()}
    assert load_into(module, bare) == ([], [])
    assert_equal(module.state_dict(), tensors)


def test_legacy_names():
    """TensorFlow's names for LayerNorm, and buffers that transformers once saved."""
    module = Encoder()
    tensors = randomized(module)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for name, t in tensors.items()
    }
    assert old.keys() != tensors.keys()
    old["embeddings.position_ids"] = torch.arange(9)[None]
    for state_dict in (old, prefixed(old)):
        module = Encoder()
        assert load_into(module, state_dict) == ([], [])
        assert_equal(module.state_dict(), tensors)


def test_the_exact_name_wins_over_the_prefixed(tmp_path):
    module = Encoder()
    tensors = randomized(module)
    both = prefixed(randomized(module)) | tensors
    loaded = load_into(module, both, strict=False)
    assert_equal(module.state_dict(), tensors)
    assert sorted(loaded.unexpected) == sorted(prefixed(tensors))


def test_a_tied_name_is_not_missing(tmp_path):
    """Saved weights hold a tied tensor once, under either name."""
    module = Head()
    tensors = randomized(module)
    for left_out in ("decoder.weight", "bert.embeddings.word_embeddings.weight"):
        module = Head()
        assert load_into(module, {name: t for name, t in tensors.items() if name != left_out}) == ([], [])
        assert_equal(module.state_dict(), tensors)
        assert module.decoder.weight is module.bert.embeddings.word_embeddings.weight
    save_state_dict(tmp_path, module.state_dict())
    assert "decoder.weight" not in load_state_dict(tmp_path)


def test_tied_names_with_different_values():
    """One of the two would be lost without a word."""
    tensors = randomized(Head()) | {"decoder.weight": torch.randn(7, 4)}
    with pytest.raises(CheckpointError, match=r"1 tied in the module but different in the file \(decoder.weight and"):
        load_into(Head(), tensors)
    module = Head()
    load_into(module, tensors, strict=False)
    assert torch.equal(module.decoder.weight, tensors["bert.embeddings.word_embeddings.weight"])


def test_missing_unexpected_and_misshapen_are_listed_in_one_line():
    module = Encoder()
    tensors = randomized(module)
    tensors["encoder.0.bias"] = torch.zeros(5)
    tensors["cls.bias"] = torch.zeros(1)
    del tensors["encoder.1.weight"], tensors["encoder.1.bias"]
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_into(module, tensors, source="some/folder")
    assert str(caught.value) == (
        "some/folder does not fit Encoder: 2 missing (encoder.1.weight, encoder.1.bias); 1 unexpected (cls.bias); "
        "1 that do not fit (encoder.0.bias: [5] in the file, [4] in the module)"
    )
    assert_equal(module.state_dict(), before)  # nothing is loaded in part


def test_long_lists_end_in_a_count():
    with pytest.raises(CheckpointError, match=r"25 unexpected \(x.0, .*, x.9 and 15 more\)") as caught:
        load_into(Encoder(), randomized(Encoder()) | {f"x.{i}": torch.zeros(1) for i in range(25)})
    assert "x.10" not in str(caught.value)


def test_patterns_of_what_may_be_missing_or_unexpected():
    tensors = prefixed(randomized(Encoder())) | {
        "cls.predictions.bias": torch.zeros(1),
        "classifier.weight": torch.ones(1),
    }
    del tensors["bert.encoder.1.bias"]
    loaded = load_into(Encoder(), tensors, ignore_missing=["encoder.1.*"], ignore_unexpected=["cls.*", "classifier.*"])
    assert loaded == (["encoder.1.bias"], ["cls.predictions.bias", "classifier.weight"])
    with pytest.raises(CheckpointError, match=r"1 unexpected \(classifier.weight\)$"):
        load_into(Encoder(), tensors, ignore_missing=["encoder.*"], ignore_unexpected=["cls.*"])
    with pytest.raises(CheckpointError, match=r"Encoder: 1 missing \(encoder.1.bias\)$"):
        load_into(Encoder(), tensors, ignore_unexpected=["cl*"])


def test_not_strict_still_wants_shapes():
    assert load_into(Encoder(), {"x": torch.zeros(1)}, strict=False).unexpected == ["x"]
    with pytest.raises(CheckpointError, match=r"encoder.0.bias: \[5\] in the file"):
        load_into(Encoder(), {"encoder.0.bias": torch.zeros(5)}, strict=False)


def test_whole_numbers_for_real_ones():
    """int8 weights fit by shape, but mean nothing without their scales."""
    tensors = randomized(Encoder()) | {"encoder.0.weight": torch.ones(4, 4, dtype=torch.int8)}
    with pytest.raises(CheckpointError, match=r"encoder.0.weight: torch.int8 in the file, torch.float32 in the module"):
        load_into(Encoder(), tensors)


def test_dtype_is_the_modules_and_tensors_are_copied():
    module = Encoder().double()
    tensors = {name: t.bfloat16() for name, t in randomized(module).items()}
    load_into(module, tensors)
    assert_equal(module.state_dict(), {name: t.double() for name, t in tensors.items()})
    tensors["encoder.0.bias"].zero_()
    assert module.encoder[0].bias.abs().sum() > 0


def test_assign_onto_meta():
    with torch.device("meta"):
        module = Encoder()
    tensors = randomized(Encoder())
    load_into(module, prefixed(tensors), assign=True)
    assert_equal(module.state_dict(), tensors)
    assert module.encoder[0].weight.data_ptr() == tensors["encoder.0.weight"].data_ptr()
    assert isinstance(module.encoder[0].weight, nn.Parameter)


# ---- with transformers -----------------------------------------------------------------------------------


@pytest.fixture
def masked_lm():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48
    )
    return transformers.BertForMaskedLM(config)


@pytest.mark.parametrize("max_shard_size", ["5GB", "10KB"], ids=["one_file", "shards"])
def test_transformers_reads_what_we_write(tmp_path, masked_lm, max_shard_size):
    masked_lm.config.save_pretrained(tmp_path)
    save_state_dict(tmp_path, masked_lm.state_dict(), max_shard_size)
    model, info = type(masked_lm).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_equal(model.state_dict(), masked_lm.state_dict())


@pytest.mark.parametrize("max_shard_size", ["5GB", "10KB"], ids=["one_file", "shards"])
def test_we_read_what_transformers_writes(tmp_path, masked_lm, max_shard_size):
    expected = {name: t.clone() for name, t in masked_lm.state_dict().items()}
    masked_lm.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    tensors = load_state_dict(tmp_path)

    fresh = type(masked_lm)(masked_lm.config)
    assert load_into(fresh, tensors) == ([], [])
    assert_equal(fresh.state_dict(), expected)
    encoder = type(masked_lm.bert)(masked_lm.config, add_pooling_layer=False)
    loaded = load_into(encoder, tensors, ignore_unexpected=["cls.*"])
    assert loaded.missing == []
    assert {name.split(".")[0] for name in loaded.unexpected} == {"cls"}
    assert_equal(encoder.state_dict(), masked_lm.bert.state_dict())
