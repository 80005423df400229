"""A word table's gradient in kept memory: the same numbers as in new memory, and only what is known to be zero is
skipped."""

import threading

import pytest
import torch

from fastbert import BertConfig, BertForMaskedLM, BertForSequenceClassification
from fastbert.kernels.cpu import adamw, kept_gradients
from fastbert.kernels.cpu.kept_gradients import Kept
from fastbert.packing import PackedBatch
from fastbert.training.adamw import AdamW

pytestmark = pytest.mark.cpp
CONFIG = BertConfig(
    vocab_size=300, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96,
    max_position_embeddings=16,
)  # fmt: skip


def model_of(kind=BertForSequenceClassification):
    torch.manual_seed(0)
    model = kind(CONFIG).train()
    (model.bert if hasattr(model, "bert") else model).impl = "native"
    return model


def batch_of(step: int) -> tuple[PackedBatch, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    texts = [torch.randint(0, 300, (n,), generator=generator).tolist() for n in (5, 9, 3)]
    return PackedBatch.from_lists(texts), torch.tensor([0, 1, 0])


def word_of(model) -> torch.nn.Parameter:
    return model.get_parameter("bert.embeddings.word_embeddings.weight")


def trained(model, steps: int, micro: int = 1, change=None):
    """Gradients of the word table and parameters after each step. change(word): called before each clipping."""
    optimizer, found = AdamW(model.parameters(), lr=1e-2, weight_decay=0.1), []
    for step in range(steps):
        for part in range(micro):
            torch.manual_seed(step)
            batch, labels = batch_of(10 * step + part)
            model(batch, labels=labels).loss.backward()
        if change is not None:
            change(word_of(model))
        norm = optimizer.clip(1e6)
        gradient = word_of(model).grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        found.append((norm, gradient, [p.detach().clone() for p in model.parameters()]))
    return found


def same(found, expected):
    for (norm, gradient, parameters), (norm_of, gradient_of, parameters_of) in zip(found, expected, strict=True):
        assert norm == pytest.approx(norm_of, rel=1e-6)
        assert torch.equal(gradient, gradient_of)
        assert all(map(torch.equal, parameters, parameters_of))


@pytest.mark.parametrize("micro", [1, 2], ids=["one batch", "two batches"])
def test_the_bits_are_those_of_new_memory(micro):
    expected = trained(model_of(), 4, micro)
    with Kept():
        same(trained(model_of(), 4, micro), expected)


def one_row_more(word):
    word.grad[7] += 1.0


def another_tensor(word):
    word.grad = word.grad * 2.0
    word.grad[7] += 1.0


def by_data(word):
    word.grad = word.grad.clone()
    word.grad[250:] = 3.0


@pytest.mark.parametrize("change", [one_row_more, another_tensor, by_data])
def test_a_changed_gradient_is_read_whole(change):
    expected = trained(model_of(), 4, change=change)
    with Kept():
        same(trained(model_of(), 4, change=change), expected)


def test_memory_is_used_again_and_rows_are_known():
    model, places = model_of(), set()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    with Kept():
        for step in range(3):
            batch, labels = batch_of(step)
            model(batch, labels=labels).loss.backward()
            gradient = word_of(model).grad
            places.add(gradient.data_ptr())
            touched = kept_gradients.touched(gradient)
            assert sorted(touched.nonzero().flatten().tolist()) == sorted(set(batch.input_ids.tolist()) - {0})
            assert torch.equal(touched > 0, (gradient != 0).any(1))
            optimizer.step()
            optimizer.zero_grad()
            assert kept_gradients.touched(gradient) is None
            del gradient
    assert len(places) == 1


def test_a_gradient_that_something_refers_to_keeps_its_numbers():
    """As with torch, a gradient that a hook or a caller holds is not written by later steps."""
    model = model_of()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    held, copies = [], []
    with Kept():
        for step in range(4):
            batch, labels = batch_of(step)
            model(batch, labels=labels).loss.backward()
            gradient = word_of(model).grad
            held.append([gradient, gradient[5:], gradient.detach(), gradient.numpy()][step])
            copies.append(torch.as_tensor(held[-1]).clone())
            del gradient
            optimizer.step()
            optimizer.zero_grad()
        model(*batch_of(9)[:1]).logits.sum().backward()
    assert all(torch.equal(torch.as_tensor(t), copy) for t, copy in zip(held, copies, strict=True))


def test_blocks_of_two_threads_are_apart():
    """The first thread leaves its block while the second is in its own."""
    inside, left, found = threading.Event(), threading.Event(), []

    def second():
        with Kept():
            inside.set()
            left.wait(10)
        found.append(kept_gradients.take(torch.Size((4, 8)))[1])

    with Kept():
        thread = threading.Thread(target=second)
        thread.start()
        inside.wait(10)
    left.set()
    thread.join()
    assert found == [None]
    assert kept_gradients.take(torch.Size((4, 8)))[1] is None


def test_a_gradient_that_is_still_needed_is_not_written():
    """Two models of one size, and a gradient that was not given back."""
    first, second = model_of(), model_of()
    with Kept():
        for model in (first, second):
            batch, labels = batch_of(1 if model is first else 2)
            model(batch, labels=labels).loss.backward()
    assert kept_gradients.touched(word_of(first).grad) is None
    assert word_of(first).grad.data_ptr() != word_of(second).grad.data_ptr()
    for model, seed in ((first, 1), (second, 2)):
        fresh = model_of()
        batch, labels = batch_of(seed)
        fresh(batch, labels=labels).loss.backward()
        used = (word_of(model).grad != 0).any(1)
        assert torch.equal(used, (word_of(fresh).grad != 0).any(1))


def test_a_tied_table_has_a_gradient_in_all_rows():
    """The decoder's gradient is added to that of the embeddings."""
    batch, _ = batch_of(1)
    labels = torch.where(torch.arange(batch.total_tokens) % 3 == 0, batch.input_ids, -100)
    found = []
    for kept in (False, True):
        model = model_of(BertForMaskedLM)
        optimizer = AdamW(model.parameters(), lr=1e-2)
        with Kept() if kept else torch.enable_grad():
            for _ in range(3):
                torch.manual_seed(3)
                model(batch, labels=labels).loss.backward()
                optimizer.clip(1.0)
                optimizer.step()
                optimizer.zero_grad()
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *found))


# ---- sums of squares -------------------------------------------------------------------------------------


def linears_of(model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".layer." in name and p.dim() == 2}


def scaled(p):
    p.grad.mul_(3.0)


def replaced(p):
    p.grad = p.grad * 3.0


def freed_and_replaced(p):
    """The new gradient may get the memory of the old one."""
    shape, p.grad = p.grad.shape, None
    p.grad = torch.full(shape, 3.0)


@pytest.mark.parametrize("change", [None, scaled, replaced, freed_and_replaced])
def test_the_norm_is_that_of_the_gradients_as_they_are_now(change, monkeypatch):
    read, call = [], adamw.cpp.call

    def counted(name, dtype, *arguments):
        if name == "sum_squares":
            read.append(arguments[2])
        return call(name, dtype, *arguments)

    monkeypatch.setattr(adamw.cpp, "call", counted)
    model = model_of()
    optimizer, linears = AdamW(model.parameters(), lr=1e-2), linears_of(model)
    total = sum(1 for _ in model.parameters())
    with Kept():
        for step in range(2):
            batch, labels = batch_of(step)
            model(batch, labels=labels).loss.backward()
            for p in linears.values() if change is not None else ():
                change(p)
            expected = torch.stack([p.grad.double().norm() for p in model.parameters()]).norm().item()
            assert optimizer.clip(1.0) == pytest.approx(expected, rel=1e-6)
            assert read[-1] == total - (len(linears) if change is None else 0)
            optimizer.zero_grad()


def test_gradients_of_several_backward_passes_are_read():
    model = model_of()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    with Kept() as kept:
        for step in range(3):
            for part in range(step + 1):
                batch, labels = batch_of(10 * step + part)
                model(batch, labels=labels).loss.backward()
                assert bool(kept._squares) == (part == 0)  # they hold memory, which later gradients do not need
            expected = torch.stack([p.grad.double().norm() for p in model.parameters()]).norm().item()
            assert optimizer.clip(1.0) == pytest.approx(expected, rel=1e-6)
            optimizer.zero_grad()
            assert not kept._squares


def test_sums_of_squares_do_not_depend_on_the_number_of_threads():
    norms, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            model = model_of()
            with Kept():
                batch, labels = batch_of(0)
                model(batch, labels=labels).loss.backward()
                norms.append(AdamW(model.parameters(), lr=1e-2).clip(1.0))
    finally:
        torch.set_num_threads(before)
    assert norms[0] == norms[1] == norms[2]
