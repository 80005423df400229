"""The Triton attention against float64: outputs, every gradient, every variant, and changes without effect."""

import mmap

import pytest
import torch

from attention_checks import DEVICE, cast, check, check_packed, lengths_tensor, options_of, padded_of, random_qkv, run
from fastbert.kernels import _attention_launch
from fastbert.kernels import attention as kernels
from fastbert.kernels._attention_arguments import UNBOUNDED
from fastbert.testing import LENGTHS, cu_seqlens_of, relative_rms

# ---- against float64 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in LENGTHS if name != "no_sequences"])  # its test is test_empty_input
def test_lengths(name):
    check_packed(LENGTHS[name], heads=1)


# float32 has other block sizes and no kernels for short sequences; bfloat16 is the usual dtype on GPUs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_dtypes(dtype):
    check_packed([5, 70, 0, 33], dtype=dtype)


# every rung of the ladder; 24, 80 and 96 are padded to a power of two on chip
@pytest.mark.parametrize("head_dim", [16, 24, 64, 80, 96, 256])
def test_head_dims(head_dim):
    check_packed([5, 70], head_dim=head_dim, heads=1)


# Both sides of each length from which on another kernel, or another number of heads in a program, is used. With three
# heads the last program of a sequence is half empty (at most 32 tokens) or three quarters empty (at most 16).
@pytest.mark.parametrize("variant", ["plain", "ids"])
def test_short_sequences_share_a_block(variant):
    check_packed([1, 16, 17, 32, 0, 33, 64, 65, 128, 129], variant=variant, heads=3)


def test_wide_heads_in_float32():
    """Their products are computed a few columns at a time. Here the last columns are past the end."""
    check_packed([5, 40], dtype=torch.float32, head_dim=200, heads=1)


VARIANTS = [
    "scale", "bias_of_all", "bias_of_heads", "bias_of_batch", "bias_of_none", "mask", "alibi", "window", "rotary",
    "dropout", "ids", "together",
]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant):
    check_packed([5, 70, 0, 33], variant=variant)


# rotary splits a head in halves, which are padded separately if head_dim is no power of two
@pytest.mark.parametrize("variant", ["rotary", "together"])
def test_variants_with_padded_head_dim(variant):
    check_packed([5, 70], variant=variant, head_dim=24)


@pytest.mark.parametrize("variant", ["plain", "together"])
def test_variants_in_float32(variant):
    check_packed([5, 70], variant=variant, dtype=torch.float32)


@pytest.mark.parametrize("variant", ["plain", "together"])
def test_grouped_heads(variant):
    check_packed([40, 70], variant=variant, heads=4, kv_heads=2)


# a sequence without keys, one without rows, more and fewer keys than rows, short and long sequences
@pytest.mark.parametrize("variant", ["plain", "together"])
def test_cross_attention(variant):
    check_packed([3, 70, 0, 66, 0, 30], [90, 9, 4, 0, 100, 16], variant=variant)


def test_8192_keys():
    """Also many blocks for one row tile. There are few rows, to keep the interpreter fast."""
    check_packed([3], [8192], heads=1, head_dim=16)


@pytest.mark.parametrize("lengths", [[5], [40], [70], [200]], ids=["stacked", "block", "tile", "loops"])
def test_scores_far_below_zero(lengths):
    """exp(-lse) overflows here. Keys past the end have scores of zero, and must be masked before exp, not after."""
    q, k, v = random_qkv(lengths)
    args = [cu_seqlens_of(lengths, DEVICE), max(lengths)]
    check((8 + q / 8, -8 + k / 8, v), args, {}, torch.float16)


def test_scores_that_fall_from_block_to_block():
    """The running maximum must be kept: relative to a later block's own maximum, the first block's share overflows."""
    q, k, v = random_qkv([200])
    sign = torch.where(torch.arange(200, device=DEVICE) < 64, 8.0, -8.0)[:, None, None]
    check((8 + q / 8, sign + k / 8, v), [cu_seqlens_of([200], DEVICE), 200], {}, torch.float16)


# the window limits the blocks on both sides; is wider than the sequence on one side; allows no later token
@pytest.mark.parametrize("window", [(0, 0), (100, 3), (3, 1000), (1 << 29, 0)], ids=str)
def test_window_over_many_blocks(window):
    lengths = [300]
    args = [cu_seqlens_of(lengths, DEVICE), 300]
    check(random_qkv(lengths, heads=1), args, {"window": window}, torch.float16)


# ---- padded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [("plain", torch.float16), ("together", torch.float16), ("plain", torch.float32)],
    ids=["plain-fp16", "together-fp16", "plain-fp32"],
)
def test_padded_equals_packed_and_ignores_padding(variant, dtype):
    """Equal to packed attention. NaN in the padding affects no result; outputs and gradients of padding are zero.

    Packed short sequences have their own kernels, which may round differently on a GPU.
    """

    def same(ours, packed):
        return torch.equal(ours, packed) or relative_rms(ours, packed) <= torch.finfo(dtype).eps

    # padding within a block, a tile that is all padding, a sequence that is all padding
    lengths, width = [5, 66, 0], 130
    packed = random_qkv(lengths, head_dim=16)
    options = {n: cast(v, dtype) for n, v in options_of(variant, [*lengths, width], head_dim=16).items()}
    options = {n: v[:-1] if n in ("mask", "sequence_ids") else v for n, v in options.items()}
    do = torch.randn(packed[0].shape, device=DEVICE).to(dtype)
    dlse = torch.randn(2, sum(lengths), device=DEVICE)

    args = [cu_seqlens_of(lengths, DEVICE), width]
    expected = run(kernels.attention, packed, args, options, lambda *_: (do, dlse), dtype)
    upstream = padded_of(do, lengths, width), padded_of(dlse.t(), lengths, width).transpose(1, 2)
    views = [padded_of(t, lengths, width) for t in packed]
    ours = run(kernels.attention_padded, views, [lengths_tensor(lengths)], options, lambda *_: upstream, dtype)
    for name, value in ours.items():
        if name == "dbias":
            assert same(value, expected[name])
            continue
        rows, wanted = (value.transpose(1, 2), expected[name].t()) if name == "lse" else (value, expected[name])
        assert same(torch.cat([r[:n] for r, n in zip(rows, lengths, strict=True)]), wanted), name
        padding = torch.cat([r[n:] for r, n in zip(rows, lengths, strict=True)])
        assert (padding == (float("-inf") if name == "lse" else 0.0)).all(), name


def test_padded_cross_attention_and_default_lengths():
    q, k, v = (torch.randn(2, n, 2, 16, dtype=torch.float64, device=DEVICE) for n in (70, 9, 9))
    check((q, k, v), [], {}, torch.float16, padded=True)
    check((q, k, v), [lengths_tensor([66, 3]), lengths_tensor([0, 7])], {}, torch.float16, padded=True)


# ---- rows without keys ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [40, 70], ids=["short", "long"])
def test_row_without_keys_gives_zeros(length):
    """A fully masked row: o and its gradients are zero, lse is -inf, and no NaN reaches any other row."""
    mask = torch.rand(1, 1, length, length, device=DEVICE) > 0.3
    mask[..., 7, :] = False
    mask[..., :, 5] = False
    args = [cu_seqlens_of([length], DEVICE), length]
    bias = torch.randn(1, 2, length, length, dtype=torch.float64)
    ours = check(random_qkv([length]), args, {"mask": mask, "bias": bias.to(DEVICE)}, torch.float16)
    assert (ours["o"][7] == 0).all()
    assert (ours["lse"][:, 7] == float("-inf")).all()
    assert (ours["dq"][7] == 0).all()
    assert (ours["dbias"][:, :, 7] == 0).all()
    assert (ours["dk"][5] == 0).all()
    assert (ours["dv"][5] == 0).all()


def test_bias_of_minus_infinity_masks():
    """Models add -inf to forbidden scores. A row of only -inf must not give NaN. The bits differ from those with a
    mask: adding a bias rounds the score, where a kernel without bias uses a fused multiply-add."""
    bias = torch.zeros(1, 1, 70, 70, device=DEVICE)
    bias[..., 66:] = float("-inf")
    bias[..., 3, :] = float("-inf")
    q, k, v = (t.half() for t in random_qkv([70]))
    ours = kernels.attention(q, k, v, cu_seqlens_of([70], DEVICE), 70, bias=bias)
    expected = kernels.attention(q, k, v, cu_seqlens_of([70], DEVICE), 70, mask=bias == 0)
    torch.testing.assert_close(ours, expected)
    assert (ours[3] == 0).all()


def test_nan_is_not_hidden():
    q, k, v = (t.half() for t in random_qkv([70, 5]))
    q[2, 0, 0] = float("nan")
    o = kernels.attention(q, k, v, cu_seqlens_of([70, 5], DEVICE), 70)
    assert o[2, 0].isnan().all()
    assert o.isnan().sum() == o.shape[-1]


# ---- changes without effect ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["plain", "together"])
def test_batch_does_not_change_bits(variant):
    """A sequence has the same bits alone and in two batches of different order, forward and backward."""
    lengths = [64, 5, 0, 66]
    options = {n: cast(v, torch.float16) for n, v in options_of(variant, lengths).items()}
    qkv = [t.half() for t in random_qkv(lengths)]
    do = torch.randn(qkv[0].shape, device=DEVICE).half()
    dlse = torch.randn(2, sum(lengths), device=DEVICE)

    def run_order(order):
        def take(t):
            return torch.cat([t.split(lengths)[i] for i in order])

        own = {n: v[order] if n == "sequence_ids" or (n == "mask" and len(v) > 1) else v for n, v in options.items()}
        upstream = take(do), take(dlse.t()).t()
        args = [cu_seqlens_of([lengths[i] for i in order], DEVICE), 66]
        out = run(kernels.attention, [take(t) for t in qkv], args, own, lambda *_: upstream, torch.float16)
        sizes = [lengths[i] for i in order]
        rows = {n: t.t() if n == "lse" else t for n, t in out.items() if n != "dbias"}
        return {n: dict(zip(order, t.split(sizes), strict=True)) for n, t in rows.items()}

    whole, turned, alone = run_order([0, 1, 2, 3]), run_order([3, 1, 2, 0]), run_order([3])
    for name, rows in whole.items():
        assert all(torch.equal(rows[i], turned[name][i]) for i in rows), name
        assert torch.equal(rows[3], alone[name][3]), name


def test_strides_do_not_matter():
    """Views of one fused tensor, a transposed last dimension and an expanded gradient give the contiguous bits."""
    lengths, args = [70, 5], [cu_seqlens_of([70, 5], DEVICE), 70]
    fused = torch.randn(75, 2, 3 * 16, device=DEVICE).half()
    views = fused.split(16, dim=-1)
    do, dlse = torch.randn(1, 1, 16, device=DEVICE).half().expand(75, 2, 16), torch.randn(2, 75, device=DEVICE)
    expected = run(kernels.attention, [t.contiguous() for t in views], args, {}, lambda *_: (do, dlse), torch.float16)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in views]
    for tensors in (views, turned):
        ours = run(kernels.attention, tensors, args, {}, lambda *_: (do, dlse), torch.float16)
        assert all(torch.equal(value, expected[name]) for name, value in ours.items())
    assert lengths == [70, 5]


@pytest.mark.parametrize("lengths", [[3], [2, 1]], ids=["within_a_sequence", "of_its_start"])
def test_offsets_past_two_to_the_31(lengths):
    """Rows are so far apart that element offsets need 64 bits. Their memory is reserved but never filled."""
    stride = 2**30 + 16
    elements = 2 * stride + 64
    if DEVICE.type == "cuda":
        memory = torch.empty(elements, dtype=torch.float16, device=DEVICE)
    else:
        memory = torch.frombuffer(mmap.mmap(-1, 2 * elements), dtype=torch.float16)
    q, k, v = (memory[16 * i :].as_strided((3, 1, 16), (stride, 16, 1)) for i in range(3))
    for t in (q, k, v):
        t.copy_(torch.randn(t.shape))
    cu_seqlens, do = cu_seqlens_of(lengths, DEVICE), torch.randn(3, 1, 16, device=DEVICE).half()
    ours, near = [], []
    for tensors, results in (((q, k, v), ours), ([t.clone() for t in (q, k, v)], near)):
        leaves = [t.detach().requires_grad_() for t in tensors]
        o = kernels.attention(*leaves, cu_seqlens, 3)
        results += [o, *torch.autograd.grad(o, leaves, do)]
    assert near[1].stride(0) == 16
    assert all(torch.equal(a, b) for a, b in zip(ours, near, strict=True))


@pytest.mark.parametrize("variant", ["plain", "window", "padded_grouped"])
def test_gradients_go_into_one_buffer(variant):
    """dq, dk and dv in slices of one [T, (H + 2 Hk) D] equal three tensors; no element beside them changes."""
    lengths, head_dim = torch.tensor([70, 5, 130], dtype=torch.int32, device=DEVICE), 16
    heads, kv_heads, padded = (2, 1, True) if variant == "padded_grouped" else (2, 2, False)
    rows = (3, 130) if padded else (205,)
    qkv = torch.randn(*rows, heads + 2 * kv_heads, head_dim, device=DEVICE).half()
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=-2)
    spans = lengths if padded else cu_seqlens_of([70, 5, 130], DEVICE)
    schedule = kernels.attention_schedule(spans, rows[-1], padded=padded)
    entries, parts = schedule.entries, schedule.parts(130)
    window = (9, 4) if variant == "window" else (UNBOUNDED,) * 2
    options = (*(None,) * 7, *window, 0.0, 0, head_dim**-0.5)
    o, lse = _attention_launch.launch_forward(q, k, v, spans, spans, entries, parts, *options)
    given = (torch.randn_like(o), None, o, lse, q, k, v, spans, spans, entries, entries, parts, parts, *options)
    *apart, delta = _attention_launch.launch_backward(*given)

    wide = torch.full((*rows, heads + 2 * kv_heads + 1, head_dim), 7.0, dtype=torch.float16, device=DEVICE)
    *slices, beside = wide.split([heads, kv_heads, kv_heads, 1], dim=-2)
    _attention_launch.launch_backward(*given, into=(*slices, torch.empty_like(delta)))
    assert all(torch.equal(one, other) for one, other in zip(slices, apart, strict=True))
    assert (beside == 7.0).all()


# ---- dropout -----------------------------------------------------------------------------------------------------


def uniform_attention(dropout_p, seed=1, stream=0, length=100, **options):
    """With v = identity and equal scores, o is the keep mask itself, as keep / (1 - p) / length."""
    q = torch.zeros(length, 2, length, device=DEVICE, dtype=torch.float16)
    v = torch.eye(length, device=DEVICE, dtype=torch.float16)[:, None].expand(-1, 2, -1)
    seed = torch.tensor([seed], device=DEVICE)
    return kernels.attention(
        q, q, v, cu_seqlens_of([length], DEVICE), length, dropout_p=dropout_p, seed=seed, stream=stream, **options
    )


def test_dropout_keeps_the_right_share_and_the_expectation():
    o = uniform_attention(0.2).float()
    kept = (o > 0).float().mean().item()
    deviation = (0.2 * 0.8 / o.numel()) ** 0.5
    assert abs(kept - 0.8) < 4 * deviation
    assert o[o > 0].unique().numel() == 1
    assert abs(o.sum(-1).mean().item() - 1.0) < 4 * deviation / 0.8


def test_dropout_differs_by_seed_stream_head_and_sequence():
    base = uniform_attention(0.5)
    assert torch.equal(base, uniform_attention(0.5))
    assert not torch.equal(base[:, 0], base[:, 1])
    for other in ({"seed": 2}, {"stream": 1}, {"sequence_ids": torch.tensor([1], device=DEVICE)}):
        agree = ((uniform_attention(0.5, **other) > 0) == (base > 0)).float().mean().item()
        assert 0.45 < agree < 0.55, other
