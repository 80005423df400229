"""Attention for training on a CPU: the C++ forward pass with softmax_stats and dropout, and its gradients."""

import math

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from cpu_dtypes import DTYPES
from fastbert.kernels import native, reference
from fastbert.kernels._random import HEAD_STREAMS, keep_mask, row_keys
from fastbert.kernels.cpu import attention as cpu_attention
from fastbert.testing import assert_within_budget, cu_seqlens_of, relative_rms

pytestmark = pytest.mark.cpp
# around six keys, a register, a block of queries, one and two blocks of keys; also no token, and one
LENGTHS = [1, 2, 5, 0, 6, 7, 16, 17, 64, 65, 130, 97]
SHAPES = [(4, 4, 32), (2, 2, 64), (3, 3, 16), (4, 2, 80), (2, 1, 112)]  # heads, key heads, head_dim


def random_inputs(lengths, heads=2, kv_heads=2, head_dim=32):
    """q, k, v, views of one fused projection, and do."""
    qkv = torch.randn(sum(lengths), heads + 2 * kv_heads, head_dim, dtype=torch.float64)
    return [*qkv.split([heads, kv_heads, kv_heads], dim=1), torch.randn(sum(lengths), heads, head_dim).double()]


def dropout_of(p, lengths):
    """A seed that uses all its bits, a stream, and names of sequences that differ from their places."""
    if p == 0.0:
        return {}
    names = torch.randperm(len(lengths)) * 123_456_789
    return {"dropout_p": p, "seed": torch.tensor(-(5**26)), "stream": 3, "sequence_ids": names}


def gradients(attention, q, k, v, do, lengths, dtype, **options):
    """[o, dq, dk, dv]"""
    leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
    o = attention(*leaves, cu_seqlens_of(lengths, "cpu"), max(lengths, default=0), **options)
    return [o, *torch.autograd.grad(o, leaves, do.to(dtype))]


def assert_like_the_reference(inputs, lengths, dtype, **options):
    q, k, v, _ = (t.to(dtype) for t in inputs)
    assert cpu_attention.takes_attention(q, k, v, cu_seqlens_of(lengths, "cpu"))
    ours = gradients(native.attention, *inputs, lengths, dtype, **options)
    assert type(ours[0].grad_fn).__name__ == "_AttentionBackward"
    plain = gradients(reference.attention, *inputs, lengths, dtype, **options)
    exact = gradients(reference.attention, *inputs, lengths, torch.float64, **options)
    for name, *three in zip(("o", "dq", "dk", "dv"), ours, plain, exact, strict=True):
        assert_within_budget(*three, name)


# ---- numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def test_gradients(heads, kv_heads, head_dim, dtype, p):
    inputs = random_inputs(LENGTHS, heads, kv_heads, head_dim)
    assert_like_the_reference(inputs, LENGTHS, dtype, **dropout_of(p, LENGTHS))


# windows that leave out only later or only earlier tokens, or both, within one block of keys and across several
@pytest.mark.parametrize("window", [(10**9, 0), (0, 10**9), (2, 0), (3, 1), (70, 40)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_windows(window, p, dtype):
    inputs = random_inputs(LENGTHS, 4, 2, 32)
    assert_like_the_reference(inputs, LENGTHS, dtype, window=window, **dropout_of(p, LENGTHS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary_positions(dtype):
    """Each token is rotated by its position in its own sequence."""
    inputs = random_inputs(LENGTHS, 4, 2, 32)
    angles = torch.rand(max(LENGTHS), 16) * 6
    rotary = angles.cos(), angles.sin()
    assert_like_the_reference(inputs, LENGTHS, dtype, rotary=rotary, window=(10**9, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_length_by_itself(dtype):
    """Each length alone, so that its relative error is not hidden by others; three sequences, since the error of few
    numbers depends on chance. (With a single token, q and k have no gradient.)"""
    for length in [n for n in LENGTHS if n > 1]:
        assert_like_the_reference(random_inputs([length] * 3), [length] * 3, dtype, scale=0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [30.0, -30.0], ids=["far above", "far below"])
def test_extreme_scores(dtype, shift):
    """Sequences of 12 and 7 rows follow each other: the second reuses memory that holds rows of the first."""
    lengths = [20, 33, 12, 7]
    q, k, v, do = random_inputs(lengths)
    assert_like_the_reference([4 + q / 8, shift + k / 8, v, do], lengths, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax_stats(dtype):
    """The two numbers of a row give its logsumexp: (maximum + log2 of the sum) / log2(e)."""
    q, k, v, _ = (t.to(dtype) for t in random_inputs(LENGTHS, 4, 2))
    cu_seqlens, stats = cu_seqlens_of(LENGTHS, "cpu"), torch.empty(2, 4, sum(LENGTHS))
    cpu_attention.attention(q, k, v, cu_seqlens, None, None, stats)
    wanted = reference.attention(q.double(), k.double(), v.double(), cu_seqlens, return_lse=True)[1]
    maximum, factor = stats.double()
    torch.testing.assert_close((maximum - factor.log2()) * math.log(2.0), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_of_few_keys_has_all_of_the_probability(dtype, p):
    """dq and dk are zero then, as for a text of one token. With dropout, which scales what it keeps, they had the
    rounding error of o: 2e-3 in bfloat16, where plain torch has almost none."""
    lengths = [1, 1, 2, 3, 6, 1, 65]
    keys = [1, 2, 2, 3, 6, 6, 1]
    q, _, _, do = random_inputs(lengths)
    _, k, v, _ = random_inputs(keys)
    firsts = cu_seqlens_of(keys, "cpu")[:-1].long()
    k[firsts], q = 8.0, q.abs()  # the first keys' scores are far above the others
    options = {"cu_seqlens_k": cu_seqlens_of(keys, "cpu"), **dropout_of(p, lengths)}
    ours = gradients(native.attention, q, k, v, do, lengths, dtype, **options)
    exact = gradients(reference.attention, q, k, v, do, lengths, torch.float64, **options)
    for name, one, truth in zip(("dq", "dk"), ours[1:3], exact[1:3], strict=True):
        assert (one.double() - truth).abs().max() < 1e-5, name
    assert relative_rms(ours[3], exact[3]) < 4 * torch.finfo(dtype).eps


def test_large_scores():
    """Scores of 16,384 and a little more, exact in float32. A logsumexp stored as one number is rounded to 1e-3 there,
    and the gradients were wrong by as much. The first element, which makes the scores large, is not compared: its
    gradients are only the rounding of sums that vanish."""
    lengths = [40, 33]
    q, k, v, do = random_inputs(lengths)
    q, k = q.round(), k.round()
    q[..., 0], k[..., 0] = 2.0**9, 2.0**10
    ours, exact = (
        gradients(module.attention, q, k, v, do, lengths, dtype, scale=2.0**-5)
        for module, dtype in ((native, torch.float32), (reference, torch.float64))
    )
    for name, one, truth in zip(("o", "dq", "dk", "dv"), ours, exact, strict=True):
        assert relative_rms(one[..., 1:], truth[..., 1:]) < 1e-5, name


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_of_other_lengths(dtype, p):
    """Fewer and more queries than keys, one query (as for the first token), no queries, no keys, neither."""
    lengths, of_keys = [1, 1, 7, 0, 3, 0, 70], [5, 65, 2, 4, 0, 0, 130]
    inputs = [torch.randn(sum(n), 2, 32).double() for n in (lengths, of_keys, of_keys, lengths)]
    starts = cu_seqlens_of(of_keys, "cpu")
    more = {"cu_seqlens_k": starts, "max_seqlen_k": 130, **dropout_of(p, lengths)}

    def of(module):
        return lambda q, k, v, *rest, **options: module.attention(q, k, v, *rest, **more, **options)

    ours = gradients(of(native), *inputs, lengths, dtype)
    assert type(ours[0].grad_fn).__name__ == "_AttentionBackward"
    plain = gradients(of(reference), *inputs, lengths, dtype)
    exact = gradients(of(reference), *inputs, lengths, torch.float64)
    for name, *three in zip(("o", "dq", "dk", "dv"), ours, plain, exact, strict=True):
        assert_within_budget(*three, name)
    second = []
    for module in (native, reference):
        q, k, v = (t.float().requires_grad_() for t in inputs[:3])
        o = of(module)(q, k, v, cu_seqlens_of(lengths, "cpu"), 70)
        grads = torch.autograd.grad(o.pow(3).sum(), (q, k, v), create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in grads), (q, k, v)))
    for one, other in zip(*second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", ["expanded", "transposed", "every second head"])
def test_upstream_gradients_of_other_strides(layout):
    lengths = [5, 20]
    q, k, v, _ = random_inputs(lengths)
    do = {
        "expanded": torch.randn(25, 1, 1).double().expand(25, 2, 32),
        "transposed": torch.randn(32, 2, 25).double().permute(2, 1, 0),
        "every second head": torch.randn(25, 4, 32).double()[:, ::2],
    }[layout]
    assert_like_the_reference([q, k, v, do], lengths, torch.float32)


# ---- dropout -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.9, 1e-12], ids=str)
def test_the_mask_is_that_of_the_specification(dtype, p):
    """With equal scores, and v or do one at a single token and zero elsewhere, the result is one column of the mask."""
    lengths, heads, width = [130, 7], 2, 32
    options = dropout_of(p, lengths)
    for sequence, (start, length) in enumerate([(0, 130), (130, 7)]):
        ids = (options["sequence_ids"][sequence] << 32) | torch.arange(length)
        streams = options["stream"] * HEAD_STREAMS + torch.arange(heads)[:, None]
        expected = keep_mask(row_keys(options["seed"], streams, ids), length, p)  # [H, L, L]
        for first in range(0, length, width):
            n = min(width, length - first)
            zero = torch.zeros(137, heads, width, dtype=dtype)
            unit = zero.clone()
            unit[start + first + torch.arange(n), :, torch.arange(n)] = 1.0
            o, *_ = gradients(native.attention, zero, zero, unit, zero, lengths, dtype, **options)
            *_, dv = gradients(native.attention, zero, zero, unit, unit, lengths, dtype, **options)
            kept, kept_backward = (t[start : start + length, :, :n].transpose(0, 1) != 0 for t in (o, dv))
            assert torch.equal(kept, expected[:, :, first : first + n])
            assert torch.equal(kept_backward, expected[:, first : first + n].transpose(1, 2))


def test_dropout_without_gradients_is_the_same():
    q, k, v, do = random_inputs([40, 9])
    options = dropout_of(0.2, [40, 9])
    o, *_ = gradients(native.attention, q, k, v, do, [40, 9], torch.float32, **options)
    without = native.attention(q.float(), k.float(), v.float(), cu_seqlens_of([40, 9], "cpu"), 40, **options)
    assert torch.equal(o, without)
    assert not without.requires_grad


def test_a_seed_that_changes_after_the_forward():
    lengths = [40, 9]
    q, k, v, do = (t.float() for t in random_inputs(lengths))
    options = dropout_of(0.2, lengths)
    wanted = gradients(native.attention, q, k, v, do, lengths, torch.float32, **options)[1:]
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    o = native.attention(*leaves, cu_seqlens_of(lengths, "cpu"), 40, **options)
    options["seed"].add_(1)
    for graph in (False, True):
        found = torch.autograd.grad(o, leaves, do, retain_graph=True, create_graph=graph)
        for ours, right in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, right)


# ---- batches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.2], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sequence_gets_the_same_bits_in_any_batch_and_any_number_of_threads(dtype, p):
    inputs, options = random_inputs(LENGTHS, 4, 2), dropout_of(p, LENGTHS)
    names = options.pop("sequence_ids", torch.arange(len(LENGTHS)))

    def run(inputs, lengths, names):
        return gradients(native.attention, *inputs, lengths, dtype, **options, sequence_ids=names)

    together = zip(*(t.split(LENGTHS) for t in run(inputs, LENGTHS, names)), strict=True)
    apart = zip(*(t.split(LENGTHS) for t in inputs), strict=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for i, (parts, expected) in enumerate(zip(apart, together, strict=True)):
            for ours, right in zip(run(parts, [LENGTHS[i]], names[i : i + 1]), expected, strict=True):
                assert torch.equal(ours, right)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("where", range(4), ids=["q", "k", "v", "do"])
def test_nan_stays_in_its_sequence_and_is_not_hidden(where):
    lengths = [20, 30, 5]
    inputs = random_inputs(lengths)
    inputs[where][25, 0, 3] = float("nan")
    found = gradients(native.attention, *inputs, lengths, torch.float32)
    wanted = gradients(reference.attention, *inputs, lengths, torch.float32)
    for ours, right in zip(found, wanted, strict=True):
        assert torch.equal(ours.isnan(), right.isnan())


def test_no_tokens():
    for lengths in ([], [0, 0]):
        for t in gradients(native.attention, *random_inputs(lengths), lengths, torch.float32):
            assert t.shape == (0, 2, 32)


# ---- torch's features ----------------------------------------------------------------------------------------


@pytest.fixture
def leaves():
    return [t.float().requires_grad_() for t in random_inputs([5, 9])[:3]]


def attend(q, k, v, **options):
    return native.attention(q, k, v, cu_seqlens_of([5, 9], "cpu"), 9, **options)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_double_backward_is_that_of_torch(leaves, dropout_p):
    """Second derivatives. Without dropout, backward used torch's fused attention, which has none."""
    options = dropout_of(dropout_p, [5, 9]) if dropout_p else {}

    def second(attention):
        o = attention(*leaves, cu_seqlens_of([5, 9], "cpu"), 9, **options)
        first = torch.autograd.grad(o.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for ours, right in zip(second(native.attention), second(reference.attention), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4)


def test_gradients_to_differentiate_again_where_inputs_are_made_of_each_other(leaves):
    """k is computed from q, and v is k: each gradient must be that of its own input only."""
    q, width = leaves[0], leaves[0].shape[-1]
    linear = torch.randn(width, width).mul(0.2).requires_grad_()

    def found(create_graph):
        k = q @ linear
        return torch.autograd.grad(attend(q, k, k).pow(3).sum(), (q, linear), create_graph=create_graph)

    torch.testing.assert_close(found(True), found(False), rtol=1e-4, atol=1e-4)


def test_checkpointing(leaves):
    options = dropout_of(0.2, [5, 9])
    wanted = torch.autograd.grad(attend(*leaves, **options).square().sum(), leaves)
    o = checkpoint(attend, *leaves, use_reentrant=False, **options)
    for ours, right in zip(torch.autograd.grad(o.square().sum(), leaves), wanted, strict=True):
        assert torch.equal(ours, right)


def test_functional_gradients_and_forward_mode_go_to_torch(leaves):
    q, k, v = (t.detach() for t in leaves)
    wanted = torch.autograd.grad(attend(*leaves).sum(), leaves[0])[0]
    torch.testing.assert_close(torch.func.grad(lambda q: attend(q, k, v).sum())(q), wanted, rtol=1e-4, atol=1e-5)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.randn_like(q))
        assert not cpu_attention.takes_attention(dual, k, v, cu_seqlens_of([5, 9], "cpu"))


def test_autocast_goes_to_torch(leaves):
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(*leaves).dtype == torch.bfloat16


def test_a_negative_scale_goes_to_torch(leaves):
    """The C++ softmax assumes that the greatest score has the greatest exponent."""
    q, k, v = leaves
    torch.testing.assert_close(attend(q * 50, k, v, scale=-1.0), attend(q * -50, k, v, scale=1.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled(leaves, dtype):
    """Compiled code gives the same bits, because it calls the same operator."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in leaves]
    o, do = attend(*leaves), torch.randn(14, 2, 32).to(dtype)
    compiled = torch.compile(native.attention, fullgraph=True, backend="aot_eager")
    ours = compiled(*leaves, cu_seqlens_of([5, 9], "cpu"), 9)
    assert torch.equal(ours, o)
    pairs = zip(torch.autograd.grad(ours, leaves, do), torch.autograd.grad(o, leaves, do), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
