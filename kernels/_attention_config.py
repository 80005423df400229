"""Launch parameters of attention's kernels, chosen by head_dim, dtype, architecture and the options of a call.

Comments give the reasons: registers of a lane, shared memory of a program and spilled registers, as the compiler
reports them without a GPU (`python -m benchmarks.inspection.compile_report`), and arithmetic. Nothing has been measured
on a GPU yet. "127 registers" means: this choice needs 127 registers a lane.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ._arch import KB, hardware

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
    max_registers: int | None = None  # cap for a lane, where the compiler would use more than needed (NVIDIA only)

    @property
    def options(self) -> dict:
        """Further options of Triton's compiler."""
        return {} if self.max_registers is None else {"maxnreg": self.max_registers}


def attention_config(
    head_dim: int, dtype: torch.dtype, arch: str, direction: str, traits: frozenset[str] = frozenset()
) -> AttentionConfig | None:
    """The launch parameters of one kernel, or None where the kernels with loops compute its sequences too.

    direction: "fwd", "bwd_dq", "bwd_dkv" and "bwd_bias" have loops and take any length; "fwd_short" and "bwd_short"
        take sequences of at most SHORT tokens, "fwd_heads" and "bwd_heads" do so for packed plain scores, and
        "fwd_tile" and "bwd_tile" take those up to TILE.
    traits: properties of a call that need registers beside the products: "dropout"; "modified" scores (bias, mask,
        ALiBi, window, rotary), and "many" with three or more of these; "grouped" heads.

    The result is the same for all batches of a model, so a sequence's bits do not depend on its batch.
    """
    unit = hardware(arch)
    if dtype == torch.float32:
        return _float32_config(head_dim, unit.matrix, direction, traits)
    if unit.matrix == "mfma":
        return _mfma_config(head_dim, direction, traits)
    if unit.matrix == "mma.sync":
        of_class = _mma_sync_crowded_config if traits & {"modified", "grouped"} else _mma_sync_config
        return of_class(head_dim, unit.shared, direction, traits)
    return _config(head_dim, unit.matrix, direction, traits)


def _config(head_dim: int, matrix: str, direction: str, traits: frozenset[str]) -> AttentionConfig | None:
    """16-bit types on matrix units with operands in shared memory ("wgmma", "tcgen05"). Registers: sm_90, bf16."""
    is_modified = "modified" in traits
    if direction == "fwd":
        # 128 rows share each load of k and v: 64 rows would ask L2 for 5 TB/s at 340 TFLOP/s. Eight warps rather than
        # four with twice the rows: 127 registers at head_dim 64, so two programs (four warp groups) fit a
        # multiprocessor and one's exp2, as long as its products there, runs under another's. Four warps: 239.
        # head_dim 128: 171 registers, one program; 128 keys would take 249, and any variant would spill.
        # tcgen05: three stages spill 5 registers at head_dim 64, two take 136 and none.
        stages = 2 if matrix == "tcgen05" and head_dim <= 64 else 3
        return AttentionConfig(128, 64 if head_dim <= 128 else 32, num_warps=8, num_stages=stages)
    if direction in ("fwd_short", "fwd_heads"):
        # latency decides, so many small programs: 79 registers and 24 KB at head_dim 64, six a multiprocessor;
        # 125 registers and four where any variant, padding or grouped heads can come ("short")
        return AttentionConfig(SHORT, SHORT, num_warps=4 if head_dim <= 128 else 8, num_stages=1)
    if direction == "fwd_tile":
        # the keys of 128 tokens stay on chip, rows come in blocks. head_dim 64: 151 registers without a cap, 128 with
        # it and no spill, 56 KB: four programs fit where the kernel with the loop has two. head_dim 128: two, not one
        if head_dim > 128:
            return None  # 255 registers
        if matrix == "wgmma":
            return AttentionConfig(64, TILE, num_warps=4, num_stages=2, max_registers=128 if head_dim <= 64 else None)
        return AttentionConfig(64, TILE, num_warps=4 if head_dim <= 64 else 8, num_stages=2)
    if direction == "bwd_dq":
        # as forward: 128 registers and 80 KB at head_dim 64, two programs; with two stages it takes 150, and one fits.
        # tcgen05: with more stages than one Triton 3.7 waits for the next k and v after the last proxy fence, and the
        # first two products read them (see the forward kernel); nothing between could carry a fence of our own
        if head_dim <= 64 or (head_dim <= 128 and not is_modified):
            # tcgen05 spills a few with modified scores at any number of stages, wgmma with many: half the rows
            rows = 64 if "many" in traits or (matrix == "tcgen05" and is_modified) else 128
            return AttentionConfig(rows, 64, num_warps=8, num_stages=1 if matrix == "tcgen05" else 3)
        # head_dim 256: 218 registers, 64 keys spill; 80 with rotary: 32 keys spill
        return AttentionConfig(64, 16 if is_modified else 32, num_warps=8, num_stages=1 if matrix == "tcgen05" else 2)
    if direction == "bwd_dkv":
        # two accumulators and two score tiles: 128 keys take over 200 registers at any number of warps, one program.
        # 64 keys by 64 rows take 196 without a cap; with a cap of 168 plain scores do not spill, and three programs fit
        if head_dim <= 64 and "grouped" in traits and not is_modified:
            return AttentionConfig(64, 64, num_warps=8, num_stages=1)  # the loop over heads: 182, four warps spill
        if head_dim <= 64 and "many" in traits:
            return AttentionConfig(32, 64, num_warps=8, num_stages=1)  # 234 registers on wgmma; four warps spill
        if head_dim <= 64:
            most = 168 if not traits and matrix == "wgmma" else None
            return AttentionConfig(32 if is_modified else 64, 64, num_warps=4, num_stages=2, max_registers=most)
        rows = 64 if head_dim <= 128 and not is_modified else 32  # 218 registers at 128, 250 at 256
        return AttentionConfig(rows, 64, num_warps=8, num_stages=2)
    if direction == "bwd_tile":
        # the keys of 128 tokens stay on chip, rows come in blocks: 216 registers and 80 KB at head_dim 64, one program.
        # It moves 131 KB for each head; separate kernels for dq and for dk, dv move 213 KB. head_dim 128 spills
        if head_dim > 64:
            return None
        # One stage on wgmma: with two, Triton 3.7 copies the next rows of do over rows that the product for dv may
        # still be reading, without waiting for that product
        return AttentionConfig(64, TILE, num_warps=8, num_stages=1 if matrix == "wgmma" else 2)
    if direction == "bwd_heads":
        # 138 registers and 40 KB at head_dim 64, three programs. head_dim 32: 139 registers, a cap of 128 spills ten.
        # head_dim 256 would spill. tcgen05 with dropout: head_dim 32 takes 246 in four warps, 64 would spill. Eight
        # warps would share lanes of tensor memory: there Triton 3.7 has no barrier between one warp's load of a result
        # and another warp's store of the zeros from which the next product starts
        if head_dim > 128 or (matrix == "tcgen05" and "dropout" in traits and head_dim > 32):
            return None
        return AttentionConfig(SHORT, SHORT, num_warps=8 if head_dim > 64 else 4, num_stages=1)
    if direction == "bwd_short":
        # 135 registers and 33 KB at head_dim 64, three programs; head_dim 256 would spill, and so would all variants,
        # and rotary at 80
        if head_dim > 128 or traits >= {"modified", "dropout"} or (is_modified and head_dim > 64):
            return None
        return AttentionConfig(SHORT, SHORT, num_warps=4 if head_dim <= 64 and not is_modified else 8, num_stages=1)
    # bwd_bias
    if "many" in traits:
        return AttentionConfig(64, 32, num_warps=8, num_stages=1)  # 238 registers; 64 keys in four warps spill
    return AttentionConfig(64, 64, num_warps=4 if head_dim <= 128 else 8, num_stages=1)


def _mma_sync_config(head_dim: int, shared: int, direction: str, traits: frozenset[str]) -> AttentionConfig | None:
    """16-bit types on "mma.sync", plain scores: as above, but operands take registers too. Registers: sm_80, bf16.

    shared: bytes of shared memory. Most of these cards have 99 KB, which is too little for two of the choices.
    """
    if direction == "fwd":
        if head_dim > 128:
            return AttentionConfig(64, 64, num_warps=8, num_stages=1)
        # head_dim 32: 64 keys take 128 registers and spill two to four, 32 keys take 103
        return AttentionConfig(128, 64 if head_dim > 32 else 32, num_warps=8, num_stages=3)
    if direction in ("fwd_short", "fwd_heads"):
        return AttentionConfig(SHORT, SHORT, num_warps=4 if head_dim <= 128 else 8, num_stages=1)
    if direction == "fwd_tile":
        if head_dim > 128:
            return None
        # head_dim 64: 124 registers, 64 rows take 230
        rows, warps = (32, 4) if head_dim <= 64 else (64, 8)
        return AttentionConfig(rows, TILE, num_warps=warps, num_stages=2)
    if direction == "bwd_dq":
        if head_dim <= 64:
            return AttentionConfig(128, 64, num_warps=8, num_stages=3)
        # head_dim 256: 96 KB in one stage, 100 in two
        stages = 2 if head_dim <= 128 or shared > 100 * KB else 1
        return AttentionConfig(64, 32, num_warps=8, num_stages=stages)
    if direction == "bwd_dkv":
        if head_dim <= 64:
            return AttentionConfig(64, 64, num_warps=4, num_stages=2)
        if head_dim <= 128:
            return AttentionConfig(64, 64, num_warps=8, num_stages=2)
        # 64 keys take 100 KB and 248 registers, 32 take 66 KB and 135
        return AttentionConfig(32, 64 if shared > 100 * KB else 32, num_warps=8, num_stages=2)
    if direction == "bwd_tile":
        return AttentionConfig(32, TILE, num_warps=8, num_stages=2) if head_dim <= 64 else None
    # bwd_heads and bwd_short: 255 registers, of which sm_120 spills some at head_dim 128, sm_80 at 64 with dropout
    if head_dim > 64 or (head_dim > 32 and "dropout" in traits):
        return None
    return AttentionConfig(SHORT, SHORT, num_warps=4 if head_dim <= 32 else 8, num_stages=1)


def _mma_sync_crowded_config(
    head_dim: int, shared: int, direction: str, traits: frozenset[str]
) -> AttentionConfig | None:
    """`_mma_sync_config` with modified scores or grouped heads: the largest tiles found that do not spill."""
    if "modified" not in traits:  # grouped alone: only dk and dv loop over heads
        if direction.endswith(("short", "heads", "tile")) and direction.startswith("bwd"):
            return None
        if direction == "bwd_dkv":
            return AttentionConfig(32 if head_dim <= 64 else 16, 64, num_warps=8, num_stages=1)
        if direction == "fwd_short" and head_dim <= 64:
            return AttentionConfig(
                SHORT, SHORT, num_warps=4, num_stages=2
            )  # sm_80: 158 registers; 168 and 2 spills in one
        return _mma_sync_config(head_dim, shared, direction, traits)
    if direction.endswith(("short", "heads", "tile")):
        return None
    if direction == "fwd" and "many" in traits:
        return AttentionConfig(64, 16, num_warps=8, num_stages=1)  # sm_120: 244 registers, 32 keys spill
    if direction == "fwd":
        # 242 registers if a lane loads bias or mask element by element (rows that do not begin at multiples of 16
        # bytes). 128 rows would take 170 on sm_120 if a lane loads 16 bytes at once, but spill 11 otherwise
        return AttentionConfig(64, 32 if head_dim <= 64 else 64, num_warps=8, num_stages=1)
    if direction == "bwd_bias" and "many" in traits:
        return AttentionConfig(16, 32, num_warps=8, num_stages=1)  # sm_120: 190 registers, 32 rows spill
    if direction == "bwd_dq":
        # 232 registers with every variant at once; head_dim 80 with rotary on sm_120: 240 for 16 rows, 32 spill
        return AttentionConfig(32 if head_dim <= 64 else 16, 32, num_warps=8, num_stages=1)
    if direction == "bwd_dkv" and head_dim > 64:
        return AttentionConfig(16, 16, num_warps=4, num_stages=1)
    return AttentionConfig(32 if direction == "bwd_dkv" else 64, 32, num_warps=8, num_stages=1)  # bwd_dkv, bwd_bias


def _mfma_config(head_dim: int, direction: str, traits: frozenset[str]) -> AttentionConfig | None:
    """16-bit types on AMD's CDNA, with 64 KB of shared memory: one stage, narrow blocks, few kernels of one block."""
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
        return AttentionConfig(128, 32, num_warps=4, num_stages=1)  # 64 keys spill, 32 take 123 registers
    if direction == "bwd_dkv":
        rows = 16 if traits >= {"modified", "dropout"} else 32 if traits else 64
        return AttentionConfig(rows, 32 if traits else 64, num_warps=warps, num_stages=1)
    if direction == "bwd_dq" and "modified" in traits:
        return AttentionConfig(32, 32, num_warps=warps, num_stages=1)
    return AttentionConfig(64, 32, num_warps=warps, num_stages=1)  # dq with 64 keys spills, 32 take 119


def _float32_config(head_dim: int, matrix: str, direction: str, traits: frozenset[str]) -> AttentionConfig | None:
    """Exact float32 products use no matrix units and keep operands in registers, so blocks are the smallest."""
    if direction.endswith(("short", "heads", "tile")):
        return None
    if head_dim <= 64 and "many" in traits:
        # half the rows and keys in the backward pass: 32 of each spill up to 38
        return AttentionConfig(*((32, 32) if direction == "fwd" else (16, 16)), num_warps=8, num_stages=1)
    if head_dim <= 64:
        # four warps spill in the backward pass
        return AttentionConfig(64 if matrix == "mma.sync" and direction == "fwd" else 32, 32, num_warps=8, num_stages=1)
    if direction == "bwd_dq" and head_dim > 128:
        return AttentionConfig(16, 32, num_warps=8, num_stages=1)  # 16 keys spill four on sm_120, 32 take 110 registers
    if direction == "bwd_dkv" and head_dim > 128:
        return AttentionConfig(32, 16, num_warps=8, num_stages=1)  # with 16 rows sm_80 and sm_100 spill two or three
    if direction == "fwd" and head_dim <= 128 and matrix in ("wgmma", "mma.sync"):
        # mma.sync: 16 rows spill two on sm_89
        return AttentionConfig(32, 32 if matrix == "wgmma" else 16, num_warps=8, num_stages=1)
    return AttentionConfig(16, 16, num_warps=8, num_stages=1)
