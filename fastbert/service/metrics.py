"""Counts and times under text-embeddings-inference's names, for Prometheus."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, chain

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
# Bounds of the histograms of seconds: powers of two times half a millisecond, up to two minutes.
SECONDS = tuple(0.0005 * 2**n for n in range(19))
TOKENS = tuple(2**n for n in range(3, 18))
PIECES = tuple(2**n for n in range(0, 13))

_TIMES = {
    "duration": "seconds from the request to its answer",
    "tokenization_duration": "seconds of tokenisation",
    "queue_duration": "seconds in the queue",
    "inference_duration": "seconds from the first batch with a piece of the request to the last",
}
OF_TEXTS = ("te_embed", "te_predict")


class Histogram:
    """Counts of numbers by size, and their sum.

    Args:
        bounds: in ascending order; of each, the numbers up to it are counted.
    """

    def __init__(self, name: str, text: str, bounds: Sequence[float]):
        self.name, self.text, self.bounds = name, text, bounds
        self._lock = threading.Lock()
        self._counts, self._sum = [0] * (len(bounds) + 1), 0.0

    def observe(self, number: float, times: int = 1) -> None:
        with self._lock:
            self._counts[bisect_left(self.bounds, number)] += times
            self._sum += number * times

    def observe_each(self, numbers: Iterable[float]) -> None:
        with self._lock:
            for number in numbers:
                self._counts[bisect_left(self.bounds, number)] += 1
                self._sum += number

    def metric(self) -> HistogramMetricFamily:
        with self._lock:
            counts, total = list(accumulate(self._counts)), self._sum
        bounds = (floatToGoString(bound) for bound in (*self.bounds, float("inf")))
        return HistogramMetricFamily(self.name, self.text, list(zip(bounds, counts, strict=True)), total)


class Metrics:
    """The metrics of one server.

    queued: returns the numbers of waiting (requests, tokens).
    """

    def __init__(self, queued: Callable[[], tuple[int, int]]):
        self.queued = queued
        self.registry = CollectorRegistry()
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()
        self._times = {
            of: [Histogram(f"{of}_{name}", text + more, SECONDS) for name, text in _TIMES.items()]
            for of, more in (("te_request", ""), *((of, ", for each text") for of in OF_TEXTS))
        }
        self.input_length = Histogram("te_request_input_length", "tokens of a text", TOKENS)
        self.batch_size = Histogram("te_batch_next_size", "pieces of a batch", PIECES)
        self.batch_tokens = Histogram("te_batch_next_tokens", "tokens of a batch", TOKENS)
        self.registry.register(self)

    def count(self, name: str, by: int = 1, **labels: str) -> None:
        with self._lock:
            self._counts[name, tuple(sorted(labels.items()))] += by

    def counted(self, name: str) -> int:
        """The sum over all labels."""
        with self._lock:
            return sum(n for (of, _), n in self._counts.items() if of == name)

    def time(self, of: str, seconds: Sequence[float], times: int = 1) -> None:
        """Counts (whole duration, tokenisation, queue, inference). of: "te_request", or one of OF_TEXTS."""
        for histogram, number in zip(self._times[of], seconds, strict=True):
            histogram.observe(number, times)

    def on_batch(self, pieces: int, tokens: int) -> None:
        self.batch_size.observe(pieces)
        self.batch_tokens.observe(tokens)

    def collect(self) -> Iterator[Metric]:
        """The metrics, for the registry. Counters are untyped, because the library appends _total to typed ones."""
        with self._lock:
            counts = sorted(self._counts.items())
        by_name: dict[str, Metric] = {}
        for (name, labels), number in counts:
            metric = by_name.setdefault(name, Metric(name, "count", "unknown"))
            metric.add_sample(name, dict(labels), number)
        yield from by_name.values()
        of_times = chain.from_iterable(self._times.values())
        for histogram in (*of_times, self.input_length, self.batch_size, self.batch_tokens):
            yield histogram.metric()
        requests, tokens = self.queued()
        yield GaugeMetricFamily("te_queue_size", "requests that wait", value=requests)
        yield GaugeMetricFamily("te_queue_tokens", "tokens that wait", value=tokens)

    def text(self) -> bytes:
        return generate_latest(self.registry)
