"""`resolve`: a name becomes a folder, on this machine or from the hub, from which only needed files come."""

from fnmatch import fnmatch

import pytest

from fastbert.checkpoint import CheckpointError, resolve

pytestmark = pytest.mark.once


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
    assert resolve("model").resolve() == folder  # a local folder wins over a hub id of the same name
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
    """Stands for the hub: a repository of files. A download takes the files that match the patterns."""

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


def test_only_needed_files_are_downloaded(hub):
    fake = hub(*DESCRIPTIONS, *OTHERS, "model.safetensors", "pytorch_model.bin")
    folder = resolve("owner/name", revision="v1")
    assert files(folder) == sorted([*DESCRIPTIONS, "model.safetensors"])
    assert fake.calls == [("owner/name", "v1")]


def test_pickled_weights_are_downloaded_only_without_safetensors(hub):
    fake = hub(*DESCRIPTIONS, *OTHERS, "pytorch_model.bin")
    assert files(resolve("name")) == sorted([*DESCRIPTIONS, "pytorch_model.bin"])
    assert fake.calls == [("name", None)] * 2


def test_other_frameworks_weights_are_downloaded_only_without_others(hub):
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
    """Old repositories have Dense only as a pickle, beside a BERT to which safetensors were added later."""
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
    return kind.__new__(kind, text)  # the constructors need an HTTP response


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
    """The real client in offline mode."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="cannot get 'owner/no-such-model'"):
        resolve("owner/no-such-model")


def test_a_repository_that_is_no_model(hub):
    hub("README.md", "data.parquet")
    with pytest.raises(CheckpointError, match="owner/data on the hub is not a model"):
        resolve("owner/data")
