"""linear_cross_entropy against float64 within the error budget; and the logits are never in memory as a whole."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="tests the Triton kernels")

from fastbert import functional, testing
from fastbert.kernels import cross_entropy, reference
from fastbert.kernels._invariance import batch_invariant
from fastbert.kernels.cross_entropy import linear_cross_entropy
from fastbert.testing import ModelShape, allowed_factor, assert_op

if functional.why_not_triton(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

torch.set_num_threads(1)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# blocks do not divide the vocabulary, and its rows are no multiple of 16 bytes
MODEL = ModelShape(40, 1, 0, 1, vocab=211)

# rows of hidden
ROWS = {"one": [1], "two_chunks_and_a_rest": [35], "none": [0]}


@pytest.fixture(params=[None, 16], ids=["one_chunk", "chunks_of_16"])
def chunks(request, monkeypatch):
    """The batch in one chunk, or in small chunks."""
    if request.param:
        monkeypatch.setattr(cross_entropy, "_chunk_rows", lambda n_cols, dtype: request.param)


@pytest.fixture
def short_blocks(monkeypatch):
    """A row of the vocabulary in several steps, as for a real vocabulary."""
    monkeypatch.setattr(cross_entropy, "BLOCK_V", 64)


# ---- against the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.usefixtures("short_blocks")
def test_options(reduction, smoothing, dtype, monkeypatch, device):
    """The loss and its three gradients, for every reduction, over chunks, with ignored rows."""
    monkeypatch.setattr(cross_entropy, "_chunk_rows", lambda n_cols, dtype: 16)
    inputs = testing.cross_entropy_inputs(MODEL, [35], reduction=reduction, label_smoothing=smoothing)
    assert_op("linear_cross_entropy", inputs, dtype, device, factor=allowed_factor(dtype))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.usefixtures("chunks")
def test_rows(rows, reduction, device):
    inputs = testing.cross_entropy_inputs(
        MODEL, ROWS[rows], reduction=reduction, bias=rows != "two_chunks_and_a_rest", ignore_index=7
    )
    assert_op("linear_cross_entropy", inputs, torch.float16, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.usefixtures("chunks")
def test_batch_invariant_form(dtype, device):
    inputs = testing.cross_entropy_inputs(MODEL, [35], reduction="sum")

    def ours(**inputs):
        with batch_invariant():
            return linear_cross_entropy(**inputs)

    checks = testing.compare(ours, reference.linear_cross_entropy, inputs, dtype, device)
    assert all(check.passed for check in checks), checks


def tensors(rows, device, dtype=torch.float32, model=MODEL):
    inputs = testing.cross_entropy_inputs(model, [rows])
    leaves = [inputs[k].to(device, dtype).requires_grad_() for k in ("hidden", "weight", "bias")]
    return *leaves, inputs["labels"].to(device)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_all_labels_ignored(smoothing, device):
    """As in torch, the mean over nothing is NaN with zero gradients; sum and rows are zero."""
    hidden, weight, bias, labels = tensors(6, device)
    labels.fill_(-100)
    for reduction in ("mean", "sum", "none"):
        grads = []
        for function in (linear_cross_entropy, reference.linear_cross_entropy):
            loss = function(hidden, weight, bias, labels, reduction=reduction, label_smoothing=smoothing)
            if reduction == "mean":
                assert loss.isnan()
            else:
                assert not loss.any()
            grads.append(torch.autograd.grad(loss, (hidden, weight, bias), torch.ones_like(loss)))
        for ours, theirs in zip(*grads, strict=True):
            assert torch.equal(ours, theirs)
            assert not ours.any()


@pytest.mark.parametrize("rows", [0, 6])
def test_empty_batch(rows, device):
    """Without rows the mean is NaN, the sum is 0, and the gradients of the weights are zero."""
    hidden, weight, bias, labels = tensors(rows, device)
    loss = linear_cross_entropy(hidden[:0], weight, bias, labels[:0], reduction="sum")
    assert loss == 0.0
    assert not any(g.any() for g in torch.autograd.grad(loss, (weight, bias)))
    assert linear_cross_entropy(hidden[:0], weight, bias, labels[:0]).isnan()
    assert linear_cross_entropy(hidden[:0], weight, bias, labels[:0], reduction="none").shape == (0,)


@pytest.mark.parametrize("vocab", [192, 193, 191, 7])
@pytest.mark.usefixtures("short_blocks")
def test_ends_of_rows(vocab, device):
    """Blocks of 64, then the rest in blocks of 8: no rest, a rest of one word, a full rest, only a rest."""
    inputs = testing.cross_entropy_inputs(ModelShape(40, 1, 0, 1, vocab=vocab), [5], reduction="none")
    assert_op("linear_cross_entropy", inputs, torch.float32, device)


@pytest.mark.usefixtures("short_blocks")
def test_extreme_logits(device):
    """Logits of 1e4, and of -inf (words that the bias excludes, in whole blocks): no overflow and no NaN."""
    hidden, weight, bias, labels = (t.detach() for t in tensors(12, device))
    bias[:130] = float("-inf")
    labels[labels >= 0] = labels[labels >= 0] % 70 + 135
    hidden *= 3e3
    hidden.requires_grad_()
    results = []
    for function, working in ((linear_cross_entropy, torch.float32), (reference.linear_cross_entropy, torch.float64)):
        loss = function(hidden.to(working), weight.to(working), bias.to(working), labels)
        results.append((loss, *torch.autograd.grad(loss, hidden)))
    assert results[0][0] > 100
    for ours, truth in zip(*results, strict=True):
        assert testing.relative_rms(ours, truth) < 1e-3  # float32 rounds 1e4 by up to 5e-4


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_large_logits(smoothing, device):
    """Two words whose logits are about 2,000 and exact in float32. A logsumexp in one number is rounded to 1e-4 there:
    both words' dz were too large or both too small by as much, multiplied by the weight, about 64."""
    hidden = torch.randn(65, 64).mul(8).round().add(8) / 16
    weight = torch.randn(2, 64).mul(4).round() / 16 + 64
    inputs = {"hidden": hidden, "weight": weight, "bias": None, "labels": torch.arange(65) % 2}
    assert_op("linear_cross_entropy", inputs | {"label_smoothing": smoothing}, torch.float32, device)


def test_float16_under_a_loss_scale(device):
    """Gradients made before the loss scale is known must not underflow: of 4,096 rows each has 1 / 4096 of it."""
    hidden, weight, bias, labels = tensors(35, device, torch.float16)
    scale = 2.0**16
    loss = linear_cross_entropy(hidden, weight, bias, labels) / 4096
    ours = torch.autograd.grad(loss * scale, (hidden, weight, bias))
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    loss = reference.linear_cross_entropy(*exact, labels) / 4096
    for grad, truth in zip(ours, torch.autograd.grad(loss * scale, exact), strict=True):
        assert testing.relative_rms(grad, truth) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scaling_is_in_float32(dtype, device):
    """Factors that the dtype cannot represent: 1 / 3 to all digits, and 2^20, where float16 ends at 65,504."""
    x = torch.randn(35, 40, device=device).to(dtype) / 2**14
    for factor in (1 / 3, 2.0**20):
        scale = torch.tensor(factor, device=device)
        expected = (x.float() * scale).to(dtype)
        assert torch.equal(cross_entropy._scaled(x, scale, dtype), expected)
        assert torch.equal(cross_entropy._scaled(x.float(), scale, dtype), expected)


def test_label_out_of_range(device):
    """NaN for that row and its gradient (torch stops the device); other rows are not affected."""
    hidden, weight, bias, labels = tensors(6, device)
    expected = linear_cross_entropy(hidden, weight, bias, labels, reduction="none").detach()
    for wrong in (MODEL.vocab, -1, 2**40):
        labels[3] = wrong
        loss = linear_cross_entropy(hidden, weight, bias, labels, reduction="none")
        (grad,) = torch.autograd.grad(loss, hidden, torch.ones_like(loss))
        for t in (loss, grad):
            assert t[3].isnan().all()
            assert not t[[0, 1, 2, 4, 5]].isnan().any()
        others = [0, 1, 2, 4, 5]
        assert torch.equal(loss[others], expected[others])


# ---- properties ------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Records the size of every tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_are_never_whole(reduction, monkeypatch, device):
    """With 4,096 rows x 211 words our largest tensor is a chunk of 128 rows, or hidden itself. torch's has all rows."""
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 1)
    monkeypatch.setattr(cross_entropy._cross_entropy_kernel, "run", lambda *args, **kwargs: None)
    rows, chunk = 4096, 128 * 256  # a row of the buffer has 256 elements, a multiple of 128 bytes
    hidden, weight, bias, labels = (t.detach() for t in tensors(rows, device))
    options = (None, -100, 0.0, [True] * 3, False)
    with LargestTensor() as watch:
        loss, dhidden, dweight, dbias = cross_entropy._launch(hidden, weight, bias, labels, *options)
    assert watch.elements == max(chunk, hidden.numel()) < rows * MODEL.vocab // 5
    assert (loss.shape, dhidden.shape, dweight.shape, dbias.shape) == (
        labels.shape, hidden.shape, weight.shape, bias.shape,
    )  # fmt: skip
    with LargestTensor() as watch:
        reference.linear_cross_entropy(hidden, weight, bias, labels, reduction=reduction)
    assert watch.elements >= rows * MODEL.vocab


def test_chunks_follow_the_vocabulary():
    """256 MiB of BERT's logits are 4,352 rows in 16 bits, or half of that in 32; a chunk never has fewer than 128."""
    assert cross_entropy._chunk_rows(30522, torch.bfloat16) == 4352
    assert cross_entropy._chunk_rows(30522, torch.float32) == 2176
    assert cross_entropy._chunk_rows(10**8, torch.float32) == 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.usefixtures("chunks", "even_products")
def test_rows_do_not_depend_on_their_batch(dtype, device):
    """Batch-invariant: a row's loss and gradient have the same bits alone and among others."""
    hidden, weight, bias, labels = tensors(35, device, dtype)
    dloss = torch.rand(35, device=device)

    def run(rows):
        with batch_invariant():
            part = hidden[rows].detach().requires_grad_()
            loss = linear_cross_entropy(part, weight, bias, labels[rows], reduction="none", label_smoothing=0.1)
        return loss, torch.autograd.grad(loss, part, dloss[rows])[0]

    whole = run(slice(0, 35))
    for rows in (slice(1, 2), slice(14, 35)):
        for ours, alone in zip(whole, run(rows), strict=True):
            assert torch.equal(ours[rows], alone)


@pytest.mark.parametrize("wanted", [0, 1, 2])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_one_gradient_alone(wanted, reduction, device):
    """A frozen decoder, or a frozen encoder: a single gradient equals the one computed with the others."""
    *leaves, labels = tensors(35, device, torch.float16)
    dy = torch.randn(35 if reduction == "none" else (), device=device)
    loss = linear_cross_entropy(*leaves, labels, reduction=reduction)
    (expected,) = torch.autograd.grad(loss, leaves[wanted], dy)
    frozen = [leaf if i == wanted else leaf.detach() for i, leaf in enumerate(leaves)]
    loss = linear_cross_entropy(*frozen, labels, reduction=reduction)
    assert torch.equal(torch.autograd.grad(loss, frozen[wanted], dy)[0], expected)


def test_views(device):
    """hidden as columns of a wider matrix, transposed weight, every other label, an expanded upstream gradient."""
    hidden, weight, bias, labels = tensors(35, device)
    wide = torch.cat((hidden, torch.full_like(hidden, math.nan)), dim=1)[:, : hidden.shape[1]].detach()
    sparse = torch.stack((labels, torch.full_like(labels, 10**6)), dim=1).flatten()[::2]
    strided = [wide.requires_grad_(), weight.detach().t().contiguous().t().requires_grad_(), bias]
    results = []
    for leaves, given in (([hidden, weight, bias], labels), (strided, sparse)):
        rows = linear_cross_entropy(*leaves, given, reduction="none")
        results.append((rows, *torch.autograd.grad(rows.sum(), leaves)))
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


# ---- autocast, compile, export ---------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(reduction, device):
    """Products in autocast's dtype, the loss in float32, gradients in the parameters' dtype."""
    *leaves, labels = tensors(35, device)
    with torch.autocast(device, dtype=torch.float16):
        loss = linear_cross_entropy(*leaves, labels, reduction=reduction)
    assert loss.dtype == torch.float32
    grads = torch.autograd.grad(loss, leaves, torch.ones_like(loss))
    assert {g.dtype for g in grads} == {torch.float32}
    halves = [leaf.detach().half() for leaf in leaves]
    assert torch.equal(loss, linear_cross_entropy(*halves, labels, reduction=reduction))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_once_for_all_lengths(reduction, device):
    """fullgraph with dynamic rows gives one graph for all lengths, and the bits of eager mode."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend=backend)
    for rows in (17, 35, 6):
        hidden, weight, bias, labels = tensors(rows, device, torch.float16)
        for t in (hidden, labels):
            torch._dynamo.mark_dynamic(t, 0)
        loss = compiled(hidden, weight, bias, labels, reduction=reduction)
        expected = linear_cross_entropy(hidden, weight, bias, labels, reduction=reduction)
        assert torch.equal(loss, expected)
        dy = torch.rand_like(loss)
        grads = [torch.autograd.grad(out, (hidden, weight, bias), dy) for out in (loss, expected)]
        assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
    assert len(graphs) == 1


def test_compiles_with_autograd_traced(device):
    hidden, weight, bias, labels = tensors(35, device, torch.float16)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, linear_cross_entropy):
        loss = function(hidden, weight, bias, labels)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight, bias))))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


class Head(torch.nn.Module):
    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)

    def forward(self, hidden, labels):
        return linear_cross_entropy(hidden, self.weight, self.bias, labels)


def test_exports(device):
    hidden, weight, bias, labels = (t.detach() for t in tensors(35, device))
    head = Head(weight, bias).requires_grad_(False)
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(head, (hidden, labels), dynamic_shapes=({0: rows}, {0: rows}))
    for n in (35, 7):
        assert torch.equal(program.module()(hidden[:n], labels[:n]), head(hidden[:n], labels[:n]))


def test_opcheck(device):
    hidden, weight, bias, labels = (t.detach() for t in tensors(35, device, torch.float16))
    scale = torch.rand(35, device=device)
    losses = cross_entropy._losses.operator
    torch.library.opcheck(losses, (hidden, weight, bias, labels, None, -100, 0.0, [False] * 3, False))
    torch.library.opcheck(losses, (hidden, weight, None, labels, scale, -100, 0.1, [True, True, False], False))
    torch.library.opcheck(cross_entropy._scaled.operator, (torch.randn(5, 7, device=device), scale[0], torch.float16))


def test_errors(device):
    *leaves, labels = (t.detach() for t in tensors(6, device))
    with pytest.raises(ValueError, match="reduction must be mean, sum or none, got 'max'"):
        linear_cross_entropy(*leaves, labels, reduction="max")
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\], got 1.5"):
        linear_cross_entropy(*leaves, labels, label_smoothing=1.5)
    with pytest.raises(TypeError, match="all tensors must share one dtype"):
        linear_cross_entropy(leaves[0].half(), *leaves[1:], labels)


# ---- machine code ----------------------------------------------------------------------------------------

# The kernel with bfloat16 gradients and a bias, compiled for sm_90. Prints Triton's last form and the PTX.
COMPILE = """
import json, re
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastbert.kernels.cross_entropy import BLOCK_V, NUM_WARPS, _cross_entropy_kernel as kernel

pointers = {"z_ptr": "*bf16", "bias_ptr": "*bf16", "labels_ptr": "*i64", "loss_ptr": "*fp32"}
sizes = {"stride_z": "i32", "n_cols": "i32", "ignore_index": "i32", "smoothing": "fp32"}
constants = {"scale_ptr": None, "HAS_GRAD": True, "HAS_SMOOTHING": False, "BLOCK_V": BLOCK_V}
signature = {n: ({**pointers, **sizes}).get(n, "constexpr") for n in kernel.arg_names}
attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in ("z_ptr", "bias_ptr", "stride_z")}
source = ASTSource(kernel, signature, constants, attributes)
made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": NUM_WARPS})
print(json.dumps({"ttgir": made.asm["ttgir"], "ptx": made.asm["ptx"]}))
"""


@pytest.fixture(scope="module")
def machine_code():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_no_warp_reads_the_labels_logit_after_another_wrote_it(machine_code):
    """dz overwrites z. z[label], which every warp reads, was once read after the sums, behind the last barrier: a slow
    warp could find another warp's dz there, and its loss was wrong. Barriers come from the reductions."""
    lines = machine_code["ttgir"].splitlines()
    reads = [n for n, line in enumerate(lines) if "tt.load" in line and line.count("!tt.ptr<bf16>") == 1]
    scalars = [n for n in reads if "tensor<" not in lines[n]]
    reductions = [n for n, line in enumerate(lines) if '"tt.reduce"' in line]
    assert len(scalars) == 2, "z[label] and bias[label]"
    assert max(scalars) < min(reductions)


def test_accesses_of_whole_blocks_are_128_bits(machine_code):
    """BERT's 30,522 words are no multiple of a vector: with a mask at their end, all accesses had 16 bits."""
    code = machine_code["ptx"]
    # a block of 4,096 in 256 lanes is two accesses of eight elements; both loops read z and bias, the second writes dz
    assert len(re.findall(r"ld\.global\.v4\.b32", code)) == 8
    assert len(re.findall(r"st\.global\.v4\.b32", code)) == 2
