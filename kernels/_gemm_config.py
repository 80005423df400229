"""Chooses for each matrix product between the vendor library and our kernel, and our kernel's tile.

Both choices depend on the model's shape, the dtype and the device, and not on the batch, so that the bits of a row do
not depend on the rest of its batch. The only exception, `FEW_ROWS`, is off under `batch_invariant()`. `CHOICES` is a
table that states the basis of every row:

    arch    "sm_90", "gfx942", ..., or "*": any
    dtype   "bf16", "fp16", "fp32", or "*"
    form    the product and what its epilogue does: see `FORMS`; or "*"
    n, k    the product's sizes that belong to the model: columns of the result, and the length of the sum; for "tn",
            whose sum runs over the batch, the rows of the result. 0: any
    by      "vendor" (the vendor library, then a pointwise kernel of ours for the epilogue), "vendor epilogue" (only
            the vendor library, with bias and activation in its own epilogue) or "ours" (our kernel)
    basis   "measured" or "reasoned"
    source  for a measured row the result file in this repository, for a reasoned one the reason

The first row that fits decides. `python -m benchmarks.tuning.tune` measures and prints rows for the top of the table.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from ._arch import hardware
from ._compile import TRITON_TYPES

# layout (see `_gemm`), then the epilogue
FORMS = {
    "nt": "x weight^T + bias: a linear layer; n, k of weight [n, k]",
    "nn": "dy weight: its input gradient; weight [k, n]",
    "tn": "dy^T x: its weight gradient [k, n]",
    "nt+act": "act(x weight^T + bias), and the pre-activation where a gradient follows; weight [n, k]",
    "nt+act only": "act(x weight^T + bias) in inference, with an activation of the vendor's epilogue; weight [n, k]",
    "nt+geglu": "gelu(first half) * second half of x weight^T + bias; weight [2n, k]",
    "nn+dact": "(dy weight) * act'(h), act(h) and column sums; weight [k, n]",
    "nn+dgeglu": "the backward pass of nt+geglu; weight [k, n]",
    "tn+accumulate": "total + dz^T hidden in float32; [k, n]",
}


@dataclass(frozen=True)
class Choice:
    """A row of the table; the columns are described above."""

    arch: str
    dtype: str
    form: str
    n: int
    k: int
    by: str
    basis: str
    source: str

    def fits(self, arch: str, dtype: str, form: str, n: int, k: int) -> bool:
        asked = (arch, dtype, form, n, k)
        return all(
            mine in ("*", 0, its)
            for mine, its in zip((self.arch, self.dtype, self.form, self.n, self.k), asked, strict=True)
        )


# What the fused epilogue saves for each element of a 16-bit result: forward a write and a read of h (4 bytes; 2 if h is
# saved anyway), backward a write and a read of g (4 bytes). At 4.3 TB/s and 790 TFLOP/s that is 0.9 ps, where the
# products take 2 k / 790 = 1.9 ps at k = 768. So our product is faster overall if it runs at 68% of the vendor's rate
# or more (81% if h is saved); at k = 384 51% (68%), at k = 1024 74% (85%).
CHOICES = (
    Choice("*", "fp32", "*", 0, 0, "vendor", "reasoned",
           "exact products run on the scalar units, where the vendor is ahead and one more pass costs little"),
    Choice("*", "*", "nt", 0, 0, "vendor", "reasoned", "nothing to fuse but a bias, which the vendor adds as well"),
    Choice("*", "*", "nn", 0, 0, "vendor", "reasoned", "nothing to fuse"),
    Choice("*", "*", "tn", 0, 0, "vendor", "reasoned", "nothing to fuse"),
    Choice("*", "*", "nt+act", 0, 0, "ours", "reasoned", "the epilogue saves a pass over h: see above"),
    Choice("*", "*", "nt+act only", 0, 0, "vendor epilogue", "reasoned",
           "no pass over h either, at the vendor's rate: our product is expected at 600 of its 790 TFLOP/s on sm_90"),
    Choice("*", "*", "nt+geglu", 0, 0, "ours", "reasoned", "the epilogue saves a pass over both halves of h"),
    Choice("*", "*", "nn+dact", 0, 0, "ours", "reasoned", "the epilogue saves a pass over g: see above"),
    Choice("*", "*", "nn+dgeglu", 0, 0, "ours", "reasoned", "the epilogue saves a pass over g"),
    Choice("*", "*", "tn+accumulate", 0, 0, "ours", "reasoned",
           "adds in its epilogue, where the vendor library reads and writes the sum once more"),
)  # fmt: skip


def choice(n: int, k: int, dtype: torch.dtype, arch: str, form: str) -> Choice:
    """The first row of CHOICES that fits this product."""
    return next(row for row in CHOICES if row.fits(arch, TRITON_TYPES[dtype], form, n, k))


# ---- tiles -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GemmConfig:
    """The launch of a product. With `vendor` the vendor library multiplies and a pointwise kernel of ours follows; the
    fields of our tile then have no effect."""

    block_m: int = 0
    block_n: int = 0  # with geglu the columns of each of the two halves
    block_k: int = 0
    num_warps: int = 4
    num_stages: int = 3
    slice_n: int = 32  # columns of the tile that the epilogue processes at a time
    bulk: bool = False  # operands by tensor descriptors (the bulk copy engine)
    flatten: bool = False  # one pipeline over all tiles of a program: the next tile is loaded during the epilogue
    programs_per_sm: int = 0  # size of the persistent grid; 0: one program per tile
    group_m: int = 8
    vendor: bool = False
    vendor_epilogue: bool = False  # with `vendor`: bias and activation in the vendor's own epilogue


VENDOR = GemmConfig(vendor=True)
VENDOR_EPILOGUE = GemmConfig(vendor=True, vendor_epilogue=True)

# Outside `batch_invariant()` the vendor library computes products of at most this many rows. Our tile has 128 rows, so
# 3,072 columns of BERT-base would give only 12 programs for 132 multiprocessors; the vendor splits the sum.
FEW_ROWS = 64

# Activations of the vendor's epilogue, and the dtypes in which they are accurate enough. Its GELU is the tanh form. As
# a replacement of GELU by erf it has an error of 1.7e-3 in bfloat16, where torch's (a rounded product, then GELU) is
# 2.6e-3. In float16 it would double the error of a product that is not rounded; in float32 it exceeds the budget.
VENDOR_ACTIVATIONS = {
    "gelu": (torch.bfloat16,),
    "gelu_tanh": (torch.bfloat16, torch.float16),
    "relu": (torch.bfloat16, torch.float16),
}

# Exact float32 products run on the scalar units, with operands in registers, so the tile is small.
FLOAT32 = GemmConfig(64, 64, 16, num_warps=4, num_stages=2, slice_n=32)
# For rows of 16-bit elements that are not a multiple of 16 bytes: these have no bulk or asynchronous copies. Elements
# are loaded one by one through registers, so a lane gets few of them.
UNALIGNED = GemmConfig(64, 64, 32, num_warps=8, num_stages=2, slice_n=32)

# (architecture, epilogue) -> [(least n, least k, config)]; the first entry that fits is used. None is measured on a GPU
# yet. For each cycle of matrix work the wide tile reads 48 bytes of operands from L2, the square tile 64. The square
# tile is better if the wide one would leave multiprocessors idle (few columns), or if the epilogue takes as long as the
# products (small k): then two programs share a multiprocessor, and one's epilogue runs beside the other's products.
_WGMMA = {
    "act": (
        (2048, 512, GemmConfig(128, 256, 64, 8, 4, slice_n=64, bulk=True, flatten=True, programs_per_sm=1)),
        (0, 0, GemmConfig(128, 128, 64, 4, 3, slice_n=32, bulk=True, flatten=True, programs_per_sm=2)),
    ),
    "geglu": (
        (2048, 512, GemmConfig(128, 128, 64, 8, 4, slice_n=32, bulk=True, flatten=True, programs_per_sm=1)),
        (0, 0, GemmConfig(128, 64, 64, 4, 3, slice_n=32, bulk=True, programs_per_sm=2)),
    ),
    "dact": (
        (2048, 512, GemmConfig(128, 256, 64, 8, 4, slice_n=32, bulk=True, flatten=True, programs_per_sm=1)),
        (0, 0, GemmConfig(128, 128, 64, 4, 3, slice_n=16, bulk=True, programs_per_sm=2)),
    ),
}
_MMA_SYNC = {
    "act": ((0, 0, GemmConfig(128, 128, 32, 4, 4, slice_n=32)),),
    "geglu": ((0, 0, GemmConfig(128, 64, 32, 4, 4, slice_n=32)),),
    "dact": ((0, 0, GemmConfig(128, 128, 32, 8, 4, slice_n=32)),),
}
_MMA_SYNC_BULK = {
    "act": ((0, 0, GemmConfig(128, 128, 32, 8, 3, slice_n=32, bulk=True, programs_per_sm=1)),),
    "geglu": ((0, 0, GemmConfig(128, 64, 32, 8, 3, slice_n=32, bulk=True, programs_per_sm=1)),),
    "dact": ((0, 0, GemmConfig(128, 128, 32, 8, 3, slice_n=32, bulk=True, programs_per_sm=1)),),
}
# No loop is flattened here: the compiler would unroll a flattened loop three times, to 15,000 instructions for geglu.
_TCGEN05 = {
    epilogue: tuple((n, k, replace(config, flatten=False, slice_n=min(config.slice_n, 32))) for n, k, config in rungs)
    for epilogue, rungs in _WGMMA.items()
}
_MFMA = {
    "act": ((0, 0, GemmConfig(128, 128, 64, 8, 2, slice_n=32)),),
    "geglu": ((0, 0, GemmConfig(128, 64, 64, 8, 2, slice_n=32)),),
    "dact": ((0, 0, GemmConfig(128, 128, 64, 8, 2, slice_n=32)),),
}
LADDERS = {"wgmma": _WGMMA, "tcgen05": _TCGEN05, "mfma": _MFMA, "mma.sync": _MMA_SYNC}


def ladder_of(arch: str) -> dict:
    """The list of tiles of every epilogue on this architecture."""
    unit = hardware(arch)
    return _MMA_SYNC_BULK if unit.matrix == "mma.sync" and unit.bulk_copy else LADDERS[unit.matrix]


@functools.cache
def gemm_config(
    n: int, k: int, dtype: torch.dtype, arch: str, layout: str = "nt", epilogue: str = "none", invariant: bool = False,
    few_rows: bool = False,
) -> GemmConfig:  # fmt: skip
    """The launch of op(A) op(B)^T; n, k as in the table above.

    epilogue: "none" (with or without bias), "act", "geglu" (two accumulators, n of each), "dact" and "dgeglu"
        (their backward), "accumulate" (onto a float32 matrix); "act only" (inference, see `VENDOR_ACTIVATIONS`).
    invariant: excludes the vendor library, which picks its kernel by M. (Layout "tn" sums over the batch in any case.)
    few_rows: M is at most FEW_ROWS; has no effect with `invariant`.
    """
    form = layout if epilogue == "none" else f"{layout}+{epilogue}"
    if layout == "tn" or not invariant:
        by = choice(n, k, dtype, arch, form).by
        if by == "vendor epilogue":
            return VENDOR_EPILOGUE
        if by == "vendor" or (few_rows and layout != "tn"):
            return VENDOR
    return own_config(n, k, dtype, arch, epilogue)


def own_config(n: int, k: int, dtype: torch.dtype, arch: str, epilogue: str = "none") -> GemmConfig:
    """The tile of our kernel, even if `CHOICES` prefers the vendor library."""
    if dtype == torch.float32:
        return FLOAT32
    rungs = ladder_of(arch)[
        {"none": "act", "act only": "act", "accumulate": "act", "dgeglu": "dact"}.get(epilogue, epilogue)
    ]
    config = next(config for least_n, least_k, config in rungs if n >= least_n and k >= least_k)
    return accumulating(config) if epilogue == "accumulate" else config


def accumulating(config: GemmConfig) -> GemmConfig:
    """The tile for accumulation: slices are thinner, because each is also read in float32, and there are enough warps
    to hold transposed operands."""
    return replace(config, slice_n=16, num_warps=config.num_warps if config.bulk else 8)
