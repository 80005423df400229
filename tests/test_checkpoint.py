"""Checkpoints are read, and are written completely or not at all."""

import json
import os
import stat
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fastbert.checkpoint import CheckpointError, load_into, load_state_dict, save_state_dict, write_atomically

pytestmark = pytest.mark.once


def state(**shapes) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def temporaries(folder) -> list[str]:
    return [p.name for p in folder.iterdir() if ".tmp" in p.name]


# ---- write_atomically ------------------------------------------------------------------------------------


def test_write_replaces_the_whole_file(tmp_path):
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
def test_an_exception_leaves_the_old_file(tmp_path, error):

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
    """Only the owner can read a file that tempfile made, so other users could not read a model in a shared folder."""
    before = os.umask(0o027)
    try:
        with write_atomically(tmp_path / "a") as temporary:
            temporary.write_text("x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.skipif(os.name == "nt", reason="POSIX special files")
def test_special_files_are_not_replaced(tmp_path):
    """For root, os.replace onto /dev/null would make it a plain file."""
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
    torch.testing.assert_close(load_state_dict(tmp_path / "new"), expected, rtol=0, atol=0)
    assert sorted(written) == sorted((tmp_path / "new").iterdir())


def test_tied_tensors_are_written_once(tmp_path):
    t = torch.randn(5, 4)
    save_state_dict(tmp_path, {"embeddings": t, "bias": torch.randn(5), "decoder": nn.Parameter(t)})
    got = load_state_dict(tmp_path)
    assert sorted(got) == ["bias", "embeddings"]
    assert torch.equal(got["embeddings"], t)


def test_shards_are_as_transformers_writes_them(tmp_path):
    """A shard exceeds the size only if it holds a single tensor; the index has all names; the metadata says pt."""
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
def test_invalid_shard_sizes_are_refused(tmp_path, size):
    with pytest.raises(ValueError, match="max_shard_size must be"):
        save_state_dict(tmp_path, state(a=1), size)


@pytest.mark.parametrize("sizes", [(40, "5GB"), ("5GB", 40), (40, 80)], ids=["to_one", "to_shards", "to_fewer"])
def test_saving_over_another_layout_leaves_no_stale_weights(tmp_path, sizes):
    """An old model.safetensors beside new shards was loaded instead of them."""
    save_state_dict(tmp_path, state(a=10, b=10, c=10, gone=10), sizes[0])
    expected = state(a=10, b=10, c=10)
    written = save_state_dict(tmp_path, expected, sizes[1])
    torch.testing.assert_close(load_state_dict(tmp_path), expected, rtol=0, atol=0)
    assert sorted(tmp_path.iterdir()) == sorted(written)


@pytest.mark.parametrize("failing_call", [1, 2, 3])
def test_a_save_that_fails_while_writing_leaves_the_old_weights(tmp_path, monkeypatch, failing_call):
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
    torch.testing.assert_close(load_state_dict(tmp_path), old, rtol=0, atol=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("old_size", [40, "5GB"], ids=["over_shards", "over_one_file"])
@pytest.mark.parametrize("failing_call", [1, 2, 3, 4])
def test_a_save_that_fails_while_renaming_never_mixes_weights(tmp_path, monkeypatch, failing_call, old_size):
    """Several files cannot be renamed in one step. A failure leaves no valid model, never one of mixed weights."""
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
    torch.testing.assert_close(load_state_dict(tmp_path), expected, rtol=0, atol=0)


def test_safetensors_are_preferred_to_pickles(tmp_path):
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
    """Writing to the weights changes only memory, because the mapping is private."""
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


def emptied(path) -> None:
    path.write_bytes(b"")


def almost_whole(path) -> None:
    cut(path, 0.999)


@pytest.mark.parametrize("spoil", [cut, almost_whole, overwrite, emptied])
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
def test_pickles_without_a_dict_of_tensors_are_refused(tmp_path, content):
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
    torch.testing.assert_close(model.state_dict(), masked_lm.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("max_shard_size", ["5GB", "10KB"], ids=["one_file", "shards"])
def test_we_read_what_transformers_writes(tmp_path, masked_lm, max_shard_size):
    expected = {name: t.clone() for name, t in masked_lm.state_dict().items()}
    masked_lm.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    tensors = load_state_dict(tmp_path)

    fresh = type(masked_lm)(masked_lm.config)
    assert load_into(fresh, tensors) == ([], [])
    torch.testing.assert_close(fresh.state_dict(), expected, rtol=0, atol=0)
    encoder = type(masked_lm.bert)(masked_lm.config, add_pooling_layer=False)
    loaded = load_into(encoder, tensors, ignore_unexpected=["cls.*"])
    assert loaded.missing == []
    assert {name.split(".")[0] for name in loaded.unexpected} == {"cls"}
    torch.testing.assert_close(encoder.state_dict(), masked_lm.bert.state_dict(), rtol=0, atol=0)
