"""Embeddings on a CPU for training: three look-ups, LayerNorm and dropout in C++, and the gradients of the tables."""

import pytest
import torch

from cpu_dtypes import DTYPES
from fastbert.kernels import native, reference
from fastbert.testing import assert_within_budget

pytestmark = pytest.mark.cpp
NAMES = ("y", "word", "position", "token_type", "weight", "bias")
WORDS, PLACES, KINDS = 23, 9, 2


def given(rows, width, dtype=torch.float32):
    """ids, segments, positions, and the tables in the order of the operator's arguments. Words repeat."""
    indices = tuple(torch.randint(high, (rows,)) for high in (WORDS, KINDS, PLACES))
    tables = [torch.randn(n, width) for n in (WORDS, PLACES, KINDS)] + [*torch.randn(2, width)]
    return indices, [t.to(dtype).requires_grad_() for t in tables]


def options(dropout_p, rows):
    if not dropout_p:
        return {}
    return {"dropout_p": dropout_p, "seed": torch.tensor(2**63 - 25), "stream": 7, "row_ids": torch.arange(rows) * 3}


def results(module, indices, tables, **options):
    y = module.embedding_layer_norm(*indices, *tables, 1e-12, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(y.dtype)
    return y, *torch.autograd.grad(y, tables, dy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("rows", "padding_idx"), [(1, None), (64, 3), (200, -2)])
def test_gradients(dtype, dropout_p, rows, padding_idx):
    indices, tables = given(rows, 48, dtype)
    more = {"padding_idx": padding_idx, **options(dropout_p, rows)}
    ours, plain = (results(module, indices, tables, **more) for module in (native, reference))
    truth = results(reference, indices, [t.detach().double().requires_grad_() for t in tables], **more)
    assert "_Embedding" in ours[0].grad_fn.name()
    for name, *three in zip(NAMES, ours, plain, truth, strict=True):
        assert three[0].dtype == dtype
        assert_within_budget(*three, name)
    assert torch.equal(ours[0] == 0, truth[0] == 0)  # the mask is exactly that of the specification
    assert torch.equal(ours[1].any(1), truth[1].any(1))  # the same words have a gradient, and padding has none


def test_the_same_bits_with_any_number_of_threads_and_without_gradients():
    indices, tables = given(200, 64)
    drop, threads, found = options(0.3, 200), torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(results(native, indices, tables, **drop))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    with torch.no_grad():
        assert torch.equal(native.embedding_layer_norm(*indices, *tables, 1e-12, **drop), found[0][0])


@pytest.mark.parametrize("wanted", range(5), ids=NAMES[1:])
def test_one_gradient_alone_and_a_strided_upstream(wanted):
    indices, tables = given(7, 32)
    dy = torch.randn(32, 7).t()
    expected = torch.autograd.grad(native.embedding_layer_norm(*indices, *tables), tables, dy)[wanted]
    alone = [t if i == wanted else t.detach() for i, t in enumerate(tables)]
    y = native.embedding_layer_norm(*indices, *alone)
    assert torch.equal(torch.autograd.grad(y, alone[wanted], dy.contiguous())[0], expected)


def test_gradients_of_gradients():
    """Computed by torch's operators under the same mask."""
    indices, tables = given(5, 16)
    second = []
    for module in (native, reference):
        y = module.embedding_layer_norm(*indices, *tables, padding_idx=1, **options(0.3, 5))
        grads = torch.autograd.grad(y.pow(3).sum(), tables, create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in grads), tables))
    for ours, theirs in zip(*second, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("index", [-1, 1000])
def test_an_index_outside_of_its_table_is_refused(place, index):
    indices, tables = given(7, 32)
    indices[place][3] = index
    with pytest.raises(IndexError, match="out of range"):
        native.embedding_layer_norm(*indices, *tables)
