"""The masked-word loss on a CPU: rows without a label are skipped, the C++ reads and writes logits in chunks."""

import pytest
import torch

from cpu_dtypes import DTYPES
from fastbert import functional, testing
from fastbert.kernels import native, reference
from fastbert.kernels._invariance import batch_invariant
from fastbert.kernels.cpu import loss as cpu_loss
from fastbert.kernels.cpu import operators as cpp
from fastbert.testing import ModelShape, assert_within_budget

pytestmark = pytest.mark.native

MODEL = ModelShape(40, 1, 0, 1, vocab=1211)  # chunks do not divide the vocabulary, nor registers the rows


@pytest.fixture(params=["kept", "computed again"])
def several_chunks(request, monkeypatch):
    """The vocabulary in chunks of 512 words; the backward pass reads stored logits or computes them again."""
    monkeypatch.setattr(cpu_loss, "CHUNK_BYTES", 1)
    if request.param == "computed again":
        monkeypatch.setattr(cpu_loss, "KEPT_BYTES", 1)


@pytest.fixture
def calls(monkeypatch):
    """A list of the numbers of rows that went to the C++, one for each call."""
    rows, row_losses = [], cpu_loss.row_losses
    monkeypatch.setattr(cpu_loss, "row_losses", lambda h, *args: rows.append(len(h)) or row_losses(h, *args))
    return rows


def tensors(rows, dtype=torch.float32, bias=True):
    inputs = testing.cross_entropy_inputs(MODEL, [rows], bias=bias)
    leaves = [inputs[k].to(dtype).requires_grad_() for k in ("hidden", "weight", "bias") if inputs[k] is not None]
    return *leaves, *([] if bias else [None]), inputs["labels"]


def results(function, dtype, inputs, wanted=("hidden", "weight", "bias"), upstream=None):
    """(loss, gradients) under a random upstream gradient."""
    given = {k: t.to(dtype) if torch.is_tensor(t) and t.is_floating_point() else t for k, t in inputs.items()}
    leaves = [given[k].requires_grad_() for k in wanted if given[k] is not None]
    loss = function(**given)
    generator = torch.Generator().manual_seed(5)
    upstream = torch.randn(loss.shape, generator=generator, dtype=torch.float64) if upstream is None else upstream
    return loss, *torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))


def check(dtype, inputs, **options):
    low = {k: t.to(dtype).double() if torch.is_tensor(t) and t.is_floating_point() else t for k, t in inputs.items()}
    ours = results(native.linear_cross_entropy, dtype, low, **options)
    plain = results(reference.linear_cross_entropy, dtype, low, **options)
    truth = results(reference.linear_cross_entropy, torch.float64, low, **options)
    for name, *three in zip(("loss", "dhidden", "dweight", "dbias"), ours, plain, truth, strict=False):
        assert_within_budget(*three, name)
    assert len(ours) == len(truth)


# ---- against float64 -----------------------------------------------------------------------------------------


@pytest.mark.cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.usefixtures("several_chunks")
def test_loss_and_gradients(dtype, smoothing, reduction, calls):
    check(dtype, testing.cross_entropy_inputs(MODEL, [75], reduction=reduction, label_smoothing=smoothing))
    assert calls == [60]  # every fifth row has no label


@pytest.mark.cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 40, 41])
def test_rows_and_no_bias(dtype, rows):
    """A single labelled row, a whole number of registers, one row more; another label than -100 to ignore."""
    inputs = testing.cross_entropy_inputs(MODEL, [rows], bias=False, reduction="none", ignore_index=7)
    inputs["labels"][0] = 3
    check(dtype, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_dtypes_that_torch_computes(dtype, calls):
    *leaves, labels = (t.detach() for t in tensors(20, dtype))
    loss = native.linear_cross_entropy(*leaves, labels, label_smoothing=0.1)
    expected = reference.linear_cross_entropy(*(t.double() for t in leaves), labels, label_smoothing=0.1)
    assert (loss.double() - expected).abs() < 1e-2
    assert calls == []


@pytest.mark.cpp
@pytest.mark.usefixtures("several_chunks")
def test_words_ruled_out_and_great_logits():
    """Chunks of only -inf, and logits of 1e4: no overflow and no NaN."""
    hidden, weight, bias, labels = (t.detach() for t in tensors(12))
    bias[:600] = float("-inf")
    labels[labels >= 0] = labels[labels >= 0] % 600 + 605
    inputs = {"hidden": hidden * 3e3, "weight": weight, "bias": bias, "labels": labels}
    ours = results(native.linear_cross_entropy, torch.float32, inputs, ("hidden", "weight"))
    truth = results(reference.linear_cross_entropy, torch.float64, inputs, ("hidden", "weight"))
    assert truth[0] > 100
    for one, other in zip(ours, truth, strict=True):
        assert testing.relative_rms(one, other) < 1e-3  # float32 rounds 1e4 by up to 5e-4


@pytest.mark.cpp
def test_nan_stays_in_its_row():
    hidden, weight, bias, labels = (t.detach() for t in tensors(12))
    hidden[3, 5] = float("nan")
    losses = native.linear_cross_entropy(hidden, weight, bias, labels, reduction="none")
    assert losses.isnan().nonzero().flatten().tolist() == [3]


# ---- labels --------------------------------------------------------------------------------------------------


def test_rows_without_a_label_are_not_read():
    """They may hold anything. Their losses and gradients are zero."""
    hidden, weight, bias, labels = tensors(35)
    poisoned = hidden.detach().clone()
    poisoned[labels == -100] = float("nan")
    poisoned.requires_grad_()
    losses = native.linear_cross_entropy(poisoned, weight, bias, labels, reduction="none")
    expected = native.linear_cross_entropy(hidden, weight, bias, labels, reduction="none")
    assert torch.equal(losses, expected)
    grads = [torch.autograd.grad(x.sum(), (h, weight, bias)) for x, h in ((losses, poisoned), (expected, hidden))]
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
    assert not grads[0][0][labels == -100].any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [0, 6])
def test_all_labels_ignored(rows, smoothing):
    """As in torch, the mean over nothing is NaN, the sum and the rows are zero, and all gradients are zero."""
    hidden, weight, bias, labels = tensors(rows)
    labels.fill_(-100)
    for reduction in ("mean", "sum", "none"):
        loss = native.linear_cross_entropy(hidden, weight, bias, labels, reduction=reduction, label_smoothing=smoothing)
        assert loss.isnan().all() if reduction == "mean" else not loss.any()
        assert loss.shape == ((rows,) if reduction == "none" else ())
        for grad in torch.autograd.grad(loss, (hidden, weight, bias), torch.ones_like(loss)):
            assert not grad.any()


@pytest.mark.parametrize("wrong", [MODEL.vocab, -1, 2**33 + 1])
def test_label_out_of_range(wrong):
    *leaves, labels = tensors(6)
    labels[3] = wrong
    with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds"):
        native.linear_cross_entropy(*leaves, labels)


# ---- gradients -----------------------------------------------------------------------------------------------


@pytest.mark.cpp
@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
def test_one_gradient_alone(wanted):
    """As for a frozen decoder, or a frozen encoder."""
    inputs = testing.cross_entropy_inputs(MODEL, [35])
    alone = results(native.linear_cross_entropy, torch.float32, inputs, (wanted,))
    names = ("hidden", "weight", "bias")
    together = results(native.linear_cross_entropy, torch.float32, inputs, names)
    assert torch.equal(alone[1], together[1 + names.index(wanted)])


@pytest.mark.cpp
def test_a_second_backward_pass_through_the_same_graph():
    *leaves, labels = tensors(35)
    loss = native.linear_cross_entropy(*leaves, labels)
    once, twice = torch.autograd.grad(loss, leaves, retain_graph=True), torch.autograd.grad(loss, leaves)
    assert all(torch.equal(one, other) for one, other in zip(once, twice, strict=True))


@pytest.mark.cpp
def test_gradients_of_gradients():
    """A penalty on gradients needs them; torch's operators compute them."""
    second = []
    for function in (native.linear_cross_entropy, reference.linear_cross_entropy):
        *leaves, labels = tensors(9)
        grads = torch.autograd.grad(function(*leaves, labels), leaves, create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))
    for ours, theirs in zip(*second, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.cpp
def test_create_graph_when_hidden_depends_on_weight():
    """With tied weights, the hidden states come from the same weight that multiplies them."""
    _, weight, bias, labels = tensors(9)

    def found(create_graph):
        loss = native.linear_cross_entropy(weight[:9].tanh(), weight, bias, labels)
        return torch.autograd.grad(loss, (weight, bias), create_graph=create_graph)

    torch.testing.assert_close(found(True), found(False))


@pytest.mark.cpp
def test_views():
    """hidden as columns of a wider matrix, weight transposed, every other element of bias."""
    hidden, weight, bias, labels = (t.detach() for t in tensors(35))
    wide = torch.cat((hidden, torch.full_like(hidden, torch.nan)), dim=1)[:, : hidden.shape[1]]
    sparse = torch.stack((bias, torch.full_like(bias, torch.nan)), dim=1).flatten()[::2]
    both = []
    for leaves in ([hidden, weight, bias], [wide, weight.t().contiguous().t(), sparse]):
        leaves = [t.requires_grad_() for t in leaves]
        losses = native.linear_cross_entropy(*leaves, labels, reduction="none")
        both.append((losses, *torch.autograd.grad(losses.sum(), leaves)))
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other)


# ---- which implementation computes ---------------------------------------------------------------------------


@pytest.mark.cpp
@pytest.mark.skipif(torch.bfloat16 not in cpp.dtypes(), reason="this CPU has no AVX512-BF16")
def test_autocast(calls):
    """Products in autocast's dtype, the loss in float32, gradients in the parameters' dtype."""
    *leaves, labels = tensors(35)
    with torch.autocast("cpu", torch.bfloat16):
        loss = functional.linear_cross_entropy(*leaves, labels, impl="native")
    assert calls == [28]
    assert loss.dtype == torch.float32
    assert {g.dtype for g in torch.autograd.grad(loss, leaves)} == {torch.float32}
    lower = [leaf.detach().bfloat16() for leaf in leaves]
    assert torch.equal(loss, native.linear_cross_entropy(*lower, labels))


def test_compiled_and_transformed():
    """Under torch.compile and torch's transforms, torch's operators compute all rows."""
    *leaves, labels = (t.detach() for t in tensors(20))
    expected = reference.linear_cross_entropy(*leaves, labels)
    compiled = torch.compile(native.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves, labels), expected)
    grad, loss = torch.func.grad_and_value(native.linear_cross_entropy)(*leaves, labels)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, torch.func.grad(reference.linear_cross_entropy)(*leaves, labels))
    tangents = [torch.randn_like(t) for t in leaves]
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(*pair) for pair in zip(leaves, tangents, strict=True)]
        _, ours = torch.autograd.forward_ad.unpack_dual(native.linear_cross_entropy(*duals, labels))
        _, theirs = torch.autograd.forward_ad.unpack_dual(reference.linear_cross_entropy(*duals, labels))
    torch.testing.assert_close(ours, theirs)


def test_batch_invariant_rows(calls):
    """Within `batch_invariant()` the bits of a row's loss do not depend on other rows."""
    *leaves, labels = (t.detach() for t in tensors(35))
    with batch_invariant():
        together = native.linear_cross_entropy(*leaves, labels, reduction="none")
        alone = native.linear_cross_entropy(leaves[0][9:10], *leaves[1:], labels[9:10], reduction="none")
    assert torch.equal(together[9:10], alone)
    assert calls == []


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_large_logits(smoothing):
    """Two words whose logits are about 2,000 and exact in float32. A logsumexp in one number is rounded to 1e-4 there:
    both words' dz were too large or both too small by as much, multiplied by the weight, about 64."""
    hidden = torch.randn(65, 64).mul(8).round().add(8) / 16
    weight = torch.randn(2, 64).mul(4).round() / 16 + 64
    inputs = {"hidden": hidden, "weight": weight, "bias": None, "labels": torch.arange(65) % 2}
    check(torch.float32, inputs | {"label_smoothing": smoothing})


@pytest.mark.cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_passes_give_the_same_bits_with_any_number_of_threads(dtype):
    """The C++ passes. The vendor library computes the products between them."""
    logits, bias = torch.randn(70, 96).to(dtype), torch.randn(70).to(dtype)
    labels, dloss = torch.randint(70, (96,), dtype=torch.int32), torch.randn(96)
    both, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            summed = [torch.full((96,), -1e30), *torch.zeros(3, 96)]
            cpu_loss.sum_logits(logits, bias, labels, *summed, 0)
            dz, dbias = torch.empty_like(logits), torch.empty(70)
            of_rows = summed[0], summed[1].log2(), dloss
            cpu_loss.logit_gradients(logits, bias, labels, *of_rows, dz, dbias, 0, 0.1, 70)
            both.append((*summed, dz, dbias))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*both, strict=True))
