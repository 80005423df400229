"""The kernels whose config can be tuned, a row for each: attention, matrix products, row-wise kernels, loss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..harness import costs
from .tunables import Config, Job, Kernel, Shape, operator_job, place, written

# ---- attention -------------------------------------------------------------------------------------------


def _attention(direction: str, batch: tuple[int, int], grid: Mapping[str, Sequence[Any]], **more: Any) -> Kernel:
    def put(original: Callable, config: Config) -> Callable:
        def attention_config(head_dim, dtype, arch, asked, traits=frozenset()):
            return config if asked == direction else original(head_dim, dtype, arch, asked, traits)

        return attention_config

    def current(shape: Shape) -> Config:
        from fastbert.kernels._attention_config import attention_config

        traits = frozenset({"dropout"} if shape.dropout else ())
        return attention_config(shape.model.head_dim, shape.dtype, shape.arch, direction, traits)

    backward = direction.startswith("bwd")

    def start(shape: Shape) -> Config:
        from fastbert.kernels._attention_config import SHORT, TILE, AttentionConfig

        return AttentionConfig(SHORT, TILE if direction.endswith("tile") else SHORT, num_warps=8, num_stages=1)

    def allowed(config: Config, shape: Shape) -> bool:
        # only NVIDIA's compiler accepts a limit of registers, a multiple of 8 up to the most that a lane can have
        most = 255 if config.num_warps <= 8 else 128
        return config.max_registers is None or (shape.arch.startswith("sm_") and config.max_registers <= most)

    def rung(config: Config, shape: Shape) -> str:
        return f'if direction == "{direction}" and head_dim <= {shape.model.head_dim}:\n    return {written(config)}'

    return Kernel(
        f"attention_{direction}", {"_attention_launch:attention_config": put}, current, grid,
        lambda shape: operator_job(
            "attention", costs.BACKWARD if backward else costs.FORWARD, shape, dropout_p=shape.dropout
        ),
        batch, rung, allowed, launches=(f"_attention_{direction}_kernel",), start=start, **more,
    )  # fmt: skip


_TILES = {
    "block_m": (32, 64, 128), "block_n": (16, 32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3, 4),
    "max_registers": (None, 128, 168),
}  # fmt: skip
_WHOLE_KEYS = {
    "block_m": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3), "max_registers": (None, 128, 168),
}  # fmt: skip
_ONE_BLOCK = {"num_warps": (2, 4, 8), "num_stages": (1, 2)}


# ---- matrix products -------------------------------------------------------------------------------------


# the names of `_gemm_config.FORMS`, the most valuable first
FORMS_BY_WORTH = ("nt+act only", "nt+act", "nn+dact", "nt", "nn", "tn", "tn+accumulate", "nt+geglu", "nn+dgeglu")


def _gelu_gradient(h: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = h.detach().requires_grad_()
        return torch.autograd.grad(torch.nn.functional.gelu(leaf).sum(), leaf)[0]


def _plain(form: str, a: Tensor, b: Tensor, c: Tensor) -> list[Tensor]:
    """A form's results from plain torch, in the operands' dtype. c: the bias, or in a backward the pre-activation."""
    gelu = torch.nn.functional.gelu
    if form in ("nt", "nn", "tn"):
        return [a @ b.T + c if form == "nt" else a @ b if form == "nn" else a.T @ b]
    if form == "tn+accumulate":
        return [a.T @ b]
    if form.startswith("nt+act"):
        return [gelu(a @ b.T + c, approximate="tanh" if form.endswith("only") else "none")]
    if form == "nt+geglu":
        left, right = (a @ b.T + c).chunk(2, dim=-1)
        return [gelu(left) * right]
    g = a @ b
    if form == "nn+dact":
        dh = g * _gelu_gradient(c)
        return [dh, gelu(c), dh.sum(0)]
    left, right = c.chunk(2, dim=-1)
    dh = torch.cat((g * right * _gelu_gradient(left), g * gelu(left)), dim=-1)
    return [dh, gelu(left) * right, dh.sum(0)]


def _ours(form: str, a: Tensor, b: Tensor, c: Tensor) -> list[Tensor]:
    """A form's results from our launchers, which choose a config."""
    from fastbert.kernels import _gemm, feed_forward

    if form in ("nt", "nn", "tn"):
        return [_gemm.matmul(a, b, c if form == "nt" else None, layout=form)]
    if form == "tn+accumulate":
        total = torch.empty(a.shape[1], b.shape[1], device=a.device)
        _gemm.accumulate_tn(total, a, b, first=True)
        return [total]
    activation = "geglu" if form.endswith("geglu") else "gelu_tanh" if form.endswith("only") else "gelu"
    if form.startswith("nt"):
        return [feed_forward.up_projection(a, b, c, activation, False, False, form.endswith("only"))[0]]
    return list(feed_forward.down_backward(a, b, c, activation, True, True, False))


def gemm_job(form: str, shape: Shape) -> Job:
    (n, k), m, halves = gemm_sizes(form, shape), shape.workload.tokens, 2 if form.endswith("geglu") else 1
    generator = torch.Generator().manual_seed(0)

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, generator=generator)).to(shape.device, shape.dtype)

    layout = form[:2]
    a = random(m, -(-k // 64) * 64)[:, :k]  # row strides are multiples of 128 bytes, as in the loss
    b = random(m, n) if layout == "tn" else random(*((halves * n, k) if layout == "nt" else (k, n)), scale=k**-0.5)
    c = random(m, halves * n) if form.startswith("nn+") else random(halves * n, scale=0.1)
    operands = (a, b, c)
    flops = 2.0 * m * n * k * (halves if layout == "nt" else 1)
    moved = sum(t.nbytes for t in operands) + shape.dtype.itemsize * (k * n if layout == "tn" else m * n)
    return Job(
        lambda: _ours(form, *operands), lambda: _plain(form, *(t.double() for t in operands)),
        lambda: _plain(form, *operands), costs.Work(flops, moved), {"m": m, "n": n, "k": k},
    )  # fmt: skip


def gemm_sizes(form: str, shape: Shape) -> tuple[int, int]:
    """n, k in the meaning of `_gemm_config.CHOICES`: as given by the user, or of one of the model's products."""
    if shape.nk is not None:
        return shape.nk
    c, f, v = shape.model.hidden, shape.model.intermediate, shape.model.vocab
    known = {"nt": (3 * c, c), "nn": (c, 3 * c), "tn": (c, 3 * c), "tn+accumulate": (c, v)}
    return known.get(form, (f, c))


def _gemm(form: str) -> Kernel:
    layout, _, epilogue = form.partition("+")

    def put(original: Callable, config: Config) -> Callable:
        def gemm_config(n, k, dtype, arch, asked="nt", asked_epilogue="none", *rest):
            if (asked, asked_epilogue) == (layout, epilogue or "none"):
                return config
            return original(n, k, dtype, arch, asked, asked_epilogue, *rest)

        return gemm_config

    def current(shape: Shape) -> Config:
        from fastbert.kernels._gemm_config import gemm_config

        return gemm_config(*gemm_sizes(form, shape), shape.dtype, shape.arch, layout, epilogue or "none")

    def allowed(config: Config, shape: Shape) -> bool:
        accumulators = config.block_m * config.block_n * (2 if form == "nt+geglu" else 1)
        has_bulk = any(rung[-1].bulk for rungs in ladder_of(shape.arch).values() for rung in rungs)
        # The accumulator must fit 128 registers a lane of eight warps; exact float32 products have no bulk copies; one
        # loop over all tiles of a program requires a persistent grid.
        return (
            accumulators <= 2**15
            and not (config.bulk and (shape.dtype == torch.float32 or not has_bulk))
            and not (config.flatten and not config.programs_per_sm)
        )

    def rung(config: Config, shape: Shape) -> str:
        n, k = gemm_sizes(form, shape)
        return f"({n}, {k}, {written(config)}),"

    from fastbert.kernels._gemm_config import VENDOR, VENDOR_EPILOGUE, ladder_of, own_config

    return Kernel(
        f"gemm:{form}", {"_gemm:gemm_config": put, "feed_forward:gemm_config": put}, current,
        {
            "block_m": (64, 128, 256), "block_n": (64, 128, 256), "block_k": (32, 64, 128), "num_warps": (4, 8),
            "num_stages": (2, 3, 4, 5), "slice_n": (16, 32, 64), "bulk": (False, True), "flatten": (False, True),
            "programs_per_sm": (0, 1, 2), "group_m": (4, 8, 16),
        },
        functools.partial(gemm_job, form), (32, 512), rung, allowed,
        (VENDOR_EPILOGUE if form == "nt+act only" else VENDOR,),
        ("_dact_kernel" if epilogue.startswith("d") else "_linear_act_kernel",),
        start=lambda shape: own_config(*gemm_sizes(form, shape), shape.dtype, shape.arch, epilogue or "none"),
    )  # fmt: skip


# ---- row-wise kernels ------------------------------------------------------------------------------------


def _of_width(
    name: str, seam: str, grid: Mapping[str, Sequence[Any]], op: str, directions: str, launches: str, **more: Any
) -> Kernel:
    """A kernel whose config depends on the number of columns."""

    def current(shape: Shape) -> Config:
        module, function = place(seam)
        return getattr(module, function)(shape.model.hidden)

    return Kernel(
        name, {seam: lambda _, config: lambda n_cols: config}, current, grid,
        lambda shape: operator_job(op, directions, shape), (32, 512),
        lambda config, shape: f"if n_cols <= {shape.model.hidden}:\n    return {written(config)}",
        launches=launches.split(), **more,
    )  # fmt: skip


@dataclass(frozen=True)
class LossConfig:
    """The two constants of `cross_entropy`."""

    block_v: int
    num_warps: int


def _loss_now(shape: Shape) -> LossConfig:
    from fastbert.kernels import cross_entropy

    return LossConfig(cross_entropy.BLOCK_V, cross_entropy.NUM_WARPS)


_WARPS = (1, 2, 4, 8, 16)
_whole_chunks = lambda config, shape: config.chunk % config.block_m == 0  # noqa: E731


@functools.cache
def kernels() -> dict[str, Kernel]:
    """All kernels by name. This is a function because it imports Triton."""
    norm = {"block_m": (1, 2, 4, 8, 16), "num_warps": _WARPS}
    found = [
        _attention("fwd", (64, 512), _TILES),
        _attention("bwd_dq", (64, 512), _TILES),
        _attention("bwd_dkv", (64, 512), _TILES),
        _attention("fwd_tile", (256, 128), _WHOLE_KEYS, others=(None,)),
        _attention("bwd_tile", (256, 128), _WHOLE_KEYS, others=(None,)),
        _attention("fwd_heads", (1024, 32), _ONE_BLOCK, others=(None,)),
        _attention("bwd_heads", (1024, 32), _ONE_BLOCK, others=(None,)),
        *(_gemm(form) for form in FORMS_BY_WORTH),
        _of_width(
            "layer_norm_fwd", "layer_norm:norm_fwd_config", norm, "add_layer_norm", costs.FORWARD,
            "_add_norm_fwd_kernel",
        ),
        _of_width(
            "layer_norm_bwd", "layer_norm:norm_bwd_config", {**norm, "programs_per_sm": (1, 2, 4, 8, 16)},
            "add_layer_norm", costs.BACKWARD, "_add_norm_bwd_kernel",
        ),
        _of_width(
            "embedding_fwd", "embedding:norm_fwd_config", norm, "embedding_layer_norm", costs.FORWARD,
            "_embedding_fwd_kernel",
        ),
        _of_width(
            "embedding_bwd", "embedding:embedding_bwd_config", {**norm, "programs_per_sm": (1, 2, 4, 8, 16)},
            "embedding_layer_norm", costs.BACKWARD, "_embedding_bwd_kernel",
        ),
        _of_width(
            "embedding_scatter", "_scatter:scatter_config",
            {"chunk": (32, 64, 128), "block_m": (2, 4, 8), "block_n": (128, 256, 512, 1024), "num_warps": (1, 2, 4)},
            "embedding_layer_norm", costs.BACKWARD, "_sum_chunks_kernel _sum_table_rows_kernel", allowed=_whole_chunks,
        ),
        _of_width(
            "pool_fwd", "pooling:pool_fwd_config",
            {"chunk": (64, 128, 256), "block_m": (16, 32, 64), "block_n": (64, 128, 256), "num_warps": (2, 4, 8)},
            "pool", costs.FORWARD, "_pool_chunks_kernel", allowed=_whole_chunks,
        ),
        _of_width(
            "pool_rows", "pooling:pool_row_config",
            {"chunk": (16, 32, 64), "block_m": (1, 2, 4, 8), "num_warps": _WARPS},
            "pool", costs.BACKWARD, "_pool_rows_kernel _pool_bwd_kernel", allowed=_whole_chunks,
        ),
        Kernel(
            "cross_entropy",
            {
                "cross_entropy:BLOCK_V": lambda _, config: config.block_v,
                "cross_entropy:NUM_WARPS": lambda _, config: config.num_warps,
            },
            _loss_now, {"block_v": (1024, 2048, 4096, 8192), "num_warps": (4, 8, 16)},
            # a narrow model, because at the usual width the products would take most of the time
            lambda shape: operator_job("linear_cross_entropy", costs.BOTH, shape), (32, 128),
            lambda config, shape: f"BLOCK_V, NUM_WARPS = {config.block_v}, {config.num_warps}", width=64,
            launches=("_cross_entropy_kernel",),
        ),
    ]  # fmt: skip
    return {kernel.name: kernel for kernel in found}


def named(names: str) -> list[Kernel]:
    """The kernels of a name such as "attention_fwd", a family such as "attention", several with commas, or "all"."""
    chosen = []
    for name in names.split(","):
        family = [k for k in kernels().values() if name == "all" or k.name.startswith((f"{name}_", f"{name}:"))]
        hits = [kernels()[name]] if name in kernels() else family
        if not hits:
            raise ValueError(f"no kernel {name!r}; there are {', '.join(kernels())}, their families, and all")
        chosen += [kernel for kernel in hits if kernel not in chosen]
    return chosen
