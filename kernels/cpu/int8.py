"""Products with 8-bit integer weights, for inference on a CPU with instructions for them (VNNI or AMX).

    W / factors = scales * Q                                  [N, K]       Q int8; scales [N, groups]: max |.| / 127
    z = x * factors                                           [M, K]       float32
    low = min z of a row, step = (max z of a group - low) / 255            [M], [M, groups], computed for every x
    q = round((z - low) / step)                               [M, K]       uint8
    y = sum over groups of step scales (q Q^T) + low sums + bias           [M, N]; q Q^T in int32, exact

`sums` [N] are the row sums of scales * Q. `factors` move outlier columns of x into the weight (SmoothQuant,
arXiv:2211.10438; `balance`). Every row of x has ranges of its own, so a text's vector does not depend on its batch. In
a whole layer the feed-forward block's activation is quantised from a least value that is known beforehand (int8.h).
There are three engines:

    C++         int8.h, with AVX512-VNNI: products, activations and whole layers; groups of up to GROUP elements
    oneDNN      torch's product for x86, with AMX, or with VNNI where there is no AVX-512; a row is one group
    plain torch everywhere else, when tracing, and with gradients: W from its integers, and x not quantised
"""

from __future__ import annotations

import platform
from array import array
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .._layer import LayerOptions
from . import operators as cpp
from .library import INT8_PANEL, NO_MEMORY, WIDTH
from .pointers import PLAIN, address, address_of_starts, addresses, strided_address

# Instructions that multiply 8-bit integers and accumulate in 32 bits, by their names in torch.cpu.get_capabilities.
INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "amx_int8")
LARGEST = 127
QUAD = 4  # adjacent elements of a weight's row that one instruction multiplies
GROUP = 128  # the most adjacent elements of a row that share a scale, or a step
WIDE_ROWS, WIDE_GROUP = (768,), 256  # rows of these sizes have longer groups: BERT-base's hidden width
TORCH_BLOCK = 256  # rows of one call of oneDNN's product, so that its intermediate results stay in the cache
SMALLEST = 1e-30  # the least scale; where max z - low of a group is less, all of its elements are quantised to 0
# SHARE: the exponent in `balance`; 0 leaves the differences between columns in x, 1 moves them into the weight.
# LEAST_COLUMN: this share of x's root mean square is added to each column's, so that nearly empty columns have
# nearly the same factor. Both were chosen on MiniLM (benchmarks/log/int8.md).
SHARE, LEAST_COLUMN = 0.35, 0.1
DAMPING = 0.3  # in `rounded`: this share of a block's mean square is added to the squares, as if z had that much noise


@cache
def why_not() -> str | None:
    """The reason why this machine cannot multiply in 8 bits; None where it can."""
    if not (hasattr(torch.ops.onednn, "qlinear_pointwise") and torch.backends.mkldnn.is_available()):
        return "this build of PyTorch has no oneDNN"
    if hasattr(torch.cpu, "get_capabilities"):
        there = any(torch.cpu.get_capabilities().get(name) for name in INSTRUCTIONS)
    else:
        there = torch.cpu._is_vnni_supported()
    if not there:
        return f"this CPU ({platform.machine()}) has neither VNNI nor AMX"
    if not is_in_cpp() and not _onednn_is_exact():
        return "oneDNN multiplies without VNNI and AMX, as ONEDNN_MAX_CPU_ISA can make it, and its sums overflow"
    return None


def _onednn_is_exact() -> bool:
    """Whether oneDNN accumulates in 32 bits, as VNNI and AMX do. With AVX2 alone it adds two products in 16 bits."""
    weight = torch.ops.onednn.qlinear_prepack(torch.full((16, 64), LARGEST, dtype=torch.int8, device="cpu"), None)
    q = torch.full((1, 64), 255, dtype=torch.uint8, device="cpu")
    scales = torch.ones(16, dtype=torch.float32, device="cpu")
    zeros = torch.zeros(16, dtype=torch.int64, device="cpu")
    y = torch.ops.onednn.qlinear_pointwise(
        q, 1.0, 0, weight, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return bool((y == 64 * 255 * LARGEST).all())


@cache
def is_in_cpp() -> bool:
    """Whether the C++ multiplies: it is installed and the CPU has AVX512-VNNI. With AMX, oneDNN multiplies."""
    return _has(torch.float32) and torch.cpu._is_vnni_supported() and not torch.cpu._is_amx_tile_supported()


@cache
def _has(dtype: torch.dtype) -> bool:
    """Whether this dtype's operators are the AVX-512 library's; only that library has 8-bit products."""
    return cpp.instructions(dtype) == "avx512" and cpp.load(dtype)[0] is not None


def engine() -> str:
    """Which engine multiplies on this machine, in words."""
    if is_in_cpp():
        return "C++ by AVX512-VNNI, a layer in one call"
    return "oneDNN" if why_not() is None else f"none: {why_not()}"


def group_of(inner: int) -> int:
    """How many elements of a row of `inner` elements, a multiple of 16, share a scale in C++."""
    most = min(inner, WIDE_GROUP if inner in WIDE_ROWS else GROUP)
    return next(group for group in range(most, 0, -1) if inner % group == 0 and group % WIDTH == 0)


def balance(mean_squares: Tensor, weight: Tensor) -> Tensor:
    """factors [K] for x, from the mean squares [K] of its columns and the weight [N, K] that multiplies it.

    A column's factor is rms(W) ** (1 - SHARE) / rms(x) ** SHARE, scaled so that the geometric mean of all is 1.
    """
    of_x = (mean_squares + LEAST_COLUMN**2 * mean_squares.mean()).clamp_min(SMALLEST).sqrt()
    squares = weight.float().square().mean(0)
    logs = (1 - SHARE) * squares.clamp_min(SMALLEST).sqrt().log() - SHARE * of_x.log()
    return (logs - logs.mean()).exp()


def rounded(weight: Tensor, moments: Tensor) -> Tensor:
    """Integers [N, K], float32, near the elements of weight [N, K], at most LARGEST.

    Within a block of columns, the error of an element's rounding is passed on to the elements after it, so that the
    error of the product with z is least (GPTQ, arXiv:2210.17323). moments [blocks, size, size]: the means of z z^T for
    the columns of z in each block.
    """
    blocks, size, _ = moments.shape
    means = moments.diagonal(dim1=1, dim2=2).mean(1).clamp_min(SMALLEST)
    identity = torch.eye(size, dtype=torch.float32, device="cpu")
    moments = moments + (DAMPING * means)[:, None, None] * identity
    finite = moments.isfinite().flatten(1).all(1)[:, None, None]
    moments = torch.where(finite, moments, identity)  # rounds to the nearest integers
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    shares = torch.linalg.cholesky(inverse, upper=True)
    shares = shares / shares.diagonal(dim1=1, dim2=2)[:, :, None]
    left = weight.T.reshape(blocks, size, -1).contiguous()  # [blocks, size, N]
    for first in range(0, size, WIDTH):
        part, of_part = left[:, first : first + WIDTH], shares[:, first : first + WIDTH]
        errors = torch.empty_like(part)
        for i in range(WIDTH):
            integer = part[:, i].round().clamp_(-LARGEST, LARGEST)
            torch.sub(part[:, i], integer, out=errors[:, i])
            part[:, i] = integer
            later = of_part[:, i, first + i + 1 : first + WIDTH, None]
            part[:, i + 1 :].addcmul_(later, errors[:, i, None], value=-1)
        left[:, first + WIDTH :].baddbmm_(of_part[:, :, first + WIDTH :].mT, errors, alpha=-1)
    return left.flatten(0, 1).T


def fits(weight: Tensor) -> bool:
    """Whether a weight [N, K] can be quantised: floating-point, on the CPU, both sizes multiples of WIDTH."""
    return (
        weight.is_cpu
        and weight.is_floating_point()
        and weight.numel() > 0
        and weight.shape[0] % WIDTH == 0
        and weight.shape[1] % WIDTH == 0
    )


class Int8Weight:
    """A weight [N, K] that `fits`, in 8 bits, with its bias [N] or None and the `factors` [K] of x, by default ones.
    The original weight is not kept, and the object never changes.

    group: how many adjacent elements of a row share a scale; None chooses the engine's most exact group. If the group
        is the whole row, every engine multiplies the same integers.
    moments: [K / size, size, size] float32, the means of x x^T for each `size` columns of typical inputs, a divisor of
        the group. The integers are then chosen for the least error of the product (`rounded`).

    Raises: ValueError where the weight does not fit, or weight or bias has no floating-point dtype or a wrong shape.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        factors: Tensor | None = None,
        group: int | None = None,
        moments: Tensor | None = None,
    ):
        if not weight.is_floating_point():
            raise ValueError(f"weight must be of floating-point numbers, got {weight.dtype}")
        if not fits(weight):
            raise ValueError(f"weight must be on the CPU, of multiples of {WIDTH}, got {(*weight.shape,)}")
        if bias is not None and not (bias.is_floating_point() and bias.shape == weight.shape[:1]):
            raise ValueError(
                f"bias must be {weight.shape[0]} floating-point numbers, got {(*bias.shape,)} of {bias.dtype}"
            )
        weight, (columns, inner) = weight.detach().float(), weight.shape
        factors = torch.ones(inner, dtype=torch.float32, device="cpu") if factors is None else factors
        weight = weight / factors
        group = group or (group_of(inner) if is_in_cpp() else inner)
        grouped = weight.unflatten(1, (-1, group))  # [N, groups, group]
        scales = grouped.abs().amax(2).clamp_min_(SMALLEST).div_(LARGEST)
        grouped = grouped / scales[:, :, None]
        if moments is None:
            integers = grouped.round_().flatten(1)
        else:
            by_block = factors.view(len(moments), -1)
            integers = rounded(grouped.flatten(1), moments * by_block[:, :, None] * by_block[:, None])
        integers = integers.to(torch.int8).contiguous()
        bias = torch.zeros(columns, dtype=torch.float32, device="cpu") if bias is None else bias.detach().float()
        self._lay_out(integers, scales, bias, factors)

    @classmethod
    def of_integers(
        cls, integers: Tensor, scales: Tensor, bias: Tensor | None = None, factors: Tensor | None = None
    ) -> Int8Weight:
        """From given integers [N, K] int8, N and K multiples of WIDTH, and scales [N, groups] float32."""
        columns, inner = integers.shape
        weight = cls.__new__(cls)
        if factors is None:
            factors = torch.ones(inner, dtype=torch.float32, device="cpu")
        bias = torch.zeros(columns, dtype=torch.float32, device="cpu") if bias is None else bias.detach().float()
        weight._lay_out(integers.contiguous(), scales, bias, factors)
        return weight

    def _lay_out(self, integers: Tensor, scales: Tensor, bias: Tensor, factors: Tensor) -> None:
        """Stores integers [N, K], scales [N, groups], bias [N] and factors [K] in the order that the engine reads.

        Raises: ValueError for a tensor that is not on the CPU. oneDNN would read arbitrary memory for a meta tensor.
        """
        for name, t in (("integers", integers), ("scales", scales), ("bias", bias), ("factors", factors)):
            if not t.is_cpu:
                raise ValueError(f"{name} must be on the CPU, got {t.device}")
        self.columns, self.inner = integers.shape
        self.group = self.inner // scales.shape[1]
        self.factors, self.bias = factors, bias
        grouped = integers.unflatten(1, (-1, self.group))
        self.sums = (grouped.sum(2) * scales).sum(1)
        self.in_cpp = is_in_cpp()
        if not self.in_cpp:
            self.scales = scales
            self.zeros = torch.zeros(self.columns, dtype=torch.int64, device="cpu")
            self.in_onednn = self.group == self.inner and why_not() is None
            self.blocked = torch.ops.onednn.qlinear_prepack(integers, None) if self.in_onednn else integers
            return
        raised = (torch.einsum("ngk,gk->ng", grouped.float(), factors.view(-1, self.group)) * scales).sum(1)
        missing = -self.columns % INT8_PANEL  # columns that fill up the last panel
        self.sums, self.bias, self.raised = (F.pad(t, (0, missing)) for t in (self.sums, bias, raised))
        scales = F.pad(scales, (0, 0, 0, missing)).unflatten(0, (-1, INT8_PANEL))
        self.scales = scales.transpose(1, 2).contiguous()  # [panels, groups, INT8_PANEL]
        quads = F.pad(integers, (0, 0, 0, missing)).view(-1, INT8_PANEL, self.inner // QUAD, QUAD)
        self.panels = quads.transpose(1, 2).contiguous()  # [panels, K / QUAD, INT8_PANEL, QUAD]
        padded = self.columns + missing
        self.fields = array(
            "Q",
            (
                address("panels", self.panels, torch.int8, padded * self.inner),
                address("scales", self.scales, torch.float32, padded * self.inner // self.group),
                address("sums", self.sums, torch.float32, padded),
                address("bias", self.bias, torch.float32, padded),
                address("factors", self.factors, torch.float32, self.inner),
                address("raised", self.raised, torch.float32, padded),
                self.group,
            ),
        )

    @property
    def integers(self) -> Tensor:
        """Q [N, K], int8."""
        if self.in_cpp:
            return self.panels.transpose(1, 2).reshape(-1, self.inner)[: self.columns]
        return _unpacked(self) if self.in_onednn else self.blocked

    @property
    def scales_of_groups(self) -> Tensor:
        """[N, groups]."""
        return self.scales.transpose(1, 2).flatten(0, 1)[: self.columns] if self.in_cpp else self.scales

    def weight(self) -> Tensor:
        """The weight that the integers stand for: [N, K] float32."""
        grouped = self.integers.unflatten(1, (-1, self.group)) * self.scales_of_groups[:, :, None]
        return grouped.flatten(1) * self.factors

    @property
    def nbytes(self) -> int:
        """Bytes of memory that this object holds."""
        held = (self.scales, self.bias, self.sums, self.factors, *([self.raised] if self.in_cpp else []))
        return self.columns * self.inner + sum(t.nbytes for t in held)

    def __getstate__(self) -> tuple[Tensor, ...]:
        """The pickled tensors, without the layout, because that depends on the machine."""
        return self.integers, self.scales_of_groups, self.bias[: self.columns], self.factors

    def __setstate__(self, state: tuple[Tensor, ...]) -> None:
        self._lay_out(*state)

    def linear(self, x: Tensor, activation: str | None = None) -> Tensor:
        """activation(x W^T + bias) [..., N] for x [..., K], in x's dtype; bias and activation in float32.

        Raises: ValueError where x has another width or no floating-point dtype.
        """
        if x.shape[-1] != self.inner:
            raise ValueError(f"x has rows of {x.shape[-1]} elements, the weight has {self.inner}")
        if not x.is_floating_point():
            raise ValueError(f"x must be of floating-point numbers, got {x.dtype}")
        if not cpp.runs_now(x) or torch.is_autocast_enabled("cpu") or x.numel() == 0 or cpp.want_gradients(x):
            return self._exact(x, activation)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if self.in_cpp and cpp.knows(rows) and _has(x.dtype) and activation in (None, *cpp.ACTIVATION_NUMBERS):
            y = self._by_vnni(rows, activation)
        elif self.in_cpp or not self.in_onednn:
            return self._exact(x, activation)
        else:
            parts = [self._by_onednn(part, activation) for part in rows.split(TORCH_BLOCK)]
            y = parts[0] if len(parts) == 1 else torch.cat(parts)
        return y.view(*x.shape[:-1], -1)

    def _exact(self, x: Tensor, activation: str | None) -> Tensor:
        y = F.linear(x, self.weight().to(x.dtype), self.bias[: self.columns].to(x.dtype))
        return y if activation is None else reference.activate(y, activation)

    def _by_vnni(self, x: Tensor, activation: str | None) -> Tensor:
        (rows, inner), dtype = x.shape, x.dtype
        y = torch.empty(rows, self.columns, dtype=dtype, device="cpu")
        failed = cpp.call(
            "int8_linear", dtype, address("x", x, dtype, rows * self.inner), self.fields.buffer_info()[0],
            strided_address("y", y, dtype, (rows, self.columns)), self.columns, rows, self.columns, inner,
            cpp.ACTIVATION_NUMBERS.get(activation, 0),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"int8_linear: no memory for {rows} rows of {inner} integers")
        return y

    def _by_onednn(self, x: Tensor, activation: str | None) -> Tensor:
        q, step, low = quantise_rows(x.float() * self.factors)
        y = torch.ops.onednn.qlinear_pointwise(
            q, 1.0, 0, self.blocked, self.scales[:, 0], self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        y = y.mul_(step).add_(low * self.sums).add_(self.bias)
        return (y if activation is None else reference.activate(y, activation)).to(x.dtype)


def _unpacked(weight: Int8Weight) -> Tensor:
    return weight.blocked.to_dense().T.contiguous()


# torch's compiler cannot trace oneDNN's layouts, so the graph breaks here. `torch.compiler.disable` sets this attribute
# too, but takes a second to import the compiler.
_unpacked._torchdynamo_disable = True


def quantise_rows(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z [M, K] float32 -> q [M, K] uint8, step and low [M, 1]; low is NaN for a row that is not finite."""
    low, most = z.aminmax(dim=1, keepdim=True)
    step = (most - low) / 255
    varies = most - low > SMALLEST
    q = ((z - low) * torch.where(varies, step.reciprocal(), 0.0)).round_().nan_to_num_(0.0, 0.0, 0.0).to(torch.uint8)
    return q, torch.where(varies, step, 0.0), low + (z * 0.0).sum(1, keepdim=True)


# ---- layers ----------------------------------------------------------------------------------------------

WEIGHTS = 6  # the first six fields of an `Int8Layer` are weights


class Int8Layer(NamedTuple):
    """A post-norm layer: 8-bit weights, and the weights and biases of its LayerNorms. Query, key and value share their
    factors. All heads together may be narrower than the layer, since heads can be pruned."""

    query: Int8Weight
    key: Int8Weight
    value: Int8Weight
    output: Int8Weight
    up: Int8Weight
    down: Int8Weight
    norms: tuple[Tensor, Tensor, Tensor, Tensor]
    heads: int


def fit_in_one_call(layer: Int8Layer) -> bool:
    """Whether the weights of this layer let `encoder_layers` compute it."""
    weights = query, *others, output, up, down = layer[:WEIGHTS]
    width, inside = query.inner, query.columns
    return (
        all(weight.in_cpp for weight in weights)
        and query.factors is layer.key.factors is layer.value.factors
        and all((weight.columns, weight.inner) == (inside, width) for weight in others)
        and (output.columns, output.inner) == (width, inside)
        and (up.inner, down.columns, up.columns) == (width, width, down.inner)
        and inside <= width
        and layer.heads > 0
        and inside % layer.heads == 0
    )


def encoder_layers(
    x: Tensor, layers: Sequence[Int8Layer], options: LayerOptions, cu_seqlens: Tensor
) -> Tensor | None:  # fmt: skip
    """The output [T, C] of a stack of layers that `fit_in_one_call`. They share one size, one head_dim and `options`,
    but not the number of heads; there is no dropout. None where the caller has to compute layer by layer: with
    gradients, or where the C++ does not support the dtype, a size or the activation.

    Raises: ValueError where x is not [T, C], or cu_seqlens does not cut T rows into sequences; MemoryError.
    """
    cpp.expect_tokens("int8_layers", x)
    (rows, width), dtype, inner = x.shape, x.dtype, layers[0].up.columns
    head_dim = layers[0].query.columns // layers[0].heads
    if not rows or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not (cpp.knows(x) and _has(dtype)):
        return None
    if options.activation not in cpp.ACTIVATION_NUMBERS or options.down_eps != options.out_eps:
        return None
    for layer in layers:
        if (layer.query.inner, layer.up.columns, layer.query.columns) != (width, inner, layer.heads * head_dim):
            return None
    if head_dim % WIDTH or width % (2 * WIDTH) or not x.is_contiguous():
        return None
    norms = addresses([t for layer in layers for t in layer.norms], dtype, [(width,)] * (4 * len(layers)))
    if norms is None or type(cu_seqlens) not in PLAIN:
        return None
    fields = array("Q")
    for number, layer in enumerate(layers):
        for weight in layer[:WEIGHTS]:
            fields.extend(weight.fields)
        fields.extend(norms[4 * number : 4 * number + 4])
        fields.append(layer.heads)
    y, work = x.clone(), torch.empty(4 * x.numel(), dtype=dtype, device="cpu")
    starts, sequences = address_of_starts("cu_seqlens", cu_seqlens)
    each = len(fields) // len(layers) * fields.itemsize
    step = cpp.layers_of_a_call(len(layers), x, inner)
    for number in range(0, len(layers), step):
        outcome = cpp.call(
            "int8_layers", dtype, address("x", y, dtype, rows * width), fields.buffer_info()[0] + number * each,
            min(step, len(layers) - number), starts, sequences, rows, width, inner, head_dim,
            cpp.ACTIVATION_NUMBERS[options.activation], options.out_eps, address("work", work, dtype, work.numel()),
        )  # fmt: skip
        if outcome == NO_MEMORY:
            raise MemoryError(f"int8_layers: no memory for {rows} rows of {inner} columns")
        if outcome:
            raise ValueError(f"int8_layers: cu_seqlens must rise from 0 to {rows}, got {cu_seqlens.tolist()}")
    return y
