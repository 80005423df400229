"""An Encoder's weights are in large pages of memory; the move keeps values, storages and objects."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from torch import nn

from fastbert.encoding.encoder import Encoder
from fastbert.inference import large_pages
from fastbert.inference.large_pages import LEAST, LINE, move_to_large_pages
from fastbert.kernels.cpu import int8
from small_bert import SPECIAL, save_bert

on_linux = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="large pages are used on Linux only")
pytestmark = pytest.mark.once


def model(width: int = 1536, dtype: torch.dtype = torch.float32) -> nn.Module:
    generator = torch.Generator(device="cpu").manual_seed(0)
    layers = nn.Sequential(
        nn.Embedding(7, width, device="cpu", dtype=dtype),
        nn.Linear(width, width, device="cpu", dtype=dtype),
        nn.Linear(width, 3, device="cpu", dtype=dtype),
    )
    for p in layers.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float32, device="cpu"))
    return layers.requires_grad_(False)


def kept(asked: list[mmap.mmap], monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps every allocation of large pages in `asked`."""
    original = large_pages._large_pages

    def noted(size: int) -> mmap.mmap | None:
        memory = original(size)
        asked.append(memory)
        return memory

    monkeypatch.setattr(large_pages, "_large_pages", noted)


@on_linux
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_objects_and_storages(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    asked: list[mmap.mmap] = []
    kept(asked, monkeypatch)
    moved = model(2 * LEAST // 4 // 1536)
    before, objects = [p.clone() for p in moved.parameters()], list(moved.parameters())

    assert move_to_large_pages(moved, dtype) is moved

    assert len(asked) == 1
    assert len(asked[0]) % large_pages.LARGE == 0
    for p, value, same in zip(moved.parameters(), before, objects, strict=True):
        assert p is same
        assert p.dtype is dtype
        assert torch.equal(p, value.to(dtype))
    weights = [moved[1].weight, moved[1].bias, moved[2].weight, moved[2].bias]
    ends = 0
    for p in weights:
        assert p.untyped_storage().nbytes() == p.nbytes
        assert p.data_ptr() % LINE == 0
        assert p.data_ptr() >= ends  # no tensor overlaps another
        ends = p.data_ptr() + p.nbytes
    assert ends - weights[0].data_ptr() <= len(asked[0])


@on_linux
def test_weights_are_copied_by_the_calling_thread_alone(monkeypatch: pytest.MonkeyPatch):
    """A hundred copies, each by all OpenMP threads, took 0.3 s on a busy machine. torch shares a copy of more than
    32,768 elements among threads."""
    original, sizes = torch.Tensor.copy_, []

    def noted(to: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        sizes.append(to.numel())
        return original(to, source)

    moved = model(LEAST // 1024)
    total = sum(p.numel() for p in moved.parameters())
    monkeypatch.setattr(torch.Tensor, "copy_", noted)
    move_to_large_pages(moved, torch.bfloat16)
    assert max(sizes) <= 32768 < total == sum(sizes)


@on_linux
def test_memory_outlives_the_model():
    """The parameters hold the memory, which is freed with the last of them."""
    weight = move_to_large_pages(model(), torch.float32)[1].weight
    expected = model()[1].weight
    assert torch.equal(weight, expected)


@on_linux
def test_an_embedding_that_has_the_dtype_is_not_moved():
    moved = model()
    where = moved[0].weight.data_ptr()
    move_to_large_pages(moved, torch.float32)
    assert moved[0].weight.data_ptr() == where


@pytest.mark.parametrize("missing", [False, True], ids=["small", "no-large-pages"])
def test_ordinary_memory(missing: bool, monkeypatch: pytest.MonkeyPatch):
    """A small model, and any model if the system refuses, is converted in ordinary memory."""
    if missing:
        monkeypatch.setattr(large_pages, "_large_pages", lambda size: None)
    else:
        monkeypatch.setattr(large_pages, "_large_pages", lambda size: pytest.fail("asked for large pages"))
    moved = model(1536 if missing else 64)
    expected = [p.bfloat16() for p in moved.parameters()]
    move_to_large_pages(moved, torch.bfloat16)
    assert all(torch.equal(p, value) for p, value in zip(moved.parameters(), expected, strict=True))


def test_a_kernel_without_large_pages(monkeypatch: pytest.MonkeyPatch):
    class Refusing(mmap.mmap):
        def madvise(self, *_: object) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    assert large_pages._large_pages(1) is None


@on_linux
def test_a_limit_of_memory():
    """If there is no room for a copy (here: in the address space), weights stay mapped from their file."""
    assert large_pages._large_pages(1 << 60) is None


@on_linux
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_an_encoder_moves_its_weights(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """8-bit weights stay, because the weights that they replace would remain in memory. Vectors have the same bits."""
    if dtype == "int8" and int8.why_not() is not None:
        pytest.skip(int8.why_not())
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64, "max_position_embeddings": 16}
    save_bert(tmp_path, [*SPECIAL, "one", "two"], **sizes)

    def load() -> Encoder:
        return Encoder.from_pretrained(tmp_path, dtype=dtype, device="cpu", impl="native")

    asked: list[mmap.mmap] = []
    kept(asked, monkeypatch)
    expected = load().encode("one two")
    assert asked == []
    monkeypatch.setattr(large_pages, "LEAST", 1)
    assert torch.equal(load().encode("one two"), expected)
    assert len(asked) == (dtype != "int8")
