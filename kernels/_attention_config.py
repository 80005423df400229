"""How attention's kernels are launched: a ladder over head_dim, dtype, architecture, and what a call asks for.

Each step says what it follows from: registers, shared memory and spills as the compiler reports them without a GPU
(`python -m benchmarks.compile_report`), and arithmetic. None of it has been measured on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

TILE = 128  # rows of one entry of a schedule; kernels with smaller blocks run several programs an entry
SHORT = 64  # a sequence up to this long, in q and k, is one block: its kernels need no loop
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class AttentionConfig:
    """How one kernel is launched. block_m counts query rows, block_n keys; both divide TILE."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # a lane's; given where the compiler takes more than it needs (NVIDIA only)

    @property
    def options(self) -> dict:
        """Further options of Triton's compiler."""
        return {} if self.max_registers is None else {"maxnreg": self.max_registers}


def attention_config(
    head_dim: int, dtype: torch.dtype, arch: str, direction: str, traits: frozenset[str] = frozenset()
) -> AttentionConfig | None:
    """The launch of one kernel, or None where the kernels with loops take its sequences too.

    direction: "fwd", "bwd_dq", "bwd_dkv" and "bwd_bias" have loops and take any length; "fwd_short" and "bwd_short"
        take sequences of at most SHORT tokens, "fwd_heads" and "bwd_heads" do so for packed plain scores, and
        "fwd_tile" and "bwd_tile" take those up to TILE.
    traits: what takes registers beside the products: "dropout"; "modified" scores (bias, mask, ALiBi, window,
        rotary); "grouped" heads.

    Depends on nothing that differs between the batches of one model, so a sequence's bits do not either.
    """
    if dtype == torch.float32:
        return _float32_config(head_dim, arch, direction)
    if arch.startswith("gfx") or (arch in ("sm_86", "sm_89", "sm_120") and head_dim > 64):
        return _small_shared_config(head_dim, direction, traits)
    if arch == "sm_80" and traits & {"modified", "grouped"}:
        return _sm_80_crowded_config(head_dim, direction, traits)
    return _config(head_dim, arch, direction, traits)


def _config(head_dim: int, arch: str, direction: str, traits: frozenset[str]) -> AttentionConfig | None:
    """16-bit types where a program may take over 160 KB of shared memory. Registers are those of sm_90 in bf16."""
    is_modified = "modified" in traits
    is_crowded = is_modified or arch == "sm_80"  # HMMA wants its operands in registers
    if direction == "fwd":
        # 128 rows share each load of k and v: 64 rows would ask L2 for 5 TB/s at 340 TFLOP/s. Eight warps rather than
        # four with twice the rows: 127 registers at head_dim 64, so two programs (four warp groups) fit a
        # multiprocessor and one's exp2, as long as its products there, runs under another's. Four warps: 239.
        # head_dim 128: 171 registers, one program; 128 keys would take 249, and any variant would spill.
        if arch == "sm_80" and head_dim > 128:
            return AttentionConfig(64, 64, num_warps=8, num_stages=1)
        # sm_100: three stages spill 5 registers at head_dim 64, two take 136 and none.
        stages = 2 if arch == "sm_100" and head_dim <= 64 else 3
        return AttentionConfig(128, 64 if head_dim <= 128 else 32, num_warps=8, num_stages=stages)
    if direction in ("fwd_short", "fwd_heads"):
        # latency decides, so many small programs: 79 registers and 24 KB at head_dim 64, six a multiprocessor;
        # 125 registers and four where any variant, padding or grouped heads can come ("short")
        return AttentionConfig(SHORT, SHORT, num_warps=4 if head_dim <= 128 else 8, num_stages=1)
    if direction == "fwd_tile":
        # keys of 128 tokens stay on chip, rows come in blocks. head_dim 64: 151 registers left alone, 128 and no
        # spill under a cap, 56 KB: four programs where the kernel with the loop has two. head_dim 128: two, it has one
        if head_dim > 128:
            return None  # 255 registers
        if arch == "sm_90":
            return AttentionConfig(64, TILE, num_warps=4, num_stages=2, max_registers=128 if head_dim <= 64 else None)
        if arch == "sm_100" or head_dim > 64:
            return AttentionConfig(64, TILE, num_warps=4 if head_dim <= 64 else 8, num_stages=2)
        return AttentionConfig(32, TILE, num_warps=4, num_stages=2)  # sm_80: 124 registers, 64 rows take 230
    if direction == "bwd_dq":
        # as forward: 128 registers and 80 KB at head_dim 64, two programs; with two stages it takes 150, and one fits
        if head_dim <= 64 or (head_dim <= 128 and not is_crowded):
            # sm_100 spills a few with modified scores at any number of stages: half the rows
            rows = 64 if arch == "sm_100" and is_modified else 128
            return AttentionConfig(rows, 64, num_warps=8, num_stages=3)
        # head_dim 256: 218 registers, 64 keys spill; 80 with rotary: 32 keys spill
        return AttentionConfig(64, 16 if is_modified else 32, num_warps=8, num_stages=2)
    if direction == "bwd_dkv":
        # two accumulators and two score tiles: 128 keys take over 200 registers at any number of warps, one program.
        # 64 keys by 64 rows take 196 left alone, but plain scores do with 168 without a spill, and three programs fit
        if head_dim <= 64 and "grouped" in traits and not is_modified:
            return AttentionConfig(64, 64, num_warps=8, num_stages=1)  # the loop over heads: 182, four warps spill
        if head_dim <= 64:
            most = 168 if not traits and arch == "sm_90" else None
            return AttentionConfig(32 if is_modified else 64, 64, num_warps=4, num_stages=2, max_registers=most)
        rows = 64 if head_dim <= 128 and not is_modified else 32  # 218 registers at 128, 250 at 256
        return AttentionConfig(rows, 64, num_warps=8, num_stages=2)
    if direction == "bwd_tile":
        # keys of 128 tokens stay on chip, rows come in blocks: 238 registers and 80 KB at head_dim 64, one program,
        # but 131 KB a head pass through memory where dq, dk and dv apart read and write 213. head_dim 128 spills
        if head_dim > 64:
            return None
        # One stage on sm_90: with two, Triton 3.7 copies the next rows of do over those that the product for dv, which
        # nothing has waited for, may still be reading
        if arch == "sm_90":
            return AttentionConfig(64, TILE, num_warps=8, num_stages=1)
        return AttentionConfig(*((32, TILE) if arch == "sm_80" else (64, TILE)), num_warps=8, num_stages=2)
    if direction == "bwd_heads":
        # 162 registers and 32 KB at head_dim 64, three programs; head_dim 256 and sm_100's dropout would spill
        if head_dim > 128:
            return None
        wide = head_dim > 64 or arch == "sm_80" or (arch == "sm_100" and "dropout" in traits)
        return AttentionConfig(SHORT, SHORT, num_warps=8 if wide else 4, num_stages=1)
    if direction == "bwd_short":
        # 135 registers and 33 KB at head_dim 64, three programs; head_dim 256 would spill, and so would all variants,
        # and rotary at 80
        if head_dim > 128 or traits >= {"modified", "dropout"} or (is_modified and head_dim > 64):
            return None
        return AttentionConfig(SHORT, SHORT, num_warps=4 if head_dim <= 64 and not is_crowded else 8, num_stages=1)
    return AttentionConfig(64, 64, num_warps=4 if head_dim <= 128 else 8, num_stages=1)  # bwd_bias


def _sm_80_crowded_config(head_dim: int, direction: str, traits: frozenset[str]) -> AttentionConfig | None:
    """16-bit types on sm_80 with modified scores or grouped heads: the largest tiles found that do not spill."""
    if "modified" not in traits:  # grouped alone: only dk and dv loop over heads
        if direction.endswith(("short", "heads", "tile")) and direction.startswith("bwd"):
            return None
        if direction == "bwd_dkv":
            return AttentionConfig(32 if head_dim <= 64 else 16, 64, num_warps=8, num_stages=1)
        return _config(head_dim, "sm_80", direction, traits - {"grouped"})
    if direction.endswith(("short", "heads", "tile")):
        return None
    if direction == "fwd":
        return AttentionConfig(*((128, 32) if head_dim <= 64 else (64, 64)), num_warps=8, num_stages=1)
    if direction == "bwd_dq":
        return AttentionConfig(32, 32, num_warps=8, num_stages=1)  # 232 registers with every variant at once
    if direction == "bwd_dkv" and head_dim > 64:
        return AttentionConfig(16, 16, num_warps=4, num_stages=1)
    return AttentionConfig(32 if direction == "bwd_dkv" else 64, 32, num_warps=8, num_stages=1)  # bwd_dkv, bwd_bias


def _small_shared_config(head_dim: int, direction: str, traits: frozenset[str]) -> AttentionConfig | None:
    """16-bit types with 64 to 100 KB of shared memory: fewer stages and narrower blocks, no kernels for short ones."""
    if direction.endswith("tile"):
        return None
    if direction.endswith(("short", "heads")):
        if head_dim > 64 or traits & {"modified", "grouped"}:
            return None
        return AttentionConfig(SHORT, SHORT, num_warps=4, num_stages=1)
    warps = 8 if "modified" in traits else 4  # every variant at once spills in four
    if head_dim > 64:
        block = 32 if head_dim <= 128 and not traits & {"modified", "grouped"} else 16
        return AttentionConfig(2 * block, block, num_warps=warps, num_stages=1)
    if direction == "fwd" and "modified" not in traits:
        return AttentionConfig(128, 32, num_warps=4, num_stages=1)  # gfx942: 64 keys spill, 32 take 123 registers
    if direction == "bwd_dkv":
        rows = 16 if traits >= {"modified", "dropout"} else 32 if traits else 64
        return AttentionConfig(rows, 32 if traits else 64, num_warps=warps, num_stages=1)
    if direction == "bwd_dq" and "modified" in traits:
        return AttentionConfig(32, 32, num_warps=warps, num_stages=1)
    return AttentionConfig(64, 32, num_warps=warps, num_stages=1)  # gfx942: dq with 64 keys spills, 32 take 119


def _float32_config(head_dim: int, arch: str, direction: str) -> AttentionConfig | None:
    """Exact products run outside the matrix units with operands in registers: the smallest blocks, to fit."""
    if direction.endswith(("short", "heads", "tile")):
        return None
    if head_dim <= 64:
        # four warps spill in the backward pass
        return AttentionConfig(64 if arch == "sm_80" and direction == "fwd" else 32, 32, num_warps=8, num_stages=1)
    if direction == "bwd_dkv" and head_dim > 128:
        return AttentionConfig(32, 16, num_warps=8, num_stages=1)  # with 16 rows sm_80 and sm_100 spill two or three
    block = 32 if arch == "sm_90" and direction == "fwd" and head_dim <= 128 else 16
    return AttentionConfig(block, block, num_warps=8, num_stages=1)
