"""The Triton attention against float64: outputs, every gradient, every variant, and what must not matter."""

import itertools
import mmap

import pytest
import torch

from fastbert import functional
from fastbert.kernels import reference
from fastbert.testing import LENGTHS, allowed_factor, assert_within_budget, cu_seqlens_of, relative_rms

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WHY_NOT = functional.why_not_triton(DEVICE)
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
if WHY_NOT is None:
    from fastbert.kernels import _attention_launch
    from fastbert.kernels import attention as kernels
    from fastbert.kernels._attention_arguments import UNBOUNDED


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- helpers ---------------------------------------------------------------------------------------------


def random_qkv(lengths_q, lengths_k=None, heads=2, kv_heads=None, head_dim=32):
    """q, k, v of packed sequences in float64: what each dtype rounds."""
    rows_q, rows_k = sum(lengths_q), sum(lengths_q if lengths_k is None else lengths_k)
    kv_heads = heads if kv_heads is None else kv_heads
    shapes = ((rows_q, heads, head_dim), (rows_k, kv_heads, head_dim), (rows_k, kv_heads, head_dim))
    return [torch.randn(shape, dtype=torch.float64, device=DEVICE) for shape in shapes]


def options_of(name, lengths_q, lengths_k=None, heads=2, head_dim=32):
    """The keyword arguments of one variant, floating point ones in float64."""
    batch, width_q = len(lengths_q), max(lengths_q)
    width_k = max(lengths_q if lengths_k is None else lengths_k)
    double = {"dtype": torch.float64, "device": DEVICE}
    angles = torch.randn(max(width_q, width_k), head_dim // 2, **double)
    dropout = {"dropout_p": 0.3, "seed": torch.tensor([7], device=DEVICE), "stream": 3}
    every = {
        "plain": {},
        "scale": {"scale": 0.7},
        "bias_of_all": {"bias": torch.randn(batch, heads, width_q, width_k, **double)},
        "bias_of_heads": {"bias": torch.randn(1, heads, width_q, width_k, **double)},
        "bias_of_batch": {"bias": torch.randn(batch, 1, width_q + 3, width_k + 5, **double)},
        "bias_of_none": {"bias": torch.randn(1, 1, width_q, width_k, **double)},
        "mask": {"mask": torch.rand(batch, 1, width_q, width_k, device=DEVICE) > 0.4},
        "alibi": {"alibi_slopes": torch.rand(heads, **double)},
        "window": {"window": (9, 4)},
        "rotary": {"rotary": (angles.cos(), angles.sin())},
        "dropout": dropout,
        "ids": dropout | {"sequence_ids": torch.arange(batch, device=DEVICE) * 3 + 2**30},
    }
    every["together"] = {k: v for n in ("bias_of_heads", "mask", "alibi", "window", "rotary", "ids") for k, v in
                         every[n].items()}  # fmt: skip
    return every[name]


def cast(value, dtype):
    """Floating point tensors, also inside tuples, in dtype."""
    if isinstance(value, tuple) and value and isinstance(value[0], torch.Tensor):
        return tuple(cast(v, dtype) for v in value)
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def run(op, qkv, args, options, upstream, dtype):
    """o, lse and the gradients of q, k, v (and bias) for upstream gradients (do, dlse), all by name."""
    # detached: `.to` of the same dtype is the same tensor, and two runs would add up in one .grad
    leaves = {n: t.detach().to(dtype).requires_grad_() for n, t in zip("qkv", qkv, strict=True)}
    options = {n: cast(v, dtype) for n, v in options.items()}
    if options.get("bias") is not None:
        leaves["bias"] = options["bias"] = options["bias"].detach().requires_grad_()
    o, lse = op(*(leaves[n] for n in "qkv"), *args, return_lse=True, **options)
    do, dlse = upstream(o, lse)
    torch.autograd.backward((o, lse), (do.to(o.dtype), dlse.to(lse.dtype)))
    return {"o": o, "lse": lse} | {f"d{n}": t.grad for n, t in leaves.items()}


def random_upstream():
    """Random do and dlse, the same for every dtype; none for a row that has no key."""
    made = {}

    def upstream(o, lse):
        if not made:
            made["do"], made["dlse"] = (torch.randn(t.shape, dtype=torch.float64, device=DEVICE) for t in (o, lse))
        return made["do"], made["dlse"]

    return upstream


def check(qkv, args, options, dtype, padded=False):
    """Ours against float64, with the budget that plain torch in the same dtype sets."""
    ours_op = kernels.attention_padded if padded else kernels.attention
    reference_op = reference.attention_padded if padded else reference.attention
    upstream = random_upstream()
    # round the inputs first, so that all three see the same numbers
    qkv, options = [t.to(dtype) for t in qkv], {n: cast(v, dtype) for n, v in options.items()}
    truth = run(reference_op, qkv, args, options, upstream, torch.float64)
    plain = run(reference_op, qkv, args, options, upstream, dtype)
    ours = run(ours_op, qkv, args, options, upstream, dtype)
    for name, value in ours.items():
        assert value.dtype == (torch.float32 if name == "lse" else dtype), name
        assert_within_budget(value, plain[name], truth[name], name, allowed_factor(dtype, interpreted_bf16=6.0))
    return ours


def check_packed(lengths_q, lengths_k=None, variant="plain", dtype=torch.float16, heads=2, kv_heads=None, head_dim=32):
    args = [cu_seqlens_of(lengths_q, DEVICE), max(lengths_q, default=0)]
    options = options_of(variant, lengths_q, lengths_k, heads, head_dim) if variant != "plain" else {}
    if lengths_k is not None:
        options = options | {"cu_seqlens_k": cu_seqlens_of(lengths_k, DEVICE), "max_seqlen_k": max(lengths_k)}
    return check(random_qkv(lengths_q, lengths_k, heads, kv_heads, head_dim), args, options, dtype)


# ---- against float64 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in LENGTHS if name != "no_sequences"])  # that: test_empty_input
def test_lengths(name):
    check_packed(LENGTHS[name], heads=1)


# float32 has no kernels for short sequences, and other blocks; bfloat16 is what GPUs run
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_dtypes(dtype):
    check_packed([5, 70, 0, 33], dtype=dtype)


# every rung of the ladder; 24, 80 and 96 are padded to a power of two on chip
@pytest.mark.parametrize("head_dim", [16, 24, 64, 80, 96, 256])
def test_head_dims(head_dim):
    check_packed([5, 70], head_dim=head_dim, heads=1)


# Both sides of each length at which another kernel, or another number of heads a program, takes over. Three heads: the
# last program of a sequence of at most 32 tokens is half empty, of at most 16 a quarter.
@pytest.mark.parametrize("variant", ["plain", "ids"])
def test_short_sequences_share_a_block(variant):
    check_packed([1, 16, 17, 32, 0, 33, 64, 65, 128, 129], variant=variant, heads=3)


def test_wide_heads_in_float32():
    """Their products go a few columns at a time, the last of which are past the end here."""
    check_packed([5, 40], dtype=torch.float32, head_dim=200, heads=1)


VARIANTS = [
    "scale", "bias_of_all", "bias_of_heads", "bias_of_batch", "bias_of_none", "mask", "alibi", "window", "rotary",
    "dropout", "ids", "together",
]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant):
    check_packed([5, 70, 0, 33], variant=variant)


# rotary splits a head in halves, each padded on its own where head_dim is no power of two
@pytest.mark.parametrize("variant", ["rotary", "together"])
def test_variants_with_padded_head_dim(variant):
    check_packed([5, 70], variant=variant, head_dim=24)


@pytest.mark.parametrize("variant", ["plain", "together"])
def test_variants_in_float32(variant):
    check_packed([5, 70], variant=variant, dtype=torch.float32)


@pytest.mark.parametrize("variant", ["plain", "together"])
def test_grouped_heads(variant):
    check_packed([40, 70], variant=variant, heads=4, kv_heads=2)


# a sequence without keys, one without rows, keys longer and shorter than rows, short and long ones
@pytest.mark.parametrize("variant", ["plain", "together"])
def test_cross_attention(variant):
    check_packed([3, 70, 0, 66, 0, 30], [90, 9, 4, 0, 100, 16], variant=variant)


def test_8192_keys():
    """Also many blocks of one row tile; rows are few, to keep the interpreter quick."""
    check_packed([3], [8192], heads=1, head_dim=16)


@pytest.mark.parametrize("lengths", [[5], [40], [70], [200]], ids=["stacked", "block", "tile", "loops"])
def test_scores_far_below_zero(lengths):
    """exp(-lse) overflows there: keys past the end, whose scores are zero, must be masked before it, not after."""
    q, k, v = random_qkv(lengths)
    args = [cu_seqlens_of(lengths, DEVICE), max(lengths)]
    check((8 + q / 8, -8 + k / 8, v), args, {}, torch.float16)


def test_scores_that_fall_from_block_to_block():
    """The running maximum must hold: relative to a later block's own maximum the first block's share overflows."""
    q, k, v = random_qkv([200])
    sign = torch.where(torch.arange(200, device=DEVICE) < 64, 8.0, -8.0)[:, None, None]
    check((8 + q / 8, sign + k / 8, v), [cu_seqlens_of([200], DEVICE), 200], {}, torch.float16)


# the window cuts the range of blocks on both sides; wider than the sequence on one side
@pytest.mark.parametrize("window", [(0, 0), (100, 3), (3, 1000)], ids=str)
def test_window_over_many_blocks(window):
    lengths = [300]
    args = [cu_seqlens_of(lengths, DEVICE), 300]
    check(random_qkv(lengths, heads=1), args, {"window": window}, torch.float16)


# ---- padded --------------------------------------------------------------------------------------------------


def padded_of(packed, lengths, width, fill=float("nan")):
    """[T, ...] -> [B, width, ...], padding poisoned."""
    out = packed.new_full((len(lengths), width, *packed.shape[1:]), fill)
    for row, sequence in zip(out, packed.split(lengths), strict=True):
        row[: len(sequence)] = sequence
    return out


def lengths_tensor(lengths):
    return torch.tensor(lengths, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [("plain", torch.float16), ("together", torch.float16), ("plain", torch.float32)],
    ids=["plain-fp16", "together-fp16", "plain-fp32"],
)
def test_padded_equals_packed_and_ignores_padding(variant, dtype):
    """The same numbers as packed; NaN in the padding reaches nothing; outputs and gradients of padding are zero.

    Packed short sequences have kernels of their own, which a GPU may round differently.
    """

    def same(ours, packed):
        return torch.equal(ours, packed) or relative_rms(ours, packed) <= torch.finfo(dtype).eps

    lengths, width = [5, 66, 0], 130  # padding within a block, a tile of nothing but padding, a sequence of none
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
    """Models add -inf to forbidden scores; a whole row of it must not give NaN. The bits are not a mask's: the sum with
    the bias is rounded, where a kernel without one has a fused multiply-add."""
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


# ---- what must not matter --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["plain", "together"])
def test_batch_does_not_change_bits(variant):
    """A sequence alone, and in two batches of different order, has the same bits, forward and backward."""
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
    """Rows so far apart that element offsets need 64 bits, in memory that is reserved but never filled."""
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
    """dq, dk and dv as slices of one [T, (H + 2 Hk) D], and not an element beside them: the bits of three tensors."""
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


def test_shared_schedule_changes_nothing():
    cu_seqlens = cu_seqlens_of([70, 5], DEVICE)
    q, k, v = (t.half() for t in random_qkv([70, 5]))
    schedule = kernels.attention_schedule(cu_seqlens, 75)
    shared = kernels.attention(q, k, v, cu_seqlens, 70, schedule=schedule)
    assert torch.equal(shared, kernels.attention(q, k, v, cu_seqlens, 70))


def listed(schedule):
    """The entries of the three parts, without surplus ones; a part is as long as it says, surplus last."""
    entries = [tuple(entry) for entry in schedule.entries.tolist()]
    bounds = (0, schedule.n_long, schedule.n_long + schedule.n_medium, len(entries))
    parts = [entries[first:end] for first, end in itertools.pairwise(bounds)]
    real = [[entry for entry in part if entry != (-1, 0)] for part in parts]
    assert all(part[: len(found)] == found for part, found in zip(parts, real, strict=True))
    return real


def longest_first(entries, lengths):
    """The tiles of the longest sequence first, in order; of equally long sequences those of the first."""
    return sorted(entries, key=lambda entry: (-lengths[entry[0]], *entry))


SCHEDULED = [[1] * 70, [64, 65, 128, 129, 0], [513], [65] * 9, [127, 1000, 3], [129] * 40, [0, 0], []]


@pytest.mark.parametrize("lengths", SCHEDULED, ids=str)
def test_schedule_lists_every_tile_once_longest_first(lengths):
    """By the kernel, with parts as long as they can be and as they are; and by the host, the same."""
    long = [(b, t) for b, n in enumerate(lengths) if n > 128 for t in range(-(-n // 128))]
    medium = [(b, 0) for b, n in enumerate(lengths) if 64 < n <= 128]
    short = [(b, 0) for b, n in enumerate(lengths) if n <= 64]
    expected = [longest_first(part, lengths) for part in (long, medium, short)]
    cu_seqlens = cu_seqlens_of(lengths, DEVICE)
    for known in (None, lengths):
        schedule = kernels.attention_schedule(cu_seqlens, sum(lengths), lengths=known)
        assert listed(schedule) == expected
        assert known is None or schedule.entries.shape[0] == sum(map(len, expected))
    assert torch.equal(kernels.attention_entries(lengths), schedule.entries.cpu())


def test_schedule_of_more_sequences_than_a_program_takes():
    lengths = [(37 * n) % 300 for n in range(300)]
    schedule = kernels.attention_schedule(cu_seqlens_of(lengths, DEVICE), sum(lengths))
    assert list(itertools.chain(*listed(schedule))) == [
        tuple(entry) for entry in kernels.attention_entries(lengths).tolist()
    ]


def test_schedule_over_rows_goes_by_the_longer_side():
    """A sequence of few rows and many keys is none of the kernels for short ones; nor the other way round."""
    rows, keys = [300, 3, 0, 70, 5, 200], [2, 300, 100, 10, 5, 0]
    spans = [cu_seqlens_of(lengths, DEVICE) for lengths in (rows, keys)]
    of_rows = kernels.attention_schedule(spans[0], sum(rows), spans[1])
    assert listed(of_rows) == [[(0, 0), (0, 1), (0, 2), (5, 0), (5, 1), (1, 0)], [(3, 0), (2, 0)], [(4, 0)]]
    of_keys = kernels.attention_schedule(spans[1], sum(keys), spans[0])
    assert listed(of_keys) == [[(1, 0), (1, 1), (1, 2), (0, 0)], [(2, 0), (3, 0)], [(4, 0)]]


def test_schedule_of_padded_lengths_covers_the_padding():
    lengths = lengths_tensor([10, 200, 0, 64, 65])
    schedule = kernels.attention_schedule(lengths, 200, padded=True)
    assert listed(schedule) == [[], [(1, 0), (1, 1), (4, 0), (4, 1)], [(3, 0), (0, 0), (2, 0)]]
    q, k, v = (torch.randn(5, 200, 2, 16, device=DEVICE).half() for _ in range(3))
    shared = kernels.attention_padded(q, k, v, lengths, schedule=schedule)
    assert torch.equal(shared, kernels.attention_padded(q, k, v, lengths))


def test_schedule_of_another_batch_is_refused():
    cu_seqlens = cu_seqlens_of([70, 5], DEVICE)
    q, k, v = (t.half() for t in random_qkv([70, 5]))
    schedule = kernels.attention_schedule(cu_seqlens, 75)
    with pytest.raises(ValueError, match=r"made for 2 sequences, size 75, padded False, but the call has 1, 75, False"):
        kernels.attention(q, k, v, cu_seqlens_of([75], DEVICE), 75, schedule=schedule)
    padded = [t.expand(2, *t.shape) for t in (q, k, v)]
    with pytest.raises(ValueError, match=r"but the call has 2, 75, True"):
        kernels.attention_padded(*padded, lengths_tensor([70, 5]), schedule=schedule)
    with pytest.raises(TypeError, match="must come from attention_schedule"):
        kernels.attention(q, k, v, cu_seqlens, 70, schedule=[(0, 1, 70, 0)])
    for wrong in ([70], [70, 4]):
        with pytest.raises(ValueError, match="for 2 sequences of 75 tokens"):
            kernels.attention_schedule(cu_seqlens, 75, lengths=wrong)


# ---- dropout -----------------------------------------------------------------------------------------------------


def uniform_attention(dropout_p, seed=1, stream=0, length=100, **options):
    """v = identity and equal scores: o shows the keep mask itself, as keep / (1 - p) / length."""
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


# ---- torch's machinery -------------------------------------------------------------------------------------------


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
        assert graphs["unique_graphs"] == min(count, 2)  # one for fixed sizes, one for any


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
    """Under autocast float32 inputs are multiplied in the lower dtype, as SDPA does; gradients come back in float32."""
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
    """Either of o and lse may be all that a loss uses."""
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
