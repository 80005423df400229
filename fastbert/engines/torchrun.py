"""Units by torchrun: of N processes each makes every N-th unit, on its own GPU. Nothing passes between them.

    torchrun --nproc-per-node 2 -m fastbert encode IN... --out-dir DIR
    torchrun --nproc-per-node 2 program.py        # which calls encode(["in"], Job("out", {"id_or_path": folder}))

A process that is killed leaves its units to the next run, on any number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..corpus.job import Job
from ..corpus.units import Unit
from ..encoding.ranks import Ranks


def share_of(ranks: Ranks, job: Job, units: Sequence[Unit]) -> tuple[Job, list[Unit]]:
    """(the job on this process's device, this process's units). `units` are all, so that all processes agree."""
    device = ranks.device(str(job.encoder.get("device", "auto")))
    return replace(job, encoder={**job.encoder, "device": device}), ranks.share(units)


def encode(inputs: Sequence[str], job: Job) -> list[dict[str, Any]]:
    """Makes what is missing of this process's share; the receipts of that.

    Raises: InputError with the first unit that failed, after the others.
    """
    from ..corpus.manifest import Manifest
    from ..corpus.run import CorpusEncoder, expect_done
    from ..corpus.units import plan

    job, units = plan(inputs, job)
    missing = set(Manifest(job.out).missing(units))
    job, own = share_of(Ranks.from_environment(), job, units)
    return expect_done(CorpusEncoder(job).encode([unit for unit in own if unit in missing]))
