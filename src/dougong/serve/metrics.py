"""What the server counts, for Prometheus.

Here        Metrics.
Elsewhere   what happens (app.py, engine.py); a board that shows it (deploy/grafana.json).
Promise     labels are names of models, versions, modalities, routes and statuses, never anything that a caller wrote:
            nobody can make the page grow.

Counted in plain numbers, and made into Prometheus' own when somebody looks: its counters lock at every request.
"""

from __future__ import annotations

import json
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from dougong.serve.engine import BatchDone
    from dougong.serve.models import Models, Version

SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SAMPLED_SECONDS: Final = 0.02
"""Between two answers whose gate weights are looked at: reading them costs more than counting."""

OF_VERSION: Final = ("model", "version")
Labels = tuple[str, ...]


class _Spread:
    """Values by bucket."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def note(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Metrics:
    """All counters of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._models: Models | None = None
        self._started = time.time()
        self._requests: dict[tuple[str, int], int] = defaultdict(int)
        self._latency: dict[Labels, _Spread] = defaultdict(lambda: _Spread(SECONDS))
        self._size: dict[Labels, _Spread] = defaultdict(lambda: _Spread(SIZES))
        self._service: dict[Labels, _Spread] = defaultdict(lambda: _Spread(SECONDS))
        self._wait: dict[Labels, _Spread] = defaultdict(lambda: _Spread(SECONDS))
        self._carried: dict[Labels, int] = defaultdict(int)
        self._failed: dict[Labels, int] = defaultdict(int)
        self._refused: dict[Labels, int] = defaultdict(int)
        self._shadow: dict[Labels, int] = defaultdict(int)
        self._gate: dict[Labels, _Spread] = defaultdict(lambda: _Spread(()))
        self._gate_at: dict[Labels, float] = {}
        self._quality: dict[Labels, _Spread] = defaultdict(lambda: _Spread(()))
        self._registry.register(_Now(self))

    def watch(self, models: Models) -> None:
        """Show queues as they are whenever somebody looks."""
        self._models = models

    def request(self, route: str, status: int, seconds: float) -> None:
        """A request was answered, in whatever way."""
        self._requests[route, status] += 1
        self._latency[(route,)].note(seconds)

    def refused(self, reason: str) -> None:
        """A request was not taken."""
        self._refused[(reason,)] += 1

    def shadow(self, version: Version, alike: bool) -> None:
        """A shadow has answered: as the version that was asked did, or otherwise."""
        self._shadow[version.name, version.version, str(alike).lower()] += 1

    def batch(self, version: Version, done: BatchDone) -> None:
        """A batch came back."""
        name, number = of = version.name, version.version
        self._size[of].note(done.size)
        self._service[of].note(done.seconds)
        note = self._wait[of].note
        for seconds in done.waited_seconds:
            note(seconds)
        for shape, count in done.shapes.items():
            for modality in shape.carries:
                self._carried[name, number, modality] += count
        for outcome in done.outcomes:
            if outcome.status != 200:
                self._failed[name, number, str(outcome.status)] += 1
        now = time.monotonic()
        outcome = done.outcomes[0]
        if now - self._gate_at.get(of, 0.0) > SAMPLED_SECONDS and outcome.status == 200:
            self._gate_at[of] = now
            for modality, weight in json.loads(outcome.body).get("gate", {}).items():
                self._gate[name, number, modality].note(weight)
        for figure, value in done.quality.items():
            self._quality[name, number, figure].note(value)

    def page(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """Families of what was counted, and of how it is now."""
        of = OF_VERSION
        requests: dict[Labels, int] = {(route, str(status)): count for (route, status), count in self._requests.items()}
        yield _counter("dougong_requests", "Requests by route and status.", ("route", "status"), requests)
        yield _histogram("dougong_request_seconds", "From headers to answer.", ("route",), self._latency)
        yield _histogram("dougong_batch_records", "Records of a batch.", of, self._size)
        yield _histogram("dougong_batch_seconds", "What a batch took its worker.", of, self._service)
        yield _histogram("dougong_wait_seconds", "What records waited for their batch.", of, self._wait)
        yield _counter("dougong_modality_records", "Records with it.", (*of, "modality"), self._carried)
        yield _counter("dougong_records_failed", "Records without an answer.", (*of, "status"), self._failed)
        yield _counter("dougong_refused", "Requests not taken.", ("reason",), self._refused)
        yield _counter("dougong_shadow", "Answers of a shadow.", (*of, "alike"), self._shadow)
        yield _summary("dougong_gate_weight", "How much it counted.", (*of, "modality"), self._gate)
        quality = "How good media are as recordings of anything."
        yield _summary("dougong_input_quality", quality, (*of, "figure"), self._quality)
        started = GaugeMetricFamily("dougong_started_seconds", "When the server started.", value=self._started)
        yield started
        yield from self._now()

    def _now(self) -> Iterable[Metric]:
        waiting = GaugeMetricFamily("dougong_queue_records", "Records that wait.", labels=OF_VERSION)
        running = GaugeMetricFamily("dougong_running_batches", "Batches at workers.", labels=OF_VERSION)
        ready = GaugeMetricFamily("dougong_ready", "Whether a worker is warm.", labels=OF_VERSION)
        wait = GaugeMetricFamily("dougong_rule_wait_seconds", "How long a batch waits to fill.", labels=OF_VERSION)
        fixed = GaugeMetricFamily("dougong_fitted_fixed_seconds", "A batch beyond its records.", labels=OF_VERSION)
        for version in self._models.all if self._models is not None else ():
            batcher, of = version.engine.batcher, (version.name, version.version)
            waiting.add_metric(of, len(batcher))
            running.add_metric(of, batcher.num_running)
            ready.add_metric(of, float(version.engine.ready))
            wait.add_metric(of, batcher.hindsight.rule.wait_seconds)
            fixed.add_metric(of, batcher.service.fixed_seconds)
        return [waiting, running, ready, wait, fixed]


class _Now(Collector):
    """What the registry asks."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics.collect()

    def describe(self) -> Iterable[Metric]:
        return []


def _counter(name: str, about: str, labels: Labels, counts: dict[Labels, int]) -> Metric:
    family = CounterMetricFamily(name, about, labels=labels)
    for key, count in counts.items():
        family.add_metric(key, count)
    return family


def _summary(name: str, about: str, labels: Labels, spreads: dict[Labels, _Spread]) -> Metric:
    family = SummaryMetricFamily(name, about, labels=labels)
    for key, spread in spreads.items():
        family.add_metric(key, count_value=sum(spread.counts), sum_value=spread.total)
    return family


def _histogram(name: str, about: str, labels: Labels, spreads: dict[Labels, _Spread]) -> Metric:
    family = HistogramMetricFamily(name, about, labels=labels)
    for key, spread in spreads.items():
        below, buckets = 0, []
        for bound, count in zip((*map(str, map(float, spread.bounds)), "+Inf"), spread.counts, strict=True):
            below += count
            buckets.append((bound, below))
        family.add_metric(key, buckets=buckets, sum_value=spread.total)
    return family
