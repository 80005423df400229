"""Counts and times under text-embeddings-inference's names, for Prometheus."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
# Bounds of the histograms of seconds: powers of two times half a millisecond, up to two minutes.
SECONDS = tuple(0.0005 * 2**n for n in range(19))
TOKENS = tuple(2**n for n in range(3, 18))
PIECES = tuple(2**n for n in range(0, 13))

_TIMES = {
    "te_request_duration": "seconds from the request to its answer",
    "te_request_tokenization_duration": "seconds of tokenisation",
    "te_request_queue_duration": "seconds in the queue",
    "te_request_inference_duration": "seconds from the first batch with a piece of the request to the last",
}


class Metrics:
    """The metrics of one server.

    queued: returns the numbers of waiting (requests, tokens).
    """

    def __init__(self, queued: Callable[[], tuple[int, int]]):
        self.queued = queued
        self.registry = CollectorRegistry()
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()
        self.times = {
            name: Histogram(name, text, registry=self.registry, buckets=SECONDS) for name, text in _TIMES.items()
        }
        self.input_length = Histogram(
            "te_request_input_length", "tokens of a text", registry=self.registry, buckets=TOKENS
        )
        self.batch_size = Histogram("te_batch_next_size", "pieces of a batch", registry=self.registry, buckets=PIECES)
        self.batch_tokens = Histogram(
            "te_batch_next_tokens", "tokens of a batch", registry=self.registry, buckets=TOKENS
        )
        self.registry.register(self)

    def count(self, name: str, by: int = 1, **labels: str) -> None:
        with self._lock:
            self._counts[name, tuple(sorted(labels.items()))] += by

    def counted(self, name: str) -> int:
        """The sum over all labels."""
        with self._lock:
            return sum(n for (of, _), n in self._counts.items() if of == name)

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
        requests, tokens = self.queued()
        yield GaugeMetricFamily("te_queue_size", "requests that wait", value=requests)
        yield GaugeMetricFamily("te_queue_tokens", "tokens that wait", value=tokens)

    def text(self) -> bytes:
        return generate_latest(self.registry)
