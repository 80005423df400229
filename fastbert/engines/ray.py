"""Units by Ray: an actor with a model in each of several processes, on as many machines as Ray has.

    import ray
    from fastbert.engines.ray import encode

    ray.init()
    encode(["in"], Job("/shared/out", {"id_or_path": folder}), actors=8, num_gpus=0.5)

Every machine must reach the inputs and the folder by the same paths or URLs. For a `ray.data.Dataset` there is
`fastbert.engines.batches.BatchEncoder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..corpus.job import Job
from ..corpus.units import Unit


class UnitActor:
    """Makes one part after another."""

    def __init__(self, job: Job):
        from ..corpus.run import CorpusEncoder

        self.encoder = CorpusEncoder(job)

    def encode(self, unit: Unit) -> Any:
        """The outcome of a unit."""
        (outcome,) = self.encoder.encode([unit])
        return outcome


def encode(inputs: Sequence[str], job: Job, *, actors: int, **resources: Any) -> list[dict[str, Any]]:
    """Makes what is missing; the receipts of that, as the parts were finished.

    Args:
        actors: how many.
        resources: of each, as `ray.remote` has them: num_cpus, num_gpus (also a part of one), resources, ...

    Raises: InputError with the first unit that failed, after the others.
    """
    import ray
    from ray.util import ActorPool

    from ..corpus.manifest import Manifest
    from ..corpus.run import expect_done
    from ..corpus.units import plan

    job, units = plan(inputs, job)
    missing = Manifest(job.out).missing(units)
    actor = ray.remote(**{"num_cpus": 1, **resources})(UnitActor)
    pool = ActorPool([actor.remote(job) for _ in range(min(actors, len(missing)))])
    return expect_done(pool.map_unordered(lambda worker, unit: worker.encode.remote(unit), missing))
