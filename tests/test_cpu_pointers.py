"""The C++ operators never access memory past the end of a tensor: each entry itself refuses what does not fit."""

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastbert.functional import LayerOptions, LayerWeights
from fastbert.kernels.cpu import attention as cpu_attention
from fastbert.kernels.cpu import embedding, encoder_layer, int8, loss, pointers
from fastbert.kernels.cpu import operators as cpp

pytestmark = pytest.mark.cpp

T, H, D, C, V = 32, 2, 16, 32, 48


def floats(*shape: int) -> Tensor:
    return torch.randn(shape)


def starts() -> Tensor:
    return torch.tensor([0, 5, T], dtype=torch.int32)


def one_each() -> Tensor:
    return torch.tensor([0, 1, 2], dtype=torch.int32)


def ids(high: int, count: int = T) -> Tensor:
    return torch.arange(count) % high


def three_norms(*args):
    return cpp.embedding_layer_norm(args[:3], args[3:], 1e-5)


def in_8_bits(x):
    if not int8.is_in_cpp():
        pytest.skip("no AVX512-VNNI")
    with torch.no_grad():
        return int8.Int8Weight(torch.randn(2 * C, C))._by_vnni(x, None)


def one_layer_in_8_bits(x, starts, *norms):
    """`int8.encoder_layers` may also refuse, by leaving a call to the separate layers."""
    if not int8.is_in_cpp():
        pytest.skip("no AVX512-VNNI")
    shapes = [(C, C)] * 4 + [(2 * C, C), (C, 2 * C)]
    layer = int8.Int8Layer(*(int8.Int8Weight(torch.randn(shape)) for shape in shapes), norms, 2)
    with torch.no_grad():
        y = int8.encoder_layers(x, [layer], LayerOptions(2, "gelu", 1e-5, 1e-5), starts)
    if y is None:
        raise ValueError("left to the layers")


def one_layer(x, starts, *layer):
    with torch.no_grad():
        y = cpp.encoder_layers(x, list(layer), LayerOptions(H, out_eps=1e-5, down_eps=1e-5), starts)
    if y is None:
        raise ValueError("the layers have to be gone through one by one")
    return y


LAYER = encoder_layer.layer_shapes(C, C, 2 * C)
LAYER_OPTIONS = LayerOptions(H, probs_p=0.1, out_p=0.1, down_p=0.1, fold=True)


def trained_layer(x, starts, sequences, rows, *weights):
    names = encoder_layer.Names(starts, sequences, rows)
    (y,), (saved,) = encoder_layer.forward(x, [LayerWeights(*weights)], names, [LAYER_OPTIONS], 1, torch.float32)
    return y, saved


def trained_layer_backward(dy, x, starts, sequences, rows, saved, *weights):
    names, wanted = encoder_layer.Names(starts, sequences, rows), [True] * 17
    return encoder_layer.backward(
        dy, [x], [LayerWeights(*weights)], [saved], names, [LAYER_OPTIONS], 1, torch.float32, wanted
    )  # fmt: skip


def of_trained_layer() -> list[Tensor]:
    return [floats(T, C), starts(), ids(2, 2), ids(T), *(floats(*shape) for shape in LAYER)]


def of_trained_layer_backward() -> list[Tensor]:
    given = of_trained_layer()
    return [floats(T, C), *given[:4], trained_layer(*given)[1], *given[4:]]


# entry -> (function of its tensors, the tensors); all others of its arguments are in the function
ENTRIES = {
    "attention": (
        lambda q, k, v, starts, stats: cpu_attention.attention(q, k, v, starts, None, None, stats),
        lambda: [*(floats(T, H, D) for _ in range(3)), starts(), floats(2, H, T)],
    ),
    "attention_with_dropout": (
        lambda q, k, v, starts, names: cpu_attention.attention(
            q, k, v, starts, None, cpu_attention.Dropout(0.1, torch.tensor([1]), names)
        ),
        lambda: [*(floats(T, H, D) for _ in range(3)), starts(), ids(2, 2)],
    ),
    "attention_backward": (
        lambda *t: cpu_attention.attention_backward(*t, None),
        lambda: [*(floats(T, H, D) for _ in range(5)), floats(2, H, T), starts()],
    ),
    "attention_with_other_keys": (
        lambda q, k, v, starts, of_keys: cpu_attention.attention(q, k, v, starts, None, cu_seqlens_k=of_keys),
        lambda: [
            floats(2, H, D),
            floats(T, H, D),
            floats(T, H, D),
            torch.tensor([0, 1, 2], dtype=torch.int32),
            starts(),
        ],
    ),
    "add_layer_norm": (
        lambda *t: cpp.add_layer_norm(*t, 1e-5),
        lambda: [floats(T, C), floats(T, C), floats(C), floats(C)],
    ),
    "add_layer_norm_with_dropout": (
        lambda *t: cpp.add_layer_norm(*t[:4], 1e-5, t[4], 0.1),
        lambda: [floats(T, C), floats(T, C), floats(C), floats(C), ids(T)],
    ),
    "add_layer_norm_backward": (
        lambda *t: cpp.add_layer_norm_backward(*t[:4], 1e-5, t[4], 0.1),
        lambda: [floats(T, C), floats(T, C), floats(T, C), floats(C), ids(T)],
    ),
    "add_layer_norm_with_a_bias_of_x": (
        lambda x, residual, w, b, x_bias: cpp.add_layer_norm(x, residual, w, b, 1e-5, x_bias=x_bias),
        lambda: [floats(T, C), floats(T, C), floats(C), floats(C), floats(C)],
    ),
    "embedding_for_training": (
        lambda *t: embedding.forward(t[:3], t[3:8], 1e-5, t[8], 0.1),
        lambda: [ids(9), ids(2), ids(7), floats(9, C), floats(2, C), floats(7, C), floats(C), floats(C), ids(T)],
    ),
    "embedding_backward": (
        lambda *t: embedding.backward(t[0], t[1:4], t[4:8], 1e-5, None, t[8], 0.1, (True,) * 3),
        lambda: [
            floats(T, C),
            ids(9),
            ids(2),
            ids(7),
            floats(9, C),
            floats(2, C),
            floats(7, C),
            floats(C),
            ids(T),
        ],
    ),
    "linear": (lambda *t: cpp.linear(*t, "gelu"), lambda: [floats(T, C), floats(V, C), floats(V)]),
    "linears": (
        lambda x, w, b, w2, b2: cpp.linears(x, [w, w2], [b, b2]),
        lambda: [floats(T, C), floats(V, C), floats(V), floats(C, C), floats(C)],
    ),
    "embedding_layer_norm": (
        three_norms,
        lambda: [ids(9), ids(2), ids(7), floats(9, C), floats(2, C), floats(7, C), floats(C), floats(C)],
    ),
    "mean_of_sequences": (cpp.mean_of_sequences, lambda: [floats(T, C), starts()]),
    "encoder_layers": (
        one_layer,
        lambda: [floats(T, C), starts(), *(floats(*shape) for shape in cpp.layer_shapes(C, 2 * C))],
    ),
    "encoder_layer_in_training": (trained_layer, of_trained_layer),
    "encoder_layer_backward": (trained_layer_backward, of_trained_layer_backward),
    "int8_linear": (in_8_bits, lambda: [floats(T, C)]),
    "int8_layers": (one_layer_in_8_bits, lambda: [floats(T, C), starts(), *(floats(C) for _ in range(4))]),
    "sum_logits": (
        lambda *t: loss.sum_logits(*t, 0),
        lambda: [floats(V, T), floats(V), ids(V).int(), *(floats(T) for _ in range(4))],
    ),
    "logit_gradients": (
        lambda *t: loss.logit_gradients(*t, 0, 0.1, V),
        lambda: [floats(V, T), floats(V), ids(V).int(), *(floats(T) for _ in range(3)), floats(V, T), floats(V)],
    ),
}


class Owned(Tensor):
    """A tensor whose memory may be anything."""


# what is done to one tensor
SPOILERS = {
    "another_dtype": lambda t: t.to(torch.int16 if t.is_floating_point() else torch.float64),
    "a_wider_dtype": lambda t: t.double() if t.is_floating_point() else t.to(torch.int8),
    "on_meta": lambda t: t.to("meta"),
    "a_subclass": lambda t: t.as_subclass(Owned),
    "no_tensor": lambda t: t.tolist(),
    "every_other_column": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "a_row_short": lambda t: t[:-1],
    "without_rows": lambda t: t[:0],
    "a_column_short": lambda t: t[..., :-1].contiguous(),
}


def is_refused(function, given) -> bool:
    try:
        function(*given)
    except (ValueError, TypeError, AttributeError):
        return True
    return False


# (entry, index of the tensor, spoiler) that is allowed: the entry copies the tensor, or the number of rows is free
FIT_TOO = {
    ("attention_backward", 0, "every_other_column"),
    ("add_layer_norm_backward", 0, "every_other_column"),
    *(("attention_with_dropout", 4, spoiler) for spoiler in SPOILERS if not spoiler.endswith("short")),
    *(
        (name, place, fewer)
        for name, places in {
            **dict.fromkeys(("linear", "linears", "int8_linear", "sum_logits"), (0,)),
            **dict.fromkeys(("embedding_layer_norm", "embedding_for_training"), (3, 4, 5)),
            "embedding_backward": (4, 5, 6),
        }.items()
        for place in places
        for fewer in ("a_row_short", "without_rows")
    ),
    ("embedding_backward", 0, "every_other_column"),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_take_what_fits(name):
    function, tensors = ENTRIES[name]
    function(*tensors())


@pytest.mark.parametrize("spoiler", SPOILERS)
@pytest.mark.parametrize("name", ENTRIES)
def test_entries_refuse_what_does_not_fit(name, spoiler):
    """A buffer made under `set_default_dtype(torch.float16)` was half as long as the library assumed, and the heap was
    overwritten without an error."""
    function, tensors = ENTRIES[name]
    for place in range(len(tensors())):
        if (name, place, spoiler) in FIT_TOO:
            continue
        given = tensors()
        given[place] = SPOILERS[spoiler](given[place])
        assert is_refused(function, given), f"tensor {place} was taken"


@pytest.mark.parametrize(
    "name", [n for n in ENTRIES if "attention" in n or ("layer" in n and "norm" not in n) or "mean" in n]
)
def test_starts_have_one_dimension(name):
    """cu_seqlens of shape [1, B + 1] was read as if it were [B + 1]."""
    function, tensors = ENTRIES[name]
    places = [n for n, t in enumerate(tensors()) if t.dtype == torch.int32]
    assert places
    for place in places:
        given = tensors()
        given[place] = given[place][None]
        with pytest.raises(ValueError, match=r"\[B \+ 1\]"):
            function(*given)


@pytest.mark.parametrize("name", ["encoder_layers", "int8_layers"])
def test_layers_take_rows_of_tokens(name):
    """For x of shape [1, T, C] ctypes got one size too many: ctypes.ArgumentError, which no caller catches."""
    function, tensors = ENTRIES[name]
    x, *rest = tensors()
    for wrong in (x[None], x.flatten()):
        with pytest.raises(ValueError, match=r"x must be \[T, C\], got shape"):
            function(wrong, *rest)


def test_arguments_that_are_no_numbers_are_refused():
    with pytest.raises(TypeError, match="add_layer_norm: argument"):
        cpp.add_layer_norm(floats(T, C), floats(T, C), floats(C), floats(C), "1e-5")


@pytest.mark.parametrize("sizes", [{"heads": 3}, {"head_dim": 12}, {"scale": -1.0}, {"scale": float("nan")}])
def test_attention_refuses_sizes(sizes):
    heads, head_dim = sizes.get("heads", 2), sizes.get("head_dim", 16)
    q, k = floats(T, heads, head_dim), floats(T, 2, head_dim)
    with pytest.raises(ValueError, match="attention: "):
        cpu_attention.attention(q, k, k, starts(), sizes.get("scale"))


@pytest.mark.parametrize("width", [0, 8, 24])
def test_rows_are_whole_registers(width):
    x = floats(4, width)
    with pytest.raises(ValueError, match="must be a multiple of 16"):
        cpp.add_layer_norm(x, x, floats(width), floats(width), 1e-5)
    with pytest.raises(ValueError, match="must be a multiple of"):
        cpp.linear(x, floats(6, width), None)


def test_only_one_module_passes_addresses():
    """A tensor that is passed in another way is unchecked."""
    folder = Path(pointers.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        tree = ast.parse(path.read_text())
        asks = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "data_ptr"]
        # layouts.py compares addresses to see whether a weight has moved, and calls nothing of the library
        assert path.name in ("pointers.py", "layouts.py") or not asks, path
