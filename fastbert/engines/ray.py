"""Units by Ray: an actor with a model in each of several processes, on as many machines as Ray has.

    import ray
    from fastbert.engines.ray import encode

    ray.init()
    encode(["in"], Job("/shared/out", {"id_or_path": folder}), actors=8, num_gpus=0.5)

Every machine must reach the inputs and the folder by the same paths or URLs. For a `ray.data.Dataset` there is
`fastbert.engines.batches.BatchEncoder`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..corpus.job import Job
from ..corpus.units import Unit, largest_first, plan


class UnitQueue:
    """An actor that gives each unit to the next worker that asks."""

    def __init__(self, units: Sequence[Unit]):
        self.units = iter(units)

    def take(self) -> Unit | None:
        """The next unit; None if there are no more."""
        return next(self.units, None)


class UnitActor:
    """Makes one part after another, until there are no more units."""

    def __init__(self, job: Job):
        from ..corpus.run import CorpusEncoder
        from ..encoding.workers import limit_tokenizer_threads

        limit_tokenizer_threads()
        self.encoder = CorpusEncoder(job)

    def encode(self, queue: Any) -> list[Any]:
        """The outcomes of the units that this actor took. A unit is taken, read and tokenised while the one before it
        is computed."""

        def units() -> Iterator[Unit]:
            import ray

            while (unit := ray.get(queue.take.remote())) is not None:
                yield unit

        return list(self.encoder.encode(units()))


def encode(inputs: Sequence[str], job: Job, *, actors: int, **resources: Any) -> list[dict[str, Any]]:
    """Makes what is missing; the receipts of that.

    Args:
        actors: how many. There should not be more than Ray can run at once, because the call waits for all of them.
        resources: of each, as `ray.remote` has them: num_cpus, num_gpus (also a part of one), resources, ...

    Raises: InputError with the first unit that failed, after the others; ValueError without an actor.
    """
    if actors < 1:
        raise ValueError(f"actors must be at least 1, got {actors}")
    import ray

    from ..corpus.manifest import Manifest
    from ..corpus.run import expect_done

    job, units = plan(inputs, job)
    missing = largest_first(Manifest(job.out).missing(units), units)
    queue = ray.remote(num_cpus=0)(UnitQueue).remote(missing)
    actor = ray.remote(**{"num_cpus": 1, **resources})(UnitActor)
    workers = [actor.remote(job) for _ in range(min(actors, len(missing)))]
    outcomes = ray.get([worker.encode.remote(queue) for worker in workers])
    return expect_done(outcome for of_worker in outcomes for outcome in of_worker)
