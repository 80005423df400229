"""DeBERTa's disentangled attention: every implementation within the budget against float64."""

import pytest
import torch

from fastbert import functional as F
from fastbert.kernels import _disentangled_native, reference
from fastbert.kernels.cpu import disentangled as cpp_disentangled
from fastbert.testing import assert_within_budget, cu_seqlens_of

# around six rows, a register, and a block of 96 rows; none; one. Small batches, since the reference is slow
LENGTHS = {"short": [1, 2, 5, 0, 6, 7, 17, 33], "blocks": [97, 64], "long": [203, 12, 96]}
TERMS = {"both": (True, True), "c2p": (True, False), "p2c": (False, True), "none": (False, False)}
NAMES = ("o", "dq", "dk", "dv", "dpk", "dpq")


def inputs_of(lengths, heads=2, head_dim=32, terms="both", rows=23, reach=None):
    """(q, k, v as views of one product, pk, pq), do, and a table that may map any distance to any row."""
    longest = max(1, *lengths) if reach is None else reach
    qkv = torch.randn(sum(lengths), 3, heads, head_dim, dtype=torch.float64)
    tables = (torch.randn(rows, heads, head_dim, dtype=torch.float64) if has else None for has in TERMS[terms])
    lut = torch.randint(0, rows, (2 * longest - 1,), dtype=torch.int32)
    return (*qkv.unbind(1), *tables), torch.randn_like(qkv[:, 0]), lut


def results(attention, tensors, do, lut, lengths, dtype, **options):
    """o, and the gradients of the tensors that are given."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]
    o = attention(*leaves, lut, cu_seqlens_of(lengths, "cpu"), max(lengths, default=0), **options)
    given = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(o, given, do.to(dtype)))
    return [o, *(None if leaf is None else next(found) for leaf in leaves)]


def dropout_of(p, lengths):
    if p == 0.0:
        return {}
    names = torch.randperm(len(lengths)) * 123_456_789
    return {"dropout_p": p, "seed": torch.tensor(-(5**26)), "stream": 3, "sequence_ids": names}


def assert_right(given, lengths, dtype, impl, **options):
    ours = results(F.disentangled_attention, *given, lengths, dtype, impl=impl, **options)
    plain = results(reference.disentangled_attention, *given, lengths, dtype, **options)
    exact = results(reference.disentangled_attention, *given, lengths, torch.float64, **options)
    assert ours[0].dtype == dtype
    for name, *three in zip(NAMES, ours, plain, exact, strict=True):
        if three[2] is not None:
            assert_within_budget(*three, name)
    return ours


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("impl", ["native"])
def test_values_and_gradients(impl, lengths, dtype, p):
    lengths = LENGTHS[lengths]
    assert_right(inputs_of(lengths), lengths, dtype, impl, **dropout_of(p, lengths))


@pytest.mark.parametrize("terms", ["c2p", "p2c", "none"])
@pytest.mark.parametrize("impl", ["native"])
def test_missing_terms(impl, terms):
    lengths = LENGTHS["short"]
    for dtype in (torch.float32, torch.bfloat16):
        assert_right(inputs_of(lengths, terms=terms), lengths, dtype, impl)


# several tiles and a part of one, none, a single row in a tile
SMALL = [33, 0, 1, 5]


@pytest.mark.parametrize(("terms", "p"), [("both", 0.3), ("c2p", 0.0), ("p2c", 0.0), ("none", 0.0)])
@pytest.mark.parametrize("impl", ["triton"])
def test_kernels(impl, terms, p):
    given = inputs_of(SMALL, heads=2 if terms == "both" else 1, head_dim=16, terms=terms, rows=5)
    assert_right(given, SMALL, torch.float32, impl, **dropout_of(p, SMALL))


@pytest.mark.parametrize("impl", ["triton"])
def test_kernels_of_16_bits_and_widths_that_fill_no_block(impl):
    """Tiles of 32 in float16, because the interpreter only emulates bfloat16."""
    assert_right(inputs_of([40, 3], heads=1, head_dim=24, rows=5, reach=50), [40, 3], torch.float16, impl)


@pytest.mark.triton
def test_heads_too_wide_for_the_kernels():
    (q, k, v, pk, pq), _, lut = inputs_of([5], heads=1, head_dim=80)
    starts = cu_seqlens_of([5], "cpu")
    q, k, v, pk, pq = (t.float() for t in (q, k, v, pk, pq))
    with pytest.raises(ValueError, match="head_dim must be at most 64, got 80"):
        F.disentangled_attention(q, k, v, pk, pq, lut, starts, 5, impl="triton")
    o = F.disentangled_attention(q, k, v, pk, pq, lut, starts, 5)
    torch.testing.assert_close(o, reference.disentangled_attention(q, k, v, pk, pq, lut, starts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head_dim", [16, 64, 80])
@pytest.mark.parametrize("impl", ["native"])
def test_other_widths_scales_and_a_table_for_longer_texts(impl, head_dim):
    lengths = [11, 40]
    given = inputs_of(lengths, heads=3, head_dim=head_dim, reach=70)
    assert_right(given, lengths, torch.float32, impl, scale=0.2)


@pytest.mark.parametrize("impl", ["native", "triton"])
def test_a_text_has_the_same_bits_in_any_batch(impl):
    """Both calls have a table for texts of up to 70 tokens. (A table for 9 would be laid out differently.)"""
    tensors, _, lut = inputs_of([30, 9, 70])
    q, k, v, pk, pq = (t.float() for t in tensors)
    whole = F.disentangled_attention(q, k, v, pk, pq, lut, cu_seqlens_of([30, 9, 70], "cpu"), 70, impl=impl)
    part = slice(30, 39)
    alone = F.disentangled_attention(
        q[part], k[part], v[part], pk, pq, lut, cu_seqlens_of([9], "cpu"), 9, impl=impl
    )  # fmt: skip
    assert torch.equal(whole[part], alone)


@pytest.mark.cpp
def test_the_cpp_computes_and_threads_change_nothing():
    lengths = [50, 3, 121]
    given = inputs_of(lengths, heads=4)
    bits, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        bits.append(results(F.disentangled_attention, *given, lengths, torch.float32, impl="native"))
    torch.set_num_threads(before)
    assert type(bits[0][0].grad_fn).__name__ == "_DisentangledBackward"
    assert all(torch.equal(a, b) for a, b in zip(*bits, strict=True))


@pytest.mark.cpp
def test_the_cpp_refuses_invalid_arguments():
    (q, k, v, pk, pq), _, lut = inputs_of([5, 8])
    q, k, v, pk, pq = (t.float() for t in (q, k, v, pk, pq))
    starts = cu_seqlens_of([5, 8], "cpu")
    for wrong in (lut[:13], lut + 23):
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 13 by at most"):
            cpp_disentangled.attention(q, k, v, pk, pq, wrong, starts, 0.1)
    with pytest.raises(ValueError, match="pq must be on the CPU"):
        cpp_disentangled.attention(q, k, v, pk, pq[:5], lut, starts, 0.1)


def test_second_derivatives():
    """Also of the C++ operator, whose backward pass then uses torch's own operators."""
    dtype = torch.float32
    lengths = [4, 7]
    given, do, lut = inputs_of(lengths, heads=1, head_dim=16)
    found = []
    for of, kind in ((F.disentangled_attention, dtype), (reference.disentangled_attention, torch.float64)):
        leaves = [t.detach().to(kind).requires_grad_() for t in given]
        more = {"impl": "native"} if kind == dtype else {}
        o = of(*leaves, lut, cu_seqlens_of(lengths, "cpu"), 7, **more)
        first = torch.autograd.grad(o, leaves, do.to(kind), create_graph=True)
        found.append(torch.autograd.grad(sum((g**2).sum() for g in first), leaves))
    for name, ours, exact in zip(NAMES[1:], *found, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4, msg=name)


def test_padding_attends_to_every_column_alike():
    """In the original, a padded query has the same score for every key, padding included."""
    tensors, _, lut = inputs_of([6, 6, 6])
    q, k, v, pk, pq = (t if t.shape[0] == 23 else t.unflatten(0, (3, 6)) for t in tensors)
    real = torch.arange(6) < torch.tensor([6, 4, 1])[:, None]
    o = F.disentangled_attention_padded(q, k, v, pk, pq, lut, real)
    torch.testing.assert_close(o[1, 5], v[1].mean(0))
    torch.testing.assert_close(o[2, 0], v[2, 0])
    packed = (t[real] for t in (q, k, v))
    of_tokens = reference.disentangled_attention(*packed, pk, pq, lut, cu_seqlens_of([6, 4, 1], "cpu"))
    torch.testing.assert_close(o[real], of_tokens)


@pytest.mark.once
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 4, 5)}, r"q must be \[T, H, D\]"),
        ({"k": torch.zeros(13, 2, 16)}, "q, k and v must be alike"),
        ({"pk": torch.zeros(23, 2, 16)}, "pk and pq must be"),
        ({"pq": torch.zeros(23, 2, 32)}, "pk and pq must be"),
        ({"lut": torch.zeros(15, dtype=torch.int64)}, "lut must be"),
        ({"lut": torch.zeros(13, dtype=torch.int32)}, "S >= 8"),
        ({"lut": torch.full((15,), 23, dtype=torch.int32)}, "0 to 22, got 23 to 23"),
        ({"cu_seqlens": torch.tensor([0, 5, 12], dtype=torch.int32)}, "cu_seqlens"),
        ({"dropout_p": 0.1}, "dropout needs seed"),
        ({"impl": "fastest"}, "impl must be one of"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    (q, k, v, pk, pq), _, lut = inputs_of([5, 8])
    call = {"q": q, "k": k, "v": v, "pk": pk, "pq": pq, "lut": lut, "cu_seqlens": cu_seqlens_of([5, 8], "cpu")}
    with pytest.raises(ValueError, match=message):
        F.disentangled_attention(**(call | {"max_seqlen": 8, "impl": "reference"} | change))


def test_no_token_at_all():
    given, do, lut = inputs_of([0, 0])
    for impl in ("native", "reference"):
        o, *grads = results(F.disentangled_attention, given, do, lut, [0, 0], torch.float32, impl=impl)
        assert o.shape == (0, 2, 32)
        assert not any(g.any() for g in grads)


def test_large_scores_in_float16():
    """The products of q and k overflowed before they were scaled, and all values became NaN. Transformers scales first;
    its scores here are about 12,000."""
    (q, k, v, pk, pq), _, lut = inputs_of([4, 7])
    given = [t.half() for t in (60.0 + q, 60.0 + k, v, pk, pq)]
    starts = cu_seqlens_of([4, 7], "cpu")
    truth = reference.disentangled_attention(*(t.double() for t in given), lut, starts)
    error = F.disentangled_attention(*given, lut, starts, 7, impl="native").double() - truth
    assert error.square().mean() <= (torch.finfo(torch.float16).eps ** 2) * truth.square().mean()


@pytest.mark.once
def test_calls_that_the_cpp_does_not_support_go_to_torch():
    (q, k, v, pk, pq), _, lut = inputs_of([5, 8], head_dim=24)
    starts = cu_seqlens_of([5, 8], "cpu")
    q, k, v, pk, pq = (t.float() for t in (q, k, v, pk, pq))
    assert not cpp_disentangled.takes(q, k, v, pk, pq, lut, starts, 0.1)
    o = _disentangled_native.disentangled_attention(q, k, v, pk, pq, lut, starts, 8)
    torch.testing.assert_close(o, reference.disentangled_attention(q, k, v, pk, pq, lut, starts), rtol=1e-4, atol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize(("arch", "lanes"), [("sm_80", 32), ("sm_90", 32), ("sm_100", 32), ("gfx942", 64)])
def test_no_tile_has_fewer_entries_than_its_program_has_threads(arch, lanes):
    """Triton's gather along a tile's columns then needs several warps for one column, and the kernel does not compile:
    the gradient of q in float32 had 8 warps of 64 lanes for 16 x 16 entries on gfx942."""
    pytest.importorskip("triton", reason="the kernels' configs are read")
    from fastbert.kernels.disentangled import disentangled_config

    for dtype in (torch.float32, torch.bfloat16):
        for direction in ("fwd", "bwd_dq", "bwd_dkv", "bwd_diagonal"):
            config = disentangled_config(dtype, arch, direction)
            assert config.num_warps * lanes <= config.block**2, (dtype, direction)
