"""The Triton attention within torch: compiled, exported, under autocast, with some gradients only; its errors."""

import pytest
import torch

from attention_checks import DEVICE, cast, lengths_tensor, options_of, padded_of, random_qkv
from fastbert.kernels import attention as kernels
from fastbert.testing import cu_seqlens_of

# ---- within torch ------------------------------------------------------------------------------------------------


def batch_of(lengths, requires_grad=True):
    tensors = [t.half().requires_grad_(requires_grad) for t in random_qkv(lengths, head_dim=16)]
    return (*tensors, cu_seqlens_of(lengths, DEVICE), max(lengths))


def test_compile_without_recompiling_for_lengths():
    seed = torch.tensor([3], device=DEVICE)

    def layer(q, k, v, cu_seqlens, max_seqlen):
        schedule = kernels.attention_schedule(cu_seqlens, q.shape[0])
        return 2 * kernels.attention(q, k, v, cu_seqlens, max_seqlen, dropout_p=0.1, seed=seed, schedule=schedule)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    for count, lengths in enumerate(([5, 9], [7, 3, 20], [70], [66, 2, 2, 2]), start=1):
        batch = batch_of(lengths)
        do = torch.randn(batch[0].shape, device=DEVICE).half()
        ours, expected = (torch.autograd.grad(f(*batch), batch[:3], do) for f in (compiled, layer))
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
        assert graphs["unique_graphs"] == min(count, 2)  # one graph for fixed sizes, one for any sizes


def test_compile_padded_with_all_variants():
    lengths = [30, 66]
    options = {n: cast(v, torch.float16) for n, v in options_of("together", lengths).items()}
    qkv = [padded_of(t, lengths, 66, 0.0).half() for t in random_qkv(lengths)]
    compiled = torch.compile(kernels.attention_padded, fullgraph=True, backend="aot_eager")
    for own in ({}, options):
        ours, expected = (f(*qkv, lengths_tensor(lengths), **own) for f in (compiled, kernels.attention_padded))
        assert torch.equal(ours, expected)


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v, cu_seqlens):
            return kernels.attention(q, k, v, cu_seqlens)

    *example, _ = batch_of([7, 3, 20], requires_grad=False)
    rows, starts = torch.export.Dim("rows", min=2), torch.export.Dim("starts", min=2)
    shapes = ({0: rows}, {0: rows}, {0: rows}, {0: starts})
    program = torch.export.export(Layer(), tuple(example), dynamic_shapes=shapes)
    *other, _ = batch_of([70, 9], requires_grad=False)
    assert torch.equal(program.module()(*other), Layer()(*other))


def test_opcheck():
    q, k, v, cu_seqlens, _ = batch_of([7, 66], requires_grad=False)
    bias = torch.randn(1, 2, 66, 66, device=DEVICE)
    options = (None, None, None, None, None, None, kernels.UNBOUNDED, kernels.UNBOUNDED, 0.0, 0, 0.25)
    schedule = kernels.attention_schedule(cu_seqlens, 73)
    spans = (cu_seqlens, cu_seqlens)
    checks = ("test_schema", "test_faketensor")
    ops = torch.ops.fastbert
    torch.library.opcheck(ops.attention_schedule.default, (cu_seqlens, None, 2, 1, 2, 73, False), test_utils=checks)
    entries, parts = schedule.entries, schedule.parts(66)
    forward = (q, k, v, *spans, entries, parts, bias, *options)
    torch.library.opcheck(ops.attention_forward.default, forward, test_utils=checks)
    o, lse = ops.attention_forward(*forward)
    backward = (o, None, o, lse, q, k, v, *spans, entries, entries, parts, parts, bias, *options)
    torch.library.opcheck(ops.attention_backward.default, backward, test_utils=checks)
    delta = ops.attention_backward(*backward)[3]
    dbias = (o, lse, delta, q, k, v, *spans, bias, *options)
    torch.library.opcheck(ops.attention_backward_bias.default, dbias, test_utils=checks)


def test_autocast():
    """Under autocast, float32 inputs are multiplied in the lower dtype, as in SDPA; their gradients are float32."""
    q, k, v, cu_seqlens, longest = batch_of([7, 20])
    wide = [t.detach().float().requires_grad_() for t in (q, k, v)]
    with torch.autocast(DEVICE.type, dtype=torch.float16):
        o = kernels.attention(*wide, cu_seqlens, longest)
    expected = kernels.attention(q, k, v, cu_seqlens, longest)
    assert o.dtype == torch.float16
    assert torch.equal(o, expected)
    do = torch.randn(o.shape, device=DEVICE).half()
    ours, wanted = torch.autograd.grad(o, wide, do), torch.autograd.grad(expected, (q, k, v), do)
    assert all(a.dtype == torch.float32 and torch.equal(a, b.float()) for a, b in zip(ours, wanted, strict=True))


def test_only_one_output_differentiated():
    """A loss may use only o or only lse."""
    q, k, v, cu_seqlens, longest = batch_of([70, 9])
    do, dlse = torch.randn(q.shape, device=DEVICE).half(), torch.randn(2, 79, device=DEVICE)
    o, lse = kernels.attention(q, k, v, cu_seqlens, longest, return_lse=True)
    both = torch.autograd.grad((o, lse), (q, k), (do, dlse), retain_graph=True)
    of_o = torch.autograd.grad(o, (q, k), do, retain_graph=True)
    of_lse = torch.autograd.grad(lse, (q, k), dlse)
    for whole, a, b in zip(both, of_o, of_lse, strict=True):
        torch.testing.assert_close(whole.float(), a.float() + b.float(), rtol=2e-2, atol=2e-3)


def test_empty_input():
    for lengths in ([], [0, 0]):
        q, k, v = (t.half().requires_grad_() for t in random_qkv(lengths))
        o, lse = kernels.attention(q, k, v, cu_seqlens_of(lengths, DEVICE), 0, return_lse=True)
        assert o.shape == (0, 2, 32)
        assert lse.shape == (2, 0)
        assert all(g.shape == (0, 2, 32) for g in torch.autograd.grad(o.sum(), (q, k, v)))
    q = torch.empty(0, 7, 2, 16, device=DEVICE)
    assert kernels.attention_padded(q, q, q).shape == q.shape


# ---- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"dtype": torch.float64}, TypeError, "q, k, v must be float32, bfloat16 or float16, got torch.float64"),
        ({"head_dim": 288}, ValueError, "head_dim must be at most 256, got 288"),
        ({"bias": torch.zeros(1, 1, 6, 7)}, ValueError, "bias has size 6 in dimension 2, expected 7"),
        ({"mask": torch.ones(1, 1, 7, 5, dtype=torch.bool)}, ValueError, "mask has size 5 in dimension 3, expected 7"),
        ({"rotary": (torch.ones(3, 8),) * 2}, ValueError, r"rotary has \[3, 3\] positions, expected 7"),
        ({"alibi_slopes": torch.ones(2, requires_grad=True)}, ValueError, "alibi_slopes requires a gradient"),
    ],
    ids=["float64", "head_dim", "bias", "mask", "rotary", "slopes_grad"],
)
def test_errors_name_expected_and_got(change, error, words):
    change = dict(change)
    dtype, head_dim = change.pop("dtype", torch.float16), change.pop("head_dim", 16)
    q = torch.zeros(10, 2, head_dim, dtype=dtype)
    with pytest.raises(error, match=words):
        kernels.attention(q, q, q, cu_seqlens_of([3, 7]), 7, **change)
