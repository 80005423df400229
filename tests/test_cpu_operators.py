"""Inference on a CPU: attention and LayerNorm in C++, and weights that are laid out beforehand."""

import copy
import gc
import io
import itertools

import pytest
import torch
import torch.nn.functional as F

import fastbert
from cpu_dtypes import DTYPES
from fastbert.kernels import native, reference
from fastbert.kernels.cpu import attention as cpu_attention
from fastbert.kernels.cpu import layouts
from fastbert.kernels.cpu import operators as cpp
from fastbert.layers import JoinedLinears
from fastbert.testing import assert_within_budget, cu_seqlens_of

pytestmark = pytest.mark.native

# around six rows and sixteen keys (one block), none, one, and more than four registers of keys
LENGTHS = [1, 2, 5, 0, 6, 7, 16, 17, 64, 65, 130]
SHAPES = [(4, 4, 32), (2, 2, 64), (3, 3, 16), (4, 2, 80), (2, 1, 112)]  # heads, key heads, head_dim


def random_qkv(lengths, heads=4, kv_heads=4, head_dim=32):
    """Views of a fused projection, as a model has them."""
    qkv = torch.randn(sum(lengths), heads + 2 * kv_heads, head_dim, dtype=torch.float64)
    return qkv.split([heads, kv_heads, kv_heads], dim=1)


def attend(q, k, v, lengths, dtype, scale=None):
    q, k, v = (t.to(dtype) for t in (q, k, v))
    cu_seqlens = cu_seqlens_of(lengths, "cpu")
    assert cpu_attention.takes_attention(q, k, v, cu_seqlens)
    return native.attention(q, k, v, cu_seqlens, max(lengths, default=0), scale=scale)


# ---- attention -----------------------------------------------------------------------------------------------


@pytest.mark.cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def test_attention(dtype, heads, kv_heads, head_dim):
    qkv = random_qkv(LENGTHS, heads, kv_heads, head_dim)
    args = [cu_seqlens_of(LENGTHS, "cpu"), max(LENGTHS)]
    expected = reference.attention(*qkv, *args)
    plain = reference.attention(*(t.to(dtype) for t in qkv), *args)
    assert_within_budget(attend(*qkv, LENGTHS, dtype), plain, expected, "o")


@pytest.mark.cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_of_extreme_scores(dtype):
    """Far above, far below and all equal: nothing overflows, and the padding of a register of keys does not count."""
    lengths = [20, 33, 7]
    q, k, v = random_qkv(lengths)
    for shift in (30.0, -30.0):
        args = (4 + q / 8, shift + k / 8, v)
        expected = reference.attention(*args, cu_seqlens_of(lengths, "cpu"), 33)
        plain = reference.attention(*(t.to(dtype) for t in args), cu_seqlens_of(lengths, "cpu"), 33)
        assert_within_budget(attend(*args, lengths, dtype), plain, expected, "o")
    means = torch.cat([x.mean(0, keepdim=True).expand_as(x) for x in v.to(dtype).float().split(lengths)])
    torch.testing.assert_close(attend(q * 0, k, v, lengths, dtype).float(), means, rtol=1e-2, atol=1e-2)


@pytest.mark.cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sequence_gets_the_same_bits_in_any_batch_and_any_number_of_threads(dtype):
    qkv = random_qkv(LENGTHS)
    together = attend(*qkv, LENGTHS, dtype).split(LENGTHS)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        apart = zip(*(t.split(LENGTHS) for t in qkv), strict=True)
        for n, parts, expected in zip(LENGTHS, apart, together, strict=True):
            assert torch.equal(attend(*parts, [n], dtype), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.cpp
def test_nan_stays_in_its_sequence_and_is_not_hidden():
    lengths = [20, 30, 5]
    q, k, v = random_qkv(lengths)
    q[25, 0, 3] = float("nan")
    ours = attend(q, k, v, lengths, torch.float32)
    assert ours[25, 0].isnan().all()
    ours[25, 0] = 0.0
    assert ours.isfinite().all()


@pytest.mark.cpp
def test_no_tokens():
    assert attend(*random_qkv([]), [], torch.float32).shape == (0, 4, 32)
    assert attend(*random_qkv([0, 0]), [0, 0], torch.float32).shape == (0, 4, 32)


@pytest.mark.cpp
@pytest.mark.parametrize("why", ["head_dim", "float16", "stride", "options"])
def test_unsupported_attention_goes_to_torch(why):
    lengths, options = [5, 9], {}
    q, k, v = random_qkv(lengths, head_dim=24 if why == "head_dim" else 32)
    q, k, v = (t.to(torch.float16 if why == "float16" else torch.float32) for t in (q, k, v))
    if why == "stride":
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    if why == "options":
        options = {"alibi_slopes": torch.rand(4)}
    else:
        assert not cpu_attention.takes_attention(q, k, v, cu_seqlens_of(lengths, "cpu"))
    args = [cu_seqlens_of(lengths, "cpu"), 9]
    o = native.attention(q, k, v, *args, **options)
    expected = reference.attention(q.double(), k.double(), v.double(), *args, **options)
    torch.testing.assert_close(o.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.cpp
def test_compiled_attention_is_the_same():
    lengths = [5, 40, 3]
    q, k, v = (t.float() for t in random_qkv(lengths))
    args = [cu_seqlens_of(lengths, "cpu"), 40]
    compiled = torch.compile(native.attention, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(q, k, v, *args), native.attention(q, k, v, *args))


# ---- add + LayerNorm -----------------------------------------------------------------------------------------


@pytest.mark.cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 384, 1024])
def test_add_layer_norm(dtype, width):
    """Also for rows far from zero, whose variance is that of what remains after subtracting the mean."""
    x, residual = torch.randn(2, 7, 3, width, dtype=torch.float64)
    residual += 5.0
    weight, bias = torch.randn(2, width, dtype=torch.float64)
    low = [t.to(dtype) for t in (x, residual, weight, bias)]
    assert cpp.takes_add_layer_norm(*low)
    exact = reference.add_layer_norm(*(t.double() for t in low), 1e-12)
    assert_within_budget(native.add_layer_norm(*low, 1e-12), reference.add_layer_norm(*low, 1e-12), exact, "y")


@pytest.mark.cpp
def test_add_layer_norm_that_goes_to_torch():
    x, residual = torch.randn(2, 5, 32)
    weight, bias = torch.randn(2, 32)
    for args in (
        (x, None, weight, bias),
        (x, residual, None, None),
        (x[:, ::2], residual[:, ::2], weight[::2], bias[::2]),
        (x[:, :24], residual[:, :24], weight[:24], bias[:24]),
        (x, residual[:1], weight, bias),
    ):
        assert not cpp.takes_add_layer_norm(*args)
        torch.testing.assert_close(native.add_layer_norm(*args), reference.add_layer_norm(*args))
    assert native.add_layer_norm(x.requires_grad_(), residual, weight, bias).requires_grad


@pytest.mark.parametrize("of_weights", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("op", ["add_layer_norm", "add_layer_norm_sum"])
@pytest.mark.parametrize("added", [False, True])
def test_gradients_over_many_rows_in_bfloat16(op, added, of_weights):
    """torch sums them in bfloat16 if x is bfloat16, also for the float32 weights that a model has under autocast: a
    sum of 4,096 ones was 256, and the LayerNorm of BERT's head for masked words learnt from a twentieth of its
    gradient."""
    x = torch.randn(4096, 32).bfloat16()
    weight, bias = (torch.full((32,), value, dtype=of_weights, requires_grad=True) for value in (1.0, 0.0))
    y = getattr(native, op)(x, torch.zeros_like(x) if added else None, weight, bias)
    y = y[0] if isinstance(y, tuple) else y
    assert y.dtype == torch.bfloat16
    y.backward(torch.ones_like(y))
    assert (bias.grad == 4096).all()
    exact = F.layer_norm(x.double(), (32,)).sum(0)
    torch.testing.assert_close(weight.grad.double(), exact, atol=0.5, rtol=0.01)


def test_gradients_of_one_embedding_in_bfloat16():
    """Every token of a batch has the same segment, so the gradient of that row is a sum over all tokens."""
    ids = torch.arange(4096) % 7
    tables = [torch.randn(size, 32) for size in (7, 2, 7)]
    low = [t.bfloat16().requires_grad_() for t in (*tables, torch.ones(32), torch.zeros(32))]
    word, segment, position, weight, bias = low
    dy = torch.randn(4096, 32).bfloat16() + 1
    native.embedding_layer_norm(ids, torch.zeros_like(ids), ids, word, position, segment, weight, bias).backward(dy)
    exact = [t.detach().double().requires_grad_() for t in low]
    word, segment, position, weight, bias = exact
    y = reference.embedding_layer_norm(ids, torch.zeros_like(ids), ids, word, position, segment, weight, bias)
    y.backward(dy.double())
    for name, ours, right in zip(("word", "segment", "position", "weight", "bias"), low, exact, strict=True):
        error = (ours.grad - right.grad).norm() / right.grad.norm()
        assert error < 0.02, (name, error)


# ---- products ------------------------------------------------------------------------------------------------


@pytest.mark.cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize(
    ("rows", "columns", "inner"),
    # weights as given, with groups of rows, and transposed: up to six rows; from one register of columns to more than a
    # panel of four
    [*itertools.product((1, 3, 4, 5, 17, 64), (4, 68), (32, 96)), (17, 32, 1056),
     (3, 68, 2080), (5, 36, 4128), (20, 100, 1056), (50, 4, 544),  # several parts of a row
     (9, 48, 1056), (12, 16, 32), (16, 144, 544), (28, 48, 96), (64, 32, 1056), (96, 48, 96),
     (145, 16, 32), (146, 64, 544), (147, 112, 96), (148, 208, 32), (149, 80, 1056), (150, 128, 544)],
)  # fmt: skip
def test_products(dtype, activation, rows, columns, inner):
    """Several draws for few rows, because the error of four numbers depends on chance."""
    draws = 1 + 16 // rows
    x, weight, bias = torch.randn(draws, rows, inner), torch.randn(columns, inner) / inner**0.5, torch.randn(columns)
    x, weight, bias = (t.double().to(dtype) for t in (x, weight, bias))
    for b in (bias, None):
        assert cpp.takes_linear(x, weight, b, activation)

        def plain(t, b=b):
            y = F.linear(t(x), t(weight), None if b is None else t(b))
            return F.gelu(y) if activation else y

        product = native.linear_act if activation else native.linear
        ours = torch.stack([product(of_draw, weight, b) for of_draw in x])
        assert_within_budget(ours, plain(lambda t: t), plain(torch.Tensor.double), "y")


@pytest.mark.cpp
@pytest.mark.parametrize(("rows", "fewer"), [(8, 1), (93, 32), (300, 151)])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_products_do_not_depend_on_other_rows_or_threads(rows, fewer, threads):
    """In each of the three products a row's bits do not depend on the number of threads or of rows. (From nine rows on,
    the product for few rows cuts a sum by their number.)"""
    x, weight, bias = torch.randn(rows, 544), torch.randn(144, 544), torch.randn(144)
    together, before = cpp.linear(x, weight, bias, "gelu"), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for n in range(0, rows - fewer + 1, 7):
            assert torch.equal(cpp.linear(x[n : n + fewer], weight, bias, "gelu"), together[n : n + fewer])
    finally:
        torch.set_num_threads(before)


@pytest.mark.cpp
def test_products_of_many_rows_with_few_columns():
    """The product for few rows computes them 64 at a time."""
    x, weight = torch.randn(130, 96), torch.randn(4, 96)
    assert torch.equal(cpp.linear(x, weight, None), torch.cat([cpp.linear(t, weight, None) for t in x.split(64)]))


@pytest.mark.cpp
@pytest.mark.parametrize("rows", [5, 150])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_side_by_side(dtype, rows, monkeypatch):
    """Equal to the separate products bit by bit, without making the joined weight."""
    monkeypatch.setattr(cpp, "multiplies", lambda dtype: True)
    layers = [torch.nn.Linear(64, n, bias=n != 32).to(dtype) for n in (16, 80, 32)]
    joined, x = JoinedLinears(), torch.randn(2, rows, 64).to(dtype)
    with torch.no_grad():
        y = joined(x, layers, impl="native")
        apart = [cpp.linear(x, layer.weight, layer.bias) for layer in layers]
    assert torch.equal(y, torch.cat(apart, -1))
    assert joined._weight_and_bias is None


@pytest.mark.cpp
def test_products_that_cannot_run_side_by_side():
    x, weights = torch.randn(5, 64), [torch.nn.Parameter(torch.randn(32, 64)) for _ in range(2)]
    with torch.no_grad():
        assert native.linears(x, weights, [None, None]).shape == (5, 64)
        assert native.linears(x, [weights[0], weights[1].double()], [None, None]) is None
    assert native.linears(x, weights, [None, None]).requires_grad


@pytest.mark.cpp
def test_subclasses_of_tensors_go_to_torch():
    class Half(torch.Tensor):
        """Reports a larger size than its memory has, as a tensor that is spread over machines does."""

    weight = torch.randn(32, 64).as_subclass(Half)
    assert not cpp.takes_linear(torch.randn(4, 64), weight, None)
    assert cpp.takes_linear(torch.randn(4, 64), weight.as_subclass(torch.Tensor), None)


@pytest.mark.cpp
def test_products_within_batch_invariant(monkeypatch):
    """A row has the same bits among any rows. Other widths, and CPUs without this product, use blocks of torch's."""
    monkeypatch.setattr(cpp, "multiplies", lambda dtype: True)
    x, weight, bias = torch.randn(200, 96), torch.randn(64, 96), torch.randn(64)
    with fastbert.batch_invariant():
        assert cpp.takes_linear(x, weight, bias)
        assert not cpp.takes_linear(x, weight[:60], bias[:60])
        for columns in (64, 60):
            given = weight[:columns], bias[:columns]
            together = native.linear_act(x, *given)
            for n in (1, 5, 150):
                assert torch.equal(native.linear_act(x[:n], *given), together[:n])
        monkeypatch.setattr(cpp, "multiplies", lambda dtype: False)
        assert not cpp.takes_linear(x[:5], weight, bias)


@pytest.mark.cpp
@pytest.mark.parametrize("rows", [5, 150])
def test_nan_stays_in_its_row(rows):
    x, weight = torch.randn(rows, 64), torch.randn(80, 64)
    x[3, 60] = torch.nan
    y = cpp.linear(x, weight, None, "gelu")
    assert y[3].isnan().all()
    y[3] = 0.0
    assert y.isfinite().all()


@pytest.mark.cpp
def test_which_products_the_cpp_takes(linear, monkeypatch):
    """None with gradients, of odd widths or with other activations. There is a limit of rows where the vendor library
    has faster instructions or the width is no multiple of 16, and a lower one if the weight is laid out."""
    x, weight = torch.randn(17, 48), linear.weight.detach()
    assert cpp.takes_linear(x, weight, None)
    assert not cpp.takes_linear(x, weight, None, laid_out=True)
    assert cpp.takes_linear(x[:16], weight, None, laid_out=True)
    assert not cpp.takes_linear(torch.randn(65, 48), weight, None)
    monkeypatch.setattr(cpp, "multiplies", lambda dtype: True)
    for rows in (x, torch.randn(65, 48)):
        assert cpp.takes_linear(rows, weight, None, laid_out=True)
    assert cpp.takes_linear(x, weight[:28], None)
    assert not cpp.takes_linear(torch.randn(65, 48), weight[:28], None)
    assert not cpp.takes_linear(x, linear.weight, linear.bias)
    assert not cpp.takes_linear(x, weight, None, "silu")
    assert not cpp.takes_linear(x, weight[:31], None)
    assert not cpp.takes_linear(x[:, :40], weight[:, :40].contiguous(), None)
    assert not cpp.takes_linear(x[0:0], weight, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert not cpp.takes_linear(x, weight, None)


# ---- weights laid out beforehand -----------------------------------------------------------------------------


@pytest.fixture
def linear(monkeypatch):
    """As on a CPU where the vendor library has instructions that the operators lack: weights are laid out for it."""
    monkeypatch.setattr(cpp, "multiplies", lambda dtype: False)
    return fastbert.prepack(torch.nn.Linear(48, 32))


def used(linear, x):
    """The product without gradients."""
    with torch.no_grad():
        return fastbert.functional.linear(x, linear.weight, linear.bias, impl="native")


def is_packed(linear):
    with torch.no_grad():
        return layouts.find(torch.zeros(1, 48, dtype=linear.weight.dtype), linear.weight, linear.bias) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "relu", "silu"])
def test_products_with_packed_weights(linear, dtype, activation):
    linear.to(dtype)
    x = torch.randn(7, 3, 48, dtype=torch.float64)
    used(linear, x.to(dtype))
    assert is_packed(linear)

    def product(x, weight, bias):
        y = F.linear(x, weight, bias)
        return y if activation is None else reference.activate(y, activation)

    with torch.no_grad():
        args = (x.to(dtype), linear.weight, linear.bias)
        ours = native.linear(*args) if activation is None else native.linear_act(*args, activation)
        assert_within_budget(ours, product(*args), product(*(t.double() for t in args)), "y")


def test_every_use_gives_the_same_bits(linear):
    x = torch.randn(20, 48)
    assert torch.equal(used(linear, x), used(linear, x))


@pytest.mark.parametrize("change", ["in place", "load_state_dict", "data", "through data", "dtype", "optimizer"])
def test_changed_weights_are_noticed(linear, change):
    x = torch.randn(20, 48)
    used(linear, x)
    assert is_packed(linear)
    if change == "in place":
        with torch.no_grad():
            linear.weight.mul_(2.0)
    elif change == "load_state_dict":
        linear.load_state_dict(torch.nn.Linear(48, 32).state_dict())
    elif change == "data":
        linear.weight.data = torch.randn(32, 48)
    elif change == "through data":  # torch does not count such changes; averaged weights are often copied like this
        linear.weight.data.copy_(torch.randn(32, 48))
    elif change == "dtype":
        linear.to(torch.bfloat16)
        x = x.bfloat16()
    else:
        optimizer = torch.optim.SGD(linear.parameters(), lr=1.0)
        linear(x).sum().backward()
        optimizer.step()
    torch.testing.assert_close(used(linear, x), F.linear(x, linear.weight, linear.bias))


def test_gradients_and_autocast_use_the_weight_itself(linear):
    x = torch.randn(20, 48)
    used(linear, x)
    y = fastbert.functional.linear(x, linear.weight, linear.bias, impl="native")
    y.sum().backward()
    assert linear.weight.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert used(linear, x).dtype == torch.bfloat16


def test_copies_and_files_hold_plain_weights(linear):
    used(linear, torch.randn(20, 48))
    twin = copy.deepcopy(linear)
    assert not is_packed(twin)
    buffer = io.BytesIO()
    torch.save(linear, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False).weight, linear.weight)


def test_packed_weights_are_freed_with_their_model():
    gc.collect()  # frees what earlier tests left
    before = len(layouts._marked)
    linear = fastbert.prepack(torch.nn.Linear(48, 32))
    used(linear, torch.randn(20, 48))
    assert len(layouts._marked) == before + 1
    del linear
    gc.collect()
    assert len(layouts._marked) == before


def test_batch_invariant_products_do_not_use_packed_weights(linear):
    used(linear, torch.randn(20, 48))
    x = torch.randn(200, 48)
    with fastbert.batch_invariant():
        assert torch.equal(used(linear, x)[:3], used(linear, x[:3]))


def test_a_maximum_of_zero_passes_its_whole_gradient_on():
    """Pooling started from zeros. torch's scatter_reduce leaves them out of the maximum, but counts them among its
    ties: after a ReLU a quarter of the gradient of three tokens was lost."""
    x = torch.tensor([-1.0, -2.0, -3.0, 0.0, 2.0]).relu()[:, None].expand(5, 16).clone().requires_grad_()
    y = native.pool(x, cu_seqlens_of([3, 0, 2]), "max", False)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, torch.tensor([0.0, 0.0, 2.0])[:, None].expand(3, 16))
    torch.testing.assert_close(dx[:, 0], torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0, 1.0]))
